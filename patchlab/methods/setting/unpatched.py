"""The unpatched runs that every method starts from, and where the patched-in values come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.engine import Baseline, Program, Result, Target, run_rest
from patchlab.errors import MethodError
from patchlab.host import precise
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.rounding import Rounding, rounding
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.shared import unedited
from patchlab.metrics import Answers
from patchlab.scores.arrays import Effects
from patchlab.sites import KINDS, POSITION_AXES, Site
from patchlab.sources import Average, Kept, Source, Zero
from patchlab.tasks.task import Batch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Runs:
    """The unpatched runs of one batch, with the source run's activations at the sites.

    ``base`` is what a sweep resumes from, where the baseline run left it. ``rounding`` is what the dtype makes of the metric. ``derived`` is what
    kinds of cells have computed from these runs, for all that ask again.
    """

    batch: Batch
    answers: Answers
    baseline_tokens: Int[Tensor, "batch pos"]
    clean: Tensor
    corrupted: Tensor
    source: Source
    positions: Mapping[str, Int[Tensor, " batch"]]
    baseline: Result
    rounding: Rounding
    base: Baseline | None = None
    derived: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False)

    @property
    def baseline_values(self) -> Tensor:
        """The metric before patching."""
        return self.baseline.values if self.baseline.values is not None else self.clean


@dataclass(frozen=True)
class Scored:
    """Scores of one batch, per site ``[batch, *axes]`` in metric units.

    ``noise`` is the rounding error to be expected of each effect where the method knows more about it than the resolution of the metric
    (see :mod:`patchlab.methods.setting.rounding`); ``standard_error`` that of effects estimated with random probes, NaN where it is unknown.
    """

    effects: Mapping[str, Effects]
    noise: Mapping[str, Effects] = field(default_factory=dict[str, Effects])
    standard_error: Mapping[str, Effects] = field(default_factory=dict[str, Effects])


def unpatched(
    setting: Setting, batch: Batch, meter: Meter, *, source: str, at: tuple[Target, ...], baseline: Mapping[str, Any], resume: bool = False
) -> Runs:
    """Run the clean, then the corrupted prompts; one of them is the baseline, the other the source.

    Args:
        setting: what the method was asked.
        batch: pairs of one length.
        meter: counts the work.
        source: ``paired``, or a source that does not come from this batch.
        at: where a paired source's activations are kept.
        baseline: extra fields of the program of the baseline run.
        resume: run the baseline only from the first difference on where that gives the same. Its gradients before are then zero, as are
            the differences that they are multiplied by.
    """
    if resume and resumable(setting, batch, source):
        return _resumed(setting, batch, meter, at=at, baseline=baseline, start=batch.first_difference)
    denoising = setting.direction == "denoising"
    kept = {"keep": at if source == "paired" else ()}
    clean = _run_clean(setting, batch, meter, kept if denoising else baseline)
    answers = batch.answers
    if setting.task.metric.needs_clean:
        # the clean run is its own reference
        answers = replace(answers, clean_logits=clean.logits)
        if clean.values is None:
            clean = replace(clean, values=setting.task.metric(required(clean.logits), answers))
    extra = baseline if denoising else kept
    scored = {"metric": setting.task.metric, "answers": answers, "logits": setting.task.metric.reads}
    corrupted = _run(setting, meter, _program(setting, batch, batch.corrupted, extra, **scored))
    base, other = (corrupted, clean) if denoising else (clean, corrupted)
    patched_in: Source = Kept(other.activations, batch.examples)
    if source != "paired":
        patched_in = Zero() if source == "zero" else required(setting.mean)
    tokens = batch.corrupted if denoising else batch.clean
    off = _rounding(setting, answers, clean, corrupted)
    base = replace(base, logits=None)
    return Runs(batch, answers, tokens, required(clean.values), required(corrupted.values), patched_in, batch.positions, base, off)


def _rounding(setting: Setting, answers: Answers, clean: Result, corrupted: Result) -> Rounding:
    model, metric, denoising = setting.model, setting.task.metric, setting.direction == "denoising"
    ends = required(clean.logits), required(corrupted.logits)
    return rounding(metric, answers, *ends, dtype=model.dtype, n_layers=model.arch.n_layers, denoising=denoising)


def of_rows(runs: Runs, rows: Int[np.ndarray, " row"]) -> Runs:
    """The runs of some examples of a batch; of the baseline only the metric."""
    index = torch.as_tensor(rows, device=runs.baseline_tokens.device)
    answers, some = runs.answers.rows(index), runs.batch.rows(rows)
    baseline = Result(some.examples, values=runs.baseline_values[index])
    return Runs(
        some,
        answers,
        runs.baseline_tokens[index],
        runs.clean[index],
        runs.corrupted[index],
        runs.source,
        some.positions,
        baseline,
        runs.rounding.rows(rows),
    )


def resumable(setting: Setting, batch: Batch, source: str) -> bool:
    """Whether running the baseline only from the first difference on gives the same."""
    answer_only = setting.task.metric.reads == "answer" and not (setting.task.metric.needs_clean and setting.direction == "noising")
    return batch.first_difference > 0 and source == "paired" and answer_only and not setting.surrounding


def _resumed(setting: Setting, batch: Batch, meter: Meter, *, at: tuple[Target, ...], baseline: Mapping[str, Any], start: int) -> Runs:
    """The source run in the whole, then the baseline run from the first difference on."""
    denoising, metric, answers = setting.direction == "denoising", setting.task.metric, batch.answers
    tokens, others = (batch.corrupted, batch.clean) if denoising else (batch.clean, batch.corrupted)
    keep = {"keep": tuple(dict.fromkeys((*at, *baseline.get("keep", ()))))}
    if metric.needs_clean:
        source, cache = unedited(setting.model, _program(setting, batch, others, keep, logits="answer"), meter, cached=True)
        answers = replace(answers, clean_logits=source.logits)
        source = replace(source, values=metric(required(source.logits), answers))
    else:
        program = _program(setting, batch, others, keep, metric=metric, answers=answers, logits="answer")
        source, cache = unedited(setting.model, program, meter, cached=True)
    rest = _program(setting, batch, tokens, baseline, metric=metric, answers=answers, logits="answer")
    base, resumed = run_rest(setting.model, rest, cache, start, source.activations)
    clean, corrupted = (source, meter.count(base)) if denoising else (meter.count(base), source)
    patched_in = Kept(source.activations, batch.examples)
    off = _rounding(setting, answers, clean, corrupted)
    base = replace(base, logits=None)
    return Runs(batch, answers, tokens, required(clean.values), required(corrupted.values), patched_in, batch.positions, base, off, resumed)


def _run_clean(setting: Setting, batch: Batch, meter: Meter, extra: Mapping[str, Any]) -> Result:
    metric = setting.task.metric
    if metric.needs_clean:
        reads = metric.reads
        if not extra.get("gradients"):
            return _run(setting, meter, _program(setting, batch, batch.clean, extra, logits=reads))
        # a gradient at the clean run itself: the reference has to be there first
        reference = meter.run(setting.model, _program(setting, batch, batch.clean, {}, logits=reads)).logits
        answers = replace(batch.answers, clean_logits=reference)
        return meter.run(setting.model, _program(setting, batch, batch.clean, extra, metric=metric, answers=answers, logits=reads))
    return _run(setting, meter, _program(setting, batch, batch.clean, extra, metric=metric, answers=batch.answers, logits=metric.reads))


def _run(setting: Setting, meter: Meter, program: Program) -> Result:
    differentiated = bool(program.gradients or program.hook_gradients)
    return meter.run(setting.model, program) if differentiated else unedited(setting.model, program, meter)[0]


def _program(setting: Setting, batch: Batch, tokens: Int[Tensor, "batch pos"], extra: Mapping[str, Any], **options: Any) -> Program:
    return Program(tokens, batch.examples, positions=batch.positions, **options, **extra)


def program(setting: Setting, runs: Runs, **options: Any) -> Program:
    """A program on the baseline prompts of a batch that evaluates the task's metric."""
    return Program(runs.baseline_tokens, runs.batch.examples, positions=runs.positions, metric=setting.task.metric, answers=runs.answers, **options)


def mean_source(
    setting: Setting,
    batches: list[Batch],
    meter: Meter,
    *,
    at: tuple[Target, ...],
    positional: bool,
    summed: Callable[[Mapping[Target, Tensor]], Mapping[Target, Tensor]] | None = None,
) -> Average:
    """Mean activations of the source prompts over the whole task, summed in float64; never over heads or neurons. ``summed`` gives sums of what is
    computed from the activations of a batch.

    Raises:
        MethodError: a pattern without ``positional``, or positional means of several lengths or templates.
    """
    if not positional and any(KINDS[kind].source is not None for kind, _ in at):
        raise MethodError("the mean of a pattern over positions is not an attention pattern; use source='mean_positional' or leave pattern out.")
    if positional and not setting.task.aligned:
        raise MethodError("positional means need examples of one length and template; this task has several. Use source='mean'.")
    sums: dict[Target, Tensor] = {}
    count = 0
    for batch in batches:
        tokens = batch.clean if setting.direction == "denoising" else batch.corrupted
        kept = meter.run(setting.model, _program(setting, batch, tokens, {}, keep=at)).activations
        for key, value in kept.items():
            total = precise(value).sum(0) if positional else precise(value).sum((0, 1))[None]
            sums[key] = total if key not in sums else sums[key] + total
        if summed is not None:
            for key, total in summed(kept).items():
                sums[key] = total if key not in sums else sums[key] + total
        count += tokens.shape[0] if positional else tokens.numel()
    return Average({key: total / count for key, total in sums.items()}, positional)


def check_metric(setting: Setting, runs: Runs, meter: Meter) -> None:
    """Check a user's metric for independence between examples, on the baseline run of one batch."""
    logits = meter.run(setting.model, replace(program(setting, runs), metric=None, answers=None, logits=setting.task.metric.reads)).logits
    setting.task.metric.check_independent(required(logits), runs.answers)


def reduced(setting: Setting, runs: Runs, site: Site, values: Float[Tensor, "batch *site"]) -> Float[Tensor, "batch *cells"]:
    """Values over all axes of one layer of a site, as cells: summed over the axes taken jointly, read at the named positions."""
    names = [name for name in KINDS[site.kind].axes if name != "layer"]
    for dim, name in reversed(list(enumerate(names, start=1))):
        if name not in site.axes:
            values = values.sum(dim)
        elif name in POSITION_AXES:
            values = at_positions(setting, runs, values, dim)
    return values


def at_positions(setting: Setting, runs: Runs, values: Float[Tensor, "batch *axes"], dim: int) -> Float[Tensor, "batch *cells"]:
    """Values along a position axis, read at the named positions where the axis is made of those."""
    if setting.axis is None or setting.axis.names is None:
        return values
    index = torch.as_tensor(setting.axis.index[runs.batch.examples.cpu().numpy()], device=values.device)
    shape = [1] * values.ndim
    shape[0], shape[dim] = index.shape
    expanded = [*values.shape]
    expanded[dim] = index.shape[1]
    return values.gather(dim, index.reshape(shape).expand(expanded))


def required(value: Value | None) -> Value:
    """The value itself, where a run was asked for it and so must have returned it.

    Raises:
        MethodError: it is None.
    """
    if value is None:
        raise MethodError("a run did not return what was asked of it.")
    return value
