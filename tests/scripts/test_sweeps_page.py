"""The page of studies: wins, ties and losses as the stored scores give them, and what has not been run is named as such."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from page_scripts import script
from sweeping import runs, swept

import patchlab as pl
from patchlab.circuits import Circuit
from patchlab.graph import Graph
from patchlab.store.runs import RunStore

page = script("make_sweeps_page")

TEXT = """
version: 1
name: seeds
models: [demo-gpt2-4l, demo-llama]
tasks: [{name: ioi, n: 8, seed: [0, 1]}]
runs:
  - {kind: score, methods: [exact, relp, atp], sites: z}
  - {kind: circuit, methods: [atp, relp], sizes: [20, 60], random: 0, smallest: false, directions: noising}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    swept(runs(folder, TEXT), folder / "out", about={"name": "seeds"})
    return folder / "out"


@pytest.fixture(scope="module")
def text(folder):
    return page.page([folder])


def cells(text: str, *first: str) -> list[str]:
    """The row of a table that begins with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    [found] = [row for row in rows if row[: len(first)] == list(first)]
    return found[len(first) :]


@pytest.mark.slow
def test_wins_are_paired_intervals_of_the_base_minus_the_other(folder, text):
    sweep = pl.sweeps.open(folder)
    table = sweep.runs()
    found = []
    for (_, _), group in table[table["kind"] == "score"].groupby(["model", "seed"], sort=False):
        maps = {row.method: sweep.scores(row.key) for row in group.itertuples()}
        [row] = (
            pl.compare(maps["exact"], {"atp": maps["atp"], "relp": maps["relp"]})
            .differences.query("cells == 'live' and site == 'z'")
            .to_dict("records")
        )
        assert (row["method"], row["other"]) == ("relp", "atp")
        found.append((row["pearson"], row["pearson_lo"], row["pearson_hi"]))
    wins, losses = sum(low > 0 for _, low, _ in found), sum(high < 0 for _, _, high in found)
    row = cells(text, "`z`", "`atp`")
    assert row[0] == f"{wins} / {4 - wins - losses} / {losses}"
    assert row[1].split()[0].replace("−", "-") == f"{np.mean([value for value, _, _ in found]):+.2f}"
    assert "4 settings (model × task × seed × direction) of 2 models" in text


@pytest.mark.slow
def test_edges_are_paired_over_models(folder, text):
    sweep = pl.sweeps.open(folder)
    table = sweep.table().query("statistic == 'cmd'")
    wide = table.pivot_table(index=["model", "seed"], columns="method", values="value")
    apart = (wide["relp"] - wide["atp"]).groupby("model").mean()
    row = cells(text, "CMD", "ioi", "`atp`")
    assert row[0] == "2"
    assert row[1].split()[0].replace("−", "-") == f"{apart.mean():+.2f}"
    less, more = int((wide["relp"] < wide["atp"]).sum()), int((wide["relp"] > wide["atp"]).sum())
    assert row[3] == f"{less} / {4 - less - more} / {more}"


@pytest.mark.slow
def test_what_has_not_been_run_is_named(text):
    for name in ("methods", "relp_rules", "relp_paper", "mib"):
        assert f"- **{name}**" in text.partition("## Not run yet")[2]
    assert "**seeds**" not in text.partition("## Not run yet")[2]


@pytest.mark.slow
def test_sections_of_studies_that_are_not_given_stay(folder, text):
    before = text.replace("## Not run yet", "## methods\n\nHow well? 280 runs.\n\n### Nodes\n\nmany\n\n## seeds\n\nold\n\n## Not run yet")
    again = page.page([folder], before)
    assert "## methods\n\nHow well? 280 runs.\n\n### Nodes\n\nmany\n\n## seeds\n" in again
    assert "\nold\n" not in again
    assert "**methods**" not in again
    assert page.page([folder], text) == text


@pytest.mark.slow
def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match="give one folder with finished runs for each of"):
        page.page([folder, folder])
    RunStore.create(tmp_path / "x", {"name": "x"}).close()
    RunStore.create(tmp_path / "seeds", {"name": "seeds"}).close()
    for wrong in ("x", "seeds"):  # another sweep, and one without a finished run
        with pytest.raises(SystemExit, match=rf"Sweep\({wrong}\)"):
            page.page([tmp_path / wrong])


def test_stability_is_what_circuits_of_other_pairs_share():
    graph = Graph(1, 1, 4)
    edges = (["input->m0", "m0->logits"], ["input->m0", "m0->logits", "input->logits"], ["input->logits"], ["input->logits"])
    circuits = {str(i): Circuit.of(graph, some) for i, some in enumerate(edges)}
    about = {"kind": "circuit", "task": "ioi", "method": ["relp", "relp", "relp", "atp"], "model": ["a", "a", "b", "b"], "key": list(circuits)}
    runs = pd.DataFrame(about)
    sweep = SimpleNamespace(runs=lambda: runs, circuits=lambda **_: circuits)
    lines = page._stability(sweep, runs)
    assert cells("\n".join(lines), "`relp`") == ["0.67", "1"], "two of three edges; model b has one circuit alone"
    assert not any("atp" in line for line in lines)
