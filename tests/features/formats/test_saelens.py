"""SAELens folders: made by hand, written by patchlab, and what is no such folder."""

import json

import pytest
import torch
from dictionary_files import WIDTH, D, draw, relu, saelens_cfg, topk, weights, write_saelens
from families import model_of, native_model

import patchlab as pl
from patchlab.errors import DictionaryError, OutputError
from patchlab.features import AbsTopK, Codes, ConstantNorm, Dictionary, JumpRelu, LayerNorm, TopK, codebook
from patchlab.testing.dictionaries import random_dictionary

X = draw(6, D, seed=99)
THRESHOLD = draw(WIDTH, seed=50, size=0.3).abs()


@pytest.fixture(scope="module")
def model():
    return model_of("gpt2", torch.float64)


def loaded(folder, model, **options) -> Dictionary:
    return pl.load_dictionary(folder, model, **options)


def check(dictionary, features, output, x=X):
    torch.testing.assert_close(dictionary.encode(x), features)
    torch.testing.assert_close(dictionary.reconstruct(x), output)
    assert 0 < float((features != 0).double().mean()) < 1


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "abstopk", "gated"])
def test_autoencoders_of_each_architecture(tmp_path, model, architecture, subtract):
    w = weights()
    product = (X - w["b_dec"] * subtract) @ w["W_enc"]
    pre, extra = product + w["b_enc"], {}
    if architecture == "jumprelu":
        w["threshold"] = THRESHOLD
        features = relu(pre) * (pre > THRESHOLD)
    elif architecture == "gated":
        del w["b_enc"]
        w |= {name: draw(WIDTH, seed=60 + i, size=0.5) for i, name in enumerate(("b_gate", "b_mag", "r_mag"))}
        features = (product + w["b_gate"] > 0) * relu(product * w["r_mag"].exp() + w["b_mag"])
    elif architecture == "standard":
        features = relu(pre)
    else:
        extra["k"] = 5
        features = relu(topk(pre, 5)) if architecture == "topk" else topk(pre, 5, absolute=True)
    folder = write_saelens(tmp_path, w, saelens_cfg(architecture, apply_b_dec_to_input=subtract, **extra))
    dictionary = loaded(folder, model)
    assert (dictionary.kind, dictionary.layer, dictionary.reads) == ("sae", 1, "resid_post")
    check(dictionary, features, features @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_rescaling_by_decoder_norms(tmp_path, model, architecture):
    w = weights()
    norms = w["W_dec"].norm(dim=-1)
    pre = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    features = relu(topk(pre, 5)) if architecture == "topk" else topk(pre, 5, absolute=True)
    assert not torch.equal(features != 0, topk(pre / norms, 5, absolute=architecture == "abstopk") != 0), "else nothing is tested"
    dictionary = loaded(write_saelens(tmp_path, w, saelens_cfg(architecture, k=5, rescale_acts_by_decoder_norm=True)), model)
    check(dictionary, features, (features / norms) @ w["W_dec"] + w["b_dec"])


def test_layer_norm_and_its_inversion(tmp_path, model):
    w = weights()
    mean, sd = X.mean(-1, keepdim=True), X.std(-1, keepdim=True, unbiased=True)
    features = relu(((X - mean) / (sd + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    dictionary = loaded(write_saelens(tmp_path, w, saelens_cfg(normalize_activations="layer_norm")), model)
    check(dictionary, features, (features @ w["W_dec"] + w["b_dec"]) * sd + mean)


def test_constant_norm_and_its_inversion(tmp_path, model):
    w = weights()
    factor = D**0.5 / X.norm(dim=-1, keepdim=True)
    features = relu((X * factor - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    dictionary = loaded(write_saelens(tmp_path, w, saelens_cfg(normalize_activations="constant_norm_rescale")), model)
    check(dictionary, features, (features @ w["W_dec"] + w["b_dec"]) / factor)


def test_average_norm_is_a_factor_that_is_given_or_lies_beside(tmp_path, model):
    w = weights()
    folder = write_saelens(tmp_path, w, saelens_cfg(normalize_activations="expected_average_only_in"))
    features = relu((X * 0.5 - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    output = (features @ w["W_dec"] + w["b_dec"]) / 0.5
    with pytest.raises(DictionaryError, match="the factor is not in the file. Pass input_scale="):
        loaded(folder, model)
    check(loaded(folder, model, input_scale=0.5), features, output)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    check(loaded(folder, model), features, output)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders_of_each_architecture(tmp_path, model, architecture):
    w = weights()
    pre = X @ w["W_enc"] + w["b_enc"]
    features = relu(pre)
    if "jumprelu" in architecture:
        w["threshold"] = THRESHOLD
        features = features * (pre > THRESHOLD)
    output = features @ w["W_dec"] + w["b_dec"]
    if "skip" in architecture:
        w["W_skip"] = draw(D, D, seed=70)
        output = output + torch.stack([torch.stack([(w["W_skip"][o] * x).sum() for o in range(D)]) for x in X])
    cfg = saelens_cfg(architecture, "blocks.2.mlp.hook_in", d_out=D, metadata={"hook_name_out": "blocks.2.hook_mlp_out"})
    del cfg["apply_b_dec_to_input"]
    dictionary = loaded(write_saelens(tmp_path, w, cfg), model)
    assert (dictionary.kind, dictionary.layer, dictionary.reads, dictionary.writes) == ("transcoder", 2, "mlp_in", "mlp_out")
    check(dictionary, features, output)


def test_heads_are_flattened(tmp_path, model):
    w, z = weights(), X.unflatten(-1, (4, 4))
    folder = write_saelens(tmp_path, w, saelens_cfg(hook="blocks.0.attn.hook_z", reshape_activations="hook_z"))
    features = relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    dictionary = loaded(folder, model)
    assert dictionary.heads == 4
    check(dictionary, features, (features @ w["W_dec"] + w["b_dec"]).unflatten(-1, (4, 4)), z)


def test_one_dictionary_for_all_layers(tmp_path, model):
    dictionary = loaded(write_saelens(tmp_path, weights(), saelens_cfg(hook="blocks.{layer}.hook_resid_pre")), model)
    assert (dictionary.kind, dictionary.layer, dictionary.reads) == ("multi_layer", None, "resid_pre")


@pytest.mark.parametrize(
    ("hook", "reads"),
    [
        ("blocks.1.hook_resid_mid", "resid_mid"),
        ("blocks.1.hook_attn_out", "attn_out"),
        ("blocks.1.hook_mlp_out", "mlp_out"),
        ("blocks.1.hook_out", "resid_post"),
        ("blocks.1.mlp.hook_out", "mlp_out"),
        ("blocks.1.ln2.hook_normalized", "ln2.hook_normalized"),
    ],
)
def test_hooks_are_sites(tmp_path, model, hook, reads):
    assert loaded(write_saelens(tmp_path, weights(), saelens_cfg(hook=hook)), model).reads == reads


def before_six(**more):
    return {
        "model_name": "gpt2-small",
        "hook_point": "blocks.1.hook_resid_pre",
        "hook_point_layer": 1,
        "d_in": D,
        "d_sae": WIDTH,
        "dtype": "torch.float32",
        "use_ghost_grads": False,
        **more,
    }


def test_files_before_version_six(tmp_path, model):
    w = weights()
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    ones = {"scaling_factor": torch.ones(WIDTH)}
    dictionary = loaded(write_saelens(tmp_path / "relu", {**w, **ones}, before_six(normalize_activations=False)), model)
    assert (dictionary.layer, dictionary.reads, dictionary.kind) == (1, "resid_pre", "sae")
    check(dictionary, relu(pre), relu(pre) @ w["W_dec"] + w["b_dec"])
    options = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "sae_lens_version": "5.10.1"}
    features = relu(topk(pre, 5))
    check(loaded(write_saelens(tmp_path / "topk", w, before_six(**options)), model), features, features @ w["W_dec"] + w["b_dec"])
    heads = loaded(write_saelens(tmp_path / "z", w, before_six(hook_point="blocks.0.attn.hook_z")), model)
    assert heads.heads == 4


def test_files_before_version_six_that_are_refused(tmp_path, model):
    folder = write_saelens(tmp_path / "a", weights(), before_six(normalize_activations=True))
    with pytest.raises(DictionaryError, match="expected_average_only_in"):
        loaded(folder, model)
    folder = write_saelens(tmp_path / "b", weights(), before_six(activation_fn_str="tanh-relu"))
    with pytest.raises(DictionaryError, match="unknown architecture 'standard with tanh-relu'"):
        loaded(folder, model)
    folder = write_saelens(tmp_path / "c", {**weights(), "scaling_factor": torch.full((WIDTH,), 2.0)}, before_six())
    with pytest.raises(DictionaryError, match="holds scaling_factor, which the architecture standard does not have"):
        loaded(folder, model)


def variants(model):
    for activation in (None, JumpRelu(THRESHOLD), TopK(5), AbsTopK(5)):
        for skip in (False, True):
            yield random_dictionary(model, kind="transcoder", activation=activation, skip=skip, layer=1)
        yield random_dictionary(model, activation=activation, subtract_b_dec=True)
        yield random_dictionary(model, activation=activation, normalise=LayerNorm(), reads="mlp_out", layer=2)
        yield random_dictionary(model, activation=activation, kind="cross_layer_transcoder", skip=True, layer=1)
    yield random_dictionary(model, normalise=ConstantNorm(), reads="z")
    yield random_dictionary(model, kind="multi_layer", layer=None)
    yield random_dictionary(model, reads="resid_mid", skip=True)
    yield random_dictionary(model, reads="ln2.hook_normalized")
    yield random_dictionary(model, kind="codebook", activation=Codes(3))
    yield codebook("euclid", draw(WIDTH, D, seed=3), k=2, layer=1, reads="attn_out", cosine=False)


def test_what_is_written_is_read_as_it_was(tmp_path, model):
    for i, dictionary in enumerate(variants(model)):
        dictionary.save(tmp_path / str(i))
        again = loaded(tmp_path / str(i), model)
        assert again.identity == dictionary.identity, dictionary
        assert again.name == dictionary.name
    assert len(pl.load_dictionaries(tmp_path, model)) == i + 1


def test_architectures_have_the_names_of_saelens(tmp_path, model):
    named = {
        "standard": random_dictionary(model),
        "jumprelu": random_dictionary(model, activation=JumpRelu(THRESHOLD)),
        "topk": random_dictionary(model, activation=TopK(2)),
        "abstopk": random_dictionary(model, activation=AbsTopK(2)),
        "transcoder": random_dictionary(model, kind="transcoder"),
        "skip_transcoder": random_dictionary(model, kind="transcoder", skip=True),
        "jumprelu_transcoder": random_dictionary(model, kind="transcoder", activation=JumpRelu(THRESHOLD)),
        "jumprelu_skip_transcoder": random_dictionary(model, kind="transcoder", activation=JumpRelu(THRESHOLD), skip=True),
        "patchlab": random_dictionary(model, kind="codebook"),
    }
    for architecture, dictionary in named.items():
        dictionary.save(tmp_path / architecture)
        assert json.loads((tmp_path / architecture / "cfg.json").read_text())["architecture"] == architecture


def test_nothing_is_overwritten_unasked_and_nothing_half_written_is_read(tmp_path, model, monkeypatch):
    one, two = random_dictionary(model, seed=1), random_dictionary(model, seed=2)
    one.save(tmp_path / "deep" / "er")
    with pytest.raises(OutputError, match="holds a dictionary .* and is not overwritten"):
        two.save(tmp_path / "deep" / "er")
    assert loaded(tmp_path / "deep" / "er", model).identity == one.identity
    two.save(tmp_path / "deep" / "er", overwrite=True)
    assert loaded(tmp_path / "deep" / "er", model).identity == two.identity

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchlab.features.writer.write_json", fails)
    with pytest.raises(OSError, match="No space left"):
        one.save(tmp_path / "half")
    with pytest.raises(DictionaryError, match=r"cannot read .*cfg\.json: No such file"):
        loaded(tmp_path / "half", model)


def test_provenance_says_where_it_came_from(tmp_path, model):
    folder = write_saelens(tmp_path / "x", weights(), saelens_cfg(metadata={"prepend_bos": True}))
    provenance = loaded(folder, model).provenance
    assert (provenance["format"], provenance["model_name"], provenance["metadata"]["prepend_bos"]) == ("SAELens", "gpt2", True)
    loaded(folder, model).save(tmp_path / "y")
    assert loaded(tmp_path / "y", model).provenance["metadata"]["prepend_bos"] is True


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


NAN = {**weights(), "b_enc": torch.full((WIDTH,), torch.nan, dtype=torch.float64)}
TRANSCODER = saelens_cfg("transcoder", "blocks.1.mlp.hook_in", d_out=D, apply_b_dec_to_input=True)
MISFITS = {
    "architecture": (weights(), saelens_cfg("standart"), r"cfg\.json: unknown architecture 'standart'; did you mean 'standard'"),
    "batchtopk": (weights(), saelens_cfg("batchtopk"), "SAELens itself writes these as jumprelu"),
    "temporal": (weights(), saelens_cfg("temporal"), "its features depend on other positions"),
    "matching_pursuit": (weights(), saelens_cfg("matching_pursuit"), "come from an iteration"),
    "normalisation": (
        weights(),
        saelens_cfg(normalize_activations="covariance_whitening"),
        "unknown normalisation 'covariance_whitening'",
    ),
    "missing tensor": (
        without(weights(), "b_enc"),
        saelens_cfg(),
        "there is no tensor b_enc, which the architecture standard has; it holds W_dec",
    ),
    "extra tensor": ({**weights(), "W_skip": draw(D, D, seed=1)}, saelens_cfg(), "holds W_skip, which the architecture standard does not have"),
    "scalar threshold": (
        {**weights(), "threshold": torch.tensor(0.1)},
        saelens_cfg("jumprelu"),
        r"threshold has the shape \[\], and the architecture jumprelu of this size needs \[24\]",
    ),
    "threshold of another width": ({**weights(), "threshold": torch.ones(9)}, saelens_cfg("jumprelu"), r"threshold has the shape \[9\]"),
    "transposed": ({**weights(), "W_dec": draw(D, WIDTH, seed=1)}, saelens_cfg(), r"W_dec has the shape \[16, 24\], .* needs \[24, 16\]"),
    "nan": (NAN, saelens_cfg(), "b_enc holds 24 of 24 values that are NaN or infinite"),
    "no dtype": (weights(), without(saelens_cfg(), "dtype"), r"cfg\.json: dtype must be a text; it is missing"),
    "no hook": (weights(), saelens_cfg(metadata={"hook_name": None}), "hook_name must be a text; got None"),
    "other hook": (weights(), saelens_cfg(hook="layers.1.out"), "cannot tell the site from the hook 'layers.1.out'"),
    "unknown hook": (weights(), saelens_cfg(hook="blocks.1.hook_resid_pst"), "unknown hook 'blocks.1.hook_resid_pst'"),
    "one head": (weights(), saelens_cfg(hook="blocks.1.attn.hook_z", metadata={"hook_head_index": 2}), "it reads head 2 alone"),
    "k": (weights(), saelens_cfg("topk"), "k must be a whole number; it is missing"),
    "large k": (weights(), saelens_cfg("topk", k=99), "k is from 1 to the number of features, 24; got 99"),
    "subtracting transcoder": (weights(), TRANSCODER, "apply_b_dec_to_input is true"),
    "layer": (weights(), saelens_cfg(hook="blocks.3.hook_resid_post"), "it reads layer 3, and gpt2 has the layers 0 to 2"),
    "width": (weights(12), saelens_cfg(d_in=12), r"it reads resid_post 12 wide, and in gpt2 that is 16 wide \(d_model\)"),
    "heads": (weights(12), saelens_cfg(d_in=12, hook="blocks.1.attn.hook_z"), r"z 12 wide, and in gpt2 that is 16 wide \(4 heads of 4\)"),
    "model": (weights(), saelens_cfg(model="gemma-2-2b"), "trained on gemma-2-2b, and this model is gpt2.*trained_on='gemma-2-2b'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_told(tmp_path, model, name):
    tensors, cfg, message = MISFITS[name]
    folder = write_saelens(tmp_path / "folder", tensors, cfg)
    with pytest.raises(DictionaryError, match=message) as told:
        loaded(folder, model)
    assert str(folder) in str(told.value), "the file is named"


def test_other_model_can_be_meant(tmp_path, model):
    folder = write_saelens(tmp_path, weights(), saelens_cfg(model="EleutherAI/pythia-70m"))
    assert loaded(folder, model, trained_on="pythia-70m").n_features == WIDTH
    with pytest.raises(DictionaryError, match="trained_on='gpt2-xl', but the file says that it was trained on EleutherAI/pythia-70m"):
        loaded(folder, model, trained_on="gpt2-xl")


@pytest.mark.parametrize("subtract", [True, False])
def test_model_with_centred_writing_weights_is_what_the_encoder_reads(tmp_path, model, subtract):
    w, kwargs = weights(), {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    folder = write_saelens(tmp_path / "a", w, saelens_cfg(metadata=kwargs, apply_b_dec_to_input=subtract))
    x = X + 3.0
    features = relu((x - x.mean(-1, keepdim=True) - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"])
    dictionary = loaded(folder, model)
    check(dictionary, features, features @ w["W_dec"] + w["b_dec"], x)
    dictionary.save(tmp_path / "b")
    assert loaded(tmp_path / "b", model).identity == dictionary.identity
    normed = write_saelens(tmp_path / "c", w, saelens_cfg(metadata=kwargs, normalize_activations="layer_norm"))
    same = write_saelens(tmp_path / "d", w, saelens_cfg(normalize_activations="layer_norm"))
    assert torch.equal(loaded(normed, model).encode(x), loaded(same, model).encode(x)), "its mean is out already"
    normed = write_saelens(tmp_path / "e", w, saelens_cfg(metadata=kwargs, normalize_activations="constant_norm_rescale"))
    with pytest.raises(DictionaryError, match="center_writing_weights=True, which is not implemented together with its normalisation"):
        loaded(normed, model)


def test_model_without_centring_ignores_that_its_writing_weights_were_to_be_centred(tmp_path):
    w, kwargs = weights(), {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    one = loaded(write_saelens(tmp_path / "a", w, saelens_cfg(model="llama", metadata=kwargs)), model_of("llama"))
    assert one.identity == loaded(write_saelens(tmp_path / "b", w, saelens_cfg(model="llama")), model_of("llama")).identity


def test_other_processing_that_changes_what_is_read_is_told(tmp_path, model):
    folder = write_saelens(
        tmp_path, weights(), saelens_cfg(hook="blocks.0.attn.hook_z", metadata={"model_from_pretrained_kwargs": {"fold_value_biases": True}})
    )
    with pytest.raises(DictionaryError, match="it was trained on z of a model loaded with fold_value_biases=True"):
        loaded(folder, model)


def test_site_that_the_model_lacks_is_told(tmp_path):
    folder = write_saelens(tmp_path, weights(), saelens_cfg(hook="blocks.1.hook_resid_mid", model="neox"))
    with pytest.raises(DictionaryError, match="it reads resid_mid, which neox does not have: attention and MLP run in parallel"):
        loaded(folder, model_of("neox"))


def test_damaged_files_are_told(tmp_path, model):
    random_dictionary(model).save(tmp_path)
    weights_file = tmp_path / "sae_weights.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-8] + b"\0" * 8)
    with pytest.raises(DictionaryError, match="its bytes are not those that were written with cfg.json"):
        loaded(tmp_path, model)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["metadata"]["patchlab"]["sha256"]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    weights_file.write_bytes(whole[:-8])
    with pytest.raises(DictionaryError, match=r"sae_weights\.safetensors: cannot be read: .*get it again"):
        loaded(tmp_path, model)
    weights_file.unlink()
    with pytest.raises(DictionaryError, match=r"there is no file .*sae_weights\.safetensors; the folder is incomplete"):
        loaded(tmp_path, model)
    (tmp_path / "cfg.json").write_text('{"architecture": "stand')
    with pytest.raises(DictionaryError, match=r"cfg\.json: is no JSON"):
        loaded(tmp_path, model)


def test_folders_are_searched_and_chosen_from(tmp_path, model):
    for layer in (2, 0, 1):
        random_dictionary(model, layer=layer).save(tmp_path / f"post{layer}")
    random_dictionary(model, kind="transcoder", layer=1).save(tmp_path / "more" / "t")
    every = pl.load_dictionaries(tmp_path, model)
    assert [(d.layer, d.reads) for d in every] == [(0, "resid_post"), (1, "mlp_in"), (1, "resid_post"), (2, "resid_post")]
    assert [d.layer for d in pl.load_dictionaries(tmp_path, model, sites=["resid_post"], layers=(1, 2))] == [1, 2]
    assert [d.kind for d in pl.load_dictionaries(tmp_path, model, kind="transcoder")] == ["transcoder"]
    assert loaded(tmp_path, model, layer=2).layer == 2
    assert loaded(tmp_path, model, layer=1, reads="mlp_in").kind == "transcoder"
    with pytest.raises(DictionaryError, match=r"holds 4 dictionaries \(.*\)\. Choose one with layer= and reads="):
        loaded(tmp_path, model)
    with pytest.raises(DictionaryError, match="holds no dictionary with layer=7, but mlp_in → mlp_out of layer 1, resid_post of layer 0"):
        loaded(tmp_path, model, layer=7)
    with pytest.raises(DictionaryError, match="holds no dictionary with layers=.*It has dictionaries that read "):
        pl.load_dictionaries(tmp_path, model, layers=(7,))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DictionaryError, match="holds no dictionary. Formats that are read: sparsify, SAELens"):
        loaded(tmp_path / "empty", model)


def test_precision_is_at_least_that_of_file_and_model(tmp_path):
    half = random_dictionary(model_of("gpt2")).to(dtype=torch.bfloat16)
    half.save(tmp_path)
    assert loaded(tmp_path, model_of("gpt2")).dtype == torch.float32
    assert loaded(tmp_path, model_of("gpt2", torch.float64)).dtype == torch.float64
    assert loaded(tmp_path, model_of("gpt2"), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_embedding_is_a_site_without_layers(tmp_path):
    native = native_model()
    dictionary = loaded(write_saelens(tmp_path, weights(), saelens_cfg(hook="hook_embed", model="native")), native)
    assert (dictionary.reads, dictionary.layer) == ("input", None)
