import json
import re

from typer.testing import CliRunner

from patchlab import cli

ARGUMENTS = ["explore", "--model", "demo-gpt2-4l", "--task", "ioi", "--n", "3", "--sites", "z", "--methods", "relp"]


def patchlab(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="patchlab")


def test_a_page_is_written_with_its_circuit_and_exact_patches(tmp_path):
    page = tmp_path / "page.html"
    result = patchlab(*ARGUMENTS, "--exact", "2", "--edges", "8", "--out", page, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"out": str(page), "bytes": page.stat().st_size, "methods": ["relp"], "sites": ["z"]}
    text = page.read_text(encoding="utf-8")
    state, answers = (json.loads(re.search(rf'id="{name}">(.*?)</script>', text, re.S)[1]) for name in ("state", "answers"))
    assert state["circuit"]["figure"]["data"]
    assert sum(question.startswith('["exact"') for question in answers) == 2
    assert "exists and is not overwritten" in patchlab(*ARGUMENTS, "--out", page).stderr


def test_what_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    assert "a page is written as .html" in patchlab(*ARGUMENTS, "--out", tmp_path / "page.pdf").stderr
