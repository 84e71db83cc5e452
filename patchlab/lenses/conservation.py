"""Conservation: how much of the metric the relevance of each layer adds up to, and how much biases take."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from patchlab.adapters import LinearPlace, NormPlace
from patchlab.engine import Result, Target
from patchlab.errors import MetricError
from patchlab.host import precise, to_array
from patchlab.lenses.coefficients import backward_runs, rows_at_once
from patchlab.lenses.rows import rows_of
from patchlab.models import Model
from patchlab.rules import Composite, get_composite
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Conservation:
    """Relevance by layer under several rules.

    Attributes:
        subject: model and prompts.
        data: ``stream`` and ``biases`` ``[rules, layer, example]`` and ``metric`` ``[example]``, in the metric's unit. ``stream`` is Σ activation ·
            coefficient over positions and width of the residual stream before a layer; its last entry, one past the last layer, is that of the last
            state. ``biases`` is what the biases from there on contribute: Σ bias · coefficient at the output of its module.
        metric: name and unit.
    """

    subject: str
    data: xr.Dataset
    metric: tuple[str, str]

    def table(self) -> pd.DataFrame:
        """Stream, biases and their total over the metric, as ratios of means, with the stream's 95 % bootstrap interval."""
        metric = self.data["metric"].to_numpy()
        weights = resampling_weights(len(metric), 1000, 0)
        rows = []
        for name in self.data["rules"].to_numpy():
            for layer in self.data["layer"].to_numpy():
                stream, biases = (self.data[part].sel(rules=name, layer=layer).to_numpy() for part in ("stream", "biases"))
                low, high = interval((weights @ stream) / (weights @ metric))
                shares = [float(part.mean() / metric.mean()) for part in (stream, biases)]
                bounds = {"low": float(low), "high": float(high)}
                rows.append({"rules": name, "layer": int(layer), "stream": shares[0], **bounds, "biases": shares[1], "total": sum(shares)})
        return pd.DataFrame(rows)

    def show(self) -> None:
        """Write :meth:`table` to standard output."""
        sys.stdout.write(self.table().to_string(index=False, float_format=lambda value: f"{value:.3f}") + "\n")

    def __repr__(self) -> str:
        table = self.table()
        first = table[table["layer"] == table["layer"].min()].set_index("rules")
        shares = ", ".join(f"{name} {row['stream']:.2f} + {row['biases']:.2f}" for name, row in first.iterrows())
        return f"Conservation({self.subject}) of {self.metric[0]}, stream + biases before layer 0: {shares}"


def conservation(
    model: Model,
    task: Task,
    rules: Iterable[str | Composite] = ("gradient", "relp", "relp-ah"),
    *,
    side: str = "clean",
    batch_size: int | None = None,
) -> Conservation:
    """Conservation of relevance: Σ relevance of the residual stream before each layer, and of the biases after it, over the metric.

    Where every non-linearity is a constant factor (``relp-ah``) both add up to a metric that is linear in the logits, at every layer. What is
    missing, or too much, is due to non-linearities that keep their gradient: norms and activations under ``gradient``, the softmax under ``relp``.

    Args:
        model: the model.
        task: its prompts and metric.
        rules: rule sets, by name or as composites.
        side: ``clean`` or ``corrupted``.
        batch_size: examples per batch; default as many as fit in memory.

    Raises:
        MetricError: a mean metric that cannot be told from zero, of which there are no shares.
        RuleError: rules that cannot cover the model.
    """
    composites = [get_composite(one) for one in rules]
    layers = model.arch.n_layers
    targets: tuple[Target, ...] = (*(("resid_pre", layer) for layer in range(layers)), ("resid_post", layers - 1))
    rows = rows_of(model, task, side=side, batch_size=batch_size or rows_at_once(model, task, targets))
    shape = (len(composites), layers + 1, len(task))
    stream, biases, metric = np.zeros(shape), np.zeros(shape), np.zeros(len(task))
    for i, composite in enumerate(composites):
        owners = _biases(model, composite)
        for batch, result in backward_runs(model, rows, composite, keep=targets, gradients=targets, hook_gradients=tuple(owners)):
            examples = batch.examples.cpu().numpy()
            for j, target in enumerate(targets):
                stream[i, j, examples] = _summed(result.activations[target], result.gradients[target])
            for hook, (layer, bias) in owners.items():
                biases[i, : layer + 1, examples] += _summed(bias, result.hook_gradients[hook])[:, None]
            metric[examples] = _metric(result)
    low, high = interval(resampling_weights(len(metric), 1000, 0) @ metric)
    if low <= 0 <= high:
        raise MetricError(
            f"the mean {task.metric.name} is {metric.mean():.3g} (95 % interval {float(low):.3g} to {float(high):.3g}), which cannot be told from "
            f"zero, so nothing has a share of it. Use prompts that the model solves (task.select(task.solved(model)))."
        )
    data = xr.Dataset(
        {"stream": (("rules", "layer", "example"), stream), "biases": (("rules", "layer", "example"), biases), "metric": (("example",), metric)},
        coords={"rules": [one.name for one in composites], "layer": np.arange(layers + 1)},
    )
    return Conservation(rows.subject if side == "clean" else f"{rows.subject}, {side}", data, (task.metric.name, task.metric.unit))


def _metric(result: Result) -> np.ndarray:
    """The metric of a run that evaluated one."""
    found = result.values  # noqa: PD011
    return np.full(len(result.examples), np.nan) if found is None else to_array(found)


def _summed(value: Tensor, gradient: Tensor) -> np.ndarray:
    """Σ value · gradient over all but the rows."""
    product = precise(value.to(gradient.device)) * precise(gradient)
    return product.flatten(1).sum(1).cpu().numpy()


def _biases(model: Model, composite: Composite) -> dict[str, tuple[int, Any]]:
    """Every bias after the embedding, by the hook where it has been added, with its layer (one past the last for the head's)."""
    end, owners = model.arch.n_layers, dict[str, tuple[int, Any]]()
    held = (".attn.q", ".attn.k", ".attn.q_norm", ".attn.k_norm") if composite.not_scored else ()
    for place in model.arch.places:
        if place.problem is not None or place.name.endswith(held):
            continue  # a place with a problem has no hook that shows its output; with the pattern held nothing reaches queries and keys
        if isinstance(place, LinearPlace):
            bias = place.parameters()[1]
        elif isinstance(place, NormPlace):
            bias = place.bias
        else:
            continue
        inside = re.match(r"blocks\.(\d+)\.", place.name)
        if bias is not None and (inside or place.name == "ln_final"):
            owners[place.at] = (end if inside is None else int(inside[1]), bias)
    bias = getattr(model.bridge, "b_U", None)
    if bias is not None and bool(torch.any(bias)):
        owners["unembed.hook_out"] = (end, bias)
    return owners
