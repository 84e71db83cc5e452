"""The union of stores, such as those of the parts of a sweep that several machines ran."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from patchlab.errors import OutputError
from patchlab.store.runs import RunStore, Stored

_SHOWN = 20
"""Disagreements that a message lists at most."""


def merge(
    target: RunStore,
    sources: Sequence[RunStore],
    *,
    same: Callable[[Stored, Stored], str | None],
    order: Sequence[str] = (),
    say: Callable[[str], Any] = lambda _: None,
) -> list[str]:
    """Copy into a store what others have planned and finished, or nothing if they disagree.

    Of several results of a run a done one is kept before a failed one, and otherwise the first, that of ``target`` before those of the sources;
    likewise of what was planned. Results that are stale, or whose run no store has planned, are left behind, and so is what was derived from
    results. After an interruption the same call again goes on.

    Args:
        target: a store that is open for writing.
        sources: others, in order.
        same: whether two done results of one run agree: None, or how they differ.
        order: keys of runs that are planned in this order, before the others.
        say: told, in a line, how many results are left behind.

    Returns:
        Keys of the runs whose results were copied.

    Raises:
        OutputError: results disagree, or a file is damaged (all of it is listed, and nothing is written); or something cannot be written.
    """
    target.plan({})  # whether it can be written to shows now
    kept, planned = agreed([target, *sources], same=same, ours=target, say=say)
    target.plan({key: planned[key] for key in dict.fromkeys((*order, *planned)) if key in planned})
    copied = {key: kept[key] for key in target.planned() if key in kept and kept[key].folder.parent.parent != target.folder}
    for key, one in copied.items():
        target.put(key, one.record, {name: partial(shutil.copyfile, one.path(name)) for name in one.files}, status=one.status)
    return list(copied)


def agreed(
    stores: Sequence[RunStore],
    *,
    same: Callable[[Stored, Stored], str | None],
    ours: RunStore | None = None,
    say: Callable[[str], Any] = lambda _: None,
) -> tuple[dict[str, Stored], dict[str, Mapping[str, object]]]:
    """The results that the union of stores has, and what it plans.

    The arguments are those of :func:`merge`; results in ``ours`` stay where they are, so that their files are not looked at.

    Raises:
        OutputError: results disagree, or a file is damaged.
    """
    if len({store.folder.resolve() for store in stores}) < len(stores):
        raise OutputError("a store cannot be merged with itself. Give each folder once.")
    planned: dict[str, Mapping[str, object]] = {}
    for store in stores:
        planned |= {key: record for key, record in store.planned().items() if key not in planned}
    faults: list[str] = []
    left = 0
    kept: dict[str, Stored] = {}
    for store in stores:
        for key, status in store.results().items():
            if status == "stale" or key not in planned:
                left += store is not ours
                continue
            try:
                one = store.get(key)
                first = kept.setdefault(key, one)
                if first.status == "failed" and one.status == "done":
                    kept[key] = one
                elif first is not one and (first.status, one.status) == ("done", "done") and (how := same(first, one)) is not None:
                    faults.append(f"{key[:12]}: {first.folder} and {one.folder} differ: {how}")
            except OutputError as error:
                faults.append(f"{key[:12]}: {error}")
    for key, one in kept.items():
        for name in one.files if ours is None or one.folder.parent.parent != ours.folder else ():
            try:
                one.path(name)
            except OutputError as error:
                faults.append(f"{key[:12]}: {error}")
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        listed = "\n  ".join(faults[:_SHOWN])
        raise OutputError(f"the stores cannot be merged, and nothing was written:\n  {listed}{more}")
    if left:
        say(f"{left} results are left behind: they are stale, or their runs are not planned.")
    return kept, planned
