"""Files of the other formats, made by hand from their descriptions: what they compute, literally, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from dictionary_files import WIDTH, D, draw, relu, single, topk, weights
from families import model_of
from safetensors.torch import save_file
from torch import Tensor

import patchlab as pl
from patchlab.errors import DictionaryError
from patchlab.features import AbsTopK, SignedTopK

X = draw(6, D, seed=99)
THRESHOLD = draw(WIDTH, seed=50, size=0.3).abs()
W = weights()
N_LAYERS = 3


@pytest.fixture(scope="module")
def model():
    return model_of("gpt2", torch.float64)


def check(dictionary, features: Tensor, output: Tensor) -> None:
    torch.testing.assert_close(dictionary.encode(X), features)
    torch.testing.assert_close(dictionary.reconstruct(X), output)
    assert 0 < float((features != 0).double().mean()) < 1


def files(folder: Path, **contents: Any) -> Path:
    """A folder with files: dicts of tensors for weights, anything else as text. Names are written with __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        file = folder / name.replace("__", ".")
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif file.suffix == ".npz":
            np.savez(file, **{key: value.numpy() if isinstance(value, Tensor) else value for key, value in content.items()})
        elif file.suffix == ".safetensors":
            save_file(single(content), file)
        elif file.suffix == ".pt":
            torch.save(single(content) if isinstance(content, dict) else content, file)
        else:
            file.write_text(content if isinstance(content, str) else yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))
    return folder


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key not in names}


# --- Gemma Scope ---------------------------------------------------------------------------------------------------------


def gemma_scope(folder: Path, **change: Any) -> Path:
    return files(folder, params__npz=single({**W, "threshold": THRESHOLD}) | change)


@pytest.mark.parametrize(
    ("place", "reads", "layer"),
    [
        ("gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_71", "resid_post", 1),
        ("gemma-scope-9b-it-mlp/layer_2/width_16k", "mlp_out", 2),
        ("models--google--gemma-scope-2b-pt-res/snapshots/0f/layer_0", "resid_post", 0),
    ],
)
def test_gemma_scope_says_its_place_in_folders(tmp_path, model, place, reads, layer):
    folder = gemma_scope(tmp_path / place)
    with pytest.raises(DictionaryError, match=r"trained on google/gemma-2-\db.*this model is gpt2"):
        pl.load_dictionary(folder, model)
    trained_on = "gemma-2-9b-it" if "9b-it" in place else "gemma-2-2b"
    dictionary = pl.load_dictionary(folder, model, trained_on=trained_on)
    pre = X @ W["W_enc"] + W["b_enc"]
    features = relu(pre) * (pre > THRESHOLD)
    check(dictionary, features, features @ W["W_dec"] + W["b_dec"])
    assert (dictionary.reads, dictionary.layer, dictionary.subtract_b_dec) == (reads, layer, False)


def test_gemma_scope_in_other_folders_is_said(tmp_path, model):
    folder = gemma_scope(tmp_path / "mine")
    with pytest.raises(DictionaryError, match="say which site it reads. Pass reads="):
        pl.load_dictionary(folder, model)
    with pytest.raises(DictionaryError, match="say which layer it reads. Pass layer="):
        pl.load_dictionary(folder, model, reads="resid_post")
    assert pl.load_dictionary(folder, model, reads="z", layer=2).heads == 4
    transcoder = pl.load_dictionary(folder, model, reads="ln2.hook_normalized", layer=2)
    assert (transcoder.kind, transcoder.writes) == ("transcoder", "mlp_out")


def test_gemma_scope_of_embeddings_is_scaled(tmp_path, model):
    dictionary = pl.load_dictionary(gemma_scope(tmp_path / "embedding"), model)
    pre = X @ (W["W_enc"] / 4) + W["b_enc"]
    features = relu(pre) * (pre > THRESHOLD)
    check(dictionary, features, features @ (W["W_dec"] * 4) + W["b_dec"])
    assert (dictionary.reads, dictionary.layer) == ("input", None)


def test_gemma_scope_is_never_unpickled(tmp_path, model):
    folder = gemma_scope(tmp_path / "layer_1", threshold=np.array([{"code": "runs"}], dtype=object))
    with pytest.raises(DictionaryError, match=r"params\.npz: is not a plain archive of tensors.*which patchlab never does"):
        pl.load_dictionary(folder, model, reads="resid_post")
    (folder / "params.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DictionaryError, match=r"params\.npz: cannot be read"):
        pl.load_dictionary(folder, model, reads="resid_post")


# --- Gemma Scope 2 -------------------------------------------------------------------------------------------------------

LOWER = {name.lower(): value for name, value in W.items()} | {"threshold": THRESHOLD}


def gemma_scope_2(folder: Path, tensors: dict[str, Tensor] | None = None, **more: Any) -> Path:
    config = {"architecture": "jump_relu", "model_name": "gpt2", "hf_hook_point_in": "model.layers.1.output", **more}
    return files(folder, params__safetensors=LOWER if tensors is None else tensors, config__json=config)


@pytest.mark.parametrize(
    ("hook", "reads"),
    [
        ("model.layers.1.output", "resid_post"),
        ("model.language_model.layers.1.self_attn.o_proj.input", "z"),
        ("model.layers.1.post_feedforward_layernorm.output", "mlp_out"),
    ],
)
def test_gemma_scope_2_names_modules(tmp_path, model, hook, reads):
    dictionary = pl.load_dictionary(gemma_scope_2(tmp_path, hf_hook_point_in=hook), model)
    assert (dictionary.kind, dictionary.reads, dictionary.layer) == ("sae", reads, 1)
    pre = X @ W["W_enc"] + W["b_enc"]
    features = relu(pre) * (pre > THRESHOLD)
    torch.testing.assert_close(dictionary.to(dtype=torch.float64).encode(X.unflatten(-1, (4, 4)) if reads == "z" else X), features)


def test_gemma_scope_2_skip_is_from_input_to_output(tmp_path, model):
    skip = draw(D, D, seed=7)
    places = {
        "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output",
    }
    folder = gemma_scope_2(tmp_path / "a", {**LOWER, "affine_skip_connection": skip}, affine_connection=True, **places)
    pre = X @ W["W_enc"] + W["b_enc"]
    features = relu(pre) * (pre > THRESHOLD)
    check(pl.load_dictionary(folder, model), features, features @ W["W_dec"] + W["b_dec"] + X @ skip)
    folder = gemma_scope_2(tmp_path / "b", affine_connection=True, **places)
    with pytest.raises(DictionaryError, match="there is no tensor affine_skip_connection"):
        pl.load_dictionary(folder, model)


def test_gemma_scope_2_across_layers_writes_to_later_ones(tmp_path, model):
    w_dec = draw(WIDTH, N_LAYERS, D, seed=8)
    w_dec[:, :1] = 0
    folder = files(tmp_path, params_layer_1__safetensors={**LOWER, "w_dec": w_dec})
    dictionary = pl.load_dictionary(folder, model)
    assert (dictionary.kind, dictionary.layer, dictionary.w_dec.shape) == ("cross_layer_transcoder", 1, (WIDTH, 2, D))
    pre = X @ W["W_enc"] + W["b_enc"]
    features = relu(pre) * (pre > THRESHOLD)
    torch.testing.assert_close(dictionary.reconstruct(X)[:, 1], features @ w_dec[:, 2])
    torch.testing.assert_close(dictionary.reconstruct(X)[:, 0], features @ w_dec[:, 1] + W["b_dec"])
    files(tmp_path, params_layer_1__safetensors={**LOWER, "w_dec": draw(WIDTH, N_LAYERS, D, seed=8)})
    with pytest.raises(DictionaryError, match="writes to layers before its own, which cannot be"):
        pl.load_dictionary(folder, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk"}, r"config\.json: unknown architecture 'topk'; Valid: jump_relu"),
        ({"hf_hook_point_in": "model.layers.1.self_attn.output"}, "unknown hook point 'model.layers.1.self_attn.output'"),
        ({"hf_hook_point_out": "model.layers.2.output"}, "it reads layer 1 and writes to layer 2"),
        ({"tensors": without(LOWER, "threshold")}, "there is no tensor threshold"),
        ({"tensors": {**LOWER, "threshold": torch.tensor(0.1)}}, r"threshold has the shape \[\]"),
        ({"tensors": {**LOWER, "bias": torch.zeros(1)}}, "holds bias, which its format does not have"),
    ],
    ids=str,
)
def test_gemma_scope_2_that_does_not_fit(tmp_path, model, change, message):
    with pytest.raises(DictionaryError, match=message):
        pl.load_dictionary(gemma_scope_2(tmp_path, **change), model)


# --- dictionary_learning -------------------------------------------------------------------------------------------------

LINEAR = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "decoder.weight": W["W_dec"].T}
TOPK = {**LINEAR, "b_dec": W["b_dec"], "k": torch.tensor(5, dtype=torch.int32), "threshold": torch.tensor(0.4)}
SUBTRACTED = (X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]


def dictionary_learning(folder: Path, architecture: str, tensors: Any, **more: Any) -> Path:
    trainer = {"dict_class": architecture, "activation_dim": D, "dict_size": WIDTH, "layer": 1, "lm_name": "openai-community/gpt2", **more}
    return files(folder, ae__pt=tensors, config__json={"trainer": trainer, "buffer": {}})


def test_dictionary_learning_plain_autoencoder_is_normalised(tmp_path, model):
    dictionary = pl.load_dictionary(dictionary_learning(tmp_path, "AutoEncoder", {**LINEAR, "bias": W["b_dec"]}), model)
    features = relu(SUBTRACTED)
    check(dictionary, features * W["W_dec"].norm(dim=-1), features @ W["W_dec"] + W["b_dec"])


def test_dictionary_learning_other_classes(tmp_path, model):
    for architecture, tensors, features in (
        ("AutoEncoderNew", {**LINEAR, "decoder.bias": W["b_dec"]}, relu(X @ W["W_enc"] + W["b_enc"])),
        ("AutoEncoderTopK", TOPK, relu(topk(SUBTRACTED, 5))),
        ("AutoEncoderTopK", without(TOPK, "threshold"), relu(topk(SUBTRACTED, 5))),
        ("BatchTopKSAE", TOPK, relu(SUBTRACTED) * (SUBTRACTED > 0.4)),
        ("BatchTopKSAE", {**TOPK, "threshold": torch.tensor(-1.0)}, relu(SUBTRACTED)),
        (
            "MatryoshkaBatchTopKSAE",
            {**W, "k": TOPK["k"], "threshold": TOPK["threshold"], "group_sizes": torch.tensor([8, 16])},
            relu(SUBTRACTED) * (SUBTRACTED > 0.4),
        ),
        ("JumpReluAutoEncoder", {**W, "threshold": THRESHOLD}, relu(X @ W["W_enc"] + W["b_enc"]) * (X @ W["W_enc"] + W["b_enc"] > THRESHOLD)),
    ):
        more = {"k": 5} if "TopK" in architecture else {}
        dictionary = pl.load_dictionary(dictionary_learning(tmp_path, architecture, tensors, **more), model)
        features = features.clone()
        got = dictionary.encode(X)
        torch.testing.assert_close(got, features, msg=architecture)
        torch.testing.assert_close(dictionary.reconstruct(X), features @ W["W_dec"] + W["b_dec"], msg=architecture)


def test_dictionary_learning_gated(tmp_path, model):
    gate, magnitude, r = (draw(WIDTH, seed=60 + i, size=0.5) for i in range(3))
    tensors = {**without(LINEAR, "encoder.bias"), "decoder_bias": W["b_dec"], "gate_bias": gate, "mag_bias": magnitude, "r_mag": r}
    product = (X - W["b_dec"]) @ W["W_enc"]
    features = (product + gate > 0) * relu(product * r.exp() + magnitude)
    check(pl.load_dictionary(dictionary_learning(tmp_path, "GatedAutoEncoder", tensors), model), features, features @ W["W_dec"] + W["b_dec"])


@pytest.mark.parametrize(
    ("submodule", "reads"),
    [
        (None, "resid_post"),
        ("resid_post_layer_1", "resid_post"),
        ("mlp_out_layer_1", "mlp_out"),
        ("attention_out_layer_1", "attn_out"),
        ("resid_pre", "resid_pre"),
    ],
)
def test_dictionary_learning_names_submodules(tmp_path, model, submodule, reads):
    folder = dictionary_learning(tmp_path, "AutoEncoderTopK", TOPK, k=5, submodule_name=submodule)
    assert pl.load_dictionary(folder, model).reads == reads


@pytest.mark.parametrize(
    ("architecture", "tensors", "more", "message"),
    [
        ("IdentityDict", TOPK, {}, r"config\.json: unknown dict_class 'IdentityDict'"),
        ("AutoEncoderTopK", TOPK, {"k": 6}, r"k is 5, and config\.json says 6"),
        ("AutoEncoderTopK", {**TOPK, "k": torch.tensor(99)}, {}, "k is a whole number from 1 to 24"),
        ("BatchTopKSAE", without(TOPK, "threshold"), {"k": 5}, "there is no tensor threshold, which the architecture BatchTopKSAE has"),
        ("BatchTopKSAE", {**TOPK, "threshold": THRESHOLD}, {"k": 5}, r"threshold has the shape \[24\], .* needs \[\]"),
        ("AutoEncoder", {**LINEAR, "bias": W["b_dec"], "x": torch.ones(1)}, {}, "holds x, which the architecture AutoEncoder does not have"),
        ("AutoEncoderTopK", TOPK, {"k": 5, "submodule_name": "gate"}, "cannot tell the site from submodule_name 'gate'"),
        ("AutoEncoderTopK", {**TOPK, "encoder.weight": W["W_enc"]}, {"k": 5}, r"encoder\.weight has the shape \[16, 24\], .* needs \[24, 16\]"),
        (
            "MatryoshkaBatchTopKSAE",
            {**W, "k": TOPK["k"], "threshold": torch.tensor(0.1), "group_sizes": torch.tensor([8, 8])},
            {"k": 5},
            "group_sizes add up to 16",
        ),
        ("AutoEncoderTopK", [1, 2], {"k": 5}, r"ae\.pt: holds list, and a dictionary of tensors is expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dictionary_learning_that_does_not_fit(tmp_path, model, architecture, tensors, more, message):
    with pytest.raises(DictionaryError, match=message):
        pl.load_dictionary(dictionary_learning(tmp_path, architecture, tensors, **more), model)


class Trap:
    """Something that unpickling would run."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_dictionary_learning_is_never_unpickled(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = dictionary_learning(tmp_path / "a", "AutoEncoderTopK", TOPK, k=5)
    torch.save({"encoder.weight": Trap()}, folder / "ae.pt")
    with pytest.raises(DictionaryError, match=r"ae\.pt: is not a plain archive of tensors.*which patchlab never does"):
        pl.load_dictionary(folder, model)
    assert not (tmp_path / "unpickled").exists()
    (folder / "ae.pt").write_bytes(b"nothing")
    with pytest.raises(DictionaryError, match=r"ae\.pt: "):
        pl.load_dictionary(folder, model)


# --- Llama Scope ---------------------------------------------------------------------------------------------------------


def llama_scope(folder: Path, **more: Any) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    w = weights(seed=7)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    save_file(single(tensors), folder / "checkpoints" / "final.safetensors")
    cfg = {"d_model": D, "d_sae": WIDTH, "hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post"}
    cfg |= {"jump_relu_threshold": 0.2, "dataset_average_activation_norm": {"in": 2.5, "out": 2.5}, "act_fn": "jumprelu", **more}
    (folder / "hyperparams.json").write_text(json.dumps(cfg))
    return folder


def test_llama_scope_scales_inputs_and_threshold(tmp_path, model):
    """The scaled form that it was trained in, and the one for raw inputs, whose features are S times smaller and meet the written threshold."""
    dictionary = pl.load_dictionary(llama_scope(tmp_path / "L1R"), model, dtype=torch.float64)
    assert (dictionary.layer, dictionary.reads, dictionary.kind) == (1, "resid_post", "sae")
    w, s, x = weights(seed=7), D**0.5 / 2.5, draw(40, D, seed=9)
    pre = x * s @ w["W_enc"] + w["b_enc"]
    scaled = torch.where(pre > 0.2 * s, pre, 0.0)
    raw = x @ w["W_enc"] + w["b_enc"] / s
    assert 0 < int((scaled > 0).sum()) < int((pre > 0).sum())
    torch.testing.assert_close(dictionary.encode(x), scaled, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dictionary.reconstruct(x), torch.where(raw > 0.2, raw, 0.0) @ w["W_dec"] + w["b_dec"] / s, rtol=1e-6, atol=1e-6)


def test_llama_scope_that_does_not_fit(tmp_path, model):
    for change, message in (
        ({"hook_point_out": "blocks.1.hook_mlp_out"}, "a transcoder, whose outputs have a scale"),
        ({"hook_point_in": "blocks.1.hook_q", "hook_point_out": "blocks.1.hook_q"}, "unknown hook point"),
        ({"act_fn": "topk"}, "unknown act_fn 'topk'"),
        ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ({"use_glu_encoder": True}, "use_glu_encoder is True"),
        ({"dataset_average_activation_norm": {"in": 0}}, "must hold a positive number 'in'; got 0"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold must be a number"),
        ({"d_sae": WIDTH + 1}, "encoder.weight has the shape"),
    ):
        with pytest.raises(DictionaryError, match=message):
            pl.load_dictionary(llama_scope(tmp_path / "L1R", **change), model)
    with pytest.raises(DictionaryError, match=r"Llama-3\.1-8B"):
        pl.load_dictionary(llama_scope(tmp_path / "Llama3_1-8B-Base-L1R-8x"), model)


# --- sparsify ------------------------------------------------------------------------------------------------------------

SPARSE = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}


def sparsify(folder: Path, tensors: dict[str, Tensor] = SPARSE, **more: Any) -> Path:
    return files(folder, sae__safetensors=tensors, cfg__json={"d_in": D, "num_latents": WIDTH, "k": 5, "signed": False, **more})


def test_sparsify_is_top_k_and_signed_is_absolute(tmp_path, model):
    files(tmp_path, config__json={"model": "gpt2"})
    dictionary = pl.load_dictionary(sparsify(tmp_path / "layers.1"), model)
    assert (dictionary.reads, dictionary.layer, dictionary.provenance["model_name"]) == ("resid_post", 1, "gpt2")
    features = relu(topk(SUBTRACTED, 5))
    check(dictionary, features, features @ W["W_dec"] + W["b_dec"])
    dictionary = pl.load_dictionary(sparsify(tmp_path / "layers.2", signed=True), model)
    features = topk(SUBTRACTED, 5, absolute=True)
    assert isinstance(dictionary.activation, AbsTopK)
    check(dictionary, features, features @ W["W_dec"] + W["b_dec"])


def test_sparsify_transcodes_without_subtraction_and_with_a_skip(tmp_path, model):
    skip = draw(D, D, seed=7)
    dictionary = pl.load_dictionary(sparsify(tmp_path / "layers.1.mlp", {**SPARSE, "W_skip": skip}, transcode=True, skip_connection=True), model)
    assert (dictionary.kind, dictionary.reads, dictionary.writes) == ("transcoder", "mlp_in", "mlp_out")
    features = relu(topk(X @ W["W_enc"] + W["b_enc"], 5))
    check(dictionary, features, features @ W["W_dec"] + W["b_dec"] + X @ skip.T)


def test_sparsify_that_does_not_fit(tmp_path, model):
    for change, message in (
        ({"activation": "groupmax"}, "unknown activation 'groupmax'"),
        ({"k": 25}, "k is from 1 to the number of features, 24; got 25"),
        ({"num_latents": None, "expansion_factor": 2}, r"encoder\.weight has the shape \[24, 16\], .* needs \[32, 16\]"),
        ({"num_latents": None}, "expansion_factor must be a whole number; it is missing"),
        ({"skip_connection": True}, "there is no tensor W_skip"),
    ):
        with pytest.raises(DictionaryError, match=message):
            pl.load_dictionary(sparsify(tmp_path / "layers.1", **change), model)
    with pytest.raises(DictionaryError, match="the name of the folder does not say the site; expected one such as layers.3"):
        pl.load_dictionary(sparsify(tmp_path / "layers.1.gate"), model)
    assert pl.load_dictionary(sparsify(tmp_path / "mine"), model, layer=1, reads="mlp_out").layer == 1


# --- circuit-tracer ------------------------------------------------------------------------------------------------------

LAYER = {"W_enc": W["W_enc"].T, "W_dec": W["W_dec"], "b_enc": W["b_enc"], "b_dec": W["b_dec"]}
CONFIG = {
    "model_name": "gpt2",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "hook_mlp_out",
    "scan": "x",
}


def transcoder_set(folder: Path, tensors: dict[str, Tensor] = LAYER, n: int = N_LAYERS, **more: Any) -> Path:
    return files(folder, config__yaml={**CONFIG, **more}, **{f"layer_{i}__safetensors": tensors for i in range(n)})


def test_circuit_tracer_sets(tmp_path, model):
    skip = draw(D, D, seed=7)
    folder = transcoder_set(tmp_path, {**LAYER, "W_skip": skip, "activation_function.threshold": THRESHOLD})
    dictionary = pl.load_dictionary(folder, model, layer=1)
    pre = X @ W["W_enc"] + W["b_enc"]
    features = relu(pre) * (pre > THRESHOLD)
    check(dictionary, features, features @ W["W_dec"] + W["b_dec"] + X @ skip.T)
    assert (dictionary.reads, dictionary.writes) == ("mlp_in", "mlp_out")
    assert len(pl.load_dictionaries(folder, model)) == N_LAYERS


def test_circuit_tracer_top_k_keeps_what_is_negative(tmp_path, model):
    dictionary = pl.load_dictionary(transcoder_set(tmp_path, activation="topk", k=20), model, layer=0)
    features = topk(X @ W["W_enc"] + W["b_enc"], 20)
    assert isinstance(dictionary.activation, SignedTopK)
    assert bool((features < 0).any())
    check(dictionary, features, features @ W["W_dec"] + W["b_dec"])


def test_circuit_tracer_files_by_name(tmp_path, model):
    folder = transcoder_set(tmp_path, transcoders=["b.safetensors", "a.safetensors"], n=0)
    files(folder, a__safetensors=LAYER, b__safetensors={**LAYER, "b_dec": W["b_dec"] * 2})
    assert [float(d.b_dec[0] / W["b_dec"][0]) for d in pl.load_dictionaries(folder, model)] == [2.0, 1.0]
    transcoder_set(tmp_path, transcoders=["hf://google/gemma-scope-2b-pt-transcoders/layer_0/params.npz"], n=0)
    with pytest.raises(DictionaryError, match="it names files elsewhere"):
        pl.load_dictionaries(folder, model)


def cross_layer(folder: Path, **more: Any) -> Path:
    encoders = {f"W_enc_{i}__safetensors": {f"{name}_{i}": LAYER[name] for name in ("W_enc", "b_enc", "b_dec")} for i in range(N_LAYERS)}
    decoders = {f"W_dec_{i}__safetensors": {f"W_dec_{i}": draw(WIDTH, N_LAYERS - i, D, seed=i)} for i in range(N_LAYERS)}
    hooks = {"model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid"}
    return files(folder, config__yaml={**CONFIG, **hooks}, **{**encoders, **decoders, **more})


def test_circuit_tracer_across_layers(tmp_path, model):
    folder = cross_layer(tmp_path)
    features = relu(X @ W["W_enc"] + W["b_enc"])
    for layer, dictionary in enumerate(pl.load_dictionaries(folder, model)):
        w_dec = draw(WIDTH, N_LAYERS - layer, D, seed=layer)
        for to in range(N_LAYERS - layer):
            expected = features @ w_dec[:, to] + (W["b_dec"] if to == 0 else 0)
            torch.testing.assert_close(dictionary.reconstruct(X)[:, to], expected)
        assert (dictionary.kind, dictionary.reads, dictionary.layer) == ("cross_layer_transcoder", "resid_mid", layer)


def test_circuit_tracer_that_does_not_fit(tmp_path, model):
    for i, (change, message) in enumerate(
        (
            ({"model_kind": "lorsa"}, r"config\.yaml: unknown model_kind 'lorsa'"),
            ({"feature_input_hook": None}, "feature_input_hook must be a text; got None"),
            ({"feature_input_hook": "mlp.hook_inn"}, "unknown hook 'blocks.0.mlp.hook_inn'"),
            ({"activation": "gelu"}, "unknown activation 'gelu'"),
            ({"activation": "topk", "k": 99}, "k is a whole number from 1 to 24; got 99"),
            ({"model_name": "google/gemma-2-2b"}, "it was trained on google/gemma-2-2b, and this model is gpt2"),
            ({"n": 4}, "it reads layer 3, and gpt2 has the layers 0 to 2"),
            ({"n": 0}, r"there is no layer_0\.safetensors; the folder is incomplete"),
            ({"tensors": without(LAYER, "b_enc")}, "there is no tensor b_enc, which the architecture transcoder has"),
            ({"tensors": {**LAYER, "log_thresholds": THRESHOLD}}, "holds log_thresholds"),
            ({"tensors": {**LAYER, "activation_function.threshold": torch.zeros(1)}}, r"threshold has the shape \[1\]"),
            ({"tensors": {**LAYER, "activation_function.threshold": -THRESHOLD}}, "24 thresholds are below zero"),
            ({"tensors": {**LAYER, "W_dec": torch.full((WIDTH, D), torch.inf)}}, "W_dec holds 384 of 384 values that are NaN or infinite"),
        )
    ):
        with pytest.raises(DictionaryError, match=message):
            pl.load_dictionaries(transcoder_set(tmp_path / str(i), **change), model)
    folder = cross_layer(tmp_path / "clt")
    (folder / "W_enc_1.safetensors").unlink()
    with pytest.raises(DictionaryError, match=r"there is no W_enc_1\.safetensors; the folder is incomplete"):
        pl.load_dictionaries(folder, model)
    folder = cross_layer(tmp_path / "clt2", W_dec_1__safetensors={"W_dec_1": torch.zeros(WIDTH, 3, D)})
    with pytest.raises(DictionaryError, match=r"W_dec_1 has the shape \[24, 3, 16\], .* needs \[24, 2, 16\]"):
        pl.load_dictionaries(folder, model)
    files(tmp_path / "yaml", config__yaml="a: [1")
    with pytest.raises(DictionaryError, match=r"config\.yaml: is no YAML"):
        pl.load_dictionaries(tmp_path / "yaml", model)
