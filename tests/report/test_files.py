"""The folder of a comparison: its page and pictures, also where something goes wrong."""

import json
import warnings
from pathlib import Path

import pytest
from html_page import parsed

from patchlab import plots, report
from patchlab.comparison import job as jobs
from patchlab.errors import OutputError


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A finished job on a task file whose name, and so everything that shows it, is markup."""
    folder = tmp_path_factory.mktemp("file")
    import patchlab as pl

    model = pl.load_model("demo-gpt2-4l", device="cpu")
    pairs = pl.load_task("ioi", model, n=3).pairs
    rows = [{"clean_ids": p.clean_ids, "corrupted_ids": p.corrupted_ids, "correct_id": p.correct, "incorrect_id": p.incorrect} for p in pairs]
    path = folder / "<b>bold & 'x'.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return jobs.run(jobs.Job("demo-gpt2-4l", str(path), ("exact", "atp"), ("z",)))


@pytest.mark.usefixtures("no_images")
def test_a_file_gives_all_its_rows_and_its_name_is_escaped(results, tmp_path):
    assert len(results.task) == 3
    report.write(tmp_path, results)
    page = parsed(tmp_path / "index.html")
    assert "<b>bold & 'x' on demo-gpt2-4l: patching methods compared" in page.text
    assert "<b>bold" not in (tmp_path / "index.html").read_text().partition("<script")[0]


@pytest.mark.usefixtures("no_images")
def test_the_page_says_what_is_patched_in(results, tmp_path):
    job = jobs.Job("demo-gpt2-4l", results.job.task, ("relp@mean", "exact@mean"), ("z",))
    found = jobs.run(job, model=results.model)
    report.write(tmp_path, found)
    text = " ".join(parsed(tmp_path / "index.html").text)
    assert "means over all positions and examples of the other prompts are put into the corrupted run, one cell at a time" in text
    assert "Exact patching is the reference; the approximations are relp@mean." in text
    assert found.job.reference == "exact@mean"
    (tmp_path / "paired").mkdir()
    report.write(tmp_path / "paired", results)
    assert "clean activations are moved into the corrupted run, one cell at a time" in " ".join(parsed(tmp_path / "paired" / "index.html").text)


def test_a_browser_that_hangs_is_ended_and_the_rest_is_written(results, tmp_path, monkeypatch):
    monkeypatch.setattr("patchlab.plots._save._DRAW", "import time; time.sleep(600)")
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path, **options: save(figure, path, timeout=0.5, **options))
    said: list[str] = []
    report.write(tmp_path, results, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("no PNG files: ")
    assert said[0].endswith("the browser drew nothing in 0.5 s")
    assert {"index.html", "run.json", "heatmaps.html"} <= {path.name for path in tmp_path.iterdir()}


def test_an_interruption_while_pictures_are_drawn_loses_the_pictures_alone(results, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("patchlab.plots._save._drawn", interrupted)
    said: list[str] = []
    report.write(tmp_path, results, say=said.append)
    assert said == ["no PNG files: interrupted; all else is written"]
    assert (tmp_path / "run.json").exists()


def test_without_a_browser_the_rest_is_written_and_the_reason_given(results, tmp_path, monkeypatch):
    save = plots.save

    def without_browser(figure, path, **options):
        if Path(path).suffix == ".png":
            warnings.warn("wrote a instead of a .png image, which needs kaleido and Chromium: there is none", stacklevel=2)
            return save(figure, Path(path).with_suffix(".html"), **options)
        return save(figure, path, **options)

    monkeypatch.setattr(plots, "save", without_browser)
    said: list[str] = []
    report.write(tmp_path, results, say=said.append)
    assert said == ["no PNG files: kaleido and Chromium: there is none"]
    assert not list(tmp_path.glob("*.png"))
    assert (tmp_path / "heatmaps.html").is_file()


@pytest.mark.usefixtures("no_images")
def test_a_page_that_cannot_be_written_is_an_error_of_ours(results, tmp_path):
    (tmp_path / "index.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*index\.html: it is a folder"):
        report.write(tmp_path, results)
