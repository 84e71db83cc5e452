"""Bridged models: what rules, interventions and the engine ask of one."""

from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchlab.adapters.architecture import Architecture


@dataclass(eq=False, repr=False)
class BridgedModel:
    """A model as the engine runs it: a TransformerLens bridge with what is known about it, and nothing of what is done with it.

    A class to derive from and no protocol: under pytest every call checks the model that it is given, and matching a protocol takes some 50
    microseconds each time.

    Args:
        bridge: the TransformerLens bridge, frozen and in eval mode.
        hooks: every hook name, aliases included, and the point that it leads to.
        name: how results and messages refer to it.
        arch: sizes, block form, sites and places.
        dtype: of its weights.
        device: where its weights are.
        keeps_logits: whether it can be asked for the last position's logits only.
    """

    bridge: TransformerBridge
    hooks: dict[str, Any]
    name: str
    arch: Architecture
    dtype: torch.dtype
    device: torch.device
    keeps_logits: bool = False
