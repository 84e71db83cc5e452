"""Tasks: pairs of prompts of equal length, their answers and the metric, as token ids."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.errors import TaskError, unknown
from patchlab.host import to_array
from patchlab.metrics import METRICS, Answers, Metric, get_metric

END = "END"
SIDES = ("clean", "corrupted")


@runtime_checkable
class TaskModel(Protocol):
    """What a task asks of a model: its tokenizer, its vocabulary size and a forward pass, ``run(tokens).logits``."""

    @property
    def name(self) -> str:
        """As it appears in messages."""
        ...

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer, or None."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a prompt, or None."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        ...

    @property
    def n_positions(self) -> int | None:
        """Length of the longest prompt it reads; None where nothing limits it."""
        ...

    @property
    def device(self) -> torch.device | str:
        """Where tokens must be."""
        ...

    @property
    def run(self) -> Callable[..., Any]:
        """A forward pass: ``run(tokens).logits`` is [batch, pos, vocab]."""
        ...


@dataclass(frozen=True)
class Pair:
    """One clean prompt, its corrupted twin of the same length, and the answers.

    ``positions`` names token positions of the clean prompt (``END``, the last one, is added where it is missing);
    pairs of one ``template`` and one length are aligned by index.

    Raises:
        TaskError: unequal lengths, an empty or identical pair, no correct answer, an answer that is both
            correct and incorrect, or a position outside the prompt.
    """

    clean_ids: tuple[int, ...]
    corrupted_ids: tuple[int, ...]
    correct: tuple[int, ...]
    incorrect: tuple[int, ...]
    positions: Mapping[str, int] = field(default_factory=dict, hash=False)
    template: str = ""

    def __post_init__(self) -> None:
        length = len(self.clean_ids)
        if length != len(self.corrupted_ids):
            raise TaskError(
                f"clean has {length} tokens and corrupted {len(self.corrupted_ids)}. Patching needs equal lengths: "
                f"change the words that differ so that they take the same number of tokens."
            )
        if not length:
            raise TaskError("the prompts have no tokens; a pair needs at least one.")
        if self.clean_ids == self.corrupted_ids:
            raise TaskError("clean and corrupted are identical, so no patch can have an effect; change at least one token.")
        if not self.correct:
            raise TaskError("there is no correct answer; give at least one.")
        if both := sorted(set(self.correct) & set(self.incorrect)):
            raise TaskError(f"the answer ids {both} are both correct and incorrect; each answer belongs on one side.")
        object.__setattr__(self, "positions", {**self.positions, END: self.positions.get(END, length - 1)})
        for name, index in self.positions.items():
            if not 0 <= index < length:
                raise TaskError(f"position {name} is {index}, outside a prompt of {length} tokens (0 to {length - 1}).")
        if self.positions[END] != length - 1:
            raise TaskError(f"position END is {self.positions[END]}; it names the last token, {length - 1}.")

    def __len__(self) -> int:
        return len(self.clean_ids)


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length for :meth:`patchlab.Model.run`, which example each row is, and where the named positions lie in each."""

    tokens: Int[Tensor, "row pos"]
    examples: Int[Tensor, " row"]
    positions: Mapping[str, Int[Tensor, " row"]]


@dataclass(frozen=True)
class Batch:
    """Pairs of one length, as tensors. ``examples`` are their indices in the task (on the CPU), ``positions`` the named positions that all have."""

    examples: Int[Tensor, " batch"]
    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    answers: Answers
    positions: Mapping[str, Int[Tensor, " batch"]]

    def __len__(self) -> int:
        return self.clean.shape[0]

    @cached_property
    def first_difference(self) -> int:
        """First position at which any pair differs (0 if none does): with paired sources nothing before it can change."""
        return int((self.clean != self.corrupted).any(0).int().argmax())

    def rows(self, index: Int[np.ndarray, " row"]) -> "Batch":
        """Some of the pairs."""
        chosen = torch.as_tensor(index)
        there = chosen.to(self.clean.device)
        positions = {name: at[there] for name, at in self.positions.items()}
        return Batch(self.examples[chosen], self.clean[there], self.corrupted[there], self.answers.rows(there), positions)

    def prompts(self, side: str) -> Prompts:
        """The ``clean`` or the ``corrupted`` prompts, to run with edits at named positions.

        Raises:
            TaskError: another side.
        """
        if side not in SIDES:
            raise TaskError(unknown("side", side, SIDES))
        return Prompts(getattr(self, side), self.examples, self.positions)


@dataclass(frozen=True)
class PositionAxis:
    """How the positions of a task's examples line up.

    Cell p of the axis lies at token ``index[e, p]`` of example e. ``names`` is None where positions are aligned
    by index; ``tokens[e][p]`` is the text of the clean token there, and ``roles[p]`` the cell's named position ("" where it has
    none), also on an axis aligned by index. ``note`` says what the axis leaves out ("": nothing).
    """

    names: tuple[str, ...] | None
    index: Int[np.ndarray, "example pos"]
    tokens: tuple[tuple[str, ...], ...]
    roles: tuple[str, ...] = ()
    note: str = ""

    def __len__(self) -> int:
        return self.index.shape[1]


@dataclass(frozen=True)
class Task:
    """Pairs of prompts, the metric that reads the answers, and where they come from.

    Make one with :func:`patchlab.load_task` or :meth:`from_pairs`. ``provenance`` is JSON-able: generator or file, options, seed, bos, tokenizer.
    ``scored_positions`` are the named positions that sites are scored at (None: all that line up); see :meth:`at_positions`.

    Args:
        metric: a Metric, or the name of one.

    Raises:
        TaskError: no pairs.
        MetricError: unknown name.
    """

    name: str
    pairs: tuple[Pair, ...]
    metric: Metric
    provenance: dict[str, Any] = field(default_factory=dict, hash=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    scored_positions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", get_metric(self.metric))
        if not self.pairs:
            raise TaskError(f"task {self.name} has no pairs; it needs at least one.")

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        lengths = sorted({len(pair) for pair in self.pairs})
        tokens = f"{lengths[0]} tokens" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]} tokens in {len(lengths)} lengths"
        templates = len({pair.template for pair in self.pairs})
        text = f"Task({self.name}[{len(self)}], {self.metric.name}, {tokens}"
        text += f", {templates} templates" if templates > 1 else ""
        return f"{text}; positions {' '.join(self.position_names())})"

    @classmethod
    def from_pairs(cls, model: TaskModel, pairs: Sequence[Any], *, name: str = "pairs", **options: Any) -> "Task":
        """A task from a Python list.

        Args:
            model: its tokenizer makes the ids.
            pairs: each a :class:`Pair`, a dictionary with the fields of a task file (``clean``, ``corrupted``, ``correct``, ``incorrect``,
                and, if wanted, ``positions``, ``template``, ...), or a tuple of the first four.
            name: how results refer to it.
            options: as of :func:`patchlab.load_task` for a file: ``bos``, ``only_correct``, ``metric``, ``chat``, ``on_mismatch``, ...

        Raises:
            TaskError: no pairs, or one that cannot be used; the message names it.

        Example:
            >>> pl.Task.from_pairs(model, [("Mary and John ... John gave to", "Mary and John ... Mary gave to", "Mary", "John")])  # doctest: +SKIP
        """
        from patchlab.tasks.load import task_of_pairs  # which stands on this module

        return task_of_pairs(model, pairs, name=name, **options)

    def describe(self, n: int | None = 3) -> str:
        """The first n pairs (None: all) in words: the tokens of both prompts with their positions and names, and the answers."""
        shown = self.pairs if n is None else self.pairs[:n]
        parts = [repr(self)] + [self._described(i, pair) for i, pair in enumerate(shown)]
        left = len(self) - len(shown)
        return "\n\n".join(parts + [f"... and {left} more pair{'s' * (left > 1)}"] * bool(left))

    def show(self, n: int | None = 3) -> None:
        """Write :meth:`describe` to standard output."""
        sys.stdout.write(self.describe(n) + "\n")

    def _described(self, i: int, pair: Pair) -> str:
        names: dict[int, list[str]] = {}
        for name, place in pair.positions.items():
            names.setdefault(place, []).append(name)
        rows = [("pos", "clean", "corrupted", "names")]
        for place, (clean, corrupted) in enumerate(zip(pair.clean_ids, pair.corrupted_ids, strict=True)):
            other = "" if clean == corrupted else repr(self.token_text(corrupted))
            rows.append((str(place), repr(self.token_text(clean)), other, " ".join(names.get(place, ()))))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        answers = [", ".join(repr(self.token_text(token)) for token in side) or "none" for side in (pair.correct, pair.incorrect)]
        return "\n".join([f"pair {i}: correct {answers[0]}, incorrect {answers[1]}", *lines])

    @property
    def fingerprint(self) -> str:
        """Hash of the token ids, the answers and the name of the metric."""
        rows = [[pair.clean_ids, pair.corrupted_ids, pair.correct, pair.incorrect] for pair in self.pairs]
        return hashlib.sha256(json.dumps([rows, self.metric.name]).encode()).hexdigest()[:16]

    @property
    def pair_fingerprints(self) -> tuple[str, ...]:
        """A hash of the token ids of each pair: whether two tasks share examples."""
        return tuple(hashlib.sha256(json.dumps([pair.clean_ids, pair.corrupted_ids]).encode()).hexdigest()[:12] for pair in self.pairs)

    def batches(self, batch_size: int | None = None, device: torch.device | str = "cpu") -> list[Batch]:
        """The pairs as tensors: grouped by length, then cut into batches (None: one batch per length).

        Raises:
            TaskError: batch_size < 1.
        """
        if batch_size is not None and batch_size < 1:
            raise TaskError(f"batch_size is {batch_size}; it must be at least 1 (or None for one batch per length).")
        groups: dict[int, list[int]] = {}
        for i, pair in enumerate(self.pairs):
            groups.setdefault(len(pair), []).append(i)
        batches = []
        for group in groups.values():
            size = batch_size or len(group)
            for chunk in (group[start : start + size] for start in range(0, len(group), size)):
                pairs = [self.pairs[i] for i in chunk]
                batches.append(
                    Batch(
                        torch.tensor(chunk),
                        torch.tensor([pair.clean_ids for pair in pairs], device=device),
                        torch.tensor([pair.corrupted_ids for pair in pairs], device=device),
                        Answers.of([list(pair.correct) for pair in pairs], [list(pair.incorrect) for pair in pairs], device),
                        {name: torch.tensor([pair.positions[name] for pair in pairs], device=device) for name in _common_names(pairs)},
                    )
                )
        return batches

    def prompts(self, side: str, device: torch.device | str = "cpu") -> Prompts:
        """All ``clean`` or all ``corrupted`` prompts, to run with edits at named positions.

        Raises:
            TaskError: prompts of several lengths, or another side.

        Example:
            >>> clean = model.run(task.prompts("clean"), keep="z")  # doctest: +SKIP
            >>> model.run(task.prompts("corrupted"), edits=[pl.Edit("L5.H3.z@S2", clean)])  # doctest: +SKIP
        """
        batches = self.batches(device=device)
        if len(batches) > 1:
            raise TaskError(
                f"a run takes prompts of one length, and {self.name} has lengths {sorted({len(pair) for pair in self.pairs})}. "
                f"Run each of task.batches() apart: batch.prompts({side!r})."
            )
        return batches[0].prompts(side)

    def position_names(self) -> tuple[str, ...]:
        """The named positions that all pairs have, in the order of their mean place."""
        common = _common_names(self.pairs)
        return tuple(sorted(common, key=lambda name: (sum(pair.positions[name] for pair in self.pairs), name == END, name)))

    @property
    def aligned(self) -> bool:
        """Whether positions line up by index: one length, one template, the same named positions."""
        first = self.pairs[0]
        return all(len(pair) == len(first) and pair.template == first.template and pair.positions == first.positions for pair in self.pairs)

    def at_positions(self, *names: str) -> "Task":
        """The task with sites scored at these named positions only, in this order.

        Raises:
            TaskError: no names, one that is given twice, or one that not all pairs have.
        """
        if not names or len(set(names)) < len(names):
            raise TaskError(f"positions to score are different names, at least one; got {', '.join(names) or 'none'}.")
        for name in names:
            if name not in (known := self.position_names()):
                raise TaskError(unknown("position of all pairs", name, known))
        return replace(self, scored_positions=names)

    def position_axis(self) -> PositionAxis:
        """How positions line up across the examples: by index where the pairs share a length, a template and their roles, else by name.

        Pairs that share no name but END line up at END alone; the axis has a note that says so.
        """
        first, note = self.pairs[0], ""
        if self.scored_positions is not None:
            names = self.scored_positions
            index = np.array([[pair.positions[name] for name in names] for pair in self.pairs])
        elif self.aligned:
            names, index = None, np.tile(np.arange(len(first)), (len(self), 1))
        else:
            names = self.position_names()
            if names == (END,):
                templates = len({pair.template for pair in self.pairs})
                note = (
                    f"the pairs of {self.name} (lengths {sorted({len(pair) for pair in self.pairs})}, "
                    f"{templates} template{'s' * (templates > 1)}) share no named position but END, so positions are scored at END alone; "
                    f"name more of them in a positions column, or keep pairs of one length and template"
                )
            index = np.array([[pair.positions[name] for name in names] for pair in self.pairs])
        tokens = tuple(tuple(self.token_text(pair.clean_ids[int(p)]) for p in row) for pair, row in zip(self.pairs, index, strict=True))
        by_place = {place: name for name, place in first.positions.items()}
        roles = tuple(by_place.get(place, "") for place in range(len(first))) if names is None else names
        return PositionAxis(names, index, tokens, roles, note)

    def token_text(self, token: int) -> str:
        """The text of a token id (the id in brackets where there is no tokenizer)."""
        if self.tokenizer is None:
            return f"[{token}]"
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def select(self, indices: Iterable[int] | Int[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> "Task":
        """The task with only these pairs, in this order; or those where a mask such as ``task.solved(model)`` is True.

        Raises:
            TaskError: an index out of range, a mask of another length, or nothing left.
        """
        if isinstance(indices, np.ndarray) and indices.dtype == bool:
            if len(indices) != len(self):
                raise TaskError(f"a mask of {len(indices)} values cannot select from the {len(self)} pairs of {self.name}; give one value per pair.")
            indices = np.flatnonzero(indices)
        chosen = [int(i) for i in indices]
        if bad := [i for i in chosen if not 0 <= i < len(self)]:
            raise TaskError(f"pairs {bad} are not in {self.name}, which has the pairs 0 to {len(self) - 1}.")
        return replace(self, pairs=tuple(self.pairs[i] for i in chosen))

    def split(self, share: float | int = 0.5, *, seed: int = 0) -> "tuple[Task, Task]":
        """Two parts of the task, to choose something on the one and to measure it on the other; equal pairs of prompts stay together.

        Args:
            share: of the examples that go into the first part, between 0 and 1.
            seed: of the draw.

        Raises:
            TaskError: a share that leaves a part empty, or fewer than two distinct pairs.

        Example:
            >>> choosing, held_out = task.split()  # doctest: +SKIP
        """
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(self.pair_fingerprints):
            groups.setdefault(name, []).append(i)
        order = np.random.default_rng(seed).permutation(len(groups))
        members, wanted, first = list(groups.values()), round(share * len(self)), []
        for group in order:
            if len(first) + len(members[group]) / 2 <= wanted:
                first += members[group]
        rest = sorted(set(range(len(self))) - set(first))
        if not first or not rest:
            raise TaskError(
                f"cannot cut {self.name} with {len(self)} examples, {len(groups)} of them distinct, at share {share}: a part would be empty. "
                f"Use more examples, or a share between 0 and 1."
            )
        return self.select(sorted(first)), self.select(rest)

    def with_metric(self, metric: str | Metric | Callable[[Tensor, Answers], Tensor]) -> "Task":
        """The task with another metric: a name, a Metric, or a function of (logits, answers).

        Raises:
            MetricError: unknown name.
        """
        return replace(self, metric=get_metric(metric))

    def _check_vocabulary(self, model: TaskModel) -> None:
        largest = max(max(*pair.clean_ids, *pair.corrupted_ids, *pair.correct, *pair.incorrect) for pair in self.pairs)
        if largest >= model.vocab_size:
            raise TaskError(
                f"task {self.name} has the token id {largest} and {model.name} a vocabulary of {model.vocab_size}: "
                f"the task was made for another tokenizer. Load it again with this model."
            )

    def _values(self, model: TaskModel, metric: Metric, which: Sequence[str]) -> dict[str, Float[np.ndarray, " example"]]:
        self._check_vocabulary(model)
        values = {side: np.zeros(len(self)) for side in which}
        for batch in self.batches(64, model.device):
            for side in which:
                with torch.no_grad():
                    logits = model.run(getattr(batch, side)).logits[:, -1]
                values[side][batch.examples.cpu().numpy()] = to_array(metric(logits, batch.answers))
        return values

    def _choice(self) -> Metric:
        """The metric whose sign says which side the model chose."""
        if any(not pair.incorrect for pair in self.pairs):
            return Metric("is_argmax", _is_argmax, "", columns="vocabulary")
        return METRICS[self.metric.name if self.metric.name in ("prob_diff", "max_diff") else "logit_diff"]

    def solved(self, model: TaskModel) -> Bool[np.ndarray, " example"]:
        """Whether the model prefers the correct answers on each clean prompt.

        Forced choice: mean logit of the correct answers above that of the incorrect ones; total probability for
        ``prob_diff``, the largest logit for ``max_diff``; for pairs without incorrect answers the most likely token must be a correct one.
        """
        return self._values(model, self._choice(), ("clean",))["clean"] > 0

    def accuracy(self, model: TaskModel) -> dict[str, float]:
        """The share of pairs where the model prefers the *clean* prompt's correct answers, on either prompt.

        ``clean`` should be near 1; ``corrupted`` is near 0 where the corruption turns the answer round and near 0.5
        where it takes the information away.
        """
        values = self._values(model, self._choice(), ("clean", "corrupted"))
        return {side: float((value > 0).mean()) for side, value in values.items()}


def _common_names(pairs: Sequence[Pair]) -> set[str]:
    """The named positions that all of the pairs have."""
    return set(pairs[0].positions).intersection(*(pair.positions for pair in pairs))


def _is_argmax(logits: Float[Tensor, "batch columns"], answers: Answers) -> Float[Tensor, " batch"]:
    top = logits.argmax(-1, keepdim=True)
    return ((answers.correct == top) & answers.correct_mask).any(-1).to(logits.dtype) * 2 - 1
