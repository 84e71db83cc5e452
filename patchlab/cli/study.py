"""``patchlab study``: where in a model a behaviour lives, and how sure that is, on one page."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from patchlab.cli.options import (
    Chat,
    Device,
    DType,
    Json,
    MetricName,
    ModelName,
    OnlyCorrect,
    OnMismatch,
    TaskName,
    TaskOptions,
    say,
    task_settings,
)

N = 64
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def study(
    model: ModelName,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="Folder for the page; the same command goes on where it stopped.")],
    budget: Annotated[str, typer.Option(help="About how long it may take: 90s, 10m, 2h. Decides what is measured and what is estimated.")] = "10m",
    n: Annotated[int | None, typer.Option("--n", help=f"Number of pairs [default: {N}; all rows of a file].", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the task's generator and of the halves.")] = 0,
    metric: MetricName = None,
    on_mismatch: OnMismatch = None,
    only_correct: OnlyCorrect = False,
    chat: Chat = False,
    device: Device = None,
    dtype: DType = None,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 32,
    option: TaskOptions = None,
    json_: Json = False,
) -> None:
    """Find where in a model a behaviour lives, and how sure that is.

    One page, readable from top to bottom: does the model do it, which heads and edges carry it (chosen on one half of the pairs, measured on the
    other), what the heads look at, and what each method would have said. A model that does not do the task ends in "not found".
    """
    options = task_settings(option, on_mismatch=on_mismatch, chat=chat)
    seconds = seconds_of(budget)
    from transformers.utils.logging import disable_progress_bar

    from patchlab.report.study import answer, write_study
    from patchlab.sweeps.spec import ModelSpec, TaskSpec
    from patchlab.sweeps.study import study as made
    from patchlab.tasks import GENERATORS
    from patchlab.terminal import prose, terminal_width

    disable_progress_bar()  # for files that load in a second
    given: dict[str, Any] = {"device": device} | ({} if dtype is None else {"dtype": dtype})
    pairs = N if n is None and task in GENERATORS else n
    spec = TaskSpec.of(task, n=pairs, seed=seed, metric=metric, only_correct=only_correct, options=options)
    found = made(ModelSpec.of(model, **given), spec, out, budget=seconds, batch_size=batch_size, say=say)
    record = write_study(found, out, say=say)
    if json_:
        typer.echo(json.dumps({"out": str(out.expanduser().resolve()), **record}, allow_nan=False))
        return
    width = terminal_width()
    for line in answer(found):
        typer.echo(prose(line, width))


def seconds_of(text: str) -> float:
    """Seconds of a time such as ``90s``, ``10m`` or ``2h``; a bare number is in minutes.

    >>> seconds_of("90s"), seconds_of("10m"), seconds_of("1.5h"), seconds_of("3")
    (90.0, 600.0, 5400.0, 180.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)?", text.strip())
    if found is None or float(found[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no time; give for instance 90s, 10m or 2h.", param_hint="--budget")
    return float(found[1]) * _UNITS[found[2] or "m"]
