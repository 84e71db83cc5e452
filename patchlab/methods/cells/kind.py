"""Kinds of cells: what a score is of. One protocol says it, and each kind is one file beside this one.

A method never asks which kind it has. It splits its setting into the :func:`parts` of one kind each, and asks the kind of a part for what
it needs: which cells there are, which of them can matter, what their exact effects are, and how scores come from gradients.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.adapters import Architecture
from patchlab.engine import Result, Target
from patchlab.errors import MethodError, unknown
from patchlab.interventions import Edit
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored
from patchlab.rules import Composite
from patchlab.scores.arrays import CellNames, Effects, Sparse
from patchlab.sites import KINDS, Site
from patchlab.sources import Source
from patchlab.tasks.task import PositionAxis

Index = tuple[int, ...]
"""A cell: one number per axis of its site."""
Path = Literal["inputs", "activations", "groups"]
"""What moves along the path of integrated gradients."""


@dataclass(frozen=True)
class Exactly:
    """The way in which cells are patched exactly; see :class:`patchlab.ActivationPatching`. ``paired``: the source is the other prompt's run."""

    engine: str = "auto"
    post_norm: str = "renormalised"
    paired: bool = True


@dataclass(frozen=True)
class Linearly:
    """The way in which cells are scored by differences times coefficients; see :class:`patchlab.methods.LinearizedPatching`.

    ``over`` is None where there is one point, the baseline; ``paired`` says that the source is the other prompt's run.
    """

    name: str
    composite: Composite
    over: Path | None = None
    qk_fix: bool = False
    grad_drop: bool = False
    paired: bool = True

    @property
    def blocked(self) -> dict[str, str]:
        """Site kinds that the rules leave without a score, with the reason."""
        return {} if self.qk_fix else self.composite.not_scored


@runtime_checkable
class Linear(Protocol):
    """Sums, over the points of a path, what the cells of one batch are scored by."""

    def add(self, point: Result, weight: float, moved: Target | None) -> None:
        """One point of the path; ``moved`` is the activation that moves alone, None where all do."""
        ...

    def close(self, meter: Meter, notes: dict[str, Any], drop: int | None) -> None:
        """The end of a path, on which the backward contribution of the layer ``drop`` was left out."""
        ...

    def result(self, meter: Meter, notes: dict[str, Any]) -> Scored:
        """Scores and noise floors."""
        ...


@runtime_checkable
class CellKind(Protocol):
    """A kind of cells. Every setting that is handed to it has sites of this kind alone."""

    name: str
    reads_behind: bool
    """Whether scores take gradients behind the activation that moves alone, at what it is computed from."""

    def check(self, setting: Setting, others: int) -> None:
        """Raise if these cells cannot be scored here, or not together with ``others`` sites of other kinds."""
        ...

    def targets(self, arch: Architecture, sites: tuple[Site, ...]) -> tuple[Target, ...]:
        """Activations whose values in both runs the scores need: what moves along paths, and what means are taken of."""
        ...

    def summed(self, setting: Setting, kept: Mapping[Target, Tensor], *, positional: bool) -> dict[Target, Tensor]:
        """Sums over rows, and positions unless ``positional``, of what scores need the mean of beside that of their targets, in float64."""
        ...

    def shape(self, arch: Architecture, site: Site, axis: PositionAxis | None) -> tuple[int, ...]:
        """Length of each scored axis of a site."""
        ...

    def live(
        self, arch: Architecture, site: Site, changed: Bool[np.ndarray, " pos"], index: Any, reads_answer: bool
    ) -> Bool[np.ndarray, "*cells"] | None:
        """The cells that can matter for one example, from its changed positions; None if only the runs show which there are."""
        ...

    def record(self, setting: Setting) -> dict[str, Any]:
        """Provenance of the cells, whatever the method is."""
        ...

    def names(self, setting: Setting, site: Site) -> CellNames:
        """Names of the cells along the axes of a site, and which combinations are cells."""
        ...

    def check_exact(self, setting: Setting, how: Exactly) -> None:
        """Raise if the cells cannot be patched exactly in this way."""
        ...

    def exact_keeps(self, setting: Setting) -> tuple[Target, ...]:
        """Activations of the baseline that exact patches need."""
        ...

    def exact_bytes(self, setting: Setting, rows: int, length: int) -> int:
        """Memory that exact patching takes for a batch."""
        ...

    def exact_work(self, setting: Setting, how: Exactly) -> Float[np.ndarray, " cell"]:
        """The work of patching each live cell, in forward passes; nothing for cells that only the runs show."""
        ...

    def exact_record(self, setting: Setting, how: Exactly) -> dict[str, Any]:
        """Provenance of exact patches."""
        ...

    def cells(self, setting: Setting, site: Site, runs: Runs) -> list[Index]:
        """The live cells of one batch, in a stable order."""
        ...

    def label(self, setting: Setting, site: Site, cell: Index) -> str:
        """A cell by name: the address ``L9.H6.z@END``, the edge ``a0.h1->m1``."""
        ...

    def patch(
        self,
        setting: Setting,
        runs: Runs,
        meter: Meter,
        sets: "Sequence[Sequence[tuple[Site, Index]]]",
        how: Exactly,
        finished: MutableMapping[int, np.ndarray] | None = None,
    ) -> Float[np.ndarray, "set batch"]:
        """Exact effects of sets of cells, each patched at once. ``finished`` has those found before, by number, and gets the others."""
        ...

    def check_linear(self, setting: Setting, how: Linearly) -> None:
        """Raise if the cells cannot be scored linearly in this way."""
        ...

    def moves(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        """Activations that move alone, one after the other, where a path is not over inputs."""
        ...

    def keeps(self, setting: Setting, how: Linearly) -> tuple[Target, ...]:
        """Activations of the baseline that scores need, beside its targets."""
        ...

    def step(self, setting: Setting, runs: Runs, moved: Target, start: Source, at: float) -> tuple[Edit, ...]:
        """The edits that put what moves so far on its way from ``start`` to the source."""
        ...

    def needs(self, setting: Setting, how: Linearly, moved: Target | None) -> dict[str, Any]:
        """Fields of the program of a point of the path: what the run must return."""
        ...

    def passes(self, setting: Setting, how: Linearly) -> int:
        """Forward passes that scores take beside those of the points."""
        ...

    def linear_bytes(self, setting: Setting, how: Linearly, rows: int, length: int) -> int:
        """Memory that scores take beside activations and blocks, in numbers of the model's dtype."""
        ...

    def linear_record(self, setting: Setting, how: Linearly) -> dict[str, Any]:
        """Provenance of linearised scores."""
        ...

    def linear_scored(self, setting: Setting, how: Linearly, site: Site) -> Bool[np.ndarray, "*first"] | None:
        """The cells that the rules leave with a score; None for all."""
        ...

    def linear(self, setting: Setting, runs: Runs, how: Linearly, drops: Sequence[int | None]) -> Linear:
        """The sums of one batch."""
        ...

    def second_order(self, setting: Setting) -> str | None:
        """Why the cells have no second-order term; None if they have."""
        ...


CELLS: dict[str, CellKind] = {}
"""Kinds of cells by name."""


def add_cells(kind: CellKind) -> CellKind:
    """Make a kind of cells known to all methods.

    Raises:
        MethodError: there is one of this name.
    """
    if kind.name in CELLS:
        raise MethodError(f"there is a kind of cells {kind.name!r} already; give another name.")
    CELLS[kind.name] = kind
    return kind


def cells_of(site: Site) -> CellKind:
    """The kind of a site's cells.

    Raises:
        MethodError: a site kind whose cells nobody has added.
    """
    name = KINDS[site.kind].cells
    if name not in CELLS:
        raise MethodError(
            f"{site} ({KINDS[site.kind].what}): {unknown('kind of cells', name, CELLS, more='Add it with patchlab.methods.cells.add_cells.')}"
        )
    return CELLS[name]


def parts(setting: Setting) -> Iterator[tuple[CellKind, Setting]]:
    """A setting in parts of one kind of cells each."""
    names = dict.fromkeys(KINDS[site.kind].cells for site in setting.sites)
    for name in names:
        sites = tuple(site for site in setting.sites if KINDS[site.kind].cells == name)
        kind = cells_of(sites[0])
        yield kind, setting if len(names) == 1 else replace(setting, sites=sites, targets=kind.targets(setting.model.arch, sites))


def summed(setting: Setting, *, positional: bool) -> Callable[[Mapping[Target, Tensor]], dict[Target, Tensor]]:
    """The sums that the kinds of cells of a setting need the mean of, from the activations of a batch."""
    found = list(parts(setting))
    return lambda kept: {key: total for kind, part in found for key, total in kind.summed(part, kept, positional=positional).items()}


def listed(live: Bool[np.ndarray, "*cells"]) -> list[Index]:
    """The cells of a mask."""
    return [tuple(cell) for cell in np.argwhere(live).tolist()]


def gathered(setting: Setting, cells: Sequence[tuple[Site, Index]], effects: Float[np.ndarray, "cell batch"]) -> dict[str, Effects]:
    """Effects of single cells as arrays per site; a cell that is not among them has none."""
    found: dict[str, Effects] = {}
    for site in setting.sites:
        rows = [row for row, (of, _) in enumerate(cells) if of == site]
        index, values, live = stacked([cells[row][1] for row in rows], len(site.axes)), effects[rows].T, setting.live[str(site)]
        if live is None:
            found[str(site)] = Sparse(index, values)
        else:
            found[str(site)] = dense = np.zeros((effects.shape[1], *live.shape))
            dense[(slice(None), *index.T)] = values
    return found


def shifted(finished: MutableMapping[int, np.ndarray], by: int) -> MutableMapping[int, np.ndarray]:
    """Numbered results as seen by who counts from ``by`` on."""
    return finished if by == 0 else _Shifted(finished, by)


class _Shifted(MutableMapping[int, np.ndarray]):
    """A view of numbered results."""

    def __init__(self, whole: MutableMapping[int, np.ndarray], by: int) -> None:
        self.whole, self.by = whole, by

    def __getitem__(self, number: int) -> np.ndarray:
        return self.whole[number + self.by]

    def __setitem__(self, number: int, value: np.ndarray) -> None:
        self.whole[number + self.by] = value

    def __delitem__(self, number: int) -> None:
        del self.whole[number + self.by]

    def __iter__(self) -> Iterator[int]:
        return (number - self.by for number in self.whole if number >= self.by)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def stacked(cells: Sequence[Index], axes: int) -> Int[np.ndarray, "cell axis"]:
    """Cells as one array."""
    return np.array(cells, dtype=np.int64).reshape(len(cells), axes)
