"""Rules for norms, activations, products and attention."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import NormPlace
from patchlab.adapters.places import Activation, value_and_slope_at_zero
from patchlab.errors import RuleError
from patchlab.rules.rule import ActivationRule, NormRule, PatternRule, ProductRule, scale_gradient


@dataclass(frozen=True)
class LNRule(NormRule):
    """The denominator is a constant: ``dy = w · centre(dx) / s`` (no centring for RMSNorm).

    Source: Ali et al. 2022 (arXiv 2202.07304), eq. 9; RelP (arXiv 2508.21258), table 1.
    """

    def surrogate(self, place: NormPlace, x: Float[Tensor, "*rows d"], scale: Float[Tensor, "*rows 1"]) -> Float[Tensor, "*rows d"]:
        x = x.to(scale.dtype)
        if place.centred:
            x = x - x.mean(-1, keepdim=True)
        y = x / scale.detach()
        return y if place.weight is None else y * place.weight


@dataclass(frozen=True)
class IdentityRule(ActivationRule):
    """An activation acts as a factor: ``dy = (f(x)/x) · dx``, at x = 0 the limit f'(0).

    Source: RelP (arXiv 2508.21258), table 1. Only for f(0) = 0; no stabiliser is added to x. The quotient is taken in float32 at
    least: f(x) of a small x is lost in float16.

    Raises:
        RuleError: the activation is not zero at zero.
    """

    def surrogate(self, f: Activation, g: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        x = g.detach().to(torch.promote_types(g.dtype, torch.float32))
        at_zero, slope = value_and_slope_at_zero(f, g.device)
        if at_zero != 0:
            raise RuleError(f"the Identity-rule needs an activation with f(0) = 0; this one has f(0) = {at_zero:g}. Use a composite without it.")
        ratio = torch.where(x == 0, slope, f(x) / torch.where(x == 0, 1.0, x))
        return ratio.to(g.dtype) * g


@dataclass(frozen=True)
class HalfRule(ProductRule):
    """Each factor of the gated product gets half of the gradient.

    With the Identity-rule on the gate: ``dp = ½ (p/g) dg + ½ (p/u) du``; without: ``½ f'(g) u dg + ½ f(g) du``. Because the
    factors are multiplied, nothing is divided and zeros need no guard. Source: RelP (arXiv 2508.21258), table 1.
    """

    def surrogate(self, a: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return scale_gradient(a * u, 0.5)


@dataclass(frozen=True)
class ConstantGateRule(ProductRule):
    """The gate is a constant: ``dp = f(g) du``. Source: CP-LRP, Ali et al. 2022 (arXiv 2202.07304)."""

    def surrogate(self, a: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return a.detach() * u


@dataclass(frozen=True)
class AHRule(PatternRule):
    """The attention pattern is a constant, so nothing reaches q and k. Source: Ali et al. 2022 (arXiv 2202.07304), eq. 8."""

    blocks_scores = True

    def surrogate(self, pattern: Float[Tensor, "row head dest src"]) -> Float[Tensor, "row head dest src"]:
        return pattern.detach()


@dataclass(frozen=True)
class TemperatureRule(PatternRule):
    """The softmax passes the gradient of ``T · softmax(s/T)``. Source: GIM, temperature-adjusted softmax gradients, T = 2.

    The scores enter through the logarithm of the pattern, which differs from them by a constant per row that both
    softmaxes ignore. An entry of zero is masked and gets nothing. Half precision is widened first: what float16 holds below its smallest
    normal number counts √(p) in a softmax of temperature 2, and is no zero.

    Raises:
        RuleError: the rows of the pattern do not sum to one (attention sinks).
    """

    temperature: float = 2.0

    def surrogate(self, pattern: Float[Tensor, "row head dest src"]) -> Float[Tensor, "row head dest src"]:
        wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        if not bool(torch.all((wide.detach().sum(-1) - 1).abs() < 1e-2)):
            raise RuleError("the temperature rule needs attention patterns whose rows sum to one; this model's do not (attention sinks?).")
        tiny = torch.finfo(wide.dtype).tiny
        scores = wide.clamp_min(tiny).log().masked_fill(wide < tiny, -torch.inf)
        return (self.temperature * (scores / self.temperature).softmax(-1)).to(pattern.dtype)


@dataclass(frozen=True)
class UniformRule:
    """Both bilinear maps of attention share the gradient equally: ½ at pattern and v, ¼ at q and k.

    Source: AttnLRP, Achtibat et al. 2024 (arXiv 2402.05602), proposition 3.3. It is put on the output of A·V and on the way from the
    pattern to the scores.
    """

    share: float = 0.5
