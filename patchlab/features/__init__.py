"""Sparse features: dictionaries that write an activation as a sum of few directions."""

from patchlab.features.activations import AbsTopK, Activation, Codes, JumpRelu, Relu, TopK, gated
from patchlab.features.dictionary import KINDS, Dictionary, codebook, folded
from patchlab.features.load import load_dictionaries, load_dictionary
from patchlab.features.normalisation import ConstantNorm, LayerNorm, Normalisation, Unchanged

__all__ = [
    "KINDS",
    "AbsTopK",
    "Activation",
    "Codes",
    "ConstantNorm",
    "Dictionary",
    "JumpRelu",
    "LayerNorm",
    "Normalisation",
    "Relu",
    "TopK",
    "Unchanged",
    "codebook",
    "folded",
    "gated",
    "load_dictionaries",
    "load_dictionary",
]
