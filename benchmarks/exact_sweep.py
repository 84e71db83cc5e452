"""Exact patching maps: patchlab against TransformerLens' own patching on the same bridge.

TransformerLens runs one whole forward pass per cell, for every cell of a map, also the ones that cannot matter. Its time for a map is
therefore (time per cell, on a random sample of live cells) × (cells of the map), plus its clean run. patchlab's time is
that of ``ActivationPatching().run``, all in: both unpatched runs, the sweep, the score map. Sampled cells are compared.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import _common as common
import numpy as np
import torch

from patchlab.engine import Program, Support, Work, node_sweep, run, session_of, support, sweep
from patchlab.engine.trust.nodes import sweep_key
from patchlab.interventions import Edit
from patchlab.methods import ActivationPatching
from patchlab.metrics import Metric
from patchlab.models import Model, load_model
from patchlab.sites import Site
from patchlab.tasks import load_task
from patchlab.tasks.task import Task

MAPS = {
    "head × position": ("z[layer,pos,head]", "z", "layer_pos_head_vector_patch_setter"),
    "resid_pre": ("resid_pre", "resid_pre", "layer_pos_patch_setter"),
    "attn_out": ("attn_out", "attn_out", "layer_pos_patch_setter"),
    "mlp_out": ("mlp_out", "mlp_out", "layer_pos_patch_setter"),
    "heads, all positions": ("z", "z", "layer_head_vector_patch_setter"),
}
GOALS = {
    ("S2", "prefix"): dict(zip(MAPS, (40, 28, 28, 28, 7), strict=True)),
    ("ABC", "prefix"): dict(zip(MAPS, (7.5, 6.5, 6.5, 6.5, 3), strict=True)),
    ("S2", "replay"): dict.fromkeys(MAPS, 2.5),
    ("ABC", "replay"): dict.fromkeys(MAPS, 2.5),
}
LLAMA_SHARE = 0.75
"""A Llama-shaped model may fall this far behind the goals, which are for GPT-2's shape."""


@dataclass
class Anchor:
    """TransformerLens' patching on one task: the clean cache, and its time and values per cell."""

    model: Model
    task: Task
    device: str

    def __post_init__(self) -> None:
        (self.batch,) = self.task.batches(device=self.device)
        with torch.no_grad():
            self.cache_seconds, (_, self.cache) = common.timed(self.device, lambda: self.model.bridge.run_with_cache(self.batch.clean))

    def cells(self, name: str, setter: str, indices: list[tuple[int, ...]]) -> tuple[float, torch.Tensor]:
        """Seconds for all of these cells, and the metric ``[cell, pair]``."""
        import pandas as pd
        from transformer_lens import patching

        frame = pd.DataFrame(indices, columns=["layer", *(f"axis{i}" for i in range(1, len(indices[0])))])
        work = partial(
            patching.generic_activation_patch,
            self.model.bridge,
            self.batch.corrupted,
            self.cache,
            self._metric,
            getattr(patching, setter),
            name,
            index_df=frame,
            reduce="none",
        )
        with torch.no_grad():
            seconds, result = common.timed(self.device, lambda: common.quietly(work))
        return seconds, result.values  # noqa: PD011

    def _metric(self, logits: torch.Tensor) -> torch.Tensor:
        return self.task.metric(logits[:, -1], self.batch.answers)


def measure(anchor: Anchor, shape: common.Shape, name: str, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """One map: interleaved repeats of a sample of TransformerLens' cells and of the whole map with patchlab."""
    model, task = anchor.model, anchor.task
    site, hook, setter = MAPS[name]
    draw = random.Random(1)
    ratios, seconds, per_cell = [], [], []
    worst = spent = 0.0
    scores: Any = None
    live: list[Any] = []
    with using(model, engine):
        for repeat in range(options.repeats):
            own, scores = common.timed(options.device, lambda: ActivationPatching().run(model, task, site, progress=False))
            live = [tuple(index) for index in np.argwhere(scores.live[site].to_numpy()).tolist()]
            sample = draw.sample(live, min(options.sample, len(live)))
            took, values = anchor.cells(hook, setter, sample)
            worst = max(worst, _difference(scores, site, sample, values))
            per_cell.append(took / len(sample))
            cells = scores.live[site].size
            ratios.append((per_cell[-1] * cells + anchor.cache_seconds) / own)
            seconds.append(own)
            spent += own
            if spent > options.budget and repeat + 1 < options.repeats:
                break
    scale = float(np.abs(scores.data.metric_clean - scores.data.metric_corrupted).max())
    tokens = anchor.batch.clean.numel()
    goal = GOALS.get((task.name, engine), {}).get(name)
    return {
        "model": model.name,
        "workload": task.name,
        "map": name,
        "asked": engine,
        "engine": scores.provenance["engine"],
        "ratio": common.median(ratios),
        "goal": None if goal is None else goal * (LLAMA_SHARE if shape.family == "llama" else 1),
        "ratios": [float(f"{ratio:.4g}") for ratio in ratios],
        "cells": int(scores.live[site].size),
        "live_cells": len(live),
        "seconds": common.median(seconds),
        "transformer_lens_seconds_per_cell": common.median(per_cell),
        "compared_cells": len(sample) * len(ratios),
        "max_difference": worst,
        "max_difference_of_scale": worst / scale,
        "flops": int(2 * scores.cost.positions * shape.layers * shape.block_parameters),
        "transformer_lens_flops": shape.forward_flops(tokens) * (int(scores.live[site].size) + 1),
    }


def _difference(scores: Any, site: str, sample: list[tuple[int, ...]], values: torch.Tensor) -> float:
    base = scores.data.metric_corrupted.to_numpy()
    effects = scores.data[site].to_numpy()
    return max(float(np.abs(effects[(slice(None), *index)] + base - values[i].double().cpu().numpy()).max()) for i, index in enumerate(sample))


@contextmanager
def using(model: Model, engine: str) -> Iterator[None]:
    """Sweep with the given engine: prefix is what patchlab finds out by itself on these models."""
    found, known = support(model), session_of(model).found
    if engine == "replay":
        known[sweep_key(model)] = Support("replay", "asked for by the benchmark")
    try:
        yield
    finally:
        known[sweep_key(model)] = found


@dataclass(frozen=True)
class Trial:
    """A sweep that can be run with single ideas switched off."""

    model: Model
    program: Program
    source: Any
    live: list[tuple[Edit, ...]]
    every: list[tuple[Edit, ...]]
    start: int

    @staticmethod
    def of(model: Model, task: Task, name: str, device: str) -> "Trial":
        """Of residual cells, or of the head × position cells of a quarter of the heads."""
        (batch,) = task.batches(device=device)
        kind, arch = MAPS[name][1], model.arch
        source = run(model, Program(batch.clean, batch.examples, keep=tuple((kind, layer) for layer in range(arch.n_layers)))).as_source()
        start = int((batch.clean != batch.corrupted).any(0).nonzero()[0])
        heads = list(range(max(1, arch.n_heads // 4))) if kind == "z" else [None]

        def cells(first: int) -> list[tuple[Edit, ...]]:
            where = [(layer, pos, head) for layer in range(arch.n_layers) for pos in range(first, batch.clean.shape[1]) for head in heads]
            return [(Edit(Site(kind, (), layer=layer, index=head, pos=(pos,)), source),) for layer, pos, head in where]

        program = Program(batch.corrupted, batch.examples, metric=task.metric, answers=batch.answers)
        return Trial(model, program, source, cells(start), cells(0), start)

    def sweep(self, **options: Any) -> Work:
        """What it computed."""
        work = Work()
        sweep(self.model, **{"program": self.program, "cells": self.live, "start": self.start, "work": work, **options})
        return work


def _everywhere(logits: torch.Tensor, answers: Any) -> torch.Tensor:
    rows = torch.arange(logits.shape[0], device=logits.device)
    return logits[rows, -1, answers.correct[:, 0]] - logits[rows, -1, answers.incorrect[:, 0]]


def _from_the_first_layer(entry: Any) -> Callable[..., Any]:
    return lambda *arguments: replace(entry(*arguments), layer=0, local=False)


def _without_narrowing(hooks: Any) -> Callable[..., Any]:
    return lambda self, layer, active, *, narrow: hooks(self, layer, active, narrow=False)


IDEAS: dict[str, Callable[[Trial], Work]] = {
    "answer position and columns only": lambda t: t.sweep(program=replace(t.program, metric=Metric("everywhere", _everywhere, reads="all"))),
    "resume at the patched layer": lambda t: _patched(t, node_sweep, "_entry", _from_the_first_layer(node_sweep._entry)),
    "many cells per call": lambda t: t.sweep(max_tokens=1),
    "keys and values of the prefix": lambda t: t.sweep(prefix=False),
    "enter at one position": lambda t: _patched(t, node_sweep, "_is_local", lambda *_: False),
    "last layer: answer position only": lambda t: _patched(t, node_sweep.Wave, "_hooks", _without_narrowing(node_sweep.Wave._hooks)),
    "skip structural zeros": lambda t: t.sweep(cells=t.every, start=0),
}


def _patched(trial: Trial, owner: Any, name: str, value: Any) -> Work:
    with mock.patch.object(owner, name, value):
        return trial.sweep()


def ablate(trial: Trial, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each idea gains: the time of the sweep without it over the time with all."""
    found = []
    for idea, without in IDEAS.items():
        gains, work = [], (Work(), Work())
        for _ in range(min(2, options.repeats)):
            with_all, full = common.timed(options.device, trial.sweep)
            without_it, reduced = common.timed(options.device, partial(without, trial))
            gains.append(without_it / with_all)
            work = (full, reduced)
        found.append(
            {
                "workload": options.workload_of_ideas,
                "map": name,
                "idea": idea,
                "gain": common.median(gains),
                "block_positions": work[0].block_positions,
                "block_positions_without": work[1].block_positions,
            }
        )
    return found


def scale(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The residual map's ratio as one size grows and the rest stays."""
    small = options.tiny
    base = replace(common.TINY_GPT2 if small else common.GPT2, layers=2 if small else 6, width=32 if small else 512, heads=4 if small else 8)
    points: list[tuple[str, int, common.Shape, int, int]] = []
    points += [("layers", n, replace(base, layers=n), 8, 15) for n in ((2, 3) if small else (3, 6, 12))]
    points += [("width", n, replace(base, width=n, heads=max(1, n // 64)), 8, 15) for n in ((32, 64) if small else (256, 512, 1024))]
    points += [("length", n, base, 8, n) for n in ((15, 30) if small else (15, 30, 60))]
    points += [("pairs", n, base, n, 15) for n in ((4, 8) if small else (2, 8, 32))]
    found = []
    for what, value, shape, pairs, length in points:
        task = common.random_task("S2", shape.vocab, pairs=pairs, length=length)
        model = common.bridged(shape, options.device)
        measured = measure(Anchor(model, task, options.device), shape, "resid_pre", "prefix", options)
        found.append({"what": what, "value": value, **{key: measured[key] for key in ("ratio", "cells", "live_cells", "seconds")}})
    return found


def precision(model: Model, task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What torch.set_float32_matmul_precision, which patchlab leaves alone, does for a user who sets it."""
    exact, found = None, []
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            seconds, scores = common.timed(options.device, lambda: ActivationPatching().run(model, task, "resid_pre", progress=False))
            effects = scores.data["resid_pre"].to_numpy()
            exact = effects if exact is None else exact
            off = float(np.abs(effects - exact).max() / np.abs(exact).max())
            found.append({"precision": setting, "seconds": float(f"{seconds:.4g}"), "max_difference_of_largest_effect": off})
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def half(shape: common.Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Effects of a model in bfloat16 against the same model in float32: random weights of a shape, and the packaged models."""
    found = []
    names = [f"{shape.family}-shape", *([] if options.tiny else ("demo-gpt2", "demo-llama"))]
    for name in names:
        whole, short = (_in_dtype(name, shape, dtype, options.device) for dtype in (torch.float32, torch.bfloat16))
        task = common.random_task("S2", shape.vocab) if name.endswith("shape") else load_task("ioi", whole, n=32)
        for site in ("resid_pre", "mlp_out", "z"):
            timed = [common.timed(options.device, lambda m=m: ActivationPatching().run(m, task, site, progress=False)) for m in (whole, short)]  # noqa: B023
            live = timed[0][1].live[site].to_numpy()
            exact, rough = (scores.mean(site).to_numpy()[live] for _, scores in timed)
            found.append(
                {
                    "model": name,
                    "map": site,
                    "engine": timed[1][1].provenance["engine"],
                    "max_difference_of_largest_effect": float(np.abs(rough - exact).max() / np.abs(exact).max()),
                    "pearson": float(np.corrcoef(rough, exact)[0, 1]),
                    "time_of_float32": timed[1][0] / timed[0][0],
                }
            )
    return found


def _in_dtype(name: str, shape: common.Shape, dtype: torch.dtype, device: str) -> Model:
    return common.bridged(shape, device, dtype) if name.endswith("shape") else load_model(name, device=device, dtype=dtype)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--sample", type=int, default=4, help="cells that TransformerLens runs per repeat and map")
    parser.add_argument("--budget", type=float, default=40, help="no further repeats of a map after this many seconds")
    parser.add_argument("--skip", nargs="*", default=[], choices=["gpt2", "llama", "s2", "abc", "replay", "ideas", "scaling", "precision", "bf16"])
    parser.add_argument("--maps", nargs="*", default=list(MAPS), choices=list(MAPS), metavar="MAP", help=", ".join(MAPS))
    options = parser.parse_args()
    options.workload_of_ideas = "S2"
    torch.set_num_threads(options.threads)
    if options.quick or options.tiny:
        options.repeats = 1
    skip = {*options.skip} | ({"abc", "llama", "scaling", "ideas", "precision", "bf16"} if options.quick else set())
    shapes = (common.TINY_GPT2, common.TINY_LLAMA) if options.tiny else (common.GPT2, common.LLAMA)
    report: dict[str, Any] = {"benchmark": "exact_sweep", "machine": common.machine(options.device), "pairs": 8, "length": 15, "results": []}
    for shape in shapes:
        if shape.family in skip:
            continue
        model = common.bridged(shape, options.device)
        checked, found = common.timed(options.device, partial(support, model))
        print(f"{model.name}: engine {found}, checked against the literal one in {checked:.1f} s (once per model)")
        for workload in ("S2", "ABC"):
            task = common.random_task(workload, shape.vocab)
            for engine in ("prefix", "replay") if workload.lower() not in skip else ():
                if engine in skip:
                    continue
                anchor = Anchor(model, task, options.device)
                for name in options.maps:
                    # a whole replay sweep of 2,160 cells takes minutes and shows nothing that the smaller maps do not
                    if engine == "replay" and (name not in ("resid_pre", "heads, all positions") or workload == "ABC" or options.quick):
                        continue
                    if options.quick and name not in ("resid_pre", "mlp_out", "heads, all positions"):
                        continue
                    result = measure(anchor, shape, name, engine, options)
                    report["results"].append(result)
                    print(
                        f"{model.name} {workload:<4} {engine:<7} {name:<21} {result['ratio']:6.1f}× (goal {result['goal']})"
                        f"  {result['seconds']:7.2f} s for {result['cells']} cells, off by {result['max_difference_of_scale']:.1e} of the scale",
                        flush=True,
                    )
        if shape.family == "gpt2" and "ideas" not in skip:
            task = common.random_task("S2", shape.vocab)
            report["ideas"] = [
                row for name in ("resid_pre", "head × position") for row in ablate(Trial.of(model, task, name, options.device), name, options)
            ]
            for row in report["ideas"]:
                print(f"{row['map']:<16} {row['idea']:<34} {row['gain']:6.2f}×", flush=True)
        if shape.family == "gpt2" and "precision" not in skip:
            report["precision"] = precision(model, common.random_task("S2", shape.vocab), options)
            print(*report["precision"], sep="\n", flush=True)
    if "bf16" not in skip:
        report["bf16"] = half(shapes[0], options)
        for row in report["bf16"]:
            print(
                f"{row['model']:<12} {row['map']:<10} bfloat16 is off by {row['max_difference_of_largest_effect']:.3f} of the largest effect, "
                f"Pearson {row['pearson']:.3f}, {row['time_of_float32']:.2f} of the time ({row['engine']})",
                flush=True,
            )
    if "scaling" not in skip:
        report["scaling"] = scale(options)
        for row in report["scaling"]:
            print(f"{row['what']:<7} {row['value']:>5} {row['ratio']:6.1f}×", flush=True)
    common.finish(options, report)


if __name__ == "__main__":
    main()
