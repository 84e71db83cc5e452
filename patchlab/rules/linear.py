"""Rules for linear maps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import LinearPlace
from patchlab.rules.rule import LinearRule


def _share(part: Tensor, whole: Tensor, epsilon: float) -> Tensor:
    """``part / (whole + ε sign whole)``, in float32 at least: float16 rounds a usual ε to 0."""
    wide = whole.detach().to(torch.promote_types(whole.dtype, torch.float32))
    return (part.detach() / (wide + torch.where(wide >= 0, 1.0, -1.0).to(wide) * epsilon)).to(part.dtype)


@dataclass(frozen=True)
class EpsilonRule(LinearRule):
    """Relevance is damped where the output is small: ``R_i = Σ_j x_i w_ij / (y_j + ε sign y_j) · R_j``.

    Source: Montavon et al. 2019, "Layer-wise relevance propagation: an overview", eq. 10.4. y includes the bias.
    """

    epsilon: float = 1e-6

    def surrogate(self, place: LinearPlace, x: Float[Tensor, "*rows d_in"], y: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        return y * _share(y, y, self.epsilon)


@dataclass(frozen=True)
class GammaRule(LinearRule):
    """Contributions that agree in sign with the output are favoured by a factor 1 + γ.

    Source: Montavon et al. 2019, section 10.2.3, in the form generalised to signed inputs (Andéol et al. 2021): for
    outputs above zero ``x⁺(W + γW⁺) + x⁻(W + γW⁻)``, below zero ``x⁺(W + γW⁻) + x⁻(W + γW⁺)``, biases likewise.
    """

    gamma: float = 0.25
    epsilon: float = 1e-9

    def surrogate(self, place: LinearPlace, x: Float[Tensor, "*rows d_in"], y: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        weight, bias = place.parameters()
        up, down = x * (x >= 0), x * (x < 0)
        favour_plus, favour_minus = weight + self.gamma * weight.clamp_min(0), weight + self.gamma * weight.clamp_max(0)
        above, below = up @ favour_plus + down @ favour_minus, up @ favour_minus + down @ favour_plus
        if bias is not None:
            above, below = above + bias + self.gamma * bias.clamp_min(0), below + bias + self.gamma * bias.clamp_max(0)
        favoured = torch.where(y > 0, above, below)
        return favoured * _share(y, favoured, self.epsilon)
