"""The overview of several comparisons on one page: what each found in words, then their tables."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import pandas as pd

from patchlab.comparison.job import Results
from patchlab.errors import OutputError
from patchlab.report.findings import FORMS, findings, with_interval
from patchlab.report.html import document, listed
from patchlab.store.files import writing

PAGE = "index.html"
_MARK = '<meta name="generator" content="patchlab overview">'


def check_overview(folder: Path, *, force: bool) -> None:
    """Check that the page of an overview may be written.

    Raises:
        OutputError: there is one and ``force`` is off, or it is not patchlab's.
    """
    page = folder / PAGE
    if not page.exists():
        return
    ours = page.is_file() and _MARK in page.read_text(encoding="utf-8", errors="replace")
    if not ours:
        raise OutputError(f"{page} is not from patchlab, and it would be replaced; choose another folder with --out.")
    if not force:
        raise OutputError(f"{folder} already holds results; choose another folder with --out, or replace earlier results with --force.")


def headline(results: Results) -> str:
    """One line on what was compared."""
    about = results.comparison.setting
    options = " ".join(map(str, results.job.options.values()))
    task = f"{results.job.task} {options}".rstrip()
    return f"{results.model.name}, {task}: {len(results.task)} pairs, {about['metric']}, gap {about['gap']:.2f} {about['metric_unit']}".rstrip()


def agreement_table(comparisons: Mapping[str, Results]) -> pd.DataFrame:
    """Correlations with exact patching with 95 % intervals, one row per comparison, site and form, one column per method."""
    rows = []
    for name, results in comparisons.items():
        live = results.comparison.table.query("cells == 'live'")
        for site, group in live.groupby("site", sort=False):
            for form, where in FORMS.items():
                values = {str(row["method"]): with_interval(row, form) for row in group.to_dict("records")}
                rows.append({"comparison": name, "site": site, "r": where.removeprefix("on the "), **values})
    return pd.DataFrame(rows)


def write_overview(folder: Path, comparisons: Mapping[str, Results]) -> None:
    """Write the page; the comparisons are in folders of their names.

    Raises:
        OutputError: the page cannot be written.
    """
    body = [f"<h1>{escape(' and '.join(dict.fromkeys(one.model.name for one in comparisons.values())))}: patching methods compared</h1>"]
    for name, results in comparisons.items():
        lines = listed(findings(results.comparison, results.maps[results.job.reference]))
        body.append(f'<section><h3><a href="{escape(name)}/index.html">{escape(headline(results))}</a></h3>{lines}</section>')
    table = agreement_table(comparisons).to_html(index=False, border=0)
    body.append(f'<h2>Pearson correlation with exact patching, live cells, 95 % intervals</h2><div class="scroll">{table}</div>')
    text = document("Patching methods compared", "".join(body), plotly=False, head=_MARK)
    with writing(folder / PAGE, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
