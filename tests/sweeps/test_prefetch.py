"""Models fetched before a sweep: what is there already, what is fetched, and one line for what cannot be."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patchlab import cli
from patchlab.errors import ModelError, TaskError
from patchlab.models import DEMO_MODELS
from patchlab.models import hub as hub_of_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = """
version: 1
models: [demo-gpt2-4l, someone/here, someone/away, {name: models/mine, dtype: bfloat16}]
tasks: [{name: ioi, n: 8}]
runs: [{kind: score, methods: relp, sites: z}]
"""


def put_in_cache(cache: Path, name: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(DEMO_MODELS["demo-gpt2-4l"], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    put_in_cache(tmp_path / "hub", "someone/here")
    shutil.copytree(DEMO_MODELS["demo-gpt2-4l"], tmp_path / "models" / "mine")
    (tmp_path / "sweep.yaml").write_text(TEXT)
    return tmp_path / "sweep.yaml"


def prefetch(file: Path):
    return CliRunner().invoke(cli.app, ["sweep", "prefetch", str(file)], prog_name="patchlab")


@pytest.mark.slow
def test_what_is_missing_is_fetched_once(file, tmp_path, monkeypatch):
    fetched: list[str] = []
    monkeypatch.setattr(hub_of_models, "_ask", lambda *_: None)
    monkeypatch.setattr(hub_of_models, "_download", lambda name, _: fetched.append(name) or put_in_cache(tmp_path / "hub", name))
    found = prefetch(file)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0] == "demo-gpt2-4l: packaged"
    assert lines[1] == f"someone/here: in the cache (hub:someone/here@{COMMIT})"
    assert lines[2] == f"someone/away: fetched (hub:someone/away@{COMMIT})"
    assert lines[3] == f"models/mine: the folder {tmp_path / 'models' / 'mine'}"
    assert fetched == ["someone/away"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = prefetch(file)
    assert again.exit_code == 0
    assert "someone/away: in the cache" in again.stdout
    assert fetched == ["someone/away"]
    planned = CliRunner().invoke(cli.app, ["sweep", "plan", str(file)], prog_name="patchlab")
    assert planned.exit_code == 0, planned.output


def test_offline_it_is_one_line(file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = prefetch(file)
    assert found.exit_code == 1
    assert found.stderr == "error: HF_HUB_OFFLINE is set, so nothing is fetched: someone/away. Unset it where there is a network.\n"


def test_one_that_cannot_be_had_does_not_keep_the_others(file, tmp_path, monkeypatch):
    file.write_text(TEXT.replace("someone/away", "someone/secret, someone/away"))

    def ask(name: str, *_: object) -> None:
        if name == "someone/secret":
            raise ModelError("access to it is restricted")

    monkeypatch.setattr(hub_of_models, "_ask", ask)
    monkeypatch.setattr(hub_of_models, "_download", lambda name, _: put_in_cache(tmp_path / "hub", name))
    found = prefetch(file)
    assert found.exit_code == 1
    assert "someone/secret: access to it is restricted" in found.stderr
    assert "1 of 5 models cannot be fetched: someone/secret." in found.stderr
    assert (tmp_path / "hub" / "models--someone--away").is_dir()


def test_a_folder_that_is_not_there_is_no_hub_name(file):
    file.write_text(TEXT.replace("models/mine", "./models/gone"))
    found = prefetch(file)
    assert found.exit_code == 1
    assert "there is no folder" in found.stderr


def test_data_sets_are_fetched_beside_models(file, tmp_path, monkeypatch):
    """A folder with a data set beside the sweep is none of the hub's, and a data set in the cache is known by its commit."""
    here, asked = tmp_path / "hub" / "datasets--someone--there", []
    rows = '{"clean": "Mary is", "corrupted": "John is", "correct": " here", "incorrect": " there"}\n'

    def put_data(repository: Path) -> Path:
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        (repository / "snapshots" / COMMIT / "train.jsonl").write_text(rows)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return repository / "snapshots" / COMMIT

    put_data(here)
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "train.jsonl").write_text(rows)
    file.write_text(
        TEXT.replace("someone/here, someone/away, ", "").replace("[{name: ioi, n: 8}]", "[{name: [ioi, someone/there, someone/far, own/data], n: 8}]")
    )
    monkeypatch.setattr("patchlab.tasks.files.hub._downloaded", lambda name: asked.append(name) or put_data(here.with_name("datasets--someone--far")))
    found = prefetch(file)
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines()[2:4] == [
        f"someone/there: in the cache (hub:someone/there@{COMMIT})",
        f"someone/far: fetched (hub:someone/far@{COMMIT})",
    ]
    assert asked == ["someone/far"]
    monkeypatch.setattr("patchlab.tasks.files.hub._downloaded", lambda name: (_ for _ in ()).throw(TaskError("it is far away")))
    file.write_text(file.read_text().replace("someone/far", "someone/further"))
    found = prefetch(file)
    assert found.exit_code == 1
    assert "someone/further: it is far away" in found.stderr
    assert "1 of 4 models and data sets cannot be fetched: someone/further. The same command tries again." in found.stderr
