"""The second-order term of each cell's effect: what linearised patching leaves out first."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.engine import Target
from patchlab.errors import MethodError
from patchlab.interventions import Edit, Source, address
from patchlab.methods.base import Method
from patchlab.methods.runs import Meter, Runs, Setting, activation_bytes, itemsize, program, reduced
from patchlab.sites import KINDS, POSITION_AXES, Site

STEPS = {torch.float32: 1e-2, torch.float64: 1e-4}
"""Share of the way to the source at which the second gradient is taken, per dtype of the model."""


@dataclass(frozen=True)
class SecondOrder(Method):
    """``½ δᵀHδ`` of every cell: what linearised patching leaves out first. Not an effect, but how far to trust one.

    H is the Hessian of the metric in one layer's site at the baseline. One Hessian-vector product per layer and probe, along
    ``u = Σ_c s_c δ_c`` with a random sign per cell and example, gives ``½ s_c δ_c · Hu`` for all cells of the layer at once:
    exact where a layer has one cell, elsewhere unbiased over the signs, since the cross terms between cells average out. (Without
    signs they would all be counted.) The product is a difference of two gradients, at the baseline and a small step along u.
    Source: arXiv 2606.09899 for the term, whose size over that of the first-order score ``|δᵀHδ| / (2 |∇m·δ|)`` tells how reliable the
    latter is (:func:`patchlab.reliability.unreliable`). There every component has a Hessian-vector product of its own, along its own δ;
    sharing one among the cells of a layer is ours (signs: Hutchinson 1989), and so is the difference in place of a second derivative.

    Args:
        probes: sign patterns to average over.
        seed: of the signs.
        source: what is patched in; see :class:`patchlab.methods.Method`.

    Example:
        >>> doubtful = patchlab.reliability.unreliable(atp, SecondOrder().run(model, task, "z"))  # doctest: +SKIP
    """

    probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise MethodError(f"probes is {self.probes}; at least 1 sign pattern is needed.")

    @property
    def name(self) -> str:
        return "second-order" if self.probes == 1 else f"second-order:{self.probes}"

    def check(self, setting: Setting) -> None:
        if setting.edges is not None:
            raise MethodError(f"second-order terms are of nodes, and {setting.edges} are edges; ask for z and mlp_out, whose outputs edges carry.")
        if setting.model.dtype not in STEPS:
            raise MethodError(
                f"a second derivative needs a model in float32 or float64; {setting.model.name} is in "
                f"{str(setting.model.dtype).removeprefix('torch.')}. Load it with dtype='float32'."
            )

    def forwards(self, setting: Setting) -> int:
        return 2 + self.probes * sum(len(_layers(setting, site)) for site in setting.sites)

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        arch = setting.model.arch
        per_block = rows * length * (12 * arch.d_model + 4 * (arch.d_mlp or 0) + 3 * arch.n_heads * length)
        return 4 * activation_bytes(setting, rows, length) + itemsize(setting) * (
            arch.n_layers * per_block + 2 * rows * length * setting.model.vocab_size
        )

    def _provenance(self, setting: Setting, skipped: dict[str, str]) -> dict[str, Any]:
        record = super()._provenance(setting, skipped)
        return {**record, "notes": [*record["notes"], "second-order terms, not effects"]}

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        return {"keep": setting.targets, "gradients": setting.targets}

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> dict[str, np.ndarray]:
        scores = {}
        for site in setting.sites:
            per_layer = [self._of_layer(setting, runs, meter, site, (site.kind, layer)) for layer in _layers(setting, site)]
            found = per_layer[0] if KINDS[site.kind].axes[0] != "layer" else torch.stack(per_layer, 1)
            scores[str(site)] = found.double().cpu().numpy()
        return scores

    def _of_layer(self, setting: Setting, runs: Runs, meter: Meter, site: Site, target: Target) -> Float[Tensor, "batch *cells"]:
        own, gradient, step = runs.baseline.activations[target], runs.baseline.gradients[target], STEPS[setting.model.dtype]
        difference = runs.source.values(address(*target), own, runs.batch.examples).to(own) - own
        total = torch.zeros((), device=own.device)
        for probe in range(self.probes):
            signs = self._signs(setting, runs, site, target, own, probe)
            nudge = Edit(address(*target), _Nudge(runs.source, signs, step))
            moved = meter.run(setting.model, program(setting, runs, edits=(nudge,), gradients=(target,))).gradients[target]
            product = signs * difference * (moved - gradient) / (2 * step)
            total = total + reduced(setting, runs, site, product if KINDS[site.kind].width is None else product.sum(-1))
        return total / self.probes

    def _signs(self, setting: Setting, runs: Runs, site: Site, target: Target, own: Float[Tensor, "batch *site"], probe: int) -> Tensor:
        """A sign per example and cell, keyed by the example's tokens; it broadcasts to the site. 0 at positions that are no cell."""
        axes = [axis for axis in KINDS[site.kind].axes if axis != "layer"]
        shape = [size if axis in site.axes else 1 for axis, size in zip(axes, own.shape[1:], strict=False)]
        named = None if setting.axis is None or setting.axis.names is None else setting.axis.index
        rows = []
        for example in runs.batch.examples.tolist():
            pair = setting.task.pairs[example]
            key = hashlib.sha256(repr((self.seed, probe, target[1], pair.clean_ids, pair.corrupted_ids)).encode()).digest()
            signs = np.random.default_rng(list(key)).choice([-1.0, 1.0], size=shape)
            for dim, axis in enumerate(axes):
                if named is not None and axis in site.axes and axis in POSITION_AXES:
                    elsewhere = np.setdiff1d(np.arange(shape[dim]), named[example])
                    signs[(slice(None),) * dim + (elsewhere,)] = 0.0
            rows.append(signs)
        found = torch.as_tensor(np.stack(rows), dtype=own.dtype, device=own.device)
        return found if KINDS[site.kind].width is None else found.unsqueeze(-1)


@dataclass(frozen=True)
class _Nudge:
    """A small step from the own value towards the source, each cell forwards or backwards."""

    source: Source
    signs: Tensor
    step: float

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        return own + self.step * self.signs * (self.source.values(site, own, examples).to(own) - own)


def _layers(setting: Setting, site: Site) -> list[int | None]:
    return [None] if "layer" not in KINDS[site.kind].axes else list(range(setting.model.arch.n_layers))
