"""Single precision for checks: a model in half precision that computes in float32, one of its blocks at a time.

Half precision rounds so coarsely (a run and the same run in another batch differ by up to 15 %) that a comparison of values in it
can tell right from wrong only by guessing. The weights are exact in float32, so the same comparison on them can be as strict as on a float32 model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_single_precision(model: Any) -> Iterator[None]:
    """Run blocks, final norm and unembedding of a half-precision model in float32 for the duration of the block; no gradients.

    Each module's weights are turned into float32 as it is called and are the old tensors again when it returns, so the memory that
    this takes is a float32 copy of the largest of them: of one block, or of the unembedding. The stream between them stays in float32. A model in
    float32 or float64 runs as it is.
    """
    if model.dtype not in HALF:
        yield
        return
    handles = []
    try:
        for part in _parts(model.bridge):
            held: list[tuple[Tensor, Tensor]] = []
            handles.append(part.register_forward_pre_hook(partial(_widen, held), with_kwargs=True))
            handles.append(part.register_forward_hook(partial(_restore, held), always_call=True))
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(bridge: Any) -> list[nn.Module]:
    """The blocks, and what is around them but for the embeddings."""
    blocks = list(bridge.blocks)
    inside = {id(module) for block in blocks for module in block.modules()}
    every = {id(module): module for root in (bridge, bridge.original_model) for module in root.modules()}
    around = [module for key, module in every.items() if key not in inside]
    return blocks + [
        module for module in around if not any(id(part) in inside or isinstance(part, nn.Embedding) for part in module.modules()) and _holds(module)
    ]


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _widen(held: list[tuple[Tensor, Tensor]], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    for tensor in {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values():
        if tensor.dtype in HALF:
            held.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
    return _widened(args), _widened(kwargs)


def _restore(held: list[tuple[Tensor, Tensor]], module: nn.Module, inputs: Any, output: Any) -> None:
    while held:
        tensor, data = held.pop()
        tensor.data = data


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, (tuple, list)):
        return type(value)(_widened(part) for part in value)
    return {name: _widened(part) for name, part in value.items()} if isinstance(value, dict) else value
