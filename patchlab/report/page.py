"""The page that shows a comparison: one HTML file beside ``plotly.min.js``, which needs no network."""

import json
import math
from collections.abc import Hashable, Iterable, Mapping
from html import escape
from typing import Any

import pandas as pd

from patchlab.comparison.compare import CELLS, FORMS, QUARTILES, STATISTICS, Comparison
from patchlab.comparison.job import Results
from patchlab.report.findings import findings
from patchlab.report.html import captioned, document, paragraph, table

_MOVED = {
    "denoising": "clean activations are moved into the corrupted run",
    "noising": "corrupted activations are moved into the clean run",
}
SOURCES = {
    "zero": "zeros are",
    "mean": "means over all positions and examples of the other prompts are",
    "mean_positional": "means over all examples of the other prompts, position by position, are",
}
COSTS = {
    "forwards": "forward passes",
    "backwards": "backward passes",
    "positions": "positions (rows × tokens)",
    "seconds": "seconds",
    "predicted_bytes": "memory predicted, MB",
    "cuda_peak_bytes": "most GPU memory used, MB",
}


def render(results: Results, figures: Mapping[str, str], written: Iterable[str], run: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        results: what was computed.
        figures: plotly's HTML (a ``<div>`` with its script) of ``comparison``, ``agreement``, ``heatmaps`` and, where there are
            differences between methods, ``differences``.
        written: names of the other files of the folder, linked at the end.
        run: the contents of ``run.json``.
    """
    title = f"{results.task.name} on {results.model.name}: patching methods compared"
    sections = {
        "Agreement": _agreement(results),
        **({"Differences": _differences(results.comparison, figures["differences"])} if "differences" in figures else {}),
        "Cost": _costs(results),
        "Intervals": captioned(figures["comparison"], "The table, drawn: each bar is a statistic with its 95 % interval."),
        "Cell by cell": captioned(
            figures["agreement"], "Each point is one cell of the example-mean map: the approximation against the exact effect."
        ),
        "Heatmaps": captioned(figures["heatmaps"], "Example-mean effect of patching each cell; the methods of a site share a colour scale."),
        "Provenance": _provenance(results, run),
        "Files": _files(name for name in written if name != "index.html"),
    }
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    body = [
        f"<h1>{escape(title)}</h1>",
        _introduction(results),
        *(paragraph(line) for line in findings(results.comparison, results.maps[results.job.reference])),
        "<nav>" + "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items()) + "</nav>",
        *(f'<section id="{anchors[name]}"><h2>{name}</h2>{part}</section>' for name, part in sections.items()),
    ]
    return document(title, "\n".join(body))


def _introduction(results: Results) -> str:
    job, exact, about = results.job, results.maps[results.job.reference], results.comparison.setting
    clean, corrupted = (float(exact.data[name].mean()) for name in ("metric_clean", "metric_corrupted"))
    unit = f" {about['metric_unit']}" if about["metric_unit"] else ""
    others = [name for name in results.maps if name != results.job.reference]
    source = str(exact.provenance["method_options"].get("source", "paired"))
    run = "corrupted" if job.direction == "denoising" else "clean"
    moved = _MOVED.get(job.direction, "") if source == "paired" else f"{SOURCES[source]} put into the {run} run"
    return paragraph(
        f"{len(results.task)} pairs of a clean and a corrupted prompt; {results.model.name} prefers the clean answer on "
        f"{results.accuracy['clean']:.0%} of the clean and {results.accuracy['corrupted']:.0%} of the corrupted prompts. "
        f"Direction {job.direction}: {moved}, one cell at a time, and a score is the effect of that on "
        f"{about['metric']}, whose mean is {clean:.2f}{unit} on clean and {corrupted:.2f}{unit} on corrupted prompts. "
        f"Exact patching is the reference; the approximations are {', '.join(others)}."
    )


def _agreement(results: Results) -> str:
    comparison = results.comparison
    about = comparison.setting
    parts = [
        paragraph(
            f"With 95 % bootstrap intervals over examples ({about['n_boot']} draws, the same for all methods). The Pearson correlation has three "
            "forms: of example-mean maps; per prompt, over the effects on one prompt (the mean over prompts, with their quartiles); and pooled, over "
            "the effects on all prompts at once. The other statistics are of example-mean maps. Slope is through the origin: approximation = "
            "slope · exact. Sign agreement counts cells whose exact effect exceeds 1 % of the gap. Top-k recall asks how many of the k largest exact "
            "effects are among the k largest of the approximation."
        )
    ]
    for cells, what in CELLS.items():
        shown = _statistics(comparison.table.query("cells == @cells"))
        rows = comparison.reliability.query("cells == @cells")
        reliability = ", ".join(f"{site} {_number(value)}" for site, value in zip(rows["site"], rows["reliability"], strict=True))
        body = shown + paragraph(f"Split-half reliability of the exact map (Spearman–Brown): {reliability}.", "muted")
        title = f"Over {escape(what)}"
        parts.append(f"<h3>{title}</h3>{body}" if cells == "live" else f"<details><summary>{title}</summary>{body}</details>")
    return "".join(parts + [paragraph(f"Note: {note}") for note in comparison.notes])


def _statistics(agreement: pd.DataFrame) -> str:
    rows = []
    for site, group in agreement.groupby("site", sort=False):
        for row in group.to_dict("records"):
            values = {name: _with_interval(*(row[f"{name}{end}"] for end in ("", "_lo", "_hi"))) for name in STATISTICS}
            values["pearson_per_prompt"] += _prompts(row)
            rows.append([escape(str(site)), escape(str(row["method"])), *values.values(), str(row["k"]), str(row["n_cells"])])
    return table(["site", "method", *STATISTICS.values(), "k", "cells"], rows, text_columns=2)


def _prompts(row: Mapping[Hashable, Any]) -> str:
    """The quartiles over prompts, and how many prompts have no correlation."""
    quartiles = [row[name] for name in QUARTILES]
    words = [] if math.isnan(quartiles[0]) else [f"quartiles {' '.join(map(_number, quartiles))}"]
    words += [f"{row['pearson_per_prompt_undefined']} undefined"] if row["pearson_per_prompt_undefined"] else []
    return "".join(f'<span class="ci">{word}</span>' for word in words)


def _differences(comparison: Comparison, figure: str) -> str:
    text = (
        "How much better one method agrees than another, as a difference of correlations with the interval of the difference itself: both "
        "methods see the same draws, so it can exclude 0 where their own intervals overlap. Intervals are of one pair each; among many, some "
        "exclude 0 by chance."
    )
    parts = [paragraph(text), captioned(figure, "The differences, drawn: right of the line the first method of the pair agrees better.")]
    for cells, what in CELLS.items():
        rows = []
        for site, group in comparison.differences.query("cells == @cells").groupby("site", sort=False):
            for row in group.to_dict("records"):
                values = (_with_interval(*(row[f"{name}{end}"] for end in ("", "_lo", "_hi")), signed=True) for name in FORMS)
                pair = f"{row['method']} − {row['other']}"
                rows.append([escape(str(site)), escape(pair), *values, str(row["pearson_per_prompt_undefined"])])
        shown = table(["site", "difference", *FORMS.values(), "undefined prompts"], rows, text_columns=2)
        parts.append(f"<details{' open' if cells == 'live' else ''}><summary>Over {escape(what)}</summary>{shown}</details>")
    return "".join(parts)


def _costs(results: Results) -> str:
    costs = results.comparison.costs.dropna(axis="columns", how="all")
    shown = [name for name in COSTS if name in costs.columns]
    rows = []
    for row in costs.to_dict("records"):
        values = [_number(row[name], 2) if name == "seconds" else _count(row[name], name) for name in shown]
        rows.append([escape(str(row["method"])), *values])
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in results.comparison.cost_sentences())
    return f"<ul>{sentences}</ul>" + table(["method", *(COSTS[name] for name in shown)], rows) + _verified_recall(results)


def _verified_recall(results: Results) -> str:
    if results.comparison.verified_recall.empty:
        return ""
    rows = [
        [escape(str(row["site"])), escape(str(row["method"])), str(row["k"]), str(row["n_cells"])]
        + [f"{row[f'cells_{recall}']} ({row[f'share_{recall}']:.0%})" for recall in (95, 100)]
        for _, group in results.comparison.verified_recall.groupby("site", sort=False)
        for row in group.to_dict("records")
    ]
    text = (
        "What it costs to verify the k largest exact effects with a method as the screen: how many of the live cells must be patched "
        "exactly, in the order of |score|, to have 95 % and all of them."
    )
    return paragraph(text) + table(["site", "method", "k", "live cells", "95 % found in", "all found in"], rows, text_columns=2)


def _provenance(results: Results, run: Mapping[str, Any]) -> str:
    exact = results.maps[results.job.reference].provenance
    facts = {
        "command": run["command"],
        "model": f"{results.model.name} (fingerprint {exact.get('model_fingerprint', '?')})",
        "task": f"{results.task!r} (fingerprint {exact.get('task_fingerprint', '?')})",
        "device, dtype": f"{exact.get('device', '?')}, {exact.get('dtype', '?')}",
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "seconds": ", ".join(f"{step} {seconds:.1f}" for step, seconds in run["seconds"].items()),
        "finished": run["finished"],
    }
    for name, scores in results.maps.items():
        if notes := scores.provenance.get("notes"):
            facts[f"note, {name}"] = "; ".join(map(str, notes))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    records = {name: scores.provenance for name, scores in results.maps.items()}
    full = escape(json.dumps(records, indent=2, ensure_ascii=False))
    return f"<dl>{listed}</dl><details><summary>Everything, per method</summary><pre>{full}</pre></details>"


def _files(names: Iterable[str]) -> str:
    return "<ul>" + "".join(f'<li><a href="{escape(name)}">{escape(name)}</a></li>' for name in sorted(names)) + "</ul>"


def _with_interval(value: float | int, low: float | int, high: float | int, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    interval = "" if math.isnan(low) else f'<span class="ci">{_number(low, sign=sign)} to {_number(high, sign=sign)}</span>'
    return _number(value, sign=sign) + interval


def _count(value: float | int | None, name: str) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value / 1e6:,.0f}" if name.endswith("_bytes") else f"{value:,.0f}"


def _number(value: float | int, digits: int = 2, *, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.{digits}f}".replace("-", "−")
