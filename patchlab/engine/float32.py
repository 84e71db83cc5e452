"""Full precision for a part of a model: what rounding in half precision would hide is tested in float32."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def widened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Weights and buffers of half precision in float32 for the duration of the block; afterwards they are the tensors they were before."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for module in modules:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if id(tensor) not in kept and is_half(tensor):
                    kept[id(tensor)] = tensor, tensor.data
                    tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in kept.values():
            tensor.data = data


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor is of half precision."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def at_full_precision(tensor: Tensor) -> Tensor:
    """A tensor cut off from its graph, in float32 if it is of half precision."""
    return tensor.detach().float() if is_half(tensor) else tensor.detach()


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A structure of plain containers with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(entry, function) for entry in value)
    return {key: mapped(entry, function) for key, entry in value.items()} if type(value) is dict else value
