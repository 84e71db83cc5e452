"""Bounds of verified patching: the recall it states, its price, other prompts."""

import itertools
from fractions import Fraction
from functools import cache
from math import comb
from typing import Any

import numpy as np
import pytest

from patchlab.errors import MethodError
from patchlab.methods.verified.bound import Bound, Price, Recall, critical_value, half_widths, look_sizes, missable, most_exceeding, prompts_needed
from patchlab.methods.verified.search import VerifiedPatching
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.stats.distributions import t_quantile

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
