"""Findings of a comparison, in sentences: who agrees best where, who fails, and which components matter most."""

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from patchlab.comparison.compare import Comparison
from patchlab.errors import ScoreError
from patchlab.scores import ScoreMap
from patchlab.sites import Site

FORMS = {"pearson_per_prompt": "per prompt", "pearson": "on the mean map"}
FAILS = 0.8
"""A method fails at a site where the whole interval of its correlation is below this."""
STRONGEST = 3


def findings(comparison: Comparison, exact: ScoreMap) -> list[str]:
    """Sentences on a comparison with exact patching, all from its tables.

    A method *agrees best* where the interval of its paired difference from every other method is above 0; else those that may lead *cannot be told
    apart*. Correlations are over live cells, with 95 % intervals.
    """
    return [*_leaders(comparison), _failures(comparison), *_strongest(exact)]


def _leaders(comparison: Comparison) -> Iterator[str]:
    table = comparison.table.query("cells == 'live'")
    for site, rows in table.groupby("site", sort=False):
        methods = {str(row["method"]): row for row in rows.to_dict("records")}
        first = {form: leading(comparison, str(site), form) for form in FORMS}
        said = [_verdict(names, len(methods)) for names in first.values()]
        values = [" and ".join(with_interval(methods[name], form) for name in names) for form, names in first.items()]
        if said[0] == said[1]:
            words = " and ".join(f"{value} {where}" for value, where in zip(values, FORMS.values(), strict=True) if value)
            yield f"{site}: {said[0]}{', r ' if words else ''}{words}."
        else:
            parts = zip(FORMS.values(), said, values, strict=True)
            yield f"{site}: {'; '.join(f'{where} {verdict}' + (f', r {value}' if value else '') for where, verdict, value in parts)}."


def _verdict(names: list[str], n_methods: int) -> str:
    if not names:
        return "no correlation is defined"
    if len(names) > 1:
        return f"{_listed(names)} cannot be told apart"
    return f"{names[0]} agrees best" if n_methods > 1 else f"{names[0]} is the only method"


def leading(comparison: Comparison, site: str, form: str) -> list[str]:
    """The methods that may agree best over live cells: the largest correlation, and those that cannot be told apart from it.

    In the order of the table; empty where none is defined.

    Args:
        comparison: of at least one method.
        site: one of its sites.
        form: ``pearson``, ``pearson_per_prompt`` or ``pearson_pooled``.
    """
    rows = comparison.table.query("cells == 'live' and site == @site")
    values = {str(name): float(value) for name, value in zip(rows["method"], rows[form], strict=True) if not math.isnan(value)}
    if not values:
        return []
    best = max(values, key=lambda name: values[name])
    return [name for name in values if name == best or not _behind(comparison, site, form, name, best)]


def _behind(comparison: Comparison, site: str, form: str, name: str, best: str) -> bool:
    """Whether the interval of the paired difference between the best and another excludes 0."""
    if comparison.differences.empty:
        return False
    rows = comparison.differences.query("cells == 'live' and site == @site")
    for row in rows.to_dict("records"):
        if (row["method"], row["other"]) == (best, name):
            return bool(row[f"{form}_lo"] > 0)
        if (row["method"], row["other"]) == (name, best):
            return bool(row[f"{form}_hi"] < 0)
    return False


def _failures(comparison: Comparison) -> str:
    """Methods whose correlation is surely low, by site."""
    found = []
    for row in comparison.table.query("cells == 'live'").to_dict("records"):
        short = [f"{where} {with_interval(row, form)}" for form, where in FORMS.items() if row[f"{form}_hi"] < FAILS]
        if short:
            found.append(f"{row['method']} at {row['site']} ({', '.join(short)})")
    limit = _number(FAILS)
    return f"Fails (r surely below {limit}): {'; '.join(found)}." if found else f"No method fails: no r is surely below {limit}."


def _strongest(exact: ScoreMap) -> Iterator[str]:
    """The components with the largest exact effects, by name."""
    names, means, shares = [], [], []
    kinds = {Site.parse(site).kind for site in exact.sites}
    wanted = {"edges", "z", "mlp_out"} | (set() if "z" in kinds else {"attn_out"})
    try:
        share = exact.normalised()
    except ScoreError:  # no gap to take a share of
        share = None
    for site in exact.sites:
        if Site.parse(site).kind not in wanted or site in exact.not_scored:
            continue
        mean = exact.mean(site).to_numpy()
        for cell in map(tuple, np.argwhere(exact.live[site].to_numpy()).tolist()):
            names.append((site, cell))
            means.append(float(mean[cell]))
    order = np.argsort(-np.abs(means), kind="stable")[:STRONGEST]
    for i in order.tolist():
        site, cell = names[i]
        if share is None:
            shares.append(f"{_component(exact, site, cell)} ({means[i]:+.2f})")
            continue
        low, value, high = (100 * float(part[site].to_numpy()[cell]) for part in (share.low, share.value, share.high))
        ci = f" [{low:.0f}, {high:.0f}]" if math.isfinite(low) else ""
        shares.append(f"{_component(exact, site, cell)} ({value:.0f}{ci} % of the gap)")
    if shares:
        yield f"Strongest components, by the exact effect of patching one alone: {'; '.join(shares)}."


def _component(exact: ScoreMap, site: str, cell: tuple[int, ...]) -> str:
    """The name of a cell as people say it: ``head L9.H6``, ``MLP m11 at END``."""
    parsed = Site.parse(site)
    at = dict(zip(parsed.axes, cell, strict=True))
    if parsed.kind == "edges":
        name = f"edge {exact.graph.name(*cell[:2])}"
    elif parsed.kind == "z":
        name = f"head L{at['layer']}.H{at['head']}" if "head" in at else f"heads of layer {at['layer']}"
    else:
        name = f"MLP m{at['layer']}" if parsed.kind == "mlp_out" else f"attention of layer {at['layer']}"
    if (pos := at.get("pos")) is None:
        return name
    label = str(exact.data["position"].to_numpy()[pos]) if "position" in exact.data.coords else ""
    return f"{name} at {label or f'position {pos}'}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def with_interval(row: Mapping[Hashable, Any] | Mapping[str, Any], form: str) -> str:
    """A statistic of a row of a comparison, with its interval."""
    low, high = row[f"{form}_lo"], row[f"{form}_hi"]
    return _number(row[form]) + ("" if math.isnan(low) else f" [{_number(low)}, {_number(high)}]")


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
