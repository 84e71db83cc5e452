"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``. Read as SAELens does (its loader for these files).

Training saw inputs times ``S = √d / dataset_average_activation_norm``, and the one threshold is for features divided by S: for pre-activations of
scaled inputs it is S times as large. Transcoders, whose outputs have a factor of their own, are not read.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from patchlab.errors import DictionaryError, unknown
from patchlab.features.activations import JumpRelu
from patchlab.features.dictionary import Dictionary, folded
from patchlab.features.formats.format import Format, Said, needed, read_json
from patchlab.features.formats.tensors import read_tensors

CFG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_HOOKS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_BASE = "Llama3_1-8B-Base"


def _read(folder: Path, said: Said) -> Iterator[Dictionary]:
    file = folder / CFG
    cfg = read_json(file)
    d, width = needed(cfg, "d_model", int, file), needed(cfg, "d_sae", int, file)
    if (activation := str(cfg.get("act_fn", "jumprelu")).lower()) != "jumprelu":
        raise DictionaryError(f"{file}: " + unknown("act_fn", activation, ["jumprelu"]))
    for key, expected in (("use_glu_encoder", False), ("use_decoder_bias", True), ("norm_activation", "dataset-wise")):
        if cfg.get(key, expected) != expected:
            raise DictionaryError(f"{file}: {key} is {cfg[key]!r}, and only dictionaries with {expected!r} are read.")
    reads, layer = _place(cfg, file)
    norm, threshold = needed(cfg, "dataset_average_activation_norm", dict, file).get("in"), cfg.get("jump_relu_threshold")
    if not isinstance(norm, (int, float)) or not norm > 0:
        raise DictionaryError(f"{file}: dataset_average_activation_norm must hold a positive number 'in'; got {norm!r}.")
    if not isinstance(threshold, (int, float)) or threshold < 0:
        raise DictionaryError(f"{file}: jump_relu_threshold must be a number that is not negative; got {threshold!r}.")
    factor = d**0.5 / float(norm)
    tensors = read_tensors(folder / WEIGHTS)
    w_enc, b_enc = tensors.take("encoder.weight", (width, d)).T.contiguous(), tensors.take("encoder.bias", (width,))
    w_dec, b_dec = tensors.take("decoder.weight", (d, width)).T.contiguous(), tensors.take("decoder.bias", (d,))
    tensors.done()
    w_enc, w_dec = folded(w_enc, w_dec, factor)
    yield Dictionary(
        name=folder.name,
        kind="sae",
        layer=layer,
        reads=reads,
        writes=reads,
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec / factor,
        activation=JumpRelu(torch.full((width,), float(threshold) * factor, dtype=w_enc.dtype)),
        provenance={
            "file": str(tensors.file),
            "format": "Llama Scope",
            "model_name": "meta-llama/Llama-3.1-8B" if folder.name.startswith(_BASE) else None,
        },
    )


def _place(cfg: dict[str, Any], file: Path) -> tuple[str, int]:
    """Site kind and layer of the hook that is read and written."""
    hook = needed(cfg, "hook_point_in", str, file)
    out = cfg.get("hook_point_out", hook)
    if out != hook:
        raise DictionaryError(
            f"{file}: it reads {hook} and writes {out}: a transcoder, whose outputs have a scale that the file does not fix. Only autoencoders of "
            f"Llama Scope are read; save it with SAELens and load that folder."
        )
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", hook)
    if match is None or match[2] not in _HOOKS:
        raise DictionaryError(f"{file}: " + unknown("hook point", hook, [f"blocks.3.hook_{name}" for name in _HOOKS]))
    return match[2], int(match[1])


LLAMA_SCOPE = Format("Llama Scope", (CFG, WEIGHTS), (CFG,), _read)
