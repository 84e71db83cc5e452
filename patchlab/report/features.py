"""The folder of a comparison on features: tables, figures, and a page that is read from top to bottom."""

import json
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from patchlab import __version__, plots
from patchlab.comparison.job import scores_file
from patchlab.feature_comparison import MARKS, NODES, FeatureJob, FeatureResults, sentences
from patchlab.report.files import write_images
from patchlab.report.html import captioned, document, inline, listed, paragraph, table
from patchlab.store import folder as folders
from patchlab.store.files import writing
from patchlab.store.record import finish
from patchlab.tables import records

AGREEMENT = {
    "pearson_per_prompt": "r per prompt",
    "pearson": "r of means",
    "slope": "slope",
}


def write_features(folder: Path, results: FeatureResults, *, images: bool = True, say: Callable[[str], Any] = lambda _: None) -> dict[str, Any]:
    """Write everything into a folder that may hold the scores already; returns what ``run.json`` holds, with what came out.

    The files: ``comparison.csv`` and ``.json`` (agreement with exact patching of single features, as those of ``patchlab compare``), ``features.csv``
    (a row per method, kind of nodes and number of nodes), ``areas.csv``, the score maps, ``faithfulness.html``, ``agreement.html``, ``index.html``
    and ``run.json``.

    Args:
        folder: see :func:`patchlab.store.result_folder`.
        results: of :func:`patchlab.feature_comparison.run`.
        images: make PNG files too.
        say: told, in a line, when no PNG files could be made.

    Raises:
        OutputError: the folder cannot be written to.
    """
    for stem, maps in (("scores", results.maps), ("neurons", results.neurons)):
        for name, scores in maps.items():
            if not (folder / scores_file(name, stem)).exists():
                scores.save(folder / scores_file(name, stem))
    results.comparison.to_csv(folder / "comparison.csv", overwrite=True)
    results.comparison.to_json(folder / "comparison.json", overwrite=True)
    for name, frame in (("features", results.circuits), ("areas", results.areas)):
        with writing(folder / f"{name}.csv", overwrite=True) as temporary:
            frame.to_csv(temporary, index=False)
    others = {name: scores for name, scores in results.maps.items() if name != "exact"}
    figures = {"agreement": plots.agreement(results.maps["exact"], others)}
    if len(results.circuits):
        title = f"Circuits of nodes: {results.choosing.name} on {results.model.name}"
        figures = {"faithfulness": plots.node_circuits(results.circuits, title=title), **figures}
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.html", include_plotlyjs="directory", overwrite=True)
    if images and (reason := write_images(figures, folder)):
        say(f"no PNG files: {reason}")
    run = _record(results, folders.listed(folder, "index.html"))
    drawn = {name: inline(name, figure) for name, figure in figures.items()}
    with writing(folder / "index.html", overwrite=True) as temporary:
        temporary.write_text(_page(results, drawn, run), encoding="utf-8")
    run = finish(folder, run, run["files"])
    return run | {"findings": sentences(results)}


def command(job: FeatureJob) -> str:
    """The command line that repeats a job (less ``--out``)."""
    options = {"model": job.model, "task": job.task, "dictionaries": job.dictionaries, "points": ",".join(job.points) or None}
    options |= {"methods": ",".join(job.methods), "direction": job.direction, "n": job.n, "seed": job.seed, "ablation": job.ablation}
    options |= {"device": job.device, "dtype": job.dtype, "batch-size": job.batch_size}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for key, value in job.options.items() for word in ("--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}")]
    return shlex.join(["patchlab", "features", "compare", *words])


def _record(results: FeatureResults, files: list[str]) -> dict[str, Any]:
    provenance = results.maps["exact"].provenance
    task = results.choosing
    return {
        "patchlab": __version__,
        "command": command(results.job),
        "job": results.job.as_dict(),
        "model": {"name": results.model.name, "fingerprint": results.model.fingerprint},
        "dictionaries": provenance.get("added_sites", {}),
        "task": {"name": task.name, "choosing": len(task), "measuring": len(results.measuring), "fingerprint": task.fingerprint},
        "accuracy": results.accuracy,
        "versions": provenance.get("versions", {}),
        "seconds": results.seconds,
        "costs": records(results.comparison.costs),
        "differences": records(results.differences),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }


def _page(results: FeatureResults, figures: dict[str, str], run: dict[str, Any]) -> str:
    title = f"Features of {results.model.name}: methods compared on {results.choosing.name}"
    body = [f"<h1>{escape(title)}</h1>", _introduction(results), "<h2>What came out</h2>", listed(sentences(results))]
    if "faithfulness" in figures:
        what = "; ".join(f"{name}: {meaning}" for name, meaning in NODES.items())
        caption = (
            f"Circuits chosen on {len(results.choosing)} pairs, measured on {len(results.measuring)} others. Everything outside a circuit carries "
            f"its {results.job.ablation.replace('_', ' ')} over corrupted prompts. {what}."
        )
        body += ["<h2>Circuits by number of nodes</h2>", captioned(figures["faithfulness"], caption), _areas(results)]
    body += [
        "<h2>Agreement with exact patching of single features</h2>",
        _agreement(results),
        captioned(figures["agreement"], "Each point is one feature or error: its estimate against its exact effect, means over examples."),
        "<h2>Cost</h2>",
        _costs(results),
        "<h2>Provenance</h2>",
        f"<pre>{escape(run['command'])}</pre>",
        paragraph(", ".join(f"{name} {version}" for name, version in run["versions"].items()), "muted"),
        "<h2>Files</h2>",
        "<ul>" + "".join(f'<li><a href="{escape(name)}">{escape(name)}</a></li>' for name in sorted(run["files"]) if name != "index.html") + "</ul>",
    ]
    return document(title, "\n".join(body))


def _introduction(results: FeatureResults) -> str:
    moved = "corrupted values into the clean run" if results.job.direction == "noising" else "clean values into the corrupted run"
    return paragraph(
        f"Sparse dictionaries split the activations at {', '.join(results.points)} into features and what they leave out, the errors. Each method "
        f"scores every feature and error: what moving {moved} there, and nothing else, does to {results.choosing.metric.name}. Exact patching "
        f"measures it one feature at a time; the others estimate it from gradients or relevance. {MARKS} is integrated gradients one submodule at a "
        f"time, as in sparse feature circuits (Marks et al. 2024). {results.model.name} prefers the clean answer on "
        f"{results.accuracy['clean']:.0%} of the clean and {results.accuracy['corrupted']:.0%} of the corrupted prompts."
    )


def _areas(results: FeatureResults) -> str:
    rows = []
    against = results.differences.set_index(["nodes", "method"]) if len(results.differences) else pd.DataFrame()
    for row in results.areas.to_dict("records"):
        key = (row["nodes"], row["method"])
        difference = ""
        if len(against) and key in against.index:
            one = against.loc[key]
            difference = f"{one['value']:+.3f} [{one['lo']:+.3f}, {one['hi']:+.3f}]"
        cells = [escape(row["nodes"]), escape(row["method"]), f"{row['distance']:.3f} [{row['distance_lo']:.3f}, {row['distance_hi']:.3f}]"]
        rows.append([*cells, difference, f"{row['left']:.3f}"])
    text = (
        "Mean over the sizes of |1 − faithfulness| with its 95 % interval over examples, its paired difference to "
        f"{MARKS} (below 0: more faithful circuits), and the mean of completeness. Low is good in every column."
    )
    return paragraph(text) + table(["nodes", "method", "mean |1 − f|", f"difference to {MARKS}", "mean completeness"], rows, text_columns=2)


def _agreement(results: FeatureResults) -> str:
    rows = []
    for row in results.comparison.table.query("cells == 'live'").to_dict("records"):
        values = [f"{row[name]:.2f} [{row[f'{name}_lo']:.2f}, {row[f'{name}_hi']:.2f}]" for name in AGREEMENT]
        rows.append([escape(str(row["site"])), escape(str(row["method"])), *values, f"{row['n_cells']:,}"])
    rows.sort(key=lambda row: row[0])
    return table(["site", "method", *AGREEMENT.values(), "cells"], rows, text_columns=2) + listed(results.comparison.notes)


def _costs(results: FeatureResults) -> str:
    rows = [
        [escape(str(row["method"])), f"{row['forwards']:,}", f"{row['backwards']:,}", f"{row['seconds']:.1f}"]
        for row in results.comparison.costs.to_dict("records")
    ]
    return table(["method", "forward passes", "backward passes", "seconds"], rows)
