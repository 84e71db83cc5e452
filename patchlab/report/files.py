"""Files of a job in its folder: score maps, tables, plots, the page, and ``run.json`` that lists them."""

import json
import shlex
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from patchlab import __version__, plots
from patchlab.comparison.job import Job, Results, scores_file
from patchlab.report.html import inline
from patchlab.report.page import render
from patchlab.store.files import writing
from patchlab.store.folder import listed
from patchlab.store.record import finish


def write(folder: Path, results: Results, *, images: bool = True, say: Callable[[str], Any] = lambda _: None) -> dict[str, Any]:
    """Write everything into a folder that may hold the scores already; returns what ``run.json`` holds, with the comparison.

    Pictures come last, each with a time limit: what keeps a browser from drawing keeps nobody from the results.

    Args:
        folder: see :func:`patchlab.store.result_folder`.
        results: of :func:`patchlab.comparison.job.run`.
        images: make PNG files too, which takes seconds each.
        say: told, in a line, when no PNG files could be made.

    Raises:
        OutputError: the folder cannot be written to.
    """
    for name, scores in results.maps.items():
        if not (folder / scores_file(name)).exists():
            scores.save(folder / scores_file(name))
    results.comparison.to_csv(folder / "comparison.csv", overwrite=True)
    if len(results.comparison.differences):
        results.comparison.to_csv(folder / "differences.csv", what="differences", overwrite=True)
    results.comparison.to_json(folder / "comparison.json", overwrite=True)
    methods = {name: scores for name, scores in results.maps.items() if name != results.job.reference}
    figures = {
        "comparison": plots.comparison(results.comparison),
        "agreement": plots.agreement(results.maps[results.job.reference], methods),
        "heatmaps": plots.heatmaps(results.maps),
    }
    if len(results.comparison.differences):
        figures["differences"] = plots.differences(results.comparison)
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.html", include_plotlyjs="directory", overwrite=True)
    if images and (reason := write_images(figures, folder)):
        say(f"no PNG files: {reason}")
    run = _record(results, listed(folder, "index.html"))
    drawn = {name: inline(name, figure) for name, figure in figures.items()}
    with writing(folder / "index.html", overwrite=True) as temporary:
        temporary.write_text(render(results, drawn, run["files"], run), encoding="utf-8")
    run = finish(folder, run, run["files"])
    return run | {"comparison": results.comparison.to_dict()}


def write_images(figures: dict[str, go.Figure], folder: Path) -> str:
    """PNG files where kaleido and a browser are there; otherwise none, and the reason."""
    for name, figure in figures.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                written = plots.save(figure, folder / f"{name}.png", include_plotlyjs="directory", overwrite=True)
            except KeyboardInterrupt:  # of what is left only the pictures are long
                return "interrupted; all else is written"
        if written.suffix != ".png":  # save() leaves the HTML, which is here already
            return str(caught[-1].message).partition(", which needs ")[2]
    return ""


def _record(results: Results, files: list[str]) -> dict[str, Any]:
    provenance = results.maps[results.job.reference].provenance
    return {
        "patchlab": __version__,
        "command": command(results.job),
        "job": results.job.as_dict(),
        "model": {"name": results.model.name, "fingerprint": results.model.fingerprint},
        "task": {"name": results.task.name, "pairs": len(results.task), "fingerprint": results.task.fingerprint, **results.task.provenance},
        "accuracy": results.accuracy,
        "versions": provenance.get("versions", {}),
        "seconds": results.seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }


def command(job: Job) -> str:
    """The command line that repeats a job (less ``--out``)."""
    options = {"model": job.model, "task": job.task, "methods": ",".join(job.methods), "sites": ",".join(job.sites), "direction": job.direction}
    options |= {"n": job.n, "seed": job.seed, "device": job.device, "dtype": job.dtype, "batch-size": job.batch_size}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for key, value in job.options.items() for word in ("--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}")]
    return shlex.join(["patchlab", "compare", *words])
