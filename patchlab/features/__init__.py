"""Sparse features: dictionaries that write an activation as a sum of few directions."""

from patchlab.features.activations import AbsTopK, Activation, Codes, JumpRelu, Linear, Relu, SignedTopK, TopK, gated
from patchlab.features.attribution import AttributionGraph, attribution_graph
from patchlab.features.contexts import Context, Examples, FeatureExamples
from patchlab.features.dictionary import KINDS, Dictionary, codebook, folded, identity_dictionary
from patchlab.features.load import load_dictionaries, load_dictionary
from patchlab.features.normalisation import ConstantNorm, LayerNorm, Normalisation, Unchanged
from patchlab.features.search import examples

__all__ = [
    "KINDS",
    "AbsTopK",
    "Activation",
    "AttributionGraph",
    "Codes",
    "ConstantNorm",
    "Context",
    "Dictionary",
    "Examples",
    "FeatureExamples",
    "JumpRelu",
    "LayerNorm",
    "Linear",
    "Normalisation",
    "Relu",
    "SignedTopK",
    "TopK",
    "Unchanged",
    "attribution_graph",
    "codebook",
    "examples",
    "folded",
    "gated",
    "identity_dictionary",
    "load_dictionaries",
    "load_dictionary",
]
