"""Named linearised methods, as the field calls them: functions that fix some fields of :class:`LinearizedPatching`.

What they make is equal whenever it computes the same, and has one name: ``RelevancePatching("gradient") == AttributionPatching()``.
"""

from patchlab.methods.linearized import LinearizedPatching, Path
from patchlab.rules import Composite


def AttributionPatching(*, source: str = "paired", qk_fix: bool = False, grad_drop: bool = False) -> LinearizedPatching:
    """AtP: difference × gradient at the baseline. Source: Nanda 2023; Syed et al. 2023 (arXiv 2310.10348).

    With the corrections ``qk_fix`` and ``grad_drop`` it is AtP* (Kramár et al. 2024, arXiv 2403.00745).

    Example:
        >>> AttributionPatching().run(model, task, ["resid_pre", "z"])  # doctest: +SKIP
        >>> AttributionPatching(qk_fix=True, grad_drop=True).name
        'atp*'
    """
    return LinearizedPatching(source=source, qk_fix=qk_fix, grad_drop=grad_drop)


def IntegratedGradients(
    n_steps: int = 5,
    over: Path = "inputs",
    *,
    quadrature: str = "midpoint",
    rules: str | Composite = "gradient",
    source: str = "paired",
    qk_fix: bool = False,
    grad_drop: bool = False,
) -> LinearizedPatching:
    """IG: difference × the mean coefficient along a path. Source: Sundararajan et al. 2017; Hanna et al. 2024 (arXiv 2403.17806).

    The completeness gap (Σ input scores − metric difference) is in the result's provenance, per example; with rules it is
    reported as non-conservation.

    Example:
        >>> IntegratedGradients(5).name
        'ig:5'
        >>> IntegratedGradients(5, rules="relp").name
        'relp+ig:5'
    """
    return LinearizedPatching(rules, n_steps, over, quadrature, qk_fix, grad_drop, source=source)


def RelevancePatching(
    rules: str | Composite = "relp", *, source: str = "paired", qk_fix: bool = False, grad_drop: bool = False
) -> LinearizedPatching:
    """RelP: difference × LRP propagation coefficient. Source: arXiv 2508.21258; presets in :data:`patchlab.rules.PRESETS`.

    Example:
        >>> RelevancePatching().name, RelevancePatching("relp-ah").name, RelevancePatching("lrp[ln,identity]").name
        ('relp', 'relp-ah', 'lrp[ln,identity]')
    """
    return LinearizedPatching(rules, qk_fix=qk_fix, grad_drop=grad_drop, source=source)
