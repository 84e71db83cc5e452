"""Documents: the text of a YAML file as plain values, and where in the file each of them stands."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from patchlab.errors import SweepError

LIMIT = 1_000_000
"""Bytes that a file may have."""
_VALUES = 100_000
"""Values that a file may have, each alias counted with all that it stands for."""
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")}
_INT, _FLOAT = re.compile(r"[-+]?(0|[1-9][\d_]*)"), re.compile(r"[-+]?[\d_]*\.?[\d_]*([eE][-+]?\d+)?|[-+]?\.(inf|nan)", re.IGNORECASE)
Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""


@dataclass(frozen=True, eq=False)
class Document:
    """A YAML file.

    Args:
        path: of the file.
        values: mappings, lists, texts, numbers, truth values and None.
    """

    path: Path
    values: Any
    _root: yaml.Node | None = field(repr=False, default=None)

    @staticmethod
    def read(path: Path) -> "Document":
        """The one document of a file.

        Raises:
            SweepError: a file that cannot be read, is too large, is not UTF-8, is empty, is not YAML, has more than one document, a key twice, keys
                that are no texts, values that are neither texts, numbers, lists nor mappings, or anchors that contain themselves.
        """
        text = _text(path)
        loader = None
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            if root is None:
                raise SweepError(f"{path} is empty; a sweep begins with 'version: 1'.")
            return Document(path, _Reader(path, loader).value(root), root)
        except yaml.MarkedYAMLError as error:
            raise SweepError(f"{path}, {_line(error)}: {_why(error, text)}") from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise SweepError(f"{path}, line {line}: the character {chr(int(error.character))!a} cannot stand in YAML; remove it.") from error
        except RecursionError as error:
            raise SweepError(f"{path} is nested too deeply; a sweep has no more than five levels.") from error
        finally:
            if loader is not None:
                loader.dispose()

    def wrong(self, place: Place, message: str) -> SweepError:
        """An error about a value: the file, the line, the path in it, and what is wrong."""
        path = self.path_of(place)
        return SweepError(f"{self.path}, line {self.line(place)}{', ' + path if path else ''}: {message}")

    def line(self, place: Place) -> int:
        """The line of a value, or of what is nearest around it."""
        lines = [found[0] for _, found in self._walk(place) if found is not None]
        return lines[-1] if lines else 1

    def path_of(self, place: Place) -> str:
        """The path of a value, ``runs[2].score.methods[1]``: the parts of a place that the file spells out, and kinds."""
        written = [part for part, found in self._walk(place) if found is not None]
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in written).removeprefix(".")

    def has(self, place: Place) -> bool:
        """Whether the file spells out such a value."""
        return all(found is not None for _, found in self._walk(place))

    def _walk(self, place: Place) -> Iterator[tuple[str | int, tuple[int, yaml.Node] | None]]:
        """The parts of a place with line and node; None for what the file does not spell out. Kinds are parts of paths."""
        node, line = self._root, 1
        for part in place:
            found = _child(node, part)
            if found is None and node is not None and _value(node, "kind") == part:
                found = line, node
            line, node = found or (line, node)
            yield part, found


def _child(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    """A part of a node and its line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def _value(node: yaml.Node | None, key: str) -> Any:
    found = _child(node, key)
    return None if found is None else found[1].value


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise SweepError(f"cannot read {path}: {error.strerror or error}. Give the YAML file of a sweep.") from error
    if len(data) > LIMIT:
        raise SweepError(f"{path} has more than {LIMIT:,} bytes, which no sweep needs; is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SweepError(f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8.") from error


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return "line ?" if mark is None else f"line {mark.line + 1}"


def _why(error: yaml.MarkedYAMLError, text: str) -> str:
    """What is wrong with text that is not YAML, and what to do."""
    mark = error.problem_mark or error.context_mark
    line = "" if mark is None else (text.split("\n")[mark.line : mark.line + 1] or [""])[0]
    why = " ".join(part for part in (error.context, error.problem) if part)
    if "\\t" in why or (line.lstrip(" ").startswith("\t")):
        return f"a tab where YAML has spaces ({why}); indent with spaces."
    if "expected a single document" in why:
        return "a second document begins here; a sweep is one document, so remove the '---'."
    if re.search(r"[\w*-]\[", line):
        return f'{why}. Names with brackets stand in quotes: "lrp[ln,identity]".'
    return f"{why}."


class _Reader:
    """Turns nodes into plain values."""

    def __init__(self, path: Path, loader: yaml.SafeLoader) -> None:
        self.path, self.loader, self.count = path, loader, 0

    def value(self, node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> Any:
        self.count += 1
        if self.count > _VALUES:
            raise self.wrong(node, f"with its aliases (*NAME) written out the file has more than {_VALUES:,} values; write fewer.")
        if any(node is one for one in above):
            raise self.wrong(node, "this anchor (&NAME) contains itself through an alias (*NAME); write the values out.")
        above = (*above, node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(one, above) for one in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, above)
        raise self.wrong(node, f"the tag {node.tag} is not read; write plain texts, numbers, lists and mappings.")

    def mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise self.wrong(key, "merge keys (<<) are not read; write the fields out, or use lists, which are grids.")
            name = self.scalar(key) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str):
                raise self.wrong(key, f"a key is a text; got {key.value if isinstance(key, yaml.ScalarNode) else 'a list or mapping'!r}.")
            if name in found:
                raise self.wrong(
                    key, f"the key {name!r} stands twice, here and in line {lines[name]}; keep one of them, or make a list of their values."
                )
            lines[name] = key.start_mark.line + 1
            found[name] = self.value(value, above)
        return found

    def scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _SCALARS:
            raise self.wrong(node, f"the tag {node.tag} is not read; write plain texts, numbers, lists and mappings.")
        kind, text = node.tag.rpartition(":")[2], node.value
        if (kind == "int" and not _INT.fullmatch(text)) or (kind == "float" and not _FLOAT.fullmatch(text)):
            raise self.wrong(
                node,
                f"{text} is another number in YAML than it looks like (octal, hexadecimal or minutes); write a decimal number, or a text in quotes.",
            )
        try:
            return self.loader.construct_object(node)
        except ValueError as error:
            raise self.wrong(node, f"{text!r} cannot be read as {kind} ({error}); put a text in quotes.") from error

    def wrong(self, node: yaml.Node, message: str) -> SweepError:
        return SweepError(f"{self.path}, line {node.start_mark.line + 1}: {message}")
