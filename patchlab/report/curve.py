"""Writing what a comparison of scores by their circuits gave: table, curve, figure, and the smallest faithful circuit of each method."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from patchlab import __version__, plots
from patchlab.circuits import FaithfulnessCurve
from patchlab.errors import OutputError
from patchlab.store.folder import INDEX, JOB


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain values; None for NaN."""
    return json.loads(str(table.to_json(orient="records")))


def smallest(curve: FaithfulnessCurve, level: float | int = 0.9) -> dict[str, dict[str, Any] | None]:
    """Per method the row of its smallest circuit with at least this faithfulness, as plain values; None if no size reaches it."""
    rows = {name: curve.smallest(name, level) for name in dict.fromkeys(curve.table["method"])}
    return {name: None if row is None else records(pd.DataFrame([row]))[0] for name, row in rows.items()}


def write_curve(folder: Path, curve: FaithfulnessCurve, *, level: float | int = 0.9, say: Callable[[str], Any] = lambda _: None) -> dict[str, Any]:
    """Write everything into a fresh folder; returns what ``run.json`` holds, with the tables.

    The files: ``faithfulness.csv`` (a row per method and size), ``areas.csv``, ``curve.json`` (all of it, for :meth:`FaithfulnessCurve.load`),
    ``faithfulness.html`` and ``.png``, ``circuit.<method>.json`` and ``run.json``.

    Args:
        folder: see :func:`patchlab.report.result_folder`.
        curve: of :func:`patchlab.circuits.faithfulness_curve`.
        level: what counts as faithful.
        say: told, in a line, when there is no PNG file.

    Raises:
        OutputError: the folder cannot be written to.
    """
    try:
        curve.table.to_csv(folder / "faithfulness.csv", index=False)
        curve.areas.to_csv(folder / "areas.csv", index=False)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}); make room, or choose another folder.") from error
    curve.save(folder / "curve.json", overwrite=True)
    figure = plots.faithfulness(curve, level=level)
    plots.save(figure, folder / "faithfulness.html", overwrite=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if plots.save(figure, folder / "faithfulness.png", overwrite=True).suffix != ".png":  # then it left the HTML, which is here already
            say(f"no PNG file: {str(caught[-1].message).partition(', which needs ')[2]}")
    for name in curve.circuits:
        found = curve.smallest_circuit(name, level)
        if found is not None and found.n_edges:
            found.save(folder / f"circuit.{name.replace(':', '-').replace('+', '-')}.json", overwrite=True)
    files = sorted([*(path.name for path in folder.iterdir() if path.name != JOB), INDEX])
    run = {"patchlab": __version__, "files": files, "level": level, "smallest": smallest(curve, level), "provenance": curve.provenance}
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        json.dump(run, file, indent=2, ensure_ascii=False)
    return run | {"table": records(curve.table), "areas": records(curve.areas)}
