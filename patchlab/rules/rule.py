"""Backward rules: a surrogate whose gradient stands in for the module's own.

A rule never computes a forward value. It returns a tensor, the *surrogate*, and :func:`graft` gives the module's value,
bit for bit, the surrogate's gradient. There is one kind of rule per kind of place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import LinearPlace, NormPlace
from patchlab.adapters.places import Activation


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, gradients[0].to(ctx.dtype)


def graft(value: Float[Tensor, "*shape"], surrogate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``value`` in the forward pass, the gradient of ``surrogate`` in the backward pass.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> graft(x * x, 3 * x).backward()
    >>> x.grad
    tensor([3.])
    """
    return _Graft.apply(value.detach(), surrogate)  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None


def scale_gradient(value: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """``value`` in the forward pass, ``factor`` times its gradient in the backward pass."""
    return _ScaleGradient.apply(value, factor)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class NormRule:
    """A rule for LayerNorm and RMSNorm."""

    def surrogate(self, place: NormPlace, x: Float[Tensor, "*rows d"], scale: Float[Tensor, "*rows 1"]) -> Float[Tensor, "*rows d"]:
        """From the norm's input and its denominator."""
        raise NotImplementedError


@dataclass(frozen=True)
class ActivationRule:
    """A rule for an elementwise activation ``f(g)``."""

    def surrogate(self, f: Activation, g: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """From the pre-activation; the surrogate's value must be f(g) up to rounding."""
        raise NotImplementedError


@dataclass(frozen=True)
class ProductRule:
    """A rule for the product ``a · u`` of a gated MLP."""

    def surrogate(self, a: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """From the activated gate (an activation rule's surrogate, or f(g)) and the linear branch."""
        raise NotImplementedError


@dataclass(frozen=True)
class PatternRule:
    """A rule for the softmax of attention. ``blocks_scores``: no gradient reaches q and k, so they are not scored."""

    blocks_scores = False

    def surrogate(self, pattern: Float[Tensor, "row head dest src"]) -> Float[Tensor, "row head dest src"]:
        """From the attention pattern."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearRule:
    """A rule for a linear map ``y = x W + b``."""

    def surrogate(self, place: LinearPlace, x: Float[Tensor, "*rows d_in"], y: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        """From the input and the output."""
        raise NotImplementedError
