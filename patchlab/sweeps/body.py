"""Bodies of files of sweeps: which keys there are and what stands under them, each field of a spec as one value or as a grid; the JSON schema."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, create_model, model_validator
from pydantic_core import core_schema

from patchlab.errors import unknown
from patchlab.sweeps.fields import Count, Direction, Plain, refusal, shown
from patchlab.sweeps.spec import BATCH_SIZE, KINDS_OF_RUN, Kind, ModelSpec, Spec, TaskSpec

VERSION = 1
TOGETHER = ("sites", "sizes", "points")
"""Fields whose lists belong together."""


@dataclass(frozen=True)
class _Reads:
    """What is read before a type is checked; ``also`` is the other form that the JSON schema allows, made from the first."""

    read: Callable[[Any], Any]
    also: Callable[[dict[str, Any]], dict[str, Any]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        return {"anyOf": [self.also(found), found]}


def _listed(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _listed_together(given: Any) -> tuple[Any, ...]:
    """One list, or a list of lists."""
    inner = [isinstance(one, list) for one in given] if isinstance(given, list) else []
    if any(inner) and not all(one or value is None for one, value in zip(inner, given, strict=True)):
        raise refusal("either one list, whose values belong together, or a list of such lists; got both in one.")
    return tuple(given) if any(inner) else (given,)


def _grid(kind: Any, *, together: bool = False) -> Any:
    """The type of one value or a list of values."""
    read = _listed_together if together else _listed
    return Annotated[tuple[kind, ...], Field(min_length=1), _Reads(read, lambda many: many["items"])]


def _named(given: Any) -> Any:
    if not isinstance(given, (str, dict)):
        raise refusal(f"an item is a name or a mapping such as {{name: gpt2}}; got {shown(given)}, which is neither. Put a name in quotes.")
    return {"name": given} if isinstance(given, str) else given


def _single(given: Any) -> Any:
    if isinstance(given, (list, dict)):
        raise refusal(f"a text, a number or a truth value; got {shown(given)}.")
    return given


Value = Annotated[Plain, BeforeValidator(_single)]


class _Item(BaseModel):
    """A mapping of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for key in given:
                if key not in cls.model_fields:
                    raise refusal(unknown("key", key, cls.model_fields), key)
        return given


def _item(name: str, spec: type[Spec], leave: Sequence[str], rename: Mapping[str, str], **more: Any) -> Any:
    """The item of the file that gives the fields of a spec, each as one value or as a grid."""
    fields: dict[str, Any] = {}
    for own, about in spec.model_fields.items():
        if own in leave:
            continue
        kind = Annotated[(about.annotation, *about.metadata)] if about.metadata else about.annotation
        grid = _grid(kind, together=own in TOGETHER)
        fields[rename.get(own, own)] = (grid, ...) if about.is_required() else (grid, Field(default_factory=tuple))
    return create_model(name, __base__=_Item, __doc__=spec.__doc__, **fields, **more)


_Optional: Any = Annotated[int | None, Field(ge=1)]
_SIZE: Any = (_Optional, None)
_Model = _item("Model", ModelSpec, ("path", "content", "device"), {}, device=(ModelSpec.model_fields["device"].annotation, None), batch_size=_SIZE)
_Task = _item(
    "Task",
    TaskSpec,
    ("path", "content", "options"),
    {},
    options=(_grid(dict[str, _grid(Value)]), Field(default_factory=tuple)),
)
_Models = _grid(Annotated[_Model, _Reads(_named, lambda _: {"type": "string"})])
_Tasks = _grid(Annotated[_Task, _Reads(_named, lambda _: {"type": "string"})])
_Directions = _grid(Direction)


def _kind(spec: type[Kind], suffix: str, **more: Any) -> Any:
    name, kind = spec.model_fields["kind"].default, spec.model_fields["kind"].annotation
    own = {"directions": (_Directions, Field(default_factory=tuple)), "batch_size": _SIZE}
    return _item(f"{name.capitalize()}{suffix}", spec, ("kind", "path", "content"), {"method": "methods"}, kind=(kind, ...), **more, **own)


def _union(kinds: Iterable[Any]) -> Any:
    first, *rest = kinds
    for one in rest:
        first = first | one
    return Annotated[first, Field(discriminator="kind")]


_Run = _union([_kind(spec, "") for spec in KINDS_OF_RUN])
_Included = _union([_kind(spec, "Included", models=(_Models, ...), tasks=(_Tasks, ...)) for spec in KINDS_OF_RUN])


Body: Any = create_model(
    "Sweep",
    __base__=_Item,
    __doc__="A sweep: models × tasks × directions × runs, without what is excluded, and with what is included.",
    version=(Literal[1], ...),
    name=(Annotated[str | None, Field(pattern=r"^[\w.-]+$")], None),
    models=(_Models, Field(default_factory=tuple)),
    tasks=(_Tasks, Field(default_factory=tuple)),
    directions=(_Directions, ("denoising",)),
    batch_size=(Count, BATCH_SIZE),
    runs=(_grid(_Run), Field(default_factory=tuple)),
    include=(_grid(_Included), Field(default_factory=tuple)),
    exclude=(_grid(Annotated[dict[str, Any], Field(min_length=1)]), Field(default_factory=tuple)),
)
"""What a file says."""


def schema() -> dict[str, Any]:
    """The JSON schema of a sweep, by which editors complete and check."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Body.model_json_schema()}


_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "finite_number": "a finite number",
}


def said(error: Any) -> str:
    """What is wrong, in the words of patchlab."""
    kind, got, about = error["type"], error.get("input"), error.get("ctx", {})
    name = next((part for part in reversed(error["loc"]) if isinstance(part, str)), "this")
    if kind == "refused":
        return str(about["message"])
    if kind == "missing":
        return f"{name!r} is missing; add '{name}: ...'."
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        valid = re.findall(r"'([^']+)'", str(about.get("expected_tags", ""))) or [spec.model_fields["kind"].default for spec in KINDS_OF_RUN]
        if kind == "union_tag_invalid":
            return unknown("kind of run", about["tag"], valid)
        return f"an item of runs says what kind it is: 'kind: {valid[0]}' (or {', '.join(valid[1:])}); got {shown(got)}."
    if kind == "literal_error":
        return unknown(name.removesuffix("s"), got, re.findall(r"'([^']+)'", str(about["expected"]))) if name != "version" else _no_version(got)
    if kind == "too_short":
        return f"{name} is empty; give at least one value, or leave {name} out."
    if kind == "string_too_short":
        return f"{name} is an empty text; give a name."
    if kind == "string_pattern_mismatch":
        return f"{name} is made of letters, digits, '.', '_' and '-'; got {shown(got)}."
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        limit = next(about[key] for key in ("ge", "gt", "le", "lt") if key in about)
        words = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most", "less_than": "less than"}[kind]
        return f"{name} must be {words} {limit:g}; got {shown(got)}."
    if kind in _KINDS:
        quotes = " Put a text in quotes." if kind == "string_type" and not isinstance(got, (list, dict)) else ""
        quotes = " Write the number without quotes, spelt out." if kind in ("int_type", "float_type") and isinstance(got, str) else quotes
        return f"{name} is {_KINDS[kind]}; got {shown(got)}.{quotes}"
    return f"{error['msg']}; got {shown(got)}."


def _no_version(got: Any) -> str:
    return f"version is the number {VERSION}; got {shown(got)}."
