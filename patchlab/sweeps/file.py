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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from patchlab.errors import PatchlabError, SweepError, unknown
from patchlab.sweeps.body import TOGETHER, VERSION, Body, said
from patchlab.sweeps.body import schema as schema
from patchlab.sweeps.document import Document, Place
from patchlab.sweeps.fields import Plain, shown
from patchlab.sweeps.spec import KINDS_OF_RUN, FeatureSpec, ModelSpec, RunSpec, ScoreSpec, Spec, TaskSpec

MOST = 100_000
"""Runs that a file may describe."""


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

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of all tasks, as written."""
        items = [*self.body.tasks, *(task for one in self.body.include for task in one.tasks)]
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
        raise _first(document, error) from None
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
    if not body.runs and body.exclude:
        raise document.wrong(("exclude",), "exclude takes runs out of the grid of 'runs:', and there is none; remove it.")
    return file


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
        order: dict[str, int] = {}
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
                found = what.spec.of(model.spec, self.folder) if isinstance(what.spec, FeatureSpec) else what.spec
                run = RunSpec(model=model.spec, task=task.spec, direction=direction, what=found, batch_size=size)
            except ValidationError as error:
                path = _path(error)
                choice = {"model": model, "task": task}.get(str(path[0]) if path else "", what).choice
                raise self.document.wrong(choice.place(path[1:]), said(error.errors()[0])) from None
            except SweepError as error:
                raise self.document.wrong(what.choice.place(("dictionaries",)), str(error)) from None
            yield run, choices

    def _directions(self, item: Any, place: Place) -> dict[Any, Place]:
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
                raise self.document.wrong(choice.place(_path(error)), said(error.errors()[0])) from None
            except SweepError as error:
                raise self.document.wrong(choice.place(("name",)), str(error)) from None
        return made

    def _choices(self, item: Any, place: Place) -> Iterator[_Choice]:
        grids: list[list[tuple[Place, Any, Place]]] = []
        for name in type(item).model_fields:
            given: Any = getattr(item, name)
            if name in ("kind", "directions", "batch_size", "models", "tasks") or given is None or given == ():
                continue
            if name == "options":
                grids.append(self._options(given, (*place, name)))
            elif name == "device":
                grids.append([((name,), given, (*place, name))])
            else:
                own = name.removesuffix("s") if name == "methods" else name
                listed = self.document.has((*place, name, len(given) - 1)) and not (name in TOGETHER and len(given) == 1)
                grids.append([((own,), value, (*place, name, *([i] if listed else []))) for i, value in enumerate(given)])
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
            raise self.document.wrong(place, said(error.errors()[0])) from None
        except PatchlabError as error:
            raise self.document.wrong(place, str(error)) from None
        if name in ("sizes", "points") and isinstance(value, list):
            return ",".join(map(str, value))
        if isinstance(value, (list, dict)):
            raise self.document.wrong(place, f"a field of a run is a text, a number or a truth value; got {shown(value)}.")
        return value

    def _refuse_repeated(self, found: Iterable[tuple[RunSpec, tuple[_Choice, ...]]]) -> None:
        seen: dict[str, tuple[_Choice, ...]] = {}
        for run, choices in found:
            if (earlier := seen.setdefault(run.key, choices)) is choices:
                continue
            items = earlier[-1].item != choices[-1].item
            pairs = [(earlier[-1], choices[-1])] if items else list(zip(earlier, choices, strict=True))
            differ = [one for pair in pairs for one in _differences(*pair)]
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


def _spelt(document: Document, place: Place) -> Place:
    """A place without the index of the one list of a field whose lists belong together, where it is the only one."""
    for i, part in enumerate(place[:-1]):
        if part in TOGETHER and not document.has((*place[: i + 2], 0)):
            return (*place[: i + 1], *place[i + 2 :])
    return place


def _first(document: Document, error: ValidationError) -> SweepError:
    """The error that stands first in the file, as one of ours."""
    errors = [one for one in error.errors() if one["type"] != "too_short" or not one["input"]]  # values that are refused count as missing
    found = [(_spelt(document, (*one["loc"], *one.get("ctx", {}).get("path", ()))), one) for one in errors]
    lines = [document.line(place) for place, _ in found]
    number = lines.index(min(lines))
    place, one = found[number]
    others = f" ({len(found) - 1} more to correct after that.)" if len(found) > 1 else ""
    return document.wrong(place, said(one) + others)
