"""Figures of score maps, comparisons and circuits: each module prepares plain data, then draws it. Nothing here changes plotly's own settings."""

from patchlab.plots._agreement import agreement
from patchlab.plots._attention import attention, head_grid
from patchlab.plots._attribution import attribution_graph
from patchlab.plots._bars import bars
from patchlab.plots._circuit import circuit
from patchlab.plots._comparison import comparison
from patchlab.plots._conservation import conservation
from patchlab.plots._costs import costs
from patchlab.plots._differences import differences
from patchlab.plots._edges import edge_heatmap
from patchlab.plots._faithfulness import faithfulness
from patchlab.plots._heatmaps import heatmaps
from patchlab.plots._layers import layers
from patchlab.plots._node_circuits import node_circuits
from patchlab.plots._patterns import patterns
from patchlab.plots._qk import qk_pairs
from patchlab.plots._ranking import ranking
from patchlab.plots._save import DARK, save
from patchlab.plots._skip_effects import layer_grid, skip_effects
from patchlab.plots._stability import stability
from patchlab.plots._token_strip import token_strip
from patchlab.plots._token_table import token_table
from patchlab.plots._trajectories import trajectories

__all__ = [
    "DARK",
    "agreement",
    "attention",
    "attribution_graph",
    "bars",
    "circuit",
    "comparison",
    "conservation",
    "costs",
    "differences",
    "edge_heatmap",
    "faithfulness",
    "head_grid",
    "heatmaps",
    "layer_grid",
    "layers",
    "node_circuits",
    "patterns",
    "qk_pairs",
    "ranking",
    "save",
    "skip_effects",
    "stability",
    "token_strip",
    "token_table",
    "trajectories",
]
