"""What activates features: contexts, densities and effects on logits, against a search written out in loops."""

import numpy as np
import pytest
import torch
from families import model_of

from patchlab import Edit
from patchlab import features as pf
from patchlab.errors import DictionaryError
from patchlab.features import search
from patchlab.features.hooks import hook_of
from patchlab.testing.dictionaries import random_dictionary
from patchlab.texts import Texts

KINDS = {
    "sae": {},
    "TopK": {"activation": pf.TopK(3)},
    "signs": {"activation": pf.AbsTopK(3)},
    "heads": {"reads": "z"},
    "mid": {"reads": "resid_mid"},
    "codebook": {"kind": "codebook"},
    "transcoder": {"kind": "transcoder", "skip": True},
    "cross-layer": {"kind": "cross_layer_transcoder"},
    "multi-layer": {"kind": "multi_layer", "layer": None},
}


@pytest.fixture(scope="module")
def model():
    return model_of("gpt2", torch.float64)


@pytest.fixture(scope="module")
def texts(model):
    draws = np.random.default_rng(0)
    return Texts("random rows", tuple(draws.integers(0, model.vocab_size, length) for length in (7, 5, 7, 7, 3, 7)))


def activations(dictionary, model, row, layer):
    """Features [pos, feature] of one row."""
    hook = hook_of(dictionary.reads, layer)
    with torch.no_grad():
        if dictionary.reads == "mlp_in":
            seen = {}
            model.bridge.run_with_hooks(torch.tensor(row)[None], fwd_hooks=[(hook, lambda value, hook: seen.update(x=value.clone()))])
            value = seen["x"]
        else:
            value = model.run(row.tolist(), keep=f"L{layer}.{dictionary.reads}")[f"L{layer}.{dictionary.reads}"]
        return dictionary.encode(value)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_against_a_search_in_loops(model, texts, kind):
    dictionary = random_dictionary(model, width=6, **KINDS[kind])
    found = pf.examples(dictionary, texts, model=model, n=3, before=2, after=1)
    layers = range(model.arch.n_layers) if dictionary.layer is None else [dictionary.layer]
    acts = {(layer, i): activations(dictionary, model, row, layer) for layer in layers for i, row in enumerate(texts.rows)}
    active = [f for f in range(6) if any((a[:, f] != 0).any() for a in acts.values())]
    assert [one.feature for one in found] == active
    assert found.n_dead == 6 - len(active)
    assert found.n_tokens == 36
    for one in found:
        column = {key: a[:, one.feature] for key, a in acts.items()}
        flat = torch.cat(list(column.values()))
        assert one.density == pytest.approx(float((flat != 0).double().mean()))
        assert one.mean == pytest.approx(float(flat[flat != 0].mean()), rel=1e-5)
        peaks = sorted((float(a.abs().max()) for a in column.values() if (a != 0).any()), reverse=True)[:3]
        assert [abs(context.activation) for context in one.contexts] == pytest.approx(peaks, rel=1e-5)
        assert len({(context.row, context.layer) for context in one.contexts}) == len(one.contexts)
        for context in one.contexts:
            a = column[(dictionary.layer if context.layer is None else context.layer), context.row]
            assert (context.layer is None) == (dictionary.layer is not None)
            start, stop = max(0, context.position - 2), context.position + 2
            assert context.activation == pytest.approx(float(a[context.position]), rel=1e-5)
            assert list(context.activations) == pytest.approx(a[start:stop].tolist(), rel=1e-5, abs=1e-7)
            assert list(context.tokens) == [str(token) for token in texts[context.row][start:stop]]
            assert context.token == str(texts[context.row][context.position])


@pytest.mark.parametrize("kind", ["sae", "transcoder", "cross-layer"])
def test_effects_are_those_of_the_final_norm_and_the_unembedding(model, texts, kind):
    dictionary = random_dictionary(model, width=6, **KINDS[kind])
    found = pf.examples(dictionary, texts, model=model, features=[4, 1], tokens=3)
    module = model.bridge.original_model
    norm, w_u = module.transformer.ln_f, module.lm_head.weight
    for one in found:
        direction = dictionary.w_dec[one.feature]
        direction = direction.sum(0) if direction.ndim == 2 else direction
        centred = direction - direction.mean()
        effects = w_u @ (norm.weight * centred / (centred.square().mean() + 1e-5).sqrt())
        order = effects.argsort(descending=True).tolist()
        assert [token for token, _ in one.promoted] == [str(token) for token in order[:3]]
        assert [token for token, _ in one.suppressed] == [str(token) for token in order[::-1][:3]]
        assert [value for _, value in one.promoted] == pytest.approx(effects[order[:3]].tolist(), rel=1e-4)
        assert [value for _, value in one.suppressed] == pytest.approx(effects[order[::-1][:3]].tolist(), rel=1e-4)


def test_a_dictionary_that_writes_elsewhere_has_no_effects(model, texts):
    (one,) = pf.examples(random_dictionary(model, "z", width=6), texts, model=model, features=[2])
    assert one.promoted == one.suppressed == ()


def test_results_do_not_depend_on_batches(model, texts, monkeypatch):
    dictionary = random_dictionary(model, width=6)
    whole = pf.examples(dictionary, texts, model=model)
    monkeypatch.setattr(search, "_BUDGET", 6 * 8)
    parts = pf.examples(dictionary, texts, model=model)
    for a, b in zip(whole, parts, strict=True):
        assert [(context.row, context.position, context.tokens) for context in a.contexts] == [
            (context.row, context.position, context.tokens) for context in b.contexts
        ]
        assert a.density == b.density
        assert a.mean == pytest.approx(b.mean)


def test_nothing_dense_in_tokens_and_features_is_kept(model, monkeypatch):
    """Batches shrink with the width of the dictionary."""
    sizes = []
    monkeypatch.setattr(search, "_BUDGET", 240)
    encode = pf.Dictionary.encode

    def watched(self, x):
        sizes.append(x.shape[0] * x.shape[1])
        return encode(self, x)

    monkeypatch.setattr(pf.Dictionary, "encode", watched)
    rows = Texts("rows", tuple(np.full(5, i) for i in range(12)))
    pf.examples(random_dictionary(model, width=24), rows, model=model, n=1)
    assert max(sizes) == 10
    assert sum(sizes) > 60, "once for all rows, and once more for those that are shown"


def test_asking_for_features(model, texts):
    dictionary = random_dictionary(model, width=6)
    found = pf.examples(dictionary, texts, model=model, features=[5, 0])
    assert [one.feature for one in found] == [5, 0]
    every = pf.examples(dictionary, texts, model=model)
    assert found[5] == every[5]
    with pytest.raises(DictionaryError, match=r"no examples of feature 3 .* not among the 2 that were asked for"):
        found[3]
    for wrong in ([6], [-1], [1, 1], []):
        with pytest.raises(DictionaryError, match="distinct numbers from 0 to 5"):
            pf.examples(dictionary, texts, model=model, features=wrong)


def test_features_that_are_never_active(model, texts):
    dictionary = random_dictionary(model, width=6, activation=pf.JumpRelu(torch.full((6,), 1e9, dtype=torch.float64)))
    assert len(pf.examples(dictionary, texts, model=model)) == 0
    (one,) = pf.examples(dictionary, texts, model=model, features=[2])
    assert (one.contexts, one.density, one.largest) == ((), 0.0, 0.0)
    assert np.isnan(one.mean)


def test_one_layer_of_a_dictionary_for_all(model, texts):
    dictionary = random_dictionary(model, layer=None, kind="multi_layer", width=6)
    found = pf.examples(dictionary, texts, model=model, layer=1)
    assert {context.layer for one in found for context in one.contexts} == {1}
    with pytest.raises(DictionaryError, match=r"has the layers 0 to \d; got layer=9"):
        pf.examples(dictionary, texts, model=model, layer=9)
    with pytest.raises(DictionaryError, match="reads layer 0; got layer=1"):
        pf.examples(random_dictionary(model, width=6), texts, model=model, layer=1)


def test_options_that_make_no_sense(model, texts):
    for options in ({"n": 0}, {"before": -1}, {"after": -1}, {"tokens": -1}):
        with pytest.raises(DictionaryError, match="examples need n of at least 1"):
            pf.examples(random_dictionary(model, width=6), texts, model=model, **options)


def test_bos_is_left_out_unless_asked_for(demo_gpt2_4l):
    rows = Texts("own", (np.array([0, 5, 6]), np.array([0, 7, 8])))
    dictionary = random_dictionary(demo_gpt2_4l, width=6)
    without, with_bos = (pf.examples(dictionary, rows, model=demo_gpt2_4l, bos=bos, features=range(6)) for bos in (False, True))
    assert (without.n_tokens, with_bos.n_tokens) == (4, 6)
    assert all(context.position > 0 for one in without for context in one.contexts)
    assert any(context.token == "<bos>" for one in with_bos for context in one.contexts)
    assert all(context.activations[0] == 0 for one in without for context in one.contexts)


def test_the_effect_has_the_direction_of_steering(model):
    """Adding a long stretch of a direction to the last stream makes its promoted token the likeliest there."""
    dictionary = random_dictionary(model, width=6, layer=model.arch.n_layers - 1)
    found = pf.examples(dictionary, Texts("own", (np.arange(4),)), model=model, features=[3], tokens=1)
    last = f"L{model.arch.n_layers - 1}.resid_post"
    kept = model.run([0, 1, 2], keep=last)[last]
    steered = kept + 1e4 * dictionary.w_dec[3]
    logits = model.run([0, 1, 2], edits=[Edit(last, steered)]).logits[0, -1]
    assert str(int(logits.argmax())) == found[3].promoted[0][0]
