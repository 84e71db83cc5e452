"""QK attribution: which components, at the position that looks and at the one that is looked at, make an attention score."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import NormPlace
from patchlab.engine import Program, run
from patchlab.engine.contributions import Layer, layers_of
from patchlab.engine.jacobians import score_forms
from patchlab.errors import LensError, SiteError, unknown
from patchlab.host import precise, to_array
from patchlab.lenses.rows import RowBatch, rows_of
from patchlab.lenses.stream import allowed
from patchlab.lenses.writers import Written, sites_read, written
from patchlab.models import Model
from patchlab.sites import Site
from patchlab.tasks.task import Task

_BLOCK, _MOST = 2**22, 2**27
"""Pairs of which means are held at a time, and the most numbers of a dense array of pairs."""


@dataclass(frozen=True, eq=False)
class Side:
    """What the query or the key of each example is made of: one entry per component that is there, those of an example side by side.

    Attributes:
        names: of all components.
        component: which of them each entry is, ``[entry]``.
        starts: where the entries of each example begin, and the end of the last, ``[example + 1]``.
        vectors: ``[entry, d_head]``; that of a query times that of a key is what the pair makes of the score.
    """

    names: tuple[str, ...]
    component: Int[np.ndarray, " entry"]
    starts: Int[np.ndarray, " example_and_end"]
    vectors: Float[np.ndarray, "entry d_head"]

    def of(self, example: int) -> tuple[Int[np.ndarray, " own"], Float[np.ndarray, "own d_head"]]:
        """Components and vectors of one example."""
        part = slice(self.starts[example], self.starts[example + 1])
        return self.component[part], self.vectors[part]


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """An attention score as a sum over pairs of components.

    Components are ``input``, ``positions``, heads, MLPs and ``bias``; with dictionaries also features (``m3.f512``), what dictionaries leave out
    (``m3.error``) and what belongs to no feature (``m3.bias``). A feature that is not active in an example is not there, and counts as zero in means.

    Attributes:
        site: the head and both positions, ``L5.H1.pattern@END<S1``.
        subject: model and prompts.
        by: what components are (:data:`patchlab.lenses.writers.BY`).
        scores: ``score`` ``[example]``, in the unit of the softmax's input, before any soft cap, and ``rest`` ``[example]``, what does not come from
            queries and keys (the position bias of ALiBi). All pairs of an example and its ``rest`` add up to its ``score``.
        queries: the components of queries.
        keys: those of keys.
        capped: whether the model caps its scores.
    """

    site: str
    subject: str
    by: str
    scores: xr.Dataset
    queries: Side
    keys: Side
    capped: bool

    @cached_property
    def data(self) -> xr.Dataset:
        """All pairs as ``pairs`` ``[example, query, key]``, beside ``score`` and ``rest``.

        Raises:
            LensError: more pairs than fit; :meth:`pairs` has those of one example.
        """
        shape = (self.scores.sizes["example"], len(self.queries.names), len(self.keys.names))
        if np.prod(shape, dtype=float) > _MOST:
            raise LensError(
                f"{shape[0]} examples of {shape[1]:,} × {shape[2]:,} components do not fit into one array; use table(), grid() or pairs()."
            )
        dense = np.zeros(shape)
        for example in range(shape[0]):
            (query, a), (key, b) = self.queries.of(example), self.keys.of(example)
            dense[example][np.ix_(query, key)] = a @ b.T
        coords = {"query": list(self.queries.names), "key": list(self.keys.names)}
        return self.scores.assign(pairs=(("example", "query", "key"), dense)).assign_coords(coords)

    def pairs(self, example: int) -> xr.DataArray:
        """The pairs of one example, ``[query, key]``, of the components that are there.

        Raises:
            LensError: no such example.
        """
        if not 0 <= example < self.scores.sizes["example"]:
            raise LensError(f"example is {example}; there are {self.scores.sizes['example']}, from 0.")
        (query, a), (key, b) = self.queries.of(example), self.keys.of(example)
        coords = {"query": [self.queries.names[i] for i in query], "key": [self.keys.names[i] for i in key]}
        return xr.DataArray(a @ b.T, dims=("query", "key"), coords=coords, name="pairs")

    def table(self, n: int | None = 10, *, of: str = "pairs") -> pd.DataFrame:
        """The n pairs with the largest mean (None: all), or of one side the components, each with all that is on the other.

        Args:
            n: how many.
            of: ``pairs``, ``query`` or ``key``.

        Raises:
            LensError: another ``of``.
        """
        if of not in ("pairs", "query", "key"):
            raise LensError(unknown("side of a score", of, ("pairs", "query", "key")))
        if of != "pairs":
            side = self.queries if of == "query" else self.keys
            mean = np.concatenate([block.sum(1) for _, block in self._means()]) if of == "query" else sum(block.sum(0) for _, block in self._means())
            order = np.argsort(-np.abs(mean), kind="stable")[:n]
            return pd.DataFrame({of: [side.names[i] for i in order], "score": np.asarray(mean)[order]})
        places, values = np.zeros(0, dtype=np.int64), np.zeros(0)
        for start, block in self._means():
            flat = block.ravel()
            places, values = np.concatenate([places, start * block.shape[1] + np.arange(flat.size)]), np.concatenate([values, flat])
            order = np.argsort(-np.abs(values), kind="stable")[:n]
            places, values = places[order], values[order]
        query, key = np.divmod(places, len(self.keys.names))
        return pd.DataFrame({"query": [self.queries.names[i] for i in query], "key": [self.keys.names[i] for i in key], "score": values})

    def grid(self, n: int = 12) -> xr.DataArray:
        """Means over examples of the pairs of the n components of each side that matter most, ``[query, key]``.

        Those with the largest sums of absolute means; all others together are ``others``: the whole adds up to the mean score (less ``rest``).
        """
        sides = (self.queries, self.keys)
        sizes = [np.zeros(len(side.names)) for side in sides]
        for start, block in self._means():
            sizes[0][start : start + len(block)] += np.abs(block).sum(1)
            sizes[1] += np.abs(block).sum(0)
        chosen = [np.argsort(-size, kind="stable")[:n] for size in sizes]
        place = []
        for side, own in zip(sides, chosen, strict=True):
            where = np.full(len(side.names), len(own))
            where[own] = np.arange(len(own))
            place.append(where)
        shape = tuple(int(where.max()) + 1 for where in place)
        total = np.zeros(shape)
        for start, block in self._means():
            np.add.at(total, np.ix_(place[0][start : start + len(block)], place[1]), block)
        names = [[*(side.names[i] for i in own), "others"][:size] for side, own, size in zip(sides, chosen, shape, strict=True)]
        return xr.DataArray(total, dims=("query", "key"), coords={"query": names[0], "key": names[1]}, name="pairs")

    def _means(self) -> Iterator[tuple[int, Float[np.ndarray, "query key"]]]:
        """Means of pairs over examples, some queries at a time, with the number of the first."""
        count, width = self.scores.sizes["example"], len(self.keys.names)
        step = max(1, _BLOCK // width)
        for start in range(0, len(self.queries.names), step):
            block = np.zeros((min(step, len(self.queries.names) - start), width))
            for example in range(count):
                (query, a), (key, b) = self.queries.of(example), self.keys.of(example)
                here = (query >= start) & (query < start + len(block))
                block[np.ix_(query[here] - start, key)] += a[here] @ b.T
            yield start, block / count

    def show(self, n: int | None = 10, *, of: str = "pairs") -> None:
        """Write :meth:`table` to standard output."""
        sys.stdout.write(self.table(n, of=of).to_string(index=False, float_format=lambda value: f"{value:+.3f}") + "\n")

    def __repr__(self) -> str:
        cap = ", before its soft cap" if self.capped else ""
        sizes = f"{len(self.queries.names)} components" if self.by == "head" else f"{len(self.queries.names)} × {len(self.keys.names)} components"
        return f"QKAttribution({self.site}, {self.subject}) {sizes}; mean score {float(self.scores['score'].mean()):.3g}{cap}"


def qk_attribution(model: Model, task: Task, site: str | Site, *, side: str = "clean", by: str = "head") -> QKAttribution:
    """The score of one head between two positions, taken apart exactly into pairs of components.

    Queries and keys are linear in what earlier components wrote into the stream at their position, when the denominator of the norm before the
    attention is held at its value (and those of norms of queries and keys); the score is bilinear in queries and keys, rotations of positions
    included. So it is a sum over pairs: one component at the position that looks, one at the position that is looked at.

    Args:
        model: the model.
        task: its prompts.
        site: head and both positions, such as ``L5.H1.pattern@END<S1``; positions are names or numbers.
        side: ``clean`` or ``corrupted``.
        by: ``head``; on a model that was given dictionaries (``model.add_dictionaries``) also ``feature``, for those on attn_out and mlp_out of
            earlier layers, or ``state``, for the one on the stream that the attention reads (resid_pre of its layer, or resid_post of the one
            before).
            Only active features are components.

    Raises:
        SiteError: no head or not one position each, one that is not attended to, or scores that are not bilinear in queries and keys.
        LensError: a stream that is not the sum of what its blocks write, or no dictionaries where some are needed.
        InterventionError: inside ``pl.intervene``.

    Example:
        >>> pl.lenses.qk_attribution(model, task, "L5.H1.pattern@END<S1").show()  # doctest: +SKIP
    """
    wanted = Site.parse(site)
    model.arch.check(wanted)
    layer, head, pos, src = wanted.layer, wanted.index, wanted.pos, wanted.src
    if wanted.kind != "pattern" or layer is None or head is None or pos is None or src is None or len(pos) != 1 or len(src) != 1:
        raise SiteError(f"a score is of one head between two positions, written L5.H1.pattern@END<S1; got {wanted}.")
    sites, blocks = sites_read(model, layer, by), layers_of(model)
    rows = rows_of(model, task, side=side)
    found: dict[int, tuple[_Parts, _Parts, float, float]] = {}
    for batch in rows.batches:
        dest, source = _at(task, batch, pos[0]), _at(task, batch, src[0])
        forms, scores, queries, keys = score_forms(model, batch.tokens, layer, head, dest, source)
        scales = _scales(model, blocks[layer].before, batch)
        with torch.no_grad():
            kept = run(model, Program(batch.tokens, batch.examples, positions=batch.positions, keep=sites)).activations
        for row, example in enumerate(batch.examples.tolist()):
            made: list[tuple[tuple[str, ...], Tensor]] = []
            for letter, at, whole in (("q", dest, queries), ("k", source, keys)):
                parts = written(model, {target: value[row, at[row]] for target, value in kept.items()}, blocks, layer, by)
                own = None if scales is None else scales[row, at[row]]
                made.append(((*parts.names, "bias"), _read(model, blocks[layer], layer, head, letter, parts, own, whole[row])))
            (query_names, query), (key_names, key) = made
            key = precise(key) @ precise(forms[row]).T
            whole = precise(queries[row]) @ precise(forms[row]) @ precise(keys[row])
            _check(model, site, precise(query), key, whole)
            total = float((precise(query).sum(0) * key.sum(0)).sum())
            found[example] = (query_names, _numpy(query)), (key_names, _numpy(key)), float(scores[row]), float(scores[row]) - total
    order = [found[example] for example in sorted(found)]
    data = xr.Dataset({name: (("example",), np.array([one[i] for one in order])) for i, name in ((2, "score"), (3, "rest"))})
    capped = any(place.name == f"blocks.{layer}.attn.softcap" for place in model.arch.places)
    subject = rows.subject if side == "clean" else f"{rows.subject}, {side}"
    return QKAttribution(str(wanted), subject, by, data, _side([one[0] for one in order]), _side([one[1] for one in order]), capped)


_Parts = tuple[tuple[str, ...], Float[np.ndarray, "_component d_head"]]


def _numpy(value: Tensor) -> Float[np.ndarray, "component d_head"]:
    return to_array(value)


def _side(parts: Sequence[_Parts]) -> Side:
    """Components of all examples by name, the bias last."""
    names = [*dict.fromkeys(name for own, _ in parts for name in own if name != "bias"), "bias"]
    number = {name: i for i, name in enumerate(names)}
    component = np.array([number[name] for own, _ in parts for name in own], dtype=np.int64)
    starts = np.cumsum([0, *(len(own) for own, _ in parts)])
    return Side(tuple(names), component, starts, np.concatenate([vectors for _, vectors in parts]))


def _at(task: Task, batch: RowBatch, position: int | str) -> Int[Tensor, " row"]:
    """The token position of each row that a name or number stands for.

    Raises:
        SiteError: a position that not all prompts have.
    """
    found: list[int] = []
    for example in batch.examples.tolist():
        pair = task.pairs[example]
        where = pair.positions.get(position) if isinstance(position, str) else position
        if where is None or not -len(pair) <= where < len(pair):
            raise SiteError(f"pair {example} of {task.name} has no position {position!r}; all have {', '.join(task.position_names())}, and numbers.")
        found.append(where % len(pair))
    return torch.tensor(found, device=batch.tokens.device)


def _scales(model: Model, place: NormPlace | None, batch: RowBatch) -> Float[Tensor, "row pos 1"] | None:
    """The denominators of the norm before the attention in this run; None where there is no norm."""
    if place is None:
        return None
    hook = place.reads[1]
    with torch.no_grad():
        return run(model, Program(batch.tokens, batch.examples, positions=batch.positions, hooks=(hook,))).hooks[hook]


def _read(
    model: Model, block: Layer, layer: int, head: int, letter: str, parts: Written, scale: Float[Tensor, " 1"] | None, whole: Float[Tensor, " d_head"]
) -> Float[Tensor, "component_and_bias d_head"]:
    """What a head's query or key is made of, by component, with the norm's denominator held; the last one is the bias.

    Raises:
        LensError: they do not add up to the query or key.
    """
    weight, bias = block.read[letter]
    vectors = parts.vectors
    weight = weight[head].to(vectors.dtype)
    fixed = torch.zeros_like(weight[:1]) if bias is None else bias[head].to(vectors.dtype)
    if block.before is not None and scale is not None:
        place = block.before
        vectors = (vectors - vectors.mean(-1, keepdim=True) if place.centred else vectors) / scale.to(vectors.dtype)
        vectors = vectors if place.weight is None else vectors * place.weight.to(vectors.dtype)
        shift = place.bias
        fixed = fixed if shift is None else fixed + shift.to(vectors.dtype) @ weight
    made = torch.cat([vectors @ weight, fixed])
    off = float((made.sum(0) - whole.to(made.dtype)).abs().max() / whole.abs().max().clamp_min(1e-30))
    if off > allowed(model):
        raise LensError(
            f"parts of the {'queries' if letter == 'q' else 'keys'} of layer {layer} of {model.name} do not add up to them (off by {off:.2g})."
        )
    return made


def _check(model: Model, site: str | Site, query: Float[Tensor, "query d"], key: Float[Tensor, "key d"], whole: Float[Tensor, ""]) -> None:
    pairs = query @ key.T
    off = float((pairs.sum() - whole).abs() / pairs.abs().sum().clamp_min(1e-30))
    if off > allowed(model):
        raise LensError(f"the pairs of {site} do not add up to what queries and keys make of the score on {model.name} (off by {off:.2g}).")
