"""Places: the modules of a model that backward rules can be put on.

A place knows the hooks it is read from and written at, and holds what a rule needs from the module (a norm's weight,
an activation function). ``problem`` says why no rule can be put there; a composite that wants to then refuses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.linear import LinearBridge
from transformer_lens.model_bridge.generalized_components.moe import MoEBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """A module that a rule can be put on; ``at`` is the hook whose value gets the rule's gradient."""

    name: str
    at: str
    problem: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Hooks whose values the rule needs."""
        return ()


@dataclass(frozen=True)
class NormPlace(Place):
    """A LayerNorm or RMSNorm: ``w · centre(x) / s (+ b)``."""

    module: Any = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (f"{self.name}.hook_in", f"{self.name}.hook_scale")

    @property
    def centred(self) -> bool:
        """Whether the mean is subtracted (LayerNorm)."""
        return not self.module.uses_rms_norm

    @property
    def weight(self) -> Tensor | None:
        """The factor of each channel; None for a norm without one."""
        weight = getattr(self.module.original_component, "weight", None)
        if weight is None:
            return None
        return 1.0 + weight if self.module.uses_weight_offset else weight


@dataclass(frozen=True)
class MLPPlace(Place):
    """The non-linearity of an MLP: ``f(g)``, or ``f(g) · u`` when gated."""

    pre: str = ""
    linear: str | None = None
    activation: Activation | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.pre,) if self.linear is None else (self.pre, self.linear)

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies a second, linear branch."""
        return self.linear is not None


@dataclass(frozen=True)
class AttentionPlace(Place):
    """An attention layer; ``at`` is its pattern hook, ``z`` the output of pattern times values."""

    z: str = ""


@dataclass(frozen=True)
class LinearPlace(Place):
    """A linear map ``x W + b``."""

    module: Any = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (f"{self.name}.hook_in",)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight as ``[in, out]`` and bias."""
        component = self.module.original_component
        weight = component.weight
        return (weight.T if isinstance(component, nn.Linear) else weight), component.bias


def _activation(component: Any) -> Activation | None:
    for name in ("act_fn", "act", "activation_fn", "activation", "activation_func", "nonlinearity"):
        found: Any = getattr(component, name, None)
        if callable(found):
            return cast(Activation, found)
    return None


def _norms(bridge: nn.Module) -> Iterator[Place]:
    wrapped = {id(m.original_component) for m in bridge.modules() if isinstance(m, NormalizationBridge)}
    named = {id(module): name for name, module in _aliased(bridge)}
    for name, module in bridge.named_modules():
        if isinstance(module, NormalizationBridge):
            if not isinstance(module.original_component, nn.Identity):
                clean = str(module.hook_out.name).removesuffix(".hook_out")
                yield NormPlace(clean, f"{clean}.hook_out", module=module)
        elif "norm" in type(module).__name__.lower() and id(module) not in wrapped and not _holds_norms(module):
            clean = named.get(id(module), name)
            yield NormPlace(clean, "", problem=f"{type(module).__name__} is not a norm that the Bridge opens", module=module)


def _holds_norms(module: nn.Module) -> bool:
    return any(isinstance(child, NormalizationBridge) for child in module.modules())


def _aliased(bridge: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in bridge.named_modules():
        yield name.replace("._original_component", ""), module


def _linears(bridge: nn.Module) -> Iterator[Place]:
    for _, module in bridge.named_modules():
        if isinstance(module, LinearBridge) and module.original_component is not None:
            clean = str(module.hook_out.name).removesuffix(".hook_out")
            if not clean.startswith("blocks.") or clean.endswith(".qkv"):  # the joint map is split into q, k and v, which run
                continue
            component = module.original_component
            usable = isinstance(component, nn.Linear) or type(component).__name__ == "Conv1D"
            problem = None if usable else f"{type(component).__name__} is not a plain linear map"
            yield LinearPlace(clean, f"{clean}.hook_out", problem=problem, module=module)


def _mlp(bridge: Any, layer: int) -> Place | None:
    block = bridge.blocks[layer]
    mlp = getattr(block, "mlp", None)
    name = f"blocks.{layer}.mlp"
    if mlp is None:
        return None
    hooks = bridge.hook_dict
    if isinstance(mlp, MoEBridge) or f"{name}.hook_post" not in hooks or f"{name}.hook_pre" not in hooks:
        return MLPPlace(name, f"{name}.hook_post", problem=f"{type(mlp).__name__} has no single activation (a router, or hooks that are missing)")
    linear = f"{name}.hook_pre_linear" if f"{name}.hook_pre_linear" in hooks else None
    activation = _activation(mlp.original_component)
    problem = None if activation is not None else f"the activation function of {type(mlp.original_component).__name__} was not found"
    return MLPPlace(name, f"{name}.hook_post", problem=problem, pre=f"{name}.hook_pre", linear=linear, activation=activation)


def _attention(bridge: Any, layer: int) -> Place | None:
    if getattr(bridge.blocks[layer], "attn", None) is None:
        return None
    name = f"blocks.{layer}.attn"
    missing = [hook for hook in ("hook_pattern", "hook_z") if f"{name}.{hook}" not in bridge.hook_dict]
    problem = f"the hooks {missing} are missing" if missing else None
    return AttentionPlace(name, f"{name}.hook_pattern", problem=problem, z=f"{name}.hook_z")


def find_places(bridge: Any, n_layers: int) -> tuple[Place, ...]:
    """Every place of a bridged model, norms first, then MLPs, attention and linear maps."""
    places: list[Place] = list(_norms(bridge))
    for find in (_mlp, _attention):
        places += [place for layer in range(n_layers) if (place := find(bridge, layer)) is not None]
    return tuple(places + list(_linears(bridge)))


@lru_cache(maxsize=64)
def value_and_slope_at_zero(activation: Activation, device: torch.device) -> tuple[float, float]:
    """``f(0)`` and ``f'(0)`` of an elementwise activation, the latter by automatic differentiation."""
    with torch.enable_grad():
        zero = torch.zeros(1, device=device, requires_grad=True)
        value = activation(zero)
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return float(value.detach()), float(slope)
