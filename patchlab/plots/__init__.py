"""Figures of score maps, comparisons and circuits: each module prepares plain data, then draws it. Nothing here changes plotly's own settings."""

from patchlab.plots._agreement import agreement
from patchlab.plots._circuit import circuit
from patchlab.plots._comparison import comparison
from patchlab.plots._costs import costs
from patchlab.plots._differences import differences
from patchlab.plots._edges import edge_heatmap
from patchlab.plots._faithfulness import faithfulness
from patchlab.plots._heatmaps import heatmaps
from patchlab.plots._patterns import patterns
from patchlab.plots._ranking import ranking
from patchlab.plots._save import DARK, save

__all__ = [
    "DARK",
    "agreement",
    "circuit",
    "comparison",
    "costs",
    "differences",
    "edge_heatmap",
    "faithfulness",
    "heatmaps",
    "patterns",
    "ranking",
    "save",
]
