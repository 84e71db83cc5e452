"""Attributions: what each component wrote into the stream, as its share of the metric that a readout gives."""

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from patchlab.engine import Program, run
from patchlab.errors import LensError, MetricError, unknown
from patchlab.host import precise, to_array
from patchlab.lenses.head import head_view
from patchlab.lenses.linear_map import LinearMap
from patchlab.lenses.rows import RowBatch, Rows
from patchlab.lenses.stream import UNITS, Part, Stream, Unit, allowed, before_blocks, hooks_of, sites_of
from patchlab.metrics import Metric
from patchlab.models import Model
from patchlab.stats.bootstrap import interval, resampling_weights


@dataclass(frozen=True, eq=False)
class Attributions:
    """Contributions of components to a metric, which add up to it.

    Attributes:
        name: of the readout.
        subject: model and prompts.
        by: the unit, such as ``head``.
        data: ``contribution`` ``[example, component]`` and ``metric`` ``[example]``, in the metric's unit. Coordinates of components: their name,
            ``kind`` (``input``, ``positions``, ``head``, ``mlp``, ``neuron``, ``norm bias``, ``logit bias``, ...) and ``layer`` (−1: before or
            after all blocks).
        metric: its name and unit.
    """

    name: str
    subject: str
    by: str
    data: xr.Dataset
    metric: tuple[str, str]

    def of(self, kind: str) -> xr.DataArray:
        """The contributions of one kind as ``[example, layer, index]``, such as heads by layer and number.

        Raises:
            LensError: a kind that is not there, or with more entries in one layer than in another.
        """
        kinds = self.data["kind"].to_numpy()
        if kind not in kinds:
            raise LensError(unknown("kind of component", kind, set(kinds.tolist())))
        part = self.data["contribution"].to_numpy()[:, kinds == kind]
        layers = np.unique(self.data["layer"].to_numpy()[kinds == kind])
        counts = [int((self.data["layer"].to_numpy()[kinds == kind] == layer).sum()) for layer in layers]
        if len(set(counts)) > 1:
            raise LensError(f"layers have {counts} entries of kind {kind}, which have no common axis; select them by name from data.")
        values = part.reshape(len(part), len(layers), -1)
        return xr.DataArray(values, dims=("example", "layer", "index"), coords={"layer": layers}, name=kind)

    def table(self, n: int | None = 10) -> pd.DataFrame:
        """The n components with the largest mean contribution (None: all), with 95 % bootstrap intervals over examples."""
        values = self.data["contribution"].to_numpy()
        mean = values.mean(0)
        order = np.argsort(-np.abs(mean), kind="stable")[:n]
        low, high = interval(resampling_weights(len(values), 1000, 0) @ values[:, order])
        names, kinds = (self.data[part].to_numpy()[order] for part in ("component", "kind"))
        return pd.DataFrame({"component": names, "kind": kinds, "contribution": mean[order], "low": low, "high": high})

    def show(self, n: int | None = 10) -> None:
        """Write :meth:`table` to standard output."""
        sys.stdout.write(self.table(n).to_string(index=False, float_format=lambda value: f"{value:+.3f}") + "\n")

    def __repr__(self) -> str:
        mean = float(self.data["metric"].mean())
        return f"Attributions({self.name} by {self.by}, {self.subject}) {self.data.sizes['component']} components; mean {self.metric[0]} {mean:.3g}"


def attributions(model: Model, rows: Rows, linear: LinearMap | None, layer: int, *, by: str, name: str) -> Attributions:
    """Attributions of the metric that a state after ``layer`` gives through a map and the head; see :meth:`patchlab.lenses.Readout.attribute`."""
    if by not in UNITS:
        raise LensError(unknown("unit of attribution", by, UNITS))
    if rows.metric is None:
        raise MetricError("plain prompts have no metric to attribute; give a task.")
    if rows.metric.needs_clean:
        raise MetricError(f"the metric {rows.metric.name} is not linear in the logits. Use task.with_metric('logit_diff').")
    unit = UNITS[by]
    values: dict[int, np.ndarray] = {}
    totals: dict[int, float] = {}
    components: list[tuple[str, str, int]] = []
    for batch in rows.batches:
        parts, metric = _of_batch(model, rows.metric, batch, linear, layer, unit)
        array = to_array(torch.cat([part.shares for part in parts], 1))
        components = [(own, part.kind, -1 if part.layer is None else part.layer) for part in parts for own in part.names]
        for row, example in enumerate(batch.examples.tolist()):
            values[example], totals[example] = array[row], float(metric[row])
    order = sorted(values)
    names, kinds, layers = zip(*components, strict=True)
    data = xr.Dataset(
        {
            "contribution": (("example", "component"), np.stack([values[example] for example in order])),
            "metric": (("example",), np.array([totals[example] for example in order])),
        },
        coords={
            "component": list(names),
            "kind": ("component", np.array(kinds, dtype=object)),
            "layer": ("component", np.array(layers)),
        },
    )
    subject = rows.subject if rows.side == "clean" else f"{rows.subject}, {rows.side}"
    at = name if layer == model.arch.n_layers - 1 else f"{name} after layer {layer}"
    return Attributions(at, subject, by, data, (rows.metric.name, rows.metric.unit))


def _of_batch(
    model: Model, metric: Metric, batch: RowBatch, linear: LinearMap | None, layer: int, unit: Unit
) -> tuple[list[Part], Float[Tensor, " row"]]:
    if batch.answers is None:
        raise MetricError("plain prompts have no answers; give a task.")
    keep, hooks = sites_of(model, unit, layer), hooks_of(model, layer)
    with torch.no_grad():
        plain = run(model, Program(batch.tokens, batch.examples, positions=batch.positions, keep=keep, hooks=hooks))
    kept = {target: value[:, -1] for target, value in plain.activations.items()}
    at_hooks = {hook: value[:, -1] for hook, value in plain.hooks.items()}
    state = kept["resid_post", layer]
    view = head_view(model, state if linear is None else linear(state).to(model.dtype), metric, batch.answers)
    coefficient = view.coefficient if linear is None else linear.back(view.coefficient)
    stream = Stream(model, kept, at_hooks, coefficient.to(torch.promote_types(coefficient.dtype, torch.float32)))
    with torch.no_grad():
        before = before_blocks(stream) if unit.sums else ()
        parts = [*before, *(part for i in range(layer + 1) for part in unit.parts(stream, i))]
        ends = [("norm bias", view.norm_bias), ("logit bias", view.logit_bias)]
        if linear is not None and linear.bias is not None:
            ends.insert(0, ("map bias", view.coefficient.to(linear.bias) @ linear.bias))
        parts += [Part(what, None, (what,), share[:, None]) for what, share in ends if bool(share.any())]
        _check_total(model, parts, view.metric)
    return parts, view.metric


def _check_total(model: Model, parts: list[Part], values: Float[Tensor, " row"]) -> None:
    """Check that everything adds up to the metric.

    Raises:
        LensError: the stream is not the sum of what the blocks write.
    """
    everything = torch.cat([precise(part.shares) for part in parts], 1)
    off = ((everything.sum(1) - precise(values)).abs() / everything.abs().sum(1).clamp_min(1e-30)).max()
    if float(off) > allowed(model):
        raise LensError(
            f"what the blocks of {model.name} write does not add up to its last state (the metric is off by {float(off):.2g} of the contributions): "
            f"its stream is not a plain sum, so there is no direct attribution."
        )
