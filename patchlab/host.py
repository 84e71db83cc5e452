"""Values of a device as the host takes them: in float64, also from devices that have none (Apple's GPUs)."""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; found out by asking it for one number."""
    try:
        torch.zeros((), device=device).to(torch.float64)
    except (TypeError, RuntimeError):  # torch raises the one for Apple's GPUs, the other elsewhere
        return False
    return True


def precise(values: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Values in float64, for long sums: where they are if their device has float64, else on the CPU."""
    return (values if has_float64(values.device) else values.cpu()).to(torch.float64)


def to_array(values: Shaped[Tensor, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Values as a float64 array; the device is waited for."""
    return values.detach().cpu().to(torch.float64).numpy()
