"""Coverage: which rule sits on which module of a model, and what no rule covers."""

from dataclasses import dataclass
from math import isnan
from typing import NamedTuple, Protocol, runtime_checkable

from patchlab.adapters import Architecture, LinearPlace
from patchlab.rules.composites import Composite, get_composite


class Uncovered(NamedTuple):
    """A module that keeps its plain gradient though a rule should be there."""

    module: str
    problem: str


@dataclass(frozen=True)
class SoftCap:
    """A soft cap ``cap · tanh(x / cap)`` with its plain gradient: the share of relevance that it loses, and loses at its ``largest`` value."""

    name: str
    cap: float
    share: float
    largest: float
    share_at_largest: float

    def __str__(self) -> str:
        if isnan(self.share):
            return f"{self.name}: tanh cap of {self.cap:g} with its plain gradient; what it loses cannot be seen from outside"
        return (
            f"{self.name}: tanh cap of {self.cap:g} with its plain gradient loses {self.share:.1%} of the relevance on random tokens, "
            f"{self.share_at_largest:.1%} at the largest value, {self.largest:.3g} (a rule for it: Composite(softcap=IdentityRule()))"
        )


@dataclass(frozen=True)
class Coverage:
    """Coverage of a model: which rule sits on which module, and what is left. Printing it shows a table."""

    composite: str
    rows: tuple[tuple[str, str, str], ...]
    uncovered: tuple[Uncovered, ...]
    caps: tuple[SoftCap, ...] = ()
    allow_gaps: bool = False

    @property
    def complete(self) -> bool:
        """Whether every non-linearity of the model has a rule, or is of a kind that the composite leaves alone."""
        return not self.uncovered

    def __str__(self) -> str:
        width = max((len(row[0]) for row in self.rows), default=0)
        allowed = " (allow_gaps: they keep the plain gradient)" if self.uncovered and self.allow_gaps else ""
        state = "all covered" if self.complete else f"{len(self.uncovered)} cannot be covered{allowed}"
        lines = [f"{self.composite}: {len(self.rows)} places, {state}"]
        lines += [f"  {module:<{width}}  {kind:<10} {rules}" for module, kind, rules in self.rows]
        lines += [f"  NOT COVERED {gap.module}: {gap.problem}" for gap in self.uncovered]
        lines += [f"  SOFT CAP {cap}" for cap in self.caps]
        return "\n".join(lines)

    __repr__ = __str__


@runtime_checkable
class CoveredModel(Protocol):
    """What coverage asks of a model: its places, and what tests of it found."""

    @property
    def arch(self) -> Architecture:
        """Its architecture."""
        ...

    def uncovered(self, rules: Composite) -> tuple[Uncovered, ...]:
        """The modules that backward rules do not cover."""
        ...

    def soft_caps(self) -> tuple[SoftCap, ...]:
        """Its soft caps, with what they lose of the relevance."""
        ...


def coverage(model: CoveredModel, rules: str | Composite) -> Coverage:
    """Coverage of a model by a composite: which rule sits on which module; places left with the plain gradient say so.

    ``uncovered`` comes from the model, not from a list of known modules: beside places whose rules cannot be put there, what the conservation
    test of each block, the embedding and the unembedding finds (:mod:`patchlab.engine.trust.conservation`). Linear maps are listed only if the
    composite has a rule for them. Never raises for modules that cannot be covered: it lists them.
    """
    composite = get_composite(rules)
    rows = []
    for place in model.arch.places:
        names = composite.rules_at(place)
        if isinstance(place, LinearPlace) and not names:
            continue
        kind = type(place).__name__.removesuffix("Place").lower()
        problem = composite.problem_at(place) if names else None
        rows.append((place.name, kind, "not covered" if problem else " + ".join(names) or "plain gradient"))
    caps = () if composite.plain or composite.softcap is not None else model.soft_caps()
    if composite.pattern is not None and composite.pattern.blocks_scores:
        caps = tuple(cap for cap in caps if not cap.name.startswith("blocks."))  # nothing goes back through the scores
    return Coverage(composite.name, tuple(rows), model.uncovered(composite), caps, composite.allow_gaps)
