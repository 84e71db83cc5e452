"""Tables as text that fits a terminal, and as plain JSON values."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def table(frame: pd.DataFrame, width: int | None = None, *, keys: int = 2) -> str:
    """The frame in columns: names to the left, numbers to the right.

    Args:
        frame: texts and numbers.
        width: most columns of text; what does not fit beside the others continues below, under the same keys, and nothing is cut. None: no limit.
        keys: how many columns at the left say what a row is about.

    >>> print(table(pd.DataFrame({"site": ["z"], "r": ["0.91"], "slope": ["1.20"]}), 12, keys=1))
    site  r
    z     0.91
    <BLANKLINE>
    site  slope
    z     1.20
    """
    texts = frame.astype(object).where(frame.notna(), "-").astype(str)
    names = [str(name) for name in texts]
    widths = {name: max(len(name), int(texts[name].str.len().max())) if len(texts) else len(name) for name in names}
    blocks: list[list[str]] = []
    first = names[:keys]
    for name in names[keys:]:
        fits = blocks and (width is None or sum(widths[one] + 2 for one in (*blocks[-1], name)) - 2 <= width)
        if fits:
            blocks[-1].append(name)
        else:
            blocks.append([*first, name])
    return "\n\n".join(_block(texts[block], widths) for block in blocks or [first])


def _block(texts: pd.DataFrame, widths: dict[str, int]) -> str:
    names = [str(name) for name in texts]
    numeric = {name: all(part.isdigit() for part in texts[name]) for name in names}
    rows = [dict(zip(names, names, strict=True)), *texts.to_dict("records")]
    lines = ("  ".join(row[name].rjust(widths[name]) if numeric[name] else row[name].ljust(widths[name]) for name in names) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as plain JSON values; what is missing or infinite is None."""
    whole = frame.astype(object)
    return [json_able({str(name): value for name, value in row.items()}) for row in whole.where(frame.notna(), None).to_dict("records")]


def json_able(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: numbers of numpy's as Python's, what is missing or infinite as None.

    >>> json_able({"r": float("nan"), "cells": np.int64(3)})
    {'r': None, 'cells': 3}
    """
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()}
