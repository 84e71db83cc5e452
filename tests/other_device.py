"""A device that is not the CPU: it computes on the CPU, refuses what an accelerator refuses, and counts what makes the host wait.

It is a backend of torch, called ``elsewhere``, with two devices. Tensors of both, or of one and the CPU, do not mix; there is no
float64 on it, as on Apple's GPUs; numpy sees nothing of it. Whatever gives values to the host is noted, since the host of a real device waits there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "elsewhere"
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
"""Operations after which the host knows values, or sizes that depend on values."""
COPIES = ("copy_", "_copy_from", "_copy_from_and_resize")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


@dataclass
class Device:
    """What the device has done; ``before`` is called with the name of every operation."""

    waits: list[str] = field(default_factory=list[str])
    before: Callable[[str], None] | None = None
    there: bool = False


_now = Device()


class There(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "There":
        about = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": device}
        made = Tensor._make_wrapper_subclass(cls, held.shape, **about)  # type: ignore[attr-defined]
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held!r}, {self.device})"

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)

    def tolist(self) -> Any:
        _now.waits.append("tolist")
        return self.detach().held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy; move it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, *args, **(kwargs or {}))


def _as_tensors(index: Any) -> Any:
    """An index with lists as tensors: torch makes them in a way that a backend in Python does not see."""
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _made(make: Any, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """What a function of torch that makes tensors gives, made on the CPU and moved, for the same reason."""
    if isinstance(data, There):
        return make(data, *args, **kwargs) if device is None else data.to(device, **kwargs)
    found = make(data, *args, **kwargs)
    return found if device is None else found.to(device)


def computed(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operation gives, computed on the CPU."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    devices = {one.device for one in tensors if isinstance(one, There)}
    if _now.before is not None:
        _now.before(name)
    _refuse_mixed(name, tensors, devices)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    _note_waits(name, args, devices, asked)
    if name == "_to_copy" and devices and kwargs.get("dtype") == torch.float64:
        raise TypeError(f"cannot convert a tensor on {NAME} to float64, which it does not have")  # nor on the way to the CPU
    kwargs_there = {key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()}
    found = func(*_held(args), **_held(kwargs_there))
    if name in COPIES or (func._schema.is_mutable and name.endswith("_")):
        return args[0]
    target = next(iter(devices), None) if asked is None else asked
    if target is None or target.type != NAME:
        return found
    found = pytree.tree_map_only(Tensor, partial(_wrapped, name, target if target.index is not None else torch.device(NAME, 0)), found)
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.arguments)
    return return_and_correct_aliasing(func, args, kwargs, found) if is_view else found


def _held(values: Any) -> Any:
    return pytree.tree_map_only(There, lambda one: one.held, values)


def _wrapped(name: str, device: torch.device, held: Tensor) -> Tensor:
    if held.dtype in (torch.float64, torch.complex128):
        raise TypeError(f"{name} gives float64, which {device} does not have")
    return There(held, device)


def _refuse_mixed(name: str, tensors: list[Tensor], devices: set[torch.device]) -> None:
    if name in COPIES or not devices:
        return
    on_cpu = [one for one in tensors if not isinstance(one, There) and one.ndim]
    if len(devices) > 1 or (on_cpu and name not in INDEXED):
        found = sorted({*map(str, devices), *(str(one.device) for one in on_cpu)})
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {' and '.join(found)}")


def _note_waits(name: str, args: tuple[Any, ...], devices: set[torch.device], asked: torch.device | None) -> None:
    if not devices:
        return
    by_mask = name in INDEXED and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
    away = (name == "_to_copy" and asked is not None and asked.type == "cpu") or (name == "copy_" and not isinstance(args[0], There))
    if name in WAITS or by_mask or away:
        _now.waits.append(f"{name} by mask" if by_mask else "cpu" if away else name)


class _Module:
    """The functions that torch looks for in ``torch.elsewhere``."""

    is_available = is_initialized = staticmethod(lambda: _now.there)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 2)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _now.there

    def has_primary_context(self, device: int) -> bool:
        return _now.there

    def is_built(self) -> bool:
        return True


@cache
def known() -> torch.library.Library:
    """Make the device known to torch, before the first backward pass of the process: which devices have a queue of their own is settled then."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks())
    library = torch.library.Library("_", "IMPL")
    library.fallback(computed, "PrivateUse1")
    return library


@contextmanager
def elsewhere() -> Iterator[Device]:
    """The device, which is there for the duration of the block."""
    known()
    makers = {name: getattr(torch, name) for name in ("tensor", "as_tensor", "eye", "arange")}
    _now.waits, _now.before, _now.there = [], None, True
    try:
        for name, make in makers.items():
            setattr(torch, name, partial(_made, make))
        yield _now
    finally:
        _now.before, _now.there = None, False
        for name, make in makers.items():
            setattr(torch, name, make)
