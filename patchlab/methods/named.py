"""The linearised methods under the names that the field has for them."""

import re
from dataclasses import dataclass
from typing import Any

from patchlab.errors import MethodError
from patchlab.methods.linearized import PATHS, LinearizedPatching, Path
from patchlab.rules import Composite


@dataclass(frozen=True)
class AttributionPatching(LinearizedPatching):
    """AtP: difference × gradient at the baseline. Source: Nanda 2023; Syed et al. 2023 (arXiv 2310.10348).

    With ``qk_fix`` and ``grad_drop`` it is AtP* (Kramár et al. 2024, arXiv 2403.00745).

    Example:
        >>> AttributionPatching().run(model, task, ["resid_pre", "z"])  # doctest: +SKIP
        >>> AttributionPatching(qk_fix=True, grad_drop=True).name
        'atp*'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.composite.plain or self.n_steps is not None:
            raise MethodError(
                "AttributionPatching is the plain gradient at one point; use RelevancePatching(rules=...) or IntegratedGradients(n_steps=...)."
            )


@dataclass(frozen=True, init=False)
class IntegratedGradients(LinearizedPatching):
    """IG: difference × the mean coefficient along a path. Source: Sundararajan et al. 2017; Hanna et al. 2024 (arXiv 2403.17806).

    The completeness gap (Σ input scores − metric difference) is in the result's provenance, per example; with rules it is
    reported as non-conservation.

    Example:
        >>> IntegratedGradients(5).name
        'ig:5'
        >>> IntegratedGradients(5, rules="relp").name
        'relp+ig:5'
    """

    def __init__(
        self,
        n_steps: int = 5,
        over: Path = "inputs",
        *,
        quadrature: str = "midpoint",
        rules: str | Composite = "gradient",
        source: str = "paired",
        qk_fix: bool = False,
        grad_drop: bool = False,
    ) -> None:
        _set(self, n_steps=n_steps, over=over, quadrature=quadrature, rules=rules, source=source, qk_fix=qk_fix, grad_drop=grad_drop)


@dataclass(frozen=True, init=False)
class RelevancePatching(LinearizedPatching):
    """RelP: difference × LRP propagation coefficient. Source: arXiv 2508.21258; presets in :data:`patchlab.rules.PRESETS`.

    Example:
        >>> RelevancePatching().name, RelevancePatching("relp-ah").name
        ('relp', 'relp-ah')
    """

    def __init__(self, rules: str | Composite = "relp", *, source: str = "paired", qk_fix: bool = False, grad_drop: bool = False) -> None:
        _set(self, n_steps=None, over="inputs", quadrature="midpoint", rules=rules, source=source, qk_fix=qk_fix, grad_drop=grad_drop)


def _set(method: LinearizedPatching, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(method, name, value)
    method.__post_init__()


_ALIASES = {"eap-ig-inputs": "ig-right"}
_IG = re.compile(rf"((?P<rules>[^+]+)\+)?(?P<path>{'|'.join([*PATHS.values(), *_ALIASES])}):(?P<steps>-?\d+)")


def parse_path_method(name: str) -> LinearizedPatching | None:
    """``ig:5``, ``relp+ig:5``, ``ig-right:5``, ``clean-corrupted``, ...; None if the name is of another kind."""
    match = _IG.fullmatch(re.sub(r"(^|\+)clean-corrupted$", r"\1ig-trapezoid:1", name))
    if match is None:
        return None
    over, quadrature = next(path for path, text in PATHS.items() if text == _ALIASES.get(match["path"], match["path"]))
    return IntegratedGradients(int(match["steps"]), over, quadrature=quadrature, rules=match["rules"] or "gradient")
