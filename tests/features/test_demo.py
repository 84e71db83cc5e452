"""The packaged dictionaries: what their folders hold, and that they do what their cards say."""

import importlib.util
import json
import re
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from paths import ROOT

from patchlab import Edit, load_task, texts
from patchlab.errors import DictionaryError
from patchlab.features import JumpRelu, TopK, load_dictionaries, load_dictionary
from patchlab.features.load import DEMO_DICTIONARIES
from patchlab.models import DEMO_MODELS

NAMES = ("demo-gpt2", "demo-llama")


def card(name: str) -> dict[tuple[str, int], dict[str, float]]:
    """(dictionary, layer) -> what was measured."""
    found = json.loads((DEMO_DICTIONARIES[name] / "card.json").read_text(encoding="utf-8"))
    return {(row["name"], row["layer"]): row for row in found["measured"]}


@pytest.fixture(params=NAMES)
def model(request):
    return request.getfixturevalue(request.param.replace("-", "_"))


@pytest.fixture(scope="module")
def script():
    """The training script, as a module."""
    path = ROOT / "scripts" / "train_demo_dictionaries.py"
    spec = importlib.util.spec_from_file_location("train_demo_dictionaries", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_they_are_there_and_small():
    assert tuple(DEMO_DICTIONARIES) == NAMES
    packaged = [path for folder in DEMO_DICTIONARIES.values() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in packaged) <= 12_000_000
    assert {path.name for path in packaged} == {"README.md", "card.json", "cfg.json", "sae_weights.safetensors"}
    assert (files("patchlab") / "features" / "demo" / "demo-gpt2" / "card.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_they_are_stored_in_half_precision(name):
    from safetensors import safe_open

    for path in DEMO_DICTIONARIES[name].rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118  (not a dictionary)


def test_which_there_are(demo_gpt2, demo_llama):
    found = load_dictionaries("demo-gpt2", demo_gpt2)
    every = {(point, layer) for point in ("resid_post", "attn_out", "mlp_out") for layer in range(12)}
    assert {(one.reads, one.layer) for one in found if one.kind == "sae"} == every
    assert {(one.reads, one.writes, one.layer) for one in found if one.kind == "transcoder"} == {("mlp_in", "mlp_out", i) for i in range(12)}
    (shared,) = [one for one in found if one.kind == "multi_layer"]
    assert (shared.reads, shared.layer, isinstance(shared.activation, TopK)) == ("resid_post", None, True)
    assert len(found) == 49
    assert all(isinstance(one.activation, JumpRelu) for one in found if one.kind != "multi_layer")
    assert all(one.dtype == torch.float32 for one in found)
    llama = load_dictionaries("demo-llama", demo_llama)
    assert {(one.reads, one.layer, one.kind) for one in llama} == {(point, i, "sae") for point in ("resid_post", "mlp_out") for i in range(6)}


def test_choosing_some(demo_gpt2):
    some = load_dictionaries("demo-gpt2", demo_gpt2, sites="attn_out", layers=[3, 5])
    assert [(one.name, one.layer) for one in some] == [("attn_out/3", 3), ("attn_out/5", 5)]
    assert len(load_dictionaries("demo-gpt2", demo_gpt2, kind="transcoder")) == 12
    one = load_dictionary("demo-gpt2", demo_gpt2, layer=3, reads="mlp_in")
    assert (one.kind, one.layer) == ("transcoder", 3)


def test_they_belong_to_their_model(demo_llama):
    with pytest.raises(DictionaryError, match="it was trained on demo-gpt2, and this model is demo-llama"):
        load_dictionaries("demo-gpt2", demo_llama)


@pytest.mark.parametrize("name", NAMES)
def test_the_card(name, script):
    measured = card(name)
    layers = 12 if name == "demo-gpt2" else 6
    specs = [spec for group in script.groups(name) for spec in group.specs]
    assert set(measured) == {(spec.name, layer) for spec in specs for layer in (range(layers) if spec.layer is None else [spec.layer])}
    text = (DEMO_DICTIONARIES[name] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)% \| (-?[\d.]+) \|$", text, re.M)
    assert len(rows) == len(measured)
    for label, layer, fvu, l0, dead, recovered in rows:
        row = measured[label, int(layer)]
        assert float(fvu) == pytest.approx(row["fvu"], abs=6e-4)
        assert float(l0) == pytest.approx(row["l0"], abs=0.06)
        assert float(dead) / 100 == pytest.approx(row["dead"], abs=6e-4)
        assert float(recovered) == pytest.approx(row["recovered"], abs=6e-4)


@pytest.mark.slow
def test_the_numbers_on_the_card(model, script):
    """Losses measured again on the card's rows through the package's own runs; reconstruction and sparsity on a part of its rows, loosely."""
    rows = texts.sentences(model, script.HELD_OUT_ROWS, seed=script.HELD_OUT_SEED).rows[: script.SPLICED_ROWS]
    ids = torch.from_numpy(np.stack(rows))
    measured = card(model.name)
    losses = torch.nn.functional.cross_entropy
    plain = model.run(ids).logits

    def loss(logits):
        return float(losses(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    assert loss(plain) == pytest.approx(next(iter(measured.values()))["plain_loss"], abs=2e-3)
    for one in load_dictionaries(model.name, model, sites=["resid_post", "mlp_out"], layers=[0, model.arch.n_layers // 2]):
        kept = model.run(ids, keep=f"L{one.layer}.{one.reads}").activations[one.reads, one.layer]
        row = measured[one.name, one.layer]
        features = one.encode(kept)
        x, rebuilt = kept[:, 1:].flatten(0, 1), one.decode(features)[:, 1:].flatten(0, 1)
        fvu = float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())
        assert fvu == pytest.approx(row["fvu"], rel=0.3)
        assert float((features[:, 1:] != 0).double().sum(-1).mean()) == pytest.approx(row["l0"], rel=0.1)
        spliced = loss(model.run(ids, edits=[Edit(f"L{one.layer}.{one.reads}", one.decode(features))]).logits)
        assert spliced - loss(plain) == pytest.approx(row["loss"] - row["plain_loss"], abs=2e-3)


# --- the script ------------------------------------------------------------------------------------------------------


def test_points_of_the_script_are_sites_of_the_package(script, model):
    """What is trained on is what the dictionaries read in patchlab."""
    module = script.AutoModelForCausalLM.from_pretrained(DEMO_MODELS[model.name]).eval()
    ids = torch.from_numpy(np.stack(texts.sentences(model, 2, seed=1).rows))
    points = [("resid_post", 1), ("attn_out", 1), ("mlp_out", 1)]
    found = script.activations(module, ids, points)
    kept = model.run(ids, keep=[f"L{layer}.{point}" for point, layer in points]).activations
    for point in points:
        torch.testing.assert_close(found[point].float(), kept[point].flatten(0, 1), rtol=2e-3, atol=2e-3)


def test_folded_scales_change_nothing(script):
    """A dictionary trained on scaled activations, as it is for the activations themselves."""
    draws = torch.Generator().manual_seed(0)
    specs = (script.Spec("sae", "resid_post", "resid_post", 0), script.Spec("transcoder", "mlp_in", "mlp_out", 0))
    group = script.Group(specs, 12, 3, steps=1)
    x, y = (torch.randn(2, 400, 6, generator=draws) * 5 + 2 for _ in range(2))
    scale_in, scale_out = torch.tensor([2.0, 3.0]), torch.tensor([2.0, 7.0])
    centre, mean = (values.mean(1) / scale[:, None] for values, scale in ((x, scale_in), (y, scale_out)))
    stack = script.Stack.new(group, centre, mean, draws)
    stack.b_enc = torch.randn(2, 12, generator=draws) * 0.1
    pre = stack.pre(x / scale_in[:, None, None])
    for i, spec in enumerate(specs):
        tensors = script.one(stack, i, group, x[i], scale_in[i], scale_out[i])
        dictionary = script.dictionary("demo-gpt2", spec, group, tensors).to(dtype=torch.float32)
        own = dictionary.pre(x[i]).relu() / scale_out[i]
        torch.testing.assert_close(own, pre[i], rtol=1e-2, atol=2e-2)  # float16 weights
        mask = tensors["threshold"][0] / scale_out[i]
        features = pre[i] * (pre[i] > mask)
        assert float((features > 0).double().sum(-1).mean()) == pytest.approx(3, abs=0.05), "the threshold keeps k per token"
        expected = (features @ stack.w_dec[i] + stack.b_dec[i]) * scale_out[i]
        got = dictionary.reconstruct(x[i])
        assert float((got - expected).norm() / expected.norm()) < 0.02


def test_what_is_largest(script):
    pre = torch.tensor([[[1.0, 5.0, 0.0], [2.0, 0.0, 0.5], [4.0, 3.0, 0.0], [0.0, 0.1, 6.0]]])
    assert script.largest(pre, 1, per_token=True).tolist() == [[[0, 5, 0], [2, 0, 0], [4, 0, 0], [0, 0, 6]]]
    # the bar is read off a quarter of the tokens, here the first one, whose second largest is 1; what is at the bar stays
    assert script.largest(pre, 1, per_token=False).tolist() == [[[1, 5, 0], [2, 0, 0], [4, 3, 0], [0, 0, 6]]]
    # four activations of a mean of one per token: those above the fifth, 2
    assert float(script.bar(pre, 1)) == 2.0
    assert (pre > script.bar(pre, 1)).sum() == 4


def test_training_leaves_less_and_is_seeded(script):
    """On sums of few directions a small group learns, the same for the same seed."""
    draws = torch.Generator().manual_seed(1)
    directions = script.unit(torch.randn(8, 6, generator=draws))
    codes = torch.rand(6000, 8, generator=draws) * (torch.rand(6000, 8, generator=draws) < 0.2)
    x = (codes @ directions * 4 + 1).half()
    spec = script.Spec("sae", "resid_post", "resid_post", 0)
    said: list[str] = []
    tensors = [script.train(script.Group((spec,), 16, 2, steps=150), {("resid_post", 0): x}, 0, said.append)[0] for _ in range(2)]
    assert all(torch.equal(tensors[0][part], tensors[1][part]) for part in tensors[0])
    one = script.dictionary("demo-gpt2", spec, script.Group((spec,), 16, 2, steps=150), tensors[0]).to(dtype=torch.float32)
    left = float((x.float() - one.reconstruct(x.float())).square().sum() / (x.float() - x.float().mean(0)).square().sum())
    assert left < 0.25
    assert said[0].startswith("step 75, variance left ")


# --- what a feature does ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_class_turned_on_changes_the_answer_and_random_features_do_not(demo_gpt2):
    """L6.F168 acts between a plural subject and its verb; set after a singular one, it makes the verb plural."""
    plain = demo_gpt2.arch
    demo_gpt2.add_dictionaries(load_dictionaries("demo-gpt2", demo_gpt2, sites=["resid_post"], layers=[6], kind="sae"))
    try:
        task = load_task("agreement", demo_gpt2, n=48, variant="across_rc")
        at_end = demo_gpt2.run(task.prompts("clean"), keep="L6.features.resid_post").activations["features.resid_post", 6][:, -1]
        acts = at_end[:, 168] > 0
        singular = ~acts
        verbs = {demo_gpt2.bridge.tokenizer.decode([pair.correct[0]]).strip() for pair, on in zip(task.pairs, acts.tolist(), strict=True) if on}
        assert verbs <= {"are", "were", "have", "do", "go"}, "where it acts, the answer is plural"
        assert 10 < int(singular.sum()) < 40

        def flipped(feature):
            logits = demo_gpt2.run(task.prompts("clean"), edits=Edit(f"L6.F{feature}.resid_post@END", 8.0)).logits[:, -1]
            wrong = [bool(row[pair.correct[0]] < row[pair.incorrect[0]]) for row, pair in zip(logits, task.pairs, strict=True)]
            return float(torch.tensor(wrong)[singular].double().mean())

        assert flipped(168) > 0.8
        others = np.random.default_rng(0).choice(np.setdiff1d(np.arange(256), [168]), 10, replace=False)
        assert float(np.mean([flipped(int(feature)) for feature in others])) < 0.1
    finally:
        demo_gpt2.drop_dictionaries()
    assert demo_gpt2.arch.sites == plain.sites
