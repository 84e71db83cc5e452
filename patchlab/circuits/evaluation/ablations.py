"""Ablations: what the edges outside a circuit carry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.engine.contributions import Contributions, contributions, post_norm_problem
from patchlab.engine.masked import pass_bytes, row_bytes
from patchlab.errors import CircuitError, unknown
from patchlab.host import precise
from patchlab.models import Model
from patchlab.tasks.task import Task

ABLATIONS = {
    "resample": "what the writer writes on the corrupted prompt of the same pair",
    "zero": "nothing",
    "mean": "the mean of what it writes on corrupted prompts, over examples and positions",
    "mean_positional": "that mean at each position, over examples",
    "optimal": "a constant, fitted so that the ablated circuit's output is as close as possible to the full model's (Li & Janson 2024)",
}


@dataclass(frozen=True)
class OptimalFit:
    """How the constants of optimal ablation are fitted: Adam from the mean, in units of each writer's spread; the best step counts.

    Source: Li & Janson 2024, "Optimal ablation for interpretability", arXiv 2409.09951.

    Args:
        steps: of gradient descent, each on all training examples. Constants of a small circuit stay on a plateau for many steps
            before they restore what it needs; ``still_falling`` beside the losses in the provenance says where more steps would help.
        lr: learning rate, as a share of the root mean square deviation of the writer from its mean.
    """

    steps: int = 200
    lr: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0:
            raise CircuitError(f"a fit needs at least one step and a positive learning rate; got {self}.")


@dataclass(frozen=True, eq=False)
class Fitting:
    """What constants are fitted from.

    Args:
        options: the budget.
        train: the examples to fit on.
        mean: what the writers write on average, where a fit starts.
        spread: their root mean square deviation from it, the unit of its steps.
    """

    options: OptimalFit
    train: Task
    mean: Contributions
    spread: Float[Tensor, "writer one one one"]


@dataclass(frozen=True, eq=False)
class Ablation:
    """An ablation that is ready to use.

    Args:
        kind: one of :data:`ABLATIONS`.
        constants: what the writers are ablated to; None where they write what they do on the corrupted prompts, or constants are fitted.
        train: the examples behind the constants, if there are any.
        post_norm: what heads write where a norm follows the attention.
        fitting: how constants are fitted to each circuit; None where one set is for all.

    Raises:
        CircuitError: optimal ablation without a fit, or another with one.
    """

    kind: str
    constants: Contributions | None = None
    train: Task | None = None
    post_norm: str = "renormalised"
    fitting: Fitting | None = None

    def __post_init__(self) -> None:
        if (self.kind == "optimal") != (self.fitting is not None):
            raise CircuitError(
                f"optimal ablation, and no other, is fitted on training examples; got {self.kind!r} {'with' if self.fitting else 'without'} a fit. "
                f"Make it with ablation_for(..., 'optimal', train=task)."
            )


def rows_per_pass(model: Model, task: Task, budget: int | float) -> int:
    """Examples of a task whose run as one circuit fits into the memory of a forward pass, in bytes."""
    return max(1, int(budget // row_bytes(model, max(len(pair) for pair in task.pairs))))


def ablation_for(
    model: Model,
    task: Task,
    kind: str = "resample",
    *,
    train: Task | None = None,
    fit: OptimalFit | None = None,
    post_norm: str = "renormalised",
) -> Ablation:
    """Prepare an ablation for a task.

    Args:
        model: the model.
        task: whose prompts the circuits will run on.
        kind: one of :data:`ABLATIONS`.
        train: examples for means and fitted constants; default the task itself for means. Optimal ablation needs its own.
        fit: the budget of optimal ablation.
        post_norm: what heads write where a norm follows the attention, one of :data:`patchlab.engine.contributions.POST_NORMS`.

    Raises:
        CircuitError: an unknown kind or form, positional means over examples that do not line up, no examples to fit constants on,
            or a fit of another kind.
    """
    if kind not in ABLATIONS:
        raise CircuitError(unknown("ablation", kind, ABLATIONS))
    if kind == "optimal" and train is None:
        raise CircuitError("optimal ablation fits its constants on examples of their own; pass train=, another part of the task (task.split()).")
    if kind != "optimal" and fit is not None:
        raise CircuitError(f"fit= is the budget of optimal ablation, and {kind!r} fits nothing; leave it out, or pass ablation='optimal'.")
    if (problem := post_norm_problem(model, post_norm)) is not None:
        raise CircuitError(problem)
    source = None if kind in ("resample", "zero") else train or task
    if source is None:
        zeros = torch.zeros(len(model.arch.graph.writers), 1, 1, model.arch.d_model, dtype=model.dtype, device=model.device)
        return Ablation(kind, Contributions(zeros, post_norm) if kind == "zero" else None, post_norm=post_norm)
    if kind == "mean_positional":
        check_lengths(task, source)
    mean = _mean(model, source, lambda values: values, post_norm, positional=kind == "mean_positional")
    constants = Contributions(mean.to(model.dtype).to(model.device), post_norm)
    if kind == "optimal":
        spread = _mean(model, source, lambda values: (values - mean).pow(2).mean(-1, keepdim=True), post_norm, positional=False)
        fitting = Fitting(fit or OptimalFit(), source, constants, spread.sqrt().clamp_min(1e-6).to(model.dtype).to(model.device))
        return Ablation(kind, None, source, post_norm, fitting)
    return Ablation(kind, constants, source, post_norm)


def _mean(model: Model, task: Task, of: Callable[[Tensor], Tensor], post_norm: str, *, positional: bool) -> Float[Tensor, "writer one own_pos width"]:
    """Mean over examples (and positions) of what every writer writes on the corrupted prompts, summed in float64; never over writers."""
    total, count = torch.zeros(()), 0
    for batch in task.batches(rows_per_pass(model, task, pass_bytes(model) / 3), model.device):
        values = of(precise(contributions(model, batch.corrupted, post_norm).values))
        total = total + values.sum(1 if positional else (1, 2), keepdim=True)
        count += len(batch) if positional else batch.corrupted.numel()
    return total / count


def check_lengths(task: Task, train: Task) -> None:
    """Refuse positional means where positions do not line up by index.

    Raises:
        CircuitError: prompts of several lengths or templates, or of another length than the training examples.
    """
    lengths, own = (sorted({len(pair) for pair in part.pairs}) for part in (task, train))
    if lengths != own or len(own) != 1:
        raise CircuitError(
            f"positional means need prompts of one length, the same on both sides; {train.name} has {own} tokens and {task.name} {lengths}. "
            f"Use ablation='mean', or examples of one length."
        )
    if len({(pair.template, tuple(sorted(pair.positions.items()))) for pair in (*task.pairs, *train.pairs)}) > 1:
        raise CircuitError(
            f"positional means need examples of one template with its roles at the same positions; {train.name} has several. Use ablation='mean'."
        )


def still_falling(provenance: Mapping[str, Any]) -> list[str]:
    """A line that says which circuits' constants were not fitted to the end; none where all were, or nothing was fitted."""
    falling = [name for name, fit in provenance.get("optimal_losses", {}).items() if fit["still_falling"]]
    if not falling:
        return []
    steps = provenance["optimal_fit"]["steps"]
    return [f"  The fitted constants of {', '.join(falling)} were still improving after {steps} steps; raise OptimalFit.steps."]
