"""Places: the modules of a model that backward rules can be put on.

A place knows the hooks it is read from and written at, and holds what a rule needs from the module (a norm's weight,
an activation function). ``problem`` says why no rule can be put there; a composite that wants to then refuses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.linear import LinearBridge
from transformer_lens.model_bridge.generalized_components.moe import MoEBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from patchlab.adapters.experts import Activation, Experts, clamp, find_experts
from patchlab.adapters.weights import fetched

LOGITS = "logits"
"""Stands in for a hook: what the whole model returns."""


@dataclass(frozen=True)
class Place:
    """A module that a rule can be put on; ``at`` is the hook whose value gets the rule's gradient.

    A new kind of place is a class with its ``slots``, and a function that puts their rules on its hooks (``patchlab.rules.attachments``).
    """

    name: str
    at: str
    problem: str | None = None
    module: Any = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Hooks whose values the rule needs."""
        return ()

    @property
    def slots(self) -> tuple[str, ...]:
        """The fields of a composite whose rules it takes."""
        raise NotImplementedError

    @property
    def takes(self) -> str:
        """The same in words."""
        return " and ".join(self.slots)

    def problem_with(self, *rules: Any) -> str | None:
        """Why the rules of its slots cannot be put there; None if they can."""
        return self.problem


@dataclass(frozen=True)
class NormPlace(Place):
    """A LayerNorm or RMSNorm: ``w · centre(x) / s (+ b)``."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (f"{self.name}.hook_in", f"{self.name}.hook_scale")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("norm",)

    @property
    def centred(self) -> bool:
        """Whether the mean is subtracted (LayerNorm)."""
        return not self.module.uses_rms_norm

    @property
    def weight(self) -> Tensor | None:
        """The factor of each channel; None for a norm without one."""
        weight = fetched(self.module.original_component, "weight")
        if weight is None:
            return None
        return 1.0 + weight if self.module.uses_weight_offset else weight

    @property
    def bias(self) -> Tensor | None:
        """What is added at the end; None for a norm without it."""
        return fetched(self.module.original_component, "bias")


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
    def slots(self) -> tuple[str, ...]:
        return ("activation", "product") if self.gated or self.problem else ("activation",)

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies a second, linear branch."""
        return self.linear is not None


@dataclass(frozen=True)
class ExpertsPlace(Place):
    """A mixture of experts; ``at`` is its output. A rule computes it again from its input, so that rules sit inside every expert."""

    experts: Experts | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (f"{self.name}.hook_in",)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("activation", "product", "routing", "linear")

    def problem_with(self, *rules: Any) -> str | None:
        if self.problem is not None or rules[3] is None:
            return self.problem
        return f"the {type(rules[3]).__name__} does not reach the linear maps of its experts"


@dataclass(frozen=True)
class AttentionPlace(Place):
    """An attention layer; ``at`` is its pattern hook, ``z`` the output of pattern times values, ``scores`` the queries and keys.

    ``open`` says whether what is put at the pattern hook flows on. Where the Bridge leaves the softmax to the wrapped module, the hook
    only shows the pattern afterwards: then it is held by holding queries and keys, and a rule that needs the softmax itself is refused.
    """

    z: str = ""
    scores: tuple[str, ...] = ()
    open: bool = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("pattern", "bilinear")

    @property
    def takes(self) -> str:
        return "attention"

    def problem_with(self, *rules: Any) -> str | None:
        if self.problem is not None or self.open:
            return self.problem
        pattern, _ = rules
        inside = f"the softmax runs inside {type(self.module.original_component).__name__}, where no hook of the Bridge reaches it"
        if pattern is not None and not pattern.blocks_scores:
            return f"{inside}, and the {type(pattern).__name__} needs it (the AHRule does not: it holds queries and keys)"
        return None if len(self.scores) == 2 else f"{inside}, nor its queries and keys"


@dataclass(frozen=True)
class GatePlace(Place):
    """A sigmoid gate on what an attention layer computes; ``at`` is the hook of the gate's input."""

    @property
    def slots(self) -> tuple[str, ...]:
        return ("gate",)


@dataclass(frozen=True)
class ClipPlace(Place):
    """A clamp of queries, keys or values to ``[-limit, limit]``; ``at`` is the hook of what is clamped next."""

    limit: float = 0.0

    @property
    def slots(self) -> tuple[str, ...]:
        return ("activation",)

    @property
    def activation(self) -> Activation:
        """The clamp."""
        return clamp(self.limit)


@dataclass(frozen=True)
class CapPlace(Place):
    """A soft cap ``c · tanh(x / c)``: of attention scores, where ``at`` is the hook of the capped scores, or of the logits."""

    cap: float = 0.0
    final: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return ("unembed.hook_out",) if self.final else ()

    @property
    def slots(self) -> tuple[str, ...]:
        return ("softcap",)

    @property
    def activation(self) -> Activation:
        """The soft cap."""
        return _soft_cap(self.cap)


@dataclass(frozen=True)
class LinearPlace(Place):
    """A linear map ``x W + b``."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (f"{self.name}.hook_in",)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("linear",)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight as ``[in, out]`` and bias."""
        component = self.module.original_component
        weight: Any = fetched(component, "weight")
        return (weight.T if isinstance(component, nn.Linear) else weight), fetched(component, "bias")


def _activation(component: Any) -> Activation | None:
    for name in ("act_fn", "act", "activation_fn", "activation", "activation_func", "nonlinearity", "gelu_impl"):
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
            yield NormPlace(clean, "", f"{type(module).__name__} is not a norm that the Bridge opens", module)


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


def _mlp(bridge: TransformerBridge, layer: int) -> Iterator[Place]:
    block = bridge.blocks[layer]
    mlp = getattr(block, "mlp", None)
    name = f"blocks.{layer}.mlp"
    if mlp is None:
        return
    hooks = bridge.hook_dict
    routed = isinstance(mlp, MoEBridge) and not mlp.bound_dense
    experts = find_experts(mlp) if routed else None
    if experts is not None:
        yield ExpertsPlace(name, f"{name}.hook_out", module=mlp, experts=experts)
        return
    if routed or f"{name}.hook_post" not in hooks or f"{name}.hook_pre" not in hooks:
        problem = f"{type(mlp).__name__} has no single activation (a router, or hooks that are missing)"
        yield MLPPlace(name, f"{name}.hook_post", problem, mlp)
        return
    linear = f"{name}.hook_pre_linear" if f"{name}.hook_pre_linear" in hooks else None
    activation = _activation(mlp.original_component)
    problem = None if activation is not None else f"the activation function of {type(mlp.original_component).__name__} was not found"
    yield MLPPlace(name, f"{name}.hook_post", problem, mlp, pre=f"{name}.hook_pre", linear=linear, activation=activation)


def _attention(bridge: TransformerBridge, layer: int) -> Iterator[Place]:
    attn = getattr(bridge.blocks[layer], "attn", None)
    if attn is None:
        return
    name = f"blocks.{layer}.attn"
    hooks = {hook: f"{name}.{hook}" for hook in _ATTENTION_HOOKS if f"{name}.{hook}" in bridge.hook_dict}
    missing = [hook for hook in ("hook_pattern", "hook_z") if hook not in hooks]
    problem = f"the hooks {missing} are missing" if missing else None
    scores = tuple(hooks[hook] for hook in ("hook_q", "hook_k") if hook in hooks)
    yield AttentionPlace(name, f"{name}.hook_pattern", problem, attn, z=f"{name}.hook_z", scores=scores)
    for hook in ("hook_q_gate", "hook_gate"):
        if hook in hooks:
            yield GatePlace(f"{name}.{hook.removeprefix('hook_')}", hooks[hook], module=attn)
    original = attn.original_component
    limit = getattr(attn, "_clip_qkv", None) or getattr(getattr(original, "config", None), "clip_qkv", None)
    if limit:
        normed = getattr(attn, "_qk_norm_phase", None) == "pre_reshape"
        for letter in "qkv":
            hook = f"hook_{letter}_normed" if normed and letter != "v" else f"hook_{letter}"
            problem = None if hook in hooks else f"its hook {hook} is missing"
            yield ClipPlace(f"{name}.clip_{letter}", f"{name}.{hook}", problem, attn, limit=float(limit))
    cap = getattr(original, "attn_logit_softcapping", None) or getattr(original, "attn_scores_soft_cap", None)
    if cap and cap > 0:
        problem = None if "hook_attn_scores" in hooks else "its hook hook_attn_scores is missing"
        yield CapPlace(f"{name}.softcap", f"{name}.hook_attn_scores", problem, attn, cap=float(cap))


_ATTENTION_HOOKS = (
    *("hook_pattern", "hook_z", "hook_q", "hook_k", "hook_v", "hook_q_normed", "hook_k_normed"),
    *("hook_attn_scores", "hook_q_gate", "hook_gate"),
)


def final_cap(bridge: TransformerBridge) -> float | None:
    """The soft cap of the logits, if the model has one."""
    config = getattr(getattr(bridge, "original_model", None), "config", None)
    found = getattr(config, "final_logit_softcapping", None)
    if found is None:
        found = getattr(bridge.cfg, "output_logits_soft_cap", None)
    return float(found) if found is not None and found > 0 else None


def find_places(bridge: TransformerBridge, n_layers: int) -> tuple[Place, ...]:
    """Every place of a bridged model, norms first, then MLPs, attention, the cap of the logits and linear maps."""
    places: list[Place] = list(_norms(bridge))
    for find in (_mlp, _attention):
        places += [place for layer in range(n_layers) for place in find(bridge, layer)]
    if (cap := final_cap(bridge)) is not None:
        places.append(CapPlace("logits.softcap", LOGITS, cap=cap, final=True))
    return tuple(places + list(_linears(bridge)))


@cache
def _soft_cap(cap: float) -> Activation:
    return lambda x: cap * (x / cap).tanh()


@lru_cache(maxsize=64)
def value_and_slope_at_zero(activation: Activation, device: torch.device) -> tuple[float, float]:
    """``f(0)`` and ``f'(0)`` of an elementwise activation, the latter by automatic differentiation."""
    with torch.enable_grad():
        zero = torch.zeros(1, device=device, requires_grad=True)
        value = activation(zero)
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return float(value.detach()), float(slope)
