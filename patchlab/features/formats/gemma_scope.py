"""Gemma Scope: ``params.npz``, JumpReLU without subtraction of the decoder's bias (Lieberum et al. 2024, arXiv 2408.05147).

The file holds numbers alone. Layer, site and model stand in the names of the folders, as in ``gemma-scope-2b-pt-res/layer_12/width_16k/...``;
where they do not, the caller says them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from patchlab.errors import DictionaryError
from patchlab.features.activations import JumpRelu
from patchlab.features.dictionary import Dictionary
from patchlab.features.formats.format import Format, Said
from patchlab.features.formats.tensors import read_tensors

PARAMS = "params.npz"
_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "z", "transcoders": "ln2.hook_normalized"}
_TRANSCODED = ("ln2.hook_normalized", "mlp_in")


def _read(folder: Path, said: Said) -> Iterator[Dictionary]:
    file = folder / PARAMS
    tensors = read_tensors(file)
    tensors.values = {f"W_{name[2:]}" if name.startswith("w_") else name: value for name, value in tensors.values.items()}
    parts = "/".join(folder.absolute().parts)
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b", parts)
    layers = re.findall(r"layer_(\d+)", parts)
    embeds = said.reads == "input" or "embedding" in folder.parts
    reads = "input" if embeds else said.reads or (_SITES[repository[3]] if repository else None)
    layer = None if embeds else int(layers[-1]) if layers else said.layer
    if reads is None or (layer is None and not embeds):
        raise DictionaryError(
            f"{file}: neither the file nor the names of its folders say {'which site' if reads is None else 'which layer'} it reads. Pass "
            f"{'reads= (resid_post, mlp_out, z; ln2.hook_normalized for a transcoder)' if reads is None else 'layer='}."
        )
    w_enc = tensors.take("W_enc", (None, None))
    d_in, width = w_enc.shape
    w_dec = tensors.take("W_dec", (width, None if reads in _TRANSCODED else d_in))
    if embeds:  # trained on embeddings that are not yet scaled by √d, as the model reads them
        w_enc, w_dec = w_enc / d_in**0.5, w_dec * d_in**0.5
    b_enc, b_dec, threshold = tensors.take("b_enc", (width,)), tensors.take("b_dec", (w_dec.shape[1],)), tensors.take("threshold", (width,))
    tensors.done()
    model = None if repository is None else f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"
    yield Dictionary(
        name=f"{reads}/{layer}",
        kind="transcoder" if reads in _TRANSCODED else "sae",
        layer=layer,
        reads=reads,
        writes="mlp_out" if reads in _TRANSCODED else reads,
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        activation=JumpRelu(threshold),
        provenance={"file": str(file), "format": "Gemma Scope", "model_name": model},
    )


GEMMA_SCOPE = Format("Gemma Scope", (PARAMS,), (PARAMS,), _read)
