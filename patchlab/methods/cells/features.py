"""Features of dictionaries, and what dictionaries leave out, as cells.

*Scores.* A feature's effect is estimated as its change between the runs times the gradient (or relevance coefficient) along its row of the decoder,
at the activation that the dictionary reconstructs; so it has one whether or not the feature is active in the baseline. The error's effect is the
change of the whole error vector times the gradient, one number per position. Gradients reach earlier layers as if nothing were spliced in.
Features, error and rest (biases, a skip, what a row's normalisation adds) together are the node score of the site under the same coefficients.

*Exact effects.* The activation is moved by the change of the feature times its row, or by that of the error: the features of the
other run, everything else as it is.

*Paths.* Over activations, the whole activation of one layer moves from its baseline to what the source's features and error give, as in Marks et al.
2024 (arXiv 2403.19647): features and errors of one layer share their path, and so do several sites of one point.

The activations of dictionaries are masks, so that f(z)/z is their slope: an Identity-rule on them would change nothing, and there is none.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.adapters import Architecture
from patchlab.adapters.dictionaries import FeatureSite, Point
from patchlab.engine import Result, Target
from patchlab.errors import MethodError
from patchlab.host import precise, to_array
from patchlab.interventions import Edit
from patchlab.methods.cells.kind import Exactly, Index, Linear, Linearly, add_cells, stacked
from patchlab.methods.cells.nodes import Nodes, patched
from patchlab.methods.cells.packs import Changed, Unpacked, packs_of
from patchlab.methods.cells.readings import (
    CHUNK_BYTES,
    Reading,
    error_change,
    feature_bytes,
    hosts,
    input_of,
    inputs,
    live_positions,
    own_and_source,
    points_of,
    reading,
    rest_change,
    summed,
)
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored
from patchlab.scores.arrays import Sparse
from patchlab.sites import KINDS, Site, address
from patchlab.sources import Blend, Constant, Source, Zero
from patchlab.tasks.task import PositionAxis


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of the scores of one layer of a site: one number for each entry (row, position and, of features, feature)."""

    layer: int
    row: Int[Tensor, " entry"]
    pos: Int[Tensor, " entry"]
    feature: Int[Tensor, " entry"] | None
    value: Float[Tensor, " entry"]
    variance: Float[Tensor, " entry"]


class _OfDictionaries(Nodes):
    """What features and errors share."""

    def check(self, setting: Setting, others: int) -> None:
        for site in setting.sites:
            setting.model.arch.check(site)

    def points(self, setting: Setting) -> dict[str, Point]:
        """The points of the sites, by name."""
        return points_of(setting, self.name)

    def targets(self, arch: Architecture, sites: tuple[Site, ...]) -> tuple[Target, ...]:
        points = [found.point for site in sites if isinstance(found := arch.accessors[f"features.{KINDS[site.kind].of}"], FeatureSite)]
        return tuple(dict.fromkeys(target for point in points for target in (*hosts(point), *inputs(point))))

    def shape(self, arch: Architecture, site: Site, axis: PositionAxis | None) -> tuple[int, ...]:
        widest = max((arch.accessors[site.kind].entries(layer) or 0 for _, layer in arch.targets(site.kind)), default=0)
        sizes = {"layer": arch.n_layers, "feature": widest, "pos": 0 if axis is None else len(axis)}
        return tuple(sizes[name] for name in site.axes)

    def live(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, arch: Architecture, site: Site, changed: Any, index: Any, reads_answer: bool
    ) -> None:
        return None

    def summed(self, setting: Setting, kept: Mapping[Target, Tensor], *, positional: bool) -> dict[Target, Tensor]:
        return {key: total for point in self.points(setting).values() for key, total in summed(setting, point, kept, positional=positional).items()}

    def exact_keeps(self, setting: Setting) -> tuple[Target, ...]:
        return setting.targets

    def exact_bytes(self, setting: Setting, rows: int, length: int) -> int:
        return super().exact_bytes(setting, rows, length) + self.linear_bytes(setting, None, rows, length)

    def entries(self, setting: Setting, site: Site, runs: Runs) -> list[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Per layer, the rows, positions and features that differ."""
        raise NotImplementedError

    def present(self, setting: Setting, site: Site, runs: Runs) -> Int[np.ndarray, "cell axis"]:
        """The cells of a batch, in their order."""
        parts = [
            _columns(setting, runs, site, Terms(layer, row, pos, feature, row.float(), row.float()))[0]
            for layer, row, pos, feature in self.entries(setting, site, runs)
        ]
        return np.concatenate([np.unique(part, axis=0) for part in parts]) if parts else stacked([], len(site.axes))

    def cells(self, setting: Setting, site: Site, runs: Runs) -> list[Index]:
        return [tuple(cell) for cell in self.present(setting, site, runs).tolist()]

    def patch(
        self,
        setting: Setting,
        runs: Runs,
        meter: Meter,
        sets: Sequence[Sequence[tuple[Site, Index]]],
        how: Exactly,
        finished: MutableMapping[int, np.ndarray] | None = None,
    ) -> Float[np.ndarray, "set batch"]:
        finished = {} if finished is None else finished
        changed = [None if how.engine == "literal" else self.changed(setting, runs, cells) for cells in sets]
        packs = packs_of(changed)
        edits = [self.edits(setting, runs, [cell for i in pack for cell in sets[i]]) for pack in packs]
        more = meter.bar.update if meter.unit == "cell" else None
        patched(setting, runs, meter, edits, engine=how.engine, finished=Unpacked(finished, packs, changed, more))
        return np.stack([finished[i] for i in range(len(sets))]) if sets else np.zeros((0, len(runs.batch)))

    def changed(self, setting: Setting, runs: Runs, cells: Sequence[tuple[Site, Index]]) -> Changed | None:
        """The prompts that a set of cells changes, where others can share its run; None where they cannot."""
        return None

    def edits(self, setting: Setting, runs: Runs, cells: Sequence[tuple[Site, Index]]) -> tuple[Edit, ...]:
        """The edits that put the source's values into a set of cells.

        Cells of one layer and point start from the baseline's values, so the activation moves by what is known. Where an earlier layer is patched as
        well, the values that they have then are read off as the run goes.
        """
        groups: dict[tuple[str, int], list[tuple[Site, dict[str, int]]]] = {}
        for site, cell in cells:
            at = dict(zip(site.axes, cell, strict=True))
            groups.setdefault((KINDS[site.kind].of, at["layer"]), []).append((site, at))
        first = min(layer for _, layer in groups) if groups else 0
        found: list[Edit] = []
        for (name, layer), chosen in groups.items():
            known = len(groups) == 1 or (layer == first and sum(one == first for _, one in groups) == 1)
            found += self.moves_of(setting, runs, name, layer, chosen) if known else self.replaced(setting, runs, name, layer, chosen)
        return tuple(found)

    def moves_of(self, setting: Setting, runs: Runs, name: str, layer: int, cells: Sequence[tuple[Site, dict[str, int]]]) -> list[Edit]:
        """Moves of the activations that a layer's dictionary writes to, by known changes."""
        raise NotImplementedError

    def replaced(self, setting: Setting, runs: Runs, name: str, layer: int, cells: Sequence[tuple[Site, dict[str, int]]]) -> list[Edit]:
        """Replacements of what the run itself has in the cells."""
        raise NotImplementedError

    def check_linear(self, setting: Setting, how: Linearly) -> None:
        super().check_linear(setting, how)
        if how.qk_fix and not how.grad_drop and all(KINDS[site.kind].cells == self.name for site in setting.sites):
            raise MethodError(f"QK-fix recomputes the softmax for queries and keys; {', '.join(map(str, setting.sites))} have none. Leave +qk out.")

    def moves(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        found: list[Target] = [(f"features.{name}", layer) for name, point in self.points(setting).items() for layer in sorted(point.of)]
        return tuple(found)

    def keeps(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        return ()

    def step(self, setting: Setting, runs: Runs, moved: Target, start: Source, at: float) -> tuple[Edit, ...]:
        name, layer = moved[0].partition(".")[2], int(moved[1] or 0)
        point = self.points(setting)[name]
        if point.of[layer].span > 1:
            place = reading(setting, runs, point, layer)
            error = error_change(setting, runs, point, layer)
            moves = [(where, place.decoded(where, (error.shape[0], error.shape[1]))) for where in range(layer, layer + point.of[layer].span)]
            return tuple(
                Edit(address(name, where), _Moved(at * (change + error if where == layer else change), runs.batch.examples), "add")
                for where, change in moves
            )
        end: Source = runs.source
        if isinstance(end, Zero):
            one = point.of[layer]
            own = own_and_source(runs, one, input_of(point, layer))[0]
            base = runs.baseline.activations[name, layer]
            end = Constant(one.rest(own).to(base.dtype).reshape(base.shape))
        return (Edit(address(name, layer), Blend(start, end, at)),)

    def needs(self, setting: Setting, how: Linearly, moved: Target | None) -> dict[str, Any]:
        points = self.points(setting)
        if moved is None:
            return {
                "gradients": tuple(key for point in points.values() for key in hosts(point)) + ((("input", None),) if how.over == "inputs" else ())
            }
        name, layer = moved[0].partition(".")[2], int(moved[1] or 0)
        return {"gradients": tuple((name, where) for where in range(layer, layer + points[name].of[layer].span))}

    def passes(self, setting: Setting, how: Linearly) -> int:
        return 0

    def linear_bytes(self, setting: Setting, how: Any, rows: int, length: int) -> int:
        one = max((feature_bytes(one) for point in self.points(setting).values() for one in point.of.values()), default=0)
        budget = CHUNK_BYTES if setting.max_memory is None else min(CHUNK_BYTES, setting.max_memory / 8)
        return int(max(one, min(one * rows * length, budget))) // 4

    def linear_record(self, setting: Setting, how: Linearly) -> dict[str, Any]:
        return {}

    def linear(self, setting: Setting, runs: Runs, how: Linearly, drops: Sequence[int | None]) -> Linear:
        return _Sums(self, setting, runs, how, drops)

    def second_order(self, setting: Setting) -> str | None:
        return f"second-order terms are of nodes, and {setting.sites[0]} are parts of them; ask for {KINDS[setting.sites[0].kind].of}."

    def terms(self, setting: Setting, runs: Runs, point: Point, gradients: Mapping[int, Tensor]) -> list[Terms]:
        """The terms of a point's scores, from the gradients at what it writes to, by layer."""
        raise NotImplementedError


class Features(_OfDictionaries):
    """Features that differ between the two runs."""

    name = "features"

    def entries(self, setting: Setting, site: Site, runs: Runs) -> list[tuple[int, Tensor, Tensor, Tensor | None]]:
        point = self.points(setting)[KINDS[site.kind].of]
        found = [(layer, reading(setting, runs, point, layer)) for layer in sorted(point.of)]
        return [(layer, one.row, one.pos, one.feature) for layer, one in found]

    def changed(self, setting: Setting, runs: Runs, cells: Sequence[tuple[Site, Index]]) -> Changed | None:
        if len(cells) != 1:
            return None
        ((site, cell),) = cells
        at = dict(zip(site.axes, cell, strict=True))
        whole = reading(setting, runs, self.points(setting)[KINDS[site.kind].of], at["layer"])
        rows = whole.places[0][_chosen(setting, runs, whole, [(site, at)])]
        return Changed((KINDS[site.kind].of, at["layer"], at.get("pos")), np.isin(np.arange(len(runs.batch)), rows))

    def moves_of(self, setting: Setting, runs: Runs, name: str, layer: int, cells: Sequence[tuple[Site, dict[str, int]]]) -> list[Edit]:
        point = self.points(setting)[name]
        whole = reading(setting, runs, point, layer)
        entries = _chosen(setting, runs, whole, cells)
        chosen = whole.of(entries)
        pos = tuple(np.unique(whole.places[1][entries]).tolist()) or (0,)
        return [
            Edit(Site(name, (), layer=where, pos=pos), _Pushed(chosen, where, runs.batch.examples), "add")
            for where in range(layer, layer + point.of[layer].span)
        ]

    def replaced(self, setting: Setting, runs: Runs, name: str, layer: int, cells: Sequence[tuple[Site, dict[str, int]]]) -> list[Edit]:
        return [
            Edit(Site(f"features.{name}", (), layer=layer), _Chosen(mask, values, runs.batch.examples))
            for mask, values in self._columns(setting, runs, name, layer, cells)
        ]

    def _columns(
        self, setting: Setting, runs: Runs, name: str, layer: int, cells: Sequence[tuple[Site, dict[str, int]]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The cells as a mask over positions and features, and the source's values there."""
        point, found = self.points(setting)[name], list[Tensor]()
        whole = reading(setting, runs, point, layer)
        shape = (*runs.baseline_tokens.shape, int(point.of[layer].dictionary.n_features))
        for _, at in cells:
            mask = torch.zeros(shape, dtype=torch.bool, device=whole.row.device)
            places = _places(setting, runs, at.get("pos"))
            rows = torch.arange(shape[0], device=mask.device)
            feature = at.get("feature")
            where = (slice(None), slice(None)) if places is None else (rows, places)
            mask[(*where, slice(None) if feature is None else feature)] = True
            found.append(mask)
        mask = torch.stack(found).any(0)
        one = point.of[layer]
        values = one.values(own_and_source(runs, one, input_of(point, layer))[0])
        values[whole.row, whole.pos, whole.feature] = whole.source
        return [(mask, values)]

    def terms(self, setting: Setting, runs: Runs, point: Point, gradients: Mapping[int, Tensor]) -> list[Terms]:
        found: list[Terms] = []
        for layer, one in sorted(point.of.items()):
            place = reading(setting, runs, point, layer)
            mine = {where: gradients[where] for where in range(layer, layer + one.span)}
            coefficient, change = place.dot(mine), place.change
            x, other = own_and_source(runs, one, input_of(point, layer))
            sizes = (x.square().sum(-1) + other.square().sum(-1))[place.row, place.pos] / x.shape[-1]
            slopes = (
                sum(
                    (gradients[where].square().sum(-1)[place.row, place.pos] * one.row_sizes(where - layer)[place.feature] for where in mine),
                    torch.zeros_like(change),
                )
                / one.rows().shape[-1]
            )
            variance = sizes * one.column_sizes[place.feature] * coefficient.square() + change.square() * slopes
            found.append(Terms(layer, place.row, place.pos, place.feature, change * coefficient, variance))
        return found


class Errors(_OfDictionaries):
    """What dictionaries leave out: one contracted number per position."""

    name = "error"

    def entries(self, setting: Setting, site: Site, runs: Runs) -> list[tuple[int, Tensor, Tensor, Tensor | None]]:
        point = self.points(setting)[KINDS[site.kind].of]
        found: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
        for layer in point.written:
            row, pos = live_positions(setting, runs, point.name, [layer]).nonzero().unbind(1)
            found.append((layer, row, pos, None))
        return found

    def moves_of(self, setting: Setting, runs: Runs, name: str, layer: int, cells: Sequence[tuple[Site, dict[str, int]]]) -> list[Edit]:
        change = error_change(setting, runs, self.points(setting)[name], layer) * self._mask(setting, runs, cells)[..., None]
        pos = tuple(np.flatnonzero(change.any(-1).any(0).cpu().numpy()).tolist()) or (0,)
        return [Edit(Site(name, (), layer=layer, pos=pos), _Moved(change, runs.batch.examples), "add")]

    def replaced(self, setting: Setting, runs: Runs, name: str, layer: int, cells: Sequence[tuple[Site, dict[str, int]]]) -> list[Edit]:
        point, mask = self.points(setting)[name], self._mask(setting, runs, cells)
        read = {one.layer: own_and_source(runs, one, input_of(point, one.layer))[0] for one in point.into(layer)}
        own = own_and_source(runs, point.into(layer)[0], (name, layer))[0] - point.reconstruct(layer, read)
        values = own + error_change(setting, runs, point, layer)
        return [Edit(Site(f"error.{name}", (), layer=layer), _Chosen(mask[..., None].expand(values.shape), values, runs.batch.examples))]

    def _mask(self, setting: Setting, runs: Runs, cells: Iterable[tuple[Site, dict[str, int]]]) -> Bool[Tensor, "row pos"]:
        mask = torch.zeros(runs.baseline_tokens.shape, dtype=torch.bool, device=runs.baseline_tokens.device)
        for _, at in cells:
            places = _places(setting, runs, at.get("pos"))
            if places is None:
                mask[:] = True
            else:
                mask[torch.arange(len(mask), device=mask.device), places] = True
        return mask

    def terms(self, setting: Setting, runs: Runs, point: Point, gradients: Mapping[int, Tensor]) -> list[Terms]:
        found: list[Terms] = []
        for layer in point.written:
            row, pos = live_positions(setting, runs, point.name, [layer]).nonzero().unbind(1)
            change, gradient = error_change(setting, runs, point, layer)[row, pos], gradients[layer][row, pos]
            own, other = own_and_source(runs, point.into(layer)[0], (point.name, layer))
            sizes = own.square().sum(-1)[row, pos] + other.square().sum(-1)[row, pos] + change.square().sum(-1)
            variance = sizes * gradient.square().sum(-1) / gradient.shape[-1]
            found.append(Terms(layer, row, pos, None, (change * gradient.to(change.dtype)).sum(-1), variance))
        return found


add_cells(Features())
add_cells(Errors())


class _Sums:
    """Sums the gradients at the activations of dictionaries over the points of a path, and makes scores of them."""

    def __init__(self, kind: _OfDictionaries, setting: Setting, runs: Runs, how: Linearly, drops: Sequence[int | None]) -> None:
        self.kind, self.setting, self.runs, self.how, self.drops = kind, setting, runs, how, drops
        self.points = kind.points(setting)
        self.total: dict[tuple[str, int, int], Tensor] = {}
        self.scores: dict[str, list[Sparse]] = {str(site): [] for site in setting.sites}
        self.noise: dict[str, list[Sparse]] = {str(site): [] for site in setting.sites}

    def add(self, point: Result, weight: float, moved: Target | None) -> None:
        for name, own in self.points.items():
            for layer, one in own.of.items():
                if moved is not None and moved != (f"features.{name}", layer):
                    continue
                for where in range(layer, layer + one.span):
                    gradient = one.flat(point.gradients[name, where]) * weight
                    key = (name, layer, where)
                    self.total[key] = gradient if key not in self.total else self.total[key] + gradient

    def close(self, meter: Meter, notes: dict[str, Any], drop: int | None) -> None:
        found = {name: self._terms(name, own) for name, own in self.points.items()}
        if drop is None:
            for name, own in self.points.items():
                self._check_sums(notes, name, own, found[name])
        for site in self.setting.sites:
            scores, noise = _gathered(self.setting, self.runs, site, found[KINDS[site.kind].of])
            if drop is not None:
                scores = _share_of_drop(self.setting, site, scores, drop)
                noise = _share_of_drop(self.setting, site, noise, drop)
            self.scores[str(site)].append(scores)
            self.noise[str(site)].append(noise)
        self.total = {}

    def result(self, meter: Meter, notes: dict[str, Any]) -> Scored:
        return Scored({name: _added(found) for name, found in self.scores.items()}, {name: _added(found) for name, found in self.noise.items()})

    def _terms(self, name: str, point: Point) -> list[Terms]:
        """The terms of a point. Gradients are those of the dictionary's own path; of an error, those of its layer's."""
        if all(one.span == 1 for one in point.of.values()):
            return self.kind.terms(self.setting, self.runs, point, {where: self.total[name, layer, where] for layer, where in _pairs(point)})
        found: list[Terms] = []
        for layer, one in sorted(point.of.items()):
            alone = Point(point.name, {layer: one})
            gradients = {where: self.total[name, layer, where] for where in range(layer, layer + one.span)}
            if self.kind.name == "features":
                found += self.kind.terms(self.setting, self.runs, alone, gradients)
        if self.kind.name == "error":
            found += self.kind.terms(self.setting, self.runs, point, {layer: self.total[name, layer, layer] for layer in point.written})
        return found

    def _check_sums(self, notes: dict[str, Any], name: str, point: Point, terms: Sequence[Terms]) -> None:
        """Hold the sums of features, error and rest against the node score of every layer that is written to.

        Raises:
            MethodError: they do not add up.
        """
        across = any(one.span > 1 for one in point.of.values())
        if self.kind.name != "features" or (across and self.how.over == "activations"):  # then each layer's features have a path of their own
            return
        n = self.runs.baseline_tokens.shape[0]
        off, largest = np.zeros(n), np.zeros(n)
        for layer in point.written:
            first = point.into(layer)[0]
            gradient = self.total[name, first.layer, layer]
            live = live_positions(self.setting, self.runs, name, [layer])
            own, other = own_and_source(self.runs, first, (name, layer))
            beside = error_change(self.setting, self.runs, point, layer)
            beside = beside + rest_change(self.runs, point, layer) if layer in point.of else beside
            features = self._sum_into(point, layer, gradient, terms if not across else None)
            node = ((other - own) * gradient).sum(-1)
            total = features + precise((beside * gradient).sum(-1) * live).sum(1)
            whole = precise(node * live).sum(1)
            off = np.maximum(off, (total - whole).abs().cpu().numpy())
            largest = np.maximum(largest, whole.abs().cpu().numpy())
        check = notes.setdefault("self_check", {})
        for key, values in (("mismatch", off), ("largest_node_score", largest)):
            check[key] = np.maximum(values, check.get(key, 0.0)).tolist()
        allowed = {torch.float64: 1e-5, torch.float32: 1e-3}.get(self.setting.model.dtype, 0.2)
        if (off > allowed * max(float(largest.max()), 1e-30)).any():
            raise MethodError(
                f"features, errors and rests of the dictionaries on {name} do not add up: their sums differ from node scores by {off.max():.2g}, "
                f"and the largest node score is {largest.max():.2g}. A dictionary does not decode as its rows say; take its features off the sites."
            )

    def _sum_into(self, point: Point, layer: int, gradient: Tensor, terms: Sequence[Terms] | None) -> Float[Tensor, " row"]:
        """What all features add to a layer's node score."""
        found = precise(gradient.new_zeros(gradient.shape[0]))
        if terms is not None:
            for one in terms:
                if one.layer == layer:
                    found.index_add_(0, one.row.to(found.device), precise(one.value))
            return found
        live = live_positions(self.setting, self.runs, point.name, [layer])
        for one in point.into(layer):
            place = reading(self.setting, self.runs, point, one.layer)
            values = place.change * place.dot({layer: gradient}) * live[place.row, place.pos]
            found.index_add_(0, place.row.to(found.device), precise(values))
        return found


def _pairs(point: Point) -> list[tuple[int, int]]:
    return [(layer, where) for layer, one in point.of.items() for where in range(layer, layer + one.span)]


def _places(setting: Setting, runs: Runs, place: int | None) -> Int[Tensor, " row"] | None:
    """The position that a place along the position axis stands for, per row; None for all positions."""
    if place is None:
        return None
    axis, device = setting.axis, runs.baseline_tokens.device
    if axis is None or axis.names is None:
        return torch.full((len(runs.batch),), place, device=device)
    return torch.as_tensor(axis.index[runs.batch.examples.cpu().numpy()][:, place], device=device)


def _chosen(setting: Setting, runs: Runs, whole: Reading, cells: Iterable[tuple[Site, dict[str, int]]]) -> Int[np.ndarray, " some"]:
    """The numbers of the entries that belong to one of the cells."""
    row, pos, feature = whole.places
    axis = setting.axis
    index = None if axis is None or axis.names is None else axis.index[runs.batch.examples.numpy()]
    found = np.zeros(len(row), dtype=bool)
    for _, at in cells:
        own = np.ones_like(found) if "feature" not in at else feature == at["feature"]
        if "pos" in at:
            own &= pos == (at["pos"] if index is None else index[row, at["pos"]])
        found |= own
    return np.flatnonzero(found)


def _columns(setting: Setting, runs: Runs, site: Site, terms: Terms) -> tuple[Int[np.ndarray, "entry axis"], Int[np.ndarray, " entry"]]:
    """The cell that each entry belongs to, and the number of the entry: one that lies at several named places is there for each."""
    row, pos = terms.row.cpu().numpy(), terms.pos.cpu().numpy()
    number = np.arange(len(row))
    place = pos
    axis = setting.axis
    if "pos" in site.axes and axis is not None and axis.names is not None:
        index = axis.index[runs.batch.examples.cpu().numpy()]  # row, place
        number, place = (index[row] == pos[:, None]).nonzero()
    columns = {"layer": np.full(len(number), terms.layer), "pos": place}
    if terms.feature is not None:
        columns["feature"] = terms.feature.cpu().numpy()[number]
    return np.stack([columns[name] for name in site.axes], 1).astype(np.int64), number


def _gathered(setting: Setting, runs: Runs, site: Site, terms: Sequence[Terms]) -> tuple[Sparse, Sparse]:
    """Terms summed into cells, and the noise floors of the sums."""
    n, index, scores, variances = len(runs.batch), [stacked([], len(site.axes))], [np.zeros((len(runs.batch), 0))], [np.zeros((len(runs.batch), 0))]
    for one in terms:
        cells, number = _columns(setting, runs, site, one)
        own, where = _unique(cells)
        row, size = one.row.cpu().numpy()[number], n * len(own)
        for into, values in ((scores, one.value), (variances, one.variance)):
            sums: Float[np.ndarray, " number"] = np.zeros(0)
            if size:
                sums = np.bincount(row * len(own) + where, to_array(values)[number], size).astype(np.float64)
            into.append(sums.reshape(n, len(own)))
        index.append(own)
    cells, values, variance = np.concatenate(index), np.concatenate(scores, 1), np.concatenate(variances, 1)
    return Sparse(cells, values), Sparse(cells, runs.rounding.of_products(variance, values))


def _unique(cells: Int[np.ndarray, "entry axis"]) -> tuple[Int[np.ndarray, "cell axis"], Int[np.ndarray, " entry"]]:
    """The cells, in order, and which one each entry is."""
    if not len(cells):
        return cells, np.zeros(0, dtype=np.int64)
    sizes = cells.max(0) + 1
    key = np.ravel_multi_index(tuple(cells.T), tuple(sizes.tolist()))
    found, where = np.unique(key, return_inverse=True)
    return np.stack(np.unravel_index(found, tuple(sizes.tolist())), 1).astype(np.int64), where.reshape(-1)


def _share_of_drop(setting: Setting, site: Site, scores: Sparse, drop: int) -> Sparse:
    """The share of one dropped layer in GradDrop's score; see :func:`patchlab.methods.corrections.drop_term`."""
    size, n_layers = np.abs(scores.effects), setting.model.arch.n_layers
    if KINDS[KINDS[site.kind].of].stream:
        return Sparse(scores.index, size / n_layers)
    size[:, scores.index[:, site.axes.index("layer")] == drop] = 0.0
    return Sparse(scores.index, size / (n_layers - 1))


def _added(parts: Sequence[Sparse]) -> Sparse:
    """Sums of maps of the same cells."""
    return parts[0] if len(parts) == 1 else Sparse(parts[0].index, np.sum([part.effects for part in parts], axis=0))


def _rows_of(own: Int[Tensor, " row"], examples: Int[Tensor, " row"]) -> Int[Tensor, " row"] | None:
    """Which of a batch's rows each example is; None where they are the same."""
    examples = examples.cpu()
    if torch.equal(own, examples):
        return None
    where = {example: row for row, example in enumerate(own.numpy().tolist())}
    return torch.tensor([where[example] for example in examples.numpy().tolist()])


@dataclass(frozen=True, eq=False)
class _Pushed:
    """The change that some features make to a layer, row by row of a batch."""

    entries: Reading
    layer: int
    examples: Int[Tensor, " row"]

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "row *site"]:
        length = own.shape[1]
        change = self.entries.decoded(self.layer, (len(self.examples), length))
        rows = _rows_of(self.examples, examples)
        return (change if rows is None else change[rows]).to(own.dtype).reshape(own.shape)


@dataclass(frozen=True, eq=False)
class _Moved:
    """A change of an activation, row by row of a batch."""

    change: Float[Tensor, "row pos d"]
    examples: Int[Tensor, " row"]

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "row *site"]:
        rows = _rows_of(self.examples, examples)
        return (self.change if rows is None else self.change[rows]).to(own.dtype).reshape(own.shape)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Given values where a mask says so, else the site's own."""

    mask: Bool[Tensor, "row pos entry"]
    given: Float[Tensor, "row pos entry"]
    examples: Int[Tensor, " row"]

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "row *site"]:
        rows = _rows_of(self.examples, examples)
        mask, given = (self.mask, self.given) if rows is None else (self.mask[rows], self.given[rows])
        return torch.where(mask, given.to(own.dtype), own)
