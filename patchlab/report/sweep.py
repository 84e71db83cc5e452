"""The report of a sweep: a folder with one page, and a file for each figure that the page loads when a reader asks for it."""

import json
import math
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from patchlab import __version__, plots
from patchlab.circuits import FaithfulnessCurve, SmallestFaithful
from patchlab.circuits.evaluation.curve import RANDOM
from patchlab.errors import OutputError
from patchlab.scores import ScoreMap
from patchlab.store.files import writing
from patchlab.store.folder import listed, result_folder
from patchlab.store.record import checked, finish, read
from patchlab.store.runs import Stored
from patchlab.sweeps.kinds import CURVE, SCORES, SIZES, SMALLEST
from patchlab.sweeps.results import Sweep
from patchlab.sweeps.work import code_digest

PAGE, PLOTLY = "index.html", "plotly.min.js"
RANKING, COSTS = "ranking", "costs"
RANKED_BY = "pearson_per_prompt"
Row = Mapping[Hashable, Any]


@dataclass(frozen=True)
class Findings:
    """What the page of a sweep shows: its runs as one reading found them, what each measured, and names that tell them apart.

    Args:
        name: of the sweep.
        runs: of :meth:`Sweep.runs`.
        plans: what was planned, by key, in the order of the plan.
        done: the finished runs.
        table: of :meth:`Sweep.table`, with seconds.
        differences: of :meth:`Sweep.differences`.
        references: the exact run that each run of scores is compared with.
        trouble: failed runs by key.
        stale: why a run is stale, by key.
        figures: names of files of figures: of each by its own name, and of each run that has one by :func:`figure_of` its key.
    """

    name: str
    runs: pd.DataFrame
    plans: Mapping[str, Mapping[str, Any]]
    done: Mapping[str, Stored]
    table: pd.DataFrame
    differences: pd.DataFrame
    references: Mapping[str, str]
    trouble: Mapping[str, Stored]
    stale: Mapping[str, str]
    figures: dict[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def statistics(self) -> dict[tuple[str, str, str], Row]:
        """Rows of the table by key, site and statistic."""
        return {(row["key"], row["site"], row["statistic"]): row for row in self.table.to_dict("records")}

    def value(self, key: str, statistic: str, site: str = "") -> float | None:
        """One number of a run; None if it has none."""
        found = self.statistics.get((key, site, statistic), {}).get("value")
        return None if found is None or pd.isna(found) else float(found)

    @cached_property
    def models(self) -> dict[str, str]:
        """The model of each run, by a name that no other model here has."""
        return _labels({key: (plan["fields"]["model"], plan["spec"]["model"]) for key, plan in self.plans.items()})

    @cached_property
    def tasks(self) -> dict[str, str]:
        """The task of each run, likewise, without its seed."""
        found: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for key, plan in self.plans.items():
            spec, pairs = plan["spec"]["task"], plan["fields"]["n"]
            rest = {name: value for name, value in spec.items() if name not in ("name", "n", "seed", "options")}
            found[key] = f"{plan['fields']['task']}{'' if pairs is None else f'[{pairs}]'}", {**rest, **spec.get("options", {})}
        return _labels(found)

    @cached_property
    def settings(self) -> dict[str, str]:
        """What each exact run is of: methods are set against each other within it."""
        named: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for key in dict.fromkeys(self.references.values()):
            fields = self.plans[key]["fields"]
            name = f"{self.models[key]} × {self.tasks[key]} seed {fields['seed']}, {fields['direction']}"
            named[key] = name, {"sites": fields["sites"], "source": fields["method"].partition("@")[2] or "paired"}
        return _labels(named)

    @cached_property
    def unscored(self) -> dict[tuple[str, str], str]:
        """Why a run scores nothing at a site, by key and site, for runs that are compared and have no agreement there."""
        lacking = [key for key in self.references if any(self.value(key, RANKED_BY, site) is None for site in self.sites(key))]
        maps = {key: ScoreMap.load(self.done[key].path(SCORES)) for key in lacking}
        return {(key, site): why for key, scores in maps.items() for site, why in scores.not_scored.items()}

    def of_kind(self, kind: str) -> list[str]:
        """The finished runs of a kind."""
        return [key for key in self.done if self.plans[key]["fields"]["kind"] == kind]

    def sites(self, key: str) -> list[str]:
        """The sites of a run."""
        return list(self.plans[key]["spec"]["what"]["sites"])

    def method(self, key: str) -> str:
        """The name of a run's method."""
        return str(self.plans[key]["fields"]["method"])

    @cached_property
    def agreement(self) -> pd.DataFrame:
        """What is ranked and drawn against cost: ``site``, ``setting``, ``method`` (without its source), ``key``, ``passes`` and ``value``."""
        rows = [
            {"site": site, "setting": self.settings[reference], "method": bare(self.method(key)), "key": key, "passes": self.passes(key)}
            | {"value": self.value(key, RANKED_BY, site)}
            for key, reference in self.references.items()
            for site in self.sites(key)
        ]
        return pd.DataFrame(rows, columns=["site", "setting", "method", "key", "passes", "value"]).astype({"value": float})

    @cached_property
    def paired(self) -> pd.DataFrame:
        """Paired differences of what is ranked, with the names of :attr:`agreement`."""
        rows = self.differences[self.differences["statistic"] == RANKED_BY]
        names = {"setting": rows["reference"].map(self.settings), "method": rows["method"].map(bare), "other": rows["other"].map(bare)}
        return rows.assign(**names).astype({"value": float, "lo": float, "hi": float})

    def passes(self, key: str) -> float:
        """Forwards + 2 · backwards of a run; NaN where it does not say."""
        forwards, backwards = (self.value(key, name) for name in ("forwards", "backwards"))
        return math.nan if forwards is None or backwards is None else forwards + 2 * backwards

    @cached_property
    def circuits(self) -> dict[str, list[str]]:
        """Finished runs of circuits that differ in their method alone."""
        groups: dict[str, list[str]] = {}
        for key in self.of_kind("circuit"):
            spec = self.plans[key]["spec"]
            rest = {name: value for name, value in spec["what"].items() if name != "method"}
            groups.setdefault(json.dumps({**spec, "what": rest}, sort_keys=True), []).append(key)
        return {f"curve-{keys[0][:16]}": keys for keys in groups.values()}


def bare(method: str) -> str:
    """A method's name without its source."""
    return method.partition("@")[0]


def figure_of(key: str) -> str:
    """The name of a run's figure."""
    return f"run-{key[:24]}"


def write_sweep(sweep: Sweep, folder: str | Path | None = None, *, force: bool = False, say: Callable[[str], Any] = lambda _: None) -> dict[str, Any]:
    """Write the report of a sweep: ``index.html``, which needs no network, ``plotly.min.js``, and a small file per figure; returns what
    ``run.json`` holds.

    Args:
        sweep: also one that is still running: its report is of what is finished.
        folder: where; None: ``report`` in the folder of the sweep. An earlier report of this sweep there is replaced, and nothing else is.
        force: replace the files of another result there.
        say: told, in a line, what takes a while.

    Raises:
        OutputError: the folder holds something else or cannot be written to, or the sweep is damaged.
        SweepError: nothing is planned.
    """
    from patchlab.report.sweep_page import render

    target = sweep.folder / "report" if folder is None else Path(folder).expanduser()
    if target.resolve() == sweep.folder.resolve():
        raise OutputError(f"{target} is the folder of the sweep itself; leave --out away (then it is {target / 'report'}), or choose another one.")
    about = {"report": "sweep", "name": sweep.name, "created": sweep.store.about["created"]}
    earlier = _earlier(target, about)
    with result_folder(target, force=force or earlier is not None) as staging:
        found = gather(sweep, say)
        made = _write_figures(found, staging, say, earlier)
        with writing(staging / PLOTLY) as temporary:
            temporary.write_text(get_plotlyjs(), encoding="utf-8")
        counts = sweep_counts(found)
        with writing(staging / PAGE) as temporary:
            temporary.write_text(render(found, counts), encoding="utf-8")
        record = {**about, "patchlab": __version__, "counts": counts, "figures": len({*found.figures.values()}), "made": made}
        return finish(staging, record, listed(staging))


@dataclass(frozen=True)
class Earlier:
    """An earlier report of the same sweep: its folder and what its ``run.json`` holds."""

    folder: Path
    record: dict[str, Any]


def _earlier(target: Path, about: Mapping[str, Any]) -> Earlier | None:
    try:
        record = read(target)
    except OutputError:  # there is none, or it is not known whose it is
        return None
    return Earlier(target, record) if all(record.get(name) == value for name, value in about.items()) else None


def sweep_counts(found: Findings) -> dict[str, int]:
    """How many runs are planned, done, failed, running, pending and stale."""
    status = list(found.runs["status"])
    return {"planned": len(status)} | {name: status.count(name) for name in ("done", "failed", "running", "pending", "stale")}


def gather(sweep: Sweep, say: Callable[[str], Any] = lambda _: None) -> Findings:
    """All that the page shows, but its figures.

    Raises:
        OutputError: a result is damaged.
    """
    runs, plans = sweep.runs(), sweep.store.planned()
    if runs.empty:
        raise OutputError(f"nothing is planned in {sweep.folder}, so there is nothing to report. Run the sweep first.")
    status = dict(zip(runs["key"], runs["status"], strict=True))
    say("comparing methods with exact patching")
    table, differences = sweep.table(costs=True), sweep.differences()
    done = {key: sweep.store.get(key) for key, state in status.items() if state == "done"}
    empty = pd.DataFrame(columns=["key", "site", "statistic", "value", "lo", "hi"])
    table = table[table["key"].isin([*done])] if len(table) else empty  # others may have ended meanwhile
    references = {key: one for key, one in sweep.references().items() if key in done and one in done}
    differences = differences[differences["key"].isin([*references]) & differences["other_key"].isin([*references])]
    trouble = {key: sweep.store.get(key) for key, state in status.items() if state == "failed"}
    stale = {key: _why_stale(sweep, key) for key, state in status.items() if state == "stale"}
    return Findings(sweep.name, runs, {key: plans[key] for key in status}, done, table, differences, references, trouble, stale)


def _why_stale(sweep: Sweep, key: str) -> str:
    try:
        sweep.store.get(key)
    except OutputError as error:
        return str(error)
    return "it was noted as such"


def _write_figures(found: Findings, folder: Path, say: Callable[[str], Any], earlier: Earlier | None) -> dict[str, list[str]]:
    """A file per figure, and in ``found`` their names; what those of score maps were made of, so that the next report need not draw them again."""
    made: dict[str, list[str]] = {}

    def write(name: str, figure: go.Figure, runs: Sequence[str] = ()) -> None:
        with writing(folder / f"{name}.js") as temporary:
            temporary.write_text(f"patchlabFigure({json.dumps(name)}, {figure.to_json()});\n", encoding="utf-8")
        found.figures[name] = name
        for key in runs:
            found.figures[figure_of(key)] = name

    if found.agreement["value"].notna().any():
        write(RANKING, plots.ranking(found.agreement, found.paired))
        exact = [
            {"site": site, "setting": found.settings[key], "method": "exact", "passes": found.passes(key)}
            for key in found.settings
            for site in found.sites(key)
        ]
        if (found.agreement["value"].notna() & (found.agreement["passes"] > 0)).any():
            write(COSTS, plots.costs(found.agreement, pd.DataFrame(exact, columns=["site", "setting", "method", "passes"])))
    for name, keys in found.circuits.items():
        write(name, plots.faithfulness(*joined({found.method(key): found.done[key] for key in keys})), keys)
    scored = [key for key, stored in found.done.items() if SCORES in stored.files]
    drawn = 0
    for key in scored:
        name, reference = figure_of(key), found.references.get(key)
        reference = None if (key, "", "not_compared") in found.statistics else reference
        shown = [found.done[one] for one in (reference, key) if one is not None]
        made[name] = [code_digest(), *(one.sums[SCORES] for one in shown)]
        found.figures[name] = name
        if earlier is not None and _copied(earlier, name, made[name], folder):
            continue
        if not drawn:
            say(f"drawing the heatmaps of up to {len(scored):,} runs")
        drawn += 1
        maps = {found.method(one.key): ScoreMap.load(one.path(SCORES)) for one in shown}
        write(name, plots.heatmaps(maps if reference is not None else maps[found.method(key)]))
    return made


def _copied(earlier: Earlier, name: str, made: list[str], folder: Path) -> bool:
    """Whether a figure of an earlier report, made of the same, is there to be used again."""
    if earlier.record.get("made", {}).get(name) != made:
        return False
    try:
        shutil.copyfile(checked(earlier.folder, earlier.record, f"{name}.js", "It is drawn again."), folder / f"{name}.js")
    except OutputError:  # somebody changed or removed it
        return False
    return True


def joined(runs: Mapping[str, Stored]) -> tuple[FaithfulnessCurve, SmallestFaithful | None]:
    """The curves of runs that differ in their method as one, and their smallest faithful circuits where they were looked for.

    Circuits of random edges do not depend on the method; where those of two runs differ all the same, each is named after its run.
    """
    curves = {name: FaithfulnessCurve.load(stored.path(CURVE)) for name, stored in runs.items()}
    first = next(iter(curves.values()))
    tables, areas = list[pd.DataFrame](), list[pd.DataFrame]()
    for name, curve in curves.items():
        for frames, frame in ((tables, curve.table), (areas, curve.areas)):
            if curve is first:
                frames.append(frame)
            elif _same_random(first, curve):
                frames.append(frame[frame["method"] != RANDOM])
            else:
                frames.append(frame.assign(method=frame["method"].replace(RANDOM, f"{RANDOM} ({name})")))
    curve = FaithfulnessCurve(pd.concat(tables, ignore_index=True), pd.concat(areas, ignore_index=True), {}, dict(first.provenance))
    looked = {name: stored for name, stored in runs.items() if SMALLEST in stored.files}
    if not looked:
        return curve, None
    rows = [_restored(json.loads(stored.path(SMALLEST).read_text(encoding="utf-8"))) for stored in looked.values()]
    sizes = FaithfulnessCurve.load(next(iter(looked.values())).path(SIZES))
    return curve, SmallestFaithful(pd.DataFrame(rows), sizes, {}, sizes.provenance)


def _same_random(one: FaithfulnessCurve, other: FaithfulnessCurve) -> bool:
    rows = [curve.table[curve.table["method"] == RANDOM].drop(columns="method").reset_index(drop=True) for curve in (one, other)]
    return rows[0].equals(rows[1])


def _restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it was before JSON, which has no infinity and no NaN."""
    return {name: (math.inf if name in ("n_edges_lo", "n_edges_hi") else math.nan) if value is None else value for name, value in row.items()}


def _labels(named: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """A label per key: its name, with the details in which others of the same name differ."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for name, details in named.values():
        alike.setdefault(name, []).append(details)
    telling: dict[str, list[str]] = {}
    for name, found in alike.items():
        every = dict.fromkeys(detail for one in found for detail in one)
        telling[name] = [detail for detail in every if len({json.dumps(one.get(detail), sort_keys=True) for one in found}) > 1]
    return {
        key: name + "".join(f" {detail}={_short(details[detail])}" for detail in telling[name] if detail in details)
        for key, (name, details) in named.items()
    }


def _short(value: Any) -> str:
    shown = str(value)
    return f"{shown[:15]}…" if shown.startswith("sha256:") else shown
