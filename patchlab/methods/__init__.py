"""Patching methods: each scores every cell of the sites it is given. Functions patch sets of edges, and shared keys and values."""

from patchlab.methods.exact import ActivationPatching
from patchlab.methods.linearized import LinearizedPatching
from patchlab.methods.method import Method
from patchlab.methods.named import AttributionPatching, IntegratedGradients, RelevancePatching
from patchlab.methods.names import METHODS, get_method
from patchlab.methods.path_patching import kv_effects, patch_edges
from patchlab.methods.registry import register_method
from patchlab.methods.second_order import SecondOrder
from patchlab.methods.verified.search import VerifiedPatching

__all__ = [
    "METHODS",
    "ActivationPatching",
    "AttributionPatching",
    "IntegratedGradients",
    "LinearizedPatching",
    "Method",
    "RelevancePatching",
    "SecondOrder",
    "VerifiedPatching",
    "get_method",
    "kv_effects",
    "patch_edges",
    "register_method",
]
