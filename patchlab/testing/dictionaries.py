"""Dictionaries with random weights, for tests without files."""

import torch

from patchlab.features import Activation, Codes, Dictionary, Normalisation, Relu, codebook
from patchlab.features.normalisation import UNCHANGED
from patchlab.models import Model


def random_dictionary(
    model: Model,
    reads: str = "resid_post",
    layer: int | None = 0,
    width: int = 24,
    activation: Activation | None = None,
    seed: int = 0,
    *,
    kind: str = "sae",
    skip: bool = False,
    subtract_b_dec: bool = False,
    normalise: Normalisation = UNCHANGED,
    scale: float = 1.0,
) -> Dictionary:
    """A dictionary of a model, with weights of a size that leaves about half of its features active.

    Args:
        model: whose widths, layers, dtype and device it fits.
        reads: the site kind; ``mlp_in`` for transcoders unless another one is named.
        layer: which it reads; None with ``kind="multi_layer"``.
        width: number of features.
        activation: default ReLU; ``Codes(4)`` in a codebook.
        seed: of the weights.
        kind: of the dictionary; transcoders write ``mlp_out``.
        skip: whether there is a linear path past the features.
        subtract_b_dec: whether the encoder reads the input less ``b_dec``.
        normalise: of each row.
        scale: of all weights of the decoder.
    """
    transcodes = kind in ("transcoder", "cross_layer_transcoder")
    if transcodes and reads == "resid_post":
        reads = "mlp_in"
    heads = model.arch.n_heads if reads == "z" else None
    d_in = model.arch.n_heads * model.arch.d_head if reads == "z" else model.arch.d_model
    d_out = model.arch.d_model if transcodes else d_in
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(device=model.device, dtype=model.dtype)

    name = f"random {kind} {reads}/{'all' if layer is None else layer}"
    if kind == "codebook":
        k = activation.k if isinstance(activation, Codes) else min(4, width)
        return codebook(name, draw(width, d_in, size=scale), k=k, layer=layer or 0, reads=reads, heads=heads)
    across = (model.arch.n_layers - (layer or 0),) if kind == "cross_layer_transcoder" else ()
    return Dictionary(
        name=name,
        kind=kind,
        layer=layer,
        reads=reads,
        writes="mlp_out" if transcodes else reads,
        w_enc=draw(d_in, width, size=d_in**-0.5),
        b_enc=draw(width, size=0.1),
        w_dec=draw(width, *across, d_out, size=scale * width**-0.5),
        b_dec=draw(d_out, size=0.1 * scale),
        activation=Relu() if activation is None else activation,
        w_skip=draw(d_in, d_out, size=0.5 * scale * d_in**-0.5) if skip else None,
        subtract_b_dec=subtract_b_dec,
        normalise=normalise,
        heads=heads,
        provenance={"model_name": model.name},
    )
