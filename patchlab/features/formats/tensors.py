"""Tensors of a file, read without running any code that the file may hold, and taken by name and shape."""

import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchlab.errors import DictionaryError

_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Tensors:
    """The tensors of a file. Each is taken once; what is left at the end does not belong to the format.

    Args:
        file: where they were read, for messages.
        values: by name.
        architecture: what the file says that it holds, for messages.
    """

    file: Path
    values: dict[str, Tensor]
    architecture: str = ""

    def __post_init__(self) -> None:
        self.names = sorted(self.values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str, shape: Sequence[int | None] | None = None) -> Tensor:
        """A tensor, and off the list. None in a shape is any length.

        Raises:
            DictionaryError: it is not there, has another shape, or holds values that are no numbers.
        """
        if name not in self.values:
            raise DictionaryError(
                f"{self.file}: there is no tensor {name}, which {self.what} has; it holds {', '.join(self.names)}. The file is of "
                f"another kind than it says, or incomplete."
            )
        value = self.values.pop(name)
        if shape is not None and (
            value.ndim != len(shape) or any(want is not None and got != want for got, want in zip(value.shape, shape, strict=True))
        ):
            wanted = ", ".join("*" if want is None else str(want) for want in shape)
            raise DictionaryError(f"{self.file}: {name} has the shape {list(value.shape)}, and {self.what} of this size needs [{wanted}].")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise DictionaryError(
                f"{self.file}: {name} holds {bad:,} of {value.numel():,} values that are NaN or infinite. The file is damaged, or training diverged."
            )
        return value

    def done(self) -> None:
        """Check that nothing is left.

        Raises:
            DictionaryError: tensors that the format does not have.
        """
        if self.values:
            raise DictionaryError(
                f"{self.file}: holds {', '.join(sorted(self.values))}, which {self.what} does not have; read so, it would be something else."
            )

    @property
    def what(self) -> str:
        """What the file says that it holds."""
        return f"the architecture {self.architecture}" if self.architecture else "its format"


def read_tensors(file: Path) -> Tensors:
    """The tensors of a ``.safetensors``, ``.npz`` or ``.pt`` file, those of half precision as float32, which holds them exactly.

    Raises:
        DictionaryError: it is not there, is damaged, or holds objects that only unpickling could read.
    """
    if not file.is_file():
        raise DictionaryError(f"there is no file {file}; the folder is incomplete.")
    reader = {".safetensors": _safetensors, ".npz": _npz}.get(file.suffix, _torch)
    return Tensors(file, {name: value.float() if value.dtype in _HALF else value for name, value in reader(file).items()})


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DictionaryError(_damaged(file, error)) from error


def _npz(file: Path) -> dict[str, Tensor]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]) for name in data.files}
    except (ValueError, TypeError, AttributeError, zipfile.BadZipFile, OSError, EOFError) as error:
        if "pickle" in str(error).lower():  # what is no array archive at all is said to be a pickle as well
            raise DictionaryError(_needs_unpickling(file)) from error
        raise DictionaryError(_damaged(file, error)) from error


def _torch(file: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DictionaryError(_needs_unpickling(file)) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise DictionaryError(_damaged(file, error)) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DictionaryError(f"{file}: holds {type(found).__name__}, and a dictionary of tensors is expected.")
    return dict(found)


def _needs_unpickling(file: Path) -> str:
    return (
        f"{file}: is not a plain archive of tensors: it is damaged, or reading it would run code that it holds (a pickle), which patchlab never "
        f"does. Have its author save the tensors alone, or convert it to safetensors where you trust it."
    )


def _damaged(file: Path, error: Exception) -> str:
    return f"{file}: cannot be read: {str(error).strip() or type(error).__name__}. It is damaged or was not downloaded to its end; get it again."
