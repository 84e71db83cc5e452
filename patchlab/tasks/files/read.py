"""Readers of task files: patchlab's own, EAP-IG's, feature-circuits', auto-circuit's and MIB's, as JSON lines, JSON, CSV or parquet."""

import codecs
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchlab.errors import PatchlabError, TaskError, unknown
from patchlab.tasks.files.folder import DATA_SUFFIXES, split_files
from patchlab.tasks.files.formats import recognise
from patchlab.tasks.files.rows import Fields, Format, Row, occurrence, unfold
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.task import Pair, TaskModel

ON_MISMATCH = ("raise", "drop")
INCORRECT = ("counterfactual", "others")
ANSWERS = ("mib", "continuation")
SUFFIXES = (".csv", *DATA_SUFFIXES)


@dataclass(frozen=True)
class TaskFile:
    """The pairs of a file, the metric it asks for (None: the default), and what there is to say about how it was read."""

    pairs: tuple[Pair, ...]
    metric: str | None
    provenance: dict[str, Any]


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or JSON-lines file as (line number, fields); of one JSON value or a parquet file, without line numbers (0).

    Raises:
        TaskError: the file is missing, unreadable, empty, or has a malformed line.
    """
    if path.suffix not in SUFFIXES:
        raise TaskError(
            f"{path} ends in {path.suffix!r}; a task file is one of {', '.join(SUFFIXES)} (.json with one object per line, or one with prompts)."
        )
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        text = _text_of(path)
        rows = _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)
    if not rows:
        raise TaskError(f"{path} is empty; a task file has one pair per line.")
    return [(number, _in_small_letters(path, number, fields)) for number, fields in rows]


def _parquet_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise TaskError(
            f"{path.name} is a parquet file, and reading it needs pyarrow: pip install 'patchlab[parquet]', or write the rows as JSON lines (.jsonl)."
        ) from error
    try:
        return [(0, fields) for fields in parquet.ParquetFile(path).read().to_pylist()]
    except (ArrowException, OSError) as error:
        raise TaskError(f"cannot read the parquet file {path}: {' '.join(str(error).split())}. Get or write it again.") from error


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
        return [(0, fields) for fields in (document if isinstance(document, list) else unfold(path.name, document))]
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


def _document(text: str) -> dict[str, Any] | list[dict[str, Any]] | None:
    """The file as one object with prompts, or as one list of objects, if it is one."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None
    if isinstance(whole, list) and whole and all(isinstance(row, dict) for row in whole):
        return whole
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


def load_file(path: Path, model: TaskModel, *, corrupted: str | None = None, **options: Any) -> TaskFile:
    """Read a task file for a model's tokenizer; ``options`` are those of :func:`read_pairs`.

    Raises:
        TaskError: anything wrong with the file; the message names the pair.
    """
    found = read_pairs(path.name, _placed(path), model, corrupted=corrupted, **options)
    return replace(found, provenance={"file": path.name, "sha256": _sha256([path]), **found.provenance})


def load_folder(folder: Path, model: TaskModel, *, split: str | None = None, subset: str | None = None, **options: Any) -> TaskFile:
    """Read a split of a data set in a folder (:func:`patchlab.tasks.files.folder.split_files`); ``options`` are those of :func:`read_pairs`.

    Raises:
        TaskError: no such split or subset, or anything wrong with a file; the message names the pair.
    """
    files = split_files(folder, split, subset)
    found = read_pairs(folder.name, [row for path in files.paths for row in _placed(path)], model, **options)
    about = {"split": files.split, "files": [path.relative_to(folder).as_posix() for path in files.paths], "sha256": _sha256(files.paths)}
    return replace(found, provenance={**about, **found.provenance})


def _placed(path: Path) -> list[tuple[str, Fields]]:
    return [(_where(path.name, i, number), fields) for i, (number, fields) in enumerate(read_rows(path))]


def _sha256(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def read_pairs(
    name: str,
    rows: Sequence[tuple[str, Fields]],
    model: TaskModel,
    *,
    bos: bool,
    corrupted: str | None = None,
    on_mismatch: str = "raise",
    chat: bool = False,
    incorrect: str | None = None,
    answers: str | None = None,
    limit: int | None = None,
) -> TaskFile:
    """Rows of fields, each with what names it in messages, as pairs for a model's tokenizer.

    ``bos`` puts the model's bos in front of prompts given as text; ids are used as they are. ``corrupted`` names the column of the corrupted prompt
    (EAP-IG's IOI file has two, MIB's data sets several), None the usual one. ``on_mismatch="drop"`` leaves out pairs of unequal length. ``chat``
    makes each prompt a user's message in the tokenizer's chat template, up to where the answer begins; it brings its own bos.

    Of MIB's data sets, ``incorrect`` says which answers count as incorrect: that of the ``counterfactual`` (the default, as in MIB), or the
    ``others`` that the clean prompt offers; ``answers`` how they become tokens: as in ``mib`` (as they are written, of several tokens the first), or
    as a ``continuation`` of the prompt (with the space that a word has, one token). Reading ends at ``limit`` pairs.

    Raises:
        TaskError: anything wrong with a row; the message names it.
    """
    if on_mismatch not in ON_MISMATCH:
        raise TaskError(unknown("on_mismatch", on_mismatch, ON_MISMATCH))
    column = "corrupted" if corrupted is None else corrupted.strip().lower()
    format_ = recognise(name, [fields for _, fields in rows], column)
    column = format_.corrupted if corrupted is None else column
    raw = [format_.read(where, fields, column) for where, fields in rows]
    notes: list[str] = []
    if format_.check is not None:
        notes += format_.check(name, raw)
    raw = [_as_asked(name, format_, row, incorrect, answers) for row in raw]
    if chat:
        raw = [_as_chat(row, model) for row in raw]
        notes.append("prompts are a user's message in the tokenizer's chat template")
    words = Lexicon.of(model, bos and not chat) if model.tokenizer is not None else None
    encoder = _Encoder(name, model, words, notes)
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    for row in raw:
        if len(pairs) == limit:
            break
        if why := encoder.leave_out(row):
            left_out[why] += 1
            continue
        clean, corrupted_ids = encoder.prompt(row, "clean"), encoder.prompt(row, "corrupted")
        if len(clean) != len(corrupted_ids):
            if on_mismatch == "drop":
                left_out["unequal lengths"] += 1
                continue
            raise TaskError(encoder.mismatch(row, clean, corrupted_ids))
        correct, wrong = encoder.answers(row, "correct"), encoder.answers(row, "incorrect")
        if row.literal and set(correct) & set(wrong):
            left_out["both answers begin with the same token"] += 1
            continue
        positions = encoder.positions(row, clean)
        try:
            pairs.append(Pair(clean, corrupted_ids, correct, wrong, positions, row.template))
        except PatchlabError as error:
            raise TaskError(f"{row.where}: {error}") from error
    if not pairs:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise TaskError(f"{name}: no pair is left of {len(raw)} with the tokenizer of {model.name}: {why}. Use another model, or other rows.")
    read = len(pairs) + sum(left_out.values())
    notes += [f"{count} of {read} pairs dropped: {reason}" for reason, count in left_out.items()]
    about = {
        "format": format_.name,
        "corrupted_column": column,
        **{key: value for key, value in (("incorrect", incorrect), ("answers", answers)) if value},
    }
    return TaskFile(tuple(pairs), _metric(name, raw, format_.metric), {**about, "notes": list(dict.fromkeys(notes))})


def _as_asked(name: str, format_: Format, row: Row, incorrect: str | None, answers: str | None) -> Row:
    """The row of a data set of MIB with the answers that are asked for."""
    for option, value, valid in (("incorrect", incorrect, INCORRECT), ("answers", answers, ANSWERS)):
        if value is not None and not row.literal:
            raise TaskError(f"{option} is an option of MIB's data sets, and {name} is a file of {format_.name}; leave it out.")
        if value not in (None, *valid):
            raise TaskError(unknown(option, str(value), valid))
    if incorrect == "others" and not row.leave_out:
        if not row.others:
            raise TaskError(f"{row.where}: the prompt offers no other answers (it is {format_.name}); leave incorrect out, or give a metric.")
        row = replace(row, answer_texts={**row.answer_texts, "incorrect": row.others}, alike=())
    return replace(row, literal=False, alike=(), single=()) if answers == "continuation" else row


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
        return tuple((self._first if row.literal else self._answer)(row, words, side, text) for text in texts or ())

    def leave_out(self, row: Row) -> str:
        """Why a row is left out; nothing where it is not."""
        if row.leave_out or self.words is None:
            return row.leave_out
        lengths = {text: len(self.words.encode(text) or ()) for text in (*row.alike, *row.single)}
        if len({lengths[text] for text in row.alike}) > 1:
            return "names or answers of unequal numbers of tokens"
        return "answers of several tokens" if any(lengths[text] != 1 for text in row.single) else ""

    def _first(self, row: Row, words: Lexicon, side: str, text: str) -> int:
        """The first token of an answer that is taken as it is written."""
        encoded = list(words.encode(text) or ())
        if not encoded:
            raise TaskError(f"{row.where}: the {side} answer {text!r} is not in the vocabulary of {self.model.name}; use a model that has it.")
        if len(encoded) > 1:
            self.notes.append("answers of several tokens count by the first, as in MIB")
        return encoded[0]

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
