"""Edges: exact patches of single edges against one forward pass per edge, and linearised scores of all edges against plain passes.

*Exact.* patchlab's time per edge is measured on a sample of every layer and kind of reader, whole groups as they run in a full map,
and weighted by how many edges each has; a full map is an extrapolation, and the report says so. It is held against ways that take
whole passes for every edge: ``plain``, one forward pass of TransformerLens (in which no edge can be patched, so this is the least);
``split``, the same with split q, k and v inputs; ``routed``, one routed pass of patchlab's, from which the exact effects may not differ;
``loop``, a corrupted and a routed pass: the two passes that EAP-IG's evaluation of one graph makes, as patchlab runs them, not its code.

*Linearised.* All edges with one point of the path, score map included, against two forward passes and one backward pass of the plain
Hugging Face model without parameter gradients; and the memory that both need at their peak.
"""

import argparse
import ctypes
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import _common as common
import linearized
import numpy as np
import torch

from patchlab.engine import Program, Work, empty_cache, run
from patchlab.engine.contributions import Contributions, contributions
from patchlab.engine.edge_sweep import Differences, edge_sweep
from patchlab.engine.masked import run_circuits
from patchlab.engine.replay import baseline
from patchlab.engine.trust.edges import edge_mask, edge_support
from patchlab.methods import ActivationPatching, AttributionPatching, RelevancePatching
from patchlab.models import Model
from patchlab.tasks.task import Task

GOALS = {"exact": 40.0, "linearised / plain": 1.2, "extra peak memory, GB": 0.3}
COMPARED = 8


class Trial:
    """The exact sweep of one task, with a sample of its edges and the ways it is compared with."""

    def __init__(self, model: Model, task: Task, options: argparse.Namespace) -> None:
        self.model, self.graph, self.options = model, model.arch.graph, options
        (batch,) = task.batches(device=options.device)
        self.start = int((batch.clean != batch.corrupted).any(0).nonzero()[0])
        self.corrupted = batch.corrupted
        self.program = Program(batch.clean, batch.examples, metric=task.metric, answers=batch.answers)
        keep = (("input", None), *((kind, layer) for kind in ("z", "mlp_out") for layer in range(model.arch.n_layers)))

        def prepare() -> tuple[Any, Differences]:
            base, result = baseline(model, Program(**{**vars(self.program), "keep": keep}), cache=empty_cache())
            source = run(model, Program(batch.corrupted, batch.examples, keep=keep)).as_source()
            return base, Differences.of(model, result.activations, source, batch.examples)

        with torch.no_grad():
            self.setup_seconds, (self.base, self.differences) = common.timed(options.device, prepare)
        self.strata = list(self._strata(random.Random(1)))
        self.sampled = np.concatenate([edges for _, _, edges in self.strata])
        self.setting = ActivationPatching().prepared(model, task, "edges", direction="noising")[0]

    def _strata(self, draw: random.Random) -> Iterator[tuple[str, int, np.ndarray]]:
        """Name, number of edges and sampled edges of every layer's heads and MLP, and of the logits."""
        kinds = np.array(self.graph.reader_kind)
        groups = {"heads": np.isin(kinds, ("q", "k", "v")), "mlp": kinds == "mlp"}
        for layer in range(self.graph.n_layers):
            here = np.zeros(len(kinds), dtype=bool)
            here[self.graph.readers_of(layer)] = True
            for name, chosen in groups.items():
                edges = np.argwhere(self.graph.allowed & chosen & here)
                writers = sorted(set(edges[:, 0].tolist()))
                wanted = self.options.writers if name == "heads" else self.options.writers * 12
                picked = draw.sample(writers, min(wanted, len(writers)))
                yield f"{layer} {name}", len(edges), edges[np.isin(edges[:, 0], picked)]
        edges = np.argwhere(self.graph.allowed & (kinds == "logits"))
        yield "logits", len(edges), edges[draw.sample(range(len(edges)), min(24, len(edges)))]

    def sweep(self, edges: np.ndarray, work: Work | None = None) -> torch.Tensor:
        """The metric of every edge and pair."""
        return edge_sweep(self.model, self.program, edges, self.differences, start=self.start, base=self.base, work=work)

    def per_edge(self) -> tuple[float, list[dict[str, Any]]]:
        """Seconds per edge over the whole graph, and the strata that it is made of."""
        rows = []
        for name, count, edges in self.strata:
            work = Work()
            seconds, _ = common.timed(self.options.device, partial(self.sweep, edges, work))
            each = {"seconds_per_edge": seconds / len(edges), "block_positions_per_edge": work.block_positions / len(edges)}
            rows.append({"stratum": name, "edges": count, "sampled": len(edges), **each})
        total = sum(row["edges"] * row["seconds_per_edge"] for row in rows) + self.setup_seconds
        return total / self.graph.n_edges, rows

    def forward(self) -> None:
        """TransformerLens' forward pass, with logits everywhere."""
        with torch.no_grad():
            self.model.bridge(self.program.tokens, return_type="logits", use_cache=False)

    def routed(self, edges: np.ndarray) -> torch.Tensor:
        """One whole routed forward pass per edge."""
        allowed = torch.as_tensor(self.graph.allowed.copy(), device=self.model.device)
        keep = torch.stack([allowed & ~edge_mask(self.model, edge) for edge in edges])
        with torch.no_grad():
            return run_circuits(self.model, self.program, self.changed, keep)

    def loop(self, edges: np.ndarray) -> torch.Tensor:
        """The same with the corrupted pass made anew for every edge."""
        with torch.no_grad():
            contributions(self.model, self.corrupted)
        return self.routed(edges)

    def prepare_routed(self) -> None:
        """What the routed passes put on the edges that are not kept."""
        values = contributions(self.model, self.program.tokens).values
        self.changed = Contributions(values + torch.stack([self.differences.contributed(writer) for writer in range(len(self.graph.writers))]))


@contextmanager
def split_inputs(model: Model) -> Iterator[None]:
    """TransformerLens computes q, k and v of every head from an input of its own."""
    model.bridge.set_use_split_qkv_input(True)
    try:
        yield
    finally:
        model.bridge.set_use_split_qkv_input(False)


def exact(model: Model, workload: str, shape: common.Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved repeats of the sampled edges and of the passes they are compared with."""
    task = common.random_task(workload, shape.vocab)
    trial = Trial(model, task, options)
    trial.prepare_routed()
    some = trial.sampled[random.Random(2).sample(range(len(trial.sampled)), COMPARED)]
    found, expected = trial.sweep(some), trial.routed(some)
    batch = task.batches(device=options.device)[0]
    logits = [
        run(model, Program(tokens, batch.examples, metric=task.metric, answers=batch.answers)).values for tokens in (batch.clean, batch.corrupted)
    ]
    scale = float((logits[0] - logits[1]).abs().max())
    ways: dict[str, Callable[[], Any]] = {"plain": trial.forward, "split": trial.forward}
    ways |= {"routed": partial(trial.routed, some[:1]), "loop": partial(trial.loop, some[:1])}
    times: dict[str, list[float]] = {name: [] for name in ("exact", *ways)}
    strata: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        seconds, strata = trial.per_edge()
        times["exact"].append(seconds)
        for name, way in ways.items():
            with split_inputs(model) if name == "split" else _nothing():
                way()  # warm
                times[name].append(common.timed(options.device, way)[0])
    ratios = {name: common.median([a / b for a, b in zip(times[name], times["exact"], strict=True)]) for name in ways}
    edges, per_edge = trial.graph.n_edges, common.median(times["exact"])
    positions = sum(row["edges"] * row["block_positions_per_edge"] for row in strata) / edges
    return {
        "model": model.name,
        "workload": workload,
        "engine": str(edge_support(model)),
        "edges": edges,
        "live_edges": int(trial.setting.live["edges"].sum()),
        "sampled_edges": len(trial.sampled),
        "ratios": ratios,
        "goal": GOALS["exact"],
        "seconds_per_edge": {name: common.median(values) for name, values in times.items()},
        "hours_for_all_edges_extrapolated": float(f"{per_edge * edges / 3600:.3g}"),
        "block_positions_per_edge": round(positions, 1),
        "block_positions_of_a_forward": model.arch.n_layers * trial.program.tokens.numel(),
        "max_difference_of_scale": float((found - expected).abs().max()) / scale,
        "strata": strata,
    }


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# ---------- linearised scores of all edges ----------


def all_edges(shape: common.Shape, workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved repeats of plain passes and of all edge scores at one point of the path, and the peak memory of both."""
    task = common.random_task(workload, shape.vocab)
    module = common.hf_module(shape, options.device).requires_grad_(False)
    model = common.bridged(shape, options.device)
    runs: dict[str, Callable[[], Any]] = {"plain": partial(linearized.plain, module, task, options.device)}
    for method in (AttributionPatching(), RelevancePatching()):
        runs[method.name] = partial(method.run, model, task, "edges", direction="noising", progress=False)
    peaks: dict[str, list[int]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for work in runs.values():
        work()
    for repeat in range(options.repeats):
        for name in list(runs) if repeat % 2 == 0 else reversed(runs):
            seconds[name].append(common.timed(options.device, runs[name])[0])
            peaks[name].append(peak_bytes(options.device, runs[name]))
    names = [name for name in runs if name != "plain"]
    return {
        "model": model.name,
        "workload": workload,
        "edges": model.arch.graph.n_edges,
        "ratios": {f"{n} / plain": common.median([a / b for a, b in zip(seconds[n], seconds["plain"], strict=True)]) for n in names},
        "goal": GOALS["linearised / plain"],
        "seconds": {name: common.median(values) for name, values in seconds.items()},
        "extra_peak_gb": {n: round((max(peaks[n]) - max(peaks["plain"])) / 1e9, 3) for n in names},
        "goal_extra_peak_gb": GOALS["extra peak memory, GB"],
        "peak_gb": {name: round(max(values) / 1e9, 3) for name, values in peaks.items()},
    }


def peak_bytes(device: str, work: Callable[[], Any]) -> int:
    """The most memory that some work takes beyond what is there before: resident (Linux), or allocated on the GPU."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--writers", type=int, default=1, help="writers whose edges into the heads of one layer are sampled")
    parser.add_argument("--skip", nargs="*", default=[], choices=["exact", "linearised", "s2", "abc"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick or options.tiny:
        options.repeats = 1
    skip = {*options.skip} | ({"abc"} if options.quick else set())
    shape = common.TINY_GPT2 if options.tiny else common.GPT2
    report: dict[str, Any] = {
        "benchmark": "edges",
        "machine": common.machine(options.device),
        "pairs": 8,
        "length": 15,
        "exact": [],
        "linearised": [],
    }
    workloads = [name for name in ("S2", "ABC") if name.lower() not in skip]
    if "exact" not in skip:
        model = common.bridged(shape, options.device)
        checked, found = common.timed(options.device, partial(edge_support, model))
        print(f"{model.name}: engine {found}, compared with routed passes in {checked:.1f} s (once per model)", flush=True)
        for workload in workloads:
            result = exact(model, workload, shape, options)
            report["exact"].append(result)
            shown = "  ".join(f"{name} {ratio:.1f}×" for name, ratio in result["ratios"].items())
            print(
                f"exact      {workload:<4} {1e3 * result['seconds_per_edge']['exact']:.1f} ms per edge ({result['sampled_edges']} sampled)  {shown}  "
                f"off by {result['max_difference_of_scale']:.1e} of the scale; {result['hours_for_all_edges_extrapolated']} h for all "
                f"{result['edges']} edges (extrapolated)",
                flush=True,
            )
        del model
    if "linearised" not in skip:
        for workload in workloads:
            result = all_edges(shape, workload, options)
            report["linearised"].append(result)
            shown = "  ".join(f"{pair} {ratio:.2f}×" for pair, ratio in result["ratios"].items())
            extra = "  ".join(f"{name} {size:+.3f} GB" for name, size in result["extra_peak_gb"].items())
            print(f"linearised {workload:<4} {shown}  extra peak memory {extra}", flush=True)
    common.finish(options, report)


if __name__ == "__main__":
    main()
