"""Score maps that are looked at together: one group per direction, checked against the model and the task that exact patches will be run on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from patchlab.comparison.alignment import check_alike, on_common_cells
from patchlab.engine import session_of
from patchlab.errors import ScoreError, unknown
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.sites import POSITION_AXES, Site
from patchlab.tasks.task import Task

EXACT = "exact"


@dataclass(frozen=True)
class Maps:
    """The maps of one direction by name, alike in everything but the method."""

    by_name: dict[str, ScoreMap]

    @property
    def first(self) -> ScoreMap:
        """The map that stands for all where they do not differ."""
        return next(iter(self.by_name.values()))

    @property
    def direction(self) -> str:
        """What all were patched in."""
        return str(self.first.provenance["direction"])

    @property
    def source(self) -> str:
        """What was patched in."""
        return str((self.first.provenance.get("method_options") or {}).get("source", "paired"))

    @property
    def post_norm(self) -> str:
        """What edges out of heads carry through a norm after the attention."""
        return str(self.first.provenance.get("post_norm", "renormalised"))

    @property
    def baseline(self) -> np.ndarray:
        """The metric before patching, per example."""
        return self.first.data["metric_corrupted" if self.direction == "denoising" else "metric_clean"].to_numpy()

    @property
    def exact(self) -> ScoreMap | None:
        """The map of exact patching, if there is one."""
        return next((one for one in self.by_name.values() if is_exact(one)), None)

    def cell(self, site: str, number: int) -> tuple[int, ...]:
        """The numbers along the axes of a cell, given as its number in the flattened effects.

        Raises:
            ScoreError: no such site or cell.
        """
        if site not in self.first.sites:
            raise ScoreError(unknown("site of these maps", site, self.first.sites))
        cells = self.first.cells(site)
        if not 0 <= number < len(cells):
            raise ScoreError(f"there is no cell {number} of {site}; it has {len(cells)}, from 0.")
        if not bool(self.first.exists(site).to_numpy().ravel()[number]):
            raise ScoreError(f"cell {number} of {site} is {self.first.zeros(site).to_numpy().ravel()[number]}, so it has no effect.")
        return tuple(cells[number].tolist())


def is_exact(scores: ScoreMap) -> bool:
    """Whether a map was made by exact patching."""
    return str(scores.provenance.get("method", "")).partition("@")[0].partition("[")[0].removesuffix("-frozen") == EXACT


def grouped(model: Model, task: Task, scores: ScoreMap | Mapping[str, ScoreMap] | Sequence[ScoreMap]) -> dict[str, Maps]:
    """The maps by direction, in the order in which they are given.

    Raises:
        ScoreError: none at all, two of one name and direction, maps of one direction that cannot be compared, or a map that is not of this
            model, task, metric, positions or surrounding edits.
    """
    if isinstance(scores, ScoreMap):
        named = [(_name(scores), scores)]
    elif isinstance(scores, Mapping):
        named = list(scores.items())
    else:
        named = [(_name(one), one) for one in scores]
    if not named:
        raise ScoreError("there is nothing to explore; give a score map, or maps by name.")
    found: dict[str, dict[str, ScoreMap]] = {}
    for name, one in named:
        if not isinstance(one, ScoreMap):
            raise ScoreError(f"{name!r} is a {type(one).__name__} and no score map; give what a method's run returned.")
        group = found.setdefault(str(one.provenance.get("direction")), {})
        if name in group:
            raise ScoreError(f"two maps in {one.provenance.get('direction')} are named {name!r}; give them by name: {{'first': ..., 'second': ...}}.")
        check_fits(model, task, name, one)
        group[name] = one
    for group in found.values():
        (first_name, first), *others = group.items()
        for name, other in others:
            check_alike(first_name, first, name, other)
        group |= dict(zip(group, on_common_cells(list(group.values())), strict=True))
    return {direction: Maps(group) for direction, group in found.items()}


def check_fits(model: Model, task: Task, name: str, scores: ScoreMap) -> None:
    """Refuse a map whose cells would be other cells when they are patched here.

    Raises:
        ScoreError: naming what differs.
    """
    record = scores.provenance

    def refuse(what: str, here: object, there: object, remedy: str) -> ScoreError:
        return ScoreError(f"the map {name!r} is of {what} {there}, and what is explored is {here}; {remedy}.")

    alike = {
        "model_fingerprint": ("another model:", f"{model.name} ({model.fingerprint})", model.fingerprint, "give the model that was scored"),
        "task_fingerprint": ("another task:", f"{task.name} ({task.fingerprint})", task.fingerprint, "give the task that was scored"),
        "metric": ("the metric", task.metric.name, task.metric.name, "give the task with that metric (task.with_metric)"),
    }
    for key, (what, here, wanted, remedy) in alike.items():
        if record.get(key) != wanted:
            raise refuse(what, here, record.get(key.removesuffix("_fingerprint"), "unknown"), remedy)
    surrounding = [f"{edit.op} {edit.address}" for edit in session_of(model).surrounding]
    if record.get("ambient", []) != surrounding:
        there, here = ("; ".join(edits) or "none" for edits in (record.get("ambient", []), surrounding))
        raise refuse("runs with the surrounding edits", here, there, "explore maps that were made without pl.intervene, since exact patches run so")
    added = {kind: model.arch.accessors[kind].identity for kind in record.get("added_sites", {}) if kind in model.arch.accessors}
    if record.get("added_sites", {}) != added:
        raise refuse("dictionaries", added or "none", record["added_sites"], "add those that were scored (model.add_dictionaries)")
    if any(set(Site.parse(site).axes) & set(POSITION_AXES) for site in scores.sites):
        _check_positions(task, name, scores)


def _check_positions(task: Task, name: str, scores: ScoreMap) -> None:
    axis = task.position_axis()
    for dim, prefix in (("pos", ""), ("dest", "dest_"), ("src", "src_")):
        token, roles = (scores.data.coords.get(f"{prefix}{what}") for what in ("token", "position"))
        if token is None:
            continue
        here = [[text.replace("\0", "\\0") for text in axis.tokens[example]] for example in scores.data["example"].to_numpy().tolist()]
        there = token.to_numpy().tolist()
        named = [] if roles is None else roles.to_numpy().tolist()
        if here != there or (any(axis.roles) and list(axis.roles) != named):
            scored = ", ".join(role for role in named if role) or f"{scores.data.sizes[dim]} positions"
            own = ", ".join(axis.names) if axis.names is not None else f"all {len(axis)} positions of a prompt"
            raise ScoreError(
                f"the map {name!r} has the positions {scored}, and the task is scored at {own}, so its cells would be others. Give the task that "
                f"was scored, such as task.at_positions({', '.join(map(repr, [role for role in named if role])) or '...'})."
            )


def _name(scores: ScoreMap) -> str:
    return str(scores.provenance.get("method", "scores"))
