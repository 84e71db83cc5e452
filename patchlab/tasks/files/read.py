"""Readers of task files: patchlab's own JSONL and CSV, EAP-IG's CSV, feature-circuits' JSONL and auto-circuit's JSON."""

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchlab.errors import PatchlabError, TaskError, unknown
from patchlab.tasks.files.rows import Fields, Row, occurrence, recognise, unfold
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.task import Pair, TaskModel

ON_MISMATCH = ("raise", "drop")
SUFFIXES = (".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class TaskFile:
    """The pairs of a file, the metric it asks for (None: the default), and what there is to say about how it was read."""

    pairs: tuple[Pair, ...]
    metric: str | None
    provenance: dict[str, Any]


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or JSON-lines file as (line number, fields); of one JSON object with a list of prompts, without line numbers (0).

    Raises:
        TaskError: the file is missing, unreadable, empty, or has a malformed line.
    """
    if path.suffix not in SUFFIXES:
        raise TaskError(
            f"{path} ends in {path.suffix!r}; a task file is one of {', '.join(SUFFIXES)} (.json with one object per line, or one with prompts)."
        )
    text = _text_of(path)
    rows = _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)
    if not rows:
        raise TaskError(f"{path} is empty; a task file has one pair per line.")
    return [(number, _in_small_letters(path, number, fields)) for number, fields in rows]


def _text_of(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 that says so in its first two bytes, as spreadsheets write it."""
    try:
        content = path.read_bytes()
        return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except OSError as error:
        raise TaskError(f"cannot read the task file {path}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"cannot read the task file {path}: byte {error.start} is not {error.encoding.upper()}. Save it as UTF-8 text "
            f"(or as UTF-16 with a byte order mark)."
        ) from error


def _in_small_letters(path: Path, number: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with their columns named in small letters, as the formats have them: spreadsheets like capitals."""
    found = {str(name).strip().lower(): value for name, value in fields.items()}
    if len(found) < len(fields):
        raise TaskError(f"{path.name}, line {number}: two columns have one name but for capitals: {', '.join(fields)}. Rename one.")
    return found


def _json_rows(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    if (document := _document(text)) is not None:
        return [(0, fields) for fields in unfold(path.name, document)]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path.name}, line {number}: not JSON ({error}). Each line is one object.") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path.name}, line {number}: expected an object with the fields of one pair; got {type(row).__name__}.")
        rows.append((number, row))
    return rows


def _document(text: str) -> dict[str, Any] | None:
    """The file as one object with prompts, if it is one."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None
    return whole if isinstance(whole, dict) and "prompts" in whole else None


def _csv_rows(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    header = text.lstrip().partition("\n")[0]
    # spreadsheets of countries with a decimal comma separate cells by semicolons
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows = []
    try:
        for fields in reader:
            if None in fields or None in fields.values():
                raise TaskError(
                    f"{path.name}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells, as in the header. "
                    f"Quote cells that hold {delimiter!r}."
                )
            rows.append((reader.line_num, {key: value for key, value in fields.items() if value != ""}))
    except csv.Error as error:
        raise TaskError(f"{path.name}, line {reader.line_num + 1}: not CSV ({error}).") from error
    return rows


def load_file(path: Path, model: TaskModel, *, corrupted: str = "corrupted", **options: Any) -> TaskFile:
    """Read a task file for a model's tokenizer; ``options`` are those of :func:`read_pairs`.

    Raises:
        TaskError: anything wrong with the file; the message names the pair.
    """
    rows = [(_where(path.name, i, number), fields) for i, (number, fields) in enumerate(read_rows(path))]
    found = read_pairs(path.name, rows, model, corrupted=corrupted, **options)
    about = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "corrupted_column": corrupted}
    return replace(found, provenance={**about, **found.provenance})


def read_pairs(
    name: str,
    rows: Sequence[tuple[str, Fields]],
    model: TaskModel,
    *,
    bos: bool,
    corrupted: str = "corrupted",
    on_mismatch: str = "raise",
    chat: bool = False,
) -> TaskFile:
    """Rows of fields, each with what names it in messages, as pairs for a model's tokenizer.

    ``bos`` puts the model's bos in front of prompts given as text; ids are used as they are. ``corrupted`` names the column of
    the corrupted prompt (EAP-IG's IOI file has two). ``on_mismatch="drop"`` leaves out pairs of unequal length. ``chat`` makes each
    prompt a user's message in the tokenizer's chat template, up to where the answer begins; it brings its own bos.

    Raises:
        TaskError: anything wrong with a row; the message names it.
    """
    if on_mismatch not in ON_MISMATCH:
        raise TaskError(unknown("on_mismatch", on_mismatch, ON_MISMATCH))
    corrupted = corrupted.strip().lower()
    format_ = recognise(name, [fields for _, fields in rows], corrupted)
    raw = [format_.read(where, fields, corrupted) for where, fields in rows]
    notes: list[str] = []
    if format_.check is not None:
        notes += format_.check(name, raw)
    if chat:
        raw = [_as_chat(row, model) for row in raw]
        notes.append("prompts are a user's message in the tokenizer's chat template")
    words = Lexicon.of(model, bos and not chat) if model.tokenizer is not None else None
    encoder = _Encoder(name, model, words, notes)
    pairs, dropped = [], 0
    for row in raw:
        clean, corrupted_ids = encoder.prompt(row, "clean"), encoder.prompt(row, "corrupted")
        if len(clean) != len(corrupted_ids):
            if on_mismatch == "drop":
                dropped += 1
                continue
            raise TaskError(encoder.mismatch(row, clean, corrupted_ids))
        correct, incorrect = encoder.answers(row, "correct"), encoder.answers(row, "incorrect")
        positions = encoder.positions(row, clean)
        try:
            pairs.append(Pair(clean, corrupted_ids, correct, incorrect, positions, row.template))
        except PatchlabError as error:
            raise TaskError(f"{row.where}: {error}") from error
    if not pairs:
        raise TaskError(f"{name}: no pair is left of {len(raw)}; all have unequal lengths with the tokenizer of {model.name}.")
    if dropped:
        notes.append(f"{dropped} of {len(raw)} pairs dropped: unequal lengths")
    return TaskFile(tuple(pairs), _metric(name, raw, format_.metric), {"format": format_.name, "notes": list(dict.fromkeys(notes))})


def _as_chat(row: Row, model: TaskModel) -> Row:
    """The row with its texts rendered by the tokenizer's chat template."""
    if model.tokenizer is None or not getattr(model.tokenizer, "chat_template", None):
        raise TaskError(f"{model.name} has no chat template; leave chat out, or use a model whose tokenizer has one.")
    if any(ids is not None for ids in row.ids.values()):
        raise TaskError(f"{row.where}: prompts given as token ids cannot be put into a chat template; give them as text.")

    def rendered(text: str) -> str:
        return model.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)

    return replace(row, texts={side: None if text is None else rendered(text) for side, text in row.texts.items()})


def _where(name: str, i: int, number: int) -> str:
    return f"pair {i} of {name}" + (f" (line {number})" if number else "")


def _metric(name: str, rows: list[Row], default: str | None) -> str | None:
    metrics = {row.metric for row in rows}
    if len(metrics) > 1:
        raise TaskError(f"{name} asks for the metrics {sorted(map(str, metrics))}; a task has one, so write the same in every row.")
    return metrics.pop() or default


@dataclass(frozen=True)
class _Encoder:
    """Turns the texts and ids of a row into checked token ids."""

    file: str
    model: TaskModel
    words: Lexicon | None
    notes: list[str]

    def _in_vocabulary(self, row: Row, what: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if bad := [i for i in ids if not 0 <= i < self.model.vocab_size]:
            raise TaskError(
                f"{row.where}: {what} has the ids {bad[:5]}, outside the vocabulary of {self.model.name} (0 to {self.model.vocab_size - 1}). "
                f"They belong to another tokenizer; give the text instead."
            )
        return ids

    def _same_text(self, row: Row, what: str, ids: tuple[int, ...], text: str) -> None:
        """Ids that stand beside a text must spell it."""
        if self.words is None:
            return
        kept = [i for i in ids if i != self.model.bos_id]
        spelt = self.words.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        if "".join(spelt.split()) != "".join(text.split()):
            raise TaskError(
                f"{row.where}: the ids of {what} spell {spelt!r} with the tokenizer of {self.model.name}, and the text says {text!r}. "
                f"The ids belong to another tokenizer; remove the id columns to use the text."
            )

    def _need_words(self, row: Row, what: str) -> Lexicon:
        if self.words is None:
            raise TaskError(
                f"{row.where}: {what} is text, and {self.model.name} has no tokenizer; give clean_ids, corrupted_ids, correct_id and incorrect_id."
            )
        return self.words

    def prompt(self, row: Row, side: str) -> tuple[int, ...]:
        """The token ids of one side; ids win over text."""
        ids, text = row.ids[side], row.texts[side]
        if ids is not None:
            self._in_vocabulary(row, side, ids)
            if text is not None:
                self._same_text(row, side, ids, text)
            return ids
        words = self._need_words(row, side)
        encoded = words.encode(text or "")
        if encoded is None:
            missing = [word for word in (text or "").split() if words.encode(word) is None]
            raise TaskError(
                f"{row.where}: {side} has words that are not in the vocabulary of {self.model.name}: {', '.join(map(repr, missing[:5]))}. "
                f"Use words of its vocabulary, or a model with a sub-word tokenizer."
            )
        return encoded if words.bos_id is None or words.bos_id in encoded[:1] else (words.bos_id, *encoded)

    def answers(self, row: Row, side: str) -> tuple[int, ...]:
        """The ids of the correct or the incorrect answers; ids win over text."""
        ids, texts = row.answer_ids[side], row.answer_texts[side]
        if ids is not None:
            self._in_vocabulary(row, side, ids)
            if texts is not None:
                if len(texts) != len(ids):
                    raise TaskError(f"{row.where}: {side} has {len(texts)} texts and {len(ids)} ids; give one id per text.")
                for one, text in zip(ids, texts, strict=True):
                    self._same_text(row, f"{side} answer", (one,), text)
            return ids
        words = self._need_words(row, side)
        return tuple(self._answer(row, words, side, text) for text in texts or ())

    def _answer(self, row: Row, words: Lexicon, side: str, text: str) -> int:
        piece = self._with_space(row, words, text)
        encoded = words.encode(piece)
        if encoded is None:
            raise TaskError(f"{row.where}: the {side} answer {text!r} is not in the vocabulary of {self.model.name}; choose a word that is.")
        if len(encoded) != 1:
            parts = [words.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in encoded]
            raise TaskError(
                f"{row.where}: the {side} answer {piece!r} is {len(encoded)} tokens ({', '.join(map(repr, parts))}) with the tokenizer of "
                f"{self.model.name}; an answer is one token. Choose a shorter word, or give its id."
            )
        return encoded[0]

    def _with_space(self, row: Row, words: Lexicon, text: str) -> str:
        """An answer word that would be glued to the prompt's last word gets the space that a continuation has; digits after digits don't."""
        prompt = row.texts["clean"] or words.tokenizer.decode(list(row.ids["clean"] or ()), clean_up_tokenization_spaces=False)
        last, first = prompt[-1:], text[:1]
        if not first.isalnum() or not (last.isalnum() or last in ",.;:!?\"'") or (last.isdigit() and first.isdigit()):
            return text
        if words.encode(" " + text) != words.encode(text):
            self.notes.append("answers without a leading space were given one")
        return " " + text

    def positions(self, row: Row, clean: tuple[int, ...]) -> dict[str, int]:
        """The named positions; negative ones count from the end. A name given by a word is left out if the word is not one token."""
        named = {name: place + len(clean) if place < 0 else place for name, place in row.positions.items()}
        start = int(row.ids["clean"] is None and self.words is not None and clean[0] == self.words.bos_id)
        if row.n_labelled in (None, len(clean) - start):
            named |= {name: place + start for name, place in row.labels.items()}
        else:
            self.notes.append(f"positions left out where the prompt is not {row.n_labelled} tokens long, for which the file names them")
        for name, (word, which) in row.words.items():
            ids = {encoded[0] for text in (word, " " + word) if self.words and (encoded := self.words.encode(text)) and len(encoded) == 1}
            places = [place for place, token in enumerate(clean) if token in ids]
            if len(places) > which:
                named[name] = places[which]
        return named | {name: self._place_of_word(row, clean, name, word) for name, word in row.wanted.items()}

    def _place_of_word(self, row: Row, clean: tuple[int, ...], name: str, word: str) -> int:
        """Where the word that names a position stands in the clean prompt."""
        words = self._need_words(row, f"position {name}")
        spelt = [words.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in clean]
        places = [place for place, text in enumerate(spelt) if text.strip() == word.strip()]
        which = occurrence(name, len(places))
        if which is not None and places:
            return places[which]
        tokens = " ".join(f"{place} {text!r}" for place, text in enumerate(spelt))
        if not places:
            why = "which is no token of the clean prompt; give a token or its index"
        else:
            why = (
                f"which is {len(places)} tokens of the clean prompt, at {', '.join(map(str, places))}; give the index, or let the name end in "
                f"the number of the occurrence that is meant ({name}1, {name}2, ...)"
            )
        raise TaskError(f"{row.where}: position {name} is {word!r}, {why}. Its tokens: {tokens}.")

    def mismatch(self, row: Row, clean: tuple[int, ...], corrupted: tuple[int, ...]) -> str:
        """The message for unequal lengths, with the words that make the difference."""
        why = ""
        if self.words is not None and row.texts["clean"] and row.texts["corrupted"]:
            why = _difference(self.words.encode, row.texts["clean"], row.texts["corrupted"])
        return (
            f"{row.where}: clean has {len(clean)} tokens and corrupted {len(corrupted)}{why}. Patching needs equal lengths: "
            f'choose words of equally many tokens, or drop the pair with on_mismatch="drop".'
        )


def _difference(encode: Callable[[str], tuple[int, ...] | None], clean: str, corrupted: str) -> str:
    one, two = clean.split(), corrupted.split()
    if len(one) != len(two):
        return f" ({len(one)} and {len(two)} words)"
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        lengths = [len(encode((" " if i else "") + word) or ()) for word in (a, b)]
        if lengths[0] != lengths[1]:
            said = [f'"{word}" is {"one token" if k == 1 else f"{k} tokens"}' for word, k in zip((a, b), lengths, strict=True)]
            return f" ({', '.join(said)})"
    return ""
