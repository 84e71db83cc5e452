"""Shared runs: unpatched runs that several methods start from, made once."""

import hashlib
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from patchlab.engine import Program, Result, Target, empty_cache, run, session_of
from patchlab.engine.memory import free_bytes
from patchlab.methods.setting.meter import Meter
from patchlab.models import Model


class SharedRuns:
    """The runs without edits and gradients that were made inside :func:`sharing_runs`, the latest ones up to ``budget`` bytes.

    Attributes:
        saved: forward passes that were asked for and not made again.
    """

    def __init__(self, budget: int | float) -> None:
        self.budget, self.saved = budget, 0
        self._kept: OrderedDict[tuple[Any, ...], tuple[Result, Any]] = OrderedDict()

    def find(self, program: Program, *, cached: bool) -> tuple[Result, Any] | None:
        """An earlier run with at least what the program keeps, and its keys and values; None if there is none."""
        key = _key(program, cached)
        if key not in self._kept or not _asked(program) <= _held(self._kept[key][0]):
            return None
        self._kept.move_to_end(key)
        result, cache = self._kept[key]
        self.saved += result.work[0]
        return result, cache

    def add(self, program: Program, result: Result, cache: Any) -> None:
        """Keep a run, instead of those that have not been asked for the longest."""
        self._kept[_key(program, cache is not None)] = result, cache
        self._kept.move_to_end(_key(program, cache is not None))
        while sum(_bytes(*one) for one in self._kept.values()) > self.budget:
            self._kept.popitem(last=False)


@contextmanager
def sharing_runs(model: Model, *, max_bytes: int | float | None = None) -> Generator[SharedRuns, None, None]:
    """Make the unpatched runs of all methods inside the block once, as far as they fit into ``max_bytes`` (default: an eighth of what is free).

    Costs of results are those of each method by itself: a run that another method has made is counted again.

    Example:
        >>> with sharing_runs(model):  # doctest: +SKIP
        ...     maps = [method.run(model, task, "resid_pre") for method in (ActivationPatching(), AttributionPatching())]
    """
    session = session_of(model)
    before, session.shared = session.shared, SharedRuns(free_bytes(model.device) // 8 if max_bytes is None else max_bytes)
    try:
        yield session.shared
    finally:
        session.shared = before


def unedited(model: Model, program: Program, meter: Meter, *, cached: bool = False) -> tuple[Result, Any]:
    """Run a program without edits and gradients, or find the run that another method made; with ``cached`` also its keys and values."""
    session = session_of(model)
    shared: SharedRuns | None = None if session.surrounding else session.shared
    if shared is not None and (found := shared.find(program, cached=cached)) is not None:
        return meter.count(found[0]), found[1]
    cache = empty_cache() if cached else None
    result = meter.count(run(model, program, cache=cache))
    if shared is not None:
        shared.add(program, result, cache)
    return result, cache


def _key(program: Program, cached: bool) -> tuple[Any, ...]:
    """What a run without edits depends on, but for what is kept of it."""
    answers = () if program.answers is None else tuple(None if part is None else _content(part) for part in vars(program.answers).values())
    return _content(program.tokens), _content(program.examples), program.metric, answers, program.logits, cached


def _content(values: Tensor) -> tuple[Any, ...]:
    plain = values.detach().cpu().contiguous()
    return tuple(plain.shape), plain.dtype, hashlib.sha256(plain.flatten().view(torch.uint8).numpy().tobytes()).digest()


def _asked(program: Program) -> set[Target | str]:
    return {*program.keep, *program.hooks}


def _held(result: Result) -> set[Target | str]:
    return {*result.activations, *result.hooks}


def _bytes(result: Result, cache: Any) -> int:
    tensors = [*result.activations.values(), *result.hooks.values()]
    tensors += [part for layer in (() if cache is None else cache.layers) for part in (layer.keys, layer.values)]
    tensors += [part for part in (result.logits, result.values) if part is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
