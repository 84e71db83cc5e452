"""Linearised patching: backward rules × points on the path × source, in one implementation.

The effect of patching a site is estimated as the difference of its activation times a coefficient: the gradient of the
metric (AtP), its mean over a path from the baseline to the source (IG), or what relevance propagation puts in the
gradient's place (RelP). One point costs two forward passes and one backward pass per batch, for all cells at once. AtP*'s
corrections go with any of them: QK-fix takes one more forward pass each for q and k, GradDrop one more forward and backward pass per layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Bool

from patchlab.engine import Result, Target, continues
from patchlab.engine.memory import activation_bytes, block_numbers, itemsize
from patchlab.errors import MethodError
from patchlab.interventions import Edit
from patchlab.methods.cells.kind import CellKind, Linearly, Path, parts
from patchlab.methods.cells.nodes import INPUT
from patchlab.methods.corrections import dropping, splicing
from patchlab.methods.method import Method
from patchlab.methods.quadrature import n_points, points_and_weights
from patchlab.methods.registry import register_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored, program
from patchlab.rules import Composite, get_composite
from patchlab.rules.composites import PACKAGED, PRESETS, rules_name
from patchlab.sites import Site, address
from patchlab.sources import Blend, Own


@dataclass(frozen=True)
class LinearizedPatching(Method):
    """The one implementation; the named methods fix some of its fields.

    Args:
        rules: backward rules, by name or as a composite that has a name (see :class:`patchlab.rules.Composite`), and kept by name;
            ``gradient`` has none.
        n_steps: points on the path from baseline to source; None takes the gradient at the baseline alone.
        over: what moves along the path: ``inputs`` (all token embeddings), ``activations`` (each layer's site alone, all
            positions and heads, the rest at baseline) or, for edges, ``groups`` (as ``activations``, with the coefficients of all
            readers averaged over all groups: what EAP-IG calls activations).
        quadrature: where the points lie: ``midpoint``; ``left`` with the baseline's end, ``right`` with the source's, ``trapezoid``
            with both. EAP-IG over inputs is ``right`` when noising.
        source: what is patched in; see :class:`patchlab.methods.Method`.
        qk_fix: for q and k, the softmax is recomputed with the patched queries or keys, and what it changes in the pattern is
            multiplied by the coefficient of the pattern. Rules of the softmax itself (AH, temperature) then do not act on q and k.
        grad_drop: mean of the absolute scores with one layer's backward contribution dropped at a time: unsigned.
        spliced: gradients reach earlier layers through the model's dictionaries alone, wherever it has one, and what these leave out is a
            constant; without it they pass as if nothing were spliced in.
    """

    rules: str | Composite = "gradient"
    n_steps: int | None = None
    over: Path = "inputs"
    quadrature: str = "midpoint"
    qk_fix: bool = field(default=False, metadata={"plus": "qk"})
    grad_drop: bool = field(default=False, metadata={"plus": "drop"})
    spliced: bool = field(default=False, metadata={"plus": "spliced"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rules", rules_name(self.composite))
        n_points(self.quadrature, 1 if self.n_steps is None else self.n_steps)
        if self.over not in ("inputs", "activations", "groups"):
            raise MethodError(f"over is {self.over!r}; valid: 'inputs', 'activations', 'groups'.")
        if self.n_steps is None and (self.over, self.quadrature) != ("inputs", "midpoint"):
            raise MethodError(
                f"over={self.over!r} and quadrature={self.quadrature!r} describe a path, but there is one point only; give n_steps as well."
            )
        if self.qk_fix and self.n_steps is not None and self.over != "inputs":
            raise MethodError(
                f"QK-fix needs the coefficient of the pattern, which has no path of its own when q or k moves alone; got over={self.over!r}. "
                "Use over='inputs', one point, or qk_fix=False."
            )

    @property
    def composite(self) -> Composite:
        """The backward rules as an object."""
        return get_composite(self.rules)

    def check(self, setting: Setting) -> None:
        if setting.task.metric.vanishes_at_clean and setting.direction == "noising" and self.n_steps is None:
            raise MethodError(
                f"the gradient of {setting.task.metric.name} vanishes at the clean run, so {self.name} in the noising direction "
                f"would score everything zero. "
                f"Use direction='denoising', integrated gradients, or another metric."
            )
        setting.model.check_rules(self.composite)
        if self.spliced:
            splicing(self.composite, setting)
        for kind, part in parts(setting):
            kind.check_linear(part, self.how)

    @property
    def how(self) -> Linearly:
        """The way in which cells are scored."""
        over = None if self.n_steps is None else self.over
        return Linearly(self.name, self.composite, over, self.qk_fix, self.grad_drop, self.source == "paired")

    def not_scored(self, setting: Setting) -> dict[str, str]:
        reasons = self.how.blocked
        return {str(site): reasons[site.kind] for site in setting.sites if site.kind in reasons}

    def scored(self, kind: CellKind, setting: Setting, site: Site) -> Bool[np.ndarray, "*first"] | None:
        return kind.linear_scored(setting, self.how, site)

    def resumes(self, setting: Setting) -> bool:
        return continues(setting.model)

    def forwards(self, setting: Setting) -> int:
        drops = len(self._drops(setting))
        extra = 2 + sum(kind.passes(part, self.how) for kind, part in parts(setting))
        if self.n_steps is None:
            return extra + (drops if self.grad_drop else 0)
        return extra + self._paths(setting)

    def backwards(self, setting: Setting) -> int:
        return len(self._drops(setting)) if self.n_steps is None else self._paths(setting)

    def _paths(self, setting: Setting) -> int:
        """The points of all paths."""
        points = 0 if self.n_steps is None else n_points(self.quadrature, self.n_steps)
        return points * len(self._drops(setting)) * (1 if self.over == "inputs" else len(self._moves(setting)))

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        # both runs' activations and the gradients, and what the backward pass of each block holds on to
        model = setting.model
        per_block = rows * length * block_numbers(model, length)
        fixed = sum(kind.linear_bytes(part, self.how, rows, length) for kind, part in parts(setting))
        return 3 * activation_bytes(model, setting.targets, rows, length) + itemsize(model) * (
            model.arch.n_layers * per_block + 2 * rows * length * model.vocab_size + fixed
        )

    def source_targets(self, setting: Setting) -> tuple[Target, ...]:
        scored = tuple(target for target in setting.targets if target[0] not in self.how.blocked)
        return tuple(dict.fromkeys((*scored, INPUT))) if self.how.over == "inputs" else scored

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        keeps = (target for kind, part in parts(setting) for target in kind.keeps(part, self.how))
        keep = {"keep": tuple(dict.fromkeys((*self.source_targets(setting), *keeps)))}
        if self.n_steps is None and not self.grad_drop:
            return {**keep, "rules": self._rules(setting, None), **self._needs(setting, None)}
        return keep

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        drops = self._drops(setting)
        sums = [kind.linear(part, runs, self.how, drops) for kind, part in parts(setting)]
        moves = [set(kind.moves(part, self.how)) for kind, part in parts(setting)]
        for drop in drops:
            for point, weight, moved in self.points(setting, runs, meter, drop):
                for linear, own in zip(sums, moves, strict=True):
                    if moved is None or moved in own:
                        linear.add(point, weight, moved)
            for linear in sums:
                linear.close(meter, notes, drop)
        found = [linear.result(meter, notes) for linear in sums]
        return Scored(*({site: values for one in found for site, values in getattr(one, part.name).items()} for part in fields(Scored)))

    def _drops(self, setting: Setting) -> list[int | None]:
        """The layers whose backward contribution is left out, one at a time; None for none."""
        return [*range(setting.model.arch.n_layers)] if self.grad_drop else [None]

    def _moves(self, setting: Setting) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(target for kind, part in parts(setting) for target in kind.moves(part, self.how)))

    def _needs(self, setting: Setting, moved: Target | None) -> dict[str, Any]:
        """What a run must return for its point of the path to be scored: fields of its program."""
        needs: dict[str, Any] = {}
        for kind, part in parts(setting):
            if moved is None or moved in kind.moves(part, self.how):
                for name, value in kind.needs(part, self.how, moved).items():
                    needs[name] = value if isinstance(value, str) else tuple(dict.fromkeys((*needs.get(name, ()), *value)))
        return needs

    def points(self, setting: Setting, runs: Runs, meter: Meter, drop: int | None) -> Iterator[tuple[Result, float, Target | None]]:
        """Runs at the points of the path, their weights, and the activation that moved alone (None: the inputs, or nothing)."""
        rules = self._rules(setting, drop)
        if self.n_steps is None:
            run = runs.baseline if drop is None else meter.run(setting.model, program(setting, runs, rules=rules, **self._needs(setting, None)))
            yield run, 1.0, None
            return
        moves = (INPUT,) if self.over == "inputs" else self._moves(setting)
        # a constant, where gradients are taken at what the activation is computed from: that does not matter while it is set to a value
        start = runs.baseline.as_source() if any(kind.reads_behind for kind, _ in parts(setting)) else Own()
        owners = {target: (kind, part) for kind, part in parts(setting) for target in kind.moves(part, self.how)} if self.over != "inputs" else {}
        for target in moves:
            alone = target if self.over == "activations" else None
            needs = self._needs(setting, alone)
            for at, weight in points_and_weights(self.quadrature, self.n_steps):
                if self.over == "inputs":
                    edits: tuple[Edit, ...] = (Edit(address(*target), Blend(start, runs.source, at)),)
                else:
                    kind, part = owners[target]
                    edits = kind.step(part, runs, target, start, at)
                point = meter.run(setting.model, program(setting, runs, edits=edits, rules=rules, **needs))
                yield point, weight / (len(moves) if self.over == "groups" else 1), alone

    def provenance_of(self, setting: Setting, skipped: dict[str, str]) -> dict[str, Any]:
        record = super().provenance_of(setting, skipped)
        if self.composite.name in PRESETS and self.composite.name not in PACKAGED:
            record["method_options"] = {**record["method_options"], "rules": repr(self.composite)}  # what the name stands for is not in patchlab
        notes = list(record["notes"])
        if self.grad_drop:
            notes.append("GradDrop: mean of absolute scores, one layer's backward contribution dropped at a time; the scores are unsigned")
        linear = [kind.linear_record(part, self.how) for kind, part in parts(setting)]
        notes += [note for one in linear for note in one.get("notes", ())]
        if self.spliced:
            notes.append("gradients reach earlier layers through the model's dictionaries alone; what these leave out is a constant")
        gaps = setting.model.uncovered(self.composite)
        if gaps:
            record["uncovered"] = {gap.module: gap.problem for gap in gaps}
            notes.append(f"no rule covers {', '.join(gap.module for gap in gaps)}: the plain gradient was kept there (allow_gaps)")
        for one in linear:
            record |= one
        return {**record, "notes": notes, "unsigned": self.grad_drop}

    def _rules(self, setting: Setting, drop: int | None) -> Composite | None:
        rules = splicing(self.composite, setting) if self.spliced else self.composite
        if drop is not None:
            return dropping(rules, setting, drop)
        return None if rules.plain else rules


def _named(form: str, what: str, **options: Any) -> None:
    register_method(form, what, number="n_steps" if form.endswith(":N") else None, **options)(LinearizedPatching)


_named("atp", "attribution patching: gradient at the baseline", implied=True)
_named("eap", "atp, under its name for edges", alias=True, rules="gradient")
_named(
    "atp*",
    "AtP*: atp with QK-fix (softmax recomputed for q and k) and GradDrop (one backward per layer; unsigned)",
    rules="gradient",
    qk_fix=True,
    grad_drop=True,
)
_named("ig:N", "integrated gradients over the inputs, N points (midpoint rule)")
_named("ig-left:N", "the same with the baseline's end of the path, not the source's", quadrature="left")
_named("ig-right:N", "the same with the source's end, not the baseline's", quadrature="right")
_named("ig-trapezoid:N", "the same with both ends", quadrature="trapezoid")
_named("eap-ig:N", "EAP-IG over inputs, with its own points when noising; results show it as ig-right:N", alias=True, quadrature="right")
_named("eap-ig-inputs:N", "the same, by its longer name", alias=True, quadrature="right")
_named("clean-corrupted", "mean of the coefficients at the clean and at the corrupted run", n_steps=1, quadrature="trapezoid")
_named("ig-activations:N", "integrated gradients over activations: each layer's site moves alone", over="activations")
_named("ig-activations-left:N", "the same with the baseline's end", over="activations", quadrature="left")
_named("ig-activations-right:N", "the same with the source's end", over="activations", quadrature="right")
_named("ig-activations-trapezoid:N", "the same with both ends", over="activations", quadrature="trapezoid")
_named(
    "eap-ig-activations:N",
    "EAP-IG over activations, for edges: coefficients averaged over all groups that move",
    over="groups",
    quadrature="left",
)
_named("ig-groups:N", "the same at midpoints", over="groups")
_named("ig-groups-right:N", "the same with the source's end", over="groups", quadrature="right")
_named("ig-groups-trapezoid:N", "the same with both ends", over="groups", quadrature="trapezoid")
