"""A comparison from names: which model, task, methods and sites; and running it."""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patchlab.comparison.compare import Comparison, compare
from patchlab.errors import MethodError, TaskError
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.linearized import LinearizedPatching
from patchlab.methods.names import scoring_method
from patchlab.methods.plan import LONG, Plan, forward_seconds
from patchlab.models import Model, load_model
from patchlab.progress import duration
from patchlab.scores import ScoreMap
from patchlab.sites import parse_sites
from patchlab.tasks import GENERATORS, Task, load_task

DEFAULT_N = 32
FEW_POINTS = 5
OWN_FIELDS = {"model", "n", "seed", "task"}


@dataclass(frozen=True)
class Job:
    """The job of a comparison, in the words of the command line.

    ``n`` None means 32 pairs of a generator, and all rows of a file; ``options`` go to the task.

    Raises:
        PatchlabError: an unknown method or site, a method named twice, no method beside exact patching to compare with it, methods of
            different sources, or an option that is a setting of its own.
    """

    model: str
    task: str
    methods: tuple[str, ...]
    sites: tuple[str, ...]
    direction: str = "denoising"
    n: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_options(self.options)
        object.__setattr__(self, "methods", exact_first(self.methods))
        object.__setattr__(self, "sites", tuple(map(str, parse_sites(self.sites))))

    @property
    def reference(self) -> str:
        """The method that the others are compared with: exact patching, of any source; it stands first."""
        return self.methods[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {**asdict(self), "methods": list(self.methods), "sites": list(self.sites), "options": dict(self.options)}


@dataclass(frozen=True)
class Results:
    """The results of a job: the score maps by method (the reference first), their comparison, and the seconds of each step."""

    job: Job
    model: Model
    task: Task
    accuracy: dict[str, float]
    maps: dict[str, ScoreMap]
    comparison: Comparison
    seconds: dict[str, float]


def exact_first(methods: Iterable[str]) -> tuple[str, ...]:
    """The names of methods that are compared, as they are written, with exact patching, the reference, first.

    >>> exact_first(["relp", "exact"])
    ('exact', 'relp')

    Raises:
        MethodError: an unknown method, one named twice, no exact patching or nothing beside it, methods of different sources.
    """
    chosen = [scoring_method(name) for name in methods]
    names = [method.name for method in chosen]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise MethodError(f"the method {repeated[0]} is named twice; name it once.")
    exact = [method.name for method in chosen if isinstance(method, ActivationPatching)]
    if not exact or len(names) < 2:
        raise MethodError(
            f"a comparison needs exact patching (the reference) and at least one other method; got {', '.join(names)}. For instance: exact,atp,relp."
        )
    sources = {method.name: method.source for method in chosen}
    if unlike := [name for name in names if sources[name] != sources[exact[0]]]:
        raise MethodError(
            f"{exact[0]} patches in the source {sources[exact[0]]!r} and {unlike[0]} the source {sources[unlike[0]]!r}, which cannot be "
            f"compared; name methods of one source, such as exact@mean,relp@mean."
        )
    return (exact[0], *(name for name in names if name != exact[0]))


def stopwatch() -> tuple[dict[str, float], Callable[[str], None]]:
    """Seconds of each step, and what is called with a step's name at its end."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def done(step: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[step], last = round(now - last, 3), now

    return seconds, done


def named_task(name: str, model: Model, *, n: int | None = None, seed: int = 0, options: Mapping[str, Any] | None = None) -> Task:
    """A task in the words of the command line; ``n`` None means 32 pairs of a generator, and all rows of a file.

    ``options`` are those of :func:`patchlab.load_task`, and ``positions``: the named positions to score, comma-separated.

    Raises:
        TaskError: an unknown name or option, or an option that is a setting of its own.
    """
    _check_options(options or {})
    count = DEFAULT_N if n is None and name in GENERATORS else n
    given = dict(options or {})
    positions = given.pop("positions", None)
    task = load_task(name, model, seed=seed, **({} if count is None else {"n": count}), **given)
    return task if positions is None else task.at_positions(*(word.strip() for word in str(positions).split(",")))


def _check_options(options: Mapping[str, Any]) -> None:
    if own := sorted(OWN_FIELDS & set(options)):
        raise TaskError(f"{own[0]} is not an option of a task but a setting of its own (--{own[0]}).")


def run(
    job: Job,
    *,
    model: Model | None = None,
    folder: Path | None = None,
    say: Callable[[str], Any] = lambda _: None,
    progress: bool = False,
) -> Results:
    """Load the model and the task, run every method, compare.

    Args:
        job: what to compare.
        model: the job's model, if it is loaded already.
        folder: each method's scores are written there as they finish, and the work on the next one as it goes; what an interrupted
            run left there is not computed again.
        say: told, in a line each, what is going on.
        progress: show the methods' progress on stderr.

    Raises:
        PatchlabError: whatever is wrong with the names, the pairs or the model.
    """
    seconds, done = stopwatch()
    model = model or load_model(job.model, device=job.device, dtype=job.dtype)
    done("load model")
    task = named_task(job.task, model, n=job.n, seed=job.seed, options=job.options)
    accuracy = task.accuracy(model)
    done("load task")
    say(f"{model.name}: {task}, accuracy {', '.join(f'{value:.2f} on {side}' for side, value in accuracy.items())}")
    settings = {"direction": job.direction, "batch_size": job.batch_size, "progress": progress}
    maps = scored(job.methods, model, task, list(job.sites), folder=folder, say=say, done=done, **settings)
    for note in dict.fromkeys(note for scores in maps.values() for note in scores.provenance.get("notes", ())):
        say(f"note: {note}")
    comparison = compare(maps[job.reference], {name: maps[name] for name in job.methods[1:]})
    done("compare")
    return Results(job, model, task, accuracy, maps, comparison, seconds)


def announced(work: Mapping[str, float], model: Model, task: Task, *, lower: str, passes: str, least: bool = False) -> str | None:
    """A line on how long work will take, from one timed forward pass; None where that is below a minute.

    Args:
        work: by name, in forward passes of every prompt of one side.
        model: the model.
        task: the prompts.
        lower: what takes less.
        passes: what is computed, in words.
        least: more comes on top that is not known yet, so that the line is written whatever is known.
    """
    once = forward_seconds(model, task)
    seconds = {name: count * once for name, count in work.items()}
    if (total := sum(seconds.values())) < LONG and not least:
        return None
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    listed = f" ({', '.join(f'{name} {duration(value)}' for name, value in parts)})" if len(parts) > 1 else ""
    return f"{'at least' if least else 'about'} {duration(total)}: {passes}{listed}. {lower}"


def cost_line(
    methods: Iterable[str],
    model: Model,
    task: Task,
    sites: Iterable[str],
    *,
    direction: str = "denoising",
    batch_size: int | None = None,
    lower: str = "fewer pairs (--n), fewer --sites",
) -> str | None:
    """A line on how long methods will take together, and what takes less; None below a minute. Nothing is scored.

    Raises:
        MethodError, SiteError: what the methods refuse.
    """
    chosen = [scoring_method(name) for name in methods]
    plans = {method.name: method.plan(model, task, sites, direction=direction, batch_size=batch_size) for method in chosen}
    if not plans:
        return None
    forwards, backwards, total = (sum(getattr(plan, part) for plan in plans.values()) for part in ("forwards", "backwards", "work"))
    whole = Plan(forwards, backwards, total, tuple(dict.fromkeys(site for plan in plans.values() for site in plan.uncounted)))
    many = [one for one in chosen if isinstance(one, LinearizedPatching) and (one.n_steps or 0) > FEW_POINTS]
    points = f", or fewer points ({replace(many[0], n_steps=FEW_POINTS).name} instead of {many[0].name})" if many else ""
    work = {name: plan.work for name, plan in plans.items()}
    return announced(work, model, task, lower=f"Less is computed with {lower}{points}.", passes=str(whole), least=bool(whole.uncounted))


def scores_file(method: str, stem: str = "scores") -> str:
    """File name of a method's score map.

    >>> scores_file("relp+ig:5"), scores_file("lrp[ln,identity]@mean")
    ('scores.relp-ig-5.nc', 'scores.lrp-ln-identity-mean.nc')
    """
    return f"{stem}.{re.sub(r'[:+@,=[]', '-', method).replace(']', '')}.nc"


def scored(
    methods: Iterable[str],
    model: Model,
    task: Task,
    sites: list[str],
    *,
    folder: Path | None = None,
    stem: str = "scores",
    say: Callable[[str], Any] = lambda _: None,
    done: Callable[[str], Any] = lambda _: None,
    **settings: Any,
) -> dict[str, ScoreMap]:
    """The score maps of several methods, each written to the folder (if there is one) when it is finished, or read from it.

    Names of files begin with ``stem``; ``settings`` go to :meth:`patchlab.methods.method.Method.run`.
    """
    maps: dict[str, ScoreMap] = {}
    names = list(methods)
    if folder is not None and len({scores_file(name) for name in names}) < len(names):
        raise MethodError(f"two of {', '.join(names)} would be written to one file; register methods or rules under names that differ in letters.")
    left = [name for name in names if folder is None or not (folder / scores_file(name, stem)).exists()]
    planned = {key: settings[key] for key in ("direction", "batch_size") if key in settings}
    if (line := cost_line(left, model, task, sites, **planned)) is not None:
        say(line)
    for name in names:
        file = None if folder is None else folder / scores_file(name, stem)
        if file is not None and (found := _earlier(file, model, task)) is not None:
            maps[name] = found
            say(f"{name}: finished before, {found.cost.seconds:.1f} s then")
            continue
        checkpoint = None if file is None else file.with_name(f".{file.stem}.checkpoint")
        maps[name] = scoring_method(name).run(model, task, sites, checkpoint=checkpoint, **settings)
        if file is not None:
            maps[name].save(file, overwrite=True)
        if len(maps) == 1 and (warning := maps[name].reversed_gap()) is not None:
            say(f"warning: {warning}")
        done(name)
        say(f"{name}: {maps[name].cost.seconds:.1f} s")
    return maps


def _earlier(file: Path, model: Model, task: Task) -> ScoreMap | None:
    """The scores that an interrupted run of the same job left, if they are of this model and these prompts."""
    if not file.exists():
        return None
    found = ScoreMap.load(file)
    same = (found.provenance["model_fingerprint"], found.provenance["task_fingerprint"]) == (model.fingerprint, task.fingerprint)
    return found if same else None
