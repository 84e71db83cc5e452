"""Single precision for checks: a model in half precision that computes in float32, one of its blocks at a time.

Half precision rounds so coarsely (a run and the same run in another batch differ by up to 15 %) that a comparison of values in it
can tell right from wrong only by guessing. The weights are exact in float32, so the same comparison on them can be as strict as on a float32 model.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.model_bridge import TransformerBridge

from patchlab.adapters import BridgedModel

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_single_precision(model: BridgedModel) -> Generator[None, None, None]:
    """Run blocks, final norm and unembedding of a half-precision model in float32 for the duration of the block, backwards too.

    Each module's weights are turned into float32 as it is called and are the old tensors again when it returns, so the memory that
    this takes is a float32 copy of the largest of them: of one block, or of the unembedding. A backward pass, which has to come inside the
    block, turns each weight into float32 as it gets there. The stream is in float32 from the embeddings on. A model in float32
    or float64 runs as it is.
    """
    if model.dtype not in HALF:
        yield
        return
    handles: list[RemovableHandle] = []
    wide: dict[int, Tensor] = {}
    try:
        for part in _parts(model.bridge):
            held: list[tuple[Tensor, Tensor]] = []
            handles.append(part.register_forward_pre_hook(partial(_widen, held, wide), with_kwargs=True))
            handles.append(part.register_forward_hook(partial(_restore, held, wide), always_call=True))
        for table in {id(part): part for part in model.bridge.original_model.modules() if isinstance(part, nn.Embedding)}.values():
            handles.append(table.register_forward_hook(_widen_output))
        with torch.autograd.graph.saved_tensors_hooks(partial(_pack, wide), _unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(bridge: TransformerBridge) -> list[nn.Module]:
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


def _widen(held: list[tuple[Tensor, Tensor]], wide: dict[int, Tensor], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    for tensor in {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values():
        if is_half(tensor):
            held.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
            wide[tensor.data_ptr()] = held[-1][1]
    return mapped(args, _as_float), mapped(kwargs, _as_float)


def _restore(held: list[tuple[Tensor, Tensor]], wide: dict[int, Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    while held:
        tensor, data = held.pop()
        wide.pop(tensor.data_ptr(), None)
        tensor.data = data


def _widen_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    return mapped(output, _as_float)


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.float() if is_half(tensor) else tensor


def _pack(wide: dict[int, Tensor], tensor: Tensor) -> Any:
    """What a backward pass keeps: of a weight in float32, or a view of it, the half-precision one that it comes from."""
    half = wide.get(tensor.untyped_storage().data_ptr()) if wide else None
    if half is None:
        return tensor
    return half, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    half, size, stride, offset = kept
    return half.float().as_strided(size, stride, offset)


@contextmanager
def widened(modules: Iterable[nn.Module]) -> Generator[None, None, None]:
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
    return tensor.dtype in HALF


def at_full_precision(tensor: Tensor) -> Tensor:
    """A tensor cut off from its graph, in float32 if it is of half precision."""
    return tensor.detach().float() if is_half(tensor) else tensor.detach()


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A structure of plain containers with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(entry, function) for entry in value)
    if type(value) is not dict:
        return value
    return {key: mapped(entry, function) for key, entry in cast(dict[Any, Any], value).items()}
