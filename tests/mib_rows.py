"""Rows of MIB's data sets, made to their published layout, and files of them as the hub has them."""

import json
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def ioi(io: str = "Phil", s: str = "Henry", c: str = "Angel", **changes: Any) -> dict[str, Any]:
    """A row of mib-bench/ioi."""
    text = "Then, {a} and {b} had a lot of fun at the {place}. {s2} gave a {object} to"

    def prompt(s2: str) -> str:
        return text.format(a=s, b=io, place="harbor", s2=s2, object="basket")

    def counterfactual(s2: str, key: int = 0) -> dict[str, Any]:
        return {"prompt": prompt(s2), "choices": [io, s], "answerKey": key}

    return {
        "template": "Then, {name_A} and {name_B} had a lot of fun at the {place}. {name_C} gave a {object} to",
        "metadata": {
            "indirect_object": io,
            "subject": s,
            "object": "basket",
            "place": "harbor",
            "random_a": "Mary",
            "random_b": "Tom",
            "random_c": c,
        },
        "prompt": prompt(s),
        "choices": [io, s],
        "answerKey": 0,
        "abc_counterfactual": counterfactual(c),
        "s2_io_flip_counterfactual": counterfactual(io, 1),
        **changes,
    }


def mcqa(colours: tuple[str, ...] = ("gray", "black", "white", "brown"), answer: int = 3, **changes: Any) -> dict[str, Any]:
    """A row of mib-bench/copycolors_mcqa: labels are texts, those of the counterfactual whole numbers."""
    question = f"A box is {colours[answer]}. What color is a box?"

    def prompt(labels: list[Any]) -> str:
        return "\n".join([f"Question: {question}", *(f"{label}. {colour}" for label, colour in zip(labels, colours, strict=True)), "Answer:"])

    letters, numbers = list("ABCD"), [1, 2, 3, 4]
    return {
        "question": question,
        "choices": {"label": letters, "text": list(colours)},
        "answerKey": answer,
        "prompt": prompt(letters),
        "symbol_counterfactual": {"prompt": prompt(numbers), "choices": {"label": numbers, "text": list(colours)}, "answerKey": answer},
        "idx": 0,
        **changes,
    }


def arithmetic(one: int = 13, two: int = 25, other: tuple[int, int] = (42, 17), **changes: Any) -> dict[str, Any]:
    """A row of mib-bench/arithmetic_addition: its label is a text, that of the counterfactual a number."""

    def prompt(a: int, b: int) -> str:
        return f"The sum of {a} and {b} is "

    return {
        "idx": 0,
        "template": "The sum of {operand1} and {operand2} is ",
        "prompt": prompt(one, two),
        "label": str(one + two),
        "operator": "+",
        "num_digit": 2,
        "operand1": one,
        "operand2": two,
        "random_counterfactual": {"label": sum(other), "operand1": other[0], "operand2": other[1], "prompt": prompt(*other)},
        **changes,
    }


def arc(**changes: Any) -> dict[str, Any]:
    """A row of mib-bench/arc_easy, with five choices."""
    texts = ["rain", "wind", "sun", "ice", "fire"]
    text = "Question: Which of these melts ice?\n{}\nAnswer:"

    def prompt(labels: str) -> str:
        return text.format("\n".join(f"{label}. {one}" for label, one in zip(labels, texts, strict=True)))

    other = {"question": "q", "choices": {"text": texts, "label": list("VWXYZ")}, "prompt": prompt("VWXYZ"), "label": "X", "answerKey": 2}
    return {
        "arc_id": "x1",
        "question": "Which of these melts ice?",
        "choices": {"text": texts, "label": list("ABCDE")},
        "prompt": prompt("ABCDE"),
        "label": "C",
        "answerKey": 2,
        "symbol_counterfactual": other,
        "idx": 0,
        **changes,
    }


def put(path: Path, *rows: dict[str, Any]) -> Path:
    """A file in the form that its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text(json.dumps(list(rows)) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def put_in_cache(cache: Path, name: str, *rows: dict[str, Any], place: str = "data/train-00000-of-00001.jsonl") -> None:
    repository = cache / f"datasets--{name.replace('/', '--')}"
    put(repository / "snapshots" / COMMIT / place, *rows)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
