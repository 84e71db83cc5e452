"""Plans of sweeps: what each run takes in passes, time and memory, before any is started."""

import gc
import json
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.evaluation.ablations import OptimalFit
from patchlab.circuits.evaluation.curve import check_plan, scored_edges
from patchlab.circuits.evaluation.runner import Runner
from patchlab.circuits.formats.mib import MIB_FRACTIONS
from patchlab.circuits.heldout import three_sets
from patchlab.circuits.smallest import sizes_to
from patchlab.engine.masked import pass_bytes, row_bytes
from patchlab.engine.memory import free_bytes
from patchlab.errors import ModelError, PatchlabError, SweepError
from patchlab.feature_comparison import NEURONS, SIZES, attach, sites_at
from patchlab.methods.names import scoring_method
from patchlab.methods.plan import forward_seconds
from patchlab.methods.verified.search import SAMPLE, VerifiedPatching, levels
from patchlab.models import DEMO_MODELS, Model, load_model
from patchlab.models.load import chosen_device
from patchlab.progress import duration
from patchlab.sweeps.spec import CircuitSpec, FeatureSpec, ModelSpec, RunSpec, ScoreSpec, VerifySpec
from patchlab.tasks.task import Task
from patchlab.terminal import fitted, terminal_width

CALIBRATION = 10.0
"""Seconds that all measurements together may take."""
_ROWS = 32
_SIZES_OF_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class RunPlan:
    """The plan of one run.

    Args:
        run: the run.
        forwards: forward passes of a batch, at most; of exact patching the cells, of which several may share a pass; of circuits one per circuit.
        backwards: backward passes of a batch, at most.
        seconds: on this machine; NaN if not known.
        peak_bytes: weights and activations.
        shared: the scores of the edges come from an earlier run of the same group and are not counted.
        uncounted: sites whose cells only the unpatched runs show; patching them comes on top.
        problem: why the run would fail; then nothing else is known.
    """

    run: RunSpec
    forwards: int = 0
    backwards: int = 0
    seconds: float = float("nan")
    peak_bytes: int = 0
    shared: bool = False
    uncounted: tuple[str, ...] = ()
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {name: getattr(self, name) for name in ("forwards", "backwards", "peak_bytes", "shared", "problem")}
        return {"key": self.run.key, **self.run.fields(), **own, "seconds": self.seconds if np.isfinite(self.seconds) else None}


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep.

    Args:
        runs: of each run, in their order.
        calibration: how times were measured, in words.
    """

    runs: tuple[RunPlan, ...]
    calibration: str = field(repr=False, default="")

    @property
    def forwards(self) -> int:
        """Forward passes of all runs."""
        return sum(one.forwards for one in self.runs)

    @property
    def backwards(self) -> int:
        """Backward passes of all runs."""
        return sum(one.backwards for one in self.runs)

    @property
    def seconds(self) -> float:
        """Time of all runs, one after the other, without loading models."""
        return float(np.nansum([one.seconds for one in self.runs]))

    @property
    def peak_bytes(self) -> int:
        """Memory of the largest run."""
        return max((one.peak_bytes for one in self.runs), default=0)

    @property
    def problems(self) -> tuple[RunPlan, ...]:
        """The runs that would fail."""
        return tuple(one for one in self.runs if one.problem is not None)

    @property
    def table(self) -> pd.DataFrame:
        """A row per run: its fields, passes, seconds and bytes."""
        return pd.DataFrame([one.as_dict() for one in self.runs])

    @property
    def by_model(self) -> dict[str, "Plan"]:
        """The plans of each model's runs."""
        names = dict.fromkeys(_called(one.run.model) for one in self.runs)
        return {name: Plan(tuple(one for one in self.runs if _called(one.run.model) == name)) for name in names}

    def __str__(self) -> str:
        lines: list[str] = []
        rows = [(_called(one.run.model), one) for one in self.runs]
        texts = {id(one): one.run.label.partition(": ")[2] for one in self.runs}
        beside = max((len(text) for text in texts.values()), default=0) + 2
        head = None
        for name, one in rows:
            if (now := one.run.label.partition(": ")[0].replace(one.run.model.name, name, 1)) != head:
                lines.append(head := now)
            lines.append(f"  {texts[id(one)]:<{beside}}{_cost(one)}")
        for name, part in self.by_model.items():
            lines.append(f"{name}: {_sum(part)}")
        if len(self.by_model) > 1:
            lines.append(f"together: {_sum(self)}")
        if any(one.uncounted for one in self.runs):
            lines.append("at least: only a run shows how many cells these sites have, and patching them comes on top.")
        if any(isinstance(one.run.what, VerifySpec) for one in self.runs):
            lines.append("at most: verified patching stops as soon as its rule says so.")
        if any(isinstance(one.run.what, FeatureSpec) and not one.uncounted for one in self.runs):
            lines.append("at most: circuits of features that turn out equal are run once.")
        return fitted("\n".join([*lines, self.calibration] if self.calibration else lines), terminal_width())


def _called(model: ModelSpec) -> str:
    """A model as a plan names it: with its dtype unless that is the usual one."""
    return model.name if model.dtype == "float32" else f"{model.name} ({model.dtype})"


def _cost(one: RunPlan) -> str:
    if one.problem is not None:
        return f"would fail: {one.problem}"
    bound = "at least " if one.uncounted else "at most " if isinstance(one.run.what, VerifySpec | FeatureSpec) else ""
    shared = ", edge scores shared" if one.shared else ""
    return f"{bound}{_passes(one.forwards, one.backwards)}, {_time(one.seconds)}, {size(one.peak_bytes)}{shared}"


def _sum(plan: Plan) -> str:
    failing = f", {len(plan.problems)} of which would fail" if plan.problems else ""
    runs = f"{len(plan.runs)} run{'s' if len(plan.runs) != 1 else ''}{failing}"
    return f"{runs}; {_passes(plan.forwards, plan.backwards)}, about {_time(plan.seconds)}, peak {size(plan.peak_bytes)}"


def _passes(forwards: int, backwards: int) -> str:
    return f"{forwards:,} forward" + (f" and {backwards:,} backward" if backwards else "") + " passes"


def _time(seconds: int | float) -> str:
    if not np.isfinite(seconds):
        return "time not known"
    return duration(seconds) if seconds >= 1 else "under 1 s"


def size(count: int | float) -> str:
    """A number of bytes as people say it.

    >>> size(1.5e6), size(3e10)
    ('1.5 MB', '30.0 GB')
    """
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def estimate(runs: Iterable[RunSpec], *, load: Callable[..., Model] = load_model, calibration: int | float = CALIBRATION) -> Plan:
    """Estimate what runs take; every model is loaded once and nothing is patched.

    A run that would fail for another reason than memory is part of the plan, with its reason: the sweep goes on without it.

    Args:
        runs: the runs.
        load: loads a model from its name or folder, with ``device`` and ``dtype``.
        calibration: seconds that measurements may take.

    Raises:
        SweepError: a run that cannot fit into the memory, with what to lower.
    """
    listed = list(runs)
    found: dict[int, RunPlan] = {}
    clock = _Clock(calibration, len({_identity(run.model) for run in listed}))
    for identity in dict.fromkeys(_identity(run.model) for run in listed):
        mine = [i for i, run in enumerate(listed) if _identity(run.model) == identity]
        found |= _of_model([(i, listed[i]) for i in mine], load, clock)
        gc.collect()  # bridges are in circles, and the next model needs the room
    return Plan(tuple(found[i] for i in range(len(listed))), clock.said())


def _identity(model: ModelSpec) -> tuple[Any, ...]:
    return model.content or model.name, model.path, model.dtype, model.device


def _of_model(runs: list[tuple[int, RunSpec]], load: Callable[..., Model], clock: "_Clock") -> dict[int, RunPlan]:
    """The plans of the runs of one model."""
    spec = runs[0][1].model
    _check_weights(spec, runs[0][1])
    try:
        model = spec.load(load)
    except PatchlabError as error:
        return {i: RunPlan(run, problem=str(error)) for i, run in runs}
    planner = _Planner(model, clock)
    return {i: planner.plan(run) for i, run in runs}


def _check_weights(spec: ModelSpec, run: RunSpec) -> None:
    """Refuse a model whose weights alone cannot fit, before it is loaded."""
    try:
        device = chosen_device(spec.device)
    except ModelError:
        return  # loading says so
    needed, free = weight_bytes(spec), free_bytes(device)
    if needed > free:
        raise SweepError(
            f"{run.label}: the weights of {spec.name} in {spec.dtype} take {size(needed)}, and {size(free)} are free on {device}. Take a smaller "
            f"dtype (bfloat16), another device, or leave the model out."
        )


def weight_bytes(spec: ModelSpec) -> int:
    """Memory for the weights of a model as its files give them; 0 if there are none here to look at."""
    folder = _folder(spec)
    each = _SIZES_OF_DTYPES[spec.dtype]
    if folder is None:
        return 0
    total = sum(numbers * each for path in folder.glob("*.safetensors") for numbers in _numbers_in(path))
    return total or sum(path.stat().st_size for path in folder.glob("*.bin"))


def _numbers_in(path: Path) -> list[int]:
    """How many numbers each tensor of a safetensors file has: its header is JSON after eight bytes with its length."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header: Mapping[str, Any] = json.loads(file.read(length))
    return [int(np.prod(about["shape"])) for name, about in header.items() if name != "__metadata__"]


def _folder(spec: ModelSpec) -> Path | None:
    """Where the files of a model are."""
    if spec.path is not None:
        return Path(spec.path)
    if spec.name in DEMO_MODELS:
        return DEMO_MODELS[spec.name]
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


class _Clock:
    """Seconds per token on this machine, measured while there is time left, and scaled by the number of weights after that."""

    def __init__(self, limit: int | float, models: int) -> None:
        self.limit, self.left, self.models = limit, limit, models
        self.rates: dict[str, list[tuple[int, float]]] = {"forward": [], "circuit": []}
        self.scaled: list[str] = []

    def measure(self, what: str, model: Model, task: Task, timed: Callable[[int], tuple[float, int]]) -> float:
        """Seconds per token; ``timed`` runs so many rows and gives seconds and tokens."""
        weights = sum(parameter.numel() for parameter in model.bridge.parameters())
        if self.left <= 0 and self.rates[what]:
            known, rate = self.rates[what][-1]
            self.scaled.append(model.name)
            return rate * weights / max(1, known)
        started = time.perf_counter()
        share = self.left / max(1, self.models) / 3
        timed(1)  # what is done once, at the first pass
        seconds, tokens = timed(1)
        if (rows := min(_ROWS, len(task), int(share / max(seconds, 1e-6)))) > 1:
            seconds, tokens = timed(rows)
        self.left -= time.perf_counter() - started
        self.rates[what].append((weights, seconds / tokens))
        return seconds / tokens

    def said(self) -> str:
        spent = self.limit - self.left
        if not any(self.rates.values()):
            return ""
        scaled = f"; {', '.join(dict.fromkeys(self.scaled))} by the number of weights, for want of time" if self.scaled else ""
        return f"times are from {spent:.1f} s of measurements on this machine{scaled}."


def _tokens(task: Task) -> int:
    return sum(map(len, task.pairs))


class _Planner:
    """Plans runs of one model."""

    def __init__(self, model: Model, clock: _Clock) -> None:
        self.model, self.clock = model, clock
        self.tasks: dict[str, Task | str] = {}
        self.rates: dict[str, float] = {}
        self.scored: set[tuple[str, str]] = set()
        self.weights = sum(part.numel() * part.element_size() for part in (*model.bridge.parameters(), *model.bridge.buffers()))
        self.free = free_bytes(model.device)

    def plan(self, run: RunSpec) -> RunPlan:
        """The plan of a run.

        Raises:
            SweepError: it cannot fit.
        """
        kinds = {ScoreSpec: self._score, VerifySpec: self._verify, CircuitSpec: self._circuit, FeatureSpec: self._features}
        try:
            task = self._task(run)
            plan = kinds[type(run.what)](run, task, run.what)
        except SweepError:
            raise
        except PatchlabError as error:
            return RunPlan(run, problem=str(error))
        if plan.peak_bytes > self.free:
            fewer = f"batch_size (now {run.batch_size})" if run.batch_size > 1 else "the length of the prompts"
            raise SweepError(
                f"{run.label}: it is predicted to need {size(plan.peak_bytes)} beside the weights, and {size(self.free)} are free on "
                f"{self.model.device}. Lower {fewer}, name fewer sites, or take a smaller dtype (bfloat16)."
            )
        return replace(plan, peak_bytes=plan.peak_bytes + self.weights)

    def _task(self, run: RunSpec) -> Task:
        name = json.dumps(run.task.plain(), sort_keys=True)
        if name not in self.tasks:
            try:
                self.tasks[name] = run.task.load(self.model)
            except PatchlabError as error:
                self.tasks[name] = str(error)
        task = self.tasks[name]
        if isinstance(task, str):
            raise PatchlabError(task)
        return task

    def _once(self, task: Task) -> float:
        """Seconds for a forward pass of every prompt of one side."""
        if "forward" not in self.rates:

            def timed(rows: int) -> tuple[float, int]:
                part = task.select(range(min(rows, len(task))))
                return forward_seconds(self.model, part, rows), _tokens(part)

            self.rates["forward"] = self.clock.measure("forward", self.model, task, timed)
        return self.rates["forward"] * _tokens(task)

    def _circuit_once(self, task: Task) -> float:
        """Seconds for one circuit on every prompt."""
        if "circuit" not in self.rates:
            some = [Circuit.empty(self.model.arch.graph), Circuit.full(self.model.arch.graph)]

            def timed(rows: int) -> tuple[float, int]:
                part = task.select(range(min(rows, len(task))))
                runner = Runner.of(self.model, part, "resample", batch_size=rows)
                started = time.perf_counter()
                runner.metric(some)
                return time.perf_counter() - started, len(some) * _tokens(part)

            self.rates["circuit"] = self.clock.measure("circuit", self.model, task, timed)
        return self.rates["circuit"] * _tokens(task)

    def _score(self, run: RunSpec, task: Task, what: ScoreSpec) -> RunPlan:
        method, options = scoring_method(what.method), {"direction": run.direction, "batch_size": run.batch_size}
        plan = method.plan(self.model, task, what.sites, **options)
        predicted = method.prepared(self.model, task, what.sites, **options)[2]
        return RunPlan(run, plan.forwards, plan.backwards, plan.work * self._once(task), predicted, uncounted=plan.uncounted)

    def _verify(self, run: RunSpec, task: Task, what: VerifySpec) -> RunPlan:
        method, options = what.patching(), {"direction": run.direction, "batch_size": run.batch_size}
        setting, batches, predicted = method.exact.prepared(self.model, task, what.sites, **options)
        screen = method.screen.plan(self.model, task, what.sites, **options)
        screening = method.screen.prepared(self.model, task, what.sites, **options)[2]
        kept = predicted * len(batches) if predicted * len(batches) <= self.free // 2 else predicted
        peak, uncounted = max(kept, screening), tuple(site for site, live in setting.live.items() if live is None)
        if uncounted:
            return RunPlan(run, screen.forwards, screen.backwards, screen.work * self._once(task), peak, uncounted=uncounted)
        price = method.price(self.model, task, what.sites, direction=run.direction)
        if price.dearer:
            sweep = method.exact.plan(self.model, task, what.sites, **options)
            return RunPlan(run, sweep.forwards, sweep.backwards, sweep.work * self._once(task), peak)
        patched = _most_patched(method, price.n_live, {str(site): live for site, live in setting.live.items()}, setting.sites)
        means = int(method.screen.source.startswith("mean"))
        forwards = screen.forwards + (2 + means + patched) * len(batches)
        return RunPlan(run, forwards, screen.backwards, (screen.work + 2 + means + patched) * self._once(task), peak)

    def _circuit(self, run: RunSpec, task: Task, what: CircuitSpec) -> RunPlan:
        method, graph = scoring_method(what.method), self.model.arch.graph
        check_plan(graph, {method.name: method}, what.sizes, how=what.how, by=what.by, ablation=what.ablation)
        choosing, held = task.split(seed=run.task.seed)
        options = {"direction": run.direction, "batch_size": run.batch_size}
        circuits = 1 + len(what.sizes or MIB_FRACTIONS) * (1 + what.random)
        parts = [(held, circuits)]
        if what.smallest:
            sets = three_sets(task, seed=run.task.seed)
            scored, _ = scored_edges(graph, method)
            parts += [(sets.finding, 1 + len(sizes_to(scored)) + (scored < graph.n_edges)), (sets.reporting, 2)]  # as size_grid
        plan = method.plan(self.model, choosing, ["edges"], **options)
        peak = method.prepared(self.model, choosing, ["edges"], **options)[2]
        shared = (run.group, method.name) in self.scored
        self.scored.add((run.group, method.name))
        forwards, backwards, seconds = (0, 0, 0.0) if shared else (plan.forwards, plan.backwards, plan.work * self._once(choosing))
        for part, number in parts:
            batches = len(part.batches(run.batch_size, self.model.device))
            forwards += (number + 2) * batches  # the whole model, and what ablated edges carry
            seconds += number * self._circuit_once(part) + 2 * self._once(part)
            if what.ablation == "optimal":
                steps, fitted_on = OptimalFit().steps, len(choosing.batches(run.batch_size, self.model.device))
                forwards += number * (steps + 1) * fitted_on
                backwards += number * steps * fitted_on
                seconds += number * 3 * steps * self._circuit_once(choosing)
        if what.ablation not in ("resample", "zero"):
            forwards += len(parts) * len(choosing.batches(run.batch_size, self.model.device))
        longest = max(len(pair) for pair in task.pairs)
        each = min(run.batch_size, len(held)) * row_bytes(self.model, longest)
        masked = max(each, min(each * circuits, pass_bytes(self.model)))
        return RunPlan(run, forwards, backwards, seconds, max(peak, masked), shared=shared)

    def _features(self, run: RunSpec, task: Task, what: FeatureSpec) -> RunPlan:
        choosing, measuring = task.split(seed=run.task.seed)
        method, options = scoring_method(what.method), {"direction": run.direction, "batch_size": run.batch_size}
        points = attach(self.model, str(what.path), what.points)
        try:
            scored = [sites_at(points), *([[NEURONS]] if NEURONS in self.model.arch.sites else [])]
            plans = [method.plan(self.model, choosing, sites, **options) for sites in scored]
            peak = max(method.prepared(self.model, choosing, sites, **options)[2] for sites in scored)
        finally:
            self.model.drop_dictionaries()
        kinds = len(scored) + 1  # features with and without their errors, and neurons
        batches = len(measuring.batches(run.batch_size, self.model.device))
        circuits = 1 + 2 * 2 * SIZES  # none; those of the method and at random; and what is outside each
        around = 1 if what.ablation == "zero" else 2  # the whole model, and what ablated nodes carry
        forwards = sum(plan.forwards for plan in plans) + kinds * (circuits + around) * batches
        seconds = sum(plan.work for plan in plans) * self._once(choosing) + kinds * (circuits + around) * self._once(measuring)
        uncounted = tuple(dict.fromkeys(site for plan in plans for site in plan.uncounted))
        return RunPlan(run, forwards, sum(plan.backwards for plan in plans), seconds, peak, uncounted=uncounted)


def _most_patched(method: VerifiedPatching, n_live: int, live: Mapping[str, Any], sites: Iterable[Any]) -> int:
    """Joint or single patches that verified patching makes at most."""
    sample = n_live if method.sample is None and method.recall is not None else SAMPLE if method.sample is None else method.sample
    groups = 0
    if method.hierarchical:
        for site in sites:
            mask = np.asarray(live[str(site)])
            groups += sum(int(mask.any(tuple(i for i, axis in enumerate(site.axes) if axis not in axes)).sum()) for axes in levels(site))
    return min(n_live, method.budget(n_live) + sample) + groups + method.subsets
