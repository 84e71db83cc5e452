"""Fits of lenses against literal twins, and their files."""

import json

import numpy as np
import pytest
import torch
from families import model_of, native_model, swap_task
from transformer_lens.tools.analysis import JacobianLens
from transformer_lens.tools.analysis.jacobian_lens import _jacobian_for_prompt, _ordinary_vjp

import patchlab as pl
from patchlab import lenses
from patchlab.errors import InterventionError, LensError, OutputError, RuleError
from patchlab.lenses import LinearMap, Readout
from patchlab.rules import get_composite
from patchlab.testing.zoo import LAYERS, VOCAB, WIDTH, zoo_model


def rows(n=5, length=7, seed=0):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def literal_jacobian(model, tokens, layer, skip):
    """Mean over source positions of the effect on all later ones, by central differences of whole runs, one dimension after another."""
    length, step, total = tokens.shape[1], 1e-6, 0.0
    places = range(skip, length - 1)
    for row in tokens:
        own = model.run(row[None], keep=f"L{layer}.resid_post")[f"L{layer}.resid_post"]
        found = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for t in places:
            moved = own.repeat(2 * WIDTH, 1, 1)
            moved[:WIDTH, t] += step * torch.eye(WIDTH)
            moved[WIDTH:, t] -= step * torch.eye(WIDTH)
            after = model.run(row.expand(2 * WIDTH, -1), edits=[pl.Edit(f"L{layer}.resid_post", moved)], keep="L2.resid_post")["L2.resid_post"]
            effect = after[:, list(places)].sum(1)
            found += (effect[:WIDTH] - effect[WIDTH:]).T / (2 * step)
        total = total + found / len(places)
    return total / len(tokens)


def test_the_jacobian_by_differences():
    model, tokens = model_of("gpt2", torch.float64), rows(2, 5)
    lens = lenses.fit_jacobian(model, tokens, skip_first=1, progress=False)
    assert sorted(lens.maps) == [0, 1]
    for layer in (0, 1):
        torch.testing.assert_close(lens.maps[layer].weight, literal_jacobian(model, tokens, layer, 1), rtol=0, atol=1e-8)


def blocks_by_hand(module, x, layers, relevance):
    """Blocks of GPT-2 written out; for the relevance lens with constant denominators and activations as constant factors."""

    def hold(value):
        return value.detach() if relevance else value

    def norm(ln, x):
        return (x - x.mean(-1, keepdim=True)) / hold((x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()) * ln.weight + ln.bias

    def own(part):
        return getattr(part, "original_component", part)

    for layer in layers:
        block = own(module.transformer.h[layer])
        attn, mlp = own(block.attn), own(block.mlp)
        write, read = own(attn.c_proj), own(attn.c_attn)
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(0, 1) for part in (norm(own(block.ln_1), x) @ read.weight + read.bias).split(WIDTH, -1))
        scores = (q @ k.mT / 2).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(-2) @ write.weight + write.bias
        pre = norm(own(block.ln_2), x) @ own(mlp.c_fc).weight + own(mlp.c_fc).bias
        gelu = 0.5 * pre * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (pre + 0.044715 * pre**3)))
        x = x + (pre * (gelu / pre).detach() if relevance else gelu) @ own(mlp.c_proj).weight + own(mlp.c_proj).bias
    return x


@pytest.mark.parametrize("rules", ["gradient", "relp"])
def test_the_jacobian_by_hand(rules):
    model, tokens, skip = model_of("gpt2", torch.float64), rows(2, 5), 1
    lens = lenses.fit_jacobian(model, tokens, rules=rules, skip_first=skip, progress=False)
    places = slice(skip, 4)
    for layer in (0, 1):
        expected = 0
        for row in tokens:
            run = model.run(row[None], keep="resid_post")
            x, last = run[f"L{layer}.resid_post"][0], run["L2.resid_post"][0]
            layers = range(layer + 1, LAYERS)
            module = model.bridge.original_model
            torch.testing.assert_close(blocks_by_hand(module, x, layers, rules == "relp"), last)
            whole = torch.autograd.functional.jacobian(lambda x, o=(module, layers): blocks_by_hand(o[0], x, o[1], rules == "relp"), x)
            expected = expected + whole[places, :, places].sum(0).mean(1)
        torch.testing.assert_close(lens.maps[layer].weight, expected / len(tokens), rtol=0, atol=1e-10)


def test_transformer_lens_fits_the_same():
    model, tokens = model_of("llama"), rows(3, 8)
    ours = lenses.fit_jacobian(model, tokens, skip_first=2, progress=False)
    theirs = [
        _jacobian_for_prompt(model.bridge, row[None], source_layers=[0, 1], dim_batch=4, skip_first_positions=2, backward_provider=_ordinary_vjp)
        for row in tokens
    ]
    for layer in (0, 1):
        torch.testing.assert_close(ours.maps[layer].weight, sum(one[layer] for one in theirs) / 3, rtol=1e-4, atol=1e-5)


def test_the_batch_does_not_matter_and_lengths_mix():
    model = model_of("gpt2", torch.float64)
    mixed = [*rows(2, 6).tolist(), *rows(1, 9, seed=1).tolist()]
    one, all_ = (lenses.fit_jacobian(model, mixed, skip_first=1, batch_size=size, progress=False) for size in (1, None))
    alone = [lenses.fit_jacobian(model, [row], skip_first=1, progress=False).maps[0].weight for row in mixed]
    torch.testing.assert_close(one.maps[0].weight, all_.maps[0].weight)
    torch.testing.assert_close(one.maps[0].weight, sum(alone) / 3)
    cut = lenses.fit_jacobian(model, mixed, skip_first=1, max_length=6, progress=False)
    assert not torch.allclose(cut.maps[0].weight, one.maps[0].weight)


def test_rows_of_a_file_are_texts(tmp_path, demo_gpt2_4l):
    from patchlab import texts

    lines = [demo_gpt2_4l.tokenizer.decode(row[1:20]) for row in texts.sentences(demo_gpt2_4l, 2).rows]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    read = texts.read(tmp_path / "a.txt", demo_gpt2_4l, lines=True)
    lens = lenses.fit_jacobian(demo_gpt2_4l, read, layers=[2], skip_first=1, progress=False)
    again = lenses.fit_jacobian(demo_gpt2_4l, [row.tolist() for row in read.rows], layers=[2], skip_first=1, progress=False)
    torch.testing.assert_close(lens.maps[2].weight, again.maps[2].weight)
    assert lens.provenance["corpus"] == read.name
    with pytest.raises(LensError, match="texts.read"):
        lenses.fit_jacobian(demo_gpt2_4l, str(tmp_path / "a.txt"))


def test_relevance_lenses_leave_norms_of_queries_and_keys_alone():
    """With the pattern held nothing goes through those norms, and without it they keep their derivative."""
    from patchlab.engine.jacobians import state_jacobians

    model, tokens = model_of("qwen3", torch.float64), rows(2, 6)
    valid = torch.tensor([False, True, True, True, True, False])
    lens = lenses.fit_jacobian(model, tokens, rules="relp", skip_first=1, progress=False)
    own = {on: state_jacobians(model, tokens, [0], 2, valid=valid, rules=get_composite("relp"), qk_norms=on).mean(0)[0] for on in (True, False)}
    torch.testing.assert_close(lens.maps[0].weight, own[False])
    assert float((own[True] - own[False]).abs().max()) > 1e-3
    assert lens.provenance["rules"]["include_qk_norms"] is False
    assert lens.name == "relevance lens (relp)"


def test_what_cannot_be_fitted_is_refused():
    model = model_of("gpt2")
    with pytest.raises(LensError, match="rows of 5 tokens.*skip_first=3"):
        lenses.fit_jacobian(model, rows(2, 5))
    with pytest.raises(LensError, match="from 0 to 1"):
        lenses.fit_jacobian(model, rows(), layers=[2])
    with pytest.raises(LensError, match="target_layer is 0"):
        lenses.fit_jacobian(model, rows(), target_layer=0)
    with pytest.raises(LensError, match="at least one"):
        lenses.fit_jacobian(model, [])
    with pytest.raises(RuleError, match="does not cover|cannot cover"):
        lenses.fit_jacobian(zoo_model("qwen3-next"), rows(), rules="relp", skip_first=1, progress=False)
    with pl.intervene(model, pl.Edit("L0.mlp_out", pl.sources.zero())), pytest.raises(InterventionError, match="outside of the block"):
        lenses.fit_jacobian(model, rows(), skip_first=1, progress=False)


def test_a_target_before_the_last_layer():
    model = model_of("gpt2", torch.float64)
    lens = lenses.fit_jacobian(model, rows(), target_layer=1, skip_first=1, progress=False)
    assert list(lens.maps) == [0]
    assert lens.layers(model) == (0, 1, 2)
    found = lens.read(model, swap_task()).data
    plain = lenses.logit_lens().read(model, swap_task()).data
    np.testing.assert_array_equal(found["kl"].sel(layer=[1, 2]), plain["kl"].sel(layer=[1, 2]))


def test_linear_maps_are_least_squares_on_the_rows_that_are_not_held_out():
    model, tokens = model_of("gpt2", torch.float64), rows(40, 7)
    lens = lenses.fit_linear(model, tokens, held_out=0.25, ridge=0.0, skip_first=1, progress=False)
    held = np.random.default_rng(0).permutation(40)[:10]
    kept = np.setdiff1d(np.arange(40), held)

    def states(which, layer):
        return model.run(tokens[which], keep=f"L{layer}.resid_post")[f"L{layer}.resid_post"][:, 1:].reshape(-1, WIDTH).numpy()

    for layer in (0, 1):
        x, y = states(kept, layer), states(kept, 2)
        solution = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
        np.testing.assert_allclose(lens.maps[layer].weight, solution[:-1].T, atol=1e-8)
        np.testing.assert_allclose(lens.maps[layer].bias, solution[-1], atol=1e-8)
        x, y = states(held, layer), states(held, 2)
        mapped = np.c_[x, np.ones(len(x))] @ solution
        quality = lens.quality.set_index("layer").loc[layer]
        assert quality["r2"] == pytest.approx(1 - ((mapped - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())
        model_p, lens_p = (lenses.logit_lens().logits(model, torch.as_tensor(part), 2).log_softmax(-1) for part in (y, mapped))
        assert quality["kl"] == pytest.approx(float((model_p.exp() * (model_p - lens_p)).sum(-1).mean()), abs=1e-5)
        plain = lenses.logit_lens().fidelity(model, tokens[held], skip_first=1).set_index("layer").loc[layer]
        assert quality["kl_logit_lens"] == pytest.approx(plain["kl"])
        assert quality["agreement"] == pytest.approx(float((model_p.argmax(-1) == lens_p.argmax(-1)).double().mean()))
    assert lens.provenance["held_out_rows"] == 10


def test_ridge_shrinks_and_too_few_states_are_refused():
    model = model_of("gpt2", torch.float64)
    norms = [float(lenses.fit_linear(model, rows(30), ridge=ridge, progress=False).maps[0].weight.norm()) for ridge in (0.0, 1.0, 100.0)]
    assert norms[0] > norms[1] > norms[2]
    with pytest.raises(LensError, match="more than 17 states"):
        lenses.fit_linear(model, rows(3, 4), progress=False)
    with pytest.raises(LensError, match="held_out is 1"):
        lenses.fit_linear(model, rows(), held_out=1, progress=False)
    with pytest.raises(LensError, match="1 different rows"):
        lenses.fit_linear(model, rows(1).repeat(5, 1), progress=False)


@pytest.fixture(scope="module")
def jacobian():
    return lenses.fit_jacobian(model_of("gpt2"), rows(), skip_first=1, progress=False, corpus="random tokens")


def test_files_are_those_of_published_lenses(jacobian, tmp_path):
    path = jacobian.save(tmp_path / "lens.pt")
    payload = torch.load(path, weights_only=True)
    assert set(payload) == {"J", "n_prompts", "source_layers", "d_model", "metadata"}
    assert payload["J"][0].dtype == torch.float16
    assert (payload["n_prompts"], payload["source_layers"], payload["d_model"]) == (5, [0, 1], WIDTH)
    wanted = {"model_name", "estimator", "hook_convention", "corpus", "n_prompts", "fit_dtype", "target_layer", "max_seq_len", "skip_first_positions"}
    assert wanted <= set(payload["metadata"])
    theirs = JacobianLens.load(str(path))
    assert theirs.estimator == "jacobian_lens"
    read = lenses.load(path, model_of("gpt2"))
    for layer in (0, 1):
        torch.testing.assert_close(theirs.jacobians[layer], read.maps[layer].weight)
        torch.testing.assert_close(read.maps[layer].weight, jacobian.maps[layer].weight, rtol=1e-3, atol=1e-3)
    assert (read.name, read.direct_from) == (jacobian.name, jacobian.direct_from)
    with pytest.raises(OutputError, match="exists"):
        jacobian.save(path)


def test_files_of_transformer_lens_are_read(jacobian, tmp_path):
    theirs = JacobianLens({0: torch.eye(WIDTH), 1: 2 * torch.eye(WIDTH)}, n_prompts=3, d_model=WIDTH, metadata={"target_layer": 2})
    theirs.save(str(tmp_path / "theirs.pt"))
    read = lenses.load(tmp_path / "theirs.pt", model_of("gpt2"))
    assert (read.name, read.direct_from, read.provenance["n_prompts"]) == ("Jacobian lens", 2, 3)
    torch.testing.assert_close(read.maps[1].weight, 2 * torch.eye(WIDTH))
    tokens = rows(1, 6)
    ours = read.read(model_of("gpt2"), tokens, top=3).data
    reference = theirs.readout(model_of("gpt2").bridge, tokens, top_k=3)
    for layer in (0, 1, 2):
        np.testing.assert_array_equal(ours["top_id"].sel(layer=layer)[0], reference.lens_topk_indices[layer])


def test_affine_maps_come_back_and_are_no_jacobians(tmp_path):
    model = model_of("gpt2")
    lens = lenses.fit_linear(model, rows(30), progress=False)
    read = lenses.load(lens.save(tmp_path / "linear.pt"), model)
    for layer in lens.maps:
        torch.testing.assert_close(read.maps[layer].weight, lens.maps[layer].weight, rtol=0, atol=0)
        torch.testing.assert_close(read.maps[layer].bias, lens.maps[layer].bias, rtol=0, atol=0)
    with pytest.raises(ValueError, match="does not look like"):
        JacobianLens.load(str(tmp_path / "linear.pt"))
    with pytest.raises(LensError, match="was fitted on gpt2"):
        read.read(native_model("other"), swap_task())
    with pytest.raises(LensError, match="no maps to write"):
        lenses.logit_lens().save(tmp_path / "none.pt")


def published(path, **more):
    torch.save({"J": {0: torch.eye(WIDTH).half()}, "n_prompts": 25, "source_layers": [0], "d_model": WIDTH, **more}, path)
    return path


def test_provenance_of_relevance_lenses_is_kept_where_it_loads(tmp_path):
    config = {"estimator": "relp", "rules": {"ln_rule": True, "half_rule_beta": 0.5, "include_qk_norms": False}, "target_layer": 1}
    path = published(tmp_path / "r.pt", provenance={"config_json": json.dumps(config)})
    read = lenses.load(path, model_of("gpt2"))
    assert read.name == "relevance lens"
    assert read.provenance["rules"]["half_rule_beta"] == 0.5
    assert read.direct_from == 1


class Payload:
    """What a pickle would build by running code."""

    def __reduce__(self):
        return (print, ("run",))


def test_what_would_be_unpickled_is_refused_and_not_run(tmp_path, capsys):
    path = published(tmp_path / "bad.pt", provenance=Payload())
    with pytest.raises(LensError, match="unpickled.*Convert it"):
        lenses.load(path, model_of("gpt2"))
    assert capsys.readouterr().out == ""


def test_files_that_are_no_lenses_are_refused(tmp_path):
    model = model_of("gpt2")
    with pytest.raises(LensError, match="no file"):
        lenses.load(tmp_path / "absent.pt", model)
    torch.save({"weights": torch.eye(3)}, tmp_path / "other.pt")
    with pytest.raises(LensError, match="no lens.*weights"):
        lenses.load(tmp_path / "other.pt", model)
    (tmp_path / "text.pt").write_text("no zip file")
    with pytest.raises(LensError, match="cannot be read|unpickled"):
        lenses.load(tmp_path / "text.pt", model)
    torch.save({"J": {7: torch.eye(WIDTH)}, "n_prompts": 1, "d_model": WIDTH}, tmp_path / "deep.pt")
    with pytest.raises(LensError, match="another model"):
        lenses.load(tmp_path / "deep.pt", model)
    torch.save({"J": {0: torch.eye(WIDTH) * torch.nan}, "n_prompts": 1, "d_model": WIDTH}, tmp_path / "nan.pt")
    with pytest.raises(LensError, match="finite"):
        lenses.load(tmp_path / "nan.pt", model)
    huge = Readout("huge", {0: LinearMap(torch.eye(WIDTH) * 1e6)}, LAYERS - 1)
    with pytest.raises(LensError, match="beyond float16"):
        huge.save(tmp_path / "huge.pt")


def test_an_interrupted_fit_of_the_reference_is_read(tmp_path):
    torch.save({"jacobian_sum": {0: 4 * torch.eye(WIDTH)}, "n_done": 4, "target_layer": 2}, tmp_path / "sum.pt")
    torch.testing.assert_close(lenses.load(tmp_path / "sum.pt", model_of("gpt2")).maps[0].weight, torch.eye(WIDTH))
    torch.save({"jacobian_sum": {0: torch.eye(WIDTH)}, "n_done": 0}, tmp_path / "none.pt")
    with pytest.raises(LensError, match="without a single prompt"):
        lenses.load(tmp_path / "none.pt", model_of("gpt2"))
