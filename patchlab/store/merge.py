"""The union of stores, such as those of the parts of a sweep that several machines ran."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from patchlab.errors import OutputError
from patchlab.store.runs import RunStore, Stored

_SHOWN = 20
"""Disagreements that a message lists at most."""


def merge(target: RunStore, sources: Sequence[RunStore], *, same: Callable[[Stored, Stored], str | None]) -> list[str]:
    """Copy into a store what others have planned and finished, or nothing if they disagree.

    Of several results of a run a done one is kept before a failed one, and otherwise the first, that of ``target`` before those of the sources.
    Stale results are left behind. After an interruption the same call again goes on.

    Args:
        target: a store that is open for writing.
        sources: others, in order.
        same: whether two done results of one run agree: None, or how they differ.

    Returns:
        Keys of the runs whose results were copied.

    Raises:
        OutputError: results disagree, plans do, or a file is damaged (all of it is listed, and nothing is written); or something cannot be written.
    """
    stores = [target, *sources]
    if len({store.folder.resolve() for store in stores}) < len(stores):
        raise OutputError("a store cannot be merged with itself. Give each folder once.")
    planned: dict[str, Mapping[str, object]] = {}
    faults: list[str] = []
    for store in stores:
        for key, record in store.planned().items():
            if planned.setdefault(key, record) != record:
                differing = sorted(name for name in {*record, *planned[key]} if record.get(name) != planned[key].get(name))
                faults.append(f"{key[:12]}: planned with another {', '.join(differing)} in {store.folder}")
    kept = {key: one for store in stores for key, one in _unlike(store, same, planned, faults, stores)}
    copied = {key: one for key, one in kept.items() if one.folder.parent.parent != target.folder}
    for key, one in copied.items():
        for name in one.files:
            try:
                one.path(name)
            except OutputError as error:
                faults.append(f"{key[:12]}: {error}")
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise OutputError(f"the stores cannot be merged, and nothing was written:\n  {'\n  '.join(faults[:_SHOWN])}{more}")
    target.plan(planned)
    for key, one in copied.items():
        target.put(key, one.record, {name: partial(shutil.copyfile, one.path(name)) for name in one.files}, status=one.status)
    return list(copied)
