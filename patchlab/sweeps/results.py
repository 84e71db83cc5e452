"""Results of a sweep: one table of everything, and the score maps, curves and circuits of single runs."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from patchlab.errors import OutputError, PatchlabError, SweepError
from patchlab.store.files import writing
from patchlab.store.runs import RUNS, RunStore, Stored

if TYPE_CHECKING:
    from patchlab.circuits import Circuit, FaithfulnessCurve, SmallestFaithful
    from patchlab.scores import ScoreMap

AGREEMENT = (
    *("pearson", "pearson_per_prompt", "pearson_pooled", "spearman", "slope", "sign_agreement", "topk_recall"),
    *("pearson_per_prompt_q25", "pearson_per_prompt_q50", "pearson_per_prompt_q75"),
)
"""Statistics of the agreement of a method with exact patching, over live cells."""
COSTS = ("forwards", "backwards", "positions", "seconds")
COMPARED = ("score", "features")
"""Kinds of runs whose scores are compared with exact patching."""


class Sweep:
    """A folder of a sweep, to be read: also while it runs, and where nothing may be written.

    Example:
        >>> sweep = pl.sweeps.open("out")  # doctest: +SKIP
        >>> sweep.table().query("statistic == 'pearson'")  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.store = RunStore.open(path)
        self._read: dict[str, tuple[Any, str | None]] = {}

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.store.folder

    @property
    def name(self) -> str:
        """The sweep's name."""
        return str(self.store.about["about"].get("name") or self.folder.name)

    def counts(self) -> dict[str, int]:
        """How many runs are ``planned``, ``done``, ``failed``, ``pending`` and ``running``, and where there are any, how many are ``damaged``."""
        found = ["pending" if one == "stale" else one for one in self._status().values()]
        wanted = ("done", "failed", "pending", "running", *(["damaged"] if "damaged" in found else []))
        return {"planned": len(found)} | {status: found.count(status) for status in wanted}

    def damaged(self) -> dict[str, str]:
        """By key, why a result cannot be read any more: its record or one of its files is gone or is not what was written."""
        status = self.store.status()
        return {key: why for key in status if status[key] in ("done", "failed") and (why := self._damage(key)) is not None}

    def runs(self) -> pd.DataFrame:
        """One row per planned run, in the order of the plan: ``key``, ``label``, ``status``, ``seconds``, ``error``, and what was asked for.

        The status is that of the store, or ``damaged``; the error is that of a failed run, or what is wrong with a damaged result.
        """
        rows: list[dict[str, Any]] = []
        damaged = self.damaged()
        status = self._status(damaged)
        for key, plan in self.store.planned().items():
            record: Mapping[str, Any] = self.store.get(key).record if status[key] in ("done", "failed") else {}
            error = damaged.get(key, "") or record.get("error", {}).get("message", "")
            rows.append(
                {"key": key, "label": plan["label"], "status": status[key], "seconds": record.get("seconds"), "error": error, **plan["fields"]}
            )
        return pd.DataFrame(rows)

    def find(self, key: str) -> Stored:
        """A result by its key, or by the beginning of one.

        Raises:
            SweepError: no such run, or several.
            OutputError: it has no result, or a stale or damaged one.
        """
        found = [one for one in self.store.planned() if one.startswith(key)] if key else []
        if len(found) != 1:
            what = f"{len(found)} runs begin with" if found else "no run begins with"
            raise SweepError(f"{what} {key!r}; give the key of a run, as Sweep.runs() and `patchlab sweep status` list them.")
        return self.store.get(found[0])

    def scores(self, key: str) -> "ScoreMap":
        """The scores of a run; of verified patching those of the screen.

        Raises:
            SweepError, OutputError: as :meth:`find`, or a run without scores.
        """
        from patchlab.scores import ScoreMap
        from patchlab.sweeps.kinds import SCORES

        return ScoreMap.load(self._file(key, SCORES))

    def curve(self, key: str) -> "FaithfulnessCurve":
        """The faithfulness curve of a run, without its circuits.

        Raises:
            SweepError, OutputError: as :meth:`find`, or a run without a curve.
        """
        from patchlab.circuits import FaithfulnessCurve
        from patchlab.sweeps.kinds import CURVE

        return FaithfulnessCurve.load(self._file(key, CURVE))

    def smallest(self, *keys: str) -> "SmallestFaithful | None":
        """What runs found about their smallest faithful circuits, a row each; the curve is that of the first. None where none of them looked.

        Raises:
            SweepError, OutputError: as :meth:`find`.
        """
        from patchlab.circuits import FaithfulnessCurve, SmallestFaithful
        from patchlab.sweeps.kinds import SIZES, SMALLEST

        looked = [stored for stored in map(self.find, keys) if SMALLEST in stored.files]
        if not looked:
            return None
        rows = [_restored(json.loads(stored.path(SMALLEST).read_text(encoding="utf-8"))) for stored in looked]
        sizes = FaithfulnessCurve.load(looked[0].path(SIZES))
        return SmallestFaithful(pd.DataFrame(rows), sizes, {}, sizes.provenance)

    def circuits(self, **where: Any) -> "dict[str, Circuit]":
        """The smallest faithful circuits of runs whose fields have these values (``method="relp"``), by key; runs that found none are left out.

        Damaged results (:meth:`damaged`) have none.

        Raises:
            SweepError: no run has such a field.
        """
        from patchlab.circuits import read
        from patchlab.circuits.sparse import with_edges
        from patchlab.sweeps.kinds import CIRCUIT

        runs = self.runs()
        for name, value in where.items():
            if name not in runs:
                raise SweepError(f"runs have no field {name!r}; they have {', '.join(map(str, runs))}.")
            runs = runs[runs[name] == value]
        done = [self.store.get(key) for key in runs.loc[runs["status"] == "done", "key"]]
        return {one.key: with_edges(read(one.path(CIRCUIT)), "the circuit of a sweep") for one in done if CIRCUIT in one.files}

    def table(self, *, costs: bool = False) -> pd.DataFrame:
        """One row per finished run, site and statistic, in the order of the plan.

        The columns: ``key``, ``label``, the fields of the run (``model``, ``task``, ``direction``, ``kind``, ``method``, ...), ``site`` ("" for the
        whole run), ``statistic``, ``value``, and its 95 % interval ``lo``, ``hi`` where it has one. Beside what each run found by itself there is
        the agreement of each method with exact patching of the same model, task, direction, sites and source, over live cells. It is the same
        however often the sweep was interrupted. A damaged result has one row, with the statistic ``damaged`` and no value; ``why`` says what is
        wrong with it.

        Args:
            costs: also what each run took: ``forwards``, ``backwards``, ``positions`` and ``seconds``, with the work that was repeated after an
                interruption, so that no two sweeps share them.
        """
        rows: list[dict[str, Any]] = []
        done = {stored.key: (stored, plan) for stored, plan in self.done()}
        damaged, plans = self.damaged(), self.store.planned()
        references = self._references({key: plan for key, (_, plan) in done.items()})
        lost = self._references({key: plans[key] for key in (*done, *damaged)})
        for key in (key for key in plans if key in done or key in damaged):
            about = {"key": key, "label": plans[key]["label"], **plans[key]["fields"]}
            if key in damaged:
                rows.append({**about, **_without_value("damaged", damaged[key])})
                continue
            stored, reference = done[key][0], references.get(key)
            found = [*stored.record["statistics"], *([] if reference is None else self._agreement(stored, done[reference][0]))]
            if reference is None and key in lost:
                found.append(_without_value("not_compared", f"the result of exact patching is damaged: {damaged[lost[key]]}"))
            if costs:
                taken = {**stored.record["cost"], "seconds": stored.record["seconds"]}
                found += [{"site": "", "statistic": name, "value": taken[name], "lo": None, "hi": None} for name in COSTS]
            rows += [{**about, **one} for one in found]
        table = pd.DataFrame(rows)
        last = ["site", "statistic", "value", "lo", "hi"]
        return table if table.empty else table[[*(name for name in table if name not in last), *last]]

    def done(self) -> Iterator[tuple[Stored, dict[str, Any]]]:
        """The finished runs and what was planned, in the order of the plan; without those whose result is damaged."""
        status = self._status()
        for key, plan in self.store.planned().items():
            if status[key] == "done":
                yield self.store.get(key), plan

    def reference(self, key: str) -> str | None:
        """The run of exact patching that a run of scores is compared with; None where there is none (yet), or it is one itself."""
        status, plans = self._status(), self.store.planned()
        done = {one: plan for one, plan in plans.items() if status[one] == "done"}
        return self._references({**done, key: plans[key]}).get(key)

    def differences(self) -> pd.DataFrame:
        """Paired differences between methods in their agreement with exact patching, of all that were compared with the same exact run.

        One row per pair, site and form of the Pearson correlation, over the live cells that all of those methods score: ``reference`` (the key of
        the exact run), ``key`` and ``other_key``, ``method`` and ``other``, ``site``, ``statistic``, ``value`` (method minus other), and its 95 %
        interval ``lo``, ``hi``: both methods see the same draws of examples. A method whose scores have no sign is not set against one whose have.
        """
        done = {stored.key: (stored, plan) for stored, plan in self.done()}
        groups: dict[str, list[str]] = {}
        for key, reference in self._references({key: plan for key, (_, plan) in done.items()}).items():
            if all(row["statistic"] != "not_compared" for row in self._agreement(done[key][0], done[reference][0])):
                groups.setdefault(reference, []).append(key)
        rows: list[dict[str, Any]] = []
        for reference, keys in groups.items():
            if len(keys) > 1:
                named = {str(done[key][1]["fields"]["method"]): done[key][0] for key in keys}
                for row in self._differences(named, done[reference][0]):
                    keys_of_pair = {"key": named[row["method"]].key, "other_key": named[row["other"]].key}
                    rows.append({"reference": reference, **keys_of_pair, **row})
        return pd.DataFrame(rows, columns=["reference", "key", "other_key", "method", "other", "site", "statistic", "value", "lo", "hi"])

    def references(self) -> dict[str, str]:
        """By their keys, the finished runs of scores and the run of exact patching that each is compared with."""
        return self._references({stored.key: plan for stored, plan in self.done()})

    def _references(self, plans: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """The exact run that each of these runs is compared with, among these."""
        exact: dict[str, str] = {}
        for key, plan in plans.items():
            if (alike := _exact(plan)) is not None:
                exact.setdefault(alike, key)
        wanted = {key: _compared_with(plan) for key, plan in plans.items()}
        return {key: exact[alike] for key, alike in wanted.items() if alike in exact}

    def _agreement(self, stored: Stored, reference: Stored) -> list[dict[str, Any]]:
        name = f"{stored.key[:32]}-{reference.key[:32]}"
        return self._derived(name, [stored, reference], lambda: _agreement(_scores_of(reference), _scores_of(stored)))

    def _differences(self, named: Mapping[str, Stored], reference: Stored) -> list[dict[str, Any]]:
        whole = json.dumps([reference.key, *(stored.key for stored in named.values())])
        name = f"differences-{hashlib.sha256(whole.encode()).hexdigest()[:32]}"
        made = [*named.values(), reference]
        return self._derived(name, made, lambda: _differences(_scores_of(reference), {name: _scores_of(one) for name, one in named.items()}))

    def _derived(self, name: str, made: list[Stored], compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """What is computed from the scores of runs, and kept as long as they and the code are the same."""
        from patchlab.sweeps.kinds import SCORES
        from patchlab.sweeps.work import code_digest

        kept, sums = self.store.derived(name), [*(stored.sums[SCORES] for stored in made), code_digest()]
        try:
            known = json.loads(kept.read_text(encoding="utf-8"))
            if known["of"] == sums:
                return known["statistics"]
        except (OSError, ValueError, KeyError, TypeError):  # it is not there, or no longer what it was: it is computed again
            pass
        statistics = compute()
        try:
            kept.parent.mkdir(exist_ok=True)
            with writing(kept, overwrite=True) as temporary:
                temporary.write_text(json.dumps({"keys": [stored.key for stored in made], "of": sums, "statistics": statistics}), encoding="utf-8")
        except (OSError, OutputError):  # where nothing may be written it is computed every time
            pass
        return statistics

    def _status(self, damaged: Mapping[str, str] | None = None) -> dict[str, str]:
        """The status of each planned run, ``damaged`` where a result is."""
        damaged = self.damaged() if damaged is None else damaged
        return {key: "damaged" if key in damaged else state for key, state in self.store.status().items()}

    def _damage(self, key: str) -> str | None:
        """What is wrong with a result that the index has; the files are read once, and again where their sizes or times are others."""
        seen = _signature(self.store.folder / RUNS / key)
        if key not in self._read or self._read[key][0] != seen:
            why = None
            try:
                stored = self.store.get(key)
                for name in stored.files:
                    stored.path(name)
            except OutputError as error:
                if self.store.status()[key] not in ("done", "failed"):  # it is being replaced just now
                    return None
                why = str(error)
            self._read[key] = seen, why
        return self._read[key][1]

    def _file(self, key: str, name: str) -> Path:
        stored = self.find(key)
        if name not in stored.files:
            raise SweepError(f"the run {stored.record['label']} has no {name}; it has {', '.join(stored.files) or 'no files'}.")
        return stored.path(name)

    def __repr__(self) -> str:
        return f"Sweep({self.name}): " + ", ".join(f"{number} {name}" for name, number in self.counts().items())


def open_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Open the folder of a sweep for reading.

    Raises:
        OutputError: there is no sweep, or it is damaged or of another format.

    Example:
        >>> pl.sweeps.open("out").counts()  # doctest: +SKIP
        {'planned': 42, 'done': 42, 'failed': 0, 'pending': 0, 'running': 0}
    """
    return Sweep(path)


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files of a result."""
    try:
        found = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    except OSError:
        return ()
    return tuple(sorted((name, about.st_size, about.st_mtime_ns) for name, about in found))


def _without_value(statistic: str, why: str) -> dict[str, Any]:
    """A statistic that a run has not, and why."""
    return {"site": "", "statistic": statistic, "value": None, "lo": None, "hi": None, "why": why}


def _restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the smallest circuits as it was before JSON, which has no infinity and no NaN."""
    return {name: (math.inf if name in ("n_edges_lo", "n_edges_hi") else math.nan) if value is None else value for name, value in row.items()}


def without_source(method: str) -> str:
    """A method's name without its source.

    >>> without_source("relp+ig:5@mean")
    'relp+ig:5'
    """
    return method.partition("@")[0]


def _alike(plan: Mapping[str, Any], source: str) -> str:
    """What a run and its reference have in common."""
    spec = plan["spec"]
    scored = {name: value for name, value in spec["what"].items() if name in ("kind", "sites", "content", "points")}
    return json.dumps([spec["model"], spec["task"], spec["direction"], scored, source], sort_keys=True)


def _compared_with(plan: Mapping[str, Any]) -> str | None:
    method = plan["spec"]["what"].get("method", "")
    if plan["spec"]["what"]["kind"] not in COMPARED or without_source(method) == "exact":
        return None
    return _alike(plan, method.partition("@")[2])


def _exact(plan: Mapping[str, Any]) -> str | None:
    what = plan["spec"]["what"]
    if what["kind"] not in COMPARED or without_source(what["method"]) != "exact":
        return None
    return _alike(plan, what["method"].partition("@")[2])


def _scores_of(stored: Stored) -> "ScoreMap":
    from patchlab.scores import ScoreMap
    from patchlab.sweeps.kinds import SCORES

    return ScoreMap.load(stored.path(SCORES))


def _agreement(exact: "ScoreMap", scores: "ScoreMap") -> list[dict[str, Any]]:
    """The agreement of one map with the exact one, per site, as statistics of a run."""
    from patchlab.comparison import compare
    from patchlab.tables import json_able

    name = str(scores.provenance["method"])
    try:
        table = compare(exact, {name: scores}).table
    except PatchlabError as error:
        return [_without_value("not_compared", str(error))]
    rows: list[dict[str, Any]] = []
    for row in table[table["cells"] == "live"].to_dict("records"):
        for statistic in AGREEMENT:
            ends = {end: row.get(f"{statistic}_{end}") for end in ("lo", "hi")}
            rows.append({"site": row["site"], "statistic": statistic, **json_able({"value": row[statistic], **ends})})
    return rows


def _differences(exact: "ScoreMap", maps: "Mapping[str, ScoreMap]") -> list[dict[str, Any]]:
    """Paired differences between maps in their agreement with the exact one, per site and form of correlation."""
    from patchlab.comparison import compare
    from patchlab.comparison.compare import FORMS
    from patchlab.tables import json_able

    rows: list[dict[str, Any]] = []
    table = compare(exact, maps).differences
    for row in table[table["cells"] == "live"].to_dict("records") if len(table) else ():
        for form in FORMS:
            values = {"value": row[form], "lo": row[f"{form}_lo"], "hi": row[f"{form}_hi"]}
            rows.append({"method": row["method"], "other": row["other"], "site": row["site"], "statistic": form, **json_able(values)})
    return rows
