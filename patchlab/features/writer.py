"""The SAELens layout of a dictionary: ``cfg.json`` beside ``sae_weights.safetensors``.

What SAELens has an architecture for is written as that, and it reads the folder. Codebooks, cross-layer transcoders and other combinations
are written in the same layout with the architecture ``patchlab``, which SAELens refuses by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchlab.errors import DictionaryError, OutputError
from patchlab.features.activations import AbsTopK, Activation, Codes, JumpRelu, Relu, SignedTopK, TopK
from patchlab.features.hooks import hook_of
from patchlab.features.normalisation import ConstantNorm, LayerNorm, Normalisation, Unchanged
from patchlab.store.files import json_text, sha256_of, write_json, writing

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OWN = "patchlab"
"""The architecture of what SAELens has no word for."""
SAELENS_VERSION = "6.54.12"
"""The version of SAELens whose layout this is."""
ACTIVATIONS: dict[type[Activation], str] = {
    Relu: "relu",
    JumpRelu: "jumprelu",
    TopK: "topk",
    AbsTopK: "abstopk",
    SignedTopK: "signedtopk",
    Codes: "codes",
}
NORMALISATIONS: dict[type[Normalisation], str] = {Unchanged: "none", LayerNorm: "layer_norm", ConstantNorm: "constant_norm_rescale"}
_AUTOENCODERS = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk", "abstopk": "abstopk"}
_TRANSCODERS = {
    ("relu", False): "transcoder",
    ("relu", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}


def write(folder: Path, dictionary: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a dictionary, given by its fields, into a folder that is made if it is not there.

    ``cfg.json`` comes last (and goes first, where it is overwritten) and holds the SHA-256 of the weights: a folder that has one is whole.

    Raises:
        OutputError: the folder holds a dictionary and ``overwrite`` is False, or it cannot be written to.
        DictionaryError: an activation or a normalisation that is not patchlab's own.
    """
    from safetensors.torch import save_file

    cfg, tensors = contents(dictionary)
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}. Choose a folder that you may write to.") from error
    there = [name for name in (CFG, WEIGHTS) if (folder / name).exists()]
    if there and not overwrite:
        raise OutputError(f"{folder} holds a dictionary ({', '.join(there)}) and is not overwritten. Choose another folder, or pass overwrite=True.")
    json_text(cfg, f"the provenance of {dictionary['name']}")
    (folder / CFG).unlink(missing_ok=True)
    with writing(folder / WEIGHTS, overwrite=overwrite) as temporary:
        save_file(tensors, temporary)
    cfg["metadata"]["patchlab"]["sha256"] = sha256_of(folder / WEIGHTS)
    write_json(folder / CFG, cfg, overwrite=overwrite)


def contents(dictionary: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is written of a dictionary: the configuration and the tensors.

    Raises:
        DictionaryError: an activation or a normalisation that is not patchlab's own.
    """
    kind, activation, skip = dictionary["kind"], dictionary["activation"], dictionary["w_skip"]
    named, normalised = ACTIVATIONS.get(type(activation)), NORMALISATIONS.get(type(dictionary["normalise"]))
    if named is None or normalised is None:
        missing = type(activation) if named is None else type(dictionary["normalise"])
        raise DictionaryError(f"{dictionary['name']}: {missing.__name__} has no name in files; those with one are {', '.join(ACTIVATIONS.values())}.")
    architecture = OWN
    if kind in ("sae", "multi_layer") and skip is None:
        architecture = _AUTOENCODERS.get(named, OWN)
    elif kind == "transcoder" and not dictionary["subtract_b_dec"]:
        architecture = _TRANSCODERS.get((named, skip is not None), OWN)
    w_enc, w_dec, provenance = dictionary["w_enc"], dictionary["w_dec"], dictionary["provenance"]
    own: dict[str, Any] = {"name": dictionary["name"]}
    if architecture == OWN:
        own |= {"kind": kind, "activation": named, "writes": dictionary["writes"]}
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": w_enc.shape[0],
        "d_sae": w_enc.shape[1],
        "dtype": str(w_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary["subtract_b_dec"],
        "normalize_activations": normalised,
        "reshape_activations": "none" if dictionary["heads"] is None else "hook_z",
        "metadata": {
            **provenance.get("metadata", {}),
            "sae_lens_version": SAELENS_VERSION,
            "model_name": provenance.get("model_name"),
            "hook_name": hook_of(dictionary["reads"], dictionary["layer"]),
            "hook_head_index": None,
            "patchlab": own,
        },
    }
    if dictionary["writes"] != dictionary["reads"]:
        cfg["d_out"] = w_dec.shape[-1]
        cfg["metadata"]["hook_name_out"] = hook_of(dictionary["writes"], dictionary["layer"])
    tensors = {"W_enc": w_enc, "b_enc": dictionary["b_enc"], "W_dec": w_dec, "b_dec": dictionary["b_dec"]}
    if isinstance(activation, (TopK, AbsTopK, SignedTopK, Codes)):
        cfg["k"] = activation.k
    if isinstance(activation, (TopK, AbsTopK)):
        cfg["rescale_acts_by_decoder_norm"] = False
    if isinstance(activation, JumpRelu):
        tensors["threshold"] = activation.threshold
    if skip is not None:
        tensors["W_skip"] = skip.T
    return cfg, {name: _plain(value) for name, value in tensors.items()}


def _plain(value: Tensor) -> Tensor:
    """A tensor with memory of its own, as the file format wants it."""
    return value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
