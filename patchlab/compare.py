"""How well approximations agree with a reference map (usually the exact one), with intervals over examples, and what they cost."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from patchlab.agreement import cells_for_recall, pearson, ranks, sign_agreement, slope, spearman_brown, split_half, topk_recall
from patchlab.alignment import check_alike, check_names
from patchlab.bootstrap import interval, resampling_weights
from patchlab.errors import ScoreError, unknown
from patchlab.output import writing
from patchlab.score_arrays import unscored_readers
from patchlab.scores import ScoreMap
from patchlab.sites import parse_site

STATISTICS = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "slope": "slope",
    "sign_agreement": "sign agreement",
    "topk_recall": "top-k recall",
}
CELLS = {"live": "live cells", "all": "all cells, structural zeros included"}
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
            zeros): ``n_cells``, ``k``, and for each statistic ``x`` its value, ``x_lo`` and ``x_hi`` (95 % percentile
            bootstrap over examples). Statistics, all on example-mean maps: ``pearson``; ``spearman``; ``slope`` of
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
    """

    table: pd.DataFrame
    costs: pd.DataFrame
    reliability: pd.DataFrame
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()
    verified_recall: pd.DataFrame = field(default_factory=pd.DataFrame)

    def summary(self, cells: str = "live") -> str:
        """The comparison as text, one line per method and site; ``cells`` is ``live`` or ``all``.

        Raises:
            ScoreError: another set of cells.
        """
        parts = [self._heading(), f"Agreement over {CELLS[_known(cells)]}:", _text(self._readable(cells)), self._reliability_line(cells)]
        parts += ["Cost of verified recall:", _text(self._readable_recall())] if len(self.verified_recall) else []
        parts += ["Cost:", _text(self._readable_costs()), *(f"Note: {note}" for note in self.notes)]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; NaN becomes None."""
        frames = {name: _records(getattr(self, name)) for name in ("table", "costs", "reliability", "verified_recall")}
        return {"setting": _json_able(self.setting), **frames, "notes": list(self.notes)}

    def to_json(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write :meth:`to_dict` as a JSON file.

        Raises:
            OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
        """
        with writing(path, overwrite=overwrite) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def to_csv(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write :attr:`table` as a CSV file, in full precision.

        Raises:
            OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
        """
        with writing(path, overwrite=overwrite) as temporary:
            self.table.to_csv(temporary, index=False)

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        parts = [f"<p>{_escaped(self._heading())}</p>"]
        for cells, what in CELLS.items():
            parts += [f"<p><b>Agreement over {what}</b></p>", self._readable(cells).to_html(index=False)]
            parts += [f"<p>{_escaped(self._reliability_line(cells))}</p>"]
        if len(self.verified_recall):
            parts += ["<p><b>Cost of verified recall</b></p>", self._readable_recall().to_html(index=False)]
        parts += ["<p><b>Cost</b></p>", self._readable_costs().to_html(index=False)]
        return "".join([*parts, *(f"<p>Note: {_escaped(note)}</p>" for note in self.notes)])

    def _heading(self) -> str:
        about = self.setting
        gap = f"gap {about['gap']:.3g} {_bracket(about['gap_lo'], about['gap_hi'])} {about['metric_unit']}".rstrip()
        what = f"{about['subject']}, {about['direction']}, {about['metric']}, {gap}"
        return f"Reference {about['reference']}: {what}. Value [95 % CI over examples, {about['n_boot']} draws, seed {about['seed']}]."

    def _reliability_line(self, cells: str) -> str:
        rows = self.reliability[self.reliability["cells"] == cells]
        values = ", ".join(f"{site} {_number(value)}" for site, value in zip(rows["site"], rows["reliability"], strict=True))
        return f"Split-half reliability of {self.setting['reference']} (Spearman–Brown): {values}"

    def _readable(self, cells: str) -> pd.DataFrame:
        rows = self.table[self.table["cells"] == cells]
        columns: dict[str, Any] = {"method": rows["method"], "site": rows["site"], "n": rows["n_cells"]}
        for name, title in STATISTICS.items():
            bounds = zip(rows[name], rows[f"{name}_lo"], rows[f"{name}_hi"], strict=True)
            columns[title] = [f"{_number(value)} {_bracket(low, high)}" for value, low, high in bounds]
        return pd.DataFrame(columns | {"k": rows["k"]})

    def _readable_recall(self) -> pd.DataFrame:
        rows = self.verified_recall
        columns: dict[str, Any] = {name: rows[name] for name in ("method", "site", "n_cells", "k")}
        for recall in RECALLS:
            cells, shares = (rows[f"{what}_{round(100 * recall)}"] for what in ("cells", "share"))
            columns[f"{100 * recall:.0f} % of the top k in"] = [f"{n} cells ({100 * share:.0f} %)" for n, share in zip(cells, shares, strict=True)]
        return pd.DataFrame(columns).rename(columns={"n_cells": "n"})

    def _readable_costs(self) -> pd.DataFrame:
        costs = self.costs.dropna(axis="columns", how="all").copy()
        return costs.assign(seconds=[f"{value:.2f}" for value in costs["seconds"]])


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
    for name, other in methods.items():
        check_alike(name_of_reference, reference, name, other)
    n = reference.data.sizes["example"]
    weights = np.vstack([np.full((1, n), 1 / n), resampling_weights(n, n_boot if n > 1 else 0, seed)])
    gaps = weights @ (reference.data["metric_clean"] - reference.data["metric_corrupted"]).to_numpy()
    low, high = (float(bound) for bound in interval(gaps[1:]))
    certain = not (low <= 0 <= high or gaps[0] == 0)
    floor = SIGN_FLOOR * np.abs(gaps) if certain else np.full(len(gaps), np.nan)
    notes, rows, reliability, recalls = _notes(reference, name_of_reference, methods, n, certain), [], [], []
    unsigned = {name for name, other in methods.items() if other.provenance.get("unsigned")}
    halves = np.argsort(np.random.default_rng([seed, 1]).random((SPLITS, n)), axis=1) < n // 2
    for site in reference.sites:
        maps = {name: _cells(other, site) for name, other in methods.items() if site not in other.not_scored}
        if site in reference.not_scored or not maps:
            continue
        exact, live = _cells(reference, site), reference.live[site].to_numpy().ravel()
        if parse_site(site).kind == "edges":
            common = _common_edges(reference, methods, site)
            exact, live, maps = exact[:, common], live[common], {name: other[:, common] for name, other in maps.items()}
        k = max(1, int(live.sum()) // TOP_SHARE)
        for cells, chosen in (("all", np.ones_like(live)), ("live", live)):
            if cells == "all" or not live.all():  # without structural zeros the two sets are one
                values = _statistics(exact[:, chosen], {name: other[:, chosen] for name, other in maps.items()}, unsigned, weights, floor, k)
                stable = _reliability(exact[:, chosen], halves)
            about = {"site": site, "cells": cells, "n_cells": int(chosen.sum())}
            rows += [{"method": name, **about, "k": k, **statistics} for name, statistics in values.items()]
            reliability.append({**about, **stable})
        recalls += [{"method": name, "site": site, **_verified(exact[:, live], other[:, live])} for name, other in maps.items() if live.any()]
    if not rows:
        raise ScoreError(f"there is nothing to compare: no site is scored both by {name_of_reference} and by one of {', '.join(methods)}.")
    about = {key: reference.provenance.get(key, "") for key in ("task", "model", "direction", "metric", "metric_unit")}
    about |= {"subject": reference.subject, "reference": name_of_reference, "methods": list(methods), "n_examples": n, "n_boot": n_boot, "seed": seed}
    about |= {"gap": float(gaps[0]), "gap_lo": low, "gap_hi": high, "sign_floor": float(floor[0]), "splits": SPLITS}
    order = {name: i for i, name in enumerate(methods)}
    table, recall = (
        pd.DataFrame(part, columns=None if part else ["method", "site"]).sort_values(
            by="method", key=lambda column: column.map(order), kind="stable", ignore_index=True
        )
        for part in (rows, recalls)
    )
    costs = [{"method": name, **asdict(scores.cost)} for name, scores in {name_of_reference: reference, **methods}.items()]
    return Comparison(table, _costs_table(costs), pd.DataFrame(reliability), about, tuple(notes), recall)


def _common_edges(reference: ScoreMap, methods: Mapping[str, ScoreMap], site: str) -> Bool[np.ndarray, " cell"]:
    """Cells that are edges, and that every map scores."""
    values = reference.data[site]
    common = np.broadcast_to(reference.graph.allowed.reshape(*reference.graph.allowed.shape, *[1] * (values.ndim - 3)), values.shape[1:]).copy()
    for scores in (reference, *methods.values()):
        if site not in scores.not_scored:
            common[:, unscored_readers(scores.provenance)] = False
    return common.ravel()


def _cells(scores: ScoreMap, site: str) -> Float[np.ndarray, "example cell"]:
    values = scores.data[site].to_numpy().astype(np.float64)
    return values.reshape(len(values), -1)


def _statistics(
    exact: Float[np.ndarray, "example cell"],
    maps: Mapping[str, Float[np.ndarray, "example cell"]],
    unsigned: Set[str],
    weights: Float[np.ndarray, "draw example"],
    floor: Float[np.ndarray, " draw"],
    k: int,
) -> dict[str, dict[str, float]]:
    """Per method every statistic with its interval; row 0 of the weights is the estimate, the others are the draws."""
    results = {name: np.full((len(STATISTICS), len(weights)), np.nan) for name in maps}
    for draws in _chunks(len(weights), exact.shape[1]):
        signed = weights[draws] @ exact
        both = {False: (signed, ranks(signed)), True: (np.abs(signed), ranks(np.abs(signed)))}
        for name, approximation in maps.items():
            mean, rank = both[name in unsigned]
            other = weights[draws] @ approximation
            results[name][:, draws] = (
                pearson(mean, other),
                pearson(rank, ranks(other)),
                slope(mean, other),
                np.full(len(mean), np.nan) if name in unsigned else sign_agreement(mean, other, floor[draws]),
                topk_recall(mean, other, k),
            )
    return {name: _with_intervals(values) for name, values in results.items()}


def _verified(exact: Float[np.ndarray, "example cell"], screen: Float[np.ndarray, "example cell"]) -> dict[str, float | int]:
    """What it costs to find the top cells of the mean map in the screen's order."""
    cells = exact.shape[1]
    k = max(1, min(VERIFIED_TOP, cells // VERIFIED_SHARE))
    found: dict[str, float | int] = {"n_cells": cells, "k": k}
    for recall in RECALLS:
        count = cells_for_recall(exact.mean(0), screen.mean(0), k, recall)
        found |= {f"cells_{round(100 * recall)}": count, f"share_{round(100 * recall)}": count / cells}
    return found


def _with_intervals(values: Float[np.ndarray, "statistic draw"]) -> dict[str, float]:
    low, high = interval(values[:, 1:].T)
    columns = {}
    for i, name in enumerate(STATISTICS):
        columns |= {name: float(values[i, 0]), f"{name}_lo": float(low[i]), f"{name}_hi": float(high[i])}
    return columns


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


def _notes(reference: ScoreMap, name_of_reference: str, methods: Mapping[str, ScoreMap], n: int, certain: bool) -> list[str]:
    notes = []
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
    if n == 1:
        notes.append("One example: there are no intervals and no reliability.")
    if not certain:
        notes.append("The gap between clean and corrupted is not distinguishable from 0, so sign agreement is left undefined.")
    return notes


def _costs_table(costs: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(costs).astype({"predicted_bytes": "Int64", "cuda_peak_bytes": "Int64"})


def _known(cells: str) -> str:
    if cells not in CELLS:
        raise ScoreError(unknown("set of cells", cells, CELLS))
    return cells


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.2f}"


def _bracket(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"[{low:.2f}, {high:.2f}]"


def _text(frame: pd.DataFrame) -> str:
    """The frame in columns: names to the left, numbers to the right."""
    texts = frame.astype(object).where(frame.notna(), "-").astype(str)
    widths = {name: max(len(name), int(texts[name].str.len().max())) for name in texts}
    numeric = {name: all(part.isdigit() for part in texts[name]) for name in texts}
    rows = [dict(zip(texts, texts, strict=True)), *texts.to_dict("records")]
    lines = ("  ".join(row[name].rjust(widths[name]) if numeric[name] else row[name].ljust(widths[name]) for name in texts) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _json_able(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    frame = frame.astype(object)
    return [_json_able(row) for row in frame.where(frame.notna(), None).to_dict("records")]
