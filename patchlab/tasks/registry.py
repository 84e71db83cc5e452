"""The registry of task generators, and how a generator becomes a task."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from patchlab.errors import TaskError, unknown
from patchlab.metrics import Metric, get_metric
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.task import Pair

PairStream = Callable[..., Iterator[Pair]]
_PATIENCE = 500  # repeats in a row after which a generator counts as exhausted


@dataclass(frozen=True)
class Generator:
    """A task generator: an endless stream of pairs for a lexicon, a random source and its options.

    ``defaults`` are the options with what they are unless given, ``values`` those that an option with named values may have.
    """

    name: str
    description: str
    metric: str
    stream: PairStream
    defaults: Mapping[str, Any]
    values: Mapping[str, tuple[str, ...]]

    @property
    def help(self) -> str:
        """What the task is and what its options mean, in words."""
        return inspect.getdoc(self.stream) or self.name

    def metric_object(self) -> Metric:
        """The metric of the task."""
        return get_metric(self.metric)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options, with the defaults where none are given.

        Raises:
            TaskError: an option that the generator does not have, a value of another type than its default, or one that is not among its values.
        """
        for option, value in given.items():
            if option not in self.defaults:
                raise TaskError(unknown(f"option of the task {self.name}", option, self.defaults))
            if type(value) is not type(default := self.defaults[option]):
                raise TaskError(f"{option} of the task {self.name} is of type {type(default).__name__}, such as {default!r}; got {value!r}.")
            if value not in self.values.get(option, (value,)):
                raise TaskError(unknown(option, value, self.values[option]))
        return {**self.defaults, **given}

    def distinct(self, words: Lexicon, seed: int, options: Mapping[str, Any]) -> Iterator[Pair]:
        """Pairs without repeats, the same for the same seed; ends when no new ones turn up."""
        rng = Random(f"{self.name}:{seed}")
        seen: set[tuple[object, ...]] = set()
        repeats = 0
        for pair in self.stream(words, rng, **self.options(options)):
            key = (pair.clean_ids, pair.corrupted_ids, pair.correct, pair.incorrect)
            repeats = repeats + 1 if key in seen else 0
            if not repeats:
                seen.add(key)
                yield pair
            elif repeats > _PATIENCE:
                return

    def take(self, words: Lexicon, n: int, seed: int, options: Mapping[str, Any]) -> tuple[Pair, ...]:
        """The first n distinct pairs.

        Raises:
            TaskError: the word lists do not give as many.
        """
        pairs = tuple(itertools.islice(self.distinct(words, seed, options), n))
        if len(pairs) < n:
            raise TaskError(
                f"task {self.name} gives only {len(pairs)} distinct pairs with the tokenizer of {words.model_name}; got n={n}. Ask for fewer."
            )
        return pairs


GENERATORS: dict[str, Generator] = {}


def generator(name: str, *, metric: str = "logit_diff", **values: Iterable[str]) -> Callable[[PairStream], PairStream]:
    """Register a stream of pairs, ``stream(words, rng, **options)``; its first docstring line describes the task.

    ``values`` are those that an option may have: ``order=("ABBA", "BABA")``.

    Raises:
        TaskError: the name is taken.
    """

    def register(stream: PairStream) -> PairStream:
        if name in GENERATORS:
            raise TaskError(f"there is already a task {name!r}; register the generator under another name.")
        defaults = {key: p.default for key, p in inspect.signature(stream).parameters.items() if p.kind is p.KEYWORD_ONLY}
        description = (inspect.getdoc(stream) or "").partition("\n")[0].rstrip(".")
        GENERATORS[name] = Generator(name, description, metric, stream, defaults, {option: tuple(valid) for option, valid in values.items()})
        return stream

    return register
