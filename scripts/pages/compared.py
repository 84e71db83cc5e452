"""Settings of finished sweeps in which methods were compared with exact patching, and how pages write what came of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import patchlab as pl
from patchlab.comparison.compare import Comparison
from patchlab.stats.distributions import t_quantile
from patchlab.sweeps import Sweep

ROOT = Path(__file__).resolve().parents[2]
SHOWN_MODELS = ("demo-gpt2", "demo-llama")
SHOWN_TASKS: dict[str, dict[str, Any]] = {"ioi": {}, "agreement": {"variant": "across_rc"}, "greater_than": {}}
"""The settings of which pages show each number; the others are counted."""
ENDS = ("atp", "relp")
"""Methods that stand first and last: differences are of a later method minus an earlier one."""


@dataclass(frozen=True)
class Setting:
    """A model, a task with its options and seed, a direction and sites, where exact patching and other methods scored the same cells.

    Args:
        model: its name.
        task: the task as the spec of a run has it.
        label: the task, its pairs, unusual options and seed, in words.
        direction: of the patches.
        comparison: of the methods, those of :data:`ENDS` first and last.
    """

    model: str
    task: Mapping[str, Any]
    label: str
    direction: str
    comparison: Comparison

    @property
    def sites(self) -> list[str]:
        """The sites that were scored."""
        return list(dict.fromkeys(self.comparison.table["site"]))

    @property
    def shown_as(self) -> str:
        """What pages call a setting that they show; nothing for one that they only count."""
        options = SHOWN_TASKS.get(self.task["name"])
        if self.model not in SHOWN_MODELS or options is None or not options.items() <= self.task["options"].items():
            return ""
        return " ".join([self.model, self.task["name"], *options.values()])


def settings_of(sweep: Sweep, *, methods: Sequence[str] = (), whole: bool = False) -> list[Setting]:
    """Every setting of the finished runs.

    Args:
        sweep: its folder.
        methods: only these are compared, and all of them in every setting; none for all that there are.
        whole: refuse a sweep with runs of them that are not done.

    Raises:
        SystemExit: what ``whole`` refuses, or a setting that lacks one of the methods.
    """
    runs = sweep.runs().set_index("key")
    wanted = runs[(runs["kind"] == "score") & (runs["method"].isin(["exact", *methods]) if methods else True)]
    if whole and (left := int((wanted["status"] != "done").sum())):
        raise SystemExit(f"{left} of the {len(wanted)} runs that this is made of are not done in {sweep.folder}. Run the sweep to its end first.")
    groups: dict[str, dict[str, str]] = {}
    for key, reference in sweep.references().items():
        if key in wanted.index:
            groups.setdefault(reference, {})[str(runs.loc[key, "method"])] = key
    planned, found = sweep.store.planned(), []
    for reference, keys in groups.items():
        about = runs.loc[reference]
        if lacking := [name for name in methods if name not in keys]:
            raise SystemExit(f"{about['label']}: there are no scores of {', '.join(lacking)} to compare. Give the folder of a sweep that has them.")
        ordered = sorted(keys, key=lambda name: ENDS.index(name) * 2 - 1 if name in ENDS else 0)
        label = str(about["label"]).partition(" × ")[2].partition(", ")[0]
        compared = pl.compare(sweep.scores(reference), {name: sweep.scores(keys[name]) for name in ordered})
        found.append(Setting(str(about["model"]), planned[reference]["spec"]["task"], label, str(about["direction"]), compared))
    return found


def over_settings(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over settings with the 95 % interval of Student's t; no interval from fewer than two settings, nothing where one is undefined."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2 or math.isnan(mean):
        return mean, math.nan, math.nan
    half = t_quantile(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def number(value: float, *, signed: bool = False) -> str:
    """Two digits: ``0.89``, ``+0.06``."""
    return "–" if math.isnan(value) else f"{value:{'+' if signed else ''}.2f}".replace("-", "−")


def with_interval(value: float, low: float, high: float, *, signed: bool = False) -> str:
    """A number with its interval, if it has one: ``+0.17 [+0.02, +0.32]``."""
    return number(value, signed=signed) + ("" if math.isnan(low) else f" [{number(low, signed=signed)}, {number(high, signed=signed)}]")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
