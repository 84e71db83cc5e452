"""Points and weights on the path from the baseline (0) to the source (1): the one place where a grid is made."""

from collections.abc import Iterator

from patchlab.errors import MethodError, unknown

QUADRATURES = ("midpoint", "left", "right", "trapezoid")


def n_points(rule: str, n_steps: int) -> int:
    """The number of points of a path of ``n_steps`` equal steps.

    Raises:
        MethodError: an unknown rule, or fewer than 1 step.
    """
    if n_steps < 1:
        raise MethodError(f"n_steps is {n_steps}; integrated gradients need at least 1 point on the path.")
    if rule not in QUADRATURES:
        raise MethodError(unknown("quadrature", rule, QUADRATURES))
    return n_steps + (rule == "trapezoid")


def points_and_weights(rule: str, n_steps: int) -> Iterator[tuple[float, float]]:
    """The points of a path of ``n_steps`` equal steps, with weights that sum to one, one after the other.

    ``left`` holds the baseline's end and not the source's, ``right`` the other way round, ``trapezoid`` both.

    >>> list(points_and_weights("right", 2))
    [(0.5, 0.5), (1.0, 0.5)]

    Raises:
        MethodError: an unknown rule, or fewer than 1 step.
    """
    offset = {"midpoint": 0.5, "left": 0.0, "right": 1.0, "trapezoid": 0.0}
    for i in range(n_points(rule, n_steps)):
        end = rule == "trapezoid" and i in (0, n_steps)
        yield (i + offset[rule]) / n_steps, (0.5 if end else 1.0) / n_steps
