"""Coefficients: the gradient of a task's metric at a site, or what a relevance backward pass puts in its place, with the axes of the site."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patchlab.engine import Program, Result, Target, run
from patchlab.engine.memory import activation_bytes, block_numbers, free_bytes, itemsize
from patchlab.errors import MethodError, RuleError, SiteError
from patchlab.lenses.rows import RowBatch, Rows, rows_of
from patchlab.models import Model
from patchlab.rules import Composite, get_composite
from patchlab.sites import KINDS, POSITION_AXES, Site
from patchlab.tasks.task import Task


def coefficients(
    model: Model,
    task: Task,
    site: str | Site,
    *,
    rules: str | Composite = "gradient",
    side: str = "clean",
    batch_size: int | None = None,
) -> xr.DataArray:
    """Coefficients at a site: ``∂ metric / ∂ activation`` under backward rules, per example.

    Attribution patching multiplies a difference of activations by it (on the corrupted side when denoising), relevance the activation itself.

    Args:
        model: the model.
        task: its prompts and metric.
        site: a kind (``resid_pre``: all layers), or an address that narrows it to a layer, head, neuron or positions (``L5.H3.z@END``).
        rules: backward rules, by name or as a composite; ``gradient`` has none.
        side: the prompts at which it is taken, ``clean`` or ``corrupted``.
        batch_size: examples per batch; default as many as fit in memory. The result does not depend on it.

    Returns:
        ``[example, *axes of the site, width]``, in the metric's unit per unit of the activation: ``z`` has ``[example, layer, pos, head, d_head]``,
        ``pattern`` ``[example, layer, head, dest, src]``. Positions of a task whose prompts do not line up are its named ones, with the
        coordinate ``position``; those of other tasks have the tokens as the coordinate ``token[example, pos]``.

    Raises:
        SiteError: a site that the model lacks, edges, or a position that not all prompts have.
        RuleError: rules that cannot cover the model, or under which nothing reaches the site.
        MethodError: a metric whose gradient vanishes at the clean prompts.

    Example:
        >>> pl.coefficients(model, task, "resid_pre", rules="relp").dims  # doctest: +SKIP
        ('example', 'layer', 'pos', 'd_model')
    """
    return _taken(model, task, site, rules, side, batch_size)[1]


def relevance(
    model: Model,
    task: Task,
    site: str | Site,
    *,
    rules: str | Composite = "relp",
    side: str = "clean",
    batch_size: int | None = None,
) -> xr.DataArray:
    """Relevance of a site: its activation times its coefficient, summed over the width; options and errors as :func:`coefficients`.

    Returns:
        ``[example, *axes of the site]`` in the metric's unit. At ``input`` it says which tokens the metric is due to.
    """
    activations, coefficient = _taken(model, task, site, rules, side, batch_size)
    width = KINDS[Site.parse(site).kind].width
    product = activations.astype(np.float64) * coefficient.astype(np.float64)
    found = product if width is None else product.sum(width)
    return found.assign_attrs(coefficient.attrs).rename("relevance")


def _taken(
    model: Model, task: Task, site: str | Site, rules: str | Composite, side: str, batch_size: int | None
) -> tuple[xr.DataArray, xr.DataArray]:
    """Activations and coefficients at a site, with the same axes."""
    wanted, composite = Site.parse(site), get_composite(rules)
    model.arch.check(wanted)
    kind = KINDS[wanted.kind]
    if kind.granularities is not None or wanted.kind not in model.arch.accessors:
        raise SiteError(f"{wanted.kind} is no activation, so it has no coefficient; give one of {', '.join(model.arch.sites)}.")
    if wanted.kind in composite.not_scored:
        raise RuleError(f"{wanted.kind} has no coefficient: {composite.not_scored[wanted.kind]}.")
    layers: list[int | None] = [wanted.layer] if wanted.layer is not None else [*range(model.arch.n_layers)] if kind.layered else [None]
    targets: tuple[Target, ...] = tuple((wanted.kind, layer) for layer in layers)
    rows = rows_of(model, task, side=side, batch_size=batch_size or rows_at_once(model, task, targets))
    places = {axis: _places(rows, task, wanted, axis) for axis in POSITION_AXES if axis in kind.axes}
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for batch, result in backward_runs(model, rows, composite, keep=targets, gradients=targets):
        for row, example in enumerate(batch.examples.tolist()):
            found[example] = (
                _picked(result.activations, targets, row, kind, places, example),
                _picked(result.gradients, targets, row, kind, places, example),
            )
    order = sorted(found)
    one = [_labelled(np.stack([found[example][part] for example in order]), model, wanted, layers, rows, task, places) for part in (0, 1)]
    metric = {"metric": task.metric.name, "unit": task.metric.unit}
    attrs = {"site": str(wanted), "rules": composite.name, **metric, "side": side, "subject": rows.subject}
    return one[0].rename("activation").assign_attrs(attrs), one[1].rename("coefficient").assign_attrs(attrs)


def backward_runs(
    model: Model,
    rows: Rows,
    composite: Composite,
    *,
    keep: tuple[Target, ...] = (),
    gradients: tuple[Target, ...] = (),
    hook_gradients: tuple[str, ...] = (),
) -> Iterator[tuple[RowBatch, Result]]:
    """One forward and backward pass per batch of a task's rows, with its metric.

    Raises:
        MethodError: a metric whose gradient vanishes at the clean prompts.
    """
    metric = rows.metric
    if metric is None:
        raise MethodError("plain prompts have no metric to differentiate; give a task.")
    if metric.vanishes_at_clean and rows.side == "clean":
        raise MethodError(f"the gradient of {metric.name} vanishes at the clean prompts. Use side='corrupted' or another metric.")
    for batch in rows.batches:
        answers = batch.answers
        if metric.needs_clean and answers is not None:
            clean = run(model, Program(batch.clean, batch.examples, positions=batch.positions, logits=metric.reads))
            answers = replace(answers, clean_logits=clean.logits)
        rules = None if composite.plain else composite
        program = Program(
            batch.tokens,
            batch.examples,
            positions=batch.positions,
            rules=rules,
            keep=keep,
            gradients=gradients,
            hook_gradients=hook_gradients,
            metric=metric,
            answers=answers,
        )
        yield batch, run(model, program)


def rows_at_once(model: Model, task: Task, targets: tuple[Target, ...]) -> int:
    """Examples whose backward pass takes at most half of the free memory."""
    length = max(len(pair) for pair in task.pairs)
    own = 3 * activation_bytes(model, targets, 1, length)
    blocks = itemsize(model) * (model.arch.n_layers * length * block_numbers(model, length) + 2 * length * model.vocab_size)
    return max(1, min(len(task), free_bytes(model.device) // 2 // max(1, own + blocks)))


@dataclass(frozen=True)
class _Places:
    """Where the entries of a position axis lie, ``index[example, entry]``, and the names of the entries (None: they line up by index)."""

    index: np.ndarray
    names: tuple[str, ...] | None


def _places(rows: Rows, task: Task, site: Site, axis: str) -> _Places:
    """The places of a position axis: those that the address names, else the task's.

    Raises:
        SiteError: a position that not all prompts have.
    """
    asked = site.src if axis == "src" else site.pos
    if asked is None:
        return _Places(rows.axis.index, rows.axis.names)
    index = np.zeros((len(task), len(asked)), dtype=int)
    for example, pair in enumerate(task.pairs):
        for i, position in enumerate(asked):
            where = pair.positions.get(position) if isinstance(position, str) else position
            if where is None or not -len(pair) <= where < len(pair):
                known = ", ".join(task.position_names())
                raise SiteError(f"pair {example} of {task.name} has no position {position!r}. Positions that all pairs have: {known}, and numbers.")
            index[example, i] = where % len(pair)
    return _Places(index, tuple(map(str, asked)))


def _picked(values: Any, targets: tuple[Target, ...], row: int, kind: Any, places: dict[str, _Places], example: int) -> np.ndarray:
    """One example's values, layers stacked, at the places of the position axes."""
    axes = [axis for axis in kind.axes if axis != "layer"]
    per_layer = []
    for target in targets:
        value: Tensor = values[target][row]
        for axis, at in places.items():
            value = value.index_select(axes.index(axis), torch.as_tensor(at.index[example], device=value.device))
        per_layer.append(value.to(torch.promote_types(value.dtype, torch.float32)).cpu().numpy())
    return np.stack(per_layer)


def _labelled(
    values: np.ndarray, model: Model, site: Site, layers: list[int | None], rows: Rows, task: Task, places: dict[str, _Places]
) -> xr.DataArray:
    """Values ``[example, layer, *axes, width]`` with the names of their axes; what the address fixes is a coordinate without an axis."""
    kind = KINDS[site.kind]
    dims = ["example", "layer", *(axis for axis in kind.axes if axis != "layer"), *([] if kind.width is None else [kind.width])]
    data = xr.DataArray(values, dims=dims)
    if layers[0] is None:
        data = data.isel(layer=0)
    else:
        data = data.assign_coords(layer=[int(layer) for layer in layers if layer is not None])
        data = data.isel(layer=0) if site.layer is not None else data
    if site.index is not None and kind.unit is not None:
        data = data.isel({kind.unit: site.index}).assign_coords({kind.unit: site.index})
    for axis, at in places.items():
        prompts = [pair.clean_ids if rows.side == "clean" else pair.corrupted_ids for pair in task.pairs]
        texts = [[task.token_text(ids[int(p)]) for p in entries] for ids, entries in zip(prompts, at.index, strict=True)]
        coords: dict[str, Any] = {("token" if axis == "pos" else f"{axis}_token"): (("example", axis), np.array(texts, dtype=object))}
        if at.names is not None:
            coords["position" if axis == "pos" else f"{axis}_position"] = (axis, list(at.names))
        data = data.assign_coords(coords)
        if (site.src if axis == "src" else site.pos) is not None and len(at.index[0]) == 1:
            data = data.isel({axis: 0})
    return data
