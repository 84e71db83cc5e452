"""Linearised patching: backward rules × points on the path × source, in one implementation.

The effect of patching a site is estimated as the difference of its activation times a coefficient: the gradient of the
metric (AtP), its mean over a path from the baseline to the source (IG), or what relevance propagation puts in the
gradient's place (RelP). One point costs two forward passes and one backward pass per batch, for all cells at once.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.engine import Target
from patchlab.errors import MethodError
from patchlab.interventions import Blend, Edit, Own, address
from patchlab.methods.base import Method
from patchlab.methods.runs import Meter, Runs, Setting, activation_bytes, itemsize, program
from patchlab.rules import Composite, get_composite
from patchlab.sites import KINDS, Site

_INPUT: Target = ("input", None)


@dataclass(frozen=True)
class LinearizedPatching(Method):
    """The one implementation; the named methods fix some of its fields.

    Args:
        rules: backward rules, a preset's name or a composite; ``gradient`` has none.
        n_steps: points on the path from baseline to source (midpoint rule); None takes the gradient at the baseline alone.
        over: what moves along the path: ``inputs`` (all token embeddings) or ``activations`` (each layer's site alone, all
            positions and heads, the rest at baseline).
        source: what is patched in; see :class:`patchlab.methods.Method`.
    """

    rules: str | Composite = "gradient"
    n_steps: int | None = None
    over: Literal["inputs", "activations"] = "inputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.composite
        if self.n_steps is not None and self.n_steps < 1:
            raise MethodError(f"n_steps is {self.n_steps}; integrated gradients need at least 1 point on the path.")
        if self.over not in ("inputs", "activations"):
            raise MethodError(f"over is {self.over!r}; valid: 'inputs', 'activations'.")

    @property
    def composite(self) -> Composite:
        """The backward rules as an object."""
        return get_composite(self.rules)

    @property
    def name(self) -> str:
        rules = self.composite.name
        if self.n_steps is None:
            return "atp" if rules == "gradient" else rules
        steps = f"ig:{self.n_steps}" if self.over == "inputs" else f"ig-activations:{self.n_steps}"
        return steps if rules == "gradient" else f"{rules}+{steps}"

    def check(self, setting: Setting) -> None:
        if setting.task.metric.vanishes_at_clean and setting.direction == "noising" and self.n_steps is None:
            raise MethodError(
                f"the gradient of {setting.task.metric.name} vanishes at the clean run, so {self.name} in the noising direction "
                f"would score everything zero. "
                f"Use direction='denoising', integrated gradients, or another metric."
            )
        self.composite.attach(setting.model.arch.places)

    def not_scored(self, setting: Setting) -> dict[str, str]:
        reasons = self.composite.not_scored
        return {str(site): reasons[site.kind] for site in setting.sites if site.kind in reasons}

    def forwards(self, setting: Setting) -> int:
        if self.n_steps is None:
            return 2
        return 2 + self.n_steps + (self.source != "paired") if self.over == "inputs" else 2 + (self.n_steps + 1) * len(self._scored(setting))

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        # both runs' activations and the gradients, and what the backward pass of each block holds on to
        arch = setting.model.arch
        per_block = rows * length * (12 * arch.d_model + 4 * (arch.d_mlp or 0) + 3 * arch.n_heads * length)
        return 3 * activation_bytes(setting, rows, length) + itemsize(setting) * (
            arch.n_layers * per_block + 2 * rows * length * setting.model.vocab_size
        )

    def source_targets(self, setting: Setting) -> tuple[Target, ...]:
        scored = self._scored(setting)
        return tuple(dict.fromkeys((*scored, _INPUT))) if self._along_inputs else scored

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        keep = self.source_targets(setting)
        if self.n_steps is None:
            return {"keep": keep, "gradients": keep, "rules": self._rules}
        return {"keep": keep}

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> dict[str, np.ndarray]:
        if self.n_steps is None:
            coefficients = dict(runs.baseline.gradients)
        elif self.over == "inputs":
            coefficients = self._along(setting, runs, meter, (_INPUT,), self.source_targets(setting))
        else:
            coefficients = {}
            for target in self._scored(setting):
                coefficients |= self._along(setting, runs, meter, (target,), (target,))
        differences = {key: self._difference(runs, key) for key in coefficients}
        self._note_gaps(setting, runs, meter, notes, coefficients, differences)
        skipped = self.not_scored(setting)
        scores = {}
        for site in setting.sites:
            if str(site) in skipped:
                scores[str(site)] = np.full((len(runs.batch), *setting.live[str(site)].shape), np.nan)
                continue
            layers = [None] if "layer" not in KINDS[site.kind].axes else list(range(setting.model.arch.n_layers))
            per_layer = [_cells(setting, runs, site, differences[site.kind, layer], coefficients[site.kind, layer]) for layer in layers]
            scores[str(site)] = (per_layer[0] if layers == [None] else torch.stack(per_layer, 1)).double().cpu().numpy()
        return scores

    @property
    def _along_inputs(self) -> bool:
        return self.n_steps is not None and self.over == "inputs"

    @property
    def _rules(self) -> Composite | None:
        return None if self.composite.plain else self.composite

    def _scored(self, setting: Setting) -> tuple[Target, ...]:
        reasons = self.composite.not_scored
        return tuple(target for target in setting.targets if target[0] not in reasons)

    def _along(self, setting: Setting, runs: Runs, meter: Meter, moving: tuple[Target, ...], at: tuple[Target, ...]) -> dict[Target, Tensor]:
        """Mean coefficients over the midpoints of the path on which ``moving`` goes from its own value to the source's."""
        n_steps = self.n_steps or 1
        total: dict[Target, Tensor] = {}
        for step in range(n_steps):
            edits = tuple(Edit(address(*target), Blend(Own(), runs.source, (step + 0.5) / n_steps)) for target in moving)
            found = meter.run(setting.model, program(setting, runs, edits=edits, gradients=at, rules=self._rules)).gradients
            total = {key: gradient / n_steps + total.get(key, 0) for key, gradient in found.items()}
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


def _cells(setting: Setting, runs: Runs, site: Site, difference: Float[Tensor, "batch *site"], coefficient: Float[Tensor, "batch *site"]) -> Tensor:
    """Difference × coefficient of one layer, summed over the vector axis and over the axes that are taken jointly."""
    kind = KINDS[site.kind]
    product = difference * coefficient.to(difference.dtype)
    if kind.width is not None:
        product = product.sum(-1)
    names = [name for name in kind.axes if name != "layer"]
    for dim, name in reversed(list(enumerate(names, start=1))):
        if name not in site.axes:
            product = product.sum(dim)
        elif name in ("pos", "dest", "src") and setting.axis is not None and setting.axis.names is not None:
            index = torch.as_tensor(setting.axis.index[runs.batch.examples.cpu().numpy()], device=product.device)
            shape = [1] * product.ndim
            shape[0], shape[dim] = index.shape
            expanded = [*product.shape]
            expanded[dim] = index.shape[1]
            product = product.gather(dim, index.reshape(shape).expand(expanded))
    return product


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class AttributionPatching(LinearizedPatching):
    """AtP: difference × gradient at the baseline. Source: Nanda 2023; Syed et al. 2023 (arXiv 2310.10348).

    Example:
        >>> AttributionPatching().run(model, task, ["resid_pre", "z"])  # doctest: +SKIP
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.composite.plain or self.n_steps is not None:
            raise MethodError(
                "AttributionPatching is the plain gradient at one point; use RelevancePatching(rules=...) or IntegratedGradients(n_steps=...)."
            )


@dataclass(frozen=True, init=False)
class IntegratedGradients(LinearizedPatching):
    """IG: difference × the mean coefficient along a path. Source: Sundararajan et al. 2017; Hanna et al. 2024 (arXiv 2403.17806).

    The completeness gap (Σ input scores − metric difference) is in the result's provenance, per example; with rules it is
    reported as non-conservation.

    Example:
        >>> IntegratedGradients(5).name
        'ig:5'
        >>> IntegratedGradients(5, rules="relp").name
        'relp+ig:5'
    """

    def __init__(
        self, n_steps: int = 5, over: Literal["inputs", "activations"] = "inputs", *, rules: str | Composite = "gradient", source: str = "paired"
    ) -> None:
        _set(self, n_steps=n_steps, over=over, rules=rules, source=source)


@dataclass(frozen=True, init=False)
class RelevancePatching(LinearizedPatching):
    """RelP: difference × LRP propagation coefficient. Source: arXiv 2508.21258; presets in :data:`patchlab.rules.PRESETS`.

    Example:
        >>> RelevancePatching().name, RelevancePatching("relp-ah").name
        ('relp', 'relp-ah')
    """

    def __init__(self, rules: str | Composite = "relp", *, source: str = "paired") -> None:
        _set(self, n_steps=None, over="inputs", rules=rules, source=source)


def _set(method: LinearizedPatching, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(method, name, value)
    method.__post_init__()


_IG = re.compile(r"((?P<rules>[^+]+)\+)?ig:(?P<steps>-?\d+)")


def parse_path_method(name: str) -> LinearizedPatching | None:
    """``ig:5`` or ``relp+ig:5``; None if the name is neither."""
    match = _IG.fullmatch(name)
    return None if match is None else IntegratedGradients(int(match["steps"]), rules=match["rules"] or "gradient")
