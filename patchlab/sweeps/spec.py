"""The spec of a run: everything that its result depends on, as plain values, with one key for all ways to write it down."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from patchlab.errors import PatchlabError, SweepError, unknown
from patchlab.sites import KINDS
from patchlab.sweeps.content import (
    data_content,
    dictionary_folder,
    file_content,
    files_content,
    folder_content,
    hub_content,
    hub_data_content,
    model_folder,
)
from patchlab.sweeps.fields import (
    Count,
    Device,
    Direction,
    MethodName,
    MetricName,
    Name,
    NotNegative,
    Number,
    Options,
    PairsMethod,
    Plain,
    Points,
    Positions,
    Resamples,
    Sites,
    Sizes,
    number,
    refusal,
)

if TYPE_CHECKING:
    from patchlab.methods.verified.search import VerifiedPatching
    from patchlab.models import Model
    from patchlab.tasks.task import Task

BATCH_SIZE = 32


@dataclass(frozen=True)
class Added:
    """Mark of a field that came after keys were in use: at ``old``, the value that means what was done before, it is left out of the key.

    >>> class Later(ScoreSpec):
    ...     folds: Annotated[int, Added(old=1)] = 1
    """

    old: Any


@dataclass(frozen=True)
class Apart:
    """Mark of a field that results do not depend on: no part of the key."""


ADDED_OPTIONS: dict[tuple[str, str], Any] = {}
"""Options of generators that came after keys were in use: (generator, option) and the value that means what was done before."""


class Spec(BaseModel):
    """What has a canonical form: plain values that are the same for all ways to write the same thing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """The values that results depend on."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            old = [mark.old for mark in field.metadata if isinstance(mark, Added)]
            if any(isinstance(mark, Apart) for mark in field.metadata) or (old and type(value) is type(old[0]) and value == old[0]):
                continue
            found[name] = value.plain() if isinstance(value, Spec) else list(value) if isinstance(value, tuple) else value
        return found

    def _settle(self, **values: Any) -> None:
        """Fill in what was left out, while the object is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class ModelSpec(Spec):
    """A model: packaged, a folder or a hub name.

    Args:
        name: as results refer to it.
        dtype: of weights and activations.
        device: where it runs; None for CUDA if there is one, else the CPU.
        path: the folder that it is loaded from; None for packaged models and hub names.
        content: what is in it: ``sha256:...`` of a folder, ``hub:NAME@COMMIT`` of a hub model.
    """

    name: Annotated[Name, Apart()]
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: Annotated[Device | None, Apart()] = None
    path: Annotated[str | None, Apart()] = None
    content: str | None = None

    @staticmethod
    def of(name: str, *, folder: Path | None = None, instead: Path | None = None, **fields: Any) -> "ModelSpec":
        """The model of a name, with its content.

        Args:
            name: a packaged model, a folder or a hub name.
            folder: what a relative folder is relative to; default the current one.
            instead: a folder that is taken in place of what the name means.
            fields: the others.

        Raises:
            SweepError: no such model, one that cannot be read, or a hub model that is not in the cache.
        """
        from patchlab.models import DEMO_MODELS

        home = model_folder(name, folder or Path()) if instead is None else instead.expanduser().resolve()
        content = hub_content(name) if home is None else folder_content(home)
        path = None if home is None or (instead is None and name in DEMO_MODELS) else str(home)
        return ModelSpec(name=name, path=path, content=content, **fields)

    def load(self, load: Callable[..., "Model"] | None = None) -> "Model":
        """The model itself, with ``load`` in place of :func:`patchlab.load_model`.

        Raises:
            ModelError: as :func:`patchlab.load_model`.
        """
        if load is None:
            from patchlab.models import load_model as load
        return load(self.path or self.name, device=self.device, dtype=self.dtype)


class TaskSpec(Spec):
    """A task: a generator with its options, a file, or a data set in a folder or on the hub.

    What is left out of a generator is filled in: its number of pairs, metric and options.

    Args:
        name: of the generator, or of the file as results refer to it.
        n: pairs; None for all rows of a file.
        seed: of the generator, and of the halves that circuits are chosen and measured on.
        metric: instead of the task's own.
        only_correct: keep only pairs whose clean prompt the model solves.
        positions: the named positions to score, with commas between them; None for all.
        options: of the generator, or of the file or data set (:data:`patchlab.tasks.load.FILE_OPTIONS`).
        half: only the ``first`` or the ``second`` half of the pairs (:meth:`patchlab.Task.split` with the seed); None for all.
        path: the file or folder; None for a name of the hub.
        content: ``sha256:...`` of the file or of the split's files, ``hub:NAME@COMMIT`` of a data set of the hub.
    """

    name: Name
    n: Count | None = None
    metric: MetricName | None = None
    only_correct: bool = False
    positions: Positions | None = None
    options: Options = {}
    seed: int = 0
    half: Annotated[Literal["first", "second"] | None, Added(old=None)] = None
    path: Annotated[str | None, Apart()] = None
    content: str | None = None

    @model_validator(mode="after")
    def _filled(self) -> "TaskSpec":
        from patchlab.comparison.job import DEFAULT_N
        from patchlab.tasks import GENERATORS
        from patchlab.tasks.load import FILE_OPTIONS

        own = [name for name in self.options if name in type(self).model_fields]
        if own:
            raise refusal(f"{own[0]} is not an option of a task but stands beside its name; move it out of options.", "options", own[0])
        if self.content is not None:
            if bad := [name for name in self.options if name not in FILE_OPTIONS]:
                raise refusal(unknown("option of a task file", bad[0], FILE_OPTIONS), "options", bad[0])
            return self
        if self.name not in GENERATORS:
            raise refusal(unknown("task", self.name, GENERATORS, more="Or give a file."), "name")
        generator = GENERATORS[self.name]
        options = {name: number(value) if isinstance(generator.defaults.get(name), float) else value for name, value in self.options.items()}
        for name, value in options.items():
            try:
                generator.options({name: value})
            except PatchlabError as error:
                raise refusal(str(error), "options", name) from error
        filled = dict(sorted(generator.options(options).items()))
        self._settle(n=DEFAULT_N if self.n is None else self.n, metric=self.metric or generator.metric, options=filled)
        return self

    @staticmethod
    def of(name: str, *, folder: Path | None = None, **fields: Any) -> "TaskSpec":
        """The task of a name: a generator's, or a file's or data set's with its content.

        ``folder`` is what a relative file is relative to; default the current one.

        Raises:
            SweepError: no such file, one that cannot be read, or a data set of the hub that is not in the cache.
            ValidationError: no such generator, or fields that do not fit.
        """
        from patchlab.tasks import GENERATORS
        from patchlab.tasks.files.hub import is_hub_name
        from patchlab.tasks.files.read import SUFFIXES

        path = (folder or Path()) / Path(name).expanduser()
        split = {key: value for key, value in fields.get("options", {}).items() if key in ("split", "subset")}
        if name not in GENERATORS and path.is_dir():
            return TaskSpec(name=name, path=str(path.resolve()), content=data_content(path, **split), **fields)
        if name not in GENERATORS and path.suffix not in SUFFIXES and not path.exists() and is_hub_name(name):
            return TaskSpec(name=name, content=hub_data_content(name), **fields)
        if name in GENERATORS or not (path.suffix in SUFFIXES or path.exists()):
            return TaskSpec(name=name, **fields)
        if not path.is_file():
            raise SweepError(f"there is no task file {path}; give a file, or one of: {', '.join(sorted(GENERATORS))}.")
        if path.suffix not in SUFFIXES:
            raise SweepError(f"{path} ends in {path.suffix!r}; a task file is one of {', '.join(SUFFIXES)}.")
        return TaskSpec(name=name, path=str(path.resolve()), content=file_content(path), **fields)

    def plain(self) -> dict[str, Any]:
        found = super().plain()
        if self.content is not None:
            del found["name"]
        kept = {name: value for name, value in self.options.items() if not self._means_old(name, value)}
        return {**found, "options": kept}

    def _means_old(self, option: str, value: Plain) -> bool:
        return (self.name, option) in ADDED_OPTIONS and self.content is None and ADDED_OPTIONS[self.name, option] == value

    def load(self, model: "Model") -> "Task":
        """The prompt pairs, as token ids for a model.

        Raises:
            PatchlabError: as :func:`patchlab.load_task`.
        """
        from patchlab.comparison.job import named_task

        given: dict[str, Any] = {"metric": self.metric, "only_correct": self.only_correct, "positions": self.positions}
        options = {**self.options, **{name: value for name, value in given.items() if value is not None}}
        task = named_task(self.path or self.name, model, n=self.n, seed=self.seed, options=options)
        return task if self.half is None else task.split(seed=self.seed)[self.half == "second"]


class ScoreSpec(Spec):
    """Scores of every cell of some sites by one method.

    Args:
        sites: as :func:`patchlab.sites.parse_sites` reads them; their order does not matter.
        method: its name.
    """

    kind: Literal["score"] = "score"
    sites: Sites
    method: MethodName

    @model_validator(mode="after")
    def _ordered(self) -> "ScoreSpec":
        self._settle(sites=tuple(sorted(self.sites, key=_place_of)))
        return self


class VerifySpec(Spec):
    """The cells with the largest exact effects, found with a screen: the arguments of :class:`patchlab.methods.VerifiedPatching`."""

    kind: Literal["verify"] = "verify"
    sites: Sites
    screen: MethodName = "relp"
    k: Count | None = None
    target: Number | None = None
    recall: Number | None = None
    sample: NotNegative | None = None
    confidence: Number = 0.95
    subsets: NotNegative = 0
    hierarchical: bool = False
    population: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _checked(self) -> "VerifySpec":
        if self.k is not None and self.target is not None:
            raise refusal("k and target say in two ways how many cells are wanted; give one of them.", "target")
        if self.target is None:
            self._settle(k=_K if self.k is None else self.k)
        try:
            self.patching()
        except PatchlabError as error:
            raise refusal(str(error)) from error
        return self

    @property
    def method(self) -> str:
        """The name of the screen."""
        return self.screen

    def patching(self) -> "VerifiedPatching":
        """The search that is run."""
        from patchlab.methods.names import scoring_method
        from patchlab.methods.verified.search import VerifiedPatching

        given = {name: getattr(self, name) for name in type(self).model_fields if name not in ("kind", "sites", "screen", "k")}
        return VerifiedPatching(screen=scoring_method(self.screen), k=self.k or _K, **given)


_K = 20


class CircuitSpec(Spec):
    """Circuits chosen by the edge scores of a method on one half of the pairs, and how faithful they are on the other.

    Args:
        method: scores the edges.
        ablation: what the other edges carry, one of :data:`patchlab.circuits.ABLATIONS`.
        how: edges are chosen, ``top_n`` or ``greedy``.
        by: importance, ``abs`` or ``signed``.
        sizes: of circuits, in edges before pruning; None for MIB's ten.
        random: draws of random circuits of the same sizes.
        level: what counts as faithful.
        smallest: find the smallest faithful circuit as well, on a quarter of the pairs, and report its faithfulness on another.
        stability: resamples of the pairs of the scores on which each choice is made again, to see how stable it is; 0 for none.
    """

    kind: Literal["circuit"] = "circuit"
    method: MethodName
    ablation: Literal["resample", "zero", "mean", "mean_positional", "optimal"] = "resample"
    how: Literal["top_n", "greedy"] = "top_n"
    by: Literal["abs", "signed"] = "abs"
    sizes: Sizes | None = None
    random: NotNegative = 5
    level: Annotated[Number, Field(gt=0, le=1)] = 0.9
    smallest: bool = True
    stability: Annotated[Resamples, Added(old=0)] = 0

    @property
    def sites(self) -> tuple[str, ...]:
        """What is scored."""
        return ("edges",)

    @property
    def least(self) -> int:
        """The fewest pairs: two that differ in each half, and with ``smallest`` in each quarter of one half."""
        return 8 if self.smallest else 4


class FeatureSpec(Spec):
    """Features and errors of dictionaries, and neurons, scored by a method on one half of the pairs, and how faithful the circuits of nodes that it
    chooses are on the other; as ``patchlab features compare`` does it.

    Args:
        method: scores the nodes.
        dictionaries: a folder, or the name of a packaged model; None for those packaged with the model of the run.
        points: sites whose dictionaries are used; empty for all.
        ablation: what nodes outside a circuit carry, one of :data:`patchlab.circuits.NODE_ABLATIONS`.
        path: the folder that they are loaded from.
        content: ``sha256:...`` of what is in it.
    """

    kind: Literal["features"] = "features"
    method: PairsMethod
    dictionaries: Annotated[Name | None, Apart()] = None
    points: Points = ()
    ablation: Literal["mean_positional", "mean", "resample", "zero"] = "mean_positional"
    path: Annotated[str | None, Apart()] = None
    content: str | None = None

    least: ClassVar[int] = 4
    """The fewest pairs: two that differ in each half."""

    @property
    def sites(self) -> tuple[str, ...]:
        """What is scored, as far as it is known without the dictionaries."""
        from patchlab.feature_comparison import sites_at

        return tuple(sites_at(self.points)) or ("features", "error")

    def of(self, model: ModelSpec, folder: Path | None = None) -> "FeatureSpec":
        """With the dictionaries of a model found, and their content; ``folder`` is what a relative one is relative to, default the current one.

        Raises:
            SweepError: there are none.
        """
        found = dictionary_folder(self.dictionaries, model.name, folder or Path())
        return self.model_copy(update={"path": str(found), "content": files_content(found)})


Kind = ScoreSpec | VerifySpec | CircuitSpec | FeatureSpec
What = Annotated[Kind, Field(discriminator="kind")]
KINDS_OF_RUN: tuple[type[Kind], ...] = (ScoreSpec, VerifySpec, CircuitSpec, FeatureSpec)


class RunSpec(Spec):
    """One run: one model, task, direction and method.

    ``batch_size`` is no part of the key, since results do not depend on it; it is fixed so that the very numbers repeat.

    Example:
        >>> model = ModelSpec(name="demo-gpt2-4l", content="sha256:00")
        >>> run = RunSpec(model=model, task=TaskSpec(name="ioi"), what=ScoreSpec(method="relp", sites=["z"]))
        >>> run.label
        'demo-gpt2-4l × ioi[32] seed 0, denoising: relp on z'
    """

    model: ModelSpec
    task: TaskSpec
    direction: Direction = "denoising"
    what: What
    batch_size: Annotated[Count, Apart()] = BATCH_SIZE

    shared: ClassVar[tuple[str, ...]] = ("model", "task", "direction")

    @model_validator(mode="after")
    def _fits(self) -> "RunSpec":
        if self.task.content is not None and self.task.seed and not self.halves and self.task.half is None:
            raise refusal(
                f"a file has no seed: its rows stay the same, and {self.what.kind} cuts them into no halves; got {self.task.seed}. Leave seed out, "
                f"or give the task with a seed to circuits and features alone (under include:).",
                "task",
                "seed",
            )
        if isinstance(self.what, CircuitSpec | FeatureSpec) and self.task.n is not None and self.task.n < self.what.least:
            raise refusal(
                f"{self.task.n} pairs cannot be cut into the halves that circuits are chosen and measured on; give n of at least {self.what.least}"
                + (" (4 with smallest: false)." if isinstance(self.what, CircuitSpec) and self.what.smallest else "."),
                "task",
                "n",
            )
        return self

    @property
    def halves(self) -> bool:
        """Whether the pairs are cut in two: those that circuits are chosen on, and those that they are measured on."""
        return isinstance(self.what, CircuitSpec | FeatureSpec)

    def canonical(self) -> str:
        """Canonical JSON of everything that the result depends on.

        Raises:
            SweepError: the content of the model or of the dictionaries is not known.
        """
        if isinstance(self.what, FeatureSpec) and self.what.content is None:
            raise SweepError("the content of the dictionaries is not known, so the run has no key; make it with FeatureSpec.of.")
        if self.model.content is None:
            raise SweepError(f"the content of the model {self.model.name} is not known, so its runs have no key; make it with ModelSpec.of.")
        return _json(self.plain())

    @cached_property
    def key(self) -> str:
        """The sha256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @cached_property
    def group(self) -> str:
        """What runs that share work have in common: model, task, direction and sites; circuits are a group of their own, features by dictionaries."""
        self.canonical()
        shared = {name: value for name, value in self.plain().items() if name in self.shared}
        sites: Any = "edges" if isinstance(self.what, CircuitSpec) else None
        if isinstance(self.what, FeatureSpec):
            sites = {"dictionaries": self.what.content, "points": list(self.what.points)}
        elif sites is None:
            sites = sorted(self.what.sites, key=_place_of)
        return hashlib.sha256(_json({**shared, "sites": sites}).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """A line for people."""
        model, task, what = self.model, self.task, self.what
        pairs = "" if task.n is None else f"[{task.n}]"
        seed = "" if task.content is not None and not self.halves else f" seed {task.seed}"
        seed += "" if task.half is None else f", {task.half} half"
        options = "".join(f" {name}={value}" for name, value in self._unusual().items())
        sites = ",".join(what.sites)
        wanted = {
            "score": f"{what.method} on {sites}",
            "verify": f"verified by {what.method} on {sites}",
            "circuit": f"circuits by {what.method}, {getattr(what, 'ablation', '')}",
            "features": f"features of {getattr(what, 'dictionaries', None) or model.name} by {what.method}, {getattr(what, 'ablation', '')}",
        }[what.kind]
        dtype = "" if model.dtype == "float32" else f" {model.dtype}"
        return f"{model.name}{dtype} × {task.name}{pairs}{options}{seed}, {self.direction}: {wanted}"

    def _unusual(self) -> Mapping[str, Plain]:
        from patchlab.tasks import GENERATORS

        usual = GENERATORS[self.task.name].defaults if self.task.content is None else {}
        return {name: value for name, value in self.task.options.items() if usual.get(name) != value}

    def fields(self) -> dict[str, Plain]:
        """The run as flat plain values, for tables; the options of task and kind by their names, with a prefix where the name is taken."""
        model, task, what = self.model, self.task, self.what
        found: dict[str, Plain] = {
            "model": model.name,
            "dtype": model.dtype,
            "task": task.name,
            **{name: getattr(task, name) for name in ("n", "seed", "half", "metric", "only_correct", "positions")},
            "direction": self.direction,
            "kind": what.kind,
            "method": what.method,
            "sites": ",".join(what.sites),
        }
        rest = {name: getattr(what, name) for name in type(what).model_fields if name not in ("kind", "method", "screen", "sites", "path", "content")}
        for prefix, values in (("task", task.options), (what.kind, rest)):
            for name, value in values.items():
                plain = ",".join(map(str, value)) if isinstance(value, tuple) else value
                found[f"{prefix}_{name}" if name in found else name] = plain
        return found


def _place_of(site: str) -> tuple[int, str]:
    """Where a site stands among others: in the order of the kinds."""
    return list(KINDS).index(site.partition("[")[0]), site


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
