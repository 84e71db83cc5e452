"""What patchlab computes, as hashes: to be compared between two checkouts on one machine while the code is moved about.

    python scripts/golden.py old.json                       # in the checkout to compare with
    python scripts/golden.py new.json --against old.json    # here; exits with 1 where anything differs

Every score map is hashed bit by bit, with what it cost (forwards, backwards, positions), its structural zeros and its notes; errors are
compared by their words. Hashes hold on one machine and with one number of threads. ``--short`` gives mean sizes to six digits instead, of
models in float64, which other machines can compare with.
"""

import argparse
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchlab as pl
from patchlab.errors import PatchlabError
from patchlab.testing.toys import toy_task
from patchlab.testing.zoo import zoo_model

METHODS = [
    "exact",
    "atp",
    "ig:3",
    "ig-left:2",
    "ig-right:2",
    "ig-trapezoid:2",
    "ig-activations:2",
    "clean-corrupted",
    "relp",
    "relp-ah",
    "attnlrp",
    "cp-lrp",
    "gim",
    "relp+ig:2",
    "atp*",
    "atp+qk",
    "relp+drop",
]
EDGE_METHODS = ["exact", "exact-frozen", "atp", "eap-ig-inputs:2", "eap-ig-activations:2", "clean-corrupted", "relp", "relp-ah", "gim", "relp+ig:2"]
SHORT, SHORT_EDGES = ["exact", "ig-activations:2", "relp+ig:2", "gim", "atp*"], ["exact", "exact-frozen", "eap-ig-activations:2", "gim"]
SITES = ["input", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "mlp_post"]
FINE = ["z[layer,pos,head]", "q[layer,pos,head]", "k[layer,pos,kv_head]", "v[layer,pos]", "mlp_post[layer]", "pattern[layer,head,dest]"]
EDGES = ["edges", "edges[writer,reader,pos]", "edges[writer,reader,dest,src]"]
Record = dict[str, Any]


def digest(*arrays: np.ndarray) -> str:
    """A short hash of arrays, bit by bit."""
    state = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        state.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return state.hexdigest()[:16]


def of_map(scores: pl.ScoreMap) -> Record:
    """A score map: hash per site, cost, liveness and what provenance says of gaps and notes."""
    cost, record = scores.cost, scores.provenance
    return {
        "method": record["method"],
        "effects": {site: digest(scores.data[site].to_numpy()) for site in scores.sites},
        "live": {site: digest(scores.live[site].to_numpy()) for site in scores.sites},
        "metric": digest(scores.data["metric_clean"].to_numpy(), scores.data["metric_corrupted"].to_numpy()),
        "cost": [cost.forwards, cost.backwards, cost.positions],
        "engine": record["engine"],
        "not_scored": record["not_scored"],
        "notes": record["notes"],
        "gaps": digest(np.array(json.dumps([record.get(name) for name in ("completeness_gap", "non_conservation", "self_check")]))),
    }


def in_short(scores: pl.ScoreMap) -> Record:
    """Mean absolute effect per site to six digits."""
    return {site: float(f"{np.nan_to_num(np.abs(scores.data[site].to_numpy())).mean():.8g}") for site in scores.sites}


def runs(demo: Path | None, short: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is run, by name."""
    show = in_short if short else of_map
    models: dict[str, pl.Model] = {}
    tasks: dict[str, Any] = {}
    for name in () if short else ("demo-gpt2", "demo-llama"):
        models[name] = pl.load_model(name if demo is None else str(demo / name), device="cpu")
        tasks[name] = pl.load_task("ioi", models[name], n=3, seed=5)
    for name in ("gemma2", "neox"):
        models[name] = zoo_model(name, torch.float64 if short else torch.float32, 3)
        tasks[name] = toy_task(models[name], n=3, length=5, seed=4)

    def scored(method: Any, name: str, sites: Any, direction: str = "denoising", **options: Any) -> Callable[[], Record]:
        return lambda: show(method().run(models[name], tasks[name], sites, direction=direction, progress=False, **options))

    def named(method: str) -> Callable[[], Any]:
        return lambda: pl.methods.get_method(method)

    for name in models:
        small = name in ("gemma2", "neox")
        own = [site for site in SITES if site in models[name].arch.sites]
        cheap = [site for site in own if small or site not in ("mlp_post", "resid_post", "resid_mid")]
        for method in SHORT if short else METHODS:
            sites = cheap if method == "exact" else own
            for direction in ("denoising", "noising") if (small and not short) or method in ("exact", "relp") else ("denoising",):
                yield f"{name} {method} {direction}", scored(named(method), name, sites, direction)
            if small:
                yield f"{name} {method} fine", scored(named(method), name, FINE)
        for method in SHORT_EDGES if short else EDGE_METHODS:
            if method == "exact-frozen" and name != "gemma2":
                continue
            if method.startswith("exact") and not small:
                continue
            yield f"{name} {method} edges", scored(named(method), name, "edges", "noising")
            if small and not method.startswith("exact"):
                for site in EDGES[1:]:
                    yield f"{name} {method} {site}", scored(named(method), name, site)
            elif small:
                yield f"{name} {method} {EDGES[1]}", scored(named(method), name, EDGES[1])
    if short:
        return
    methods = pl.methods
    for name in ("gemma2", "neox"):
        for source in ("zero", "mean", "mean_positional"):
            for method in (methods.ActivationPatching, methods.AttributionPatching, methods.RelevancePatching, methods.SecondOrder):
                for sites in (["resid_pre", "z"], "edges"):
                    if method is methods.SecondOrder and sites == "edges":
                        continue
                    yield f"{name} {method.__name__} {source} {sites}", scored(lambda m=method, s=source: m(source=s), name, sites)
        yield f"{name} literal", scored(lambda: methods.ActivationPatching(engine="literal"), name, ["resid_pre", "z", "mlp_out"])
        yield f"{name} literal edges", scored(lambda: methods.ActivationPatching(engine="literal"), name, "edges")
        yield f"{name} second order", scored(lambda: methods.SecondOrder(), name, ["z", "resid_pre"])
        yield f"{name} second order:4", scored(lambda: methods.SecondOrder(probes=4), name, ["z[layer,pos,head]"])
        yield f"{name} batches of 2", scored(named("relp"), name, ["resid_pre", "z"], batch_size=2)
        for sites in ("z[layer,pos,head]", "edges"):
            yield f"{name} verified {sites}", verified(models[name], tasks[name], sites)
        yield f"{name} subsets", verified(models[name], tasks[name], "z[layer,pos,head]", subsets=8)
        yield f"{name} ambient", ambient(models[name], tasks[name])
        yield f"{name} path patching", paths(models[name], tasks[name])
    yield "demo-llama circuits", circuits(models["demo-llama"], tasks["demo-llama"])
    yield "gemma2 comparison", comparison(models["gemma2"], tasks["gemma2"])
    yield "demo-gpt2 tasks", listed_tasks(models["demo-gpt2"])


def verified(model: pl.Model, task: Any, sites: str, **options: Any) -> Callable[[], Record]:
    """Verified patching."""

    def found() -> Record:
        result = pl.VerifiedPatching(k=4, **options).run(model, task, sites, direction="denoising", progress=False)
        return {"table": digest(np.array(result.table.to_csv())), "text": repr(result)}

    return found


def ambient(model: pl.Model, task: Any) -> Callable[[], Record]:
    """Methods inside surrounding edits."""

    def found() -> Record:
        with pl.intervene(model, pl.Edit("L0.attn_out", pl.sources.zero())):
            return {
                name: of_map(pl.methods.get_method(name).run(model, task, ["resid_pre", "z"], direction="noising", progress=False))
                for name in ("exact", "relp")
            }

    return found


def paths(model: pl.Model, task: Any) -> Callable[[], Record]:
    """Sets of edges, and shared keys and values."""

    def found() -> Record:
        names = ["a0.h1->m1", "a1.h0->logits"]
        sets = pl.methods.patch_edges(model, task, {"one": names[:1], "two": names}, direction="noising", progress=False).sel("sets")
        shared = pl.methods.kv_effects(model, task, direction="noising", progress=False).sel("sets")
        return {"sets": digest(sets.to_numpy().T), "shared": digest(shared.to_numpy().T), "edges": shared["set_name"].values.tolist()[:5]}

    return found


def circuits(model: pl.Model, task: Any) -> Callable[[], Record]:
    """Selection, evaluation, curves, ACDC."""

    def found() -> Record:
        scores = pl.methods.get_method("atp").run(model, task, "edges", direction="noising", progress=False)
        circuit = pl.circuits.top_n(scores, 100)
        greedy = pl.circuits.greedy(scores, 80)
        record: Record = {"edges": digest(circuit.edges, greedy.edges), "text": repr(circuit)}
        for ablation in ("resample", "mean", "zero"):
            options = {"ablation": ablation, "allow_overlap": True, "progress": False, "n_boot": 50}
            evaluation = pl.circuits.evaluate(model, {"top": circuit, "greedy": greedy}, task, minimality="node", **options)
            record[ablation] = [digest(*evaluation.metric.values()), digest(np.array(evaluation.table.to_csv() + evaluation.minimality.to_csv()))]
        curve = pl.circuits.faithfulness_curve(model, scores, task, sizes=[60, 120, 240], allow_overlap=True, progress=False, n_boot=50)
        record["curve"] = digest(np.array(curve.table.to_csv()))
        record["acdc"] = digest(pl.circuits.acdc(model, task, 3.0, progress=False)[3.0].edges)
        record["roc"] = repr(pl.circuits.roc(scores, circuit))
        return record

    return found


def comparison(model: pl.Model, task: Any) -> Callable[[], Record]:
    """Agreement of several methods with exact patching."""

    def found() -> Record:
        maps = {
            name: pl.methods.get_method(name).run(model, task, ["resid_pre", "z"], direction="denoising", progress=False)
            for name in ("exact", "atp", "relp", "ig:3")
        }
        result = pl.compare(maps.pop("exact"), maps, n_boot=50)
        columns = [column for column in result.table.columns if "seconds" not in column]
        return {"table": digest(np.array(result.table[columns].to_csv())), "differences": digest(np.array(result.differences.to_csv()))}

    return found


def listed_tasks(model: pl.Model) -> Callable[[], Record]:
    """Fingerprints of the packaged tasks."""
    names = ("ioi", "agreement", "greater_than", "induction", "docstring", "pronoun", "facts")
    return lambda: {name: pl.load_task(name, model, n=6, seed=3).fingerprint for name in names}


def errors() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that are refused."""
    model, llama = zoo_model("gpt2", torch.float32, 3), zoo_model("llama", torch.float32, 3)
    task = toy_task(model, n=3, length=5, seed=4)
    get, methods, circuits_ = pl.methods.get_method, pl.methods, pl.circuits
    relp = get("relp")
    for text in ("resid", "z[head,pos", "L9.z", "L0.H7.z", "z[layer,neuron]", "L0.H1.mlp_out", "edges[writer]", "a9.h9", "L1.pattern@0<9x", ""):
        yield f"site {text!r}", lambda text=text: relp.run(model, task, text, progress=False)
    for text in ("rlp", "ig:0", "ig:", "relp+ig:-1", "nope+ig:3", "exact+qk", "atp+qk+qk", "ig-activations:2+qk", "gradient", "lrp", "ig-middle:3"):
        yield f"method {text!r}", lambda text=text: get(text).run(model, task, "z", progress=False)
    for options in ({"direction": "both"}, {"batch_size": 0}, {"max_memory": 10}, {"checkpoint": "/nowhere/at/all"}):
        yield f"run {options}", lambda options=options: relp.run(model, task, "z", progress=False, **options)
    for options in ({"source": "median"}, {"rules": "nope"}):
        yield f"relp {options}", lambda options=options: methods.RelevancePatching(**options)
    for options in ({"engine": "fast"}, {"post_norm": "half"}, {"source": "none"}):
        yield f"exact {options}", lambda options=options: methods.ActivationPatching(**options)
    for options in ({"tolerance": 2.0}, {"probes": 0}):
        yield f"second order {options}", lambda options=options: methods.SecondOrder(**options)
    for options in ({"k": 0}, {"confidence": 3.0}, {"recall": 0.5}, {"subsets": 3}):
        yield f"verified {options}", lambda options=options: pl.VerifiedPatching(**options).run(model, task, "z", progress=False)
    yield "edges and nodes", lambda: relp.run(model, task, ["edges", "z"], progress=False)
    yield "exact edges by pairs", lambda: get("exact").run(model, task, EDGES[2], progress=False)
    yield "frozen nodes", lambda: methods.ActivationPatching(post_norm="frozen").run(model, task, "z", progress=False)
    yield "frozen edges", lambda: get("exact-frozen").run(model, task, "edges", progress=False)
    yield "drop on edges", lambda: get("atp+drop").run(model, task, "edges", progress=False)
    yield "second order on edges", lambda: methods.SecondOrder().run(model, task, "edges", progress=False)
    yield "groups on nodes", lambda: get("eap-ig-activations:2").run(model, task, "z", progress=False)
    yield "mean of a pattern", lambda: methods.AttributionPatching(source="mean").run(model, task, "pattern", progress=False)
    yield "other model's task", lambda: relp.run(zoo_model("mamba", torch.float32, 2), task, "z", progress=False)
    yield "edit without layer", lambda: model.run(torch.tensor([[1, 2, 3]]), edits=[pl.Edit("z", pl.sources.zero())])
    yield "edit op", lambda: pl.Edit("L0.z", pl.sources.zero(), "multiply")
    yield "edit source", lambda: pl.Edit("L0.z", {})
    yield "edit shape", lambda: model.run(torch.tensor([[1, 2, 3]]), edits=[pl.Edit("L0.z", torch.ones(5))])
    yield "kept nothing", lambda: model.run(torch.tensor([[1, 2, 3]]), keep=["z"])["L0.q"]
    yield "no edge", lambda: methods.patch_edges(model, task, [["a1.h0->a0.h0<q>"]], progress=False)
    yield "no set", lambda: methods.patch_edges(model, task, {}, progress=False)
    edges = get("atp").run(model, task, "edges", direction="noising", progress=False)
    nodes = get("atp").run(model, task, "z", direction="noising", progress=False)
    circuit = circuits_.top_n(edges, 30)
    yield "circuit of nodes", lambda: circuits_.top_n(nodes, 5)
    yield "too many edges", lambda: circuits_.top_n(edges, 10**6)
    yield "other graph", lambda: circuits_.evaluate(llama, circuit, toy_task(llama, n=3), progress=False)
    yield "same examples", lambda: circuits_.evaluate(model, circuit, task, progress=False)
    yield "ablation", lambda: circuits_.evaluate(model, circuit, task, ablation="median", progress=False)
    yield "compare directions", lambda: pl.compare(nodes, {"other": relp.run(model, task, "z", direction="denoising", progress=False)})
    yield "compare sites", lambda: pl.compare(nodes, {"other": edges})
    yield "no circuit file", lambda: circuits_.read("/nowhere.json")
    yield "kind of circuit file", lambda: circuits_.read("/nowhere.txt")
    yield "scores file", lambda: pl.ScoreMap.load("/nowhere.nc")
    yield "task name", lambda: pl.load_task("nope", model)
    yield "metric", lambda: toy_task(model, metric="nope")
    yield "model name", lambda: pl.load_model("demo-nope")


def main() -> int:
    """Run everything; compare if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--demo", type=Path, help="folder of the packaged models, where two checkouts differ in them")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: Record = {}
    for name, call in runs(arguments.demo, arguments.short):
        if arguments.only in name:
            try:
                found[name] = call()
            except PatchlabError as error:
                found[name] = f"{type(error).__name__}: {error}"
    if not arguments.short:
        for name, call in errors():
            if arguments.only in name:
                try:
                    found[name] = f"no error: {type(call()).__name__}"
                except PatchlabError as error:
                    found[name] = f"{type(error).__name__}: {error}"
                except Exception:
                    found[name] = "raw " + traceback.format_exc(limit=0).strip()
    arguments.out.write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(len(found), "records")
    if arguments.against is None:
        return 0
    old = {name: value for name, value in json.loads(arguments.against.read_text()).items() if arguments.only in name}
    new = json.loads(arguments.out.read_text())
    unlike = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    for name in unlike:
        print(f"{name}:\n  was {json.dumps(old.get(name))[:1500]}\n  is  {json.dumps(new.get(name))[:1500]}")
    print(f"{len(unlike)} of {len(old)} differ")
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
