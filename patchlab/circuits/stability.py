"""Stability of a choice: how much of a circuit stays when the prompts that it was chosen on are drawn anew, and what stays in every draw."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.nodes import Candidates, NodeCircuit
from patchlab.errors import CircuitError
from patchlab.scores import ScoreMap
from patchlab.stats.jaccard import BAR, ENOUGH, likeness, sentence

DRAWS = 100
Choose = Callable[[ScoreMap], Any]
"""A choice from scores: ``lambda scores: top_n(scores, 100)``. It gives a circuit, or a bool array over cells."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Stability:
    """How alike the choices are that are made on resamples of the prompts.

    The headline is the mean **pairwise** Jaccard index: of two resamples, which stand for two studies of the same behaviour, what both chose as a
    share of what either chose. The choice on all prompts lies in the middle of the resamples, so that their likeness to it (``jaccard_to_choice``)
    is higher, and says less about whether others would find this circuit. Large circuits are alike whatever they were chosen by: compare with
    ``jaccard_chance``.

    Args:
        choice: what is chosen on all prompts; of a circuit, its provenance holds :meth:`record` under ``stability``.
        numbers: of :func:`patchlab.stats.jaccard.likeness`; tables have them as columns.
        sizes: how many parts each resample chose.
        shares: per part (as the numbering of the circuit has it) in which share of the resamples it is; parts that are in none are left out.
        prompts: how many there are.
        seed: of the resamples.
    """

    choice: Any = field(repr=False)
    numbers: Mapping[str, float]
    sizes: Int[np.ndarray, " draw"] = field(repr=False)
    shares: Mapping[int, float] = field(repr=False)
    prompts: int
    seed: int

    @property
    def jaccard(self) -> float:
        """Mean over pairs of resamples."""
        return self.numbers["jaccard"]

    @property
    def reaches_bar(self) -> bool | None:
        """Whether the mean is at least .8; None with fewer than 100 prompts, which the bar is not for."""
        return self.jaccard >= BAR if self.prompts >= ENOUGH else None

    def record(self) -> dict[str, Any]:
        """What files hold, as plain values."""
        about = {"draws": len(self.sizes), "prompts": self.prompts, "seed": self.seed, "reaches_bar": self.reaches_bar}
        return {**self.numbers, **about}

    def table(self) -> pd.DataFrame:
        """Per part that some resample chose: ``edge`` (and ``pos``) or ``node``, ``share`` of the resamples, ``chosen`` on all prompts; the largest
        share first.

        Raises:
            CircuitError: the choice is no circuit, so that its parts have no names.
        """
        known = np.array(list(self.shares), dtype=np.int64)
        columns = _names(self.choice, known) | {"share": list(self.shares.values()), "chosen": np.isin(known, parts(self.choice)[0])}
        return pd.DataFrame(columns).sort_values("share", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        return f"Stability({sentence(self.record())})"


def stability(scores: ScoreMap, choose: Choose, *, draws: int = DRAWS, seed: int = 0) -> Stability:
    """Measure how stable a choice is under resampling of the prompts that the scores come from.

    The prompts are drawn with replacement, as many as there are, the choice is made on each draw as on the whole, and every pair of draws is
    compared by its Jaccard index ``|A ∩ B| / |A ∪ B|``. Source: arXiv 2510.00845, which asks for .8 at 100 prompts and more.

    Args:
        scores: a map with effects per example, of edges, nodes or whatever is chosen from.
        choose: the choice: a function of a map that gives a circuit, or a bool array over cells.
        draws: resamples.
        seed: of the resamples: those that an interval with this seed uses.

    Raises:
        CircuitError: fewer than two prompts or draws, nothing chosen, and whatever the choice refuses.

    Example:
        >>> stability(scores, lambda one: circuits.top_n(one, 100))  # doctest: +SKIP
        Stability(Jaccard .71 between resamples (95 % of pairs in .62 to .81, chance .01; 100 resamples of 128 prompts; the bar of .8 is not reached))
    """
    return stabilities(scores, {"": choose}, draws=draws, seed=seed)[""]


def stabilities(scores: ScoreMap, choices: Mapping[Key, Choose], *, draws: int = DRAWS, seed: int = 0) -> dict[Key, Stability]:
    """The stability of several choices from the same scores, on the same resamples; see :func:`stability`."""
    prompts = scores.data.sizes["example"]
    if prompts < 2 or draws < 2:
        raise CircuitError(f"stability compares choices on resamples of prompts: at least 2 of each; got {draws} resamples and {prompts} prompts.")
    whole = {key: choose(scores) for key, choose in choices.items()}
    found: dict[Key, list[np.ndarray]] = {key: [] for key in choices}
    for rows in np.random.default_rng(seed).integers(prompts, size=(draws, prompts)):
        redrawn = _redrawn(scores, rows)
        for key, choose in choices.items():
            found[key].append(parts(choose(redrawn))[0])
    return {key: _measured(whole[key], chosen, prompts, seed) for key, chosen in found.items()}


def consistent(scores: ScoreMap, choose: Choose, *, share: float | int = 0.9, draws: int = DRAWS, seed: int = 0, prune: bool = True) -> Any:
    """The parts that are chosen on at least this share of resamples of the prompts.

    What a choice on all prompts owes to a few of them is left out, so that fewer parts are chosen than by ``choose`` itself, or more where many
    parts are about equally important. Source: bootstrapped selection, arXiv 2510.25786.

    Args:
        scores: as for :func:`stability`.
        choose: as for :func:`stability`.
        share: of the resamples, above 0 and at most 1.
        draws: resamples.
        seed: of the resamples.
        prune: drop edges that dangle afterwards (:meth:`Circuit.pruned`).

    Returns:
        What ``choose`` gives, a circuit or a bool array, with those parts; the scores of a circuit are the effects over all prompts.

    Raises:
        CircuitError: a share outside its range, and as :func:`stability`.

    Example:
        >>> consistent(scores, lambda one: circuits.top_n(one, 100), share=0.9)  # doctest: +SKIP
    """
    if not 0 < share <= 1:
        raise CircuitError(f"the share of resamples that a part must be chosen on is above 0 and at most 1; got {share}.")
    found = stability(scores, choose, draws=draws, seed=seed)
    least = math.ceil(share * draws - 1e-9)
    kept = np.array([part for part, one in found.shares.items() if round(one * draws) >= least], dtype=np.int64)
    how = str(getattr(found.choice, "provenance", {}).get("how", "a choice"))
    about = {"how": f"in at least {share:.0%} of {draws:,} resamples: {how}", "share": float(share), "draws": draws, "resampling_seed": seed}
    return restricted(found.choice, kept, about, scores, prune)


@singledispatch
def parts(choice: Any) -> tuple[Int[np.ndarray, " part"], int]:
    """The numbers of the parts that a choice holds, and how many there are to choose from.

    Raises:
        CircuitError: neither a circuit nor a bool array.
    """
    raise CircuitError(f"a choice gives a circuit, or a bool array over cells; got {type(choice).__name__}.")


@parts.register
def _(choice: Circuit) -> tuple[Int[np.ndarray, " part"], int]:
    return np.flatnonzero(choice.edges), choice.graph.n_edges * (choice.n_positions or 1)


@parts.register
def _(choice: np.ndarray) -> tuple[Int[np.ndarray, " part"], int]:
    if choice.dtype != bool:
        raise CircuitError(f"a choice gives a circuit, or a bool array over cells; got an array of {choice.dtype}.")
    return np.flatnonzero(choice), choice.size


@parts.register
def _(choice: NodeCircuit) -> tuple[Int[np.ndarray, " part"], int]:
    return np.concatenate([first + choice.ids(one.name) for one, first in _numbered(choice)]), choice.size


def _numbered(choice: NodeCircuit) -> Iterator[tuple[Candidates, int]]:
    """Candidates of each site with the number of their first node, counting site by site."""
    first = 0
    for one in choice.universe:
        yield one, first
        first += math.prod(one.shape)


@singledispatch
def restricted(choice: Any, kept: Int[np.ndarray, " part"], about: Mapping[str, Any], scores: ScoreMap, prune: bool) -> Any:
    """A choice of the same kind with other parts, and their effects in the map."""
    raise CircuitError(f"a choice gives a circuit, or a bool array over cells; got {type(choice).__name__}.")


@restricted.register
def _(choice: Circuit, kept: Int[np.ndarray, " part"], about: Mapping[str, Any], scores: ScoreMap, prune: bool) -> Circuit:
    made = replace(choice, edges=_mask(choice.edges.shape, kept), provenance=_with(choice.provenance, about))
    return made.pruned() if prune else made


@restricted.register
def _(choice: np.ndarray, kept: Int[np.ndarray, " part"], about: Mapping[str, Any], scores: ScoreMap, prune: bool) -> Bool[np.ndarray, "*cells"]:
    return _mask(choice.shape, kept)


@restricted.register
def _(choice: NodeCircuit, kept: Int[np.ndarray, " part"], about: Mapping[str, Any], scores: ScoreMap, prune: bool) -> NodeCircuit:
    listed: dict[str, Any] = {}
    effects: dict[str, Any] = {}
    for one, first in _numbered(choice):
        ids = kept[(kept >= first) & (kept < first + math.prod(one.shape))] - first
        known = pd.Series(scores.mean(one.name).to_numpy().ravel(), index=one.ids(scores.cells(one.name)))
        listed[one.name], effects[one.name] = one.cells(ids), known.reindex(ids).to_numpy(np.float64)
    return NodeCircuit(choice.universe, listed, False, effects, _with(choice.provenance, about))


def _with(provenance: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in provenance.items() if key not in ("pruned", "stability")}, **about}


def _names(choice: Any, known: Int[np.ndarray, " part"]) -> dict[str, Any]:
    """The names of parts, as columns."""
    if isinstance(choice, Circuit):
        places = np.unravel_index(known, choice.edges.shape)
        names = [choice.graph.name(writer, reader) for writer, reader in zip(places[0].tolist(), places[1].tolist(), strict=True)]
        return {"edge": names} | ({"pos": places[2]} if choice.n_positions is not None else {})
    if isinstance(choice, NodeCircuit):
        ranges = [(one, known[(known >= first) & (known < first + math.prod(one.shape))] - first) for one, first in _numbered(choice)]
        return {"node": [one.address(cell, choice.positions) for one, ids in ranges for cell in one.cells(ids).tolist()]}
    raise CircuitError(f"parts of circuits have names; the choice is a {type(choice).__name__}.")


def noted(choice: Any, record: Mapping[str, Any]) -> Any:
    """A choice that holds the record of its stability, where it has provenance."""
    if not hasattr(choice, "provenance"):
        return choice
    return replace(choice, provenance={**choice.provenance, "stability": dict(record)})


def _redrawn(scores: ScoreMap, rows: Int[np.ndarray, " example"]) -> ScoreMap:
    """The map of a resample: its examples, some of them several times."""
    return replace(scores, data=scores.data.isel(example=rows), patterns=None, noise=None, standard_error=None)


def _measured(choice: Any, chosen: list[np.ndarray], prompts: int, seed: int) -> Stability:
    own, total = parts(choice)
    if not len(own):
        raise CircuitError("nothing is chosen on all prompts, so there is nothing that could be stable. Choose more.")
    known, counts = np.unique(np.concatenate(chosen), return_counts=True)
    shares = dict(zip(known.tolist(), (counts / len(chosen)).tolist(), strict=True))
    sizes = np.array([len(one) for one in chosen], dtype=np.int64)
    found = Stability(choice, likeness(chosen, own, total), sizes, shares, prompts, seed)
    return replace(found, choice=noted(choice, found.record()))


def _mask(shape: tuple[int, ...], kept: Int[np.ndarray, " part"]) -> Bool[np.ndarray, "*cells"]:
    mask = np.zeros(shape, dtype=bool)
    mask.ravel()[kept] = True
    return mask
