"""Cost against depth, width, length and pairs on a CPU, and what a sweep over an 8B model takes by the plan.

Each size is varied alone around a base. All settings are run in turn, and that again: a ratio is that of a setting to the base of the same round,
and the smallest and largest ratio of the rounds say how far the machine can be trusted. Passes of the 8B sweep are planned on a model of its depth
and heads with tiny width, since a plan's passes do not depend on the width; hours follow from the weights of the real one and an assumed speed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import _common as common
import torch

from patchlab.circuits import Circuit
from patchlab.circuits.evaluation.runner import Runner
from patchlab.methods import ActivationPatching, RelevancePatching
from patchlab.models import Model
from patchlab.sweeps.plan import CALIBRATION, _Clock, _Planner
from patchlab.sweeps.spec import CircuitSpec, ModelSpec, RunSpec, TaskSpec
from patchlab.tasks.task import Task

BASE = common.Shape("gpt2", 6, 256, 4, vocab=2000)
VARIED: dict[str, tuple[int, ...]] = {"layers": (3, 12), "width": (128, 512), "length": (30, 60), "pairs": (2, 32)}
SETTING = {"layers": 6, "width": 256, "length": 15, "pairs": 8}
TASKS = {"ioi": 17, "mcqa": 45, "addition": 12, "subtraction": 12, "arc_easy": 80, "arc_challenge": 90, "greater_than": 13, "agreement": 8}
"""Tokens of a prompt, about; 100 pairs each."""
METHODS = ("atp", "eap-ig-inputs:5", "relp", "attnlrp", "gim", "relp+ig:5")
EIGHT = common.Shape("llama", 32, 4096, 32, 8, 14336, 128256)
TINY_EIGHT = common.Shape("llama", 32, 64, 32, 8, 32, 120)
SPEED = 250e12
"""Floating-point operations a second that one GPU is assumed to sustain in bfloat16: a quarter of what an H100 is sold for."""


def works(setting: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """What is timed at a setting."""
    shape = replace(BASE, layers=setting["layers"], width=setting["width"], heads=max(2, setting["width"] // 64))
    model, task = common.bridged(shape, "cpu"), common.random_task("S2", shape.vocab, pairs=setting["pairs"], length=setting["length"])
    (batch,) = task.batches()
    some = [Circuit.empty(model.arch.graph), Circuit.full(model.arch.graph)]
    runner = Runner.of(model, task, "resample", batch_size=len(task))
    return {
        "forward": partial(_forward, model, batch.clean),
        "RelP nodes": partial(RelevancePatching().run, model, task, ["resid_pre", "attn_out", "mlp_out", "z"], progress=False),
        "RelP edges": partial(RelevancePatching().run, model, task, "edges", progress=False),
        "exact resid_pre": partial(ActivationPatching().run, model, task, "resid_pre", progress=False),
        "two circuits": partial(runner.metric, some),
    }


def _forward(model: Model, tokens: torch.Tensor) -> Any:
    with torch.no_grad():
        return model.run(tokens).logits


def measure(repeats: int, varied: dict[str, tuple[int, ...]]) -> tuple[list[dict[str, Any]], float]:
    """A row per varied size and work, and how many plain forwards a circuit takes at the base."""
    settings = {("base", 0): SETTING} | {(name, value): {**SETTING, name: value} for name, values in varied.items() for value in values}
    timed = {key: works(setting) for key, setting in settings.items()}
    for some in timed.values():
        for work in some.values():
            work()  # what is done once
    rounds: list[dict[tuple[str, int], dict[str, float]]] = []
    for _ in range(repeats):
        rounds.append({key: {name: common.timed("cpu", work)[0] for name, work in some.items()} for key, some in timed.items()})
    rows = []
    for what, value in settings:
        for work in timed[what, value] if what != "base" else ():
            ratios = [one[what, value][work] / one["base", 0][work] for one in rounds]
            size = value / SETTING[what]
            rows.append(
                {
                    "what": what,
                    "value": value,
                    "work": work,
                    "size": size,
                    "ratio": common.median(ratios),
                    "range": [common.median([one]) for one in (min(ratios), max(ratios))],
                }
            )
    circuit = common.median([one["base", 0]["two circuits"] / 2 / one["base", 0]["forward"] for one in rounds])
    return rows, circuit


def sweep(circuit: float, tasks: dict[str, int], shape: common.Shape, pairs: int = 100) -> list[dict[str, Any]]:
    """A row per task: passes and the work in forward passes of one token, as :class:`patchlab.sweeps.plan.Plan` counts it."""
    model = common.bridged(shape, "cpu")
    planner = _Planner(model, _Clock(CALIBRATION, 1))
    planner.rates = {"forward": 1.0, "circuit": circuit}  # seconds for a token in units of that of a forward pass
    rows = []
    for name, length in tasks.items():
        spec = TaskSpec(name=f"{name}.jsonl", n=pairs, content=f"sha256:{name}")
        task: Task = common.random_task("S2", shape.vocab, pairs=pairs, length=length)
        planner.tasks[json.dumps(spec.plain(), sort_keys=True)] = task
        runs = [
            RunSpec(model=ModelSpec(name="8B", content="sha256:8"), task=spec, direction="noising", what=CircuitSpec(method=method), batch_size=10)
            for method in METHODS
        ]
        plans = [planner.plan(run) for run in runs]
        if problems := [one.problem for one in plans if one.problem]:
            raise SystemExit(f"the sweep cannot be planned: {problems[0]}")
        scores, _ = task.split(seed=0)
        scored = sum(method_work(model, scores, method) for method in METHODS) * sum(map(len, scores.pairs))
        work = sum(one.seconds for one in plans)
        forwards, backwards = (sum(getattr(one, part) for one in plans) for part in ("forwards", "backwards"))
        rows.append({"task": name, "tokens": length, "forwards": forwards, "backwards": backwards, "work": work, "scores": scored})
    return rows


def method_work(model: Model, task: Task, method: str) -> float:
    """Work of the scores of the edges, in forward passes of all prompts."""
    from patchlab.methods.names import scoring_method

    return scoring_method(method).plan(model, task, ["edges"], direction="noising", batch_size=10).work


def main() -> None:
    """Measure, plan, print."""
    options: argparse.Namespace = common.arguments((__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(options.threads)
    varied = {"layers": (3,), "pairs": (2,)} if options.tiny else VARIED
    rows, circuit = measure(1 if options.tiny else options.repeats, varied)
    for row in rows:
        low, high = row["range"]
        print(f"{row['what']} × {row['size']:g}: {row['work']} × {row['ratio']:.2f} ({low:.2f} to {high:.2f})")
    print(f"a circuit on a prompt takes {circuit:.1f} plain forward passes")
    planned = sweep(circuit, {"ioi": 8} if options.tiny else TASKS, common.TINY_LLAMA if options.tiny else TINY_EIGHT, 16 if options.tiny else 100)
    per_token = EIGHT.forward_flops(1)
    hours = sum(row["work"] for row in planned) * per_token / SPEED / 3600
    print(f"8B × {len(planned)} tasks × {len(METHODS)} methods: {hours:.1f} GPU-hours at {SPEED / 1e12:g} TFLOP/s")
    report = {
        "benchmark": "scaling", "machine": common.machine("cpu"), "base": SETTING, "growth": rows, "circuit": circuit,
        "sweep": planned, "methods": METHODS, "token_flops": per_token, "speed": SPEED, "hours": hours,
    }  # fmt: skip
    common.finish(options, report)


if __name__ == "__main__":
    main()
