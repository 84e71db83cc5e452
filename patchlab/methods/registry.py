"""The registry of methods: which class a word stands for, and how a method is spelled with it.

``[RULES+]WORD[:N][[option=value,...]][+qk][+drop][@SOURCE]``, always in this order, with defaults left out: ``relp+ig:5+qk@mean``,
``second-order:4[seed=1]``, ``verified[relp@mean,k=10]``. A class says by its fields what may stand where: ``rules`` comes first, a field with
``plus`` in its metadata is a suffix, ``source`` comes last, and all others are options in brackets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from patchlab.errors import MethodError
from patchlab.grammar import Word, changed, enter, options, written
from patchlab.rules import PRESETS
from patchlab.rules.composites import LRP

Kind = TypeVar("Kind", bound=type)
FIRST, LAST = "rules", "source"
"""The fields that are written before and after everything else."""


@dataclass(frozen=True)
class Entry:
    """A word: the class it stands for, the fields that it fixes, and the fields that its number and a method in brackets give."""

    kind: type
    word: str
    what: str
    fixed: Mapping[str, Any]
    number: str | None
    inner: str | None
    alias: bool
    implied: bool

    def __str__(self) -> str:
        return f"{self.kind.__name__}: {self.what}"

    @property
    def options(self) -> tuple[str, ...]:
        """The fields that may stand in brackets."""
        taken = {FIRST, LAST, self.number, self.inner, *self.fixed, *self.suffixes.values()}
        return tuple(field.name for field in fields(self.kind) if field.init and field.name not in taken)

    @property
    def suffixes(self) -> dict[str, str]:
        """The fields that are written as suffixes, by suffix, in their order."""
        return {field.metadata["plus"]: field.name for field in fields(self.kind) if "plus" in field.metadata}

    def takes(self, name: str) -> bool:
        """Whether methods of this word have a field."""
        return any(field.name == name and field.init for field in fields(self.kind))


ENTRIES: dict[str, Entry] = {}
"""All words. Words with a number end in ``:N``, so that a word may stand for one thing with a number and for another without."""


def register_method(
    form: str, what: str, *, number: str | None = None, inner: str | None = None, alias: bool = False, implied: bool = False, **fixed: Any
) -> Callable[[Kind], Kind]:
    """Decorator that registers a method, a frozen dataclass, under a word; several may be put on one class.

    Args:
        form: the word, such as ``ig-left``; with ``:N`` at its end if it takes a number.
        what: a line that describes it.
        number: the field that the number gives.
        inner: the field that is a method by itself, written in brackets first.
        alias: read, never written.
        implied: what rules alone mean: after rules the word is left out (``relp``, not ``relp+atp``).
        **fixed: values of fields that the word stands for.

    Example:
        >>> @register_method("doubled:N", "twice N", number="n")  # doctest: +SKIP
        ... @dataclass(frozen=True)
        ... class Doubled(Method):
        ...     n: int = 1

    Raises:
        MethodError: the word is taken or malformed, or the class has no such field.
    """

    def register(kind: Kind) -> Kind:
        own = {field.name for field in fields(kind) if field.init}
        for name in (number, inner, *fixed):
            if name is not None and name not in own:
                raise MethodError(f"{kind.__name__} has no field {name!r}, which {form!r} needs; it has {', '.join(sorted(own))}.")
        word = form.removesuffix(":N")
        if (form == word) == (number is not None):
            raise MethodError(f"{form!r}: a word ends in ':N' if number= says which field that is, and only then.")
        entry = Entry(kind, word, what, fixed, number, inner, alias, implied)
        if word in (*PRESETS, LRP):
            raise MethodError(f"there is already a rule preset {word!r}; register the method under another name.")
        enter(ENTRIES, "method", form, entry, MethodError)
        return kind

    return register


def name_of(method: Any) -> str:
    """The name of a method, with which :func:`patchlab.methods.get_method` gives an equal one.

    Raises:
        MethodError: its class is not registered.
    """
    entries = [entry for entry in ENTRIES.values() if entry.kind is type(method) and not entry.alias]
    if not entries:
        raise MethodError(
            f"{type(method).__name__} is in no registry of methods, so no result could be led back to it: put "
            f"@patchlab.methods.register_method(NAME, 'what it is') over the class, or give it a property 'name'."
        )
    given = changed(method)
    rest = [
        (entry, {name: value for name, value in given.items() if name not in (entry.number, entry.inner, *entry.fixed)})
        for entry in entries
        if (entry.number is None or getattr(method, entry.number) is not None)
        and all(getattr(method, name) == value for name, value in entry.fixed.items())
    ]
    if not rest:
        forms = ", ".join(entry.word for entry in entries)
        raise MethodError(f"none of the names of {type(method).__name__} ({forms}) fits {method!r}; register one that does.")
    entry, left = min(rest, key=lambda one: (len(one[1]), -len(one[0].fixed)))
    rules, source = left.pop(FIRST, None), left.pop(LAST, None)
    if any(rules == one.word for one in ENTRIES.values()):
        raise MethodError(f"the rule preset {rules!r} has the name of a method; register it under another.")
    suffixes = [suffix for suffix, field in entry.suffixes.items() if left.pop(field, False)]
    inner = () if entry.inner is None else (getattr(method, entry.inner).name,)
    number = None if entry.number is None else written(getattr(method, entry.number))
    word = None if rules is not None and entry.implied else str(Word(entry.word, number, (*inner, *options(left))))
    return "+".join(part for part in (rules, word, *suffixes) if part is not None) + ("" if source is None else f"@{source}")
