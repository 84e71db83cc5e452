"""Verified patching: a cheap method says where to look, exact patching says what is there, a sample says what may be missing."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from patchlab.bootstrap import interval, resampling_weights
from patchlab.errors import MethodError
from patchlab.methods.base import Method
from patchlab.methods.bound import Bound
from patchlab.methods.cells import Cells, Patcher
from patchlab.methods.exact import ActivationPatching, addresses
from patchlab.methods.named import RelevancePatching
from patchlab.methods.runs import Meter
from patchlab.methods.subsets import FEWEST, SubsetBound, largest_effect, memberships
from patchlab.methods.verified_result import VerifiedResult, cell_columns, ordered
from patchlab.models import Model
from patchlab.scores import Cost, ScoreMap
from patchlab.sites import KINDS, POSITION_AXES, Site
from patchlab.tasks.base import Task

TOP_SHARE = 20
"""A top-k is of at most one live cell in so many: 5 %."""
_N_BOOT = 1000


@dataclass(frozen=True)
class VerifiedPatching:
    """The cells with the largest exact effects, found with a screen, and a bound on how many were missed.

    All sites are pooled: their cells compete by the |mean effect over examples|. For one list per site, run it once per site.

    *Order and stopping rule.* Cells are patched exactly, ``k`` at a time, in the order of |screen score| × r, where r is the
    largest |exact| / |screen| among the last ``max(10, 2k)`` verified cells of the same site (before the first: 1). Verifying
    stops when (a) none of the last k cells came into the top k, and (b) no other cell's |screen score| × r exceeds the k-th
    verified |effect|; or when ``max_share`` is used up. The rule is a heuristic: a screen that gives an important cell next to
    nothing hides it from the rule.

    *Confidence.* Therefore ``sample`` cells are then drawn uniformly from the live cells that were not verified, and patched.
    The threshold (the k-th verified |effect|, or the target) is fixed before the draw, so "with 95 % confidence at most M of
    the N unverified cells exceed it" holds whatever the screen and the rule did: it is a hypergeometric bound
    (:func:`patchlab.methods.bound.most_exceeding`). Without exceeding cells, a sample of 30, 59 or 299 out of many gives M of about
    10, 5 or 1 % of N. Cells of the sample that belong to the top k join it; the threshold of the statement stays.

    *Hierarchical.* After the first k cells, whole groups are patched jointly: each layer of each site, then each position of
    the layers that matter. Only cells in groups whose exact joint |effect| is at least ``group_fraction`` × the k-th verified
    |effect| (or × the target) stay candidates. This assumes that effects inside a group do not cancel; the sample is drawn
    from all unverified cells, so the bound does not assume it.

    *Subsets.* With ``subsets`` random subsets of the unverified cells are patched, each jointly, and bound the largest |effect| that any of
    them may have, under the assumption that effects add up: the diagnostic of the AtP* paper (Kramár et al. 2024, arXiv
    2403.00745; :class:`patchlab.methods.subsets.SubsetBound`). The sample makes no such assumption, and bounds no size.

    Args:
        screen: the method that scores all cells; its ``source`` is patched in.
        k: how many cells are wanted; at most 5 % of the live cells are returned (and at least 1).
        target: instead of k, a share of |mean m_clean − mean m_corrupted|: all cells whose |mean effect| exceeds it are wanted.
            The rule's k is then 5 % of the live cells, at most 20.
        sample: cells drawn at random (all that are left, if there are fewer).
        confidence: of the bound.
        max_share: most cells that are patched before the sample is drawn, as a share of the live ones (groups count too).
        hierarchical: look at groups first.
        group_fraction: see above.
        engine: of the exact patches; see :class:`patchlab.ActivationPatching`.
        seed: of the sample and the subsets.
        subsets: how many random subsets of the unverified cells are patched jointly; 0 for none.

    Example:
        >>> found = VerifiedPatching(k=10).run(model, task, ["z[layer,pos,head]", "mlp_out"])  # doctest: +SKIP
        >>> found.top[["address", "effect", "screen"]]  # doctest: +SKIP
        >>> print(found.bound)  # doctest: +SKIP
        with 95 % confidence at most 19 of the 201 unverified cells exceed 0.0614 logits (0 of 30 drawn at random did); ...
    """

    screen: Method = field(default_factory=RelevancePatching)
    k: int = 20
    target: float | int | None = None
    sample: int = 30
    confidence: float = 0.95
    max_share: float | int = 0.5
    hierarchical: bool = False
    group_fraction: float | int = 0.5
    engine: str = "auto"
    seed: int = 0
    subsets: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise MethodError(f"k is {self.k}; ask for at least 1 cell.")
        if self.sample < 0:
            raise MethodError(f"sample is {self.sample}; give a number of cells, 0 for no bound.")
        if self.target is not None and not self.target > 0:
            raise MethodError(f"target is {self.target}; give a share of the gap above 0, such as 0.05, or None for the k largest.")
        for name, value in (("confidence", self.confidence), ("max_share", self.max_share)):
            if not 0 < value < 1 and not (name == "max_share" and value == 1):
                raise MethodError(f"{name} is {value}; it must be between 0 and 1.")
        if self.subsets and self.subsets < FEWEST:
            raise MethodError(f"subsets is {self.subsets}; give 0 for none, or at least {FEWEST}.")
        if self.group_fraction < 0:
            raise MethodError(f"group_fraction is {self.group_fraction}; give a share of the k-th |effect|, 0 or more.")
        if isinstance(self.screen, ActivationPatching):
            raise MethodError("the screen is exact patching itself, so there is nothing to verify; give a cheap one such as RelevancePatching().")
        _ = self._exact

    @property
    def name(self) -> str:
        """How results refer to the method."""
        return f"verified({self.screen.name})"

    @property
    def _exact(self) -> ActivationPatching:
        return ActivationPatching(source=self.screen.source, engine=self.engine)

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
    ) -> VerifiedResult:
        """Find and verify the most important cells; the arguments are those of :meth:`patchlab.methods.Method.run`.

        Raises:
            MethodError: no live cell, a site that the screen cannot score, a target without a gap, and as every method.
            SiteError: unknown or absent site.
        """
        started = time.perf_counter()
        options: dict[str, Any] = {"direction": direction, "batch_size": batch_size, "max_memory": max_memory}
        setting, batches, predicted = self._exact.prepared(model, task, sites, **options)
        screen = self.screen.run(model, task, setting.sites, progress=progress, **options)
        with tqdm(desc=self.name, unit="forward", disable=not progress, leave=False) as bar:
            search = _Search(self, Patcher(self._exact, setting, batches, predicted, Meter(bar)), Cells.of(setting, screen))
            search.run(_target(self.target, screen))
        return search.result(screen, time.perf_counter() - started)


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
    """One search: which cells were patched, in which order, and with what effect."""

    def __init__(self, method: VerifiedPatching, patcher: Patcher, cells: Cells) -> None:
        self.method, self.patcher, self.cells = method, patcher, cells
        self.n = len(cells.where)
        self.k = max(1, min(method.k if method.target is None else 20, self.n // TOP_SHARE))
        self.size = np.abs(cells.screen)
        self.verified: list[int] = []
        self.drawn: list[int] = []
        self.effects: dict[int, np.ndarray] = {}
        self.means: dict[int, float] = {}
        self.groups: list[dict[str, Any]] = []
        self.candidates = np.ones(self.n, dtype=bool)
        self.target: float | None = None
        self.bound: Bound | None = None
        self.subsets: SubsetBound | None = None
        self.joint_runs = 0
        self.stopped = ""

    def run(self, target: float | None) -> None:
        """Verify until the rule says stop, then draw the sample."""
        self.target = target
        self._verify(self._order()[: self.k])
        if self.method.hierarchical:
            self._prune()
        budget = max(self.k, int(self.method.max_share * self.n)) - len(self.groups)
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

    def _patch(self, numbers: list[int]) -> None:
        found = self.patcher.effects([self.cells.where[i] for i in numbers])
        self.effects.update(zip(numbers, found, strict=True))
        self.means.update(zip(numbers, np.abs(found.mean(1)).tolist(), strict=True))

    def _threshold(self) -> float:
        """|effect| that a cell must exceed to come in, in metric units."""
        return self.target if self.target is not None else sorted(self.means[i] for i in self.verified)[-self.k]

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
        for number, site in enumerate(self.patcher.setting.sites):
            mine = np.flatnonzero(self.cells.site == number)
            for axes in _levels(site):
                keys = {int(i): tuple(self.cells.index[i][site.axes.index(axis)] for axis in axes) for i in mine if self.candidates[i]}
                wanted = sorted(set(keys.values()))
                coarse = Site(site.kind, axes)
                shape = tuple(size for axis, size in zip(site.axes, self.patcher.setting.live[str(site)].shape, strict=True) if axis in axes)
                mask: Bool[np.ndarray, "*cells"] = np.zeros(shape, dtype=bool)
                for key in wanted:
                    mask[key] = True
                found = list(addresses(self.patcher.setting, coarse, mask))
                joint = self.patcher.effects([where for _, where in found]).mean(1)
                kept = {key for (key, _), effect in zip(found, joint, strict=True) if abs(effect) >= floor}
                self.groups += [
                    {"address": str(where), "effect": float(effect), "kept": key in kept} for (key, where), effect in zip(found, joint, strict=True)
                ]
                for cell, key in keys.items():
                    self.candidates[cell] = key in kept

    def _draw(self) -> None:
        """Patch a uniform sample of the unverified live cells; the threshold is fixed before it is drawn."""
        threshold = self._threshold()
        left = np.setdiff1d(np.arange(self.n), self.verified)
        drawn = np.random.default_rng(self.method.seed).choice(left, min(self.method.sample, len(left)), replace=False)
        self.drawn = sorted(drawn.tolist())
        self._patch(self.drawn)
        exceeding = sum(self.means[i] > threshold for i in self.drawn)
        unit = self.patcher.setting.task.metric.unit
        self.bound = Bound(self.method.confidence, len(left), len(self.drawn), exceeding, threshold, unit)
        if self.method.subsets and len(left):
            self._patch_subsets(left.tolist(), unit)

    def _patch_subsets(self, left: list[int], unit: str) -> None:
        """Patch random subsets of the unverified cells jointly."""
        members = memberships(len(left), self.method.subsets, self.method.seed)
        filled = np.flatnonzero(members.any(0))  # a subset of few cells may have none, and then no effect
        joint = np.zeros(members.shape[1])
        joint[filled] = self.patcher.joint([[self.cells.where[left[i]] for i in np.flatnonzero(members[:, j])] for j in filled]).mean(1)
        self.joint_runs = len(filled)
        at_most = largest_effect(members, joint, self.method.confidence)
        seen = max((self.means[i] for i in self.drawn), default=0.0)
        self.subsets = SubsetBound(self.method.confidence, len(left), self.method.subsets, float(members.mean()), at_most, seen, unit)

    def result(self, screen: ScoreMap, seconds: float) -> VerifiedResult:
        """The tables and what they cost."""
        if self.bound is None:
            raise MethodError("the search has not been run.")
        numbers = sorted(self.effects, key=lambda i: -self.means[i])
        effects = np.array([self.effects[i] for i in numbers])
        effects.setflags(write=False)
        frame = self._frame(screen, numbers, effects)
        frame["top"] = frame["effect"].abs() > self.target if self.target is not None else np.arange(len(frame)) < self.k
        meter, about = self.patcher.meter, screen.provenance
        tokens = sum(len(pair) for pair in self.patcher.setting.task.pairs)
        passes = {
            "screen": screen.cost.positions / tokens * (1 + 2 * screen.cost.backwards / screen.cost.forwards),
            "verified": float(len(self.verified)),
            "sample": float(len(self.drawn)),
            "groups": float(len(self.groups)),
            "subsets": float(self.joint_runs),
        }
        passes["unpatched"] = meter.forwards / len(self.patcher.batches) - sum(value for name, value in passes.items() if name != "screen")
        mine = {
            name: str(getattr(self.method, name)) if name == "screen" else getattr(self.method, name) for name in self.method.__dataclass_fields__
        }
        cost = Cost(
            meter.forwards + screen.cost.forwards,
            screen.cost.backwards + meter.backwards,
            meter.positions + screen.cost.positions,
            seconds,
            screen.cost.predicted_bytes,
            screen.cost.cuda_peak_bytes,
        )
        return VerifiedResult(
            frame,
            effects,
            screen,
            self.bound,
            None if self.target is not None else self.k,
            self.n,
            pd.DataFrame(self.groups, columns=["address", "effect", "kept"]),
            self.stopped,
            passes,
            cost,
            {**about, "method": self.method.name, "method_options": mine, "engine": meter.engine},
            self.subsets,
        )

    def _frame(self, screen: ScoreMap, numbers: list[int], effects: Float[np.ndarray, "cell example"]) -> pd.DataFrame:
        place = np.empty(self.n, dtype=np.int64)
        place[np.argsort(-self.size, kind="stable")] = np.arange(1, self.n + 1)
        n_examples = effects.shape[1]
        low, high = interval(resampling_weights(n_examples, _N_BOOT if n_examples > 1 else 0, self.method.seed) @ effects.T)
        drawn = set(self.drawn)
        columns = {
            "address": [str(self.cells.where[i]) for i in numbers],
            "effect": effects.mean(1),
            "low": low,
            "high": high,
            "screen": self.cells.screen[numbers],
            "place": place[numbers],
            "found": ["sample" if i in drawn else "screen" for i in numbers],
        }
        values = pd.DataFrame(columns)
        parts = []
        for number, site in enumerate(self.patcher.setting.sites):
            rows = [row for row, i in enumerate(numbers) if self.cells.site[i] == number]
            if rows:
                index = np.array([self.cells.index[numbers[row]] for row in rows], dtype=np.float64)
                parts.append(pd.DataFrame({"site": str(site), **cell_columns(screen, str(site), index)}, index=rows))
        where = pd.concat(parts).sort_index()
        table = pd.concat([where, values], axis=1)
        return table.reindex(columns=ordered(list(table.columns)))


def _levels(site: Site) -> list[tuple[str, ...]]:
    """Coarser granularities of a site, the coarsest first: per layer, then per layer and position."""
    kind = KINDS[site.kind]
    if "layer" not in kind.axes:
        return []
    place = next((axis for axis in site.axes if axis in POSITION_AXES), None)
    levels = [("layer",), *([("layer", place)] if place is not None else [])]
    return [axes for axes in levels if axes != site.axes]
