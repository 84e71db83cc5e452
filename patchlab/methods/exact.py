"""Activation patching: the ground truth, one patched forward pass per cell."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchlab.interventions import Edit
from patchlab.methods.base import Method
from patchlab.methods.runs import Meter, Runs, Setting, activation_bytes, itemsize, program
from patchlab.sites import Position, Site


@dataclass(frozen=True)
class ActivationPatching(Method):
    """Patch every cell and read the metric: effect = patched metric − baseline metric.

    Axes that a site does not name are patched jointly (``z`` patches a head at all positions). Structural zeros are not
    run; their effect is zero. Source: Vig et al. 2020; Meng et al. 2022; as in TransformerLens' ``patching``.

    Example:
        >>> ActivationPatching().run(model, task, "resid_pre")  # doctest: +SKIP
    """

    @property
    def name(self) -> str:
        return "exact"

    def forwards(self, setting: Setting) -> int:
        return 2 + sum(int(live.sum()) for live in setting.live.values())

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        return activation_bytes(setting, rows, length) + rows * setting.model.vocab_size * itemsize(setting)

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> dict[str, np.ndarray]:
        scores = {}
        for site in setting.sites:
            live = setting.live[str(site)]
            effects = np.zeros((len(runs.batch), *live.shape))
            for cell, where in _cells(setting, site, live):
                patched = meter.run(setting.model, program(setting, runs, edits=(Edit(where, runs.source),)))
                if patched.values is not None:
                    effects[(slice(None), *cell)] = (patched.values.double() - runs.baseline_values.double()).cpu().numpy()
            scores[str(site)] = effects
        return scores


def _cells(setting: Setting, site: Site, live: np.ndarray) -> Iterator[tuple[tuple[int, ...], Site]]:
    """Index and address of every live cell."""
    names = None if setting.axis is None else setting.axis.names

    def position(index: dict[str, int], axis: str) -> tuple[Position, ...] | None:
        if axis not in index:
            return None
        return (index[axis] if names is None else names[index[axis]],)

    for cell in map(tuple, np.argwhere(live).tolist()):
        index = dict(zip(site.axes, cell, strict=True))
        yield (
            cell,
            Site(
                site.kind,
                (),
                layer=index.get("layer"),
                head=index.get("head", index.get("kv_head")),
                neuron=index.get("neuron"),
                pos=position(index, "dest" if site.kind == "pattern" else "pos"),
                src=position(index, "src"),
            ),
        )
