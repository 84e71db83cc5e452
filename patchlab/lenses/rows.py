"""Rows: the prompts that a readout is given, a task's or plain ones, in batches of one length and with the positions that line up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from patchlab.errors import LensError, TaskError, unknown
from patchlab.metrics import Answers, Metric
from patchlab.models import Model
from patchlab.tasks.task import SIDES, PositionAxis, Task
from patchlab.texts import Texts

Prompts = Task | str | Sequence[Any] | Tensor
"""What readouts take: a task, a text, texts or rows of token ids of one length, or a tensor of them."""
Corpus = Texts | Task | Sequence[Any] | Tensor
"""What looks at many tokens takes: rows of :mod:`patchlab.texts`, a task (its clean prompts), texts or rows of token ids, a tensor of them."""


@dataclass(frozen=True)
class RowBatch:
    """Rows of one length. ``clean`` are the clean prompts of a task, for metrics that compare with them."""

    tokens: Int[Tensor, "row pos"]
    examples: Int[Tensor, " row"]
    positions: Mapping[str, Int[Tensor, " row"]]
    answers: Answers | None
    clean: Int[Tensor, "row pos"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Rows:
    """Batches of rows, how their positions line up, and what they are called. ``metric`` is None for plain prompts."""

    batches: tuple[RowBatch, ...]
    axis: PositionAxis
    subject: str
    side: str
    metric: Metric | None

    def __len__(self) -> int:
        return len(self.axis.index)

    def at(self, batch: RowBatch) -> Int[Tensor, "row pos"]:
        """The token positions of a batch's rows that the cells of the axis lie at."""
        return torch.as_tensor(self.axis.index[batch.examples.cpu().numpy()], device=batch.tokens.device)


def rows_of(model: Model, prompts: Prompts, *, side: str = "clean", batch_size: int | None = None) -> Rows:
    """The rows of a task's ``side``, or of plain prompts.

    Raises:
        TaskError: another side than ``clean`` or ``corrupted``.
        LensError: prompts of several lengths, none at all, or ids that the model does not have.
    """
    if side not in SIDES:
        raise TaskError(unknown("side", side, SIDES))
    if isinstance(prompts, Task):
        largest = max(max(*pair.clean_ids, *pair.corrupted_ids, *pair.correct, *pair.incorrect) for pair in prompts.pairs)
        if largest >= model.vocab_size:
            raise LensError(f"task {prompts.name} has token id {largest}, but {model.name} has {model.vocab_size} tokens. Load the task with it.")
        batches = tuple(
            RowBatch(getattr(batch, side), batch.examples, batch.positions, batch.answers, batch.clean)
            for batch in prompts.batches(batch_size, model.device)
        )
        return Rows(batches, _on_side(prompts, side), f"{model.name} × {prompts.name}[{len(prompts)}]", side, prompts.metric)
    ids = token_ids(model, prompts)
    size = batch_size or len(ids)
    numbers = torch.arange(len(ids), device=model.device)
    last = torch.full((len(ids),), ids.shape[1] - 1, device=model.device)
    found = tuple(
        RowBatch(ids[part], numbers[part], {"END": last[part]}, None, ids[part]) for part in (slice(i, i + size) for i in range(0, len(ids), size))
    )
    index = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    texts = tuple(tuple(token_text(model, token) for token in row) for row in ids.tolist())
    return Rows(found, PositionAxis(None, index, texts), f"{model.name} × {len(ids)} prompts", side, None)


def _on_side(task: Task, side: str) -> PositionAxis:
    """The task's position axis with the tokens of a side."""
    axis = task.position_axis()
    if side == "clean":
        return axis
    texts = tuple(tuple(task.token_text(pair.corrupted_ids[int(p)]) for p in places) for pair, places in zip(task.pairs, axis.index, strict=True))
    return PositionAxis(axis.names, axis.index, texts, axis.roles, axis.note)


def token_ids(model: Model, prompts: str | Sequence[Any] | Tensor) -> Int[Tensor, "row pos"]:
    """Plain prompts as token ids on the model's device.

    Raises:
        LensError: prompts of several lengths, none at all, or ids that the model does not have.
        ModelError: text, and the model has no tokenizer.
    """
    if isinstance(prompts, Tensor):
        ids = prompts[None] if prompts.ndim == 1 else prompts
        if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.dtype == torch.bool:
            raise LensError(f"token ids are whole numbers of shape [row, pos]; got shape {list(prompts.shape)} of {prompts.dtype}.")
    else:
        given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        lists = [model.to_ids(row) if isinstance(row, str) else row for row in given]
        lists = [lists] if lists and isinstance(lists[0], int) else [list(row) for row in lists]
        lengths = sorted({len(row) for row in lists})
        if len(lengths) != 1 or lengths[0] == 0:
            raise LensError(f"prompts need one common number of tokens, at least 1; got {lengths or 'no prompts'}. Read lengths apart, or as a task.")
        ids = torch.tensor(lists, dtype=torch.long)
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.vocab_size:
        raise LensError(f"token ids must lie in 0 to {model.vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}.")
    if model.n_positions is not None and ids.shape[1] > model.n_positions:
        raise LensError(f"the prompts have {ids.shape[1]} tokens, and {model.name} reads {model.n_positions} at most. Cut them.")
    return ids.to(model.device, torch.long)


def by_length(model: Model, rows: Corpus) -> list[tuple[Int[np.ndarray, " row"], Int[Tensor, "row pos"]]]:
    """The rows of a corpus, whose lengths may differ: for each length the numbers of its rows and their token ids, on the model's device.

    Raises:
        LensError: no rows, a path in their place, or ids that the model has not.
    """
    if isinstance(rows, Task):
        return [(batch.examples.cpu().numpy(), batch.tokens) for batch in rows_of(model, rows).batches]
    if isinstance(rows, (str, Path)):
        raise LensError(f"rows are texts, lists of token ids, a tensor or a task; got {rows!r}. For a file take patchlab.texts.read(path, model).")
    if isinstance(rows, Tensor):
        ids = token_ids(model, rows)
        return [(np.arange(len(ids)), ids)]
    if isinstance(rows, Texts):
        return [(numbers, token_ids(model, ids)) for numbers, ids in rows.batches(rows.n_tokens * max(map(len, rows.rows)))]
    lists = [model.to_ids(row) if isinstance(row, str) else [int(token) for token in row] for row in rows]
    if not lists:
        raise LensError("there are no rows; give at least one.")
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(lists):
        groups.setdefault(len(row), []).append(number)
    return [(np.array(numbers), token_ids(model, [lists[i] for i in numbers])) for numbers in groups.values()]


def token_text(model: Model, token: int) -> str:
    """The text of a token id (the id in brackets where there is no tokenizer)."""
    return f"[{token}]" if model.tokenizer is None else model.tokenizer.decode([token], clean_up_tokenization_spaces=False)


def batch_rows(model: Model, length: int, most: int = 2**26) -> int:
    """Rows per batch so that the logits of all positions are at most so many numbers."""
    return max(1, most // (length * model.vocab_size))
