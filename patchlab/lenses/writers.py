"""Writers: what wrote into the stream before a layer at one position of one prompt, as vectors that add up to the stream there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters.dictionaries import Attached, Point
from patchlab.engine import Target
from patchlab.engine.contributions import Layer
from patchlab.errors import LensError, unknown
from patchlab.lenses.stream import LETTERS, allowed, point_of
from patchlab.models import Model

BY = {
    "head": "the embedding, heads, MLPs and biases",
    "feature": "the same, with what attention and MLPs write as features, errors and biases of their dictionaries, where they have some",
    "state": "the features, the error and the bias of the dictionary on the stream itself (resid_pre of the layer, or resid_post of the one before)",
}
"""What the stream before a layer can be taken apart into."""


@dataclass(frozen=True)
class Written:
    """Vectors that add up to the stream, by name. Of a dictionary only features that are active."""

    names: tuple[str, ...]
    vectors: Float[Tensor, "component d_model"]


class _Vectors:
    def __init__(self) -> None:
        self.names: list[str] = []
        self.vectors: list[Tensor] = []

    def add(self, names: Sequence[str], vectors: Float[Tensor, "component d_model"]) -> None:
        self.names += names
        self.vectors.append(vectors.to(torch.promote_types(vectors.dtype, torch.float32)))


def sites_read(model: Model, layer: int, by: str) -> tuple[Target, ...]:
    """The activations that :func:`written` needs.

    Raises:
        LensError: an unknown ``by``, or one that needs dictionaries where there are none.
    """
    if by not in BY:
        raise LensError(unknown("way to take a score apart (by)", by, BY))
    found: list[Target] = []
    if by != "state":
        found += [(kind, i) for kind in ("z", "mlp_out") if kind not in model.arch.absent for i in range(layer)]
    for point, layers in _points(model, layer, by):
        into = {i: point.into(i) for i in layers}
        found += [(point.name, i) for i in into if into[i]]
        found += [(_read_at(point, one), one.layer) for each in into.values() for one in each]
    ends: tuple[Target, ...] = (("resid_pre", 0), ("resid_pre", layer), *([] if "input" in model.arch.absent else [("input", None)]))
    return tuple(dict.fromkeys((*found, *ends)))


def written(model: Model, kept: Mapping[Target, Tensor], blocks: Sequence[Layer], layer: int, by: str) -> Written:
    """What wrote into the stream before a layer, in one of the ways of :data:`BY`.

    Args:
        model: the model.
        kept: the activations that :func:`sites_read` names, at one position of one prompt: ``[*site]``.
        blocks: the blocks of the model.
        layer: the layer.
        by: into what.

    Raises:
        LensError: the vectors do not add up to the stream.
    """
    made = _Vectors()
    points = _points(model, layer, by)
    if by != "state":
        _of_blocks(made, model, kept, blocks[:layer], {(point.name, i) for point, layers in points for i in layers if point.into(i)})
    for point, layers in points:
        _of_dictionaries(made, point, layers, kept)
    wide = max((part.dtype for part in made.vectors), key=lambda dtype: dtype.itemsize)
    vectors = torch.cat([part.to(wide) for part in made.vectors])
    stream = kept["resid_pre", layer].to(wide)
    off = float((vectors.sum(0) - stream).abs().max() / stream.abs().max().clamp_min(1e-30))
    if off > allowed(model):
        raise LensError(f"what the blocks of {model.name} write does not add up to its stream before layer {layer} (off by {off:.2g}).")
    return Written(tuple(made.names), vectors)


def _points(model: Model, layer: int, by: str) -> list[tuple[Point, range]]:
    """The dictionaries that are read, and the layers of their point that count.

    Raises:
        LensError: there are none.
    """
    if by == "head":
        return []
    if by == "state":
        places = [("resid_pre", layer), ("resid_post", layer - 1)]
        found = [(point, range(i, i + 1)) for name, i in places if (point := point_of(model, name)) is not None and point.into(i)]
        if not found:
            raise LensError(
                f"{model.name} has no dictionary on the stream before layer {layer}: on resid_pre of that layer, or resid_post of the one before. "
                f"Add one (model.add_dictionaries), or take what attention and MLPs write apart: by='feature', by='head'."
            )
        return found[:1]
    both = [(point, range(layer)) for name in ("attn_out", "mlp_out") if (point := point_of(model, name)) is not None]
    found = [(point, layers) for point, layers in both if any(point.into(i) for i in layers)]
    if not found:
        raise LensError(
            f"{model.name} has no dictionaries on attn_out or mlp_out before layer {layer}. Add some (model.add_dictionaries); by='state' takes the "
            f"stream itself apart, with one on resid_pre of layer {layer} or resid_post of the layer before."
        )
    return found


def _read_at(point: Point, one: Attached) -> str:
    """The site that a dictionary reads."""
    return point.name if one.reads is None else f"reads.{point.name}"


def _of_blocks(made: _Vectors, model: Model, kept: Mapping[Target, Tensor], blocks: Sequence[Layer], without: Collection[tuple[str, int]]) -> None:
    """The embedding, heads, MLPs and the attention's biases; ``without`` what has dictionaries."""
    names, vectors = _before(model, kept)
    made.add(names, vectors)
    biases = torch.zeros_like(vectors[0])
    for i, block in enumerate(blocks):
        if ("attn_out", i) not in without:
            shares, rest = block.shares(kept["z", i][None, None, None])
            made.add([f"a{i}.h{head}" for head in range(shares.shape[1])], shares[0, :, 0, 0])
            biases = biases + (rest.reshape(-1) if isinstance(rest, Tensor) else rest)
        if "mlp_out" not in model.arch.absent and ("mlp_out", i) not in without:
            made.add([f"m{i}"], kept["mlp_out", i][None])
    if bool(torch.any(biases)):
        made.add(["attention biases"], biases[None])


def _before(model: Model, kept: Mapping[Target, Tensor]) -> tuple[list[str], Float[Tensor, "component d_model"]]:
    """The stream before the first block: token embedding and learned positions, or both as one where it is not their sum."""
    first, token = kept["resid_pre", 0], kept.get(("input", None))
    if token is None or token.shape != first.shape:
        return ["embedding"], first[None]
    if not bool((first - token).any()):
        return ["input"], token[None]
    return (["input", "positions"], torch.stack([token, first - token])) if hasattr(model.bridge, "pos_embed") else (["embedding"], first[None])


def _of_dictionaries(made: _Vectors, point: Point, layers: range, kept: Mapping[Target, Tensor]) -> None:
    """Active features, errors and biases. A feature that writes to several of the layers is one vector."""
    letter = LETTERS[point.name]
    sources = {one.layer: one for i in layers for one in point.into(i)}
    inputs = {start: one.flat(kept[_read_at(point, one), start][None, None])[0, 0] for start, one in sources.items()}
    by_features: dict[int, Tensor] = {}
    for start, one in sources.items():
        values = one.values(inputs[start])
        active = values.nonzero()[:, 0]
        steps = {i: values[active, None] * one.rows(i - start)[active] for i in layers if start <= i < start + one.span}
        made.add([f"{letter}{start}.f{feature}" for feature in active.tolist()], torch.stack(list(steps.values())).sum(0))
        by_features |= {i: part.sum(0) + by_features.get(i, 0.0) for i, part in steps.items()}
    for i in by_features:
        whole, rebuilt = point.into(i)[0].flat(kept[point.name, i][None, None])[0, 0], point.reconstruct(i, inputs)
        made.add([f"{letter}{i}.error", f"{letter}{i}.bias"], torch.stack([whole - rebuilt, rebuilt - by_features[i]]))
