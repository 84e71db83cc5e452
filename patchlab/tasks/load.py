"""Tasks by the name of a generator or the path of a file (``load_task``), and from Python lists."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchlab.errors import TaskError, unknown
from patchlab.metrics import PACKAGED, Answers, Metric, get_metric
from patchlab.tasks.files.hub import hub_data, is_hub_name
from patchlab.tasks.files.read import SUFFIXES, TaskFile, load_file, load_folder, read_pairs
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.registry import GENERATORS, Generator
from patchlab.tasks.task import Pair, Task, TaskModel

DEFAULT_N = 64
_CANDIDATES = 10  # with only_correct, a generator draws at most this many candidates per pair asked for
ROW_OPTIONS = ("corrupted", "on_mismatch", "chat", "incorrect", "answers")
FOLDER_OPTIONS = ("split", "subset")
FILE_OPTIONS = (*ROW_OPTIONS, *FOLDER_OPTIONS)


def load_task(
    name_or_path: str | Path,
    model: TaskModel,
    *,
    n: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    only_correct: bool = False,
    metric: str | Metric | Callable[[Tensor, Answers], Tensor] | None = None,
    **options: Any,
) -> Task:
    """Prompt pairs as token ids for a model: from a generator, a file, or a data set in a folder or on the hub.

    Args:
        name_or_path: a name of :data:`TASKS`; a file with clean, corrupted, correct and incorrect (text or ids), or in another layout that is
            read; a folder with a data set, or its name on the hub (``mib-bench/ioi``).
        model: its tokenizer makes the ids; nothing is run unless ``only_correct`` or a metric of your own asks for it.
        n: how many pairs. None means 64 from a generator and all rows of a file; of a file the first n are taken.
        seed: of the generator; the same seed gives the same pairs.
        bos: put the model's bos in front of every prompt. None: where the model has one. Token ids in a file are used as they are.
        only_correct: keep only pairs whose clean prompt the model solves (see :meth:`Task.solved`), still n of them.
        metric: instead of the task's own: a name, a Metric, or a function of (logits, answers) with one value per example.
        options: of the generator (``order="BABA"``), or of a file: ``corrupted`` (the column to use), ``on_mismatch`` ("raise" or "drop"),
            ``chat`` (True: each prompt is a user's message in the tokenizer's chat template). Of a data set also ``split`` ("train", "validation",
            "test") and ``subset``; of MIB's ``incorrect`` ("counterfactual" or "others") and ``answers`` ("mib" or "continuation").

    Raises:
        TaskError: unknown task or option, bad n, too few pairs, or a file that cannot be used; the message names the pair.
        MetricError: unknown metric, or one that mixes examples.

    Example:
        >>> load_task("ioi", model, n=32, order="BABA")  # doctest: +SKIP
        Task(ioi[32], logit_diff, 15 tokens; positions S1 AFTER_S1 IO PLACE S2 OBJECT END)
    """
    if n is not None and (isinstance(n, bool) or n < 1):
        raise TaskError(f"n is {n}; a task needs at least 1 pair.")
    with_bos = _with_bos(model, bos)
    common = {"seed": seed, "bos": with_bos, "tokenizer": _tokenizer(model), "only_correct": only_correct}
    path = Path(name_or_path)
    if str(name_or_path) in GENERATORS:
        task = _generated(GENERATORS[str(name_or_path)], model, DEFAULT_N if n is None else n, seed, with_bos, only_correct, options)
    elif path.suffix in SUFFIXES or path.exists() or is_hub_name(str(name_or_path)):
        task = _of_rows(
            path.name, path.name if path.is_dir() else path.stem, _read(path, model, n, with_bos, only_correct, options), model, n, only_correct
        )
        common = _about_rows(task, model, common)
    else:
        raise TaskError(
            unknown(
                "task",
                str(name_or_path),
                GENERATORS,
                more=f"Or the path of a file ending in {', '.join(SUFFIXES)}, a folder with such files, or a data set of the hub (owner/name).",
            )
        )
    return _finished(task, model, common, metric)


def _read(path: Path, model: TaskModel, n: int | None, bos: bool, only_correct: bool, options: dict[str, Any]) -> TaskFile:
    """The rows of a file, or of a data set: of that no more than are wanted, since it may have tens of thousands."""
    if bad := [option for option in options if option not in FILE_OPTIONS]:
        raise TaskError(unknown("option of a task file", bad[0], FILE_OPTIONS))
    if path.is_file() or path.suffix in SUFFIXES:
        if bad := [option for option in FOLDER_OPTIONS if option in options]:
            raise TaskError(f"{bad[0]} is an option of a folder with a data set, and {path} is one file; leave it out.")
        return load_file(path, model, bos=bos, **options)
    folder = path if path.is_dir() else hub_data(path.as_posix(), options.get("split"), options.get("subset"))
    found = load_folder(folder, model, bos=bos, limit=None if only_correct else n, **options)
    return found if path.is_dir() else replace(found, provenance={"data_set": path.as_posix(), **found.provenance})


def task_of_pairs(
    model: TaskModel,
    pairs: Sequence[Any],
    *,
    name: str = "pairs",
    bos: bool | None = None,
    only_correct: bool = False,
    metric: str | Metric | Callable[[Tensor, Answers], Tensor] | None = None,
    **options: Any,
) -> Task:
    """A task from a Python list; see :meth:`Task.from_pairs`."""
    if bad := [option for option in options if option not in ROW_OPTIONS]:
        raise TaskError(unknown("option of a list of pairs", bad[0], ROW_OPTIONS))
    if isinstance(pairs, (str, bytes, Mapping)) or not isinstance(pairs, Sequence) or not pairs:
        raise TaskError(f"pairs is a list of (clean, corrupted, correct, incorrect), of dictionaries or of Pair; got {pairs!r:.80}.")
    with_bos = _with_bos(model, bos)
    if all(isinstance(pair, Pair) for pair in pairs):
        read = TaskFile(tuple(pairs), None, {"format": "Pair", "notes": []})
    else:
        rows = [(f"pair {i} of {name}", _fields(f"pair {i} of {name}", pair)) for i, pair in enumerate(pairs)]
        read = read_pairs(name, rows, model, bos=with_bos, **options)
    task = _of_rows(name, name, read, model, None, only_correct)
    common = {"bos": with_bos, "tokenizer": _tokenizer(model), "only_correct": only_correct}
    return _finished(task, model, _about_rows(task, model, common), metric)


_FIELDS = ("clean", "corrupted", "correct", "incorrect")


def _fields(where: str, pair: Any) -> Mapping[str, Any]:
    if isinstance(pair, Mapping):
        return pair
    if isinstance(pair, (tuple, list)) and len(pair) == len(_FIELDS):
        return dict(zip(_FIELDS, (list(part) if isinstance(part, tuple) else part for part in pair), strict=True))
    raise TaskError(
        f"{where}: a pair is (clean, corrupted, correct, incorrect), a dictionary with these fields, or a Pair (then all must be); got {pair!r:.80}."
    )


def _with_bos(model: TaskModel, bos: bool | None) -> bool:
    if bos and model.bos_id is None:
        raise TaskError(f"bos=True, and {model.name} has no bos token; leave bos out or set it to False.")
    return model.bos_id is not None if bos is None else bos


def _about_rows(task: Task, model: TaskModel, common: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, as far as it concerns rows: they have no seed, and ids may or may not begin with a bos."""
    found = {key: value for key, value in common.items() if key != "seed"}
    return found | {"bos": model.bos_id is not None and all(pair.clean_ids[0] == model.bos_id for pair in task.pairs)}


def _finished(task: Task, model: TaskModel, common: dict[str, Any], metric: str | Metric | Callable[[Tensor, Answers], Tensor] | None) -> Task:
    task.provenance.update(common)
    return _checked(task if metric is None else task.with_metric(metric), model)


def _generated(generator: Generator, model: TaskModel, n: int, seed: int, bos: bool, only_correct: bool, options: dict[str, Any]) -> Task:
    words = Lexicon.of(model, bos)
    provenance: dict[str, Any] = {"generator": generator.name, "options": generator.options(options), "n": n}

    def task(pairs: tuple[Pair, ...]) -> Task:
        return Task(generator.name, pairs, generator.metric_object(), provenance, model.tokenizer)

    if not only_correct:
        return task(generator.take(words, n, seed, options))
    candidates = islice(generator.distinct(words, seed, options), _CANDIDATES * n)
    solved: list[Pair] = []
    drawn = 0
    while len(solved) < n and (chunk := tuple(islice(candidates, max(n, DEFAULT_N)))):
        part = task(chunk)
        for good, pair in zip(part.solved(model), chunk, strict=True):
            if len(solved) < n:
                drawn += 1
                solved += [pair] * bool(good)
    if len(solved) < n:
        raise TaskError(
            f"{model.name} solves {len(solved)} of {drawn} pairs of {generator.name}; got n={n} with only_correct. "
            f"Ask for fewer pairs, or use a model that does the task."
        )
    provenance["candidates"] = drawn
    return task(tuple(solved))


def _of_rows(where: str, name: str, read: TaskFile, model: TaskModel, n: int | None, only_correct: bool) -> Task:
    task = Task(name, read.pairs, get_metric(read.metric or "logit_diff"), dict(read.provenance), model.tokenizer)
    if only_correct:
        good = task.solved(model)
        task.provenance["candidates"] = len(task)
        if not good.any():
            raise TaskError(
                f"{model.name} solves none of the {len(task)} pairs of {where}; only_correct leaves nothing. Use a model that does the task."
            )
        task = task.select(good)
    if n is not None and n > len(task):
        kept = f" that {model.name} solves" if only_correct else ""
        raise TaskError(f"{where} has {len(task)} pairs{kept}; got n={n}. Ask for fewer, or leave n out for all of them.")
    return task if n is None else task.select(range(n))


def _tokenizer(model: TaskModel) -> dict[str, Any] | None:
    """Which tokenizer made the ids: a hash of its vocabulary."""
    if model.tokenizer is None:
        return None
    vocabulary = sorted(model.tokenizer.get_vocab().items())
    return {"model": model.name, "size": len(vocabulary), "sha256": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]}


def _checked(task: Task, model: TaskModel) -> Task:
    """What fits the model, and what needs the final metric: incorrect answers where it compares, independence where it is not one of ours."""
    for i, pair in enumerate(task.pairs):
        if model.n_positions is not None and len(pair) > model.n_positions:
            raise TaskError(
                f"pair {i} of {task.name} has {len(pair)} tokens, and {model.name} reads {model.n_positions} at most. Shorten or drop such pairs."
            )
    compares = task.metric.name in ("logit_diff", "logprob_diff", "max_diff", "prob_diff")
    for i, pair in enumerate(task.pairs):
        if compares and not pair.incorrect:
            raise TaskError(
                f"pair {i} of {task.name} has no incorrect answer, and {task.metric.name} compares with it; give one or use another metric."
            )
    if task.metric not in PACKAGED:
        first = task.select(_of_one_length(task)).batches(device=model.device)[0]
        with torch.no_grad():
            logits = model.run(first.clean).logits
        logits = logits[:, -1] if task.metric.reads == "answer" else logits
        answers = first.answers
        if task.metric.needs_clean:
            answers = Answers(answers.correct, answers.correct_mask, answers.incorrect, answers.incorrect_mask, logits)
        task.metric.check_independent(logits, answers)
    return task


def _of_one_length(task: Task) -> Iterator[int]:
    length = len(task.pairs[0])
    return islice((i for i, pair in enumerate(task.pairs) if len(pair) == length), 4)
