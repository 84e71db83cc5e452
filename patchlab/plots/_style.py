"""The style that figures share: one look, a page laid out in pixels, and text that plotly shows as it is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any
from zlib import crc32

import plotly.graph_objects as go

from patchlab.scores import ScoreMap

Pixels = float | int

INK, MUTED, GREY, PALE = "#1f2328", "#636c76", "#dcdfe3", "#f3f4f6"
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
OPPOSES, SUPPORTS, UNSCORED = "#b2182b", "#2166ac", "#8b949e"
"""Red: works against the behaviour. Blue: supports it. And what has no score. Nothing else is red or blue."""
_PURPLE, _GREEN = "#762a83", "#1b7837"
_METHODS = {
    "atp": "#0072b2",
    "ig:5": "#d55e00",
    "relp": "#009e73",
    "relp-ah": "#cc79a7",
    "gim": "#e69f00",
    "attnlrp": "#56b4e9",
    "cp-lrp": "#882255",
    "relp+ig:5": "#999933",
    "atp*": "#9500ff",
    "ig:10": "#6c3b01",
    "ig-right:5": "#fe046c",
    "eap-ig-activations:5": "#0e5300",
    "ig-activations:5": "#06c801",
    "clean-corrupted": "#665674",
    "atp+qk": "#542b9c",
    "atp+drop": "#a205a9",
    "relp+qk": "#126966",
    "relp+drop": "#9880fd",
    "exact": INK,
    "random": UNSCORED,
}
"""The first eight are Okabe and Ito's palette (2008), told apart with colour-blind eyes, extended by two of Tol's; the others keep their distance."""
_OTHERS = ("#ee7cfc", "#3c65f5", "#ad0305", "#fe8d7e", "#dd41aa", "#5502e2", "#9f5854", "#0e36b5", "#6a6907", "#905bb3", "#b3a3e3", "#008201")
_ALIASES = {"eap": "atp", "eap-ig:5": "ig-right:5", "eap-ig-inputs:5": "ig-right:5", "gradient": "atp"}


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour per method, decided by its name: the same on every page, in whatever company and order.

    Names that patchlab knows (and the field's: EAP is ``atp``, edge-RelP ``relp``) have colours of their own. The others get one of twelve more
    by their letters; where two names of one page would share a colour, the later in the alphabet takes the next that is free.

    >>> method_colours(["RelP", "mine"])["RelP"] == method_colours(["AtP", "IG-5", "edge-RelP"])["edge-RelP"]
    True
    """
    known = {name: _canonical(name) for name in dict.fromkeys(names)}
    slots = [*_OTHERS, *_METHODS.values()]
    colours: dict[str, str] = {}
    for name in sorted(known, key=lambda name: (known[name] not in _METHODS, known[name], name)):
        own = known[name]
        first = slots.index(_METHODS[own]) if own in _METHODS else crc32(own.encode()) % len(_OTHERS)
        order = [*slots[first:], *slots[:first]]
        colours[name] = next((colour for colour in order if colour not in colours.values()), order[0])
    return {name: colours[name] for name in known}


def _canonical(name: str) -> str:
    """A method's name in patchlab's spelling: ``edge-RelP+IG-5`` is ``relp+ig:5``."""
    text = re.sub(r"-(\d+)$", r":\1", name.strip().lower().removeprefix("edge-"))
    return _ALIASES.get(text, text)


@dataclass(frozen=True)
class Signs:
    """What the sign of an effect means: a colour scale, the colours of its negative and positive half, and a word for each."""

    scale: Any
    negative: str
    positive: str
    below: str
    above: str

    @property
    def legend(self) -> str:
        """Both colours with their words."""
        parts = [(self.positive, self.above), (self.negative, self.below)]
        parts = parts[:1] if self.above == self.below else sorted(parts, key=lambda part: part[0] == OPPOSES)
        return " &nbsp; ".join(f'<span style="color:{colour}">■</span> {words}' for colour, words in parts)


def signs(record: Mapping[str, Any]) -> Signs:
    """Blue is what supports the behaviour and red what works against it, whichever way was patched.

    Denoising raises the metric at what supports the behaviour, noising lowers it there. Where a record has no direction (a circuit from
    elsewhere), or the effects have lost their sign, the colours are others: purple and green.
    """
    if record.get("unsigned"):
        return Signs(["white", _GREEN], _GREEN, _GREEN, "size of the effect, sign unknown", "size of the effect, sign unknown")
    if record.get("direction") == "denoising":
        return Signs("RdBu", OPPOSES, SUPPORTS, "works against the behaviour", "supports the behaviour")
    if record.get("direction") == "noising":
        return Signs("RdBu_r", SUPPORTS, OPPOSES, "supports the behaviour", "works against the behaviour")
    return Signs("PRGn", _PURPLE, _GREEN, "negative score", "positive score")


_AXIS = {
    "showgrid": False,
    "zeroline": False,
    "showline": True,
    "linecolor": MUTED,
    "linewidth": 1,
    "ticks": "outside",
    "ticklen": 3,
    "tickcolor": MUTED,
    "tickfont": {"size": 11, "color": INK},
    "title": {"font": {"size": 12, "color": INK}, "standoff": 6},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
        "colorway": list(_METHODS.values()),
    }
)


@dataclass(frozen=True)
class Box:
    """A panel's place on the page, in pixels from its top left corner."""

    left: Pixels
    top: Pixels
    width: Pixels
    height: Pixels


class Page:
    """A figure of fixed size on which panels are placed in pixels, so that cells keep their shape whatever the number of panels."""

    def __init__(self, width: Pixels, height: Pixels, title: str, subtitle: str) -> None:
        self.figure, self.width, self.height, self.panels = go.Figure(), width, height, 0
        self.figure.update_layout(template=TEMPLATE, width=width, height=height, showlegend=False)
        self.note(16, 14, f"<b>{escape(title, quote=False)}</b>", size=16)
        self.note(16, 38, subtitle, size=12, colour=MUTED)

    def note(self, left: Pixels, top: Pixels, text: str, *, size: Pixels = 12, colour: str = INK, **options: Any) -> None:
        """Text (plotly's HTML) whose top left corner is at this pixel, unless the options anchor it otherwise."""
        place = {"xref": "paper", "yref": "paper", "x": left / self.width, "y": 1 - top / self.height, "xanchor": "left", "yanchor": "top"}
        self.figure.add_annotation({**place, "text": text, "showarrow": False, "align": "left", "font": {"size": size, "color": colour}, **options})

    def panel(self, box: Box, xaxis: dict[str, Any], yaxis: dict[str, Any]) -> dict[str, str]:
        """Add a pair of axes in the box; returns the names that traces use to be drawn there."""
        self.panels += 1
        number = "" if self.panels == 1 else str(self.panels)
        across = [box.left / self.width, (box.left + box.width) / self.width]
        up = [1 - (box.top + box.height) / self.height, 1 - box.top / self.height]
        self.figure.update_layout({f"xaxis{number}": {"domain": across, "anchor": f"y{number}", **xaxis}})
        self.figure.update_layout({f"yaxis{number}": {"domain": up, "anchor": f"x{number}", **yaxis}})
        return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def words_width(title: str, subtitle: str) -> Pixels:
    """Pixels that a figure's title and subtitle need."""
    plain = re.sub(r"<[^>]*>|&nbsp;", "", subtitle)
    return 32 + max(10 * len(title), 7 * len(plain))


def lines(words: Iterable[str], width: Pixels) -> list[str]:
    """Words about a figure (plotly's HTML), with dots between them, in lines of this width."""
    found: list[str] = []
    for word in words:
        longer = f"{found[-1]} &nbsp;·&nbsp; {word}" if found else word
        if found and words_width("", longer) <= width:
            found[-1] = longer
        else:
            found.append(word)
    return found


def heading(title: str, description: str, width: Pixels) -> str:
    """A panel's heading: its name, and below it what it is, broken to fit."""
    lines = [f"<b>{escape(title, quote=False)}</b>"]
    small = f"font-size:11px;color:{MUTED}"
    return "<br>".join(lines + [f'<span style="{small}">{escape(line, quote=False)}</span>' for line in _broken(description, width)])


def heading_height(description: str, width: Pixels) -> int:
    """Pixels that a heading takes."""
    return 26 + 15 * len(_broken(description, width))


def _broken(text: str, width: Pixels) -> list[str]:
    return wrap(text, max(18, int(width / 5.6)))


def shown(token: str, limit: int = 14) -> str:
    r"""A token as tick text: without its leading space, control characters visible, nothing that plotly takes for a tag.

    >>> shown(" the"), shown("<bos>"), shown("\n")
    ('the', '&lt;bos&gt;', '↵')
    """
    text = token.strip(" ") or "␣" * len(token)
    for raw, visible in (("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(raw, visible)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return escape(text, quote=False)


def about(scores: ScoreMap) -> str:
    """What was patched, in one line: ``demo-gpt2 × ioi[32], denoising``."""
    text = f"{scores.subject}, {scores.provenance.get('direction', '?')}"
    return escape(text, quote=False)


def sparse_ticks(count: int, most: int) -> list[int]:
    """Indices to label so that at most ``most`` labels are drawn, in steps of 1, 2, 5, 10, ...

    >>> sparse_ticks(12, 12) == list(range(12)), sparse_ticks(48, 12)
    (True, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45])
    """
    steps = (digit * 10**power for power in range(8) for digit in (1, 2, 5))
    return list(range(0, count, next(step for step in steps if count <= most * step)))


def flow(sizes: Sequence[Pixels], limit: Pixels) -> list[list[int]]:
    """Indices of panels of these widths, in rows no wider than ``limit`` (a wider panel has a row of its own).

    >>> flow([40, 40, 40], 100)
    [[0, 1], [2]]
    """
    rows: list[list[int]] = []
    for i, size in enumerate(sizes):
        if rows and sum(sizes[j] for j in rows[-1]) + size <= limit:
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows
