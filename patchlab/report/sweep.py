"""The report of a sweep: a folder with one page, and a file for each figure that the page loads when a reader asks for it."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from patchlab import __version__, plots
from patchlab.circuits import FaithfulnessCurve
from patchlab.circuits.evaluation.curve import RANDOM
from patchlab.errors import OutputError
from patchlab.report.sweep_findings import COSTS, RANKING, Findings, figure_of, gather, sweep_counts
from patchlab.report.sweep_page import render
from patchlab.scores import ScoreMap
from patchlab.store.files import writing
from patchlab.store.folder import listed, result_folder
from patchlab.store.record import checked, finish, read
from patchlab.store.runs import Stored
from patchlab.sweeps.kinds import CURVE, NODES, SCORES
from patchlab.sweeps.results import Sweep
from patchlab.sweeps.work import code_digest

PAGE, PLOTLY = "index.html", "plotly.min.js"


def write_sweep(sweep: Sweep, folder: str | Path | None = None, *, force: bool = False, say: Callable[[str], Any] = lambda _: None) -> dict[str, Any]:
    """Write the report of a sweep: ``index.html``, which needs no network, ``plotly.min.js``, and a small file per figure; returns what
    ``run.json`` holds.

    Args:
        sweep: also one that is still running: its report is of what is finished.
        folder: where; None: ``report`` in the folder of the sweep. An earlier report of this sweep there is replaced, and nothing else is.
        force: replace the files of another result there.
        say: told, in a line, what takes a while.

    Raises:
        OutputError: the folder holds something else or cannot be written to, or the sweep is damaged.
        SweepError: nothing is planned.
    """
    target = sweep.folder / "report" if folder is None else Path(folder).expanduser()
    if target.resolve() == sweep.folder.resolve():
        raise OutputError(f"{target} is the folder of the sweep itself; leave --out away (then it is {target / 'report'}), or choose another one.")
    about = {"report": "sweep", "name": sweep.name, "created": sweep.store.about["created"]}
    earlier = _earlier(target, about)
    with result_folder(target, force=force or earlier is not None) as staging:
        found = gather(sweep, say)
        made = _write_figures(sweep, found, staging, say, earlier)
        with writing(staging / PLOTLY) as temporary:
            temporary.write_text(get_plotlyjs(), encoding="utf-8")
        counts = sweep_counts(found)
        with writing(staging / PAGE) as temporary:
            temporary.write_text(render(found, counts), encoding="utf-8")
        record = {**about, "patchlab": __version__, "counts": counts, "figures": len({*found.figures.values()}), "made": made}
        return finish(staging, record, listed(staging))


@dataclass(frozen=True)
class Earlier:
    """An earlier report of the same sweep: its folder and what its ``run.json`` holds."""

    folder: Path
    record: dict[str, Any]


def _earlier(target: Path, about: Mapping[str, Any]) -> Earlier | None:
    try:
        record = read(target)
    except OutputError:  # there is none, or it is not known whose it is
        return None
    return Earlier(target, record) if all(record.get(name) == value for name, value in about.items()) else None


def _write_figures(sweep: Sweep, found: Findings, folder: Path, say: Callable[[str], Any], earlier: Earlier | None) -> dict[str, list[str]]:
    """A file per figure, and in ``found`` their names; what those of score maps were made of, so that the next report need not draw them again."""
    made: dict[str, list[str]] = {}

    def write(name: str, figure: go.Figure, runs: Sequence[str] = ()) -> None:
        with writing(folder / f"{name}.js") as temporary:
            temporary.write_text(f"patchlabFigure({json.dumps(name)}, {figure.to_json()});\n", encoding="utf-8")
        found.figures[name] = name
        for key in runs:
            found.figures[figure_of(key)] = name

    if found.agreement["value"].notna().any():
        write(RANKING, plots.ranking(found.agreement, found.paired))
        exact = [
            {"site": site, "setting": found.settings[key], "method": "exact", "passes": found.passes(key)}
            for key in found.settings
            for site in found.sites(key)
        ]
        if (found.agreement["value"].notna() & (found.agreement["passes"] > 0)).any():
            write(COSTS, plots.costs(found.agreement, pd.DataFrame(exact, columns=["site", "setting", "method", "passes"])))
    for name, keys in found.circuits.items():
        write(name, plots.faithfulness(joined({found.method(key): found.done[key] for key in keys}), sweep.smallest(*keys)), keys)
    for name, keys in found.features.items():
        write(name, plots.node_circuits(_nodes({found.method(key): found.done[key] for key in keys})), keys)
    scored = [key for key, stored in found.done.items() if SCORES in stored.files and NODES not in stored.files]
    drawn = 0
    for key in scored:
        name, reference = figure_of(key), found.references.get(key)
        reference = None if (key, "", "not_compared") in found.statistics else reference
        shown = [found.done[one] for one in (reference, key) if one is not None]
        made[name] = [code_digest(), *(one.sums[SCORES] for one in shown)]
        found.figures[name] = name
        if earlier is not None and _copied(earlier, name, made[name], folder):
            continue
        if not drawn:
            say(f"drawing the heatmaps of up to {len(scored):,} runs")
        drawn += 1
        maps = {found.method(one.key): ScoreMap.load(one.path(SCORES)) for one in shown}
        write(name, plots.heatmaps(maps if reference is not None else maps[found.method(key)]))
    return made


def _copied(earlier: Earlier, name: str, made: list[str], folder: Path) -> bool:
    """Whether a figure of an earlier report, made of the same, is there to be used again."""
    if earlier.record.get("made", {}).get(name) != made:
        return False
    try:
        shutil.copyfile(checked(earlier.folder, earlier.record, f"{name}.js", "It is drawn again."), folder / f"{name}.js")
    except OutputError:  # somebody changed or removed it
        return False
    return True


def _nodes(runs: Mapping[str, Stored]) -> pd.DataFrame:
    """The circuits of nodes of runs that differ in their method as one table, with the random ones of the first."""
    tables = [pd.read_csv(stored.path(NODES)) for stored in runs.values()]
    return pd.concat([tables[0], *(one[one["method"] != RANDOM] for one in tables[1:])], ignore_index=True)


def joined(runs: Mapping[str, Stored]) -> FaithfulnessCurve:
    """The curves of runs that differ in their method as one.

    Circuits of random edges do not depend on the method; where those of two runs differ all the same, each is named after its run.
    """
    curves = {name: FaithfulnessCurve.load(stored.path(CURVE)) for name, stored in runs.items()}
    first = next(iter(curves.values()))
    tables, areas = list[pd.DataFrame](), list[pd.DataFrame]()
    for name, curve in curves.items():
        for frames, frame in ((tables, curve.table), (areas, curve.areas)):
            if curve is first:
                frames.append(frame)
            elif _same_random(first, curve):
                frames.append(frame[frame["method"] != RANDOM])
            else:
                frames.append(frame.assign(method=frame["method"].replace(RANDOM, f"{RANDOM} ({name})")))
    return FaithfulnessCurve(pd.concat(tables, ignore_index=True), pd.concat(areas, ignore_index=True), {}, dict(first.provenance))


def _same_random(one: FaithfulnessCurve, other: FaithfulnessCurve) -> bool:
    rows = [curve.table[curve.table["method"] == RANDOM].drop(columns="method").reset_index(drop=True) for curve in (one, other)]
    return rows[0].equals(rows[1])
