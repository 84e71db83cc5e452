"""The result of verified patching: exact effects of some cells, the screen's scores of all, and a bound on what was missed."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from patchlab.methods.verified.bound import Bound, Price, Recall, prompts_needed
from patchlab.methods.verified.subsets import SubsetBound
from patchlab.scores import Cost, ScoreMap
from patchlab.sites import KINDS, Site
from patchlab.stats.distributions import t_quantile
from patchlab.tables import records


@dataclass(frozen=True, eq=False)
class VerifiedResult:
    """The verified cells of one run of :class:`patchlab.VerifiedPatching`.

    Args:
        table: one row per patched cell, by falling |effect|: ``site``, the axes that occur (``<NA>`` where a site lacks one),
            ``position`` and ``token`` (where all examples share it) beside ``pos``, ``address``, ``effect`` (exact mean over
            examples, metric units), ``screen`` (the screen's score), ``place`` (1 = first in the screen's order of |score|), ``found``
            (``screen``, ``sample`` or ``sweep``) and ``top`` (whether it is in the result: the k largest, or above the target). Of
            the population of prompts also ``low`` and ``high``: intervals for the mean effect over prompts such as these, which
            hold together for all live cells; infinite where the prompts are too few for any.
        effects: the exact effects per example, ``[cell, example]``, in the order of the table.
        screen: the screen's score of every cell; where the sweep was run instead, the sweep.
        bound: what the random sample says about the cells that the screen did not bring up.
        recall: how much of what was asked for is certainly there.
        price: what was expected before anything was patched.
        k: the number of cells asked for; None with a target.
        n_live: live cells of all sites.
        groups: joint patches of whole groups (hierarchical mode): ``address``, ``effect``, ``kept``; empty otherwise.
        stopped: why no more cells were verified.
        passes: what each part cost, in forward passes per example (a backward pass counts as two): ``screen``, ``verified``,
            ``sample``, ``groups``, ``subsets`` and ``unpatched``.
        cost: of everything, the screen included.
        provenance: like that of a score map.
        subsets: what joint patches of random subsets say, if effects add up; None if there were none.
        population: the confidence of the intervals over prompts such as these; None where only these prompts are spoken of.
    """

    table: pd.DataFrame
    effects: Float[np.ndarray, "cell example"]
    screen: ScoreMap
    bound: Bound
    recall: Recall
    price: Price
    k: int | None
    n_live: int
    groups: pd.DataFrame
    stopped: str
    passes: dict[str, float]
    cost: Cost
    provenance: dict[str, Any]
    subsets: SubsetBound | None = None
    population: float | None = None

    @property
    def top(self) -> pd.DataFrame:
        """The rows of the table that were asked for: the k largest |effect|, or all above the target."""
        return self.table.loc[self.table["top"]].reset_index(drop=True)

    @property
    def complete(self) -> bool:
        """Whether every live cell was patched, so that the table is the whole ranking."""
        return len(self.table) == self.n_live

    @property
    def share(self) -> float:
        """Everything that was computed, in rows through the whole model, over the rows of a full sweep's live cells."""
        return sum(self.passes.values()) / self.n_live

    @property
    def share_without_sample(self) -> float:
        """The same without the random sample, which finds nothing but says what may be missing."""
        return (sum(self.passes.values()) - self.passes["sample"]) / self.n_live

    def to_dict(self) -> dict[str, Any]:
        """Everything but the screen's scores and the effects per example, as plain JSON values; NA and infinite ends become None."""
        bound = {name: getattr(self.bound, name) for name in ("confidence", "unverified", "sample", "exceeding", "threshold", "unit", "at_most")}
        recall, price = {**asdict(self.recall), "share": self.recall.share, "reached": self.recall.reached}, asdict(self.price)
        return {
            "table": records(self.table),
            "bound": {**bound, "statement": str(self.bound)},
            "recall": {**recall, "statement": str(self.recall)},
            "price": {**price, "statement": str(self.price)},
            "subsets": None if self.subsets is None else {**asdict(self.subsets), "recall": self.subsets.recall, "statement": str(self.subsets)},
            "k": self.k,
            "n_live": self.n_live,
            "complete": self.complete,
            "speaks_of": self.speaks_of,
            "groups": records(self.groups),
            "stopped": self.stopped,
            "passes": dict(self.passes),
            "share": self.share,
            "provenance": self.provenance,
        }

    @property
    def speaks_of(self) -> str:
        """The prompts that the effects, the ranking and the recall are about."""
        n = self.effects.shape[1]
        these = f"these {n} prompt pairs" if n > 1 else "this prompt pair"
        if self.population is None:
            return f"effects, ranking and recall are those of {these}, exactly; nothing is said about other prompts"
        about = f"effects are those of {these}; intervals and recall are about prompts such as these (drawn independently from the same source): "
        wide = (self.table["high"] - self.table["low"]).to_numpy() / 2
        if np.isinf(wide).any():
            needed = max(n + 1, prompts_needed(self.effects[np.isinf(wide)], self.n_live, self.population))
            return (
                f"{about}{n} prompts cannot support intervals of {int(np.isinf(wide).sum())} of the {len(wide)} patched cells that hold for all "
                f"{self.n_live} live cells at once with {100 * self.population:g} % confidence, as effects are too unevenly spread over prompts for "
                f"so few; it takes about {needed} or more"
            )
        spread = self.effects.std(1, ddof=1)
        student = t_quantile(1 - (1 - self.population) / (2 * self.n_live), n - 1) * spread / np.sqrt(n)
        text = (
            f"{about}with {100 * self.population:g} % confidence no interval of any of the {self.n_live} live cells misses, however cells "
            f"were chosen (bootstrap-t with Bonferroni's correction: {np.max(wide[spread > 0] / student[spread > 0], initial=1.0):.2g} "
            f"times as wide as for normal effects, because of how these are spread over prompts)"
        )
        same = int((spread == 0).sum())
        return text + (f"; {same} patched cells have one and the same effect on every prompt, so that nothing tells how others vary" if same else "")

    def summary(self) -> str:
        """The result as text: what was asked for, or the whole ranking where every live cell was patched."""
        about, by = self.provenance, self.table["found"].value_counts()
        wanted = f"top {self.k}" if self.k is not None else f"|effect| > {self.bound.threshold:.3g} {self.bound.unit}".rstrip()
        lines = [f"{about['method']}, {about['direction']}, {about['metric']}, {self.screen.subject}: {wanted} of {self.n_live} live cells"]
        if self.complete:
            asked = f"{self.k} cells were asked for" if self.k is not None else f"{len(self.top)} cells exceed the target"
            lines.append(f"{asked}; all {self.n_live} live cells were patched, so this is the whole ranking:")
        others = "the other {}" if self.complete else "{} at random"
        found = {"screen": "{} cells in the screen's order", "sample": others, "sweep": "all {} live cells"}
        lines += [
            *map(_line, (self.table if self.complete else self.top).to_dict("records")),
            f"Exact: {' and '.join(text.format(by[name]) for name, text in found.items() if name in by)}; stopped: {self.stopped}.",
            *(
                _sentence(str(part))
                for part in (self.recall, self.bound, self.subsets)
                if part is not None and not (part is self.bound and self.complete)
            ),
            _sentence(self.speaks_of),
            self._work(),
        ]
        if len(self.groups):
            lines.append(
                f"Only cells inside {sum(self.groups['kept'])} of {len(self.groups)} groups were candidates, "
                f"on the assumption that no effects cancel inside a group."
            )
        return "\n".join(lines)

    def _work(self) -> str:
        parts = {
            "screen": "screening {} (a backward pass counts as two)",
            "verified": "cells in its order {}" if "sweep" not in set(self.table["found"]) else "cells {}",
            "sample": "the other cells {}" if self.complete else "cells at random {}",
            "groups": "joint patches of groups {}",
            "subsets": "joint patches of random subsets {}",
            "unpatched": "runs without a patch {}",
        }
        counts = [parts[name].format(f"{value:.3g}" if value % 1 else f"{value:.0f}") for name, value in self.passes.items() if value]
        return (
            f"Work: as much as {sum(self.passes.values()):.4g} forward passes over all prompts, {100 * self.share:.1f} % of a full sweep, which "
            f"patches each of the {self.n_live} live cells: {', '.join(counts)}.{self._screening()}"
        )

    def _screening(self) -> str:
        screening = self.passes.get("screen", 0)
        if not screening:
            return ""
        times = self.n_live / screening
        return (
            f" Screening cost {screening:.3g} forward-pass equivalents; exact patching of all {self.n_live} cells costs "
            f"{times:,.{1 if times < 10 else 0}f} times as many passes."
        )

    def __repr__(self) -> str:
        return self.summary()


def cell_columns(screen: ScoreMap, site: str, cells: Float[np.ndarray, "cell axis"]) -> dict[str, Any]:
    """Columns that say where the cells of one site are: its axes, and names and shared tokens of positions."""
    axes = Site.parse(site).axes
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
    first = ["address", "effect", "low", "high", "site", *(name for axis in axes for name in [axis, *labels.get(axis, [])])]
    return [name for name in first if name in columns] + [name for name in columns if name not in first]


def _line(row: dict[Any, Any]) -> str:
    spread = f" [{row['low']:.4g}, {row['high']:.4g}]" if "low" in row else ""
    where = f"{row['effect']:+10.4g}{spread}  {row['address']}"
    if row["found"] == "sweep":
        return where
    return f"{where}  (screen {row['screen']:+.3g}, place {row['place']}{', from the sample' if row['found'] == 'sample' else ''})"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
