"""A study: where in a model a behaviour lives, and how sure that is. A sweep that is chosen by a budget, and what follows from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from patchlab.engine import Program, run
from patchlab.errors import MethodError, RuleError, SweepError
from patchlab.host import precise, to_array
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.names import scoring_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.verified.patcher import Patcher
from patchlab.models import Model
from patchlab.progress import duration, progress_bar
from patchlab.scores import ScoreMap
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.sweeps.driver import run_sweep
from patchlab.sweeps.executors.local import Local
from patchlab.sweeps.plan import estimate
from patchlab.sweeps.results import Sweep
from patchlab.sweeps.spec import CircuitSpec, ModelSpec, RunSpec, ScoreSpec, TaskSpec, VerifySpec
from patchlab.tasks.task import Task

BUDGET = 600.0
"""Seconds that a study may take, about."""
HEADS, PLACES = "z", ("resid_pre", "attn_out", "mlp_out")
SCREENS = ("relp", "atp")
"""What says where to look: the first that this model allows (rules do not cover every kind of module)."""
ESTIMATES = ("relp", "atp", "ig:5")
CANDIDATES = 10
"""Heads that are chosen on one half of the pairs and measured on the other."""
SHARE = 0.05
"""A head is found if its effect is at least this share of the gap between the two prompts."""
CONFIDENCE = 0.95
DRAWS = 10_000
FOUND, SPREAD, NOT_FOUND = "found", "spread", "not found"
_FOLDER = "runs"


@dataclass(frozen=True)
class Decision:
    """What was decided about one question of the study, and why: ``exact`` or ``screened`` or ``left out``."""

    what: str
    how: str
    seconds: float | None
    why: str


@dataclass(frozen=True, eq=False)
class Study:
    """The result of :func:`study`.

    Args:
        verdict: ``found`` (heads that carry the behaviour), ``spread`` (the model does it, and no head by itself matters much), or ``not found``
            (the model does not do it, so there is nothing to look for).
        model: the model.
        task: all pairs; ``choosing`` and ``measuring`` are the halves.
        solved: what the model makes of the measuring half: ``accuracy`` on clean prompts, ``gap`` with its interval ``gap_lo``, ``gap_hi``,
            ``metric_clean`` and ``metric_corrupted``.
        heads: a row per candidate, by falling effect where it was measured: ``address``, ``layer``, ``head``, ``chosen`` (its effect or score on the
            choosing half), ``effect`` with ``lo`` and ``hi`` (exact, on the measuring half, together certain with 95 %), ``share`` of the gap,
            ``found``.
        together: all heads that support the behaviour patched at once, on the measuring half: how many ``heads``, ``effect``, ``lo``, ``hi`` and
            ``share``, ``share_lo``, ``share_hi``.
        screen: the method that estimates every component.
        patterns: mean attention of each found head on the clean prompts of the measuring half, ``[dest, src]``, by address; empty where the prompts
            do not line up.
        methods: per method and candidate its place among all heads on the choosing half.
        decisions: what was computed exactly and what was not.
        sweep: the runs behind it.
        keys: the runs by what they are for, such as ``exact z``.
        notes: what a reader should know.
    """

    verdict: str
    model: Model
    task: Task
    choosing: Task
    measuring: Task
    solved: dict[str, float]
    heads: pd.DataFrame
    together: dict[str, float]
    screen: str
    patterns: dict[str, Float[np.ndarray, "dest src"]]
    methods: pd.DataFrame
    decisions: tuple[Decision, ...]
    sweep: Sweep = field(repr=False)
    keys: dict[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> list[str]:
        """The addresses of the heads that carry the behaviour, the most important first."""
        return _addresses(self.heads, 1)

    @property
    def opposing(self) -> list[str]:
        """The addresses of the heads that work against it."""
        return _addresses(self.heads, -1)

    def scores(self, what: str) -> ScoreMap | None:
        """The scores of a run such as ``relp z``; None if there was none."""
        return self.sweep.scores(self.keys[what]) if what in self.keys else None

    def __repr__(self) -> str:
        return f"Study({self.model.name} × {self.task.name}[{len(self.task)}]: {self.verdict}{': ' if self.found else ''}{', '.join(self.found)})"


def study(
    model: ModelSpec,
    task: TaskSpec,
    out: str | Path,
    *,
    budget: float | int = BUDGET,
    batch_size: int = 32,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = True,
) -> Study:
    """Find out which heads and edges of a model carry a behaviour, within a budget, and measure on other pairs what they do.

    Everything is chosen on one half of the pairs and measured on the other. RelP scores every component (AtP where no rules
    cover the model); exact patching replaces it, cheapest
    question first, as far as the budget allows; heads that cannot all be patched are searched for and verified. The runs are kept in ``out/runs`` and
    a study that was interrupted goes on.

    Args:
        model: the model.
        task: at least 16 pairs; the direction is denoising.
        out: folder.
        budget: seconds, about: what is predicted to take longer is left out, and said.
        batch_size: examples per batch.
        say: told, in a line, what is going on.
        progress: show the progress over runs on stderr.

    Raises:
        SweepError: too few pairs, or a budget of none.
        PatchlabError: what the model or the task refuses.
    """
    if not budget > 0:
        raise SweepError(f"the budget is {budget} seconds; give some time, such as --budget 10m.")
    if task.half is not None or (task.n is not None and task.n < 16):
        raise SweepError(f"a study needs 16 pairs or more, for its halves and quarters; got {task.n}. Give more with --n.")
    loaded = model.load()
    say(f"{loaded.name}: loaded")
    pairs = task.load(loaded)
    if len(pairs) < 16:
        raise SweepError(f"a study needs 16 pairs or more, for its halves and quarters; {pairs.name} has {len(pairs)}.")
    choosing, measuring = pairs.split(seed=task.seed)
    solved = _solved(loaded, measuring, batch_size)
    trouble = _unsolved(solved, len(measuring))
    screen, notes = _screen(loaded, choosing, batch_size)
    questions = _questions(model, task, screen, [site for site in PLACES if site in loaded.arch.sites], batch_size)
    runs, decisions, spent = _planned(questions if trouble is None else questions[:1], loaded, budget)
    say(f"{pairs!r}: {len(runs)} of {len(questions)} questions, about {duration(spent)} of a budget of {duration(budget)}")
    folder = Path(out) / _FOLDER
    counts = run_sweep(
        runs.values(),
        folder,
        Local(loaded=(model, loaded)),
        about={"name": f"study of {pairs.name} in {loaded.name}"},
        say=say,
        progress=progress,
    )
    sweep = Sweep(folder)
    keys = {what: one.key for what, one in runs.items() if sweep.store.status()[one.key] == "done"}
    notes = [*([] if trouble is None else [trouble]), *notes]
    if counts["failed"]:
        notes.append(f"{counts['failed']} runs failed; `patchlab sweep status {folder}` says why.")
    heads, together, patterns, methods = pd.DataFrame(), {}, {}, pd.DataFrame()
    if trouble is None:
        heads = _candidates(sweep, keys, screen)
        heads, patcher = _measured(heads, loaded, measuring, batch_size, solved)
        methods = _places(sweep, keys, heads)
        if _addresses(heads, 1):
            together = _together(heads, patcher)
        if heads["found"].any():
            patterns = _patterns(heads, loaded, measuring)
            if not patterns:
                notes.append("The prompts differ in length or template, so mean attention patterns have no common axes and are left out.")
    verdict = NOT_FOUND if trouble is not None else FOUND if _addresses(heads, 1) else SPREAD
    return Study(
        verdict, loaded, pairs, choosing, measuring, solved, heads, together, screen, patterns, methods, tuple(decisions), sweep, keys, tuple(notes)
    )


@dataclass(frozen=True)
class _Question:
    """One question of a study: its run, what it is in words, how it is answered, whether it has to be, and instead of which run it is asked."""

    name: str
    run: RunSpec
    what: str
    how: str
    must: bool = False
    instead_of: str = ""


def _screen(model: Model, task: Task, batch_size: int) -> tuple[str, list[str]]:
    """The method that estimates every component, and why those before it are not used.

    Raises:
        MethodError, RuleError, SiteError: the last of them cannot be used either.
    """
    notes: list[str] = []
    for name in SCREENS[:-1]:
        try:
            scoring_method(name).prepared(model, task, HEADS, batch_size=batch_size)
            return name, notes
        except (RuleError, MethodError) as error:
            notes.append(f"{name} cannot be used on this model: {error}")
    scoring_method(SCREENS[-1]).prepared(model, task, HEADS, batch_size=batch_size)
    return SCREENS[-1], notes


def _questions(model: ModelSpec, task: TaskSpec, screen: str, sites: Sequence[str], batch_size: int) -> list[_Question]:
    """The questions of a study, in the order of what their answers are worth."""

    def asked(what: ScoreSpec | VerifySpec | CircuitSpec, of: TaskSpec) -> RunSpec:
        return RunSpec(model=model, task=of, direction="denoising", what=what, batch_size=batch_size)

    def scores(method: str, sites: Sequence[str]) -> RunSpec:
        return asked(ScoreSpec(method=method, sites=tuple(sites)), task.model_copy(update={"half": "first"}))

    places = ", ".join(sites)
    verify = VerifySpec(sites=(HEADS,), screen=screen, k=CANDIDATES)
    return [
        _Question(f"{screen} {HEADS}", scores(screen, [HEADS]), f"every head, by {screen}", "estimated", must=True),
        _Question(f"{screen} places", scores(screen, sites), f"{places}, by {screen}", "estimated", must=True),
        *(_Question(f"{other} {HEADS}", scores(other, [HEADS]), f"every head, by {other}", "estimated") for other in ESTIMATES if other != screen),
        _Question(f"exact {HEADS}", scores("exact", [HEADS]), "every head, patched by itself", "exact"),
        _Question(
            "verified", asked(verify, task.model_copy(update={"half": "first"})), f"the {CANDIDATES} largest heads, verified", "exact",
            instead_of=f"exact {HEADS}",
        ),
        _Question(f"circuit {screen}", asked(CircuitSpec(method=screen), task), f"circuits of edges, chosen by {screen}", "exact"),
        _Question("exact places", scores("exact", sites), f"{places}, each layer and position patched by itself", "exact"),
        *(
            _Question(f"circuit {other}", asked(CircuitSpec(method=other), task), f"circuits of edges, chosen by {other}", "exact")
            for other in SCREENS[1:] if other != screen
        ),
    ]  # fmt: skip


def _planned(questions: Sequence[_Question], loaded: Model, budget: float | int) -> tuple[dict[str, RunSpec], list[Decision], float]:
    """The runs that a budget pays for, what was decided about each question, and the seconds that are predicted."""
    prices = _prices([one.run for one in questions], loaded)
    runs: dict[str, RunSpec] = {}
    decisions: list[Decision] = []
    spent = 0.0
    for one, (seconds, problem) in zip(questions, prices, strict=True):
        left = max(budget - spent, 0.0)
        if one.instead_of in runs:
            continue
        if problem is not None:
            decisions.append(Decision(one.what, "left out", None, problem))
        elif seconds > left and not one.must:
            decisions.append(Decision(one.what, "left out", seconds, f"about {duration(seconds)}, and {duration(left)} of the budget were left"))
        else:
            runs[one.name] = one.run
            spent += seconds
            decisions.append(Decision(one.what, one.how, seconds, f"about {duration(seconds)}"))
    return runs, decisions, spent


def _prices(runs: Sequence[RunSpec], loaded: Model) -> list[tuple[float, str | None]]:
    """Seconds of each run, or why it cannot be made."""

    def priced(some: Sequence[RunSpec]) -> list[tuple[float, str | None]]:
        plans = estimate(some, load=lambda *_, **__: loaded).runs
        return [(one.seconds if np.isfinite(one.seconds) else 0.0, one.problem) for one in plans]

    try:
        return priced(runs)
    except SweepError:  # one of them does not fit into the memory
        found: list[tuple[float, str | None]] = []
        for one in runs:
            try:
                found += priced([one])
            except SweepError as error:
                found.append((0.0, str(error)))
        return found


def _solved(model: Model, task: Task, batch_size: int) -> dict[str, float]:
    """What the model makes of the pairs."""
    from patchlab.methods.linearized import LinearizedPatching

    scores = LinearizedPatching().run(model, task, HEADS, batch_size=batch_size, progress=False)
    low, high = scores.gap_interval()
    ends = {side: float(scores.data[side].mean()) for side in ("metric_clean", "metric_corrupted")}
    return {"accuracy": task.accuracy(model)["clean"], **ends, "gap": scores.gap, "gap_lo": low, "gap_hi": high}


def _unsolved(solved: Mapping[str, float], pairs: int) -> str | None:
    """Why there is nothing to look for; None if the model does the task."""
    from scipy.stats import binomtest

    right = round(solved["accuracy"] * pairs)
    low = float(binomtest(right, pairs, 0.5).proportion_ci(CONFIDENCE, method="exact").low)
    if not solved["gap_lo"] > 0:
        return (
            f"The model does not tell the clean from the corrupted prompts: the metric differs by {solved['gap']:.3g} between them on average (95 % "
            f"interval [{solved['gap_lo']:.3g}, {solved['gap_hi']:.3g}], which is not above 0)."
        )
    if low <= 0.5:
        return (
            f"The model does not do the task: it prefers the correct answer on {right} of {pairs} clean prompts, which by guessing happens too (the "
            f"share may be as low as {100 * low:.0f} % with 95 % confidence)."
        )
    return None


def _candidates(sweep: Sweep, keys: Mapping[str, str], screen: str) -> pd.DataFrame:
    """The heads that the choosing half brings up: by exact effects where all were patched, else the verified ones, else by the screen."""
    import json

    if f"exact {HEADS}" in keys or "verified" not in keys:
        by = f"exact {HEADS}" if f"exact {HEADS}" in keys else f"{screen} {HEADS}"
        scores = sweep.scores(keys[by])
        mean, live = scores.mean(HEADS).to_numpy(), scores.live[HEADS].to_numpy()
        order = [index for index in np.argsort(-np.abs(mean), axis=None).tolist() if live.flat[index]][:CANDIDATES]
        cells = [tuple(map(int, np.unravel_index(index, mean.shape))) for index in order]
        rows = [{"layer": layer, "head": head, "chosen": float(mean[layer, head])} for layer, head in cells]
    else:
        found = json.loads(sweep.find(keys["verified"]).path("verified.json").read_text(encoding="utf-8"))
        rows = [{"layer": row["layer"], "head": row["head"], "chosen": row["effect"]} for row in found["table"] if row["top"]]
    return pd.DataFrame([{"address": f"a{row['layer']}.h{row['head']}", **row} for row in rows])


def _patcher(model: Model, task: Task, batch_size: int) -> Patcher:
    exact = ActivationPatching()
    setting, batches, predicted = exact.prepared(model, task, HEADS, batch_size=batch_size)
    with progress_bar("heads", "cell", None, show=False) as bar:
        return Patcher(exact, setting, batches, predicted, Meter(bar, "cell"))


def _measured(heads: pd.DataFrame, model: Model, task: Task, batch_size: int, solved: Mapping[str, float]) -> tuple[pd.DataFrame, Patcher]:
    """Exact effects of the candidates on the measuring half, with intervals that hold together."""
    patcher = _patcher(model, task, batch_size)
    site = patcher.setting.sites[0]
    cells = [[(site, (int(row["layer"]), int(row["head"])))] for row in heads.to_dict("records")]
    effects = patcher.joint(cells)
    draws = effects @ resampling_weights(effects.shape[1], DRAWS, 0).T
    tail = (1 - CONFIDENCE) / (2 * max(1, len(cells)))
    low, high = np.quantile(draws, [tail, 1 - tail], axis=1)
    mean = effects.mean(1)
    share = mean / solved["gap"]
    same_sign = np.sign(mean) == np.sign(heads["chosen"].to_numpy())
    found = ((low > 0) | (high < 0)) & (np.abs(share) >= SHARE) & same_sign
    table = heads.assign(effect=mean, lo=low, hi=high, share=share, found=found)
    order = np.argsort(-np.abs(mean), kind="stable")
    return table.iloc[order].reset_index(drop=True), patcher


def _addresses(heads: pd.DataFrame, sign: int) -> list[str]:
    """The found heads whose effect has a sign."""
    return [str(one) for one in heads.loc[heads["found"] & (np.sign(heads["effect"]) == sign), "address"]] if len(heads) else []


def _together(heads: pd.DataFrame, patcher: Patcher) -> dict[str, float]:
    """The effect of all heads that support the behaviour at once."""
    site = patcher.setting.sites[0]
    supporting = heads[heads["address"].isin(_addresses(heads, 1))]
    cells = [(site, (int(row["layer"]), int(row["head"]))) for row in supporting.to_dict("records")]
    [effect] = patcher.joint([cells])
    gaps = np.concatenate([to_array(runs.clean - runs.corrupted) for runs in patcher.runs()])[patcher.order]
    weights = resampling_weights(len(effect), DRAWS, 0)
    low, high = interval(weights @ effect)
    share_low, share_high = interval((weights @ effect) / (weights @ gaps))
    shares = {"share": float(effect.mean() / gaps.mean()), "share_lo": float(share_low), "share_hi": float(share_high)}
    return {"heads": float(len(cells)), "effect": float(effect.mean()), "lo": float(low), "hi": float(high), **shares}


def _patterns(heads: pd.DataFrame, model: Model, task: Task) -> dict[str, Float[np.ndarray, "dest src"]]:
    """Mean attention of the found heads on clean prompts that line up."""
    if not task.aligned:
        return {}
    found = heads[heads["found"]]
    targets = tuple(("pattern", int(layer)) for layer in dict.fromkeys(found["layer"]))
    sums: dict[str, np.ndarray] = {}
    for batch in task.batches(32, model.device):
        with torch.no_grad():
            kept = run(model, Program(batch.clean, batch.examples, keep=targets)).activations
        for row in found.to_dict("records"):
            part = to_array(precise(kept["pattern", int(row["layer"])][:, int(row["head"])]).sum(0))
            address = str(row["address"])
            sums[address] = part if address not in sums else sums[address] + part
    return {address: total / len(task) for address, total in sums.items()}


def _places(sweep: Sweep, keys: Mapping[str, str], heads: pd.DataFrame) -> pd.DataFrame:
    """Per method and candidate its place among all live heads by |score|."""
    rows: list[dict[str, Any]] = []
    for method in ("exact", *ESTIMATES):
        if f"{method} {HEADS}" not in keys:
            continue
        scores = sweep.scores(keys[f"{method} {HEADS}"])
        mean = np.where(scores.live[HEADS].to_numpy(), np.abs(scores.mean(HEADS).to_numpy()), -1.0)
        place = (-mean).ravel().argsort(kind="stable").argsort(kind="stable").reshape(mean.shape) + 1
        signed = scores.mean(HEADS).to_numpy()
        for row in heads.to_dict("records"):
            at = int(row["layer"]), int(row["head"])
            rows.append(
                {"method": method, "address": row["address"], "place": int(place[at]), "score": float(signed[at]), "found": bool(row["found"])}
            )
    return pd.DataFrame(rows)
