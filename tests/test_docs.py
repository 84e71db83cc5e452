"""The README and the documentation site: every block of Python on a page runs, in order, and nothing that exists is left out."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import plotly.io
import pytest
import yaml
from command_lines import instead
from paths import ROOT
from typer.testing import CliRunner

DOCS = ROOT / "docs"
NOT_RUN = {
    ("docs/howto/dictionaries.md", 'one = pl.load_dictionary("saes/blocks.3.hook_resid_post", model)'): "dictionaries of the hub",
    ("docs/howto/mib.md", "import patchlab as pl"): "data sets of the hub: tests/tasks/test_mib.py reads files of their layout",
    (
        "docs/howto/mib.md",
        'pl.circuits.write_submission({"ioi_gpt2": edges, "mcqa_qwen2.5": others}, "my-method")  # maps of scores: importances',
    ): "maps of two of the track's models: tests/circuits/test_mib.py writes and checks folders",
    ("docs/howto/own.md", 'model = pl.load_model("gpt2", dtype="float32", device="cpu")'): "a hub model: tests have no network",
    ("docs/howto/sweeps.md", 'sweep = pl.sweeps.open("out")'): "tests/sweeps reads sweeps",
}
"""Blocks that are shown and not run, by page and first line, with the reason."""
RUN_ELSEWHERE = {"docs/howto/sweeps.md": "tests/sweeps, tests/cli/test_sweep.py", "docs/howto/study.md": "tests/sweeps/test_study.py"}
"""Pages whose commands take long: here only their options are checked, and what they do is tested there."""


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "pages" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


outputs, offline = script("outputs"), script("offline")
PAGES = [path.relative_to(ROOT).as_posix() for path in outputs.PAGES]


def masked(text: str) -> str:
    """A text without its numbers and spaces, which differ from machine to machine."""
    return re.sub(r"[-−+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?", "#", re.sub(r"\s+", " ", text))


@contextmanager
def registries() -> Iterator[None]:
    """What a page adds to a registry is taken out again."""
    from patchlab.methods.cells.kind import CELLS
    from patchlab.methods.registry import ENTRIES
    from patchlab.metrics import METRICS
    from patchlab.rules.attachments import ATTACHING
    from patchlab.rules.composites import DESCRIPTIONS, PRESETS, RULES
    from patchlab.sites import KINDS
    from patchlab.tasks import GENERATORS

    found: tuple[dict[Any, Any], ...] = (CELLS, ENTRIES, METRICS, ATTACHING, DESCRIPTIONS, PRESETS, RULES, KINDS, GENERATORS)
    before = [dict(one) for one in found]
    try:
        yield
    finally:
        for one, entries in zip(found, before, strict=True):
            one.clear()
            one.update(entries)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order_and_print_what_it_shows(page, tmp_path, monkeypatch):
    from patchlab.cli import app
    from patchlab.models import DEMO_MODELS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plotly.io, "show", lambda figure, *_, **__: figure.to_json())
    monkeypatch.setattr("patchlab.report.files.write_images", lambda *_: "")  # pictures take seconds, and are not what is tried here
    text = (ROOT / page).read_text(encoding="utf-8")
    with registries():
        assert masked(outputs.with_outputs(text, page)) == masked(text), f"make it anew: python scripts/pages/outputs.py {page}"
        for words in commands(page):
            if page in RUN_ELSEWHERE:
                name = [word for word in words[:2] if word in ("study", "sweep") or words[0] == "sweep"]
                known = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200"})
                assert known.exit_code == 0, words
                assert all(word.partition("=")[0] in known.output for word in words if word.startswith("--")), words
                continue
            result = CliRunner().invoke(app, instead(words, ["--model", DEMO_MODELS["demo-gpt2-4l"]]))
            assert result.exit_code == 0, f"{words}: {result.output}"


def commands(page: str) -> list[list[str]]:
    """The patchlab commands of a how-to."""
    text = (ROOT / page).read_text(encoding="utf-8") if page.startswith("docs/howto/") else ""
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("patchlab ")]


def test_every_block_that_is_not_run_has_a_reason():
    found = {page: outputs.blocks((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
    assert {(page, match["code"].partition("\n")[0]) for page in PAGES for match, runs in found[page] if not runs} == set(NOT_RUN)


def test_outputs_are_put_below_their_blocks():
    page = "# A\n\n```python\na = 2\nprint(a)\n```\n\n<!-- not run -->\n```python\nb\n```\n\n```python\nprint(a * a, ' ')\n```\n\n```text\n3\n```\n"
    assert outputs.with_outputs(page, "page") == page.replace("3", "4")
    with pytest.raises(ZeroDivisionError) as raised:
        outputs.with_outputs("\n\n```python\n1 / 0\n```\n", "page")
    assert raised.traceback[-1].lineno == 3


def test_masks_hide_numbers_and_nothing_else():
    assert masked("a0.h3  −1,204.50 [0.1, +1e-05]") == masked("a7.h12 8 [-2.25, 0]") == "a#.h# # [#, #]"
    assert masked("one") != masked("two")


def test_the_readme_is_short_and_begins_with_one_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) == ["docs/figures/readme.png"]
    assert re.findall(r"^make \w+", text, re.M) == ["make demo", "make test"]


PLACES = re.compile(r"\b(?:benchmarks|datasets|docs|notebooks|patchlab|scripts|tests)/[\w*./-]*\w")


@pytest.mark.parametrize(
    "page", [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))]
)
def test_files_that_pages_name_are_there(page):
    spans = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text(encoding="utf-8"))
    named = {place for span in spans for place in PLACES.findall(span) if "NAME" not in place}
    assert not [place for place in named if not list(ROOT.glob(place))]


def test_every_package_and_every_module_beside_them_has_a_place_in_the_reference():
    package = ROOT / "patchlab"
    folders = {path.parent.name for path in package.glob("*/__init__.py")} - {"cli"}  # the page on the command line
    assert {path.stem for path in (DOCS / "reference").glob("*.md")} == {*folders, "index", "nouns"}
    for name in folders:
        assert f"::: patchlab.{name}\n" in (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert set(re.findall(r"^::: patchlab\.(\w+)$", (DOCS / "reference" / "nouns.md").read_text(encoding="utf-8"), re.M)) == modules


def test_the_reference_lists_the_public_names():
    import patchlab as pl

    listed = re.findall(r"^\| `pl\.(\w+)`", (DOCS / "reference" / "index.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(set(pl.__all__) - {"__version__"})


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script src="https://a.example/x.js"></script>', True),
        ("<link rel=stylesheet href=//a.example/x.css>", True),
        ('<link rel="preconnect" href="https://fonts.example" crossorigin>', True),
        ('<img alt="a" src="http://a.example/x.png">', True),
        ("@font-face { src: url(https://a.example/x.woff2) }", True),
        ('@import "https://a.example/x.css";', True),
        ('<link rel="canonical" href="https://a.example/">', False),
        ('<a href="https://arxiv.org/abs/2508.21258">RelP</a>', False),
        ('<script src="../assets/x.js"></script><link rel="stylesheet" href="site.css"><img src="figures/a.svg">', False),
        ("background: url(data:image/svg+xml;base64,AAAA)", False),
    ],
)
def test_what_a_page_of_the_site_loads_is_seen(text, loads):
    assert bool(offline.loaded(text)) is loads


def test_the_citation_names_the_version():
    import patchlab as pl

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pl.__version__
