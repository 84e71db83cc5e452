"""Attention patterns and their statistics by hand; attention scores taken apart, against the scores of a forward pass."""

import numpy as np
import pytest
import torch
from families import HEADS, LAYERS, WIDTH, mixed_task, model_of, swap_task

import patchlab as pl
from patchlab import lenses
from patchlab.errors import InterventionError, LensError, ModelError, SiteError
from patchlab.lenses import Attention
from patchlab.testing.zoo import zoo_model


def test_patterns_are_those_of_the_run():
    model, task = model_of("llama"), swap_task()
    found = lenses.attention(model, task, side="corrupted", batch_size=2)
    kept = model.run(task.prompts("corrupted"), keep="pattern")
    for layer in range(LAYERS):
        np.testing.assert_allclose(found.patterns.sel(layer=layer), kept[f"L{layer}.pattern"], atol=1e-6)
    np.testing.assert_array_equal(found.pattern("a1.h2", 1), found.pattern("L1.H2", 1))
    np.testing.assert_allclose(found.pattern("a1.h2", None), kept["L1.pattern"][:, 2].mean(0), atol=1e-6)
    assert list(found.patterns["src_token"].to_numpy()[2]) == [f"[{token}]" for token in task.pairs[2].corrupted_ids]


def made(rows, mass=0.9):
    """Attention of one head of one layer on one example."""
    import xarray as xr

    patterns = np.array(rows, dtype=float)[None, None, None]
    texts = np.array([["a", "b", "c", "d"]], dtype=object)
    coords = {"layer": [0], "token": (("example", "dest"), texts), "src_token": (("example", "src"), texts)}
    return Attention("made", xr.DataArray(patterns, dims=("example", "layer", "head", "dest", "src"), coords=coords), {"END": np.array([3])}, mass)


def test_statistics_by_hand():
    rows = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0.6, 0.3, 0.1, 0]]
    found = {name: part[0, 0, 0] for name, part in made(rows).statistics().items()}
    np.testing.assert_allclose(found["entropy"], [0, np.log(2), 0, -(0.6 * np.log(0.6) + 0.3 * np.log(0.3) + 0.1 * np.log(0.1))])
    np.testing.assert_allclose(found["effective"][:3], [1, 2, 1])
    np.testing.assert_array_equal(found["count"], [1, 2, 1, 2])
    np.testing.assert_allclose(found["share"], [1, 1, 1 / 3, 0.5])
    np.testing.assert_array_equal(made(rows, 0.95).statistics()["count"][0, 0, 0], [1, 2, 1, 3])


def test_means_at_a_position():
    model, task = model_of("gpt2"), mixed_task().select([0, 2])
    found = lenses.attention(model, task)
    statistics = found.statistics()["effective"].to_numpy()
    np.testing.assert_allclose(found.at("effective", "A"), (statistics[0, :, :, 1] + statistics[1, :, :, 3]) / 2)
    np.testing.assert_allclose(found.at("effective", -1), found.at("effective"))
    table = found.table()
    assert list(table["head"][:5]) == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "a1.h0"]
    assert len(table) == LAYERS * HEADS


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda found: found.pattern("a9.h0"), "no head 'a9.h0'"),
        (lambda found: found.pattern("x"), "no head 'x'"),
        (lambda found: found.pattern("a0.h0", 7), "example is 7"),
        (lambda found: found.at("spread"), "unknown statistic"),
        (lambda found: found.at("entropy", "S9"), "position 'S9'"),
        (lambda found: found.at("entropy", 5), "outside"),
    ],
)
def test_what_is_not_there_is_refused(ask, says):
    with pytest.raises(LensError, match=says):
        ask(lenses.attention(model_of("gpt2"), swap_task()))


def test_patterns_that_do_not_line_up_or_do_not_exist_are_refused():
    with pytest.raises(LensError, match="do not line up"):
        lenses.attention(model_of("gpt2"), mixed_task())
    with pytest.raises(SiteError, match="pattern"):
        lenses.attention(zoo_model("gpt-j"), swap_task())
    with pytest.raises(LensError, match="mass is 1"):
        lenses.attention(model_of("gpt2"), swap_task(), mass=1.0)


def scores_of_run(model, task, layer, head, dest, src):
    """The scores that a forward pass shows."""
    from patchlab.engine import Program, run

    prompts = task.prompts("clean")
    hook = f"blocks.{layer}.attn.hook_attn_scores"
    return run(model, Program(prompts.tokens, prompts.examples, hooks=(hook,))).hooks[hook][:, head, dest, src]


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "qwen2", "qwen3", "gemma2", "bloom", "cohere", "olmo2", "granite", "gemma3", "mpt"])
def test_pairs_add_up_to_the_score(family):
    """With RoPE, grouped keys, norms of queries and keys (denominators held), norms after the attention, soft caps and ALiBi."""
    model, task = zoo_model(family, torch.float64), swap_task()
    found = lenses.qk_attribution(model, task, "L2.H3.pattern@END<3").data
    score = scores_of_run(model, task, 2, 3, 4, 3)
    if family == "gemma2":
        score = 50 * (score / 50).atanh()
    np.testing.assert_allclose(found["score"], score, atol=1e-6)
    np.testing.assert_allclose(found["pairs"].sum(("query", "key")) + found["rest"], found["score"], atol=1e-9)
    if family in ("bloom", "mpt"):  # the bias of ALiBi, which is the same for all prompts
        assert float(found["rest"].max() - found["rest"].min()) < 1e-6
        assert float(abs(found["rest"][0])) > 1e-3
    else:
        np.testing.assert_allclose(found["rest"], 0, atol=3e-6)


def test_pairs_by_hand():
    model, task = model_of("gpt2", torch.float64), swap_task()
    found = lenses.qk_attribution(model, task, "L1.H2.pattern@END<1")
    kept = model.run(task.prompts("clean"), keep=["resid_pre", "input", "z", "mlp_out"])
    block = model.bridge.original_model.transformer.h[1]
    block = getattr(block, "original_component", block)
    norm, read = (getattr(part, "original_component", part) for part in (block.ln_1, getattr(block.attn, "original_component", block.attn).c_attn))
    write = model.bridge.original_model.transformer.h[0].attn.c_proj
    write = getattr(write, "original_component", write)
    x = kept["L1.resid_pre"]
    scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def reads(value, at, offset):
        part = (value - value.mean(-1, keepdim=True)) / scale * norm.weight
        return part[:, at] @ read.weight[:, offset + 8 : offset + 12]

    names = list(found.data["query"].to_numpy())
    assert names == ["input", "positions", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "attention biases", "bias"]
    head = kept["L0.H1.z"] @ write.weight[4:8]
    bias = norm.bias @ read.weight[:, WIDTH + 8 : WIDTH + 12] + read.bias[WIDTH + 8 : WIDTH + 12]
    pairs = found.data["pairs"].to_numpy()
    place = {name: i for i, name in enumerate(names)}
    expected = (reads(head, 4, 0) * reads(kept["L0.mlp_out"], 1, WIDTH)).sum(-1) / 2
    np.testing.assert_allclose(pairs[:, place["a0.h1"], place["m0"]], expected, atol=1e-12)
    np.testing.assert_allclose(pairs[:, place["input"], place["bias"]], (reads(kept["input"], 4, 0) * bias).sum(-1) / 2, atol=1e-12)
    assert len(found.table(5)) == 5
    assert found.table(1)["score"][0] == pytest.approx(float(pairs.mean(0).flat[np.abs(pairs.mean(0)).argmax()]))


def test_named_positions_of_mixed_prompts():
    model, task = model_of("gpt2", torch.float64), mixed_task()
    found = lenses.qk_attribution(model, task, "L1.H0.pattern@END<A").data
    for example, pair in enumerate(task.pairs):
        alone = lenses.qk_attribution(model, task.select([example]), f"L1.H0.pattern@-1<{pair.positions['A']}").data
        np.testing.assert_allclose(found["pairs"][example], alone["pairs"][0], atol=1e-12)


@pytest.mark.parametrize(
    ("family", "site", "error", "says"),
    [
        ("gpt2", "L1.H0.z", SiteError, "between two positions"),
        ("gpt2", "L1.H0.pattern@END", SiteError, "between two positions"),
        ("gpt2", "L1.H0.pattern@END<S9", SiteError, "no position 'S9'"),
        ("gpt2", "L1.H0.pattern@1<3", SiteError, "does not attend there"),
        ("opt", "L1.H0.pattern@END<1", SiteError, "no site pattern"),
        ("olmo", "L1.H0.pattern@END<1", SiteError, "clamped"),
        ("mistral", "L1.H0.pattern@END<0", SiteError, "outside of its window"),
        ("deepseek-v3", "L1.H0.pattern@END<1", ModelError, "not known"),
    ],
)
def test_scores_that_cannot_be_taken_apart_are_refused(family, site, error, says):
    with pytest.raises(error, match=says):
        lenses.qk_attribution(zoo_model(family), swap_task(), site)


def test_a_softmax_that_no_hook_reaches_is_noticed():
    with pytest.raises(SiteError, match="does not show the scores"):
        lenses.qk_attribution(model_of("native"), swap_task(), "L1.H0.pattern@END<1")


def test_edits_around_a_score_are_refused():
    model = model_of("gpt2")
    with pl.intervene(model, pl.Edit("L0.mlp_out", pl.sources.zero())), pytest.raises(InterventionError, match="outside of the block"):
        lenses.qk_attribution(model, swap_task(), "L1.H0.pattern@END<1")
