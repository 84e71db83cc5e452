"""What a run is, in values that can be compared after a restart."""

import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from patchlab.methods.setting.setting import Setting


class _Unknown(Exception):
    """A value that cannot be told from another one."""


def identify(record: Mapping[str, Any], setting: Setting, batches: str) -> dict[str, str | None]:
    """The parts of a run that its results depend on; None for a part that cannot be told from another.

    Args:
        record: the provenance of the run.
        setting: what the method was asked.
        batches: how the examples are split, in words.

    A metric is told by the code of its function and by the values that the code refers to; surrounding edits by their
    addresses, operations and values. Functions with a state of their own, and sources of other classes, cannot be told.
    """
    options = ", ".join(f"{name}={value}" for name, value in record["method_options"].items())
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("patchlab", "torch", "transformers"))
    return {
        "method": f"{record['method']} ({options})",
        "model": f"{record['model']} ({record['model_fingerprint']})",
        "task": f"{record['task']} ({record['task_fingerprint']})",
        "sites": ", ".join(map(str, setting.sites)) + "".join(f" @{name}" for name in setting.task.scored_positions or ()),
        "direction": record["direction"],
        "metric": digest(setting.task.metric, setting.task.metric.name),
        "dtype": record["dtype"],
        "device": record["device"],
        "batches": batches,
        "max_memory": str(setting.max_memory),
        "surroundings": digest(setting.surrounding, f"{len(setting.surrounding)} edits"),
        "versions": versions,
    }


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
    elif is_dataclass(value) and type(value).__module__.startswith("patchlab."):
        yield from _all([(field.name, getattr(value, field.name)) for field in fields(value)], above)
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
