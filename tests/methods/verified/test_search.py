"""The search of verified patching on given effects: the stopping rule, groups, random subsets."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from families import model_of, swap_task

from patchlab.errors import MethodError
from patchlab.methods.cells import cells_of
from patchlab.methods.setting.setting import Setting
from patchlab.methods.verified.bound import Price, Recall, look_sizes, most_exceeding
from patchlab.methods.verified.patcher import Cells
from patchlab.methods.verified.search import VerifiedPatching, _Search, levels
from patchlab.methods.verified.subsets import largest_effect, memberships, most_exceeding_additive
from patchlab.sites import Site
from patchlab.stats.distributions import t_quantile

# the search, on given effects

HEADS = "z[layer,pos,head]"


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


@pytest.mark.slow
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
    assert levels(Site.parse(HEADS)) == [("layer",), ("layer", "pos")]
    assert levels(Site.parse("z")) == [("layer",)]
    assert levels(Site.parse("resid_pre")) == [("layer",)]
    assert levels(Site.parse("pattern[layer,head,dest,src]")) == [("layer",), ("layer", "dest")]
    assert levels(Site.parse("mlp_post[layer,pos,neuron]")) == [("layer",), ("layer", "pos")]
    assert levels(Site.parse("input")) == []


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


def test_the_subset_bound_by_hand() -> None:
    """Means 2 and 1.25 of two subsets each, variances of the means 1 and .5625, one degree of freedom."""
    members = np.array([[True, True, False, False]])
    bound = largest_effect(members, np.array([3.0, 1.0, 2.0, 0.5]), 0.95)
    assert bound == pytest.approx(0.75 + 6.313751515 * 1.25)
