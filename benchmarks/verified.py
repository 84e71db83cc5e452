"""Verified patching against the full sweep: recall of the top k, the share of the work, and whether the stated confidence holds.

Head × position maps (``z[layer,pos,head]``) of the packaged models on their tasks, pairs that the model solves. For every task and
seed the full exact sweep is the truth; k is 5 % of the live cells, at most 20.
Recall counts a missed cell as found where its |effect| is within 1 % of the gap of the
k-th verified one; strict recall does not. Shares are of a full sweep's rows, with everything included. The bound holds when
no more unverified cells exceed the threshold than it says.
"""

import argparse
import statistics
from typing import Any

import _common as common
import numpy as np
import torch

import patchlab as pl
from patchlab.errors import TaskError
from patchlab.methods import get_method
from patchlab.scores import ScoreMap
from patchlab.stats.agreement import cells_for_recall
from patchlab.tasks import GENERATORS

SITE = "z[layer,pos,head]"
OPTIONS: dict[str, dict[str, Any]] = {"agreement": {"variant": "across_rc"}}
SCREENS = ("atp", "ig:5", "relp", "relp-ah", "attnlrp", "gim", "relp+ig:5")
TIE = 0.01
HIERARCHICAL = "relp"
"""The screen that the hierarchical mode is measured with."""


def truth(exact: ScoreMap, result: Any) -> dict[str, Any]:
    """What a result found of what there is."""
    sizes = exact.mean(SITE).to_numpy()
    sizes = {cell: abs(float(sizes[cell])) for cell in map(tuple, np.argwhere(exact.live[SITE].to_numpy()).tolist())}
    axes = [str(dim) for dim in exact.live[SITE].dims]
    rows = [(tuple(int(row[axis]) for axis in axes), row) for row in result.table.to_dict("records")]
    chosen = {cell for cell, row in rows if row["top"]}
    best = sorted(sizes, key=lambda cell: -sizes[cell])[: result.k]
    kth, missed = min(sizes[cell] for cell in chosen), [cell for cell in best if cell not in chosen]
    unverified = set(sizes) - {cell for cell, row in rows if row["found"] != "sample"}
    exceeding = sum(sizes[cell] > result.bound.threshold for cell in unverified)
    return {
        "recall": 1 - sum(sizes[cell] > kth + TIE * abs(exact.gap) for cell in missed) / result.k,
        "strict_recall": 1 - sum(sizes[cell] > kth * (1 + 1e-4) for cell in missed) / result.k,
        "exceeding": exceeding,
        "at_most": result.bound.at_most,
        "unverified": result.bound.unverified,
        "held": exceeding <= result.bound.at_most,
        "certain": result.recall.at_least / result.k,
        "share": result.share,
        "share_without_sample": result.share_without_sample,
        "verified": result.passes["verified"] / result.n_live,
        "largest_missed_share_of_gap": max((sizes[cell] for cell in missed), default=0.0) / abs(exact.gap),
        "k": result.k,
        "n_live": result.n_live,
        "kth_share_of_gap": sizes[best[-1]] / abs(exact.gap),
    }


def needed(exact: ScoreMap, screen: ScoreMap) -> float:
    """Share of the live cells that must be verified in the screen's order to have all of the top k."""
    live = exact.live[SITE].to_numpy()
    first, second = (scores.mean(SITE).to_numpy()[live] for scores in (exact, screen))
    return cells_for_recall(first, second, max(1, min(20, live.sum() // 20)), 1.0) / int(live.sum())


def measure(model: Any, name: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every screen and sample on one task."""
    task = pl.load_task(name, model, n=options.pairs, seed=seed, only_correct=True, **OPTIONS.get(name, {}))
    exact = pl.ActivationPatching().run(model, task, SITE, progress=False)
    rows = []
    for screen in options.screens:
        for hierarchical in (False, True) if screen == HIERARCHICAL else (False,):
            for sample in range(options.samples):
                k = max(1, min(20, int(exact.live[SITE].sum()) // 20))
                method = pl.VerifiedPatching(screen=get_method(screen), k=k, hierarchical=hierarchical, seed=sample)
                result = method.run(model, task, SITE, progress=False)
                about = {"model": model.name, "task": name, "seed": seed, "sample": sample}
                label = f"{screen}, hierarchical" if hierarchical else screen
                rows.append({**about, "screen": label, **truth(exact, result), "needed": needed(exact, result.screen)})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over tasks, seeds and samples."""
    names = ("recall", "strict_recall", "certain", "share", "share_without_sample", "verified", "needed")
    found: dict[str, Any] = {name: common.median([row[name] for row in rows]) for name in names}
    found |= {"least_recall": min(row["recall"] for row in rows), "least_strict_recall": min(row["strict_recall"] for row in rows)}
    found["mean_strict_recall"] = statistics.fmean(row["strict_recall"] for row in rows)
    found["most_needed"] = max(row["needed"] for row in rows)
    found["at_most"] = common.median([row["at_most"] / row["unverified"] for row in rows])
    return {**found, "held": statistics.fmean(row["held"] for row in rows), "runs": len(rows)}


def shown(label: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{label:<24} {found['recall']:6.2f} {found['strict_recall']:6.2f} {found['mean_strict_recall']:6.3f} {found['least_strict_recall']:6.2f}"
        f" {found['share']:6.2f} {found['share_without_sample']:9.2f} {found['needed']:7.2f} {found['most_needed']:6.2f}"
        f" {found['at_most']:7.2f} {100 * found['held']:6.1f} % {found['runs']:5d}"
    )


HEADER = f"{'':<24} recall strict   mean  least  share no sample  needed   most   M / N     held  runs"


def main() -> None:
    """Measure all tasks, then print the medians."""
    parser = common.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["demo-gpt2", "demo-llama"])
    parser.add_argument("--tasks", nargs="+", default=list(GENERATORS), choices=list(GENERATORS))
    parser.add_argument("--screens", nargs="+", default=list(SCREENS))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="sets of pairs per task")
    parser.add_argument("--samples", type=int, default=3, help="random samples per set of pairs and screen")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick or options.tiny:
        options.tasks, options.screens, options.seeds, options.samples = options.tasks[:2], ["atp", "relp"], 1, 2
    if options.tiny:
        options.models, options.tasks, options.pairs = options.models[:1], options.tasks[:1], 2
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name in options.models:
        model = pl.load_model(name, device=options.device)
        for task in options.tasks:
            try:
                rows += [row for seed in range(options.seeds) for row in measure(model, task, seed, options)]
            except TaskError as error:
                skipped[f"{name} {task}"] = str(error)
    by_screen = {label: [row for row in rows if row["screen"] == label] for label in dict.fromkeys(row["screen"] for row in rows)}
    print(f"medians over {len({(row['model'], row['task'], row['seed']) for row in rows})} sets of pairs; {SITE}\n{HEADER}")
    screens = {label: summary(part) for label, part in by_screen.items()}
    for label, found in screens.items():
        print(shown(label, found))
    print(f"\n{HIERARCHICAL}, task by task")
    tasks = {}
    for key in dict.fromkeys((row["model"], row["task"]) for row in rows):
        part = [row for row in rows if (row["model"], row["task"]) == key and row["screen"] == HIERARCHICAL]
        if part:
            tasks[" ".join(key)] = {**summary(part), **{name: part[0][name] for name in ("k", "n_live", "kth_share_of_gap")}}
            print(
                shown(" ".join(key), tasks[" ".join(key)])
                + f"  k {part[0]['k']} of {part[0]['n_live']}, at {100 * part[0]['kth_share_of_gap']:.2f} % of the gap"
            )
    for key, why in skipped.items():
        print(f"skipped {key}: {why}")
    goals = {"median recall": 0.95, "held": 0.95}
    report = {"benchmark": "verified", "machine": common.machine(options.device), "site": SITE, "pairs": options.pairs, "goals": goals}
    common.finish(options, {**report, "screens": screens, "tasks": tasks, "skipped": skipped})


if __name__ == "__main__":
    main()
