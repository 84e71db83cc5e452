"""What runs will compute, said before they start."""

import math
import re

import pytest
from families import mixed_task, model_of, swap_task
from typer.testing import CliRunner

from patchlab import cli
from patchlab.comparison import job as jobs
from patchlab.methods import SecondOrder, get_method
from patchlab.methods.plan import forward_seconds
from patchlab.methods.quadrature import QUADRATURES, n_points, points_and_weights

NODES, EDGES = ["resid_pre", "z", "q"], ["edges"]


@pytest.mark.parametrize(
    ("method", "sites"),
    [
        *((name, NODES) for name in ("exact", "atp", "relp", "ig:3", "ig-activations:2", "relp+ig:2", "relp+qk", "atp*", "ig:2+drop")),
        *((name, EDGES) for name in ("exact", "relp", "ig:3", "eap-ig-activations:2")),
    ],
)
def test_planned_passes_are_those_that_are_run(method: str, sites: list[str]) -> None:
    task, model = mixed_task(), model_of("gpt2")
    plan = get_method(method).plan(model, task, sites)
    cost = get_method(method).run(model, task, sites, progress=False).cost
    assert plan.backwards == cost.backwards
    assert plan.forwards == cost.forwards
    assert str(plan).endswith("passes")


def test_second_order_terms_with_a_number_of_probes() -> None:
    task, model, method = swap_task(), model_of("gpt2"), SecondOrder(probes=2)
    plan, cost = method.plan(model, task, "z"), method.run(model, task, "z", progress=False).cost
    assert (plan.forwards, plan.backwards) == (cost.forwards, cost.backwards)


def test_an_exact_plan_counts_the_share_of_the_model_that_is_computed() -> None:
    model, task = model_of("gpt2"), swap_task()
    exact = get_method("exact")
    plan = exact.plan(model, task, "resid_pre")
    n_live = plan.forwards - 2
    assert 2 < plan.work < 2 + n_live
    cost = exact.run(model, task, "resid_pre", progress=False).cost
    one = sum(map(len, task.pairs))
    assert plan.work == pytest.approx(cost.positions / one, rel=0.35)


@pytest.mark.parametrize("rule", QUADRATURES)
def test_a_path_of_a_billion_points_takes_no_memory(rule: str) -> None:
    assert n_points(rule, 10**9) >= 10**9
    at, weight = next(points_and_weights(rule, 10**9))
    assert 0 <= at < 1e-8
    assert 0 < weight <= 1e-9
    few = list(points_and_weights(rule, 7))
    assert len(few) == n_points(rule, 7)
    assert math.isclose(sum(weight for _, weight in few), 1)


def test_a_forward_pass_is_timed() -> None:
    assert 0 < forward_seconds(model_of("gpt2"), mixed_task()) < 60


def test_long_work_is_announced_and_short_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = model_of("gpt2"), swap_task()
    monkeypatch.setattr(jobs, "forward_seconds", lambda *_: 0.01)
    assert jobs.cost_line(["exact", "ig:5"], model, task, ["z"]) is None
    line = jobs.cost_line(["exact", "ig:999999"], model, task, ["z"])
    assert line is not None
    assert line.startswith("about 8 h 20 min: 1,000,0")
    assert "999,999 backward passes (ig:999999 8 h 20 min, exact 0 s)" in line
    assert line.endswith("Less is computed with fewer pairs (--n), fewer --sites, or fewer points (ig:5 instead of ig:999999).")
    assert "fewer points" not in (jobs.announced({"exact": 1e5}, model, task, lower="Less.", passes="many") or "")
    assert jobs.cost_line([], model, task, ["z"]) is None


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--methods", "exact,atp", "--sites", "z", "--out", "out"],
        ["verify", "--k", "2"],
        ["circuit", "find", "--out", "circuit.json"],
        ["circuit", "evaluate", "--curve", "curve", "--methods", "atp", "--sizes", "100,150"],
    ],
)
def test_commands_say_the_cost_before_they_begin(command, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "forward_seconds", lambda *_: 1e4)

    def begun(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("patchlab.methods.method.Method._run", begun)
    result = CliRunner().invoke(cli.app, [*command, "--model", "demo-gpt2-4l", "--task", "ioi", "--n", "8"], prog_name="patchlab")
    assert result.exit_code != 0
    assert re.search(r"^about \d+ \S+.*: .* passes.*Less is computed with", result.stderr, re.M), result.stderr
