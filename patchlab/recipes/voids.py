"""Voids: layers that hardly lengthen a token's state are left out for that token (L2 adaptive computation)."""

import numpy as np
import torch

from patchlab import depth
from patchlab.plots import bars
from patchlab.recipes.recipe import Inputs, Number, Outcome, recipe
from patchlab.tasks import Task

ALPHA = 0.8


def accuracies(inputs: Inputs, task: Task, alpha: float) -> dict[str, float]:
    """Top-1 accuracy with all layers, with inactive ones skipped, and read out after the last active one, each with its random control."""
    model = inputs.model
    right: dict[str, list[float]] = {}
    share: list[float] = []
    for batch in task.batches(32, model.device):
        active = depth.void_mask(model, batch.clean, alpha)
        random = depth.shuffled(active, inputs.seed)
        share += active.float().mean((1, 2)).tolist()
        runs = {
            "all layers": model.run(batch.clean).logits,
            "skipped": model.run(batch.clean, edits=list(depth.skip_inactive(model, active))).logits,
            "skipped, random": model.run(batch.clean, edits=list(depth.skip_inactive(model, random))).logits,
            "read out": depth.read_last_active(model, batch.clean, active),
            "read out, random": depth.read_last_active(model, batch.clean, random),
        }
        for name, logits in runs.items():
            top = torch.as_tensor(logits)[:, -1].argmax(-1, keepdim=True)
            hit = ((batch.answers.correct == top) & batch.answers.correct_mask).any(-1)
            right.setdefault(name, []).extend(hit.float().tolist())
    return {"share": float(np.mean(share)), **{name: float(np.mean(values)) for name, values in right.items()}}


@recipe(
    "voids",
    paper="Void in Language Models (2025), L2 adaptive computation",
    claim="tokens need only layers that lengthen their state: without the others accuracy stays (Qwen2.5-7B, MMLU 69.24 → 71.29, 30 % of layers).",
)
def voids(inputs: Inputs) -> Outcome:
    """Accuracy with the layers that are active at alpha = .8, on two tasks; equally many layers at random are the control.

    ``skipped`` leaves layers out; ``read out`` is what the authors' code does: all layers run, and the state after the last active one is read.
    """
    found = {name: accuracies(inputs, inputs.task(name, 48), ALPHA) for name in ("facts", "ioi")}
    numbers = []
    for name, one in found.items():
        numbers += [
            Number(f"{name}: share of layers active", one["share"], "0.30 (MMLU)"),
            Number(f"{name}: accuracy with all layers", one["all layers"], "0.692 (MMLU)"),
            Number(f"{name}: accuracy, inactive layers skipped", one["skipped"], "unknown", one["skipped, random"], "equally many at random"),
            Number(
                f"{name}: accuracy, read out after the last active",
                one["read out"],
                "0.713 (MMLU)",
                one["read out, random"],
                "equally many at random",
            ),
        ]
    kept = {
        how: all(one[how] >= one["all layers"] - 0.05 and one[how] > one[f"{how}, random"] for one in found.values())
        for how in ("skipped", "read out")
    }
    verdict = "; ".join(
        f"{words} the accuracy of both tasks {'stays and beats the control' if kept[how] else 'does not both stay and beat the control'}"
        for how, words in (("skipped", "with layers left out"), ("read out", "read out as the authors' code does"))
    )
    ways = ["all layers", "skipped", "skipped, random", "read out", "read out, random"]
    series = {f"control: {way}" if "random" in way else way: [one[way] for one in found.values()] for way in ways}
    figure = bars(list(found), series, title="Accuracy without void layers", label="top-1 accuracy", words=(inputs.model.name, f"alpha {ALPHA}"))
    return Outcome(tuple(numbers), kept["skipped"] or kept["read out"], verdict[0].upper() + verdict[1:] + ".", {"accuracy": figure})
