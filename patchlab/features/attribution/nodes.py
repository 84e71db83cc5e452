"""The table of an attribution graph's nodes, from which every index of it comes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

FEATURE, ERROR, EMBEDDING, LOGIT = "feature", "error", "embedding", "logit"
NODE_KINDS = (FEATURE, ERROR, EMBEDDING, LOGIT)
"""Kinds of nodes, in the order in which a graph lists them."""


@dataclass(frozen=True, eq=False, repr=False)
class Nodes:
    """The table of a graph's nodes: features (by layer, position, number), errors (by layer, position), token embeddings, logits.

    Args:
        kind: index into :data:`NODE_KINDS`.
        layer: block of a feature or error; -1 of a token, the number of layers of a logit.
        pos: position in the prompt.
        unit: number of a feature; token id of a token or logit; -1 of an error.
        activation: of a feature; NaN of the others.
        probability: of a logit under the model; 0 of the others.
        value: what a target has in the run: the pre-activation of a feature, the logit less the mean logit; NaN of the others.
        constant: the part of ``value`` that no node gives: biases and positional embeddings.
        positional: the part of ``constant`` that comes from the positional embedding.
        left_out: the part of ``value`` that features give which are not in the graph.
    """

    kind: Int[np.ndarray, " node"]
    layer: Int[np.ndarray, " node"]
    pos: Int[np.ndarray, " node"]
    unit: Int[np.ndarray, " node"]
    activation: Float[np.ndarray, " node"]
    probability: Float[np.ndarray, " node"]
    value: Float[np.ndarray, " node"]
    constant: Float[np.ndarray, " node"]
    positional: Float[np.ndarray, " node"]
    left_out: Float[np.ndarray, " node"]

    def __post_init__(self) -> None:
        for column in vars(self).values():
            column.setflags(write=False)

    def __len__(self) -> int:
        return len(self.kind)

    def of(self, kind: str) -> Bool[np.ndarray, " node"]:
        """Which nodes are of a kind."""
        return self.kind == NODE_KINDS.index(kind)

    def take(self, chosen: Bool[np.ndarray, " node"] | Int[np.ndarray, " some"]) -> "Nodes":
        """Some of the nodes."""
        return Nodes(**{name: column[chosen].copy() for name, column in vars(self).items()})
