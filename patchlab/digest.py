"""Digests: short texts that tell a value from others, also after a restart."""

import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class _Unknown(Exception):
    """A value that cannot be told from another one."""


def digest(value: Any, name: str) -> str | None:
    """A name with a short hash of everything that a value is made of; None if that cannot be found out.

    >>> digest(2.5, "x") == digest(2.5, "x"), digest(object(), "x")
    (True, None)
    """
    state = hashlib.sha256()
    try:
        for piece in _pieces(value, ()):
            state.update(len(piece).to_bytes(8, "big") + piece)
    except _Unknown:
        return None
    return f"{name} ({state.hexdigest()[:16]})"


def _pieces(value: Any, above: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes that a value is made of; ``above`` are the ids of the values around it, which end a circle."""
    yield type(value).__qualname__.encode()
    if id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, (str, int, float, complex, bool, bytes, types.NoneType, type(...), torch.dtype, torch.device)):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype} {list(plain.shape)}".encode()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (tuple, list)):
        yield from _all(value, above)
    elif isinstance(value, Mapping):
        yield from _all(sorted(value.items(), key=lambda item: repr(item[0])), above)
    elif isinstance(value, types.ModuleType):
        yield value.__name__.encode()
    elif isinstance(value, (types.BuiltinFunctionType, type)) or _is_library(value):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from _all((value.co_consts, value.co_names), above)
    elif isinstance(value, types.FunctionType):
        yield from _all(_of_function(value), above)
    elif is_dataclass(value):
        yield from _all([(field.name, getattr(value, field.name)) for field in fields(value)], above)
        yield from _all(_methods(type(value)), above)
    else:
        raise _Unknown


def _all(values: Iterable[Any], above: tuple[int, ...]) -> Iterator[bytes]:
    for value in values:
        yield from _pieces(value, above)


def _is_library(value: Any) -> bool:
    """A function of a package whose version is part of the identity."""
    return isinstance(value, types.FunctionType) and value.__module__.split(".")[0] in ("torch", "patchlab")


def _of_function(function: types.FunctionType) -> Sequence[Any]:
    """Code, defaults, and the values that the code takes from around it."""
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as error:  # a cell that is not filled yet
        raise _Unknown from error
    names = sorted(_names(function.__code__) & function.__globals__.keys())
    return function.__code__, function.__defaults__, function.__kwdefaults__, cells, [(name, function.__globals__[name]) for name in names]


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _methods(kind: type) -> list[tuple[str, types.FunctionType]]:
    """What a class of other packages than ours, whose version is part of the identity, does."""
    own = [base for base in kind.__mro__ if base.__module__ != "builtins" and not base.__module__.startswith("patchlab.")]
    return [
        (name, method)
        for base in own
        for name, method in sorted(vars(base).items())
        if isinstance(method, types.FunctionType) and (name == "__call__" or not name.startswith("__"))
    ]
