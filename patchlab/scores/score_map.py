"""ScoreMap: what a patching method found, one effect per example and cell, with named axes, provenance and cost."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from patchlab.errors import ScoreError, SiteError, unknown
from patchlab.graph import Graph
from patchlab.labelled import Variable, bare_coords, coords_of, in_double, read, variables_of, write
from patchlab.scores.addresses import address_of, located, selected
from patchlab.scores.arrays import (
    CellNames,
    Effects,
    Patterns,
    PositionLabels,
    Sparse,
    axes_of,
    cell_dim,
    check_finite,
    check_no_path,
    check_patterns,
    check_rows,
    check_shape,
    checksum,
    frozen,
    graph_of,
    label_of,
    name_coords,
    plain,
    position_coords,
    spread,
    upgraded,
    values_of,
)
from patchlab.scores.cost import Cost
from patchlab.sites import KINDS, POSITION_AXES, Site
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.store.files import writing

FORMAT = 3
_ATTRIBUTE = "patchlab_scoremap"
NO_PATH, SAME, NO_EDGE = "no path", "same in both prompts", "no edge"
"""Why a cell cannot matter."""
_BESIDE = ("patterns", "no_path", "noise", "standard_error")


@dataclass(frozen=True, eq=False)
class Normalised:
    """Mean effects as a share of the gap between clean and corrupted, each with a 95 % interval over examples.

    ``value``, ``low`` and ``high`` are Datasets like the map's, without the example axis (no unit: 1 is the whole gap);
    ``gap`` is mean m_clean − mean m_corrupted in metric units. With one example there are no intervals (NaN).
    """

    value: xr.Dataset
    low: xr.Dataset
    high: xr.Dataset
    gap: float
    gap_interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """The effect of patching each cell of some sites, per example, in metric units.

    A method makes it (through :meth:`build`); its arrays are read-only.

    Args:
        data: an xarray Dataset with one variable per site, named as the site is written (``"resid_pre"``,
            ``"z[layer,pos,head]"``), dims ``("example", *axes)``. A site that is NaN throughout was not scored;
            ``provenance["not_scored"]`` says why. Coordinates: ``example`` (index in the task), one integer index per
            axis, ``metric_clean`` and ``metric_corrupted`` per example, and the clean tokens as ``token(example, pos)``
            (``dest_token``, ``src_token``), and ``position(pos)`` where positions have names.
        live: bool, the same variables without the example axis; False marks a structural zero, a cell that cannot matter for any example.
        provenance: what made it: method, task, model, direction, metric, versions, notes; JSON-able.
        cost: what it cost.
        patterns: bool, the same variables with the axis ``mask`` instead of ``example``, and ``pattern_of(example)``: which cells can
            matter for which example (:meth:`live_per_example`); None in maps that do not know.
        no_path: bool, as ``live``; True where no causal path leads from the cell to what the metric reads. The other structural zeros are the same
            in both prompts (see :meth:`zeros`). None in files that do not say.
        noise: the rounding error to be expected of each effect in the model's dtype, in metric units, the same variables with the dims of
            ``data``, or ``example`` alone where all cells share it (see :mod:`patchlab.methods.setting.rounding`). NaN where it is unknown.
        standard_error: of effects that were estimated with random probes, in metric units, dims as ``data``; None for other methods.

    Example:
        >>> relp = pl.RelevancePatching().run(model, task, ["resid_pre", "z"])  # doctest: +SKIP
        >>> relp.mean("z").argmax(["layer", "head"])  # doctest: +SKIP
    """

    data: xr.Dataset
    live: xr.Dataset
    provenance: dict[str, Any]
    cost: Cost
    patterns: xr.Dataset | None = None
    no_path: xr.Dataset | None = None
    noise: xr.Dataset | None = None
    standard_error: xr.Dataset | None = None

    @staticmethod
    def build(
        scores: Mapping[str, Effects],
        live: Mapping[str, np.ndarray | None],
        *,
        task_axis: PositionLabels | None,
        examples: Sequence[int] | np.ndarray,
        metric_clean: Float[np.ndarray, " example"],
        metric_corrupted: Float[np.ndarray, " example"],
        provenance: Mapping[str, Any],
        cost: Cost,
        patterns: Patterns | None = None,
        no_path: Mapping[str, np.ndarray] | None = None,
        noise: Mapping[str, Effects] | None = None,
        standard_error: Mapping[str, Effects] | None = None,
        names: Mapping[str, CellNames] | None = None,
    ) -> "ScoreMap":
        """Check the arrays of a method's result and name their axes.

        Args:
            scores: per site the effects ``[example, *axes]`` in metric units, or those of some cells (:class:`patchlab.scores.arrays.Sparse`).
            live: per site a bool array ``[*axes]``; False = structural zero. None for sparse effects, whose cells all count as live.
            task_axis: names and tokens of the positions (rows are looked up by example index); None leaves them bare.
            examples: the task's index of each row; rows are put in that order.
            metric_clean: metric of the unpatched clean run.
            metric_corrupted: metric of the unpatched corrupted run.
            provenance: see the class.
            cost: see the class.
            patterns: which cells can matter for which example, where that differs between examples.
            no_path: per site a bool array ``[*axes]``; True = no causal path to what the metric reads, which no live cell is.
            noise: per site ``[example, *axes]`` or ``[example]``; see the class.
            standard_error: per site ``[example, *axes]``; see the class.
            names: per site the names of its cells, where they have any.

        Raises:
            ScoreError: shapes that do not fit together, values that are not finite in a scored site, a site that is NaN
                without a reason in ``provenance["not_scored"]``, or provenance that is not JSON.
        """
        record, names = plain(provenance), names or {}
        sparse = {name: values for name, values in scores.items() if isinstance(values, Sparse)}
        own_cells = {name: np.ones(len(values.index), dtype=bool) for name, values in sparse.items()}
        live = own_cells | {name: mask for name, mask in live.items() if mask is not None}
        no_path = None if no_path is None else {**no_path, **{name: ~mask for name, mask in own_cells.items()}}
        index = np.asarray(examples, dtype=np.int64)
        order = np.argsort(index, kind="stable")
        check_rows(values_of(scores), live, index, metric_clean, metric_corrupted)
        sizes: dict[str, int] = {"example": len(index)}
        variables: dict[str, Variable] = {}
        masks: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        paths: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        named: dict[str, Any] = {}
        if no_path is not None:
            check_no_path(no_path, live)
        for name, values in scores.items():
            axes, own = axes_of(name), names.get(name, CellNames())
            about = {"units": str(record.get("metric_unit", "")), **({"noun": own.noun, "names": own.joined} if own.noun else {})}
            if isinstance(values, Sparse):
                named |= {f"{name}.{axis}": (cell_dim(name), values.index[:, i].astype(np.int64)) for i, axis in enumerate(axes)}
                places = [] if task_axis is None else [axis for axis in axes if axis in POSITION_AXES]
                sizes |= {axis: sizes.get(axis, len(task_axis.tokens[0])) for axis in places if task_axis is not None}
                axes, values = (cell_dim(name),), values.effects
            check_shape(name, axes, values, live[name], sizes)
            check_finite(name, axes, values, record, own)
            named |= name_coords(name, axes, own, sizes)
            variables[name] = Variable(("example", *axes), values[order], about)
            masks[name] = (axes, live[name].astype(bool))
            if no_path is not None:
                paths[name] = (axes, no_path[name].astype(bool))
        coords: dict[str, Any] = {axis: np.arange(size) for axis, size in sizes.items()}
        coords["example"] = index[order]
        coords["metric_clean"] = ("example", metric_clean[order].astype(np.float64))
        coords["metric_corrupted"] = ("example", metric_corrupted[order].astype(np.float64))
        coords |= position_coords(task_axis, index[order], sizes) | named
        data = xr.Dataset(variables, coords=coords)
        bare = bare_coords(data, "example")
        patterns = patterns or Patterns(np.zeros(len(index), dtype=np.int64), {name: mask[None] for name, mask in live.items()})
        of_all = {name: np.ones((patterns.of.max() + 1, len(values.index)), dtype=bool) for name, values in sparse.items()}
        patterns = Patterns(patterns.of, {**patterns.cells, **of_all})
        check_patterns(patterns, live, len(index))
        rows = {name: (("mask", *masks[name][0]), cells.astype(bool)) for name, cells in patterns.cells.items()}
        of = xr.Dataset(rows, coords={"example": coords["example"], "pattern_of": ("example", patterns.of[order].astype(np.int64))})
        cut = None if no_path is None else frozen(xr.Dataset(paths, coords=bare))
        errors = [None if found is None else spread(data, values_of(found), order) for found in (noise, standard_error)]
        return ScoreMap(frozen(data), frozen(xr.Dataset(masks, coords=bare)), record, cost, frozen(of), cut, *errors)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, as they are written."""
        return tuple(str(name) for name in self.data.data_vars)

    @property
    def not_scored(self) -> dict[str, str]:
        """The sites that were not scored, with the reason."""
        return {site: why for site, why in self.provenance.get("not_scored", {}).items() if site in self.data.data_vars}

    def live_per_example(self, site: str | Site) -> Bool[np.ndarray, "example *axes"]:
        """The cells of a site that can matter for each example; where the map does not know, those that can for any.

        Raises:
            ScoreError: the map has no such site.
        """
        name = self.site_name(site)
        if self.patterns is None:
            return np.broadcast_to(self.live[name].to_numpy(), self.data[name].shape)
        return self.patterns[name].to_numpy()[self.patterns["pattern_of"].to_numpy()]

    @property
    def graph(self) -> Graph:
        """The graph whose edges are scored.

        Raises:
            ScoreError: a map without edges.
        """
        return graph_of(self.provenance)

    @property
    def subject(self) -> str:
        """Model and task with its number of examples: ``demo-gpt2 × ioi[32]``."""
        task = str(self.provenance.get("task", "?"))
        return f"{self.provenance.get('model', '?')} × {task}" + ("" if task.endswith("]") else f"[{self.data.sizes['example']}]")

    @property
    def gap(self) -> float:
        """Mean m_clean − mean m_corrupted, in metric units."""
        return float((self.data["metric_clean"] - self.data["metric_corrupted"]).mean())

    def gap_interval(self, *, n_boot: int = 1000, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the gap over examples (NaN with one example)."""
        low, high = interval(self._draws(n_boot, seed) @ (self.data["metric_clean"] - self.data["metric_corrupted"]).to_numpy())
        return float(low), float(high)

    def reversed_gap(self) -> str | None:
        """A warning where the gap is negative, so that the model does the opposite of what the task asks; else None."""
        if not self.gap < 0:
            return None
        clean, corrupted = (float(self.data[f"metric_{side}"].mean()) for side in ("clean", "corrupted"))
        low, high = self.gap_interval()
        ci = f", 95 % CI [{low:.3g}, {high:.3g}]" if np.isfinite(low) else ""
        unit = str(self.provenance.get("metric_unit", ""))
        return (
            f"the gap is negative: {self.provenance.get('metric', 'the metric')} is {clean:.3g} on the clean and {corrupted:.3g} on the corrupted "
            f"prompts (gap {f'{self.gap:.3g} {unit}'.rstrip()}{ci}), so the model does the opposite of what the task asks, and effects that restore "
            f"it are negative. Are correct and incorrect answers swapped, or clean and corrupted prompts? To patch the other way round, use "
            f"direction={'noising' if self.provenance.get('direction') == 'denoising' else 'denoising'!r}."
        )

    def sel(self, address: str | Site) -> xr.DataArray:
        """The effects of a cell per example, by its address: ``L9.H6.z@END``, ``a9.h6``, ``a0.h0->m3``, ``m3@END``; in metric units.

        Axes that the address leaves open stay: ``L9.z`` is the heads of layer 9, and the name of a site all of it. Of several sites of its kind
        the one with the fewest other axes is read, so ``L9.H6.z`` is the joint effect of a head at all positions where ``z`` was scored.

        Raises:
            ScoreError: the map has no such site, layer, head, position or edge.
            SiteError: a text that is no address.

        Example:
            >>> float(scores.sel("L9.H6.z").mean())  # doctest: +SKIP
        """
        site, numbers = located(self.data, self.provenance, address)
        return selected(self.data, site, numbers)

    def top(self, n: int = 10, site: str | Site | None = None, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The cells with the largest mean effects, by size, largest first.

        Args:
            n: how many; fewer where there are fewer live cells.
            site: of one site; None compares those of all.
            n_boot: bootstrap draws.
            seed: of the draws.

        Returns:
            Columns ``address`` (which :meth:`sel` reads), ``site``, ``effect`` (mean over examples, metric units), ``low`` and ``high`` (95 %
            bootstrap interval over examples of each cell alone; NaN with one example).

        Raises:
            ScoreError: ``n`` below 1, the map has no such site.
        """
        if n < 1:
            raise ScoreError(f"n is {n}; ask for at least 1 cell.")
        found: list[tuple[float, str, int]] = []
        for name in [self.site_name(site)] if site is not None else [one for one in self.sites if one not in self.not_scored]:
            mean = self.mean(name).to_numpy().ravel()
            ranked = np.flatnonzero((self.live[name] & self.scored(name)).to_numpy().ravel())
            ranked = ranked[np.argsort(-np.abs(mean[ranked]), kind="stable")][:n]
            found += [(float(mean[place]), name, int(place)) for place in ranked]
        found = sorted(found, key=lambda one: -abs(one[0]))[:n]
        weights = self._draws(n_boot, seed)
        rows: list[dict[str, Any]] = []
        for value, name, place in found:
            effects = self.data[name].to_numpy().reshape(self.data.sizes["example"], -1)[:, place].astype(np.float64)
            low, high = interval(weights @ effects)
            address = address_of(self.data, name, tuple(self.cells(name)[place].tolist()))
            rows.append({"address": address, "site": name, "effect": value, "low": float(low), "high": float(high)})
        return pd.DataFrame(rows, columns=["address", "site", "effect", "low", "high"])

    def mean(self, site: str | Site) -> xr.DataArray:
        """Mean effect over examples, dims = the site's axes, in metric units (NaN where the site was not scored).

        Raises:
            ScoreError: the map has no such site.
        """
        return in_double(self.data[self.site_name(site)]).mean("example", skipna=False, keep_attrs=True)

    def zeros(self, site: str | Site) -> xr.DataArray:
        """Why each cell of a site cannot matter, as text; "" where it can.

        ``"no path"``: no causal path leads from the cell to what the metric reads. ``"same in both prompts"``: wherever a path leads to the metric,
        what a patch would put there is what is there already, since nothing before it differs. ``"no edge"``: the writer is not computed before
        the reader. ``"structural zero"``: the map is from a file that does not say which.

        Raises:
            ScoreError: the map has no such site.
        """
        name = self.site_name(site)
        live = self.live[name]
        words = np.full(live.shape, "structural zero" if self.no_path is None else SAME, dtype=f"<U{len(SAME)}")
        if self.no_path is not None:
            words[self.no_path[name].to_numpy()] = NO_PATH
        words[~self.exists(name).to_numpy()] = f"no {self.data[name].attrs.get('noun', 'cell')}"
        words[live.to_numpy()] = ""
        return live.copy(data=words)

    def axes(self, site: str | Site) -> tuple[str, ...]:
        """The axes of a site's cells.

        Raises:
            ScoreError: the map has no such site.
        """
        return axes_of(self.site_name(site))

    def is_sparse(self, site: str | Site) -> bool:
        """Whether the map holds some cells of a site (in one row) rather than all."""
        return self.live[self.site_name(site)].dims == (cell_dim(self.site_name(site)),)

    def cells(self, site: str | Site) -> Int[np.ndarray, "cell axis"]:
        """The cells of a site, in the order of its flattened effects: their numbers along its axes."""
        name = self.site_name(site)
        if self.is_sparse(name):
            return np.stack([self.data[f"{name}.{axis}"].to_numpy() for axis in self.axes(name)], 1)
        return np.stack([part.ravel() for part in np.indices(self.live[name].shape)], 1)

    def layers(self, site: str | Site) -> Int[np.ndarray, " cell"]:
        """The layer of every cell of a site, flattened; 0 for sites without layers."""
        name = self.site_name(site)
        live, mask = self.live[name], f"layer_of_{self.data[name].attrs.get('noun', '')}"
        if mask in coords_of(live):
            return np.broadcast_to(live[mask].to_numpy().reshape(*live[mask].shape, *[1] * (live.ndim - live[mask].ndim)), live.shape).ravel()
        return self.cells(name)[:, self.axes(name).index("layer")] if "layer" in self.axes(name) else np.zeros(live.size, dtype=np.int64)

    def exists(self, site: str | Site) -> xr.DataArray:
        """The combinations of a site's axes that are cells, bool, dims = its axes."""
        live = self.live[self.site_name(site)]
        mask = f"is_{self.data[self.site_name(site)].attrs.get('noun', '')}"
        whole, own = live | ~live, coords_of(live).get(mask)
        return whole if own is None else whole & own.drop_vars(list(coords_of(own)))

    def scored(self, site: str | Site) -> xr.DataArray:
        """The cells of a site that have a score, bool, dims = its axes."""
        name = self.site_name(site)
        return xr.DataArray(np.isfinite(self.data[name])).all("example") & self.exists(name)

    def on_cells(self, site: str | Site, cells: Int[np.ndarray, "cell axis"]) -> "ScoreMap":
        """The map with the cells of a sparse site in another order, and with others, which have no effect.

        Raises:
            ScoreError: the map has no such site, or holds all of its cells; or one of those that it holds is left out.
        """
        name, dim = self.site_name(site), cell_dim(self.site_name(site))
        if not self.is_sparse(name):
            raise ScoreError(f"the map holds all cells of {name}; only maps of some cells can be put on others.")
        own = {tuple(cell): i for i, cell in enumerate(self.cells(name).tolist())}
        where = np.array([own.get(tuple(cell), -1) for cell in cells.tolist()], dtype=np.int64)
        if len(set(where[where >= 0].tolist())) < len(own):
            raise ScoreError(f"{len(own) - len(set(where[where >= 0].tolist()))} cells of {name} that the map holds are not among those given.")

        def moved(part: xr.Dataset | None, nothing: bool | float) -> xr.Dataset | None:
            if part is None or dim not in part.dims:
                return part
            variables = variables_of(part)
            for key, variable in variables.items():
                if dim in variable.dims:
                    at, values = variable.dims.index(dim), variable.data
                    values = np.concatenate([values, np.full_like(values.take([0], at), nothing)], at).take(where, at)
                    variables[key] = variable._replace(data=values)
            known = {dim: np.arange(len(cells)), **{f"{name}.{axis}": cells[:, i] for i, axis in enumerate(self.axes(name))}}
            variables |= {key: Variable((dim,), values, {}) for key, values in known.items() if key in variables}
            return frozen(xr.Dataset({k: variables[k] for k in part.data_vars}, coords={k: variables[k] for k in part.coords}))

        data, live = moved(self.data, 0.0), moved(self.live, True)
        beside = {key: moved(getattr(self, key), key == "patterns") for key in _BESIDE}
        return ScoreMap(data or self.data, live or self.live, self.provenance, self.cost, **beside)

    def noise_floor(self, site: str | Site) -> xr.DataArray:
        """The rounding error to be expected of each mean effect, dims = the site's axes, in metric units; NaN where it is unknown.

        Errors of examples are taken as independent: √Σ noise² / n.

        Raises:
            ScoreError: the map has no such site.
        """
        return self._of_mean(self.noise, site)

    def error_of_mean(self, site: str | Site) -> xr.DataArray:
        """The standard error of each mean effect over random probes (not over examples), as :meth:`noise_floor`.

        NaN where it is unknown, also throughout for methods without probes.
        """
        return self._of_mean(self.standard_error, site)

    def below_noise(self, site: str | Site) -> xr.DataArray:
        """The live cells whose mean effect is smaller than its noise floor, bool, dims = the site's axes."""
        return (abs(self.mean(site)) < self.noise_floor(site)) & self.live[self.site_name(site)]

    def _of_mean(self, errors: xr.Dataset | None, site: str | Site) -> xr.DataArray:
        name = self.site_name(site)
        if errors is None:
            return xr.full_like(self.mean(name), np.nan)
        squares = (in_double(errors[name]) ** 2).sum("example", skipna=False)
        whole = squares.broadcast_like(self.live[name]).transpose(*self.live[name].dims)
        return whole.copy(data=np.sqrt(whole.to_numpy()) / self.data.sizes["example"])

    def site_name(self, site: str | Site) -> str:
        """The name of a site in this map, however it was written; ``features`` is that of the only point whose features it scores.

        Raises:
            ScoreError: the map has no such site.
        """
        try:
            parsed = Site.parse(site)
            name = str(parsed)
            points = [str(replace(parsed, kind=kind)) for kind in KINDS[parsed.kind].points]
        except SiteError:
            name, points = str(site), []
        if len(own := [point for point in points if point in self.data.data_vars]) == 1:
            return own[0]
        if name not in self.data.data_vars:
            raise ScoreError(unknown("site of this score map", name, self.sites))
        return name

    def normalised(self, *, n_boot: int = 1000, seed: int = 0) -> Normalised:
        """Mean effect / (mean m_clean − mean m_corrupted): a ratio of batch means, bootstrapped jointly over examples.

        Never a mean of per-example ratios, which single examples with a small gap would dominate.

        Raises:
            ScoreError: the 95 % interval of the gap contains 0.
        """
        gaps = (self.data["metric_clean"] - self.data["metric_corrupted"]).to_numpy()
        low, high = self.gap_interval(n_boot=n_boot, seed=seed)
        if low <= 0 <= high or self.gap == 0:
            where = f"95 % CI [{low:.3g}, {high:.3g}]" if np.isfinite(low) else "one example, no CI"
            raise ScoreError(
                f"cannot normalise: the gap mean m_clean − mean m_corrupted is {self.gap:.3g} ({where}), not distinguishable from 0 "
                f"over {len(gaps)} examples. Use the effects as they are, more examples, or only pairs that the model solves (only_correct=True)."
            )
        weights = self._draws(n_boot, seed)
        bottom = (weights @ gaps)[:, None]
        parts: dict[str, dict[str, Any]] = {"value": {}, "low": {}, "high": {}}
        for site in self.sites:
            mean = self.mean(site)
            parts["value"][site] = mean / self.gap
            flat = self.data[site].to_numpy().reshape(len(gaps), -1).astype(np.float64)
            bounds = [interval(weights @ flat[:, part] / bottom) for part in _parts(flat.shape[1], len(weights))]
            for which, pieces in zip(("low", "high"), zip(*bounds, strict=True), strict=True):
                parts[which][site] = mean.copy(data=np.concatenate(pieces).reshape(mean.shape))
        datasets = {name: frozen(xr.Dataset(variables).drop_attrs()) for name, variables in parts.items()}
        return Normalised(**datasets, gap=self.gap, gap_interval=(low, high))

    def _draws(self, n_boot: int, seed: int) -> Float[np.ndarray, "draw example"]:
        n = self.data.sizes["example"]
        return resampling_weights(n, n_boot if n > 1 else 0, seed)

    def to_dataframe(self) -> pd.DataFrame:
        """A long table with one row per score.

        Columns: ``site``, ``example``, the axes that occur (``<NA>`` where a site lacks one), ``token`` and ``position``
        beside ``pos`` (``dest_token``, ... beside ``dest`` and ``src``), the name of the ``edge`` where edges are scored (pairs that
        are no edge are left out), ``zero`` (why a cell cannot matter, see :meth:`zeros`; "" where it can), ``effect`` in metric units, ``live``.
        """
        frames: list[pd.DataFrame] = []
        for site in self.sites:
            array = self.data[site]
            grid = dict(zip(array.dims, np.indices(array.shape), strict=True))
            columns: dict[str, Any] = {"site": np.full(array.size, site)}
            for dim, index in grid.items():
                if dim == cell_dim(site):
                    own = self.cells(site)[index.ravel()]
                    columns |= {axis: pd.array(own[:, i], dtype="Int64") for i, axis in enumerate(self.axes(site))}
                    continue
                columns[str(dim)] = pd.array(array[dim].to_numpy()[index].ravel(), dtype="Int64")
                for label in (label_of("token", str(dim)), label_of("position", str(dim))):
                    if dim in POSITION_AXES and label in coords_of(array):
                        coord = array[label]
                        columns[label] = coord.to_numpy()[tuple(grid[d] for d in coord.dims)].ravel()
            columns["zero"] = np.broadcast_to(self.zeros(site).to_numpy(), array.shape).ravel()
            columns["effect"] = array.to_numpy().ravel()
            columns["live"] = np.broadcast_to(self.live[site].to_numpy(), array.shape).ravel()
            frame = pd.DataFrame(columns)
            if noun := array.attrs.get("noun"):
                words = {axis: array[f"{axis}_name"].to_numpy()[frame[axis]] for axis in self.axes(site) if f"{axis}_name" in coords_of(array)}
                frame[noun] = [array.attrs["names"].format(**dict(zip(words, one, strict=True))) for one in zip(*words.values(), strict=True)]
                frame = frame[np.broadcast_to(self.exists(site).to_numpy(), array.shape).ravel()]
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        return table.reindex(columns=[*table.columns.drop(["zero", "effect", "live"]), "zero", "effect", "live"])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write one netCDF file (the effects; ``live``, ``patterns`` and errors as groups; the rest as JSON), whole or not at all.

        Raises:
            OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
        """
        beside = {name: part for name in _BESIDE if (part := getattr(self, name)) is not None}
        about = {"format": FORMAT, "provenance": self.provenance, "cost": asdict(self.cost), "beside": list(beside)}
        record = json.dumps({**about, "sha256": checksum(about, self.data, self.live, *beside.values())})
        with writing(path, overwrite=overwrite) as temporary:
            write(self.data.assign_attrs({_ATTRIBUTE: record}), temporary)
            for name, part in {"live": self.live, **beside}.items():
                write(part, temporary, group=name)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "ScoreMap":
        """Read a map that :meth:`save` wrote; equal to it in every value.

        Raises:
            ScoreError: no such file, a damaged one, one that is no score map, or one of a newer patchlab.
        """
        if not Path(path).is_file():
            raise ScoreError(f"there is no score map {path}. Give the path of a .nc file that ScoreMap.save wrote.")
        try:
            data, live = (read(path, group) for group in (None, "live"))
            record = json.loads(data.attrs.pop(_ATTRIBUTE))
            groups = [name for name in record.get("beside", ()) if name in _BESIDE]
            beside = {name: frozen(read(path, name)) for name in groups}
        except KeyError as error:
            raise ScoreError(f"{path} is not a patchlab score map: {error} is missing. Give a .nc file that ScoreMap.save wrote.") from error
        except Exception as error:  # a damaged file breaks its reader in many ways
            raise ScoreError(f"cannot read the score map {path}: {error}. It is damaged or not a score map; compute it again.") from error
        if record["format"] > FORMAT:
            raise ScoreError(f"{path} has the format {record['format']} and this patchlab reads up to {FORMAT}. Update patchlab.")
        written = record.pop("sha256", None)  # files of format 1 have none
        if written != checksum(record, data, live, *beside.values()) and (written is not None or record["format"] > 1):
            raise ScoreError(f"the score map {path} is damaged: its values do not have the checksum that was written with them. Compute it again.")
        data, live = upgraded(data, live, record)
        return ScoreMap(frozen(data), frozen(live), record["provenance"], Cost(**record["cost"]), **beside)

    def __repr__(self) -> str:
        about, skipped = self.provenance, self.not_scored
        sites: list[str] = []
        for site in self.sites:
            shape = ", ".join(f"{axis} {self.live.sizes[axis]}" for axis in self.live[site].dims)
            shape = f"{self.live[site].size} cells of {', '.join(self.axes(site))}" if self.is_sparse(site) else shape
            sites.append(f"{Site.parse(site).kind}[{shape}]" + (" (not scored)" if site in skipped else ""))
        head = ", ".join(str(about.get(key, "?")) for key in ("method", "direction", "metric"))
        check = about.get("self_check")
        what = "edges" if "graph" in about else "features, errors and rests"
        sums = f"; {what} add up to node scores within {max(check['mismatch']) / max(*check['largest_node_score'], 1e-300):.0e}" if check else ""
        notes = "".join(f"; note: {note}" for note in about.get("notes", ()))
        return f"ScoreMap({head}, {self.subject}) {' '.join(sites)}{sums}{self._doubts()}; {self.cost}{notes}"

    def _doubts(self) -> str:
        """How many cells are below the noise floor, and how many of a second-order map were patched."""
        known = {site: self.noise_floor(site).to_numpy() for site in self.sites if site not in self.not_scored}
        below = sum(int(self.below_noise(site).sum()) for site in known)
        cells = sum(int((self.live[site].to_numpy() & np.isfinite(floor)).sum()) for site, floor in known.items())
        text = f"; {below} of {cells} cells below the noise floor of {self.provenance.get('dtype', '?')}" if below else ""
        for site, counts in self.provenance.get("patched_exactly", {}).items():
            live = int(self.live[str(site)].sum()) * self.data.sizes["example"]
            above = sum(self.provenance.get("above_tolerance", {}).get(site, ()))
            text += f"; {site}: {sum(counts)} of {live} terms patched exactly, where probes would cost more" if sum(counts) else ""
            text += f"; {site}: {above} of {live} terms above the tolerance, where patching would have cost more than a sweep" if above else ""
        return text


def _parts(cells: int, draws: int, limit: int = 4_000_000) -> Iterator[slice]:
    """Cut the cells so that no [draw, cell] matrix has more than ``limit`` entries."""
    step = max(1, limit // max(1, draws))
    return (slice(start, start + step) for start in range(0, cells, step))
