"""Verified patching on models: exact cells, what is refused, and what it all cost."""

import importlib.util
import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from families import mixed_task, model_of, swap_task
from paths import ROOT

import patchlab as pl
from patchlab.errors import MethodError, SiteError
from patchlab.methods import get_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.verified.bound import Bound, half_widths, most_exceeding
from patchlab.methods.verified.patcher import Patcher
from patchlab.methods.verified.result import VerifiedResult
from patchlab.methods.verified.search import VerifiedPatching
from patchlab.scores import ScoreMap
from patchlab.sites import Site

# on models

HEADS = "z[layer,pos,head]"


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
