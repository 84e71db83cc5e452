"""Answers to what is asked about a cell: exact patches, cells patched together, attention, what an activation is made of.

A question is a list of texts and numbers whose first entry says what is asked; an answer is plain JSON. The view in a notebook asks while it is
looked at, a page holds answers that were asked beforehand: both go through :meth:`Answers.answer`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from patchlab.engine import Program, run, session_of
from patchlab.errors import MethodError, PatchlabError, SiteError, TaskError, unknown
from patchlab.explorer.maps import Maps
from patchlab.explorer.state import label, made_of, summary
from patchlab.methods import ActivationPatching
from patchlab.methods.method import Method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import DIRECTIONS, SOURCES
from patchlab.methods.verified.patcher import Patcher
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.sites import KINDS, Site, parse_sites
from patchlab.tasks.task import SIDES, Task

PARTS = 10
"""Neurons, and features, that are listed."""
MOST_PARTS = 100_000_000
"""Effects of neurons that are held at most, of all layers, positions and examples."""
MEAN = -1
"""Stands for the mean over examples where an example is asked for."""
Tick = Callable[[int], None]


class _Bar:
    """What a meter moves: calls ``tick``, which may raise to end the work."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def update(self, n: int | bool = 1) -> None:
        """Count."""
        self.tick(int(n))


class Answers:
    """Answers about the cells of some maps, each worked out once.

    Args:
        model: the model.
        task: the task that the maps are of.
        groups: the maps by direction.
        screen: what scores neurons and features.
    """

    def __init__(self, model: Model, task: Task, groups: Mapping[str, Maps], screen: Method) -> None:
        self.model, self.task, self.groups, self.screen = model, task, groups, screen
        self._fingerprint = model.fingerprint
        self.exact: dict[tuple[str, str, int], np.ndarray] = {}
        """Exact effects per example, by direction, site and number of the cell: what the button has patched."""
        self._patchers: dict[tuple[Any, ...], Patcher] = {}
        self._patterns: dict[tuple[int, str], list[np.ndarray]] = {}
        self._parts: dict[tuple[str, str, str], ScoreMap] = {}
        self._tick: Tick = _nothing
        self._kinds = {"exact": self._exact, "together": self._together, "attention": self._attention, "parts": self._made_of}

    def answer(self, question: Sequence[Any], tick: Tick | None = None) -> dict[str, Any]:
        """The answer to a question: ``["exact", direction, site, cell]``, ``["together", direction, source, [[site, cell], ...]]``,
        ``["attention", head, example or -1, side]`` or ``["parts", direction, site, cell]``, cells by their number in the flattened site.

        ``tick`` is called while it is worked out, with how many steps have been done; it may raise to end the work.

        Raises:
            PatchlabError: what cannot be answered, with the reason.
        """
        if not question or question[0] not in self._kinds:
            raise MethodError(unknown("question", question[0] if question else "", self._kinds))
        if session_of(self.model).surrounding:
            raise MethodError("the model has surrounding edits (pl.intervene), and the maps were made without; leave the block first.")
        if self.model.fingerprint != self._fingerprint:
            raise MethodError(
                f"the weights of {self.model.name} are not those that the maps are of ({self.model.fingerprint}, not {self._fingerprint}); leave the "
                f"block that edits them first, or explore maps of the model as it is now."
            )
        before, self._tick = self._tick, tick or _nothing
        try:
            with session_of(self.model).running():
                return self._kinds[question[0]](*question[1:])
        finally:
            self._tick = before

    def _maps(self, direction: str) -> Maps:
        if direction not in self.groups:
            raise MethodError(unknown("direction of the maps", direction, self.groups))
        return self.groups[direction]

    def _exact(self, direction: str, site: str, number: int) -> dict[str, Any]:
        maps, key = self._maps(direction), (direction, site, number)
        cell = maps.cell(site, number)
        if key not in self.exact:
            patcher = self._patcher(direction, maps.source, maps.post_norm, (site,))
            self.exact[key] = patcher.joint([[(Site.parse(site), cell)]])[0]
        return {**_of_examples(self.exact[key]), **_metric(maps.baseline, self.exact[key])}

    def _together(self, direction: str, source: str, cells: Sequence[Sequence[Any]]) -> dict[str, Any]:
        maps = self._maps(direction if direction in self.groups else next(iter(self.groups)))
        if direction not in DIRECTIONS:
            raise MethodError(unknown("direction", direction, DIRECTIONS))
        if source not in SOURCES:
            raise MethodError(unknown("source", source, SOURCES))
        chosen = list(dict.fromkeys((str(site), int(number)) for site, number in cells))
        if not chosen:
            raise MethodError("no cells are chosen; choose at least one.")
        sites = tuple(sorted({site for site, _ in chosen}))
        patcher = self._patcher(direction, source, maps.post_norm, sites)
        effects = patcher.joint([[(Site.parse(site), maps.cell(site, number)) for site, number in chosen]])[0]
        before = maps.first.data["metric_corrupted" if direction == "denoising" else "metric_clean"].to_numpy()
        return {**_of_examples(effects), **_metric(before, effects), "cells": len(chosen)}

    def _patcher(self, direction: str, source: str, post_norm: str, sites: tuple[str, ...]) -> Patcher:
        """What patches cells of these sites; it keeps the unpatched runs where they fit into memory."""
        key = (direction, source, post_norm, sites)
        if key not in self._patchers:
            exact = ActivationPatching(source=source, post_norm=post_norm)
            setting, batches, predicted = exact.prepared(self.model, self.task, parse_sites(list(sites)), direction=direction)
            self._patchers[key] = Patcher(exact, setting, batches, predicted, Meter(_Bar(lambda n: self._tick(n)), "cell"))
        return self._patchers[key]

    def _attention(self, head: str, example: int, side: str) -> dict[str, Any]:
        layer, _, number = str(head).removeprefix("a").partition(".h")
        if not (layer.isdigit() and number.isdigit()) or int(layer) >= self.model.arch.n_layers or int(number) >= self.model.arch.n_heads:
            raise SiteError(
                f"there is no head {head!r}; {self.model.name} has a0.h0 to a{self.model.arch.n_layers - 1}.h{self.model.arch.n_heads - 1}."
            )
        if side not in SIDES:
            raise TaskError(unknown("side", side, SIDES))
        if example != MEAN and not 0 <= example < len(self.task):
            raise TaskError(f"there is no example {example}; {self.task.name} has {len(self.task)}, from 0.")
        if example == MEAN and not self.task.aligned:
            raise TaskError("the prompts do not line up, so their patterns have no mean; choose an example.")
        of = self._patterns_of(int(layer), side)
        rows = np.mean([one[int(number)] for one in of], 0) if example == MEAN else of[example][int(number)]
        return {"pattern": [[round(float(value), 3) for value in row[: i + 1]] for i, row in enumerate(rows)]}

    def _patterns_of(self, layer: int, side: str) -> list[np.ndarray]:
        """The patterns of a layer's heads, ``[head, dest, src]`` per example."""
        if (layer, side) not in self._patterns:
            self.model.arch.check(Site("pattern", (), layer=layer))
            found: dict[int, np.ndarray] = {}
            for batch in self.task.batches(device=self.model.device):
                program = Program(getattr(batch, side), batch.examples, positions=batch.positions, keep=(("pattern", layer),))
                kept = run(self.model, program).activations["pattern", layer].float().cpu().numpy()
                found |= dict(zip(batch.examples.tolist(), kept, strict=True))
            self._patterns[layer, side] = [found[example] for example in range(len(self.task))]
        return self._patterns[layer, side]

    def _made_of(self, direction: str, site: str, number: int) -> dict[str, Any]:
        maps = self._maps(direction)
        cell = maps.cell(site, number)
        at = dict(zip(maps.first.axes(site), cell, strict=True))
        lists: list[dict[str, Any]] = []
        for what, kind in made_of(self.model, site, at.get("layer")).items():
            axes = [axis for axis in KINDS[kind].axes if axis != "pos" or "pos" in at]
            wanted = str(Site(kind, tuple(axes)))
            try:
                scores = self._scored(direction, wanted)
            except PatchlabError as error:
                lists.append({"what": what, "why": str(error)})
                continue
            lists.append({"what": what, "method": scores.provenance["method"], **_largest(scores, wanted, at)})
        return {"lists": lists}

    def _scored(self, direction: str, site: str) -> ScoreMap:
        """The screen's scores of neurons or features."""
        kind = Site.parse(site)
        accessor = self.model.arch.accessors.get(kind.kind)
        key = (direction, site, "" if accessor is None else str(accessor.identity))  # other dictionaries may have been added since
        if key not in self._parts:
            maps = self._maps(direction)
            own = next((one for one in maps.by_name.values() if site in one.sites and site not in one.not_scored), None)
            length = max(map(len, self.task.pairs)) if "pos" in kind.axes else 1
            count = len(self.task) * self.model.arch.n_layers * length * (self.model.arch.d_mlp or 0) * (kind.kind == "mlp_post")
            if own is None and count > MOST_PARTS:
                raise MethodError(
                    f"{site} has {count:,} effects on all examples, more than are held for a look ({MOST_PARTS:,}). Explore fewer examples "
                    f"(task.select), or mlp_out[layer], which has no positions."
                )
            if own is None:
                screen = replace(self.screen, source=maps.source)
                own = screen.run(self.model, self.task, site, direction=direction, progress=False)
            self._parts[key] = own
        return self._parts[key]


def _largest(scores: ScoreMap, site: str, at: Mapping[str, int]) -> dict[str, Any]:
    """The entries of a site with the largest mean effects at a layer and position, and the sum of all there."""
    axes, cells = scores.axes(site), scores.cells(site)
    here = np.ones(len(cells), dtype=bool)
    for axis in ("layer", "pos"):
        if axis in axes:
            here &= cells[:, axes.index(axis)] == at[axis]
    chosen = np.flatnonzero(here)
    if site in scores.not_scored:
        return {"why": scores.not_scored[site]}
    effects = scores.data[site].to_numpy().reshape(scores.data.sizes["example"], -1)[:, chosen].astype(np.float64)
    total, order = effects.sum(1), np.argsort(-np.abs(effects.mean(0)), kind="stable")[:PARTS]
    order = order[np.abs(effects[:, order]).max(0) > 0]
    rows = [{"label": label(scores, site, tuple(cells[chosen[i]].tolist())), **_of_examples(effects[:, i])} for i in order]
    return {"rows": rows, "count": len(chosen), "sum": _of_examples(total)}


def _of_examples(effects: Float[np.ndarray, " example"]) -> dict[str, Any]:
    """Mean, interval and the effect on each example, in metric units."""
    mean, low, high = (_plain(part[0]) for part in summary(effects[:, None]))
    return {"mean": mean, "low": low, "high": high, "each": [_plain(value) for value in effects]}


def _metric(before: Float[np.ndarray, " example"], effects: Float[np.ndarray, " example"]) -> dict[str, Any]:
    """The mean metric before and after a patch."""
    return {"before": _plain(before.mean()), "after": _plain((before + effects).mean())}


def _plain(value: Any) -> float | None:
    """A number of seven digits, which is what JSON has; None where it is undefined."""
    return None if not np.isfinite(value) else float(f"{float(value):.7g}")


def _nothing(n: int) -> None:
    """What is done about progress that nobody asks for."""
