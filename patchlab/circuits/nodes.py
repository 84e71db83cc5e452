"""NodeCircuit: nodes of sites that were chosen (heads, MLPs, neurons, features, errors), and the candidates that they were chosen from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from patchlab.adapters import Architecture
from patchlab.circuits.circuit import Circuit
from patchlab.errors import CircuitError, unknown
from patchlab.scores.arrays import plain
from patchlab.sites import KINDS, POSITION_AXES, Position, Site, parse_sites
from patchlab.stats.jaccard import sentence
from patchlab.tasks.task import PositionAxis

Index = Int[np.ndarray, "_node _axis"]
"""Nodes of one site as their numbers along its axes."""


@dataclass(frozen=True)
class Candidates:
    """The nodes of one site that circuits choose from. What is no candidate is in every circuit and in its complement: it is never ablated.

    Args:
        site: the site at its granularity: ``z`` has a node per layer and head, ``z[layer,pos,head]`` one per position as well.
        shape: lengths of the site's axes.
        layers: the layers whose nodes are candidates; all of them by default.
        units: heads, neurons or features of each layer, where they differ from layer to layer; ``shape`` has the largest.

    Raises:
        CircuitError: a site that has no nodes, or sizes that do not fit it.

    Example:
        >>> Candidates(Site.parse("z"), (4, 2)).size
        8
    """

    site: Site
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()
    units: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        kind = KINDS[self.site.kind]
        if self.site.narrowed or kind.granularities is not None or kind.source is not None:
            raise CircuitError(
                f"{self.site} has no nodes that a circuit can hold: they are those of an activation at every position (z, mlp_out, mlp_post, "
                f"attn_out, resid_post, features, ...), named as a whole."
            )
        if len(self.shape) != len(self.site.axes) or min(self.shape, default=0) < 1:
            raise CircuitError(f"{self.site} has the axes {list(self.site.axes)}; got the sizes {list(self.shape)}. Give one for each, above 0.")
        n = self.shape[0] if kind.layered else 0
        object.__setattr__(self, "layers", self.layers or tuple(range(n)))
        if sorted(set(self.layers)) != list(self.layers) or not all(0 <= layer < n for layer in self.layers):
            raise CircuitError(f"the layers of {self.site} are 0 to {n - 1}, each once and in order; got {list(self.layers)}.")
        if self.units is not None and (kind.unit not in self.site.axes or len(self.units) != n or max(self.units) > self.shape[-1]):
            raise CircuitError(f"units says how many {kind.unit or 'units'} each of {n} layers of {self.site} has; got {list(self.units)}.")

    @property
    def name(self) -> str:
        """The site as it is written."""
        return str(self.site)

    @property
    def size(self) -> int:
        """How many nodes there are."""
        if not KINDS[self.site.kind].layered:
            return int(np.prod(self.shape))
        if self.units is None:
            return len(self.layers) * int(np.prod(self.shape[1:]))
        return sum(self.units[layer] for layer in self.layers) * int(np.prod(self.shape[1:-1]))

    @property
    def n_positions(self) -> int | None:
        """How many positions have nodes of their own; None where a node is at all positions."""
        return self.shape[self.site.axes.index("pos")] if "pos" in self.site.axes else None

    def contains(self, cells: Index) -> Bool[np.ndarray, " node"]:
        """Which of some numbers along the axes are candidates."""
        inside = np.asarray(((cells >= 0) & (cells < np.array(self.shape))).all(axis=1))
        if KINDS[self.site.kind].layered:
            inside &= np.isin(cells[:, 0], self.layers)
        if self.units is not None:
            inside[inside] = cells[inside, -1] < np.array(self.units)[cells[inside, 0]]
        return inside

    def ids(self, cells: Index) -> Int[np.ndarray, " node"]:
        """Nodes as single numbers, in the order of the axes."""
        return np.asarray(np.ravel_multi_index(tuple(cells.T.astype(np.int64)), self.shape), dtype=np.int64).reshape(-1)

    def cells(self, ids: Int[np.ndarray, " node"]) -> Index:
        """The numbers along the axes of nodes given as single numbers."""
        return np.stack(np.unravel_index(ids, self.shape), 1).astype(np.int64).reshape(len(ids), len(self.shape))

    def every(self) -> Int[np.ndarray, " node"]:
        """All nodes, as single numbers."""
        ids = np.arange(int(np.prod(self.shape)), dtype=np.int64)
        return ids if self.size == len(ids) else ids[self.contains(self.cells(ids))]

    def drawn(self, n: int, rng: np.random.Generator) -> Int[np.ndarray, " node"]:
        """``n`` different nodes at random, without listing all that there are."""
        if 4 * n >= self.size or self.size == 0:
            return np.sort(rng.permutation(self.every())[:n])
        found = np.zeros(0, dtype=np.int64)
        while len(found) < n:
            more = rng.integers(0, int(np.prod(self.shape)), 2 * n)
            found = np.concatenate([found, more[self.contains(self.cells(more))]])
            found = found[np.sort(np.unique(found, return_index=True)[1])][:n]
        return np.sort(found)

    def address(self, cell: Sequence[int], positions: Sequence[str] | None) -> str:
        """The address of a node: ``L0.H1.z``, ``L2.N17.mlp_post@END``."""
        kind, at = KINDS[self.site.kind], dict(zip(self.site.axes, map(int, cell), strict=True))
        where: tuple[Position, ...] | None = None if "pos" not in at else (at["pos"] if not positions else positions[at["pos"]],)
        if where is not None and isinstance(where[0], str) and where[0].isdigit():
            where = (int(where[0]),)
        return str(Site(self.site.kind, (), layer=at.get("layer"), index=None if kind.unit is None else at.get(kind.unit), pos=where))

    def cell(self, address: Site, positions: Sequence[str] | None) -> tuple[int, ...]:
        """The node that an address names.

        Raises:
            CircuitError: an address of another granularity, or of no candidate.
        """
        kind = KINDS[self.site.kind]
        known: dict[str, Any] = {"layer": address.layer, "pos": address.pos} | ({} if kind.unit is None else {kind.unit: address.index})
        given = {axis: value for axis, value in known.items() if value is not None}
        if set(given) != set(self.site.axes) or (address.pos is not None and len(address.pos) != 1):
            raise CircuitError(f"{address} is no node of {self.site}, whose nodes are told by {', '.join(self.site.axes)}.")
        if "pos" in given:
            place = given["pos"][0]
            names = [str(i) for i in range(self.n_positions or 0)] if positions is None else list(positions)
            if str(place) not in names:
                raise CircuitError(unknown(f"position of {self.site}", str(place), names))
            given["pos"] = names.index(str(place))
        cell = tuple(int(given[axis]) for axis in self.site.axes)
        if not self.contains(np.array([cell]))[0]:
            raise CircuitError(f"{address} is not among the candidates of {self}.")
        return cell

    def __str__(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(self.site.axes, self.shape, strict=True))
        some = f" of layers {_ranges(self.layers)}" if KINDS[self.site.kind].layered and len(self.layers) < self.shape[0] else ""
        return f"{self.site.kind}[{sizes}]{some}"


def candidates(arch: Architecture, sites: str | Iterable[str | Site], axis: PositionAxis | None = None) -> tuple[Candidates, ...]:
    """The nodes of a model's sites.

    Args:
        arch: ``model.arch``.
        sites: as for a method: ``["z", "mlp_out[layer]"]``.
        axis: ``task.position_axis()``, for sites with a node per position.

    Raises:
        SiteError: a site that the model lacks.
        CircuitError: a site without nodes, or positions without an axis.

    Example:
        >>> candidates(model.arch, ["z", "mlp_post"])  # doctest: +SKIP
    """
    found: list[Candidates] = []
    for site in arch.meant(parse_sites(sites if isinstance(sites, str) else list(sites))):
        accessor = arch.accessors.get(site.kind)
        layers = accessor.layers(arch.n_layers) if accessor is not None and KINDS[site.kind].layered else (0,)
        arch.check(Site(site.kind, (), layer=layers[0] if KINDS[site.kind].layered else None))
        if axis is None and "pos" in site.axes:
            raise CircuitError(f"{site} has a node per position; pass the positions of your prompts, task.position_axis().")
        if accessor is not None and KINDS[site.kind].of:
            found.append(of_entries(site, arch.n_layers, {layer: accessor.entries(layer) for layer in layers}, 0 if axis is None else len(axis)))
            continue
        found.append(Candidates(site, tuple(len(axis) if name in POSITION_AXES and axis is not None else arch.size(name) for name in site.axes)))
    return tuple(found)


def of_entries(site: Site, n_layers: int, entries: Mapping[int, int | None], n_positions: int) -> Candidates:
    """The nodes of a site that some layers have, with so many units (features) each."""
    unit = KINDS[site.kind].unit
    every = tuple(entries.get(layer) or 0 for layer in range(n_layers))
    sizes = {"layer": n_layers, "pos": n_positions}
    units = every if unit is not None and unit in site.axes else None
    return Candidates(site, tuple(sizes[axis] if axis in sizes else max(every) for axis in site.axes), tuple(sorted(entries)), units)


@dataclass(frozen=True, eq=False)
class NodeCircuit:
    """Nodes that were chosen among candidates. Held as a list, of those that are in or of those that are not, never as a mask over all.

    Nodes are entries of activations: heads (``L3.H7.z``), MLPs (``L2.mlp_out``), neurons (``L2.N17.mlp_post``), features
    (``L3.F512.resid_post``), errors (``L3.error.resid_post``), at all positions or each at its own (``@END``). No edge is cut: what a node in the
    circuit reads is all that is there. Circuits of edges are :class:`patchlab.circuits.Circuit`; their verbs take both.

    Args:
        universe: the candidates, per site; what lies outside of them is free.
        listed: per site (as it is written) the listed nodes, their numbers along the axes of the site.
        all_but: the listed nodes are those outside the circuit, and all other candidates are in.
        scores: per site the mean effects of the listed nodes, in metric units; None where they were not chosen by scores.
        provenance: where it comes from: method, task, model, direction, how it was chosen, ``positions`` (names), notes; JSON-able.

    Raises:
        CircuitError: a site twice, nodes that are no candidates, or scores that do not fit.

    Example:
        >>> heads = (Candidates(Site.parse("z"), (2, 2)),)
        >>> circuit = NodeCircuit.of(heads, ["a0.h1", "a1.h0"])
        >>> circuit.nodes, (~circuit).nodes
        (('L0.H1.z', 'L1.H0.z'), ('L0.H0.z', 'L1.H1.z'))
    """

    universe: tuple[Candidates, ...]
    listed: Mapping[str, Index]
    all_but: bool = False
    scores: Mapping[str, Float[np.ndarray, " _node"]] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [one.name for one in self.universe]
        kinds = [one.site.kind for one in self.universe]
        if not names or len(set(kinds)) < len(kinds):
            raise CircuitError(f"a circuit has candidates of at least one site, each kind once; got {', '.join(names) or 'none'}.")
        if strange := [name for name in self.listed if name not in names]:
            raise CircuitError(unknown("site of this circuit", strange[0], names))
        if len({one.n_positions for one in self.universe} - {None}) > 1:
            raise CircuitError(f"the sites of a circuit share their positions; got {', '.join(map(str, self.universe))}.")
        listed: dict[str, Index] = {}
        scores: dict[str, np.ndarray] = {}
        for one in self.universe:
            cells = np.asarray(self.listed.get(one.name, np.zeros((0, len(one.shape)), dtype=np.int64))).reshape(-1, len(one.shape))
            if not (inside := one.contains(cells)).all():
                raise CircuitError(f"{cells[~inside][0].tolist()} ({', '.join(one.site.axes)}) is not among the candidates of {one}.")
            ids, first = np.unique(one.ids(cells), return_index=True)
            if len(ids) < len(cells):
                raise CircuitError(f"{len(cells) - len(ids)} nodes of {one.name} are listed twice; list each once.")
            listed[one.name] = _frozen(one.cells(ids))
            if self.scores is not None:
                own = np.asarray(self.scores.get(one.name, np.full(len(cells), np.nan)), dtype=np.float64)
                if own.shape != (len(cells),) or np.isinf(own).any():
                    raise CircuitError(f"{one.name} has {len(cells)} listed nodes and scores of shape {list(own.shape)}; give one finite score each.")
                scores[one.name] = _frozen(own[first])
        object.__setattr__(self, "listed", listed)
        object.__setattr__(self, "scores", None if self.scores is None else scores)
        object.__setattr__(self, "provenance", plain(self.provenance))
        if self.positions is not None and len(self.positions) != (self.n_positions or len(self.positions)):
            raise CircuitError(
                f"provenance['positions'] names {len(self.positions)} positions and the nodes have {self.n_positions}; name each once."
            )

    @staticmethod
    def of(universe: Sequence[Candidates], nodes: Iterable[str], provenance: Mapping[str, Any] | None = None) -> "NodeCircuit":
        """A circuit of named nodes: addresses, or names of heads and MLPs (``a3.h7``, ``m2``).

        Raises:
            SiteError: a text that is no address.
            CircuitError: a node that is no candidate, or of another granularity.
        """
        about = dict(provenance or {})
        by_kind = {one.site.kind: one for one in universe}
        listed: dict[str, list[tuple[int, ...]]] = {one.name: [] for one in universe}
        for name in [nodes] if isinstance(nodes, str) else nodes:
            site = Site.parse(name)
            if site.kind not in by_kind:
                raise CircuitError(f"{name} is of the site {site.kind}, and the candidates are of {', '.join(by_kind)}.")
            one = by_kind[site.kind]
            listed[one.name].append(one.cell(site, about.get("positions")))
        return NodeCircuit(tuple(universe), {name: _cells(cells) for name, cells in listed.items() if cells}, provenance=about)

    @staticmethod
    def full(universe: Sequence[Candidates], provenance: Mapping[str, Any] | None = None) -> "NodeCircuit":
        """All candidates."""
        return NodeCircuit(tuple(universe), {}, True, None, {**(provenance or {}), "how": "all nodes"})

    @staticmethod
    def empty(universe: Sequence[Candidates], provenance: Mapping[str, Any] | None = None) -> "NodeCircuit":
        """No candidates."""
        return NodeCircuit(tuple(universe), {}, False, None, {**(provenance or {}), "how": "no nodes"})

    @staticmethod
    def from_edges(circuit: Circuit) -> "NodeCircuit":
        """The heads and MLPs of a circuit of edges, among all heads and MLPs of its graph, at all positions.

        Example:
            >>> from patchlab.graph import Graph
            >>> NodeCircuit.from_edges(Circuit.of(Graph(2, 2, 8), ["a0.h1->m1", "m1->logits"])).nodes
            ('L0.H1.z', 'L1.mlp_out')
        """
        graph = circuit.graph
        sizes = {"z": (graph.n_layers, graph.n_heads)} | ({"mlp_out[layer]": (graph.n_layers,)} if graph.mlps else {})
        universe = tuple(Candidates(Site.parse(name), shape) for name, shape in sizes.items())
        kept = [name for name in circuit.nodes if name not in ("input", "logits")]
        about = {key: value for key, value in circuit.provenance.items() if key not in ("positions", "node_scores")}
        return NodeCircuit.of(universe, kept, {**about, "how": f"nodes of {circuit.n_edges:,} edges"})

    @property
    def n_nodes(self) -> int:
        """Number of nodes in the circuit."""
        listed = sum(map(len, self.listed.values()))
        return self.size - listed if self.all_but else listed

    @property
    def size(self) -> int:
        """Number of candidates."""
        return sum(one.size for one in self.universe)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the candidates, as they are written."""
        return tuple(one.name for one in self.universe)

    @property
    def n_positions(self) -> int | None:
        """Number of positions; None where all nodes are at all positions."""
        return next((one.n_positions for one in self.universe if one.n_positions is not None), None)

    @property
    def positions(self) -> tuple[str, ...] | None:
        """Names of the positions, where they have names."""
        return tuple(self.provenance["positions"]) if "positions" in self.provenance else None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Addresses of the nodes in the circuit, site by site."""
        return tuple(one.address(cell, self.positions) for one in self.universe for cell in one.cells(self.ids(one.name)).tolist())

    def ids(self, site: str) -> Int[np.ndarray, " node"]:
        """The nodes of a site that are in, as single numbers (:meth:`Candidates.ids`)."""
        one = self._candidates(site)
        listed = one.ids(self.listed[site])
        return np.setdiff1d(one.every(), listed, assume_unique=True) if self.all_but else listed

    def mask(self, site: str, layer: int | None) -> Bool[np.ndarray, "*axes"]:
        """Which nodes of one layer of a site are in: ``[pos]``, ``[unit]``, ``[pos, unit]`` or one value, as its axes have it.

        What is no candidate counts as in.
        """
        one, cells = self._candidates(site), self.listed[site]
        shape = one.shape[1:] if layer is not None else one.shape
        if layer is not None and layer not in one.layers:
            return np.ones(shape, dtype=bool)
        mask = np.full(shape, self.all_but)
        rows = cells if layer is None else cells[np.searchsorted(cells[:, 0], layer) : np.searchsorted(cells[:, 0], layer, side="right"), 1:]
        if len(rows):
            mask[tuple(rows.T)] = not self.all_but
        if one.units is not None and layer is not None:
            mask[..., one.units[layer] :] = True
        return mask

    def keeps_all(self, site: str, layer: int | None) -> bool:
        """Whether nothing of one layer of a site is ablated."""
        one = self._candidates(site)
        if layer is not None and layer not in one.layers:
            return True
        listed = self.listed[site]
        here = listed if layer is None else listed[listed[:, 0] == layer]
        return not len(here) if self.all_but else bool(self.mask(site, layer).all())

    def from_layer(self, start: int) -> "NodeCircuit":
        """With the nodes of the layers before ``start`` taken out of the candidates, so that they are free. Sites without layers go as well.

        Raises:
            CircuitError: no candidates are left.
        """
        kept = [(one, tuple(layer for layer in one.layers if layer >= start)) for one in self.universe]
        universe = tuple(replace(one, layers=layers) for one, layers in kept if layers)
        if not universe:
            raise CircuitError(f"no candidates are left from layer {start} on: {', '.join(map(str, self.universe))}.")
        return self._among(universe, {"start_layer": start})

    def only(self, *sites: str) -> "NodeCircuit":
        """With the candidates of some sites only; the others are free.

        Raises:
            CircuitError: no such site.
        """
        for site in sites:
            self._candidates(site)
        return self._among(tuple(one for one in self.universe if one.name in sites), {})

    def without(self, site: str, node: int) -> "NodeCircuit":
        """The circuit without one of its nodes, given as a single number."""
        one = self._candidates(site)
        gone = NodeCircuit(self.universe, {site: one.cells(np.array([node], dtype=np.int64))}, provenance=self.provenance)
        return replace(self - gone, provenance=self.provenance)

    def equals(self, other: "NodeCircuit") -> bool:
        """Whether candidates, nodes and scores are the same; provenance may differ."""
        if self.universe != other.universe or self.positions != other.positions:
            return False
        if any(not np.array_equal(self.ids(site), other.ids(site)) for site in self.sites):
            return False
        if self.scores is None or other.scores is None or self.all_but != other.all_but:
            return self.scores is other.scores
        return all(np.array_equal(self.scores[site], other.scores[site], equal_nan=True) for site in self.sites)

    def key(self) -> bytes:
        """Bytes that tell which nodes are in, among the same candidates."""
        return b"".join([bytes([self.all_but]), *(self.listed[site].tobytes() + b"|" for site in self.sites)])

    def __or__(self, other: "NodeCircuit") -> "NodeCircuit":
        return self._combined(other, "union", lambda mine, theirs: mine | theirs)

    def __and__(self, other: "NodeCircuit") -> "NodeCircuit":
        return self._combined(other, "intersection", lambda mine, theirs: mine & theirs)

    def __sub__(self, other: "NodeCircuit") -> "NodeCircuit":
        return self._combined(other, "difference", lambda mine, theirs: mine & (not theirs))

    def __xor__(self, other: "NodeCircuit") -> "NodeCircuit":
        return self._combined(other, "symmetric difference", lambda mine, theirs: mine != theirs)

    def __invert__(self) -> "NodeCircuit":
        return replace(self, all_but=not self.all_but, provenance=_without_choice(self.provenance) | {"how": "complement"})

    def table(self) -> pd.DataFrame:
        """The nodes that are in: ``node`` (address), ``site``, the axes that occur, ``score`` (mean effect; NaN where unknown), the largest first."""
        frames: list[pd.DataFrame] = []
        for one in self.universe:
            cells = one.cells(self.ids(one.name))
            columns: dict[str, Any] = {"node": [one.address(cell, self.positions) for cell in cells.tolist()], "site": one.name}
            columns |= {axis: pd.array(cells[:, i], dtype="Int64") for i, axis in enumerate(one.site.axes)}
            known = self.scores is not None and not self.all_but
            frames.append(
                pd.DataFrame(columns | {"score": np.asarray(self.scores[one.name]) if known and self.scores else np.full(len(cells), np.nan)})
            )
        table = pd.concat(frames, ignore_index=True)
        order = table["score"].abs().sort_values(ascending=False, kind="stable", na_position="last").index
        return table.reindex(columns=[*table.columns.drop("score"), "score"]).loc[order].reset_index(drop=True)

    def summary(self, top: int = 10) -> str:
        """The circuit as text: its size, its stability if measured, the nodes per layer and the ``top`` nodes by absolute score."""
        lines = [repr(self), *([f"Stability: {sentence(self.provenance['stability'])}."] if "stability" in self.provenance else [])]
        for one in self.universe:
            cells = one.cells(self.ids(one.name))
            if KINDS[one.site.kind].layered and len(cells):
                layers, counts = np.unique(cells[:, 0], return_counts=True)
                lines.append(f"{one.name}: " + ", ".join(f"layer {layer} {n:,}" for layer, n in zip(layers, counts, strict=True)))
        table = self.table().dropna(subset="score").head(top)
        if len(table):
            lines.append(f"Largest {len(table)} of its nodes by |effect|:")
            lines += [f"  {row['node']:<24} {row['score']:+.4g}" for row in table.to_dict("records")]
        return "\n".join(lines)

    def __repr__(self) -> str:
        about = self.provenance
        who = ", ".join(str(about[key]) for key in ("method", "direction", "metric", "how", "file") if about.get(key))
        what = " × ".join(str(about[key]) for key in ("model", "task") if about.get(key))
        of = [f"{len(self.ids(one.name)) if not self.all_but else one.size - len(self.listed[one.name]):,} of {one}" for one in self.universe]
        notes = "".join(f"; note: {note}" for note in about.get("notes", ()))
        return f"NodeCircuit({'; '.join(filter(None, [who, what]))}) {self.n_nodes:,} of {self.size:,} nodes: {', '.join(of)}{notes}"

    def _candidates(self, site: str) -> Candidates:
        found = next((one for one in self.universe if one.name == site), None)
        if found is None:
            raise CircuitError(unknown("site of this circuit", site, self.sites))
        return found

    def _among(self, universe: tuple[Candidates, ...], more: Mapping[str, Any]) -> "NodeCircuit":
        """The circuit among fewer candidates."""
        listed, scores = {}, {}
        for one in universe:
            cells = self.listed[one.name]
            inside = one.contains(cells)
            listed[one.name] = cells[inside]
            scores[one.name] = None if self.scores is None else self.scores[one.name][inside]
        return NodeCircuit(universe, listed, self.all_but, None if self.scores is None else scores, self.provenance | dict(more))

    def _combined(self, other: "NodeCircuit", how: str, rule: Callable[[bool, bool], bool]) -> "NodeCircuit":
        """Both circuits as sets: which of the nodes listed by either are in, and whether the others are."""
        if self.universe != other.universe or self.positions != other.positions:
            raise CircuitError(
                f"one circuit has the candidates {_text(self)} and the other {_text(other)}; combine circuits of the same candidates only "
                f"(only(...) and from_layer(...) take some out)."
            )
        outside = rule(self.all_but, other.all_but)
        known = self.scores is not None and other.scores is not None
        listed, scores = {}, {}
        for one in self.universe:
            mine, theirs = one.ids(self.listed[one.name]), one.ids(other.listed[one.name])
            ids = np.union1d(mine, theirs)
            inside = np.array(
                [rule(m, t) for m, t in zip(np.isin(ids, mine) != self.all_but, np.isin(ids, theirs) != other.all_but, strict=True)], dtype=bool
            )
            ids = ids[inside != outside]
            listed[one.name] = one.cells(ids)
            if known and self.scores is not None and other.scores is not None:
                of = {
                    **dict(zip(theirs.tolist(), other.scores[one.name], strict=True)),
                    **dict(zip(mine.tolist(), self.scores[one.name], strict=True)),
                }
                scores[one.name] = np.array([of[i] for i in ids.tolist()])
        shared = {key: value for key, value in _without_choice(self.provenance).items() if other.provenance.get(key) == value}
        return NodeCircuit(self.universe, listed, outside, scores if known and not outside else None, shared | {"how": how})


def _without_choice(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance without what says how the nodes were chosen, which no longer holds for a combination."""
    return {key: value for key, value in provenance.items() if key not in ("how", "n_requested", "level", "stability")}


def _cells(cells: Sequence[Sequence[int]]) -> Index:
    return np.array(cells, dtype=np.int64)


def _text(circuit: NodeCircuit) -> str:
    return ", ".join(map(str, circuit.universe)) + (f" at {', '.join(circuit.positions)}" if circuit.positions else "")


def _ranges(layers: Sequence[int]) -> str:
    """Layers in words: ``2 to 5``, or ``1, 3``."""
    whole = list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 2 and list(layers) == whole else ", ".join(map(str, layers))


def _frozen(values: np.ndarray) -> np.ndarray:
    values = np.array(values)
    values.setflags(write=False)
    return values
