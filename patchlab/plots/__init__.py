"""Figures of score maps and comparisons: each module prepares plain data, then draws it. Nothing here changes plotly's own settings."""

from patchlab.plots._agreement import agreement
from patchlab.plots._comparison import comparison
from patchlab.plots._heatmaps import heatmaps
from patchlab.plots._save import save

__all__ = ["agreement", "comparison", "heatmaps", "save"]
