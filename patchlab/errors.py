"""The errors patchlab raises, under one base class.

Every message says what was got, what was expected and what to do about it.
"""

import difflib
from collections.abc import Iterable


class PatchlabError(Exception):
    """Base class of every error that patchlab raises on purpose."""


class SiteError(PatchlabError):
    """A site name cannot be parsed, or the model does not have that site."""


class MetricError(PatchlabError):
    """A metric is unknown, malformed, or returned something that is not one finite value per example."""


class ModelError(PatchlabError):
    """A model cannot be found, loaded or trusted."""


class TaskError(PatchlabError):
    """A task, a generator option or a task file is not usable."""


class TextError(PatchlabError):
    """A corpus cannot be made or read, or does not fit the model."""


class InterventionError(PatchlabError):
    """An edit or its source does not fit the run it is applied to."""


class RuleError(PatchlabError):
    """A backward rule or a composite is unknown, or cannot cover a module of this model."""


class MethodError(PatchlabError):
    """A method's options or its inputs do not make sense together."""


class ScoreError(PatchlabError):
    """Score maps cannot be read, normalised, aligned or compared."""


class CircuitError(PatchlabError):
    """A circuit cannot be built, combined, read, or does not belong to this model."""


class DictionaryError(PatchlabError):
    """A dictionary of features cannot be read, or does not belong to this model."""


class LensError(PatchlabError):
    """A lens cannot be fitted, read from a file or applied to this model."""


class RecipeError(PatchlabError):
    """A recipe is unknown, or cannot be run on these inputs."""


class SweepError(PatchlabError):
    """The file of a sweep, or a run that it describes, cannot be read or planned."""


class OutputError(PatchlabError):
    """A result cannot be written where it was asked for."""


def unknown(what: str, got: object, valid: Iterable[str], *, more: str = "") -> str:
    """Message for a name that is in no registry: what was got, the valid names, the nearest one.

    >>> unknown("method", "realp", ["exact", "relp"])
    "unknown method 'realp'; did you mean 'relp'? Valid: exact, relp."
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(got), names, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r};{hint} Valid: {', '.join(names) or '(none)'}." + (f" {more}" if more else "")
