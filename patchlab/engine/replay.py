"""Replay of the model's own blocks: what a baseline run leaves for it, and how the model calls its blocks."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.adapters.weights import fetched
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Result
from patchlab.engine.session import exclusive
from patchlab.errors import InterventionError


class Prefix:
    """Stands in for a key-value cache: the baseline's keys and values of the positions before the start, for every row."""

    def __init__(self, base: "Baseline", start: int) -> None:
        self.base, self.start = base, start

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values behind those of the prefix."""
        return self._joined(self.base.keys[layer], key), self._joined(self.base.values[layer], value)

    def _joined(self, prefix: Tensor, own: Tensor) -> Tensor:
        n, heads, _, width = prefix.shape
        joined = own.new_empty(own.shape[0], heads, self.start + own.shape[2], width)
        joined.unflatten(0, (-1, n))[..., : self.start, :] = prefix[:, :, : self.start]
        joined[:, :, self.start :] = own
        return joined

    def get_seq_length(self, layer: int = 0) -> int:
        """Number of positions before the start."""
        return self.start


@dataclass(frozen=True)
class Baseline:
    """The unpatched run as sweeps need it: the input of every block, keys and values, and the logits that are read."""

    inputs: tuple[Float[Tensor, "row pos d_model"], ...]
    keys: tuple[Tensor, ...] = field(repr=False)
    values: tuple[Tensor, ...] = field(repr=False)
    logits: Tensor | None = None
    tuples: bool = False


@dataclass(frozen=True)
class Template:
    """The model's calls of its blocks on the positions from ``start`` on."""

    start: int
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    cache: Any


@exclusive
def baseline(model: BridgedModel, program: Program, *, cache: Any = None) -> tuple[Baseline, Result]:
    """Run the unpatched program once and keep what the sweep resumes from: block inputs before any edit, which the blocks apply again.

    ``cache`` gives the keys and values; without one there are none.
    """
    reads_all = program.metric is not None and program.metric.reads == "all"
    seen = _Seen([], [])
    handles = [block.register_forward_pre_hook(seen.input_of, with_kwargs=True) for block in model.bridge.blocks]
    handles.append(model.bridge.blocks[0].register_forward_hook(seen.output_of))
    try:
        result = run(model, replace(program, edits=(), logits="all" if reads_all else program.logits), cache=cache)
    finally:
        for handle in handles:
            handle.remove()
    logits = result.logits if reads_all else None
    if cache is None:
        return Baseline(tuple(seen.inputs), (), (), logits, seen.tuples[0]), result
    if len(cache.layers) != model.arch.n_layers:
        raise InterventionError(f"{model.name} does not fill a key-value cache ({len(cache.layers)} of {model.arch.n_layers} layers).")
    keys, values = (tuple(getattr(layer, name) for layer in cache.layers) for name in ("keys", "values"))
    return Baseline(tuple(seen.inputs), keys, values, logits, seen.tuples[0]), result


@dataclass(frozen=True)
class _Seen:
    """What went into the blocks, and whether they return tuples."""

    inputs: list[Tensor]
    tuples: list[bool]

    def input_of(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    def output_of(self, module: Any, inputs: Any, output: Any) -> None:
        self.tuples.append(isinstance(output, (tuple, list)))


def unembed(model: BridgedModel, hidden: Float[Tensor, "row pos d_model"], columns: Int[Tensor, " column"] | None) -> Float[Tensor, "row pos column"]:
    """Logits of the last block's output, for some columns of the vocabulary or all."""
    bridge = model.bridge
    for name in ("ln_final", "project_out"):
        hidden = getattr(bridge, name)(hidden) if hasattr(bridge, name) else hidden
    linear = bridge.unembed.original_component
    weight: Any = fetched(linear, "weight")
    bias = fetched(linear, "bias")
    if columns is not None:
        weight, bias = weight[columns], None if bias is None else bias[columns]
    # the stream is in float32 where a half-precision model is checked
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return bridge.adapter.apply_output_logits_transform(logits)  # soft-caps, scales


@exclusive
def template(model: BridgedModel, program: Program, base: Baseline, start: int, span: int) -> Template:
    """See how the model calls its blocks on ``span`` positions from the start on, on one row, with the prefix in a real cache."""
    cache = None
    if start:
        cache = empty_cache()
        for layer, (keys, values) in enumerate(zip(base.keys, base.values, strict=True)):
            cache.update(keys[:1, :, :start].clone(), values[:1, :, :start].clone(), layer)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    blocks = list(model.bridge.blocks)
    options: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache}
    try:
        for i, block in enumerate(blocks):
            # a bridge component hands plain attributes on to the module it wraps
            object.__setattr__(block, "forward", partial(_note_call, calls, i == len(blocks) - 1, base.tuples))
        model.bridge(program.tokens[:1, start : start + span], return_type="logits", **options)
    except _Noted:
        return Template(start, tuple(calls), cache)
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    raise InterventionError(f"{model.name} does not run its blocks one after the other.")


class _Noted(Exception):
    """All blocks have been called."""


def _note_call(calls: list[Any], last: bool, as_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a block: notes its arguments and passes the stream on."""
    calls.append((args, dict(kwargs)))
    if last:
        raise _Noted
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden,) if as_tuple else hidden


def empty_cache() -> Any:
    """A key-value cache for a run to fill."""
    from transformers import DynamicCache

    return DynamicCache()
