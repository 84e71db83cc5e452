"""Nodes: cells of a site's activation, such as a head of z or a position of the residual stream."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from patchlab.adapters import Architecture
from patchlab.engine import Result, Support, Target, Work, in_blocks, support, sweep
from patchlab.engine.memory import activation_bytes, itemsize, token_bytes
from patchlab.errors import MethodError
from patchlab.host import to_array, to_arrays
from patchlab.interventions import Edit
from patchlab.methods.cells.kind import Exactly, Index, Linear, Linearly, add_cells, listed
from patchlab.methods.corrections import drop_term, every_layer, qk_forwards, qk_scores
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.rounding import product_variance
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored, program, reduced, required
from patchlab.scores.arrays import CellNames
from patchlab.sites import KINDS, POSITION_AXES, Site, address
from patchlab.sources import Blend, Kept, Source
from patchlab.tasks.task import PositionAxis

INPUT: Target = ("input", None)


class Nodes:
    """Cells of activations: patched by edits, scored by the difference of the activation times a coefficient."""

    name = "nodes"
    reads_behind = False

    def check(self, setting: Setting, others: int) -> None:
        """Nodes go with everything, also inside edits."""

    def targets(self, arch: Architecture, sites: tuple[Site, ...]) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(target for site in sites for target in arch.targets(site.kind)))

    def shape(self, arch: Architecture, site: Site, axis: PositionAxis | None) -> tuple[int, ...]:
        return tuple(len(axis) if name in POSITION_AXES and axis is not None else arch.size(name) for name in site.axes)

    def live(self, arch: Architecture, site: Site, changed: Bool[np.ndarray, " pos"], index: Any, reads_answer: bool) -> Bool[np.ndarray, "*cells"]:
        kind = KINDS[site.kind]
        length = len(changed)
        prefix = np.logical_or.accumulate(changed)
        layers = arch.n_layers if kind.layered else 1
        by_pos = np.tile(prefix, (layers, 1))  # layer, position
        if kind.first == "always" or (arch.parallel and kind.first == "parallel"):
            by_pos[0] = changed
        if reads_answer and kind.layered and not kind.attended:
            by_pos[-1, : length - 1] = False
        live = by_pos
        names = ["layer", kind.position]
        if kind.source is not None:
            live = by_pos[:, :, None] & np.tri(length, dtype=bool)
            names.append(kind.source)
        for dim, name in enumerate(names):
            if name in site.axes and name != "layer" and index is not None:
                live = np.take(live, index, axis=dim)
        joint = tuple(dim for dim, name in enumerate(names) if name not in site.axes)
        live = np.asarray(np.any(live, axis=joint))
        kept = [name for name in names if name in site.axes]
        for dim, name in enumerate(site.axes):
            if name not in kept:
                live = np.repeat(np.expand_dims(live, dim), arch.size(name), axis=dim)
        return live

    def record(self, setting: Setting) -> dict[str, Any]:
        return {}

    def names(self, setting: Setting, site: Site) -> CellNames:
        return CellNames()

    def check_exact(self, setting: Setting, how: Exactly) -> None:
        if how.post_norm != "renormalised":
            raise MethodError(
                f"post_norm={how.post_norm!r} says what an edge out of a head carries; got the sites {', '.join(map(str, setting.sites))}, which are "
                f"patched in the model as it runs. Leave it out, or ask for 'edges'."
            )

    def exact_keeps(self, setting: Setting) -> tuple[Target, ...]:
        return ()

    def exact_bytes(self, setting: Setting, rows: int, length: int) -> int:
        arch = setting.model.arch
        kept = 3 * arch.n_layers * rows * length * arch.d_model
        return (
            activation_bytes(setting.model, setting.targets, rows, length)
            + itemsize(setting.model) * (rows * arch.vocab_size + kept)
            + rows * length * token_bytes(setting.model, length)
        )

    def exact_work(self, setting: Setting, how: Exactly) -> Float[np.ndarray, " cell"]:
        mode = support(setting.model).mode if how.engine == "auto" else "literal"
        found = [np.zeros(0)]
        for site in setting.sites:
            if (live := setting.live[str(site)]) is not None:
                cells, kind = np.argwhere(live), KINDS[site.kind]
                layers = cells[:, site.axes.index("layer")] if "layer" in site.axes else np.zeros(len(cells))
                places = cells[:, site.axes.index(kind.position)] if kind.position in site.axes else None
                found.append(shares(setting, mode, layers, places, paired=how.paired))
        return np.concatenate(found)

    def exact_record(self, setting: Setting, how: Exactly) -> dict[str, Any]:
        return {}

    def cells(self, setting: Setting, site: Site, runs: Runs) -> list[Index]:
        return listed(required(setting.live[str(site)]))

    def label(self, setting: Setting, site: Site, cell: Index) -> str:
        return str(cell_address(setting, site, cell))

    def patch(
        self,
        setting: Setting,
        runs: Runs,
        meter: Meter,
        sets: Sequence[Sequence[tuple[Site, Index]]],
        how: Exactly,
        finished: MutableMapping[int, np.ndarray] | None = None,
    ) -> Float[np.ndarray, "set batch"]:
        edits = [tuple(Edit(cell_address(setting, site, cell), runs.source) for site, cell in cells) for cells in sets]
        return patched(setting, runs, meter, edits, engine=how.engine, finished=finished)

    def check_linear(self, setting: Setting, how: Linearly) -> None:
        if how.over == "groups":
            raise MethodError("over='groups' averages over the readers of edges; for nodes use over='activations'.")
        if how.grad_drop and setting.model.arch.n_layers < 2:
            raise MethodError(f"GradDrop drops one layer at a time, and {setting.model.name} has only one; use {how.name} without it.")

    def moves(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        return _linear(setting, how)

    def summed(self, setting: Setting, kept: Mapping[Target, Tensor], *, positional: bool) -> dict[Target, Tensor]:
        return {}

    def step(self, setting: Setting, runs: Runs, moved: Target, start: Source, at: float) -> tuple[Edit, ...]:
        return (Edit(address(*moved), Blend(start, runs.source, at)),)

    def keeps(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        return (*every_layer(setting, "resid_pre"), *every_layer(setting, "pattern")) if _fixed(setting, how) else ()

    def needs(self, setting: Setting, how: Linearly, moved: Target | None) -> dict[str, Any]:
        if moved is not None:
            return {"gradients": (moved,)}
        patterns = every_layer(setting, "pattern") if _fixed(setting, how) else ()
        return {"gradients": tuple(dict.fromkeys((*_linear(setting, how), *patterns)))}

    def passes(self, setting: Setting, how: Linearly) -> int:
        extra = qk_forwards(setting) if how.qk_fix else 0
        if how.over is None or how.grad_drop:
            return extra
        return extra + (not how.paired if how.over == "inputs" else len(_linear(setting, how)))

    def linear_bytes(self, setting: Setting, how: Linearly, rows: int, length: int) -> int:
        if not _fixed(setting, how):
            return 0
        # the patterns, how they change and their coefficients, and the streams
        arch = setting.model.arch
        drops = arch.n_layers if how.grad_drop else 1
        return arch.n_layers * rows * length * ((3 + drops) * arch.n_heads * length + arch.d_model)

    def linear_record(self, setting: Setting, how: Linearly) -> dict[str, Any]:
        if _fixed(setting, how) and how.composite.pattern is not None:
            rule = type(how.composite.pattern).__name__
            return {"notes": [f"q and k are scored by QK-fix, with the true softmax; the {rule} does not act on them"]}
        return {}

    def linear_scored(self, setting: Setting, how: Linearly, site: Site) -> None:
        return None

    def linear(self, setting: Setting, runs: Runs, how: Linearly, drops: Sequence[int | None]) -> Linear:
        return _NodeScores(setting, runs, how, drops)

    def second_order(self, setting: Setting) -> str | None:
        return None


add_cells(Nodes())


def _fixed(setting: Setting, how: Linearly) -> tuple[Target, ...]:
    """The queries and keys that QK-fix scores."""
    return tuple(target for target in setting.targets if target[0] in ("q", "k")) if how.qk_fix else ()


def _linear(setting: Setting, how: Linearly) -> tuple[Target, ...]:
    """Sites scored by difference times coefficient, and the input where the path goes along it."""
    scored = tuple(target for target in setting.targets if target[0] not in how.blocked)
    scored = tuple(dict.fromkeys((*scored, INPUT))) if how.over == "inputs" else scored
    fixed = _fixed(setting, how)
    return tuple(target for target in scored if target not in fixed)


class _NodeScores:
    """Sums the coefficients of one batch over the points of a path; differences times coefficients are the scores."""

    def __init__(self, setting: Setting, runs: Runs, how: Linearly, drops: Sequence[int | None]) -> None:
        self.setting, self.runs, self.how, self.drops = setting, runs, how, drops
        self.skipped = {str(site) for site in setting.sites if site.kind in how.blocked}
        self.fixed = {str(site) for site in setting.sites if (site.kind, 0) in _fixed(setting, how)}
        self.differences = {target: change_of(runs, target) for target in _linear(setting, how)}
        self.total: dict[Target, Tensor] = {}
        self.patterns: list[dict[int, Tensor]] = []
        shapes = {str(site): (len(runs.batch), *required(setting.live[str(site)]).shape) for site in setting.sites}
        self.scores, self.noise = (
            {name: np.full(shape, np.nan if name in self.skipped else 0.0) for name, shape in shapes.items()} for _ in range(2)
        )

    def add(self, point: Result, weight: float, moved: Target | None) -> None:
        if self.how.over is None:
            self.total = dict(point.gradients)
            return
        found = point.gradients if moved is None else {moved: point.gradients[moved]}
        self.total |= {key: gradient * weight + self.total.get(key, 0) for key, gradient in found.items()}

    def close(self, meter: Meter, notes: dict[str, Any], drop: int | None) -> None:
        n_layers = self.setting.model.arch.n_layers
        if drop is None:
            self._note_gaps(meter, notes)
        if self.fixed:
            share = 1.0 if self.how.composite.bilinear is None else self.how.composite.bilinear.share
            self.patterns.append({layer: self.total["pattern", layer] * share for layer in range(n_layers)})
        sites = [site for site in self.setting.sites if str(site) not in self.skipped | self.fixed]
        found = to_arrays([part for site in sites for part in self._linear_scores(site)])
        for site, scores, off in zip(sites, found[::2], found[1::2], strict=True):
            self._count(site, scores, self.runs.rounding.of_products(off, scores), drop)
        self.total = {}

    def result(self, meter: Meter, notes: dict[str, Any]) -> Scored:
        by_name = {str(site): site for site in self.setting.sites}
        for name, found in qk_scores(self.setting, self.runs, meter, self.patterns).items() if self.fixed else ():
            for drop, (scores, off) in zip(self.drops, found, strict=True):
                self._count(by_name[name], scores, off, drop)
        return Scored(self.scores, self.noise)

    def _count(self, site: Site, scores: Float[np.ndarray, "batch *cells"], off: Float[np.ndarray, "batch *cells"], drop: int | None) -> None:
        n_layers = self.setting.model.arch.n_layers
        for into, values in ((self.scores, scores), (self.noise, off)):
            into[str(site)] += values if drop is None else drop_term(values, site.kind, drop, n_layers)

    def _linear_scores(self, site: Site) -> list[Float[Tensor, "batch *cells"]]:
        """Scores, and the squares of their rounding errors."""
        layers = list(range(self.setting.model.arch.n_layers)) if KINDS[site.kind].layered else [None]
        scores: list[Tensor] = []
        variances: list[Tensor] = []
        for key in ((site.kind, layer) for layer in layers):
            change, coefficient, vectors = self.differences[key], self.total[key], KINDS[site.kind].width is not None
            product = change * coefficient.to(change.dtype)
            scores.append(reduced(self.setting, self.runs, site, product.sum(-1) if vectors else product))
            variance = product_variance(change, self.runs.baseline.activations[key], coefficient, vectors=vectors)
            variances.append(reduced(self.setting, self.runs, site, variance))
        return [part[0] if layers == [None] else torch.stack(part, 1) for part in (scores, variances)]

    def _note_gaps(self, meter: Meter, notes: dict[str, Any]) -> None:
        """Completeness gap per example: the sum of a path's scores minus what the whole patch really does."""
        setting, runs, how = self.setting, self.runs, self.how
        if how.over is None:
            return
        groups = (INPUT,) if how.over == "inputs" else tuple(self.total)
        name = "completeness_gap" if how.composite.plain else "non_conservation"
        for group in groups:
            if how.over == "inputs" and how.paired and not setting.surrounding:
                end = runs.clean if setting.direction == "denoising" else runs.corrupted
            else:
                moved = meter.run(setting.model, program(setting, runs, edits=(Edit(address(*group), runs.source),)))
                end = moved.values if moved.values is not None else runs.baseline_values
            scores = (self.differences[group] * self.total[group]).flatten(1).sum(1)
            gaps = to_array(scores - (end - runs.baseline_values)).tolist()
            notes.setdefault(name, {}).setdefault(str(address(*group)), []).extend(gaps)


def change_of(runs: Runs, key: Target) -> Float[Tensor, "batch *site"]:
    """The change that a patch of a whole activation would make, in float32 or better."""
    own = runs.baseline.activations[key]
    wide = torch.float64 if own.dtype == torch.float64 else torch.float32
    return runs.source.values(address(*key), own, runs.batch.examples).to(wide) - own.to(wide)


def cell_address(setting: Setting, site: Site, cell: Index) -> Site:
    """A cell as the address of an edit."""
    kind, names = KINDS[site.kind], None if setting.axis is None else setting.axis.names
    index = dict(zip(site.axes, cell, strict=True))
    pos, src = (
        (index[axis] if names is None else names[index[axis]],) if axis is not None and axis in index else None
        for axis in (kind.position, kind.source)
    )
    return Site(site.kind, (), layer=index.get("layer"), index=None if kind.unit is None else index.get(kind.unit), pos=pos, src=src)


def shares(
    setting: Setting, mode: str, layers: Shaped[np.ndarray, " cell"], places: Int[np.ndarray, " cell"] | None, *, paired: bool
) -> Float[np.ndarray, " cell"]:
    """Of each cell the share of layers and positions from it on, where an engine computes no more than these."""
    share = np.ones(len(layers))
    if mode == "literal":
        return share
    share -= layers / setting.model.arch.n_layers
    if mode == "prefix":
        length = max(len(pair) for pair in setting.task.pairs)
        start = min(batch.first_difference for batch in setting.task.batches(len(setting.task), "cpu")) if paired else 0
        named = setting.axis is None or setting.axis.names is not None
        share *= 1 - (np.full(len(share), start) if places is None or named else np.maximum(start, places)) / length
    return share


def addresses(setting: Setting, site: Site, live: Bool[np.ndarray, "*cells"]) -> Iterator[tuple[Index, Site]]:
    """Index and address of every cell that the mask has."""
    for cell in listed(live):
        yield cell, cell_address(setting, site, cell)


def patched(
    setting: Setting,
    runs: Runs,
    meter: Meter,
    cells: Sequence[tuple[Edit, ...]],
    *,
    engine: str = "auto",
    finished: MutableMapping[int, np.ndarray] | None = None,
) -> Float[np.ndarray, "cell batch"]:
    """Exact effects of cells (sets of edits) on one batch, in metric units.

    ``finished`` holds those that were found before, by number, and gets the others as they are found.
    """
    way = support(setting.model) if engine == "auto" else Support("literal", "asked for")
    finished = {} if finished is None else finished
    base = to_array(runs.baseline_values)

    def found(numbers: list[int], values: Tensor) -> None:
        finished.update(zip(numbers, to_array(values) - base, strict=True))
        meter.keep()

    if way.mode != "literal" and not in_blocks(setting.model, setting.surrounding):
        way = Support("literal", "a surrounding edit reaches several blocks")
    inside = [all(edit.address.layer is not None for edit in cell) and in_blocks(setting.model, cell) for cell in cells]
    fast = [i for i in range(len(cells)) if way.mode != "literal" and inside[i]]
    meter.engine = str(way)
    skip = {place for place, i in enumerate(fast) if i in finished}
    if len(skip) < len(fast):
        work = Work()

        def done(places: list[int], values: Tensor) -> None:
            meter.bar.update(len(places))
            found([fast[place] for place in places], values)

        try:
            sweep(
                setting.model,
                program(setting, runs),
                [cells[i] for i in fast],
                prefix=way.mode == "prefix",
                start=runs.batch.first_difference if isinstance(runs.source, Kept) and not setting.surrounding else 0,
                base=runs.base if way.mode == "prefix" else None,
                max_tokens=_max_tokens(setting, runs),
                done=done,
                skip=skip,
                work=work,
            )
        finally:
            meter.note_room(work.room, "cells")
            meter.forwards += work.forwards + work.cells
            meter.positions += round(work.block_positions / setting.model.arch.n_layers) + work.forwards * runs.baseline_tokens.numel()
    for i in sorted(set(range(len(cells))) - set(fast) - finished.keys()):
        result = meter.run(setting.model, program(setting, runs, edits=cells[i]))
        meter.bar.update(meter.unit == "cell")
        found([i], required(result.values)[None])
    return np.stack([finished[i] for i in range(len(cells))]) if cells else np.zeros((0, len(runs.batch)))


def _max_tokens(setting: Setting, runs: Runs) -> int | None:
    """Rows × positions of a block call that fit into the budget; None for the engine's own choice."""
    if setting.max_memory is None:
        return None
    rows, length = runs.baseline_tokens.shape
    left = setting.max_memory - activation_bytes(setting.model, setting.targets, rows, length)
    return max(1, int(left // token_bytes(setting.model, length)))
