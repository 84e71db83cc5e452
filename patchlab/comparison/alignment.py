"""Alignment: maps can be compared if they are alike in everything but the method."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from patchlab.errors import ScoreError
from patchlab.scores import ScoreMap

FULL_PRECISION = ("float32", "float64")
BASELINE_TOLERANCE = 1e-3
_ALIKE = {
    "task_fingerprint": ("task", "run both on one task"),
    "model_fingerprint": ("model", "run both on one model"),
    "direction": ("direction", "run both in one direction"),
    "metric": ("metric", "run both with one metric (task.with_metric)"),
}


def check_names(reference: str, names: Iterable[Any]) -> None:
    """Names that can stand in a table: text, not empty, each once, none that of the reference.

    Raises:
        ScoreError: otherwise.
    """
    names, seen = list(names), {reference}
    if not names:
        raise ScoreError('there is nothing to compare with the reference. Give maps by name, such as {"AtP": atp, "RelP": relp}.')
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ScoreError(f"a method needs a name to appear under; got {name!r}.")
        if name.strip() in seen:
            taken = "the reference has it" if name.strip() == reference else "it is given twice"
            raise ScoreError(f"the name {name!r} is taken ({taken}); give each method a name of its own.")
        seen.add(name.strip())


def on_common_cells(maps: Sequence[ScoreMap]) -> list[ScoreMap]:
    """The maps with the same cells at the sites of which all hold only some: those that any of them holds; elsewhere there is no effect."""
    found = list(maps)
    for site in maps[0].sites:
        if all(site in one.sites and one.is_sparse(site) for one in found):
            cells = np.unique(np.concatenate([one.cells(site) for one in found]), axis=0)
            found = [one.on_cells(site, cells) for one in found]
    return found


def check_alike(reference_name: str, reference: ScoreMap, name: str, other: ScoreMap) -> None:
    """Refuse two maps that differ in task, model, direction, metric, examples, sites, axes, structural zeros or baselines.

    Raises:
        ScoreError: naming the first thing that differs and its two values.
    """
    here, there = reference.provenance, other.provenance

    def refuse(what: str, first: object, second: object, remedy: str) -> ScoreError:
        return ScoreError(f"cannot compare {name} with {reference_name}: {what} differ ({second} against {first}); {remedy}.")

    for key, (what, remedy) in _ALIKE.items():
        if here.get(key) != there.get(key):
            raise refuse(f"the {what}s", _described(here, key, what), _described(there, key, what), remedy)
    sources = [(record.get("method_options") or {}).get("source", "paired") for record in (here, there)]
    if sources[0] != sources[1]:
        raise refuse("the sources", sources[0], sources[1], "patch in the same thing with both")
    if here.get("ambient", []) != there.get("ambient", []):
        raise refuse("the surrounding interventions", _shortened(here.get("ambient", [])), _shortened(there.get("ambient", [])), "run both alike")
    added = [record.get("added_sites", {}) for record in (here, there)]
    if added[0] != added[1]:
        first, second = (_shortened(one.values()) for one in added)
        raise refuse("the sites that were added to the model", first, second, "score the same dictionary with both")
    forms = [record.get("post_norm", "renormalised") for record in (here, there)]  # what a linearised score estimates
    if forms[0] != forms[1]:
        raise refuse("what edges out of heads carry through the norm after the attention", forms[0], forms[1], "take one form with both (post_norm=)")
    examples, others = (scores.data["example"].to_numpy() for scores in (reference, other))
    if not np.array_equal(examples, others):
        raise refuse("the examples", _shortened(examples), _shortened(others), "score the same pairs (task.select)")
    if set(reference.sites) != set(other.sites):
        raise refuse("the sites", ", ".join(reference.sites), ", ".join(other.sites), "score the same sites with both")
    for site in reference.sites:
        _check_axes(site, reference, other, refuse)
    baselines = [np.stack([scores.data["metric_clean"], scores.data["metric_corrupted"]]) for scores in (reference, other)]
    apart = np.abs(baselines[0] - baselines[1]).max()
    precise = all(record.get("dtype") in FULL_PRECISION for record in (here, there))
    if precise and apart > BASELINE_TOLERANCE * np.abs(baselines[0]).max():
        first, second = (np.round(values.mean(1), 4).tolist() for values in baselines)
        raise refuse("the unpatched metrics [clean, corrupted]", first, second, "was one of them run under an intervention? Run both alike")


def _check_axes(site: str, reference: ScoreMap, other: ScoreMap, refuse: Any) -> None:
    first, second = reference.data[site], other.data[site]
    if first.sizes != second.sizes:
        raise refuse(f"the axes of {site}", dict(first.sizes), dict(second.sizes), "score the same sites of the same model")
    for axis in first.dims:
        for label in (axis, "position" if axis == "pos" else f"{axis}_position"):
            values = [part[label].to_numpy().tolist() if label in part.coords else None for part in (first, second)]
            if values[0] != values[1]:
                raise refuse(
                    f"the {label} coordinates of {site}", _shortened(values[0]), _shortened(values[1]), "score the same sites on the same positions"
                )
    apart = int((reference.live[site].to_numpy() != other.live[site].to_numpy()).sum())
    if apart:
        raise ScoreError(
            f"structural zeros of {site} differ in {apart} cells. They follow from token ids and the graph alone: "
            f"compute both maps with one version of patchlab."
        )
    known = reference.patterns is not None and other.patterns is not None
    if known and not np.array_equal(reference.live_per_example(site), other.live_per_example(site)):
        raise ScoreError(
            f"which cells of {site} can matter for which example differs between the maps. It follows from token ids and the graph alone: "
            f"compute both maps with one version of patchlab."
        )


def _described(record: dict[str, Any], key: str, what: str) -> str:
    """Name and fingerprint, or just the value."""
    value = record.get(key, "unknown")
    return str(value) if key == what else f"{record.get(what, '?')} {value}"


def _shortened(values: Any) -> str:
    text = "none" if values is None or not len(values) else ", ".join(map(str, values))
    return text if len(text) < 60 else text[:56] + " ..."
