"""Attribution graphs of prompts, through transcoders."""

from patchlab.features.attribution.build import attribution_graph
from patchlab.features.attribution.graph import AttributionGraph, GraphScores
from patchlab.features.attribution.nodes import Nodes

__all__ = ["AttributionGraph", "GraphScores", "Nodes", "attribution_graph"]
