"""Readings: what dictionaries read in the two runs of a batch, kept where the runs differ and nowhere else.

Features are held as entries (row, position, feature) with their values in both runs: never as a tensor over all features of all positions and
layers. Only positions that can matter are encoded, a chunk of them at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.adapters.dictionaries import Attached, FeatureSite, Point
from patchlab.engine import Target
from patchlab.host import precise
from patchlab.methods.cells.nodes import Nodes
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs
from patchlab.sites import KINDS, Site, address
from patchlab.sources import Average, Kept, Zero

CHUNK_BYTES = 2**27
"""What the features of the positions that are encoded at once may take."""
ENTRIES = 2048
"""Rows of a decoder that are gathered at once: as many as a CPU's cache holds at d_model 768."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The features of one dictionary that differ between baseline and source: entry ``i`` is feature ``feature[i]`` at position ``pos[i]`` of row
    ``row[i]``, with its value in both runs. Entries are in the order of rows, positions and features.
    """

    one: Attached
    row: Int[Tensor, " entry"]
    pos: Int[Tensor, " entry"]
    feature: Int[Tensor, " entry"]
    own: Float[Tensor, " entry"]
    source: Float[Tensor, " entry"]

    @property
    def change(self) -> Float[Tensor, " entry"]:
        """Source minus baseline."""
        return self.source - self.own

    @cached_property
    def places(self) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " entry"], Int[np.ndarray, " entry"]]:
        """Row, position and feature of the entries on the host, moved there once."""
        row, pos, feature = torch.stack([self.row, self.pos, self.feature]).cpu().numpy()
        return row, pos, feature

    def of(self, entries: Int[np.ndarray, " some"]) -> "Reading":
        """Some of the entries."""
        index = torch.as_tensor(entries, device=self.row.device)
        return Reading(self.one, *(part[index] for part in (self.row, self.pos, self.feature, self.own, self.source)))

    def dot(self, gradients: Mapping[int, Float[Tensor, "row pos d"]]) -> Float[Tensor, " entry"]:
        """Gradients at what is written to, per layer, along each entry's row of the decoder."""
        found = self.own.new_zeros(len(self.own), dtype=torch.promote_types(self.own.dtype, torch.float32))
        for layer, gradient in gradients.items():
            rows = self.one.rows(layer - self.one.layer)
            for part in self._parts():
                there = gradient[self.row[part], self.pos[part]].to(rows.dtype)
                found[part] += (rows[self.feature[part]] * there).sum(-1)
        return found

    def decoded(self, layer: int, shape: tuple[int, int]) -> Float[Tensor, "row pos d"]:
        """The change that all entries make to a layer that is written to."""
        rows = self.one.rows(layer - self.one.layer)
        found = rows.new_zeros(shape[0] * shape[1], rows.shape[1])
        change, place = self.change, self.row * shape[1] + self.pos
        for part in self._parts():
            found.index_add_(0, place[part], rows[self.feature[part]] * change[part, None])
        return found.reshape(*shape, -1)

    def _parts(self) -> Iterator[slice]:
        return (slice(first, first + ENTRIES) for first in range(0, len(self.own), ENTRIES))


def points_of(setting: Setting, family: str) -> dict[str, Point]:
    """The points of the sites of a setting, by name: ``features.resid_post`` has resid_post."""
    accessors = setting.model.arch.accessors
    names = dict.fromkeys(KINDS[site.kind].of for site in setting.sites if KINDS[site.kind].cells == family)
    return {name: accessor.point for name in names if isinstance(accessor := accessors[f"features.{name}"], FeatureSite)}


def hosts(point: Point) -> tuple[Target, ...]:
    """The activations that a point's dictionaries write to."""
    return tuple((point.name, layer) for layer in point.written)


def inputs(point: Point) -> tuple[Target, ...]:
    """The activations that a point's dictionaries read."""
    return tuple(input_of(point, layer) for layer in sorted(point.of))


def input_of(point: Point, layer: int) -> Target:
    """The activation that the dictionary of a layer reads."""
    return (point.name if point.of[layer].reads is None else f"reads.{point.name}"), layer


def own_and_source(runs: Runs, one: Attached, key: Target) -> tuple[Tensor, Tensor]:
    """An activation in the baseline run, and what the source has for it, ``[row, pos, d]``, in the dictionary's dtype. Of zero it has zeros."""
    own = runs.baseline.activations[key]
    return one.flat(own), one.flat(runs.source.values(address(*key), own, runs.batch.examples))


def reading(setting: Setting, runs: Runs, point: Point, layer: int) -> Reading:
    """What a dictionary reads in the runs of a batch; found once for all that ask."""
    key = ("reading", point.name, layer)
    if key not in runs.derived:
        runs.derived[key] = _read(setting, runs, point, layer)
    return runs.derived[key]


def _read(setting: Setting, runs: Runs, point: Point, layer: int) -> Reading:
    one = point.of[layer]
    target = input_of(point, layer)
    own, other = own_and_source(runs, one, target)
    mask = live_positions(setting, runs, point.name, range(layer, layer + one.span))
    if isinstance(runs.source, Kept):
        mask = mask & (own != other).any(-1)
    where, step = mask.nonzero(), _encoded_at_once(setting, one)
    found: list[tuple[Tensor, ...]] = []
    for first in range(0, len(where), step):
        row, pos = where[first : first + step].unbind(1)
        before, after = one.values(own[row, pos]), _source_values(runs, one, point, layer, other[row, pos], pos)
        entry, feature = (before != after).nonzero().unbind(1)
        found.append((row[entry], pos[entry], feature, before[entry, feature], after[entry, feature]))
    if not found:
        empty = where.new_zeros(0)
        return Reading(one, empty, empty, empty, own.new_zeros(0), own.new_zeros(0))
    return Reading(one, *(torch.cat(parts) for parts in zip(*found, strict=True)))


def _source_values(runs: Runs, one: Attached, point: Point, layer: int, other: Tensor, pos: Tensor) -> Float[Tensor, "n feature"]:
    """The features of the source at some rows and positions."""
    if isinstance(runs.source, Kept):
        return one.values(other)
    zeros = other.new_zeros(len(other), one.dictionary.n_features)
    if isinstance(runs.source, Zero) or not isinstance(runs.source, Average):
        return zeros
    mean = runs.source.means[f"features.{point.name}", layer]
    if mean.is_sparse:
        mean = mean.index_select(0, pos.to(mean.device)).to_dense()
    return zeros + mean.to(zeros)


def _encoded_at_once(setting: Setting, one: Attached) -> int:
    """Positions whose features fit into a chunk: pre-activations, masks and features of both runs."""
    budget = CHUNK_BYTES if setting.max_memory is None else min(CHUNK_BYTES, setting.max_memory / 8)
    return max(1, int(budget // feature_bytes(one)))


def feature_bytes(one: Attached) -> int:
    """Bytes that encoding one position in both runs takes."""
    return 8 * one.dictionary.n_features * one.dictionary.w_enc.element_size()


def live_positions(setting: Setting, runs: Runs, kind: str, layers: Iterable[int]) -> Bool[Tensor, "row pos"]:
    """Where an activation of some layers can differ and matter, by the token ids and the graph."""
    shape, device = runs.baseline_tokens.shape, runs.baseline_tokens.device
    if setting.surrounding:
        return torch.ones(shape, dtype=torch.bool, device=device)
    changed = runs.batch.clean != runs.batch.corrupted if isinstance(runs.source, Kept) else torch.ones(shape, dtype=torch.bool)
    arch, site, answer = setting.model.arch, Site(kind, ("layer", "pos")), setting.task.metric.reads == "answer"
    found = [Nodes().live(arch, site, row, None, answer)[list(layers)].any(0) for row in changed.cpu().numpy()]
    return torch.as_tensor(np.stack(found), device=device)


def rest_change(runs: Runs, point: Point, layer: int) -> Float[Tensor, "row pos d"]:
    """How the part that belongs to no feature differs: biases, a skip, what a row's normalisation adds."""
    one = point.of[layer]
    own, other = own_and_source(runs, one, input_of(point, layer))
    before = one.rest(own)
    if isinstance(runs.source, Zero):
        return -before
    if isinstance(runs.source, Average):
        return runs.source.means[f"rest.{point.name}", layer].to(before) - before
    return one.rest(other) - before


def error_change(setting: Setting, runs: Runs, point: Point, layer: int) -> Float[Tensor, "row pos d"]:
    """How what the dictionaries leave out of a layer differs between baseline and source, where that can matter; else zero."""
    key = ("error", point.name, layer)
    if key not in runs.derived:
        live = live_positions(setting, runs, point.name, [layer])
        runs.derived[key] = _error_change(setting, runs, point, layer) * live[..., None]
    return runs.derived[key]


def _error_change(setting: Setting, runs: Runs, point: Point, layer: int) -> Float[Tensor, "row pos d"]:
    into = point.into(layer)
    own, other = own_and_source(runs, into[0], (point.name, layer))
    shape = (own.shape[0], own.shape[1])
    if isinstance(runs.source, Average):
        read = {one.layer: own_and_source(runs, one, input_of(point, one.layer))[0] for one in into}
        mean = runs.source.means[f"error.{point.name}", layer].to(own)
        return mean - (own - in_chunks(setting, point, layer, read))
    change = other - own
    for one in into:
        change = change - reading(setting, runs, point, one.layer).decoded(layer, shape)
    return change - rest_change(runs, point, layer) if layer in point.of else change


def in_chunks(setting: Setting, point: Point, layer: int, read: Mapping[int, Float[Tensor, "row pos d_in"]]) -> Float[Tensor, "row pos d_out"]:
    """What the dictionaries give a layer, a chunk of positions at a time."""
    first = point.into(layer)[0]
    flat = {key: value.flatten(0, 1) for key, value in read.items()}
    step = _encoded_at_once(setting, first)
    n = len(next(iter(flat.values())))
    parts = [point.reconstruct(layer, {key: value[i : i + step] for key, value in flat.items()}) for i in range(0, n, step)]
    shape = next(iter(read.values())).shape
    whole = torch.cat(parts)
    return whole.reshape(shape[0], shape[1], whole.shape[-1])


def summed(setting: Setting, point: Point, kept: Mapping[Target, Tensor], *, positional: bool) -> dict[Target, Tensor]:
    """Sums of features, rests and errors over rows (and positions unless ``positional``), for means over all source prompts."""
    found: dict[Target, Tensor] = {}
    read = {layer: point.of[layer].flat(kept[key]) for key in inputs(point) if (layer := key[1]) is not None}
    for layer, x in read.items():
        one, flat = point.of[layer], x.flatten(0, 1)
        length, width = x.shape[1], int(one.dictionary.n_features)
        parts: list[Tensor] = []
        for first in range(0, len(flat), step := _encoded_at_once(setting, one)):
            values = precise(one.values(flat[first : first + step]))
            if not positional:
                parts.append(values.sum(0)[None])
                continue
            entry, feature = values.nonzero().unbind(1)
            parts.append(_sparse(torch.stack([(entry + first) % length, feature]), values[entry, feature], (length, width)))
        found[f"features.{point.name}", layer] = sum(parts[1:], parts[0])
        rest = precise(one.rest(x))
        found[f"rest.{point.name}", layer] = rest.sum(0) if positional else rest.sum((0, 1))[None]
    for layer in point.written:
        own = point.into(layer)[0].flat(kept[point.name, layer])
        error = precise(own - in_chunks(setting, point, layer, {one.layer: read[one.layer] for one in point.into(layer)}))
        found[f"error.{point.name}", layer] = error.sum(0) if positional else error.sum((0, 1))[None]
    return found


def _sparse(index: Int[Tensor, "two entry"], values: Float[Tensor, " entry"], shape: tuple[int, int]) -> Tensor:
    """A sparse matrix; torch's function has no types."""
    return cast(Any, torch).sparse_coo_tensor(index, values, shape, check_invariants=False).coalesce()
