"""Activations of dictionaries: which features a row has, given its pre-activations.

Every activation here is a mask: a feature is its pre-activation where the mask is open and zero elsewhere (a code is one where it is open). So
its slope in the pre-activation is the mask, and the mask is also f(z)/z: an Identity-rule would change nothing.

BatchTopK and Matryoshka dictionaries are :class:`JumpRelu` once they are trained; a gated one is as well, by :func:`gated`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchlab.errors import DictionaryError


@dataclass(frozen=True, eq=False)
class Activation(ABC):
    """Which features are active, and how strongly."""

    @abstractmethod
    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        """Where features are active."""

    def __call__(self, pre: Float[Tensor, "*rows feature"]) -> Float[Tensor, "*rows feature"]:
        """The features: pre-activations where the mask is open, else zero. The gradient is the mask."""
        return torch.where(self.mask(pre), pre, 0.0)

    def check(self, n_features: int) -> None:
        """Check that it belongs to a dictionary of this width.

        Raises:
            DictionaryError: it does not.
        """
        del n_features

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> "Activation":
        """The same on another device or in another precision."""
        del device, dtype
        return self


@dataclass(frozen=True, eq=False)
class Relu(Activation):
    """``max(pre, 0)``."""

    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return pre > 0


@dataclass(frozen=True, eq=False)
class Linear(Activation):
    """Every pre-activation as it is."""

    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return torch.ones_like(pre, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class JumpRelu(Activation):
    """``relu(pre) · (pre > θ)``: a threshold per feature, itself not passed.

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), eq. 3.
    """

    threshold: Float[Tensor, " feature"]

    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return (pre > 0) & (pre > self.threshold)

    def check(self, n_features: int) -> None:
        if self.threshold.shape != (n_features,):
            raise DictionaryError(f"a threshold has one number per feature, [{n_features}]; got the shape {list(self.threshold.shape)}.")
        if bool(torch.isnan(self.threshold).any()):
            raise DictionaryError(f"{int(torch.isnan(self.threshold).sum())} of {n_features} thresholds are NaN; the file is damaged.")

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> "Activation":
        return replace(self, threshold=self.threshold.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class _Largest(Activation):
    """The k largest of a row."""

    k: int

    def check(self, n_features: int) -> None:
        if not 1 <= self.k <= n_features:
            raise DictionaryError(f"k is from 1 to the number of features, {n_features}; got {self.k}.")

    def _largest(self, of: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return torch.zeros_like(of, dtype=torch.bool).scatter(-1, of.topk(self.k, dim=-1).indices, True)


class TopK(_Largest):
    """The k largest pre-activations of a row, those below zero dropped.

    Source: Gao et al. 2024 (arXiv 2406.04093), eq. 3, with the ReLU of the published code.
    """

    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return self._largest(pre) & (pre > 0)


class SignedTopK(_Largest):
    """The k largest pre-activations of a row, also those below zero, as circuit-tracer has it."""

    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return self._largest(pre)


class AbsTopK(_Largest):
    """The k pre-activations of a row that are largest in absolute value, with their signs."""

    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return self._largest(pre.abs())


class Codes(_Largest):
    """One for each of the k codes that fit a row best, zero for the others. Choosing has no slope: gradients through it are zero.

    Source: Tamkin et al. 2023 (arXiv 2310.17230), section 2.
    """

    def mask(self, pre: Float[Tensor, "*rows feature"]) -> Bool[Tensor, "*rows feature"]:
        return self._largest(pre)

    def __call__(self, pre: Float[Tensor, "*rows feature"]) -> Float[Tensor, "*rows feature"]:
        return self.mask(pre).to(pre.dtype)


def gated(
    w_enc: Float[Tensor, "d_in feature"],
    b_gate: Float[Tensor, " feature"],
    b_mag: Float[Tensor, " feature"],
    r_mag: Float[Tensor, " feature"],
) -> tuple[Float[Tensor, "d_in feature"], Float[Tensor, " feature"], JumpRelu]:
    """Encoder, bias and activation of a gated dictionary, ``[xW + b_gate > 0] · relu(x(W·e^r) + b_mag)``.

    The gate and the magnitude are two readings of the same product, so the gate opens where the magnitude's pre-activation is above
    ``b_mag − b_gate·e^r``: a JumpReLU on the magnitude. Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), appendix E.
    """
    gain = r_mag.exp()
    return w_enc * gain, b_mag, JumpRelu(b_mag - b_gate * gain)
