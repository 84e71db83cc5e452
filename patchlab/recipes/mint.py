"""MINT: an answer is changed by one neuron (neuron-level model editing)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import patchlab as pl
from patchlab import weight_edit
from patchlab.host import precise
from patchlab.models import Model
from patchlab.plots import bars
from patchlab.recipes.recipe import Inputs, Number, Outcome, recipe
from patchlab.tasks import Task
from patchlab.weight_edit import EditReport, Request, WeightEdit

LADDER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
Ranking = Callable[[int], Sequence[tuple[int, int]]]
"""From the number of a fact to (layer, neuron), the best first."""


def basis_step(model: Model, wanted: int, current: int) -> Tensor:
    """The unit vector from one token's semantic basis to another's: rows of the pseudo-inverse of the unembedding."""
    unembed = model.bridge.unembed.original_component.weight.detach()
    inverse = torch.linalg.pinv(precise(unembed))  # [d_model, vocab]
    step = inverse[:, wanted] - inverse[:, current]
    return (step / step.norm()).to(model.device, model.dtype)


def unique_facts(task: Task) -> Task:
    """The task with each clean prompt once."""
    first: dict[tuple[int, ...], int] = {}
    for i, pair in enumerate(task.pairs):
        first.setdefault(pair.clean_ids, i)
    return task.select(list(first.values()))


def repaired(model: Model, request: Request, current: int, activations: Tensor, neurons: Sequence[tuple[int, int]], fact: int) -> list[WeightEdit]:
    """The first neuron, at the first rung of a ladder of steps, that makes the wanted token the most likely; else the two first at the largest."""
    step = basis_step(model, request.wanted, current)
    for layer, neuron in neurons[:2]:
        for size in LADDER:
            edit = weight_edit.neuron_row(model, layer, neuron, size * step / activations[fact, layer, neuron])
            with weight_edit.edited(model, edit):
                if int(torch.as_tensor(model.run(list(request.tokens)).logits)[0, -1].argmax()) == request.wanted:
                    return [edit]
    return [weight_edit.neuron_row(model, *place, LADDER[-1] * step / activations[fact, place[0], place[1]]) for place in neurons[:2]]


@recipe(
    "mint",
    paper="MINT: neuron-level repair of language models",
    claim="changing what one or two neurons write repairs an answer, generalises, keeps other answers, and repairs add up.",
)
def mint(inputs: Inputs) -> Outcome:
    """Facts are given another capital by one neuron's row, chosen by its activation at END beyond its mean on other facts.

    The workbench's addition: neurons ranked by |mlp_post| scores of AtP and of RelP. Control: a random active neuron. The exact formulas of the paper
    are not known to us: the step is along the difference of the tokens' semantic bases, its size the first that works.
    """
    model = inputs.model
    task = unique_facts(inputs.task("facts", 64))
    task = task.select(task.solved(model))
    task = task.select(range(min(len(task), 16)))
    rng = np.random.default_rng(inputs.seed)
    answers = [pair.correct[0] for pair in task.pairs]
    wanted = [rng.choice([other for other in sorted(set(answers)) if other != answer]) for answer in answers]
    requests = [Request(pair.clean_ids, int(token)) for pair, token in zip(task.pairs, wanted, strict=True)]
    layers = range(model.arch.n_layers)
    keep = tuple(f"L{layer}.mlp_post" for layer in layers)
    a = torch.stack([torch.stack([torch.as_tensor(model.run(list(r.tokens), keep=keep)[one])[0, -1] for one in keep]) for r in requests])
    beyond = (a.abs() - (a.abs().sum(0) - a.abs()) / max(1, len(a) - 1)).flatten(1)
    usable = (a.abs() > 1e-2 * a.abs().amax()).flatten(1)
    width = a.shape[-1]

    def places(order: Tensor) -> list[tuple[int, int]]:
        return [divmod(int(i), width) for i in order]

    def by(scores: Tensor) -> Ranking:
        return lambda fact: places(torch.where(usable[fact], scores[fact], -torch.inf).argsort(descending=True)[:2])

    rankings: dict[str, Ranking] = {"activation": by(beyond)}
    for name, method in (("AtP", pl.AttributionPatching()), ("RelP", pl.RelevancePatching())):
        data = method.run(model, task, "mlp_post").data["mlp_post"].to_numpy()
        rankings[name] = by(torch.from_numpy(np.abs(data).reshape(len(data), -1)).to(usable.device))
    rankings["random"] = by(torch.rand(usable.shape, generator=torch.Generator().manual_seed(inputs.seed)).to(usable.device))
    others = {"ioi": [list(pair.clean_ids) for pair in inputs.task("ioi", 64).pairs]}
    reports: dict[str, EditReport] = {}
    for name, ranking in rankings.items():
        edits = [repaired(model, r, answer, a, ranking(i), i) for i, (r, answer) in enumerate(zip(requests, answers, strict=True))]
        reports[name] = weight_edit.report(model, requests, edits, others=others)
    control = reports["random"]
    numbers = []
    for column, what in (
        ("success", "success alone"),
        ("others_kept", "other facts kept"),
        ("kept ioi", "IOI answers kept"),
        ("size", "norm of the change"),
    ):
        for name in ("activation", "AtP", "RelP"):
            value, against = float(reports[name].alone[column].mean()), float(control.alone[column].mean())
            numbers.append(Number(f"{what}, neurons by {name}", value, "unknown", against, "random neurons"))
    last = reports["activation"].together.iloc[-1]
    against = control.together.iloc[-1]
    numbers.append(
        Number(f"success of {len(requests)} repairs together", float(last["success"]), "unknown", float(against["success"]), "random neurons")
    )
    numbers.append(Number("IOI answers kept with all repairs", float(last["kept ioi"]), "unknown", float(against["kept ioi"]), "random neurons"))
    own = reports["activation"].alone
    alone = bool(own["success"].mean() >= 0.9 and own["others_kept"].mean() >= 0.9 and own["kept ioi"].mean() >= 0.9)
    random = control.alone
    verdict = (
        f"Alone, one or two neurons change {own['success'].sum():.0f} of {len(own)} answers and keep {own['others_kept'].mean():.2f} of the other "
        f"facts (random active neurons: {random['success'].sum():.0f} and {random['others_kept'].mean():.2f}); made together, "
        f"{last['success']:.2f} of them hold, so repairs {'add up' if last['success'] >= 0.8 else 'do NOT add up'}."
    )
    columns = ["success", "others_kept", "kept ioi"]
    series = {("control: random" if name == "random" else name): [float(one.alone[c].mean()) for c in columns] for name, one in reports.items()}
    figures = {
        "repairs": bars(["success", "other facts kept", "IOI kept"], series, title=f"Facts of {model.name} changed by one neuron", label="share")
    }
    return Outcome(tuple(numbers), alone and bool(last["success"] >= 0.8), verdict, figures)
