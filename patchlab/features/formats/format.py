"""Formats: how files of dictionaries are recognised and read."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchlab.errors import DictionaryError
from patchlab.features.dictionary import Dictionary


@dataclass(frozen=True)
class Said:
    """What the caller says of dictionaries, where their files do not.

    Args:
        layer: the layer.
        reads: the site kind.
        input_scale: the factor on inputs that training used and a file left out.
    """

    layer: int | None = None
    reads: str | None = None
    input_scale: float | None = None


@dataclass(frozen=True)
class Format:
    """A format of files.

    Args:
        name: for messages and provenance.
        files: patterns of the names of its files.
        markers: those of them that a folder of it has one of.
        read: the dictionaries of such a folder, one after the other.
    """

    name: str
    files: tuple[str, ...]
    markers: tuple[str, ...]
    read: Callable[[Path, Said], Iterator[Dictionary]]

    def recognises(self, folder: Path) -> bool:
        """Whether a folder is one of these."""
        return any(next(folder.glob(marker), None) is not None for marker in self.markers)


def read_json(file: Path) -> dict[str, Any]:
    """The contents of a JSON file that holds an object.

    Raises:
        DictionaryError: it is not there, no JSON, or something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DictionaryError(f"cannot read {file}: {error.strerror or error}.") from error
    except ValueError as error:
        raise DictionaryError(f"{file}: is no JSON ({error}). It is damaged or was not downloaded to its end; get it again.") from error
    if not isinstance(found, dict):
        raise DictionaryError(f"{file}: holds {type(found).__name__}, and an object is expected.")
    return found


def needed(cfg: dict[str, Any], key: str, kind: type, file: Path) -> Any:
    """A value of a configuration.

    Raises:
        DictionaryError: it is not there, or of another type.
    """
    value = cfg.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        got = "it is missing" if key not in cfg else f"got {value!r}"
        raise DictionaryError(f"{file}: {key} must be {_NAMES.get(kind, kind.__name__)}; {got}.")
    return value


_NAMES = {int: "a whole number", str: "a text", dict: "an object", bool: "true or false", float: "a number"}
