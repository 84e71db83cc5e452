"""Edges between nodes of sites, scored by the linearised machinery: what of a node's effect goes by way of which other node.

For nodes u and d, of features, errors, neurons or heads, as Marks et al. 2024 (arXiv 2403.19647, eq. 5 and the published code)::

    edge(u -> d) = (∂m/∂d) · (∂d/∂u) · Δu        summed over positions, mean over examples

``∂m/∂d`` is the coefficient by which the method scores d: a gradient, its mean along a path, or what relevance rules make of it. ``∂d/∂u`` is taken
on the baseline run under the same rules, with every other candidate in between held, so that no effect is counted on two ways. ``Δu`` is how u
changes. There is also the edge to the logits, the part of u's effect that goes past no other candidate. At one point, the edges out of a node into
all candidates and the logits add up to the node's score.

A feature's derivative is its mask times its column of the encoder: a feature that is not active in the baseline has no edges into it. An error as a
target is ``g · (x − reconstruction)`` with g held, and the derivative of both; as a source it is the change of the whole error. What belongs to no
feature (a skip, what the norm of a row adds) is no node: derivatives pass through it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters.dictionaries import Attached, FeatureSite, Point
from patchlab.circuits.evaluation.node_runner import checked_nodes, dictionary_of
from patchlab.circuits.nodes import NodeCircuit
from patchlab.circuits.sparse import NodeTable, SparseCircuit, point_of
from patchlab.engine import Target
from patchlab.engine.memory import block_numbers, free_bytes, itemsize
from patchlab.engine.segments import Passing, Segments, cut_run, in_order
from patchlab.errors import CircuitError
from patchlab.host import to_array
from patchlab.methods.cells.nodes import change_of
from patchlab.methods.cells.readings import error_change, reading
from patchlab.methods.linearized import LinearizedPatching
from patchlab.methods.method import Method
from patchlab.methods.names import scoring_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, program, unpatched
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.sites import KINDS
from patchlab.tasks.task import Task

_BATCH_BYTES = 2**28
"""What the gradients of the targets that are taken back at once may take."""
_ENCODED = 16
"""Positions of which all features are there at a time."""


def node_edges(
    model: Model,
    task: Task,
    nodes: NodeCircuit,
    method: str | Method = "relp",
    *,
    direction: str | None = None,
    level: float = 0.0,
    batch_size: int | None = None,
    max_memory: int | float | None = None,
    progress: bool = True,
) -> SparseCircuit:
    """The edges between chosen nodes, and from them to the logits, with their effects: those that are not zero.

    A run is cut at all candidates of the nodes (at whole activations: at ``resid_post`` for its features), in each of their layers. Choose from the
    result with :func:`patchlab.circuits.top_n` or :func:`patchlab.circuits.threshold`.

    Args:
        model: the model.
        task: prompt pairs, answers and metric.
        nodes: chosen nodes of features, errors, neurons, heads or whole activations; only edges between these are looked for.
        method: a gradient or relevance method by name (``atp``, ``ig-activations-left:10``, ``relp``, ...) or as an object. Along a path the
            coefficients of targets are means, as in the published code; derivatives between nodes and by the logits are the baseline's.
        direction: ``denoising`` or ``noising``; default that in which the nodes were scored, else ``noising``.
        level: edges whose |effect| is below this, in metric units, are left out.
        batch_size: examples per batch; results do not depend on it.
        max_memory: bytes for activations and gradients.
        progress: show a progress bar on stderr.

    Raises:
        CircuitError: nodes that do not fit the model or task, or not listed; nodes of dictionaries across layers; a method without derivatives, with
            corrections or through dictionaries alone; float16.
        MethodError, SiteError, RuleError: as the method itself.
        InterventionError: inside ``intervene``.

    Example:
        >>> scores = pl.RelevancePatching().run(model, task, ["features", "error"], direction="noising")  # doctest: +SKIP
        >>> edges = node_edges(model, task, pl.circuits.threshold(scores, 0.1), "relp")  # doctest: +SKIP
        >>> circuit = pl.circuits.threshold(edges, 0.01)  # doctest: +SKIP
    """
    way = _linear(method)
    nodes = checked_nodes(nodes, model, task, "the circuit of nodes")
    if not nodes.n_nodes:
        raise CircuitError("there are no nodes to find edges between; choose more.")
    _check(model, nodes, way, level)
    direction = direction or str(nodes.provenance.get("direction") or "noising")
    sites = [one.site for one in nodes.universe]
    setting, batches, _ = way.prepared(model, task, sites, direction=direction, batch_size=batch_size, max_memory=max_memory)
    found: _Sums | None = None
    steps = len(batches) * (way.forwards(setting) + nodes.n_nodes + 1)
    with progress_bar(f"edges ({way.name})", "step", steps, show=progress) as bar:
        meter = Meter(bar)
        setting = way.with_mean(setting, batches, meter)
        for batch in batches:
            at, baseline = way.source_targets(setting), way.baseline_options(setting)
            runs = unpatched(setting, batch, meter, source=way.source, at=at, baseline=baseline)
            found = _Sums.of(setting, nodes) if found is None else found
            _Batch(way, setting, nodes, runs, meter).add_to(found)
    if found is None:
        raise CircuitError(f"{task.name} has no examples.")
    source, target, effect = found.edges(len(task), level)
    record = {**nodes.provenance, **way.provenance_of(setting, {}), "notes": list(nodes.provenance.get("notes", ()))}
    pairs = dict.fromkeys([*nodes.provenance.get("task_pairs", ()), *task.pair_fingerprints])
    record |= {
        "task_pairs": list(pairs),
        "how": "all edges" if level == 0 else f"|effect| at least {level:g}",
        "nodes_how": nodes.provenance.get("how"),
    }
    return SparseCircuit(nodes, source, target, scores=effect, provenance=record)


def _linear(method: str | Method) -> LinearizedPatching:
    way = scoring_method(method) if isinstance(method, str) else method
    if not isinstance(way, LinearizedPatching):
        raise CircuitError(
            f"edges between nodes are derivatives; {way.name} takes none. Use a gradient or relevance method such as atp, ig:10, relp."
        )
    for what, given in (("QK-fix (+qk)", way.qk_fix), ("GradDrop (+drop)", way.grad_drop), ("+spliced", way.spliced)):
        if given:
            raise CircuitError(
                f"{what} says how nodes are scored and has no meaning for an edge between two; use {way.name.split('+')[0]} without it."
            )
    return way


def _check(model: Model, nodes: NodeCircuit, way: LinearizedPatching, level: float) -> None:
    if nodes.all_but:
        raise CircuitError("edges are found between nodes that are listed; these are all but the listed ones. Choose nodes (top_n, threshold) first.")
    if model.dtype == torch.float16:
        raise CircuitError("products of two small derivatives are lost in float16; load the model with dtype='bfloat16' or 'float32'.")
    if not np.isfinite(level) or level < 0:
        raise CircuitError(f"level is a size in metric units, finite and at least 0; got {level}.")
    for one in nodes.universe:
        if (why := way.how.blocked.get(one.site.kind)) is not None:
            raise CircuitError(
                f"{way.name} leaves {one.site.kind} without a coefficient ({why}), so no edge can lead there; take it out (only(...))."
            )
        if KINDS[one.site.kind].of:
            for layer, attached in _point(model, one.site.kind).of.items():
                if attached.span > 1:
                    raise CircuitError(
                        f"{attached.dictionary.name} (layer {layer}) writes to {attached.span} layers, so its features are no part of one activation "
                        f"that a run could be cut at; pl.features.attribution_graph has edges of cross-layer transcoders."
                    )


def _point(model: Model, kind: str) -> Point:
    accessor = model.arch.accessors[f"features.{KINDS[kind].of}"]
    if not isinstance(accessor, FeatureSite):
        raise CircuitError(f"{kind} of {model.name} has no dictionaries.")
    return accessor.point


@dataclass(frozen=True, eq=False)
class _Group:
    """The chosen nodes of one layer of a site: their numbers, units (-1: the whole) and positions (-1: all)."""

    kind: str
    layer: int | None
    numbers: Int[np.ndarray, " node"]
    unit: Int[np.ndarray, " node"]
    pos: Int[np.ndarray, " node"]

    @property
    def at(self) -> Target:
        """The activation that they are part of."""
        return point_of(self.kind), self.layer

    @cached_property
    def units(self) -> Int[np.ndarray, " unit"]:
        """The different units, in order."""
        return np.unique(self.unit)

    @cached_property
    def column(self) -> Int[np.ndarray, " node"]:
        """The place of each node's unit among them."""
        return np.searchsorted(self.units, self.unit)


def _groups(nodes: NodeCircuit, table: NodeTable) -> list[_Group]:
    """The nodes activation by activation, in the order in which they are computed."""
    found: list[_Group] = []
    keys = np.stack([table.stage, table.which, table.layer], 1)
    for stage, which, layer in np.unique(keys, axis=0).tolist():
        own = np.flatnonzero((table.which == which) & (table.layer == layer) & (table.stage == stage))
        kind = nodes.universe[which].site.kind
        found.append(_Group(kind, layer if KINDS[kind].layered else None, own, table.unit[own], table.pos[own]))
    return found


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums of edges over examples: a block for each pair of activations that a path leads between, of their chosen nodes alone."""

    groups: list[_Group]
    n_nodes: int
    blocks: dict[tuple[int, int], Float[np.ndarray, "target source"]] = field(default_factory=dict[tuple[int, int], np.ndarray])

    @staticmethod
    def of(setting: Setting, nodes: NodeCircuit) -> "_Sums":
        return _Sums(_groups(nodes, NodeTable.of(nodes)), nodes.n_nodes)

    def add(self, target: int, source: int, rows: Int[np.ndarray, " target"], values: Float[np.ndarray, "target source"]) -> None:
        """Add to the rows of a block; the target -1 is the metric."""
        n = 1 if target < 0 else len(self.groups[target].numbers)
        block = self.blocks.setdefault((target, source), np.zeros((n, len(self.groups[source].numbers))))
        block[rows] += values

    def edges(self, n_examples: int, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources, targets and mean effects of the edges that are not zero and not below a level."""
        parts = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))]
        for (target, source), block in self.blocks.items():
            numbers = np.array([self.n_nodes]) if target < 0 else self.groups[target].numbers
            mean = block / n_examples
            row, column = np.nonzero((mean != 0) & (np.abs(mean) >= level))
            parts.append((self.groups[source].numbers[column], numbers[row], mean[row, column]))
        source, target, effect = (np.concatenate(column) for column in zip(*parts, strict=True))
        return source, target, effect


@dataclass(frozen=True, eq=False)
class _Batch:
    """The edges of one batch."""

    way: LinearizedPatching
    setting: Setting
    nodes: NodeCircuit
    runs: Runs
    meter: Meter

    def add_to(self, sums: _Sums) -> None:
        """Find them, target by target."""
        coefficients, segments = self._coefficients(), self._cut()
        groups = sums.groups
        order = {target: place for place, target in enumerate(_cuts(self.nodes))}
        for number, group in enumerate(groups):
            before = [i for i, other in enumerate(groups) if order[other.at] < order[group.at]]
            if not before:
                self.meter.bar.update(len(group.numbers))
                continue
            whole = self._heads(segments, group, coefficients[group.at])
            for part in np.array_split(np.arange(len(group.numbers)), -(-len(group.numbers) // self._at_once(group))):
                heads, columns = whole(group.column[part])
                masks = self._masks(group.pos[part])
                rows, length = self.runs.baseline_tokens.shape
                cotangents = heads.new_zeros(len(part), rows, length, heads.shape[-1])
                for i, column in enumerate(columns.tolist()):
                    cotangents[i, :, :, column] = masks[i]
                self._collect(sums, number, part, segments.pull(heads, cotangents, self._leaves(groups, before)), before)
                self.meter.bar.update(len(part))
        every = list(range(len(groups)))
        ones = torch.ones_like(segments.values)[None]
        self._collect(sums, -1, np.zeros(1, dtype=np.int64), segments.pull(segments.values, ones, self._leaves(groups, every)), every)
        self.meter.bar.update(1)

    def _leaves(self, groups: Sequence[_Group], numbers: Sequence[int]) -> list[Target]:
        return list(dict.fromkeys(groups[i].at for i in numbers))

    def _collect(self, sums: _Sums, target: int, rows: Int[np.ndarray, " target"], gradients: dict[Target, Tensor], sources: Sequence[int]) -> None:
        for i in sources:
            group = sums.groups[i]
            if group.at in gradients:
                products = self._products(group, gradients[group.at])
                sums.add(target, i, rows, to_array(self._summed(group, products)))

    def _at_once(self, group: _Group) -> int:
        """Targets whose gradients fit into the budget."""
        model, (rows, length) = self.setting.model, self.runs.baseline_tokens.shape
        limit = self.setting.max_memory
        budget = min(_BATCH_BYTES, free_bytes(model.device) // 8) if limit is None else limit / 4
        each = itemsize(model) * rows * length * (2 * block_numbers(model, length) + 4 * len(group.numbers))
        return int(max(1, min(64, budget // each)))

    def _coefficients(self) -> dict[Target, Tensor]:
        """What each activation is multiplied by where the method scores it, ``[row, pos, *site]``."""
        found: dict[Target, Tensor] = {}
        wanted = dict.fromkeys(_cuts(self.nodes))
        for point, weight, moved in self.way.points(self.setting, self.runs, self.meter, None):
            own = wanted if moved is None else [moved if moved in wanted else (point_of(moved[0]), moved[1])]
            for target in own:
                if target in wanted:
                    gradient = point.gradients[target].to(torch.promote_types(point.gradients[target].dtype, torch.float32)) * weight
                    found[target] = gradient if target not in found else found[target] + gradient
        return found

    def _cut(self) -> Segments:
        """The run that is cut at all candidates. What belongs to no feature (a skip, what the norm of a row adds) is no node, and is not held."""
        rules = None if self.way.composite.plain else self.way.composite
        reads: list[str] = []
        passing: dict[Target, Passing] = {}
        for name in dict.fromkeys(KINDS[one.site.kind].of for one in self.nodes.universe if KINDS[one.site.kind].of):
            for layer, one in _point(self.setting.model, f"features.{name}").of.items():
                reads += [] if one.reads is None else [one.reads]
                if one.dictionary.w_skip is not None or one.dictionary.normalise.per_row:
                    passing[name, layer] = Passing(partial(_rest, one), one.reads)
        return cut_run(self.setting.model, program(self.setting, self.runs, rules=rules), _cuts(self.nodes), reads, passing)

    def _heads(self, segments: Segments, group: _Group, coefficient: Tensor) -> "_Heads":
        """Quantities whose derivatives are those of targets, times their coefficients."""
        own = segments.before[group.at]
        units = torch.as_tensor(group.units, device=own.device)
        kind = dictionary_of(group.kind)
        if kind is None:
            product = own * coefficient.detach().to(own.dtype)
            product = product.sum(-1) if KINDS[group.kind].width is not None else product
            return _Heads(lambda columns: product[..., None] if group.unit[0] < 0 else product[..., units[columns]])
        point = _point(self.setting.model, group.kind)
        (one,) = point.into(int(group.layer or 0))
        gradient, x = one.flat(coefficient).detach(), self._read(segments, point, one)
        if kind[0] == "features":
            slopes = _slopes(one, x.detach(), units) * (gradient @ one.rows()[units].T)
            return _Heads(lambda columns: _masked(one, x, units[columns], slopes[..., columns]))
        through = _through_reconstruction(one, point, x.detach(), gradient)
        error = ((gradient * one.flat(own)).sum(-1) - (through * x).sum(-1))[..., None]
        return _Heads(lambda columns: error)

    def _read(self, segments: Segments, point: Point, one: Attached) -> Float[Tensor, "row pos d"]:
        """What a dictionary reads, with its graph."""
        return one.flat(segments.before[point.name, one.layer] if one.reads is None else segments.hooks[one.reads])

    def _products(self, group: _Group, gradient: Float[Tensor, "n row pos *site"]) -> Float[Tensor, "n row pos unit"]:
        """Gradients at an activation times the changes of its chosen units."""
        kind, setting, runs = dictionary_of(group.kind), self.setting, self.runs
        if kind is None:
            change = change_of(runs, group.at)
            product = gradient.to(change.dtype) * change
            product = product.sum(-1) if KINDS[group.kind].width is not None else product
            return product[..., None] if group.unit[0] < 0 else product[..., torch.as_tensor(group.units, device=product.device)]
        point, layer = _point(setting.model, group.kind), int(group.layer or 0)
        if kind[0] == "error":
            (one,) = point.into(layer)
            change = error_change(setting, runs, point, layer)
            return (gradient.flatten(3).to(change.dtype) * change).sum(-1)[..., None]
        one = point.of[layer]
        units = torch.as_tensor(group.units, device=gradient.device)
        place = torch.full((int(one.dictionary.n_features),), -1, device=gradient.device).index_copy(
            0, units, torch.arange(len(units), device=units.device)
        )
        entries = reading(setting, runs, point, layer)
        column = place[entries.feature]
        inside = column >= 0
        change = entries.change.new_zeros(*runs.baseline_tokens.shape, len(units))
        change[entries.row[inside], entries.pos[inside], column[inside]] = entries.change[inside]
        return (gradient.flatten(3).to(change.dtype) @ one.rows()[units].T) * change

    def _summed(self, group: _Group, products: Float[Tensor, "n row pos unit"]) -> Float[Tensor, "n node"]:
        """Products summed over the positions of each node, and over examples."""
        column = torch.as_tensor(group.column, device=products.device)
        if bool((group.pos < 0).all()):
            return products.sum((1, 2), dtype=torch.promote_types(products.dtype, torch.float32))[:, column]
        places, which = np.unique(group.pos, return_inverse=True)
        by_place = torch.einsum("nrpu,krp->nku", products, self._masks(places).to(products.dtype))
        return by_place[:, torch.as_tensor(which, device=products.device), column]

    def _masks(self, places: Int[np.ndarray, " place"]) -> Float[Tensor, "place row pos"]:
        """The tokens of places along the position axis, per row; -1 stands for all."""
        (rows, length), device = self.runs.baseline_tokens.shape, self.runs.baseline_tokens.device
        axis = self.setting.axis
        found = torch.ones(len(places), rows, length, device=device)
        for i, place in enumerate(places.tolist()):
            if place >= 0:
                found[i] = 0
                at = place if axis is None or axis.names is None else axis.index[self.runs.batch.examples.cpu().numpy()][:, place]
                found[i, torch.arange(rows, device=device), torch.as_tensor(at, device=device)] = 1
        return found


def _cuts(nodes: NodeCircuit) -> tuple[Target, ...]:
    """The activations that candidates are part of: where a run is cut."""
    layered = [(one, layer) for one in nodes.universe for layer in (one.layers if KINDS[one.site.kind].layered else (None,))]
    return in_order((point_of(one.site.kind), layer) for one, layer in layered)


@dataclass(frozen=True, eq=False)
class _Heads:
    """Quantities of the targets of an activation: a column per unit, made for some units at a time."""

    make: Callable[[Tensor], Float[Tensor, "row pos column"]]

    def __call__(self, columns: Int[np.ndarray, " some"]) -> tuple[Float[Tensor, "row pos column"], Int[np.ndarray, " some"]]:
        """The quantities of some units, and the column of each."""
        units, place = np.unique(columns, return_inverse=True)
        return self.make(torch.as_tensor(units)), place


def _masked(
    one: Attached, x: Float[Tensor, "row pos d"], chosen: Int[Tensor, " some"], slopes: Float[Tensor, "row pos some"]
) -> Float[Tensor, "row pos some"]:
    """Pre-activations of some features times slopes that are held, with the scale of their rows, which is differentiated."""
    d = one.dictionary
    entered = d.normalise.enter(x)
    entered = entered - d.b_dec if d.subtract_b_dec else entered
    values = (entered @ d.w_enc[:, chosen] + d.b_enc[chosen]) * slopes
    return values * d.scale(_shaped(one, x)) if d.normalise.per_row else values


def _slopes(one: Attached, x: Float[Tensor, "row pos d"], chosen: Int[Tensor, " some"]) -> Float[Tensor, "row pos some"]:
    """The slope of some features in their pre-activations: their masks; of codes it is zero. A few positions are encoded at a time."""
    found: list[Tensor] = []
    for part in x.flatten(0, 1).split(_ENCODED):
        with torch.enable_grad():
            pre = one.dictionary.pre(_shaped(one, part)).detach().requires_grad_()
            values = one.dictionary.activation(pre)
            slope = torch.autograd.grad(values.sum(), pre)[0] if values.requires_grad else torch.zeros_like(pre)
            found.append(slope[:, chosen])
    return torch.cat(found).reshape(*x.shape[:-1], -1)


def _rest(one: Attached, x: Float[Tensor, "row pos *site"]) -> Float[Tensor, "row pos d_out"]:
    return one.rest(one.flat(x))


def _shaped(one: Attached, x: Float[Tensor, "*rows d"]) -> Tensor:
    heads: int | None = one.dictionary.heads
    return x if heads is None else x.unflatten(-1, (heads, -1))


def _through_reconstruction(
    one: Attached, point: Point, x: Float[Tensor, "row pos d"], gradient: Float[Tensor, "row pos d_out"]
) -> Float[Tensor, "row pos d"]:
    """Coefficients at the output of a dictionary taken back through it to what it reads, a few positions at a time."""
    found: list[Tensor] = []
    for part, of in zip(x.flatten(0, 1).split(_ENCODED), gradient.flatten(0, 1).split(_ENCODED), strict=True):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            whole = point.reconstruct(one.layer, {one.layer: leaf})
            found.append(torch.autograd.grad(whole, leaf, of)[0] if whole.requires_grad else torch.zeros_like(leaf))
    return torch.cat(found).reshape(x.shape)
