"""circuit-tracer: ``config.yaml`` with one file per layer of a set of transcoders, or two of a cross-layer transcoder.

Read from the source of versions 0.4.1 and 0.5.0. Encoders lie transposed against SAELens; the skip of a transcoder is ``x @ W_skip.T``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from patchlab.errors import DictionaryError, unknown
from patchlab.features.activations import Activation, JumpRelu, Relu, SignedTopK
from patchlab.features.dictionary import Dictionary
from patchlab.features.formats.format import Format, Said, needed
from patchlab.features.formats.tensors import Tensors, read_tensors
from patchlab.features.hooks import kind_of

CONFIG = "config.yaml"
_KINDS = ("transcoder_set", "cross_layer_transcoder")


def _read(folder: Path, said: Said) -> Iterator[Dictionary]:
    config = folder / CONFIG
    try:
        cfg = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DictionaryError(f"{config}: is no YAML ({error}). It is damaged or was not downloaded to its end; get it again.") from error
    if not isinstance(cfg, dict):
        raise DictionaryError(f"{config}: holds {type(cfg).__name__}, and keys with values are expected.")
    kind = needed(cfg, "model_kind", str, config)
    if kind not in _KINDS:
        raise DictionaryError(f"{config}: " + unknown("model_kind", kind, _KINDS))
    where = {"reads": kind_of(needed(cfg, "feature_input_hook", str, config)), "writes": kind_of(needed(cfg, "feature_output_hook", str, config))}
    files = _listed(cfg, folder) if "transcoders" in cfg else _numbered(folder, "layer_*" if kind == "transcoder_set" else "W_enc_*")
    for layer, file in enumerate(files):
        if said.layer is None or said.layer == layer:
            read = _single if kind == "transcoder_set" else _across
            yield read(cfg, read_tensors(file), layer, len(files), {**where, "layer": layer, "name": f"{folder.name}/{layer}"})


def _listed(cfg: dict[str, Any], folder: Path) -> list[Path]:
    """The files that the configuration names, in the order of layers."""
    names = cfg["transcoders"]
    if not isinstance(names, list) or not names:
        raise DictionaryError(f"{folder / CONFIG}: transcoders must list a file for each layer; got {names!r}.")
    if remote := [name for name in names if "://" in str(name)]:
        raise DictionaryError(
            f"{folder / CONFIG}: it names files elsewhere ({remote[0]}{', ...' if len(remote) > 1 else ''}), which are not fetched from here. "
            f"Load the repository that holds them, or a folder with a copy."
        )
    return [folder / str(name) for name in names]


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """The files of all layers, by number; none may be missing."""
    found = {int(match[1]): file for file in folder.glob(f"{pattern}.safetensors") if (match := re.search(r"_(\d+)$", file.stem))}
    if not found or sorted(found) != list(range(len(found))):
        missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
        raise DictionaryError(f"{folder}: there is no {pattern.replace('*', str(missing[0]))}.safetensors; the folder is incomplete.")
    return [found[i] for i in range(len(found))]


def _single(cfg: dict[str, Any], tensors: Tensors, layer: int, n_layers: int, about: dict[str, Any]) -> Dictionary:
    del layer, n_layers
    tensors.architecture = "transcoder"
    w_enc = tensors.take("W_enc", (None, None))
    width, d_in = w_enc.shape
    w_dec = tensors.take("W_dec", (width, d_in))
    parts = {"b_enc": tensors.take("b_enc", (width,)), "b_dec": tensors.take("b_dec", (d_in,))}
    activation = _activation(cfg, tensors, "activation_function.threshold", width)
    w_skip = tensors.take("W_skip", (d_in, d_in)).T.contiguous() if "W_skip" in tensors else None
    tensors.done()
    return Dictionary(
        kind="transcoder",
        w_enc=w_enc.T.contiguous(),
        w_dec=w_dec,
        activation=activation,
        w_skip=w_skip,
        provenance=_provenance(cfg, tensors),
        **parts,
        **about,
    )


def _across(cfg: dict[str, Any], tensors: Tensors, layer: int, n_layers: int, about: dict[str, Any]) -> Dictionary:
    tensors.architecture = "cross_layer_transcoder"
    w_enc = tensors.take(f"W_enc_{layer}", (None, None))
    width, d_in = w_enc.shape
    parts = {"b_enc": tensors.take(f"b_enc_{layer}", (width,)), "b_dec": tensors.take(f"b_dec_{layer}", (d_in,))}
    activation = _activation(cfg, tensors, f"threshold_{layer}", width)
    tensors.done()
    decoder = read_tensors(tensors.file.with_name(f"W_dec_{layer}.safetensors"))
    decoder.architecture = "cross_layer_transcoder"
    w_dec = decoder.take(f"W_dec_{layer}", (width, n_layers - layer, d_in))
    decoder.done()
    return Dictionary(
        kind="cross_layer_transcoder",
        w_enc=w_enc.T.contiguous(),
        w_dec=w_dec,
        activation=activation,
        provenance=_provenance(cfg, tensors),
        **parts,
        **about,
    )


def _activation(cfg: dict[str, Any], tensors: Tensors, name: str, width: int) -> Activation:
    """ReLU, with a threshold where there is one; the k largest where the configuration says so."""
    said = cfg.get("activation")
    if said == "topk":
        k = cfg.get("k")
        if not isinstance(k, int) or not 1 <= k <= width:
            raise DictionaryError(f"{tensors.file.with_name(CONFIG)}: k is a whole number from 1 to {width}; got {k!r}.")
        return SignedTopK(k)
    if said not in (None, "relu", "jump_relu", "jumprelu"):
        raise DictionaryError(f"{tensors.file.with_name(CONFIG)}: " + unknown("activation", said, ["relu", "jump_relu", "topk"]))
    if name not in tensors:
        return Relu()
    threshold = tensors.take(name, (width,))
    if bool((threshold < 0).any()):
        raise DictionaryError(
            f"{tensors.file}: {int((threshold < 0).sum())} thresholds are below zero, with which circuit-tracer lets negative features through; "
            f"that is not implemented."
        )
    return JumpRelu(threshold)


def _provenance(cfg: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    return {"file": str(tensors.file), "format": "circuit-tracer", "model_name": cfg.get("model_name"), "scan": cfg.get("scan")}


CIRCUIT_TRACER = Format("circuit-tracer", (CONFIG, "*.safetensors"), (CONFIG,), _read)
