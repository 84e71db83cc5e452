"""Make docs/results.md: how well the approximations agree with exact patching on the packaged models, and which method that speaks for.

    patchlab sweep run examples/sweeps/methods.yaml --out out/methods
    python scripts/pages/make_results_page.py out/methods

Every number and every verdict of the page comes from the scores of that sweep; the rule that turns tables into recommendations is :func:`verdicts`.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
from compared import ROOT, Setting, number, over_settings, settings_of, table, with_interval

import patchlab as pl
from patchlab.comparison.compare import FORMS
from patchlab.sweeps import Sweep

BASE = "atp"
METHODS = (BASE, "relp", "relp-ah", "attnlrp", "cp-lrp", "gim", "clean-corrupted", "ig:5", "relp+ig:5")
HELD = ("relp-ah", "cp-lrp")
"""They hold the attention pattern, so they score no edges into queries and keys, and are left out where edges are compared."""
KINDS = {
    "residual stream": ("resid_pre",),
    "attention": ("attn_out", "z"),
    "MLP": ("mlp_out",),
    "neurons": ("mlp_post",),
    "edges": ("edges",),
}
SITES = [site for sites in KINDS.values() for site in sites]


# The rule


def tables_of(settings: Iterable[Setting], kind: str) -> dict[tuple[str, str], pd.DataFrame]:
    """Per model and task the correlations of each method (rows) in each form (columns), averaged over variants and over the sites of a kind."""
    tables: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for setting in settings:
        rows = setting.comparison.table
        rows = rows[(rows["cells"] == "live") & rows["site"].isin(KINDS[kind])]
        for _, group in rows.groupby("site", sort=False):
            tables.setdefault((setting.model, setting.task["name"]), []).append(group.set_index("method")[list(FORMS)])
    return {name: sum(parts[1:], parts[0]) / len(parts) for name, parts in tables.items()}


def verdicts(tables: Mapping[tuple[str, str], pd.DataFrame]) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
    """For every ordered pair of methods and each form, the mean difference over settings with its interval."""
    methods = next(iter(tables.values())).index
    return {
        (one, other): {form: over_settings([each.loc[one, form] - each.loc[other, form] for each in tables.values()]) for form in FORMS}
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


def counts(kind: str, name: str, settings: Iterable[Setting]) -> str:
    """In how many of the tables (model, task, variant, site) the paired interval against the base is above and below 0, in each form."""
    frames = [setting.comparison.differences for setting in settings]
    rows = pd.concat([frame[(frame["cells"] == "live") & (frame["other"] == BASE)] for frame in frames])
    rows = rows[rows["site"].isin(KINDS[kind]) & (rows["method"] == name)]
    return ", ".join(f"{(rows[f'{form}_lo'] > 0).sum()} / {(rows[f'{form}_hi'] < 0).sum()}" for form in FORMS) + f" of {len(rows)}"


def advice(kind: str, direction: str, settings: Sequence[Setting]) -> str:
    """The paragraph and the table for one kind of site and one direction; nothing where it was not scored."""
    chosen = [one for one in settings if one.direction == direction and set(one.sites) & set(KINDS[kind])]
    if not chosen:
        return ""
    tables, passes = tables_of(chosen, kind), passes_of(chosen)
    pairs = verdicts(tables)
    methods = [name for name in METHODS if any(name == one for one, _ in pairs)]
    over = {name: {form: over_settings([each.loc[name, form] for each in tables.values()]) for form in FORMS} for name in methods}
    means = pd.Series({name: over[name]["pearson_per_prompt"][0] for name in methods})
    single, several = ([name for name in methods if (passes[name] == 1) is one] for one in (True, False))
    lines = [f"### {kind[0].upper()}{kind[1:]} ({_listed(KINDS[kind])}), {direction}", ""]
    best = [(words, recommended(group, means, pairs), group) for words, group in (("One", single), ("Several", several)) if group]
    for words, (name, others), group in best:
        beaten = [other for other in group if other not in (name, *others)]
        verdict = f"better than {_listed(beaten)}" if beaten else "better than none by the rule"
        rest = f"; no difference can be told from {_listed(others)}" if others else ""
        lines.append(f"- **{words} backward pass{'es' if words == 'Several' else ''}: `{name}`**, {verdict}{rest}.")
    if len(best) == 2:
        (_, (cheap, _), _), (_, (dear, _), _) = best
        if better(pairs[dear, cheap]):
            lines.append(f"- More passes pay: `{dear}` is better than `{cheap}`.")
        elif better(pairs[cheap, dear]):
            lines.append(f"- More passes do not pay: `{cheap}` is better than `{dear}`.")
        else:
            lines.append(f"- Whether more passes pay cannot be told: `{dear}` and `{cheap}` do not differ surely in all three forms.")
    rows = []
    for name in methods:
        values = [number(over[name][form][0]) for form in FORMS]
        apart = ["–"] * 3 if name == BASE else [with_interval(*pairs[name, BASE][form], signed=True) for form in FORMS]
        verdict = "–" if name == BASE else "better" if better(pairs[name, BASE]) else "worse" if better(pairs[BASE, name]) else "cannot be told"
        rows.append([f"`{name}`", *values, *apart, verdict, "–" if name == BASE else counts(kind, name, chosen)])
    words = ("of means", "per prompt", "pooled")
    header = ["method", *words, *(f"− `{BASE}`, {what}" for what in words), f"than `{BASE}`", "tables: surely better / worse, of all"]
    return "\n".join([*lines, "", f"Means over {len(tables)} settings:", "", table(header, rows), ""])


def passes_of(settings: Sequence[Setting]) -> dict[str, int]:
    """Backward passes of a batch that each method takes."""
    total = pd.concat([one.comparison.costs for one in settings]).groupby("method")["backwards"].sum()
    batches = total[total > 0].min()
    return {str(name): int(count // batches) for name, count in total.items()}


# The page


def _values(row: Mapping[Any, Any], name: str, *, signed: bool = False) -> str:
    return with_interval(*(row[f"{name}{end}"] for end in ("", "_lo", "_hi")), signed=signed)


def tables(name: str, settings: Iterable[Setting]) -> str:
    """Everything measured in the settings of one name: agreement with intervals, and paired differences against the base method."""
    parts = [f"### {name}", ""]
    rows, apart = [], []
    for setting in settings:
        comparison = setting.comparison
        about = comparison.setting
        unit = f" {about['metric_unit']}" if about["metric_unit"] else ""
        gap = f"gap {about['gap']:.2f} [{about['gap_lo']:.2f}, {about['gap_hi']:.2f}]{unit}"
        parts.append(f"- {_listed(setting.sites)}: {about['n_examples']} pairs, {about['direction']}, {about['metric']}, {gap}")
        differences = comparison.differences[(comparison.differences["cells"] == "live") & (comparison.differences["other"] == BASE)]
        against = {(row["site"], row["method"]): row for row in differences.to_dict("records")}
        live = comparison.table[comparison.table["cells"] == "live"].to_dict("records")
        for row in sorted(live, key=lambda row: (SITES.index(row["site"]), METHODS.index(row["method"]))):
            quartiles = " ".join(number(row[f"pearson_per_prompt_{one}"]) for one in ("q25", "q50", "q75"))
            undefined = [str(row["pearson_per_prompt_undefined"])]
            further = [_values(row, "spearman"), _values(row, "slope")]
            names = [f"`{row['site']}`", f"`{row['method']}`"]
            rows.append([*names, str(row["n_cells"]), *(_values(row, form) for form in FORMS), quartiles, *undefined, *further])
            if (difference := against.get((row["site"], row["method"]))) is not None:
                apart.append([*names, *(_values(difference, form, signed=True) for form in FORMS)])
    header = ["site", "method", "live cells", "of means", "per prompt", "pooled", "quartiles over prompts", "undefined prompts", "Spearman", "slope"]
    parts += ["", table(header, rows), "", f"Paired differences, method − `{BASE}`:", ""]
    return "\n".join([*parts, table(["site", "method", "of means", "per prompt", "pooled"], apart), ""])


def costs(settings: Iterable[Setting]) -> str:
    """Passes of a batch and seconds per method and sites, summed over the settings."""
    frames = [one.comparison.costs.assign(sites=_listed(one.sites)) for one in settings]
    total = pd.concat(frames).groupby(["sites", "method"], sort=False)[["forwards", "backwards", "positions", "seconds"]].sum()
    runs = list(dict.fromkeys(total.index.get_level_values("sites")))
    rows = []
    for name in ("exact", *METHODS):
        found = [total.loc[(run, name)] if (run, name) in total.index else None for run in runs]
        cells = ["not scored" if one is None else f"{one['forwards']:.0f} / {one['backwards']:.0f}, {one['seconds']:.1f} s" for one in found]
        rows.append([f"`{name}`", *cells])
    return table(["method", *runs], rows)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


INTRODUCTION = """# Results

Made by `python scripts/pages/make_results_page.py` from a finished folder of `examples/sweeps/methods.yaml`; do not edit. How well the approximations
agree with exact patching on the packaged models, and what that says about which to use.

- Agreement is the Pearson correlation with exact patching over the **live** cells (those that could matter), in three forms: **of means**
  (example-mean maps), **per prompt** (of the effects on one prompt, over the cells live for it; the mean over prompts), **pooled** (of the effects
  on all prompts at once). They can rank methods differently: errors that cancel over prompts are invisible in the first.
- Brackets in the tables hold 95 % bootstrap intervals over examples. **Paired differences** use the same draws for both methods, so they can
  exclude 0 where the methods' own intervals overlap.
- PAIRS. All pairs count, whether the model solves them or not. HELD hold the attention pattern, score no edges into queries and keys, and are left
  out at edges.
- The packaged models are small and were trained on synthetic text: which method wins here need not win on a model trained on the web. The same tables
  for another model or task: `patchlab compare --model NAME --task NAME --methods exact,atp,ig:5,relp --out results`, or the sweep with its name.

## Which method for what

The rule, the same for every kind of site: a setting is a model and a task. In each setting and form, the correlation of a method is
averaged over the variants of the task and the sites of the kind; the difference between two methods is averaged over settings, with the 95
% interval of Student's t over settings (they are few, so it is wide). **One method is better than another if that interval lies above 0 in
all three forms**; else no difference can be told. Recommended, separately for methods with one backward pass and with several, is the one
with the highest mean correlation per prompt among those that none is better than. It is a choice among methods that may well be equal where
the line says that no difference can be told. Intervals are of one pair of methods each, not corrected for the number of pairs. The last
column counts tables (a model, a task, a variant, a site) where the paired interval over prompts is above or below 0, in the three forms:
what can be said of these models and tasks, not beyond them.

"""


def page(sweep: Sweep) -> str:
    """The whole page.

    Raises:
        SystemExit: a sweep with unfinished runs, or without comparisons.
    """
    settings = settings_of(sweep, whole=True)
    if not settings:
        raise SystemExit(f"{sweep!r} has no methods to compare with exact patching; give the folder of examples/sweeps/methods.yaml.")
    pairs = [f"{one.comparison.setting['n_examples']} where {_listed(one.sites)} {'are' if len(one.sites) > 1 else 'is'} scored" for one in settings]
    parts = [INTRODUCTION.replace("PAIRS", "Pairs: " + "; ".join(dict.fromkeys(pairs))).replace("HELD", _listed(HELD).replace(",", " and"))]
    directions = dict.fromkeys(one.direction for one in settings)
    parts += [text + "\n" for kind in KINDS for direction in directions if (text := advice(kind, direction, settings))]
    parts += ["## Cost\n\nForward / backward passes of a batch and seconds, summed over the settings.\n\n", costs(settings), "\n\n## Tables\n\n"]
    parts.append("Those of the settings in the README; [all settings](results/sweeps.md#methods) are among the studies.\n\n")
    named: dict[str, list[Setting]] = {}
    for one in settings:
        if one.shown_as and (one.direction == "denoising" or one.sites == ["edges"]):
            named.setdefault(one.shown_as, []).append(one)
    parts += [tables(name, some) + "\n" for name, some in named.items()]
    return "".join(parts).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the finished sweep examples/sweeps/methods.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    arguments.out.write_text(page(pl.sweeps.open(arguments.folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
