"""Everything that is worth knowing about patchlab on a GPU, in a given number of minutes.

    python -m benchmarks.gpu --minutes 10 --out gpu-results
    python -m benchmarks.gpu --minutes 3 --out gpu-results --pieces linearised edges --models llama-3.1-8b --dtypes bfloat16

Models have random weights of the shapes of published ones, built on the device; nothing is downloaded. Every piece is measured against what it is
held to on the same device in the same run: TransformerLens' own patching, or two forward passes and one backward pass of the plain Hugging Face
model. ``DIR/gpu.json`` is written anew after every measurement, so a run that is stopped keeps what it has, and the same command goes on with
what is missing. What does not fit into the time is left out and listed; what fails is listed with its error, and the rest goes on.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _common as common
import edges
import exact_sweep
import linearized
import numpy as np
import torch

from patchlab.engine import support
from patchlab.methods import ActivationPatching, VerifiedPatching, get_method
from patchlab.models import Model, load_model, wrap_bridge
from patchlab.tasks import load_task

SHAPES = {
    "gpt2": common.GPT2,
    "gpt2-xl": common.Shape("gpt2", 48, 1600, 25),
    "llama-3.1-8b": common.Shape("llama", 32, 4096, 32, 8, 14336, 128256),
    "gemma-2-2b": common.Shape("gemma2", 26, 2304, 8, 4, 9216, 256000),
}
TINY = {
    "gpt2": common.TINY_GPT2,
    "gpt2-xl": common.Shape("gpt2", 4, 32, 4, vocab=120),
    "llama-3.1-8b": common.TINY_LLAMA,
    "gemma-2-2b": common.Shape("gemma2", 3, 32, 4, 2, 48, 120),
}
DTYPES = ("float32", "bfloat16")
AGREE_WITHIN = 2e-3
"""Of the largest score: what scores on two devices may differ by in float32 without TF32."""
PACKAGED = ("demo-gpt2", "demo-llama")
ON_BOTH = {
    "nodes": (("exact", "atp", "relp", "relp-ah", "attnlrp", "gim", "ig:3"), ("resid_pre", "attn_out", "mlp_out", "z", "pattern")),
    "edges": (("atp", "relp", "ig:3"), ("edges",)),
}
"""What is computed on the CPU and on the device: methods and sites, of nodes and of edges."""


@dataclass(frozen=True)
class Job:
    """One measurement: a piece, of a model shape and dtype where it has one."""

    piece: str
    model: str
    dtype: str

    @property
    def name(self) -> str:
        """As results are filed."""
        return f"{self.piece} {self.model} {self.dtype}"


@dataclass
class Bench:
    """What the pieces share: options, and the model that is on the device (one at a time)."""

    options: argparse.Namespace
    until: float
    held: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device that is measured."""
        return self.options.device

    def shape(self, job: Job) -> common.Shape:
        """Sizes of the job's model."""
        return (TINY if self.options.tiny else SHAPES)[job.model]

    def model(self, job: Job) -> Model:
        """The job's model, bridged and tested; the one before it is gone."""
        key = f"{job.model} {job.dtype}"
        if self.held.get("key") != key:
            self.drop()
            module = common.hf_module(self.shape(job), self.device, getattr(torch, job.dtype))
            self.held = {"key": key, "model": wrapped(module, job.model)}
        return self.held["model"]

    def plain(self, job: Job) -> Any:
        """A plain Hugging Face model of the job's shape, beside the bridged one."""
        if "plain" not in self.held:
            self.model(job)
            self.held["plain"] = common.hf_module(self.shape(job), self.device, getattr(torch, job.dtype)).requires_grad_(False)
        return self.held["plain"]

    def drop(self) -> None:
        """Give the device's memory back."""
        self.held = {}
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def task(self, job: Job, *, pairs: int = 8, length: int = 15) -> Any:
        """Pairs of random tokens of which one differs."""
        return common.random_task("S2", self.shape(job).vocab, pairs=pairs, length=length)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and result; the device is waited for."""
        return common.timed(self.device, work)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.until

    def peak(self, work: Callable[[], Any]) -> float:
        """The most memory that some work takes beyond what is there before, in GB."""
        return round(edges.peak_bytes(self.device, work) / 1e9, 3)


def wrapped(module: Any, name: str) -> Model:
    """A model in memory as patchlab runs it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return wrap_bridge(build_bridge_from_module(module, type(module).__name__, hf_config=module.config, tokenizer=None), name)


# ---------- the pieces ----------


def agree(bench: Bench, job: Job) -> dict[str, Any]:
    """Scores of a packaged model on the device against those on the CPU."""
    here, there = (load_model(job.model, device=device) for device in ("cpu", bench.device))
    rows = []
    for methods, sites in ON_BOTH.values():
        for name in methods if not bench.options.tiny else methods[:2]:
            maps = [get_method(name).run(model, load_task("ioi", model, n=4), list(sites), progress=False) for model in (here, there)]
            for site in sites:
                one, other = (np.nan_to_num(scores.data[site].to_numpy()) for scores in maps)
                off = float(np.abs(one - other).max() / np.abs(one).max()) if np.abs(one).max() else float(np.abs(other).max())
                rows.append({"method": name, "site": site, "off": off, "engine": maps[1].provenance["engine"]})
    worst = max(rows, key=lambda row: row["off"])
    return {"rows": rows, "worst": worst, "within": AGREE_WITHIN, "agrees": worst["off"] <= AGREE_WITHIN}


def load(bench: Bench, job: Job) -> dict[str, Any]:
    """What it takes to bridge and test a model, and to find out how it can be swept."""
    bench.drop()
    built, module = bench.timed(lambda: common.hf_module(bench.shape(job), bench.device, getattr(torch, job.dtype)))
    tested, model = bench.timed(lambda: wrapped(module, job.model))
    trusted, engine = bench.timed(partial(support, model))
    bench.held = {"key": f"{job.model} {job.dtype}", "model": model}
    parameters = sum(weight.numel() for weight in module.parameters())
    return {"parameters": parameters, "seconds": {"build": built, "bridge and self-test": tested, "engine": trusted}, "engine": str(engine)}


def maps(bench: Bench, job: Job) -> dict[str, Any]:
    """Whole exact maps against TransformerLens' patching, of which a sample of cells is run."""
    model = bench.model(job)
    anchor = exact_sweep.Anchor(model, bench.task(job), bench.device)
    rows = []
    for name in ("resid_pre", "heads, all positions", "head × position"):
        row = exact_sweep.measure(anchor, bench.shape(job), name, "prefix", bench.options)
        rows.append({**row, "peak_gb": bench.peak(lambda name=name: _run(ActivationPatching(), model, anchor.task, exact_sweep.MAPS[name][0]))})
        if bench.over():
            break
    return {"rows": rows}


def linearised(bench: Bench, job: Job) -> dict[str, Any]:
    """AtP and RelP of all node sites against two forwards and one backward of the plain model."""
    model, module, task = bench.model(job), bench.plain(job), bench.task(job)
    runs = {"plain": partial(linearized.plain, module, task, bench.device)}
    runs |= {name: partial(_run, get_method(name), model, task, linearized.SITES) for name in ("atp", "relp")}
    return _side_by_side(bench, runs)


def all_edges(bench: Bench, job: Job) -> dict[str, Any]:
    """Scores of all edges against two forwards and one backward of the plain model."""
    model, module, task = bench.model(job), bench.plain(job), bench.task(job)
    runs = {"plain": partial(linearized.plain, module, task, bench.device)}
    runs |= {name: partial(_run, get_method(name), model, task, "edges", direction="noising") for name in ("atp", "relp", "ig:5")}
    return {"edges": model.arch.graph.n_edges, **_side_by_side(bench, runs)}


def exact_edges(bench: Bench, job: Job) -> dict[str, Any]:
    """Exact effects of a sample of all edges, extrapolated, against one forward pass for each."""
    return edges.exact(bench.model(job), "S2", bench.shape(job), bench.options)


def verified(bench: Bench, job: Job) -> dict[str, Any]:
    """Verified patching of heads at positions: its time against that of the whole map."""
    model, task, site = bench.model(job), bench.task(job), "z[layer,pos,head]"
    own, found = bench.timed(lambda: VerifiedPatching(k=10, screen=get_method("relp"), seed=0).run(model, task, site, progress=False))
    whole, scores = bench.timed(partial(_run, ActivationPatching(), model, task, site))
    mean, live = np.abs(scores.mean(site).to_numpy()), scores.live[site].to_numpy()
    true = np.sort(mean[live])[::-1][:10]
    kept = np.sort(np.abs(found.table["effect"].to_numpy(float)))[::-1][:10]
    return {
        "seconds": {"verified": own, "whole map": whole},
        "ratio": whole / own,
        "k": 10,
        "recall": float((kept >= true[-1] * (1 - 1e-3)).mean()),
    }


PIECES: dict[str, Callable[[Bench, Job], dict[str, Any]]] = {
    "agree": agree,
    "load": load,
    "linearised": linearised,
    "edges": all_edges,
    "maps": maps,
    "verified": verified,
    "exact edges": exact_edges,
}


def _run(method: Any, model: Model, task: Any, site: Any, **options: Any) -> Any:
    return method.run(model, task, site, progress=False, **options)


def _side_by_side(bench: Bench, runs: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Interleaved repeats, the order turned round every time: medians of seconds, ratios to the plain passes, peak memory."""
    for work in runs.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(bench.options.repeats):
        for name in list(runs) if repeat % 2 == 0 else reversed(runs):
            seconds[name].append(bench.timed(runs[name])[0])
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)] for name in runs if name != "plain"}
    return {
        "seconds": {name: common.median(values) for name, values in seconds.items()},
        "ratios": {name: common.median(values) for name, values in ratios.items()},
        "repeats": bench.options.repeats,
        "peak_gb": {name: bench.peak(work) for name, work in runs.items()},
    }


# ---------- the run ----------


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What is to be measured: first whether scores are right, then model by model, the smaller ones first."""
    if "agree" in options.pieces:
        yield from (Job("agree", name, "float32") for name in PACKAGED)
    order = [(name, dtype) for name in options.models for dtype in options.dtypes]
    for name, dtype in sorted(order, key=lambda one: ((one[0], one[1]) != ("gpt2", "float32"), one[0].startswith("gpt2-"), one[1] != "bfloat16")):
        yield from (Job(piece, name, dtype) for piece in PIECES if piece != "agree" and piece in options.pieces)


class Record:
    """``gpu.json``: what was measured, left out and failed."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu.json"
        self.content: dict[str, Any] = {"benchmark": "gpu", **about, "results": {}, "failed": {}, "left_out": {}}
        if self.path.exists():
            old = json.loads(self.path.read_text(encoding="utf-8"))
            if old["machine"] != about["machine"]:
                sys.exit(f"{self.path} was measured on {old['machine']}, and this is {about['machine']}: give another folder.")
            self.content["results"] = old["results"]

    def write(self) -> None:
        """The file, whole or not at all."""
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def expected(job: Job, bench: Bench, took: dict[str, float]) -> float | None:
    """Seconds that a job will take, from the largest model that its piece has run on; None before the first."""
    before = [(bench.shape(other), took[other.name]) for other in (Job(job.piece, name, d) for name in SHAPES for d in DTYPES) if other.name in took]
    if not before or job.model not in SHAPES:
        return None
    shape, seconds = max(before, key=lambda one: one[0].forward_flops(1))
    return seconds * max(1.0, bench.shape(job).forward_flops(1) / shape.forward_flops(1)) ** 0.5  # small models do not fill a GPU


def main() -> None:
    """Measure until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json; one that is there is gone on with")
    parser.add_argument("--pieces", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # seconds, for the tests: ratios mean nothing
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"--device {options.device}: this machine (or this build of torch) has no CUDA. To try the script, use --device cpu --tiny.")
    vars(options).update(sample=4, budget=20, writers=1, quick=False, workload_of_ideas="S2")  # what the pieces' own benchmarks ask for
    until = time.monotonic() + 60 * options.minutes
    took: dict[str, float] = {}
    bench = Bench(options, until)
    record = Record(options.out, {"machine": common.machine(options.device), "pairs": 8, "length": 15})
    for job in jobs(options):
        if job.name in record.content["results"]:
            continue
        left, needs = until - time.monotonic(), expected(job, bench, took)
        if left <= 0 or (needs is not None and needs > left):
            record.content["left_out"][job.name] = f"{max(0.0, left):.0f} s were left" + ("" if needs is None else f", about {needs:.0f} s needed")
            record.write()
            continue
        started = time.monotonic()
        try:
            record.content["results"][job.name] = {"model": job.model, "dtype": job.dtype, "piece": job.piece, **PIECES[job.piece](bench, job)}
            print(f"{job.name}: {json.dumps(brief(record.content['results'][job.name]))}", flush=True)
        except Exception as error:  # what does not work on this device is a result
            record.content["failed"][job.name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            print(f"{job.name}: failed: {type(error).__name__}: {error}", flush=True)
            bench.drop()
        took[job.name] = time.monotonic() - started
        record.content.setdefault("took", {})[job.name] = round(took[job.name], 2)
        record.write()
    shown = {name: len(record.content[name]) for name in ("results", "failed", "left_out")}
    print(f"{record.path}: " + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in shown.items()))
    sys.exit(1 if record.content["failed"] else 0)


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """What is printed of a result."""
    return {name: result[name] for name in ("worst", "seconds", "ratios", "ratio", "peak_gb", "recall") if name in result}


if __name__ == "__main__":
    main()
