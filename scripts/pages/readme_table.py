"""Make the table of the README: where RelP is nearer to exact patching than AtP at the same cost, and where it is farther from it.

Run it in the repository: ``python scripts/pages/readme_table.py`` (about a minute on two cores). The settings are those of the results page, which
has all methods (``make_results_page.py``).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from make_results_page import BASE, MODELS, ROOT, RUNS, TASKS, measure, table

import patchlab as pl
from patchlab.comparison.compare import Comparison

METHOD, SITES = "relp", RUNS["nodes"][0]
FORMS = {"pearson_per_prompt": "per prompt", "pearson": "of means"}
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def number(value: float, *, signed: bool = False) -> str:
    """Two digits, without the zero before the point: ``.89``, ``+.06``."""
    return f"{value:{'+' if signed else ''}.2f}".replace("-", "−").replace("0.", ".", 1 if abs(value) < 0.995 else 0)


def cell(base: Mapping[Any, Any], row: Mapping[Any, Any], difference: Mapping[Any, Any], form: str) -> str:
    """Both correlations and the interval of their difference, marked where it excludes 0: ``.89 → .95 [+.02, +.10] ▲``."""
    low, high = difference[f"{form}_lo"], difference[f"{form}_hi"]
    mark = " ▲" if low > 0 else " ▼" if high < 0 else ""
    return f"{number(base[form])} → {number(row[form])} [{number(low, signed=True)}, {number(high, signed=True)}]{mark}"


def rows(model: str, task: str, comparison: Comparison) -> list[list[str]]:
    """A row per form of agreement, with a cell per site."""
    live = comparison.table[comparison.table["cells"] == "live"]
    found = {(row["method"], row["site"]): row for row in live.to_dict("records")}
    against = comparison.differences[(comparison.differences["cells"] == "live") & (comparison.differences["other"] == BASE)]
    differences = {row["site"]: row for row in against[against["method"] == METHOD].to_dict("records")}
    name = " ".join([model, task, *TASKS[task].values()])
    return [
        [name if i == 0 else "", words, *(cell(found[BASE, site], found[METHOD, site], differences[site], form) for site in SITES)]
        for i, (form, words) in enumerate(FORMS.items())
    ]


def counts(body: list[list[str]]) -> list[list[str]]:
    """In how many settings each site is surely better and worse, a row per form."""
    found = []
    for i, words in enumerate(FORMS.values()):
        columns = zip(*(row[2:] for row in body[i :: len(FORMS)]), strict=True)
        cells = [f"**{sum('▲' in one for one in column)} ▲, {sum('▼' in one for one in column)} ▼**" for column in columns]
        found.append([f"all {len(body) // len(FORMS)}" if i == 0 else "", words, *cells])
    return found


def insert(readme: Path, text: str) -> None:
    """Put the text between the markers of the README."""
    whole = readme.read_text(encoding="utf-8")
    head, begin, rest = whole.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme} has no lines {BEGIN} and {END}; put them where the table shall be.")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file whose table is replaced")
    arguments = parser.parse_args()
    body: list[list[str]] = []
    halves: list[float] = []
    for name in MODELS:
        model = pl.load_model(name)
        for task in TASKS:
            print(f"{name}, {task}", flush=True)
            comparison = measure(model, task, "nodes", arguments.n, arguments.seed, (BASE, METHOD))
            body += rows(name, task, comparison)
            halves += comparison.reliability["reliability"].tolist()
    told = (
        f"{arguments.n} pairs each that the model solves. The exact maps themselves have a split-half reliability of at least {number(min(halves))}."
    )
    insert(arguments.readme, table(["AtP → RelP", "", *(f"`{site}`" for site in SITES)], body + counts(body)) + "\n\n" + told)


if __name__ == "__main__":
    main()
