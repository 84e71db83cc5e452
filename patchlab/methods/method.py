"""The base class of all methods: checks, batches, the metric of the two unpatched runs, provenance and cost.

A method is a frozen dataclass of hyper-parameters with one verb, :meth:`Method.run`. A concrete method says only how the
effects of one batch are found.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int

from patchlab.adapters.accessors import HOSTS
from patchlab.engine import Target, session_of
from patchlab.engine.memory import free_bytes
from patchlab.engine.pending import empty_cache, is_out_of_memory
from patchlab.errors import MethodError, unknown
from patchlab.host import to_arrays
from patchlab.methods.cells import CellKind, cells_of, parts
from patchlab.methods.cells.kind import summed
from patchlab.methods.plan import Plan
from patchlab.methods.registry import name_of
from patchlab.methods.setting.batches import cut_as, halved
from patchlab.methods.setting.checkpoint import Checkpoint, Finished, batch_rows, described, joined, keeping
from patchlab.methods.setting.fingerprint import identify
from patchlab.methods.setting.liveness import live_cells, live_patterns, pattern_cells, without_path
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import DIRECTIONS, SOURCES, Setting
from patchlab.methods.setting.unpatched import Runs, Scored, check_metric, mean_source, resumable, unpatched
from patchlab.metrics import PACKAGED
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.scores import Cost, ScoreMap
from patchlab.scores.arrays import Patterns, concatenated
from patchlab.sites import POSITION_AXES, Site, parse_sites
from patchlab.store import Keeper
from patchlab.tasks.task import Batch, Task
from patchlab.versions import library_versions


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; ``source``, which goes by keyword, says what is patched in.

    ``source``: ``paired`` (the other prompt's activation), ``zero``, ``mean`` (over all examples and positions of the other
    prompts) or ``mean_positional`` (over examples only).
    """

    source: str = field(default="paired", kw_only=True)
    unit: ClassVar[str] = "forward"

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise MethodError(unknown("source", self.source, SOURCES))

    @property
    def name(self) -> str:
        """The name by which results refer to the method, that of the registry."""
        return name_of(self)

    @abstractmethod
    def forwards(self, setting: Setting) -> int:
        """Steps of the progress bar per batch: forward passes, or whatever ``unit`` says."""

    def backwards(self, setting: Setting) -> int:
        """Backward passes per batch."""
        return 0

    def work(self, setting: Setting) -> float:
        """The work per batch, in forward passes of it: a backward pass counts as two."""
        return self.forwards(setting) + 2.0 * self.backwards(setting)

    @abstractmethod
    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        """Memory for the activations of one batch, in bytes."""

    @abstractmethod
    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        """Scores of one batch. ``notes[name][group]`` is a list to add one value per example to."""

    def not_scored(self, setting: Setting) -> dict[str, str]:
        """Sites that this method cannot score, with the reason."""
        return {}

    def scored(self, kind: CellKind, setting: Setting, site: Site) -> Bool[np.ndarray, "*first"] | None:
        """The cells of a site that this method can score; None for all."""
        return None

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        """Extra fields of the program of the unpatched baseline run."""
        return {}

    def resumes(self, setting: Setting) -> bool:
        """Whether the baseline may run from the first difference on, with the source run's keys and values before it."""
        return False

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
        checkpoint: str | os.PathLike[str] | Keeper | None = None,
    ) -> ScoreMap:
        """Score every cell of the sites: an estimate, per example, of the effect of patching it.

        Args:
            model: the model.
            task: prompt pairs, answers and metric.
            sites: such as ``"resid_pre"`` or ``["resid_pre", "z[layer,pos,head]"]``.
            direction: ``denoising`` (clean activations into the corrupted run; effect over the corrupted metric) or
                ``noising`` (corrupted into clean; effect over the clean metric).
            batch_size: examples per batch; default as many of one length as fit in memory. Results do not depend on it.
            progress: show a progress bar on stderr; without a terminal, a line every ten seconds.
            max_memory: most bytes to use for activations; default half of what is free. A run that is
                predicted to need more than a given max_memory does not start.
            checkpoint: a file, or another :class:`~patchlab.store.Keeper`, that finished work is written to every few seconds and after an
                exception; it is removed when the run ends normally. The same call again, also in a new process, goes on from there, with
                the very numbers of an uninterrupted run and the cost of all parts. Without one an interrupted run (Ctrl-C) leaves its
                finished work on the model: the same call again goes on. Finished work is cells in exact patching, batches in other methods.

        Returns:
            Effects in the metric's unit.

        Raises:
            ModelError: another thread runs the model.
            MethodError: unknown direction, batch_size < 1, too little memory, options that make no sense together, a checkpoint
                that is damaged or of another run.
            OutputError: a checkpoint that cannot be written.
            SiteError: unknown or absent site.
        """
        options: dict[str, Any] = {"direction": direction, "max_memory": max_memory}
        unfinished = session_of(model).unfinished
        prepared = self.prepared(model, task, sites, batch_size=batch_size, **options)
        identity = self._identity(*prepared[:2])
        if batch_size is None and (rows := batch_rows(unfinished, identity, checkpoint)) is not None:
            prepared = self.prepared(model, task, sites, batch_size=rows, **options)
            identity = self._identity(*prepared[:2])
        with session_of(model).running(), keeping(unfinished, identity, checkpoint) as work:
            return self._run(*prepared, progress, work)

    def prepared(
        self,
        model: Model,
        task: Task,
        sites: str | Site | Iterable[str | Site],
        *,
        direction: str = "denoising",
        batch_size: int | None = None,
        max_memory: int | float | None = None,
    ) -> tuple[Setting, list[Batch], int]:
        """The start of :meth:`run`: the checked setting, the batches, and the bytes predicted for the largest one.

        Raises:
            MethodError, SiteError: as :meth:`run`.
        """
        if direction not in DIRECTIONS:
            raise MethodError(unknown("direction", direction, DIRECTIONS))
        if batch_size is not None and batch_size < 1:
            raise MethodError(f"batch_size is {batch_size}; it must be at least 1 (or None for all examples of one length at once).")
        parsed = model.arch.meant(parse_sites(sites))
        for site in parsed:
            model.arch.check(site)
        bare = Setting(model, task, parsed, "denoising" if direction == "denoising" else "noising", None, {}, max_memory=max_memory)
        for kind, part in parts(bare):
            kind.check(part, len(parsed) - len(part.sites))
        _check_tokens(model, task)
        needs_axis = any(set(site.axes) & set(POSITION_AXES) for site in parsed)
        axis = task.position_axis() if needs_axis else None
        paired = self.source == "paired"
        live = {str(site): live_cells(model.arch, site, task, axis, paired=paired) for site in parsed}
        if bare.surrounding:
            shapes = {str(site): cells_of(site).shape(model.arch, site, axis) for site in parsed}
            live = {name: None if mask is None else np.ones(shapes[name], dtype=bool) for name, mask in live.items()}
        moving = tuple(dict.fromkeys(target for kind, part in parts(bare) for target in kind.targets(model.arch, part.sites)))
        setting = replace(bare, axis=axis, live=live, targets=moving)
        self.check(setting)
        budget = free_bytes(model.device) // 2 if max_memory is None else max_memory
        longest = max(len(pair) for pair in task.pairs)
        rows = batch_size
        if rows is None:
            rows = max(1, min(len(task), int(budget // max(1, self.predicted_bytes(setting, 1, longest)))))
        batches = task.batches(rows, model.device)
        predicted = max(self.predicted_bytes(setting, *batch.clean.shape) for batch in batches)
        if max_memory is not None and predicted > max_memory:
            raise MethodError(
                f"{self.name} is predicted to need {_megabytes(predicted)} for a batch of {max(map(len, batches))} examples, "
                f"and max_memory is {_megabytes(max_memory)}. Lower batch_size, ask for fewer sites, or raise max_memory."
            )
        return setting, batches, predicted

    def plan(
        self,
        model: Model,
        task: Task,
        sites: str | Site | Iterable[str | Site],
        *,
        direction: str = "denoising",
        batch_size: int | None = None,
        max_memory: int | float | None = None,
    ) -> Plan:
        """The plan of :meth:`run`: how many passes it will take; :func:`patchlab.methods.plan.forward_seconds` says how long one takes.

        Raises:
            MethodError, SiteError: as :meth:`run`.
        """
        setting, batches, _ = self.prepared(model, task, sites, direction=direction, batch_size=batch_size, max_memory=max_memory)
        means = self.source.startswith("mean")
        forwards = (self.forwards(setting) + (2 if self.unit == "cell" else 0) + means) * len(batches)
        if self.unit == "cell" and self.resumes(setting):  # a baseline in the whole leaves nothing to resume cells from, so it is run once more
            forwards += sum(not resumable(setting, batch, self.source) for batch in batches)
        return Plan(forwards, self.backwards(setting) * len(batches), self.work(setting) + means, self._uncounted(setting))

    def _uncounted(self, setting: Setting) -> tuple[str, ...]:
        """Sites whose cells count as steps, of which only the runs show how many there are."""
        return tuple(site for site, live in setting.live.items() if live is None and self.unit == "cell")

    def _identity(self, setting: Setting, batches: list[Batch]) -> dict[str, str | None]:
        return identify(self.provenance_of(setting, {}), setting, described([len(batch) for batch in batches]))

    def _run(self, setting: Setting, batches: list[Batch], predicted: int, progress: bool, work: Checkpoint) -> ScoreMap:
        model, task = setting.model, setting.task
        on_cuda = model.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        steps, means = self.forwards(setting), self.source.startswith("mean") and self.unit == "forward"
        before = len(work.batches) * steps + len(work.cells_of(len(work.batches)))
        total = None if self._uncounted(setting) else len(batches) * (steps + means)
        with progress_bar(self.name, self.unit, total, done=before, show=progress) as bar:
            meter = Meter(bar, self.unit)
            work.begin(meter)
            setting = self.with_mean(setting, batches, meter)
            trusted = task.metric in PACKAGED or any(len(batch) > 1 for batch in batches[: len(work.batches)])
            batches = cut_as(batches, work.sizes())
            while (number := len(work.batches)) < len(batches):
                check = not trusted and len(batches[number]) > 1  # a batch of one shows nothing
                finished = self._tried(setting, batches[number], meter, work.cells_of(number), check=check)
                if finished is not None:
                    work.add(finished)
                    trusted = trusted or check
                    continue
                empty_cache()
                meter.notes.append(f"memory ran out with {len(batches[number])} examples at once; went on with half as many")
                batches, work.cells = halved(batches, number), (number, {})
        skipped = self.not_scored(setting)
        forwards, backwards, positions, seconds = work.spent()
        done = work.batches
        effects, noise, errors = (
            {site: concatenated([found[site] for found in of_batches]) for site in map(str, setting.sites) if site in of_batches[0]}
            for of_batches in ([getattr(one.scored, part.name) for one in done] for part in fields(Scored))
        )
        clean, corrupted = (np.concatenate([getattr(one, side) for one in done]) for side in ("clean", "corrupted"))
        examples = torch.cat([batch.examples for batch in batches]).cpu().numpy()
        order = np.argsort(examples).tolist()  # as the map orders its rows
        notes = {name: {group: [values[i] for i in order] for group, values in groups.items()} for name, groups in joined(done).items()}
        record = self.provenance_of(setting, skipped)
        return ScoreMap.build(
            effects,
            setting.live,
            patterns=self._patterns(setting, examples),
            noise=noise,
            standard_error=errors or None,
            task_axis=setting.axis,
            no_path=self._no_path(setting),
            names={
                str(site): replace(kind.names(part, site), scored=self.scored(kind, part, site))
                for kind, part in parts(setting)
                for site in part.sites
            },
            examples=examples,
            metric_clean=clean,
            metric_corrupted=corrupted,
            provenance={**record, "notes": [*record["notes"], *meter.notes], "engine": meter.engine, **notes},
            cost=Cost(
                forwards,
                backwards,
                positions,
                seconds,
                predicted,
                torch.cuda.max_memory_allocated(model.device) if on_cuda else None,
            ),
        )

    def with_mean(self, setting: Setting, batches: list[Batch], meter: Meter) -> Setting:
        """The setting with the mean that is patched in, where one is."""
        if not self.source.startswith("mean"):
            return setting
        positional = self.source == "mean_positional"
        at, extra = self.source_targets(setting), summed(setting, positional=positional)
        return replace(setting, mean=mean_source(setting, batches, meter, at=at, positional=positional, summed=extra))

    def _tried(self, setting: Setting, batch: Batch, meter: Meter, cells: dict[int, np.ndarray], *, check: bool) -> Finished | None:
        """One batch; None if memory ran out and fewer examples may fit, once what the run held is gone."""
        notes: dict[str, Any] = {}
        meter.cells = cells
        try:
            at, baseline = self.source_targets(setting), self.baseline_options(setting)
            runs = unpatched(setting, batch, meter, source=self.source, at=at, baseline=baseline, resume=self.resumes(setting))
            if check:
                check_metric(setting, runs, meter)
            scored = _with_noise(setting, runs, self.score(setting, runs, meter, notes))
            clean, corrupted = to_arrays([runs.clean, runs.corrupted])
            return Finished(scored, clean, corrupted, notes)
        except RuntimeError as error:
            if is_out_of_memory(error) and len(batch) > 1:
                return None
            if is_out_of_memory(error):
                error.add_note(f"patchlab: {self.name} does not fit with one example at a time; ask for fewer sites, or shorter prompts.")
            raise

    def _patterns(self, setting: Setting, examples: Int[np.ndarray, " example"]) -> Patterns | None:
        """Which cells can matter for which example; None where all can for all."""
        if setting.surrounding:
            return None
        task, axis, paired = setting.task, setting.axis, self.source == "paired"
        number = live_patterns(task, axis, paired=paired)
        first = np.unique(number, return_index=True)[1].tolist()
        found = {str(site): pattern_cells(setting.model.arch, site, task, axis, first, paired=paired) for site in setting.sites}
        return Patterns(number[examples], {site: cells for site, cells in found.items() if cells is not None})

    def _no_path(self, setting: Setting) -> dict[str, np.ndarray]:
        known = {site: live for site in setting.sites if (live := setting.live[str(site)]) is not None}
        if setting.surrounding:  # then no cell is taken as a structural zero
            return {str(site): np.zeros_like(live) for site, live in known.items()}
        found = {str(site): without_path(setting.model.arch, site, setting.task, setting.axis) for site in known}
        return {site: cut for site, cut in found.items() if cut is not None}

    def source_targets(self, setting: Setting) -> tuple[Target, ...]:
        """The activations of the source that are needed."""
        return setting.targets

    def provenance_of(self, setting: Setting, skipped: dict[str, str]) -> dict[str, Any]:
        """The provenance of a run; ``skipped`` are the sites that are not scored, with reasons."""
        model, task = setting.model, setting.task
        options = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        ambient = [f"{edit.op} {edit.address}" for edit in setting.surrounding]
        notes = [f"{len(ambient)} surrounding edits; no cell is taken as a structural zero"] if ambient else []
        notes += [setting.axis.note] if setting.axis is not None and setting.axis.note else []
        return {
            "method": self.name,
            "method_options": options,
            "task": f"{task.name}[{len(task)}]",
            "task_fingerprint": task.fingerprint,
            "task_pairs": list(task.pair_fingerprints),
            "task_provenance": task.provenance,
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "direction": setting.direction,
            "metric": task.metric.name,
            "metric_unit": task.metric.unit,
            "versions": library_versions(),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            **_added(setting),
            "not_scored": skipped,
            "ambient": ambient,
            **{name: value for kind, part in parts(setting) for name, value in kind.record(part).items()},
            "notes": notes,
        }


def _with_noise(setting: Setting, runs: Runs, scored: Scored) -> Scored:
    """A difference of two metrics is as uncertain as both, where the method does not know better."""
    two = np.sqrt(2) * runs.rounding.metric
    return replace(scored, noise={str(site): scored.noise.get(str(site), two) for site in setting.sites})


def _megabytes(count: int | float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,.0f} bytes"


def _check_tokens(model: Model, task: Task) -> None:
    top = max(max(pair.clean_ids + pair.corrupted_ids + pair.correct + pair.incorrect) for pair in task.pairs)
    if top >= model.vocab_size:
        raise MethodError(f"task {task.name} has token id {top}, but {model.name} has {model.vocab_size} tokens. Load the task for this model.")
    longest = max(len(pair) for pair in task.pairs)
    if model.arch.n_positions is not None and longest > model.arch.n_positions:
        raise MethodError(f"task {task.name} has prompts of {longest} tokens, but {model.name} reads {model.arch.n_positions} at most.")


def _added(setting: Setting) -> dict[str, Any]:
    """What tells the site kinds that are not part of the model itself."""
    accessors = setting.model.arch.accessors
    found = {site.kind: accessors[site.kind].identity for site in setting.sites if site.kind in accessors and site.kind not in HOSTS}
    entries = {kind: {str(layer): accessors[kind].entries(layer) for layer in accessors[kind].layers(setting.model.arch.n_layers)} for kind in found}
    sizes = {kind: {"n_layers": setting.model.arch.n_layers, "entries": own} for kind, own in entries.items()}
    return {"added_sites": found, "added_entries": sizes} if found else {}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
