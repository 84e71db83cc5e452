"""Contexts that activate features: values that print as tables and as pages."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import pandas as pd

from patchlab.errors import DictionaryError
from patchlab.store.files import writing

Weighted = tuple[tuple[str, float], ...]
"""Tokens with a number each."""


@dataclass(frozen=True)
class Context:
    """A place in the texts where a feature is active, and what is around it.

    Args:
        row: number of the row of the texts.
        layer: which layer's activation it is, of a dictionary that reads several; else None.
        position: of the token, in its row.
        activation: of the feature there.
        tokens: the window, as texts of tokens.
        activations: of the feature in the window.
        at: which token of the window it is about.
    """

    row: int
    layer: int | None
    position: int
    activation: float
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    at: int

    @property
    def token(self) -> str:
        """The token at which the feature is most active."""
        return self.tokens[self.at]

    def __str__(self) -> str:
        before, after = " ".join(self.tokens[: self.at]), " ".join(self.tokens[self.at + 1 :])
        return f"{before} [{self.token}] {after}".strip()


@dataclass(frozen=True)
class FeatureExamples:
    """What activates one feature, and what its direction does to the logits.

    Args:
        feature: its number.
        address: its name, ``L3.F512.resid_post``.
        density: share of the tokens where it is active.
        mean: of its activation where it is active; NaN if nowhere.
        contexts: where it is most active, at most one per row, the most active first.
        promoted: tokens whose logit its decoder direction raises most, with the difference in logits.
        suppressed: tokens whose logit it lowers most.
    """

    feature: int
    address: str
    density: float
    mean: float
    contexts: tuple[Context, ...]
    promoted: Weighted
    suppressed: Weighted

    @property
    def largest(self) -> float:
        """Its activation at the first of the contexts; 0 if it is never active."""
        return self.contexts[0].activation if self.contexts else 0.0

    @property
    def tokens(self) -> Weighted:
        """The tokens at which it is most active, with the share of the contexts in which it is that token."""
        counts = Counter(context.token for context in self.contexts)
        return tuple((token, count / len(self.contexts)) for token, count in counts.most_common())


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """What activates the features of a dictionary.

    Args:
        dictionary: its name.
        model: the model's name.
        texts: the name of the texts.
        n_tokens: tokens that were looked at (per layer, where the dictionary reads several).
        n_features: features of the dictionary.
        n_dead: features of those asked for that are never active here.
        features: one entry per feature.
    """

    dictionary: str
    model: str
    texts: str
    n_tokens: int
    n_features: int
    n_dead: int
    features: tuple[FeatureExamples, ...]

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[FeatureExamples]:
        return iter(self.features)

    def __getitem__(self, feature: int) -> FeatureExamples:
        """The examples of a feature, by its number in the dictionary.

        Raises:
            DictionaryError: a feature that is not among them.
        """
        for one in self.features:
            if one.feature == feature:
                return one
        raise DictionaryError(
            f"there are no examples of feature {feature} of {self.dictionary}: it is not among the {len(self)} that were asked for, or never active."
        )

    @property
    def heading(self) -> str:
        """What was looked at, in a sentence."""
        dead = f", {self.n_dead:,} more are never active" if self.n_dead else ""
        return f"{self.dictionary} of {self.model} on {self.n_tokens:,} tokens of {self.texts}: {len(self):,} of {self.n_features:,} features{dead}"

    def table(self) -> pd.DataFrame:
        """One row per feature: ``feature, density, mean, max, tokens, promoted, suppressed``; the last three as texts."""
        rows = [
            (one.feature, one.density, one.mean, one.largest, *(_words(tokens) for tokens in (one.tokens, one.promoted, one.suppressed)))
            for one in self.features
        ]
        return pd.DataFrame(rows, columns=["feature", "density", "mean", "max", "tokens", "promoted", "suppressed"])

    def save_html(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a page that needs no network.

        Raises:
            OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.
        """
        with writing(path, overwrite=overwrite) as temporary:
            temporary.write_text(page(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        return _sections(self, at_most=12)

    def __repr__(self) -> str:
        lines = [f"Examples({self.heading})"]
        for one in self.features[:10]:
            where = f"{one.address:<22} {one.density:6.2%}  max {one.largest:<7.3g}"
            effects = f"  +logits: {_words(one.promoted[:4])}" if one.promoted else ""
            lines.append(f"  {where}  at: {_words(one.tokens[:4]) or '(never active)'}{effects}")
        return "\n".join(lines + ([f"  and {len(self) - 10:,} more"] if len(self) > 10 else []))


def _words(tokens: Weighted) -> str:
    return ", ".join(token for token, _ in tokens)


# --- pages -----------------------------------------------------------------------------------------------------------

_CSS = """
.patchlab-examples { color: #1c2330; background: #fff; font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  --muted: #5d6675; --line: #d9dee6; --band: #f5f7fa; --accent: #2f5d8a; --heat: 236, 130, 20; color-scheme: light; }
.patchlab-examples * { box-sizing: border-box; }
.patchlab-examples h1 { margin: 0 0 4px; font-size: 24px; line-height: 1.25; }
.patchlab-examples h2 { margin: 0; font-size: 16px; }
.patchlab-examples p { max-width: 90ch; margin: 4px 0 10px; color: var(--muted); }
.patchlab-examples nav { display: flex; flex-wrap: wrap; gap: 4px 6px; margin: 12px 0 20px; }
.patchlab-examples a { color: var(--accent); text-decoration: none; padding: 1px 7px; border: 1px solid var(--line);
  border-radius: 10px; font-size: 13px; }
.patchlab-examples a:hover, .patchlab-examples a:focus-visible { background: var(--band); outline: 2px solid var(--accent); }
.patchlab-examples section { margin: 0 0 14px; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; }
.patchlab-examples dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; margin: 8px 0; }
.patchlab-examples dt { color: var(--muted); }
.patchlab-examples dd { margin: 0; overflow-wrap: anywhere; }
.patchlab-examples .number { color: var(--muted); font-variant-numeric: tabular-nums; }
.patchlab-examples dd span.word { margin-right: 14px; white-space: nowrap; }
.patchlab-examples .scroll { overflow-x: auto; }
.patchlab-examples .scroll:focus-visible { outline: 2px solid var(--accent); }
.patchlab-examples table { border-collapse: collapse; width: 100%; background: none; margin: 6px 0 0; }
.patchlab-examples caption { text-align: left; color: var(--muted); font-size: 13px; }
.patchlab-examples th, .patchlab-examples td { padding: 3px 10px 3px 0; text-align: left; white-space: nowrap; border: 0; background: none;
  border-top: 1px solid var(--line); font-weight: 400; }
.patchlab-examples td.number, .patchlab-examples th.number { text-align: right; width: 1%; }
.patchlab-examples th { color: var(--muted); font-size: 13px; }
.patchlab-examples .token { display: inline-block; padding: 0 3px; margin: 0 1px; border-radius: 3px; white-space: pre; color: inherit; }
.patchlab-examples mark.token { font-weight: 700; box-shadow: inset 0 -2px 0 rgb(var(--heat)); background: none; }
@media (prefers-color-scheme: dark) { .patchlab-examples { color: #dfe4ea; background: #141414; --muted: #9aa4b1; --line: #343c47; --band: #1d232b;
  --accent: #8db8e2; --heat: 230, 120, 20; color-scheme: dark; } }
"""
_PAGE_CSS = "body { margin: 0; } .patchlab-examples { max-width: 1200px; min-height: 100vh; margin: 0 auto; padding: 28px 24px 48px; }"
_PAGE_CSS += " @media (prefers-color-scheme: dark) { body { background: #141414; } }"
_VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def page(found: Examples) -> str:
    """A whole document, with a list of links to the features."""
    links = "".join(f'<a href="#f{one.feature}">{one.feature}</a>' for one in found.features)
    body = (
        f'<main class="patchlab-examples"><h1>What activates the features of {escape(found.dictionary)}</h1><p>{escape(found.heading)}. {_LEGEND}</p>'
        f'<nav aria-label="Features">{links}</nav>{"".join(map(_section, found.features))}</main>'
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.dictionary)} of {escape(found.model)}: examples of features</title><style>{_CSS}{_PAGE_CSS}</style></head>"
        f"<body>{body}</body></html>\n"
    )


_LEGEND = (
    "Each row is a place where a feature is most active, with its activation there; that token is underlined, and the stronger a token's background, "
    "the more active the feature is at it. Raised and lowered are the tokens whose logits the feature's direction moves by itself."
)


def _sections(found: Examples, at_most: int) -> str:
    """A piece of a page with the first features."""
    more = f"<p>and {len(found) - at_most:,} more features; save_html writes them all.</p>" if len(found) > at_most else ""
    body = "".join(map(_section, found.features[:at_most]))
    return f'<div class="patchlab-examples"><style>{_CSS}</style><p>{escape(found.heading)}</p>{body}{more}</div>'


def _section(one: FeatureExamples) -> str:
    about = f"active at {one.density:.2%} of the tokens, {one.mean:.3g} on average there" if one.contexts else "never active here"
    effects = "".join(
        f"<dt>{name}</dt><dd>{''.join(_effect(token, value) for token, value in tokens)}</dd>"
        for name, tokens in (("raised", one.promoted), ("lowered", one.suppressed))
        if tokens
    )
    largest = max((abs(value) for context in one.contexts for value in context.activations), default=0.0) or 1.0
    rows = "".join(_row(context, largest) for context in one.contexts)
    head = '<tr><th class="number" scope="col">activation</th><th class="number" scope="col">row</th><th scope="col">tokens</th></tr>'
    table = f'<div class="scroll" tabindex="0" role="group" aria-label="contexts of {escape(one.address)}"><table>{head}{rows}</table></div>'
    return (
        f'<section id="f{one.feature}"><h2>{escape(one.address)}</h2><span class="number">{about}</span>'
        f"{f'<dl>{effects}</dl>' if effects else ''}{table if rows else ''}</section>"
    )


def _effect(token: str, value: float) -> str:
    return f'<span class="word">{_visible(token)} <span class="number">{value:+.2f}</span></span>'


def _row(context: Context, largest: float) -> str:
    spans = []
    for place, (token, value) in enumerate(zip(context.tokens, context.activations, strict=True)):
        tag = "mark" if place == context.at else "span"
        shade = f' style="background: rgba(var(--heat), {0.7 * abs(value) / largest:.2f})"' if value else ""
        title = f' title="{value:.3g}"' if value else ""
        spans.append(f'<{tag} class="token"{shade}{title}>{_visible(token)}</{tag}>')
    where = f"{context.row}" if context.layer is None else f"{context.row}, layer {context.layer}"
    return f'<tr><td class="number">{context.activation:.3g}</td><td class="number">{where}</td><td>{"".join(spans)}</td></tr>'


def _visible(token: str) -> str:
    """A token as HTML, with signs for what would not be seen."""
    shown = token.translate(_VISIBLE)
    return escape(shown if shown.strip() else shown.replace(" ", "␣") or "∅")
