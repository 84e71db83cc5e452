"""dictionary_learning: ``ae.pt``, a plain state dict, and ``config.json``. Read from the source of version 0.1.0."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchlab.errors import DictionaryError, unknown
from patchlab.features.activations import JumpRelu, Relu, TopK, gated
from patchlab.features.dictionary import Dictionary
from patchlab.features.formats.format import Format, Said, needed, read_json
from patchlab.features.formats.tensors import Tensors, read_tensors

CONFIG, WEIGHTS = "config.json", "ae.pt"


def _read(folder: Path, said: Said) -> Iterator[Dictionary]:
    config = folder / CONFIG
    trainer = needed(read_json(config), "trainer", dict, config)
    architecture = needed(trainer, "dict_class", str, config)
    if architecture not in _CLASSES:
        raise DictionaryError(f"{config}: " + unknown("dict_class", architecture, _CLASSES))
    d_in, width = needed(trainer, "activation_dim", int, config), needed(trainer, "dict_size", int, config)
    layer = needed(trainer, "layer", int, config)
    tensors = read_tensors(folder / WEIGHTS)
    tensors.architecture = architecture
    parts = _CLASSES[architecture](tensors, d_in, width, trainer)
    tensors.done()
    reads = _site(trainer.get("submodule_name"), said, config)
    yield Dictionary(
        name=folder.name,
        kind="sae",
        layer=layer,
        reads=reads,
        writes=reads,
        provenance={
            "file": str(tensors.file),
            "format": "dictionary_learning",
            "architecture": architecture,
            "model_name": trainer.get("lm_name"),
        },
        **parts,
    )


def _site(submodule: Any, said: Said, config: Path) -> str:
    """The site of a submodule's name, such as ``resid_post_layer_8``; without one it is the residual stream after the block."""
    if submodule is None:
        return said.reads or "resid_post"
    name = str(submodule)
    for word, site in (("resid_pre", "resid_pre"), ("resid", "resid_post"), ("mlp", "mlp_out"), ("att", "attn_out")):
        if word in name:
            return site
    if said.reads is None:
        raise DictionaryError(f"{config}: cannot tell the site from submodule_name {name!r}; pass reads= (resid_post, attn_out, mlp_out).")
    return said.reads


def _linear(tensors: Tensors, d_in: int, width: int) -> dict[str, Tensor]:
    return {
        "w_enc": tensors.take("encoder.weight", (width, d_in)).T.contiguous(),
        "b_enc": tensors.take("encoder.bias", (width,)),
        "w_dec": tensors.take("decoder.weight", (d_in, width)).T.contiguous(),
    }


def _plain(tensors: Tensors, d_in: int, width: int) -> dict[str, Tensor]:
    shapes = {"W_enc": (d_in, width), "b_enc": (width,), "W_dec": (width, d_in), "b_dec": (d_in,)}
    return {name.lower(): tensors.take(name, shape) for name, shape in shapes.items()}


def _autoencoder(tensors: Tensors, d_in: int, width: int, trainer: dict[str, Any]) -> dict[str, Any]:
    parts = _linear(tensors, d_in, width)
    norms = parts["w_dec"].norm(dim=-1)
    if not bool((norms > 0).all()):
        raise DictionaryError(f"{tensors.file}: {int((norms == 0).sum())} rows of the decoder are zero, and it is normalised when it is read.")
    if not torch.allclose(norms, torch.ones_like(norms)):  # as the library does, with the tolerance that it has
        parts = {"w_enc": parts["w_enc"] * norms, "b_enc": parts["b_enc"] * norms, "w_dec": parts["w_dec"] / norms[:, None]}
    return {**parts, "b_dec": tensors.take("bias", (d_in,)), "activation": Relu(), "subtract_b_dec": True}


def _autoencoder_new(tensors: Tensors, d_in: int, width: int, trainer: dict[str, Any]) -> dict[str, Any]:
    return {**_linear(tensors, d_in, width), "b_dec": tensors.take("decoder.bias", (d_in,)), "activation": Relu()}


def _gated(tensors: Tensors, d_in: int, width: int, trainer: dict[str, Any]) -> dict[str, Any]:
    encoder = tensors.take("encoder.weight", (width, d_in)).T
    w_enc, b_enc, activation = gated(encoder, *(tensors.take(name, (width,)) for name in ("gate_bias", "mag_bias", "r_mag")))
    return {
        "w_enc": w_enc.contiguous(),
        "b_enc": b_enc,
        "w_dec": tensors.take("decoder.weight", (d_in, width)).T.contiguous(),
        "b_dec": tensors.take("decoder_bias", (d_in,)),
        "activation": activation,
        "subtract_b_dec": True,
    }


def _jumprelu(tensors: Tensors, d_in: int, width: int, trainer: dict[str, Any]) -> dict[str, Any]:
    return {**_plain(tensors, d_in, width), "activation": JumpRelu(tensors.take("threshold", (width,)))}


def _topk(tensors: Tensors, d_in: int, width: int, trainer: dict[str, Any]) -> dict[str, Any]:
    k = _k(tensors, trainer, width)
    if "threshold" in tensors:
        tensors.take("threshold", ())  # for another way to encode, which is not the default
    return {**_linear(tensors, d_in, width), "b_dec": tensors.take("b_dec", (d_in,)), "activation": TopK(k), "subtract_b_dec": True}


def _batch_topk(tensors: Tensors, d_in: int, width: int, trainer: dict[str, Any]) -> dict[str, Any]:
    _k(tensors, trainer, width)
    parts = {**_linear(tensors, d_in, width), "b_dec": tensors.take("b_dec", (d_in,))}
    return {**parts, "activation": _one_threshold(tensors, width), "subtract_b_dec": True}


def _matryoshka(tensors: Tensors, d_in: int, width: int, trainer: dict[str, Any]) -> dict[str, Any]:
    _k(tensors, trainer, width)
    sizes = tensors.take("group_sizes", (None,))
    if int(sizes.sum()) != width:
        raise DictionaryError(f"{tensors.file}: group_sizes add up to {int(sizes.sum())}, and there are {width} features.")
    return {**_plain(tensors, d_in, width), "activation": _one_threshold(tensors, width), "subtract_b_dec": True}


def _one_threshold(tensors: Tensors, width: int) -> JumpRelu:
    """The threshold that stands for the choice over a batch at inference; below zero it was never set, and every positive feature passes."""
    return JumpRelu(tensors.take("threshold", ()).expand(width).clone())


def _k(tensors: Tensors, trainer: dict[str, Any], width: int) -> int:
    said = trainer.get("k")
    k = int(tensors.take("k", ())) if "k" in tensors else said
    if not isinstance(k, int) or not 1 <= k <= width:
        raise DictionaryError(f"{tensors.file}: k is a whole number from 1 to {width}, in the file or its {CONFIG}; got {k!r}.")
    if said is not None and said != k:
        raise DictionaryError(f"{tensors.file}: k is {k}, and {CONFIG} says {said}.")
    return k


_CLASSES: dict[str, Callable[[Tensors, int, int, dict[str, Any]], dict[str, Any]]] = {
    "AutoEncoder": _autoencoder,
    "AutoEncoderNew": _autoencoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}

DICTIONARY_LEARNING = Format("dictionary_learning", (CONFIG, WEIGHTS), (WEIGHTS,), _read)
