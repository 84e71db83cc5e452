"""Dictionaries from folders and the hub."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from patchlab.errors import DictionaryError
from patchlab.features.dictionary import Dictionary
from patchlab.features.fit import fitted
from patchlab.features.formats import FORMATS, Format, Said
from patchlab.features.hub import HubName, hub_dictionaries
from patchlab.models import Model

_DEMO = Path(__file__).parent / "demo"
DEMO_DICTIONARIES: dict[str, Path] = {path.name: path for path in sorted(_DEMO.glob("*/")) if (path / "card.json").is_file()}
"""The folders of the packaged dictionaries, by the model that they belong to."""


def load_dictionary(
    path: str | Path,
    model: Model,
    *,
    layer: int | None = None,
    reads: str | None = None,
    trained_on: str | None = None,
    input_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Dictionary:
    """Load one dictionary of a model.

    Args:
        path: a folder (of SAELens, ...), or a hub name: ``owner/repository``, or ``owner/repository:folder`` for a folder of it.
        model: the model that it was trained on; it is checked.
        layer: which one, where there are several; or the layer of one whose files do not say it.
        reads: the same for the site kind.
        trained_on: the name of the model that the file names, to use its dictionary on this model all the same.
        input_scale: the factor on inputs that training used, where the file left it out.
        dtype: of its weights; default its own, at least float32 and at least that of the model.

    Raises:
        DictionaryError: not found, unreadable, several, or one that does not fit the model.

    Example:
        >>> load_dictionary("saes/blocks.3.hook_resid_post", model)  # doctest: +SKIP
        Dictionary(blocks.3.hook_resid_post: sae, resid_post of layer 3, 64 -> 512 features, JumpRelu)
    """
    said = Said(layer, reads, input_scale)
    found = list(_found(path, model, said, trained_on, dtype, single=True))
    if len(found) > 1:
        raise DictionaryError(
            f"{path} holds {len(found)} dictionaries ({_listed([d.where for d in found])}). Choose one with layer= and reads=, name its folder, or "
            f"use load_dictionaries."
        )
    return found[0]


def load_dictionaries(
    folder: str | Path,
    model: Model,
    *,
    layers: Collection[int] | None = None,
    sites: Collection[str] | None = None,
    kind: str | None = None,
    trained_on: str | None = None,
    input_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Dictionary, ...]:
    """Load all dictionaries of a model in a folder and the folders in it, in the order of layers.

    Args:
        folder: a folder, or a hub name (see :func:`load_dictionary`).
        model: the model that they were trained on; it is checked.
        layers: only those of these layers.
        sites: only those that read these site kinds.
        kind: only those of this kind (:data:`patchlab.features.KINDS`).
        trained_on: the name of the model that the files name, to use its dictionaries on this model all the same.
        input_scale: the factor on inputs that training used, where the files left it out.
        dtype: of their weights; default their own, at least float32 and at least that of the model.

    Raises:
        DictionaryError: none found, or one that is unreadable or does not fit the model.
    """
    wanted = {"layers": layers, "sites": sites, "kind": kind}
    every = list(_found(folder, model, Said(input_scale=input_scale), trained_on, dtype, single=False))
    found = [
        dictionary
        for dictionary in every
        if (layers is None or dictionary.layer in layers)
        and (sites is None or dictionary.reads in ([sites] if isinstance(sites, str) else sites))
        and (kind is None or dictionary.kind == kind)
    ]
    if not found:
        asked = ", ".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
        there = dict.fromkeys(f"{one.reads} ({one.kind})" for one in every)
        raise DictionaryError(f"{folder} holds no dictionary with {asked}. It has dictionaries that read {', '.join(there)}.")
    return tuple(sorted(found, key=lambda dictionary: (-1 if dictionary.layer is None else dictionary.layer, dictionary.reads, dictionary.name)))


def _found(path: str | Path, model: Model, said: Said, trained_on: str | None, dtype: torch.dtype | None, *, single: bool) -> Iterator[Dictionary]:
    """The dictionaries at a place, each checked; at least one."""
    folder, others, count = _folder(path, single), [], 0
    for kind, inner in _folders(folder):
        for dictionary in kind.read(inner, said):
            if said.layer not in (None, dictionary.layer) or said.reads not in (None, dictionary.reads):
                others.append(dictionary.where)
                continue
            count += 1
            yield fitted(dictionary, model, trained_on=trained_on, dtype=dtype)
    if others and not count:
        asked = " and ".join(f"{name}={value!r}" for name, value in (("layer", said.layer), ("reads", said.reads)) if value is not None)
        raise DictionaryError(f"{folder} holds no dictionary with {asked}, but {_listed(others)}.")
    if not count:
        raise DictionaryError(f"{folder} holds no dictionary. Formats that are read: {', '.join(kind.name for kind in FORMATS)}.")


def _listed(places: Sequence[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _folder(path: str | Path, single: bool) -> Path:
    if str(path) in DEMO_DICTIONARIES:
        return DEMO_DICTIONARIES[str(path)]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = HubName.parse(str(path)) if isinstance(path, str) else None
    if name is None:
        raise DictionaryError(
            f"there is no folder {folder}; give one, a packaged model that has dictionaries ({', '.join(DEMO_DICTIONARIES)}), or a name of the hub "
            f"such as owner/repository:folder."
        )
    markers = [marker for kind in FORMATS for marker in kind.markers]
    return hub_dictionaries(name, markers, [file for kind in FORMATS for file in kind.files], single=single)


def _folders(folder: Path) -> Iterator[tuple[Format, Path]]:
    """The folders of dictionaries at or below a folder, each with its format."""
    for kind in FORMATS:
        if kind.recognises(folder):
            yield kind, folder
            return
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        yield from _folders(inner)
