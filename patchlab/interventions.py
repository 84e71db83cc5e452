"""Interventions: an edit puts values from a source into a site of a run.

    >>> import patchlab as pl
    >>> edit = pl.Edit("L9.H6.z@END", pl.sources.zero())
    >>> str(edit.address)
    'L9.H6.z@END'

Edits are values: nothing happens until a run carries them (``model.run(tokens, edits=[...])``) or a
``with pl.intervene(model, [...])`` block surrounds runs and methods.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.errors import InterventionError
from patchlab.sites import KINDS, Position, Site, address
from patchlab.sources import Source, as_source, fitted

Operation = Literal["replace", "add", "scale", "at_least", "at_most"]
OPERATIONS = get_args(Operation)


@dataclass(frozen=True)
class Edit:
    """Put a source's values into a site.

    Args:
        site: an address such as ``"L9.H6.z@END"`` or ``"L3.resid_pre"`` (all positions).
        source: a run with kept activations, ``pl.sources.zero()``, ``pl.sources.noise(...)``, ``pl.sources.mean_of(...)``, a tensor or a number.
        op: ``replace`` the value, ``add`` to it, ``scale`` it, or clamp it: raise it to ``at_least`` the source's, lower it to ``at_most`` that.
        rows: which rows of the run it applies to (boolean, one per row); None means all.
        joint: a name that edits of parts of one sum share (the features of a dictionary and its error). Where they follow each other at a hook,
            each reads what the first of them read, and their changes are added up: none acts on what another one has changed.
    """

    site: Site | str
    source: Any
    op: Operation = "replace"
    rows: Bool[Tensor, " row"] | None = None
    joint: str = ""

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise InterventionError(f"an edit's op is one of {', '.join(map(repr, OPERATIONS))}; got {self.op!r}.")
        _ = self.address, self.values_from

    @cached_property
    def address(self) -> Site:
        """The parsed address."""
        site = Site.parse(self.site)
        if not site.narrowed and not KINDS[site.kind].layered and KINDS[site.kind].granularities is None:
            site = address(site.kind, None)
        if not site.narrowed:
            raise InterventionError(f"an edit needs an address with a layer, such as L3.{site.kind}@END; got {str(site)!r}.")
        return site

    @cached_property
    def values_from(self) -> Source:
        """The source as an object."""
        return as_source(self.source)

    def apply(
        self, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"], positions: Mapping[str, Int[Tensor, " row"]]
    ) -> Float[Tensor, "row *site"]:
        """The site's new value."""
        values = fitted(self.values_from.values(self.address, own, examples), self.address, own)
        if self.op == "add":
            values = own + values
        elif self.op == "scale":
            values = own * values
        elif self.op == "at_least":
            values = torch.maximum(own, values)
        elif self.op == "at_most":
            values = torch.minimum(own, values)
        mask = self._mask(own, positions)
        return values.clone() if mask is None else torch.where(mask, values, own)

    def _mask(self, own: Float[Tensor, "row *site"], positions: Mapping[str, Int[Tensor, " row"]]) -> Bool[Tensor, "row *site"] | None:
        site = self.address
        if site.whole and self.rows is None:
            return None
        mask = torch.ones(own.shape, dtype=torch.bool, device=own.device)
        if self.rows is not None:
            if self.rows.shape != own.shape[:1]:
                raise InterventionError(f"rows has {self.rows.shape[0]} entries and the run {own.shape[0]} rows; give one boolean per row.")
            mask &= _along(self.rows.to(own.device), 0, own.ndim)
        kind = KINDS[site.kind]
        if site.pos is not None:
            mask &= _positions_mask(site, site.pos, own, kind.dim(kind.position), positions)
        if site.src is not None and kind.source is not None:
            mask &= _positions_mask(site, site.src, own, kind.dim(kind.source), positions)
        if site.index is not None and kind.unit is not None:
            dim = kind.dim(kind.unit)
            mask &= _along(torch.arange(own.shape[dim], device=own.device) == site.index, dim, own.ndim)
        return mask


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    return vector.reshape([-1 if d == dim else 1 for d in range(ndim)])


def _positions_mask(site: Site, wanted: tuple[Position, ...], own: Tensor, dim: int, named: Mapping[str, Tensor]) -> Tensor:
    length = own.shape[dim]
    everywhere = torch.arange(length, device=own.device)
    chosen = torch.zeros(own.shape[0], length, dtype=torch.bool, device=own.device)
    for position in wanted:
        if isinstance(position, str) and position not in named:
            raise InterventionError(f"{site} names the position {position!r}; this run knows {', '.join(sorted(named)) or 'no names'} and integers.")
        if isinstance(position, int) and not -length <= position < length:
            raise InterventionError(f"{site} names position {position}, but the run has {length} positions (0 to {length - 1}).")
        index = named[position] if isinstance(position, str) else torch.full((own.shape[0],), position % length)
        chosen |= everywhere[None, :] == index.to(own.device)[:, None]
    return chosen.reshape([own.shape[0], *[length if d == dim else 1 for d in range(1, own.ndim)]])


def as_edits(edits: Any) -> tuple[Edit, ...]:
    """One edit or several, as a tuple.

    Raises:
        InterventionError: anything else.
    """
    several = (edits,) if isinstance(edits, Edit) or not isinstance(edits, Iterable) else tuple(edits)
    for edit in several:
        if not isinstance(edit, Edit):
            raise InterventionError(f"edits are pl.Edit(site, source), one or a list of them; got {type(edit).__name__}.")
    return several
