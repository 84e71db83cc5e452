"""Tables and prose as text that fits a terminal."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import TextIO

import pandas as pd


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that a stream, stdout, is (``COLUMNS`` says otherwise); None where it is none, and nothing has to fit."""
    if os.environ.get("COLUMNS", "").isdigit() or (stream or sys.stdout).isatty():
        return max(40, shutil.get_terminal_size().columns)
    return None


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
    widths = {name: max(len(name), int(texts[name].str.len().max())) if len(texts) else len(name) for name in texts}
    blocks: list[list[str]] = []
    first = list(texts)[:keys]
    for name in list(texts)[keys:]:
        fits = blocks and (width is None or sum(widths[one] + 2 for one in (*blocks[-1], name)) - 2 <= width)
        if fits:
            blocks[-1].append(name)
        else:
            blocks.append([*first, name])
    return "\n\n".join(_block(pd.DataFrame(texts[names]), widths) for names in blocks or [first])


def _block(texts: pd.DataFrame, widths: dict[str, int]) -> str:
    numeric = {name: all(part.isdigit() for part in texts[name]) for name in texts}
    rows = [dict(zip(texts, texts, strict=True)), *texts.to_dict("records")]
    lines = ("  ".join(row[name].rjust(widths[name]) if numeric[name] else row[name].ljust(widths[name]) for name in texts) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def prose(text: str, width: int | None = None, *, indent: str = "") -> str:
    """Lines of at most so many columns; those after the first are indented."""
    if width is None:
        return text
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def fitted(text: str, width: int | None = None) -> str:
    """Lines of at most so many columns; what is too long goes on below, two columns deeper than its line began.

    >>> print(fitted("  the first, the second, the third", 24))
      the first, the second,
        the third
    """
    return "\n".join(prose(line, width, indent=" " * (len(line) - len(line.lstrip()) + 2)) for line in text.splitlines())


def described(entries: Mapping[str, str], width: int | None = None) -> str:
    """Names and what they are, in two columns; on a narrow terminal what a name is stands below it.

    >>> print(described({"ig:N": "at N points", "exact": "by running the model"}, 24))
    ig:N   at N points
    exact  by running the
           model
    """
    beside = max(map(len, entries), default=0) + 2
    if width is not None and width - beside < max(map(len, " ".join(entries.values()).split()), default=0):
        return "\n".join(f"{name}\n{prose(f'    {what}', width, indent='    ')}" for name, what in entries.items())
    return "\n".join(prose(f"{name:<{beside}}{what}", width, indent=" " * beside) for name, what in entries.items())
