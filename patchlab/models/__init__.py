"""Models: packaged, from a directory, the hub or memory, all as one wrapper around a TransformerLens bridge."""

from patchlab.models.load import DEMO_MODELS, bridge_module, load_model, wrap_bridge
from patchlab.models.model import Model

__all__ = ["DEMO_MODELS", "Model", "bridge_module", "load_model", "wrap_bridge"]
