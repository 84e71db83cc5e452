"""Names with arguments, ``WORD[:NUMBER][[ITEM,...]]``, such as ``ig:5`` or ``lrp[ln,epsilon:1e-4]``: how methods and rules are written.

Arguments stand in square brackets, as the axes of sites do: the shells that people type in take them as they are (or quoted, where they are
patterns), round brackets never. Nothing inside brackets cuts a list, so names with arguments go into lists with commas.
"""

import numbers
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from patchlab.errors import PatchlabError, unknown

_INT = re.compile(r"-?\d+", re.ASCII)
_FLOAT = re.compile(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?|-?inf", re.ASCII)
_PLAIN = {"none": None, "true": True, "false": False}


def split(text: str, at: str = ",") -> list[str]:
    """The parts of a text between separators that stand outside brackets, without the spaces around them.

    >>> split("exact, lrp[ln,identity], ig:5")
    ['exact', 'lrp[ln,identity]', 'ig:5']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


@dataclass(frozen=True)
class Word:
    """A word with its number and its items in brackets; None and nothing where there are none.

    >>> Word.parse("gamma:0.5[epsilon=1e-06]")
    Word(text='gamma', number='0.5', items=('epsilon=1e-06',))
    """

    text: str
    number: str | None = None
    items: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> "Word | None":
        """The word that a text is; None if it is none."""
        match = re.fullmatch(r"(?P<word>[^\[\]:+@,=\s]+)(:(?P<number>[^\[\]:+@,=\s]+))?(\[(?P<items>.*)\])?", text)
        if match is None:
            return None
        items = () if match["items"] is None else tuple(split(match["items"]))
        balanced = all(item and item.count("[") == item.count("]") for item in items)
        return Word(match["word"], match["number"], items) if balanced else None

    def __str__(self) -> str:
        number, items = "" if self.number is None else f":{self.number}", f"[{','.join(self.items)}]" if self.items else ""
        return f"{self.text}{number}{items}"


def written(value: object) -> str:
    """A value as it stands in a name: ``0.3``, ``true``, ``none``, ``literal``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value) + 0.0).removesuffix(".0").replace("e+", "e")  # as an equal whole number, and without -0
    return str(value)


def read(text: str, kind: type, field: str, error: type[PatchlabError]) -> Any:
    """The value of a field of a class that a text stands for, of the field's type.

    Raises:
        PatchlabError: none of the field's types has such a value; of the given class.
    """
    hint = get_type_hints(kind)[field]
    if get_origin(hint) is Literal:
        types: tuple[type, ...] = (str,)
    else:
        types = get_args(hint) or (hint,)
    if text in _PLAIN and type(_PLAIN[text]) in types:
        return _PLAIN[text]
    if int in types and _INT.fullmatch(text):
        return int(text)
    if float in types and _FLOAT.fullmatch(text):
        return float(text)
    if str in types and text not in _PLAIN:
        return text
    wanted = " or ".join("none" if one is NoneType else one.__name__ for one in types)
    raise error(f"{field} is of type {wanted}; got {text!r}.")


def default(field: Field[Any]) -> Any:
    """The value of a dataclass's field unless given; MISSING if it must be given."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass object that are not at their defaults."""
    given = {field.name: (getattr(value, field.name), default(field)) for field in fields(value) if field.init}
    return {name: own for name, (own, usual) in given.items() if usual is MISSING or own != usual}


def options(given: dict[str, Any]) -> tuple[str, ...]:
    """Items ``name=value``."""
    return tuple(f"{name}={written(value)}" for name, value in given.items())


def values(items: Iterable[str], kind: type, what: str, valid: Iterable[str], error: type[PatchlabError]) -> dict[str, Any]:
    """The fields of a class that items ``name=value`` give.

    Raises:
        PatchlabError: an item of another form, a name that is not valid or stands twice, a value of another type; of the given class.
    """
    found: dict[str, Any] = {}
    valid = list(valid)
    for item in items:
        name, *value = split(item, "=")
        if name not in valid:
            raise error(unknown(f"option of {what}", name, valid))
        if len(value) != 1:
            raise error(f"{item!r} in the name of {what} is no option; write {name}=VALUE.")
        if name in found:
            raise error(f"{what} has {name} twice; give it once.")
        found[name] = read(value[0], kind, name, error)
    return found


def enter(registry: dict[str, Any], what: str, name: str, value: Any, error: type[PatchlabError]) -> None:
    """Add to a registry.

    Raises:
        PatchlabError: the name is taken, or is not made of small letters, digits, ``-``, ``_`` and ``*`` (``:N`` may follow); of the given class.
    """
    if name in registry:
        raise error(f"there is already a {what} {name!r} ({registry[name]}); register another name.")
    if not re.fullmatch(r"[a-z][a-z0-9_*-]*(:N)?", name, re.ASCII):
        raise error(f"{name!r} cannot be the name of a {what}: take small letters, digits, '-' and '_', beginning with a letter.")
    registry[name] = value
