"""Sparse features: dictionaries that write an activation as a sum of few directions."""

from patchlab.features.activations import AbsTopK, Activation, Codes, JumpRelu, Relu, SignedTopK, TopK, gated
from patchlab.features.attribution import AttributionGraph, attribution_graph
from patchlab.features.dictionary import KINDS, Dictionary, codebook, folded
from patchlab.features.load import load_dictionaries, load_dictionary
from patchlab.features.normalisation import ConstantNorm, LayerNorm, Normalisation, Unchanged

__all__ = [
    "KINDS",
    "AbsTopK",
    "Activation",
    "AttributionGraph",
    "Codes",
    "ConstantNorm",
    "Dictionary",
    "JumpRelu",
    "LayerNorm",
    "Normalisation",
    "Relu",
    "SignedTopK",
    "TopK",
    "Unchanged",
    "attribution_graph",
    "codebook",
    "folded",
    "gated",
    "load_dictionaries",
    "load_dictionary",
]
