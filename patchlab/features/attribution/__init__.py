"""Attribution graphs of prompts, through transcoders."""

from patchlab.features.attribution.build import attribution_graph
from patchlab.features.attribution.graph import AttributionGraph, GraphScores, Nodes

__all__ = ["AttributionGraph", "GraphScores", "Nodes", "attribution_graph"]
