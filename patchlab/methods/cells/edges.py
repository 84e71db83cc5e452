"""Edges: what one component writes, as one other component reads it.

*Exact.* The reader's input carries the writer's output of the other run, everything else is as it is.

*Linearised.* An edge's score is ``Σ (u_source − u_baseline) · g_r`` over positions and channels, where ``g_r`` is the part of the gradient (or
relevance coefficient) at the residual stream that comes through reader r alone. It is never computed by a backward pass of its
own: the gradients at q, k, v and at the MLP's input, from the pass that node scores take, go back through W and the norm before it.
Source: EAP, Syed et al. 2023 (arXiv 2310.10348); EAP-IG, Hanna et al. 2024 (arXiv 2403.17806).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.adapters import Architecture, NormPlace
from patchlab.engine import Result, Support, Target, Work
from patchlab.engine.contributions import Layer, has_post_norm, layers_of, post_norm_problem, post_norm_record, written_at
from patchlab.engine.edge_sweep import Differences, edge_sweep
from patchlab.engine.memory import itemsize, token_bytes
from patchlab.engine.trust.edges import edge_mask, edge_support, run_edge_sets
from patchlab.errors import MethodError
from patchlab.host import to_array, to_arrays
from patchlab.interventions import Edit
from patchlab.methods.cells.kind import Exactly, Index, Linear, Linearly, add_cells, listed, stacked
from patchlab.methods.cells.nodes import change_of, shares
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored, at_positions, program, required
from patchlab.rules import Composite
from patchlab.rules.jacobian import norm_jvp, norm_vjp
from patchlab.scores.arrays import CellNames
from patchlab.sites import Site, address
from patchlab.sources import Blend, Kept, Source
from patchlab.tasks.task import PositionAxis

CHUNK_BYTES = 2**26
"""What the outputs of all writers may take at once; more examples than fit are scored in chunks."""


class Edges:
    """Cells ``[writer, reader]``, also by the position at which the reader reads, or by pairs of positions."""

    name = "edges"
    reads_behind = True

    def check(self, setting: Setting, others: int) -> None:
        among = others + len(setting.sites) - 1
        if among or setting.surrounding:
            got = f"together with {among} other sites" if among else "inside intervene"
            raise MethodError(f"edges are scored on the model as it is, in a run of their own; got them {got}. Run them alone.")

    def targets(self, arch: Architecture, sites: tuple[Site, ...]) -> tuple[Target, ...]:
        return written_at(arch)

    def shape(self, arch: Architecture, site: Site, axis: PositionAxis | None) -> tuple[int, ...]:
        return (*arch.graph.allowed.shape, *(0 if axis is None else len(axis) for _ in site.axes[2:]))

    def live(self, arch: Architecture, site: Site, changed: Bool[np.ndarray, " pos"], index: Any, reads_answer: bool) -> Bool[np.ndarray, "*cells"]:
        # what the writer holds can differ at a position, and what the reader reads there can matter
        graph, length = arch.graph, len(changed)
        prefix = np.logical_or.accumulate(changed)
        written = np.tile(prefix, (len(graph.writers), 1))
        written[0] = changed
        if arch.parallel and graph.mlps:
            written[graph.mlp_of(0)] = changed  # the first MLP reads the input alone
        last = np.arange(length) == length - 1
        read = np.ones((len(graph.readers), length), dtype=bool)
        crossing, late = np.isin(graph.reader_kind, ("k", "v")), graph.reader_layer >= graph.n_layers - 1
        if reads_answer:
            read[late & ~crossing] = last
        if "dest" not in site.axes:
            by_pos = written[:, None, :] & read[None, :, :]
            if "pos" not in site.axes:
                return graph.allowed & by_pos.any(-1)
            return graph.allowed[:, :, None] & (by_pos if index is None else np.take(by_pos, index, axis=2))
        pairs = np.where(crossing[:, None, None], np.tri(length, dtype=bool), np.eye(length, dtype=bool) & read[:, :, None])
        if reads_answer:
            pairs[late] &= last[:, None]
        if index is not None:
            pairs, written = pairs.take(index, axis=1).take(index, axis=2), written.take(index, axis=1)
        return graph.allowed[:, :, None, None] & written[:, None, None, :] & pairs[None]

    def record(self, setting: Setting) -> dict[str, Any]:
        return {"graph": setting.model.arch.graph.as_dict()}

    def names(self, setting: Setting, site: Site) -> CellNames:
        graph = setting.model.arch.graph
        layers = np.broadcast_to(graph.reader_layer, graph.allowed.shape)
        return CellNames({"writer": graph.writers, "reader": graph.readers}, "edge", "{writer}->{reader}", graph.allowed, layers)

    def check_exact(self, setting: Setting, how: Exactly) -> None:
        if (problem := post_norm_problem(setting.model, how.post_norm)) is not None:
            raise MethodError(problem)
        if "dest" in setting.sites[0].axes:
            raise MethodError(
                "exact patching scores an edge by the position at which its reader reads, not by pairs of positions; got "
                f"{setting.sites[0]}. Ask for 'edges' or 'edges[writer,reader,pos]', or take a linearised method such as RelevancePatching()."
            )

    def exact_keeps(self, setting: Setting) -> tuple[Target, ...]:
        return setting.targets

    def exact_bytes(self, setting: Setting, rows: int, length: int) -> int:
        return exact_bytes(setting, rows, length)

    def exact_work(self, setting: Setting, how: Exactly) -> Float[np.ndarray, " cell"]:
        mode = edge_support(setting.model).mode if how.engine == "auto" else "literal"
        cells = np.argwhere(required(setting.live[str(setting.sites[0])]))
        layers = setting.model.arch.graph.reader_layer[cells[:, 1]]
        return shares(setting, mode, layers, cells[:, 2] if cells.shape[1] > 2 else None, paired=how.paired)

    def exact_record(self, setting: Setting, how: Exactly) -> dict[str, Any]:
        return post_norm_record(setting.model, how.post_norm)

    def cells(self, setting: Setting, site: Site, runs: Runs) -> list[Index]:
        return listed(required(setting.live[str(site)]))

    def label(self, setting: Setting, site: Site, cell: Index) -> str:
        names = None if setting.axis is None else setting.axis.names
        where = "" if len(cell) < 3 else f"@{cell[2] if names is None else names[cell[2]]}"
        return setting.model.arch.graph.name(*cell[:2]) + where

    def patch(
        self,
        setting: Setting,
        runs: Runs,
        meter: Meter,
        sets: Sequence[Sequence[tuple[Site, Index]]],
        how: Exactly,
        finished: MutableMapping[int, np.ndarray] | None = None,
    ) -> Float[np.ndarray, "set batch"]:
        if all(len(cells) == 1 for cells in sets):
            single = stacked([cell for ((_, cell),) in sets], len(setting.sites[0].axes))
            return edge_effects(setting, runs, meter, single, engine=how.engine, finished=finished, post_norm=how.post_norm)
        masks = np.zeros((len(sets), *required(setting.live[str(setting.sites[0])]).shape), dtype=bool)
        for mask, cells in zip(masks, sets, strict=True):
            mask[tuple(stacked([cell for _, cell in cells], mask.ndim).T)] = True
        return set_effects(setting, runs, meter, masks, post_norm=how.post_norm)

    def check_linear(self, setting: Setting, how: Linearly) -> None:
        edge_options(setting, how.composite)
        if how.qk_fix or how.grad_drop:
            raise MethodError(f"{how.name} corrects scores of nodes: QK-fix and GradDrop are not defined for edges. Use the method without them.")

    def moves(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        return setting.targets

    def summed(self, setting: Setting, kept: Mapping[Target, Tensor], *, positional: bool) -> dict[Target, Tensor]:
        return {}

    def step(self, setting: Setting, runs: Runs, moved: Target, start: Source, at: float) -> tuple[Edit, ...]:
        return (Edit(address(*moved), Blend(start, runs.source, at)),)

    def keeps(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        return ()

    def needs(self, setting: Setting, how: Linearly, moved: Target | None) -> dict[str, Any]:
        return edge_options(setting, how.composite)

    def passes(self, setting: Setting, how: Linearly) -> int:
        return int(how.over == "inputs" and not how.paired)

    def linear_bytes(self, setting: Setting, how: Linearly, rows: int, length: int) -> int:
        return linear_bytes(setting, rows, length)

    def linear_record(self, setting: Setting, how: Linearly) -> dict[str, Any]:
        return {"readers_not_scored": how.composite.not_scored} if how.composite.not_scored else {}

    def linear_scored(self, setting: Setting, how: Linearly, site: Site) -> Bool[np.ndarray, "writer reader"] | None:
        graph = setting.model.arch.graph
        cut = np.isin(graph.reader_kind, list(how.composite.not_scored))
        return np.broadcast_to(~cut, graph.allowed.shape) if cut.any() else None

    def linear(self, setting: Setting, runs: Runs, how: Linearly, drops: Sequence[int | None]) -> Linear:
        return EdgeScores(setting, runs, how.composite, {target: change_of(runs, target) for target in setting.targets})

    def second_order(self, setting: Setting) -> str | None:
        return f"second-order terms are of nodes, and {setting.sites[0]} are edges; ask for z and mlp_out, whose outputs edges carry."


add_cells(Edges())


def edge_effects(
    setting: Setting,
    runs: Runs,
    meter: Meter,
    cells: Int[np.ndarray, "edge axis"],
    *,
    engine: str = "auto",
    finished: MutableMapping[int, np.ndarray] | None = None,
    grouped: bool = False,
    post_norm: str = "renormalised",
) -> Float[np.ndarray, "edge batch"]:
    """Exact effects of single edges on one batch, in metric units.

    Args:
        setting: with edges as its site.
        runs: the unpatched runs, with the writers' activations.
        meter: counts the work.
        cells: writer, reader and (if the site has it) place along the position axis, per edge.
        engine: ``auto`` or ``literal``.
        finished: effects found before, by number; gets the others as they are found.
        grouped: a changed key or value is seen by all query heads that share it.
        post_norm: see :data:`patchlab.engine.contributions.POST_NORMS`.
    """
    finished = {} if finished is None else finished
    way = edge_support(setting.model) if engine == "auto" else Support("literal", "asked for")
    meter.engine = str(way)
    base, where = to_array(runs.baseline_values), _positions(setting, runs, cells)
    left = [i for i in range(len(cells)) if i not in finished]

    def done(numbers: list[int], values: Tensor) -> None:
        meter.bar.update(len(numbers) * (meter.unit == "cell"))
        finished.update(zip(numbers, to_array(values) - base, strict=True))
        meter.keep()

    if left and way.mode == "literal":
        masks = (edge_mask(setting.model, cells[i, :2], grouped=grouped) for i in left)
        if where is not None:
            length = runs.baseline_tokens.shape[1]
            masks = (mask[:, :, None, None] & _one_hot(where[i], length) for mask, i in zip(masks, left, strict=True))

        def of_left(places: list[int], values: Tensor) -> None:
            done([left[i] for i in places], values)

        run_sets(setting, runs, meter, masks, of_left, post_norm=post_norm)
    elif left:
        work = Work()
        try:
            edge_sweep(
                setting.model,
                program(setting, runs),
                cells[:, :2],
                _differences(setting, runs, post_norm),
                where=where,
                grouped=grouped,
                prefix=way.mode == "prefix",
                start=runs.batch.first_difference if isinstance(runs.source, Kept) else 0,
                base=runs.base if way.mode == "prefix" else None,
                max_tokens=_max_tokens(setting, runs),
                done=done,
                skip=finished.keys(),
                work=work,
            )
        finally:
            meter.note_room(work.room, "edges")
            meter.forwards += work.forwards + work.cells
            meter.positions += round(work.block_positions / setting.model.arch.n_layers) + work.forwards * runs.baseline_tokens.numel()
    return np.stack([finished[i] for i in range(len(cells))]) if len(cells) else np.zeros((0, len(runs.batch)))


def set_effects(
    setting: Setting,
    runs: Runs,
    meter: Meter,
    sets: Iterable[Bool[np.ndarray, "writer reader *pos"]],
    *,
    post_norm: str = "renormalised",
) -> Float[np.ndarray, "set batch"]:
    """Exact effects of sets of edges on one batch, each set patched at once, in metric units.

    A set is a mask over the edges, ``[writer, reader]`` or by place along the position axis ``[writer, reader, pos]``.
    """
    found: list[np.ndarray] = []
    base = to_array(runs.baseline_values)
    meter.engine = "literal (sets of edges are routed)"
    masks = (_everywhere(setting, runs, mask) for mask in sets)

    def done(numbers: list[int], values: Tensor) -> None:
        meter.bar.update(len(numbers) * (meter.unit == "cell"))
        found.append(to_array(values) - base)

    run_sets(setting, runs, meter, masks, done, post_norm=post_norm)
    return np.concatenate(found) if found else np.zeros((0, len(runs.batch)))


def run_sets(
    setting: Setting,
    runs: Runs,
    meter: Meter,
    masks: Iterator[Bool[Tensor, "writer reader *where"]],
    done: Callable[[list[int], Tensor], None],
    *,
    post_norm: str,
) -> None:
    """Run sets of edges with whole forward passes, and count them."""

    def counted(numbers: list[int], values: Tensor) -> None:
        meter.forwards += len(numbers)
        meter.positions += len(numbers) * runs.baseline_tokens.numel()
        done(numbers, values)

    budget = None if setting.max_memory is None else setting.max_memory / 2
    run_edge_sets(setting.model, program(setting, runs), masks, _differences(setting, runs, post_norm), max_bytes=budget, done=counted)


def exact_bytes(setting: Setting, rows: int, length: int) -> int:
    """Bytes that the exact scores of a batch, the writers' activations in both runs and one chunk of edges take."""
    arch, live = setting.model.arch, required(setting.live[str(setting.sites[0])])
    written = len(setting.targets) * rows * length * max(arch.d_model, arch.n_heads * arch.d_head)
    kept = (3 + has_post_norm(setting.model)) * arch.n_layers * rows * length * arch.d_model
    return (
        16 * rows * live.size
        + itemsize(setting.model) * (3 * written + kept + rows * arch.vocab_size)
        + rows * length * token_bytes(setting.model, length)
    )


def _differences(setting: Setting, runs: Runs, post_norm: str) -> Differences:
    own = {key: runs.baseline.activations[key] for key in setting.targets}
    return Differences.of(setting.model, own, runs.source, runs.batch.examples, post_norm)


def _max_tokens(setting: Setting, runs: Runs) -> int | None:
    """Rows × positions of a block call that fit into the budget; None for the engine's own choice."""
    if setting.max_memory is None:
        return None
    rows, length = runs.baseline_tokens.shape
    left = setting.max_memory - exact_bytes(setting, rows, length)
    return max(rows * length, int(left // token_bytes(setting.model, length)))


def _index(setting: Setting, runs: Runs) -> Int[Tensor, "row place"]:
    """The position that each place along the position axis stands for, per row."""
    axis, device = setting.axis, setting.model.device
    rows, length = runs.baseline_tokens.shape
    if axis is None or axis.names is None:
        return torch.arange(length, device=device).expand(rows, length)
    return torch.as_tensor(axis.index[runs.batch.examples.cpu().numpy()], device=device)


def _positions(setting: Setting, runs: Runs, cells: Int[np.ndarray, "edge axis"]) -> list[Int[Tensor, " row"]] | None:
    """Where each edge is read, per row; None for everywhere."""
    if cells.shape[1] < 3:
        return None
    columns = _index(setting, runs).unbind(1)  # one tensor per place, which all edges there share
    return [columns[place] for place in cells[:, 2].tolist()]


def _one_hot(where: Int[Tensor, " row"], length: int) -> Bool[Tensor, "row pos"]:
    return torch.arange(length, device=where.device) == where[:, None]


def _everywhere(setting: Setting, runs: Runs, mask: Bool[np.ndarray, "writer reader *pos"]) -> Bool[Tensor, "writer reader *where"]:
    """A mask at the positions that its places stand for, per row."""
    chosen = torch.as_tensor(mask.copy(), device=setting.model.device)
    if chosen.ndim == 2:
        return chosen
    index, length = _index(setting, runs), runs.baseline_tokens.shape[1]
    spread = torch.stack([_one_hot(index[:, place], length) for place in range(index.shape[1])])  # place, row, pos
    return (chosen[..., None, None] & spread).any(2)


def edge_options(setting: Setting, composite: Composite) -> dict[str, Any]:
    """Options of a run's program, so that it returns what scores of its point of the path are made of.

    Raises:
        MethodError: rules that edges cannot be scored under.
    """
    if composite.linear is not None:
        raise MethodError(
            f"edges need the 0-rule on linear maps, and the composite {composite.name!r} puts {type(composite.linear).__name__} on them: "
            f"what reaches one head is then no longer a part of what reaches the stream. Use a composite with linear=None."
        )
    arch = setting.model.arch
    layers = range(arch.n_layers)
    letters = [letter for letter in "qkv" if letter not in composite.not_scored]
    gradients: list[Target] = [*setting.targets, *((letter, layer) for letter in letters for layer in layers), ("resid_post", arch.n_layers - 1)]
    norms = [place for layer in layers_of(setting.model) for place in layer.norms]
    by_dest = "dest" in setting.sites[0].axes
    return {
        "gradients": tuple(gradients),
        "hooks": tuple(dict.fromkeys(name for place in norms for name in place.reads)),
        "hook_gradients": tuple(f"blocks.{layer}.mlp.hook_in" for layer in layers if arch.graph.mlps),
        "attention": "dest" if by_dest else "head",
    }


def linear_bytes(setting: Setting, rows: int, length: int) -> int:
    """Bytes that the scores of a batch and one chunk of their computation take."""
    writers, readers = setting.model.arch.graph.allowed.shape
    cells = writers * readers * length ** (len(setting.sites[0].axes) - 2)
    one = _writer_bytes(setting, 1, length)
    return 2 * rows * cells * (8 + 4) + 3 * max(one, min(rows * one, _chunk_bytes(setting)))


class EdgeScores:
    """Sums the scores of one batch over the points of a path, with the node scores of the same points beside them."""

    def __init__(self, setting: Setting, runs: Runs, composite: Composite, differences: dict[Target, Tensor]) -> None:
        self.setting, self.runs, self.composite = setting, runs, composite
        arch, site = setting.model.arch, setting.sites[0]
        self.graph, self.axes = arch.graph, site.axes[2:]
        n, length = runs.baseline_tokens.shape
        start = runs.batch.first_difference if isinstance(runs.source, Kept) else 0
        self.span = length - start
        self.differences = {key: value[:, -self.span :] for key, value in differences.items()}
        self.parts = layers_of(setting.model)
        shape = (n, *self.graph.allowed.shape, *[length] * len(self.axes))
        kind = torch.float64 if setting.model.dtype == torch.float64 else torch.float32
        self.total = torch.zeros(shape, dtype=kind, device=runs.baseline_tokens.device)
        self.variance = torch.zeros_like(self.total)
        self.nodes = self.total.new_zeros(n, len(self.graph.writers))

    def add(self, point: Result, weight: float, moved: Target | None = None) -> None:
        """Add the scores at one point of the path; of the writers of one group only, where one is named."""
        rows = slice(0, len(self.graph.writers)) if moved is None else self._writers_of(moved)
        n = len(self.total)
        step = max(1, int(_chunk_bytes(self.setting) // _writer_bytes(self.setting, 1, self.span)))
        for first in range(0, n, step):
            chunk = slice(first, first + step)
            scores, off = self.total.new_zeros(2, *self.total[chunk].shape).unbind(0)
            written = self._written(point, chunk)
            sizes = self._sizes(written, chunk).unsqueeze(-1)
            for readers, coefficients in self._readers(point, chunk):
                low, high = rows.start, min(rows.stop, int(self.graph.writers_before[readers.start]))
                if low < high:
                    self._contract(scores[:, low:high, readers], written[:, low:high], coefficients)
                    slopes = coefficients.to(written.dtype).square().sum(-1, keepdim=True)
                    self._contract(off[:, low:high, readers], sizes[:, low:high], slopes)
            self.total[chunk] += weight * scores
            self.variance[chunk] += weight * off / written.shape[-1]
            del scores, off, written
        self._add_nodes(point, weight, rows)

    def close(self, meter: Meter, notes: dict[str, Any], drop: int | None) -> None:
        """Hold the sums of the writers' edges against their node scores."""
        off, scale = self.mismatch()
        notes.setdefault("self_check", {}).setdefault("mismatch", []).extend([off] * len(self.total))
        notes["self_check"].setdefault("largest_node_score", []).extend([scale] * len(self.total))
        check_sums(self.setting, off, scale)

    def result(self, meter: Meter, notes: dict[str, Any]) -> Scored:
        """The scores and their noise floors; NaN for readers that the rules cut off."""
        found: list[Tensor] = []
        for values in (self.total, self.variance):
            for dim in range(3, values.ndim):
                values = at_positions(self.setting, self.runs, values, dim)
            found.append(values)
        (scores, variance), name = to_arrays(found), str(self.setting.sites[0])
        for values in (scores, variance):
            values[:, :, np.isin(self.graph.reader_kind, list(self.composite.not_scored))] = np.nan
        return Scored({name: scores}, {name: self.runs.rounding.of_products(variance, scores)})

    def mismatch(self) -> tuple[float, float]:
        """Largest |Σ of a writer's edges − its node score|, and the largest |node score| to hold it against."""
        sums = self.total.flatten(2).sum(2)
        off, scale = to_array(torch.stack([(sums - self.nodes).abs().amax(), self.nodes.abs().amax()]))
        return float(off), float(scale)

    def _written(self, point: Result, chunk: slice) -> Float[Tensor, "batch writer pos d_model"]:
        """How the output of every writer differs, as it reaches the residual stream at this point of the path."""
        embedded = self.differences["input", None][chunk]
        n, span, width = embedded.shape
        written = embedded.new_empty(n, len(self.graph.writers), span, width)
        written[:, 0] = embedded
        for layer, part in enumerate(self.parts):
            heads = einsum(
                self.differences["z", layer][chunk], part.write.to(written.dtype), "batch pos head d_head, head d_head d -> batch pos head d"
            )
            if part.post is not None:
                heads = norm_jvp(self.composite.norm, part.post, *self._norm_inputs(point, part.post, chunk), heads)
            written[:, self.graph.heads_of(layer)] = heads.transpose(1, 2)
            if self.graph.mlps:
                written[:, self.graph.mlp_of(layer)] = self.differences["mlp_out", layer][chunk]
        return written

    def _sizes(self, written: Float[Tensor, "batch writer pos d_model"], chunk: slice) -> Float[Tensor, "batch writer pos"]:
        """Squared lengths of what every writer writes in both runs and of their difference, which rounding is a share of.

        Of a head they are taken at z, with the gain that the difference has from there to the residual stream.
        """
        change = written.square().sum(-1)
        shares = torch.zeros_like(change)
        for (kind, layer), difference in self.differences.items():
            own = self.runs.baseline.activations[kind, layer][chunk, -self.span :].to(difference.dtype)
            moved = difference[chunk].square().sum(-1)
            lengths = (own.square() + (own + difference[chunk]).square()).sum(-1)
            share = torch.where(moved > 0, lengths / torch.where(moved > 0, moved, 1.0), 0.0)
            shares[:, self._writers_of((kind, layer))] = share.transpose(1, 2) if kind == "z" else share[:, None]
        return change * (1 + shares)

    def _writers_of(self, target: Target) -> slice:
        """Where the writers of an activation are."""
        kind, layer = target
        if kind == "z" and layer is not None:
            return self.graph.heads_of(layer)
        own = 0 if layer is None else self.graph.mlp_of(layer)
        return slice(own, own + 1)

    def _readers(self, point: Result, chunk: slice) -> Iterator[tuple[slice, Tensor]]:
        """Readers and their coefficients ``[batch, pos, reader, d_model]`` (or with dest first)."""
        graph = self.graph
        letters = [letter for letter in "qkv" if letter not in self.composite.not_scored]
        for layer, part in enumerate(self.parts):
            found = {letter: self._head_readers(part, letter, point.gradients[letter, layer], point, chunk) for letter in letters}
            if "dest" not in self.axes:  # one product for all
                yield graph.readers_of(layer, *letters), torch.cat(list(found.values()), 2)
            else:
                yield from ((graph.readers_of(layer, letter), part) for letter, part in found.items())
            if graph.mlps:
                gradient = point.hook_gradients[f"blocks.{layer}.mlp.hook_in"][chunk, -self.span :].unsqueeze(2)
                yield graph.readers_of(layer, "mlp"), self._through(part.mlp, point, chunk, gradient)
        final = point.gradients["resid_post", graph.n_layers - 1][chunk, -self.span :].unsqueeze(2)
        yield graph.readers_of(None), final

    def _head_readers(self, part: Layer, letter: str, gradient: Tensor, point: Result, chunk: slice) -> Tensor:
        split = gradient.ndim == 5
        gradient = gradient[chunk, -self.span :, -self.span :] if split else gradient[chunk, -self.span :]
        stream = einsum(gradient, part.read[letter][0].to(gradient.dtype), "... head d_head, head d d_head -> ... head d")
        back = [self._through(part.before, point, chunk, one) for one in (stream.unbind(1) if split else [stream])]
        return torch.stack(back, 1) if split else back[0]

    def _contract(self, into: Tensor, written: Tensor, coefficients: Tensor) -> None:
        coefficients = coefficients.to(written.dtype)
        if not self.axes:
            read = rearrange(coefficients, "batch pos reader d -> batch reader (pos d)")
            into.copy_(rearrange(written, "batch writer pos d -> batch writer (pos d)") @ read.mT)
            return
        by_pos = written.transpose(1, 2)
        start = into.shape[-1] - self.span
        if coefficients.ndim == 5:
            for dest in range(self.span):
                into[:, :, :, start + dest, start:] = (by_pos @ coefficients[:, dest].mT).movedim(1, -1)
            return
        found = (by_pos @ coefficients.mT).movedim(1, -1)
        if self.axes == ("pos",):
            into[..., start:] = found
        else:
            into[..., start:, start:] = torch.diag_embed(found)

    def _through(self, place: NormPlace | None, point: Result, chunk: slice, gradient: Tensor) -> Tensor:
        if place is None:
            return gradient
        return norm_vjp(self.composite.norm, place, *self._norm_inputs(point, place, chunk), gradient)

    def _norm_inputs(self, point: Result, place: NormPlace, chunk: slice) -> tuple[Tensor, Tensor]:
        x, scale = (point.hooks[name][chunk, -self.span :] for name in place.reads)
        return x, scale

    def _add_nodes(self, point: Result, weight: float, rows: slice) -> None:
        found = torch.zeros_like(self.nodes)
        for (kind, layer), difference in self.differences.items():
            product = difference * point.gradients[kind, layer][:, -self.span :].to(difference.dtype)
            found[:, self._writers_of((kind, layer))] = product.sum((1, 3)) if kind == "z" else product.sum((1, 2))[:, None]
        self.nodes[:, rows] += weight * found[:, rows]


def _writer_bytes(setting: Setting, rows: int, length: int) -> int:
    arch = setting.model.arch
    return rows * length * len(arch.graph.writers) * arch.d_model * max(4, itemsize(setting.model))


def _chunk_bytes(setting: Setting) -> int | float:
    return CHUNK_BYTES if setting.max_memory is None else min(CHUNK_BYTES, setting.max_memory / 4)


def check_sums(setting: Setting, off: float, scale: float) -> None:
    """Hold the sums of the writers' edges against their node scores.

    Raises:
        MethodError: they do not add up, so the model is not what the graph says.
    """
    allowed = {torch.float64: 1e-5, torch.float32: 1e-3}.get(setting.model.dtype, 0.2)
    if off > allowed * scale:
        raise MethodError(
            f"the edges of {setting.model.name} do not add up: the sum of a writer's edges differs from its node score by {off:.2g}, and the largest "
            f"node score is {scale:.2g}. This architecture has a path that the graph lacks; score nodes instead (sites z, mlp_out)."
        )
