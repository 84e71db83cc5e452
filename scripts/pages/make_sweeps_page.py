"""Make docs/results/sweeps.md from finished folders of the studies in examples/sweeps: what came out, whatever it says.

    patchlab sweep run examples/sweeps/relp_rules.yaml --out out/relp_rules
    python scripts/pages/make_sweeps_page.py out/relp_rules out/methods

Every number is computed here from the stored scores. A study whose folder is not given keeps the section that the page has, which says when and with
which versions it was made; one without is named as not run yet.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from compared import ROOT, Setting, over_settings, settings_of, table
from compared import with_interval as shown

import patchlab as pl
from patchlab.circuits import overlap
from patchlab.sweeps import Sweep

STUDIES = {
    "methods": "How well does each method agree with exact patching?",
    "relp_rules": "Which of RelP's rules does the work?",
    "relp_paper": "The models, task and sites of the RelP paper",
    "mib": "The models and tasks of the circuit track of MIB",
    "seeds": "How often does RelP win, over models trained with other seeds?",
}
BASE = "relp"
FORMS = {"pearson": "mean map", "pearson_per_prompt": "per prompt"}
EDGES = {"cmd": "CMD", "smallest_edges": "smallest faithful circuit, edges"}


def verdict(low: float, high: float) -> str:
    """What an interval of a paired difference says: ``win`` above 0, ``loss`` below it, ``tie`` where it has 0, and nothing where it is undefined.

    >>> verdict(0.1, 0.2), verdict(-0.2, -0.1), verdict(-0.1, 0.1)
    ('win', 'loss', 'tie')
    """
    return "" if np.isnan(low) or np.isnan(high) else "win" if low > 0 else "loss" if high < 0 else "tie"


def counted(verdicts: Sequence[str]) -> str:
    """Wins, ties and losses; settings where nothing is defined are told apart."""
    counts = " / ".join(str(verdicts.count(name)) for name in ("win", "tie", "loss"))
    return counts + (f" ({verdicts.count('')} undefined)" if "" in verdicts else "")


def differences(settings: Sequence[Setting], other: str, site: str) -> Iterator[Mapping[str, Any]]:
    """The base method minus another at a site, per setting, over live cells."""
    for setting in settings:
        rows = setting.comparison.differences
        rows = rows[(rows["cells"] == "live") & (rows["site"] == site) & (rows["method"] == BASE) & (rows["other"] == other)]
        yield from rows.to_dict("records")


def against(settings: Sequence[Setting], methods: Sequence[str], sites: Sequence[str]) -> str:
    """Wins, ties and losses of the base method, and its mean difference over settings."""
    rows = []
    for site in sites:
        for other in methods:
            found = list(differences(settings, other, site))
            cells = []
            for form in FORMS:
                mean = over_settings([row[form] for row in found if not np.isnan(row[form])]) if found else (np.nan,) * 3
                cells += [counted([verdict(row[f"{form}_lo"], row[f"{form}_hi"]) for row in found]), shown(*mean, signed=True)]
            rows.append([f"`{site}`", f"`{other}`", *cells])
    heads = [part for words in FORMS.values() for part in (f"{words}: wins / ties / losses", f"{words}: `{BASE}` − other")]
    return table(["site", "against", *heads], rows)


def means(settings: Sequence[Setting], methods: Sequence[str], sites: Sequence[str]) -> str:
    """The mean agreement of each method over settings."""
    rows = []
    for name in methods:
        cells = []
        for site in sites:
            for form in FORMS:
                values = [value for one in settings for value in _live(one, site, name)[form] if not np.isnan(value)]
                cells.append(f"{np.mean(values):.2f}".replace("-", "−") if values else "–")
        rows.append([f"`{name}`", *cells])
    return table(["method", *(f"`{site}` {words}" for site in sites for words in FORMS.values())], rows)


def everything(settings: Sequence[Setting], methods: Sequence[str]) -> str:
    """The agreement of each method in each setting, with intervals over prompts."""
    parts = []
    for setting in settings:
        rows, sites = [], setting.sites
        for name in methods:
            found = [_live(setting, site, name).to_dict("records") for site in sites]
            cells = [shown(*(one[0][f"{form}{end}"] for end in ("", "_lo", "_hi"))) if one else "–" for one in found for form in FORMS]
            rows.append([f"`{name}`", *cells])
        head = ["method", *(f"`{site}` {words}" for site in sites for words in FORMS.values())]
        parts.append(f"**{setting.model}, {setting.label}, {setting.direction}**\n\n{table(head, rows)}\n")
    return "\n".join(parts)


def _live(setting: Setting, site: str, method: str) -> pd.DataFrame:
    rows = setting.comparison.table
    return rows[(rows["cells"] == "live") & (rows["site"] == site) & (rows["method"] == method)]


def edges(sweep: Sweep) -> str:
    """Circuits: the base method against the others, paired over models."""
    runs = sweep.runs()
    chosen = runs[(runs["kind"] == "circuit") & (runs["status"] == "done")]
    if chosen.empty:
        return ""
    found = pd.DataFrame([{**plan["fields"], **_edge_numbers(stored)} for stored, plan in sweep.done() if plan["fields"]["kind"] == "circuit"])
    methods = [name for name in dict.fromkeys(found["method"]) if name != BASE]
    rows, summary = [], []
    for statistic, words in EDGES.items():
        wide = found.pivot_table(index=["model", "task", "seed"], columns="method", values=statistic, dropna=False)
        for name in (BASE, *methods):
            values = wide[name] if name in wide else pd.Series(dtype=float)
            summary.append([words, f"`{name}`", f"{values.mean():.3g}", str(int(values.notna().sum())), str(int(values.isna().sum()))])
        for other in methods:
            for task in dict.fromkeys(found["task"]):
                if BASE not in wide or other not in wide:
                    continue
                apart = (wide[other] - wide[BASE]).xs(task, level="task").dropna()  # less is better: positive is in favour of the base
                each = apart.groupby("model").mean()
                mean, low, high = over_settings(list(each)) if len(each) else (np.nan,) * 3
                less, more = int((apart > 0).sum()), int((apart < 0).sum())
                cells = [shown(-mean, -high, -low, signed=True), verdict(low, high) or "–", f"{less} / {len(apart) - less - more} / {more}"]
                rows.append([words, task, f"`{other}`", str(len(each)), *cells])
    head = ["", "task", "against", "models", f"`{BASE}` − other", "verdict", "less / same / more, of all settings"]
    return "\n".join(
        [
            "### Edges",
            "",
            "Means over models, tasks and seeds of pairs. Less is better. A circuit that no size made faithful has no number.",
            "",
            table(["", "method", "mean", "settings", "without a number"], summary),
            "",
            f"Paired differences, averaged over the seeds of pairs of a model, with the interval of Student's t over models. `{BASE}` wins where it "
            f"lies below 0.",
            "",
            table(head, rows),
            "",
            *_stability(sweep, found),
        ]
    )


def _edge_numbers(stored: Any) -> dict[str, float]:
    found = {row["statistic"]: row["value"] for row in stored.record["statistics"]}
    return {name: np.nan if found.get(name) is None else found[name] for name in EDGES}


def _stability(sweep: Sweep, found: pd.DataFrame) -> list[str]:
    """How alike the smallest faithful circuits are that other pairs of the same task and model give."""
    runs, rows = sweep.runs().set_index("key"), []
    circuits = sweep.circuits(kind="circuit")
    for name in dict.fromkeys(found["method"]):
        alike: list[float] = []
        mine = runs.loc[[key for key in circuits if runs.loc[key, "method"] == name]]
        for _, group in mine.groupby(["model", "task"], sort=False):
            for one, other in zip(group.index[:-1], group.index[1:], strict=True):
                counts = overlap(circuits[str(one)], circuits[str(other)])
                alike.append(counts["tp"] / (counts["tp"] + counts["fp"] + counts["fn"]))
        if alike:
            rows.append([f"`{name}`", f"{np.mean(alike):.2f}", str(len(alike))])
    if not rows:
        return []
    return [
        "Stability: edges that the smallest faithful circuits of two seeds of pairs share, of those in either.",
        "",
        table(["method", "shared", "pairs"], rows),
        "",
    ]


def study(name: str, sweep: Sweep) -> str:
    """The section of a study."""
    counts, settings = sweep.counts(), settings_of(sweep)
    records = [stored.record for stored, _ in sweep.done()]
    first, took = records[0], sum(record["seconds"] for record in records) / 60
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    left = f", {counts['pending']} not done" if counts["pending"] else ""
    parts = [
        f"## {name}",
        "",
        f"{STUDIES[name]} `examples/sweeps/{name}.yaml`: {counts['done']} runs{failed}{left}, {took:.1f} minutes in all, up to "
        f"{max(record['ended'] for record in records)[:10]}; {versions}.",
        "",
    ]
    if failed:
        errors = sweep.runs().query("status == 'failed'")
        parts += [*(f"- failed: {row['label']}: {row['error'].splitlines()[0]}" for row in errors.to_dict("records")), ""]
    if settings:
        sites = list(dict.fromkeys(site for one in settings for site in one.sites))
        methods = [name for name in dict.fromkeys(sweep.runs().query("kind == 'score'")["method"]) if not name.startswith("exact")]
        number = len({one.model for one in settings})
        parts += [
            "### Agreement",
            "",
            f"{len(settings)} settings (model × task × seed × direction) of {number} model{'s' if number > 1 else ''}.",
            "",
            f"`{BASE}` against the others:",
            "",
            against(settings, [name for name in methods if name != BASE], sites),
            "",
            "Mean agreement over settings:",
            "",
            means(settings, methods, sites),
            "",
        ]
        parts += ["#### Every setting", "", everything(settings, methods)]
    return "\n".join([*parts, edges(sweep)]).rstrip() + "\n"


INTRODUCTION = f"""# Studies: what came out

Made by `python scripts/pages/make_sweeps_page.py` from folders of finished sweeps; do not edit. The studies are the files in `examples/sweeps/`, and
`patchlab sweep run` repeats them.

- Agreement is the Pearson correlation with exact patching over **live** cells: of the **mean map** (over prompts), and **per prompt** (the mean over
  prompts of the correlation within each). Brackets hold 95 % intervals over prompts.
- **A win** of `{BASE}` is a setting where the paired 95 % interval of its agreement minus the other's, over the same resamples of the prompts, lies
  above 0; a loss, below 0; a tie holds 0. Intervals are not corrected for their number: where methods are equal, about 5 of 100 are no ties.
- Means of differences have the interval of Student's t over settings. Settings of one model are alike, so it is narrower than one for other models
  would be: what is said holds for these models and tasks.
"""


def page(folders: Sequence[Path], before: str = "") -> str:
    """The whole page; ``before`` is the one that is there.

    Raises:
        SystemExit: a folder of another sweep, of one study twice, or without a finished run.
    """
    found: dict[str, Sweep] = {}
    for folder in folders:
        sweep = pl.sweeps.open(folder)
        if sweep.name not in STUDIES or sweep.name in found or not sweep.counts()["done"]:
            raise SystemExit(f"{folder} is {sweep!r}; give one folder with finished runs for each of: {', '.join(STUDIES)}.")
        found[sweep.name] = sweep
    sections = {**_sections(before), **{name: study(name, sweep) for name, sweep in found.items()}}
    parts = [INTRODUCTION, *(sections[name] for name in STUDIES if name in sections)]
    if missing := [f"- **{name}**: {about} `examples/sweeps/{name}.yaml`" for name, about in STUDIES.items() if name not in sections]:
        parts.append("\n".join(["## Not run yet", "", *missing]) + "\n")
    return "\n".join(parts)


def _sections(page: str) -> dict[str, str]:
    """The sections of studies of a page, by name."""
    parts = page.split("\n## ")[1:]
    return {name: f"## {part.rstrip()}\n" for part in parts if (name := part.partition("\n")[0]) in STUDIES}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of finished studies")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "sweeps.md")
    arguments = parser.parse_args()
    text = page(arguments.folders, arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else "")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
