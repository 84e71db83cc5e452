"""Make the table of the README: where RelP is nearer to exact patching than AtP at the same cost, and where it is farther from it.

    patchlab sweep run examples/sweeps/methods.yaml --out out/methods
    python scripts/pages/readme_table.py out/methods

Every number comes from the scores of that sweep. The settings shown are those of the results page (``make_results_page.py``), the counts are of all
that the sweep patched denoising; ``make_sweeps_page.py`` shows all of them, with all methods and both directions.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compared import ROOT, Setting, settings_of, table

import patchlab as pl
from patchlab.comparison.compare import Comparison
from patchlab.sweeps import Sweep

BASE, METHOD = "atp", "relp"
SITES = ("resid_pre", "attn_out", "mlp_out", "z")
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


def rows(name: str, comparison: Comparison) -> list[list[str]]:
    """A row per form of agreement, with a cell per site."""
    live = comparison.table[comparison.table["cells"] == "live"]
    found = {(row["method"], row["site"]): row for row in live.to_dict("records")}
    against = comparison.differences[(comparison.differences["cells"] == "live") & (comparison.differences["other"] == BASE)]
    differences = {row["site"]: row for row in against[against["method"] == METHOD].to_dict("records")}
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


def settings(sweep: Sweep) -> list[Setting]:
    """The settings of node sites that the sweep patched denoising.

    Raises:
        SystemExit: unfinished runs, nothing of that kind, a setting without one of the methods, or two settings of one name.
    """
    found = [one for one in settings_of(sweep, methods=(BASE, METHOD), whole=True) if one.direction == "denoising" and set(SITES) <= set(one.sites)]
    if not found:
        raise SystemExit(f"{sweep!r} has no denoising runs of {BASE}, {METHOD} and exact; give the folder of examples/sweeps/methods.yaml.")
    names = [one.shown_as for one in found if one.shown_as]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise SystemExit(f"{repeated[0]} occurs twice; give the folder of examples/sweeps/methods.yaml.")
    return found


def written(found: Sequence[Setting]) -> str:
    """The table, with the settings that are shown and the counts over all of them, and what is said below it."""
    every = [(one.shown_as, rows(one.shown_as, one.comparison)) for one in found]
    body = [row for name, part in every if name for row in part]
    heads = ["AtP → RelP", "", *(f"`{site}`" for site in SITES)]
    halves = min(one.comparison.reliability["reliability"].min() for one in found)
    pairs = sorted({int(one.comparison.setting["n_examples"]) for one in found})
    told = (
        f"{' or '.join(map(str, pairs))} pairs each, whether the model solves them or not. The last rows count all {len(found)} settings, shown or "
        f"not. The exact maps themselves have a split-half reliability of at least {number(float(halves))}."
    )
    return table(heads, body + counts([row for _, part in every for row in part])) + "\n\n" + told


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the finished sweep examples/sweeps/methods.yaml")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file whose table is replaced")
    arguments = parser.parse_args()
    insert(arguments.readme, written(settings(pl.sweeps.open(arguments.folder))))


if __name__ == "__main__":
    main()
