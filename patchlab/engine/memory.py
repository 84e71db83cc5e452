"""Memory: what is free, and what activations, blocks and gradients take. The one place that knows what a block holds on to."""

import os

import torch

from patchlab.adapters import BridgedModel
from patchlab.engine.program import Target


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device (4 GiB where the system does not tell)."""
    if device.type == "cuda":
        # what torch holds from earlier work and does not use is free as well
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, AttributeError, OSError):  # not every system tells
        return 4 * 2**30


def itemsize(model: BridgedModel) -> int:
    """Bytes of one number of the model's dtype."""
    return torch.empty(0, dtype=model.dtype).element_size()


def block_numbers(model: BridgedModel, length: int) -> int:
    """Numbers that a block holds per token of a prompt of some length: stream, MLP and attention scores."""
    arch = model.arch
    return 12 * arch.d_model + 4 * (arch.d_mlp or 0) + 3 * arch.n_heads * length


def token_bytes(model: BridgedModel, length: int) -> int:
    """Bytes that one token of a prompt takes on its way through a block, with the keys and values of those before it."""
    arch = model.arch
    return itemsize(model) * (block_numbers(model, length) + 2 * length * arch.n_kv_heads * arch.d_head)


def activation_bytes(model: BridgedModel, targets: tuple[Target, ...], rows: int, length: int) -> int:
    """Bytes of the activations at some sites, for a batch of rows."""
    return itemsize(model) * sum(rows * length * model.arch.numbers(kind, length) for kind, _ in targets)
