"""Verified patching: exact cells, the stopping rule, the recall it states and its price, other prompts, groups, and what it all cost."""

import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import comb
from typing import Any

import numpy as np
import pytest
from families import mixed_task, model_of, swap_task
from paths import ROOT

import patchlab as pl
from patchlab.errors import MethodError, SiteError
from patchlab.methods import get_method
from patchlab.methods.cells import cells_of
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.verified.bound import Bound, Price, Recall, critical_value, half_widths, look_sizes, missable, most_exceeding, prompts_needed
from patchlab.methods.verified.patcher import Cells, Patcher
from patchlab.methods.verified.result import VerifiedResult
from patchlab.methods.verified.search import VerifiedPatching, _levels, _Search
from patchlab.methods.verified.subsets import largest_effect, memberships, most_exceeding_additive
from patchlab.scores import ScoreMap
from patchlab.sites import Site
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.stats.distributions import t_quantile

HEADS = "z[layer,pos,head]"


# the bound


def _probability(population: int, marked: int, sample: int, seen: int) -> Fraction:
    """Probability of at most ``seen`` marked ones, by listing every sample."""
    samples = list(itertools.combinations(range(population), sample))
    return Fraction(sum(sum(i < marked for i in one) <= seen for one in samples), len(samples))


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_bound_against_every_possible_sample(confidence: float) -> None:
    for population in range(9):
        for sample in range(population + 1):
            for seen in range(sample + 1):
                possible = [
                    marked
                    for marked in range(seen, population - sample + seen + 1)
                    if _probability(population, marked, sample, seen) >= 1 - Fraction(str(confidence))
                ]
                # seen marked ones are certainly there
                assert most_exceeding(population, sample, seen, confidence) == max(possible, default=seen), (population, sample, seen)


@pytest.mark.parametrize(("population", "sample"), [(40, 7), (200, 30), (1000, 59)])
def test_the_bound_covers_whatever_the_truth(population: int, sample: int) -> None:
    bounds = np.array([most_exceeding(population, sample, seen) for seen in range(sample + 1)])
    for marked in range(0, population + 1, max(1, population // 40)):
        held = sum(comb(marked, seen) * comb(population - marked, sample - seen) for seen in range(sample + 1) if bounds[seen] >= marked) / comb(
            population, sample
        )
        assert held >= 0.95, marked
    assert bounds[0] < population / 2  # and says something


def test_the_bound_of_large_populations_is_the_binomial_one() -> None:
    for sample, share in ((30, 0.0950), (59, 0.0495), (299, 0.0100)):
        assert most_exceeding(10**6, sample, 0) / 10**6 == pytest.approx(share, abs=2e-4)  # 1 − 0.05^(1/sample)


@pytest.mark.parametrize("numbers", [(10, 11, 0), (10, 5, 6), (10, 5, -1)])
def test_a_sample_that_cannot_be(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(MethodError, match="cannot be; the sample is at most the unverified cells"):
        most_exceeding(*numbers)
    with pytest.raises(MethodError, match="cannot be"):
        Bound(0.95, *numbers, threshold=1.0)


def test_the_statement_says_what_it_does_not_bound() -> None:
    bound = Bound(0.95, 200, 30, 1, 0.25, "logits")
    assert str(bound) == (
        "with 95 % confidence at most 28 of the 200 unverified cells exceed 0.25 logits (1 of 30 drawn at random did); "
        "how large a missed effect may be is not bounded"
    )
    assert (bound.at_most, bound.unseen) == (28, 27)
    assert str(Bound(0.95, 7, 7, 2, 0.25)) == "every live cell was patched; 2 of the last 7 exceed 0.25"
    assert "at most 7 of the 7" in str(Bound(0.95, 7, 0, 0, 0.25))
    assert "none was drawn" in str(Bound(0.95, 7, 0, 0, 0.25))


# the growing sample, the price


_at_most = cache(most_exceeding)


def _claims(marks: np.ndarray, sizes: list[int], confidence: float, cap: int) -> int:
    """The growing sample on one order of the cells, literally: how many exceeding cells it says there are at most."""
    looks: tuple[int, ...] = ()
    for allowed, size in enumerate(sizes):
        if size >= cap:  # the budget ends before the next look
            seen = int(marks[:cap].sum())
            return _at_most(len(marks), cap, seen, confidence, looks[:seen])
        if marks[:size].sum() <= allowed:
            return _at_most(len(marks), size, int(marks[:size].sum()), confidence, looks)
        looks += (size,)
    raise AssertionError


@pytest.mark.parametrize(("unverified", "missed", "confidence", "cap"), [(9, 1, 0.8, 9), (9, 2, 0.8, 7), (9, 0, 0.7, 9), (9, 3, 0.7, 4)])
def test_the_growing_sample_is_wrong_as_rarely_as_it_says_on_every_possible_order(unverified: int, missed: int, confidence: float, cap: int) -> None:
    sizes = list(itertools.islice(look_sizes(unverified, lambda found: missed, confidence), unverified + 1))
    wrong, peeked = [], []
    for marked in range(unverified + 1):
        failures = peeking = 0
        orders = list(itertools.combinations(range(unverified), marked))
        for order in orders:
            marks = np.isin(np.arange(unverified), order)
            failures += _claims(marks, sizes, confidence, cap) < marked
            steps = np.concatenate([[0], marks.cumsum()]).tolist()
            # what comes of looking at every size as if it were the only one
            peeking += any(_at_most(unverified, n, steps[n], confidence) < marked for n in range(cap + 1))
        wrong.append(failures / len(orders))
        peeked.append(peeking / len(orders))
    assert max(wrong) <= 1 - confidence + 1e-12
    assert max(wrong) > 0
    assert max(peeked) > 1 - confidence  # so the correction is needed


def test_a_sample_stops_growing_only_where_no_more_than_allowed_are_left() -> None:
    for allowed in (lambda found: 3, lambda found: (17 + found) * 15 // 85, lambda found: 5 - found):
        looks: list[int] = []
        for found, size in zip(range(6), look_sizes(200, allowed), strict=False):
            if allowed(found) >= 0:
                assert most_exceeding(200, size, found, 0.95, looks) - found <= allowed(found)
                # one cell fewer would not do
                assert size == max([found, *looks[-1:]]) or most_exceeding(200, size - 1, found, 0.95, looks) - found > allowed(found)
            else:
                assert size == 200
            looks.append(size)
    first = next(look_sizes(200, lambda found: 3))
    fixed = next(n for n in range(200) if most_exceeding(200, n, 0) <= 3)
    assert first == fixed  # the right to go on costs nothing


@pytest.mark.parametrize("looks", [[30], [3, 2]])
def test_looks_that_cannot_have_been(looks: list[int]) -> None:
    with pytest.raises(MethodError, match="cannot have come before a sample of 10 with 2 exceeding"):
        most_exceeding(40, 10, 2, 0.95, looks)
    with pytest.raises(MethodError, match="cannot have come before"):
        most_exceeding(40, 10, 0, 0.95, [4])


@pytest.mark.parametrize("unverified", [1000, 4000])
def test_what_recall_costs_whatever_the_effects(unverified: int) -> None:
    """At the default confidence of 95 %: 17 of 20 take 53 % of the unverified cells; a tenth of them only excludes more than 28 misses."""
    confidence = VerifiedPatching().confidence
    assert missable(0.85, 20) == 3
    assert next(look_sizes(unverified, lambda found: 3, confidence)) / unverified == pytest.approx(1 - 0.05**0.25, abs=0.002)
    assert f"{next(look_sizes(unverified, lambda found: 3, confidence)) / unverified:.0%}" == "53%"
    assert most_exceeding(unverified, unverified // 10, 0, confidence) == 28
    price = Price(unverified + 40, 20, confidence, 4.0, 40, unverified // 10)
    assert "With 95 % confidence" in str(price)
    assert "at most 28 of the others do, which makes sure of 0 of the top 20" in str(price)
    assert f"17 of the top 20 would take {price.sample_for(3)} at random, none of them above (53 % of the unverified; " in str(price)


@pytest.mark.parametrize(("recall", "of", "missed"), [(0.85, 20, 3), (1, 20, 0), (0.55, 20, 9), (0.7, 10, 3), (0.01, 5, 4), (0.999, 1000, 1)])
def test_how_many_may_be_missed(recall: float, of: int, missed: int) -> None:
    assert missable(recall, of) == missed
    assert Fraction(of - missed, of) >= Fraction(str(recall))
    assert Fraction(of - missed - 1, of) < Fraction(str(recall))


def test_a_recall_reads_well() -> None:
    assert str(Recall(17, 20, 0.95, 20, asked=0.85)) == (
        "with 95 % confidence at least 17 of the true top 20 on these prompts are among those returned; a recall of 85 % was asked for and is reached"
    )
    assert str(Recall(16, 20, 0.95, 20, asked=0.85)).endswith("is not reached")
    assert str(Recall(5, 5, 1.0, 5)) == "for certain all 5 of the true top 5 on these prompts are among those returned"
    assert "at least 8 of at most 11 cells above the target over prompts such as these" in str(Recall(8, 11, 0.95, None, population=True))
    assert str(Recall(0, 0, 1.0, None)) == "for certain no cell is above the target on these prompts"
    assert Recall(0, 0, 1.0, None).share == 1


def test_the_price_of_a_target_says_how_many_are_missed() -> None:
    text = str(Price(400, None, 0.95, 4.0, 20, 30))
    assert "exceeds the target, at most" in text
    assert "At most 3 missed would take" in text
    assert str(Price(400, None, 0.95, 4.0, 20, 0)).count("none of them above") == 3


# intervals for other prompts


def _selected(effects: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-np.abs(effects.mean(-1)), axis=-1)[..., :k]


DRAWS: dict[str, Any] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "heavy": lambda generator, shape: generator.standard_t(4, shape),
    "skewed": lambda generator, shape: generator.exponential(1, shape) - 1,
    "lognormal": lambda generator, shape: generator.lognormal(0, 1, shape) - np.exp(0.5),
    "half of the prompts": lambda generator, shape: generator.exponential(1, shape) * (generator.random(shape) < 0.5) - 0.5,
}


@pytest.mark.parametrize(("draw", "prompts"), [*((name, 16) for name in DRAWS), ("skewed", 64), ("half of the prompts", 48)])
def test_intervals_hold_together_for_weak_cells_that_were_selected(draw: str, prompts: int) -> None:
    """Cells that do next to nothing over prompts such as these, the largest of them on the prompts that were run."""
    runs, cells, k = 60 if prompts == 16 else 30, 300, 20
    generator, together, student, old, widths = np.random.default_rng(0), [], [], [], []
    weights, t = resampling_weights(prompts, 200, 0), t_quantile(1 - 0.05 / (2 * cells), prompts - 1)
    for _ in range(runs):
        truth = generator.normal(0, 0.05, (cells, 1))
        effects = DRAWS[draw](generator, (cells, prompts)) + truth
        chosen = _selected(effects, k)
        off, spread = np.abs(effects.mean(1, keepdims=True) - truth)[chosen, 0], effects[chosen].std(1, ddof=1) / np.sqrt(prompts)
        widths.append(half_widths(effects[chosen], cells))
        together.append((off <= widths[-1]).all())
        student.append((off <= t * spread).all())
        low, high = interval(weights @ effects[chosen].T)
        old.append(((low <= truth[chosen, 0]) & (truth[chosen, 0] <= high)).mean())
        assert np.isinf(widths[-1]).all() or (widths[-1] >= 0.999 * t * spread).all()
    assert np.mean(together) >= 0.92 - 3 * np.sqrt(0.08 * 0.92 / runs)
    if draw in ("normal", "heavy"):
        assert np.mean(old) < 0.5  # intervals of single cells, taken after the selection
    else:
        assert np.mean(student) < 0.7
    # where half of the prompts have no effect, 16 say too little; else intervals say something
    unknown = np.mean([np.isinf(wide).any() for wide in widths])
    assert unknown > 0.8 if (draw, prompts) == ("half of the prompts", 16) else unknown < 0.02
    if draw == "normal":
        assert np.median([wide.max() / (t * 1 / np.sqrt(prompts)) for wide in widths]) < 2.5


def test_critical_values_against_all_resamples() -> None:
    """Every way to draw five prompts from five, with equal weight."""
    generator = np.random.default_rng(1)
    effects = np.stack([generator.exponential(1, 5), generator.standard_normal(5), -generator.lognormal(0, 1, 5)])
    found = []
    for draw in itertools.product(range(5), repeat=5):
        for cell in effects:
            again = cell[list(draw)]
            spread = again.std(ddof=1)
            found.append(np.inf if spread < 1e-12 else abs(again.mean() - cell.mean()) / (spread / np.sqrt(5)))
    for family, confidence in ((1, 0.95), (4, 0.9), (5, 0.95)):
        critical, level = critical_value(effects, family, confidence), (1 - confidence) / family
        assert np.isfinite(critical)
        assert 0.75 * level < np.mean(np.array(found) > critical) < 1.25 * level
    assert np.mean(np.isinf(found)) == pytest.approx(5**-4)
    assert critical_value(effects, 100) == np.inf  # 0.0016 of the resamples have no spread, more than 0.0005
    assert critical_value(np.ones((3, 5)), 4) == t_quantile(1 - 0.05 / 8, 4)  # nothing varies


def test_half_widths_by_hand() -> None:
    effects = np.concatenate([np.random.default_rng(0).standard_normal((3, 400)), np.zeros((1, 400))])
    wide, spread = half_widths(effects, 4), np.sqrt(np.square(effects - effects.mean(1, keepdims=True)).sum(1) / 399 / 400)
    np.testing.assert_allclose(wide, critical_value(effects, 4) * spread)
    np.testing.assert_allclose(wide, t_quantile(1 - 0.05 / 8, 399) * spread, rtol=0.1)  # normal effects, many prompts
    assert half_widths(effects, 40)[0] > wide[0]
    assert (half_widths(effects[:, :3], 4) == np.inf).all()  # one in nine resamples of three prompts has no spread
    with pytest.raises(MethodError, match="one prompt pair says nothing about other prompts"):
        half_widths(effects[:, :1], 40)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_prompts_needed(share: float) -> None:
    """About so many prompts have finite intervals, and half as many not; ``share``: of the prompts without an effect."""
    generator, family = np.random.default_rng(0), 50

    def drawn(n: int) -> np.ndarray:
        return generator.standard_normal((family, n)) * (generator.random((family, n)) >= share)

    needed = prompts_needed(drawn(40), family)
    assert np.mean([critical_value(drawn(2 * needed), family) < np.inf for _ in range(10)]) > 0.8
    assert np.mean([critical_value(drawn(needed // 2), family) < np.inf for _ in range(10)]) < 0.2


# the search, on given effects


LABELS: dict[tuple[Site, Any], str] = {}


class Given:
    """Effects from a table in place of a model; a table of one prompt, or ``[..., example]``."""

    def __init__(self, effects: np.ndarray, joint: dict[str, float] | None = None, sites: tuple[Site, ...] = (Site.parse(HEADS),)) -> None:
        rows = effects.reshape(-1, effects.shape[-1]) if effects.ndim == 4 else effects.reshape(-1, 1)
        self.table: dict[str, Any] = dict(zip(map(str, _addresses(effects[..., 0] if effects.ndim == 4 else effects)), rows, strict=True))
        self.table |= joint or {}
        effects = effects.reshape(*effects.shape[:3], -1)[..., 0]
        live = {str(site): np.ones(effects.shape, dtype=bool) for site in sites}
        self.setting = Setting(model_of("gpt2"), swap_task(), sites, "denoising", None, live)
        self.asked: list[str] = []
        self.together: Callable[[list[Any]], Any] = sum

    def name(self, site: Site, index: Any) -> str:
        """The label of a cell, asked for once: simulations ask for thousands."""
        if (site, index) not in LABELS:
            LABELS[site, index] = cells_of(site).label(self.setting, site, index)
        return LABELS[site, index]

    def joint(self, sets: Sequence[Sequence[Any]]) -> np.ndarray:
        named = [[self.name(site, index) for site, index in cells] for cells in sets]
        self.asked += ["+".join(names) for names in named]
        return np.stack([np.atleast_1d(self.together([self.table[name] for name in names])) for names in named])


def _addresses(effects: np.ndarray) -> list[Site]:
    return _grid(effects.shape)


@cache
def _grid(shape: tuple[int, ...]) -> list[Site]:
    return [Site("z", (), layer=layer, pos=(pos,), index=head) for layer, pos, head in np.ndindex(*shape)]


def searched(
    effects: np.ndarray,
    screen: np.ndarray,
    target: float | None = None,
    joint: dict[str, float] | None = None,
    together: Callable[[list[Any]], Any] = sum,
    **options: Any,
) -> tuple[_Search, Given]:
    patcher = Given(effects, joint)
    patcher.together = together
    where = [(Site.parse(HEADS), cell) for cell in np.ndindex(*screen.shape)]
    cells = Cells(np.zeros(screen.size, dtype=np.int64), where, screen.ravel().astype(float), patcher.setting)
    search = _Search(VerifiedPatching(**options), patcher.setting, cells, patcher.joint)
    search.run(target)
    return search, patcher


def _falling(n: int = 400) -> np.ndarray:
    return (0.97 ** np.arange(n)).reshape(4, n // 16, 4)


def test_a_perfect_screen_needs_twice_k_cells() -> None:
    effects = _falling()
    search, patcher = searched(effects, 3 * effects, k=10, sample=30)
    assert search.verified == list(range(20))
    assert len(search.drawn) == 30
    assert set(search.drawn).isdisjoint(search.verified)
    assert "none of the last 10 came in" in search.stopped
    assert patcher.asked == [patcher.asked[i] for i in range(50)]
    assert len(set(patcher.asked)) == 50  # no cell twice
    bound = search.bound
    assert bound is not None
    assert (bound.unverified, bound.sample, bound.exceeding) == (380, 30, 0)
    assert bound.threshold == pytest.approx(float(effects.ravel()[9]))


def test_k_is_what_was_asked_for() -> None:
    effects = _falling()
    assert searched(effects, effects, k=50)[0].k == 50
    assert searched(effects, effects, k=7)[0].k == 7
    assert searched(effects, effects, k=500)[0].k == 400  # no more are live
    assert VerifiedPatching(target=0.5, k=50).step(400) == 20  # at a time
    assert VerifiedPatching(target=0.5, k=50).step(40) == 2


def test_a_screen_that_ranks_wrongly_is_followed_until_the_budget_ends() -> None:
    effects = _falling()
    backwards = np.flip(effects.ravel()).reshape(effects.shape)
    search, _ = searched(effects, backwards, k=10, max_share=0.25)
    assert len(search.verified) == 100
    assert "budget of 25 %" in search.stopped
    # the important cells were missed, and the sample shows it
    assert search.bound is not None
    assert search.bound.exceeding > 20
    assert search.bound.at_most >= 300
    everything, _ = searched(effects, backwards, k=10, max_share=1)
    assert sorted(everything.verified) == list(range(400))
    assert everything.stopped == "every candidate is verified"


def test_one_cell_that_the_screen_underrates_keeps_the_search_going() -> None:
    effects = _falling()
    screen = effects.copy()
    screen.ravel()[1] *= 0.7  # verified later, and its ratio of 1.4 means that others may be as wrong
    search, _ = searched(effects, screen, k=10)
    assert 1 in search.verified
    assert len(search.verified) > 20


def test_a_target_finds_all_cells_above_it() -> None:
    effects = _falling()
    search, _ = searched(effects, effects, target=0.5)
    above = int((effects > 0.5).sum())
    assert above == 23
    assert set(range(above)) <= set(search.verified)
    assert len(search.verified) <= above + 40
    assert search.bound is not None
    assert search.bound.threshold == 0.5
    assert search.bound.exceeding == 0
    nothing, _ = searched(effects, effects, target=2.0)
    assert len(nothing.verified) == 20


def test_the_sample_is_uniform_over_the_unverified_cells_and_follows_the_seed() -> None:
    effects = _falling(80)
    counts = np.zeros(effects.size)
    for seed in range(300):
        search, _ = searched(effects, effects, k=2, sample=10, seed=seed)
        counts[search.drawn] += 1
    left = np.delete(counts, search.verified)
    assert not counts[search.verified].any()
    expected = 300 * 10 / len(left)
    assert np.abs(left - expected).max() < 5 * np.sqrt(expected)
    assert searched(effects, effects, k=2, seed=5)[0].drawn == searched(effects, effects, k=2, seed=5)[0].drawn
    assert searched(effects, effects, k=2, seed=5)[0].drawn != searched(effects, effects, k=2, seed=6)[0].drawn


@pytest.mark.parametrize("quality", [0.0, 0.5, 2.0])
def test_the_stated_confidence_holds_with_bad_screens(quality: float) -> None:
    held, said = [], []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        effects = generator.standard_normal((4, 20, 4)) ** 3
        screen = quality * effects + generator.standard_normal(effects.shape)
        search, _ = searched(effects, screen, k=12, sample=25, max_share=0.2, seed=seed)
        bound = search.bound
        assert bound is not None
        truth = int((np.abs(np.delete(effects.ravel(), search.verified)) > bound.threshold).sum())
        held.append(truth <= bound.at_most)
        said.append(bound.at_most / bound.unverified)
    assert np.mean(held) >= 0.92  # 95 % at least, less three standard errors and a bit
    assert np.median(said) < 0.7


def _missed(effects: np.ndarray, search: _Search, k: int) -> int:
    """How many of the true top k a search did not return, of the given mean effects."""
    returned = sorted(search.effects, key=lambda i: -search.means[i])[:k]
    return len(set(np.argsort(-np.abs(effects.ravel()))[:k].tolist()) - set(returned))


def _recalled(search: _Search) -> Recall:
    assert search.bound is not None
    return search._recall(search.bound)


@pytest.mark.parametrize("quality", [0.0, 1.0])
def test_the_sample_grows_until_the_recall_is_certain(quality: float) -> None:
    held, sizes, search = [], set(), searched(_falling(80), _falling(80), k=2)[0]
    for seed in range(50):
        generator = np.random.default_rng(seed)
        effects = generator.standard_normal((4, 10, 4)) ** 3
        screen = quality * effects + generator.standard_normal(effects.shape)
        search, _ = searched(effects, screen, k=10, recall=0.8, max_share=0.15, seed=seed)
        recall = _recalled(search)
        assert recall.reached
        assert recall.at_least >= 8
        assert search.bound is not None
        assert search.bound.unseen <= 2
        held.append(10 - _missed(effects, search, 10) >= recall.at_least)
        sizes.add(len(search.drawn))
    assert np.mean(held) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 50)
    first = next(look_sizes(search.bound.unverified, lambda found: 2))
    assert min(sizes) > first if quality == 0 else first in sizes  # the more it finds, the more it takes


def test_a_budget_ends_the_growth_and_what_it_permits_is_said() -> None:
    effects = _falling()
    search, _ = searched(effects, effects, k=20, recall=0.85, sample=100)
    recall = _recalled(search)
    assert len(search.drawn) == 100
    assert search.bound is not None
    assert recall.at_least == 20 - most_exceeding(360, 100, 0) == 20 - search.bound.unseen
    assert not recall.reached
    enough = _recalled(searched(effects, effects, k=20, recall=0.85)[0])
    assert (enough.at_least, enough.of, enough.reached) == (17, 20, True)
    everything = searched(effects, effects, k=20, recall=1, sample=None)[0]
    assert _recalled(everything).at_least == 20


def test_the_price_is_what_a_good_screen_takes() -> None:
    effects = _falling()
    search, _ = searched(effects, effects, k=20, recall=0.85)
    price = Price(400, 20, 0.95, 4.0, len(search.verified), len(search.drawn), recall=0.85)
    assert price.sample == price.sample_for(3)
    assert price.unverified == 360


@pytest.mark.parametrize("recall", [0.6, 0.9])
def test_the_recall_of_all_cells_above_a_target(recall: float) -> None:
    held = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        effects = generator.standard_normal((4, 10, 4))
        search, _ = searched(effects, effects + generator.standard_normal(effects.shape), target=1.2, recall=recall, max_share=0.1, seed=seed)
        said = _recalled(search)
        assert said.reached
        assert said.share >= recall - 1e-9
        above = set(np.flatnonzero(np.abs(effects) > 1.2).tolist())
        assert said.at_least == len(above & set(search.effects))
        held.append(said.at_least >= said.share * len(above) - 1e-9)
    assert np.mean(held) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 60)


@pytest.mark.parametrize("target", [None, 0.8])
def test_recall_over_prompts_such_as_these_holds(target: float | None) -> None:
    """The top k of the true means, from few noisy prompts of them; strong cells and many that are near nothing."""
    held, said, covered = [], [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        truth = np.concatenate([generator.uniform(1, 2, 12) + (target is None), generator.normal(0, 0.2, 108)])
        generator.shuffle(truth)
        truth = truth.reshape(3, 10, 4)
        prompts = truth[..., None] + generator.standard_normal((*truth.shape, 24)) * 0.4
        options: dict[str, Any] = {} if target is None else {"target": target}
        search, _ = searched(prompts, prompts.mean(-1), k=12, sample=60, max_share=0.3, population=True, seed=seed, **options)
        recall, mean = _recalled(search), truth.ravel()
        covered.append(all(abs(search.effects[i].mean() - mean[i]) <= search.wide[i] for i in search.effects))
        if target is None:
            held.append(12 - _missed(truth, search, 12) >= recall.at_least)
        else:
            above = set(np.flatnonzero(np.abs(mean) > target).tolist())
            returned = {i for i in search.effects if search.means[i] > target}
            held.append(len(above & returned) >= recall.share * len(above) - 1e-9)
        said.append(recall.at_least)
    assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 60)
    assert np.mean(held) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 60)
    assert np.mean(said) > 3  # and says something


def test_doubt_about_the_prompts_is_not_removed_by_patching_more_cells() -> None:
    generator = np.random.default_rng(0)
    prompts = generator.standard_normal((2, 10, 4, 4))  # nothing but noise
    search, _ = searched(prompts, prompts.mean(-1), k=5, recall=0.8, population=True)
    recall = _recalled(search)
    assert len(search.effects) == 80  # all were patched, and still
    assert recall.at_least == 0
    assert not recall.reached
    here = _recalled(searched(prompts, prompts.mean(-1), k=5, recall=0.8)[0])
    assert here.reached  # these prompts are known


# groups


def _grouped(effects: np.ndarray) -> dict[str, float]:
    """Joint effects that are the sums of their cells."""
    joint = {str(Site("z", (), layer=layer)): float(effects[layer].sum()) for layer in range(effects.shape[0])}
    return joint | {str(Site("z", (), layer=layer, pos=(pos,))): float(effects[layer, pos].sum()) for layer, pos in np.ndindex(*effects.shape[:2])}


def test_only_cells_in_groups_that_matter_are_candidates() -> None:
    effects = np.full((4, 25, 4), 1e-3)
    effects[2, 3] = effects[2, 7] = [1.0, 0.9, 0.8, 0.7]
    screen = np.random.default_rng(0).random(effects.shape)
    screen[2, 3] = 2
    search, patcher = searched(effects, screen, joint=_grouped(effects), k=4, hierarchical=True, max_share=1)
    places = {(cell[0], cell[1]) for i in np.flatnonzero(search.candidates) for cell in [search.cells.where[i][1]]}
    assert places == {(2, 3), (2, 7)}
    assert {"L0.z", "L1.z", "L2.z", "L3.z", "L2.z@0", "L2.z@7"} <= set(patcher.asked)
    assert "L1.z@0" not in patcher.asked  # its layer does not matter
    assert set(search.verified) >= {i for i, cell in enumerate(cell for _, cell in search.cells.where) if (cell[0], cell[1]) == (2, 7)}
    kept = {group["address"] for group in search.groups if group["kept"]}
    assert kept == {"L2.z", "L2.z@3", "L2.z@7"}
    assert len(search.verified) + len(search.groups) + len(search.drawn) == len(patcher.asked)


def test_cancellation_hides_a_group_from_the_search_but_not_from_the_sample() -> None:
    effects = np.full((4, 25, 4), 1e-3)
    effects[1, :, 0], effects[1, :, 1] = 5.0, -5.0  # strong cells whose sum is nothing
    effects[2, 3] = [1.0, 0.9, 0.8, 0.7]
    search, _ = searched(
        effects,
        np.where(effects == 1e-3, 0.1, 0.01) + effects * (effects < 2) * (effects > 0.5),
        joint=_grouped(effects),
        k=4,
        hierarchical=True,
        sample=60,
    )
    hidden = {i for i, cell in enumerate(cell for _, cell in search.cells.where) if cell[0] == 1}
    assert hidden.isdisjoint(np.flatnonzero(search.candidates))
    assert search.bound is not None
    assert search.bound.exceeding > 0


def test_levels_go_from_layers_over_positions() -> None:
    assert _levels(Site.parse(HEADS)) == [("layer",), ("layer", "pos")]
    assert _levels(Site.parse("z")) == [("layer",)]
    assert _levels(Site.parse("resid_pre")) == [("layer",)]
    assert _levels(Site.parse("pattern[layer,head,dest,src]")) == [("layer",), ("layer", "dest")]
    assert _levels(Site.parse("mlp_post[layer,pos,neuron]")) == [("layer",), ("layer", "pos")]
    assert _levels(Site.parse("input")) == []


# subsets


def _hidden(size: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Effects with a tail of small ones, of which the screen misses one of the given size."""
    effects = _falling() * np.random.default_rng(0).choice([-1, 1], 400).reshape(_falling().shape)
    effects.ravel()[100:] *= 0.1
    screen = effects.copy()
    effects.ravel()[300] = size
    return effects, screen


def test_subsets_bound_the_largest_missed_effect_where_effects_add_up() -> None:
    effects, screen = _hidden()
    held, sizes = [], []
    for seed in range(60):
        search, patcher = searched(effects, screen, k=10, sample=5, subsets=80, seed=seed)
        assert search.subsets is not None
        left = np.setdiff1d(np.arange(400), search.verified)
        assert (search.subsets.unverified, search.subsets.subsets) == (len(left), 80)
        assert search.subsets.share == pytest.approx(10 / 80)
        assert len(patcher.asked) == len(search.verified) + 5 + 80
        held.append(search.subsets.at_most >= np.abs(effects.ravel()[left]).max())
        sizes.append(search.subsets.at_most)
    assert np.mean(held) >= 0.95
    assert np.median(sizes) < 4  # and says something: the sum of all unverified |effects| is above 20


@pytest.mark.parametrize("tail", [1.0, 3.0])
def test_the_subset_bound_covers_heavy_tails(tail: float) -> None:
    held = []
    for seed in range(200):
        effects = np.random.default_rng(seed).standard_normal(150)
        effects = np.sign(effects) * np.abs(effects) ** tail
        members = memberships(150, 64, seed)
        held.append(largest_effect(members, effects @ members, 0.95) >= np.abs(effects).max())
    assert np.mean(held) >= 0.93


def test_the_subset_bound_shrinks_with_more_subsets_and_is_sharp_for_one_cell() -> None:
    effects = np.random.default_rng(0).standard_normal(100)
    bounds = [np.mean([largest_effect(m, effects @ m, 0.95) for m in (memberships(100, n, seed) for seed in range(20))]) for n in (16, 64, 256)]
    assert bounds[0] > bounds[1] > bounds[2] > np.abs(effects).max()
    one = memberships(1, 8, 0)
    assert largest_effect(one, -2.0 * one[0], 0.95) == pytest.approx(2.0)


def test_subsets_claim_a_recall_that_single_cells_cannot_for_the_same_work() -> None:
    effects = _falling()
    effects.ravel()[20:] *= 0.02
    search, patcher = searched(effects, effects, k=20, sample=20, subsets=60)
    assert search.subsets is not None
    assert (search.subsets.exceeding, search.subsets.recall) == (0, 20)
    assert "and at most 0 exceed 0.561 logits, so at least 20 of the true top 20 are among those returned" in str(search.subsets)
    assert _recalled(search).at_least == 0
    singles, other = searched(effects, effects, k=20, sample=80)
    assert len(other.asked) == len(patcher.asked)
    assert _recalled(singles).at_least < 20
    # a cell that the screen missed and the sample did not hit is not claimed away
    effects.ravel()[300] = 0.9
    screen = effects.copy()
    screen.ravel()[300] = 0
    missing, _ = searched(effects, screen, k=20, sample=1, subsets=60)
    assert missing.subsets is not None
    assert 300 not in missing.effects
    assert missing.subsets.recall is None


@pytest.mark.parametrize(("exceed", "start"), [(1, 0), (4, 3), (2, 3)])
def test_the_number_that_subsets_claim_holds(exceed: int, start: int) -> None:
    """As many cells as would make a claim wrong, each just above the threshold."""
    generator = np.random.default_rng(0)
    false = []
    for seed in range(200):
        effects = generator.normal(0, 0.1, 100)
        effects[:exceed] = generator.choice([-1.001, 1.001], exceed)
        members = memberships(100, 64, seed)
        claimed = most_exceeding_additive(members, effects @ members, 1.0, 0.95, start)
        false.append(claimed is not None and claimed < exceed)
    assert np.mean(false) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    quiet = generator.normal(0, 0.1, 100)
    members = memberships(100, 64, 0)
    assert most_exceeding_additive(members, quiet @ members, 1.0, 0.95, start) == 0
    assert most_exceeding_additive(members, quiet @ members, 0.01, 0.95, start) is None


def test_few_cells_leave_some_subsets_empty() -> None:
    effects = np.array([3.0, 2.0, -1.5, 0.5, *([0.1] * 36)]).reshape(1, 10, 4)
    seed = next(seed for seed in range(50) if not memberships(39, 32, seed).any(0).all())
    search, patcher = searched(effects, effects, k=1, sample=2, subsets=32, max_share=0.025, seed=seed)
    assert search.subsets is not None
    assert len(search.verified) == 1
    assert search.joint_runs < 32
    assert len(patcher.asked) == 1 + 2 + search.joint_runs
    assert "" not in patcher.asked
    assert search.subsets.at_most > 2


def test_where_subsets_cost_as_much_as_the_cells_that_are_left_those_are_patched() -> None:
    effects = _falling()
    search, patcher = searched(effects, effects, k=10, sample=100, subsets=300)
    assert search.subsets is None
    assert sorted(search.effects) == list(range(400))
    assert len(patcher.asked) == 400
    assert search.bound is not None
    assert (search.bound.sample, search.bound.unseen) == (380, 0)


def test_each_cell_is_in_the_same_number_of_subsets() -> None:
    members = memberships(50, 80, 3)
    assert (members.sum(1) == 10).all()
    assert (memberships(50, 8, 3).sum(1) == 4).all()
    assert not np.array_equal(members, memberships(50, 80, 4))
    with pytest.raises(MethodError, match="subsets is 7; give 0 for none, or at least 8"):
        memberships(50, 7, 0)


def test_where_effects_cancel_the_subsets_are_fooled_and_say_what_they_assume() -> None:
    """Cells that act only alone: a joint patch of several does nothing."""
    effects, screen = _hidden()
    search, _ = searched(effects, screen, k=10, sample=5, subsets=80, together=lambda cells: sum(cells) if len(cells) == 1 else 0.0)
    bound = search.subsets
    assert bound is not None
    assert bound.at_most < 0.6  # not true
    assert str(bound).startswith("if the effects of cells add up, then with 95 % confidence no |effect| of the ")
    assert bound.contradicted  # and the single cells of the sample show that it is not
    assert "a single cell drawn at random has " in str(bound)
    assert str(bound).endswith("which contradicts this)")
    quiet = replace(bound, largest_seen=0.0)
    assert not quiet.contradicted
    assert "that they add up is assumed, not shown" in str(quiet)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 6.3138), (2, 2.9200), (3, 2.3534), (4, 2.1318), (9, 1.8331), (30, 1.6973), (200, 1.6525)])
def test_quantiles_of_t(freedom: int, expected: float) -> None:
    """Against printed tables."""
    assert t_quantile(0.95, freedom) == pytest.approx(expected, abs=5e-5)
    assert t_quantile(0.6, freedom) < t_quantile(0.9, freedom) < t_quantile(0.99, freedom)


# on models


def test_subsets_are_joint_patches() -> None:
    result = found(subsets=8, sample=2)
    assert result.subsets is not None
    assert result.passes["subsets"] == 8
    assert result.share == pytest.approx(sum(result.passes.values()) / result.n_live)
    assert "If the effects of cells add up" in result.summary()
    record = json.loads(json.dumps(result.to_dict()))["subsets"]
    assert record["statement"] == str(result.subsets)
    assert record["unverified"] == result.n_live - int((result.table["found"] == "screen").sum())
    plain = found(sample=2)
    assert plain.subsets is None
    assert plain.to_dict()["subsets"] is None
    assert plain.table.equals(result.table)


@pytest.mark.parametrize("mixed", [False, True])
def test_joint_effects_are_those_of_one_run_with_all_edits(mixed: bool) -> None:
    model, task = model_of("gpt2"), mixed_task() if mixed else swap_task(n=4, length=6)
    exact = pl.ActivationPatching()
    setting, batches, predicted = exact.prepared(model, task, ["z", "mlp_out"])
    patcher = Patcher(exact, setting, batches, predicted, Meter(Bar()))
    z, mlp_out = setting.sites
    sets = [[(z, (0, 1)), (mlp_out, (2, 2))], [(z, (2, 0))]]
    got = patcher.joint(sets)
    literal = Patcher(pl.ActivationPatching(engine="literal"), setting, batches, predicted, Meter(Bar())).joint(sets)
    np.testing.assert_allclose(got, literal, rtol=0, atol=1e-5)
    assert np.abs(got[0] - patcher.joint([[cell] for cell in sets[0]])).max() > 1e-3
    assert patcher.joint([]).shape == (0, len(task))


class Bar:
    """A progress bar that shows nothing."""

    def update(self, n: int) -> None:
        """Do nothing."""


def test_the_baseline_is_run_from_the_first_difference_on() -> None:
    task = swap_task(n=4, length=6, changed=(4,))
    result = found(task, sample=0)
    patched = result.cost.positions - result.screen.cost.positions
    full = pl.ActivationPatching().run(model_of("gpt2"), task, [HEADS, "mlp_out"], progress=False)
    # no more than the whole sweep, whose unpatched runs are 6 and then 2 positions of 4 prompts
    assert 4 * (6 + 2) < patched <= full.cost.positions


@cache
def exact_map(sites: tuple[str, ...] = (HEADS, "mlp_out"), mixed: bool = False, direction: str = "denoising", source: str = "paired") -> ScoreMap:
    task = mixed_task() if mixed else swap_task(n=4, length=6)
    return pl.ActivationPatching(source=source).run(model_of("gpt2"), task, list(sites), direction=direction, progress=False)


def found(task: Any = None, sites: Any = (HEADS, "mlp_out"), **options: Any) -> VerifiedResult:
    run = {name: options.pop(name) for name in ("direction", "batch_size", "max_memory") if name in options}
    return VerifiedPatching(**options).run(model_of("gpt2"), task or swap_task(n=4, length=6), list(sites), progress=False, **run)


def _check_effects(result: VerifiedResult, exact: ScoreMap) -> None:
    """Every row is the cell of the full sweep, per example."""
    for row, effects in zip(result.table.to_dict("records"), result.effects, strict=True):
        axes = {axis: int(row[axis]) for axis in Site.parse(row["site"]).axes}
        expected = exact.data[row["site"]].isel(axes)
        np.testing.assert_allclose(effects, expected.to_numpy(), rtol=1e-4, atol=2e-5, err_msg=row["address"])
        assert row["effect"] == pytest.approx(effects.mean())
        assert row["screen"] == pytest.approx(float(result.screen.mean(row["site"]).isel(axes)))
        assert bool(exact.live[row["site"]].isel(axes))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("source", ["paired", "zero", "mean"])
def test_verified_effects_are_those_of_the_full_sweep(source: str, direction: str) -> None:
    screen = pl.RelevancePatching(source=source)
    result = found(screen=screen, sample=6, direction=direction)
    _check_effects(result, exact_map(direction=direction, source=source))
    assert result.provenance["direction"] == direction


def test_several_lengths_give_rows_in_the_order_of_the_examples() -> None:
    result = found(mixed_task(), ("resid_pre", "z"), sample=3, k=2)
    _check_effects(result, exact_map(("resid_pre", "z"), mixed=True))


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3, "max_memory": 100_000}])
def test_results_do_not_depend_on_batches_or_memory(options: dict[str, int]) -> None:
    whole, parts = found(), found(**options)
    assert whole.table["address"].tolist() == parts.table["address"].tolist()
    np.testing.assert_allclose(whole.effects, parts.effects, rtol=1e-4, atol=1e-5)
    assert whole.bound.at_most == parts.bound.at_most


def test_runs_that_do_not_fit_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlab.methods.verified.patcher.free_bytes", lambda device: 0)
    again = found()
    monkeypatch.undo()
    kept = found()
    np.testing.assert_allclose(again.effects, kept.effects)
    assert again.passes["unpatched"] > kept.passes["unpatched"]


def test_everything_verified_is_the_exact_top_k() -> None:
    result = found(sample=10, target=1e-9, max_share=1)  # no cell is below, so the search goes on to the end
    exact = exact_map()
    values = np.concatenate([np.abs(exact.mean(site).to_numpy())[exact.live[site].to_numpy()] for site in exact.sites])
    assert len(result.table) == result.n_live == len(values)
    assert result.complete
    np.testing.assert_allclose(result.top["effect"].abs(), np.sort(values)[::-1], rtol=1e-4)
    assert result.table["effect"].abs().is_monotonic_decreasing
    assert set(result.table["found"]) == {"screen"}
    assert (result.recall.at_least, result.recall.of, result.recall.confidence) == (55, 55, 1)
    text = result.summary()
    assert "all 55 live cells were patched, so this is the whole ranking:" in text
    assert all(f"  {address}  (screen" in text for address in result.table["address"])


def test_cells_of_the_sample_join_the_top() -> None:
    with_sample = found(sample=45, max_share=0.05, k=2)
    assert "sample" in with_sample.table["found"].tolist()
    assert with_sample.top["effect"].abs().min() >= with_sample.table[~with_sample.table["top"]]["effect"].abs().max()
    # the threshold of the statement is the one from before the draw
    before = with_sample.table[with_sample.table["found"] == "screen"]["effect"].abs().nlargest(2).min()
    assert with_sample.bound.threshold == pytest.approx(before)


def test_the_share_counts_screen_cells_sample_and_unpatched_runs() -> None:
    result = found(sample=5, k=2)
    by = result.table["found"].value_counts()
    patched = int(by["screen"]) + 5
    cost = result.screen.cost
    screen = cost.positions / (4 * 6) * (1 + 2 * cost.backwards / cost.forwards)  # four prompts of six tokens
    unpatched = result.cost.forwards - cost.forwards - patched
    assert unpatched == 2  # once, and every wave of cells resumes from there
    passes = {"screen": pytest.approx(screen), "verified": by["screen"], "sample": 5, "groups": 0, "subsets": 0, "unpatched": unpatched}
    assert result.passes == passes
    assert result.share == pytest.approx((screen + patched + unpatched) / result.n_live)
    assert result.share_without_sample == pytest.approx((screen + patched + unpatched - 5) / result.n_live)
    assert result.cost.backwards == cost.backwards == 1
    assert result.cost.positions > cost.positions
    dearer = found(screen=get_method("ig:3"), sample=5, k=2)
    assert dearer.passes["screen"] > screen


def test_a_target_is_a_share_of_the_gap() -> None:
    gap = abs(exact_map().gap)
    result = found(task=swap_task(n=1, length=6), target=0.02, sample=0)
    gap = abs(result.screen.gap)
    assert result.k is None
    assert result.bound.threshold == pytest.approx(0.02 * gap)
    assert result.table["top"].tolist() == (result.table["effect"].abs() > 0.02 * gap).tolist()
    assert "|effect| >" in str(result)


def test_a_target_without_a_gap_is_refused() -> None:
    task = swap_task(n=6)
    mirrored = task.select([0])
    pair = mirrored.pairs[0]
    swapped = type(pair)(pair.corrupted_ids, pair.clean_ids, pair.correct, pair.incorrect, pair.positions, pair.template)
    both = type(task)(task.name, (pair, swapped), task.metric)
    with pytest.raises(MethodError, match="not distinguishable from 0. Ask for k cells"):
        found(both, target=0.1)


def test_a_run_that_costs_more_than_the_sweep_runs_the_sweep() -> None:
    told: list[str] = []
    method = VerifiedPatching(k=20, sample=35)
    result = method.run(model_of("gpt2"), swap_task(n=4, length=6), [HEADS, "mlp_out"], progress=False, say=told.append)
    assert told == [str(result.price)] == [str(method.price(model_of("gpt2"), swap_task(n=4, length=6), [HEADS, "mlp_out"]))]
    assert told[0] == (
        "Price: verified patching would take about 59 patched rows per prompt or more, and a full sweep takes 55 (one for each live cell), "
        "so the sweep is run."
    )
    exact = exact_map()
    assert set(result.table["found"]) == {"sweep"}
    assert (result.complete, result.k, int(result.table["top"].sum())) == (True, 20, 20)
    assert result.cost.forwards == exact.cost.forwards  # no screen, no cell twice
    assert result.cost.backwards == 0
    assert result.passes == {"screen": 0, "verified": 55, "sample": 0, "groups": 0, "subsets": 0, "unpatched": exact.cost.forwards - 55}
    assert result.table["screen"].isna().all()
    assert result.table["place"].isna().all()
    for row, effects in zip(result.table.to_dict("records"), result.effects, strict=True):
        axes = {axis: int(row[axis]) for axis in Site.parse(row["site"]).axes}
        np.testing.assert_allclose(effects, exact.data[row["site"]].isel(axes).to_numpy())
    text = result.summary()
    assert "20 cells were asked for; all 55 live cells were patched, so this is the whole ranking:" in text
    assert all(f"  {address}\n" in text for address in result.table["address"])
    assert "For certain all 20 of the true top 20 on these prompts are among those returned." in text
    assert "nan" not in text
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["table"][0]["screen"] is None


def test_more_cells_than_are_live_are_all_of_them() -> None:
    result = found(sites=("mlp_out[layer]",), k=20)
    assert result.n_live == len(result.top) == len(result.table) < 20
    assert str(result.price).startswith("Price: 20 are wanted, and a full sweep takes ")
    assert f"20 cells were asked for; all {result.n_live} live cells were patched" in result.summary()
    assert result.recall.share == 1


@pytest.mark.parametrize("source", ["paired", "mean"])
def test_edges_and_other_sources_are_swept_too(source: str) -> None:
    screen = pl.RelevancePatching(source=source)
    result = found(screen=screen, k=55)
    _check_swept(result, exact_map(source=source))
    edges = found(swap_task(), ("edges",), k=10**5)
    assert len(edges.table) == edges.n_live


def _check_swept(result: VerifiedResult, exact: ScoreMap) -> None:
    assert set(result.table["found"]) == {"sweep"}
    sizes = np.concatenate([np.abs(exact.mean(site).to_numpy())[exact.live[site].to_numpy()] for site in exact.sites])
    np.testing.assert_allclose(result.table["effect"].abs(), np.sort(sizes)[::-1])


def test_the_price_is_kept() -> None:
    """What a run takes is no less than the price said, and no more where the screen is right."""
    for options in ({"k": 2, "sample": 5}, {"k": 3, "recall": 0.3}, {"k": 2, "sample": 4, "subsets": 8}):
        result = found(**options)
        price = result.price
        assert result.passes["screen"] <= price.screen
        assert result.passes["verified"] >= price.verified
        assert result.passes["groups"] + result.passes["subsets"] >= price.joint
        if result.passes["verified"] == price.verified and not result.bound.exceeding:
            assert result.passes["sample"] == price.sample
    dearer = found(screen=get_method("ig:3"), k=2, sample=5)
    assert dearer.passes["screen"] <= dearer.price.screen


def test_intervals_are_those_of_the_effects_per_prompt() -> None:
    task = swap_task(n=10, length=6)
    result = found(task, k=2, sample=6, population=True)
    wide = np.zeros(len(result.effects))
    for way in ("screen", "sample"):
        mine = (result.table["found"] == way).to_numpy()
        wide[mine] = half_widths(result.effects[np.flatnonzero(mine)], result.n_live, 0.975)
    assert np.isfinite(wide).all()
    np.testing.assert_allclose(result.table["low"], result.effects.mean(1) - wide)
    np.testing.assert_allclose(result.table["high"], result.effects.mean(1) + wide)
    text = result.summary()
    assert f"no interval of any of the {result.n_live} live cells misses, however cells were chosen (bootstrap-t with Bonferroni's" in text
    assert "times as wide as for normal effects" in text
    assert "over prompts such as these are among those returned" in text
    assert "may exceed" in text
    assert result.population == 0.975
    plain = found(task, k=2, sample=6)
    assert plain.table["effect"].tolist() == result.table["effect"].tolist()
    assert plain.population is None
    with pytest.raises(MethodError, match="one prompt pair says nothing about other prompts; give at least 2 pairs"):
        found(swap_task(n=1, length=6), k=2, population=True)


def test_too_few_prompts_for_any_interval() -> None:
    result = found(swap_task(n=3, length=6), k=2, sample=6, population=True)
    assert np.isinf(result.table["high"]).all()
    assert result.recall.at_least == 0
    assert "3 prompts cannot support intervals of" in result.summary()
    assert re.search(r"it takes about [6-8] or more", result.summary())
    assert {row["low"] for row in json.loads(json.dumps(result.to_dict(), allow_nan=False))["table"]} == {None}


def test_hierarchical_joint_effects_are_the_coarse_sweeps() -> None:
    result = found(hierarchical=True, sample=4)
    coarse = exact_map(("z[layer]", "z[layer,pos]", "mlp_out[layer]"))
    levels = set()
    for row in result.groups.to_dict("records"):
        address = Site.parse(row["address"])
        at = {"layer": address.layer} if address.pos is None else {"layer": address.layer, "pos": address.pos[0]}
        expected = float(coarse.mean(f"{address.kind}[{','.join(at)}]").isel(at))
        assert row["effect"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        levels.add((address.kind, len(at)))
    assert levels == {("z", 1), ("z", 2), ("mlp_out", 1)}
    assert {"L0.z", "L0.mlp_out"} <= set(result.groups["address"])
    assert result.passes["groups"] == len(result.groups)
    assert "no effects cancel inside a group" in result.summary()
    _check_effects(result, exact_map())


def test_the_result_reads_well_and_is_json() -> None:
    result = found(sample=4, k=5)
    text = repr(result)
    assert text.startswith("verified[relp,k=5,sample=4], denoising, logit_diff, gpt2 × ")
    assert "With 95 % confidence at most" in text
    assert "how large a missed effect may be is not bounded" in text
    assert "With 95 % confidence at least 0 of the true top 5 on these prompts are among those returned." in text
    assert "Effects, ranking and recall are those of these 4 prompt pairs, exactly; nothing is said about other prompts." in text
    work = next(line for line in text.splitlines() if line.startswith("Work: "))
    screen = f"screening {result.passes['screen']:.3g} (a backward pass counts as two)"
    assert work.startswith(
        f"Work: as much as {sum(result.passes.values()):.4g} forward passes over all prompts, {100 * result.share:.1f} % of a full"
    )
    assert f"{screen}, cells in its order {result.passes['verified']:.0f}, cells at random 4, runs without a patch 2. " in work
    assert work.endswith(
        f"Screening cost {result.passes['screen']:.3g} forward-pass equivalents; exact patching of all {result.n_live} cells costs "
        f"{result.n_live / result.passes['screen']:.{1 if result.n_live / result.passes['screen'] < 10 else 0}f} times as many passes."
    )
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["bound"]["at_most"] == result.bound.at_most
    assert values["recall"]["at_least"] == result.recall.at_least == 0
    assert values["price"]["statement"] == str(result.price)
    assert values["speaks_of"] == result.speaks_of
    assert [row["address"] for row in values["table"]] == result.table["address"].tolist()
    assert values["provenance"]["method"] == "verified[relp,k=5,sample=4]"
    assert not result.effects.flags.writeable
    assert not {"low", "high"} & set(result.table.columns)  # nothing is uncertain about an effect on these prompts
    assert sorted(result.table["place"]) == sorted(set(result.table["place"]))
    assert (result.table["place"] <= result.n_live).all()


def test_positions_are_labelled() -> None:
    result = found(mixed_task(), ("resid_pre", "pattern[layer,head,dest,src]"), screen=pl.AttributionPatching(), sample=2)
    rows = result.table
    assert set(rows["site"]) <= {"resid_pre", "pattern[layer,head,dest,src]"}
    assert {"position", "dest_position", "src_position"} & set(rows.columns)


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; ask for at least 1 cell"),
        ({"subsets": 5}, "subsets is 5; give 0 for none, or at least 8"),
        ({"sample": -1}, "sample is -1; give a number of cells"),
        ({"recall": 0}, "recall is 0; give a share above 0 and at most 1, such as 0.85"),
        ({"recall": 20}, "recall is 20; give a share above 0 and at most 1"),
        ({"target": 0.0}, "target is 0.0; give a share of the gap above 0"),
        ({"confidence": 1.0}, "confidence is 1.0; it must be between 0 and 1"),
        ({"max_share": 0.0}, "max_share is 0.0; it must be between 0 and 1"),
        ({"group_fraction": -0.5}, "group_fraction is -0.5; give a share"),
        ({"engine": "quick"}, "unknown engine 'quick'"),
        ({"screen": pl.ActivationPatching()}, "the screen is exact patching itself"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        VerifiedPatching(**options)


def test_sites_that_cannot_be_verified() -> None:
    with pytest.raises(MethodError, match="the screen relp-ah does not score q .* leave the site out or take another screen"):
        found(sites=("z", "q"), screen=get_method("relp-ah"), k=1, sample=0)
    with pytest.raises(SiteError, match="unknown site"):
        found(sites=("zz",))
    with pytest.raises(MethodError, match="unknown direction"):
        found(direction="sideways")


def test_confidence_of_a_bound() -> None:
    with pytest.raises(MethodError, match="confidence is 2.0; it must be between 0 and 1"):
        most_exceeding(10, 2, 0, 2.0)


def test_a_public_name() -> None:
    assert pl.VerifiedPatching is VerifiedPatching
    assert pl.VerifiedPatching().name == "verified[relp]"
    assert VerifiedPatching() == VerifiedPatching()


# the benchmark


def test_the_benchmark_judges_a_result_by_the_full_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_verified", ROOT / "benchmarks" / "verified.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    exact = exact_map((HEADS,))
    perfect = benchmark.truth(exact, found(sites=(HEADS,), sample=10**6, max_share=1))
    assert (perfect["recall"], perfect["strict_recall"], perfect["held"], perfect["largest_missed_share_of_gap"]) == (1, 1, True, 0)
    # a result that claims the wrong cells: none of the top k, and a bound that is too small
    result = found(sites=(HEADS,), k=2, sample=0)
    assert result.k == 2
    table = result.table.copy()
    smallest = exact.mean(HEADS).to_numpy()
    cells = sorted(map(tuple, np.argwhere(exact.live[HEADS].to_numpy()).tolist()), key=lambda cell: abs(smallest[cell]))
    table = table.iloc[:2].assign(top=True, found="screen")
    for axis, values in zip(("layer", "pos", "head"), zip(*cells[:2], strict=True), strict=True):
        table[axis] = values
    wrong = replace(result, table=table, bound=Bound(0.95, len(cells) - 2, len(cells) - 2, 0, 0.0))
    judged = benchmark.truth(exact, wrong)
    assert judged["strict_recall"] == 0
    assert judged["exceeding"] == len(cells) - 2
    assert not judged["held"]
    assert judged["largest_missed_share_of_gap"] > 0
