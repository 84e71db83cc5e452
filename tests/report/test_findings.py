"""What a comparison says in words, from its tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
from score_maps import make_map
from typer.testing import CliRunner

from patchlab import cli, report
from patchlab.cli import commands
from patchlab.comparison import job as jobs
from patchlab.comparison.compare import compare
from patchlab.errors import OutputError
from patchlab.report import findings
from patchlab.report.findings import leading


def noisy(scores, noise: float, seed: int = 1, **changes):
    rng = np.random.default_rng(seed)
    return make_map({site: (values := scores.data[site].to_numpy()) + noise * rng.normal(size=values.shape) for site in scores.sites}, **changes)


@pytest.fixture(scope="module")
def exact():
    rng = np.random.default_rng(0)
    return make_map({"resid_pre": rng.normal(size=(12, 3, 6)), "z": rng.normal(size=(12, 3, 4))})


def test_the_best_method_is_said_with_its_intervals_and_a_failure_is_named(exact):
    comparison = compare(exact, {"good": noisy(exact, 0.05), "bad": noisy(exact, 4.0, 2)})
    first, *_, fails, strongest = findings(comparison, exact)
    row = comparison.table.query("cells == 'live' and site == 'resid_pre' and method == 'good'").iloc[0]
    forms = (f"{row[x]:.2f} [{row[f'{x}_lo']:.2f}, {row[f'{x}_hi']:.2f}]" for x in ("pearson_per_prompt", "pearson"))
    assert first == "resid_pre: good agrees best, r {} per prompt and {} on the mean map.".format(*forms)
    assert fails.startswith("Fails (r surely below 0.80): bad at resid_pre (per prompt ")
    assert "good at" not in fails
    assert strongest.startswith("Strongest components")
    assert strongest.count("head L") == 3


def test_methods_that_are_alike_cannot_be_told_apart(exact):
    comparison = compare(exact, {"a": noisy(exact, 0.3, 1), "b": noisy(exact, 0.3, 2), "c": noisy(exact, 5.0, 3)})
    assert leading(comparison, "resid_pre", "pearson_per_prompt") == ["a", "b"]
    assert any("a and b cannot be told apart" in line for line in findings(comparison, exact))
    other_way = compare(exact, {"c": noisy(exact, 5.0, 3), "a": noisy(exact, 0.05, 1)})
    assert leading(other_way, "resid_pre", "pearson") == ["a"], "the difference is tabulated the other way round"


def test_the_paired_interval_decides_and_not_the_two_intervals(exact):
    comparison = compare(exact, {"a": noisy(exact, 0.3, 1), "b": noisy(exact, 0.3, 2)})
    apart = comparison.differences.assign(pearson_lo=0.01, pearson_hi=0.02)  # method b minus other a
    table = comparison.table.assign(pearson=comparison.table["method"].map({"a": 0.90, "b": 0.91}))
    assert leading(replace(comparison, differences=apart, table=table), "z", "pearson") == ["b"]
    assert leading(replace(comparison, differences=apart.assign(pearson_lo=-0.01), table=table), "z", "pearson") == ["a", "b"]


def test_one_method_and_no_correlation(exact):
    alone = findings(compare(exact, {"a": noisy(exact, 0.3)}), exact)
    assert alone[0].startswith("resid_pre: a is the only method, r ")
    constant = make_map({site: np.ones(exact.data[site].shape) for site in exact.sites})
    assert findings(compare(exact, {"a": constant}), exact)[0] == "resid_pre: no correlation is defined."


def test_the_strongest_components_have_names_signs_and_shares():
    effects = {"mlp_out": np.zeros((6, 2, 3)), "z": np.zeros((6, 2, 2)), "resid_pre": np.full((6, 2, 3), 9.0)}
    effects["mlp_out"][:, 1, 2], effects["z"][:, 0, 1], effects["z"][:, 1, 0] = -1.0, 0.5, 0.25
    exact = make_map(effects, clean=np.full(6, 1.0), corrupted=np.zeros(6))
    *_, last = findings(compare(exact, {"a": exact}), exact)
    assert last == (
        "Strongest components, by the exact effect of patching one alone: MLP m1 at position 2 (-100 [-100, -100] % of the gap); "
        "head L0.H1 (50 [50, 50] % of the gap); head L1.H0 (25 [25, 25] % of the gap)."
    )
    no_gap = make_map(effects, clean=np.zeros(6), corrupted=np.zeros(6))
    assert "MLP m1 at position 2 (-1.00)" in findings(compare(no_gap, {"a": no_gap}), no_gap)[-1]


def demo(*arguments: object):
    return CliRunner().invoke(cli.app, ["demo", "--n", "4", *map(str, arguments)], prog_name="patchlab")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo on a smaller model, twice."""
    out = tmp_path_factory.mktemp("demo") / "out"
    job = jobs.Job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "Job", lambda model, *rest, **options: job("demo-gpt2-4l", *rest, **options))
        patch.setattr(commands, "SITES", "z,mlp_out")
        patch.setattr(commands, "METHODS", "exact,atp,relp")
        result = demo("--out", out)
        assert result.exit_code == 0, result.output
        page = (out / "index.html").read_text(encoding="utf-8")
        refused = demo("--out", out)
        patch.setattr(commands, "DEMO", commands.DEMO[:1])
        again = demo("--out", out, "--force", "--json")
    return out, page, result, refused, again


@pytest.mark.slow
def test_the_demo_says_what_was_found_first_and_then_the_table(folder):
    out, page, result, refused, again = folder
    lines = result.stdout.splitlines()
    assert lines[0].startswith("demo-gpt2-4l, ioi: 4 pairs, logit_diff, gap ")
    headlines = [i for i, line in enumerate(lines) if line.startswith("demo-gpt2-4l, ")]
    assert len(headlines) == 4
    assert sum(line.startswith("demo-gpt2-4l, agreement across_rc: ") for line in lines) == 2
    table = next(i for i, line in enumerate(lines) if line.startswith("Pearson correlation"))
    assert headlines[-1] < table
    assert sum("Strongest components" in line for line in lines[:table]) == 4
    assert page.index("Strongest components") < page.index("<table")
    for name in ("demo-gpt2-ioi", "demo-gpt2-agreement", "demo-llama-ioi", "demo-llama-agreement"):
        assert f'href="{name}/index.html"' in page
        own = (out / name / "index.html").read_text(encoding="utf-8")
        assert own.index("agrees best") < own.index("<table")
    assert refused.exit_code == 1
    assert "already holds results" in refused.stderr
    assert again.exit_code == 0
    found = json.loads(again.stdout)["comparisons"]
    assert all(line in result.stdout for one in found.values() for line in one["findings"])


def test_a_page_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    for force in ([], ["--force"]):
        result = demo("--out", tmp_path, *force)
        assert result.exit_code == 1
        assert "index.html is not from patchlab" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    with pytest.raises(OutputError):
        report.check_overview(tmp_path, force=True)
