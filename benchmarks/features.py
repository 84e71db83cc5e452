"""Features of 32k-wide random dictionaries against node scores, their memory, exact ablation of single features against a forward pass each, and
edges between the 500 largest features and errors of 19 sites against one pass of IG-10 over the same sites.

About 100 features of a dictionary are active per position. The dictionaries of all layers share their weights, so that memory is that of the work and
not of the dictionaries. Times are CPU time of one thread; ratios are medians of interleaved repeats, in one run.
"""

import argparse
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import _common as common
import numpy as np
import torch

from patchlab.circuits import node_edges, top_n
from patchlab.features import Dictionary, JumpRelu
from patchlab.methods import ActivationPatching, AttributionPatching, get_method
from patchlab.methods.cells.features import Features
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.unpatched import Runs, unpatched
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.tasks.task import Task
from patchlab.testing.dictionaries import random_dictionary

FEATURES = "features[layer,pos,feature]"
GOALS = {"features of one layer / nodes": 1.3, "peak of all layers, bytes": 2e9, "one forward each / exact": 20.0, "edges / IG-10": 3.0}


def dictionaries_of(model: Model, width: int, active: int, tokens: torch.Tensor) -> list[Dictionary]:
    """The same weights in every layer, each with a threshold that leaves about so many features active on these prompts."""
    one = random_dictionary(model, layer=0, width=width)
    kept = model.run(tokens, keep="resid_post")
    found: list[Dictionary] = []
    for layer in range(model.arch.n_layers):
        x = kept[f"L{layer}.resid_post"].flatten(0, 1)
        strengths = torch.cat([one.pre(part).topk(active + 1).values[:, -1] for part in x.split(16)])
        threshold = torch.full((width,), float(strengths.median().clamp_min(1e-3)), dtype=model.dtype)
        found.append(replace(one, name=f"random/{layer}", layer=layer, activation=JumpRelu(threshold)))
    return found


def score(model: Model, task: Task, sites: Any, **options: Any) -> Any:
    """AtP scores."""
    return AttributionPatching().run(model, task, sites, progress=False, **options)


def peak(work: Callable[[], Any]) -> tuple[int, Any]:
    """The most memory that this process has had while something runs, on top of what it had before, in bytes; and what it gives."""
    before, most, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = work()
    finally:
        done.set()
        watcher.join()
    return max(0, most[0] - before), found


def _resident() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def exact(model: Model, task: Task, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Exact patching of single features at single positions through the fast engine, and a sample of the same with whole forward passes."""
    method = ActivationPatching()
    setting, (batch,), _ = method.prepared(model, task, FEATURES, direction="denoising")
    with progress_bar("exact", "cell", None, done=0, show=False) as bar:
        meter = Meter(bar, "cell")
        runs: Runs = unpatched(
            setting, batch, meter, source="paired", at=setting.targets, baseline=method.baseline_options(setting), resume=method.resumes(setting)
        )
        kind, (site,) = Features(), setting.sites
        cells = kind.cells(setting, site, runs)
        chosen = [cells[i] for i in np.random.default_rng(0).permutation(len(cells))[:number]]
        sample = chosen[:: max(1, len(chosen) // 12)]
        whole = ActivationPatching(engine="literal").how
        fast = partial(kind.patch, setting, runs, meter, [[(site, cell)] for cell in chosen], method.how)
        slow = partial(kind.patch, setting, runs, meter, [[(site, cell)] for cell in sample], whole)
        slow()
        before = meter.forwards
        changed = [kind.changed(setting, runs, [(site, cell)]) for cell in chosen]
        ratios, seconds = [], []
        for _ in range(options.repeats):
            own, found = common.timed(options.device, fast)
            shared = meter.forwards - before
            each, expected = common.timed(options.device, slow)
            before = meter.forwards
            ratios.append(each / len(sample) * len(chosen) / own)
            seconds.append(own)
    off = np.abs(found[:: max(1, len(chosen) // 12)] - expected).max() / np.abs(expected).max()
    pairs = [float(one.rows.sum()) for one in changed if one is not None]
    return {
        "cells": len(chosen),
        "of": len(cells),
        "runs": shared,
        "pairs of a feature": float(np.mean(pairs)),
        "pairs": len(batch),
        "ratio": common.median(ratios),
        "seconds": common.median(seconds),
        "max_difference": float(off),
    }


def edges(model: Model, task: Task, dictionaries: list[Dictionary], options: argparse.Namespace) -> dict[str, Any]:
    """Edges between the 500 largest features and errors of 19 sites, against IG-10 over the same: of one site at a time (Marks et al. 2024), and over
    inputs. The former has 190 points; quick runs take a tenth of them and say so.
    """
    layers = range(min(6, model.arch.n_layers))
    one = dictionaries[0]
    places = [("resid_pre", 0), *((point, layer) for layer in layers for point in ("attn_out", "mlp_out", "resid_post"))]
    model.add_dictionaries([replace(one, name=f"{point}/{layer}", layer=layer, reads=point, writes=point) for point, layer in places])
    sites = [f"{part}.{point}" for point in dict.fromkeys(point for point, _ in places) for part in ("features", "error")]
    nodes = top_n(score(model, task, sites, direction="noising"), 20 if options.tiny else 500)
    share = 10 if options.quick or options.tiny else 1
    alone = get_method(f"ig-activations-left:{10 // share}")
    runs = {
        "edges": partial(node_edges, model, task, nodes, "atp", progress=False),
        "inputs": partial(get_method("ig:10").run, model, task, sites, direction="noising", progress=False),
        "alone": partial(alone.run, model, task, sites, direction="noising", progress=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 if options.quick else min(3, options.repeats)):
        for name, work in runs.items():
            seconds[name].append(common.timed(options.device, work)[0] * (share if name == "alone" else 1))
    took = {name: common.median(values) for name, values in seconds.items()}
    found = runs["edges"]()
    record = {"sites": len(places), "nodes": nodes.n_nodes, "edges": found.n_edges, "seconds": took, "points of one at a time": 190 // share}
    return {**record, "ratio": took["edges"] / took["alone"], "ratio to inputs": took["edges"] / took["inputs"]}


def main() -> None:
    parser = common.arguments(__doc__)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.repeats = 2 if options.tiny or options.quick else max(5, options.repeats)
    shape = common.TINY_GPT2 if options.tiny else common.GPT2
    width, active, number = (256, 8, 20) if options.tiny else (2**15, 100, 200 if options.quick else 1000)
    model, task = common.bridged(shape, options.device), common.random_task("S2", shape.vocab)
    (batch,) = task.batches(device=options.device)
    dictionaries = dictionaries_of(model, width, active, batch.clean)
    middle = dictionaries[shape.layers // 2]
    report: dict[str, Any] = {"benchmark": "features", "machine": common.machine(options.device), "goals": GOALS, "width": width}

    model.add_dictionaries(middle)
    score(model, task, FEATURES)
    ratios: list[float] = []
    for repeat in range(options.repeats):
        runs = {"nodes": partial(score, model, task, "resid_post"), "features": partial(score, model, task, FEATURES)}
        seconds = {name: common.timed(options.device, runs[name])[0] for name in (runs if repeat % 2 == 0 else reversed(runs))}
        ratios.append(seconds["features"] / seconds["nodes"])
    report["features of one layer / nodes"] = common.median(ratios)
    print(f"features of one layer / nodes: {report['features of one layer / nodes']:.3f}", flush=True)
    model.drop_dictionaries()

    model.add_dictionaries(dictionaries)
    score(model, task, "resid_post")
    nodes = common.timed(options.device, partial(score, model, task, "resid_post"))[0]
    whole = common.timed(options.device, partial(score, model, task, FEATURES))[0]
    most, scores = peak(partial(score, model, task, FEATURES))
    name = scores.sites[0]
    report |= {"peak of all layers, bytes": most, "cells": len(scores.cells(name)), "features of all layers / nodes": whole / nodes}
    per_position = len(scores.cells(name)) / max(1, len({tuple(cell) for cell in scores.cells(name)[:, :2].tolist()}))
    print(
        f"all {shape.layers} layers: {report['cells']} cells ({per_position:.0f} per layer and position), "
        f"{report['peak of all layers, bytes'] / 1e6:.0f} MB at the most, {whole / nodes:.2f} x its time",
        flush=True,
    )
    report["exact"] = exact(model, task, number, options)
    found = report["exact"]
    print(
        f"exact: {found['cells']} features in {found['runs']} runs, one forward each / fast engine {found['ratio']:.1f}, "
        f"off by {found['max_difference']:.1e}",
        flush=True,
    )

    model.drop_dictionaries()
    report["edges"] = between = edges(model, task, dictionaries, options)
    report["edges / IG-10"] = between["ratio"]
    print(
        f"{between['edges']} edges between {between['nodes']} nodes of {between['sites']} sites: {between['ratio']:.2f} x IG-10 one site at a time, "
        f"{between['ratio to inputs']:.2f} x IG-10 over inputs",
        flush=True,
    )

    if not options.tiny:
        del model, dictionaries
        model = common.bridged(replace(shape, positions=2048), options.device)
        model.add_dictionaries(middle)
        long = common.random_task("S2", shape.vocab, pairs=1, length=500 if options.quick else 2000)
        limit = AttributionPatching().prepared(model, long, "resid_post")[2]
        most = peak(partial(score, model, long, FEATURES, max_memory=1.2 * limit))[0]
        report["long"] = {"length": len(long.pairs[0]), "layers": shape.layers, "max_memory": 1.2 * limit, "peak, bytes": most}
        print(f"{report['long']['length']} tokens: {report['long']['peak, bytes'] / 1e6:.0f} MB of at most {1.2 * limit / 1e6:.0f} MB", flush=True)
    common.finish(options, report)


if __name__ == "__main__":
    main()
