"""Trust in resumed runs: the rest of prompts, run alone, is compared with the whole before the first use on a model."""

import torch

from patchlab.adapters import BridgedModel
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Target
from patchlab.engine.replay import empty_cache
from patchlab.engine.resume import run_rest
from patchlab.engine.session import found_once
from patchlab.engine.trust.precision import in_single_precision
from patchlab.engine.trust.trials import tolerance, trial
from patchlab.errors import PatchlabError


def continues(model: BridgedModel) -> bool:
    """Whether the rest of a prompt runs on this model as it does in the whole, forwards and backwards; found out once per model."""
    return found_once(model, "rest", lambda: _agrees(model))


def _agrees(model: BridgedModel) -> bool:
    prompts, last = trial(model), model.arch.n_layers - 1
    start = prompts.middle
    at: tuple[Target, ...] = (("resid_pre", 0), ("resid_pre", last))
    program = prompts.program(keep=at, gradients=at, logits="answer")
    cache = empty_cache()
    try:
        with in_single_precision(model):
            whole = run(model, program)
            run(model, Program(program.tokens, program.examples), cache=cache)
            if start == 0 or len(cache.layers) != last + 1:
                return False
            rest, _ = run_rest(model, program, cache, start, whole.activations)
    except (PatchlabError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False  # a model may have no use for a cache
    allowed = tolerance(whole=True)
    pairs = [(rest.gradients[key][:, start:], whole.gradients[key][:, start:]) for key in at]
    pairs += [(rest.activations[key], whole.activations[key]) for key in at]
    pairs += [(torch.as_tensor(rest.logits), torch.as_tensor(whole.logits))]
    return all(float((got - expected).abs().max()) <= allowed * float(expected.abs().max()) for got, expected in pairs)
