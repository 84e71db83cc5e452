"""The page of a study: where a behaviour lives, told from top to bottom to somebody who does not know the library, and ``study.json``."""

import json
from collections.abc import Callable, Hashable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from patchlab import __version__, plots
from patchlab.circuits import FaithfulnessCurve, SmallestFaithful, read
from patchlab.circuits.sparse import with_edges
from patchlab.errors import OutputError
from patchlab.report.html import captioned, document, inline, listed, paragraph, table
from patchlab.store.files import write_json, writing
from patchlab.sweeps.kinds import CIRCUIT, SIZES, SMALLEST
from patchlab.sweeps.study import ESTIMATES, FOUND, HEADS, NOT_FOUND, SHARE, Study
from patchlab.tables import json_able, records

PAGE, RECORD = "index.html", "study.json"
_MOST_EDGES = 60


def write_study(study: Study, folder: Path, *, say: Callable[[str], Any] = lambda _: None) -> dict[str, Any]:
    """Write the page, ``plotly.min.js`` and ``study.json`` into a folder, instead of those of an earlier study there; returns what the JSON holds.

    Raises:
        OutputError: the folder cannot be written to.
    """
    record = as_dict(study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plotly.min.js").write_text(plotly_source(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out.") from error
    with writing(folder / PAGE, overwrite=True) as temporary:
        temporary.write_text(_page(study), encoding="utf-8")
    write_json(folder / RECORD, record, overwrite=True)
    say(f"done: open {(folder / PAGE).resolve()}")
    return record


def plotly_source() -> str:
    """Plotly's JavaScript, which comes with its package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def as_dict(study: Study) -> dict[str, Any]:
    """A study as plain JSON values."""
    smallest = _smallest(study)
    return {
        "patchlab": __version__,
        "verdict": study.verdict,
        "answer": answer(study),
        "model": {"name": study.model.name, "fingerprint": study.model.fingerprint},
        "task": {"name": study.task.name, "fingerprint": study.task.fingerprint, "pairs": len(study.task), **study.task.provenance},
        "halves": {"choosing": list(study.choosing.pair_fingerprints), "measuring": list(study.measuring.pair_fingerprints)},
        "solved": json_able(study.solved),
        "heads": records(study.heads) if len(study.heads) else [],
        "together": json_able(study.together),
        "circuits": smallest,
        "methods": records(study.methods) if len(study.methods) else [],
        "decisions": [json_able(vars(one)) for one in study.decisions],
        "runs": study.keys,
        "notes": list(study.notes),
    }


def answer(study: Study) -> list[str]:
    """The result in sentences, the first one the shortest."""
    name, task = study.model.name, study.task.name
    if study.verdict == NOT_FOUND:
        return [f"Not found: {name} does not do {task}, so there is nothing to locate.", *study.notes[:1]]
    solved, both, lines = study.solved, study.together, []
    if study.verdict == FOUND:
        n = len(study.found)
        heads, they = ("one attention head carries", "it restores") if n == 1 else (f"{n} attention heads carry", "they restore together")
        lines.append(
            f"Found: {heads} {task} in {name}: {_listed(study.found)}. Put back into the corrupted run, {they} {_percent(both['share'])} of the "
            f"difference between the prompts (95 % interval {_percent(both['share_lo'])} to {_percent(both['share_hi'])})."
        )
    else:
        lines.append(
            f"Spread out: {name} does {task}, but no single attention head among the {len(study.heads)} with the largest effects restores "
            f"{_percent(SHARE)} of the difference between the prompts for certain."
        )
    if study.opposing:
        lines.append(f"Working against it: {_listed(study.opposing)}.")
    lines.append(
        f"{name} prefers the correct answer on {_percent(solved['accuracy'])} of the clean prompts; the metric ({study.task.metric.name}) is "
        f"{_number(solved['metric_clean'])} on clean and {_number(solved['metric_corrupted'])} on corrupted prompts."
    )
    lines += [_of_smallest(method, row) for method, row in _smallest(study).items()]
    return lines


def _of_smallest(method: str, row: Mapping[str, Any]) -> str:
    if "n_edges" not in row:
        return f"How small a faithful circuit of edges chosen by {method} can be is not known: there are too few pairs to tell. More pairs (--n) "
        "help."
    if row["n_edges"] is None:
        return f"No circuit of edges chosen by {method} reaches 90 % of the behaviour and keeps it as it grows."
    return (
        f"A circuit of {row['n_edges']:,.0f} of {row['of']:,} edges, chosen by {method}, is enough for 90 % of the behaviour; on pairs that had no "
        f"part "
        f"in choosing it, its faithfulness is {_number(row['faithfulness'])}{_bracket(row.get('lo'), row.get('hi'))}."
    )


def _page(study: Study) -> str:
    title = f"{study.task.name} in {study.model.name}: where does it live?"
    sections = {
        "The short answer": listed(answer(study)),
        "The question": _question(study),
        "Does the model do it?": _does_it(study),
    }
    if study.verdict != NOT_FOUND:
        sections |= {
            "Where information flows": _flows(study),
            "Which heads": _heads(study),
            **({"What the heads look at": _looks(study)} if study.patterns else {}),
            "The circuit of edges": _circuit(study),
            "What each method would have said": _methods(study),
        }
    sections |= {"How sure is this?": _sure(study)}
    nav = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, name in enumerate(sections))
    body = "".join(f'<section id="s{i}"><h2>{escape(name)}</h2>{part}</section>' for i, (name, part) in enumerate(sections.items()))
    return document(title, f"<h1>{escape(title)}</h1><nav>{nav}</nav>{body}")


def _question(study: Study) -> str:
    pair, text = study.task.pairs[0], study.task.token_text
    clean, corrupted = (_text(study, ids) for ids in (pair.clean_ids, pair.corrupted_ids))
    correct, incorrect = (" or ".join(text(token).strip() for token in ids) for ids in (pair.correct, pair.incorrect))
    asked = f"“{correct}”" + (f" and not “{incorrect}”" if incorrect else "")
    return (
        paragraph(
            f"Each of {len(study.task)} pairs has a clean prompt, on which the behaviour shows, and a corrupted one that differs in a few words. "
            f"The model is "
            f"asked for {asked} after a prompt such as the first of these:"
        )
        + f"<pre>clean      {escape(clean)}\ncorrupted  {escape(corrupted)}</pre>"
        + paragraph(
            "Patching takes one activation from the clean run and puts it into the corrupted run. If the behaviour comes back, what was moved "
            "carries it. "
            "The effect of a patch is how much the metric rises, as a share of the whole difference between the two prompts."
        )
        + paragraph(
            f"Everything is chosen on one half of the pairs ({len(study.choosing)}) and measured on the other ({len(study.measuring)}), so that "
            f"nothing looks "
            "good only because it was picked for that.",
            "muted",
        )
    )


def _does_it(study: Study) -> str:
    solved, metric = study.solved, study.task.metric
    ends = [_number(solved[name]) for name in ("metric_clean", "metric_corrupted", "gap")]
    text = (
        f"On the {len(study.measuring)} measuring pairs it prefers the correct answer on {_percent(solved['accuracy'])} of the clean prompts. The "
        f"metric "
        f"({', '.join(filter(None, (metric.name, metric.unit)))}) is {ends[0]} on clean and {ends[1]} on corrupted prompts; the difference is "
        f"{ends[2]}"
        f"{_bracket(solved['gap_lo'], solved['gap_hi'])}, with its 95 % interval."
    )
    notes = study.notes if study.verdict == NOT_FOUND else ()
    return paragraph(text) + "".join(map(paragraph, notes))


def _flows(study: Study) -> str:
    exact = study.scores("exact places")
    shown = exact if exact is not None else study.scores(f"{study.screen} places")
    if shown is None:
        return paragraph("Nothing was computed within the budget.")
    how = (
        "Measured: every layer and position was patched by itself."
        if exact is not None
        else f"Estimated with {study.screen}: patching every layer and position by itself would have taken longer than the budget."
    )
    text = (
        f"{how} The residual stream shows where the information is at each depth; attention and MLP outputs show where it is moved and made. Blue "
        "supports the behaviour, red works against it, and what cannot matter (before the first difference, or behind the last position) is marked."
    )
    return paragraph(text) + captioned(
        inline("places", plots.heatmaps(shown, normalised=True)), "Mean over the choosing half, as a share of the gap."
    )


def _heads(study: Study) -> str:
    exact = study.scores(f"exact {HEADS}")
    screened = exact if exact is not None else study.scores(f"{study.screen} {HEADS}")
    how = (
        "Every head was patched by itself on the choosing half."
        if exact is not None
        else f"Not every head could be patched within the budget; {study.screen} said where to look, and the largest were verified by patching."
    )
    text = (
        f"{how} The {len(study.heads)} with the largest effects were then patched on the measuring half; their intervals hold for all of them "
        f"together "
        f"with 95 % confidence. A head is found if its interval excludes 0, its sign is the same on both halves, and it restores at least "
        f"{_percent(SHARE)} of the difference."
    )
    rows = [
        [
            _name(row),
            str(row["layer"]),
            str(row["head"]),
            _number(row["chosen"], sign="+"),
            f'{_number(row["effect"], sign="+")}<span class="ci">{_number(row["lo"], sign="+")} to {_number(row["hi"], sign="+")}</span>',
            _percent(row["share"]),
            "found" if row["found"] else "–",
        ]
        for row in study.heads.to_dict("records")
    ]
    head = ["head", "layer", "number", "choosing half", "measuring half", "share of the gap", ""]
    parts = [paragraph(text), table(head, rows)]
    if study.together:
        parts.append(paragraph(_at_once(study)))
    if "verified" in study.keys:
        found = json.loads(study.sweep.find(study.keys["verified"]).path("verified.json").read_text(encoding="utf-8"))
        parts += [paragraph(found["recall"]["statement"]), paragraph(found["bound"]["statement"], "muted")]
    if screened is not None:
        caption = "Exact effect of every head" if exact is not None else f"{study.screen}'s estimate for every head"
        parts.append(
            captioned(inline("heads", plots.heatmaps(screened, normalised=True)), f"{caption}, mean over the choosing half, as a share of the gap.")
        )
    return "".join(parts)


def _name(row: Mapping[Hashable, Any]) -> str:
    name = escape(str(row["address"]))
    return f"<b>{name}</b>" if row["found"] else name


def _at_once(study: Study) -> str:
    both = study.together
    share = f"{_percent(both['share'])} of the difference ({_percent(both['share_lo'])} to {_percent(both['share_hi'])})"
    if both["heads"] == 1:
        return f"By itself {study.found[0]} restores {share}."
    total = study.heads.loc[study.heads["address"].isin(study.found), "share"].sum()
    return (
        f"All {both['heads']:.0f} heads that support it at once: {_number(both['effect'], sign='+')}{_bracket(both['lo'], both['hi'])}, which is "
        f"{share}. "
        f"Their single "
        f"effects add up to {_percent(total)}: heads that pass on the same information each restore it by themselves, and heads that need each other "
        "restore little alone."
    )


def _looks(study: Study) -> str:
    axis = study.measuring.position_axis()
    pair = study.measuring.pairs[0]
    tokens = [study.measuring.token_text(token) for token in pair.clean_ids]
    roles = {place: name for name, place in pair.positions.items()}
    names = [roles.get(place, "") for place in range(len(tokens))]
    end = len(tokens) - 1
    lines = []
    for address, pattern in study.patterns.items():
        best = np.argsort(-pattern[end], kind="stable")[:2]
        targets = " and ".join(f"{names[at] or _quoted(tokens[at])} ({_percent(pattern[end, at])})" for at in best.tolist())
        lines.append(f"{address}: from the last position it looks at {targets}.")
    figure = plots.patterns(study.patterns, tokens, names, title="Mean attention of the found heads on clean prompts")
    caption = f"Mean over the {len(study.measuring)} clean prompts of the measuring half; the words are those of the first of them."
    return listed(lines) + captioned(inline("patterns", figure), caption) + (paragraph(axis.note, "muted") if axis.note else "")


def _circuit(study: Study) -> str:
    rows, parts = _smallest(study), []
    if not rows:
        return paragraph("Circuits of edges would have taken longer than the budget.")
    text = (
        "An edge is what one component tells another. A score chooses edges on the choosing half; then every other edge of the model carries what "
        "it would "
        "carry on the corrupted prompt, and the circuit alone has to do the task. Faithfulness is the share of the behaviour that is left."
    )
    parts.append(paragraph(text))
    for method, row in rows.items():
        curve = study.sweep.curve(study.keys[f"circuit {method}"])
        parts.append(captioned(inline(f"curve-{method}", plots.faithfulness(curve, _smallest_of(study, method))), _of_curve(curve, method, row)))
        stored = study.sweep.find(study.keys[f"circuit {method}"])
        if CIRCUIT in stored.files:
            circuit = with_edges(read(stored.path(CIRCUIT)), "the circuit of a study")
            if circuit.n_edges <= 3000:
                shown = min(circuit.n_edges, _MOST_EDGES)
                first = "" if shown == circuit.n_edges else f", of which the {shown} with the largest scores are drawn first"
                drawn = f"The smallest faithful circuit of {method}: {circuit.n_edges:,} edges{first}."
                parts.append(captioned(inline(f"circuit-{method}", plots.circuit(circuit, shown)), drawn))
        for line in stored.record.get("log", ()):
            parts.append(paragraph(line, "muted"))
    return "".join(parts)


def _of_curve(curve: FaithfulnessCurve, method: str, row: Mapping[str, Any]) -> str:
    [area] = curve.areas[curve.areas["method"] == method].to_dict("records")
    text = f"Faithfulness by size, edges by {method}: area under the curve (CPR) {_number(area['cpr'])}{_bracket(area['cpr_lo'], area['cpr_hi'])}"
    text += f", area between it and 1 (CMD, low is good) {_number(area['cmd'])}{_bracket(area['cmd_lo'], area['cmd_hi'])}."
    if row.get("n_edges") is not None:
        low, high = row.get("n_edges_lo"), row.get("n_edges_hi")
        between = f" (95 % interval {low:,.0f} to {high:,.0f})" if low is not None and high is not None else ""
        text += f" Faithful to 90 % from {row['n_edges']:,.0f} edges on{between}."
    return text


def _methods(study: Study) -> str:
    methods = list(dict.fromkeys(study.methods["method"]))
    estimates = [method for method in ESTIMATES if method in methods or method == study.screen]
    table_of = study.methods.set_index(["address", "method"])
    rows = []
    for row in study.heads.to_dict("records"):
        cells = [str(table_of.loc[(row["address"], method), "place"]) if method in methods else "–" for method in ("exact", *estimates)]
        rows.append([_name(row), _percent(row["share"]), *cells])
    text = (
        f"The place of each head among all heads by the size of its score, on the choosing half: exact patching measures, "
        f"{_listed(estimates)} "
        "estimate from gradients in a few passes. Where an estimate puts a found head far down, a study with that method alone would have missed it."
    )
    lines = [_said(study, method) for method in methods if method != "exact"]
    return paragraph(text) + table(["head", "share of the gap", "exact", *estimates], rows) + listed(lines)


def _said(study: Study, method: str) -> str:
    rows = study.methods[(study.methods["method"] == method) & study.methods["found"]]
    n = len(rows)
    if not n:
        return f"{method}: there is no found head to look for."
    inside = int((rows["place"] <= n).sum())
    missed = rows.loc[rows["place"] > n, ["address", "place"]].to_dict("records")
    places = ", ".join(f"{one['address']} only in place {one['place']}" for one in missed)
    more = f"; it has {places}" if places else ""
    return f"{method}: {inside} of the {n} found heads are its first {n}{more}."


def _sure(study: Study) -> str:
    rows = [[escape(one.what), escape(one.how), escape(one.why)] for one in study.decisions]
    parts = [
        paragraph("What was computed exactly, what was estimated, and what was left out, with the time that was predicted for it:"),
        table(["question", "how", "why"], rows, text_columns=3) if rows else paragraph("Nothing: the model does not do the task."),
        *(paragraph(f"Note: {note}") for note in study.notes),
    ]
    facts = {
        "model": f"{study.model.name} (fingerprint {study.model.fingerprint})",
        "task": f"{study.task!r} (fingerprint {study.task.fingerprint})",
        "made by": f"patchlab {__version__}",
        "numbers": f"{RECORD} beside this page; the runs are in the folder runs",
    }
    parts.append("<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()) + "</dl>")
    return "".join(parts)


def _smallest(study: Study) -> dict[str, dict[str, Any]]:
    """Per method the smallest faithful circuit, as plain values; without sizes where none was found."""
    found: dict[str, dict[str, Any]] = {}
    total = study.model.arch.graph.n_edges
    for name, key in study.keys.items():
        kind, _, method = name.partition(" ")
        if kind == "circuit":
            stored = study.sweep.find(key)
            row = json.loads(stored.path(SMALLEST).read_text(encoding="utf-8")) if SMALLEST in stored.files else {}
            found[method] = {**row, "of": total}
    return found


def _smallest_of(study: Study, method: str) -> SmallestFaithful | None:
    """What was found about the smallest faithful circuit, to be drawn; None if there was nothing to find it on."""
    stored = study.sweep.find(study.keys[f"circuit {method}"])
    if SMALLEST not in stored.files:
        return None
    row = {name: np.nan if value is None else value for name, value in _smallest(study)[method].items()}
    sizes = FaithfulnessCurve.load(stored.path(SIZES))
    return SmallestFaithful(pd.DataFrame([row]), sizes, {}, sizes.provenance)


def _bracket(low: Any, high: Any) -> str:
    return "" if low is None or high is None or pd.isna(low) or pd.isna(high) else f" [{_number(low)}, {_number(high)}]"


def _number(value: float, *, sign: str = "") -> str:
    """A number with two digits behind the point and a minus sign that is one."""
    return f"{value:{sign}.2f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")


def _quoted(token: str) -> str:
    return f"“{token.strip()}”"


def _text(study: Study, ids: tuple[int, ...]) -> str:
    """A prompt as its tokenizer spells it."""
    tokenizer = study.task.tokenizer
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
