"""The report of a sweep: every number is the table's, what is missing says why, and the page needs nothing but the files beside it."""

import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from browsing import found_in
from sweeping import runs, swept
from typer.testing import CliRunner

import patchlab as pl
from patchlab import cli
from patchlab.errors import OutputError
from patchlab.report import sweep as report
from patchlab.report.sortable import Column, missing, number, sortable, text
from patchlab.store import gc
from patchlab.store.runs import RunStore
from patchlab.sweeps.driver import planned
from patchlab.sweeps.results import without_source

STUDY = """
version: 1
name: study
models: demo-gpt2-4l
tasks:
  - {name: ioi, n: 16, seed: [0, 1]}
runs:
  - {kind: score, methods: [exact, atp, relp], sites: [resid_pre, z]}
  - {kind: verify, screen: relp, sites: z, k: 2, sample: 0}
  - {kind: circuit, methods: [atp, relp], ablation: resample, sizes: [30, 100, 300], random: 1}
"""
SECTIONS = ["What ran", "What failed", "What is missing", "Agreement", "Ranking", "Cost", "Circuits", "Verified", "Runs"]


class Tables(HTMLParser):
    """The tables of a page: per id a list of rows, and of each cell by its column the number behind it, its text and what is said on hover."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: dict[str, list[dict[str, dict]]] = {}
        self.headings: list[str] = []
        self._heads: list[str] = []
        self._table, self._cell, self._heading = "", None, False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "table":
            self._table, self._heads = found["id"], []
            self.rows[self._table] = []
        elif tag == "tr" and self._heads:
            self.rows[self._table].append({})
        elif tag == "th":
            self._heads.append("")
            self._cell = "head"
        elif tag == "td":
            row = self.rows[self._table][-1]
            self._cell = {"value": None if "data-v" not in found else float(found["data-v"]), "text": "", "why": ""}
            row[self._heads[len(row)]] = self._cell
        elif isinstance(self._cell, dict):
            self._cell["why"] += found.get("title", "")
            self._cell["show"] = found.get("data-show")
            self._cell["text"] += "|" if found.get("class") == "ci" else ""
        self._heading = tag == "h2"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None
        self._heading = False

    def handle_data(self, data):
        if self._cell == "head":
            self._heads[-1] += data
        elif isinstance(self._cell, dict):
            self._cell["text"] += data
        elif self._heading:
            self.headings.append(data)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def written(folder: Path, out: Path, **options) -> tuple[str, Tables]:
    report.write_sweep(pl.sweeps.open(folder), out, **options)
    page = (out / "index.html").read_text(encoding="utf-8")
    return page, Tables(page)


@pytest.fixture(scope="module")
def swept_study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    counts, _ = swept(runs(folder, STUDY), folder / "out", about={"name": "study"})
    assert counts["done"] == 12
    sweep = pl.sweeps.open(folder / "out")
    assert len(sweep.table())
    assert len(sweep.differences())
    return folder / "out"


@pytest.fixture(scope="module")
def folder(swept_study, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report"
    written(swept_study, out)
    return out


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def copy(swept_study, tmp_path):
    return Path(shutil.copytree(swept_study, tmp_path / "copy"))


def shown(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace("-", "−")


def check(cell: dict, row: pd.Series | None, digits: int = 3) -> None:
    """A cell shows a row of the table: its value, exactly behind it and rounded to be read, and its interval."""
    if row is None or pd.isna(row["value"]):
        assert cell["text"] == "–", cell
        assert cell["value"] is None
        assert len(cell["why"]) > 10
        return
    assert cell["value"] == row["value"]
    interval = "" if pd.isna(row["lo"]) else f"|{shown(row['lo'], digits)} to " + ("∞" if pd.isna(row["hi"]) else shown(row["hi"], digits))
    assert cell["text"] == shown(row["value"], digits) + interval


def test_every_number_on_the_page_is_the_tables(swept_study, page):
    sweep, tables = pl.sweeps.open(swept_study), Tables(page)
    table = sweep.table(costs=True)
    rows = {(row["key"], row["site"], row["statistic"]): row for _, row in table.iterrows()}
    by = {(row["kind"], row["method"], row["seed"]): row["key"] for _, row in table.iterrows()}
    cost = {"forwards": 0, "backwards": 0, "seconds": 2}

    agreement = {"r per prompt": "pearson_per_prompt", "r of means": "pearson", "top-k recall": "topk_recall"}
    assert len(tables.rows["agreement-table"]) == 3 * 2 * 2
    for row in tables.rows["agreement-table"]:
        key = by["score", row["method"]["text"], int(row["seed"]["text"])]
        for name, statistic in agreement.items():
            check(row[name], rows.get((key, row["site"]["text"], statistic)))
        for name, digits in cost.items():
            check(row[name], rows[key, "", name], digits)
        if row["method"]["text"] == "exact":
            assert row["r per prompt"]["why"] == "this is what the others are compared with"
        assert row["heatmaps"]["show"] == report.figure_of(key)

    circuits = {"CPR": "cpr", "CMD": "cmd", "random CPR": "random_cpr", "random CMD": "random_cmd", "faithfulness": "smallest_faithfulness"}
    assert len(tables.rows["circuits-table"]) == 4
    for row in tables.rows["circuits-table"]:
        key = by["circuit", row["method"]["text"], int(row["seed"]["text"])]
        for name, statistic in circuits.items():
            check(row[name], rows[key, "edges", statistic])
        check(row["smallest"], rows[key, "edges", "smallest_edges"], 0)
        check(row["share"], rows[key, "edges", "smallest_share"], 4)
        for name, digits in cost.items():
            check(row[name], rows[key, "", name], digits)

    verified = {"found": 0, "at least right": 0, "recall bound": 3, "confidence": 3, "patched": 0, "live cells": 0, "share of a sweep": 3}
    statistics = ["found", "at_least", "recall", "confidence", "patched_cells", "live_cells", "share_of_sweep"]
    assert len(tables.rows["verified-table"]) == 2
    for row in tables.rows["verified-table"]:
        key = by["verify", row["method"]["text"], int(row["seed"]["text"])]
        for (name, digits), statistic in zip(verified.items(), statistics, strict=True):
            check(row[name], rows[key, "", statistic], digits)
        assert row["complete"]["text"] == {1.0: "yes", 0.0: "no"}[rows[key, "", "complete"]["value"]]

    assert [row["run"]["text"] for row in tables.rows["runs-table"]] == list(sweep.runs()["label"])
    for row, key in zip(tables.rows["runs-table"], sweep.runs()["key"], strict=True):
        check(row["gap"], rows[key, "", "gap"], 2)
        assert row["key"]["text"] == key[:10]
    totals = {name: table.loc[table["statistic"] == name, "value"].sum() for name in ("forwards", "backwards", "seconds")}
    passes = f"{totals['forwards']:,.0f} forward and {totals['backwards']:,.0f} backward passes (of circuits, those of their scores alone)"
    assert f"12 runs planned: 12 done. Those that are done took {passes} and {totals['seconds']:.1f} s." in page


def test_pairs_are_those_that_compare_gives(swept_study, page):
    sweep = pl.sweeps.open(swept_study)
    labels = dict(zip(sweep.runs()["key"], zip(sweep.runs()["method"], sweep.runs()["seed"], strict=True), strict=True))
    kinds = dict(zip(sweep.runs()["key"], sweep.runs()["kind"], strict=True))
    keys = {name: key for key, name in labels.items() if kinds[key] == "score"}
    differences = sweep.differences()
    expected = []
    for seed in (0, 1):
        maps = {name: sweep.scores(keys[name, seed]) for name in ("atp", "relp")}
        table = pl.compare(sweep.scores(keys["exact", seed]), maps).differences.query("cells == 'live'")
        for row in table.to_dict("records"):
            expected += [(seed, row["site"], row["method"], row["other"], form, row[form], row[f"{form}_lo"], row[f"{form}_hi"]) for form in
                         ("pearson", "pearson_per_prompt", "pearson_pooled")]  # fmt: skip
    found = [
        (labels[row["reference"]][1], row["site"], row["method"], row["other"], row["statistic"], row["value"], row["lo"], row["hi"])
        for row in differences.to_dict("records")
    ]
    assert sorted(found) == sorted(expected)
    assert sweep.differences().equals(differences), "read from what was kept"
    for row in Tables(page).rows["pairs-table"]:
        mine = differences.query("statistic == 'pearson_per_prompt' and site == @row['site']['text']")
        assert f"{mine['method'].iloc[0]} − {mine['other'].iloc[0]}" == row["difference"]["text"]
        assert row["mean"]["value"] == pytest.approx(mine["value"].mean())
        assert row["settings"]["value"] == 2 == row["above"]["value"] + row["open"]["value"] + row["below"]["value"]
        assert row["above"]["value"] == (mine["lo"] > 0).sum()


def test_the_page_is_small_and_draws_nothing_until_it_is_asked(folder, page):
    assert page.count("<script") == 1
    assert "<link" not in page
    assert not re.search(r'(src|href)="?(https?:|//)', page)
    assert "Plotly.newPlot" in page
    assert '"data":' not in page, "figures are in files of their own"
    assert len(page) < 120_000
    figures = re.findall(r'data-(?:figure|show)="([^"]+)"', page)
    assert {"ranking", "costs"} < {*figures}
    for name in figures:
        start, end = (folder / f"{name}.js").read_text(encoding="utf-8").split("(", 1)
        assert start == "patchlabFigure"
        called, figure = json.loads(f"[{end.rstrip().removesuffix(');')}]")
        assert called == name
        assert figure["data"]
    record = json.loads((folder / "run.json").read_text())
    assert {*record["files"]} == {path.name for path in folder.iterdir()}
    assert record["counts"] == {"planned": 12, "done": 12, "failed": 0, "running": 0, "pending": 0, "stale": 0, "damaged": 0}
    assert record["figures"] == len({*figures}) == 2 + 2 + 6 + 2
    assert [name for name in SECTIONS if name not in ("What failed", "What is missing")] == Tables(page).headings


def test_failed_stale_and_pending_runs_are_told_and_part_of_no_number(copy, tmp_path):
    sweep = pl.sweeps.open(copy)
    keys = {(row["kind"], row["method"], row["seed"]): row["key"] for _, row in sweep.runs().iterrows()}
    extra = runs(tmp_path, STUDY.replace("[0, 1]", "[2, 3]"))
    error = {"type": "MethodError", "message": "no room\nfor <b>this</b>", "traceback": "Traceback (most recent call last):\n  line <i>9</i>"}
    with RunStore.open(copy, write=True) as store:
        store.plan({run.key: planned(run) for run in extra[:2]})
        stale = next(key for (kind, method, seed), key in keys.items() if (kind, method, seed) == ("score", "atp", 1))
        record = store.get(stale).record
        store.set_stale(stale, "its model had another fingerprint")
        store.put(extra[0].key, {**record, "error": error}, {}, status="failed")
    page, tables = written(copy, tmp_path / "out")
    assert [heading for heading in tables.headings if heading.startswith("What")] == ["What ran", "What failed", "What is missing"]
    assert "14 runs planned: 11 done, 1 failed, 1 pending, 1 stale." in page
    assert f"<summary><b>{extra[0].label}</b> MethodError: no room</summary><pre>Traceback" in page
    assert "line &lt;i&gt;9&lt;/i&gt;" in page
    assert "its model had another fingerprint" in page
    assert f"<li>{extra[1].label}</li>" in page
    shown = [(row["method"]["text"], row["seed"]["text"]) for row in tables.rows["agreement-table"]]
    assert ("atp", "1") not in shown
    assert len(shown) == 2 * (3 + 2)
    states = {row["run"]["text"]: row["status"]["text"] for row in tables.rows["runs-table"]}
    assert states[extra[0].label] == "failed"
    assert states[extra[1].label] == "pending"
    [row] = [row for row in tables.rows["runs-table"] if row["run"]["text"] == extra[0].label]
    assert row["gap"]["text"] == row["seconds"]["text"] == row["figure"]["text"] == "–"
    assert row["gap"]["why"] == "the run is failed"
    assert "1 of 2 settings" in (tmp_path / "out" / "ranking.js").read_text(), "methods are ranked where all of them ran"


def test_a_stale_reference_leaves_dashes_that_say_so(copy, tmp_path):
    sweep = pl.sweeps.open(copy)
    for key in sweep.runs().query("method == 'exact'")["key"]:
        with RunStore.open(copy, write=True) as store:
            store.set_stale(key, "other code")
    page, tables = written(copy, tmp_path / "out")
    assert "Ranking" not in tables.headings
    assert "Cost" not in tables.headings
    assert 'data-figure="ranking"' not in page
    for row in tables.rows["agreement-table"]:
        assert row["r per prompt"]["text"] == "–"
        assert row["r per prompt"]["why"].startswith("no exact patching of the same model")


def test_names_with_html_in_them_are_escaped(tmp_path):
    wanted = runs(tmp_path, STUDY)
    nasty = "<img src=x onerror=alert(1)>"
    with RunStore.create(tmp_path / "store", {"name": nasty}) as store:
        plans = {run.key: planned(run) for run in wanted}
        for plan in plans.values():
            plan["label"] = plan["fields"]["model"] = plan["fields"]["task"] = nasty
        store.plan(plans)
        error = {"type": "Error", "message": nasty, "traceback": nasty}
        versions, host = {"patchlab": nasty}, {"name": nasty, "cpus": 1, "system": nasty, "python": "3"}
        record = {"error": error, "versions": versions, "host": host, "commit": nasty, "ended": nasty, "label": nasty}
        store.put(wanted[0].key, record, {}, status="failed")
    page, tables = written(tmp_path / "store", tmp_path / "out")
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 10
    assert tables.rows["runs-table"][0]["run"]["text"] == nasty


@pytest.mark.parametrize(
    ("kinds", "headings"),
    [
        ("score", ["What ran", "Agreement", "Ranking", "Cost", "Runs"]),
        ("circuit", ["What ran", "Circuits", "Runs"]),
        ("verify", ["What ran", "Verified", "Runs"]),
        ("", ["What ran", "What failed", "Runs"]),
    ],
)
def test_sections_without_data_are_left_out(swept_study, tmp_path, kinds, headings):
    source = pl.sweeps.open(swept_study)
    with RunStore.create(tmp_path / "part", {"name": "part"}) as store:
        for key, plan in source.store.planned().items():
            stored = source.find(key)
            if plan["fields"]["kind"] == kinds:
                store.plan({key: plan})
                store.put(key, stored.record, {name: stored.path(name).read_bytes() for name in stored.files})
            elif not kinds:
                store.plan({key: plan})
                store.put(key, {**stored.record, "error": {"type": "Error", "message": "", "traceback": "all of it"}}, {}, status="failed")
    shutil.copytree(swept_study / "derived", tmp_path / "part" / "derived")
    page, tables = written(tmp_path / "part", tmp_path / "out")
    assert tables.headings == headings
    assert len(tables.rows["runs-table"]) == {"score": 6, "circuit": 4, "verify": 2, "": 12}[kinds]
    if not kinds:
        assert "12 runs: Error: (no message)" in page
        assert "Those that are done" not in page
    assert (tmp_path / "out" / "plotly.min.js").stat().st_size > 1e6


@pytest.mark.slow
def test_nothing_but_its_own_report_is_replaced(copy, tmp_path):
    sweep, out = pl.sweeps.open(copy), tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        report.write_sweep(sweep, out)
    with pytest.raises(OutputError, match="no earlier run lists"):
        report.write_sweep(sweep, out, force=True)
    assert tree(out) == {"index.html": hashlib.sha256(b"mine").hexdigest()}
    with pytest.raises(OutputError, match="is the folder of the sweep itself"):
        report.write_sweep(sweep, copy)

    shutil.rmtree(out)
    report.write_sweep(sweep, out)
    (out / "notes.txt").write_text("mine")
    gone = out / "run-0.js"
    before = tree(out)
    report.write_sweep(sweep, out)
    assert {**tree(out), "run.json": ""} == {**before, "run.json": ""}
    assert not gone.exists()

    other = tmp_path / "other"
    with RunStore.create(other, {"name": "other"}) as store:
        store.plan(sweep.store.planned())
    with pytest.raises(OutputError, match="already holds results"):
        report.write_sweep(pl.sweeps.open(other), out)
    assert tree(out) == {**before, "run.json": tree(out)["run.json"]}
    report.write_sweep(pl.sweeps.open(other), out, force=True)
    assert "12 pending" in (out / "index.html").read_text()
    assert {path.name for path in out.iterdir()} == {"index.html", "plotly.min.js", "run.json", "notes.txt"}, "figures of the other are gone"


@pytest.mark.slow
def test_only_figures_whose_scores_changed_are_drawn_again(copy, monkeypatch):
    sweep, drawn = pl.sweeps.open(copy), []
    report.write_sweep(sweep)
    before, draw = tree(copy / "report"), pl.plots.heatmaps
    monkeypatch.setattr(report.plots, "heatmaps", lambda maps: drawn.append(maps) or draw(maps))
    figures = sorted((copy / "report").glob("run-*.js"))
    figures[0].write_text("damaged")
    figures[1].unlink()
    report.write_sweep(sweep)
    assert len(drawn) == 2
    assert tree(copy / "report") == before
    monkeypatch.setattr(report, "code_digest", lambda: "other code")
    report.write_sweep(sweep)
    assert len(drawn) == 2 + len(figures)


@pytest.mark.slow
def test_an_interrupted_report_leaves_the_earlier_one(copy, monkeypatch):
    sweep = pl.sweeps.open(copy)
    report.write_sweep(sweep)
    before = tree(copy / "report")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_sweep(sweep)
    assert tree(copy / "report") == before


@pytest.mark.slow
def test_a_report_within_it_does_not_disturb_the_store(copy):
    before = {name: sum_ for name, sum_ in tree(copy).items() if not name.startswith(("report/", "derived/"))}
    result = CliRunner().invoke(cli.app, ["sweep", "report", str(copy), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["page"] == str(copy / "report" / "index.html")
    assert said["counts"]["done"] == 12
    with RunStore.open(copy, write=True) as store:
        assert gc(store) == []
        assert store.counts()["done"] == 12
    with RunStore.create(copy, {}) as store:
        assert store.counts()["done"] == 12
    after = {name: sum_ for name, sum_ in tree(copy).items() if not name.startswith(("report/", "derived/"))}
    assert {**after, "index.sqlite": ""} == {**before, "index.sqlite": ""}
    assert (copy / "report" / "index.html").exists()
    again = CliRunner().invoke(cli.app, ["sweep", "report", str(copy)])
    assert again.exit_code == 0, again.output
    assert str(copy / "report" / "index.html") in again.stdout.replace("\n", "")


@pytest.mark.slow
def test_a_store_that_cannot_be_written_to_is_reported_elsewhere(copy, tmp_path, page):
    shutil.rmtree(copy / "derived")
    (copy / "derived").write_text("nothing can be kept here")
    (copy / "report").write_text("nor here")
    before = tree(copy)
    with pytest.raises(OutputError, match="is a file"):
        report.write_sweep(pl.sweeps.open(copy))
    mine, _ = written(copy, tmp_path / "out")
    assert mine == page
    assert tree(copy) == before


def test_an_empty_plan_is_no_report(tmp_path):
    RunStore.create(tmp_path / "store", {}).close()
    with pytest.raises(OutputError, match="nothing is planned"):
        report.write_sweep(pl.sweeps.open(tmp_path / "store"))
    assert not (tmp_path / "store" / "report").exists()


def test_models_and_tasks_of_one_name_are_told_apart(tmp_path):
    text = STUDY.replace("models: demo-gpt2-4l", "models: [demo-gpt2-4l, {name: demo-gpt2-4l, dtype: bfloat16}]")
    text = text.replace("seed: [0, 1]", "options: {template: [plain, mixed]}")
    text = text.replace("methods: [exact, atp, relp]", "methods: [exact, exact@mean, relp, relp@mean]")
    wanted = runs(tmp_path, text)
    with RunStore.create(tmp_path / "store", {}) as store:
        store.plan({run.key: planned(run) for run in wanted})
    found = report.gather(pl.sweeps.open(tmp_path / "store"))
    assert {*found.models.values()} == {"demo-gpt2-4l dtype=float32", "demo-gpt2-4l dtype=bfloat16"}
    assert {*found.tasks.values()} == {"ioi[16] template=plain", "ioi[16] template=mixed"}
    assert without_source("relp@mean") == "relp"


def test_cells_say_what_is_missing_and_intervals_without_an_end():
    assert number(None, why="a <reason>").html == '<span class="none" title="a &lt;reason&gt;">–</span>'
    assert number(math.nan) == missing("it is not defined")
    assert number(-0.25, digits=2).html == "−0.25"
    assert number(-0.25).value == -0.25
    assert number(0.0).html == "0.000", "a measured 0 is a number"
    assert number(12, 10, math.nan, digits=0).html == '12<span class="ci">10 to <span title="no finite upper end">∞</span></span>'
    html = sortable(
        "t", [Column("a<b", choose=True), Column("n", "what <it> is", number=True)], [[text("<x>"), number(1)], [text("y"), number(None)]]
    )
    assert "<option>&lt;x&gt;</option><option>y</option>" in html
    assert 'title="what &lt;it&gt; is"' in html
    assert "a&lt;b" in html
    assert 'data-column="0"' in html
    assert 'data-column="1"' not in html


CLICKS = """async (found) => {
  const cells = (place, table = "agreement-table") => [...document.querySelectorAll(`#${table} tbody tr:not(.drawn)`)]
    .filter((row) => !row.hidden).map((row) => row.cells[place].dataset.v ?? row.cells[place].textContent);
  const table = document.getElementById("agreement-table");
  found.drawn = document.querySelectorAll(".js-plotly-plot").length;
  const place = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent === "r per prompt");
  const head = table.tHead.rows[0].cells[place].firstChild, form = document.querySelector('[data-for="agreement-table"]');
  head.click();
  found.up = cells(place);
  const button = table.querySelector("tbody tr [data-show]");
  button.click();
  const row = button.closest("tr");
  await until(() => row.nextSibling.querySelector(".main-svg"));
  found.below = row.nextSibling.querySelectorAll(".main-svg").length > 0;
  found.fits = row.nextSibling.querySelector("figure").clientWidth <= document.documentElement.clientWidth;
  found.wide = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
  head.click();
  found.down = cells(place);
  found.sorted = table.tHead.rows[0].cells[place].getAttribute("aria-sort");
  found.moved = row.nextSibling === row.figureRow;
  const select = form.querySelector("select");
  select.value = "atp";
  select.dispatchEvent(new Event("input", { bubbles: true }));
  found.chosen = [...new Set(cells(0))];
  found.said = form.querySelector("output").value;
  form.querySelector("input").value = "Z atp";
  form.querySelector("input").dispatchEvent(new Event("input", { bubbles: true }));
  found.filtered = cells(place).length;
  found.hidden = row.hidden === row.figureRow.hidden;
  select.value = "";
  form.querySelector("input").value = "";
  select.dispatchEvent(new Event("input", { bubbles: true }));
  found.all = cells(0).length;
  button.click();
  found.closed = !table.querySelector("tr.drawn");
  const lost = document.querySelector("#runs-table [data-show]");
  lost.dataset.show = "gone";
  lost.click();
  await until(() => lost.closest("tr").nextSibling.textContent.includes("cannot"));
  found.lost = lost.closest("tr").nextSibling.textContent;
  const figure = document.querySelector('[data-figure="ranking"]');
  figure.scrollIntoView();
  await until(() => figure.querySelector(".main-svg"));
  found.ranking = figure.querySelectorAll(".main-svg").length > 0;
}"""


@pytest.mark.parametrize("width", [1400, 800])
def test_in_a_browser_tables_sort_and_filter_and_figures_come_when_they_are_asked_for(browser, swept_study, folder, tmp_path, width):
    there = Path(shutil.copytree(folder, tmp_path / "there"))
    found = found_in(browser, there / "index.html", CLICKS, width)
    table = pl.sweeps.open(swept_study).table()
    values = sorted(table.loc[(table["statistic"] == "pearson_per_prompt"), "value"])
    assert found["drawn"] == 0
    assert [float(value) for value in found["up"][: len(values)]] == values
    assert [float(value) for value in found["down"][: len(values)]] == values[::-1]
    assert found["up"][len(values) :] == found["down"][len(values) :] == ["–"] * 4, "what is missing comes last, either way"
    assert found["sorted"] == "descending"
    assert found["below"]
    assert found["fits"]
    assert found["wide"], "the page itself does not scroll sideways"
    assert found["moved"], "the figure stays below its row"
    assert found["chosen"] == ["atp"]
    assert found["said"] == "4 of 12 rows"
    assert found["filtered"] == 2
    assert found["hidden"]
    assert found["all"] == 12
    assert found["closed"]
    assert "gone.js cannot be loaded" in found["lost"]
    assert found["ranking"]
    assert found["errors"] == []
