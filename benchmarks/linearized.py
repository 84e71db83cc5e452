"""AtP and RelP node scores of all sites against two forward passes and one backward pass of the plain Hugging Face model.

The plain passes have no hooks, no parameter gradients (the input embeddings require one) and compute all logits. patchlab's
time is that of ``AttributionPatching().run`` and ``RelevancePatching().run``, score map included.
"""

import argparse
from functools import partial
from typing import Any

import _common as common
import torch

from patchlab.methods import AttributionPatching, RelevancePatching
from patchlab.models import Model
from patchlab.tasks.task import Task

SITES = ("resid_pre", "attn_out", "mlp_out", "z[layer,pos,head]")
GOALS = {"atp / plain": 0.8, "relp / atp": 1.15}


def plain(module: Any, task: Task, device: str) -> float:
    """Two forwards and one backward; returns the size of the gradient, so that nothing is left out."""
    (batch,) = task.batches(device=device)
    with torch.no_grad():
        module(input_ids=batch.clean, use_cache=False)
    embedded = module.get_input_embeddings()(batch.corrupted).detach().requires_grad_()
    logits = module(inputs_embeds=embedded, use_cache=False).logits
    (gradient,) = torch.autograd.grad(task.metric(logits[:, -1], batch.answers).sum(), embedded)
    return float(gradient.norm())


def measure(shape: common.Shape, workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved repeats of all three, the order turned round every time."""
    task = common.random_task(workload, shape.vocab)
    module = common.hf_module(shape, options.device).requires_grad_(False)
    model = common.bridged(shape, options.device)
    runs = {
        "plain": partial(plain, module, task, options.device),
        "atp": partial(_scores, AttributionPatching(), model, task),
        "relp": partial(_scores, RelevancePatching(), model, task),
    }
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats):
        for name in list(runs) if repeat % 2 == 0 else reversed(runs):
            seconds[name].append(common.timed(options.device, runs[name])[0])
    ratios = {}
    for pair in ("atp / plain", "relp / plain", "relp / atp"):
        above, below = (seconds[name] for name in pair.split(" / "))
        ratios[pair] = [a / b for a, b in zip(above, below, strict=True)]
    scores = _scores(AttributionPatching(), model, task)
    tokens = task.batches()[0].clean.numel()
    return {
        "model": model.name,
        "workload": workload,
        "sites": SITES,
        "cells": sum(int(live.size) for live in scores.live.values()),
        "ratios": {pair: common.median(values) for pair, values in ratios.items()},
        "goals": GOALS,
        "seconds": {name: common.median(values) for name, values in seconds.items()},
        "max_difference": _agreement(module, model, task, options.device),
        "flops": int(2 * (2 * scores.cost.positions - tokens) * shape.layers * shape.block_parameters),  # a backward pass for the last run
        "positions": scores.cost.positions,
        "positions_of_plain": 2 * tokens,
    }


def _scores(method: Any, model: Model, task: Task) -> Any:
    return method.run(model, task, SITES, progress=False)


def _agreement(module: Any, model: Model, task: Task, device: str) -> float:
    """Largest difference, as a share of the largest score, between AtP at the first residual stream and plain autograd."""
    (batch,) = task.batches(device=device)
    blocks = module.transformer.h if hasattr(module, "transformer") else module.model.layers
    seen: list[torch.Tensor] = []

    def note(block: Any, inputs: Any) -> Any:
        seen.append(inputs[0].detach().requires_grad_())
        return (seen[-1], *inputs[1:])

    handle = blocks[0].register_forward_pre_hook(note)
    try:
        module(batch.clean, use_cache=False)
        logits = module(batch.corrupted, use_cache=False).logits
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(task.metric(logits[:, -1], batch.answers).sum(), seen[1])
    expected = ((seen[0] - seen[1]).detach() * gradient).sum(-1)
    got = torch.tensor(_scores(AttributionPatching(), model, task).data["resid_pre"].to_numpy()[:, 0]).to(expected)
    return float((got - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = common.arguments(__doc__)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.repeats = 2 if options.tiny or options.quick else max(5, options.repeats)
    report: dict[str, Any] = {"benchmark": "linearized", "machine": common.machine(options.device), "pairs": 8, "length": 15, "results": []}
    shapes = (common.TINY_GPT2, common.TINY_LLAMA) if options.tiny else (common.GPT2,) if options.quick else (common.GPT2, common.LLAMA)
    for shape in shapes:
        for workload in ("S2",) if options.quick else ("S2", "ABC"):
            result = measure(shape, workload, options)
            report["results"].append(result)
            shown = "  ".join(f"{pair} {ratio:.3f}" for pair, ratio in result["ratios"].items())
            print(f"{result['model']} {workload:<4} {shown}  ({result['cells']} cells, off by {result['max_difference']:.1e})", flush=True)
    common.finish(options, report)


if __name__ == "__main__":
    main()
