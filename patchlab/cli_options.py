"""What the commands share: options that mean the same everywhere, and how an option of a task is read."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

N = 32
Force = Annotated[bool, typer.Option("--force", help="Replace the results of an earlier run in the folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout (everything else goes to stderr).")]
ModelName = Annotated[str, typer.Option("--model", help="A packaged model (patchlab models), a local Hugging Face folder, or a hub name.")]
TaskName = Annotated[str, typer.Option("--task", help="A generator (patchlab tasks) or a JSONL or CSV file.")]
Pairs = Annotated[int | None, typer.Option("--n", help=f"Number of pairs [default: {N}; all rows of a file].", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: CUDA if present].", show_default=False)]
BatchSize = Annotated[int | None, typer.Option(help="Examples per batch [default: chosen].", show_default=False)]
TaskOptions = Annotated[list[str] | None, typer.Option("--option", help="An option of the task, key=value; repeat for several.", show_default=False)]
Out = Annotated[Path, typer.Option(help="File to write.")]


def task_option(text: str) -> tuple[str, Any]:
    """``key=value``, where the value is JSON (true, 3, "x") or else a plain string."""
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise typer.BadParameter(f"{text!r} is not of the form key=value.", param_hint="--option")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
