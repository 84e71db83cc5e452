"""Linear maps between states, and their least-squares fit."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.errors import LensError
from patchlab.host import precise


@dataclass(frozen=True, eq=False)
class LinearMap:
    """An affine map of states: ``weight @ x + bias``; computed in float32 at least."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None = None

    def __call__(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        y = x.to(dtype) @ self.weight.to(x.device, dtype).T
        return y if self.bias is None else y + self.bias.to(x.device, dtype)

    def back(self, gradient: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_in"]:
        """A gradient at the output as one at the input."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return gradient.to(dtype) @ self.weight.to(gradient.device, dtype)


class LeastSquares:
    """The sums that a least-squares fit of ``y ≈ W x + b`` needs, in float64: states are added in batches and not kept."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.count = 0
        self._xx = precise(torch.zeros(d_in + 1, d_in + 1, device=device))
        self._xy = precise(torch.zeros(d_in + 1, d_out, device=device))
        self._device = device

    def add(self, x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"]) -> None:
        """Add pairs of states."""
        wide = precise(x)
        wide = torch.cat([wide, wide.new_ones(len(wide), 1)], 1)
        self._xx += wide.T @ wide
        self._xy += wide.T @ precise(y)
        self.count += len(x)

    def solve(self, ridge: float | int, dtype: torch.dtype) -> LinearMap:
        """The map with the least squared error plus ``ridge`` · (mean squared entry of x) · ‖W‖² per state; the bias is not shrunk.

        Raises:
            LensError: fewer states than the map has coefficients per output.
        """
        width = len(self._xx) - 1
        if self.count <= width + 1:
            raise LensError(f"a map of {width} dimensions needs more than {width + 1} states to fit, and got {self.count}. Give more or longer rows.")
        penalty = ridge * self._xx[:-1, :-1].diagonal().mean()
        system = self._xx.clone()
        system[:-1, :-1].diagonal().add_(penalty)
        solution = torch.linalg.lstsq(system, self._xy, driver=None if system.is_cuda else "gelsd").solution
        return LinearMap(solution[:-1].T.to(dtype).contiguous().to(self._device), solution[-1].to(dtype).to(self._device))
