"""Backward rules for layer-wise relevance propagation, and composites that say which rule goes where."""

from patchlab.rules.composites import PRESETS, RULES, Composite, get_composite, register_preset, register_rule
from patchlab.rules.coverage import Coverage, SoftCap, Uncovered, coverage
from patchlab.rules.linear import EpsilonRule, GammaRule
from patchlab.rules.nonlinear import AHRule, ConstantGateRule, HalfRule, IdentityRule, LNRule, TemperatureRule, UniformRule
from patchlab.rules.rule import ActivationRule, LinearRule, NormRule, PatternRule, ProductRule, graft, scale_gradient

__all__ = [
    "PRESETS",
    "RULES",
    "AHRule",
    "ActivationRule",
    "Composite",
    "ConstantGateRule",
    "Coverage",
    "EpsilonRule",
    "GammaRule",
    "HalfRule",
    "IdentityRule",
    "LNRule",
    "LinearRule",
    "NormRule",
    "PatternRule",
    "ProductRule",
    "SoftCap",
    "TemperatureRule",
    "Uncovered",
    "UniformRule",
    "coverage",
    "get_composite",
    "graft",
    "register_preset",
    "register_rule",
    "scale_gradient",
]
