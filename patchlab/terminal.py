"""Text that fits a terminal."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import TextIO


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that a stream, stdout, is (``COLUMNS`` says otherwise); None where it is none, and nothing has to fit."""
    if os.environ.get("COLUMNS", "").isdigit() or (stream or sys.stdout).isatty():
        return max(40, shutil.get_terminal_size().columns)
    return None


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
