"""What every method shares: checks, batches, the metric of the two unpatched runs, provenance and cost.

A method is a frozen dataclass of hyper-parameters with one verb, :meth:`Method.run`. A concrete method says only how the
effects of one batch are found.
"""

import importlib.metadata
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from patchlab.engine import Program, Result, Target, run
from patchlab.engine.program import targets
from patchlab.errors import MethodError, unknown
from patchlab.interventions import Average, Kept, Source, Zero
from patchlab.methods.liveness import cell_shape, live_cells
from patchlab.metrics import METRICS, Answers
from patchlab.models import Model
from patchlab.scores import Cost, ScoreMap
from patchlab.sites import POSITION_AXES, Site, parse_sites
from patchlab.tasks.base import Batch, PositionAxis, Task

Direction = Literal["denoising", "noising"]
DIRECTIONS = ("denoising", "noising")
SOURCES = ("paired", "zero", "mean", "mean_positional")


@dataclass(frozen=True)
class Setting:
    """What one run of a method is about; ``axis`` is None where no site is scored by position."""

    model: Model
    task: Task
    sites: tuple[Site, ...]
    direction: Direction
    axis: PositionAxis | None
    live: dict[str, Bool[np.ndarray, "*cells"]]
    mean: Average | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every (kind, layer) that the sites need."""
        return tuple(dict.fromkeys(t for site in self.sites for t in targets(site.kind, self.model.arch.n_layers)))


@dataclass(frozen=True)
class Runs:
    """The unpatched runs of one batch, with the source run's activations at the sites."""

    batch: Batch
    answers: Answers
    baseline_tokens: Int[Tensor, "batch pos"]
    clean: Tensor
    corrupted: Tensor
    source: Source
    positions: dict[str, Int[Tensor, " batch"]]
    baseline: Result

    @property
    def baseline_values(self) -> Tensor:
        """The metric before patching."""
        return self.baseline.values if self.baseline.values is not None else self.clean


class Meter:
    """Counts what was computed."""

    def __init__(self, bar: Any) -> None:
        self.forwards = self.backwards = self.positions = 0
        self.bar = bar

    def run(self, model: Model, program: Program) -> Result:
        """Run a program and count its work."""
        result = run(model, program)
        forwards, backwards, positions = result.work
        self.forwards, self.backwards, self.positions = self.forwards + forwards, self.backwards + backwards, self.positions + positions
        self.bar.update(forwards)
        return result


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; ``source`` says what is patched in.

    ``source``: ``paired`` (the other prompt's activation), ``zero``, ``mean`` (over all examples and positions of the other
    prompts) or ``mean_positional`` (over examples only).
    """

    source: str = "paired"

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise MethodError(unknown("source", self.source, SOURCES))

    @property
    @abstractmethod
    def name(self) -> str:
        """How results refer to the method."""

    @abstractmethod
    def forwards(self, setting: Setting) -> int:
        """Forward passes per batch, for the progress bar."""

    @abstractmethod
    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        """Memory for the activations of one batch, in bytes."""

    @abstractmethod
    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> dict[str, np.ndarray]:
        """Effects per site, ``[batch, *axes]``, of one batch."""

    def not_scored(self, setting: Setting) -> dict[str, str]:
        """Sites that this method cannot score, with the reason."""
        return {}

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        """Extra fields of the program of the unpatched baseline run."""
        return {}

    def check(self, setting: Setting) -> None:
        """Raise if this method makes no sense here."""
        return

    def run(
        self,
        model: Model,
        task: Task,
        sites: str | Site | Iterable[str | Site],
        *,
        direction: str = "denoising",
        batch_size: int | None = None,
        progress: bool = True,
        max_memory: int | float | None = None,
    ) -> ScoreMap:
        """Score every cell of the sites: an estimate, per example, of the effect of patching it.

        Args:
            model: the model.
            task: prompt pairs, answers and metric.
            sites: such as ``"resid_pre"`` or ``["resid_pre", "z[layer,pos,head]"]``.
            direction: ``denoising`` (clean activations into the corrupted run; effect over the corrupted metric) or
                ``noising`` (corrupted into clean; effect over the clean metric).
            batch_size: examples per batch; default all of one length. Results do not depend on it.
            progress: show a progress bar on stderr.
            max_memory: refuse to start if more bytes than this are predicted.

        Returns:
            Effects in the metric's unit.

        Raises:
            MethodError: unknown direction, batch_size < 1, too little memory, options that make no sense together.
            SiteError: unknown or absent site.
        """
        if direction not in DIRECTIONS:
            raise MethodError(unknown("direction", direction, DIRECTIONS))
        if batch_size is not None and batch_size < 1:
            raise MethodError(f"batch_size is {batch_size}; it must be at least 1 (or None for all examples of one length at once).")
        parsed = parse_sites(sites)
        for site in parsed:
            model.arch.check(site)
        _check_tokens(model, task)
        needs_axis = any(set(site.axes) & set(POSITION_AXES) for site in parsed)
        axis = task.position_axis() if needs_axis else None
        paired = self.source == "paired"
        live = {
            str(site): np.ones(cell_shape(model.arch, site, axis), dtype=bool) if model.ambient else live_cells(model.arch, site, task, axis, paired=paired)
            for site in parsed
        }
        setting = Setting(model, task, parsed, "denoising" if direction == "denoising" else "noising", axis, live)
        self.check(setting)
        batches = task.batches(batch_size, model.device)
        predicted = max(self.predicted_bytes(setting, *batch.clean.shape) for batch in batches)
        if max_memory is not None and predicted > max_memory:
            raise MethodError(
                f"{self.name} is predicted to need {predicted / 1e6:.1f} MB for a batch of {len(batches[0])} examples, and max_memory is {max_memory / 1e6:.1f} MB. "
                f"Lower batch_size, ask for fewer sites, or raise max_memory."
            )
        return self._run(setting, batches, predicted, progress)

    def _run(self, setting: Setting, batches: list[Batch], predicted: int, progress: bool) -> ScoreMap:
        model, task = setting.model, setting.task
        on_cuda = model.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        started = time.perf_counter()
        parts: list[dict[str, np.ndarray]] = []
        metrics: list[tuple[Tensor, Tensor]] = []
        notes: dict[str, Any] = {}
        total = len(batches) * (self.forwards(setting) + self.source.startswith("mean"))
        with tqdm(total=total, desc=self.name, unit="forward", disable=not progress, leave=False) as bar:
            meter = Meter(bar)
            if self.source.startswith("mean"):
                setting = replace(setting, mean=self._mean(setting, batches, meter))
            for batch in batches:
                runs = self._unpatched(setting, batch, meter)
                if task.metric.name not in METRICS and not metrics:
                    _check_metric(setting, runs, meter)
                parts.append(self.score(setting, runs, meter, notes))
                metrics.append((runs.clean, runs.corrupted))
        skipped = self.not_scored(setting)
        seconds = time.perf_counter() - started
        scores = {name: np.concatenate([part[name] for part in parts]) for name in map(str, setting.sites)}
        clean, corrupted = (torch.cat([pair[i] for pair in metrics]).double().cpu().numpy() for i in (0, 1))
        return ScoreMap.build(
            scores,
            setting.live,
            task_axis=setting.axis,
            examples=torch.cat([batch.examples for batch in batches]).cpu().numpy(),
            metric_clean=clean,
            metric_corrupted=corrupted,
            provenance=self._provenance(setting, skipped, notes),
            cost=Cost(
                meter.forwards,
                meter.backwards,
                meter.positions,
                seconds,
                predicted,
                torch.cuda.max_memory_allocated(model.device) if on_cuda else None,
            ),
        )

    def _mean(self, setting: Setting, batches: list[Batch], meter: Meter) -> Average:
        """Mean activations of the source prompts over the whole task, summed in float64."""
        positional = self.source == "mean_positional"
        wanted = self.source_targets(setting)
        if not positional and any(kind == "pattern" for kind, _ in wanted):
            raise MethodError("the mean of a pattern over positions is not an attention pattern; use source='mean_positional' or leave pattern out.")
        if positional and setting.task.position_axis().names is not None:
            raise MethodError("positional means need examples of one length and template; this task has several. Use source='mean'.")
        sums: dict[Target, Tensor] = {}
        count = 0
        for batch in batches:
            tokens = batch.clean if setting.direction == "denoising" else batch.corrupted
            kept = meter.run(setting.model, Program(tokens, batch.examples, self._positions(setting, batch), keep=wanted)).activations
            for key, value in kept.items():
                total = value.double().sum(0) if positional else value.double().sum((0, 1))[None]
                sums[key] = total if key not in sums else sums[key] + total
            count += tokens.shape[0] if positional else tokens.numel()
        return Average({key: total / count for key, total in sums.items()}, positional)

    def source_targets(self, setting: Setting) -> tuple[Target, ...]:
        """Where the source's activations are needed."""
        return setting.targets

    def _positions(self, setting: Setting, batch: Batch) -> dict[str, Tensor]:
        pairs = [setting.task.pairs[i] for i in batch.examples.tolist()]
        names = set(pairs[0].positions).intersection(*(pair.positions for pair in pairs))
        return {name: torch.tensor([pair.positions[name] for pair in pairs], device=setting.model.device) for name in names}

    def _unpatched(self, setting: Setting, batch: Batch, meter: Meter) -> Runs:
        """Run the clean, then the corrupted prompts; one of them is the baseline, the other the source."""
        metric, answers = setting.task.metric, batch.answers
        denoising = setting.direction == "denoising"
        keep = self.source_targets(setting) if self.source == "paired" else ()
        shared: dict[str, Any] = {"examples": batch.examples, "positions": self._positions(setting, batch)}
        results: dict[str, Result] = {}
        for which, tokens in (("clean", batch.clean), ("corrupted", batch.corrupted)):
            is_baseline = (which == "corrupted") == denoising
            options = self.baseline_options(setting) if is_baseline else {"keep": keep}
            if which == "clean" and metric.needs_clean:
                # the clean run is its own reference; only a metric whose gradient is not asked for here can need it
                reads = "answer" if metric.reads == "answer" else "all"
                result = meter.run(setting.model, Program(tokens, logits=reads, **shared, **options))
                answers = replace(answers, clean_logits=result.logits)
                if result.logits is not None:
                    result = replace(result, values=metric(result.logits, answers))
            else:
                result = meter.run(setting.model, Program(tokens, metric=metric, answers=answers, **shared, **options))
            results[which] = result
        clean, corrupted = results["clean"], results["corrupted"]
        baseline, other = (corrupted, clean) if denoising else (clean, corrupted)
        source: Source
        if self.source == "paired":
            source = Kept(other.activations, batch.examples)
        else:
            source = Zero() if self.source == "zero" else _required(setting.mean)
        values = (_required(clean.values), _required(corrupted.values))
        tokens = batch.corrupted if denoising else batch.clean
        return Runs(batch, answers, tokens, *values, source, shared["positions"], baseline)

    def _provenance(self, setting: Setting, skipped: dict[str, str], notes: dict[str, Any]) -> dict[str, Any]:
        model, task = setting.model, setting.task
        options = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        packages = {name: importlib.metadata.version(name) for name in ("torch", "transformer-lens", "transformers", "numpy")}
        ambient = [f"{edit.op} {edit.address}" for edit in model.ambient]
        return {
            "method": self.name,
            "method_options": options,
            "task": f"{task.name}[{len(task)}]",
            "task_fingerprint": task.fingerprint,
            "task_provenance": task.provenance,
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "direction": setting.direction,
            "metric": task.metric.name,
            "metric_unit": task.metric.unit,
            "versions": {"patchlab": _own_version(), **{name.replace("-", "_"): version for name, version in packages.items()}},
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "not_scored": skipped,
            "ambient": ambient,
            "notes": [f"{len(ambient)} surrounding edits; no cell is taken as a structural zero"] if ambient else [],
            **notes,
        }


def program(setting: Setting, runs: Runs, **options: Any) -> Program:
    """A program on the baseline prompts of a batch that evaluates the task's metric."""
    return Program(
        runs.baseline_tokens, runs.batch.examples, positions=runs.positions, metric=setting.task.metric, answers=runs.answers, **options
    )


def _check_tokens(model: Model, task: Task) -> None:
    top = max(max(pair.clean_ids + pair.corrupted_ids + pair.correct + pair.incorrect) for pair in task.pairs)
    if top >= model.vocab_size:
        raise MethodError(f"task {task.name} has token id {top}, but {model.name} has {model.vocab_size} tokens. Load the task for this model.")
    longest = max(len(pair) for pair in task.pairs)
    if model.arch.n_positions is not None and longest > model.arch.n_positions:
        raise MethodError(f"task {task.name} has prompts of {longest} tokens, but {model.name} reads {model.arch.n_positions} at most.")


def _check_metric(setting: Setting, runs: Runs, meter: Meter) -> None:
    reads = "answer" if setting.task.metric.reads == "answer" else "all"
    logits = meter.run(setting.model, replace(program(setting, runs), metric=None, answers=None, logits=reads)).logits
    setting.task.metric.check_independent(_required(logits), runs.answers)


def _required(value: Any) -> Any:
    if value is None:
        raise MethodError("a run did not return what was asked of it.")
    return value


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _own_version() -> str:
    from patchlab import __version__

    return __version__
