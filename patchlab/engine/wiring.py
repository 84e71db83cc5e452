"""What readers read through and writers write through: a block's own norms and linear maps, for code that computes parts of it by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters.places import LinearPlace, NormPlace
from patchlab.engine.literal import run
from patchlab.engine.program import Program, row_numbers
from patchlab.errors import ModelError


@dataclass(frozen=True)
class Contributions:
    """What every writer adds to the residual stream: ``values[writer, row, pos, d_model]``, writers in the order of the graph.

    A row or position axis of length 1 stands for all (zeros, means, constants); an axis in front for one set per circuit.
    """

    values: Float[Tensor, "*circuit writer row pos d_model"]

    def rows(self, part: slice) -> "Contributions":
        """Those of some rows."""
        return self if self.values.shape[-3] == 1 else Contributions(self.values[..., part, :, :])

    def circuits(self, part: slice) -> "Contributions":
        """Those of some circuits."""
        return self if self.values.ndim == 4 or self.values.shape[0] == 1 else Contributions(self.values[part])


def contributions(model: Any, tokens: Int[Tensor, "row pos"]) -> Contributions:
    """What every writer adds to the stream in an unpatched run.

    Raises:
        SiteError: a model without a graph of edges.
    """
    graph = model.arch.graph
    kinds = ("z", "mlp_out") if graph.mlps else ("z",)
    keep = (("input", None), *((kind, layer) for layer in range(graph.n_layers) for kind in kinds))
    kept = run(model, Program(tokens, row_numbers(tokens), keep=keep)).activations
    values = kept["input", None].new_empty(len(graph.writers), *kept["input", None].shape)
    values[0] = kept["input", None]
    for i, layer in enumerate(layers_of(model)):
        part = values[graph.writer_slice(i)]
        part[: graph.n_heads] = layer.heads(kept["z", i][None])[0][0]
        if graph.mlps:
            part[graph.n_heads] = kept["mlp_out", i]
    return Contributions(values)


@dataclass(frozen=True)
class Layer:
    """A block as edges see it: norms before the attention, before the MLP and after the attention; how each query head reads and writes."""

    before: NormPlace | None
    mlp: NormPlace | None
    post: NormPlace | None
    read: Mapping[str, tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head one d_head"] | None]]
    write: Float[Tensor, "head d_head d_model"]
    bias: Float[Tensor, " d_model"] | None

    @property
    def norms(self) -> tuple[NormPlace, ...]:
        """The norms that are there."""
        return tuple(place for place in (self.before, self.mlp, self.post) if place is not None)

    def inputs(self, letter: str, x: Float[Tensor, "circuit head row pos d_model"]) -> Float[Tensor, "circuit head row pos d_head"]:
        """Queries, keys or values of every head, from what it reads."""
        weight, bias = self.read[letter]
        out = torch.matmul(_normed(self.before, x).flatten(2, 3), weight)
        return (out if bias is None else out + bias).unflatten(2, x.shape[2:4])

    def into_mlp(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The MLP's input, from what it reads."""
        return _normed(self.mlp, x)

    def heads(self, z: Float[Tensor, "circuit row pos head d_head"]) -> tuple[Float[Tensor, "circuit head row pos d_model"], Tensor | float]:
        """What every head adds to the stream, and what the attention adds besides (its bias)."""
        parts = torch.matmul(z.permute(0, 3, 1, 2, 4).flatten(2, 3), self.write).unflatten(2, z.shape[1:3])
        rest: Tensor | float = 0.0 if self.bias is None else self.bias
        if self.post is None:
            return parts, rest
        total = parts.sum(1) + rest
        scale = self._inverse_denominator(total)
        bias = getattr(self.post.module.original_component, "bias", None)
        rest = self.scaled(rest) * scale if isinstance(rest, Tensor) else rest
        return self.scaled(parts) * scale[:, None], rest if bias is None else rest + bias

    def scaled(self, x: Tensor) -> Tensor:
        """Weight times (centred) input: the post-norm without its denominator and bias."""
        if self.post is None:
            return x
        x = x - x.mean(-1, keepdim=True) if self.post.centred else x
        return x if self.post.weight is None else x * self.post.weight

    def _inverse_denominator(self, total: Float[Tensor, "circuit row pos d_model"]) -> Float[Tensor, "circuit row pos one"]:
        """1 / denominator of the post-norm on the whole attention output: the factor by which its own output is a multiple of w · x."""
        component = self.post.module.original_component if self.post is not None else torch.nn.Identity()
        out, bias = component(total), getattr(component, "bias", None)
        out = out if bias is None else out - bias
        numerator = self.scaled(total)
        return (out * numerator).sum(-1, keepdim=True) / (numerator * numerator).sum(-1, keepdim=True).clamp_min(1e-30)


def layers_of(model: Any) -> list[Layer]:
    """The blocks of a model.

    Raises:
        ModelError: a query, key, value or output map that is no plain linear map.
    """
    arch, places = model.arch, {place.name: place for place in model.arch.places}
    layers: list[Layer] = []
    for i in range(arch.n_layers):
        block = f"blocks.{i}"
        read = {}
        for letter, heads in (("q", arch.n_heads), ("k", arch.n_kv_heads), ("v", arch.n_kv_heads)):
            weight, bias = _linear(model, places, f"{block}.attn.{letter}")
            weight = weight.unflatten(1, (heads, -1)).transpose(0, 1)
            bias = None if bias is None else bias.unflatten(0, (heads, 1, -1))
            if (times := arch.n_heads // heads) > 1:
                weight, bias = (None if part is None else part.repeat_interleave(times, 0) for part in (weight, bias))
            read[letter] = (weight, bias)
        write, bias = _linear(model, places, f"{block}.attn.o")
        # Granite multiplies what attention and MLP add to the stream
        scale = float(getattr(model.bridge.blocks[i], "residual_contribution_scale", 1.0))
        write, bias = write * scale, None if bias is None else bias * scale
        before, mlp, post = (_norm(places.get(f"{block}.{name}")) for name in ("ln1", "ln2", "ln1_post"))
        mlp = before if mlp is None and arch.parallel else mlp
        layers.append(Layer(before, mlp, post, read, write.unflatten(0, (arch.n_heads, -1)), bias))
    return layers


def _norm(place: Any) -> NormPlace | None:
    return place if isinstance(place, NormPlace) else None


def _normed(place: NormPlace | None, x: Tensor) -> Tensor:
    return x if place is None else place.module.original_component(x)


def _linear(model: Any, places: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor | None]:
    place = places.get(name)
    if not isinstance(place, LinearPlace) or place.problem is not None:
        why = f"{name} {'is missing' if place is None else 'is not a plain linear map'}"
        raise ModelError(f"{model.name} cannot be run as a circuit: {why}, so what its heads read and write is not known.")
    return place.parameters()
