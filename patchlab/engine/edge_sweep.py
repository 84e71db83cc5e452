"""The fast exact engine for single edges: one reader's input carries a writer's output of another run, everything else is as it is.

Only one edge changes, so its writer's current output is the baseline's, and the reader's input is the baseline's plus the difference
δ between the two runs. What follows is computed once where it is shared and only where it differs:

- *q, k, v of a head.* The block runs on x + δ with two of q, k, v held at the baseline's; its z is then each head's under the
  change of its own third (one run for the readers of all heads). One head's change goes through W_O, and the block is finished
  with that attention output: its own post-norm, residual, MLP.
- *mlp.* The block is finished with the baseline's attention output and δ added to the input of the MLP's norm only.
- *logits.* δ is added to the last block's output.

From there rows of many edges go through the model's own blocks together, from the first position that can differ.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.engine.contributions import Layer, layers_of
from patchlab.engine.hooks import hooked
from patchlab.engine.node_sweep import ACCELERATOR_TOKENS, CPU_TOKENS, Wave, Work, answer_columns, not_finite
from patchlab.engine.pending import Pending, in_parts
from patchlab.engine.program import Program, Target
from patchlab.engine.replay import Baseline, Template, baseline, empty_cache, template
from patchlab.engine.session import exclusive, session_of
from patchlab.errors import InterventionError
from patchlab.graph import Graph
from patchlab.sites import address
from patchlab.sources import Source


@dataclass(frozen=True)
class Differences:
    """Differences of what writers add to the residual stream: in the source run minus in the baseline run.

    Args:
        graph: the graph of the model.
        layers: the blocks of the model.
        changes: source − baseline, :func:`patchlab.engine.contributions.written_at`.
        form: what a head adds where a norm follows the attention, one of :data:`patchlab.engine.contributions.POST_NORMS`. All else of that
            attention is the baseline's: its norm is taken anew with the changed head, or its denominator is the baseline's.
        attention: the sum of the heads in the baseline run, per layer with a norm after it.
    """

    graph: Graph
    layers: Sequence[Layer]
    changes: Mapping[Target, Tensor] = field(repr=False)
    form: str = "renormalised"
    attention: Mapping[int, Float[Tensor, "row pos d_model"]] = field(default_factory=dict[int, Tensor], repr=False)

    @staticmethod
    def of(
        model: BridgedModel, own: Mapping[Target, Tensor], source: Source, examples: Int[Tensor, " row"], form: str = "renormalised"
    ) -> "Differences":
        """Of a source and the baseline's activations at all writers."""
        changes = {key: source.values(address(*key), value, examples) - value for key, value in own.items()}
        layers = layers_of(model)
        attention = {
            i: rearrange(own["z", i], "row pos head d -> row pos (head d)") @ rearrange(layer.write, "head d to -> (head d) to").to(own["z", i].dtype)
            for i, layer in enumerate(layers)
            if layer.post is not None
        }
        return Differences(model.arch.graph, layers, changes, form, attention)

    def written(self, writer: int, start: int) -> Float[Tensor, "row pos d_model"]:
        """δ in the stream at the positions from the start on, where nothing else changes."""
        layer, change = self._output(writer, start)
        if layer is None:
            return change
        part, own = self.layers[layer], self.attention[layer][:, start:]
        if self.form == "frozen":
            return (part.scaled(change) * part.inverse_denominator(own)).to(change.dtype)
        return part.after(own + change) - part.after(own)

    def contributed(self, writer: int) -> Float[Tensor, "row pos d_model"]:
        """The difference of the writer's :class:`patchlab.engine.contributions.Contributions`."""
        return self.written(writer, 0) if self.form == "frozen" else self._output(writer, 0)[1]

    def _output(self, writer: int, start: int) -> tuple[int | None, Float[Tensor, "row pos d_model"]]:
        """How the writer's own output differs, and the layer whose norm follows it, if one does."""
        _, layer, head = self.graph.node_table[writer]
        if layer is None or head is None:
            return None, self.changes["input" if layer is None else "mlp_out", layer][:, start:]
        change = self.changes["z", layer][:, start:, head]
        change = change @ self.layers[layer].write[head].to(change.dtype)
        return layer if layer in self.attention else None, change


@exclusive
def edge_sweep(
    model: BridgedModel,
    program: Program,
    edges: Int[np.ndarray, "edge 2"],
    differences: Differences,
    *,
    where: Sequence[Int[Tensor, " row"]] | None = None,
    grouped: bool = False,
    prefix: bool = True,
    max_tokens: int | None = None,
    start: int = 0,
    base: Baseline | None = None,
    done: Callable[[list[int], Tensor], Any] | None = None,
    skip: Collection[int] = frozenset(),
    work: Work | None = None,
) -> Float[Tensor, "edge row"]:
    """The metric of a run with one edge patched, for every edge and row of the program.

    Args:
        model: the model; nothing surrounds the runs.
        program: rows, examples, metric and answers, shared by all edges; without edits.
        edges: writer and reader of each edge, as in the model's graph.
        differences: what the writers' outputs change by.
        where: per edge the position, for each row, at which the reader reads the change; None for all positions.
        grouped: a changed key or value is seen by all query heads that share it, not only by the reader's own.
        prefix: use the baseline's keys and values before the start (causal attention).
        max_tokens: rows × positions that go through a block at once; at most (and by default) what suits the device.
        start: no writer's output differs before this position.
        base: the baseline's run, if it was made before.
        done: called with the numbers of the edges that are finished, and their metric, ``[edge, row]`` on the CPU; now and then on other devices.
        skip: numbers of edges whose metric is not needed (NaN); the others come out as without it, to the bit.
        work: counts what was computed.

    Raises:
        InterventionError: surrounding edits, or no metric.
    """
    if program.metric is None or program.answers is None:
        raise InterventionError("a sweep evaluates a metric; give the program a metric and answers.")
    if session_of(model).surrounding:
        raise InterventionError("single edges are patched on the model as it is; leave the intervene block, or patch sites instead of edges.")
    work = Work() if work is None else work
    usual = CPU_TOKENS if program.tokens.device.type == "cpu" else ACCELERATOR_TOKENS
    max_tokens = usual if max_tokens is None else min(max_tokens, usual)
    rows, length = program.tokens.shape
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    values = torch.full((len(edges), rows), torch.nan, device=program.tokens.device, dtype=dtype)
    with torch.no_grad(), Pending(done, not_finite(model, program.metric)) as pending:
        if base is None:
            base, _ = baseline(model, program, cache=empty_cache() if prefix else None)
            work.forwards += 1
        read = answer_columns(program)
        for first, chunks in _chunks(model.arch.graph, edges, _starts(edges, where, start, prefix), max_tokens // rows, length):
            wanted = [chunk for chunk in chunks if not all(number in skip for number in chunk)]
            if not wanted:
                continue
            wave = Wave(model, program, base, first, {}, [], work, read)
            run = _Run(wave, template(model, program, base, first, length - first), differences, grouped)
            for chunk in wanted:
                for some, found in in_parts(partial(run.numbered, edges, where), chunk, work.room):
                    numbers, found = list(some), found.to(dtype)
                    values[torch.tensor(numbers, device=values.device)] = found
                    work.cells += len(numbers)
                    pending.add(numbers, found)
    return values


def _starts(edges: Int[np.ndarray, "edge 2"], where: Sequence[Tensor] | None, start: int, prefix: bool) -> Int[np.ndarray, " edge"]:
    """First position that each edge changes, over all rows."""
    if where is None or not prefix:
        return np.full(len(edges), start if prefix else 0)
    places = {id(position): position for position in where}  # edges that are read at one place share its tensor
    lowest = dict(zip(places, torch.stack([position.amin() for position in places.values()]).cpu().numpy().tolist(), strict=True)) if places else {}
    return np.array([max(start, lowest[id(position)]) for position in where], dtype=np.int64)


def _chunks(
    graph: Graph, edges: Int[np.ndarray, "edge 2"], starts: Int[np.ndarray, " edge"], positions: int, length: int
) -> Iterator[tuple[int, list[list[int]]]]:
    """Numbers of edges that run together: of one start, the earliest layers first, the readers of one writer side by side."""
    layers = graph.reader_layer[edges[:, 1]]
    order = np.lexsort((edges[:, 1], edges[:, 0], layers, starts))
    for first in np.unique(starts).tolist():
        mine = order[starts[order] == first].tolist()
        step = max(1, positions // (length - first))
        yield first, [mine[i : i + step] for i in range(0, len(mine), step)]


@dataclass(frozen=True, eq=False)
class _Edge:
    """One edge, at one position of each row or at all."""

    writer: int
    reader: int
    where: Tensor | None


@dataclass(frozen=True)
class _Layer:
    """The baseline's block on the positions that are computed: its input, what its attention gives, its output."""

    before: Float[Tensor, "row pos d_model"]
    attention: Float[Tensor, "row pos d_model"]
    after: Float[Tensor, "row pos d_model"]


class _Seen(Exception):
    """Everything that a run of a block is for has been seen."""


@dataclass
class _Run:
    """Runs of edges with one start position; row ``e · n + i`` is edge e of example i."""

    wave: Wave
    template: Template
    differences: Differences
    grouped: bool
    layers: dict[int, _Layer] = field(default_factory=dict[int, _Layer])

    @property
    def _answer_only(self) -> bool:
        metric = self.wave.program.metric
        return metric is not None and metric.reads == "answer"

    def numbered(self, edges: Int[np.ndarray, "edge 2"], where: Sequence[Tensor] | None, numbers: Sequence[int]) -> Float[Tensor, "some row"]:
        """The metric of some of the edges, by number."""
        return self.values([_Edge(int(edges[i, 0]), int(edges[i, 1]), None if where is None else where[i]) for i in numbers])

    def values(self, edges: list[_Edge]) -> Float[Tensor, "edge row"]:
        """The metric of every edge's run; the edges come in the order of their readers' layers."""
        arch = self.wave.model.arch
        layers, kinds = arch.graph.reader_layer, arch.graph.reader_kind
        changes: dict[tuple[int, int], Tensor] = {}
        hidden = self.wave.base.inputs[0][:0, self.wave.start :]
        for layer in range(int(layers[edges[0].reader]), arch.n_layers):
            if hidden.shape[0]:
                hidden = self.wave.block(layer, hidden, self.template, [])
            if layer == arch.n_layers - 1 and self._answer_only:
                hidden = hidden[:, -1:]
            mine = [edge for edge in edges if layers[edge.reader] == layer]
            heads = [edge for edge in mine if kinds[edge.reader] != "mlp"]
            mlps = [edge for edge in mine if kinds[edge.reader] == "mlp"]
            order = {id(edge): i for i, edge in enumerate([*heads, *mlps])}
            if mine:
                joining = self._joining(layer, heads, mlps, changes)
                by_edge = rearrange(joining, "(edge row) pos d -> edge row pos d", edge=len(mine))
                hidden = torch.cat([hidden, *by_edge[[order[id(edge)] for edge in mine]]])
        final = [self._change(edge, changes) for edge in edges if layers[edge.reader] == arch.n_layers]
        if final:
            after = self._layer(arch.n_layers - 1).after
            hidden = torch.cat([hidden[:, -after.shape[1] :], *(after + change[:, -after.shape[1] :] for change in final)])
        return self.wave.metric(hidden)

    def _change(self, edge: _Edge, known: dict[tuple[int, int], Tensor]) -> Float[Tensor, "row pos d_model"]:
        """δ of an edge, at its position only where it has one."""
        start = self.wave.start
        change = known.get((edge.writer, start))
        if change is None:
            change = known[edge.writer, start] = self.differences.written(edge.writer, start)
        if edge.where is None:
            return change
        here = torch.arange(start, start + change.shape[1], device=change.device) == edge.where[:, None]
        return change * here[..., None]

    def _layer(self, layer: int) -> _Layer:
        """The baseline's block, run once."""
        if layer not in self.layers:
            before, attention = self.wave.base.inputs[layer][:, self.wave.start :], list[Tensor]()
            attn = self.wave.model.bridge.blocks[layer].attn
            with hooked({"attn": attn}, {"attn": partial(_note, attention)}):
                after = self.wave.block(layer, before, self.template, [])
            if layer == self.wave.model.arch.n_layers - 1 and self._answer_only:
                before, after, attention = before[:, -1:], after[:, -1:], [attention[0][:, -1:]]
            self.layers[layer] = _Layer(before, attention[0], after)
        return self.layers[layer]

    def _joining(self, layer: int, heads: list[_Edge], mlps: list[_Edge], known: dict[tuple[int, int], Tensor]) -> Float[Tensor, "row pos d_model"]:
        """The block's output for edges into heads, then for edges into the MLP."""
        arch, own = self.wave.model.arch, self._layer(layer)
        moved = self._moved(layer, heads, known) if heads else own.attention[:0]
        if heads and arch.parallel and layer not in self.differences.attention:
            through = own.after.repeat(len(heads), 1, 1) + moved
            return torch.cat([through, self._joining(layer, [], mlps, known)]) if mlps else through
        attention = own.attention.repeat(len(heads) + len(mlps), 1, 1)
        attention[: len(moved)] += moved
        added = [self._change(edge, known)[:, -attention.shape[1] :] for edge in mlps]
        return self._finished(layer, attention, torch.cat(added) if added else None)

    def _moved(self, layer: int, edges: list[_Edge], known: dict[tuple[int, int], Tensor]) -> Float[Tensor, "row pos d_model"]:
        """How the attention's output (before a norm after it) differs, for edges into its heads."""
        graph, n = self.wave.model.arch.graph, self.wave.program.tokens.shape[0]
        places = [("qkv".index(graph.reader_kind[edge.reader]), int(graph.reader_head[edge.reader])) for edge in edges]
        probes: dict[Any, int] = {}
        index = [
            probes.setdefault((edge.writer, letter, None if edge.where is None else id(edge.where)), len(probes))
            for edge, (letter, _) in zip(edges, places, strict=True)
        ]
        chosen = [index.index(probe) for probe in range(len(probes))]
        z = self._probed(layer, [self._change(edges[i], known) for i in chosen], [places[i][0] for i in chosen])
        z = z[:, :, -self._layer(layer).attention.shape[1] :]
        change, weights = z[1:] - z[:1], self.differences.layers[layer].write.to(z.dtype)
        moved: list[Tensor] = []
        for probe, (letter, head) in zip(index, places, strict=True):
            seen = graph.sharing(head) if self.grouped and letter else slice(head, head + 1)
            moved.append(
                rearrange(change[probe][:, :, seen], "row pos head d -> row pos (head d)") @ rearrange(weights[seen], "head d to -> (head d) to")
            )
        return torch.cat(moved) if moved else z.new_zeros(0, n)

    def _probed(self, layer: int, changes: list[Tensor], letters: list[int]) -> Float[Tensor, "probe row pos head d_head"]:
        """The z of every head when its q (0), k (1) or v (2) alone is computed from the input plus a change; the baseline's first."""
        model, own = self.wave.model, self.wave.base.inputs[layer][:, self.wave.start :]
        name, n = f"blocks.{layer}.attn.hook_", own.shape[0]
        hidden = torch.cat([own, *(own + change for change in changes)])
        free = torch.tensor([-1, *letters], device=own.device)
        seen: list[Tensor] = []
        hooks: dict[str, Callable[..., Tensor | None]] = {f"{name}{letter}": partial(_held, n, free == number) for number, letter in enumerate("qkv")}
        try:
            with hooked(model.hooks, {**hooks, f"{name}z": partial(_see, seen)}):
                self.wave.block(layer, hidden, self.template, [])
        except _Seen:
            pass
        return rearrange(model.arch.accessors["z"].shape(seen[0]), "(probe row) ... -> probe row ...", row=n)

    def _finished(
        self, layer: int, attention: Float[Tensor, "row pos d_model"], added: Float[Tensor, "some pos d_model"] | None
    ) -> Float[Tensor, "row pos d_model"]:
        """The block's output with a given output of its attention, and more in the MLP's input on the last rows."""
        model, own = self.wave.model, self._layer(layer)
        attn = model.bridge.blocks[layer].attn
        norm = self.differences.layers[layer].mlp
        entry = f"blocks.{layer}.mlp.hook_in" if norm is None else f"{norm.name}.hook_in"
        hooks = {} if added is None else {entry: partial(_add, added)}
        object.__setattr__(attn, "forward", partial(_given, attention))
        try:
            with hooked(model.hooks, hooks):
                return self.wave.block(layer, own.before.repeat(attention.shape[0] // own.before.shape[0], 1, 1), self.template, [])
        finally:
            attn.__dict__.pop("forward")


def _held(n: int, free: Tensor, module: Any, inputs: Any, value: Tensor) -> Tensor:
    """Rows of probes that do not change this third of the attention get the baseline's."""
    groups = rearrange(value, "(probe row) ... -> probe row ...", row=n)
    return rearrange(torch.where(free.reshape(-1, *[1] * value.ndim), groups, groups[:1]), "probe row ... -> (probe row) ...")


def _note(attention: list[Tensor], module: Any, inputs: Any, value: Tensor | tuple[Any, ...]) -> None:
    attention.append(value[0] if isinstance(value, tuple) else value)


def _given(attention: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return attention, None


def _see(seen: list[Tensor], module: Any, inputs: Any, value: Tensor) -> Tensor:
    seen.append(value)
    raise _Seen


def _add(added: Tensor, module: Any, inputs: Any, value: Tensor) -> Tensor:
    return torch.cat([value[: value.shape[0] - added.shape[0]], value[value.shape[0] - added.shape[0] :] + added])
