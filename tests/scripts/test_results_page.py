"""The pages of results: the rule that turns tables into recommendations, and what the tables say."""

import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from page_scripts import script
from score_maps import altered, random_map
from sweeping import runs, swept

import patchlab as pl
from patchlab.comparison.compare import FORMS, compare
from patchlab.methods import get_method
from patchlab.scores import Cost, ScoreMap
from patchlab.store.runs import RunStore
from patchlab.sweeps.driver import planned

compared, page, readme = script("compared"), script("make_results_page"), script("readme_table")


def settings(**methods: list[float]) -> dict[tuple[str, str], pd.DataFrame]:
    """Every form has the same correlation; one number per setting."""
    count = len(next(iter(methods.values())))
    return {("m", str(i)): pd.DataFrame({form: {name: values[i] for name, values in methods.items()} for form in FORMS}) for i in range(count)}


def test_interval_over_settings_is_students():
    mean, low, high = compared.over_settings([0.1, 0.2, 0.6])
    half = 4.3027 * math.sqrt(((0.2**2) + (0.1**2) + (0.3**2)) / 2) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-4)
    assert np.isnan(compared.over_settings([0.1])[1:]).all()
    assert np.isnan(compared.over_settings([0.1, math.nan, 0.2])).all()


def test_a_method_is_better_only_if_it_is_in_all_three_forms():
    pairs = page.verdicts(settings(a=[0.5, 0.6, 0.55, 0.58], b=[0.7, 0.81, 0.74, 0.79], c=[0.4, 0.9, 0.3, 0.95]))
    assert page.better(pairs["b", "a"])
    assert not page.better(pairs["a", "b"])
    assert not page.better(pairs["c", "a"])
    assert not page.better(pairs["a", "c"])
    first, second = (dict(pairs["b", "a"]) for _ in range(2))
    for form in FORMS:
        assert not page.better(first | {form: (0.1, -0.01, 0.2)})
        assert not page.better(second | {form: (math.nan, math.nan, math.nan)})


def test_the_recommended_is_the_best_of_the_unbeaten_and_names_those_it_cannot_be_told_from():
    tables = settings(a=[0.5, 0.6, 0.55, 0.58], b=[0.7, 0.81, 0.74, 0.79], c=[0.4, 0.9, 0.3, 0.95])
    means = pd.Series({"a": 0.56, "b": 0.76, "c": 0.64})
    assert page.recommended(["a", "b", "c"], means, page.verdicts(tables)) == ("b", ["c"])
    # a higher mean does not help a method that another is better than
    assert page.recommended(["a", "b"], pd.Series({"a": 0.99, "b": 0.76}), page.verdicts(tables)) == ("b", [])
    alike = page.verdicts(settings(a=[0.5, 0.6], b=[0.6, 0.5]))
    assert page.recommended(["a", "b"], pd.Series({"a": 0.55, "b": 0.55}), alike) == ("a", ["b"])


def _noisy(exact: ScoreMap, name: str, size: float) -> ScoreMap:
    def change(site: str, values: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(len(site)).normal(size=values.shape) * exact.live[site].to_numpy()
        return (values + size * noise).astype(values.dtype)

    return altered(exact, change, method=name)


@pytest.fixture(scope="module")
def found():
    """Settings as the page takes them, of maps made by hand: every method's noise is its own."""
    noise = {name: 0.2 * (len(page.METHODS) - i) for i, name in enumerate(page.METHODS)}
    passes = {name: Cost(2, 1 if i < 6 else 5, 10, 0.0) for i, name in enumerate(page.METHODS)}
    settings = []
    for seed, (model, task) in enumerate([("m", "ioi"), ("m", "greater_than"), ("l", "ioi"), ("l", "ioi")]):
        for sites in (("attn_out", "z"), *([("mlp_post",)] if seed == 0 else [])):
            exact = random_map(*sites, seed=seed)
            maps = {name: replace(_noisy(exact, name, size), cost=passes[name]) for name, size in noise.items()}
            about = ({"name": task, "options": {"variant": str(seed)}}, f"{task}[16]", "denoising" if seed < 3 else "noising")
            settings.append(compared.Setting(model, *about, compare(replace(exact, cost=Cost(9, 0, 10, 0.0)), maps, n_boot=20)))
    return settings


def test_the_page_takes_its_verdicts_and_numbers_from_the_comparisons(found):
    text = page.advice("attention", "denoising", found)
    assert text.startswith("### Attention (`attn_out`, `z`), denoising")
    assert "**One backward pass: `gim`**" in text  # the least noise of those with one pass
    assert "**Several backward passes: `relp+ig:5`**" in text
    values = [one.comparison.table.query("cells == 'live' and method == 'gim' and site in ['attn_out', 'z']")["pearson_pooled"] for one in found[:4]]
    assert f"{np.mean([part.mean() for part in values if len(part)]):.2f}" in next(line for line in text.splitlines() if line.startswith("| `gim`"))
    rows = pd.concat([one.comparison.differences for one in found[:4]]).query("cells == 'live' and method == 'gim' and other == 'atp'")
    rows = rows[rows["site"].isin(["attn_out", "z"])]
    counted = [(int((rows[f"{form}_lo"] > 0).sum()), int((rows[f"{form}_hi"] < 0).sum())) for form in FORMS]
    assert sum(better for better, _ in counted) > 0
    assert ", ".join(f"{better} / {worse}" for better, worse in counted) + " of 6 |" in text
    assert page.advice("edges", "denoising", found) == "" == page.advice("neurons", "noising", found)
    listed = page.tables("m ioi", found[:2])
    for name in page.METHODS:
        assert f"| `z` | `{name}` |" in listed
        assert (f"| `mlp_post` | `{name}` |" in listed.partition("Paired differences")[2]) is (name != page.BASE)
    difference = found[0].comparison.differences.query("cells == 'live' and method == 'gim' and other == 'atp' and site == 'z'").iloc[0]
    assert page._values(difference, "pearson_pooled", signed=True) in listed
    assert page.costs(found).count("\n") == 2 + len(page.METHODS)
    assert "| `relp` | 8 / 4, 0.0 s | 2 / 1, 0.0 s |" in page.costs(found)


def test_variants_of_a_task_are_one_setting(found):
    """Of model l there are two, in two directions."""
    [table] = [page.tables_of(found[3:], "attention")["l", "ioi"]]
    parts = [one.comparison.table.query("cells == 'live' and method == 'relp'")["pearson"].mean() for one in found[3:]]
    assert table.loc["relp", "pearson"] == pytest.approx(np.mean(parts))
    assert list(page.tables_of(found, "neurons")) == [("m", "ioi")]


def test_cells_of_the_readme_mark_differences_that_exclude_0(found):
    assert [readme.number(value) for value in (0.891, -0.12, 1.0, 0.999, -1.0, 0.0)] == [".89", "−.12", "1.00", "1.00", "−1.00", ".00"]
    assert [readme.number(value, signed=True) for value in (0.06, -0.004, 1.2)] == ["+.06", "−.00", "+1.20"]
    base, row = ({"pearson": value} for value in (0.5, 0.625))
    told = {(0.01, 0.2): " ▲", (-0.2, -0.01): " ▼", (-0.1, 0.3): "", (0.0, 0.3): ""}
    for (low, high), mark in told.items():
        text = readme.cell(base, row, {"pearson_lo": low, "pearson_hi": high}, "pearson")
        assert text == f".50 → .62 [{readme.number(low, signed=True)}, {readme.number(high, signed=True)}]{mark}"


def test_rows_of_the_readme_are_those_of_the_comparison(found, monkeypatch):
    monkeypatch.setattr(readme, "SITES", ("attn_out", "z"))
    comparison = found[2].comparison
    first, second = readme.rows("m greater_than", comparison)
    assert (first[:2], second[:2]) == (["m greater_than", "per prompt"], ["", "of means"])
    live = comparison.table.query("cells == 'live' and site == 'z'").set_index("method")
    apart = comparison.differences.query("cells == 'live' and site == 'z' and method == 'relp' and other == 'atp'").iloc[0]
    low, high = (readme.number(apart[f"pearson_per_prompt_{end}"], signed=True) for end in ("lo", "hi"))
    values = [readme.number(live.loc[name, "pearson_per_prompt"]) for name in ("atp", "relp")]
    assert first[3].startswith(f"{values[0]} → {values[1]} [{low}, {high}]")


def test_marks_are_counted_by_site_and_form():
    body = [["m", "per prompt", "a ▲", "b ▼"], ["", "of means", "c", "d ▼"], ["l", "per prompt", "e ▲", "f"], ["", "of means", "g ▲", "h ▼"]]
    assert readme.counts(body) == [["all 2", "per prompt", "**2 ▲, 0 ▼**", "**0 ▲, 1 ▼**"], ["", "of means", "**1 ▲, 0 ▼**", "**0 ▲, 2 ▼**"]]


STUDY = """
version: 1
name: methods
models: demo-gpt2-4l
tasks:
  - {name: ioi, n: 8}
  - {name: agreement, n: 8, options: {variant: across_rc}}
directions: [denoising, noising]
runs: [{kind: score, methods: [exact, atp, relp, gim], sites: [resid_pre, attn_out, mlp_out, z]}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    swept(runs(folder, STUDY), folder / "out", about={"name": "methods"})
    return folder


@pytest.mark.slow
def test_the_table_of_the_readme_is_that_of_the_sweep(folder, monkeypatch):
    """And its numbers are those of the same runs without a sweep."""
    shown = sys.modules[readme.Setting.__module__]
    monkeypatch.setattr(shown, "SHOWN_MODELS", ("demo-gpt2-4l",))
    monkeypatch.setattr(shown, "SHOWN_TASKS", {"agreement": {"variant": "across_rc"}})
    found = readme.settings(pl.sweeps.open(folder / "out"))
    assert [one.shown_as for one in found] == ["", "demo-gpt2-4l agreement across_rc"]
    model = pl.load_model("demo-gpt2-4l")
    pairs = pl.load_task("agreement", model, n=8, variant="across_rc")
    maps = {name: get_method(name).run(model, pairs, readme.SITES, progress=False) for name in ("exact", "atp", "relp")}
    expected = readme.rows("demo-gpt2-4l agreement across_rc", pl.compare(maps.pop("exact"), maps))
    text = readme.written(found)
    lines = text.splitlines()
    assert lines[2:4] == ["| " + " | ".join(row) + " |" for row in expected]
    assert lines[4].startswith("| all 2 | per prompt |")
    assert "8 pairs each, whether the model solves them or not. The last rows count all 2 settings" in text


@pytest.mark.slow
def test_the_page_is_that_of_the_sweep(folder):
    text = page.page(pl.sweeps.open(folder / "out"))
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    kinds = ("Residual stream (`resid_pre`)", "Attention (`attn_out`, `z`)", "MLP (`mlp_out`)")
    assert heads == [f"### {kind}, {direction}" for kind in kinds for direction in ("denoising", "noising")]
    assert text.count("Means over 2 settings:") == 6
    assert "Several backward pass" not in text.partition("## Which")[2].partition("###")[2], "there is none"


@pytest.mark.slow
def test_what_is_not_done_is_no_page(folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "out")
    wanted = runs(folder, STUDY.replace("name: ioi, n: 8}", "name: ioi, n: 8, seed: [0, 1]}"))
    with RunStore.open(tmp_path / "out", write=True) as store:
        store.plan({run.key: planned(run) for run in wanted})
    with pytest.raises(SystemExit, match="6 of the 18 runs that this is made of are not done in"):
        readme.settings(pl.sweeps.open(tmp_path / "out"))
    with pytest.raises(SystemExit, match="8 of the 24 runs that this is made of are not done in"):
        page.page(pl.sweeps.open(tmp_path / "out"))
    with pytest.raises(SystemExit, match="there are no scores of gimp to compare"):
        compared.settings_of(pl.sweeps.open(folder / "out"), methods=("relp", "gimp"))
