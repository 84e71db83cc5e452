"""Formats of dictionary files: one file each, and one line each below."""

from patchlab.features.formats.circuit_tracer import CIRCUIT_TRACER
from patchlab.features.formats.dictionary_learning import DICTIONARY_LEARNING
from patchlab.features.formats.format import Format, Said
from patchlab.features.formats.gemma_scope import GEMMA_SCOPE
from patchlab.features.formats.gemma_scope_2 import GEMMA_SCOPE_2
from patchlab.features.formats.llama_scope import LLAMA_SCOPE
from patchlab.features.formats.saelens import SAELENS
from patchlab.features.formats.sparsify import SPARSIFY

FORMATS: tuple[Format, ...] = (SPARSIFY, SAELENS, GEMMA_SCOPE, GEMMA_SCOPE_2, LLAMA_SCOPE, DICTIONARY_LEARNING, CIRCUIT_TRACER)
"""In the order in which they are tried on a folder."""

__all__ = ["FORMATS", "Format", "Said"]
