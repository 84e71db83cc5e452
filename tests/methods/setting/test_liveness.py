"""Structural zeros: cells declared dead are patched for real and do nothing; hand-written masks say which cells are alive."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, LAYERS, mixed_task, model_of, native_model, pair, scores_of, swap_task

import patchlab as pl
from patchlab.engine import Program, run
from patchlab.interventions import Edit
from patchlab.methods.cells import cells_of
from patchlab.methods.cells.nodes import addresses
from patchlab.methods.setting.liveness import live_cells, without_path
from patchlab.methods.setting.setting import Setting
from patchlab.metrics import METRICS, Metric
from patchlab.models import Model
from patchlab.sites import POSITION_AXES, Site
from patchlab.sources import Average, Kept
from patchlab.tasks.task import Pair, Task

SITES = (
    "input",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "z[layer,pos]",
    "z[layer,pos,head]",
    "q[layer,pos]",
    "k[layer,pos,kv_head]",
    "v[layer,pos]",
    "pattern[layer,dest]",
    "pattern[layer,dest,src]",
    "pattern[layer,head,src]",
    "mlp_post[layer,pos]",
)


def _dead_effects(model: Model, task: Task, direction: str, source: str = "paired") -> tuple[dict[str, float], dict[str, int]]:
    """Largest |effect| of the cells declared dead, each patched with one forward pass, and how many there were."""
    everything = tuple((kind, layer) for kind in model.arch.sites for layer in ([None] if kind == "input" else range(model.arch.n_layers)))
    worst, number = {}, {}
    for name in SITES:
        site = Site.parse(name)
        if site.kind in model.arch.absent:
            continue
        axis = task.position_axis() if set(site.axes) & set(POSITION_AXES) else None
        live = live_cells(model.arch, site, task, axis, paired=source == "paired")
        dead = [where for _, where in addresses(Setting(model, task, (site,), "denoising", axis, {}), site, ~live)]
        worst[name], number[name] = 0.0, len(dead)
        for batch in task.batches():
            tokens, others = (batch.corrupted, batch.clean) if direction == "denoising" else (batch.clean, batch.corrupted)
            named = batch.positions
            shared = {"positions": named, "metric": task.metric}
            own = run(model, Program(tokens, batch.examples, answers=batch.answers, **shared)).values
            activations = run(model, Program(others, batch.examples, keep=everything)).activations
            what = Kept(activations, batch.examples)
            if source == "mean":
                what = Average({key: value.mean((0, 1))[None] for key, value in activations.items() if key[0] != "pattern"})
            if site.kind == "pattern" and source == "mean":
                continue
            # all dead cells as rows of one batch: each row is one example with one cell patched
            for start in range(0, len(dead), 64):
                chunk = dead[start : start + 64]
                rows = len(chunk) * len(batch)
                which = torch.arange(rows) // len(batch)
                edits = tuple(Edit(where, what, rows=which == i) for i, where in enumerate(chunk))
                repeated = torch.arange(len(batch)).repeat(len(chunk))
                positions = {key: value[repeated] for key, value in named.items()}
                program = Program(
                    tokens[repeated], batch.examples[repeated], positions, edits, metric=task.metric, answers=batch.answers.rows(repeated)
                )
                effect = run(model, program).values - own[repeated]
                worst[name] = max(worst[name], float(effect.abs().max()))
    return worst, number


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dead_cells_have_no_effect_when_patched_for_real(family: str, direction: str) -> None:
    model, task = model_of(family), swap_task(n=2, length=5, changed=(1, 3))
    worst, number = _dead_effects(model, task, direction)
    assert max(worst.values()) < 1e-5, worst
    assert all(number[name] > 0 for name in number if name not in ("z", "pattern[layer,head,src]")), number


def test_dead_cells_have_no_effect_with_changes_that_differ_between_examples() -> None:
    pairs = (pair(5, (2,), 1), pair(5, (1,), 2), pair(5, (1, 4), 3))
    for family in ("gpt2", "neox"):
        worst, number = _dead_effects(model_of(family), Task("several", pairs, METRICS["logit_diff"]), "denoising")
        assert max(worst.values()) < 1e-5
        assert sum(number.values()) > 0


def test_dead_cells_have_no_effect_at_named_positions() -> None:
    worst, number = _dead_effects(model_of("llama"), mixed_task(), "noising")
    assert max(worst.values()) < 1e-5
    assert sum(number.values()) > 0


def test_dead_cells_have_no_effect_with_a_mean() -> None:
    """With a source that is not paired only the graph decides: nothing but the answer's position after the last attention."""
    worst, number = _dead_effects(model_of("gpt2"), swap_task(n=2), "denoising", source="mean")
    assert max(worst.values()) < 1e-5
    assert number["resid_post"] == 4
    assert number["resid_pre"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Masks by hand: 3 layers, prompts of 5 tokens that differ at positions 1 and 3, the metric reads position 4.

N, Y = False, True
EVERYWHERE_AFTER = [N, Y, Y, Y, Y]
CHANGED = [N, Y, N, Y, N]
LAST = [N, N, N, N, Y]
NOWHERE = [N, N, N, N, N]
BY_POSITION = {
    "resid_pre": [CHANGED, EVERYWHERE_AFTER, EVERYWHERE_AFTER],
    "resid_mid": [EVERYWHERE_AFTER, EVERYWHERE_AFTER, LAST],
    "resid_post": [EVERYWHERE_AFTER, EVERYWHERE_AFTER, LAST],
    "attn_out": [EVERYWHERE_AFTER, EVERYWHERE_AFTER, LAST],
    "mlp_out": [EVERYWHERE_AFTER, EVERYWHERE_AFTER, LAST],
    "z[layer,pos]": [EVERYWHERE_AFTER, EVERYWHERE_AFTER, LAST],
    "q[layer,pos]": [CHANGED, EVERYWHERE_AFTER, LAST],
    "k[layer,pos]": [CHANGED, EVERYWHERE_AFTER, EVERYWHERE_AFTER],
    "v[layer,pos]": [CHANGED, EVERYWHERE_AFTER, EVERYWHERE_AFTER],
    "mlp_post[layer,pos]": [EVERYWHERE_AFTER, EVERYWHERE_AFTER, LAST],
    "pattern[layer,dest]": [EVERYWHERE_AFTER, EVERYWHERE_AFTER, LAST],
}


def _mask(model: Model, name: str, task: Task, *, paired: bool = True) -> list:
    site = Site.parse(name)
    axis = task.position_axis() if set(site.axes) & set(POSITION_AXES) else None
    return live_cells(model.arch, site, task, axis, paired=paired).tolist()


@pytest.mark.parametrize("name", BY_POSITION)
def test_masks_by_hand(name: str) -> None:
    assert _mask(model_of("gpt2"), name, swap_task()) == BY_POSITION[name]


@pytest.mark.parametrize("name", [name for name in BY_POSITION if name != "resid_mid"])
def test_masks_of_parallel_blocks(name: str) -> None:
    """The MLP of a parallel block reads the same stream as its attention: position-local in layer 0."""
    expected = {"mlp_out": [CHANGED, EVERYWHERE_AFTER, LAST], "mlp_post[layer,pos]": [CHANGED, EVERYWHERE_AFTER, LAST]}.get(name, BY_POSITION[name])
    assert _mask(model_of("neox"), name, swap_task()) == expected
    assert _mask(model_of("neox-sequential"), name, swap_task()) == BY_POSITION[name]


def test_mask_of_the_input_and_of_attention_edges() -> None:
    model, task = model_of("gpt2"), swap_task()
    assert _mask(model, "input", task) == CHANGED
    by_edge = np.array(_mask(model, "pattern[layer,dest,src]", task))
    for dest in range(5):
        expected = [src <= dest and dest >= 1 for src in range(5)]
        assert by_edge[0, dest].tolist() == expected
        assert by_edge[2, dest].tolist() == (expected if dest == 4 else NOWHERE)
    # jointly over positions a head is alive as soon as one of its positions is
    assert np.array(_mask(model, "z", task)).all()
    assert cells_of(Site.parse("k")).shape(model.arch, Site.parse("k[layer,pos,kv_head]"), task.position_axis()) == (3, 5, 4)
    assert cells_of(Site.parse("k")).shape(model_of("llama").arch, Site.parse("k"), None) == (3, 2)


def test_prefix_counts_over_all_examples() -> None:
    """A cell is dead only if it is dead for every example."""
    task = Task("two", (pair(5, (3,), 1), pair(5, (2,), 2)), swap_task().metric)
    model = model_of("gpt2")
    assert _mask(model, "resid_pre", task) == [[N, N, Y, Y, N], [N, N, Y, Y, Y], [N, N, Y, Y, Y]]
    assert _mask(model, "resid_pre", task.select([0])) == [[N, N, N, Y, N], [N, N, N, Y, Y], [N, N, N, Y, Y]]


@pytest.mark.parametrize("source", ["paired", "zero"])
@pytest.mark.parametrize("sites", [("resid_pre", "z", "z[layer,pos,head]", "pattern[layer,dest,src]"), ("edges",), ("edges[writer,reader,pos]",)])
def test_each_example_has_the_live_cells_it_has_alone(sites: tuple[str, ...], source: str) -> None:
    """Changes at several places, named positions, several lengths: what can matter for an example does not depend on the others."""
    several = Task("several", (pair(5, (2,), 1), pair(5, (1,), 2), pair(5, (2,), 3), pair(5, (1, 4), 4)), swap_task().metric)
    for task in (several, mixed_task()):
        scores = scores_of(pl.AttributionPatching(source=source), model_of("gpt2"), task, sites)
        axis = task.position_axis() if any(set(Site.parse(site).axes) & set(POSITION_AXES) for site in sites) else None
        for site in scores.sites:
            found = scores.live_per_example(site)
            assert (found.any(0) == scores.live[site].to_numpy()).all()
            for e in range(len(task)):
                alone = axis if axis is None else replace(axis, index=axis.index[[e]])
                expected = live_cells(model_of("gpt2").arch, Site.parse(site), task.select([e]), alone, paired=source == "paired")
                np.testing.assert_array_equal(found[e], expected)
            assert not scores.data[site].to_numpy()[~found].any()
        if source == "paired":  # examples with the same changes share a pattern
            assert scores.patterns["pattern_of"].to_numpy().tolist() == ([0, 1, 0, 2] if task is several else [0, 1, 2, 3])


def test_heads_that_read_nothing_new_are_dead_jointly() -> None:
    """Only the answer's token differs: in layer 0 everything happens at position 4, and queries of the last layer stay alive there."""
    task = Task("end", (pair(5, (4,), 1),), swap_task().metric)
    model = model_of("gpt2")
    assert _mask(model, "attn_out", task) == [LAST, LAST, LAST]
    assert _mask(model, "q", task) == [[Y] * 4] * 3
    one = native_model("one layer", n_layers=1)
    assert _mask(one, "q[layer,pos]", Task("start", (pair(5, (0,), 1),), swap_task().metric)) == [NOWHERE]
    assert _mask(one, "q", Task("start", (pair(5, (0,), 1),), swap_task().metric)) == [[N] * 4]


def test_without_pairs_only_the_graph_decides() -> None:
    everywhere = [Y] * 5
    for name, expected in {"resid_pre": [everywhere] * 3, "resid_post": [everywhere, everywhere, LAST], "input": everywhere}.items():
        assert _mask(model_of("gpt2"), name, swap_task(), paired=False) == expected


ALL_POSITIONS = Metric(
    "all positions", lambda logits, answers: logits.gather(-1, answers.correct[:, None].expand(-1, logits.shape[1], -1)).sum((1, 2)), reads="all"
)


def test_a_metric_that_reads_all_positions_keeps_the_last_layer_alive() -> None:
    model, task = model_of("gpt2"), swap_task(metric=ALL_POSITIONS)
    for name, by_layer in BY_POSITION.items():
        expected = [by_layer[0], by_layer[1], EVERYWHERE_AFTER]
        assert _mask(model, name, task) == expected, name
    exact = scores_of(pl.ActivationPatching(), model, task, ["resid_post", "attn_out"])
    assert (np.abs(exact.data["resid_post"].isel(layer=2).to_numpy())[:, 1:] > 1e-4).all()
    answer_only = scores_of(pl.ActivationPatching(), model, swap_task(), "resid_post")
    assert not answer_only.data["resid_post"].isel(layer=2).to_numpy()[:, :4].any()


def test_surrounding_edits_switch_structural_zeros_off() -> None:
    """An edit of the unchanged prefix may make any cell matter: everything is run."""
    model, task = model_of("gpt2"), swap_task(n=1)
    with pl.intervene(model, pl.Edit("L0.attn_out", pl.sources.noise(1.0), op="add")):
        scores = scores_of(pl.ActivationPatching(engine="literal"), model, task, "resid_pre")
    assert scores.live["resid_pre"].to_numpy().all()
    assert scores.cost.forwards == 2 + LAYERS * 5
    assert "no cell is taken as a structural zero" in scores.provenance["notes"][0]


def test_live_cells_do_matter() -> None:
    """The masks are not larger than they have to be: on random models nearly every live cell has an effect."""
    model, task = model_of("gpt2", torch.float64), swap_task()
    scores = scores_of(pl.ActivationPatching(), model, task, ["resid_pre", "mlp_out", "z[layer,pos,head]", "k[layer,pos,kv_head]"])
    for site in scores.sites:
        live = scores.live[site].to_numpy()
        assert (np.abs(scores.data[site].to_numpy()).max(0)[live] > 1e-9).mean() > 0.99, site
        assert not scores.data[site].to_numpy()[:, ~live].any()


# ---------------------------------------------------------------------------------------------------------------------
# Why a cell cannot matter: no path, or the same in both prompts.

L, P, S = "", "no path", "same in both prompts"


def _why(site: str, task: Task, family: str = "gpt2", **options: str) -> list:
    scores = scores_of(pl.AttributionPatching(**options), model_of(family), task, site)
    return scores.zeros(site).to_numpy().tolist()


def test_two_kinds_of_structural_zeros_by_hand() -> None:
    """Tokens differ at 1 and 3 of 0..4; behind the last attention only position 4 is read."""
    task = swap_task()
    assert _why("resid_pre", task) == [[S, L, S, L, S], [S, L, L, L, L], [S, L, L, L, L]]
    assert _why("resid_post", task) == [[S, L, L, L, L], [S, L, L, L, L], [P, P, P, P, L]]
    assert _why("mlp_out", task, "neox") == [[S, L, S, L, S], [S, L, L, L, L], [P, P, P, P, L]], "a parallel MLP reads the input alone"
    assert _why("pattern[layer,dest,src]", task)[2][3] == [P] * 5
    assert _why("pattern[layer,dest,src]", task)[0][0] == [S, P, P, P, P], "the future is never attended to"
    assert _why("resid_post", task, source="zero") == [[L] * 5, [L] * 5, [P, P, P, P, L]], "without pairs nothing is the same"


def test_no_path_holds_in_every_example_and_the_same_wherever_there_is_a_path() -> None:
    two = Task("two", (pair(5, (3,), 1), pair(5, (2,), 2)), swap_task().metric)
    assert _why("resid_post", two) == [[S, S, L, L, L], [S, S, L, L, L], [P, P, P, P, L]]
    # the queries of the only layer are read at the end; the position A is there in the second example alone, with an unchanged token
    model, metric = native_model("one layer", n_layers=1), swap_task().metric
    pairs = (pair(5, (0,), 1, template="a", A=2), pair(3, (0,), 2, template="b", A=2))
    for some, place in ((pairs, 0), (pairs[:1], 2), (pairs[1:], 2)):  # by name where lengths differ (A, END), else by index
        task = Task("roles", some, metric)
        axis, site = task.position_axis(), Site.parse("q[layer,pos]")
        live, cut = live_cells(model.arch, site, task, axis, paired=True), without_path(model.arch, site, task, axis)
        assert np.where(live, L, np.where(cut, P, S))[0, place] == (P if some == pairs[:1] else S)


def test_kinds_of_edges() -> None:
    why = scores_of(pl.AttributionPatching(), model_of("gpt2"), swap_task(changed=(1,)), "edges", direction="noising").zeros("edges")
    graph = model_of("gpt2").arch.graph
    assert (why.to_numpy() == "no edge").tolist() == (~graph.allowed).tolist()
    told = {name: str(why[graph.edge(name)].to_numpy()) for name in ("input->a0.h0<v>", "input->a2.h0<q>", "input->logits", "a0.h0->a2.h0<q>")}
    assert told == {"input->a0.h0<v>": L, "input->a2.h0<q>": S, "input->logits": S, "a0.h0->a2.h0<q>": L}


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_cells_without_a_path_never_matter_and_cells_that_are_the_same_do_when_something_else_is_put_there(family: str) -> None:
    model, task = model_of(family, torch.float64), swap_task(n=2)
    sites = [site for site in ("resid_pre", "resid_post", "mlp_out", "v[layer,pos]") if Site.parse(site).kind not in model.arch.absent]
    why = scores_of(pl.AttributionPatching(), model, task, sites)
    zeroed = scores_of(pl.ActivationPatching(source="zero", engine="literal"), model, task, sites)
    for site in sites:
        kinds, effects = why.zeros(site).to_numpy(), np.abs(zeroed.data[site].to_numpy()).max(0)
        assert set(kinds.ravel()) == ({L, S} if site in ("resid_pre", "v[layer,pos]") else {L, S, P})
        assert not effects[kinds == "no path"].any()
        assert (effects[kinds == "same in both prompts"] > 1e-9).all(), site


def test_surrounding_edits_leave_no_kind() -> None:
    model = model_of("gpt2")
    with pl.intervene(model, pl.Edit("L0.attn_out", pl.sources.noise(1.0), op="add")):
        scores = scores_of(pl.AttributionPatching(), model, swap_task(n=1), "resid_post")
    assert set(scores.zeros("resid_post").to_numpy().ravel()) == {""}


def test_prompts_of_one_token_and_changes_at_the_start() -> None:
    model = model_of("gpt2")
    task = Task("one token", (Pair((3,), (4,), (5,), (6,)),), swap_task().metric)
    for name in ("resid_pre", "resid_post", "attn_out"):
        assert _mask(model, name, task) == [[Y], [Y], [Y]]


def test_a_sliding_window_leaves_cells_alive() -> None:
    """Gemma-2's window makes some of these cells exactly zero, but neither ids nor the graph of blocks say so."""
    model, task = model_of("gemma2"), swap_task(n=2, length=6, changed=(0,))
    assert _mask(model, "resid_pre", task)[2] == [Y] * 6
