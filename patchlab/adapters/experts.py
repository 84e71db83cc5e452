"""Experts: what a mixture-of-experts layer computes, from its own weights, with the non-linear parts left open."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.moe import unwrap_bridge

Activation = Callable[[Tensor], Tensor]
Neurons = Callable[["Gated", Tensor, Tensor], Tensor]
"""Neurons from the kind of MLP, the gate's pre-activations and the linear branch."""
Weighted = Callable[[Tensor, Tensor], Tensor]
"""What an expert adds, from its routing weight and its output, both ``[token, d_model]``."""


@dataclass(frozen=True)
class Gated:
    """The gated product of an MLP: ``activation(g) · (clamp(u) + one)``, where ``clamp`` and ``one`` are there (GPT-OSS) or not."""

    activation: Activation
    clamp: Activation | None = None
    one: Float[Tensor, ""] | None = None

    def linear(self, u: Float[Tensor, "token neuron"]) -> Float[Tensor, "token neuron"]:
        """The linear branch as it enters the product, from what is clamped already."""
        return u if self.one is None else u + self.one.to(u)


def plain_neurons(gated: Gated, g: Float[Tensor, "token neuron"], u: Float[Tensor, "token neuron"]) -> Float[Tensor, "token neuron"]:
    """Neurons as the model computes them."""
    return gated.activation(g) * gated.linear(u if gated.clamp is None else gated.clamp(u))


def plain_weighted(weight: Float[Tensor, "token d_model"], out: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """Routing as the model computes it."""
    return weight * out


@dataclass(frozen=True, eq=False)
class Experts:
    """The parts of a mixture-of-experts layer.

    A router gives every token the weights and numbers of a few experts; each of these is a gated MLP. Beside them there may be one expert for
    all tokens, with a sigmoid gate of its own or without.

    Args:
        router: gives logits, weights ``[token, chosen]`` and numbers ``[token, chosen]``.
        weights: owns ``gate_up_proj`` and ``down_proj`` of all experts, and their biases.
        gated: the product of the gate and the linear branch.
        interleaved: gate and linear branch are the even and the odd outputs of ``gate_up_proj``; else its first and second half.
        transposed: weights are ``[expert, in, out]``; else ``[expert, out, in]``.
        shared: the expert for all tokens.
        shared_gate: the map to the input of its gate.
    """

    router: nn.Module
    weights: Any
    gated: Gated
    interleaved: bool = False
    transposed: bool = False
    shared: Any = None
    shared_gate: nn.Module | None = None

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """What is added inside, in the layer's own tensors: biases of experts, and the one of the linear branch."""
        names = ("gate_up_proj_bias", "down_proj_bias")
        found = [getattr(self.weights, name) for name in names if isinstance(getattr(self.weights, name, None), Tensor)]
        shared = [] if self.shared is None else [parameter for name, parameter in self.shared.named_parameters() if name.endswith("bias")]
        return (*found, *shared, *([] if self.gated.one is None else [self.gated.one]))

    def run(
        self, x: Float[Tensor, "row pos d_model"], neurons: Neurons = plain_neurons, weighted: Weighted = plain_weighted
    ) -> Float[Tensor, "row pos d_model"]:
        """The output of the layer for its input, with other neurons and another product with the routing weights."""
        flat = x.flatten(0, 1)
        _, weights, chosen = self.router(flat)
        total = torch.zeros_like(flat)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            out = self._expert(expert, flat[token], neurons)
            total = total.index_add(0, token, weighted(weights[token, place, None].expand_as(out), out).to(total.dtype))
        if self.shared is not None:
            g, u = unwrap_bridge(self.shared.gate_proj)(flat), unwrap_bridge(self.shared.up_proj)(flat)
            out = unwrap_bridge(self.shared.down_proj)(neurons(Gated(self.shared.act_fn), g, u))
            total = total + (out if self.shared_gate is None else weighted(self.shared_gate(flat).sigmoid().expand_as(out), out))
        return total.view_as(x)

    def _expert(self, expert: int, x: Float[Tensor, "token d_model"], neurons: Neurons) -> Float[Tensor, "token d_model"]:
        both = self._map("gate_up_proj", expert, x)
        g, u = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        return self._map("down_proj", expert, neurons(self.gated, g, u))

    def _map(self, name: str, expert: int, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
        weight, bias = getattr(self.weights, name)[expert], getattr(self.weights, f"{name}_bias", None)
        y = x @ (weight if self.transposed else weight.T)
        return y if bias is None else y + bias[expert]


def find_experts(mlp: nn.Module) -> Experts | None:
    """The experts of a mixture-of-experts layer; None if it is put together in a way that is not known.

    Whether the parts compute what the layer does is tested at load.
    """
    block = unwrap_bridge(mlp)
    router, weights = (_part(block, *names) for names in (("gate", "router"), ("experts",)))
    if router is None or weights is None or any(getattr(getattr(weights, name, None), "ndim", 0) != 3 for name in ("gate_up_proj", "down_proj")):
        return None
    shared, gate = _part(block, "shared_expert", "shared_experts"), _part(block, "shared_expert_gate")
    if shared is not None and any(not hasattr(shared, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    alpha, limit = getattr(weights, "alpha", None), getattr(weights, "limit", None)
    if alpha is not None and limit is not None:
        gated, interleaved = Gated(_Swish(float(alpha), float(limit)), clamp(float(limit)), torch.ones(())), True
    elif callable(getattr(weights, "act_fn", None)):
        gated, interleaved = Gated(weights.act_fn), False
    else:
        return None
    transposed = weights.gate_up_proj.shape[1] == weights.down_proj.shape[2]  # d_model; else it is 2 · d_mlp and d_mlp
    return Experts(router, weights, gated, interleaved, transposed, shared, gate)


def _part(block: nn.Module, *names: str) -> Any:
    found = next((part for name in names if isinstance(part := getattr(block, name, None), nn.Module)), None)
    return None if found is None else unwrap_bridge(found)


@cache
def clamp(limit: float) -> Activation:
    """The clamp to ``[-limit, limit]``."""
    return lambda x: x.clamp(-limit, limit)


@dataclass(frozen=True)
class _Swish:
    """``c · σ(α c)`` of the input ``c`` clamped from above (GPT-OSS)."""

    alpha: float
    limit: float

    def __call__(self, x: Tensor) -> Tensor:
        x = x.clamp(max=self.limit)
        return x * (self.alpha * x).sigmoid()
