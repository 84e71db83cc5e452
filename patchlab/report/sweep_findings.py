"""Findings of a sweep: what its page shows, as one reading of its folder found it."""

import json
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from patchlab.errors import OutputError
from patchlab.scores import ScoreMap
from patchlab.store.runs import Stored
from patchlab.sweeps.kinds import NODES, SCORES
from patchlab.sweeps.results import Sweep, without_source

RANKING, COSTS = "ranking", "costs"
RANKED_BY = "pearson_per_prompt"
Row = Mapping[Hashable, Any]


@dataclass(frozen=True)
class Findings:
    """What the page of a sweep shows: its runs as one reading found them, what each measured, and names that tell them apart.

    Args:
        name: of the sweep.
        runs: of :meth:`Sweep.runs`.
        plans: what was planned, by key, in the order of the plan.
        done: the finished runs.
        table: of :meth:`Sweep.table`, with seconds.
        differences: of :meth:`Sweep.differences`.
        references: the exact run that each run of scores is compared with.
        trouble: failed runs by key.
        stale: why a run is stale, by key.
        damaged: what is wrong with a result that cannot be read any more, by key.
        figures: names of files of figures: of each by its own name, and of each run that has one by :func:`figure_of` its key.
    """

    name: str
    runs: pd.DataFrame
    plans: Mapping[str, Mapping[str, Any]]
    done: Mapping[str, Stored]
    table: pd.DataFrame
    differences: pd.DataFrame
    references: Mapping[str, str]
    trouble: Mapping[str, Stored]
    stale: Mapping[str, str]
    damaged: Mapping[str, str] = field(default_factory=dict[str, str])
    figures: dict[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def statistics(self) -> dict[tuple[str, str, str], Row]:
        """Rows of the table by key, site and statistic."""
        return {(row["key"], row["site"], row["statistic"]): row for row in self.table.to_dict("records")}

    def value(self, key: str, statistic: str, site: str = "") -> float | None:
        """One number of a run; None if it has none."""
        found = self.statistics.get((key, site, statistic), {}).get("value")
        return None if found is None or pd.isna(found) else float(found)

    @cached_property
    def models(self) -> dict[str, str]:
        """The model of each run, by a name that no other model here has."""
        return _labels({key: (plan["fields"]["model"], plan["spec"]["model"]) for key, plan in self.plans.items()})

    @cached_property
    def tasks(self) -> dict[str, str]:
        """The task of each run, likewise, without its seed."""
        found: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for key, plan in self.plans.items():
            spec, pairs = plan["spec"]["task"], plan["fields"]["n"]
            rest = {name: value for name, value in spec.items() if name not in ("name", "n", "seed", "options")}
            found[key] = f"{plan['fields']['task']}{'' if pairs is None else f'[{pairs}]'}", {**rest, **spec.get("options", {})}
        return _labels(found)

    @cached_property
    def settings(self) -> dict[str, str]:
        """What each exact run is of: methods are set against each other within it."""
        named: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for key in dict.fromkeys(self.references.values()):
            fields = self.plans[key]["fields"]
            name = f"{self.models[key]} × {self.tasks[key]} seed {fields['seed']}, {fields['direction']}"
            named[key] = name, {"sites": fields["sites"], "source": fields["method"].partition("@")[2] or "paired"}
        return _labels(named)

    @cached_property
    def unscored(self) -> dict[tuple[str, str], str]:
        """Why a run scores nothing at a site, by key and site, for runs that are compared and have no agreement there."""
        lacking = [key for key in self.references if any(self.value(key, RANKED_BY, site) is None for site in self.sites(key))]
        maps = {key: ScoreMap.load(self.done[key].path(SCORES)) for key in lacking}
        return {(key, site): why for key, scores in maps.items() for site, why in scores.not_scored.items()}

    def of_kind(self, kind: str) -> list[str]:
        """The finished runs of a kind."""
        return [key for key in self.done if self.plans[key]["fields"]["kind"] == kind]

    def sites(self, key: str) -> list[str]:
        """The sites of a run; of features those that its dictionaries have, as the run found them."""
        if self.plans[key]["fields"]["kind"] == "features":
            return [site for one, site, statistic in self.statistics if one == key and statistic == "live_cells"]
        return list(self.plans[key]["spec"]["what"]["sites"])

    def method(self, key: str) -> str:
        """The name of a run's method."""
        return str(self.plans[key]["fields"]["method"])

    @cached_property
    def agreement(self) -> pd.DataFrame:
        """What is ranked and drawn against cost: ``site``, ``setting``, ``method`` (without its source), ``key``, ``passes`` and ``value``."""
        rows = [
            {"site": site, "setting": self.settings[reference], "method": without_source(self.method(key)), "key": key, "passes": self.passes(key)}
            | {"value": self.value(key, RANKED_BY, site)}
            for key, reference in self.references.items()
            for site in self.sites(key)
        ]
        return pd.DataFrame(rows, columns=["site", "setting", "method", "key", "passes", "value"]).astype({"value": float})

    @cached_property
    def paired(self) -> pd.DataFrame:
        """Paired differences of what is ranked, with the names of :attr:`agreement`."""
        rows = self.differences[self.differences["statistic"] == RANKED_BY]
        names = {
            "setting": rows["reference"].map(self.settings),
            "method": rows["method"].map(without_source),
            "other": rows["other"].map(without_source),
        }
        return rows.assign(**names).astype({"value": float, "lo": float, "hi": float})

    def passes(self, key: str) -> float:
        """Forwards + 2 · backwards of a run; NaN where it does not say."""
        forwards, backwards = (self.value(key, name) for name in ("forwards", "backwards"))
        return math.nan if forwards is None or backwards is None else forwards + 2 * backwards

    @cached_property
    def circuits(self) -> dict[str, list[str]]:
        """Finished runs of circuits that differ in their method alone."""
        return self._but_for_the_method("circuit", "curve")

    @cached_property
    def features(self) -> dict[str, list[str]]:
        """Finished runs of features that differ in their method alone, and have circuits."""
        found = self._but_for_the_method("features", "nodes")
        having = {name: [key for key in keys if NODES in self.done[key].files] for name, keys in found.items()}
        return {name: keys for name, keys in having.items() if keys}

    def _but_for_the_method(self, kind: str, name: str) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for key in self.of_kind(kind):
            spec = self.plans[key]["spec"]
            rest = {name: value for name, value in spec["what"].items() if name != "method"}
            groups.setdefault(json.dumps({**spec, "what": rest}, sort_keys=True), []).append(key)
        return {f"{name}-{keys[0][:16]}": keys for keys in groups.values()}


def figure_of(key: str) -> str:
    """The name of a run's figure."""
    return f"run-{key[:24]}"


def sweep_counts(found: Findings) -> dict[str, int]:
    """How many runs are planned, done, failed, running, pending, stale and damaged."""
    status = list(found.runs["status"])
    return {"planned": len(status)} | {name: status.count(name) for name in ("done", "failed", "running", "pending", "stale", "damaged")}


def gather(sweep: Sweep, say: Callable[[str], Any] = lambda _: None) -> Findings:
    """All that the page shows, but its figures.

    Raises:
        OutputError: nothing is planned.
    """
    runs, plans = sweep.runs(), sweep.store.planned()
    if runs.empty:
        raise OutputError(f"nothing is planned in {sweep.folder}, so there is nothing to report. Run the sweep first.")
    status = dict(zip(runs["key"], runs["status"], strict=True))
    say("comparing methods with exact patching")
    table, differences = sweep.table(costs=True), sweep.differences()
    done = {key: sweep.store.get(key) for key, state in status.items() if state == "done"}
    empty = pd.DataFrame(columns=["key", "site", "statistic", "value", "lo", "hi"])
    table = table[table["key"].isin([*done])] if len(table) else empty  # others may have ended meanwhile
    references = {key: one for key, one in sweep.references().items() if key in done and one in done}
    differences = differences[differences["key"].isin([*references]) & differences["other_key"].isin([*references])]
    trouble = {key: sweep.store.get(key) for key, state in status.items() if state == "failed"}
    stale = {key: _why_stale(sweep, key) for key, state in status.items() if state == "stale"}
    damaged = {row["key"]: row["error"] for row in runs[runs["status"] == "damaged"].to_dict("records")}
    return Findings(sweep.name, runs, {key: plans[key] for key in status}, done, table, differences, references, trouble, stale, damaged)


def _why_stale(sweep: Sweep, key: str) -> str:
    try:
        sweep.store.get(key)
    except OutputError as error:
        return str(error)
    return "it was noted as such"


def _labels(named: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """A label per key: its name, with the details in which others of the same name differ."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for name, details in named.values():
        alike.setdefault(name, []).append(details)
    telling: dict[str, list[str]] = {}
    for name, found in alike.items():
        every = dict.fromkeys(detail for one in found for detail in one)
        telling[name] = [detail for detail in every if len({json.dumps(one.get(detail), sort_keys=True) for one in found}) > 1]
    return {
        key: name + "".join(f" {detail}={_short(details[detail])}" for detail in telling[name] if detail in details)
        for key, (name, details) in named.items()
    }


def _short(value: Any) -> str:
    shown = str(value)
    return f"{shown[:15]}…" if shown.startswith("sha256:") else shown
