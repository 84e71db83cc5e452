"""Reading a sweep: a result that is damaged on disk is said to be, everywhere, and the others are read all the same."""

import json
import re
import shutil
from pathlib import Path

import pytest
from sweeping import runs, swept
from typer.testing import CliRunner

import patchlab as pl
from patchlab import cli
from patchlab.errors import OutputError

SCORES = """
version: 1
name: damage
models: demo-gpt2-4l
tasks: [{name: ioi, n: 8}]
runs: [{kind: score, methods: [exact, atp, relp], sites: z}]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    swept(runs(folder, SCORES), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def key_of(sweep, method: str) -> str:
    return next(key for key, plan in sweep.store.planned().items() if plan["fields"]["method"] == method)


def flip(path: Path) -> None:
    """Change one byte; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("run.json", cut, r"run\.json is damaged"),
        ("run.json", Path.unlink, "has no result"),
        ("scores.nc", flip, r"scores\.nc is damaged: its SHA-256 is"),
        ("scores.nc", Path.unlink, r"cannot read .*scores\.nc, which run\.json lists"),
    ],
    ids=["record cut", "record gone", "file changed", "file gone"],
)
def test_a_damaged_result_is_shown_as_damaged_and_the_others_as_they_are(whole, copy, name, damage, says):
    before = pl.sweeps.open(whole).table()
    sweep = pl.sweeps.open(copy)
    key = key_of(sweep, "relp")
    assert sweep.damaged() == {}
    damage(copy / "runs" / key / name)
    assert sweep.counts() == {"planned": 3, "done": 2, "failed": 0, "pending": 0, "running": 0, "damaged": 1}
    assert repr(sweep).endswith("1 damaged")
    [row] = sweep.runs().query("status == 'damaged'").to_dict("records")
    assert (row["key"], list(sweep.damaged())) == (key, [key])
    assert re.search(says, row["error"])
    table = sweep.table()
    [line] = table[table["key"] == key].to_dict("records")
    assert (line["statistic"], line["site"], line["method"]) == ("damaged", "", "relp")
    assert line["why"] == row["error"]
    others = table[table["key"] != key].drop(columns="why").reset_index(drop=True)
    expected = before[before["key"] != key].reset_index(drop=True)
    assert others.astype(object).equals(expected.astype(object))
    assert key not in {stored.key for stored, _ in sweep.done()}
    assert set(sweep.differences()["method"]) == set()
    with pytest.raises(OutputError):
        sweep.scores(key)


def test_without_the_exact_run_the_others_say_why_they_are_compared_with_nothing(copy):
    sweep = pl.sweeps.open(copy)
    flip(copy / "runs" / key_of(sweep, "exact") / "scores.nc")
    table = sweep.table().set_index(["method", "statistic"])
    for method in ("atp", "relp"):
        why = table.loc[(method, "not_compared"), "why"]
        assert why.startswith("the result of exact patching is damaged: ")
        assert (method, "pearson") not in table.index
    assert len(table.loc["exact"]) == 1


def test_commands_show_what_is_damaged(copy):
    sweep = pl.sweeps.open(copy)
    flip(copy / "runs" / key_of(sweep, "atp") / "scores.nc")

    def patchlab(*words: object) -> str:
        found = CliRunner().invoke(cli.app, list(map(str, words)), prog_name="patchlab")
        assert found.exit_code == 0, found.output
        return found.output

    assert json.loads(patchlab("sweep", "status", copy, "--json"))["damaged"] == 1
    text = patchlab("sweep", "status", copy)
    assert "2 done" in text
    assert "1 damaged" in text
    assert "atp on z" in text
    patchlab("sweep", "export", copy, copy.parent / "t.csv")
    assert ",damaged," in (copy.parent / "t.csv").read_text()
    patchlab("sweep", "report", copy)
    page = (copy / "report" / "index.html").read_text(encoding="utf-8")
    assert "1 damaged" in page
    assert "1 run have a result" not in page
    assert "damaged: its SHA-256 is" in page
    assert "no number on this page" in page


def test_a_result_that_is_put_back_is_no_longer_damaged(whole, copy):
    sweep = pl.sweeps.open(copy)
    path = Path("runs") / key_of(sweep, "relp") / "scores.nc"
    flip(copy / path)
    assert len(sweep.damaged()) == 1
    shutil.copyfile(whole / path, copy / path)
    assert sweep.damaged() == {}
    assert sweep.table().equals(pl.sweeps.open(whole).table())
