"""Normalisations: what a dictionary does to its input first, and undoes on its output."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-5
"""Of the layer norm."""


class Normalisation(ABC):
    """A shift and a scale per row: the encoder reads ``(x − shift) / divisor``, and the output is ``y · scale + shift``.

    A factor that is the same for all rows is no normalisation here: it belongs into the weights (:func:`patchlab.features.folded`).
    """

    per_row = True
    """Whether decoding needs the input again."""

    @abstractmethod
    def enter(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """What the encoder reads."""

    @abstractmethod
    def leave(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """The output in units of the activation, given the input."""

    @abstractmethod
    def scale(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        """What a feature's part of the output is multiplied by."""

    def held(self, x: Float[Tensor, "*rows d"]) -> "Normalisation":
        """The same with the scale of every row a constant, that of these inputs: what a rule for norms does to it."""
        return self


@dataclass(frozen=True)
class Unchanged(Normalisation):
    """None."""

    per_row = False

    def enter(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return x

    def leave(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return y

    def scale(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        return x.new_ones((*x.shape[:-1], 1))


UNCHANGED = Unchanged()


@dataclass(frozen=True)
class LayerNorm(Normalisation):
    """``(x − μ) / (σ + ε)`` with the unbiased standard deviation; back with ``y · σ + μ``.

    The two factors differ by ε, as in SAELens (``layer_norm``), whose files these are.
    """

    fixed: Tensor | None = None

    def enter(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return (x - x.mean(-1, keepdim=True)) / (self.scale(x) + EPSILON)

    def leave(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return y * self.scale(x) + x.mean(-1, keepdim=True)

    def scale(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        return x.std(-1, keepdim=True) if self.fixed is None else self.fixed

    def held(self, x: Float[Tensor, "*rows d"]) -> "Normalisation":
        return replace(self, fixed=self.scale(x).detach())


@dataclass(frozen=True)
class ConstantNorm(Normalisation):
    """Every row is scaled to the norm √d, and back (``constant_norm_rescale`` of SAELens)."""

    fixed: Tensor | None = None

    def enter(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return x / self.scale(x)

    def leave(self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return y * self.scale(x)

    def scale(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5 if self.fixed is None else self.fixed

    def held(self, x: Float[Tensor, "*rows d"]) -> "Normalisation":
        return replace(self, fixed=self.scale(x).detach())
