"""Folders of sweeps put together, and what nobody needs in one: nothing is written where results disagree, nothing removed unless asked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from sweeping import runs, same_tables, swept
from typer.testing import CliRunner

import patchlab as pl
from patchlab import cli
from patchlab.errors import OutputError
from patchlab.store.runs import RunStore, Stored
from patchlab.sweeps.kinds import SCORES, saved
from patchlab.sweeps.merge import merge, same, tolerance

TEXT = """
version: 1
name: two
models: demo-gpt2-4l
tasks: [{name: ioi, n: 8}]
runs: [{kind: score, methods: [exact, relp], sites: z}]
"""


def patchlab(*words: object):
    return CliRunner().invoke(cli.app, list(map(str, words)), prog_name="patchlab")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    swept(runs(folder, TEXT), folder / "out", about={"name": "two"})
    return folder / "out"


def changed(done: Path, out: Path, *, scores: float = 0.0, statistic: float = 0.0, about: dict | None = None, status: str = "done") -> Path:
    """A folder with the same runs, in which one score and one statistic of RelP's differ by shares of the largest."""
    source = RunStore.open(done)
    with RunStore.create(out, {"name": "two"}) as store:
        store.plan(source.planned())
        for key in source.planned():
            one, files = source.get(key), dict[str, bytes]()
            record = json.loads(json.dumps(one.record))
            if record["fields"]["method"] == "relp":
                found = pl.ScoreMap.load(one.path(SCORES))
                largest = max(abs(float(found.data[name].max())) for name in ("z", "metric_clean", "metric_corrupted"))
                data = found.data.copy(deep=True)
                data["z"].values[0, 1, 1] += scores * largest
                files[SCORES] = saved(replace(found, data=data).save, ".nc")
                row = next(row for row in record["statistics"] if row["statistic"] == "gap")
                row["value"] += statistic * max(1, abs(row["value"]))
                record |= about or {}
                store.put(key, record, files, status=status)
            else:
                store.put(key, record, {SCORES: one.path(SCORES).read_bytes()})
    return out


def pair(one: Path, other: Path) -> tuple[Stored, Stored]:
    """The results of RelP in two folders."""
    stores = [RunStore.open(folder) for folder in (one, other)]
    key = next(key for key, plan in stores[0].planned().items() if plan["fields"]["method"] == "relp")
    return stores[0].get(key), stores[1].get(key)


@pytest.mark.parametrize("what", ["scores", "statistic"])
def test_results_may_differ_by_rounding_and_no_more(done, tmp_path, what):
    limit = tolerance("float32")
    near, far = (changed(done, tmp_path / name, **{what: share * limit}) for name, share in (("near", 0.9), ("far", 1.2)))
    assert same(*pair(done, near)) is None
    how = same(*pair(done, far))
    assert how is not None
    assert ("z differs by up to" if what == "scores" else "gap is") in how
    counts = merge(tmp_path / "out", [done, near])
    assert (counts["done"], counts["copied"]) == (2, 2)
    same_tables(done, tmp_path / "out")  # the first is kept
    before = contents(tmp_path / "out")
    for out, first in (("new", done), ("out", near)):
        refused = patchlab("sweep", "merge", tmp_path / out, first, far)
        assert refused.exit_code == 1
        assert "the stores cannot be merged, and nothing was written" in refused.stderr
        assert "far" in refused.stderr
    assert not (tmp_path / "new").exists()
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_the_rounding_of_another_batch_size_is_within_the_tolerance(done, tmp_path):
    other = [run.model_copy(update={"batch_size": 3}) for run in runs(tmp_path, TEXT)]
    swept(other, tmp_path / "other", about={"name": "two"})
    assert merge(tmp_path / "out", [done, tmp_path / "other"])["done"] == 2


def test_other_fingerprints_and_missing_numbers_are_listed(done, tmp_path):
    other = changed(done, tmp_path / "prints", about={"fingerprints": {"model": "x", "task": "y"}})
    assert same(*pair(done, other)) == "the fingerprints of model and task"
    one, two = pair(done, changed(done, tmp_path / "plain"))
    rows = two.record["statistics"]
    rows[0] = {**rows[0], "value": None}
    assert "pairs is 8 and None" in str(same(one, two))
    del rows[0]
    assert "pairs is 8 and None" in str(same(one, two))


def test_done_beats_failed_in_any_order(done, tmp_path):
    failed = changed(done, tmp_path / "failed", status="failed")
    for name, folders in (("a", [failed, done]), ("b", [done, failed])):
        assert merge(tmp_path / name, folders)["done"] == 2
        same_tables(done, tmp_path / name)


def test_a_damaged_source_is_said_and_nothing_is_written(done, tmp_path):
    shutil.copytree(done, tmp_path / "bad")
    scores = next((tmp_path / "bad").glob(f"runs/*/{SCORES}"))
    scores.write_bytes(scores.read_bytes()[:-1] + b"x")
    with pytest.raises(OutputError, match="nothing was written"):
        merge(tmp_path / "out", [tmp_path / "bad"])
    assert not (tmp_path / "out").exists()
    missing = patchlab("sweep", "merge", tmp_path / "out", done, tmp_path / "no")
    assert missing.exit_code == 1
    assert "there is no store of runs in" in missing.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_command_prints(done, tmp_path):
    found = patchlab("sweep", "merge", tmp_path / "out", done, "--json")
    counts = {"planned": 2, "done": 2, "failed": 0, "pending": 0, "running": 0, "copied": 2}
    assert json.loads(found.stdout) == {"out": str(tmp_path / "out"), **counts}
    assert patchlab("sweep", "merge", tmp_path / "out", done).stdout == "2 planned, 2 done, 0 failed, 0 pending, 0 running, 0 copied\n"


def test_missing_shards_are_said(tmp_path):
    text = TEXT.replace("n: 8}", "n: 8, seed: [0, 1]}").replace("exact, relp", "relp")
    runs(tmp_path, text)
    assert patchlab("sweep", "run", tmp_path / "sweep.yaml", "--out", tmp_path / "one", "--shard", "1/2").exit_code == 0
    found = patchlab("sweep", "merge", tmp_path / "out", tmp_path / "one")
    assert found.exit_code == 0
    assert "1 of the 2 runs of the sweep are in none of these folders; they hold shard 1/2" in found.stderr


def test_gc_lists_and_removes_only_when_asked(done, tmp_path):
    folder = Path(shutil.copytree(done, tmp_path / "out"))
    shutil.rmtree(folder / "derived", ignore_errors=True)
    table = pl.sweeps.open(folder).table()
    assert len(list((folder / "derived").iterdir())) == 1
    assert patchlab("sweep", "gc", folder).stdout == "nothing to remove\n"
    relp = pair(done, folder)[1]
    (folder / "work" / f"{relp.key}.checkpoint").write_bytes(b"left")
    with RunStore.open(folder, write=True) as store:
        store.set_stale(relp.key, "a test says so")
    before = contents(folder)
    shown = patchlab("sweep", "gc", folder)
    assert shown.exit_code == 0
    for line in ("it is stale", "it was computed from results that are gone"):
        assert line in shown.stdout
    assert shown.stdout.endswith("--yes removes them\n")
    listed = json.loads(patchlab("sweep", "gc", folder, "--json").stdout)
    assert listed["removed"] is False
    assert listed["bytes"] == sum(one["bytes"] for one in listed["garbage"]) > 0
    assert contents(folder) == before
    removed = patchlab("sweep", "gc", folder, "--yes")
    assert "removed 2 files or folders" in removed.stdout
    assert not list((folder / "derived").iterdir())
    assert (folder / "work" / f"{relp.key}.checkpoint").exists(), "a pending run goes on from its checkpoint"
    assert pl.sweeps.open(folder).counts()["pending"] == 1
    swept(runs(tmp_path, TEXT), folder)
    assert pl.sweeps.open(folder).table().equals(table)
    assert "there is no store of runs" in patchlab("sweep", "gc", tmp_path).stderr
