"""A stand-in for a model, for tests of tasks in which only the tokenizer counts."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class Stub:
    """A model for which only the tokenizer counts; ``logits`` gives the logits of the last position for a row of tokens."""

    tokenizer: Any = None
    vocab_size: int = 12
    bos_id: int | None = None
    logits: Any = None
    name: str = "stub"
    device: str = "cpu"
    n_positions: int | None = None

    def run(self, tokens: torch.Tensor) -> Any:
        rows = torch.stack([self.logits(row) for row in tokens])
        return SimpleNamespace(logits=rows[:, None, :].expand(-1, tokens.shape[1], -1))


def with_gpt2_tokenizer(shared: Path) -> Stub:
    """The stand-in with GPT-2's byte-pair encoding."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "data" / "tokenizers" / "gpt2")
    return Stub(tokenizer, len(tokenizer), tokenizer.bos_token_id, name="gpt2")
