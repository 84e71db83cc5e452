"""Make docs/results.md: how well the approximations agree with exact patching on the packaged models, and which method that speaks for.

Run it in the repository: ``python scripts/pages/make_results_page.py`` (about a quarter of an hour on one core). Every number and every verdict of
the page is computed here, from pairs that the model solves, seed 0; the rule that turns tables into recommendations is :func:`verdicts`.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import patchlab as pl
from patchlab.comparison.compare import FORMS, Comparison
from patchlab.methods import get_method

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("demo-gpt2", "demo-llama")
TASKS: dict[str, dict[str, Any]] = {"ioi": {}, "agreement": {"variant": "across_rc"}, "greater_than": {}}
BASE = "atp"
METHODS = (BASE, "relp", "relp-ah", "attnlrp", "cp-lrp", "gim", "clean-corrupted", "ig:5", "relp+ig:5")
HELD = ("relp-ah", "cp-lrp")
"""They hold the attention pattern, so they score no edges into queries and keys, and are left out where edges are compared."""
RUNS: dict[str, tuple[tuple[str, ...], str]] = {
    "nodes": (("resid_pre", "attn_out", "mlp_out", "z"), "denoising"),
    "neurons": (("mlp_post",), "denoising"),
    "edges": (("edges",), "noising"),
}
"""What is scored in one run, and in which direction (edges as the literature on circuits does)."""
KINDS = {"residual stream": ("resid_pre",), "attention": ("attn_out", "z"), "MLP": ("mlp_out", "mlp_post"), "edges": ("edges",)}
LEVEL = 0.95


def measure(model: Any, task: str, run: str, n: int, seed: int, methods: Sequence[str] = METHODS) -> Comparison:
    """The comparison of one run."""
    sites, direction = RUNS[run]
    pairs = pl.load_task(task, model, n=n, seed=seed, only_correct=True, **TASKS[task])
    names = [name for name in ("exact", *methods) if run != "edges" or name not in HELD]
    maps = {name: get_method(name).run(model, pairs, sites, direction=direction, progress=False) for name in names}
    exact = maps.pop("exact")
    return pl.compare(exact, maps, seed=seed)


# The rule


def settings_of(found: Mapping[tuple[str, str, str], Comparison], kind: str) -> dict[tuple[str, str], pd.DataFrame]:
    """Per model and task the correlations of each method (rows) in each form (columns), averaged over the sites of a kind."""
    tables: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for (model, task, _), comparison in found.items():
        rows = comparison.table[(comparison.table["cells"] == "live") & comparison.table["site"].isin(KINDS[kind])]
        for _, group in rows.groupby("site", sort=False):
            tables.setdefault((model, task), []).append(group.set_index("method")[list(FORMS)])
    return {setting: sum(parts[1:], parts[0]) / len(parts) for setting, parts in tables.items()}


def student(freedom: int) -> float:
    """The t with P(|T| < t) = 0.95, from the density in the angle whose tangent is T / √freedom.

    >>> round(student(1), 3), round(student(5), 3)
    (12.706, 2.571)
    """
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(LEVEL, area / area[-1], angle)))


def over_settings(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over settings with the interval of Student's t; no interval from fewer than two settings, nothing where one is undefined."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2 or math.isnan(mean):
        return mean, math.nan, math.nan
    half = student(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def verdicts(settings: Mapping[tuple[str, str], pd.DataFrame]) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
    """For every ordered pair of methods and each form, the mean difference over settings with its interval."""
    methods = next(iter(settings.values())).index
    return {
        (one, other): {form: over_settings([table.loc[one, form] - table.loc[other, form] for table in settings.values()]) for form in FORMS}
        for one, other in permutations(methods, 2)
    }


def better(differences: Mapping[str, tuple[float, float, float]]) -> bool:
    """Whether a method is better than another: the interval of the difference lies above 0 in all three forms."""
    return all(low > 0 for _, low, _ in differences.values())


def recommended(methods: Sequence[str], means: pd.Series, pairs: Mapping[tuple[str, str], Any]) -> tuple[str, list[str]]:
    """The method with the highest mean correlation per prompt among those that none is better than, and the others it cannot be told from."""
    unbeaten = [one for one in methods if not any(better(pairs[other, one]) for other in methods if other != one)]
    first = max(unbeaten, key=lambda name: (means[name], -methods.index(name)))
    return first, [name for name in methods if name != first and not better(pairs[first, name])]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def counts(kind: str, name: str, found: Mapping[tuple[str, str, str], Comparison]) -> str:
    """In how many of the tables (model, task, site) the paired interval against the base is above and below 0, in each form."""
    frames = [comparison.differences for comparison in found.values()]
    rows = pd.concat([frame[(frame["cells"] == "live") & (frame["other"] == BASE)] for frame in frames])
    rows = rows[rows["site"].isin(KINDS[kind]) & (rows["method"] == name)]
    return ", ".join(f"{(rows[f'{form}_lo'] > 0).sum()} / {(rows[f'{form}_hi'] < 0).sum()}" for form in FORMS) + f" of {len(rows)}"


def advice(kind: str, found: Mapping[tuple[str, str, str], Comparison], backwards: Mapping[str, int]) -> str:
    """The paragraph and the table for one kind of site."""
    settings = settings_of(found, kind)
    pairs = verdicts(settings)
    methods = [name for name in METHODS if any(name == one for one, _ in pairs)]
    over = {name: {form: over_settings([table.loc[name, form] for table in settings.values()]) for form in FORMS} for name in methods}
    means = pd.Series({name: over[name]["pearson_per_prompt"][0] for name in methods})
    single, several = ([name for name in methods if (backwards[name] == 1) is one] for one in (True, False))
    (cheap, alike), (dear, dear_alike) = recommended(single, means, pairs), recommended(several, means, pairs)
    sites = ", ".join(f"`{site}`" for site in KINDS[kind] if any(site in set(one.table["site"]) for one in found.values()))
    lines = [f"### {kind[0].upper()}{kind[1:]} ({sites})", ""]
    for words, name, others in (("One backward pass", cheap, alike), ("Several backward passes", dear, dear_alike)):
        beaten = [other for other in (single if name == cheap else several) if other not in (name, *others)]
        verdict = f"better than {_listed(beaten)}" if beaten else "better than none by the rule"
        rest = f"; no difference can be told from {_listed(others)}" if others else ""
        lines.append(f"- **{words}: `{name}`**, {verdict}{rest}.")
    if better(pairs[dear, cheap]):
        lines.append(f"- More passes pay: `{dear}` is better than `{cheap}`.")
    elif better(pairs[cheap, dear]):
        lines.append(f"- More passes do not pay: `{cheap}` is better than `{dear}`.")
    else:
        lines.append(f"- Whether more passes pay cannot be told: `{dear}` and `{cheap}` do not differ surely in all three forms.")
    rows = []
    for name in methods:
        values = [_number(over[name][form][0]) for form in FORMS]
        apart = ["–"] * 3 if name == BASE else [with_interval(*pairs[name, BASE][form], signed=True) for form in FORMS]
        verdict = "–" if name == BASE else "better" if better(pairs[name, BASE]) else "worse" if better(pairs[BASE, name]) else "cannot be told"
        rows.append([f"`{name}`", *values, *apart, verdict, "–" if name == BASE else counts(kind, name, found)])
    words = ("of means", "per prompt", "pooled")
    header = ["method", *words, *(f"− `{BASE}`, {what}" for what in words), f"than `{BASE}`", "tables: surely better / worse, of all"]
    return "\n".join([*lines, "", f"Means over {len(settings)} settings:", "", table(header, rows), ""])


# The page


def _number(value: float, signed: bool = False) -> str:
    return "–" if math.isnan(value) else f"{value:{'+' if signed else ''}.2f}".replace("-", "−")


def with_interval(value: float, low: float, high: float, *, signed: bool = False) -> str:
    """A number with its interval, if it has one: ``+0.17 [+0.02, +0.32]``."""
    return _number(value, signed) + ("" if math.isnan(low) else f" [{_number(low, signed)}, {_number(high, signed)}]")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _values(row: Mapping[str, Any], name: str, *, signed: bool = False) -> str:
    return with_interval(*(row[f"{name}{end}"] for end in ("", "_lo", "_hi")), signed=signed)


def tables(model: str, task: str, found: Mapping[tuple[str, str, str], Comparison]) -> str:
    """Everything measured on one model and task: agreement with intervals, and paired differences against the base method."""
    option = "".join(f" {value}" for value in TASKS[task].values())
    parts = [f"### {model}, {task}{option}", ""]
    rows, apart = [], []
    for run in RUNS:
        if (model, task, run) not in found:
            continue
        comparison = found[model, task, run]
        about = comparison.setting
        unit = f" {about['metric_unit']}" if about["metric_unit"] else ""
        gap = f"gap {about['gap']:.2f} [{about['gap_lo']:.2f}, {about['gap_hi']:.2f}]{unit}"
        parts.append(f"- {', '.join(RUNS[run][0])}: {about['n_examples']} pairs, {about['direction']}, {about['metric']}, {gap}")
        differences = comparison.differences[(comparison.differences["cells"] == "live") & (comparison.differences["other"] == BASE)]
        against = {(row["site"], row["method"]): row for row in differences.to_dict("records")}
        live = comparison.table[comparison.table["cells"] == "live"].to_dict("records")
        for row in sorted(live, key=lambda row: RUNS[run][0].index(row["site"])):
            quartiles = " ".join(_number(row[f"pearson_per_prompt_{name}"]) for name in ("q25", "q50", "q75"))
            undefined = [str(row["pearson_per_prompt_undefined"])]
            further = [_values(row, "spearman"), _values(row, "slope")]
            names = [f"`{row['site']}`", f"`{row['method']}`"]
            rows.append([*names, str(row["n_cells"]), *(_values(row, form) for form in FORMS), quartiles, *undefined, *further])
            if (difference := against.get((row["site"], row["method"]))) is not None:
                apart.append([*names, *(_values(difference, form, signed=True) for form in FORMS)])
    header = ["site", "method", "live cells", "of means", "per prompt", "pooled", "quartiles over prompts", "undefined prompts", "Spearman", "slope"]
    parts += ["", table(header, rows), "", f"Paired differences, method − `{BASE}`:", ""]
    return "\n".join([*parts, table(["site", "method", "of means", "per prompt", "pooled"], apart), ""])


def costs(found: Mapping[tuple[str, str, str], Comparison]) -> str:
    """Passes of a batch and seconds per method and run, summed over models and tasks."""
    frames = [comparison.costs.assign(run=run) for (_, _, run), comparison in found.items()]
    total = pd.concat(frames).groupby(["run", "method"], sort=False)[["forwards", "backwards", "positions", "seconds"]].sum()
    runs = [run for run in RUNS if run in total.index.get_level_values("run")]
    rows = []
    for name in ("exact", *METHODS):
        cells = []
        for run in runs:
            known = (run, name) in total.index
            one = total.loc[(run, name)] if known else None
            cells.append("not scored" if one is None else f"{one['forwards']:.0f} / {one['backwards']:.0f}, {one['seconds']:.1f} s")
        rows.append([f"`{name}`", *cells])
    return table(["method", *(f"{run} ({', '.join(RUNS[run][0])})" for run in runs)], rows)


INTRODUCTION = """# Results

Made by `python scripts/pages/make_results_page.py` (TIME); do not edit. How well the approximations agree with exact patching on the packaged models,
and what that says about which to use.

- Agreement is the Pearson correlation with exact patching over the **live** cells (those that could matter), in three forms: **of means**
  (example-mean maps), **per prompt** (of the effects on one prompt, over the cells live for it; the mean over prompts), **pooled** (of the effects
  on all prompts at once). They can rank methods differently: errors that cancel over prompts are invisible in the first.
- Brackets in the tables hold 95 % bootstrap intervals over examples. **Paired differences** use the same draws for both methods, so they can
  exclude 0 where the methods' own intervals overlap.
- Node sites are patched denoising, edges noising. HELD hold the attention pattern, score no edges into queries and keys, and are left out at edges.
- The packaged models are small and were trained on synthetic text: which method wins here need not win on a model trained on the web. The same tables
  for another model or task: `patchlab compare --model NAME --task NAME --methods exact,atp,ig:5,relp --out results`.

## Which method for what

The rule, the same for every kind of site: a setting is a model and a task. In each setting and form, the correlation of a method is averaged over the
sites of the kind; the difference between two methods is averaged over settings, with the 95 % interval of Student's t over settings (they are
few, so it is wide). **One method is better than another if that interval lies above 0 in all three forms**; else no difference can be told.
Recommended, separately for methods with one backward pass and with several, is the one with the highest mean correlation per prompt among
those that none is better than. It is a choice among methods that may well be equal where the line says that no difference can be told. Intervals
are of one pair of methods each, not corrected for the number of pairs. The last column counts tables (a model, a task, a site) where the paired
interval over prompts is above or below 0, in the three forms: what can be said of these models and tasks, not beyond them.

"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--n", type=int, default=32, help="pairs where nodes are scored")
    parser.add_argument("--few", type=int, default=16, help="pairs where neurons and edges are scored, of which there are many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    started, found = time.perf_counter(), {}
    for name in arguments.models:
        model = pl.load_model(name)
        for task in arguments.tasks:
            for run in RUNS:
                print(f"{name}, {task}, {run} ({time.perf_counter() - started:.0f} s)", flush=True)
                found[name, task, run] = measure(model, task, run, arguments.n if run == "nodes" else arguments.few, arguments.seed)
    first = next(iter(found.values())).costs
    backwards = {str(name): int(count) for name, count in zip(first["method"], first["backwards"], strict=True)}
    batches = min(count for name, count in backwards.items() if name != "exact")
    passes = {name: count // batches for name, count in backwards.items()}
    took = f"{(time.perf_counter() - started) / 60:.0f} minutes on {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    parts = [INTRODUCTION.replace("TIME", took).replace("HELD", _listed(HELD).replace(",", " and"))]
    parts += [advice(kind, found, passes) + "\n" for kind in KINDS]
    parts += ["## Cost\n\nForward / backward passes of a batch and seconds, summed over the settings.\n\n", costs(found), "\n\n## Tables\n\n"]
    parts += [tables(name, task, found) + "\n" for name in arguments.models for task in arguments.tasks]
    arguments.out.write_text("".join(parts).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
