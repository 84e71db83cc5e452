"""Depth: contributions, skips and maps against blocks that are called one by one, and what is refused."""

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, hf_module, model_of, native_model, swap_task

import patchlab as pl
from patchlab import depth
from patchlab.errors import LensError, SiteError
from patchlab.texts import Texts

LAYERS = 3


def rows(n=3, length=6, seed=0):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


class Literal:
    """A GPT-2 of the zoo, its blocks called one after the other, each with or without what it adds."""

    def __init__(self):
        self.module = hf_module("gpt2", torch.float64).eval()

    def blocks(self, tokens, skipped=None, positions=None, minus=None):
        """States, contributions, probabilities. ``minus`` is (layer, vectors): taken off the input of one layer, and what it adds there is kept."""
        body, length = self.module.transformer, tokens.shape[1]
        mask = torch.full((1, 1, length, length), -math.inf, dtype=torch.float64).triu(1)
        h = body.wte(tokens) + body.wpe(torch.arange(length))
        states, added = [h], []
        for i, block in enumerate(body.h):
            if minus is not None and minus[0] == i:
                h = h - minus[1]
            out = block(h, attention_mask=mask)
            c = (out[0] if isinstance(out, tuple) else out) - h
            added.append(c)
            if skipped == i:
                c = c.clone()
                c[:, slice(None) if positions is None else positions] = 0
            h = h + c
            states.append(h)
        return states, added, self.module.lm_head(body.ln_f(h)).softmax(-1)


@pytest.fixture(scope="module")
def literal():
    return Literal()


@pytest.mark.parametrize("future", [None, 2])
@torch.no_grad()
def test_skip_effects_are_those_of_blocks_that_are_left_out(literal, future):
    model, tokens = model_of("gpt2", torch.float64), rows()
    found = depth.skip_effects(model, tokens, future=future)
    _, plain, p = literal.blocks(tokens)
    start = future or 0
    for s in range(LAYERS):
        _, added, q = literal.blocks(tokens, s, None if future is None else list(range(future)))
        for layer in range(s + 1, LAYERS):
            for row in range(3):
                ratios = [float((plain[layer] - added[layer])[row, t].norm() / plain[layer][row, t].norm()) for t in range(start, 6)]
                assert float(found.data["effect"][row, s, layer]) == pytest.approx(max(ratios), rel=1e-6)
        for row in range(3):
            distances = [float((p - q)[row, t].norm()) for t in range(start, 6)]
            assert float(found.data["output"][row, s]) == pytest.approx(max(distances), rel=1e-6)
            kl = [float((p[row, t] * (p[row, t].log() - q[row, t].log())).sum()) for t in range(start, 6)]
            assert float(found.data["kl"][row, s]) == pytest.approx(sum(kl) / len(kl), rel=1e-6)
    assert np.isnan(found.matrix()[np.tril_indices(LAYERS)]).all()
    np.testing.assert_allclose(found.matrix(), found.data["effect"].max("example"))
    np.testing.assert_allclose(found.matrix("mean"), found.data["effect"].mean("example"))


@pytest.mark.parametrize("future", [None, 4])
@torch.no_grad()
def test_local_effects_take_a_contribution_off_one_input(literal, future):
    model, tokens = model_of("gpt2", torch.float64), rows()
    found = depth.skip_effects(model, tokens, local=True, future=future)
    _, plain, _ = literal.blocks(tokens)
    for s in range(LAYERS):
        for layer in range(s + 1, LAYERS):
            removed = plain[s].clone()
            if future is not None:
                removed[:, future:] = 0
            _, added, _ = literal.blocks(tokens, minus=(layer, removed))
            for row in range(3):
                ratios = [float((plain[layer] - added[layer])[row, t].norm() / plain[layer][row, t].norm()) for t in range(future or 0, 6)]
                assert float(found.data["effect"][row, s, layer]) == pytest.approx(max(ratios), rel=1e-6)
    assert "output" not in found.data


@torch.no_grad()
def test_before_the_skipped_positions_nothing_can_change():
    """Skipped at later positions only, a causal model's earlier tokens are as they were."""
    model, tokens = model_of("llama", torch.float64), rows()
    changed = model.run(tokens, edits=list(depth.skip(model, 1, [4, 5]))).logits
    plain = model.run(tokens).logits
    torch.testing.assert_close(changed[:, :4], plain[:, :4])
    assert not torch.allclose(changed[:, 4:], plain[:, 4:])
    assert depth.skip(model, 1, []) == ()


@torch.no_grad()
def test_contributions_are_norms_and_cosines(literal):
    model, tokens = model_of("gpt2", torch.float64), rows()
    found = depth.contributions(model, tokens, skip_first=1)
    states, added, _ = literal.blocks(tokens)
    for layer in range(LAYERS):
        norms, cosines = [], []
        for row in range(3):
            for t in range(1, 6):
                c, h = added[layer][row, t], states[layer][row, t]
                norms.append(float(c.norm() / h.norm()))
                cosines.append(float(c @ h / (c.norm() * h.norm())))
        assert found["layer_norm"][layer] == pytest.approx(sum(norms) / len(norms), rel=1e-6)
        assert found["layer_cosine"][layer] == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)
    run = model.run(tokens, keep=["resid_pre", "resid_mid", "attn_out", "mlp_out"])
    for layer in range(LAYERS):
        a, m, h, mid = (run[f"L{layer}.{kind}"][:, 1:] for kind in ("attn_out", "mlp_out", "resid_pre", "resid_mid"))
        assert found["attention_norm"][layer] == pytest.approx(float((a.norm(dim=-1) / h.norm(dim=-1)).mean()), rel=1e-6)
        assert found["mlp_norm"][layer] == pytest.approx(float((m.norm(dim=-1) / mid.norm(dim=-1)).mean()), rel=1e-6)


@torch.no_grad()
def test_an_mlp_beside_attention_is_compared_with_the_stream_that_it_reads():
    model, tokens = model_of("neox", torch.float64), rows()
    run = model.run(tokens, keep=["resid_pre", "mlp_out"])
    found = depth.contributions(model, tokens)
    for layer in range(LAYERS):
        ratio = run[f"L{layer}.mlp_out"].norm(dim=-1) / run[f"L{layer}.resid_pre"].norm(dim=-1)
        assert found["mlp_norm"][layer] == pytest.approx(float(ratio.mean()), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_skipped_layer_leaves_the_stream_as_it_was_on_every_family(family):
    model, tokens = model_of(family, torch.float64), rows()
    run = model.run(tokens, edits=list(depth.skip(model, [1])), keep=["resid_pre", "resid_post"])
    torch.testing.assert_close(run["L1.resid_post"], run["L1.resid_pre"], rtol=0, atol=1e-12)
    assert depth.skip_effects(model, tokens).matrix().shape == (LAYERS, LAYERS)


@torch.no_grad()
def test_models_without_an_mlp_have_attention_to_skip():
    model = native_model("attention-only", dtype=torch.float64, attn_only=True)
    assert {edit.address.kind for edit in depth.skip(model, 0)} == {"attn_out"}
    assert depth.contributions(model, rows()).names == ("attention_norm", "layer_norm", "attention_cosine", "layer_cosine")


@torch.no_grad()
def test_layer_influence_is_a_cosine_and_a_divergence(literal):
    model, tokens = model_of("gpt2", torch.float64), rows()
    found = depth.layer_influence(model, tokens)
    states, _, p = literal.blocks(tokens)
    for layer in range(LAYERS):
        before, after = states[layer], states[layer + 1]
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found["lim"][layer] == pytest.approx(-float(cosine.mean()), rel=1e-6)
        q = literal.blocks(tokens, layer)[2]
        assert found["skip_kl"][layer] == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-6)


def test_active_layers_by_hand():
    norms = torch.tensor([1.0, 4, 5, 7, 7, 6.5, 9])[None, :, None]
    # Δ = 3, 1, 2, 0, −0.5, 2.5; ranges before: -, 0, 2, 2, 3, 3.5
    assert depth.active_layers(norms, 0.8)[0, :, 0].tolist() == [True, True, True, False, False, False]
    assert depth.active_layers(norms, 0.5)[0, :, 0].tolist() == [True, True, True, False, False, True]
    assert depth.active_layers(norms, 0)[0, :, 0].tolist() == [True, True, True, True, False, True]


@torch.no_grad()
def test_voids_are_skipped_or_read_out(literal):
    model, tokens = model_of("gpt2", torch.float64), rows()
    states, _, _ = literal.blocks(tokens)
    active = depth.void_mask(model, tokens, 0.3)
    torch.testing.assert_close(active, depth.active_layers(torch.stack([h.norm(dim=-1) for h in states], 1), 0.3))
    active = torch.rand(active.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    active[0, :, 0] = False
    run = model.run(tokens, edits=list(depth.skip_inactive(model, active)), keep=["resid_pre", "resid_post"])
    for layer in range(LAYERS):
        same = (run[f"L{layer}.resid_post"] - run[f"L{layer}.resid_pre"]).abs().amax(-1) < 1e-12
        assert torch.equal(same, ~active[:, layer])
    read = depth.read_last_active(model, tokens, active)
    body = literal.module.transformer
    for row in range(3):
        for t in range(6):
            last = max((layer + 1 for layer in range(LAYERS) if active[row, layer, t]), default=0)
            torch.testing.assert_close(read[row, t], literal.module.lm_head(body.ln_f(states[last][row, t])), rtol=1e-5, atol=1e-5)
    control = depth.shuffled(active, seed=3)
    assert torch.equal(control.sum(1), active.sum(1))
    assert not torch.equal(control, active)


def test_a_model_maps_to_itself_and_only_to_it():
    model, other = model_of("gpt2"), model_of("llama")
    texts = Texts("random", tuple(np.random.default_rng(i).integers(0, VOCAB, 12) for i in range(40)))
    own = depth.maps_between(model, model, texts)
    assert own.dims == ("layer", "to_layer")
    np.testing.assert_allclose(np.diag(own), 1, atol=1e-4)
    across = depth.maps_between(model, other, texts)
    assert float(across.max()) < 0.99
    assert pl.plots.layer_grid(across).layout.title.text is None


def test_the_heatmap_shows_the_effects():
    from patchlab.plots._skip_effects import _prepare_skip_effects

    found = depth.skip_effects(model_of("gpt2"), swap_task(), future=2)
    data = _prepare_skip_effects(found, "mean")
    np.testing.assert_array_equal(data.values, found.matrix("mean"))
    assert data.hover[0, 0] == ""
    assert data.hover[0, 2].startswith("<b>skipped layer 0, later layer 2</b><br>")
    assert "position 2" in data.subtitle[-1]
    heat = pl.plots.skip_effects(found, "mean").data[0]
    np.testing.assert_array_equal(heat.z, data.values)
    table = found.table()
    assert len(table) == LAYERS * (LAYERS - 1) // 2
    assert float(table.iloc[1]["mean"]) == found.matrix("mean")[0, 2]


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda model: depth.skip(model, [3]), "from 0 to 2"),
        (lambda model: depth.skip(model, []), "at least one"),
        (lambda model: depth.skip_effects(model, rows(), future=6), "give 1 to 5"),
        (lambda model: depth.skip_effects(model, rows()).matrix("median"), "'max' or their 'mean'"),
        (lambda model: depth.contributions(model, rows(), skip_first=6), "no position after"),
        (lambda model: depth.void_mask(model, rows(), -1.0), "alpha is -1"),
        (lambda model: depth.maps_between(model, model, rows(1)), "cannot be cut"),
        (lambda model: pl.plots.layer_grid(depth.skip_effects(model, rows()).data["effect"]), "two axes"),
    ],
)
def test_what_cannot_be_done_is_refused(ask, says):
    with pytest.raises(LensError, match=says):
        ask(model_of("gpt2"))


def test_sites_that_a_model_lacks_are_named():
    model = model_of("gpt2")
    with pytest.raises(SiteError, match="layer 7"):
        model.run(rows(), edits=[pl.Edit("L7.attn_out", 0.0)])
