"""The README and the documentation site: every block of Python on a page runs, in order, and nothing that exists is left out."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.io
import pytest
import yaml
from command_lines import instead
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FILES = (ROOT / "README.md", DOCS / "index.md", DOCS / "concepts.md", *sorted(DOCS.glob("howto/*.md")))
PAGES = [path.relative_to(ROOT).as_posix() for path in FILES]
BLOCK = re.compile(r"^(?P<mark><!-- not run -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
NOT_RUN = {("docs/howto/own.md", 'model = pl.load_model("gpt2", dtype="float32", device="cpu")'): "a hub model: tests have no network"}
"""Blocks that are shown and not run, by page and first line, with the reason."""


def blocks(page: str) -> Iterator[tuple[int, str, bool]]:
    """Line, code, and whether it is marked as not run, of each block of Python on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start("code")), match["code"], match["mark"] is not None


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


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    from patchlab.cli import app

    shown: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plotly.io, "show", lambda figure, *_, **__: shown.append(figure.to_json()))
    monkeypatch.setattr("patchlab.report.files._images", lambda *_: "")  # pictures take seconds, and are not what is tried here
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look for their module
    ran = 0
    with registries():
        for line, code, skipped in blocks(page):
            assert skipped == ((page, code.partition("\n")[0]) in NOT_RUN), f"{page}, line {line}: marks and NOT_RUN are to say the same"
            if not skipped:
                exec(compile("\n" * line + code, str(ROOT / page), "exec"), vars(module))
                ran += 1
        for words in commands(page):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"{words}: {result.output}"
    assert ran


def commands(page: str) -> list[list[str]]:
    """The patchlab commands of a how-to, with a packaged model for the reader's own."""
    from patchlab.models import DEMO_MODELS

    text = (ROOT / page).read_text(encoding="utf-8") if page.startswith("docs/howto/") else ""
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("patchlab ")]
    return [instead(words, ["--model", DEMO_MODELS["demo-gpt2-4l"]]) for words in found]


def test_every_exception_from_running_is_on_a_page():
    marked = {(page, code.partition("\n")[0]) for page in PAGES for _, code, skipped in blocks(page) if skipped}
    assert marked == set(NOT_RUN)


def test_blocks_are_found_with_their_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("# A\n\n```python\na = 1\n```\n\n<!-- not run -->\n```python\nb = 2\n```\n```sh\nc\n```\n")
    assert list(blocks("page.md")) == [(3, "a = 1\n", False), (8, "b = 2\n", True)]


def test_the_readme_is_short_and_begins_with_one_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) == ["docs/figures/readme.png"]
    assert re.findall(r"^make \w+", text, re.M) == ["make demo", "make test"]


def test_every_package_and_every_module_beside_them_has_a_place_in_the_reference():
    package = ROOT / "patchlab"
    folders = {path.parent.name for path in package.glob("*/__init__.py")} - {"cli"}  # the page on the command line
    assert {path.stem for path in (DOCS / "reference").glob("*.md")} == {*folders, "index", "nouns"}
    for name in folders:
        assert f"::: patchlab.{name}\n" in (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
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
    assert bool(offline().loaded(text)) is loads


def offline() -> Any:
    """The hook of the site's build that refuses such pages."""
    spec = importlib.util.spec_from_file_location("offline", ROOT / "scripts" / "pages" / "offline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_citation_names_the_version():
    import patchlab as pl

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pl.__version__
