"""Verified patching: a cheap method says where to look, exact patching says what is there, a sample says what may be missing.

What the sample proves, what that costs, and why it may grow: :mod:`patchlab.methods.verified.bound`.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from patchlab.errors import MethodError
from patchlab.methods.cells.kind import listed
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.method import Method
from patchlab.methods.named import RelevancePatching
from patchlab.methods.registry import name_of, register_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.verified.bound import Bound, Price, Recall, half_widths, look_sizes, missable
from patchlab.methods.verified.patcher import Cell, Cells, Patcher
from patchlab.methods.verified.result import VerifiedResult, cell_columns, ordered
from patchlab.methods.verified.subsets import FEWEST, SubsetBound, largest_effect, memberships, most_exceeding_additive
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.scores import Cost, ScoreMap
from patchlab.sites import KINDS, POSITION_AXES, Site
from patchlab.tasks.task import Task

SAMPLE = 30
"""Cells drawn at random where no recall is asked for."""
_ROUNDING = 1e-9


@register_method("verified", "the cells with the largest exact effects, found with the method in brackets as a screen; no score map", inner="screen")
@dataclass(frozen=True)
class VerifiedPatching:
    """The cells with the largest exact effects, found with a screen, and a bound on how many were missed.

    All sites are pooled: their cells compete by the |mean effect over examples|. For one list per site, run it once per site.

    *Order and stopping rule.* Cells are patched exactly, ``k`` at a time, in the order of |screen score| × r, where r is the
    largest |exact| / |screen| among the last ``max(10, 2k)`` verified cells of the same site (before the first: 1). Verifying
    stops when (a) none of the last k cells came into the top k, and (b) no other cell's |screen score| × r exceeds the k-th
    verified |effect|; or when ``max_share`` is used up. The rule is a heuristic: a screen that gives an important cell next to
    nothing hides it from the rule.

    *Recall.* Therefore cells are then drawn uniformly from the live cells that were not verified, and patched. The threshold (the k-th
    verified |effect|, or the target) is fixed before the draw, so "with 95 % confidence at least r of the true top k are among those
    returned" holds whatever the screen and the rule did. It is dear: if none of the drawn cells exceeds the threshold, 17 of the top
    20 take 53 % of the unverified cells, and a tenth of them only excludes more than 28 misses. With ``recall`` the sample grows until
    that share is certain, or ``sample`` cells are drawn; the confidence allows for the growing. Cells of the sample that belong to the top
    k join it; the threshold of the statement stays. :meth:`price` says beforehand what a recall takes, and what a sample buys.

    *The sweep instead.* Where all of that would cost no less than a full sweep, or k cells are all there are, the sweep is run:
    every live cell is patched, and the result is the whole ranking.

    *Which prompts.* An effect is the mean over the prompts that were run, exactly. So are the ranking and the recall, unless
    ``population`` is asked for: then every effect has an interval for its mean over prompts such as these, wide enough to hold for all
    live cells at once and so for those that were selected (:func:`patchlab.methods.verified.bound.half_widths`), and the recall is of the top k
    over such prompts: a cell may be missed if the upper end of its |effect| exceeds the k-th largest lower end. Half of 1 −
    ``confidence`` is for the prompts, half for the sample of cells, so that all of it holds together.

    *Hierarchical.* After the first k cells, whole groups are patched jointly: each layer of each site, then each position of
    the layers that matter. Only cells in groups whose exact joint |effect| is at least ``group_fraction`` × the k-th verified
    |effect| (or × the target) stay candidates. This assumes that effects inside a group do not cancel; the sample is drawn
    from all unverified cells, so the bound does not assume it.

    *Subsets.* With ``subsets`` random subsets of the unverified cells are patched, each jointly, and bound the largest |effect| that any of
    them may have, and how many may exceed the threshold, under the assumption that effects add up: the diagnostic of the AtP* paper (Kramár
    et al. 2024, arXiv 2403.00745; :class:`patchlab.methods.verified.subsets.SubsetBound`). They can claim more than single cells for the same work;
    the sample makes no such assumption, and bounds no size. They speak of these prompts.

    Args:
        screen: the method that scores all cells; its ``source`` is patched in.
        k: how many cells are wanted.
        target: instead of k, a share of |mean m_clean − mean m_corrupted|: all cells whose |mean effect| exceeds it are wanted.
            The rule's k is then 5 % of the live cells, at most 20.
        recall: the share of the top k (or of the cells above the target) that must be certain; None for what the sample gives.
        sample: most cells drawn at random. None: with a recall as many as it takes, else 30.
        confidence: of what is said about cells that were not patched and, with ``population``, about other prompts.
        max_share: most cells that are patched before the sample is drawn, as a share of the live ones (groups count too).
        hierarchical: look at groups first.
        group_fraction: see above.
        engine: of the exact patches; see :class:`patchlab.ActivationPatching`.
        seed: of the sample and the subsets.
        subsets: how many random subsets of the unverified cells are patched jointly; 0 for none.
        population: speak of prompts such as these, not only of these.

    Example:
        >>> method = VerifiedPatching(k=10, recall=0.8)
        >>> print(method.price(model, task, ["z[layer,pos,head]", "mlp_out"]))  # doctest: +SKIP
        >>> found = method.run(model, task, ["z[layer,pos,head]", "mlp_out"])  # doctest: +SKIP
        >>> found.top[["address", "effect", "screen"]]  # doctest: +SKIP
        >>> print(found.recall)  # doctest: +SKIP
        with 95 % confidence at least 8 of the true top 10 on these prompts are among those returned; ...
    """

    screen: Method = field(default_factory=RelevancePatching)
    k: int = 20
    target: float | int | None = None
    recall: float | int | None = None
    sample: int | None = None
    confidence: float = 0.95
    max_share: float | int = 0.5
    hierarchical: bool = False
    group_fraction: float | int = 0.5
    engine: str = "auto"
    seed: int = 0
    subsets: int = 0
    population: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise MethodError(f"k is {self.k}; ask for at least 1 cell.")
        if self.sample is not None and self.sample < 0:
            raise MethodError(f"sample is {self.sample}; give a number of cells, 0 for no bound.")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise MethodError(f"recall is {self.recall}; give a share above 0 and at most 1, such as 0.85, or None for what the sample gives.")
        if self.target is not None and not self.target > 0:
            raise MethodError(f"target is {self.target}; give a share of the gap above 0, such as 0.05, or None for the k largest.")
        for name, value in (("confidence", self.confidence), ("max_share", self.max_share)):
            if not 0 < value < 1 and not (name == "max_share" and value == 1):
                raise MethodError(f"{name} is {value}; it must be between 0 and 1.")
        if self.subsets and self.subsets < FEWEST:
            raise MethodError(f"subsets is {self.subsets}; give 0 for none, or at least {FEWEST}.")
        if not self.group_fraction >= 0:
            raise MethodError(f"group_fraction is {self.group_fraction}; give a share of the k-th |effect|, 0 or more.")
        if isinstance(self.screen, ActivationPatching):
            raise MethodError("the screen is exact patching itself, so there is nothing to verify; give a cheap one such as RelevancePatching().")
        _ = self.exact

    @property
    def name(self) -> str:
        """The name by which results refer to the method."""
        return name_of(self)

    @property
    def exact(self) -> ActivationPatching:
        """The method that patches the cells."""
        return ActivationPatching(source=self.screen.source, engine=self.engine)

    @property
    def level(self) -> float:
        """Confidence of what is said about unpatched cells and, of the population, about other prompts: together they make ``confidence``."""
        return 1 - (1 - self.confidence) / 2 if self.population else self.confidence

    def step(self, n_live: int) -> int:
        """The number of cells that are verified at a time."""
        return min(self.k, n_live) if self.target is None else max(1, min(20, n_live // 20))

    def budget(self, n_live: int) -> int:
        """Most cells that are verified."""
        return max(self.step(n_live), int(self.max_share * n_live))

    def price(self, model: Model, task: Task, sites: str | Site | Iterable[str | Site], *, direction: str = "denoising") -> Price:
        """The price of a run, at least, and of recall; nothing is run.

        Raises:
            MethodError, SiteError: as :meth:`run`, where that can be known.
        """
        return self._price(self.exact.prepared(model, task, sites, direction=direction)[0])

    def _price(self, setting: Setting, screen: ScoreMap | None = None) -> Price:
        if screen is None and any(live is None for live in setting.live.values()):
            raise MethodError(f"which cells {', '.join(map(str, setting.sites))} have is only known after a run, and so is the price; run it.")
        n_live = self.exact.forwards(setting) if screen is None else sum(int(screen.live[str(site)].sum()) for site in setting.sites)
        if not n_live:
            raise MethodError(f"none of the cells of {', '.join(map(str, setting.sites))} can matter: all are structural zeros. Name other sites.")
        if self.population and len(setting.task) < 2:
            raise MethodError("one prompt pair says nothing about other prompts; give at least 2 pairs, or leave population out.")
        step = self.step(n_live)
        # a first step always comes into the top k, so a second one follows; cells above a target may all be absent
        verified = min(n_live, step if self.target is not None or 2 * step > self.budget(n_live) else 2 * step)
        unverified = n_live - verified
        most = unverified if self.sample is None else min(self.sample, unverified)
        if self.recall is None:
            sample = min(SAMPLE, most) if self.sample is None else most
        elif self.target is None:
            missed = missable(self.recall, self.k)
            sample = min(next(look_sizes(unverified, lambda found: missed, self.level)), most)
        else:
            sample = 0  # how many exceed the target, and so how many may be missed, is not known yet
        grouped = [live for site in setting.sites if (live := setting.live[str(site)]) is not None and levels(site)]
        groups = sum(live.shape[0] for live in grouped) if self.hierarchical else 0
        screening = 3 * self.screen.forwards(setting) - 2  # all but the first run may have a backward pass, which counts as two
        wanted = self.k if self.target is None else None
        return Price(n_live, wanted, self.level, float(screening), verified, sample, groups + self.subsets, self.recall)

    def run(
        self,
        model: Model,
        task: Task,
        sites: str | Site | Iterable[str | Site],
        *,
        direction: str = "denoising",
        batch_size: int | None = None,
        progress: bool = True,
        max_memory: int | float | None = None,
        say: Callable[[str], None] | None = None,
    ) -> VerifiedResult:
        """Find and verify the most important cells; the arguments are those of :meth:`patchlab.methods.Method.run`.

        ``say`` is told the price before anything is patched; without it, ``progress`` shows the price on stderr.

        Raises:
            MethodError: no live cell, a site that the screen cannot score, a target without a gap, and as every method.
            SiteError: unknown or absent site.
        """
        started = time.perf_counter()
        options: dict[str, Any] = {"direction": direction, "batch_size": batch_size, "max_memory": max_memory}
        setting, batches, predicted = self.exact.prepared(model, task, sites, **options)
        known = all(live is not None for live in setting.live.values())
        screen = None if known else self.screen.run(model, task, setting.sites, progress=progress, **options)
        price = self._price(setting, screen)
        if say is not None:
            say(str(price))
        elif progress:
            sys.stderr.write(f"{price}\n")
        if price.dearer:
            scores = self.exact.run(model, task, setting.sites, progress=progress, **options)
            cells = Cells.of(setting, scores)
            search = _Search(self, setting, cells, _read(scores, cells))
            search.take_all(_target(self.target, scores))
            return search.result(scores, price, scores.cost, scores.cost.forwards / len(batches), scores.provenance.get("engine", ""))
        if screen is None:
            screen = self.screen.run(model, task, setting.sites, progress=progress, **options)
        with progress_bar(self.name, "forward", show=progress) as bar:
            meter = Meter(bar)
            patcher = Patcher(self.exact, setting, batches, predicted, meter)
            search = _Search(self, setting, Cells.of(setting, screen), patcher.joint)
            search.run(_target(self.target, screen))
        cost = Cost(
            meter.forwards + screen.cost.forwards,
            meter.backwards + screen.cost.backwards,
            meter.positions + screen.cost.positions,
            time.perf_counter() - started,
            screen.cost.predicted_bytes,
            screen.cost.cuda_peak_bytes,
        )
        return search.result(screen, price, cost, meter.forwards / len(batches), meter.engine)


def _read(scores: ScoreMap, cells: Cells) -> Callable[[Sequence[Sequence[Cell]]], Float[np.ndarray, "set example"]]:
    """Effects of single cells, read from a sweep."""
    effects: dict[Cell, np.ndarray] = {}
    for site in cells.setting.sites:
        values = scores.data[str(site)].transpose("example", ...).to_numpy()
        rows = values.reshape(len(values), -1).T
        effects |= {(site, tuple(cell)): row for cell, row in zip(scores.cells(site).tolist(), rows, strict=True)}
    return lambda sets: np.stack([effects[cell] for (cell,) in sets]).astype(np.float64)


def _target(target: float | int | None, screen: ScoreMap) -> float | None:
    """A target in metric units."""
    if target is None:
        return None
    low, high = screen.gap_interval()
    if low <= 0 <= high or screen.gap == 0:
        raise MethodError(
            f"target={target} is a share of the gap mean m_clean − mean m_corrupted, which is {screen.gap:.3g} and not distinguishable from 0. "
            f"Ask for k cells instead, or use pairs that the model solves."
        )
    return target * abs(screen.gap)


class _Search:
    """One search: which cells were patched, in which order, and with what effect. ``joint`` gives exact effects of sets of cells."""

    def __init__(
        self,
        method: VerifiedPatching,
        setting: Setting,
        cells: Cells,
        joint: Callable[[Sequence[Sequence[Cell]]], Float[np.ndarray, "set example"]],
    ) -> None:
        self.method, self.setting, self.cells, self.joint = method, setting, cells, joint
        self.n = len(cells.where)
        self.k = method.step(self.n)
        self.size = np.abs(cells.screen)
        self.verified: list[int] = []
        self.drawn: list[int] = []
        self.effects: dict[int, np.ndarray] = {}
        self.means: dict[int, float] = {}  # |mean effect|
        self.wide: dict[int, float] = {}  # half the width of the interval for it; 0 where these prompts are spoken of
        self.groups: list[dict[str, Any]] = []
        self.candidates = np.ones(self.n, dtype=bool)
        self.target: float | None = None
        self.bound: Bound | None = None
        self.subsets: SubsetBound | None = None
        self.joint_runs = 0
        self.swept = False
        self.stopped = ""

    def run(self, target: float | None) -> None:
        """Verify until the rule says stop, then draw the sample."""
        self.target = target
        self._verify(self._order()[: self.k])
        if self.method.hierarchical:
            self._prune()
        budget = self.method.budget(self.n) - len(self.groups)
        while not self.stopped:
            following = self._order()[: self.k]
            if not len(following):
                self.stopped = "every candidate is verified"
            elif self._settled():
                self.stopped = f"none of the last {self.k} came in, and no other cell is expected above {self._threshold():.3g}"
            elif len(self.verified) + len(following) > budget:
                self.stopped = f"the budget of {100 * self.method.max_share:g} % of the live cells is used up; more may be found"
            else:
                self._verify(following)
        self._draw()

    def take_all(self, target: float | None) -> None:
        """Patch every cell."""
        self.target, self.swept = target, True
        self._verify(np.arange(self.n))
        self.stopped = "a full sweep takes no more than verified patching would" if self.k < self.n else "no more cells are live than were asked for"
        self._draw()

    def _patch(self, numbers: list[int]) -> None:
        if not numbers:
            return
        found = self.joint([[self.cells.where[i]] for i in numbers])
        self.effects.update(zip(numbers, found, strict=True))
        self.means.update(zip(numbers, np.abs(found.mean(1)).tolist(), strict=True))

    def _widen(self, numbers: list[int]) -> None:
        """Take the intervals of patched cells, all of one width in standard errors."""
        found = np.array([self.effects[i] for i in numbers])
        wide = half_widths(found, self.n, self.method.level) if self.method.population and numbers else np.zeros(len(numbers))
        self.wide.update(zip(numbers, wide.tolist(), strict=True))

    def _threshold(self) -> float:
        """|effect| that a cell must exceed to come in, in metric units."""
        return self.target if self.target is not None else sorted(self.means[i] for i in self.verified)[-self.k]

    def _certain(self, numbers: Iterable[int]) -> float:
        """|effect| in metric units that at least k cells have for certain (the k-th largest lower end), or the target."""
        if self.target is not None:
            return self.target
        return sorted(max(0.0, self.means[i] - self.wide[i]) for i in numbers)[-self.k]

    def _exceeding(self, numbers: Iterable[int], threshold: float) -> int:
        """How many cells exceed a threshold; over prompts such as these, may exceed it."""
        return sum(self.means[i] + self.wide[i] > threshold for i in numbers)

    def _verify(self, chosen: Int[np.ndarray, " cell"]) -> None:
        self._patch(chosen.tolist())
        self.verified += chosen.tolist()

    def _expected(self) -> Float[np.ndarray, " cell"]:
        """What each cell could have: |screen score| × the largest |exact| / |screen| seen lately at its site."""
        expected = self.size.copy()
        for site in np.unique(self.cells.site):
            recent = [i for i in self.verified if self.cells.site[i] == site and self.size[i] > 0][-max(10, 2 * self.k) :]
            ratios = [self.means[i] / self.size[i] for i in recent]
            expected[self.cells.site == site] *= max(ratios, default=1.0)
        return expected

    def _order(self) -> Int[np.ndarray, " cell"]:
        """Candidates that are not verified yet, the most promising first."""
        left = self.candidates.copy()
        left[self.verified] = False
        numbers = np.flatnonzero(left)
        expected = self._expected()[numbers]
        return numbers[np.lexsort((-self.size[numbers], -expected))]

    def _settled(self) -> bool:
        threshold = self._threshold()
        if self.target is None:
            came_in = any(self.means[i] >= threshold for i in self.verified[-self.k :])
        else:
            came_in = any(self.means[i] > threshold for i in self.verified[-self.k :])
        left = self._order()
        return not came_in and not bool((self._expected()[left] > threshold).any())

    def _prune(self) -> None:
        """Patch groups jointly, level by level, and drop the cells of those that do not matter."""
        floor = self.method.group_fraction * self._threshold()
        for number, site in enumerate(self.setting.sites):
            mine = np.flatnonzero(self.cells.site == number)
            for axes in levels(site):
                live = self.setting.live[str(site)]
                if live is None:
                    break
                keys = {int(i): tuple(self.cells.where[i][1][site.axes.index(axis)] for axis in axes) for i in mine if self.candidates[i]}
                wanted = sorted(set(keys.values()))
                coarse = Site(site.kind, axes)
                shape = tuple(size for axis, size in zip(site.axes, live.shape, strict=True) if axis in axes)
                mask: Bool[np.ndarray, "*cells"] = np.zeros(shape, dtype=bool)
                for key in wanted:
                    mask[key] = True
                found = listed(mask)
                joint = self.joint([[(coarse, key)] for key in found]).mean(1)
                kept = {key for key, effect in zip(found, joint, strict=True) if abs(effect) >= floor}
                self.groups += [
                    {"address": self.cells.label((coarse, key)), "effect": float(effect), "kept": key in kept}
                    for key, effect in zip(found, joint, strict=True)
                ]
                for cell, key in keys.items():
                    self.candidates[cell] = key in kept

    def _draw(self) -> None:
        """Patch a uniform sample of the unverified live cells; the threshold, and when to stop, are fixed before it is drawn."""
        self._widen(self.verified)
        method, threshold = self.method, self._certain(self.verified)
        left = np.setdiff1d(np.arange(self.n), self.verified)
        order = np.random.default_rng(method.seed).permutation(left).tolist()
        unlimited = SAMPLE if method.recall is None else len(left)
        most = min(unlimited if method.sample is None else method.sample, len(left))
        sizes: Iterator[int] = itertools.repeat(most) if method.recall is None else look_sizes(len(left), self._missable(threshold), method.level)
        looks, exceeding = [next(sizes)], 0
        if method.subsets and min(looks[0], most) + method.subsets >= len(left):
            looks[0] = most = len(left)  # as cheap, and certain
        while len(self.drawn) < (size := min(looks[exceeding], most)):
            self._patch(order[len(self.drawn) : size])
            self._widen(order[len(self.drawn) : size])
            self.drawn = order[:size]
            exceeding = self._exceeding(self.drawn, threshold)
            looks += itertools.islice(sizes, max(0, exceeding + 1 - len(looks)))
        made = tuple(size for size in looks[:exceeding] if size <= len(self.drawn)) if method.recall is not None else ()
        unit = self.setting.task.metric.unit
        self.bound = Bound(method.level, len(left), len(self.drawn), exceeding, threshold, unit, made, method.population)
        if method.subsets and len(self.drawn) < len(left):
            self._patch_subsets(left.tolist(), exceeding, threshold)

    def _missable(self, threshold: float) -> Callable[[int], int]:
        """How many exceeding cells may stay unpatched if so many are found at random, so that the recall is reached all the same."""
        recall = float(self.method.recall or 0)
        if self.target is None:
            may_be = self._exceeding(sorted(self.verified, key=lambda i: -self.means[i])[self.k :], threshold) if self.method.population else 0
            missed = missable(recall, self.k) - may_be
            return lambda found: missed - found if self.method.population else missed
        sure = sum(self.means[i] > self.target + self.wide[i] for i in self.verified)
        per_found = (1 - recall) / recall
        if self.method.population:
            may_be = sum(self.target - self.wide[i] < self.means[i] <= self.target for i in self.verified)
            return lambda found: math.floor(sure * per_found + _ROUNDING) - may_be - found
        return lambda found: math.floor((sure + found) * per_found + _ROUNDING)

    def _patch_subsets(self, left: list[int], exceeding: int, threshold: float) -> None:
        """Patch random subsets of the unverified cells jointly."""
        method = self.method
        members = memberships(len(left), method.subsets, method.seed)
        filled = np.flatnonzero(members.any(0))  # a subset of few cells may have none, and then no effect
        joint = np.zeros(members.shape[1])
        joint[filled] = self.joint([[self.cells.where[left[i]] for i in np.flatnonzero(members[:, j])] for j in filled]).mean(1)
        self.joint_runs = len(filled)
        wanted = self.k if self.target is None and not method.population else None
        start = missable(method.recall, wanted) if wanted is not None and method.recall is not None else 0
        self.subsets = SubsetBound(
            method.confidence,
            len(left),
            method.subsets,
            float(members.mean()),
            largest_effect(members, joint, method.confidence),
            max((self.means[i] for i in self.drawn), default=0.0),
            self.setting.task.metric.unit,
            threshold,
            most_exceeding_additive(members, joint, threshold, method.confidence, start),
            exceeding,
            wanted,
        )

    def _recall(self, bound: Bound) -> Recall:
        """What is certainly returned of what was asked for."""
        method, ranked = self.method, sorted(self.effects, key=lambda i: -self.means[i])
        certain = 1.0 if bound.sample == bound.unverified and not method.population else method.confidence
        if self.target is None:
            lost = self._exceeding(ranked[self.k :], self._certain(ranked)) if method.population else 0
            return Recall(max(0, self.k - lost - bound.unseen), self.k, certain, self.k, method.population, method.recall)
        sure = sum(self.means[i] > self.target + self.wide[i] for i in ranked)
        lost = sum(self.target - self.wide[i] < self.means[i] <= self.target for i in ranked)
        return Recall(sure, sure + lost + bound.unseen, certain, None, method.population, method.recall)

    def result(self, screen: ScoreMap, price: Price, cost: Cost, forwards: float, engine: str) -> VerifiedResult:
        """The tables and what they cost; ``forwards`` are those per batch, without the screen's."""
        if self.bound is None:
            raise MethodError("the search has not been run.")
        numbers = sorted(self.effects, key=lambda i: -self.means[i])
        effects = np.array([self.effects[i] for i in numbers])
        effects.setflags(write=False)
        frame = self._frame(screen, numbers, effects)
        frame["top"] = frame["effect"].abs() > self.target if self.target is not None else np.arange(len(frame)) < self.k
        tokens = sum(len(pair) for pair in self.setting.task.pairs)
        patched = {"verified": len(self.verified), "sample": len(self.drawn), "groups": len(self.groups), "subsets": self.joint_runs}
        screened = 0.0 if self.swept else screen.cost.positions / tokens * (1 + 2 * screen.cost.backwards / screen.cost.forwards)
        passes = {"screen": screened, **{name: float(count) for name, count in patched.items()}, "unpatched": forwards - sum(patched.values())}
        mine = {
            name: str(getattr(self.method, name)) if name == "screen" else getattr(self.method, name) for name in self.method.__dataclass_fields__
        }
        return VerifiedResult(
            frame,
            effects,
            screen,
            self.bound,
            self._recall(self.bound),
            price,
            self.method.k if self.target is None else None,
            self.n,
            pd.DataFrame(self.groups, columns=["address", "effect", "kept"]),
            self.stopped,
            passes,
            cost,
            {**screen.provenance, "method": self.method.name, "method_options": mine, "engine": engine},
            self.subsets,
            self.method.level if self.method.population else None,
        )

    def _frame(self, screen: ScoreMap, numbers: list[int], effects: Float[np.ndarray, "cell example"]) -> pd.DataFrame:
        place = np.empty(self.n, dtype=np.int64)
        place[np.argsort(-self.size, kind="stable")] = np.arange(1, self.n + 1)
        drawn, n_cells = set(self.drawn), len(numbers)
        mean, wide = effects.mean(1), np.array([self.wide[i] for i in numbers])
        columns = {
            "address": [self.cells.label(self.cells.where[i]) for i in numbers],
            "effect": mean,
            **({"low": mean - wide, "high": mean + wide} if self.method.population else {}),
            "screen": np.full(n_cells, np.nan) if self.swept else self.cells.screen[numbers],
            "place": pd.array([pd.NA] * n_cells if self.swept else place[numbers], dtype="Int64"),
            "found": ["sweep" if self.swept else "sample" if i in drawn else "screen" for i in numbers],
        }
        values = pd.DataFrame(columns)
        parts: list[pd.DataFrame] = []
        for number, site in enumerate(self.setting.sites):
            rows = [row for row, i in enumerate(numbers) if self.cells.site[i] == number]
            if rows:
                index = np.array([self.cells.where[numbers[row]][1] for row in rows], dtype=np.float64)
                parts.append(pd.DataFrame({"site": str(site), **cell_columns(screen, str(site), index)}, index=rows))
        where = pd.concat(parts).sort_index()
        table = pd.concat([where, values], axis=1)
        return table.reindex(columns=ordered(list(table.columns)))


def levels(site: Site) -> list[tuple[str, ...]]:
    """Coarser granularities of a site, the coarsest first: per layer, then per layer and position."""
    kind = KINDS[site.kind]
    if "layer" not in kind.axes:
        return []
    place = next((axis for axis in site.axes if axis in POSITION_AXES), None)
    levels = [("layer",), *([("layer", place)] if place is not None else [])]
    return [axes for axes in levels if axes != site.axes]
