"""Values of a device as the host takes them: in float64, also from devices that have none (Apple's GPUs)."""

from collections.abc import Sequence
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
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # torch raises the one for Apple's GPUs, the other elsewhere
        return False
    return True


def precise(values: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Values in float64, for long sums: where they are if their device has float64, else on the CPU."""
    return (values if has_float64(values.device) else values.cpu()).to(torch.float64)


def to_arrays(several: Sequence[Float[Tensor, "..."]]) -> list[Float[np.ndarray, "..."]]:
    """Several tensors of one device as float64 arrays, in one move: the device is waited for once."""
    if not several:
        return []
    wide = torch.float64 if has_float64(several[0].device) else torch.float32
    flat = to_array(torch.cat([values.detach().to(wide).flatten() for values in several]))
    ends = np.cumsum([values.numel() for values in several])[:-1]
    return [part.reshape(values.shape) for part, values in zip(np.split(flat, ends), several, strict=True)]


def to_array(values: Shaped[Tensor, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Values as a float64 array; the device is waited for."""
    return values.detach().cpu().to(torch.float64).numpy()
