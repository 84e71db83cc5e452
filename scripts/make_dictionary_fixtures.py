"""Small dictionary files as the field's own libraries write them, with what those libraries compute from them, for tests/features.

Each library pins other versions than patchlab's, so each runs in an environment of its own, and this script imports nothing of patchlab:

    python -m venv v && v/bin/pip install torch sae-lens            && v/bin/python scripts/make_dictionary_fixtures.py saelens
    python -m venv v && v/bin/pip install torch dictionary-learning && v/bin/python scripts/make_dictionary_fixtures.py dictionary_learning
    python -m venv v && v/bin/pip install torch circuit-tracer      && v/bin/python scripts/make_dictionary_fixtures.py circuit_tracer

Written with sae-lens 6.54.12, dictionary-learning 0.1.0 and circuit-tracer 0.5.0. Each folder gets ``expected.safetensors``: the inputs ``x`` and
the library's ``features`` and ``output`` on them, float32.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).resolve().parents[1] / "tests" / "features" / "fixtures"
D, WIDTH, HEADS, LAYERS, ROWS = 16, 24, 4, 3, 6
SIZES = {"W_enc": 0.4, "W_dec": 0.3, "W_skip": 0.3, "encoder": 0.4, "decoder": 0.3}


def draw(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Give every floating parameter and buffer random values; thresholds are positive."""
    with torch.no_grad():
        for i, (name, value) in enumerate(sorted(module.state_dict().items())):
            if value.is_floating_point():
                size = next((size for part, size in SIZES.items() if part in name and "bias" not in name), 0.2)
                new = draw(*value.shape, seed=seed * 100 + i, size=size)
                value.copy_(new.abs() if "threshold" in name else new)


def expect(folder: Path, x: Tensor, features: Tensor, output: Tensor) -> None:
    """Note what the library computes."""
    parts = {"x": x, "features": features.to_dense() if features.is_sparse else features, "output": output}
    save_file({name: value.detach().to(torch.float32).contiguous().clone() for name, value in parts.items()}, folder / "expected.safetensors")


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder without the files of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    yield folder


def saelens() -> None:
    """Every architecture that SAELens has a class for, each saved by it and read back by it."""
    from sae_lens import SAE, TrainingSAE

    warnings.filterwarnings("ignore")
    hooks = {"transcoder": ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"), "z": ("blocks.1.attn.hook_z", None)}
    plain = ("blocks.1.hook_resid_post", None)
    cases: dict[str, dict[str, Any]] = {
        "standard": {},
        "standard_no_subtraction": {"architecture": "standard", "apply_b_dec_to_input": False},
        "standard_layer_norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
        "standard_constant_norm": {"architecture": "standard", "normalize_activations": "constant_norm_rescale"},
        "standard_z": {"architecture": "standard", "reshape_activations": "hook_z"},
        "jumprelu": {},
        "topk": {"k": 5},
        "topk_rescaled": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
        "abstopk": {"k": 5},
        "abstopk_rescaled": {"architecture": "abstopk", "k": 5, "rescale_acts_by_decoder_norm": True},
        "gated": {},
        "transcoder": {"d_out": D},
        "transcoder_layer_norm": {"architecture": "transcoder", "d_out": D, "normalize_activations": "layer_norm"},
        "skip_transcoder": {"d_out": D},
        "jumprelu_transcoder": {"d_out": D},
        "jumprelu_skip_transcoder": {"d_out": D},
    }
    for seed, (name, more) in enumerate(cases.items()):
        architecture = more.get("architecture", name)
        hook, out = hooks["transcoder"] if "transcoder" in name else hooks["z"] if name.endswith("_z") else plain
        metadata = {"model_name": "gpt2", "hook_name": hook, "hook_name_out": out, "hook_head_index": None}
        cfg = {"architecture": architecture, "d_in": D, "d_sae": WIDTH, "dtype": "float32", "device": "cpu", "metadata": metadata, **more}
        cfg.setdefault("apply_b_dec_to_input", "transcoder" not in name)
        sae = SAE.from_dict(cfg)
        randomise(sae, seed)
        with emptied(OUT / "saelens" / name) as folder:
            sae.save_model(folder)
            again = SAE.load_from_disk(folder)
            x = draw(ROWS, HEADS, D // HEADS, seed=999) if name.endswith("_z") else draw(ROWS, D, seed=999)
            expect(folder, x, again.encode(x), again(x))
    for seed, (name, more) in enumerate({"batchtopk": {"k": 5.0}, "matryoshka_batchtopk": {"k": 5.0, "matryoshka_widths": [8, 16, WIDTH]}}.items()):
        metadata = {"model_name": "gpt2", "hook_name": plain[0], "hook_head_index": None}
        cfg = {"architecture": name, "d_in": D, "d_sae": WIDTH, "dtype": "float32", "device": "cpu", "metadata": metadata, **more}
        sae = TrainingSAE.from_dict(cfg)
        randomise(sae, 50 + seed)
        sae.topk_threshold = torch.tensor(0.4, dtype=sae.topk_threshold.dtype)
        with emptied(OUT / "saelens" / name) as folder:
            sae.save_inference_model(folder)
            again = SAE.load_from_disk(folder)
            x = draw(ROWS, D, seed=999)
            expect(folder, x, again.encode(x), again(x))


def dictionary_learning() -> None:
    """Every class that dictionary_learning loads, saved as its trainers do and read back by it."""
    from dictionary_learning import dictionary, utils
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {
        "AutoEncoder": dictionary.AutoEncoder(D, WIDTH),
        "AutoEncoderNew": dictionary.AutoEncoderNew(D, WIDTH),
        "GatedAutoEncoder": dictionary.GatedAutoEncoder(D, WIDTH),
        "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder(D, WIDTH),
        "AutoEncoderTopK": AutoEncoderTopK(D, WIDTH, 5),
        "BatchTopKSAE": BatchTopKSAE(D, WIDTH, 5),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, WIDTH, 5, [8, 8, 8]),
    }
    for seed, (name, ae) in enumerate(made.items()):
        randomise(ae, seed)
        with emptied(OUT / "dictionary_learning" / name) as folder:
            torch.save(ae.state_dict(), folder / "ae.pt")
            trainer = {
                "dict_class": name,
                "activation_dim": D,
                "dict_size": WIDTH,
                "layer": 1,
                "lm_name": "gpt2",
                "submodule_name": "resid_post_layer_1",
            }
            if hasattr(ae, "k"):
                trainer["k"] = 5
            (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}, indent=1))
            again, _ = utils.load_dictionary(str(folder), "cpu")
            x = draw(ROWS, D, seed=999)
            features = again.encode(x)
            expect(folder, x, features, again.decode(features))


def circuit_tracer() -> None:
    """Sets of transcoders and cross-layer ones of circuit-tracer; files of Gemma Scope 1 and 2 by hand, read by circuit-tracer."""
    from circuit_tracer.transcoder import cross_layer_transcoder as clt
    from circuit_tracer.transcoder import single_layer_transcoder as plt
    from circuit_tracer.transcoder.activation_functions import JumpReLU

    cpu, single = torch.device("cpu"), torch.float32
    x = draw(LAYERS, ROWS, D, seed=999)

    def config(folder: Path, kind: str, hook: str) -> None:
        about = {"model_name": "gpt2", "model_kind": kind, "feature_input_hook": hook, "feature_output_hook": "hook_mlp_out", "scan": "someone/tiny"}
        (folder / "config.yaml").write_text(yaml.safe_dump(about))

    for seed, (name, jump, skip) in enumerate((("relu", False, False), ("jumprelu_skip", True, True))):
        layers = {}
        for layer in range(LAYERS):
            activation = JumpReLU(torch.zeros(WIDTH)) if jump else torch.nn.functional.relu
            layers[layer] = plt.SingleLayerTranscoder(D, WIDTH, activation, layer, skip_connection=skip, device=cpu, dtype=single)
            randomise(layers[layer], 10 * seed + layer)
        with emptied(OUT / "circuit_tracer" / f"set_{name}") as folder:
            plt.TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out").to_safetensors(str(folder))
            config(folder, "transcoder_set", "mlp.hook_in")
            paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(LAYERS)}
            again = plt.load_transcoder_set(paths, "scan", "mlp.hook_in", "hook_mlp_out", device=cpu, dtype=single)
            features = again.encode(x)
            expect(folder, x, features, again.decode(features, x))
    for seed, name in enumerate(("relu", "jump_relu")):
        model = clt.CrossLayerTranscoder(LAYERS, WIDTH, D, name, lazy_decoder=False, device=cpu, dtype=single)
        randomise(model, 40 + seed)
        with emptied(OUT / "circuit_tracer" / f"clt_{name}") as folder:
            model.to_safetensors(str(folder))
            config(folder, "cross_layer_transcoder", "hook_resid_mid")
            again = clt.load_clt(str(folder), device=cpu, dtype=single, lazy_decoder=False)
            expect(folder, x, again.encode(x), again(x))

    def hand(*shapes: tuple[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        made = {name: draw(*shape, seed=100 * seed + i, size=0.3) for i, (name, shape) in enumerate(shapes)}
        return {name: value.abs() if name == "threshold" else value for name, value in made.items()}

    biases = (("b_enc", (WIDTH,)), ("b_dec", (D,)), ("threshold", (WIDTH,)))
    with emptied(OUT / "gemma_scope" / "layer_1") as folder:
        parts = hand(("W_enc", (D, WIDTH)), ("W_dec", (WIDTH, D)), *biases, seed=60)
        np.savez(folder / "params.npz", **{name: value.numpy() for name, value in parts.items()})
        again = plt.load_gemma_scope_transcoder(str(folder / "params.npz"), 1, device=cpu)
        expect(folder, x[1], again.encode(x[1]), again(x[1]))
    with emptied(OUT / "gemma_scope_2" / "transcoder") as folder:
        parts = hand(("w_enc", (D, WIDTH)), ("w_dec", (WIDTH, D)), ("affine_skip_connection", (D, D)), *biases, seed=61)
        save_file(parts, folder / "params.safetensors")
        layer = "model.layers.1."
        about = {
            "architecture": "jump_relu",
            "model_name": "gpt2",
            "hf_hook_point_in": f"{layer}pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"{layer}post_feedforward_layernorm.output",
            "affine_connection": True,
        }
        (folder / "config.json").write_text(json.dumps(about, indent=1))
        again = plt.load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 1, device=cpu)
        expect(folder, x[1], again.encode(x[1]), again(x[1]))
    with emptied(OUT / "gemma_scope_2" / "clt") as folder:
        for layer in range(LAYERS):
            shapes = (("w_enc", (D, WIDTH)), ("w_dec", (WIDTH, LAYERS, D)), ("affine_skip_connection", (D, D)))
            parts = hand(*shapes, *biases, seed=70 + layer)
            parts["w_dec"][:, :layer] = 0
            save_file(parts, folder / f"params_layer_{layer}.safetensors")
        # its loader leaves out the last path that it is given
        paths = {i: str(folder / f"params_layer_{min(i, LAYERS - 1)}.safetensors") for i in range(LAYERS + 1)}
        again = clt.load_gemma_scope_2_clt(paths, device=cpu, dtype=single)
        expect(folder, x, again.encode(x), again.decode(again.encode(x), x))


LIBRARIES: dict[str, Callable[[], None]] = {"saelens": saelens, "dictionary_learning": dictionary_learning, "circuit_tracer": circuit_tracer}

if __name__ == "__main__":
    with torch.no_grad():
        LIBRARIES[sys.argv[1]]()
