"""The page of a sweep, from top to bottom: what ran, agreement with exact patching, ranks, cost, circuits, verified cells, and every run."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from patchlab.feature_comparison import NODES
from patchlab.plots._ranking import SiteRanking, rank_methods
from patchlab.report.html import FIT, document, listed, paragraph
from patchlab.report.sortable import Cell, Column, missing, number, sortable, text
from patchlab.report.sweep_findings import COSTS, RANKING, Findings, figure_of
from patchlab.sweeps.results import without_source

AGREEMENT = {
    "pearson_per_prompt": ("r per prompt", "Pearson correlation with the exact effects on one prompt, mean over prompts, with its 95 % interval"),
    "pearson": ("r of means", "Pearson correlation of the example-mean maps, with its 95 % interval"),
    "topk_recall": ("top-k recall", "share of the largest tenth of the exact effects that is among the largest tenth of the method's"),
}
PASSES = {"forwards": "forward passes of the run, its sites together", "backwards": "backward passes of the run, its sites together"}
_STABILITY = (
    "of the choice of that circuit: mean Jaccard index between resamples of the pairs that were scored, with the range of 95 % of pairs of resamples"
)
_SHOWN = 6
"""Curves that a reader sees without asking."""
_HEAD = '<meta name="generator" content="patchlab sweep report">'


def render(found: Findings, counts: Mapping[str, int]) -> str:
    """The whole page.

    Args:
        found: of :func:`patchlab.report.sweep.gather`, with the names of its figures.
        counts: of :func:`patchlab.report.sweep.sweep_counts`.
    """
    title = f"{found.name}: a sweep of {_runs(counts['planned'])}"
    sections = {
        "What ran": _ran(found, counts),
        "What failed": _failed(found),
        "What is missing": _missing_runs(found),
        "Agreement": _agreement(found),
        "Ranking": _ranking(found),
        "Cost": _costs(found),
        "Circuits": _circuits(found),
        "Features": _features(found),
        "Verified": _verified(found),
        "Runs": _all_runs(found),
    }
    sections = {name: part for name, part in sections.items() if part}
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    body = [
        f"<h1>{escape(title)}</h1>",
        paragraph(_headline(found, counts)),
        "<nav>" + "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items()) + "</nav>",
        *(f'<section id="{anchors[name]}"><h2>{name}</h2>{part}</section>' for name, part in sections.items()),
    ]
    code, style = (files("patchlab.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "sweep.css"))
    return document(title, "\n".join(body), plotly=False, head=f"{_HEAD}<style>\n{style}</style>", script=FIT + code)


def _runs(count: int) -> str:
    return f"{count:,} run{'' if count == 1 else 's'}"


def _headline(found: Findings, counts: Mapping[str, int]) -> str:
    words = ", ".join(f"{count:,} {name}" for name, count in counts.items() if name != "planned" and count)
    total, *passes = (sum((found.value(key, name) or 0.0 for key in found.done), 0.0) for name in ("seconds", *PASSES))
    counted = " (of circuits, those of their scores alone)" if found.of_kind("circuit") or found.of_kind("features") else ""
    ran = f" Those that are done took {passes[0]:,.0f} forward and {passes[1]:,.0f} backward passes{counted} and {_duration(total)}."
    return f"{_runs(counts['planned'])} planned: {words}.{ran if found.done else ''}"


def _duration(seconds: float | int) -> str:
    """Seconds in words: ``41.3 s``, ``2 h 05 min``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


# what ran


def _ran(found: Findings, counts: Mapping[str, int]) -> str:
    records = [stored.record for stored in (*found.done.values(), *found.trouble.values())]
    fields = [plan["fields"] for plan in found.plans.values()]
    kinds = Counter(str(one["kind"]) for one in fields)
    facts = {
        "models": _counted(found.models.values()),
        "tasks": _counted(found.tasks.values()),
        "their options": "; ".join(dict.fromkeys(f"{found.tasks[key]}: {_options(plan)}" for key, plan in found.plans.items())),
        "seeds": _counted(str(one["seed"]) for one in fields),
        "directions": _counted(str(one["direction"]) for one in fields),
        **{f"{kind} runs": f"{count:,}: " + _counted(str(one["method"]) for one in fields if one["kind"] == kind) for kind, count in kinds.items()},
        "sites": _counted(str(one["sites"]) for one in fields),
        "versions": _counted(", ".join(f"{name} {version}" for name, version in one["versions"].items()) for one in records),
        "commits": _counted(str(one.get("commit") or "no repository") for one in records),
        "machines": _counted(_host(one) for one in records),
        "ended": _span([str(one["ended"]) for one in records]),
    }
    shown = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
    warned = {key: [*stored.record.get("warnings", ()), *stored.record.get("log", ())] for key, stored in found.done.items()}
    said = [f"{found.plans[key]['label']}: {line}" for key, lines in warned.items() for line in lines]
    notes = f"<details><summary>{len(said):,} warnings and notes of runs</summary>{listed(said)}</details>" if said else ""
    unsure = sorted({f"{found.models[key]} × {found.tasks[key]}, seed {found.plans[key]['fields']['seed']}" for key in _unsure(found)})
    doubt = paragraph(f"The model does not surely do the task (the interval of the gap contains 0): {'; '.join(unsure)}.") if unsure else ""
    return f"<dl>{shown}</dl>{doubt}{notes}"


def _options(plan: Mapping[str, Any]) -> str:
    """The metric of a run and the options of its task, in words."""
    fields, spec = plan["fields"], plan["spec"]["task"]
    more = {name: fields[name] for name in ("only_correct", "positions") if fields.get(name)}
    return ", ".join(
        f"{name} {value}" for name, value in {"metric": fields["metric"], **spec.get("options", {}), **more}.items() if value is not None
    )


def _unsure(found: Findings) -> list[str]:
    """Finished runs whose gap is not told from 0."""
    rows = (found.statistics.get((key, "", "gap")) for key in found.done)
    return [str(row["key"]) for row in rows if row is not None and row["lo"] is not None and row["lo"] <= 0 <= row["hi"]]


def _counted(names: Iterable[str]) -> str:
    """Names with how many runs have each, where there are several."""
    found = Counter(names)
    return next(iter(found), "") if len(found) < 2 else "; ".join(f"{name} ({count:,})" for name, count in found.items())


def _host(record: Mapping[str, Any]) -> str:
    host = record["host"]
    device = f", {record['device']}" if record.get("device") else ""
    return f"{host['name']} ({host['cpus']} CPUs{device}, {host['system']}, Python {host['python']})"


def _span(times: list[str]) -> str:
    return "" if not times else min(times) if len({*times}) == 1 else f"{min(times)} to {max(times)}"


def _failed(found: Findings) -> str:
    if not found.trouble:
        return ""
    errors = {key: stored.record["error"] for key, stored in found.trouble.items()}
    kinds = Counter(f"{error['type']}: {_first(error['message'])}" for error in errors.values())
    summary = listed(f"{_runs(count)}: {kind}" for kind, count in kinds.most_common()) if len(kinds) < len(errors) else ""
    parts = [
        f"<details><summary><b>{escape(found.plans[key]['label'])}</b> {escape(error['type'])}: {escape(_first(error['message']))}</summary>"
        f"<pre>{escape(error['traceback'])}</pre></details>"
        for key, error in errors.items()
    ]
    again = "They are part of no number below. <code>patchlab sweep run --retry-failed</code> does them again."
    return f"<p>{_runs(len(errors))} failed. {again}</p>{summary}<div class=failed>{''.join(parts)}</div>"


def _first(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "(no message)")


def _missing_runs(found: Findings) -> str:
    status = dict(zip(found.runs["key"], found.runs["status"], strict=True))
    parts = []
    if found.damaged:
        why = listed(f"{found.plans[key]['label']}: {reason}" for key, reason in found.damaged.items())
        parts.append(f"<p>{_runs(len(found.damaged))} with a damaged result, which is part of no number on this page.</p>{why}")
    if found.stale:
        why = listed(f"{found.plans[key]['label']}: {reason}" for key, reason in found.stale.items())
        parts.append(f"<p>{_runs(len(found.stale))} have a result that is stale and is not used.</p>{why}")
    for name, words in (("running", "under way"), ("pending", "not done yet")):
        left = [str(found.plans[key]["label"]) for key, state in status.items() if state == name]
        if left:
            parts.append(f"<details><summary>{_runs(len(left))} {words}</summary>{listed(left)}</details>")
    return "".join(parts)


# columns that all tables of runs have


def _columns(found: Findings, keys: Sequence[str]) -> dict[Column, Any]:
    """What tells runs apart: method, task and model, and of seed, direction and others what is not the same in all of them."""
    columns = {
        Column("method", choose=True): lambda key: text(found.method(key)),
        Column("task", choose=True): lambda key: text(found.tasks[key]),
        Column("model", choose=True): lambda key: text(found.models[key]),
    }
    fields = {key: found.plans[key]["fields"] for key in keys}
    for name in ("seed", "direction", "ablation", "how", "by", "level", "sizes", "random", "smallest", "dictionaries", "points"):
        if len({repr(one.get(name)) for one in fields.values()}) > 1:
            columns[Column(name, choose=True)] = lambda key, name=name: text("–" if fields[key].get(name) is None else fields[key][name])
    return columns


def _constant(found: Findings, keys: Sequence[str]) -> str:
    """What is the same in all rows of a table, in words."""
    fields = [found.plans[key]["fields"] for key in keys]
    same = [f"{name} {fields[0][name]}" for name in ("seed", "direction") if len({one.get(name) for one in fields}) == 1]
    return f" In all rows: {', '.join(same)}." if same else ""


def _passes(found: Findings, key: str) -> list[Cell]:
    counts = [number(found.value(key, name), digits=0, why="the run does not say") for name in PASSES]
    return [*counts, number(found.value(key, "seconds"), digits=2, why="the run does not say")]


_PASSES = [*(Column(name, hint, number=True) for name, hint in PASSES.items()), Column("seconds", "of the run, its sites together", number=True)]


def _statistic(found: Findings, key: str, site: str, name: str, *, digits: int = 3, why: str = "it is not defined") -> Cell:
    row = found.statistics.get((key, site, name))
    return missing(why) if row is None else number(row["value"], row["lo"], row["hi"], digits=digits, why=why)


def _button(found: Findings, key: str) -> Cell:
    name = found.figures.get(figure_of(key))
    return missing("this run has no figure") if name is None else Cell(f'<button type=button data-show="{name}">show</button>')


# agreement


def _agreement(found: Findings) -> str:
    keys = [*found.of_kind("score"), *found.of_kind("features")]
    if not keys:
        return ""
    columns = _columns(found, keys)
    heads = [*columns, Column("site", choose=True)]
    heads += [Column(name, hint, number=True) for name, hint in AGREEMENT.values()]
    heads += [*_PASSES, Column("heatmaps")]
    rows = []
    for key in keys:
        for site in found.sites(key):
            said = [_statistic(found, key, site, name, why=_why_none(found, key, site)) for name in AGREEMENT]
            rows.append([*(cell(key) for cell in columns.values()), text(site), *said, *_passes(found, key), _button(found, key)])
    words = (
        "One row per run and site: how well a method's scores agree with those of exact patching of the same model, pairs and direction, over live "
        "cells, with 95 % intervals over prompts. Click a header to sort. Passes and seconds are those of the whole run, its sites together."
    )
    return paragraph(words + _constant(found, keys)) + sortable("agreement-table", heads, rows)


def _why_none(found: Findings, key: str, site: str) -> str:
    """Why a run has no agreement at a site."""
    if without_source(found.method(key)).startswith("exact"):
        return "this is what the others are compared with"
    if (row := found.statistics.get((key, "", "not_compared"))) is not None:
        return f"not compared: {row.get('why')}"
    if key not in found.references:
        return "no exact patching of the same model, pairs, direction, sites and source is done in this sweep"
    return f"not scored: {why}" if (why := found.unscored.get((key, site))) else "it is not defined on these cells, or too few of them are live"


def _ranking(found: Findings) -> str:
    if RANKING not in found.figures:
        return ""
    ranked = rank_methods(found.agreement, found.paired)
    words = (
        "Within each setting (model, task, seed, direction) methods are ranked by their Pearson correlation per prompt with exact patching. "
        "A mean over settings counts each once, however unlike they are. Differences are paired: both methods see the same draws of prompts, so "
        "their interval can exclude 0 where those of the two methods overlap; of many such intervals, some exclude 0 by chance."
    )
    return paragraph(words) + listed(map(_leader, ranked)) + _figure(RANKING) + _pairs(found)


def _leader(site: SiteRanking) -> str:
    if not site.complete:
        return f"{site.site}: in no setting do all methods have a value."
    over = f"{site.complete} of {site.settings} settings" if site.complete < site.settings else f"{site.settings} settings"
    first = [one for one in site.methods if one.mean_rank == site.methods[0].mean_rank]
    names = " and ".join(one.method for one in first)
    said = f"{site.site}, over {over}: {names} {'has' if len(first) == 1 else 'share'} the best mean rank, {first[0].mean_rank:.2f}"
    best = ", ".join(f"{one.method} in {one.best}" for one in site.methods if one.best)
    rest = [f"is {one.method} in {one.worse} of {len(one.value)}, above it in {one.better}" for one in site.methods[1:] if len(one.value)]
    return f"{said}; best: {best}." + (f" Surely below {site.methods[0].method} {', '.join(rest)}." if rest else "")


def _pairs(found: Findings) -> str:
    """A table of all pairs of methods."""
    rows = []
    for (site, method, other), group in found.paired.groupby(["site", "method", "other"], sort=False):
        value, low, high = (group[name] for name in ("value", "lo", "hi"))
        better, worse = int((low > 0).sum()), int((high < 0).sum())
        counts = [number(count, digits=0) for count in (len(group), better, len(group) - better - worse, worse)]
        values = [number(part, digits=3) for part in (value.mean(), value.min(), value.max())]
        rows.append([text(f"{method} − {other}"), text(site), *counts, *values])
    if not rows:
        return ""
    heads = [Column("difference", choose=True), Column("site", choose=True), Column("settings", "in which both ran", number=True)]
    heads += [Column("above", "settings whose whole interval is above 0: the first method agrees better", number=True)]
    heads += [Column("open", "settings whose interval contains 0", number=True)]
    heads += [Column("below", "settings whose whole interval is below 0: the second method agrees better", number=True)]
    heads += [Column(f"{name}", f"{name} of the differences over settings", number=True) for name in ("mean", "smallest", "largest")]
    return f"<details><summary>All pairs of methods</summary>{sortable('pairs-table', heads, rows, filters=len(rows) > 8)}</details>"


def _costs(found: Findings) -> str:
    if COSTS not in found.figures:
        return ""
    words = (
        "Each point is a run: its passes, a backward pass counted as two forward ones, are those of all its sites together, and what runs of one "
        "model and task share counts in each of them. Passes of different models are not alike in time."
    )
    return paragraph(words) + _figure(COSTS)


def _figure(name: str, caption: str = "") -> str:
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{said}<div class=lazy data-figure="{name}"></div></figure>'


# circuits


def _circuits(found: Findings) -> str:
    keys = found.of_kind("circuit")
    if not keys:
        return ""
    columns = _columns(found, keys)
    stable = any(found.plans[key]["fields"].get("stability") for key in keys)
    heads = [
        *columns,
        Column("CPR", "area under the curve of faithfulness, high is good; 95 % interval over pairs", number=True),
        Column("CMD", "area between the curve and 1, low is good; 95 % interval over pairs", number=True),
        Column("random CPR", "of random circuits of the same sizes", number=True),
        Column("random CMD", "of random circuits of the same sizes", number=True),
        Column("smallest", "edges of the smallest circuit from which on all larger ones are faithful; 95 % interval over resamples", number=True),
        Column("share", "of all edges that were asked for, before pruning", number=True),
        Column("faithfulness", "of that circuit, on pairs that had no part in finding it", number=True),
        *([Column("stability", _STABILITY, number=True)] if stable else []),
        *_PASSES,
        Column("curve"),
    ]
    rows = []
    for key in keys:
        areas = [
            _statistic(found, key, "edges", name, why="no random circuits were asked for") for name in ("cpr", "cmd", "random_cpr", "random_cmd")
        ]
        looked = (key, "edges", "smallest_edges") in found.statistics
        why = f"no size reaches {_level(found, key)}" if looked else "it was not looked for, or not to be found on so few pairs: see the run's log"
        smallest = [
            _statistic(found, key, "edges", "smallest_edges", digits=0, why=why),
            _statistic(found, key, "edges", "smallest_share", digits=4, why=why),
            _statistic(found, key, "edges", "smallest_faithfulness", why=why),
        ]
        jaccard = "it was not asked for" if not found.plans[key]["fields"].get("stability") else why
        smallest += [_statistic(found, key, "edges", "smallest_jaccard", why=jaccard)] if stable else []
        rows.append([*(cell(key) for cell in columns.values()), *areas, *smallest, *_passes(found, key), _button(found, key)])
    own = any(found.plans[key]["fields"].get("sizes") is not None for key in keys)
    words = (
        "Edges are scored on one half of the pairs, and the faithfulness of the circuits that they make is measured on the other. "
        + ("Where sizes were given, CPR and CMD are over those and are not MIB's. " if own else "")
        + f"A circuit is faithful from {', '.join(sorted({_level(found, key) for key in keys}))} on. "
        "Values of different ablations are not comparable. Passes are those of the scores."
    )
    figures = [_figure(name, _caption(found, group[0])) for name, group in found.circuits.items() if name in found.figures]
    more = figures[_SHOWN:]
    hidden = f"<details><summary>{len(more)} more curves</summary><div class=curves>{''.join(more)}</div></details>" if more else ""
    curves = f"<h3>Curves</h3><div class=curves>{''.join(figures[:_SHOWN])}</div>{hidden}"
    return paragraph(words + _constant(found, keys)) + listed(_best_circuits(found)) + sortable("circuits-table", heads, rows) + curves


def _level(found: Findings, key: str) -> str:
    return f"{found.plans[key]['fields'].get('level'):g}"


def _caption(found: Findings, key: str) -> str:
    fields = found.plans[key]["fields"]
    return f"{found.models[key]} × {found.tasks[key]}, seed {fields['seed']}, {fields['direction']}, {fields['ablation']} ablation"


def _best_circuits(found: Findings) -> list[str]:
    """Per ablation which method has the lowest CMD how often, among settings in which several are done."""
    wins: dict[str, Counter[str]] = {}
    settings: Counter[str] = Counter()
    for keys in found.circuits.values():
        values = {found.method(key): value for key in keys if (value := found.value(key, "cmd", "edges")) is not None}
        if len(values) > 1:
            ablation = str(found.plans[keys[0]]["fields"]["ablation"])
            settings[ablation] += 1
            wins.setdefault(ablation, Counter()).update(name for name, value in values.items() if value == min(values.values()))
    return [
        f"{ablation} ablation, {settings[ablation]} settings with several methods: the lowest CMD has "
        + ", ".join(f"{name} in {count}" for name, count in wins[ablation].most_common())
        + " (not all of these differences are sure: see the intervals)."
        for ablation in wins
    ]


# circuits of features


def _features(found: Findings) -> str:
    keys = found.of_kind("features")
    if not keys:
        return ""
    columns = _columns(found, keys)
    names = {
        "distance": ("|1 − f|", "mean distance of faithfulness from 1 over the numbers of nodes, low is good; 95 % interval over pairs"),
        "random_distance": ("random |1 − f|", "the same of nodes at random"),
        "left": ("completeness", "mean over the numbers of nodes of the faithfulness of what is outside the circuit, low is good"),
        "random_left": ("random completeness", "the same of nodes at random"),
    }
    heads = [*columns, Column("nodes", choose=True), *(Column(name, hint, number=True) for name, hint in names.values()), *_PASSES, Column("curve")]
    rows = []
    for key in keys:
        for nodes in NODES:
            values = [_statistic(found, key, nodes, name, why="faithfulness is not defined: see the run's log") for name in names]
            rows.append([*(cell(key) for cell in columns.values()), text(nodes), *values, *_passes(found, key)])
            rows[-1].append(_button(found, key))
    words = (
        "Features and errors of dictionaries, and neurons, are scored on one half of the pairs; circuits of the most important nodes are measured on "
        f"the other: everything outside them carries what the ablation says. {'; '.join(f'{name}: {what}' for name, what in NODES.items())}. Passes "
        "are those of the scores."
    )
    figures = "".join(_figure(name, _caption(found, group[0])) for name, group in found.features.items() if name in found.figures)
    return paragraph(words + _constant(found, keys)) + sortable("features-table", heads, rows) + f"<h3>By the number of nodes</h3>{figures}"


# verified cells


def _verified(found: Findings) -> str:
    keys = found.of_kind("verify")
    if not keys:
        return ""
    columns = _columns(found, keys)
    names = {
        "found": ("found", "of the largest effects, each patched exactly", 0),
        "at_least": ("at least right", "lower bound on how many of them are among the largest of all live cells", 0),
        "recall": ("recall bound", "that bound as a share of the cells asked for", 3),
        "confidence": ("confidence", "of that bound", 3),
        "patched_cells": ("patched", "cells patched exactly", 0),
        "live_cells": ("live cells", "cells that can matter", 0),
        "share_of_sweep": ("share of a sweep", "what it took, as a share of patching every live cell", 3),
    }
    heads = [*columns, Column("sites", choose=True), *(Column(name, hint, number=True) for name, hint, _ in names.values())]
    heads += [Column("complete", choose=True), *_PASSES, Column("screen")]
    rows = []
    for key in keys:
        values = [_statistic(found, key, "", name, digits=digits, why="there is no such bound") for name, (_, _, digits) in names.items()]
        complete = {1.0: text("yes"), 0.0: text("no")}.get(found.value(key, "complete") or 0.0, missing("the run does not say"))
        rows.append([*(cell(key) for cell in columns.values()), text(",".join(found.sites(key))), *values, complete, *_passes(found, key)])
        rows[-1].append(_button(found, key))
    whole = sum(found.value(key, "complete") == 1.0 for key in keys)
    words = (
        "The cells with the largest exact effects, found by patching those that a screen puts first. "
        f"{whole} of {_runs(len(keys))} went on until their bound was reached (complete)."
    )
    return paragraph(words + _constant(found, keys)) + sortable("verified-table", heads, rows)


# every run


def _all_runs(found: Findings) -> str:
    heads = [Column("run"), Column("status", choose=True), Column("kind", choose=True), Column("gap", "metric of the clean minus that of the "
             "corrupted prompts, with its 95 % interval: where that contains 0, the model does not do the task", number=True)]  # fmt: skip
    heads += [*_PASSES, Column("key", "the beginning of the run's key: patchlab sweep show DIR KEY"), Column("figure")]
    rows = []
    for key, status in zip(found.runs["key"], found.runs["status"], strict=True):
        plan, why = found.plans[key], f"the run is {status}"
        gap = _statistic(found, key, "", "gap", digits=2, why=why)
        said = _passes(found, key) if key in found.done else [missing(why)] * 3
        figure = _button(found, key) if key in found.done else missing(why)
        rows.append([text(plan["label"]), text(status), text(plan["fields"]["kind"]), gap, *said, Cell(f"<code>{key[:10]}</code>"), figure])
    return sortable("runs-table", heads, rows)
