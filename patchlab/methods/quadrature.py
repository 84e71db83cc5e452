"""Points and weights on the path from the baseline (0) to the source (1): the one place where a grid is made."""

from patchlab.errors import MethodError, unknown

QUADRATURES = ("midpoint", "left", "right", "trapezoid")


def points_and_weights(rule: str, n_steps: int) -> list[tuple[float, float]]:
    """The points of a path of ``n_steps`` equal steps, with weights that sum to one.

    ``left`` holds the baseline's end and not the source's, ``right`` the other way round, ``trapezoid`` both.

    >>> points_and_weights("right", 2)
    [(0.5, 0.5), (1.0, 0.5)]

    Raises:
        MethodError: an unknown rule, or fewer than 1 step.
    """
    if n_steps < 1:
        raise MethodError(f"n_steps is {n_steps}; integrated gradients need at least 1 point on the path.")
    if rule not in QUADRATURES:
        raise MethodError(unknown("quadrature", rule, QUADRATURES))
    if rule == "trapezoid":
        return [(i / n_steps, (0.5 if i in (0, n_steps) else 1.0) / n_steps) for i in range(n_steps + 1)]
    offset = {"midpoint": 0.5, "left": 0.0, "right": 1.0}[rule]
    return [((i + offset) / n_steps, 1 / n_steps) for i in range(n_steps)]
