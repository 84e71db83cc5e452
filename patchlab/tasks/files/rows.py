"""The columns of the task files that patchlab reads, and what each row says, before any tokenizer is asked."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from patchlab.errors import TaskError

Fields = Mapping[str, Any]
_NAME = re.compile(r"\b[A-Z][a-z]+\b")
_POSITION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_\-]*")


@dataclass(frozen=True)
class Row:
    """One pair as its file gives it: texts, ids or both. ``where`` names it in messages.

    ``words`` names positions by a word of the clean text and which of its occurrences is meant: ``{"S2": ("John", 1)}``; a word that is no
    single token is left out. ``wanted`` names positions by a word that must be there (:func:`occurrence` says which of several is meant).
    ``foreign_ids`` are answer ids of a tokenizer that the file does not name. ``labels`` names positions counted from the first token after
    a bos that is put in front; where ``n_labelled`` says how many tokens were counted, they hold for prompts of that many only.
    ``literal`` answers are taken as they are written, and of several tokens the first; ``others`` are the answers that the clean prompt offers
    beside the correct one. Texts that are ``alike`` must take equally many tokens, and ``single`` ones one, else the row is left out; ``leave_out``
    says why it is anyway.
    """

    where: str
    texts: Mapping[str, str | None]
    ids: Mapping[str, tuple[int, ...] | None]
    answer_texts: Mapping[str, tuple[str, ...] | None]
    answer_ids: Mapping[str, tuple[int, ...] | None]
    positions: Mapping[str, int] = field(default_factory=dict)
    words: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    wanted: Mapping[str, str] = field(default_factory=dict)
    foreign_ids: tuple[int, int] | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    n_labelled: int | None = None
    template: str = ""
    metric: str | None = None
    literal: bool = False
    others: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    leave_out: str = ""


@dataclass(frozen=True)
class Format:
    """A kind of task file: the columns it is recognised by, how a row is read, and a check over all rows that returns notes.

    ``corrupted`` is the column of the corrupted prompt unless another one is asked for.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[str, Fields, str], Row]
    metric: str | None = None
    check: Callable[[str, list[Row]], list[str]] | None = None
    corrupted: str = "corrupted"


# --- values of cells -------------------------------------------------------------------------------------------------


def _text(where: str, fields: Fields, column: str) -> str | None:
    value = fields.get(column)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise TaskError(f"{where}: {column} must be a text that is not empty; got {value!r}.")
    return value


def needed_text(where: str, fields: Fields, column: str) -> str:
    """The text of a column that every row has.

    Raises:
        TaskError: it is missing, or no text.
    """
    value = _text(where, fields, column)
    if value is None:
        raise TaskError(f"{where}: {column} is missing; every pair needs it.")
    return value


def _list(where: str, fields: Fields, column: str) -> list[Any] | None:
    """A cell with one value or several; a CSV cell with several is a JSON list."""
    value = fields.get(column)
    if value is None:
        return None
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(where, column, value)
    return value if isinstance(value, list) else [value]


def _json(where: str, column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}: {column} looks like JSON and is not ({error}).") from error


def _texts(where: str, fields: Fields, column: str) -> tuple[str, ...] | None:
    values = _list(where, fields, column)
    if values is not None and not all(isinstance(value, str) and value for value in values):
        raise TaskError(f"{where}: {column} must be a text or a list of texts; got {fields[column]!r}.")
    return None if values is None else tuple(values)


def _ids(where: str, fields: Fields, column: str) -> tuple[int, ...] | None:
    values = _list(where, fields, column)
    if values is None:
        return None
    numbers: list[Any] = [int(value) if isinstance(value, str) and value.strip().isdigit() else value for value in values]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in numbers):
        raise TaskError(f"{where}: {column} must be a token id or a list of them; got {fields[column]!r}.")
    return tuple(numbers)


# --- patchlab's own --------------------------------------------------------------------------------------------------

OWN = {"clean": "clean_ids", "corrupted": "corrupted_ids", "correct": "correct_id", "incorrect": "incorrect_id"}


def _read_own(where: str, fields: Fields, corrupted: str) -> Row:
    for column, either in OWN.items():
        column = corrupted if column == "corrupted" else column
        if fields.get(column) is None and fields.get(either) is None:
            raise TaskError(f"{where}: {column} is missing; every pair needs it (or {either}).")
    positions = _named(where, fields)
    # ids belong to the column "corrupted": with another column chosen they say nothing about it
    other_ids = _ids(where, fields, "corrupted_ids") if corrupted == "corrupted" else None
    return Row(
        where,
        {"clean": _text(where, fields, "clean"), "corrupted": _text(where, fields, corrupted)},
        {"clean": _ids(where, fields, "clean_ids"), "corrupted": other_ids},
        {side: _texts(where, fields, side) for side in ("correct", "incorrect")},
        {side: _ids(where, fields, f"{side}_id") for side in ("correct", "incorrect")},
        {name: place for name, place in positions.items() if isinstance(place, int)},
        wanted={name: place for name, place in positions.items() if isinstance(place, str)},
        template=_text(where, fields, "template") or "",
        metric=_text(where, fields, "metric"),
    )


def _named(where: str, fields: Fields) -> Mapping[str, int | str]:
    """The column ``positions``: names to token indices or words, or a list of words that are their own names."""
    given = fields.get("positions") or {}
    if isinstance(given, str):
        given = _json(where, "positions", given)
    listed = given if isinstance(given, list) else ()
    positions = given if isinstance(given, dict) else {word.strip(): word for word in listed if isinstance(word, str)}
    if len(positions) < len(listed) or not isinstance(given, (dict, list)) or not all(map(_is_place, positions.values())):
        raise TaskError(
            f'{where}: positions must map names to token indices or words, as in {{"S1": 4, "S2": "John"}}, or list different words; '
            f"got {fields['positions']!r}."
        )
    for name in positions:
        if not _POSITION_NAME.fullmatch(name):
            raise TaskError(
                f"{where}: {name!r} cannot name a position; a name begins with a letter and has letters, digits, _ and - (it is written after @)."
            )
    return positions


def _is_place(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, int) and not isinstance(value, bool)


def occurrence(name: str, found: int) -> int | None:
    """Which of ``found`` occurrences of a word a position's name means; None where the name does not say.

    A name that ends in a number means that occurrence, ``S2`` the second; a word that occurs once needs no number.

    >>> occurrence("S2", 2), occurrence("SUBJECT", 1), occurrence("SUBJECT", 2), occurrence("S3", 2)
    (1, 0, None, None)
    """
    if found == 1:
        return 0
    number = int(match[0]) if (match := re.search(r"\d+$", name)) else 0
    return number - 1 if 1 <= number <= found else None


def _of_text(where: str, clean: str, corrupted: str, correct: list[str], incorrect: list[str], **more: Any) -> Row:
    nothing = {"clean": None, "corrupted": None}
    answers = {"correct": tuple(correct), "incorrect": tuple(incorrect)}
    return Row(where, {"clean": clean, "corrupted": corrupted}, nothing, answers, {"correct": None, "incorrect": None}, **more)


# --- EAP-IG ----------------------------------------------------------------------------------------------------------


def _read_eap_ioi(where: str, fields: Fields, corrupted: str) -> Row:
    """The answers come from the text: the ids in these files are those of whatever tokenizer the file was made for."""
    clean = needed_text(where, fields, "clean")
    counts = Counter(_NAME.findall(clean))
    repeated = [word for word, count in counts.items() if count == 2]
    partners = [
        other for s in repeated for other, count in counts.items() if count == 1 and re.search(rf"\b({s} and {other}|{other} and {s})\b", clean)
    ]
    if len(repeated) != 1 or len(partners) != 1:
        raise TaskError(
            f"{where}: correct_idx and incorrect_idx are ids of a tokenizer that the file does not name, and the text does not say which answers "
            f"they are (one name once and another twice, joined by 'and'). Write the answers as text, in columns correct and incorrect."
        )
    subject, indirect = repeated[0], partners[0]
    ids = _ids(where, fields, "correct_idx"), _ids(where, fields, "incorrect_idx")
    if ids[0] is None or ids[1] is None:
        raise TaskError(f"{where}: correct_idx or incorrect_idx is missing; every pair needs both.")
    roles = {"IO": (indirect, 0), "S1": (subject, 0), "S2": (subject, 1)}
    other = needed_text(where, fields, corrupted)
    return _of_text(where, clean, other, [" " + indirect], [" " + subject], words=roles, foreign_ids=(ids[0][0], ids[1][0]))


def _check_eap_ioi(name: str, rows: list[Row]) -> list[str]:
    """Each id of the file must stand for one name, else the names read from the text are not the file's answers."""
    meaning: dict[int, str] = {}
    for row in rows:
        for side, one in zip(("correct", "incorrect"), row.foreign_ids or (), strict=False):
            text = (row.answer_texts[side] or ("",))[0]
            if meaning.setdefault(one, text) != text:
                raise TaskError(
                    f"{row.where}: {side}_idx is {one}, which stood for {meaning[one].strip()!r} before; the text says {text.strip()!r}. "
                    f"Write the answers of {name} as text, in columns correct and incorrect."
                )
    return ["correct_idx, incorrect_idx not used (ids of an unnamed tokenizer): the answers are the name that occurs once, the one that occurs twice"]


def _read_eap_years(where: str, fields: Fields, corrupted: str) -> Row:
    label = str(fields.get("label"))
    if not re.fullmatch(r"\d\d?", label) or int(label) > 98:
        raise TaskError(f"{where}: label must be the two last digits of the first year, 00 to 98; got {label!r}.")
    years = [f"{year:02d}" for year in range(100)]
    above = int(label) + 1
    return _of_text(where, needed_text(where, fields, "clean"), needed_text(where, fields, corrupted), years[above:], years[:above])


# --- feature-circuits ------------------------------------------------------------------------------------------------


def _read_feature_circuits(where: str, fields: Fields, corrupted: str) -> Row:
    columns = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
    clean, patch, right, wrong = (needed_text(where, fields, column) for column in columns)
    return _of_text(where, clean, patch, [right], [wrong])


# --- auto-circuit ----------------------------------------------------------------------------------------------------


def unfold(name: str, document: Fields) -> list[dict[str, Any]]:
    """The pairs of a prompt file of auto-circuit, one object with a list of ``prompts``; each pair takes the file's labels with it.

    Raises:
        TaskError: prompts that are no list of objects.
    """
    prompts = document["prompts"]
    if not isinstance(prompts, list) or not all(isinstance(prompt, dict) for prompt in prompts):
        raise TaskError(f"{name}: prompts must be a list of objects with clean, corrupt, answers and wrong_answers; got {type(prompts).__name__}.")
    shared = {key: document[key] for key in ("seq_labels", "word_idxs") if document.get(key) is not None}
    return [{**prompt, **shared} for prompt in prompts]


def _read_auto_circuit(where: str, fields: Fields, corrupted: str) -> Row:
    """``word_idxs`` names positions; without it, the entries of ``seq_labels`` (one per token) that occur once do."""
    texts: dict[str, str | None] = {"clean": None, "corrupted": None}
    ids: dict[str, tuple[int, ...] | None] = {"clean": None, "corrupted": None}
    for side, column in (("clean", "clean"), ("corrupted", "corrupt")):
        if isinstance(fields.get(column), list):
            ids[side] = _ids(where, fields, column)
        else:
            texts[side] = needed_text(where, fields, column)
    answer_texts: dict[str, tuple[str, ...] | None] = {"correct": None, "incorrect": None}
    answer_ids: dict[str, tuple[int, ...] | None] = {"correct": None, "incorrect": None}
    for side, column in (("correct", "answers"), ("incorrect", "wrong_answers")):
        values = fields.get(column)
        if not isinstance(values, list):
            raise TaskError(f"{where}: {column} must be a list of texts or of token ids; got {values!r}.")
        if not values or isinstance(values[0], int):
            answer_ids[side] = _ids(where, fields, column)
        else:
            answer_texts[side] = _texts(where, fields, column)
    sequence, places = fields.get("seq_labels"), fields.get("word_idxs")
    if sequence is not None and not (isinstance(sequence, list) and all(isinstance(label, str) for label in sequence)):
        raise TaskError(f"{where}: seq_labels must be a list of texts, one per token; got {sequence!r}.")
    if places is None:
        counts = Counter(sequence or ())
        places = {label: i for i, label in enumerate(sequence or ()) if label and counts[label] == 1}
    if not isinstance(places, dict) or not all(isinstance(place, int) and not isinstance(place, bool) and place >= 0 for place in places.values()):
        raise TaskError(f'{where}: word_idxs must map names to token indices, as in {{"S1": 4}}; got {places!r}.')
    return Row(where, texts, ids, answer_texts, answer_ids, labels={**places}, n_labelled=len(sequence) if sequence else None)


FORMATS = (
    Format("patchlab", ("clean", "corrupted", "correct", "incorrect"), _read_own),
    Format("EAP-IG", ("clean", "corrupted", "correct_idx", "incorrect_idx"), _read_eap_ioi, check=_check_eap_ioi),
    Format("EAP-IG greater-than", ("clean", "corrupted", "label"), _read_eap_years, metric="prob_diff"),
    Format("feature-circuits", ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer"), _read_feature_circuits),
    Format("auto-circuit", ("clean", "corrupt", "answers", "wrong_answers"), _read_auto_circuit),
)
