"""A comparison from names: which model, task, methods and sites; and running it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from patchlab.compare import Comparison, compare
from patchlab.errors import MethodError, TaskError
from patchlab.methods import get_method
from patchlab.models import Model, load_model
from patchlab.scores import ScoreMap
from patchlab.sites import parse_sites
from patchlab.tasks import GENERATORS, Task, load_task

REFERENCE = "exact"
DEFAULT_N = 32
OWN_FIELDS = {"model", "n", "seed", "task"}


@dataclass(frozen=True)
class Job:
    """What to compare, in the words of the command line.

    ``n`` None means 32 pairs of a generator, and all rows of a file; ``options`` go to the task.

    Raises:
        PatchlabError: an unknown method or site, a method named twice, no method beside ``exact`` to compare with it, or
            an option that is a setting of its own.
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
        names = tuple(get_method(name.strip()).name for name in self.methods)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise MethodError(f"the method {repeated[0]} is named twice; name it once.")
        if REFERENCE not in names or len(names) < 2:
            raise MethodError(
                f"a comparison needs {REFERENCE} (the reference) and at least one other method; got {', '.join(names)}. "
                f"For instance: {REFERENCE},atp,relp."
            )
        _check_options(self.options)
        object.__setattr__(self, "methods", (REFERENCE, *(name for name in names if name != REFERENCE)))
        object.__setattr__(self, "sites", tuple(map(str, parse_sites(self.sites))))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {**asdict(self), "methods": list(self.methods), "sites": list(self.sites), "options": dict(self.options)}


@dataclass(frozen=True)
class Results:
    """What a job gave: the score maps by method (the reference first), their comparison, and the seconds of each step."""

    job: Job
    model: Model
    task: Task
    accuracy: dict[str, float]
    maps: dict[str, ScoreMap]
    comparison: Comparison
    seconds: dict[str, float]


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


def run(job: Job, *, say: Callable[[str], Any] = lambda _: None, progress: bool = False) -> Results:
    """Load the model and the task, run every method, compare.

    Args:
        job: what to compare.
        say: told, in a line each, what is going on.
        progress: show the methods' progress bars (on stderr).

    Raises:
        PatchlabError: whatever is wrong with the names, the pairs or the model.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(step: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[step], started = round(now - started, 3), now

    model = load_model(job.model, device=job.device, dtype=job.dtype)
    done("load model")
    task = named_task(job.task, model, n=job.n, seed=job.seed, options=job.options)
    accuracy = task.accuracy(model)
    done("load task")
    say(f"{model.name}: {task}, accuracy {', '.join(f'{value:.2f} on {side}' for side, value in accuracy.items())}")
    maps: dict[str, ScoreMap] = {}
    for name in job.methods:
        maps[name] = get_method(name).run(model, task, list(job.sites), direction=job.direction, batch_size=job.batch_size, progress=progress)
        done(name)
        say(f"{name}: {maps[name].cost.seconds:.1f} s")
    for note in dict.fromkeys(note for scores in maps.values() for note in scores.provenance.get("notes", ())):
        say(f"note: {note}")
    comparison = compare(maps[REFERENCE], {name: maps[name] for name in job.methods if name != REFERENCE})
    done("compare")
    return Results(job, model, task, accuracy, maps, comparison, seconds)
