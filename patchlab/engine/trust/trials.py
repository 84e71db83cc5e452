"""Trials: random prompts on which two ways of computing the same are compared, and how far apart the two may be."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.engine.program import Program, row_numbers
from patchlab.metrics import METRICS, Answers, Metric


def tolerance(dtype: torch.dtype = torch.float32, *, whole: bool = False) -> float:
    """Largest difference between two ways of computing the same, as a share of the scale: tight enough to notice a missing softcap.

    Rounding in float32, whatever the model's dtype: some norms and softmaxes compute in it, and checks of models in half precision run in it.

    Args:
        dtype: float64 where what is compared is in float64 all the way.
        whole: both ways run through the whole model, and add up in different orders.
    """
    if dtype == torch.float64:
        return 1e-6
    rounding = 1e-4 if torch.get_float32_matmul_precision() == "highest" else 2e-2
    return max(2e-3, rounding) if whole else rounding


@dataclass(frozen=True)
class Trial:
    """Two random prompts, with answers."""

    tokens: Int[Tensor, "row pos"]
    vocab_size: int

    @property
    def middle(self) -> int:
        """The position in the middle."""
        return self.tokens.shape[1] // 2

    @property
    def answers(self) -> Answers:
        """A correct and an incorrect answer for each."""
        return Answers.of([[0], [1]], [[2 % self.vocab_size], [3 % self.vocab_size]], self.tokens.device)

    def other(self, where: slice) -> Int[Tensor, "row pos"]:
        """The prompts with other tokens at some positions."""
        tokens = self.tokens.clone()
        tokens[:, where] = (tokens[:, where] + 1) % self.vocab_size
        return tokens

    def program(self, metric: Metric = METRICS["logit_diff"], **options: Any) -> Program:
        """A run of the prompts that evaluates a metric."""
        return Program(self.tokens, row_numbers(self.tokens), metric=metric, answers=self.answers, **options)


def trial(model: BridgedModel, length: int = 5, *, seed: int = 1) -> Trial:
    """Random prompts of a length, or as long as the model reads, the same whenever they are asked for."""
    arch = model.arch
    shape = (2, min(length, arch.n_positions or length))
    tokens = torch.randint(0, arch.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return Trial(tokens.to(model.device), arch.vocab_size)


def every_logit(reads: Literal["answer", "all"]) -> Metric:
    """A metric that no change of the logits leaves alone: their sum with weights from −1 to 1."""
    return Metric("sum of logits", _weighed, reads=reads)


def _weighed(logits: Tensor, answers: Answers) -> Tensor:
    return (logits * torch.linspace(-1, 1, logits.shape[-1]).to(logits)).flatten(1).sum(1)
