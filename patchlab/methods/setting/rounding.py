"""Noise floors: how much of the effect of each cell is rounding.

A dtype has the relative spacing ε (2⁻⁷ in bfloat16, 2⁻¹⁰ in float16, 2⁻²³ in float32): one rounding is off by ½ ε at most. Every block rounds
what it adds to the residual stream several times, in independent directions. Taken here is that a run through L blocks leaves an activation
off by ``½ ε √L`` times its length in a random direction, and that a gradient, which goes back through the same blocks and depends on what
the forward run left in them, is off by ``ε √L`` times its length; so is, then, the product of both. In float32 and float64 twice as much: there the
sums inside a matrix product are rounded too, which half precision takes in float32. From this follow

- the resolution of the metric, ``r = √Σ_j (∂m/∂l_j · ½ ε √L max(|l_j|, s))²`` over the logits l that it reads, where s is their standard
  deviation over the vocabulary (a logit near zero is a sum of terms as large as the others). Its slope is the largest at five points
  on the way from the corrupted to the clean logits: where it is flat at both ends, as a probability, what is patched lies between. An
  exact effect is a difference of two such values: its floor is √2 r, the same for all cells of an example;
- the floor of a linearised score δ · g of vectors of d entries, ``ε √L |g| √((|a_source|² + |a_own|² + |δ|²) / d)``, summed in squares over what
  a cell takes jointly, and where the metric bends ρ |δ · g| in addition: ρ is by how much, relatively, its slope at the baseline changes if the
  logits are off as above;
- the floor of a second-order term, a difference of two gradients over twice a step h: ``ε √L |δ| |g| / (h √(2d))``.

These are sizes, not bounds: an effect below its floor says nothing, and between one effect in a hundred and one in three (random
Gemma-2 in float16, differences of probabilities) is off by more than its floor. Errors of examples are
taken as independent, so that a mean over n of them has the floor ``√Σ floor² / n`` (:meth:`patchlab.ScoreMap.noise_floor`).
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.host import precise, to_arrays
from patchlab.metrics import Answers, Metric

POINTS = 5
"""On the way from the corrupted to the clean logits."""


@dataclass(frozen=True)
class Rounding:
    """Rounding errors of a batch: of the metric, in its unit, and of its slope at the baseline, as a share; ``unit`` is ε √L, or 2 ε √L.

    NaN for a metric that cannot be differentiated.
    """

    unit: float
    metric: Float[np.ndarray, " batch"]
    slope: Float[np.ndarray, " batch"]

    def rows(self, rows: Int[np.ndarray, " row"]) -> "Rounding":
        """Of some examples."""
        return Rounding(self.unit, self.metric[rows], self.slope[rows])

    def of_products(
        self, variance: Float[np.ndarray, "batch *cells"], scores: Float[np.ndarray, "batch *cells"]
    ) -> Float[np.ndarray, "batch *cells"]:
        """The floor of linearised scores, from their :func:`product_variance`."""
        bent = self.slope.reshape(-1, *[1] * (scores.ndim - 1)) * scores
        return np.sqrt(self.unit**2 * variance + bent**2)


def spacing(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of a dtype, as products of matrices have it.

    >>> spacing(torch.bfloat16) == 2**-7
    True
    """
    if dtype == torch.float32:
        return {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    return torch.finfo(dtype).eps


def rounding(
    metric: Metric,
    answers: Answers,
    clean: Float[Tensor, "batch *rest"],
    corrupted: Float[Tensor, "batch *rest"],
    *,
    dtype: torch.dtype,
    n_layers: int,
    denoising: bool,
) -> Rounding:
    """Rounding errors of the metric in a dtype. The logits are what it reads, ``[batch, vocab]`` or ``[batch, pos, vocab]``."""
    unit, n = spacing(dtype) * n_layers**0.5 * (1 if dtype in (torch.float16, torch.bfloat16) else 2), len(clean)
    ends = [logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) for logits in (corrupted, clean)]
    size = 0.5 * unit * torch.stack([torch.maximum(end.abs(), end.std(-1, keepdim=True)) for end in ends]).amax(0)
    points = [torch.lerp(ends[0], ends[1], share) for share in torch.linspace(0, 1, POINTS).numpy().tolist()]
    signs = 1.0 - 2.0 * torch.randint(0, 2, size.shape[1:], generator=torch.Generator().manual_seed(0)).to(size)
    base = 0 if denoising else POINTS - 1
    with torch.enable_grad():
        logits = torch.cat([*points, points[base] + signs * size]).requires_grad_()
        try:
            values = metric(logits, answers.rows(torch.arange(n, device=clean.device).repeat(POINTS + 1)))
            (slopes,) = torch.autograd.grad(values.sum(), logits)
        except RuntimeError:  # torch's word for a function that leaves its graph
            return Rounding(unit, np.full(n, np.nan), np.full(n, np.nan))
    slopes = precise(rearrange(slopes, "(point batch) ... -> point batch (...)", batch=n))
    off = _length(slopes[:POINTS] * precise(size.flatten(1))).amax(0)
    length = _length(slopes[base])
    bent = torch.where(length > 0, _length(slopes[POINTS] - slopes[base]) / length, 0.0)
    return Rounding(unit, *to_arrays([off, bent]))


def _length(vectors: Float[Tensor, "*rest entry"]) -> Float[Tensor, "*rest"]:
    return cast(Any, torch.linalg).vector_norm(vectors, dim=-1)  # torch.linalg has no types


def product_variance(
    difference: Float[Tensor, "batch *site"], own: Float[Tensor, "batch *site"], coefficient: Float[Tensor, "batch *site"], *, vectors: bool
) -> Float[Tensor, "batch *axes"]:
    """Squared rounding error of ``difference · coefficient``, the difference being source − own, in units of (ε √L)².

    With ``vectors`` the last axis is summed over; else every number is a product of its own, whose factors are off by the mean length
    along that axis if they are shorter.
    """
    own, slope = own.to(difference.dtype), coefficient.to(difference.dtype).square()
    sizes, change = own.square() + (own + difference).square(), difference.square()
    if vectors:
        return (sizes + change).sum(-1) * slope.sum(-1) / difference.shape[-1]
    off, bent = (torch.maximum(squares, squares.mean(-1, keepdim=True)) for squares in (sizes, slope))
    return off * slope + change * bent
