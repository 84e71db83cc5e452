"""Contents of inputs: by what a key knows the models and files that a run reads, however they are spelt."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from patchlab.errors import SweepError, TaskError

MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""The files of a model folder that its results depend on: configuration, weights and tokenizer."""


def file_content(path: Path) -> str:
    """The content of a file, ``sha256:...`` of its bytes.

    Raises:
        SweepError: a file that cannot be read.
    """
    try:
        about = path.stat()
        return f"sha256:{_digest(path.resolve(), about.st_size, about.st_mtime_ns)}"
    except OSError as error:
        raise SweepError(f"cannot read {path}: {error.strerror or error}.") from error


def folder_content(folder: Path) -> str:
    """The content of a model folder, ``sha256:...`` of the names and bytes of its configuration, weights and tokenizer.

    Raises:
        SweepError: a folder that is no model, or that cannot be read.
    """
    files = {path.name: path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    if "config.json" not in files:
        raise SweepError(f"the folder {folder} has no config.json; give a Hugging Face model folder.")
    if not any(name.endswith((".safetensors", ".bin")) for name in files):
        raise SweepError(f"the folder {folder} has no weights (*.safetensors or *.bin); give a Hugging Face model folder.")
    return _content({name: files[name] for name in sorted(files)})


def _content(files: Mapping[str, Path]) -> str:
    lines = "\n".join(f"{name} {file_content(path)}" for name, path in files.items())
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def data_content(folder: Path, split: str | None = None, subset: str | None = None) -> str:
    """The content of a split of a data set, ``sha256:...`` of the names and bytes of its files.

    Raises:
        SweepError: no such split, or a file that cannot be read.
    """
    from patchlab.tasks.files.folder import split_files

    try:
        paths = split_files(folder, split, subset).paths
    except TaskError as error:
        raise SweepError(str(error)) from error
    return _content({path.relative_to(folder).as_posix(): path for path in paths})


def hub_data_content(name: str) -> str:
    """The content of a data set of the hub, ``hub:NAME@COMMIT``, of the commit that is in the cache.

    Raises:
        SweepError: it is not in the cache.
    """
    from patchlab.tasks.files.hub import cached_data

    folder = cached_data(name)
    if folder is None:
        raise SweepError(
            f"the data set {name!r} is neither a generator nor a file or folder nor in the hub cache. If it is a name of the hub, fetch it with: "
            f"patchlab sweep prefetch FILE."
        )
    return f"hub:{name}@{folder.name}"


def dictionary_folder(name: str | None, model: str, folder: Path) -> Path:
    """The folder of dictionaries: those packaged with a model, by its name, or a folder relative to ``folder``.

    Raises:
        SweepError: there is none.
    """
    from patchlab.features.load import DEMO_DICTIONARIES

    wanted = model if name is None else name
    if wanted in DEMO_DICTIONARIES:
        return DEMO_DICTIONARIES[wanted]
    packaged = f"Packaged are those of: {', '.join(DEMO_DICTIONARIES)}."
    if name is None:
        raise SweepError(f"no dictionaries are packaged for the model {model}; give 'dictionaries: FOLDER'. {packaged}")
    if not (found := folder / Path(name).expanduser()).is_dir():
        raise SweepError(f"there is no folder of dictionaries {found}; give a folder, or the name of a packaged model. {packaged}")
    return found.resolve()


def files_content(folder: Path) -> str:
    """The content of a folder of dictionaries, ``sha256:...`` of the names and bytes of all files in it and below, but hidden ones.

    Raises:
        SweepError: no file, or one that cannot be read.
    """
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    kept = [name for name in sorted(names) if not any(part.startswith(".") for part in Path(name).parts)]
    if not kept:
        raise SweepError(f"the folder {folder} is empty; give a folder of dictionaries.")
    return _content({name: names[name] for name in kept})


def model_folder(name: str, folder: Path) -> Path | None:
    """The folder of a model: packaged, or a folder relative to ``folder``; None for a hub name.

    Raises:
        SweepError: the name can be that of a folder only, and there is none.
    """
    from patchlab.models import DEMO_MODELS

    if name in DEMO_MODELS:
        return DEMO_MODELS[name]
    if (found := folder / Path(name).expanduser()).is_dir():
        return found.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise SweepError(f"there is no folder {found}; give a model folder, a hub name, or one of: {', '.join(DEMO_MODELS)}.")
    return None


def hub_content(name: str) -> str:
    """The content of a hub model, ``hub:NAME@COMMIT``, of the commit that is in the cache.

    Raises:
        SweepError: a model that is not in the cache, or not wholly.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from patchlab.models import DEMO_MODELS
    from patchlab.models.hub import has_weights

    valid = f"Packaged models: {', '.join(DEMO_MODELS)}. Or give a folder or a hub name."
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise SweepError(f"unknown model {name!r}: there is no such folder, and it cannot be a hub name. {valid}") from error
    if not isinstance(found, str) or not has_weights(Path(found).parent):
        state = "is only in part in the hub cache" if isinstance(found, str) else "is neither packaged nor a folder nor in the hub cache"
        raise SweepError(f"the model {name!r} {state}. If it is a hub name, fetch it with: patchlab sweep prefetch FILE. {valid}")
    return f"hub:{name}@{Path(found).parent.name}"


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int) -> str:
    """The hash of a file, computed once while its size and time stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
