"""What verified patching found: exact effects of some cells, the screen's scores of all, and a bound on what was missed."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from patchlab.methods.bound import Bound
from patchlab.methods.subsets import SubsetBound
from patchlab.scores import Cost, ScoreMap
from patchlab.sites import KINDS, parse_site


@dataclass(frozen=True, eq=False)
class VerifiedResult:
    """The verified cells of one run of :class:`patchlab.VerifiedPatching`.

    Args:
        table: one row per patched cell, by falling |effect|: ``site``, the axes that occur (``<NA>`` where a site lacks one),
            ``position`` and ``token`` (where all examples share it) beside ``pos``, ``address``, ``effect`` (exact mean over
            examples, metric units), ``low`` and ``high`` (95 % bootstrap interval over examples), ``screen`` (the screen's score),
            ``place`` (1 = first in the screen's order of |score|), ``found`` (``screen`` or ``sample``) and ``top`` (whether it is
            in the result: the k largest, or above the target).
        effects: the exact effects per example, ``[cell, example]``, in the order of the table.
        screen: the screen's score of every cell.
        bound: what the random sample says about the cells that the screen did not bring up.
        k: the number of cells asked for, at most 5 % of the live ones; None with a target.
        n_live: live cells of all sites.
        groups: joint patches of whole groups (hierarchical mode): ``address``, ``effect``, ``kept``; empty otherwise.
        stopped: why no more cells were verified.
        passes: what each part cost, in forward passes per example (a backward pass counts as two): ``screen``, ``verified``,
            ``sample``, ``groups``, ``subsets`` and ``unpatched``.
        cost: of everything, the screen included.
        provenance: like that of a score map.
        subsets: what joint patches of random subsets say, if effects add up; None if there were none.
    """

    table: pd.DataFrame
    effects: Float[np.ndarray, "cell example"]
    screen: ScoreMap
    bound: Bound
    k: int | None
    n_live: int
    groups: pd.DataFrame
    stopped: str
    passes: dict[str, float]
    cost: Cost
    provenance: dict[str, Any]
    subsets: SubsetBound | None = None

    @property
    def top(self) -> pd.DataFrame:
        """The rows of the table that were asked for: the k largest |effect|, or all above the target."""
        return self.table.loc[self.table["top"]].reset_index(drop=True)

    @property
    def share(self) -> float:
        """Everything that was computed, in rows through the whole model, over the rows of a full sweep's live cells."""
        return sum(self.passes.values()) / self.n_live

    @property
    def share_without_sample(self) -> float:
        """The same without the random sample, which finds nothing but says what may be missing."""
        return (sum(self.passes.values()) - self.passes["sample"]) / self.n_live

    def to_dict(self) -> dict[str, Any]:
        """Everything but the screen's scores and the effects per example, as plain JSON values; NA becomes None."""
        bound = {name: getattr(self.bound, name) for name in ("confidence", "population", "sample", "exceeding", "threshold", "unit", "at_most")}
        return {
            "table": _records(self.table),
            "bound": {**bound, "statement": str(self.bound)},
            "subsets": None if self.subsets is None else {**asdict(self.subsets), "statement": str(self.subsets)},
            "k": self.k,
            "n_live": self.n_live,
            "groups": _records(self.groups),
            "stopped": self.stopped,
            "passes": dict(self.passes),
            "share": self.share,
            "provenance": self.provenance,
        }

    def summary(self) -> str:
        """The result as text."""
        about, top = self.provenance, self.top
        wanted = f"top {self.k}" if self.k is not None else f"|effect| > {self.bound.threshold:.3g} {self.bound.unit}".rstrip()
        by = self.table["found"].value_counts()
        lines = [
            f"{about['method']}, {about['direction']}, {about['metric']}, {self.screen.subject}: {wanted} of {self.n_live} live cells",
            *map(_line, top.to_dict("records")),
            f"Exact: {by.get('screen', 0)} cells in the screen's order and {by.get('sample', 0)} at random; stopped: {self.stopped}.",
            *(f"{str(bound)[:1].upper()}{str(bound)[1:]}." for bound in (self.bound, self.subsets) if bound is not None),
            f"Work: {100 * self.share:.1f} % of a full sweep's rows "
            f"({', '.join(f'{name} {value:g}' for name, value in self.passes.items() if value)} passes per example).",
        ]
        if len(self.groups):
            lines.append(
                f"Only cells inside {sum(self.groups['kept'])} of {len(self.groups)} groups were candidates, "
                f"on the assumption that no effects cancel inside a group."
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()


def cell_columns(screen: ScoreMap, site: str, cells: Float[np.ndarray, "cell axis"]) -> dict[str, Any]:
    """Columns that say where the cells of one site are: its axes, and names and shared tokens of positions."""
    axes = parse_site(site).axes
    columns: dict[str, Any] = {axis: pd.array(cells[:, i].astype(np.int64), dtype="Int64") for i, axis in enumerate(axes)}
    for i, axis in enumerate(axes):
        if axis not in ("pos", "dest", "src"):
            continue
        prefix = "" if axis == "pos" else f"{axis}_"
        if f"{prefix}position" in screen.data.coords:
            columns[f"{prefix}position"] = screen.data[f"{prefix}position"].to_numpy()[cells[:, i].astype(int)]
        if f"{prefix}token" in screen.data.coords:
            tokens = screen.data[f"{prefix}token"].transpose("example", ...).to_numpy()
            shared = [tokens[0, p] if (tokens[:, p] == tokens[0, p]).all() else None for p in cells[:, i].astype(int)]
            columns[f"{prefix}token"] = pd.Series(shared, dtype=object)
    return columns


def ordered(columns: list[str]) -> list[str]:
    """Columns of the table in the order in which people read them."""
    axes = list(dict.fromkeys(axis for kind in KINDS.values() for axis in kind.axes))
    labels = {"pos": ["position", "token"], "dest": ["dest_position", "dest_token"], "src": ["src_position", "src_token"]}
    first = ["site", *(name for axis in axes for name in [axis, *labels.get(axis, [])])]
    return [name for name in first if name in columns] + [name for name in columns if name not in first]


def _line(row: dict[Any, Any]) -> str:
    where = f"{row['effect']:+10.4g} [{row['low']:.4g}, {row['high']:.4g}]  {row['address']}"
    return f"{where}  (screen {row['screen']:+.3g}, place {row['place']}{', from the sample' if row['found'] == 'sample' else ''})"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(key): value.item() if isinstance(value, np.generic) else value for key, value in row.items()} for row in plain.to_dict("records")]
