"""Comparisons: agreement of approximations with a reference map (usually the exact one), with intervals over examples, and their cost."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from patchlab.comparison.alignment import check_alike, check_names, on_common_cells
from patchlab.errors import ScoreError, unknown
from patchlab.scores import ScoreMap
from patchlab.stats.agreement import (
    Moments,
    cells_for_recall,
    mean_of_defined,
    pearson,
    ranks,
    sign_agreement,
    slope,
    spearman_brown,
    split_half,
    topk_recall,
)
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.store.files import writing
from patchlab.tables import json_able, records, table
from patchlab.terminal import prose

FORMS = {"pearson": "Pearson of means", "pearson_per_prompt": "Pearson per prompt", "pearson_pooled": "Pearson pooled"}
"""Agreement in three forms: of example-mean maps, of each prompt's effects (mean over prompts), of all prompts' effects concatenated."""
STATISTICS = {
    **FORMS,
    "spearman": "Spearman",
    "slope": "slope",
    "sign_agreement": "sign agreement",
    "topk_recall": "top-k recall",
}
CELLS = {"live": "live cells", "all": "all cells, structural zeros included"}
QUARTILES = {"pearson_per_prompt_q25": 0.25, "pearson_per_prompt_q50": 0.5, "pearson_per_prompt_q75": 0.75}
TABLES = ("table", "costs", "reliability", "verified_recall", "differences")
SIGN_FLOOR = 0.01
TOP_SHARE = 10
SPLITS = 200
VERIFIED_TOP, VERIFIED_SHARE, RECALLS = 20, 20, (0.95, 1.0)
"""Verified recall: of the top 20 cells, or one live cell in 20 if that is fewer."""
_LIMIT = 4_000_000


@dataclass(frozen=True, eq=False)
class Comparison:
    """Agreement of approximations with a reference map.

    Args:
        table: one row per method, site and set of cells (``cells`` = ``all`` or ``live``, the latter without structural
            zeros): ``n_cells``, ``k``, ``below_noise`` (live cells whose mean effect is below its noise floor, here or in the reference; NaN
            where a map has none), and for each statistic ``x`` its value, ``x_lo`` and ``x_hi`` (95 % percentile
            bootstrap over examples). The Pearson correlation has three forms: ``pearson`` of example-mean maps;
            ``pearson_per_prompt``, the arithmetic mean over prompts of the correlation of a prompt's raw effects, over the cells that are
            live for that prompt (quartiles over prompts in ``_q25``, ``_q50``, ``_q75``; ``_undefined`` counts the prompts left out since
            one of their maps is constant); ``pearson_pooled`` of these effects of all prompts concatenated. The others are of example-mean
            maps: ``spearman``; ``slope`` of
            approximation = slope · exact; ``sign_agreement`` where |exact| exceeds 1 % of the gap; ``topk_recall`` of the k
            largest |effect|, k = max(1, 10 % of the live cells). An undefined statistic is NaN. Unsigned maps are held against
            |exact| and have no sign agreement.
        costs: per method (the reference first) forwards, backwards, positions, seconds and bytes.
        reliability: per site and set of cells of the reference, ``half_pearson`` (mean Pearson between the mean maps of
            two random halves of the examples) and ``reliability``, its Spearman–Brown value for all examples.
        setting: task, model, direction, metric, gap, draws: what was compared.
        notes: what was left out, and why.
        verified_recall: what it costs to verify the top cells with a method as the screen: per method and site ``n_cells``
            (live), ``k`` = min(20, 5 % of them), and how many cells in the screen's order, also as a share of the live ones, hold 95 %
            (``cells_95``, ``share_95``) and all (``cells_100``, ``share_100``) of the k largest exact |effects|.
        differences: one row per pair of methods, site and set of cells: the three forms of Pearson, ``method`` minus ``other``, with the
            intervals of the difference itself, since both see the same draws. Per prompt it is the mean over prompts where both are
            defined (``pearson_per_prompt_undefined`` counts the others). Intervals are of one pair each: among many pairs some exclude 0 by
            chance. A signed and an unsigned method have no row.
    """

    table: pd.DataFrame
    costs: pd.DataFrame
    reliability: pd.DataFrame
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()
    verified_recall: pd.DataFrame = field(default_factory=pd.DataFrame)
    differences: pd.DataFrame = field(default_factory=pd.DataFrame)

    def summary(self, cells: str = "live", *, width: int | None = None) -> str:
        """The comparison as text, one line per method and site; ``cells`` is ``live`` or ``all``.

        In a ``width`` of so many columns, columns that do not fit continue below the others; nothing is cut.

        Raises:
            ScoreError: another set of cells.
        """
        parts: list[str] = []
        for title, body in self._sections(_known(cells)):
            parts += [f"{title}:"] if title else []
            parts.append(table(body, width) if isinstance(body, pd.DataFrame) else "\n".join(prose(line, width) for line in body))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; NaN becomes None."""
        frames = {name: records(getattr(self, name)) for name in TABLES}
        return {"setting": json_able(self.setting), **frames, "notes": list(self.notes)}

    def to_json(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write :meth:`to_dict` as a JSON file.

        Raises:
            OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
        """
        with writing(path, overwrite=overwrite) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def to_csv(self, path: str | os.PathLike[str], *, what: str = "table", overwrite: bool = False) -> None:
        """Write :attr:`table` (or ``what`` else: ``differences``, ``costs``, ``reliability``, ``verified_recall``) as CSV, in full precision.

        Raises:
            OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
            ScoreError: there is no such table.
        """
        if what not in TABLES:
            raise ScoreError(unknown("table of a comparison", what, TABLES))
        with writing(path, overwrite=overwrite) as temporary:
            getattr(self, what).to_csv(temporary, index=False)

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        parts: list[str] = []
        for title, body in self._sections(*CELLS):
            parts += [f"<p><b>{_escaped(title)}</b></p>"] if title else []
            parts += [body.to_html(index=False)] if isinstance(body, pd.DataFrame) else [f"<p>{_escaped(line)}</p>" for line in body]
        return "".join(parts)

    def _sections(self, *sets: str) -> Iterator[tuple[str, pd.DataFrame | list[str]]]:
        """What is shown of some sets of cells, in order: tables under their titles, and lines, some of them under none."""
        yield "", [self._heading()]
        for cells in sets:
            for title, frame in self._readable(cells).items():
                yield title, frame
                if title.startswith("Agreement"):
                    yield "", [self._reliability_line(cells)]
        if len(self.verified_recall):
            yield "Cost of verified recall", self._readable_recall()
        yield "Cost", self.cost_sentences()
        for note in self.notes:
            yield "", [f"Note: {note}"]

    def _heading(self) -> str:
        about = self.setting
        gap = f"gap {about['gap']:.3g} {_bracket(about['gap_lo'], about['gap_hi'])} {about['metric_unit']}".rstrip()
        what = f"{about['subject']}, {about['direction']}, {about['metric']}, {gap}"
        return f"Reference {about['reference']}: {what}. Value [95 % CI over examples, {about['n_boot']} draws, seed {about['seed']}]."

    def _reliability_line(self, cells: str) -> str:
        rows = self.reliability[self.reliability["cells"] == cells]
        values = ", ".join(f"{site} {_number(value)}" for site, value in zip(rows["site"], rows["reliability"], strict=True))
        return f"Split-half reliability of {self.setting['reference']} (Spearman–Brown): {values}"

    def _readable(self, cells: str) -> dict[str, pd.DataFrame]:
        """The tables of one set of cells by their titles."""
        rows = _of_cells(self.table, cells)
        columns: dict[str, Any] = {"method": rows["method"], "site": rows["site"]}
        quartiles = zip(*(rows[name] for name in QUARTILES), strict=True)
        over = ["undefined" if math.isnan(values[0]) else " ".join(map(_number, values)) for values in quartiles]
        forms = {"n": rows["n_cells"], **_bracketed(rows, FORMS), "quartiles over prompts": over, **_undefined(rows)}
        others = _bracketed(rows, {name: title for name, title in STATISTICS.items() if name not in FORMS})
        titles = {
            f"Agreement over {CELLS[cells]}": pd.DataFrame(columns | forms),
            "Further statistics, of example-mean maps": pd.DataFrame(columns | others | {"k": rows["k"]}),
        }
        if len(self.differences):
            rows = _of_cells(self.differences, cells)
            pair = [f"{method} − {other}" for method, other in zip(rows["method"], rows["other"], strict=True)]
            paired = {"difference": pair, "site": rows["site"], **_bracketed(rows, FORMS, signed=True), **_undefined(rows)}
            titles["Paired differences between methods, over the same draws"] = pd.DataFrame(paired)
        return titles

    def _readable_recall(self) -> pd.DataFrame:
        rows = self.verified_recall
        columns: dict[str, Any] = {name: rows[name] for name in ("method", "site", "n_cells", "k")}
        for recall in RECALLS:
            cells, shares = (rows[f"{what}_{round(100 * recall)}"] for what in ("cells", "share"))
            columns[f"{100 * recall:.0f} % of the top k in"] = [f"{n} cells ({100 * share:.0f} %)" for n, share in zip(cells, shares, strict=True)]
        return pd.DataFrame(columns).rename(columns={"n_cells": "n"})

    def cost_sentences(self) -> list[str]:
        """The cost of each method, the reference first, in a sentence each; positions are rows × tokens that went through the model."""
        rows = self.costs.to_dict("records")
        return [_cost_sentence(row, rows[0] if row is not rows[0] else None) for row in rows]


def compare(reference: ScoreMap, methods: Mapping[str, ScoreMap], *, n_boot: int = 1000, seed: int = 0) -> Comparison:
    """Compare approximations with a reference on the same task, model, direction, metric, sites and examples.

    Args:
        reference: the map taken as the truth, usually of :class:`patchlab.ActivationPatching`.
        methods: the approximations by the name they shall have in tables and plots.
        n_boot: bootstrap draws of the examples; every method, site and statistic sees the same draws.
        seed: of the draws and of the random halves.

    Returns:
        A :class:`Comparison`. With one example the intervals and the reliability are NaN; where the 95 % interval of the
        gap contains 0, sign agreement is NaN (1 % of it would be an arbitrary floor). Notes say so.

    Raises:
        ScoreError: no methods, a bad or repeated name, maps that are not alike (the message names what differs),
            an unsigned reference, nothing scored in both, or n_boot < 1.

    Example:
        >>> comparison = pl.compare(exact, {"AtP": atp, "RelP": relp})  # doctest: +SKIP
        >>> comparison.table.query("cells == 'live'").pivot(index="site", columns="method", values="pearson")  # doctest: +SKIP
    """
    if n_boot < 1:
        raise ScoreError(f"n_boot is {n_boot}; it must be at least 1 (1000 is usual).")
    name_of_reference = str(reference.provenance.get("method", "reference"))
    check_names(name_of_reference, methods)
    if reference.provenance.get("unsigned"):
        raise ScoreError(
            f"the reference {name_of_reference} is unsigned, so nothing can be compared with its signs. Take a signed map, such as exact."
        )
    reference, *others = on_common_cells([reference, *methods.values()])
    methods = dict(zip(methods, others, strict=True))
    for name, other in methods.items():
        check_alike(name_of_reference, reference, name, other)
    n = reference.data.sizes["example"]
    weights = np.vstack([np.full((1, n), 1 / n), resampling_weights(n, n_boot if n > 1 else 0, seed)])
    gaps = weights @ (reference.data["metric_clean"] - reference.data["metric_corrupted"]).to_numpy()
    low, high = (float(bound) for bound in interval(gaps[1:]))
    certain = not (low <= 0 <= high or gaps[0] == 0)
    floor = SIGN_FLOOR * np.abs(gaps) if certain else np.full(len(gaps), np.nan)
    unsigned = {name for name, other in methods.items() if other.provenance.get("unsigned")}
    halves = np.argsort(np.random.default_rng([seed, 1]).random((SPLITS, n)), axis=1) < n // 2
    rows, reliability, recalls, differences = [], [], [], []
    for site in reference.sites:
        effects = _effects(reference, methods, site)
        if effects is None:
            continue
        live = np.asarray(effects.live.any(0))
        k = max(1, int(live.sum()) // TOP_SHARE)
        for cells, part in (("all", replace(effects, live=np.ones_like(effects.live))), ("live", effects.only(live))):
            if cells == "all" or not effects.live.all():  # without structural zeros the two sets are one
                draws = _draws(part, unsigned, weights, floor, k)
                stable = _reliability(part.exact, halves)
            about = {"site": site, "cells": cells}
            size = {"n_cells": part.exact.shape[1], "k": k}
            below = {name: _below_noise(reference, methods[name], site) for name in draws}
            rows += [{"method": name, **about, **size, "below_noise": below[name], **one.statistics()} for name, one in draws.items()]
            differences += [{**about, **one} for one in _differences(draws, unsigned, weights)]
            reliability.append({**about, "n_cells": part.exact.shape[1], **stable})
        exact, maps = part.exact, part.maps
        recalls += [{"method": name, "site": site, **_verified(exact, other)} for name, other in maps.items() if live.any()]
    if not rows:
        raise ScoreError(f"there is nothing to compare: no site is scored both by {name_of_reference} and by one of {', '.join(methods)}.")
    about = {key: reference.provenance.get(key, "") for key in ("task", "model", "direction", "metric", "metric_unit")}
    about |= {"subject": reference.subject, "reference": name_of_reference, "methods": list(methods), "n_examples": n, "n_boot": n_boot, "seed": seed}
    about |= {"gap": float(gaps[0]), "gap_lo": low, "gap_hi": high, "sign_floor": float(floor[0]), "splits": SPLITS}
    costs = [{"method": name, **asdict(scores.cost)} for name, scores in {name_of_reference: reference, **methods}.items()]
    return Comparison(
        _ordered(rows, methods),
        _costs_table(costs),
        pd.DataFrame(reliability),
        about,
        tuple(_notes(reference, name_of_reference, methods, n, certain)),
        _ordered(recalls, methods),
        _ordered(differences, methods),
    )


def _ordered(rows: list[dict[str, Any]], methods: Mapping[str, ScoreMap]) -> pd.DataFrame:
    """A table with its rows in the order of the methods."""
    order = {name: i for i, name in enumerate(methods)}
    names = [name for name in ("method", "other") if not rows or name in rows[0]]
    table = pd.DataFrame(rows, columns=None if rows else [*names, "site"])
    return table.sort_values(by=names, key=lambda column: column.map(order), kind="stable", ignore_index=True)


@dataclass(frozen=True)
class _Effects:
    """Raw effects at one site: of the reference, of each method, and which cells can matter for which example."""

    exact: Float[np.ndarray, "example cell"]
    maps: dict[str, Float[np.ndarray, "example cell"]]
    live: Bool[np.ndarray, "example cell"]

    def only(self, chosen: Bool[np.ndarray, " cell"]) -> "_Effects":
        """The effects at some of the cells."""
        return _Effects(self.exact[:, chosen], {name: other[:, chosen] for name, other in self.maps.items()}, self.live[:, chosen])


def _effects(reference: ScoreMap, methods: Mapping[str, ScoreMap], site: str) -> _Effects | None:
    """What is compared at a site; None if the reference or all others did not score it. Of edges, those that every map scores."""
    maps = {name: _cells(other, site) for name, other in methods.items() if site not in other.not_scored}
    if site in reference.not_scored or not maps:
        return None
    live = reference.live_per_example(site) & reference.live[site].to_numpy()
    effects = _Effects(_cells(reference, site), maps, live.reshape(len(live), -1))
    common = np.all([scores.scored(site).to_numpy() for scores in (reference, *methods.values()) if site not in scores.not_scored], axis=0)
    return effects if common.all() else effects.only(common.ravel())


def _cells(scores: ScoreMap, site: str) -> Float[np.ndarray, "example cell"]:
    values = scores.data[site].to_numpy().astype(np.float64)
    return values.reshape(len(values), -1)


@dataclass(frozen=True)
class _Draws:
    """Every statistic of one method at one site, of the examples as they are (draw 0) and of each resample; and each prompt's correlation."""

    found: dict[str, Float[np.ndarray, " draw"]]
    per_prompt: Float[np.ndarray, " example"]

    def statistics(self) -> dict[str, float | int]:
        """Columns of the table."""
        defined = self.per_prompt[~np.isnan(self.per_prompt)]
        quartiles = np.quantile(defined, list(QUARTILES.values())) if defined.size else np.full(len(QUARTILES), np.nan)
        columns: dict[str, float | int] = {}
        for name in STATISTICS:
            columns |= _with_interval(name, self.found[name])
            if name == "pearson_per_prompt":
                columns |= dict(zip(QUARTILES, map(float, quartiles), strict=True))
                columns[f"{name}_undefined"] = len(self.per_prompt) - len(defined)
        return columns


def _draws(
    effects: _Effects, unsigned: Set[str], weights: Float[np.ndarray, "draw example"], floor: Float[np.ndarray, " draw"], k: int
) -> dict[str, _Draws]:
    """Every statistic of each method, a few draws or a few prompts at a time."""
    n, cells = effects.exact.shape
    found = {name: {statistic: np.full(len(weights), np.nan) for statistic in STATISTICS} for name in effects.maps}
    for draws in _chunks(len(weights), cells):
        signed = weights[draws] @ effects.exact
        both = {False: (signed, ranks(signed)), True: (np.abs(signed), ranks(np.abs(signed)))}
        for name, approximation in effects.maps.items():
            mean, rank = both[name in unsigned]
            other = weights[draws] @ approximation
            found[name]["pearson"][draws] = pearson(mean, other)
            found[name]["spearman"][draws] = pearson(rank, ranks(other))
            found[name]["slope"][draws] = slope(mean, other)
            if name not in unsigned:
                found[name]["sign_agreement"][draws] = sign_agreement(mean, other, floor[draws])
            found[name]["topk_recall"][draws] = topk_recall(mean, other, k)
    per_prompt = {}
    for name, approximation in effects.maps.items():
        parts = [(effects.exact[part], approximation[part], effects.live[part]) for part in _chunks(n, max(1, cells))]
        moments = Moments.joined([Moments.of(np.abs(exact) if name in unsigned else exact, other, live) for exact, other, live in parts])
        per_prompt[name] = moments.per_prompt()
        found[name]["pearson_per_prompt"] = mean_of_defined(per_prompt[name], weights)
        found[name]["pearson_pooled"] = moments.pooled(weights)
    return {name: _Draws(found[name], per_prompt[name]) for name in effects.maps}


def _differences(draws: Mapping[str, _Draws], unsigned: Set[str], weights: Float[np.ndarray, "draw example"]) -> Iterator[dict[str, Any]]:
    """Per pair of methods the differences of the three forms; unsigned methods are held against something else than signed ones."""
    for (other, one), (method, two) in combinations(draws.items(), 2):
        if (method in unsigned) != (other in unsigned):
            continue
        apart = two.per_prompt - one.per_prompt
        row: dict[str, Any] = {"method": method, "other": other}
        for name in FORMS:
            difference = mean_of_defined(apart, weights) if name == "pearson_per_prompt" else two.found[name] - one.found[name]
            row |= _with_interval(name, difference)
        yield row | {"pearson_per_prompt_undefined": int(np.isnan(apart).sum())}


def _below_noise(reference: ScoreMap, other: ScoreMap, site: str) -> float:
    """Live cells whose mean effect is below its noise floor in one map or the other; NaN where one has no floor."""
    if any(bool(np.isnan(scores.noise_floor(site)).all()) for scores in (reference, other)):
        return math.nan
    return float((reference.below_noise(site) | other.below_noise(site)).sum())


def _verified(exact: Float[np.ndarray, "example cell"], screen: Float[np.ndarray, "example cell"]) -> dict[str, float | int]:
    """What it costs to find the top cells of the mean map in the screen's order."""
    cells = exact.shape[1]
    k = max(1, min(VERIFIED_TOP, cells // VERIFIED_SHARE))
    found: dict[str, float | int] = {"n_cells": cells, "k": k}
    for recall in RECALLS:
        count = cells_for_recall(exact.mean(0), screen.mean(0), k, recall)
        found |= {f"cells_{round(100 * recall)}": count, f"share_{round(100 * recall)}": count / cells}
    return found


def _with_interval(name: str, values: Float[np.ndarray, " draw"]) -> dict[str, float]:
    """A statistic's value (draw 0) and the interval over the others, as columns."""
    low, high = interval(values[1:])
    return {name: float(values[0]), f"{name}_lo": float(low), f"{name}_hi": float(high)}


def _chunks(rows: int, cells: int) -> Iterator[slice]:
    """Slices of the rows such that a [row, cell] matrix stays small; none where there are no cells."""
    step = max(1, _LIMIT // max(1, cells))
    return (slice(start, start + step) for start in (range(0, rows, step) if cells else ()))


def _reliability(exact: Float[np.ndarray, "example cell"], halves: np.ndarray) -> dict[str, float]:
    splits = [split_half(exact, halves[part]) for part in _chunks(len(halves), exact.shape[1])] if len(exact) > 1 else []
    values = np.concatenate([*splits, np.empty(0)])
    values = values[~np.isnan(values)]
    half = float(values.mean()) if values.size else math.nan
    return {"half_pearson": half, "reliability": spearman_brown(half)}


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def _notes(reference: ScoreMap, name_of_reference: str, methods: Mapping[str, ScoreMap], n: int, certain: bool) -> list[str]:
    notes = [_sentence(note) for note in dict.fromkeys(note for one in (reference, *methods.values()) for note in one.provenance.get("notes", ()))]
    for name, scores in {name_of_reference: reference, **methods}.items():
        by_reason: dict[str, list[str]] = {}
        for site, reason in scores.not_scored.items():
            by_reason.setdefault(reason, []).append(site)
        for kind, reason in scores.provenance.get("readers_not_scored", {}).items():
            by_reason.setdefault(reason, []).append(f"edges into <{kind}>")
        notes += [f"{name}: {', '.join(sites)} not scored and left out ({reason})." for reason, sites in by_reason.items()]
    for name, scores in methods.items():
        if scores.provenance.get("unsigned"):
            notes.append(f"{name}: its scores are unsigned; they are held against the size of the reference, and sign agreement is left undefined.")
    signed = [name for name, scores in methods.items() if not scores.provenance.get("unsigned")]
    if signed and len(signed) < len(methods):
        notes.append("Unsigned methods are held against something else than signed ones, so the two have no paired differences.")
    some = []
    for site in reference.sites:
        counts = {name: _below_noise(reference, scores, site) for name, scores in methods.items() if site in scores.sites}
        found = ", ".join(f"{int(count)} ({name})" for name, count in counts.items() if count > 0)
        some += [f"{found} of {int(reference.live[site].sum())} at {site}"] if found else []
    if some:
        dtypes = " and ".join(sorted({str(one.provenance.get("dtype", "?")) for one in (reference, *methods.values())}))
        notes.append(f"The mean effect of live cells, here or in the reference, is below the noise floor of {dtypes}: {'; '.join(some)}.")
    if reference.patterns is None and not all(bool(mask.all()) for mask in reference.live.values()):
        notes.append("The reference does not say which cells can matter for which prompt: those that can for any count for all.")
    if n == 1:
        notes.append("One example: there are no intervals and no reliability.")
    if (reversed_gap := reference.reversed_gap()) is not None:
        notes.append(f"{reversed_gap[0].upper()}{reversed_gap[1:]}")
    if not certain:
        notes.append("The gap between clean and corrupted is not distinguishable from 0, so sign agreement is left undefined.")
    return notes


def _cost_sentence(row: Mapping[Any, Any], reference: Mapping[Any, Any] | None) -> str:
    """``relp took 0.3 s: 2 forward and 1 backward passes of a batch, 480 positions. exact computed 31 times as many positions.``"""
    passes = f"{row['forwards']:,} forward and {row['backwards']:,} backward passes of a batch, {row['positions']:,} positions"
    text = f"{row['method']} took {row['seconds']:.2f} s: {passes}."
    if reference is not None and row["positions"]:
        times = reference["positions"] / row["positions"]
        text += f" {reference['method']} computed {times:,.{1 if times < 10 else 0}f} times as many positions."
    for name, what in (("predicted_bytes", "Its activations were predicted to need"), ("cuda_peak_bytes", "At most it used")):
        if pd.notna(row[name]):
            text += f" {what} {row[name] / 1e6:,.0f} MB{' of the GPU' if name == 'cuda_peak_bytes' else ''}."
    return text


def _costs_table(costs: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(costs).astype({"predicted_bytes": "Int64", "cuda_peak_bytes": "Int64"})


def _bracketed(rows: pd.DataFrame, statistics: Mapping[str, str], *, signed: bool = False) -> dict[str, list[str]]:
    """Columns of values with their intervals, by title."""
    return {
        title: [
            f"{_number(value, signed)} {_bracket(low, high, signed)}"
            for value, low, high in zip(rows[name], rows[f"{name}_lo"], rows[f"{name}_hi"], strict=True)
        ]
        for name, title in statistics.items()
    }


def _undefined(rows: pd.DataFrame) -> dict[str, list[int]]:
    """The number of prompts without a correlation, where there are any."""
    counts = [int(count) for count in rows["pearson_per_prompt_undefined"]]
    return {"undefined prompts": counts} if any(counts) else {}


def _of_cells(table: pd.DataFrame, cells: str) -> pd.DataFrame:
    return pd.DataFrame(table[table["cells"] == cells])


def _known(cells: str) -> str:
    if cells not in CELLS:
        raise ScoreError(unknown("set of cells", cells, CELLS))
    return cells


def _number(value: float, signed: bool = False) -> str:
    return "undefined" if math.isnan(value) else f"{value:{'+' if signed else ''}.2f}"


def _bracket(low: float, high: float, signed: bool = False) -> str:
    return "" if math.isnan(low) else f"[{_number(low, signed)}, {_number(high, signed)}]"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
