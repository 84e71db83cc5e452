"""The stream of one run, and what each component wrote into it, seen through a linear function of a later state.

The units that a state is attributed to are in :data:`UNITS`. Another unit is a function that gives the parts of one layer, and an entry there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import LinearPlace, NormPlace
from patchlab.adapters.dictionaries import FeatureSite, Point
from patchlab.engine import Target
from patchlab.engine.trust.trials import tolerance
from patchlab.errors import LensError, SiteError
from patchlab.models import Model
from patchlab.rules import LNRule
from patchlab.rules.jacobian import norm_vjp

LETTERS = {"attn_out": "a", "mlp_out": "m", "resid_post": "r", "resid_pre": "r"}
"""How names of what dictionaries write begin, by the point that they are on: ``m3.f512``, ``m3.error``, ``m3.bias``."""


@dataclass(frozen=True)
class Part:
    """The contributions of components of one kind in one layer, ``[row, component]``. ``layer`` is None for what comes before the blocks."""

    kind: str
    layer: int | None
    names: tuple[str, ...]
    shares: Float[Tensor, "row component"]


@dataclass(frozen=True)
class Stream:
    """What was written at one position of each row: sites, hooks of the norms after attention and MLP, and the coefficient of the state.

    ``kept`` holds ``[row, *site]``; ``hooks`` inputs and denominators of post-norms, ``[row, d]`` and ``[row, 1]``.
    """

    model: Model
    kept: Mapping[Target, Tensor]
    hooks: Mapping[str, Tensor]
    coefficient: Float[Tensor, "row d_model"]

    def through(self, name: str) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
        """The coefficient taken back through the norm after attention or MLP, if there is one, and what its bias contributes."""
        place, c = norm_after(self.model, name), self.coefficient
        if place is None:
            return c, torch.zeros_like(c[:, 0])
        x, scale = (self.hooks[hook][:, None] for hook in place.reads)
        bias = place.bias
        share = torch.zeros_like(c[:, 0]) if bias is None else c @ bias.to(c.dtype)
        return norm_vjp(LNRule(), place, x, scale, c[:, None, None])[:, 0, 0].to(c.dtype), share

    def written(self, kind: str, layer: int) -> Float[Tensor, " row"]:
        """What a whole site adds to the metric."""
        return (self.kept[kind, layer].to(self.coefficient.dtype) * self.coefficient).sum(-1)

    def scale(self, layer: int) -> float:
        """The factor of what a block adds to the stream (Granite)."""
        return float(getattr(self.model.bridge.blocks[layer], "residual_contribution_scale", 1.0))


def norm_after(model: Model, name: str) -> NormPlace | None:
    """A norm after attention (``blocks.0.ln1_post``) or MLP, None where there is none."""
    return next((place for place in model.arch.places if isinstance(place, NormPlace) and place.name == name), None)


def output_map(model: Model, name: str) -> tuple[Float[Tensor, "d_in d_model"], Float[Tensor, " d_model"] | None]:
    """Weight and bias of the linear map that heads or neurons write through.

    Raises:
        LensError: it is missing, or no plain linear map.
    """
    place = next((place for place in model.arch.places if isinstance(place, LinearPlace) and place.name == name), None)
    if place is None or place.problem is not None:
        raise LensError(f"{model.name} has no plain linear map {name}, so what is written through it cannot be told apart.")
    return place.parameters()


def _attention(stream: Stream, layer: int) -> Iterator[Part]:
    yield Part("attention", layer, (f"a{layer}",), stream.written("attn_out", layer)[:, None])


def _mlp(stream: Stream, layer: int) -> Iterator[Part]:
    if "mlp_out" not in stream.model.arch.absent:
        yield Part("mlp", layer, (f"m{layer}",), stream.written("mlp_out", layer)[:, None])


def _layers(stream: Stream, layer: int) -> Iterator[Part]:
    both = [part.shares for part in (*_attention(stream, layer), *_mlp(stream, layer))]
    yield Part("layer", layer, (f"layer {layer}",), torch.stack(both).sum(0))


def _components(stream: Stream, layer: int) -> Iterator[Part]:
    yield from _attention(stream, layer)
    yield from _mlp(stream, layer)


def _heads(stream: Stream, layer: int) -> Iterator[Part]:
    weight, bias = output_map(stream.model, f"blocks.{layer}.attn.o")
    c, extra = stream.through(f"blocks.{layer}.ln1_post")
    z = stream.kept["z", layer].to(c.dtype)
    scale = stream.scale(layer)
    by_head = scale * (z * (c @ weight.to(c.dtype).T).unflatten(-1, z.shape[1:])).sum(-1)
    rest = extra if bias is None else extra + scale * (c @ bias.to(c.dtype))
    _check(stream, "attn_out", layer, by_head.sum(-1) + rest)
    yield Part("head", layer, tuple(f"a{layer}.h{head}" for head in range(by_head.shape[1])), by_head)
    if bias is not None or bool(extra.any()):
        yield Part("attention bias", layer, (f"a{layer}.bias",), rest[:, None])
    yield from _mlp(stream, layer)


def _neurons(stream: Stream, layer: int) -> Iterator[Part]:
    yield from _attention(stream, layer)
    weight, bias = output_map(stream.model, f"blocks.{layer}.mlp.out")
    c, extra = stream.through(f"blocks.{layer}.ln2_post")
    scale = stream.scale(layer)
    by_neuron = scale * stream.kept["mlp_post", layer].to(c.dtype) * (c @ weight.to(c.dtype).T)
    rest = extra if bias is None else extra + scale * (c @ bias.to(c.dtype))
    _check(stream, "mlp_out", layer, by_neuron.sum(-1) + rest)
    yield Part("neuron", layer, tuple(f"m{layer}.n{neuron}" for neuron in range(by_neuron.shape[1])), by_neuron)
    if bias is not None or bool(extra.any()):
        yield Part("mlp bias", layer, (f"m{layer}.bias",), rest[:, None])


def _feature_targets(point: str, model: Model, layers: range) -> tuple[Target, ...]:
    """The features that write to a point in some layers, and what they leave out there; none where the point has no dictionaries."""
    found = point_of(model, point)
    into = [] if found is None else [(layer, one) for layer in layers for one in found.into(layer)]
    features = dict.fromkeys((f"features.{point}", one.layer) for _, one in into)
    return (*features, *dict.fromkeys((f"error.{point}", layer) for layer, _ in into))


def point_of(model: Model, name: str) -> Point | None:
    """The dictionaries on a kind of site; None where it has none."""
    site = model.arch.accessors.get(f"features.{name}")
    return site.point if isinstance(site, FeatureSite) else None


def _written_by_features(stream: Stream, point: str, layer: int) -> Iterator[Part]:
    """What features write to a point in one layer, what belongs to none of them, and what they leave out."""
    found, c = point_of(stream.model, point), stream.coefficient
    sources = () if found is None else found.into(layer)
    if not sources:
        return
    letter = LETTERS[point]
    left = stream.written(point, layer)
    for one in sources:
        values = stream.kept[f"features.{point}", one.layer].to(c.dtype)
        shares = values * (c @ one.rows(layer - one.layer).to(c.dtype).T)
        to = f">{layer}" if one.layer != layer else ""
        yield Part("feature", layer, tuple(f"{letter}{one.layer}.f{feature}{to}" for feature in range(shares.shape[1])), shares)
        left = left - shares.sum(-1)
    error = (stream.kept[f"error.{point}", layer].to(c.dtype) * c).sum(-1)
    yield Part("error", layer, (f"{letter}{layer}.error",), error[:, None])
    yield Part("dictionary bias", layer, (f"{letter}{layer}.bias",), (left - error)[:, None])


def _features(stream: Stream, layer: int) -> Iterator[Part]:
    for point, whole in (("attn_out", _attention), ("mlp_out", _mlp)):
        found = point_of(stream.model, point)
        yield from _written_by_features(stream, point, layer) if found is not None and found.into(layer) else whole(stream, layer)


def _feature_sites(model: Model, last: int) -> tuple[Target, ...]:
    found = tuple(target for point in ("attn_out", "mlp_out") for target in _feature_targets(point, model, range(last + 1)))
    if not found:
        raise LensError(
            f"{model.name} has no dictionaries on attn_out or mlp_out up to layer {last}. Add some (model.add_dictionaries); by='state' takes "
            f"the state itself apart, with one on resid_post."
        )
    return found


def _state(stream: Stream, layer: int) -> Iterator[Part]:
    if ("error.resid_post", layer) in stream.kept:
        yield from _written_by_features(stream, "resid_post", layer)


def _state_sites(model: Model, last: int) -> tuple[Target, ...]:
    found = _feature_targets("resid_post", model, range(last, last + 1))
    if not found:
        raise LensError(f"{model.name} has no dictionary on resid_post of layer {last}, the state that is read. Add one (model.add_dictionaries).")
    return found


def _no_more(model: Model, last: int) -> tuple[Target, ...]:
    return ()


@dataclass(frozen=True)
class Unit:
    """A unit of attribution: the sites that it needs of every layer, the function that gives a layer's parts, and what else it needs.

    ``sums`` says that its parts are added to what is in the stream before the blocks; otherwise they are all of the state.
    """

    sites: tuple[str, ...]
    parts: Callable[[Stream, int], Iterator[Part]]
    more: Callable[[Model, int], tuple[Target, ...]] = _no_more
    sums: bool = True


UNITS: dict[str, Unit] = {
    "layer": Unit(("attn_out", "mlp_out"), _layers),
    "component": Unit(("attn_out", "mlp_out"), _components),
    "head": Unit(("attn_out", "z", "mlp_out"), _heads),
    "neuron": Unit(("attn_out", "mlp_out", "mlp_post"), _neurons),
    "feature": Unit(("attn_out", "mlp_out"), _features, _feature_sites),
    "state": Unit((), _state, _state_sites, sums=False),
}
"""The units by name."""


def before_blocks(stream: Stream) -> Iterator[Part]:
    """What is in the stream before the first block: the token embedding, and the rest (learned positions) where it is a sum of both."""
    first, c = stream.kept["resid_pre", 0].to(stream.coefficient.dtype), stream.coefficient
    token = stream.kept.get(("input", None))
    if token is not None and token.shape == first.shape:
        token = token.to(c.dtype)
        rest = first - token
        if not bool(rest.any()) or hasattr(stream.model.bridge, "pos_embed"):
            yield Part("input", None, ("input",), (token * c).sum(-1, keepdim=True))
            if bool(rest.any()):
                yield Part("positions", None, ("positions",), (rest * c).sum(-1, keepdim=True))
            return
    yield Part("input", None, ("embedding",), (first * c).sum(-1, keepdim=True))


def sites_of(model: Model, unit: Unit, last: int) -> tuple[Target, ...]:
    """The activations that a unit needs, up to a layer.

    Raises:
        SiteError: one that the model lacks (an MLP is not needed where there is none).
    """
    absent = model.arch.absent
    for kind in unit.sites:
        if kind in absent and not (kind == "mlp_out" and "mlp_post" not in unit.sites):
            raise SiteError(f"{model.name} has no site {kind}: {absent[kind]}.")
    layered = tuple((kind, layer) for kind in unit.sites if kind not in absent for layer in range(last + 1))
    ends: tuple[Target, ...] = (("resid_pre", 0), ("resid_post", last))
    return (*layered, *ends, *unit.more(model, last), *([] if "input" in absent else [("input", None)]))


def hooks_of(model: Model, last: int) -> tuple[str, ...]:
    """Hooks of the norms after attention and MLP, up to a layer."""
    names = [f"blocks.{layer}.{name}" for layer in range(last + 1) for name in ("ln1_post", "ln2_post")]
    return tuple(hook for name in names if (place := norm_after(model, name)) is not None for hook in place.reads)


def _check(stream: Stream, kind: str, layer: int, total: Float[Tensor, " row"]) -> None:
    """Check that parts add up to the site that they are parts of.

    Raises:
        LensError: they do not.
    """
    whole = stream.written(kind, layer)
    size = (stream.kept[kind, layer].to(stream.coefficient.dtype) * stream.coefficient).abs().sum(-1)
    off = float(((total - whole).abs() / size.clamp_min(1e-30)).max())
    if off > allowed(stream.model):
        raise LensError(
            f"the parts of {kind} in layer {layer} of {stream.model.name} do not add up to it (off by {off:.2g} of its size): something between them "
            f"and the stream is not known. Use by='component'."
        )


def allowed(model: Model) -> float:
    """Largest gap of a sum, as a share of what is added up."""
    return 0.05 if model.dtype in (torch.bfloat16, torch.float16) else 10 * tolerance()
