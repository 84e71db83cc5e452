"""Adapters: what differs between architectures, such as which hook carries a site, and which modules backward rules apply to."""

from patchlab.adapters.accessors import Accessor
from patchlab.adapters.architecture import Architecture, describe
from patchlab.adapters.model import BridgedModel
from patchlab.adapters.places import (
    LOGITS,
    AttentionPlace,
    CapPlace,
    ClipPlace,
    ExpertsPlace,
    GatePlace,
    LinearPlace,
    MLPPlace,
    NormPlace,
    Place,
    final_cap,
    find_places,
)

__all__ = [
    "LOGITS",
    "Accessor",
    "Architecture",
    "AttentionPlace",
    "BridgedModel",
    "CapPlace",
    "ClipPlace",
    "ExpertsPlace",
    "GatePlace",
    "LinearPlace",
    "MLPPlace",
    "NormPlace",
    "Place",
    "describe",
    "final_cap",
    "find_places",
]
