"""patchlab: exact, gradient and relevance patching of transformer language models behind one intervention API.

The public names are loaded when they are first used, so that ``import patchlab`` (and ``patchlab --help``) stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from patchlab import circuits as circuits
    from patchlab import features as features
    from patchlab import lenses as lenses
    from patchlab import methods as methods
    from patchlab import plots as plots
    from patchlab import rules as rules
    from patchlab import sources as sources
    from patchlab import sweeps as sweeps
    from patchlab import texts as texts
    from patchlab.circuits import Circuit as Circuit
    from patchlab.comparison import compare as compare
    from patchlab.engine import intervene as intervene
    from patchlab.errors import PatchlabError as PatchlabError
    from patchlab.explorer import explore as explore
    from patchlab.features import load_dictionaries as load_dictionaries
    from patchlab.features import load_dictionary as load_dictionary
    from patchlab.interventions import Edit as Edit
    from patchlab.lenses import coefficients as coefficients
    from patchlab.methods import ActivationPatching as ActivationPatching
    from patchlab.methods import AttributionPatching as AttributionPatching
    from patchlab.methods import IntegratedGradients as IntegratedGradients
    from patchlab.methods import RelevancePatching as RelevancePatching
    from patchlab.methods import VerifiedPatching as VerifiedPatching
    from patchlab.metrics import Metric as Metric
    from patchlab.models import Model as Model
    from patchlab.models import load_model as load_model
    from patchlab.models import wrap_bridge as wrap_bridge
    from patchlab.scores import ScoreMap as ScoreMap
    from patchlab.sites import Site as Site
    from patchlab.tasks import Task as Task
    from patchlab.tasks import load_task as load_task

_HOMES = {
    "circuits": "",
    "features": "",
    "lenses": "",
    "methods": "",
    "plots": "",
    "rules": "",
    "sources": "",
    "sweeps": "",
    "texts": "",
    "Circuit": "circuits",
    "compare": "comparison",
    "intervene": "engine",
    "PatchlabError": "errors",
    "explore": "explorer",
    "load_dictionaries": "features",
    "load_dictionary": "features",
    "Edit": "interventions",
    "coefficients": "lenses",
    "ActivationPatching": "methods",
    "AttributionPatching": "methods",
    "IntegratedGradients": "methods",
    "RelevancePatching": "methods",
    "VerifiedPatching": "methods",
    "Metric": "metrics",
    "Model": "models",
    "load_model": "models",
    "wrap_bridge": "models",
    "ScoreMap": "scores",
    "Site": "sites",
    "Task": "tasks",
    "load_task": "tasks",
}
"""Public name -> the module it lives in ("" for a module of its own)."""

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchlab' has no attribute {name!r}")
    home = _HOMES[name]
    if not home:
        return importlib.import_module(f"patchlab.{name}")
    value = getattr(importlib.import_module(f"patchlab.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
