"""The view as a page: the state, the answers that it may ask for, and plotly, in one file."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from patchlab.errors import OutputError, PatchlabError
from patchlab.explorer.answers import MEAN, Answers
from patchlab.explorer.maps import Maps
from patchlab.explorer.state import made_of
from patchlab.explorer.widget import script, style
from patchlab.progress import progress_bar
from patchlab.store.files import writing
from patchlab.tasks.task import SIDES

BYTES = 3_500_000
"""Of the answers about attention, neurons and features that a page holds."""
TOGETHER = (2, 3, 5, 10, 20)
"""Numbers of the largest cells that a page has patched together."""


def write_page(state: dict[str, Any], answers: Answers, path: Path, *, exact: int, overwrite: bool, progress: bool) -> Path:
    """Work out what a page holds, and write it, whole or not at all.

    Raises:
        OutputError: not ``.html``, a file that exists and is not to be overwritten, or one that cannot be written.
    """
    check_target(path, exact=exact, overwrite=overwrite)
    found = _answers(state, answers, exact, progress)
    with writing(path, overwrite=overwrite) as temporary:
        temporary.write_text(_document(state, found), encoding="utf-8")
    return path


def check_target(path: Path, *, exact: int, overwrite: bool) -> None:
    """Refuse, before anything is computed, what could not be written.

    Raises:
        OutputError: as :func:`write_page`.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"a page is written as .html; got {path.name!r}. Give a name that ends so.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists and is not overwritten. Choose another name, or pass overwrite=True.")
    if exact < 0:
        raise OutputError(f"exact is {exact}; it is a number of cells per site, 0 or more.")


def key(question: list[Any]) -> str:
    """A question as the text by which a page finds its answer; JavaScript's ``JSON.stringify`` writes the same."""
    return json.dumps(question, separators=(",", ":"), ensure_ascii=False)


def _answers(state: dict[str, Any], answers: Answers, exact: int, progress: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    patches = [question for maps in answers.groups.values() for question in _patches(state, answers, maps, exact)]
    looks = [*_parts(state, answers), *_heads(state)]
    left = BYTES
    with progress_bar("page", "answer", len(patches) + len(looks), show=progress) as bar:
        for question in patches:
            found[key(question)] = _answered(answers, question)
            bar.update(1)
        for question in looks:  # the most wanted first
            if left > 0:
                answer = _answered(answers, question)
                left -= len(json.dumps(answer)) + len(key(question))
                found[key(question)] = answer
            bar.update(1)
    return found


def _answered(answers: Answers, question: list[Any]) -> dict[str, Any]:
    try:
        return answers.answer(question)
    except PatchlabError as error:
        return {"error": str(error)}


def _patches(state: dict[str, Any], answers: Answers, maps: Maps, exact: int) -> Iterator[list[Any]]:
    """Where no map has them, exact patches of the cells with the largest estimates and those of the view; and the largest together."""
    direction = maps.direction
    for site, shown in state["groups"][direction]["sites"].items():
        numbers = [number for number, zero in zip(shown["cells"], shown["zeros"], strict=True) if not zero]
        ranked = [one for one in (maps.exact, *maps.by_name.values()) if one is not None and site not in one.not_scored]
        if not ranked:
            continue
        sizes = np.abs(ranked[0].mean(site).to_numpy().ravel())
        order = sorted(numbers, key=lambda number: -float(np.nan_to_num(sizes[number])))
        if maps.exact is None or site in maps.exact.not_scored:  # else the state has them
            patched = {number for kept, of, number in answers.exact if (kept, of) == (direction, site)} & set(shown["cells"])
            yield from (["exact", direction, site, number] for number in dict.fromkeys([*order[:exact], *sorted(patched)]))
        for count in TOGETHER if exact else ():
            if count <= min(len(order), exact):
                yield ["together", direction, maps.source, [[site, number] for number in sorted(order[:count])]]


def _parts(state: dict[str, Any], answers: Answers) -> Iterator[list[Any]]:
    for direction, group in state["groups"].items():
        for site, shown in group["sites"].items():
            for number, layer in zip(shown["cells"], shown["layers"], strict=True):
                if made_of(answers.model, site, layer if layer >= 0 else None):
                    yield ["parts", direction, site, number]


def _heads(state: dict[str, Any]) -> Iterator[list[Any]]:
    """Patterns of every head that a cell of a head belongs to: of the mean first, then example by example."""
    sites = [site for group in state["groups"].values() for site in group["sites"].values() if site["kind"] in HEADS]
    heads = sorted({node for site in sites for of in site["nodes"] for node in of if node.startswith("a")}, key=lambda name: (len(name), name))
    for example in [*([MEAN] if state["aligned"] else []), *range(state["n"])]:
        for side in SIDES:
            yield from (["attention", head, example, side] for head in heads)


HEADS = ("z", "q", "k", "v", "pattern")
"""Kinds of sites whose cells show attention patterns."""


def _document(state: dict[str, Any], answers: dict[str, Any]) -> str:
    def data(name: str, value: Any) -> str:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        return f'<script type="application/json" id="{name}">{text}</script>'

    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Explorer: {escape(state['title'])}</title>",
            f"<style>\nhtml, body {{ margin: 0; }}\n{style()}\n</style>",
            f"<script>{get_plotlyjs()}</script></head>",
            f'<body><main id="explorer"></main>{data("state", state)}{data("answers", answers)}',
            f'<script type="module">\n{script("page")}\n</script></body></html>\n',
        ]
    )
