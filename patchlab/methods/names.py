"""Names of methods, as results, files and the command line write them; the grammar is that of :mod:`patchlab.methods.registry`."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from patchlab.errors import MethodError, unknown
from patchlab.grammar import Word, default, read, split, values
from patchlab.methods.method import Method
from patchlab.methods.registry import ENTRIES, FIRST, LAST, Entry
from patchlab.methods.verified.search import VerifiedPatching
from patchlab.rules import PRESETS, RULES
from patchlab.rules.composites import DESCRIPTIONS, LRP


class _Listing(Mapping[str, str]):
    """The names that are registered at the moment, and how they combine."""

    def _all(self) -> dict[str, str]:
        words = {f"{form}[METHOD]" if entry.inner else form: entry.what for form, entry in ENTRIES.items()}
        combined = {
            f"{LRP}[RULE,...]": f"relevance patching with single rules, e.g. lrp[ln,identity]; rules: {', '.join(RULES)}",
            "PRESET+ig:N": "integrated relevance: a rule preset (or lrp[...]) at N points, e.g. relp+ig:5, gim+ig-left:5",
            "METHOD+qk": "QK-fix on top of a gradient or relevance method, e.g. atp+qk, relp+qk, ig:5+qk",
            "METHOD+drop": "GradDrop on top of a gradient or relevance method, e.g. atp+drop, relp+qk+drop",
            "METHOD+spliced": "gradients reach earlier layers through the model's dictionaries alone, e.g. atp+spliced, relp+spliced",
            "METHOD@SOURCE": "what is patched in, if not the other prompt: zero, mean or mean_positional, e.g. exact@mean, relp+ig:5+qk@zero",
            "METHOD[OPTION=VALUE,...]": "other options by name, e.g. exact[engine=literal], second-order:4[seed=1], verified[relp,k=10]",
        }
        return {**words, **DESCRIPTIONS, **combined}

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


METHODS = _Listing()
"""All names, with placeholders in capitals, and what they stand for."""


def get_method(name: str) -> Method | VerifiedPatching:
    """The method that a name stands for; the name of a method gives an equal one.

    Names are read as :mod:`patchlab.methods.registry` writes them. Aliases are read as well, and defaults may be spelt out; linearised
    methods are :class:`patchlab.methods.LinearizedPatching`, which is what their named constructors make.

    >>> get_method("relp+ig:5").name, get_method("eap-ig:5").name, get_method("second-order[probes=4,seed=0]").name
    ('relp+ig:5', 'ig-right:5', 'second-order:4')

    Raises:
        MethodError: unknown name, a suffix that the method does not have or that stands in another place, an option that it does not take.
        RuleError: unknown rules.
    """

    def refused(why: str = "") -> MethodError:
        return MethodError(unknown("method", name, METHODS, more=why))

    body, *sources = split(_text(name), "@")
    texts = split(body, "+")
    given: dict[str, Any] = {}
    if (found := _found(texts[0])) is None and len(texts) > 1 and (found := _found(texts[1])) is not None:
        given[FIRST] = texts.pop(0)
        if found[0].implied or FIRST in found[0].fixed or not found[0].takes(FIRST):
            raise refused(f"{found[0].word} does not go with rules before it.")
    elif found is None and _is_rules(texts[0]):
        found, given[FIRST] = next((entry, Word(entry.word)) for entry in ENTRIES.values() if entry.implied), texts[0]
    if found is None:
        raise refused()
    entry, word = found
    if entry.number is not None:
        try:
            given[entry.number] = read(word.number or "", entry.kind, entry.number, MethodError)
        except MethodError as error:
            raise refused(str(error)) from None
        if given[entry.number] is None:
            raise refused(f"{entry.word} needs a number, as in {entry.word}:5.")
    items = list(word.items)
    if entry.inner is not None and items and len(split(items[0], "=")) == 1:
        given[entry.inner] = scoring_method(items.pop(0))
    given |= values(items, entry.kind, f"the method {entry.word}", entry.options, MethodError)
    given |= dict.fromkeys(_suffixes(entry, texts[1:], refused), True)
    if sources:
        if len(sources) > 1 or not entry.takes(LAST) or not sources[0]:
            inside = f" The source is that of the method in brackets: {entry.word}[relp@mean]." if entry.inner else ""
            raise refused(f"One source may follow '@', and only where the method has one.{inside}")
        given[LAST] = sources[0]
    given = {**entry.fixed, **given}
    if missing := [field.name for field in fields(entry.kind) if field.init and default(field) is MISSING and field.name not in given]:
        raise refused(f"{entry.word} needs {', '.join(missing)}, as in {entry.word}[{missing[0]}=VALUE].")
    return entry.kind(**given)


def scoring_method(name: str) -> Method:
    """The method that a name stands for, which must give a score map.

    Raises:
        MethodError, RuleError: as :func:`get_method`; the name of verified patching, which finds cells and scores only some.
    """
    method = get_method(name)
    if isinstance(method, Method):
        return method
    raise MethodError(
        f"{name} scores only the cells that it verifies, so it gives no score map; name its screen instead, such as {method.screen.name}."
    )


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise MethodError(f"the name of a method is a text, such as 'relp'; got {name!r}. (In YAML, put names with brackets in quotes.)")
    return name


def _found(text: str) -> tuple[Entry, Word] | None:
    """The entry of a word; None if there is none."""
    word = Word.parse(text)
    entry = None if word is None else ENTRIES.get(word.text if word.number is None else f"{word.text}:N")
    return None if entry is None or word is None else (entry, word)


def _is_rules(text: str) -> bool:
    word = Word.parse(text)
    return word is not None and word.number is None and word.text != "gradient" and word.text in (*PRESETS, LRP)


def _suffixes(entry: Entry, texts: list[str], refused: Any) -> Iterator[str]:
    """The fields of suffixes, which stand once each and in their order."""
    order, last = list(entry.suffixes), -1
    for text in texts:
        if text not in order:
            raise refused(f"{text!r} is no suffix of {entry.word}; it has {', '.join(f'+{one}' for one in order) or 'none'}.")
        if entry.suffixes[text] in entry.fixed:
            raise refused(f"+{text} is part of {entry.word} already.")
        if order.index(text) <= last:
            raise refused(f"Suffixes stand once each and in this order: {', '.join(f'+{one}' for one in order)}.")
        last = order.index(text)
        yield entry.suffixes[text]
