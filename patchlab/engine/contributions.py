"""Contributions of writers to the residual stream, and the norms and linear maps of blocks, for code that computes parts of them by itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import Architecture, BridgedModel
from patchlab.adapters.places import LinearPlace, NormPlace
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Target, row_numbers
from patchlab.engine.trust.precision import widened
from patchlab.errors import ModelError, unknown

POST_NORMS = {
    "renormalised": "where a norm follows the attention, every reader gets the norm of the heads' outputs that it reads, changed ones among them",
    "frozen": "where a norm follows the attention, a head's share is taken with a denominator held at a run's own, whatever else the reader reads",
}
"""How the output of one head is told from a block's attention where a norm follows it (Gemma 2 and 3, OLMo 2)."""


def post_norm_problem(model: BridgedModel, form: str) -> str | None:
    """Why a model has no edges of a form: an unknown one, or a denominator to hold where there is none; None if it has."""
    if form not in POST_NORMS:
        return unknown("form of the norm after attention (post_norm)", form, POST_NORMS)
    if form == "frozen" and not has_post_norm(model):
        return f"{model.name} has no norm after its attention, so there is no denominator to hold; leave post_norm='frozen' out."
    return None


def has_post_norm(model: BridgedModel) -> bool:
    """Whether a norm follows the attention in some block."""
    return any(place.name.endswith(".ln1_post") for place in model.arch.places)


def norm_over_heads(model: BridgedModel) -> str | None:
    """The name of a norm over the keys of all heads at once (OLMo 2); None where every head has its own, or none."""
    for place in model.arch.places:
        if isinstance(place, NormPlace) and place.name.endswith(".attn.k_norm"):
            weight = place.weight
            if weight is not None and weight.ndim == 1 and weight.numel() != model.arch.d_head:
                return place.name
    return None


def post_norm_record(model: BridgedModel, form: str) -> dict[str, str]:
    """Provenance of the form; nothing on models where there is but one."""
    return {"post_norm": form, "post_norm_is": POST_NORMS[form]} if has_post_norm(model) else {}


@dataclass(frozen=True)
class Contributions:
    """Contributions of every writer to the residual stream: ``values[writer, row, pos, d_model]``, writers in the order of the graph.

    A row or position axis of length 1 stands for all (zeros, means, constants); an axis in front for one set per circuit. Where a norm
    follows the attention, heads come as they are before it (``renormalised``), or in shares of its output (``frozen``).
    """

    values: Float[Tensor, "*circuit writer row pos d_model"]
    form: str = "renormalised"

    def rows(self, part: slice) -> "Contributions":
        """Those of some rows."""
        return self if self.values.shape[-3] == 1 else replace(self, values=self.values[..., part, :, :])

    def circuits(self, part: slice) -> "Contributions":
        """Those of some circuits."""
        return self if self.values.ndim == 4 or self.values.shape[0] == 1 else replace(self, values=self.values[part])


def written_at(arch: Architecture) -> tuple[Target, ...]:
    """The activations that tell what every writer writes: ``input``, and ``z`` and (where there are MLPs) ``mlp_out`` of every layer."""
    return tuple(target for kind in ("input", "z", "mlp_out") if kind not in arch.absent for target in arch.targets(kind))


def contributions(model: BridgedModel, tokens: Int[Tensor, "row pos"], form: str = "renormalised") -> Contributions:
    """Contributions of every writer in an unpatched run, in one of :data:`POST_NORMS`.

    Raises:
        SiteError: a model without a graph of edges.
    """
    graph = model.arch.graph
    kept = run(model, Program(tokens, row_numbers(tokens), keep=written_at(model.arch))).activations
    dtype = torch.promote_types(kept["input", None].dtype, kept["z", 0].dtype)
    values = kept["input", None].new_empty(len(graph.writers), *kept["input", None].shape, dtype=dtype)
    values[0] = kept["input", None]
    for i, layer in enumerate(layers_of(model)):
        z = kept["z", i][None]
        values[graph.heads_of(i)] = (layer.shares(z)[0] if form == "frozen" else layer.heads(z))[0]
        if graph.mlps:
            values[graph.mlp_of(i)] = kept["mlp_out", i]
    return Contributions(values, form)


@dataclass(frozen=True)
class Layer:
    """A block as edges see it: norms before the attention, before the MLP and after the attention; how each query head reads and writes.

    Weights of half precision are turned into float32, one at a time, where they meet a stream in float32.
    """

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
        out = torch.matmul(rearrange(_normed(self.before, x), "circuit head row pos d -> circuit head (row pos) d"), weight.to(x.dtype))
        return rearrange(out if bias is None else out + bias, "circuit head (row pos) d -> circuit head row pos d", row=x.shape[2])

    def into_mlp(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The MLP's input, from what it reads."""
        return _normed(self.mlp, x)

    def heads(self, z: Float[Tensor, "circuit row pos head d_head"]) -> Float[Tensor, "circuit head row pos d_model"]:
        """The output of every head: what the attention's own output, before a norm after it, is the sum of (with its bias)."""
        written = torch.matmul(rearrange(z, "circuit row pos head d -> circuit head (row pos) d"), self.write.to(z.dtype))
        return rearrange(written, "circuit head (row pos) d -> circuit head row pos d", row=z.shape[1])

    def after(self, attention: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The attention's contribution to the stream, from the sum of its heads: its bias comes in, then the norm after it."""
        return _normed(self.post, attention if self.bias is None else attention + self.bias)

    def shares(self, z: Float[Tensor, "circuit row pos head d_head"]) -> tuple[Float[Tensor, "circuit head row pos d_model"], Tensor | float]:
        """Contribution of every head where the norm's denominator is this run's, and what the attention adds besides (biases)."""
        parts = self.heads(z)
        rest: Tensor | float = 0.0 if self.bias is None else self.bias
        if self.post is None:
            return parts, rest
        scale = self.inverse_denominator(parts.sum(1))
        bias = self.post.bias
        rest = self.scaled(rest) * scale if isinstance(rest, Tensor) else rest
        return self.scaled(parts) * scale[:, None], rest if bias is None else rest + bias

    def scaled(self, x: Tensor) -> Tensor:
        """Weight times (centred) input: the post-norm without its denominator and bias."""
        if self.post is None:
            return x
        x = x - x.mean(-1, keepdim=True) if self.post.centred else x
        return x if self.post.weight is None else x * self.post.weight

    def inverse_denominator(self, attention: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows one"]:
        """1 / denominator of the post-norm on the sum of all heads: the factor by which its output is a multiple of w · x."""
        bias = None if self.post is None else self.post.bias
        out = self.after(attention) if bias is None else self.after(attention) - bias
        numerator = self.scaled(attention if self.bias is None else attention + self.bias)
        return (out * numerator).sum(-1, keepdim=True) / (numerator * numerator).sum(-1, keepdim=True).clamp_min(1e-30)


def layers_of(model: BridgedModel) -> list[Layer]:
    """The blocks of a model.

    Raises:
        ModelError: a query, key, value or output map that is no plain linear map.
    """
    arch, places = model.arch, {place.name: place for place in model.arch.places}
    layers: list[Layer] = []
    for i in range(arch.n_layers):
        block = f"blocks.{i}"
        read: dict[str, tuple[Tensor, Tensor | None]] = {}
        for letter, heads in (("q", arch.n_heads), ("k", arch.n_kv_heads), ("v", arch.n_kv_heads)):
            weight, bias = _linear(model, places, f"{block}.attn.{letter}")
            copies = arch.n_heads // heads  # query heads that share one
            weight = repeat(weight, "d_model (head d) -> (head copy) d_model d", head=heads, copy=copies)
            read[letter] = weight, None if bias is None else repeat(bias, "(head d) -> (head copy) 1 d", head=heads, copy=copies)
        write, bias = _linear(model, places, f"{block}.attn.o")
        # Granite multiplies what attention and MLP add to the stream
        scale = float(getattr(model.bridge.blocks[i], "residual_contribution_scale", 1.0))
        write, bias = write * scale, None if bias is None else bias * scale
        before, mlp, post = (_norm(places.get(f"{block}.{name}")) for name in ("ln1", "ln2", "ln1_post"))
        mlp = before if mlp is None and arch.parallel else mlp
        layers.append(Layer(before, mlp, post, read, rearrange(write, "(head d) d_model -> head d d_model", head=arch.n_heads), bias))
    return layers


def _norm(place: Any) -> NormPlace | None:
    return place if isinstance(place, NormPlace) else None


def _normed(place: NormPlace | None, x: Tensor) -> Tensor:
    if place is None:
        return x
    norm = place.module.original_component
    with widened(norm.modules() if x.dtype == torch.float32 else ()):  # where a half-precision model is checked
        return norm(x)


def _linear(model: BridgedModel, places: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor | None]:
    place = places.get(name)
    if not isinstance(place, LinearPlace) or place.problem is not None:
        why = f"{name} {'is missing' if place is None else 'is not a plain linear map'}"
        raise ModelError(f"{model.name} cannot be run as a circuit: {why}, so what its heads read and write is not known.")
    return place.parameters()
