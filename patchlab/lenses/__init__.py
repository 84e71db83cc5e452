"""Lenses: readouts of the residual stream as tokens or attributions, what heads attend to and why, and coefficients at sites."""

from patchlab.lenses.attention import Attention, attention
from patchlab.lenses.attributions import Attributions
from patchlab.lenses.coefficients import coefficients, relevance
from patchlab.lenses.conservation import Conservation, conservation
from patchlab.lenses.distributions import Distributions
from patchlab.lenses.fit import fit_jacobian, fit_linear
from patchlab.lenses.head_paths import HeadPaths, head_paths
from patchlab.lenses.linear_map import LinearMap
from patchlab.lenses.qk import QKAttribution, qk_attribution
from patchlab.lenses.readout import Readout, load, logit_lens

__all__ = [
    "Attention",
    "Attributions",
    "Conservation",
    "Distributions",
    "HeadPaths",
    "LinearMap",
    "QKAttribution",
    "Readout",
    "attention",
    "coefficients",
    "conservation",
    "fit_jacobian",
    "fit_linear",
    "head_paths",
    "load",
    "logit_lens",
    "qk_attribution",
    "relevance",
]
