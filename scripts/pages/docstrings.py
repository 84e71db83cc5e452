"""An extension of griffe that makes pages of patchlab's docstrings.

References, such as :func:`patchlab.load_task`, become links; doctests become blocks of code; and a package lists its public names, which are
documented in the modules that they live in.
"""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
_BLOCK = re.compile(r"::$", re.M)
_DOCTEST = re.compile(r"^( *)>>> .*\n?(?:\1\S.*\n?)*", re.M)
_FLAG = re.compile(r" *# doctest: .*")


class Pages(griffe.Extension):
    """Rewrites the docstrings of a package when it has been read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite them all."""
        _rewrite(pkg)


def _rewrite(parent: griffe.Object | griffe.Alias) -> None:
    if parent.is_module and parent.exports:
        _list_exports(parent)
    if parent.docstring is not None:
        text = _ROLE.sub(lambda match: _link(match[1], _found(parent, match[1])), parent.docstring.value)
        parent.docstring.value = _DOCTEST.sub(_fenced, _BLOCK.sub(":", text))
    for member in parent.members.values():
        if not member.is_alias:
            _rewrite(member)


def _list_exports(module: Any) -> None:
    """Name what a package exports at its head, with links, so that it is documented once; what comes from private modules is documented here."""
    listed, kept = [], []
    for name in module.exports:
        member = module.members.get(str(name))
        away = member is not None and member.is_alias and "._" not in member.target_path
        (listed if away else kept).append(str(name))
    module.exports = kept or None
    if listed and module.docstring is not None:
        links = ", ".join(_link(name, module.members[name]) for name in listed)
        module.docstring.value += f"\n\nPublic names: {links}."


def _found(within: Any, name: str) -> Any:
    """What a name means in a docstring."""
    first, _, rest = name.partition(".")
    try:
        found = within.package if first == "patchlab" else within.package[within.resolve(first).removeprefix("patchlab.")]
        return found[rest] if rest else found
    except (griffe.NameResolutionError, KeyError):
        raise ValueError(f"{within.path}: no {name} is known here, which its docstring refers to") from None


def _link(name: str, found: Any) -> str:
    """A link to what is documented; code where it has no docstring of its own, as a field that its class describes."""
    try:
        target = found.final_target if found.is_alias else found
    except griffe.AliasResolutionError:  # one of several names of an assignment
        return f"`{name}`"
    return f"[`{name}`][{target.path}]" if target.docstring is not None else f"`{name}`"


def _fenced(block: re.Match[str]) -> str:
    indent, text = block[1], _FLAG.sub("", block[0].rstrip("\n"))
    return f"{indent}```python\n{text}\n{indent}```\n"
