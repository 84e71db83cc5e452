"""The lexicon of a model: templates and words as token ids of its own tokenizer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from patchlab.errors import TaskError
from patchlab.tasks.task import Pair, TaskModel

_SLOT = re.compile(r"( ?)\{(\w+)(!?)\}")


@dataclass(frozen=True)
class Lexicon:
    """A tokenizer, as the generators use it.

    Templates are plain text with slots, ``"When {IO} and {S1} went to"``; a slot is filled with a word that is one token
    there (with the space before it, unless the slot is written ``{A!}``), and gives its position the slot's name if that is in capitals. The fixed
    text between the slots may take any number of tokens. ``bos_id`` is put in front of every prompt unless it is None.
    """

    model_name: str
    tokenizer: Any
    vocab_size: int
    bos_id: int | None
    _cache: dict[str, tuple[int, ...] | None] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(model: TaskModel, bos: bool) -> "Lexicon":
        """The lexicon of a model.

        Raises:
            TaskError: the model has no tokenizer.
        """
        if model.tokenizer is None:
            raise TaskError(f"{model.name} has no tokenizer, so no text can be made for it; use a task file with clean_ids and corrupted_ids.")
        return Lexicon(model.name, model.tokenizer, model.vocab_size, model.bos_id if bos else None)

    def encode(self, text: str) -> tuple[int, ...] | None:
        """Token ids of a text without special tokens; None where the tokenizer cannot express it."""
        if text not in self._cache:
            self._cache[text] = self._encode(text)
        return self._cache[text]

    def _encode(self, text: str) -> tuple[int, ...] | None:
        try:
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        except Exception:  # tokenizers raises a bare Exception for a word-level vocabulary without an unknown token
            return None
        if any(i >= self.vocab_size for i in ids):
            return None
        # an unknown word comes back as another text
        back = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return ids if "".join(back.split()) == "".join(text.split()) else None

    def is_single(self, piece: str) -> bool:
        """Whether the piece (with its leading space, if it has one) is one token."""
        ids = self.encode(piece)
        return ids is not None and len(ids) == 1

    def token(self, piece: str) -> int:
        """The id of a piece that is one token.

        Raises:
            TaskError: it is several tokens, or unknown.
        """
        ids = self.encode(piece)
        if ids is None or len(ids) != 1:
            what = "is not in the vocabulary" if ids is None else f"is {len(ids)} tokens"
            raise TaskError(f"{piece!r} {what} of {self.model_name}; an answer or a slot of a template takes exactly one token.")
        return ids[0]

    def words(self, words: Iterable[str], what: str, *, at_least: int = 2, prefix: str = " ") -> list[str]:
        """The words that are one token after ``prefix``.

        Raises:
            TaskError: fewer than ``at_least``.
        """
        words = list(words)
        single = [word for word in words if self.is_single(prefix + word)]
        if len(single) < at_least:
            raise TaskError(
                f"only {len(single)} of {len(words)} {what} are single tokens for the tokenizer of {self.model_name}, and this task needs "
                f"{at_least}. Use a model with a larger vocabulary, or a task file of your own."
            )
        return single

    def couples(self, words: Mapping[str, str], what: str, *, at_least: int = 2) -> list[tuple[str, str]]:
        """The (key, value) pairs of which both words are one token.

        Raises:
            TaskError: fewer than ``at_least``.
        """
        keys = [key for key, value in words.items() if self.is_single(" " + key) and self.is_single(" " + value)]
        if len(keys) < at_least:
            self.words([], f"{len(words)} {what}", at_least=at_least)
        return [(key, words[key]) for key in keys]

    def prompt(self, template: str, fills: Mapping[str, str]) -> tuple[tuple[int, ...], dict[str, int]]:
        """Token ids of a filled template, and the position of each slot.

        Raises:
            TaskError: the tokenizer cannot express the template, or a word takes several tokens.
        """
        ids: list[int] = [] if self.bos_id is None else [self.bos_id]
        positions: dict[str, int] = {}
        end = 0
        for match in _SLOT.finditer(template):
            before = "" if match[3] else match[1]
            ids += self._fixed(template[end : match.start(2) - 1 - len(before)])
            if match[2].isupper():
                positions[match[2]] = len(ids)
            ids.append(self.token(before + fills[match[2]]))
            end = match.end()
        ids += self._fixed(template[end:])
        return tuple(ids), positions

    def _fixed(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        ids = self.encode(text)
        if ids is None:
            raise TaskError(
                f"the tokenizer of {self.model_name} has no tokens for the template text {text.strip()!r}; use another task for this model."
            )
        return ids

    def pair(
        self,
        template: str,
        clean: Mapping[str, str],
        corrupted: Mapping[str, str],
        correct: Sequence[str],
        incorrect: Sequence[str],
        *,
        name: str = "",
        after: Mapping[str, str] | None = None,
    ) -> Pair:
        """One pair from two fillings of a template. ``corrupted`` needs only the slots that differ.

        ``after`` names further positions: each the token after a slot, as in ``{"AFTER_S1": "S1"}``.
        """
        clean_ids, named = self.prompt(template, clean)
        corrupted_ids, _ = self.prompt(template, {**clean, **corrupted})
        for key, slot in (after or {}).items():
            named[key] = named[slot] + 1
        answers = tuple(self.token(piece) for piece in correct), tuple(self.token(piece) for piece in incorrect)
        return Pair(clean_ids, corrupted_ids, *answers, named, name)
