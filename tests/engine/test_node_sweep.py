"""The fast exact engine against the literal one, and the work it does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, LAYERS, mixed_task, model_of, native_model, pair, scores_of, swap_task

import patchlab as pl
from patchlab.engine import Program, Support, Work, node_sweep, run, session_of, support, sweep
from patchlab.engine.trust.nodes import sweep_key
from patchlab.errors import InterventionError, MethodError
from patchlab.interventions import Edit
from patchlab.methods.method import DIRECTIONS
from patchlab.metrics import METRICS, Metric
from patchlab.tasks.task import Task

LITERAL = pl.ActivationPatching(engine="literal")
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "z[layer,pos,head]", "q", "k[layer,pos,kv_head]", "v", "pattern", "mlp_post", "input")
EVERY = (*SITES, "resid_mid")


def sites_of(model: Any) -> tuple[str, ...]:
    return tuple(site for site in EVERY if site.split("[")[0] not in model.arch.absent)


def largest_difference(first: pl.ScoreMap, second: pl.ScoreMap) -> float:
    """As a share of the metric's scale."""
    scale = float(np.abs(first.data.metric_clean.to_numpy() - first.data.metric_corrupted.to_numpy()).max())
    return max(float(np.abs(first.data[site] - second.data[site]).max()) for site in first.sites) / scale


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_literal_sweep(family: str, direction: str) -> None:
    model = model_of(family)
    fast, slow = (scores_of(method, model, swap_task(), sites_of(model), direction) for method in (pl.ActivationPatching(), LITERAL))
    assert fast.provenance["engine"].startswith("replay" if family == "native" else "prefix")
    assert slow.provenance["engine"] == "literal (asked for)"
    assert largest_difference(fast, slow) < 1e-5


def test_equals_the_literal_sweep_in_double_precision() -> None:
    model = model_of("gpt2", torch.float64)
    fast, slow = (scores_of(method, model, swap_task(), sites_of(model)) for method in (pl.ActivationPatching(), LITERAL))
    assert fast.provenance["engine"] == "prefix"
    assert largest_difference(fast, slow) < 1e-10


@pytest.mark.parametrize("source", ["zero", "mean", "mean_positional"])
def test_sources(source: str) -> None:
    model = model_of("llama")
    sites = ("resid_pre", "z[layer,pos,head]", "mlp_post", "v")
    maps = [scores_of(pl.ActivationPatching(engine, source=source), model, swap_task(), sites, "noising") for engine in ("auto", "literal")]
    assert largest_difference(*maps) < 1e-5


@pytest.mark.parametrize("metric", ["prob_diff", "neg_kl", Metric("all positions", lambda logits, a: logits.cumsum(1).amax(-1).sum(1), reads="all")])
def test_metrics(metric: str | Metric) -> None:
    model = model_of("gemma2")
    maps = [scores_of(method, model, swap_task(metric=metric), ("resid_pre", "attn_out", "z")) for method in (pl.ActivationPatching(), LITERAL)]
    assert largest_difference(*maps) < 1e-5


@pytest.mark.slow
def test_several_lengths_named_positions_and_different_first_differences() -> None:
    model = model_of("qwen3")
    # of the last one, all pairs differ at position 4, and one of them does before
    pairs = ((pair(6, (1,), 1), pair(6, (4,), 2)), (pair(6, (1, 4), 1), pair(6, (4,), 2)))
    for task in (mixed_task(), *(Task("two", two, METRICS["logit_diff"]) for two in pairs)):
        maps = [scores_of(method, model, task, ("resid_pre", "attn_out", "z[layer,pos,head]", "k")) for method in (pl.ActivationPatching(), LITERAL)]
        assert largest_difference(*maps) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "edits",
    [
        [Edit("L1.resid_pre", pl.sources.noise(0.3), op="add")],
        [Edit("L2.attn_out@2", pl.sources.noise(0.3), op="add"), Edit("L0.H1.z", 2.0, op="scale")],
        [Edit("L1.pattern@END", 0.1)],
        [Edit("input@1", pl.sources.zero())],
        [Edit("L2.resid_mid", 0.5, op="scale"), Edit("L2.mlp_out@END", pl.sources.zero())],
    ],
    ids=lambda edits: "+".join(str(edit.address) for edit in edits),
)
def test_surrounding_edits(edits: list[Edit]) -> None:
    model = model_of("gpt2")
    with pl.intervene(model, edits):
        maps = [
            scores_of(method, model, swap_task(), ("resid_pre", "resid_mid", "mlp_out", "z[layer,pos,head]"))
            for method in (pl.ActivationPatching(), LITERAL)
        ]
    assert maps[0].provenance["engine"] == "prefix"
    assert largest_difference(*maps) < 1e-5


def _program(model: Any, task: Task) -> tuple[Program, Any]:
    (batch,) = task.batches()
    keep = tuple((kind, layer) for kind in ("resid_pre", "attn_out", "z", "mlp_out") for layer in range(LAYERS))
    source = run(model, Program(batch.clean, batch.examples, keep=keep)).as_source()
    return Program(batch.corrupted, batch.examples, metric=task.metric, answers=batch.answers), source


def test_cells_of_several_edits_in_any_order() -> None:
    model = model_of("llama")
    program, source = _program(model, swap_task())
    cells = [
        (Edit("L2.H0.z@4", source), Edit("L0.attn_out@2", pl.sources.zero())),
        (Edit("L1.resid_pre@1,3", source, op="add"),),
        (Edit("L0.mlp_out@3", source), Edit("L0.attn_out@3", source)),
        (Edit("L1.mlp_out", 0.5, op="scale"), Edit("L2.resid_pre@END", source), Edit("L2.resid_pre@END", 2.0, op="scale")),
    ]
    positions = {"END": torch.full((3,), 4)}
    program = replace(program, positions=positions)
    expected = torch.stack([run(model, replace(program, edits=cell)).values for cell in cells])
    for options in ({}, {"prefix": False}, {"max_tokens": 1}):
        torch.testing.assert_close(sweep(model, program, cells, **options), expected, atol=1e-5, rtol=0)


def _work(cells: list[tuple[Edit, ...]], **options: Any) -> Work:
    model = model_of("gpt2")
    program, _ = _program(model, swap_task())
    work = Work()
    sweep(model, program, cells, work=work, **options)
    return work


def test_only_what_a_patch_can_change_is_computed() -> None:
    rows, length = 3, 5
    # a residual patch at position 3 of layer 1: layers 1 and 2, positions 3 and 4
    assert _work([(Edit("L1.resid_pre@3", pl.sources.zero()),)]).block_positions == 2 * rows * 2
    # an MLP output changes its own layer at its own position only, then everything after it
    assert _work([(Edit("L1.mlp_out@3", pl.sources.zero()),)]).block_positions == rows * (1 + 2)
    # all positions of a head: everything from its layer on, but for the part of the prompt that is known not to differ
    assert _work([(Edit("L1.H0.z", pl.sources.zero()),)]).block_positions == 2 * rows * length
    assert _work([(Edit("L1.H0.z", pl.sources.zero()),)], start=3).block_positions == 2 * rows * 2
    # without keys and values of the baseline, whole sequences
    assert _work([(Edit("L1.resid_pre@3", pl.sources.zero()),)], prefix=False).block_positions == 2 * rows * length


def test_a_sweep_is_one_forward_pass_and_its_cells() -> None:
    work = _work([(Edit(f"L{layer}.resid_pre@{pos}", pl.sources.zero()),) for layer in range(LAYERS) for pos in range(5)])
    assert (work.forwards, work.cells) == (1, 15)
    assert work.block_positions == 3 * sum((LAYERS - layer) * (5 - pos) for layer in range(LAYERS) for pos in range(5))


def test_the_cost_of_exact_patching_counts_the_work() -> None:
    model = model_of("gpt2")
    scores = scores_of(pl.ActivationPatching(), model, swap_task(), "resid_pre")
    live = int(scores.live["resid_pre"].sum())
    assert scores.cost.forwards == 2 + live
    rows, length, first = 3, 5, 1
    blocks = sum(rows * (LAYERS - layer) * (length - pos) for layer, pos in np.argwhere(scores.live["resid_pre"].to_numpy()).tolist())
    # the source's run, and the baseline's from the first difference on, which the sweep resumes from
    assert scores.cost.positions == rows * (length + length - first) + round(blocks / LAYERS)


def test_a_model_on_which_the_engines_disagree_falls_back_and_says_why(monkeypatch) -> None:
    model = native_model("odd")
    right = node_sweep.unembed
    monkeypatch.setattr(node_sweep, "unembed", lambda *arguments: right(*arguments) * 1.5)
    assert support(model).mode == "literal"
    assert "does not fill a key-value cache" in support(model).reason
    assert "differs by" in support(model).reason
    maps = [scores_of(method, model, swap_task(), "resid_pre") for method in (pl.ActivationPatching(), LITERAL)]
    assert maps[0].provenance["engine"].startswith("literal (prefix: ")
    assert largest_difference(*maps) == 0


def test_support_is_found_out_once() -> None:
    model = native_model("once")
    session_of(model).found[sweep_key(model)] = Support("literal", "set by hand")
    assert support(model).reason == "set by hand"


def test_a_cell_needs_a_layer_and_a_sweep_a_metric() -> None:
    model = model_of("gpt2")
    program, _ = _program(model, swap_task())
    with pytest.raises(InterventionError, match="needs edits in layers; the input is patched by the literal engine"):
        sweep(model, program, [(Edit("input@2", pl.sources.zero()),)])
    with pytest.raises(InterventionError, match="a sweep evaluates a metric"):
        sweep(model, replace(program, metric=None), [(Edit("L0.z", pl.sources.zero()),)])
    with pytest.raises(MethodError, match="unknown engine 'fast'.*auto, literal"):
        pl.ActivationPatching(engine="fast")


def test_nothing_stays_on_the_model_when_a_metric_fails() -> None:
    model = model_of("gpt2")

    def broken(logits: torch.Tensor, answers: Any) -> torch.Tensor:
        raise RuntimeError("broken on purpose")

    program, source = _program(model, swap_task())
    with pytest.raises(RuntimeError, match="broken on purpose"):
        sweep(model, replace(program, metric=Metric("broken", broken)), [(Edit("L1.attn_out@3", source),)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.bridge.modules() if "HookPoint" in type(module).__name__)
    assert all("forward" not in block.__dict__ for block in model.bridge.blocks)
