"""Gemma Scope 2: ``config.json`` and ``params.safetensors``, or one ``params_layer_*.safetensors`` per layer of a cross-layer transcoder.

Read from the loaders of SAELens 6.54.12 and circuit-tracer 0.5.0. The decoder of a cross-layer transcoder has an axis of all layers, of which its own
and later ones are used; its skip, and that of a transcoder, is ``x @ affine_skip_connection``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchlab.errors import DictionaryError, unknown
from patchlab.features.activations import JumpRelu
from patchlab.features.dictionary import Dictionary
from patchlab.features.formats.format import Format, Said, needed, read_json
from patchlab.features.formats.tensors import Tensors, read_tensors

CONFIG, PARAMS, LAYERS = "config.json", "params.safetensors", "params_layer_*.safetensors"
_SITES = {
    "output": "resid_post",
    "self_attn.o_proj.input": "z",
    "post_feedforward_layernorm.output": "mlp_out",
    "pre_feedforward_layernorm.output": "mlp_in",
}


def _read(folder: Path, said: Said) -> Iterator[Dictionary]:
    config = folder / CONFIG
    cfg = read_json(config) if config.is_file() or (folder / PARAMS).is_file() else {}
    if (architecture := cfg.get("architecture", "jump_relu")) != "jump_relu":
        raise DictionaryError(f"{config}: " + unknown("architecture", architecture, ["jump_relu"]))
    if (folder / PARAMS).is_file():
        yield _single(cfg, read_tensors(folder / PARAMS), config)
        return
    files = sorted(folder.glob(LAYERS), key=_number)
    for file in files:
        if said.layer is None or _number(file) == said.layer:
            yield _across(cfg, read_tensors(file), _number(file))


def _number(file: Path) -> int:
    match = re.fullmatch(r"params_layer_(\d+)", file.stem)
    if match is None:
        raise DictionaryError(f"{file}: the number of its layer is not in its name.")
    return int(match[1])


def _place(hook: str, config: Path) -> tuple[str, int]:
    """Site kind and layer of a Hugging Face module, such as ``model.layers.3.output``."""
    match = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.+)", hook)
    if match is None or match[2] not in _SITES:
        valid = [f"model.layers.3.{name}" for name in _SITES]
        raise DictionaryError(f"{config}: " + unknown("hook point", hook, valid))
    return _SITES[match[2]], int(match[1])


def _single(cfg: dict[str, Any], tensors: Tensors, config: Path) -> Dictionary:
    reads, layer = _place(needed(cfg, "hf_hook_point_in", str, config), config)
    out = cfg.get("hf_hook_point_out") or cfg["hf_hook_point_in"]
    writes, to = _place(out, config)
    if to != layer:
        raise DictionaryError(f"{config}: it reads layer {layer} and writes to layer {to}; only a transcoder of one layer is read from {PARAMS}.")
    w_enc = tensors.take("w_enc", (None, None))
    d_in, width = w_enc.shape
    w_dec = tensors.take("w_dec", (width, d_in if reads == writes else None))
    skip = bool(cfg.get("affine_connection")) or "affine_skip_connection" in tensors
    w_skip = tensors.take("affine_skip_connection", (d_in, w_dec.shape[1])) if skip else None
    b_enc, b_dec, threshold = tensors.take("b_enc", (width,)), tensors.take("b_dec", (w_dec.shape[1],)), tensors.take("threshold", (width,))
    tensors.done()
    return Dictionary(
        name=f"{reads}/{layer}",
        kind="sae" if reads == writes else "transcoder",
        layer=layer,
        reads=reads,
        writes=writes,
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        activation=JumpRelu(threshold),
        w_skip=w_skip,
        provenance={"file": str(tensors.file), "format": "Gemma Scope 2", "model_name": _model(cfg)},
    )


def _across(cfg: dict[str, Any], tensors: Tensors, layer: int) -> Dictionary:
    w_enc = tensors.take("w_enc", (None, None))
    d_in, width = w_enc.shape
    w_dec = tensors.take("w_dec", (width, None, None))
    if layer >= w_dec.shape[1] or bool((w_dec[:, :layer] != 0).any()):
        what = f"to {w_dec.shape[1]} layers" if layer >= w_dec.shape[1] else "to layers before its own"
        raise DictionaryError(f"{tensors.file}: the transcoder of layer {layer} writes {what}, which cannot be.")
    w_skip = tensors.take("affine_skip_connection", (d_in, w_dec.shape[2])) if "affine_skip_connection" in tensors else None
    b_enc, b_dec, threshold = tensors.take("b_enc", (width,)), tensors.take("b_dec", (w_dec.shape[2],)), tensors.take("threshold", (width,))
    tensors.done()
    return Dictionary(
        name=f"cross-layer/{layer}",
        kind="cross_layer_transcoder",
        layer=layer,
        reads="mlp_in",
        writes="mlp_out",
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec[:, layer:].contiguous(),
        b_dec=b_dec,
        activation=JumpRelu(threshold),
        w_skip=w_skip,
        provenance={"file": str(tensors.file), "format": "Gemma Scope 2", "model_name": _model(cfg)},
    )


def _model(cfg: dict[str, Any]) -> str | None:
    name = cfg.get("model_name")
    return name.replace("-v3", "-3") if isinstance(name, str) else None


GEMMA_SCOPE_2 = Format("Gemma Scope 2", (CONFIG, PARAMS, LAYERS), (PARAMS, LAYERS), _read)
