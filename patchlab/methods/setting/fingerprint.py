"""Fingerprints of runs: what their results depend on, as texts that can be compared after a restart."""

from collections.abc import Mapping
from typing import Any

from patchlab.digest import digest
from patchlab.methods.setting.setting import Setting


def identify(record: Mapping[str, Any], setting: Setting, batches: str) -> dict[str, str | None]:
    """Fingerprint of a run: the parts that its results depend on, by name; None for a part that cannot be told from another.

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
        "added_sites": ", ".join(record.get("added_sites", {}).values()),
        "direction": record["direction"],
        "metric": digest(setting.task.metric, setting.task.metric.name),
        "dtype": record["dtype"],
        "device": record["device"],
        "batches": batches,
        "max_memory": str(setting.max_memory),
        "surroundings": digest(setting.surrounding, f"{len(setting.surrounding)} edits"),
        "versions": versions,
    }
