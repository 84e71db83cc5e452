"""Fields of specs: types that read plain values as a file gives them, and refuse what means nothing."""

import itertools
import json
import re
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from patchlab.errors import PatchlabError, SweepError, unknown
from patchlab.sites import POINTS, parse_sites


def refusal(message: str, *path: str | int) -> PydanticCustomError:
    """An error with a message of its own, about a part of what is validated."""
    return PydanticCustomError("refused", "{message}", {"message": message, "path": path})


def _told(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A validator whose errors are those that patchlab raises."""

    def validated(value: Any) -> Any:
        try:
            return read(value)
        except PatchlabError as error:
            raise refusal(str(error)) from error

    return validated


def _method(name: str) -> str:
    from patchlab.methods.names import scoring_method

    return scoring_method(name).name


def _metric(name: str) -> str:
    from patchlab.metrics import get_metric

    return get_metric(name).name


def _sites(given: Any) -> tuple[str, ...]:
    if not isinstance(given, (str, list, tuple)) or not all(isinstance(one, str) for one in given):
        raise SweepError(f"sites are a name such as 'resid_pre' or a list of names; got {shown(given)}.")
    if not isinstance(given, str):
        for i, one in enumerate(given):
            try:
                parse_sites([one])
            except PatchlabError as error:
                raise refusal(str(error), i) from error
    return tuple(map(str, parse_sites(given)))


def number(given: Any) -> Any:
    """YAML 1.1 takes 1e-6 for a text; it is meant as a number."""
    return float(given) if isinstance(given, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", given) else given


def _positions(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise SweepError(f"positions are names with commas between them, each once, such as S2,END; got {text!r}.")
    return ",".join(names)


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise SweepError(f"unknown device {name!r}; give cpu, cuda, cuda:1 or mps, or leave it out.")
    return name


def _points(points: tuple[str, ...]) -> tuple[str, ...]:
    for i, point in enumerate(points):
        if point not in POINTS or point in points[:i]:
            why = unknown("site of dictionaries", point, POINTS) if point not in POINTS else f"the site {point} stands twice; name it once."
            raise refusal(why, i)
    return tuple(sorted(points, key=POINTS.index))


def _of_pairs(method: str) -> str:
    from patchlab.methods.names import scoring_method

    if (source := scoring_method(method).source) != "paired":
        raise SweepError(f"features are compared between the prompts of a pair; got {method}, which patches in the source {source!r}. Leave it out.")
    return method


def _resamples(draws: int) -> int:
    if draws == 1:
        raise SweepError("stability compares resamples with each other, so that it needs at least 2; got 1. Leave it out (0) for none.")
    return draws


def _increasing(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or sizes[0] < 0 or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise SweepError(f"sizes are numbers of edges, 0 or more, each larger than the one before; got {list(sizes)}.")
    return sizes


def shown(value: Any) -> str:
    """A value as a message shows it, as YAML would write it."""
    return str(value) if isinstance(value, date) else json.dumps(value, default=str, ensure_ascii=False)[:80]


Name = Annotated[str, Field(min_length=1)]
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
MethodName = Annotated[str, AfterValidator(_told(_method))]
Sites = Annotated[tuple[str, ...], BeforeValidator(_told(_sites))]
Sizes = Annotated[
    tuple[int, ...], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given), AfterValidator(_told(_increasing))
]
Points = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else (given,) if isinstance(given, str) else given),
    AfterValidator(_points),
]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Plain = str | int | float | bool | None
Options = dict[str, Plain]
MetricName = Annotated[str, AfterValidator(_told(_metric))]
Positions = Annotated[str, AfterValidator(_told(_positions))]
Device = Annotated[str, AfterValidator(_told(_device))]
Resamples = Annotated[NotNegative, AfterValidator(_told(_resamples))]
PairsMethod = Annotated[MethodName, AfterValidator(_told(_of_pairs))]
Direction = Literal["denoising", "noising"]
