"""Tables as text that fits a terminal."""

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
