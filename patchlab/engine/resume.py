"""Resumed runs: only the rest of prompts is run whose beginning another run has computed.

Attention is causal, so two prompts that begin with the same tokens have the same activations there. The second run starts at
the first difference, with the first run's keys and values in its cache.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Result, Target
from patchlab.engine.replay import Baseline, baseline, empty_cache
from patchlab.sites import KINDS


def beginning(cache: Any, start: int) -> Any:
    """A cache with the first ``start`` positions of another."""
    shorter = empty_cache()
    for layer, filled in enumerate(cache.layers):
        shorter.update(filled.keys[:, :, :start], filled.values[:, :, :start], layer)
    return shorter


def run_rest(model: BridgedModel, program: Program, cache: Any, start: int, known: Mapping[Target, Tensor]) -> tuple[Result, Baseline | None]:
    """Run a program from position ``start`` on, and say what the whole run would.

    Args:
        model: the model; nothing surrounds the run.
        program: whole prompts, without edits, with a metric that reads the answer position.
        cache: of a run on prompts with the same tokens before the start; it is not changed.
        start: first position to run.
        known: that run's activations, for the positions before the start.

    Returns:
        Kept activations of whole prompts, and gradients, which before the start are not computed and zero. Without gradients also
        what a sweep of cells at or after the start resumes from.
    """
    rest, own = replace(program, tokens=program.tokens[:, start:], positions={}), beginning(cache, start)
    if program.gradients:
        return _whole(run(model, rest, cache=own), start, known), None
    base, result = baseline(model, rest, cache=own)
    inputs = tuple(_after(start, torch.zeros_like(value[:, :1]), value, 1) for value in base.inputs)
    return _whole(result, start, known), replace(base, inputs=inputs)


def _whole(result: Result, start: int, known: Mapping[Target, Tensor]) -> Result:
    activations, gradients = {}, {}
    for key, value in result.activations.items():
        activations[key] = _after(start, known[key], value, KINDS[key[0]].dim(KINDS[key[0]].position))
    for key, value in result.gradients.items():
        dim = KINDS[key[0]].dim(KINDS[key[0]].position)
        gradients[key] = _after(start, torch.zeros_like(value.narrow(dim, 0, 1)), value, dim)
    return replace(result, activations=activations, gradients=gradients)


def _after(start: int, first: Tensor, rest: Tensor, dim: int) -> Tensor:
    """``rest`` behind the first ``start`` positions of a tensor (or its only one, repeated)."""
    shape = [start if d == dim else -1 for d in range(rest.ndim)]
    before = first.expand(shape) if first.shape[dim] == 1 else first.narrow(dim, 0, start)
    return torch.cat([before, rest], dim)
