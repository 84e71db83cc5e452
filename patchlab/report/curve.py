"""Files of a comparison of scores by their circuits: table, curve, figure, and the smallest faithful circuit of each method."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from patchlab import __version__, plots
from patchlab.circuits import FaithfulnessCurve, Sets, SmallestFaithful, write
from patchlab.circuits.evaluation.ablations import still_falling
from patchlab.circuits.evaluation.curve import areas_note, areas_text
from patchlab.stats.jaccard import sentence
from patchlab.store.files import writing
from patchlab.store.folder import listed
from patchlab.store.record import finish
from patchlab.tables import records


def smallest(curve: FaithfulnessCurve, level: float | int = 0.9) -> dict[str, dict[str, Any] | None]:
    """Per method the row of its smallest circuit with at least this faithfulness, as plain values; None if no size reaches it."""
    rows = {name: curve.smallest(name, level) for name in dict.fromkeys(curve.table["method"])}
    return {name: None if row is None else records(pd.DataFrame([row]))[0] for name, row in rows.items()}


def summary(curve: FaithfulnessCurve, found: SmallestFaithful) -> str:
    """A few lines per method: the areas with their intervals, from which size on it is faithful, and how stable that circuit is, where measured."""
    about, sets = curve.provenance, found.table.iloc[0]
    lines = [
        f"FaithfulnessCurve({about['model']} × {about['task']}, {about['metric']}, {about['ablation']} ablation)",
        f"  pairs: {sets['choosing_pairs']} for choosing, {sets['finding_pairs']} for finding the size (of {sets['n_sizes']}, a tenth apart), "
        f"{sets['reporting_pairs']} for reporting; CPR and CMD on the last two together",
    ]
    for row in curve.areas.to_dict("records"):
        name = row["method"]
        words = [] if name not in found.curve.areas["method"].to_numpy() else [found.sentence(name)]
        words = [areas_text(row), *words]
        if (circuit := found.circuits.get(name)) is not None and "stability" in circuit.provenance:
            words.append(sentence(circuit.provenance["stability"]))
        lines.append(f"  {name}: " + f"\n  {' ' * len(name)}  ".join(words))
    return "\n".join([*lines, f"  {areas_note(curve)}", *still_falling(about)])


def write_curve(
    folder: Path,
    curve: FaithfulnessCurve,
    found: SmallestFaithful | None = None,
    sets: Sets | None = None,
    *,
    level: float | int = 0.9,
    say: Callable[[str], Any] = lambda _: None,
) -> dict[str, Any]:
    """Write everything into a fresh folder; returns what ``run.json`` holds, with the tables.

    The files: ``faithfulness.csv`` (a row per method and size), ``areas.csv``, ``curve.json`` (all of it, for :meth:`FaithfulnessCurve.load`),
    ``faithfulness.html`` and ``.png``, ``circuit.<method>.json`` and ``run.json``; where stability was measured ``stability.html``; with ``found``
    also ``smallest.csv`` (a row per method) and ``sizes.csv`` and ``sizes.json`` (the measurements that the sizes were found from).

    Args:
        folder: see :func:`patchlab.store.result_folder`.
        curve: of :func:`patchlab.circuits.faithfulness_curve`.
        found: of :func:`patchlab.circuits.smallest_faithful`; without, the smallest circuits are those among the sizes of the curve.
        sets: the pairs that each step had, for ``run.json``.
        level: what counts as faithful, without ``found``.
        say: told, in a line, when there is no PNG file.

    Raises:
        OutputError: the folder cannot be written to.
    """
    level = level if found is None else found.level
    tables = {"faithfulness": curve.table, "areas": curve.areas}
    if found is not None:
        tables |= {"smallest": found.table, "sizes": found.curve.table}
    for name, table in tables.items():
        with writing(folder / f"{name}.csv", overwrite=True) as temporary:
            table.to_csv(temporary, index=False)
    curve.save(folder / "curve.json", overwrite=True)
    if found is not None:
        found.curve.save(folder / "sizes.json", overwrite=True)
    figure = plots.faithfulness(curve, found, level=level)
    plots.save(figure, folder / "faithfulness.html", overwrite=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if plots.save(figure, folder / "faithfulness.png", overwrite=True).suffix != ".png":  # then it left the HTML, which is here already
            say(f"no PNG file: {str(caught[-1].message).partition(', which needs ')[2]}")
    if "jaccard" in curve.table:
        plots.save(plots.stability(curve), folder / "stability.html", overwrite=True)
    chosen = {name: curve.smallest_circuit(name, level) for name in curve.circuits} if found is None else found.circuits
    for name, circuit in chosen.items():
        if circuit is not None and circuit.nodes:
            write(circuit, folder / f"circuit.{name.replace(':', '-').replace('+', '-')}.json", overwrite=True)
    rows = [] if found is None else records(found.table)
    best = {row["method"]: None if row["n_edges"] is None else row for row in rows} or smallest(curve, level)
    run = {"patchlab": __version__, "level": level, "smallest": best, "provenance": curve.provenance}
    if sets is not None:
        run["sets"] = sets.as_dict()
    run = finish(folder, run, listed(folder))
    more = {} if found is None else {"sizes": records(found.curve.table)}
    return run | {"table": records(curve.table), "areas": records(curve.areas)} | more
