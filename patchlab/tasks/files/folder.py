"""Folders of data sets: the files of a split, in the layouts that the Hugging Face hub has."""

import re
from dataclasses import dataclass
from pathlib import Path

from patchlab.errors import TaskError, unknown

DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
SPLIT = "train"
"""The split that is read unless another one is asked for."""
SUBSET = "4_answer_choices"
"""The subset that is read where a data set has several with it and none is asked for, as the MIB circuit track does."""
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
_NAMED = re.compile(r"(?P<split>[A-Za-z]+)(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?")
_PLAIN_FOLDERS = ("data", "default")


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split of one subset, in their order.

    Args:
        paths: the files.
        split: its name.
        subset: its name; empty where a data set has none.
    """

    paths: tuple[Path, ...]
    split: str
    subset: str


def split_files(folder: Path, split: str | None = None, subset: str | None = None) -> SplitFiles:
    """The files of a split.

    Files are named after their split (``train.jsonl``, ``data/train-00000-of-00002.parquet``), or lie in a folder that is (``test/0000.parquet``);
    a folder around that is the subset (``4_answer_choices/test.jsonl``).

    Args:
        folder: of the data set.
        split: ``train`` (the default), ``validation`` or ``test``.
        subset: of a data set that has several; default ``4_answer_choices`` if it has that.

    Raises:
        TaskError: no data files, no such split or subset, several where none is named, two formats of one split, or a part that is missing.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.suffix in DATA_SUFFIXES and path.is_file() and not any(part.startswith(".") for part in place.parts):
            named = _split_of(place)
            if named is not None:
                found.setdefault(named, []).append(path)
    if not found:
        arrow = any(folder.rglob("*.arrow"))
        hint = "It was written by save_to_disk; write each split with to_parquet or to_json instead." if arrow else f"Name them as in {SPLIT}.jsonl."
        raise TaskError(f"{folder} has no files of splits ({', '.join(DATA_SUFFIXES)}, named {', '.join(dict.fromkeys(_SPLITS.values()))}). {hint}")
    subset = _subset(folder, sorted({name for name, _ in found}), subset)
    wanted = _SPLITS.get(SPLIT if split is None else split.lower(), split or SPLIT)
    if (subset, wanted) not in found:
        raise TaskError(f"{folder}: {unknown('split', wanted, sorted(name for one, name in found if one == subset))}")
    paths = found[subset, wanted]
    if len(suffixes := sorted({path.suffix for path in paths})) > 1:
        raise TaskError(f"{folder} has the split {wanted} as {' and as '.join(suffixes)}; keep one of them, or give the file itself.")
    _check_parts(folder, wanted, paths)
    return SplitFiles(tuple(paths), wanted, subset)


def _split_of(place: Path) -> tuple[str, str] | None:
    """Subset and split of a file; None for files that are neither, such as dataset_infos.json."""
    above = [part for part in place.parts[:-1] if part not in _PLAIN_FOLDERS]
    match = _NAMED.fullmatch(place.stem)
    if match and match["split"].lower() in _SPLITS:
        return "/".join(above), _SPLITS[match["split"].lower()]
    if above and above[-1].lower() in _SPLITS:
        return "/".join(above[:-1]), _SPLITS[above[-1].lower()]
    return None


def _subset(folder: Path, there: list[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in there:
            raise TaskError(f"{folder}: {unknown('subset', asked, [name for name in there if name])}")
        return asked
    if len(there) == 1 or SUBSET in there:
        return SUBSET if SUBSET in there else there[0]
    raise TaskError(f"{folder} has the subsets {', '.join(name or '(none)' for name in there)}; name one, as in subset={there[-1]!r}.")


def _check_parts(folder: Path, split: str, paths: list[Path]) -> None:
    """All parts of a split that says of how many it is made must be there, once."""
    parts = [match for path in paths if (match := _NAMED.fullmatch(path.stem)) and match["part"]]
    if not parts:
        return
    total = {int(match["parts"]) for match in parts}
    numbers = sorted(int(match["part"]) for match in parts)
    if len(total) > 1 or len(parts) < len(paths) or numbers != list(range(max(total))):
        missing = sorted(set(range(max(total))) - set(numbers))
        what = f"part {missing[0]:05d} is missing" if missing else "it is there in two versions"
        raise TaskError(f"{folder}: the split {split} is made of {max(total)} parts and {what}. Download it again, or remove what is too much.")
