"""What the edges outside a circuit carry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.evaluation.runner import Progress, checked, distinct, full_divergence, key_of, masks_on, rows_per_pass, with_full_logits
from patchlab.engine.contributions import Contributions, contributions, post_norm_problem, post_norm_record
from patchlab.engine.masked import pass_bytes, row_bytes, run_circuits, slices
from patchlab.errors import CircuitError, unknown
from patchlab.models import Model
from patchlab.tasks.task import Batch, Task

ABLATIONS = {
    "resample": "what the writer writes on the corrupted prompt of the same pair",
    "zero": "nothing",
    "mean": "the mean of what it writes on corrupted prompts, over examples and positions",
    "mean_positional": "that mean at each position, over examples",
    "optimal": "a constant, fitted so that the ablated circuit's output is as close as possible to the full model's (Li & Janson 2024)",
}

WHOLE = 2**62
"""A budget that never cuts: all rows that are differentiated at once are one pass."""


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


@dataclass(frozen=True)
class Ablation:
    """An ablation that is ready to use on the batches of a task: :meth:`of` gives the ablated contributions.

    ``losses`` collects, per fitted circuit, KL to the full model in nats (mean over training examples) at the means and at the best step,
    and whether the last quarter of the steps still lowered it by more than a tenth.
    """

    kind: str
    model: Model
    constants: Contributions | None
    train: Task | None
    fit: OptimalFit
    post_norm: str = "renormalised"
    spread: Float[Tensor, "writer one one one"] | None = None
    losses: dict[bytes, tuple[float, float, bool]] = field(default_factory=dict, repr=False)

    def of(self, batch: Batch) -> Contributions:
        """What every writer is ablated to on the prompts of a batch."""
        return contributions(self.model, batch.corrupted, self.post_norm) if self.constants is None else self.constants

    def measure(
        self,
        circuits: Sequence[Circuit],
        task: Task,
        *,
        batch_size: int | None = None,
        max_bytes: int | float | None = None,
        done: Progress | None = None,
    ) -> Float[np.ndarray, "circuit example"]:
        """The task's metric of every circuit on every example; equal circuits are run once."""
        unlike, places = distinct(circuits)
        values = np.zeros((len(unlike), len(task)))
        budget = pass_bytes(self.model) if max_bytes is None else max_bytes
        batches = task.batches(batch_size or rows_per_pass(self.model, task, budget), self.model.device)
        for some in slices(len(unlike), self._fitted_at_once(budget)):
            constants = self.fitted_to(unlike[some], max_bytes) if self.kind == "optimal" else None
            for batch in batches:
                ablated = self.of(batch) if constants is None else constants
                program, columns = with_full_logits(self.model, batch, task.metric), batch.examples.cpu().numpy()
                for part in slices(len(unlike[some]), _masked_at_once(unlike, batch, budget)):
                    keep = masks_on(unlike[some][part], task, batch)
                    with torch.no_grad():
                        found = run_circuits(self.model, program, ablated.circuits(part), keep, max_bytes=max_bytes)
                    values[some.start + part.start : some.start + part.stop, columns] = found.double().cpu().numpy()
                    if done is not None:
                        done(found.numel())
        return values[places]

    def losses_of(self, circuits: Mapping[str, Circuit]) -> dict[str, Any]:
        """How far the fit of each circuit's constants got, for the provenance; nothing for ablations that are not fitted."""
        found = {name: self.losses[key_of(circuit)] for name, circuit in circuits.items() if key_of(circuit) in self.losses}
        names = ("at_mean", "final", "still_falling")
        return {"optimal_losses": {name: dict(zip(names, values, strict=True)) for name, values in found.items()}} if found else {}

    def provenance(self) -> dict[str, Any]:
        """What it is, as JSON: the examples, and for fitted constants the budget."""
        record: dict[str, Any] = {"ablation": self.kind, "ablation_is": ABLATIONS[self.kind], **post_norm_record(self.model, self.post_norm)}
        if self.train is not None:
            record["ablation_examples"] = f"{self.train.name}[{len(self.train)}]"
        if self.kind == "optimal":
            record["optimal_fit"] = asdict(self.fit)
        return record

    def fitted_to(self, circuits: Sequence[Circuit], max_bytes: int | float | None = None) -> Contributions:
        """Constants for each of some circuits, fitted on the training examples at once; their losses go to :attr:`losses`.

        Raises:
            CircuitError: an ablation without training examples, or circuits whose positions the examples lack.
        """
        if self.train is None or self.constants is None or self.spread is None:
            raise CircuitError("optimal ablation is fitted on training examples; make it with ablation_for(..., 'optimal', train=task).")
        for circuit in circuits:
            checked(circuit, self.model, self.train)
        mean, spread, model = self.constants.values, self.spread, self.model
        budget = (pass_bytes(model) if max_bytes is None else max_bytes) / 4  # a backward pass keeps about that many times more
        length = max(len(pair) for pair in self.train.pairs)
        rows = max(1, int(budget // (row_bytes(model, length) * len(circuits))))
        parts = []
        for batch in self.train.batches(rows, model.device):
            program = with_full_logits(model, batch, full_divergence(self.train.metric.reads))
            parts.append((program, masks_on(circuits, self.train, batch)))
        with torch.enable_grad():
            shift = torch.zeros(len(circuits), *mean.shape, dtype=torch.promote_types(mean.dtype, torch.float32), device=mean.device)
            optimizer = torch.optim.Adam([shift.requires_grad_()], lr=self.fit.lr)
            best, history = shift.detach().clone(), []
            for _ in range(self.fit.steps + 1):
                optimizer.zero_grad()
                loss = torch.zeros(len(circuits), device=mean.device)
                for program, keep in parts:
                    constants = Contributions((mean + spread * shift).to(mean.dtype), self.post_norm)
                    divergence = -run_circuits(model, program, constants, keep, max_bytes=WHOLE).sum(1) / len(self.train)
                    divergence.sum().backward()
                    loss += divergence.detach()
                better = loss < torch.stack(history).amin(0) if history else torch.ones_like(loss, dtype=torch.bool)
                best[better] = shift.detach()[better]
                history.append(loss)
                optimizer.step()
        final, before = (torch.stack(history[:steps]).amin(0) for steps in (len(history), 1 + 3 * self.fit.steps // 4))
        ends = zip(history[0].tolist(), final.tolist(), (final < 0.9 * before).tolist(), strict=True)
        self.losses.update(zip(map(key_of, circuits), ends, strict=True))
        return Contributions((mean + spread * best).to(mean.dtype), self.post_norm)

    def _fitted_at_once(self, budget: int | float) -> int:
        """How many circuits get their constants fitted together."""
        if self.kind != "optimal" or self.train is None:
            return 2**62
        return max(1, int(budget // (4 * row_bytes(self.model, max(len(pair) for pair in self.train.pairs)))))


def _masked_at_once(circuits: Sequence[Circuit], batch: Batch, budget: int | float) -> int:
    """How many circuits' masks are set up together."""
    each = circuits[0].graph.allowed.size
    if any(circuit.n_positions for circuit in circuits):
        each *= batch.clean.numel()
    return max(1, int(budget // each))


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
        raise CircuitError("optimal ablation fits its constants on examples of their own; pass train=, another part of the task (circuits.split).")
    if kind != "optimal" and fit is not None:
        raise CircuitError(f"fit= is the budget of optimal ablation, and {kind!r} fits nothing; leave it out, or pass ablation='optimal'.")
    if (problem := post_norm_problem(model, post_norm)) is not None:
        raise CircuitError(problem)
    source = None if kind in ("resample", "zero") else train or task
    fit = fit or OptimalFit()
    if source is None:
        zeros = torch.zeros(len(model.arch.graph.writers), 1, 1, model.arch.d_model, dtype=model.dtype, device=model.device)
        return Ablation(kind, model, Contributions(zeros, post_norm) if kind == "zero" else None, None, fit, post_norm)
    if kind == "mean_positional":
        _check_lengths(task, source)
    mean = _mean(model, source, lambda values: values, post_norm, positional=kind == "mean_positional")
    spread = None
    if kind == "optimal":
        spread = _mean(model, source, lambda values: (values - mean).pow(2).mean(-1, keepdim=True), post_norm, positional=False)
        spread = spread.sqrt().clamp_min(1e-6).to(model.dtype)
    return Ablation(kind, model, Contributions(mean.to(model.dtype), post_norm), source, fit, post_norm, spread)


def _mean(model: Model, task: Task, of: Callable[[Tensor], Tensor], post_norm: str, *, positional: bool) -> Float[Tensor, "writer one own_pos width"]:
    """Mean over examples (and positions) of what every writer writes on the corrupted prompts, summed in float64; never over writers."""
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in task.batches(rows_per_pass(model, task, pass_bytes(model) / 3), model.device):
        values = of(contributions(model, batch.corrupted, post_norm).values.double())
        total = total + values.sum(1 if positional else (1, 2), keepdim=True)
        count += len(batch) if positional else batch.corrupted.numel()
    return total / count


def _check_lengths(task: Task, train: Task) -> None:
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
