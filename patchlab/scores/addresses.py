"""Addresses of cells in score maps: ``L9.H6.z@END``, ``a9.h6``, ``a0.h0->m3``."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from patchlab.errors import ScoreError, unknown
from patchlab.labelled import coords_of
from patchlab.scores.arrays import axes_of, cell_dim, graph_of, label_of
from patchlab.sites import KINDS, POSITION_AXES, Position, Site


def located(data: xr.Dataset, provenance: Mapping[str, Any], text: str | Site) -> tuple[str, dict[str, int]]:
    """The site of a map that holds what an address names, and the numbers along the axes that the address narrows.

    Of several sites that do, the one with the fewest other axes: ``L9.H6.z`` is a cell of ``z``, and a row of ``z[layer,pos,head]`` where there is no
    ``z``. The name of a site narrows nothing.

    Raises:
        ScoreError: the map has no site with these axes, or no such layer, head, position or edge.
        SiteError: a text that is no address, or no edge.
    """
    sites = [str(name) for name in data.data_vars]
    for site in sites:
        axes = axes_of(site)
        if len(axes) == 1 and f"{axes[0]}_name" in coords_of(data[site]) and text in data[f"{axes[0]}_name"].to_numpy():
            return site, {axes[0]: data[f"{axes[0]}_name"].to_numpy().tolist().index(text)}
    edge = isinstance(text, str) and "->" in text
    if not edge and not (parsed := Site.parse(text)).narrowed:
        if str(parsed) not in sites:
            raise ScoreError(unknown("site of this score map", str(parsed), sites))
        return str(parsed), {}
    kind, wanted = _edge(data, provenance, str(text)) if edge else _node(Site.parse(text))
    fitting = [site for site in sites if Site.parse(site).kind == kind and set(wanted) <= set(axes_of(site))]
    if not fitting:
        raise ScoreError(f"{text} needs a site {kind} with the axes {', '.join(wanted)}; this map has {', '.join(sites)}. Score it first.")
    site = min(fitting, key=lambda name: len(axes_of(name)))
    return site, {axis: _number(data, site, axis, value, text) for axis, value in wanted.items()}


def _edge(data: xr.Dataset, provenance: Mapping[str, Any], text: str) -> tuple[str, dict[str, Any]]:
    name, _, where = text.replace(" ", "").partition("@")
    if "graph" not in provenance:
        raise ScoreError(f"{text} is an edge, and the map scores none; it has {', '.join(map(str, data.data_vars))}.")
    writer, reader = graph_of(provenance).edge(name)
    pos, _, src = where.partition("<")
    found: dict[str, Any] = {"writer": writer, "reader": reader}
    found |= {"dest" if src else "pos": _position(pos)} if pos else {}
    return "edges", found | ({"src": _position(src)} if src else {})


def _node(site: Site) -> tuple[str, dict[str, Any]]:
    about = KINDS[site.kind]
    found: dict[str, Any] = {} if site.layer is None else {"layer": site.layer}
    found |= {} if site.index is None or about.unit is None else {about.unit: site.index}
    for axis, positions in ((about.position, site.pos), (about.source, site.src)):
        if axis is not None and positions is not None:
            found[axis], *others = positions
            if others:
                raise ScoreError(f"{site} names {len(positions)} positions, and a cell is at one; name one of {', '.join(map(str, positions))}.")
    return site.kind, found


def _position(text: str) -> Position:
    return int(text) if text.lstrip("-").isdigit() else text


def _number(data: xr.Dataset, site: str, axis: str, value: Position, text: str | Site) -> int:
    """The number along an axis; of a position its number or its name."""
    names = _names(data, axis)
    if isinstance(value, str):
        if value not in names:
            named = [name for name in names if name]
            raise ScoreError(
                unknown(f"position of {text}", value, named) if named else f"{text}: no position of this map has a name; give its number."
            )
        return names.index(value)
    if _is_named(names):
        raise ScoreError(f"{text}: the positions of this map are those with names; write {names[0]!r} or another of {', '.join(names)}.")
    size = data.sizes.get(axis)
    if value < 0 or (size is not None and value >= size):
        last = "" if size is None else f" 0 to {size - 1}"
        raise ScoreError(f"{text}: there is no {axis} {value} in {site}; it has{last}.")
    return int(value)


def selected(data: xr.Dataset, site: str, numbers: Mapping[str, int]) -> xr.DataArray:
    """The effects of a site at some numbers along its axes; of a site that holds some cells, at those cells.

    Raises:
        ScoreError: none of the cells that the map holds is there.
    """
    array = data[site]
    if cell_dim(site) not in array.dims:
        return array.isel(dict(numbers))
    hit = np.ones(array.sizes[cell_dim(site)], dtype=bool)
    for axis, number in numbers.items():
        hit &= array[f"{site}.{axis}"].to_numpy() == number
    if not hit.any():
        raise ScoreError(f"no cell of {site} that this map holds is at {', '.join(f'{axis} {number}' for axis, number in numbers.items())}.")
    found = array.isel({cell_dim(site): np.flatnonzero(hit)})
    return found.isel({cell_dim(site): 0}) if set(numbers) == set(axes_of(site)) else found


def address_of(data: xr.Dataset, site: str, cell: tuple[int, ...]) -> str:
    """The address of a cell, with which :func:`located` finds it again."""
    parsed = Site.parse(site)
    about, at = KINDS[parsed.kind], dict(zip(axes_of(site), cell, strict=True))
    where = {axis: _label(data, axis, at[axis]) for axis in POSITION_AXES if axis in at}
    if joined := data[site].attrs.get("names"):
        words = {axis: data[f"{axis}_name"].to_numpy()[number] for axis, number in at.items() if axis not in where}
        return joined.format(**words) + (f"@{'<'.join(map(str, where.values()))}" if where else "")
    pos, src = ((where[axis],) if axis is not None and axis in where else None for axis in (about.position, about.source))
    return str(Site(parsed.kind, (), layer=at.get("layer"), index=None if about.unit is None else at.get(about.unit), pos=pos, src=src))


def _names(data: xr.Dataset, axis: str) -> list[str]:
    """The names of the positions along an axis, "" where one has none; empty if none has."""
    label = label_of("position", axis)
    return data[label].to_numpy().tolist() if axis in POSITION_AXES and label in data.coords else []


def _label(data: xr.Dataset, axis: str, number: int) -> Position:
    """The name of a position where all have one, else its number."""
    names = _names(data, axis)
    return names[number] if _is_named(names) else number


def _is_named(names: list[str]) -> bool:
    """Whether the positions of an axis are told by their names: each has one of its own."""
    return bool(names) and all(names) and len(set(names)) == len(names)
