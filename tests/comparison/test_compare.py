"""Agreement statistics against slow twins, the bootstrap, and what a comparison refuses."""

import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from literal_agreement import literal_cells, literal_ranks
from score_maps import altered, make_map, random_map

from patchlab.comparison.compare import FORMS, STATISTICS, Comparison, compare
from patchlab.errors import OutputError, ScoreError
from patchlab.scores import Cost, ScoreMap
from patchlab.scores.arrays import Patterns
from patchlab.stats import agreement as stats

SITES = ("resid_pre", "z")


def noisy(scores, seed: int = 1, scale: float = 0.8, noise: float = 0.5, **changes):
    rng = np.random.default_rng(seed)

    def change(site: str, values: np.ndarray) -> np.ndarray:
        live = scores.live[site].to_numpy()
        return ((scale * values + noise * rng.normal(size=values.shape)) * live).astype(values.dtype)

    return altered(scores, change, **{"method": "atp", **changes})


def same(site: str, values: np.ndarray) -> np.ndarray:
    return values


@pytest.fixture(scope="module")
def exact():
    return random_map(*SITES, cost=Cost(40, 0, 9000, 3.0))


@pytest.fixture(scope="module")
def comparison(exact) -> Comparison:
    return compare(exact, {"AtP": noisy(exact), "RelP": noisy(exact, 2, 1.1, 0.1)}, n_boot=200)


def row(comparison: Comparison, method: str, site: str, cells: str = "live") -> pd.Series:
    table = comparison.table
    found = table[(table["method"] == method) & (table["site"] == site) & (table["cells"] == cells)]
    assert len(found) == 1
    return found.iloc[0]


def test_the_comparison_says_what_a_verified_top_costs(exact):
    scores = random_map("resid_pre", "z[layer,pos,head]")
    others = {"good": noisy(scores, noise=0.0), "bad": noisy(scores, 3, noise=50.0)}
    comparison = compare(scores, others, n_boot=5)
    table = comparison.verified_recall
    assert list(zip(table["method"], table["site"], strict=True)) == [(name, site) for name in others for site in scores.sites]
    for row in table.to_dict("records"):
        live = scores.live[row["site"]].to_numpy()
        values = [one.mean(row["site"]).to_numpy()[live] for one in (scores, others[row["method"]])]
        assert row["n_cells"] == live.sum()
        assert row["k"] == max(1, min(20, live.sum() // 20))
        for recall in (95, 100):
            assert row[f"cells_{recall}"] == literal_cells(*values, row["k"], recall / 100)
            assert row[f"share_{recall}"] == row[f"cells_{recall}"] / live.sum()
    good, bad = (table[table["method"] == name] for name in others)
    assert (good["cells_100"] == good["k"]).all()
    assert bad["cells_100"].sum() > good["cells_100"].sum()
    assert "Cost of verified recall:" in comparison.summary()
    assert "100 % of the top k in" in comparison.summary()


def test_without_live_cells_nothing_is_verified():
    scores = random_map("z")
    dead = replace(scores, live=scores.live & False)
    found = compare(dead, {"x": noisy(dead, noise=0.0)}, n_boot=2)
    assert found.verified_recall.empty
    assert "verified" not in found.summary()


MEANS = [name for name in STATISTICS if name not in ("pearson_per_prompt", "pearson_pooled")]
"""Statistics of example-mean maps."""


def literal(exact: np.ndarray, other: np.ndarray, gap: float, k: int) -> dict[str, float]:
    """Every statistic of one pair of mean maps without ties at the k-th place, one cell at a time."""
    top = [set(np.argsort(-np.abs(values))[:k].tolist()) for values in (exact, other)]
    counted = [(e, a) for e, a in zip(exact, other, strict=True) if abs(e) > 0.01 * abs(gap)]
    return {
        "pearson": np.corrcoef(exact, other)[0, 1],
        "spearman": np.corrcoef(literal_ranks(exact), literal_ranks(other))[0, 1],
        "slope": sum(e * a for e, a in zip(exact, other, strict=True)) / sum(e * e for e in exact),
        "sign_agreement": np.mean([np.sign(e) == np.sign(a) for e, a in counted]),
        "topk_recall": len(top[0] & top[1]) / k,
    }


@pytest.mark.parametrize("cells", ["all", "live"])
@pytest.mark.parametrize("site", SITES)
def test_every_statistic_equals_its_literal_twin(exact, comparison, site, cells):
    chosen = exact.live[site].to_numpy() if cells == "live" else np.ones(exact.live[site].shape, dtype=bool)
    other = noisy(exact)
    k = max(1, int(exact.live[site].to_numpy().sum()) // 10)
    expected = literal(exact.mean(site).to_numpy()[chosen], other.mean(site).to_numpy()[chosen], exact.gap, k)
    found = row(comparison, "AtP", site, cells)
    assert found["n_cells"] == chosen.sum()
    assert found["k"] == k
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-10), name


def test_intervals_equal_a_literal_bootstrap(exact):
    other, n = noisy(exact), exact.data.sizes["example"]
    found = row(compare(exact, {"AtP": other}, n_boot=50, seed=4), "AtP", "z")
    draws = np.random.default_rng(4).integers(n, size=(50, n))
    gaps = (exact.data["metric_clean"] - exact.data["metric_corrupted"]).to_numpy()
    values = {name: [] for name in MEANS}
    for draw in draws:
        means = [scores.data["z"].to_numpy()[draw].astype(float).mean(0).ravel() for scores in (exact, other)]
        for name, value in literal(*means, gaps[draw].mean(), found["k"]).items():
            values[name].append(value)
    for name in MEANS:
        assert found[f"{name}_lo"] == pytest.approx(np.quantile(values[name], 0.025), abs=1e-10), name
        assert found[f"{name}_hi"] == pytest.approx(np.quantile(values[name], 0.975), abs=1e-10), name


# agreement per prompt, pooled, and differences between methods


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson, one cell at a time in float64; NaN where one of the two does not vary."""
    if len(a) < 2 or len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        return np.nan
    top = sum((x - a.mean()) * (y - b.mean()) for x, y in zip(a, b, strict=True))
    return top / np.sqrt(sum((x - a.mean()) ** 2 for x in a) * sum((y - b.mean()) ** 2 for y in b))


def forms(exact: ScoreMap, other: ScoreMap, site: str, draw: np.ndarray, live: bool, unsigned: bool = False) -> dict[str, float]:
    """The correlations per prompt and pooled of one resample of the examples, a prompt after the other."""
    masks = exact.live_per_example(site) if live else np.ones(exact.data[site].shape, dtype=bool)
    per_prompt, pooled = [], ([], [])
    for e in draw:
        a, b = (scores.data[site].to_numpy()[e][masks[e]].astype(float) for scores in (exact, other))
        a = np.abs(a) if unsigned else a
        per_prompt.append(correlation(a, b))
        pooled[0].extend(a)
        pooled[1].extend(b)
    defined = [value for value in per_prompt if not np.isnan(value)]
    mean = np.mean(defined) if defined else np.nan
    return {"pearson_per_prompt": mean, "pearson_pooled": correlation(*(np.array(part) for part in pooled)), "per_prompt": np.array(per_prompt)}


def mixed_liveness(n: int = 8, seed: int = 0, **changes) -> ScoreMap:
    """Effects of very different size at cells that are live for some prompts only; prompt 2 has one live cell, prompt 5 is constant."""
    rng = np.random.default_rng(seed)
    kinds = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=bool).reshape(3, 2, 3)
    of = np.array([0, 1, 2, 0, 1, 1, 0, 1])[:n]
    cells = kinds[of]
    effects = (3.0 + rng.normal(size=(n, 2, 3))) * np.exp(rng.normal(size=(n, 1, 1))) * cells
    if n > 5:
        effects[5] = 0.1 * cells[5]
    used = sorted(set(of.tolist()))
    patterns = Patterns(np.array([used.index(i) for i in of]), {"z": kinds[used]})
    return make_map({"z": effects}, live={"z": cells.any(0)}, patterns=patterns, **changes)


def disturbed(scores: ScoreMap, seed: int, noise: float, **changes) -> ScoreMap:
    live, rng = scores.live_per_example("z"), np.random.default_rng(seed)
    found = altered(scores, lambda site, values: (values + noise * rng.normal(size=values.shape)) * live, method="atp", **changes)
    return replace(found, patterns=scores.patterns)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("cells", ["live", "all"])
def test_agreement_per_prompt_and_pooled_equal_their_literal_twins(cells, unsigned):
    exact = mixed_liveness()
    exact = altered(exact, lambda site, values: values * np.array([1, -1, 1, 1, -1, 1, 1, 1])[:, None, None]) if unsigned else exact
    exact = replace(exact, patterns=mixed_liveness().patterns)
    other = disturbed(exact, 1, 1.0, **({"unsigned": True} if unsigned else {}))
    found = row(compare(exact, {"x": other}, n_boot=60, seed=3), "x", "z", cells)
    whole = forms(exact, other, "z", np.arange(8), cells == "live", unsigned)
    per_prompt = whole["per_prompt"]
    undefined = int(np.isnan(per_prompt).sum())
    assert undefined == (2 if cells == "live" else 0)
    assert found["pearson_per_prompt_undefined"] == undefined
    for name, share in (("q25", 0.25), ("q50", 0.5), ("q75", 0.75)):
        assert found[f"pearson_per_prompt_{name}"] == pytest.approx(np.quantile(per_prompt[~np.isnan(per_prompt)], share), abs=1e-12)
    draws = [forms(exact, other, "z", draw, cells == "live", unsigned) for draw in np.random.default_rng(3).integers(8, size=(60, 8))]
    for name in ("pearson_per_prompt", "pearson_pooled"):
        assert found[name] == pytest.approx(whole[name], abs=1e-10), name
        for end, share in (("lo", 0.025), ("hi", 0.975)):
            assert found[f"{name}_{end}"] == pytest.approx(np.quantile([one[name] for one in draws], share), abs=1e-10), (name, end)


def test_a_cell_that_is_dead_for_a_prompt_does_not_count_for_it():
    """Shared zeros would make two unrelated maps agree."""
    exact, other = mixed_liveness(), mixed_liveness(seed=9)
    other = replace(other, provenance={**other.provenance, "method": "atp"})
    live, everything = (row(compare(exact, {"x": other}, n_boot=5), "x", "z", cells) for cells in ("live", "all"))
    assert everything["pearson_per_prompt"] > live["pearson_per_prompt"] + 0.3
    # the same where every cell is live for some prompt, so that the mean map has no structural zero at all
    part = {name: altered(scores, same).data.isel(layer=0, head=[1, 2]).to_array().to_numpy()[0] for name, scores in (("e", exact), ("o", other))}
    cells = exact.patterns["z"].to_numpy()[:, :1, 1:]
    patterns = Patterns(exact.patterns["pattern_of"].to_numpy(), {"z": np.concatenate([cells[:2], [[[True, False]]]])})
    maps = [make_map({"z": values[:, None]}, patterns=patterns) for values in part.values()]
    assert maps[0].live["z"].to_numpy().all()
    found = compare(maps[0], {"x": maps[1]}, n_boot=5)
    assert row(found, "x", "z", "live")["pearson_per_prompt_undefined"] == 2
    assert row(found, "x", "z", "all")["pearson"] == row(found, "x", "z", "live")["pearson"]


def test_a_map_that_does_not_know_which_cells_matter_for_which_prompt_says_so():
    exact = mixed_liveness()
    vague = replace(exact, patterns=None)
    found = compare(vague, {"x": disturbed(exact, 1, 1.0)}, n_boot=5)
    assert found.notes == ("The reference does not say which cells can matter for which prompt: those that can for any count for all.",)
    assert row(found, "x", "z")["pearson_per_prompt_undefined"] == 0


def test_maps_whose_prompts_differ_in_live_cells_are_refused():
    exact = mixed_liveness()
    other = disturbed(exact, 1, 1.0)
    turned = other.patterns.assign_coords(pattern_of=("example", other.patterns["pattern_of"].to_numpy()[::-1]))
    with pytest.raises(ScoreError, match="which cells of z can matter for which example differs"):
        compare(exact, {"x": replace(other, patterns=turned)})


def test_one_form_flatters_where_another_does_not():
    """Prompts that disagree and cancel: the means agree perfectly, no prompt does."""
    signal, own = np.array([1.0, -1.0, 2.0, -2.0]), np.array([1.0, 1.0, -1.0, -1.0])
    sign = np.array([1.0, -1.0] * 4)[:, None]
    exact = make_map({"z": (signal + 9 * sign * own)[:, None]})
    other = make_map({"z": (signal - 9 * sign * own)[:, None]}, method="atp")
    found = row(compare(exact, {"x": other}, n_boot=5), "x", "z", "live")
    assert found["pearson"] == pytest.approx(1)
    assert found["pearson_per_prompt"] < -0.9
    assert found["pearson_pooled"] < -0.9


def test_pooling_sees_the_size_of_prompts_and_the_mean_over_prompts_does_not():
    exact = np.random.default_rng(0).normal(size=(4, 1, 5))
    scale = np.array([1.0, -2.0, 3.0, 0.5])[:, None, None]  # one prompt has the wrong sign
    found = row(compare(make_map({"z": exact}), {"x": make_map({"z": exact * scale}, method="atp")}, n_boot=5), "x", "z")
    assert found["pearson_per_prompt"] == pytest.approx(0.5)
    assert found["pearson_pooled"] == pytest.approx(correlation(exact.ravel(), (exact * scale).ravel()))


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_constant_prompts_are_undefined_and_counted_whatever_their_size(size):
    exact = np.random.default_rng(0).normal(size=(4, 1, 5))
    flat = np.broadcast_to(size * np.array([0.1, 0.1, 0.3, 0.7])[:, None, None], exact.shape)
    found = compare(make_map({"z": exact}), {"x": make_map({"z": flat}, method="atp"), "y": make_map({"z": exact})}, n_boot=50)
    x = row(found, "x", "z")
    assert x["pearson_per_prompt_undefined"] == 4
    assert x[["pearson_per_prompt", "pearson_per_prompt_lo", "pearson_per_prompt_q50"]].isna().all()
    assert np.isfinite(x["pearson_pooled"])  # the prompts differ from each other
    assert found.differences["pearson_per_prompt_undefined"].tolist() == [4, 4]
    assert found.differences["pearson_per_prompt"].isna().all()
    assert "undefined prompts" in found.summary()
    everywhere = make_map({"z": np.full_like(exact, 0.1 * size)}, method="atp")
    assert row(compare(make_map({"z": exact}), {"x": everywhere}, n_boot=5), "x", "z")[list(FORMS)].isna().all()


def test_draws_of_prompts_that_are_all_alike_are_undefined_when_pooled():
    a, b = np.full((3, 4), 0.1) * [[1], [1], [2]], np.random.default_rng(0).normal(size=(3, 4))
    pooled = stats.Moments.of(a, b).pooled(np.array([[0.3, 0.7, 0.0], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert np.isnan(pooled).tolist() == [True, False, True, True]


def test_pooled_correlation_survives_a_large_common_offset():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 6))
    pooled = stats.Moments.of(a + 1e6, b - 1e6).pooled(np.full((1, 5), 0.2))
    assert pooled[0] == pytest.approx(correlation(a.ravel(), b.ravel()), abs=1e-8)


def test_differences_equal_a_literal_paired_bootstrap():
    exact = mixed_liveness()
    methods = {"a": disturbed(exact, 1, 2.0), "b": disturbed(exact, 2, 0.5), "c": disturbed(exact, 3, 1.0)}
    flat = methods["c"].data["z"].to_numpy().copy()
    flat[0] = 0.25 * exact.live_per_example("z")[0]  # undefined for c alone
    methods["c"] = replace(altered(methods["c"], lambda site, values: flat), patterns=exact.patterns)
    found = compare(exact, methods, n_boot=80, seed=5)
    table = found.differences
    assert list(table.columns[:4]) == ["site", "cells", "method", "other"]
    assert table.query("cells == 'live'")[["method", "other"]].to_numpy().tolist() == [["b", "a"], ["c", "a"], ["c", "b"]]
    draws = np.random.default_rng(5).integers(8, size=(80, 8))
    for cells in ("live", "all"):
        for one in table[table["cells"] == cells].to_dict("records"):
            two = [methods[one[key]] for key in ("method", "other")]
            values = {name: [] for name in FORMS}
            for draw in [np.arange(8), *draws]:
                chosen = exact.live["z"].to_numpy() if cells == "live" else np.ones((2, 3), dtype=bool)
                means = [scores.data["z"].to_numpy()[draw].mean(0)[chosen] for scores in (exact, *two)]
                values["pearson"].append(correlation(means[0], means[1]) - correlation(means[0], means[2]))
                first, second = (forms(exact, scores, "z", draw, cells == "live") for scores in two)
                values["pearson_per_prompt"].append(np.nanmean(first["per_prompt"] - second["per_prompt"]))
                values["pearson_pooled"].append(first["pearson_pooled"] - second["pearson_pooled"])
            for name, (value, *rest) in values.items():
                assert one[name] == pytest.approx(value, abs=1e-10), (one, name)
                assert one[f"{name}_lo"] == pytest.approx(np.quantile(rest, 0.025), abs=1e-10), (one, name)
                assert one[f"{name}_hi"] == pytest.approx(np.quantile(rest, 0.975), abs=1e-10), (one, name)
    counts = table.query("cells == 'live'")["pearson_per_prompt_undefined"].tolist()
    assert counts == [2, 3, 3]
    # per prompt the difference is over the prompts that both have, not the difference of two means over different prompts
    live = found.table.query("cells == 'live'").set_index("method")["pearson_per_prompt"]
    assert table.query("cells == 'live' and method == 'c' and other == 'b'")["pearson_per_prompt"].item() != pytest.approx(live["c"] - live["b"])


def test_a_paired_difference_is_surer_than_two_intervals():
    """Two methods with the same errors but for a small one: their intervals overlap, that of the difference does not contain 0."""
    rng = np.random.default_rng(0)
    effects, noise = rng.normal(size=(2, 16, 3, 6))
    exact = make_map({"z": effects})
    methods = {name: make_map({"z": effects + size * noise}, method="atp") for name, size in (("worse", 1.0), ("better", 0.9))}
    found = compare(exact, methods, n_boot=200)
    worse, better = (row(found, name, "z") for name in methods)
    assert worse["pearson_per_prompt_hi"] > better["pearson_per_prompt_lo"]
    difference = found.differences.query("cells == 'live'").iloc[0]
    assert (difference["method"], difference["other"]) == ("better", "worse")
    assert difference[[f"{name}_lo" for name in FORMS]].min() > 0
    assert "better − worse" in found.summary()


def test_signed_and_unsigned_methods_have_no_difference(exact):
    unsigned = {"unsigned": True}
    methods = {"a": noisy(exact), "b": noisy(exact, 2), "c": noisy(exact, 3, **unsigned), "d": noisy(exact, 4, **unsigned)}
    found = compare(exact, methods, n_boot=5)
    assert set(map(tuple, found.differences[["method", "other"]].to_numpy().tolist())) == {("b", "a"), ("d", "c")}
    assert any("the two have no paired differences" in note for note in found.notes)


def test_a_single_method_has_no_differences(exact):
    found = compare(exact, {"x": noisy(exact)}, n_boot=5)
    assert found.differences.empty
    assert found.to_dict()["differences"] == []
    assert "difference" not in found.summary()


def test_with_one_prompt_the_three_forms_are_one():
    exact = random_map(*SITES, n=1)
    found = compare(exact, {"x": noisy(exact), "y": noisy(exact, 2)})
    for name in FORMS:
        assert found.table[name].to_numpy() == pytest.approx(found.table["pearson"].to_numpy())
        assert found.differences[name].notna().all()
        assert found.differences[f"{name}_lo"].isna().all()


def test_a_site_that_one_method_lacks_has_no_difference_with_it(exact):
    ah = altered(exact, lambda site, values: values if site == "resid_pre" else np.full_like(values, np.nan), not_scored={"z": "pattern is constant"})
    found = compare(exact, {"AH": ah, "AtP": noisy(exact), "RelP": noisy(exact, 2)}, n_boot=5)
    pairs = found.differences.query("site == 'z' and cells == 'live'")[["method", "other"]]
    assert pairs.to_numpy().tolist() == [["RelP", "AtP"]]


def test_structural_zeros_tie_in_spearman():
    exact, other = np.array([[0.0, 0.0, 1.0, 2.0]]), np.array([[0.0, 0.0, 2.0, 1.0]])
    assert stats.spearman(exact, other)[0] == pytest.approx(np.corrcoef([0.5, 0.5, 2, 3], [0.5, 0.5, 3, 2])[0, 1])


@pytest.mark.parametrize(
    "constant", [np.zeros((1, 5)), np.full((1, 5), 0.1), 0.1 + 1e-17 * np.arange(5.0)[None], np.full((1, 5), 1 / 3) * np.ones((1, 5))]
)
def test_correlations_with_a_constant_map_are_undefined_without_a_warning(constant):
    varying = np.arange(5.0)[None]
    for statistic in (stats.pearson, stats.spearman):
        assert np.isnan(statistic(varying, constant)[0])
        assert np.isnan(statistic(constant, varying)[0])


def test_correlation_does_not_depend_on_the_unit():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 50))
    for statistic in (stats.pearson, stats.spearman):
        assert statistic(1e-9 * a, 1e9 * b)[0] == pytest.approx(statistic(a, b)[0])


def test_slope_is_of_the_approximation_on_the_exact_effect(exact):
    found = compare(exact, {"half": altered(exact, lambda site, values: 0.5 * values)}, n_boot=10)
    assert row(found, "half", "z")["slope"] == pytest.approx(0.5)


def test_sign_agreement_counts_only_effects_above_one_percent_of_the_gap():
    # gap 2: effects up to 0.02 do not count; an approximation of 0 has no sign
    exact = make_map({"z": np.tile([[1.0, -1.0, 0.5, 0.02, 0.021]], (4, 1, 1))}, clean=np.full(4, 1.5), corrupted=np.full(4, -0.5))
    other = altered(exact, lambda site, values: np.tile([[3.0, 1.0, 0.0, -9.0, 0.1]], (4, 1, 1)))
    found = compare(exact, {"x": other}, n_boot=10)
    assert row(found, "x", "z")["sign_agreement"] == 0.5
    assert found.setting["sign_floor"] == pytest.approx(0.02)


def test_topk_recall_is_by_size_and_shares_ties():
    assert stats.topk_recall(np.array([[-3.0, 2.0, 1.0]]), np.array([[9.0, 0.0, -8.0]]), 2)[0] == 0.5
    # three cells tie for the one place: each has a third of it
    assert stats.topk_recall(np.array([[1.0, 1.0, 1.0]]), np.array([[1.0, 0.0, 0.0]]), 1)[0] == pytest.approx(1 / 3)
    assert stats.topk_recall(np.array([[4.0, 3.0]]), np.array([[4.0, 3.0]]), 1)[0] == 1


def test_k_is_ten_percent_of_the_live_cells_at_least_one(comparison):
    assert set(comparison.table.query("site == 'resid_pre'")["k"]) == {1}  # 15 live cells of 18
    assert row(compare(random_map("mlp_post"), {"x": random_map("mlp_post", seed=3)}, n_boot=2), "x", "mlp_post")["k"] == 12  # of 120


# the comparison


def test_a_map_agrees_perfectly_with_itself(exact):
    found = compare(exact, {"itself": altered(exact, same)}, n_boot=20)
    for name in STATISTICS:
        assert found.table[[name, f"{name}_lo", f"{name}_hi"]].to_numpy() == pytest.approx(1), name


def test_all_methods_and_sites_see_the_same_draws(exact):
    other = noisy(exact)
    alone = compare(exact, {"AtP": other}, n_boot=50)
    together = compare(exact, {"RelP": noisy(exact, 2), "AtP": other, "copy": other}, n_boot=50)
    for site in SITES:
        a, b, c = row(alone, "AtP", site), row(together, "AtP", site), row(together, "copy", site)
        pd.testing.assert_series_equal(a.drop("method"), b.drop("method"), check_names=False)
        pd.testing.assert_series_equal(b.drop("method"), c.drop("method"), check_names=False)


def test_the_seed_decides_the_draws(exact):
    other = noisy(exact)
    first, again, second = (row(compare(exact, {"x": other}, n_boot=30, seed=seed), "x", "z") for seed in (0, 0, 1))
    assert first["pearson_lo"] == again["pearson_lo"] != second["pearson_lo"]
    assert first["pearson"] == second["pearson"]


def test_large_maps_are_cut_into_chunks_without_changing_a_digit(exact, monkeypatch):
    other = noisy(exact)
    whole = compare(exact, {"x": other}, n_boot=40)
    monkeypatch.setattr(sys.modules["patchlab.comparison.compare"], "_LIMIT", 60)
    chunked = compare(exact, {"x": other}, n_boot=40)
    pd.testing.assert_frame_equal(whole.table, chunked.table, rtol=1e-12)
    pd.testing.assert_frame_equal(whole.reliability, chunked.reliability, rtol=1e-12)


def test_table_lists_both_sets_of_cells_and_the_methods_in_order(comparison):
    table = comparison.table
    assert list(table["method"].unique()) == ["AtP", "RelP"]
    assert len(table) == 2 * len(SITES) * 2
    assert list(table.columns[:5]) == ["method", "site", "cells", "n_cells", "k"]
    assert row(comparison, "AtP", "resid_pre", "all")["n_cells"] == 18
    assert row(comparison, "AtP", "resid_pre", "live")["n_cells"] == 15


def test_a_site_without_live_cells_is_undefined_not_zero():
    exact = make_map({"z": np.zeros((4, 1, 3))}, live={"z": np.zeros((1, 3), dtype=bool)})
    found = row(compare(exact, {"x": altered(exact, same)}, n_boot=5), "x", "z")
    assert found["n_cells"] == 0
    assert found[list(STATISTICS)].isna().all()


def test_costs_start_with_the_reference(comparison):
    assert comparison.costs["method"].tolist() == ["exact", "AtP", "RelP"]
    assert comparison.costs[["forwards", "backwards", "positions"]].to_numpy().tolist() == [[40, 0, 9000], [2, 1, 60], [2, 1, 60]]
    assert comparison.costs["seconds"].tolist() == [3.0, 0.5, 0.5]


def test_costs_read_as_sentences_wherever_they_are_shown(comparison, exact):
    one = "exact took 3.00 s: 40 forward and 0 backward passes of a batch, 9,000 positions."
    two = "AtP took 0.50 s: 2 forward and 1 backward passes of a batch, 60 positions. exact computed 150 times as many positions."
    assert comparison.cost_sentences()[:2] == [one, two]
    for text in (comparison.summary(), comparison._repr_html_()):
        assert one in text
        assert two in text
        assert "predicted_bytes" not in text
    sized = compare(altered(exact, same, cost=Cost(1, 0, 300, 1.0, 2_600_000, 7_000_000)), {"x": altered(exact, same)}, n_boot=5)
    assert sized.cost_sentences()[0].endswith("300 positions. Its activations were predicted to need 3 MB. At most it used 7 MB of the GPU.")
    assert sized.cost_sentences()[1].endswith("exact computed 5.0 times as many positions.")


def test_sites_that_were_not_scored_are_left_out_with_a_note(exact):
    ah = altered(exact, lambda site, values: values if site == "resid_pre" else np.full_like(values, np.nan), not_scored={"z": "pattern is constant"})
    found = compare(exact, {"AH": ah, "AtP": noisy(exact)}, n_boot=10)
    assert set(found.table.query("method == 'AH'")["site"]) == {"resid_pre"}
    assert set(found.table.query("method == 'AtP'")["site"]) == set(SITES)
    assert found.notes == ("AH: z not scored and left out (pattern is constant).",)
    assert "Note: AH: z not scored" in found.summary()
    nothing = altered(exact, lambda site, values: np.full_like(values, np.nan), not_scored=dict.fromkeys(SITES, "why"))
    with pytest.raises(ScoreError, match="nothing to compare: no site is scored both by exact and by one of AH"):
        compare(exact, {"AH": nothing})


def test_split_half_reliability_tells_signal_from_noise():
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=(1, 4, 30)), rng.normal(size=(40, 4, 30))
    stable = compare(make_map({"z": signal + 0.1 * noise}), {"x": make_map({"z": signal + noise})}, n_boot=5).reliability
    unstable = compare(make_map({"z": noise}), {"x": make_map({"z": signal + noise})}, n_boot=5).reliability
    assert stable["reliability"].min() > 0.99
    assert abs(unstable["half_pearson"]).max() < 0.25
    mixed = compare(make_map({"z": signal + 4 * noise}), {"x": make_map({"z": noise})}, n_boot=5).reliability.iloc[0]
    # half-means have noise variance 16/20 beside signal variance of about 1
    assert mixed["half_pearson"] == pytest.approx(1 / 1.8, abs=0.12)
    assert mixed["reliability"] == pytest.approx(2 * mixed["half_pearson"] / (1 + mixed["half_pearson"]))


def test_halves_are_halves_of_the_examples():
    effects = np.array([[0.0, 1.0, 5.0], [1.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
    split = np.array([[True, False, False]])
    expected = np.corrcoef(effects[0], effects[1:].mean(0))[0, 1]
    assert stats.split_half(effects, split)[0] == pytest.approx(expected)


def test_one_example_has_no_intervals():
    exact = random_map(*SITES, n=1)
    found = compare(exact, {"x": noisy(exact)})
    assert found.table[[f"{name}_{end}" for name in STATISTICS for end in ("lo", "hi")]].isna().all(axis=None)
    assert found.table["pearson"].notna().all()
    assert found.reliability["reliability"].isna().all()
    assert "One example: there are no intervals and no reliability." in found.notes
    assert "[" not in found.summary().split("Agreement over")[1].split("Cost")[0].replace("[95 % CI", "")


def test_sign_agreement_is_undefined_where_the_gap_may_be_zero():
    exact = random_map("z", clean=np.array([1.0, -1.0] * 4), corrupted=np.zeros(8))
    found = compare(exact, {"x": noisy(exact)}, n_boot=20)
    assert found.table[["sign_agreement", "sign_agreement_lo"]].isna().all(axis=None)
    assert found.table["pearson"].notna().all()
    assert any("not distinguishable from 0" in note for note in found.notes)
    assert "undefined" in found.summary()


def test_summary_reads_well(comparison):
    text = comparison.summary()
    assert text.startswith("Reference exact: tiny × toy[8], denoising, logit_diff, gap 2")
    assert "Agreement over live cells:" in text
    assert f"{row(comparison, 'AtP', 'z')['pearson']:.2f} [" in text
    assert "Split-half reliability of exact (Spearman–Brown): resid_pre 0.9" in text
    assert "all cells, structural zeros included" in comparison.summary("all")
    assert repr(comparison) == text
    html = comparison._repr_html_()
    assert html.count("<table") == 7  # three for each set of cells, verified recall; costs are sentences
    with pytest.raises(ScoreError, match="unknown set of cells 'dead'; Valid: all, live"):
        comparison.summary("dead")


def test_html_escapes_names(exact):
    assert "&lt;b&gt;x" in compare(exact, {"<b>x": noisy(exact)}, n_boot=2)._repr_html_()


def test_files_hold_the_table_in_full_precision(comparison, tmp_path):
    comparison.to_csv(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), comparison.table, check_dtype=False, rtol=1e-15)
    comparison.to_csv(tmp_path / "d.csv", what="differences")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "d.csv"), comparison.differences, check_dtype=False, rtol=1e-15)
    with pytest.raises(ScoreError, match="unknown table of a comparison 'notes'"):
        comparison.to_csv(tmp_path / "e.csv", what="notes")
    comparison.to_json(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert record == comparison.to_dict()
    assert set(record) == {"setting", "table", "costs", "reliability", "notes", "verified_recall", "differences"}
    assert record["table"][0]["pearson"] == comparison.table["pearson"].iloc[0]
    assert record["costs"][0]["predicted_bytes"] is None
    for write, name in ((comparison.to_csv, "a.csv"), (comparison.to_json, "a.json")):
        with pytest.raises(OutputError, match="not overwritten"):
            write(tmp_path / name)
        write(tmp_path / name, overwrite=True)


def test_undefined_values_are_null_in_json(tmp_path):
    exact = random_map("z", n=1)
    compare(exact, {"x": noisy(exact)}).to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["table"][0]["pearson_lo"] is None


def test_n_boot_must_be_positive(exact):
    with pytest.raises(ScoreError, match="n_boot is 0; it must be at least 1"):
        compare(exact, {"x": exact}, n_boot=0)
