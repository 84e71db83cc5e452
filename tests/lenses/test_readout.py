"""Readouts: the logit lens and direct attributions against arithmetic by hand, on every family, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, mixed_task, model_of, native_model, swap_task
from transformer_lens.tools.analysis import logit_lens as reference_lens

from patchlab import lenses
from patchlab.engine import intervene
from patchlab.errors import LensError, MetricError, SiteError
from patchlab.interventions import Edit
from patchlab.lenses import LinearMap, Readout
from patchlab.lenses.head import check_head, head_view
from patchlab.sources import zero
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.zoo import LAYERS, VOCAB, WIDTH, zoo_model

LENS = lenses.logit_lens()
# norms in float32 round more
ROUNDING = 3e-6


def weights(model):
    """The weights of the head of a model, by hand: scale and bias of the final norm, unembedding and its bias."""
    module = model.bridge.original_model
    norm = getattr(module.transformer, "ln_f", None) if hasattr(module, "transformer") else module.model.norm
    norm = getattr(norm, "original_component", norm)
    head = getattr(module.lm_head, "original_component", module.lm_head)
    return norm.weight, getattr(norm, "bias", None), head.weight, head.bias


def literal_logits(family, model, x):
    """Logits of states, written out from the papers of the architectures."""
    weight, bias, unembed, unembed_bias = weights(model)
    if family == "gpt2":
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight + bias
    else:
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)
    logits = y @ unembed.T + (0 if unembed_bias is None else unembed_bias)
    return 30 * (logits / 30).tanh() if family == "gemma2" else logits


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_logit_lens_is_norm_and_unembedding_of_every_state(family):
    model, task = model_of(family, torch.float64), swap_task()
    states = model.run(task.prompts("clean"), keep="resid_post")
    found = LENS.read(model, task, top=3)
    own = states.logits.log_softmax(-1)
    for layer in range(LAYERS):
        logits = literal_logits(family, model, states[f"L{layer}.resid_post"])
        torch.testing.assert_close(LENS.logits(model, states[f"L{layer}.resid_post"], layer), logits, rtol=1e-5, atol=ROUNDING)
        log_p = logits.log_softmax(-1)
        part = found.data.sel(layer=layer)
        assert np.array_equal(part["top_id"], log_p.topk(3, -1).indices)
        np.testing.assert_allclose(part["top_probability"], log_p.topk(3, -1).values.exp(), atol=ROUNDING)
        np.testing.assert_allclose(part["entropy"], -(log_p.exp() * log_p).sum(-1), atol=1e-5)
        np.testing.assert_allclose(part["kl"], (own.exp() * (own - log_p)).sum(-1), atol=1e-5)
        correct, incorrect = ([getattr(pair, side)[0] for pair in task.pairs] for side in ("correct", "incorrect"))
        rows = range(len(task))
        np.testing.assert_allclose(part["metric"], logits[rows, -1, correct] - logits[rows, -1, incorrect], atol=1e-5)
        np.testing.assert_allclose(part["correct"], log_p.exp()[rows, -1, correct], atol=ROUNDING)
        assert [int(r) for r in part["rank"]] == [int((logits[i, -1] > logits[i, -1, c]).sum()) for i, c in enumerate(correct)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_the_model(family):
    model, task = model_of(family, torch.float64), mixed_task()
    found = LENS.read(model, task).data.isel(layer=-1)
    assert float(abs(found["kl"]).max()) < ROUNDING
    np.testing.assert_allclose(found["metric"], task._values(model, task.metric, ("clean",))["clean"], atol=1e-5)


def test_transformer_lens_reads_the_same():
    model = model_of("gpt2")
    tokens = torch.arange(6)[None]
    ours = LENS.read(model, tokens, top=2, site="resid_pre").data
    theirs = reference_lens(model.bridge, tokens, positions=None, top_k=2, return_type="probs")
    np.testing.assert_allclose(ours["top_probability"][0], theirs.values[:-1, 0], atol=1e-5)
    np.testing.assert_array_equal(ours["top_id"][0], theirs.readout.top_ids[:-1, 0])


def test_named_positions_and_sides_are_those_of_the_task():
    model, task = model_of("gpt2"), mixed_task()
    found = LENS.read(model, task, side="corrupted")
    axis = task.position_axis()
    assert found.roles == axis.names == ("A", "B", "END")
    for example, pair in enumerate(task.pairs):
        alone = LENS.read(model, [list(pair.corrupted_ids)])
        for name in ("kl", "entropy"):
            np.testing.assert_allclose(found.data[name][example], alone.data[name][0, :, axis.index[example]], atol=1e-4)
        assert list(found.data["token"][example].to_numpy()) == [f"[{pair.corrupted_ids[i]}]" for i in axis.index[example]]
    np.testing.assert_array_equal(LENS.read(model, task, batch_size=1).data["top_id"], LENS.read(model, task).data["top_id"])


def test_tables_show_tokens_and_means():
    model, task = model_of("gpt2"), swap_task()
    found = LENS.read(model, task)
    table = found.table(1)
    assert list(table.index) == [0, 1, 2]
    assert table.columns[2] == f"2 '[{task.pairs[1].clean_ids[2]}]'"
    assert table.iloc[0, 0] == f"'{found.top(1)[0, 0]}' {float(found.data['top_probability'][1, 0, 0, 0]):.2f}"
    np.testing.assert_allclose(found.trajectory()["metric"], found.data["metric"].mean("example"))
    assert "3 examples, 3 layers, 5 positions" in repr(found)
    with pytest.raises(LensError, match="no answers"):
        LENS.read(model, torch.arange(4)).trajectory()


def test_a_metric_that_needs_the_clean_run_gets_it():
    model, task = model_of("gpt2", torch.float64), swap_task(metric="neg_kl")
    found = LENS.read(model, task).data
    np.testing.assert_allclose(found["metric"], -found["kl"][:, :, -1], atol=1e-6)
    assert float(LENS.read(model, task, side="corrupted").data["metric"].isel(layer=-1).max()) < -1e-3


def test_the_identity_as_a_map_is_the_logit_lens():
    model, task = model_of("llama", torch.float64), swap_task()
    eye = Readout("identity", {layer: LinearMap(torch.eye(WIDTH, dtype=torch.float64)) for layer in range(LAYERS - 1)}, LAYERS - 1)
    ours, plain = (one.read(model, task).data for one in (eye, LENS))
    for name in ("kl", "entropy", "metric", "top_id"):
        np.testing.assert_array_equal(ours[name], plain[name])


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite", "olmo2", "bloom"])
def test_contributions_add_up_to_the_metric(family):
    model, task = (model_of if family in FAMILIES else zoo_model)(family, torch.float64), mixed_task()
    for by, side in [("layer", "clean"), ("component", "clean"), ("head", "corrupted"), ("neuron", "clean")]:
        found = LENS.attribute(model, task, by=by, side=side)
        np.testing.assert_allclose(found.data["contribution"].sum("component"), found.data["metric"], atol=ROUNDING)
        np.testing.assert_allclose(found.data["metric"], task._values(model, task.metric, (side,))[side], atol=ROUNDING)


def test_experts_have_no_neurons_to_attribute_to():
    with pytest.raises(SiteError, match="mixture of experts"):
        LENS.attribute(zoo_model("mixtral"), swap_task(), by="neuron")


@pytest.mark.parametrize("kind", ["sae", "transcoder", "cross_layer_transcoder"])
def test_features_write_their_rows(kind):
    """Each feature's value times its row, an error, and what belongs to no feature: together the MLP's output."""
    model, task = native_model("with features", dtype=torch.float64), swap_task()
    made = [random_dictionary(model, "mlp_out" if kind == "sae" else "mlp_in", layer, width=9, kind=kind, seed=layer) for layer in (0, 2)]
    whole = LENS.attribute(model, task)
    model.add_dictionaries(made)
    found = LENS.attribute(model, task, by="feature")
    np.testing.assert_allclose(found.data["contribution"].sum("component"), found.data["metric"], atol=1e-10)
    by_name = dict(zip(found.data["component"].to_numpy().tolist(), found.data["contribution"].to_numpy().T, strict=True))
    entire = dict(zip(whole.data["component"].to_numpy().tolist(), whole.data["contribution"].to_numpy().T, strict=True))
    for layer in (0, 2):
        own = [value for name, value in by_name.items() if (name.startswith(f"m{layer}.") and ">" not in name) or name.endswith(f">{layer}")]
        np.testing.assert_allclose(sum(own), entire[f"m{layer}"], atol=1e-10)
    if kind == "sae":
        np.testing.assert_array_equal(by_name["m1"], entire["m1"])
        assert found.of("feature").shape == (3, 2, 9)
        view = head_view(model, model.run(task.prompts("clean"), keep="resid_post")["L2.resid_post"][:, -1], task.metric, task.batches()[0].answers)
        features = made[1].encode(model.run(task.prompts("clean"), keep="mlp_out")["L2.mlp_out"][:, -1])
        np.testing.assert_allclose(by_name["m2.f4"], features[:, 4] * (view.coefficient @ made[1].w_dec[4]), atol=1e-12)


def test_a_state_is_its_features():
    model, task = native_model("with states", dtype=torch.float64), swap_task()
    model.add_dictionaries([random_dictionary(model, "resid_post", layer, width=9, seed=layer) for layer in (1, 2)])
    for layer in (1, 2):
        found = LENS.attribute(model, task, by="state", layer=layer)
        np.testing.assert_allclose(found.data["contribution"].sum("component"), found.data["metric"], atol=1e-10)
        assert list(found.data["component"][:2].to_numpy()) == [f"r{layer}.f0", f"r{layer}.f1"]
        np.testing.assert_allclose(found.data["metric"], LENS.read(model, task, layers=[layer]).data["metric"][:, 0], atol=1e-5)
    with pytest.raises(LensError, match="resid_post of layer 0"):
        LENS.attribute(model, task, by="state", layer=0)


def test_contributions_by_hand():
    model, task = model_of("gpt2", torch.float64), swap_task()
    found = LENS.attribute(model, task, by="head")
    run = model.run(task.prompts("clean"), keep=["z", "mlp_out", "resid_post", "input"])
    weight, bias, unembed, _ = weights(model)
    x = run["L2.resid_post"][:, -1]
    scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    direction = torch.stack([unembed[pair.correct[0]] - unembed[pair.incorrect[0]] for pair in task.pairs])

    def share(part):
        return ((part - part.mean(-1, keepdim=True)) / scale * weight * direction).sum(-1)

    names = list(found.data["component"].to_numpy())
    values = dict(zip(names, found.data["contribution"].to_numpy().T, strict=True))
    for layer in range(LAYERS):
        write = model.bridge.original_model.transformer.h[layer].attn.c_proj
        write = getattr(write, "original_component", write)
        for head in range(4):
            part = run[f"L{layer}.H{head}.z"][:, -1] @ write.weight[4 * head : 4 * head + 4]
            np.testing.assert_allclose(values[f"a{layer}.h{head}"], share(part), atol=1e-12)
        np.testing.assert_allclose(values[f"a{layer}.bias"], share(write.bias.expand(3, -1)), atol=1e-12)
        np.testing.assert_allclose(values[f"m{layer}"], share(run[f"L{layer}.mlp_out"][:, -1]), atol=1e-12)
    np.testing.assert_allclose(values["input"], share(run["input"][:, -1]), atol=1e-12)
    np.testing.assert_allclose(values["norm bias"], (direction * bias).sum(-1), atol=1e-12)
    assert found.of("head").shape == (3, LAYERS, 4)
    np.testing.assert_array_equal(found.of("head")[:, 1, 2], values["a1.h2"])


def test_a_capped_logit_shares_its_cap():
    """With a soft cap each logit is its factor times what was written."""
    model, task = model_of("gemma2", torch.float64), swap_task()
    found = LENS.attribute(model, task, by="component")
    x = model.run(task.prompts("clean"), keep="resid_post")["L2.resid_post"][:, -1]
    weight, _, unembed, _ = weights(model)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)
    raw = y @ unembed.T
    factor = 30 * (raw / 30).tanh() / raw
    rows = torch.arange(3)
    correct, incorrect = (torch.tensor([getattr(pair, side)[0] for pair in task.pairs]) for side in ("correct", "incorrect"))
    direction = factor[rows, correct, None] * unembed[correct] - factor[rows, incorrect, None] * unembed[incorrect]
    scale = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    mlp = model.run(task.prompts("clean"), keep="mlp_out")["L1.mlp_out"][:, -1]
    expected = (mlp / scale * (1 + weight) * direction).sum(-1)
    place = list(found.data["component"].to_numpy()).index("m1")
    np.testing.assert_allclose(found.data["contribution"][:, place], expected, atol=ROUNDING)


def test_an_earlier_layer_is_attributed_through_its_map():
    model, task = model_of("gpt2", torch.float64), swap_task()
    generator = torch.Generator().manual_seed(0)
    own = LinearMap(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64), torch.ones(WIDTH, dtype=torch.float64))
    lens = Readout("mapped", {1: own}, LAYERS - 1)
    found = lens.attribute(model, task, by="head", layer=1)
    np.testing.assert_allclose(found.data["contribution"].sum("component"), found.data["metric"], atol=1e-10)
    np.testing.assert_allclose(found.data["metric"], lens.read(model, task, layers=[1]).data["metric"][:, 0], atol=1e-5)
    assert int(found.data["layer"].max()) == 1
    assert "map bias" in found.data["kind"]
    with pytest.raises(LensError, match="no map for layer 0"):
        lens.attribute(model, task, layer=0)


def test_edits_around_a_readout_count():
    model, task = model_of("gpt2", torch.float64), swap_task()
    with intervene(model, Edit("L1.mlp_out", zero())):
        found = LENS.attribute(model, task)
    names = list(found.data["component"].to_numpy())
    assert not np.any(found.data["contribution"][:, names.index("m1")])


def test_tables_of_attributions_have_intervals():
    found = LENS.attribute(model_of("gpt2"), swap_task(8), by="head")
    table = found.table(4)
    assert len(table) == 4
    assert (table["low"] <= table["contribution"]).all()
    assert (table["contribution"] <= table["high"]).all()
    assert list(table["contribution"].abs()) == sorted(table["contribution"].abs(), reverse=True)
    assert len(found.table(None)) == found.data.sizes["component"]
    with pytest.raises(LensError, match="'neuron'.*attention bias"):
        found.of("neuron")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"by": "expert"}, LensError, "unit of attribution 'expert'"),
        ({"by": "feature"}, LensError, "no dictionaries on attn_out or mlp_out"),
        ({"by": "state"}, LensError, "no dictionary on resid_post of layer 2"),
        ({"layer": 9}, LensError, "layers 0 to 2"),
    ],
)
def test_attributions_that_make_no_sense_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        LENS.attribute(model_of("gpt2"), swap_task(), **options)


@pytest.mark.parametrize("metric", ["logprob_diff", "prob_diff", "neg_kl"])
def test_only_linear_metrics_are_attributed(metric):
    pairs = tuple(replace(pair, correct=(*pair.correct, 5 if 5 not in pair.correct + pair.incorrect else 6)) for pair in swap_task().pairs)
    task = replace(swap_task(), pairs=pairs)
    LENS.attribute(model_of("gpt2"), task, by="layer")
    with pytest.raises(MetricError, match="linear in the logits"):
        LENS.attribute(model_of("gpt2"), task.with_metric(metric), by="layer")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"top": 0}, "top is 0"), ({"layers": [7]}, "from 0 to 2"), ({"layers": []}, "at least one"), ({"site": "z"}, "got 'z'")],
)
def test_readings_that_make_no_sense_are_refused(options, says):
    with pytest.raises(LensError, match=says):
        LENS.read(model_of("gpt2"), swap_task(), **options)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [([[1, 2], [3]], "one common number"), ([[1, VOCAB]], "lie in 0 to"), (torch.rand(2, 3), "whole numbers"), ([list(range(25))], "reads 24")],
)
def test_prompts_that_do_not_fit_are_refused(prompts, says):
    with pytest.raises(LensError, match=says):
        LENS.read(model_of("gpt2"), prompts)


def test_a_head_that_is_more_than_norm_and_unembedding_is_refused():
    with pytest.raises(LensError, match="project_out"):
        LENS.read(zoo_model("opt-projected"), torch.arange(4))


def test_a_head_that_gives_other_logits_is_refused(monkeypatch):
    model = native_model("other-head")
    monkeypatch.setattr(model.bridge.adapter, "apply_output_logits_transform", lambda logits: -logits)
    with pytest.raises(LensError, match="other logits"):
        check_head(model)


def test_half_precision_reads_like_itself():
    model = model_of("llama", torch.bfloat16)
    found = LENS.read(model, swap_task())
    assert float(found.data["kl"].isel(layer=-1).max()) < 1e-2
    LENS.attribute(model, swap_task(), by="neuron")


def test_maps_of_another_model_are_refused():
    lens = Readout("narrow", {0: LinearMap(torch.eye(3))}, LAYERS - 1)
    with pytest.raises(LensError, match=r"shape \[3, 3\].*width 16"):
        lens.read(model_of("gpt2"), swap_task())
