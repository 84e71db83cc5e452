"""Make docs/circuits.md and its figures: which edge scores find the smaller faithful circuit on the packaged models.

Run it in the repository: ``python scripts/pages/make_circuits_page.py`` (about five minutes on one core; figures need the extra ``images`` and a
Chromium or Chrome). Every number of the page is measured here: 96 IOI pairs that the model solves, seed 0, cut into a half to score and choose
on, a quarter to find the size on, and a quarter to report on.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchlab as pl
from patchlab import circuits, plots
from patchlab.circuits.evaluation.curve import RANDOM
from patchlab.methods import get_method
from patchlab.testing import auc_table

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("demo-gpt2", "demo-llama")
METHODS = {"EAP": "atp", "IG-5": "ig:5", "edge-RelP": "relp", "edge-RelP+IG-5": "relp+ig:5", "exact": "exact"}
ABLATIONS = ("resample", "mean", "zero")
CHOICES = (("top_n", "abs"), ("top_n", "signed"), ("greedy", "abs"), ("greedy", "signed"))
LEVEL = 0.9


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def with_interval(row: Mapping[Any, Any], name: str, low: str, high: str, digits: int = 2) -> str:
    """``0.95 [0.93, 0.97]``."""
    value, a, b = (f"{row[key]:.{digits}f}".replace("-", "−") for key in (name, low, high))
    return f"{value} [{a}, {b}]"


def edges_text(found: circuits.SmallestFaithful, label: str) -> str:
    """Edges of the smallest faithful circuit after pruning, with their interval."""
    row = found.table.set_index("method").loc[label].to_dict()
    return f"{row['n_edges']:,.0f} [{row['n_edges_lo']:,.0f}, {row['n_edges_hi']:,.0f}]" if np.isfinite(row["n_edges"]) else "none"


def measure(name: str, n: int, seed: int) -> dict[str, Any]:
    """All that the page says of one model."""
    model = pl.load_model(name)
    task = pl.load_task("ioi", model, n=n, seed=seed, only_correct=True)
    sets, second = circuits.three_sets(task, seed=seed), task.split(seed=seed)[1]
    first = sets.choosing
    maps = {label: get_method(method).run(model, first, "edges", direction="noising", progress=False) for label, method in METHODS.items()}
    options: dict[str, Any] = {"seed": seed, "progress": False}
    areas = {
        kind: circuits.faithfulness_curve(model, maps, second, ablation=kind, train=None if kind in ("resample", "zero") else first, **options)
        for kind in ABLATIONS
    }
    fine = {
        (how, by): circuits.smallest_faithful(model, maps, sets.finding, sets.reporting, level=LEVEL, how=how, by=by, **options)
        for how, by in CHOICES
    }
    exact = maps["exact"]
    comparison = pl.compare(exact, {label: scores for label, scores in maps.items() if label != "exact"}, seed=seed)
    return {"model": model, "sets": sets, "second": second, "maps": maps, "areas": areas, "fine": fine, "comparison": comparison}


def draw(name: str, found: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The figures of a model as SVG; returns their paths relative to the page."""
    fine = found["fine"]["top_n", "abs"]
    figures = {
        "faithfulness": plots.faithfulness(found["areas"]["resample"], fine),
        "circuit": plots.circuit(fine.circuits["edge-RelP"]),
        "edges": plots.edge_heatmap(found["maps"]["edge-RelP"]),
    }
    paths = {}
    for kind, figure in figures.items():
        path = folder / "figures" / f"circuits-{name}-{kind}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = plots.save(figure, path, overwrite=True, scale=1)
        if written.suffix != ".svg":
            raise SystemExit("no figures: install the extra images, and a Chromium or Chrome.")
        paths[kind] = path.relative_to(folder).as_posix()
    return paths


def ranking(found: circuits.SmallestFaithful) -> str:
    """The methods by the size of their smallest faithful circuit, in words."""
    reached = {row["method"]: row["n_edges"] for row in found.table.to_dict("records") if np.isfinite(row["n_edges"])}
    words = ", ".join(f"{label} {reached[label]:,.0f}" for label in sorted(reached, key=lambda label: reached[label]))
    missing = [label for label in METHODS if label not in reached]
    return f"From the smallest: {words}" + (f"; not reached by {', '.join(missing)}" if missing else "") + "."


def section(name: str, found: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """What the page says of one model."""
    graph, sets, second = found["model"].arch.graph, found["sets"], found["second"]
    fine, main = found["fine"]["top_n", "abs"], []
    there = {row["method"]: row for row in fine.table.to_dict("records")}
    for label in METHODS:
        area = {row["method"]: row for row in found["areas"]["resample"].areas.to_dict("records")}[label]
        cost = found["maps"][label].cost
        main.append([
            label,
            edges_text(fine, label),
            with_interval(there[label], "faithfulness", "lo", "hi") if label in fine.circuits else "–",
            with_interval(area, "cpr", "cpr_lo", "cpr_hi", 3),
            with_interval(area, "cmd", "cmd_lo", "cmd_hi", 3),
            f"{cost.forwards:,} / {cost.backwards}",
            f"{cost.seconds:.1f} s",
        ])  # fmt: skip
    baseline = {row["method"]: row for row in found["areas"]["resample"].areas.to_dict("records")}[RANDOM]
    random_areas = [with_interval(baseline, key, f"{key}_lo", f"{key}_hi", 3) for key in ("cpr", "cmd")]
    main.append(["random", "", "", *random_areas, "", ""])
    ways = [f"{'largest' if how == 'top_n' else 'greedy'}, {by}" for how, by in CHOICES]
    choice = [[label, *(edges_text(found["fine"][way], label) for way in CHOICES)] for label in METHODS]
    kinds = []
    for label in METHODS:
        rows = [{row["method"]: row for row in found["areas"][kind].areas.to_dict("records")}[label] for kind in ABLATIONS]
        kinds.append([label, *(f"{row['cpr']:.3f} / {row['cmd']:.3f}" for row in rows)])
    statistics = ("pearson", "spearman", "slope", "sign_agreement", "topk_recall")
    live = [row for row in found["comparison"].table.to_dict("records") if row["cells"] == "live"]
    agree = [[row["method"], *(with_interval(row, key, f"{key}_lo", f"{key}_hi") for key in statistics)] for row in live]
    chosen = fine.circuits["edge-RelP"].provenance["n_requested"]
    return f"""## {name}, IOI

{graph.n_edges:,} edges ({graph}); metric {second.metric.name}; scores from {len(sets.choosing)} pairs that the model solves, sizes
found on {len(sets.finding)} others, faithfulness of what was found on {len(sets.reporting)} more; areas on the last two together.

![Faithfulness against the number of edges]({figures["faithfulness"]})

Resample ablation, edges of largest |effect|, pruned. *Smallest*: edges left after pruning in the smallest circuit from which on all larger ones have
f ≥ {LEVEL:g}, of {there["exact"]["n_sizes"]} sizes from one edge to all, each at most a tenth larger than the one before (or one edge);
brackets hold the 95 % interval of that size over resamples of the pairs it was found on, the same for all scores; *f there*: its faithfulness
on the pairs that were not used to find it. CPR and CMD are over MIB's ten sizes, and so are the lines of the figure; its rings are the smallest
circuits, at *f there*. Passes are forwards / backwards of a batch of pairs.

{table(["score", "smallest", "f there", "CPR (high is good)", "CMD (low is good)", "passes", "time"], main)}

{ranking(fine)}

The choice matters as well as the score. Edges in that smallest circuit, by how edges are chosen: by |effect| (abs) or by effect
with its sign, helpful edges first (signed); the largest, or greedily from the logits:

{table(["score", *ways], choice)}

CPR / CMD under other ablations (largest |effect|; means over the corrupted prompts of the pairs that were scored on). The scores estimate what
resampling does, so the other two ask how far that carries:

{table(["score", *ABLATIONS], kinds)}

Agreement of the scores themselves with exact single-edge patching, over the edges that can matter, on the example mean:

{table(["score", "Pearson", "Spearman", "slope", "sign", "recall of the top 10 %"], agree)}

The circuit that edge-RelP finds at f ≥ {LEVEL:g} ({chosen} edges asked for), and all of its edge scores:

![Circuit]({figures["circuit"]})

![Edge scores]({figures["edges"]})
"""


def toys() -> str:
    """AUC of each method on the hand-made circuits."""
    aucs = auc_table()
    rows = [[f"`{name}`", *(f"{value:.3f}" for value in row)] for name, row in zip(aucs.index, aucs.to_numpy(), strict=True)]
    return f"""## Known circuits

Two small models whose circuit follows from their weights ([patchlab.testing.circuits](reference/testing.md)): an induction circuit in
two layers of attention, and one with an MLP that looks up a word. There is no redundancy, so exact patching finds every edge. The numbers are
the AUC of |effect| against the true edges, over all edges of the graph; edges that a method does not score (queries and keys, where it holds the
pattern constant) rank last. At the higher sharpness the softmax of the true heads is saturated and passes next to no gradient at the clean run.

{table(["method", *map(str, aucs.columns)], rows)}
"""


INTRODUCTION = """# Circuits

Made by `python scripts/pages/make_circuits_page.py` (TIME); do not edit. Edge scores estimate what a patch of one edge does; a circuit
is the part of the graph that they pick; whether it explains the behaviour is measured by running it. This page does that on the packaged models.

- **EAP** is `atp`, **IG-5** is `ig:5` (midpoint rule; EAP-IG, `eap-ig:5`, takes the ends of the steps instead), **edge-RelP** is `relp`,
  **edge-RelP+IG-5** is `relp+ig:5` (relevance coefficients averaged over the points of the path), **exact** patches each edge by itself. All of them
  give noising effects: what happens to the clean run when one edge carries what it would in the corrupted run.
- **Faithfulness** f(C) = (m(C) − m(∅)) / (m(M) − m(∅)): the metric of the circuit C with all other edges ablated, of the whole model M, and of
  the model with every edge ablated. It is a ratio of means; brackets hold the 95 % interval over examples. It may exceed 1, since edges that work
  against the behaviour can be outside.
- **CPR** and **CMD** are the areas under f and between f and 1 over shares of the edges, as the MIB benchmark takes them. CPR has no upper bound and
  rewards f above 1; CMD and the smallest size do not, so the three are read together.
- Choosing edges, finding the size, and reporting use three disjoint sets of pairs.

The packaged models are small and were trained on synthetic text: which score wins here need not win on a model trained on the web. To ask
the same of another model or task:

```sh
patchlab circuit evaluate --model demo-gpt2 --task ioi --n 96 --curve results --methods atp,ig:5,relp,exact
```

"""


def main() -> None:
    """Measure, draw, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--n", type=int, default=96, help="pairs, half of them to choose on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page and its figures")
    arguments = parser.parse_args()
    started, parts = time.perf_counter(), []
    for name in arguments.models:
        print(name, flush=True)
        found = measure(name, arguments.n, arguments.seed)
        parts.append(section(name, found, draw(name, found, arguments.out)))
    print("toys", flush=True)
    parts.append(toys())
    took = f"{(time.perf_counter() - started) / 60:.0f} minutes on {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    (arguments.out / "circuits.md").write_text(INTRODUCTION.replace("TIME", took) + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
