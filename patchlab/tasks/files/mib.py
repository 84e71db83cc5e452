"""Rows of the data sets of the MIB circuit track (Mueller et al. 2025, arXiv 2504.13151): IOI, multiple choice, arithmetic.

Columns as in the repositories mib-bench/ioi, copycolors_mcqa, arc_easy, arc_challenge, arithmetic_addition and arithmetic_subtraction. Which
counterfactual, which answers and which rows the track takes is what its ``HFEAPDataset`` does (hannamw/MIB-circuit-track, ``dataset.py``):
an answer is the text of the file without a space that it does not have, and of several tokens the first.
"""

from collections.abc import Mapping
from typing import Any

from patchlab.errors import TaskError, unknown
from patchlab.tasks.files.rows import Fields, Format, Row, needed_text

SUFFIX = "_counterfactual"
_IOI = ("prompt", "metadata", "choices", "answerkey")
_CHOICES = ("prompt", "choices", "answerkey")
_ARITHMETIC = ("prompt", "label", "operator", "operand1", "operand2")
_NO_IDS: Mapping[str, None] = {"clean": None, "corrupted": None}
_NO_ANSWER_IDS: Mapping[str, None] = {"correct": None, "incorrect": None}


def _mapping(where: str, value: Any, what: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TaskError(f"{where}: {what} must be an object with {', '.join(keys)}, as MIB writes it; got {_shown(value)}.")
    if missing := [key for key in keys if key not in value]:
        raise TaskError(f"{where}: {what} lacks {', '.join(missing)}; it has {', '.join(map(str, value)) or 'nothing'}.")
    return value


def _words(where: str, value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{where}: {what} must be a text that is not empty; got {_shown(value)}.")
    return value


def _whole(where: str, value: Any, what: str) -> int:
    """A whole number, also written as text: arithmetic labels are texts, those of its counterfactuals numbers."""
    text = str(value).strip()
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not text.removeprefix("-").isdecimal():
        raise TaskError(f"{where}: {what} must be a whole number; got {_shown(value)}.")
    return int(text)


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def _counterfactual(where: str, fields: Fields, column: str) -> Any:
    """The column of the counterfactual that is asked for, by its whole name or without its ending."""
    found = next((name for name in (column, column + SUFFIX) if name in fields), None)
    if found is None:
        there = [name for name in fields if name.endswith(SUFFIX)]
        raise TaskError(
            f"{where}: {unknown('counterfactual', column, there)}"
            if there
            else f"{where}: there is no counterfactual column (their names end in {SUFFIX}), so nothing says what the corrupted prompt is."
        )
    return fields[found]


def _row(where: str, clean: str, corrupted: str, correct: str, incorrect: str, **more: Any) -> Row:
    answers = {"correct": (correct,), "incorrect": (incorrect,)}
    return Row(where, {"clean": clean, "corrupted": corrupted}, _NO_IDS, answers, _NO_ANSWER_IDS, literal=True, **more)


def _left_out(where: str, prompt: str, why: str) -> Row:
    return _row(where, prompt, prompt, "", "", leave_out=why)


def _answer(where: str, row: Mapping[str, Any], what: str) -> tuple[list[str], str]:
    """The labels of a multiple-choice question and the correct one; labels of counterfactuals are numbers."""
    choices = _mapping(where, row["choices"], f"choices of {what}", ("label", "text"))
    labels = choices["label"]
    if (
        not isinstance(labels, list)
        or not labels
        or not all(isinstance(one, (str, int)) and not isinstance(one, bool) and one != "" for one in labels)
    ):
        raise TaskError(f"{where}: the labels of {what} must be a list of texts or whole numbers; got {_shown(labels)}.")
    texts = choices["text"]
    if not isinstance(texts, list) or len(texts) != len(labels):
        got = f"{len(texts)}" if isinstance(texts, list) else _shown(texts)
        raise TaskError(f"{where}: {what} has {len(labels)} labels and {got} texts; each choice has one of both.")
    named = [str(label) for label in labels]
    if len(set(named)) < len(named):
        raise TaskError(f"{where}: the labels of {what} repeat: {', '.join(named)}. Each choice needs a label of its own.")
    key = row["answerKey"]
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < len(named):
        raise TaskError(
            f"{where}: answerKey of {what} must be the index of one of its {len(named)} choices, 0 to {len(named) - 1}; got {_shown(key)}."
        )
    return named, named[key]


def _read_ioi(where: str, fields: Fields, corrupted: str) -> Row:
    """The answers are the indirect object and the subject; rows whose names differ in their number of tokens are left out."""
    _mapping(where, fields, "the row", _IOI)
    clean = needed_text(where, fields, "prompt")
    roles = _mapping(where, fields["metadata"], "metadata", ("indirect_object", "subject", "random_c"))
    io, subject, third = (_words(where, roles[key], f"{key} of metadata") for key in ("indirect_object", "subject", "random_c"))
    choices, key = fields["choices"], fields["answerkey"]
    if not isinstance(choices, list) or isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < len(choices) or choices[key] != io:
        raise TaskError(
            f"{where}: answerKey {_shown(key)} of the choices {_shown(choices)} is not the indirect object of metadata, {io!r}. Correct one of them."
        )
    other = _mapping(where, _counterfactual(where, fields, corrupted), corrupted, ("prompt",))
    named = {"IO": (io, 0), "S1": (subject, 0), "S2": (subject, 1)}
    return _row(
        where,
        clean,
        _words(where, other["prompt"], f"the prompt of {corrupted}"),
        f" {io}",
        f" {subject}",
        words=named,
        others=(f" {subject}",),
        alike=(f" {io}", f" {subject}", f" {third}"),
        template=str(fields.get("template") or ""),
    )


def _read_choices(where: str, fields: Fields, corrupted: str) -> Row:
    """The correct answer is a label of the clean prompt, the incorrect one what the counterfactual's answer is called."""
    _mapping(where, fields, "the row", _CHOICES)
    clean = needed_text(where, fields, "prompt")
    labels, correct = _answer(where, {"choices": fields["choices"], "answerKey": fields["answerkey"]}, "the prompt")
    found = _counterfactual(where, fields, corrupted)
    if found is None:
        return _left_out(where, clean, f"without {corrupted}")
    other = _mapping(where, found, corrupted, ("prompt", "choices", "answerKey"))
    prompt = _words(where, other["prompt"], f"the prompt of {corrupted}")
    _, incorrect = _answer(where, other, corrupted)
    if incorrect == correct:
        return _left_out(where, clean, f"the answer is the same in {corrupted}")
    return _row(where, clean, prompt, correct, incorrect, others=tuple(label for label in labels if label != correct), alike=(correct, incorrect))


_OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


def _read_arithmetic(where: str, fields: Fields, corrupted: str) -> Row:
    """The answers are the two results; rows without this counterfactual are left out."""
    _mapping(where, fields, "the row", _ARITHMETIC)
    clean = needed_text(where, fields, "prompt")
    operator = fields["operator"]
    if operator not in _OPERATORS:
        raise TaskError(f"{where}: {unknown('operator', str(operator), _OPERATORS)}")

    def result(of: Mapping[str, Any], what: str) -> tuple[int, int, int]:
        label, one, two = (_whole(where, of[key], f"{key} of {what}") for key in ("label", "operand1", "operand2"))
        if label != _OPERATORS[operator](one, two):
            raise TaskError(f"{where}: the label of {what} is {label}, and {one} {operator} {two} is {_OPERATORS[operator](one, two)}. Correct it.")
        return label, one, two

    label, one, two = result(fields, "the prompt")
    found = _counterfactual(where, fields, corrupted)
    if found is None or (isinstance(found, Mapping) and found.get("prompt") is None):
        return _left_out(where, clean, f"without {corrupted}")
    other = _mapping(where, found, corrupted, ("prompt", "label", "operand1", "operand2"))
    wrong, *_ = result(other, corrupted)
    if wrong == label:
        return _left_out(where, clean, f"the result is the same in {corrupted}")
    named = {"OPERAND1": (str(one), 0), "OPERAND2": (str(two), int(one == two))}
    prompt = _words(where, other["prompt"], f"the prompt of {corrupted}")
    return _row(
        where, clean, prompt, str(label), str(wrong), words=named, single=(str(label), str(wrong)), template=str(fields.get("template") or "")
    )


FORMATS = (
    Format("MIB IOI", _IOI, _read_ioi, corrupted="s2_io_flip_counterfactual"),
    Format("MIB multiple choice", _CHOICES, _read_choices, corrupted="symbol_counterfactual"),
    Format("MIB arithmetic", _ARITHMETIC, _read_arithmetic, corrupted="random_counterfactual"),
)
