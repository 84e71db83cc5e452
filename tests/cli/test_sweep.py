"""``patchlab sweep``: what the commands print and write, and what they refuse."""

import json

import pandas as pd
import pytest
from sweeping import runs, swept
from typer.testing import CliRunner

import patchlab as pl
from patchlab.cli import app

TEXT = """
version: 1
name: two
models: demo-gpt2-4l
tasks: {name: ioi, n: 4}
runs: [{kind: score, methods: [exact, relp], sites: z}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    swept(runs(folder, TEXT), folder / "out", about={"name": "two"})
    return folder


def said(*words, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["sweep", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_status_counts_and_names_what_is_left(folder, tmp_path):
    assert json.loads(said("status", folder / "out", "--json")) == {"planned": 2, "done": 2, "failed": 0, "pending": 0, "running": 0}
    assert said("status", folder / "out").strip() == "two: 2 planned, 2 done, 0 failed, 0 pending, 0 running"
    from patchlab.store.runs import RunStore
    from patchlab.sweeps.driver import planned

    wanted = runs(tmp_path, TEXT)
    with RunStore.create(tmp_path / "out", {}) as store:
        store.plan({run.key: planned(run) for run in wanted})
    text = said("status", tmp_path / "out")
    assert "pending" in text
    assert wanted[0].key[:10] in text


def test_show_tells_all_of_one_run(folder):
    key = pl.sweeps.open(folder / "out").runs()["key"][1]
    text = said("show", folder / "out", key[:12])
    assert "demo-gpt2-4l × ioi[4] seed 0, denoising: relp on z" in text
    assert "largest_effect" in text
    record = json.loads(said("show", folder / "out", key, "--json"))
    assert record["key"] == key
    assert record["cost"]["backwards"] == 1
    assert "no run begins with 'nothing'" in said("show", folder / "out", "nothing", code=1)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_export_writes_the_table_and_replaces_nothing_unasked(folder, tmp_path, suffix):
    file = tmp_path / f"all{suffix}"
    said("export", folder / "out", file)
    table = pl.sweeps.open(folder / "out").table()
    read = pd.read_csv(file) if suffix == ".csv" else pd.read_parquet(file)
    assert list(read) == list(table)
    assert list(read["statistic"]) == list(table["statistic"])
    assert read["value"].to_numpy() == pytest.approx(table["value"].to_numpy(float), nan_ok=True)
    before = file.read_bytes()
    assert "exists and is not overwritten" in said("export", folder / "out", file, code=1)
    assert file.read_bytes() == before
    said("export", folder / "out", file, "--force", "--costs")
    assert file.read_bytes() != before
    assert "a .csv or a .parquet file" in said("export", folder / "out", tmp_path / "all.xlsx", code=1)


@pytest.mark.slow
def test_plan_and_schema(folder):
    assert "2" in said("plan", folder / "sweep.yaml")
    found = json.loads(said("plan", folder / "sweep.yaml", "--json"))
    assert found["planned"] == len(found["runs"]) == 2
    assert found["forwards"] == sum(run["forwards"] for run in found["runs"])
    assert json.loads(said("schema"))["type"] == "object"


def test_run_does_what_is_missing_and_fails_where_a_run_failed(folder, monkeypatch):
    assert "2 done, 0 failed" in said("run", folder / "sweep.yaml", "--out", folder / "out")
    from patchlab.sweeps import kinds

    monkeypatch.setattr(kinds, "compute", lambda *_, **__: 1 / 0)
    text = said("run", folder / "sweep.yaml", "--out", folder / "new", code=1)
    assert "failed: demo-gpt2-4l × ioi[4] seed 0, denoising: exact on z: ZeroDivisionError: division by zero" in " ".join(text.split())
    assert "0 done, 2 failed" in text


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--workers", "0"), "give at least 1"),
        (("--workers", "2", "--ray", "local"), "not both"),
        (("--model-folder", "x"), "NAME=FOLDER"),
        (("--ray", "local", "--per-gpu", "0"), "at least one per GPU"),
    ],
)
def test_options_that_make_no_sense_are_refused(folder, words, problem):
    result = CliRunner().invoke(app, ["sweep", "run", str(folder / "sweep.yaml"), "--out", str(folder / "not"), *words])
    assert result.exit_code != 0
    assert problem in " ".join(result.output.split())
    assert not (folder / "not").exists()


def test_a_folder_that_is_no_sweep_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert "sweep.json" in " ".join(said("status", tmp_path, code=1).split())
