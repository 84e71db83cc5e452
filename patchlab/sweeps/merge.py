"""The union of folders of sweeps, such as those of its shards: results of one run must say the same wherever they were made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from patchlab.store.merge import agreed
from patchlab.store.merge import merge as merge_stores
from patchlab.store.runs import HEADER, RunStore, Stored
from patchlab.sweeps.kinds import SCORES

EPSILONS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""By dtype, how far 1 is from the next number."""


def tolerance(dtype: str) -> float:
    """By how much results of one run may differ between machines, as a share of the largest number: half the digits of the dtype.

    Another order of sums changes scores in float32 by about 5e-7 of the largest effect.

    >>> f"{tolerance('float32'):.1e}"
    '3.5e-04'
    """
    return EPSILONS[dtype] ** 0.5


def same(one: Stored, other: Stored) -> str | None:
    """Whether two finished results of one run agree: None, or how they differ.

    Fingerprints of model and prompts must be equal. Score maps may differ by :func:`tolerance` times the largest of their effects and metrics, and
    statistics by it times their size or 1, whichever is more.
    """
    a, b = one.record, other.record
    if a["fingerprints"] != b["fingerprints"]:
        unlike = sorted(name for name in {*a["fingerprints"], *b["fingerprints"]} if a["fingerprints"].get(name) != b["fingerprints"].get(name))
        return f"the fingerprints of {' and '.join(unlike)}"
    limit = tolerance(str(a["spec"]["model"]["dtype"]))
    if (how := _statistics(a["statistics"], b["statistics"], limit)) is not None:
        return how
    held = [SCORES in stored.files for stored in (one, other)]
    if any(held) and not all(held):
        return f"one of them has no {SCORES}"
    if not any(held) or one.sums[SCORES] == other.sums[SCORES]:
        return None
    return _scores(one.path(SCORES), other.path(SCORES), limit)


def _statistics(one: Iterable[Mapping[str, Any]], other: Iterable[Mapping[str, Any]], limit: float) -> str | None:
    a, b = ({(row["site"], row["statistic"]): row for row in rows} for rows in (one, other))
    for name in dict.fromkeys((*a, *b)):
        for end in ("value", "lo", "hi"):
            x, y = (rows.get(name, {}).get(end) for rows in (a, b))
            if x == y:
                continue
            if x is None or y is None or not abs(x - y) <= limit * max(1.0, abs(x), abs(y)):
                what = name[1] + (f" of {name[0]}" if name[0] else "") + ("" if end == "value" else f" ({end})")
                return f"{what} is {x} and {y}, and may differ by {limit:.0e}"
    return None


def _scores(one: Path, other: Path, limit: float) -> str | None:
    from patchlab.scores import ScoreMap

    a, b = (ScoreMap.load(path).data for path in (one, other))
    if {*a.variables} != {*b.variables}:
        return f"the score maps hold {sorted(map(str, {*a.variables} ^ {*b.variables}))[0]} once"
    metrics = ("metric_clean", "metric_corrupted")
    for name in a.variables:
        x, y = a[name].to_numpy(), b[name].to_numpy()
        if x.shape != y.shape:
            return f"{name} has the shapes {x.shape} and {y.shape}"
        if not np.issubdtype(x.dtype, np.floating):
            if not np.array_equal(x, y):
                return f"{name} is not the same"
        elif not np.array_equal(np.isnan(x), np.isnan(y)):
            return f"{name} has scores in other cells"
        else:
            scale = max(_largest(part.to_numpy()) for data in (a, b) for part in (data[name], *(data[metric] for metric in metrics)))
            apart = _largest(x - y)
            if apart > limit * scale:
                return f"{name} differs by up to {apart:.1e}, and may differ by {limit * scale:.1e}"
    return None


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def merge(out: str | Path, folders: Sequence[str | Path], *, say: Callable[[str], Any] = lambda _: None) -> dict[str, int]:
    """Put the results of several folders into one, or change nothing if they disagree.

    Args:
        out: the folder for all results; a new one, or one of a sweep.
        folders: what is copied from, in order: of several results of a run that agree the first is kept, and a done one before a failed one.
        say: told, in a line, what is missing or left behind.

    Returns:
        The numbers of runs that are ``planned``, ``done``, ``failed``, ``pending`` and ``running``, and how many were ``copied``.

    Raises:
        OutputError: a folder that is no sweep or is damaged, results that disagree, all of them listed, or something cannot be written.
    """
    sources = [RunStore.open(folder) for folder in folders]
    abouts: list[Mapping[str, Any]] = [source.about["about"] for source in sources]
    if not (Path(out).expanduser() / HEADER).exists():
        agreed(sources, same=same)  # before a folder is made for them
    about = {"name": abouts[0].get("name"), "file": abouts[0].get("file"), "merged": [str(source.folder) for source in sources]}
    whole = list(dict.fromkeys(key for one in abouts for key in one.get("sweep", ())))
    with closing(RunStore.create(out, about, say=say)) as target:
        copied = merge_stores(target, sources, same=same, order=whole, say=say)
        if missing := len({*whole} - target.planned().keys()):
            say(f"{missing} of the {len(whole)} runs of the sweep are in none of these folders; they hold {_shards(abouts)}")
        return {**target.counts(), "copied": len(copied)}


def _shards(abouts: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"shard {one['shard']}" if one.get("shard") else "a whole sweep" for one in abouts)
