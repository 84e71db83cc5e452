"""Metrics: one number per example, higher = more of the behaviour.

A :class:`Metric` declares what it reads (the answer position or all positions; the answer columns or the
whole vocabulary; the clean run's logits), so that an engine can compute just that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.errors import MetricError, unknown
from patchlab.grammar import enter


@dataclass(frozen=True)
class Answers:
    """The answers of a batch of examples, as columns of the logits that the metric is given.

    Rows with fewer answers than the widest carry False in the mask. ``clean_logits`` (same shape as the logits)
    is there for metrics with ``needs_clean``.
    """

    correct: Int[Tensor, "batch n_correct"]
    correct_mask: Bool[Tensor, "batch n_correct"]
    incorrect: Int[Tensor, "batch n_incorrect"]
    incorrect_mask: Bool[Tensor, "batch n_incorrect"]
    clean_logits: Float[Tensor, "batch *rest"] | None = None

    @property
    def batch(self) -> int:
        """Number of examples."""
        return self.correct.shape[0]

    def rows(self, index: Int[Tensor, " rows"]) -> "Answers":
        """The answers of the given examples, in that order (an example may appear several times)."""
        return Answers(
            self.correct[index],
            self.correct_mask[index],
            self.incorrect[index],
            self.incorrect_mask[index],
            None if self.clean_logits is None else self.clean_logits[index],
        )

    @staticmethod
    def of(correct: list[list[int]], incorrect: list[list[int]], device: torch.device | str = "cpu") -> "Answers":
        """Build from token ids per example."""
        return Answers(*_padded(correct, device), *_padded(incorrect, device))


def _padded(rows: list[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    width = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids.to(device), mask.to(device)


MetricFunction = Callable[[Tensor, Answers], Tensor]


@dataclass(frozen=True)
class Metric:
    """A function of logits with one value per example.

    Args:
        name: how it appears in results.
        function: ``(logits, answers) -> [batch]``. Logits are ``[batch, columns]`` at the answer position for
            ``reads="answer"``, else ``[batch, pos, columns]``.
        unit: of the values: ``logits``, ``nats`` or ``probability``.
        reads: ``answer`` (the last position) or ``all`` positions.
        columns: ``answers`` if only the logits of the answer tokens enter (the engine may then leave out the
            rest and renumber the answers), ``vocabulary`` otherwise.
        needs_clean: the clean run's logits are needed in ``answers.clean_logits``.
        vanishes_at_clean: the gradient is zero at the clean run, so a one-point noising method has nothing to use.

    Example:
        >>> Metric("margin", lambda logits, a: logits.amax(-1), unit="logits").name
        'margin'
    """

    name: str
    function: MetricFunction
    unit: str = "logits"
    reads: Literal["answer", "all"] = "answer"
    columns: Literal["answers", "vocabulary"] = "vocabulary"
    needs_clean: bool = False
    vanishes_at_clean: bool = False

    def __call__(self, logits: Float[Tensor, "batch *rest"], answers: Answers) -> Float[Tensor, " batch"]:
        """One value per example.

        Raises:
            MetricError: the function returned another shape.
        """
        values = self.function(logits, answers)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise MetricError(
                f"metric {self.name!r} returned {got} for {logits.shape[0]} examples; return one value per example, shape [{logits.shape[0]}]."
            )
        return values

    def check_independent(self, logits: Float[Tensor, "batch *rest"], answers: Answers) -> None:
        """Check that no example's value depends on the other examples of the batch.

        Raises:
            MetricError: a value changes when its example is evaluated alone.
        """
        together = self(logits, answers)
        for i in range(logits.shape[0]):
            one = torch.tensor([i], device=logits.device)
            alone = self(logits[one], answers.rows(one))
            if not torch.allclose(alone[0], together[i], rtol=1e-4, atol=1e-5, equal_nan=True):
                raise MetricError(
                    f"metric {self.name!r} mixes examples: example {i} gives {alone[0].item():.6g} alone and {together[i].item():.6g} in a batch "
                    f"of {logits.shape[0]}. Per-example scores need a metric that treats each row on its own (no mean over the batch)."
                )


METRICS: dict[str, Metric] = {}


def register_metric(name: str, **options: Any) -> Callable[[MetricFunction], MetricFunction]:
    """Decorator that registers a function of ``(logits, answers)`` as a metric, with the other arguments of :class:`Metric`.

    >>> @register_metric("margin", unit="logits")
    ... def margin(logits, answers):
    ...     return logits.amax(-1)
    >>> get_metric("margin") is METRICS.pop("margin")
    True

    Raises:
        MetricError: the name is taken or malformed.
    """

    def register(function: MetricFunction) -> MetricFunction:
        enter(METRICS, "metric", name, Metric(name, function, **options), MetricError)
        return function

    return register


def _gathered(logits: Float[Tensor, "batch columns"], ids: Tensor, mask: Tensor, fill: float) -> Float[Tensor, "batch n"]:
    return logits.gather(-1, ids).masked_fill(~mask, fill)


def _mean(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return _gathered(logits, ids, mask, 0.0).sum(-1) / mask.sum(-1)


@register_metric("logit_diff", columns="answers")
def _logit_diff(logits: Float[Tensor, "batch columns"], a: Answers) -> Float[Tensor, " batch"]:
    return _mean(logits, a.correct, a.correct_mask) - _mean(logits, a.incorrect, a.incorrect_mask)


@register_metric("logprob_diff", unit="nats", columns="answers")
def _logprob_diff(logits: Float[Tensor, "batch columns"], a: Answers) -> Float[Tensor, " batch"]:
    # the normaliser of the softmax is the same in both terms and cancels
    correct = _gathered(logits, a.correct, a.correct_mask, -torch.inf).logsumexp(-1)
    return correct - _gathered(logits, a.incorrect, a.incorrect_mask, -torch.inf).logsumexp(-1)


@register_metric("max_diff", columns="answers")
def _max_diff(logits: Float[Tensor, "batch columns"], a: Answers) -> Float[Tensor, " batch"]:
    # the best answer of each side: above 0 where a choice among all of them would be right
    correct = _gathered(logits, a.correct, a.correct_mask, -torch.inf).amax(-1)
    return correct - _gathered(logits, a.incorrect, a.incorrect_mask, -torch.inf).amax(-1)


@register_metric("prob_diff", unit="probability")
def _prob_diff(logits: Float[Tensor, "batch columns"], a: Answers) -> Float[Tensor, " batch"]:
    probabilities = logits.softmax(-1)
    correct = _gathered(probabilities, a.correct, a.correct_mask, 0.0).sum(-1)
    return correct - _gathered(probabilities, a.incorrect, a.incorrect_mask, 0.0).sum(-1)


@register_metric("neg_kl", unit="nats", needs_clean=True, vanishes_at_clean=True)
def _neg_kl(logits: Float[Tensor, "batch columns"], a: Answers) -> Float[Tensor, " batch"]:
    if a.clean_logits is None:
        raise MetricError("neg_kl compares with the clean run, whose logits are missing; evaluate it through a task.")
    return -divergence(a.clean_logits, logits)


def divergence(of: Float[Tensor, "batch *rest"], from_: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """KL divergence of the distributions that logits give, in nats: Σ p (log p − log q) over the vocabulary and any positions."""
    log_p, log_q = of.log_softmax(-1), from_.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).flatten(1).sum(1)


PACKAGED = frozenset(METRICS.values())
"""The metrics that patchlab comes with: they are known to treat examples apart."""


def get_metric(metric: str | Metric | MetricFunction) -> Metric:
    """A metric by name, a :class:`Metric` as it is, or a plain function of ``(logits, answers)``.

    Raises:
        MetricError: unknown name.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise MetricError(unknown("metric", metric, METRICS))
        return METRICS[metric]
    if callable(metric):
        return Metric(getattr(metric, "__name__", "custom"), metric)
    raise MetricError(f"a metric is a name, a Metric or a function of (logits, answers); got {type(metric).__name__}.")
