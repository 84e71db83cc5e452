"""Linearised patching: backward rules × points on the path × source, in one implementation.

The effect of patching a site is estimated as the difference of its activation times a coefficient: the gradient of the
metric (AtP), its mean over a path from the baseline to the source (IG), or what relevance propagation puts in the
gradient's place (RelP). One point costs two forward passes and one backward pass per batch, for all cells at once. AtP*'s
corrections go with any of them: QK-fix takes one more forward pass each for q and k, GradDrop one more forward and backward pass per layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.engine import Result, Target, continues
from patchlab.errors import MethodError
from patchlab.interventions import Blend, Edit, Own, address
from patchlab.methods.base import Method
from patchlab.methods.corrections import drop_term, dropping, every_layer, qk_forwards, qk_scores
from patchlab.methods.edges import EdgeScores, check_sums, edge_bytes, edge_options
from patchlab.methods.noise import product_variance
from patchlab.methods.quadrature import n_points, points_and_weights
from patchlab.methods.runs import Meter, Runs, Scored, Setting, activation_bytes, itemsize, program, reduced
from patchlab.rules import Composite, get_composite
from patchlab.sites import KINDS, Site, parse_site

_INPUT: Target = ("input", None)
Path = Literal["inputs", "activations", "groups"]
PATHS: dict[tuple[Path, str], str] = {
    ("inputs", "midpoint"): "ig",
    ("inputs", "left"): "ig-left",
    ("inputs", "right"): "ig-right",
    ("inputs", "trapezoid"): "ig-trapezoid",
    ("activations", "midpoint"): "ig-activations",
    ("groups", "left"): "eap-ig-activations",
}
"""What the usual paths are called."""


@dataclass(frozen=True)
class LinearizedPatching(Method):
    """The one implementation; the named methods fix some of its fields.

    Args:
        rules: backward rules, a preset's name or a composite; ``gradient`` has none.
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
    """

    rules: str | Composite = "gradient"
    n_steps: int | None = None
    over: Path = "inputs"
    quadrature: str = "midpoint"
    qk_fix: bool = False
    grad_drop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.composite
        n_points(self.quadrature, 1 if self.n_steps is None else self.n_steps)
        if self.over not in ("inputs", "activations", "groups"):
            raise MethodError(f"over is {self.over!r}; valid: 'inputs', 'activations', 'groups'.")
        if self.qk_fix and self.n_steps is not None and self.over != "inputs":
            raise MethodError(
                f"QK-fix needs the coefficient of the pattern, which has no path of its own when q or k moves alone; got over={self.over!r}. "
                "Use over='inputs', one point, or qk_fix=False."
            )

    @property
    def composite(self) -> Composite:
        """The backward rules as an object."""
        return get_composite(self.rules)

    @property
    def name(self) -> str:
        rules = self.composite.name
        steps = f"{PATHS.get((self.over, self.quadrature), f'ig-{self.over}-{self.quadrature}')}:{self.n_steps}"
        steps = "clean-corrupted" if steps == "ig-trapezoid:1" else steps
        parts = [] if rules == "gradient" else [rules]
        parts += [] if self.n_steps is None else [steps]
        if self.qk_fix and self.grad_drop and not parts:
            return "atp*"
        return "+".join([*(parts or ["atp"]), *(["qk"] if self.qk_fix else []), *(["drop"] if self.grad_drop else [])])

    def corrected(self, *, qk_fix: bool = False, grad_drop: bool = False) -> "LinearizedPatching":
        """The same method with corrections added.

        >>> RelevancePatching().corrected(qk_fix=True).name
        'relp+qk'
        """
        values = {field.name: getattr(self, field.name) for field in fields(LinearizedPatching)}
        return LinearizedPatching(**{**values, "qk_fix": self.qk_fix or qk_fix, "grad_drop": self.grad_drop or grad_drop})

    def check(self, setting: Setting) -> None:
        if setting.task.metric.vanishes_at_clean and setting.direction == "noising" and self.n_steps is None:
            raise MethodError(
                f"the gradient of {setting.task.metric.name} vanishes at the clean run, so {self.name} in the noising direction "
                f"would score everything zero. "
                f"Use direction='denoising', integrated gradients, or another metric."
            )
        setting.model.check_rules(self.composite)
        if setting.edges is None and self.over == "groups":
            raise MethodError("over='groups' averages over the readers of edges; for nodes use over='activations'.")
        if setting.edges is not None:
            edge_options(setting, self.composite)
            if self.qk_fix or self.grad_drop:
                raise MethodError(
                    f"{self.name} corrects scores of nodes: QK-fix and GradDrop are not defined for edges. Use the method without them."
                )
        if self.grad_drop and setting.model.arch.n_layers < 2:
            raise MethodError(f"GradDrop drops one layer at a time, and {setting.model.name} has only one; use {self.name} without it.")

    def not_scored(self, setting: Setting) -> dict[str, str]:
        reasons = self._blocked
        return {str(site): reasons[site.kind] for site in setting.sites if site.kind in reasons}

    def resumes(self, setting: Setting) -> bool:
        return continues(setting.model)

    def forwards(self, setting: Setting) -> int:
        drops = setting.model.arch.n_layers if self.grad_drop else 1
        extra = 2 + (qk_forwards(setting) if self.qk_fix else 0)
        if self.n_steps is None:
            return extra + (drops if self.grad_drop else 0)
        if self.over == "inputs":
            return extra + self._n_points * drops + (self.source != "paired" and not self.grad_drop)
        ends = not self.grad_drop and setting.edges is None
        return extra + (self._n_points * drops + ends) * len(self._linear(setting))

    def backwards(self, setting: Setting) -> int:
        drops = setting.model.arch.n_layers if self.grad_drop else 1
        if self.n_steps is None:
            return drops
        return self._n_points * drops * (1 if self.over == "inputs" else len(self._linear(setting)))

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        # both runs' activations and the gradients, and what the backward pass of each block holds on to
        arch = setting.model.arch
        fixed = 0
        if setting.edges is not None:
            fixed = edge_bytes(setting, rows, length)
        per_block = rows * length * (12 * arch.d_model + 4 * (arch.d_mlp or 0) + 3 * arch.n_heads * length)
        if self._fixed(setting):  # the patterns, how they change and their coefficients, and the streams
            drops = arch.n_layers if self.grad_drop else 1
            fixed = arch.n_layers * rows * length * ((3 + drops) * arch.n_heads * length + arch.d_model)
        return 3 * activation_bytes(setting, rows, length) + itemsize(setting) * (
            arch.n_layers * per_block + 2 * rows * length * setting.model.vocab_size + fixed
        )

    def source_targets(self, setting: Setting) -> tuple[Target, ...]:
        scored = self._scored(setting)
        return tuple(dict.fromkeys((*scored, _INPUT))) if self._along_inputs else scored

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        keep = self.source_targets(setting)
        if self._fixed(setting):
            keep = tuple(dict.fromkeys((*keep, *every_layer(setting, "resid_pre"), *every_layer(setting, "pattern"))))
        if self.n_steps is None and setting.edges is not None:
            return {"keep": keep, "rules": self._rules(setting, None), **edge_options(setting, self.composite)}
        if self.n_steps is None and not self.grad_drop:
            return {"keep": keep, "gradients": self._differentiated(setting), "rules": self._rules(setting, None)}
        return {"keep": keep}

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        if setting.edges is not None:
            return self._edge_scores(setting, runs, meter, notes)
        n_layers, skipped = setting.model.arch.n_layers, self.not_scored(setting)
        fixed = {str(site) for site in setting.sites if (site.kind, 0) in self._fixed(setting)}
        drops = list(range(n_layers)) if self.grad_drop else [None]
        patterns: list[dict[int, Tensor]] = []
        differences = {target: self._difference(runs, target) for target in self._linear(setting)}
        scores, noise = (
            {str(site): np.full((len(runs.batch), *setting.live[str(site)].shape), np.nan if str(site) in skipped else 0.0) for site in setting.sites}
            for _ in range(2)
        )
        for drop in drops:
            coefficients = self._coefficients(setting, runs, meter, drop)
            if not self.grad_drop:
                self._note_gaps(setting, runs, meter, notes, coefficients, differences)
            if fixed:
                share = 1.0 if self.composite.bilinear is None else self.composite.bilinear.share
                patterns.append({layer: coefficients["pattern", layer] * share for layer in range(n_layers)})
            for site in setting.sites:
                if str(site) not in skipped and str(site) not in fixed:
                    found, off = self._linear_scores(setting, runs, site, differences, coefficients)
                    scores[str(site)] += self._term(site, found, drop, n_layers)
                    noise[str(site)] += self._term(site, off, drop, n_layers)
        for name, parts in qk_scores(setting, runs, meter, patterns).items() if fixed else ():
            for drop, (found, off) in zip(drops, parts, strict=True):
                scores[name] += self._term(parse_site(name), found, drop, n_layers)
                noise[name] += self._term(parse_site(name), off, drop, n_layers)
        return Scored(scores, noise)

    def _edge_scores(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        scores = EdgeScores(setting, runs, self.composite, {target: self._difference(runs, target) for target in setting.targets})
        for point, weight, group in self._edge_points(setting, runs, meter):
            scores.add(point, weight, group)
        off, scale = scores.mismatch()
        notes.setdefault("self_check", {}).setdefault("mismatch", []).extend([off] * len(runs.batch))
        notes["self_check"].setdefault("largest_node_score", []).extend([scale] * len(runs.batch))
        check_sums(setting, off, scale)
        found, noise = scores.result()
        return Scored({str(setting.edges): found}, {str(setting.edges): noise})

    def _edge_points(self, setting: Setting, runs: Runs, meter: Meter) -> Iterator[tuple[Result, float, Target | None]]:
        """Runs at the points of the path, their weights, and the group of writers that they are for (None: all)."""
        if self.n_steps is None:
            yield runs.baseline, 1.0, None
            return
        options = {"rules": self._rules(setting, None), **edge_options(setting, self.composite)}
        groups = ((_INPUT,),) if self.over == "inputs" else tuple((target,) for target in setting.targets)
        for group in groups:
            for at, weight in points_and_weights(self.quadrature, self.n_steps):
                # a constant: what the group reads does not matter while it is set to a value
                edits = tuple(Edit(address(*target), Blend(runs.baseline.as_source(), runs.source, at)) for target in group)
                point = meter.run(setting.model, program(setting, runs, edits=edits, **options))
                yield point, weight / (len(groups) if self.over == "groups" else 1), group[0] if self.over == "activations" else None

    @property
    def _n_points(self) -> int:
        return 0 if self.n_steps is None else n_points(self.quadrature, self.n_steps)

    def _coefficients(self, setting: Setting, runs: Runs, meter: Meter, drop: int | None) -> dict[Target, Tensor]:
        """What differences are multiplied by, with the backward contribution of layer ``drop`` dropped."""
        rules, at = self._rules(setting, drop), self._differentiated(setting)
        if self.n_steps is None and drop is None:
            return dict(runs.baseline.gradients)
        if self.n_steps is None:
            return dict(meter.run(setting.model, program(setting, runs, gradients=at, rules=rules)).gradients)
        if self.over == "inputs":
            return self._along(setting, runs, meter, (_INPUT,), at, rules)
        found = {}
        for target in at:
            found |= self._along(setting, runs, meter, (target,), (target,), rules)
        return found

    def _linear_scores(
        self, setting: Setting, runs: Runs, site: Site, differences: dict[Target, Tensor], coefficients: dict[Target, Tensor]
    ) -> tuple[Float[np.ndarray, "batch *cells"], Float[np.ndarray, "batch *cells"]]:
        """Scores, and their noise floors."""
        layers = [None] if "layer" not in KINDS[site.kind].axes else list(range(setting.model.arch.n_layers))
        scores, variances = [], []
        for key in ((site.kind, layer) for layer in layers):
            difference, coefficient, vectors = differences[key], coefficients[key], KINDS[site.kind].width is not None
            product = difference * coefficient.to(difference.dtype)
            scores.append(reduced(setting, runs, site, product.sum(-1) if vectors else product))
            variance = product_variance(difference, runs.baseline.activations[key], coefficient, vectors=vectors)
            variances.append(reduced(setting, runs, site, variance))
        found, off = ((part[0] if layers == [None] else torch.stack(part, 1)).double().cpu().numpy() for part in (scores, variances))
        return found, runs.rounding.of_products(off, found)

    @staticmethod
    def _term(site: Site, scores: Float[np.ndarray, "batch *cells"], drop: int | None, n_layers: int) -> Float[np.ndarray, "batch *cells"]:
        return scores if drop is None else drop_term(scores, site.kind, drop, n_layers)

    def _provenance(self, setting: Setting, skipped: dict[str, str]) -> dict[str, Any]:
        record = super()._provenance(setting, skipped)
        notes = list(record["notes"])
        if self.grad_drop:
            notes.append("GradDrop: mean of absolute scores, one layer's backward contribution dropped at a time; the scores are unsigned")
        if self._fixed(setting) and self.composite.pattern is not None:
            notes.append(f"q and k are scored by QK-fix, with the true softmax; the {type(self.composite.pattern).__name__} does not act on them")
        gaps = setting.model.uncovered(self.composite)
        if gaps:
            record["uncovered"] = {gap.module: gap.problem for gap in gaps}
            notes.append(f"no rule covers {', '.join(gap.module for gap in gaps)}: the plain gradient was kept there (allow_gaps)")
        if setting.edges is not None and self.composite.not_scored:
            record["readers_not_scored"] = self.composite.not_scored
        return {**record, "notes": notes, "unsigned": self.grad_drop}

    @property
    def _along_inputs(self) -> bool:
        return self.n_steps is not None and self.over == "inputs"

    def _rules(self, setting: Setting, drop: int | None) -> Composite | None:
        if drop is not None:
            return dropping(self.composite, setting, drop)
        return None if self.composite.plain else self.composite

    @property
    def _blocked(self) -> dict[str, str]:
        return {} if self.qk_fix else self.composite.not_scored

    def _scored(self, setting: Setting) -> tuple[Target, ...]:
        return tuple(target for target in setting.targets if target[0] not in self._blocked)

    def _fixed(self, setting: Setting) -> tuple[Target, ...]:
        """The queries and keys that QK-fix scores."""
        return tuple(target for target in setting.targets if target[0] in ("q", "k")) if self.qk_fix else ()

    def _linear(self, setting: Setting) -> tuple[Target, ...]:
        """Sites scored by difference times coefficient, and the input where the path goes along it."""
        fixed = self._fixed(setting)
        return tuple(target for target in self.source_targets(setting) if target not in fixed)

    def _differentiated(self, setting: Setting) -> tuple[Target, ...]:
        patterns = every_layer(setting, "pattern") if self._fixed(setting) else ()
        return tuple(dict.fromkeys((*self._linear(setting), *patterns)))

    def _along(
        self, setting: Setting, runs: Runs, meter: Meter, moving: tuple[Target, ...], at: tuple[Target, ...], rules: Composite | None
    ) -> dict[Target, Tensor]:
        """Mean coefficients over the points of the path on which ``moving`` goes from its own value to the source's."""
        total: dict[Target, Tensor] = {}
        for point, weight in points_and_weights(self.quadrature, self.n_steps or 1):
            edits = tuple(Edit(address(*target), Blend(Own(), runs.source, point)) for target in moving)
            found = meter.run(setting.model, program(setting, runs, edits=edits, gradients=at, rules=rules)).gradients
            total = {key: gradient * weight + total.get(key, 0) for key, gradient in found.items()}
        return total

    def _difference(self, runs: Runs, key: Target) -> Float[Tensor, "batch *site"]:
        own = runs.baseline.activations[key]
        return runs.source.values(address(*key), own, runs.batch.examples).to(_wide(own.dtype)) - own.to(_wide(own.dtype))

    def _note_gaps(
        self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any], coefficients: dict[Target, Tensor], differences: dict[Target, Tensor]
    ) -> None:
        """Completeness gap per example: the sum of a path's scores minus what the whole patch really does."""
        if self.n_steps is None:
            return
        groups = (_INPUT,) if self.over == "inputs" else tuple(coefficients)
        name = "completeness_gap" if self.composite.plain else "non_conservation"
        for group in groups:
            if self.over == "inputs" and self.source == "paired" and not setting.model.ambient:
                end = runs.clean if setting.direction == "denoising" else runs.corrupted
            else:
                patched = meter.run(setting.model, program(setting, runs, edits=(Edit(address(*group), runs.source),)))
                end = patched.values if patched.values is not None else runs.baseline_values
            scores = (differences[group] * coefficients[group]).flatten(1).sum(1)
            gaps = (scores - (end - runs.baseline_values)).double().cpu().tolist()
            notes.setdefault(name, {}).setdefault(str(address(*group)), []).extend(gaps)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
