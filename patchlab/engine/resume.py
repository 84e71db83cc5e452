"""Running only the rest of prompts whose beginning another run has computed.

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
from patchlab.engine.session import found_once
from patchlab.engine.trust.nodes import tolerance
from patchlab.engine.trust.precision import in_single_precision
from patchlab.errors import PatchlabError
from patchlab.metrics import METRICS, Answers
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


def continues(model: BridgedModel) -> bool:
    """Whether the rest of a prompt runs on this model as it does in the whole, forwards and backwards; found out once per model."""
    return found_once(model, "rest", lambda: _agrees(model))


def _agrees(model: BridgedModel) -> bool:
    arch = model.arch
    length = min(5, arch.n_positions or 5)
    start = length // 2
    tokens = torch.randint(0, arch.vocab_size, (2, length), generator=torch.Generator().manual_seed(1)).to(model.device)
    answers = Answers.of([[0], [1]], [[2 % arch.vocab_size], [3 % arch.vocab_size]], model.device)
    at: tuple[Target, ...] = (("resid_pre", 0), ("resid_pre", arch.n_layers - 1))
    examples = torch.arange(2, device=model.device)
    program = Program(tokens, examples, metric=METRICS["logit_diff"], answers=answers, keep=at, gradients=at, logits="answer")
    cache = empty_cache()
    try:
        with in_single_precision(model):
            whole = run(model, program)
            run(model, Program(tokens, examples), cache=cache)
            if start == 0 or len(cache.layers) != arch.n_layers:
                return False
            rest, _ = run_rest(model, program, cache, start, whole.activations)
    except (PatchlabError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False  # a model may have no use for a cache
    # some norms and softmaxes compute in single precision whatever the model's dtype
    allowed = max(2e-3, tolerance())
    pairs = [(rest.gradients[key][:, start:], whole.gradients[key][:, start:]) for key in at]
    pairs += [(rest.activations[key], whole.activations[key]) for key in at]
    pairs += [(torch.as_tensor(rest.logits), torch.as_tensor(whole.logits))]
    return all(float((got - expected).abs().max()) <= allowed * float(expected.abs().max()) for got, expected in pairs)


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
