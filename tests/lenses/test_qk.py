"""Attention scores taken apart, against the scores of a forward pass and products by hand, by component and by feature."""

import numpy as np
import pytest
import torch
from dictionary_cells import attached, saes
from families import WIDTH, mixed_task, model_of, swap_task
from torch import Tensor

import patchlab as pl
from patchlab import lenses
from patchlab.errors import InterventionError, LensError, ModelError, SiteError
from patchlab.features import identity_dictionary
from patchlab.models import Model
from patchlab.testing.zoo import zoo_model


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


LAYER, HEAD, DEST, SRC = 2, 3, 4, 3


def read_by_hand(model: Model, letter: str, vectors: Tensor, at: int, example: int, tokens: Tensor) -> Tensor:
    """What a head's query or key makes of each vector in a stream, from the papers: norm with its denominator held, weights, norms of queries and
    keys with theirs held, rotation."""
    block = model.bridge.original_model.model.layers[LAYER]
    plain = lambda module: getattr(module, "original_component", module)  # noqa: E731
    norm, attn = plain(block.input_layernorm), plain(block.self_attn)
    offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
    x = model.run(tokens, keep="resid_pre")[f"L{LAYER}.resid_pre"][example, at]
    normed = lambda value, whole, own: value / (whole.square().mean() + 1e-6).sqrt() * (offset + own.weight)  # noqa: E731
    weight = plain(attn.q_proj if letter == "q" else attn.k_proj).weight.unflatten(0, (-1, 4))[HEAD if letter == "q" else HEAD // 2]
    read, whole = normed(vectors, x, norm) @ weight.T, normed(x, x, norm) @ weight.T
    if hasattr(attn, "q_norm"):
        read = normed(read, whole, plain(attn.q_norm if letter == "q" else attn.k_norm))
    angles = at * torch.tensor([1.0, 10000.0**-0.5], dtype=torch.float64).repeat(2)
    turned = torch.cat([-read[:, 2:], read[:, :2]], 1)
    return read * angles.cos() + turned * angles.sin()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_features_of_a_state_make_a_score_by_hand(family: str) -> None:
    """With RoPE, grouped keys, norms of queries and keys, and a soft cap."""
    task = swap_task()
    with attached(family) as model:
        found = lenses.qk_attribution(model, task, f"L{LAYER}.H{HEAD}.pattern@END<{SRC}", by="state")
        prompts = task.prompts("clean")
        states = model.run(prompts, keep="resid_post")[f"L{LAYER - 1}.resid_post"]
        one = saes(model)[LAYER - 1]
        for example in range(len(task)):
            sides = {}
            for letter, at in (("q", DEST), ("k", SRC)):
                features = one.encode(states[example, at])
                active = features.nonzero()[:, 0].tolist()
                rest = torch.stack([states[example, at] - features @ one.w_dec - one.b_dec, one.b_dec])
                vectors = torch.cat([features[active, None] * one.w_dec[active], rest])
                sides[letter] = [f"r1.f{i}" for i in active] + ["r1.error", "r1.bias"], vectors, at
                assert 0 < len(active) < one.n_features
            query, key = sides["q"][0], sides["k"][0]
            q, k = (read_by_hand(model, letter, vectors, at, example, prompts.tokens) for letter, (_, vectors, at) in sides.items())
            pairs = found.pairs(example)
            assert list(pairs["query"].to_numpy()) == [*query, "bias"]
            assert list(pairs["key"].to_numpy()) == [*key, "bias"]
            np.testing.assert_allclose(pairs[:-1, :-1], q @ k.T / 2, atol=1e-6)
            assert not pairs[-1].any()
    score = scores_of_run(model, task, LAYER, HEAD, DEST, SRC)
    np.testing.assert_allclose(found.scores["score"], 50 * (score / 50).atanh() if family == "gemma2" else score, atol=1e-6)
    np.testing.assert_allclose(found.data["pairs"].sum(("query", "key")) + found.data["rest"], found.data["score"], atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp_out", "skip", "cross_layer", "cross_layer_skip", "layer_norm", "resid_pre", "multi_layer", "abstopk"])
def test_features_and_errors_add_up_to_the_components(kind: str) -> None:
    """What the features, errors and biases of a dictionary make together is what the component makes that they stand for, of every kind."""
    task, site = swap_task(), "L2.H1.pattern@END<1"
    by = "state" if kind in ("layer_norm", "resid_pre", "multi_layer", "abstopk") else "feature"
    with attached("gpt2", kind) as model:
        heads = lenses.qk_attribution(model, task, site).table(None, of="query").set_index("query")["score"]
        found = lenses.qk_attribution(model, task, site, by=by)
        table = found.table(None, of="query")
        np.testing.assert_allclose(found.scores["rest"], 0, atol=3e-6)
        made = table.set_index("query")["score"]
        if by == "state":
            assert made.drop("bias").sum() == pytest.approx(heads.drop("bias").sum(), abs=1e-9)
        else:
            same = [name for name in heads.index if name not in ("m0", "m1")]
            assert set(same) < set(made.index)
            np.testing.assert_allclose(made[same], heads[same], atol=1e-9)
            assert made.drop(same).sum() == pytest.approx(heads["m0"] + heads["m1"], abs=1e-9)
        assert table.set_index("query")["score"]["bias"] == pytest.approx(heads["bias"], abs=1e-9)


def test_a_feature_that_writes_to_several_layers_is_one_component() -> None:
    task = swap_task()
    with attached("gpt2", "cross_layer") as model:
        found = lenses.qk_attribution(model, task, "L2.H1.pattern@END<1", by="feature").pairs(0)
        one = model.arch.accessors["features.mlp_out"].point.of[0].dictionary
        kept = model.run(task.prompts("clean"), keep=["features.mlp_out", "resid_pre"])
        feature = int(next(name for name in found["query"].to_numpy() if name.startswith("m0.f")).removeprefix("m0.f"))
        value = float(kept["L0.features.mlp_out"][0, 4, feature])
        block = model.bridge.original_model.transformer.h[2]
        block = getattr(block, "original_component", block)
        norm, read = (
            getattr(part, "original_component", part) for part in (block.ln_1, getattr(block.attn, "original_component", block.attn).c_attn)
        )
        x = kept["L2.resid_pre"][0]
        vector = value * (one.w_dec[feature, 0] + one.w_dec[feature, 1])
        query = (vector - vector.mean()) / (x[4].var(unbiased=False) + 1e-5).sqrt() * norm.weight @ read.weight[:, 4:8]
        key = norm(x[1]) @ read.weight[:, WIDTH + 4 : WIDTH + 8] + read.bias[WIDTH + 4 : WIDTH + 8]
    assert float(found.sel(query=f"m0.f{feature}").sum()) == pytest.approx(float(query @ key) / 2, abs=1e-6)


def test_features_of_both_points_and_their_tables() -> None:
    task = swap_task()
    with attached("gpt2", "mlp_out") as model:
        model.add_dictionaries([identity_dictionary(WIDTH, layer=0, reads="attn_out", dtype=torch.float64)])
        found = lenses.qk_attribution(model, task, "L2.H1.pattern@END<1", by="feature")
    names = set(found.queries.names)
    assert {"a0.f0", "a0.error", "a0.bias", "a1.h0", "attention biases", "m0.error", "m1.bias", "input", "bias"} < names
    assert not names & {"a0.h0", "m0", "m1"}
    mean = found.data["pairs"].mean("example")
    table = found.table(7)
    for _, row in table.iterrows():
        assert row["score"] == pytest.approx(float(mean.sel(query=row["query"], key=row["key"])), abs=1e-12)
    np.testing.assert_allclose(table["score"].abs(), np.sort(np.abs(mean.to_numpy()), axis=None)[::-1][:7])
    for side, other in (("query", "key"), ("key", "query")):
        sums = mean.sum(other)
        first = found.table(1, of=side).iloc[0]
        assert first["score"] == pytest.approx(float(sums.to_numpy()[np.abs(sums.to_numpy()).argmax()]))
        assert float(sums.sel({side: first[side]})) == pytest.approx(first["score"])
    grid = found.grid(3)
    assert grid.shape == (4, 4)
    assert float(grid.sum()) == pytest.approx(float(mean.sum()), abs=1e-9)
    first = np.abs(mean).sum("key")
    assert list(grid["query"].to_numpy()[:3]) == [found.queries.names[i] for i in np.argsort(-first.to_numpy(), kind="stable")[:3]]


def test_means_in_blocks_are_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    with attached("gpt2", "mlp_out") as model:
        found = lenses.qk_attribution(model, swap_task(), "L2.H1.pattern@END<1", by="feature")
    whole = found.table(12), found.table(5, of="key"), found.grid(4)
    monkeypatch.setattr(lenses.qk, "_BLOCK", 3 * len(found.keys.names))
    blocks = found.table(12), found.table(5, of="key"), found.grid(4)
    assert len(list(found._means())) > 3
    assert list(whole[0]["query"]) == list(blocks[0]["query"])
    np.testing.assert_allclose(whole[0]["score"], blocks[0]["score"])
    np.testing.assert_allclose(whole[1]["score"], blocks[1]["score"])
    np.testing.assert_allclose(whole[2], blocks[2])
    monkeypatch.setattr(lenses.qk, "_MOST", 10)
    with pytest.raises(LensError, match=r"do not fit into one array; use table\(\)"):
        _ = found.data


def test_what_has_no_dictionaries_is_refused() -> None:
    task, site = swap_task(), "L1.H0.pattern@END<1"
    for by, says in (("state", "no dictionary on the stream before layer 1"), ("feature", "no dictionaries on attn_out or mlp_out"), ("x", "by")):
        with pytest.raises(LensError, match=says):
            lenses.qk_attribution(model_of("gpt2"), task, site, by=by)
    with attached("gpt2", "some_layers") as model:
        assert lenses.qk_attribution(model, task, "L2.H0.pattern@END<1", by="state").queries.names[-1] == "bias"
        with pytest.raises(LensError, match="before layer 1: on resid_pre of that layer"):
            lenses.qk_attribution(model, task, site, by="state")
        found = lenses.qk_attribution(model, task, "L2.H0.pattern@END<1", by="state")
        with pytest.raises(LensError, match="example is 3"):
            found.pairs(3)
        with pytest.raises(LensError, match="side of a score"):
            found.table(of="keys")
