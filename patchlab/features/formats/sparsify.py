"""sparsify: ``cfg.json`` and ``sae.safetensors``. Read from its source (``sparse_coder.py``).

The folder's name is that of the module it reads: ``layers.3`` for the residual stream after block 3, ``layers.3.mlp`` for an MLP.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchlab.errors import DictionaryError, unknown
from patchlab.features.activations import AbsTopK, TopK
from patchlab.features.dictionary import Dictionary
from patchlab.features.formats.format import Format, Said, needed, read_json
from patchlab.features.formats.tensors import read_tensors

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
_SITES = {"": "resid_post", "mlp": "mlp_out", "attn": "attn_out", "self_attn": "attn_out", "attention": "attn_out"}


def _read(folder: Path, said: Said) -> Iterator[Dictionary]:
    file = folder / CFG
    cfg = read_json(file)
    d_in, k = needed(cfg, "d_in", int, file), needed(cfg, "k", int, file)
    width = cfg.get("num_latents") or d_in * needed(cfg, "expansion_factor", int, file)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise DictionaryError(f"{file}: " + unknown("activation", activation, ["topk"]))
    if not 1 <= k <= width:
        raise DictionaryError(f"{file}: k is from 1 to the number of features, {width}; got {k}.")
    transcodes = bool(cfg.get("transcode", False))
    reads, layer = _place(folder, said, transcodes)
    tensors = read_tensors(folder / WEIGHTS)
    parts: dict[str, Any] = {
        "w_enc": tensors.take("encoder.weight", (width, d_in)).T.contiguous(),
        "b_enc": tensors.take("encoder.bias", (width,)),
        "w_dec": tensors.take("W_dec", (width, d_in)),
        "b_dec": tensors.take("b_dec", (d_in,)),
    }
    w_skip = tensors.take("W_skip", (d_in, d_in)).T.contiguous() if cfg.get("skip_connection") else None
    tensors.done()
    parent = folder.parent / "config.json"
    yield Dictionary(
        name=folder.name,
        kind="transcoder" if transcodes else "sae",
        layer=layer,
        reads=reads,
        writes="mlp_out" if transcodes else reads,
        activation=AbsTopK(k) if cfg.get("signed") else TopK(k),
        w_skip=w_skip,
        subtract_b_dec=not transcodes,
        provenance={"file": str(tensors.file), "format": "sparsify", "model_name": read_json(parent).get("model") if parent.is_file() else None},
        **parts,
    )


def _place(folder: Path, said: Said, transcodes: bool) -> tuple[str, int | None]:
    """Site kind and layer of a folder."""
    if folder.name == "embed_tokens" and not transcodes:
        return "input", None
    match = re.search(r"(?:^|\.)(?:layers|h)[._](\d+)(?:\.(\w+))?$", folder.name)
    found = None if match is None else _SITES.get(match[2] or "")
    if transcodes:
        found = "mlp_in" if found == "mlp_out" else None
    reads, layer = said.reads or found, said.layer if match is None else int(match[1])
    if reads is None or layer is None:
        raise DictionaryError(
            f"{folder}: the name of the folder does not say {'the layer' if layer is None else 'the site'}; expected one such as layers.3 or "
            f"layers.3.mlp. Pass {'layer=' if layer is None else 'reads='}."
        )
    return reads, layer


SPARSIFY = Format("sparsify", (CFG, WEIGHTS), (WEIGHTS,), _read)
