"""Texts: token rows of a corpus, for what looks at many tokens and not at pairs of prompts."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from patchlab.errors import TaskError, TextError
from patchlab.tasks import sentences as corpus
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.task import TaskModel

LENGTH = 128
"""Tokens of a row that is packed from a file, if the model reads as many."""


@dataclass(frozen=True, eq=False, repr=False)
class Texts:
    """Token rows of a corpus, the bos token included where there is one.

    Args:
        name: for people.
        rows: token ids of each row; lengths may differ.

    Raises:
        TextError: no rows, or an empty one.
    """

    name: str
    rows: tuple[Int[np.ndarray, " _"], ...]

    def __post_init__(self) -> None:
        if not self.rows or not all(len(row) for row in self.rows):
            raise TextError(f"{self.name}: texts are at least one row of at least one token; got {len(self.rows)} rows.")
        for row in self.rows:
            row.setflags(write=False)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(map(len, self.rows))

    def batches(self, tokens: int = 8192) -> Iterator[tuple[Int[np.ndarray, " row"], Int[Tensor, "row pos"]]]:
        """Row numbers and token ids of rows of one length, at most ``tokens`` of them (or one row); short rows come first."""
        of_length: dict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(self.rows):
            of_length[len(row)].append(number)
        for length, numbers in sorted(of_length.items()):
            size = max(1, tokens // length)
            for start in range(0, len(numbers), size):
                chosen = np.array(numbers[start : start + size])
                yield chosen, torch.from_numpy(np.stack([self.rows[i] for i in chosen]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Int[np.ndarray, " pos"]: ...
    @overload
    def __getitem__(self, index: slice) -> "Texts": ...
    def __getitem__(self, index: int | slice) -> "Int[np.ndarray, ' pos'] | Texts":
        return Texts(self.name, self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __repr__(self) -> str:
        lengths = {len(row) for row in self.rows}
        each = f"{min(lengths)}" if len(lengths) == 1 else f"{min(lengths)} to {max(lengths)}"
        return f"Texts({self.name}: {len(self):,} rows of {each} tokens)"


def sentences(model: TaskModel, n: int = 1024, *, seed: int = 0, length: int = corpus.ROW, swaps: float = 0.1) -> Texts:
    """Sentences that the packaged models were trained on: all tasks and filler, packed into rows that begin with the bos token.

    Args:
        model: a packaged model, or another one with their vocabulary.
        n: rows.
        seed: which sentences. The models were trained with seed 0.
        length: tokens of a row; the last sentence of each is cut there.
        swaps: share of the answers that are wrong, as in the training text.

    Raises:
        TextError: the model's tokenizer doesn't have the words, or rows are longer than the model reads.

    Example:
        >>> texts.sentences(pl.load_model("demo-gpt2"), 64)  # doctest: +SKIP
        Texts(sentences, seed 0: 64 rows of 48 tokens)
    """
    if n < 1 or length < 2 or not 0 <= swaps <= 1:
        raise TextError(f"sentences need n of at least 1, a length of at least 2 and swaps from 0 to 1; got n={n}, length={length}, swaps={swaps:g}.")
    _check_length(model, length)
    try:
        lexicon = Lexicon.of(model, bos=False)
        if lexicon.encode("Mary") != lexicon.encode(" Mary") or lexicon.token("<bos>") != model.bos_id:
            raise TaskError(f"the tokenizer of {model.name} doesn't take words apart at white space")
        ids = corpus.rows(lexicon, n, seed, lambda _: swaps, length=length)[0]
    except TaskError as error:
        raise TextError(
            f"the sentences are those of the packaged models, in their vocabulary: {str(error).rstrip('.')}. Give a text of your own: "
            f"texts.read(path, model)."
        ) from error
    return Texts(f"sentences, seed {seed}", tuple(ids.numpy().astype(np.int64)))


def read(path: str | Path, model: TaskModel, *, length: int | None = None, lines: bool = False) -> Texts:
    """Rows of a text file in UTF-8, each with the bos token in front if the model has one.

    Args:
        path: the file.
        model: whose tokenizer makes the tokens.
        length: tokens of a packed row, with bos; default 128, or as many as the model reads if that is fewer. What is left at the end and
            does not fill a row is a shorter one.
        lines: one row per line that is not blank, instead of packed ones.

    Raises:
        TextError: no such file, another encoding, no text, a word that the tokenizer doesn't know, or a line that is longer than the model reads.
    """
    path = Path(path).expanduser()
    if model.tokenizer is None:
        raise TextError(f"{model.name} has no tokenizer, so {path} cannot be read for it; make Texts of token ids.")
    if lines and length is not None:
        raise TextError(f"length={length} is for packed rows; with lines=True a row is as long as its line.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TextError(f"there is no file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as a text in UTF-8: {error}. Convert it, or give another file.") from error
    numbered = [(number, line.rstrip("\n")) for number, line in enumerate(text.splitlines(keepends=True), 1) if line.strip()]
    if not numbered:
        raise TextError(f"{path} holds no text.")
    first = [] if model.bos_id is None else [model.bos_id]
    if lines:
        rows = [[*first, *_encode(model, line, f"{path}, line {number}")] for number, line in numbered]
        for (number, _), row in zip(numbered, rows, strict=True):
            _check_length(model, len(row), f"{path}, line {number}: ")
    else:
        size = min(LENGTH, model.n_positions or LENGTH) if length is None else length
        _check_length(model, size)
        if (step := size - len(first)) < 1:
            raise TextError(f"a row takes at least one token beside bos; got length={length}.")
        ids = [token for number, line in numbered for token in _encode(model, line + "\n", f"{path}, line {number}")]
        rows = [first + ids[start : start + step] for start in range(0, len(ids), step)]
    return Texts(path.name, tuple(np.array(row, dtype=np.int64) for row in rows))


def _encode(model: TaskModel, text: str, where: str) -> list[int]:
    """Token ids of a line, without special tokens."""
    tokenizer = model.tokenizer
    try:
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # tokenizers raises a bare Exception for a word-level vocabulary without an unknown token
        raise TextError(f"{where}: the tokenizer of {model.name} cannot express {text.strip()[:60]!r}: {error}") from error
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown != model.bos_id and unknown in ids:  # a tokenizer of bytes calls its bos so, and never needs it
        words = [word for word in text.split() if unknown in tokenizer.encode(word, add_special_tokens=False)]
        raise TextError(f"{where}: the tokenizer of {model.name} doesn't know {words[0] if words else text.strip()!r}. Leave such lines out.")
    if ids and max(ids) >= model.vocab_size:
        raise TextError(f"{where}: the tokenizer gives the id {max(ids)}, and {model.name} has {model.vocab_size} tokens.")
    return ids


def _check_length(model: TaskModel, length: int, where: str = "") -> None:
    if model.n_positions is not None and length > model.n_positions:
        raise TextError(f"{where}a row of {length} tokens is longer than {model.name} reads ({model.n_positions}). Make it shorter.")
