"""Files of sweeps: YAML that describes many runs, in which a list is a grid.

::

    version: 1
    models: [demo-gpt2-4l, {name: gpt2, dtype: bfloat16}]
    tasks:
      - {name: ioi, n: 16, seed: [0, 1]}
    directions: [denoising]
    runs:
      - {kind: score, methods: [exact, atp, relp], sites: [resid_pre, z]}
      - {kind: circuit, methods: relp, ablation: [resample, mean]}

Every combination is a run. The lists ``sites`` and ``sizes`` belong together; a list of such lists is a grid. An item of ``runs`` may have
``directions`` and a ``batch_size`` of its own, a model a ``batch_size``. ``exclude`` takes runs out of the grid: all that have the given
fields, as :meth:`patchlab.sweeps.spec.RunSpec.fields` names them. ``include`` adds items with ``models`` and ``tasks`` of their own.
"""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import core_schema

from patchlab.errors import PatchlabError, SweepError, unknown
from patchlab.sweeps.document import Document, Place
from patchlab.sweeps.spec import (
    BATCH_SIZE,
    KINDS_OF_RUN,
    CircuitSpec,
    Count,
    Direction,
    ModelSpec,
    Plain,
    RunSpec,
    ScoreSpec,
    Spec,
    TaskSpec,
    VerifySpec,
    refusal,
    shown,
)

VERSION = 1
MOST = 100_000
"""Runs that a file may describe."""
TOGETHER = ("sites", "sizes")
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
        kind = Annotated[(about.annotation, *about.metadata)] if about.metadata else about.annotation  # type: ignore[valid-type]
        grid = _grid(kind, together=own in TOGETHER)
        fields[rename.get(own, own)] = (grid, ...) if about.is_required() else (grid, Field(default_factory=tuple))
    return create_model(name, __base__=_Item, __doc__=spec.__doc__, **fields, **more)


Size = (Annotated[int, Field(ge=1)] | None, None)
_Model = _item("Model", ModelSpec, ("path", "content", "device"), {}, device=(ModelSpec.model_fields["device"].annotation, None), batch_size=Size)
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


def _kind(spec: type[ScoreSpec] | type[VerifySpec] | type[CircuitSpec], suffix: str, **more: Any) -> Any:
    name = spec.model_fields["kind"].default
    more = {"kind": (Literal[name], ...), **more, "directions": (_Directions, Field(default_factory=tuple)), "batch_size": Size}  # type: ignore[valid-type]
    return _item(f"{name.capitalize()}{suffix}", spec, ("kind",), {"method": "methods"}, **more)


def _union(kinds: Iterable[Any]) -> Any:
    first, *rest = kinds
    for one in rest:
        first = first | one
    return Annotated[first, Field(discriminator="kind")]


_Run = _union([_kind(spec, "") for spec in KINDS_OF_RUN])
_Included = _union([_kind(spec, "Included", models=(_Models, ...), tasks=(_Tasks, ...)) for spec in KINDS_OF_RUN])


class Body(_Item):
    """A sweep: models × tasks × directions × runs, without what is excluded, and what is included."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    models: _Models = ()
    tasks: _Tasks = ()
    directions: _Directions = ("denoising",)
    batch_size: Count = BATCH_SIZE
    runs: Annotated[tuple[_Run, ...], Field(min_length=1), _Reads(_listed, lambda many: many["items"])] = ()
    include: _grid(_Included) = ()  # type: ignore[valid-type]
    exclude: _grid(Annotated[dict[str, Any], Field(min_length=1)]) = ()  # type: ignore[valid-type]


@dataclass(frozen=True)
class SweepFile:
    """A file of a sweep, read and checked as far as one value by itself can be; :func:`runs_of` gives the runs.

    Args:
        document: the text, with the place of every value.
        body: what it says.
    """

    document: Document = field(repr=False)
    body: Any = field(repr=False)

    @property
    def path(self) -> Path:
        """The file."""
        return self.document.path

    @property
    def name(self) -> str:
        """The name of the sweep: that in the file, or of the file."""
        return self.body.name or self.path.stem

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of all models, as written."""
        items = [*self.body.models, *(model for one in self.body.include for model in one.models)]
        return tuple(dict.fromkeys(name for item in items for name in item.name))


def read(path: str | os.PathLike[str]) -> SweepFile:
    """Read the file of a sweep.

    Raises:
        SweepError: with the line and the path in the file, what was got and what is valid.
    """
    document = Document.read(Path(path))
    if not isinstance(document.values, dict):
        raise document.wrong((), f"a sweep is a mapping that begins with 'version: 1'; got {shown(document.values)}.")
    version = document.values.get("version")
    if type(version) is int and version != VERSION:
        raise document.wrong(
            ("version",), f"this is version {version} of the format, and this patchlab reads version {VERSION}. Use another patchlab."
        )
    try:
        body = Body.model_validate(document.values)
    except ValidationError as error:
        raise _first(document, error, Body) from None
    file = SweepFile(document, body)
    if not body.runs and not body.include:
        raise document.wrong((), "the file has no runs; give at least one item under 'runs:', such as {kind: score, methods: [relp], sites: [z]}.")
    for name in ("models", "tasks"):
        if body.runs and not getattr(body, name):
            raise document.wrong(("runs",), f"runs without {name}; list at least one under '{name}:'.")
        if not body.runs and getattr(body, name):
            raise document.wrong(
                (name,), f"{name} without runs would be ignored, since items of 'include:' have their own; add 'runs:' or remove them."
            )
    for name in ("directions", "exclude"):
        if not body.runs and name == "exclude" and body.exclude:
            raise document.wrong((name,), "exclude takes runs out of the grid of 'runs:', and there is none; remove it.")
    return file


def schema() -> dict[str, Any]:
    """The JSON schema of a sweep, by which editors complete and check."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Body.model_json_schema()}


@dataclass(frozen=True)
class _Choice:
    """One choice out of the grids of an item: its values, and where in the file each of them stands."""

    values: Mapping[str, Any]
    item: Place
    places: Mapping[Place, Place]

    def place(self, path: Place) -> Place:
        """Where a field stands, or what is nearest around it."""
        return next((self.places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.places), self.item)


@dataclass(frozen=True)
class _Made:
    """A part of a run and the choice that it comes from."""

    spec: Any
    choice: _Choice
    item: Any


def runs_of(file: SweepFile, *, models: Mapping[str, str | Path] | None = None) -> list[RunSpec]:
    """The runs that a file describes, in a fixed order: by model, task with seed, and direction, then as written.

    Args:
        file: from :func:`read`.
        models: folders that are taken in place of models of the file, by their names there.

    Raises:
        SweepError: an unknown task or option, a model or file that is not there, runs that mean the same, an exclude that matches nothing, or no
            or too many runs.
    """
    return _Expansion(file, {name: Path(folder) for name, folder in (models or {}).items()}).runs()


class _Expansion:
    """The expansion of one file."""

    def __init__(self, file: SweepFile, instead: Mapping[str, Path]) -> None:
        self.file, self.document, self.body, self.instead = file, file.document, file.body, instead
        self.folder = file.path.absolute().parent
        if odd := sorted(set(instead) - set(file.model_names)):
            raise SweepError(unknown("model to replace", odd[0], file.model_names))

    def runs(self) -> list[RunSpec]:
        body = self.body
        found = list(self._grid(body.models, ("models",), body.tasks, ("tasks",), body.runs, ("runs",)))
        found = self._without(found)
        for i, item in enumerate(body.include):
            place: Place = ("include", i, item.kind)
            found += self._grid(item.models, (*place, "models"), item.tasks, (*place, "tasks"), (item,), ("include",), first=i)
        self._refuse_repeated(found)
        if not found:
            raise self.document.wrong(("exclude",), "every run is excluded; exclude less.")
        runs = [run for run, _ in found]
        order: dict[Any, int] = {}
        places = [[order.setdefault(_same(part), len(order)) for part in (run.model, run.task, run.direction)] for run in runs]
        return [runs[i] for i in sorted(range(len(runs)), key=lambda i: places[i])]

    def _grid(
        self, models: Sequence[Any], at_models: Place, tasks: Sequence[Any], at_tasks: Place, items: Sequence[Any], at: Place, *, first: int = 0
    ) -> Iterator[tuple[RunSpec, tuple[_Choice, ...]]]:
        """All combinations, with the choices behind each."""
        all_models = [one for i, item in enumerate(models) for one in self._parts(item, (*at_models, i), self._model)]
        all_tasks = [one for i, item in enumerate(tasks) for one in self._parts(item, (*at_tasks, i), self._task)]
        wanted = [one for i, item in enumerate(items, first) for one in self._parts(item, (*at, i, item.kind), _what)]
        directions = {id(item): self._directions(item, (*at, i, item.kind)) for i, item in enumerate(items, first)}
        order = list(dict.fromkeys(name for found in directions.values() for name in found))
        self._check_number(len(all_models) * len(all_tasks) * sum(len(directions[id(what.item)]) for what in wanted))
        for model, task, direction, what in itertools.product(all_models, all_tasks, order, wanted):
            if direction not in directions[id(what.item)]:
                continue
            size = next(size for size in (what.item.batch_size, model.item.batch_size, self.body.batch_size) if size is not None)
            chosen = _Choice({}, at, {("direction",): directions[id(what.item)][direction]})
            choices = (model.choice, task.choice, chosen, what.choice)
            try:
                run = RunSpec(model=model.spec, task=task.spec, direction=direction, what=what.spec, batch_size=size)
            except ValidationError as error:
                path = _path(error)
                choice = {"model": model, "task": task}.get(str(path[0]) if path else "", what).choice
                raise self.document.wrong(choice.place(path[1:]), _said(error.errors()[0])) from None
            yield run, choices

    def _directions(self, item: Any, place: Place) -> dict[str, Place]:
        own = bool(item.directions)
        names, at = (item.directions, (*place, "directions")) if own else (self.body.directions, ("directions",))
        repeated = [i for i, name in enumerate(names) if name in names[:i]]
        if repeated:
            raise self.document.wrong((*at, repeated[0]), f"the direction {names[repeated[0]]} stands twice; name it once.")
        return {name: (*at, i) for i, name in enumerate(names)}

    def _parts(self, item: Any, place: Place, make: Callable[[dict[str, Any], Any], Any]) -> list[_Made]:
        """The specs of an item of the file, one for each choice of its grids."""
        made = []
        for choice in self._choices(item, place):
            try:
                made.append(_Made(make(dict(choice.values), item), choice, item))
            except ValidationError as error:
                raise self.document.wrong(choice.place(_path(error)), _said(error.errors()[0])) from None
            except SweepError as error:
                raise self.document.wrong(choice.place(("name",)), str(error)) from None
        return made

    def _choices(self, item: Any, place: Place) -> Iterator[_Choice]:
        grids: list[list[tuple[Place, Any, Place]]] = []
        for name, about in type(item).model_fields.items():
            values = getattr(item, name)
            if name in ("kind", "directions", "batch_size", "models", "tasks") or values is None or values == ():
                continue
            if name == "options":
                grids.append(self._options(values, (*place, name)))
            elif name == "device":
                grids.append([((name,), values, (*place, name))])
            else:
                own = name.removesuffix("s") if name == "methods" else name
                listed = self.document.has((*place, name, len(values) - 1)) and not (name in TOGETHER and len(values) == 1)
                grids.append([((own,), value, (*place, name, *([i] if listed else []))) for i, value in enumerate(values)])
        self._check_number(math.prod(map(len, grids)))
        for chosen in itertools.product(*grids):
            places: dict[Place, Place] = {}
            values: dict[str, Any] = {}
            for path, value, where in chosen:
                places[path] = where
                if path == ("options",):
                    values["options"] = {name: one for name, one, _ in value}
                    places |= {("options", name): at for name, _, at in value}
                else:
                    values[str(path[0])] = value
            yield _Choice(values, place, places)

    def _options(self, many: Sequence[Mapping[str, Sequence[Any]]], place: Place) -> list[tuple[Place, Any, Place]]:
        found: list[tuple[Place, Any, Place]] = []
        for i, options in enumerate(many):
            at = (*place, i)
            grids = [[(name, value, (*at, name, j)) for j, value in enumerate(values)] for name, values in options.items()]
            self._check_number(math.prod(map(len, grids)))
            found += [(("options",), chosen, at) for chosen in itertools.product(*grids)]
        return found

    def _check_number(self, number: int) -> None:
        if number > MOST:
            raise self.document.wrong(
                (), f"the grids of this file make at least {number:,} runs; a sweep has at most {MOST:,}. Shorten lists, or cut it up."
            )

    def _model(self, values: dict[str, Any], item: Any) -> ModelSpec:
        return ModelSpec.of(**values, folder=self.folder, instead=self.instead.get(values["name"]))

    def _task(self, values: dict[str, Any], item: Any) -> TaskSpec:
        return TaskSpec.of(**values, folder=self.folder)

    def _without(self, found: list[tuple[RunSpec, tuple[_Choice, ...]]]) -> list[tuple[RunSpec, tuple[_Choice, ...]]]:
        """The runs that no exclude matches; each value of an exclude must match one."""
        if not self.body.exclude:
            return found
        rows = [run.fields() for run, _ in found]
        valid = dict.fromkeys(name for row in rows for name in row)
        dropped: set[int] = set()
        for i, item in enumerate(self.body.exclude):
            place: Place = ("exclude", i)
            grids = [[(name, *one) for one in self._wanted(name, value, (*place, name), valid)] for name, value in item.items()]
            self._check_number(math.prod(map(len, grids)))
            for chosen in itertools.product(*grids):
                matched = {j for j, row in enumerate(rows) if all(name in row and _equal(row[name], value) for name, value, _ in chosen)}
                if not matched:
                    alone = [one for one in chosen if not any(one[0] in row and _equal(row[one[0]], one[1]) for row in rows)]
                    name, value, at = (alone or chosen)[0]
                    there = sorted({shown(row[name]) for row in rows if name in row})
                    why = f"no run has {name} {shown(value)}; there are {', '.join(there[:20])}" if alone else "no run has all of these together"
                    raise self.document.wrong(at if alone else place, f"this exclude matches nothing: {why}. Correct it or remove it.")
                dropped |= matched
        return [one for j, one in enumerate(found) if j not in dropped]

    def _wanted(self, name: str, value: Any, place: Place, valid: Iterable[str]) -> list[tuple[Any, Place]]:
        """The values of one field of an exclude, as the fields of runs write them."""
        if name not in valid:
            raise self.document.wrong(place, unknown("field of a run", name, valid))
        if name in TOGETHER and isinstance(value, list) and not any(isinstance(one, list) for one in value):
            value = [value]
        many = value if isinstance(value, list) else [value]
        if not many:
            raise self.document.wrong(place, "an empty list matches nothing; give at least one value.")
        return [(self._field(name, one, at), at) for i, one in enumerate(many) for at in [(*place, i)]]

    def _field(self, name: str, value: Any, place: Place) -> Plain:
        try:
            if name == "method" and isinstance(value, str):
                from patchlab.methods.names import scoring_method

                return scoring_method(value).name
            if name == "sites" and isinstance(value, (str, list)):
                return ",".join(ScoreSpec(method="exact", sites=value).sites)  # type: ignore[arg-type]
        except ValidationError as error:
            raise self.document.wrong(place, _said(error.errors()[0])) from None
        except PatchlabError as error:
            raise self.document.wrong(place, str(error)) from None
        if name == "sizes" and isinstance(value, list):
            return ",".join(map(str, value))
        if isinstance(value, (list, dict)):
            raise self.document.wrong(place, f"a field of a run is a text, a number or a truth value; got {shown(value)}.")
        return value

    def _refuse_repeated(self, found: Iterable[tuple[RunSpec, tuple[_Choice, ...]]]) -> None:
        seen: dict[str, tuple[_Choice, ...]] = {}
        for run, choices in found:
            if (earlier := seen.setdefault(run.key, choices)) is choices:
                continue
            differ = [pair for a, b in zip(earlier, choices, strict=True) for pair in _differences(a, b)]
            first, second = (list(dict.fromkeys(pair[i] for pair in differ)) for i in (0, 1))
            names = " with ".join(map(self.document.path_of, first))
            raise self.document.wrong(
                second[0],
                f"the same run as {names} in line {self.document.line(first[0])}: {run.label}. Keep one of them.",
            )


def _what(values: dict[str, Any], item: Any) -> Spec:
    kind = next(spec for spec in KINDS_OF_RUN if spec.model_fields["kind"].default == item.kind)
    return kind(**values)


def _same(part: Any) -> str:
    """A text that is the same for equal parts of runs."""
    return part if isinstance(part, str) else f"{type(part).__name__} {part.plain()}"


def _equal(a: Plain, b: Plain) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _differences(a: _Choice, b: _Choice) -> list[tuple[Place, Place]]:
    """Where two choices differ."""
    if a.item != b.item:
        return [(a.item, b.item)]
    return [(a.places[path], b.places[path]) for path in a.places if path in b.places and a.places[path] != b.places[path]]


def _path(error: ValidationError) -> Place:
    """Where in what was checked the first error is."""
    first = error.errors()[0]
    own: Place = tuple(first.get("ctx", {}).get("path", ()))
    return (*first["loc"], *own)


def _first(document: Document, error: ValidationError, root: type[BaseModel]) -> SweepError:
    """The error that stands first in the file, as one of ours."""
    found = [((*one["loc"], *one.get("ctx", {}).get("path", ())), one) for one in error.errors()]
    lines = [document.line(place) for place, _ in found]
    number = lines.index(min(lines))
    place, one = found[number]
    others = f" ({len(found) - 1} more of the file's values are refused.)" if len(found) > 1 else ""
    return document.wrong(place, _said(one) + others)


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


def _said(error: Any) -> str:
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
