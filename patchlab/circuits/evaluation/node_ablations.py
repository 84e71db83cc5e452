"""Ablations of nodes: what the nodes outside a circuit carry."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.circuits.evaluation.ablations import check_lengths
from patchlab.circuits.nodes import Candidates, NodeCircuit
from patchlab.engine import Program, run
from patchlab.errors import CircuitError, unknown
from patchlab.host import precise
from patchlab.models import Model
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import Batch, PositionAxis, Task

NODE_ABLATIONS = {
    "mean_positional": "the mean over corrupted prompts of what it is at its position (Marks et al. 2024)",
    "mean": "the mean of what it is on corrupted prompts, over examples and positions",
    "resample": "what it is on the corrupted prompt of the same pair",
    "zero": "nothing",
}
Target = tuple[str, int | None]


@dataclass(frozen=True, eq=False)
class NodeAblation:
    """An ablation that is ready to use.

    Args:
        kind: one of :data:`NODE_ABLATIONS`.
        means: per target (kind and layer) the mean of the site's values, ``[pos, *site]`` (one position for all, or those of the axis), or
            such a tensor in sparse form; none for what needs no means.
        train: the examples behind the means, if there are any.
        at: the named positions that the means are of; None where positions line up by index.
    """

    kind: str
    means: Mapping[Target, Tensor] = field(default_factory=dict[Target, Tensor], repr=False)
    train: Task | None = None
    at: tuple[str, ...] | None = None


def targets_of(universe: Iterable[Candidates]) -> list[tuple[Candidates, int | None]]:
    """The candidates layer by layer: one activation each."""
    return [(one, layer) for one in universe for layer in (one.layers if KINDS[one.site.kind].layered else (None,))]


def node_ablation(model: Model, task: Task, universe: Sequence[Candidates], kind: str, *, train: Task | None = None, rows: int = 32) -> NodeAblation:
    """Prepare an ablation of nodes.

    Args:
        model: the model.
        task: whose prompts the circuits will run on.
        universe: the candidates.
        kind: one of :data:`NODE_ABLATIONS`.
        train: examples for the means; default the task itself. Means are over their corrupted prompts, each example once.
        rows: examples per batch; the means do not depend on it.

    Raises:
        CircuitError: an unknown ablation, or positional means over prompts that do not line up.
    """
    if kind not in NODE_ABLATIONS:
        raise CircuitError(unknown("ablation of nodes", kind, NODE_ABLATIONS))
    if kind in ("resample", "zero"):
        return NodeAblation(kind)
    source, at = train or task, None
    if kind == "mean_positional":
        at = task.position_axis().names
        joint = [one.name for one in universe if one.n_positions is None]
        if at is None or joint:
            try:
                check_lengths(task, source)
            except CircuitError as error:
                of = f" Or choose among nodes at named positions ({joint[0]} has nodes at all positions at once)." if joint and at else ""
                raise CircuitError(f"{error}{of}") from error
        if at is not None:
            source = source.at_positions(*at)
    return NodeAblation(kind, _means(model, source, universe, at, rows, positional=kind == "mean_positional"), source, at)


def _means(
    model: Model, source: Task, universe: Sequence[Candidates], at: tuple[str, ...] | None, rows: int, *, positional: bool
) -> dict[Target, Tensor]:
    """Mean over corrupted prompts of every site, summed in float64; of sparse sites (features) in sparse form."""
    index = None if at is None else source.position_axis().index
    total: dict[Target, Tensor] = {}
    counts: dict[Target, int] = {}
    for batch in source.batches(rows, model.device):
        where = None if index is None else torch.as_tensor(index[batch.examples.cpu().numpy()], device=model.device)
        donor = CorruptedRun(model, batch, universe)
        for one, layer in targets_of(universe):
            key, values = (one.site.kind, layer), precise(donor.read(one.site.kind, layer))
            if positional and where is not None and one.n_positions is not None:
                values = values[torch.arange(len(batch), device=values.device)[:, None], where.to(values.device)]
            part = values.sum(0) if positional else values.sum((0, 1)).unsqueeze(0)
            counts[key] = counts.get(key, 0) + (len(batch) if positional else batch.corrupted.numel())
            if part.ndim == 2 and int((part != 0).sum()) * 8 < part.numel():
                part = part.to_sparse()
            known = total.get(key)
            total[key] = part if known is None else known + part if known.is_sparse == part.is_sparse else _dense(known) + _dense(part)
    return {key: (value / counts[key]).to(model.dtype).to(model.device) for key, value in total.items()}


def _dense(value: Tensor) -> Tensor:
    return value.to_dense() if value.is_sparse else value


class CorruptedRun:
    """The corrupted prompts of a batch, run once: what hosts the sites is kept, and a site is read from it when it is needed.

    So the features of one layer are there at a time, and not those of all.
    """

    def __init__(self, model: Model, batch: Batch, universe: Iterable[Candidates]) -> None:
        self.accessors, needed = model.arch.accessors, dict[str, None]()
        for one, layer in targets_of(universe):
            accessor = self.accessors[one.site.kind].at(layer)
            needed |= dict.fromkeys((accessor.host(layer), *_names(accessor.companion(layer))))
        self.hooks = run(model, Program(batch.corrupted, batch.examples, positions=batch.positions, hooks=tuple(needed))).hooks

    def read(self, kind: str, layer: int | None) -> Float[Tensor, "row *site"]:
        """The value of a site on the corrupted prompts."""
        accessor = self.accessors[kind].at(layer)
        beside = tuple(self.hooks[name] for name in _names(accessor.companion(layer)))
        several: Any = beside if len(beside) > 1 else beside[0] if beside else None
        return accessor.read(self.hooks[accessor.host(layer)], several)


def _names(companion: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The hooks that an accessor reads beside its host."""
    return (companion,) if isinstance(companion, str) else companion or ()


@dataclass(frozen=True, eq=False)
class Outside:
    """A source that leaves a site as it is where a circuit holds it, and puts in what the ablation says elsewhere.

    Rows are circuits × examples, those of one circuit together.

    Args:
        one: the candidates at this site.
        layer: which layer.
        circuits: the circuits, among the same candidates.
        way: the ablation.
        donor: the corrupted run of the same examples, for resampling.
        places: where the named positions of each example lie; None where positions line up by index.
    """

    one: Candidates
    layer: int | None
    circuits: Sequence[NodeCircuit]
    way: NodeAblation
    donor: CorruptedRun | None = None
    places: Int[Tensor, "example name"] | None = None

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "row *site"]:
        """The site's value in every circuit's run."""
        return torch.where(self.kept(own), own, self.ablated(own))

    def kept(self, own: Float[Tensor, "row *site"]) -> Bool[Tensor, "row *where"]:
        """What the circuits hold: bool, ``[row, pos or 1, unit or 1, 1 for a vector]``."""
        one, rows = self.one, own.shape[0] // len(self.circuits)
        axes = [axis for axis in one.site.axes if axis != "layer"]
        masks = torch.as_tensor(np.stack([circuit.mask(one.name, self.layer) for circuit in self.circuits]), device=own.device)
        masks = masks if "pos" in axes else masks[:, None]
        masks = masks[..., : own.shape[2]] if masks.ndim == 3 else masks[:, :, None]
        places = self.places if "pos" in axes else None
        masks = masks[:, None].expand(-1, rows, -1, -1) if places is None else _at_tokens(masks, places, own.shape[1])
        return masks.flatten(0, 1).reshape(own.shape[0], *masks.shape[2:], *[1] * (own.ndim - 3))

    def ablated(self, own: Float[Tensor, "row *site"]) -> Float[Tensor, "row *site"]:
        """What the nodes outside carry, in the shape of the site."""
        if self.way.kind == "zero":
            return torch.zeros_like(own)
        times = len(self.circuits)
        if self.donor is not None:
            value = self.donor.read(self.one.site.kind, self.layer).to(own)
            return value.repeat(times, *[1] * (own.ndim - 1))
        mean = _dense(self.way.means[self.one.site.kind, self.layer]).to(own)
        if self.way.kind == "mean" or self.one.n_positions is None or self.places is None:
            return torch.broadcast_to(mean, own.shape)
        value, places = own.clone(), self.places.repeat(times, 1)
        value[torch.arange(own.shape[0], device=own.device)[:, None], places] = mean
        return value


def _at_tokens(
    masks: Bool[Tensor, "circuit name unit"], places: Int[Tensor, "example name"], length: int
) -> Bool[Tensor, "circuit example pos unit"]:
    """Masks over named positions as masks over tokens. Two names may meet at a token: it is held if one of them is. The other tokens are free."""
    n, rows = masks.shape[0], places.shape[0]
    found = masks.new_zeros(n, rows, length, masks.shape[2])
    named = places.new_zeros(rows, length, dtype=torch.bool)
    each = torch.arange(rows, device=places.device)
    for i in range(places.shape[1]):
        found[:, each, places[:, i]] |= masks[:, i, None]
        named[each, places[:, i]] = True
    return found | ~named[None, :, :, None]


def meeting(axis: PositionAxis) -> str:
    """The first example with two named positions at one token, and their names, in words; empty where there is none."""
    for i, row in enumerate([] if axis.names is None else axis.index.tolist()):
        if len(set(row)) < len(row):
            return f"example {i} has {' and '.join(name for name, place in zip(axis.names or (), row, strict=True) if row.count(place) > 1)}"
    return ""


def check_places(axis: PositionAxis, way: NodeAblation) -> None:
    """Refuse positional means where two named positions meet at one token: it would have two means.

    Raises:
        CircuitError: an example where they do.
    """
    if way.kind == "mean_positional" and way.at is not None and (met := meeting(axis)):
        raise CircuitError(
            f"{met} at one token, which would have a mean of each. Score fewer positions (task.at_positions(...)), or use ablation='resample'."
        )
