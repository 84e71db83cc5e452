"""Options and errors of the commands: how errors and options are read and worded, and options that mean the same everywhere."""

import json
import re
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from patchlab.errors import PatchlabError

N = 32
SETTINGS = {"help_option_names": ["-h", "--help"]}
Force = Annotated[bool, typer.Option("--force", help="Replace the results of an earlier run in the folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout (everything else goes to stderr).")]
ModelName = Annotated[str, typer.Option("--model", help="A packaged model (patchlab models), a local Hugging Face folder, or a hub name.")]
TaskName = Annotated[str, typer.Option("--task", help="A generator (patchlab tasks) or a JSONL or CSV file.")]
Pairs = Annotated[int | None, typer.Option("--n", help=f"Number of pairs [default: {N}; all rows of a file].", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: CUDA if present].", show_default=False)]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ... [default: float32].", show_default=False)]
BatchSize = Annotated[int | None, typer.Option(help="Examples per batch [default: chosen].", show_default=False)]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="An option of the task (patchlab tasks NAME), key=value; repeat for several.", show_default=False),
]
MetricName = Annotated[str | None, typer.Option("--metric", help="Instead of the task's own: logit_diff, prob_diff, ...", show_default=False)]
Positions = Annotated[
    str | None, typer.Option("--positions", help="Score these named positions only, comma-separated: S2,END [default: all].", show_default=False)
]
OnMismatch = Annotated[
    str | None, typer.Option("--on-mismatch", help="Pairs of a file whose lengths differ: raise or drop [default: raise].", show_default=False)
]
OnlyCorrect = Annotated[bool, typer.Option("--only-correct", help="Keep only pairs whose clean prompt the model solves.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put each prompt of a file into the tokenizer's chat template.")]


class Group(TyperGroup):
    """Turns the package's own errors into one line on stderr and exit status 1; they speak of options."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PatchlabError as error:
            typer.echo(f"error: {as_options(' '.join(str(error).split()))}", err=True)
            raise typer.Exit(1) from error


class Command(TyperCommand):
    """Refuses an option that is given twice with different values: which of them is meant?"""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        single = {name: param for param in self.params for name in param.opts if name.startswith("--") and not getattr(param, "multiple", False)}
        seen: dict[str, str] = {}
        for i, word in enumerate(args):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if name not in single or getattr(single[name], "is_flag", False):
                continue
            value = value if equals else args[i + 1] if i + 1 < len(args) else ""
            if seen.setdefault(name, value) != value:
                raise typer.BadParameter(f"given twice, as {seen[name]!r} and as {value!r}; give it once.", ctx=ctx, param_hint=name)
        return super().parse_args(ctx, args)


_ARGUMENT = re.compile(r"""\b(?P<name>[a-z_]+)=(?P<value>"[^"]*"|'[^']*'|[A-Za-z0-9_.]+)?""")
_FLAGS = {("only_correct", "True"): "--only-correct", ("overwrite", "True"): "--force", ("chat", "True"): "--chat"}
_VALUED = {"ablation", "batch_size", "device", "direction", "dtype", "k", "metric", "n", "on_mismatch", "positions"}
_VALUED |= {"sample", "seed", "subsets", "target"}
"""Arguments of Python functions that are options of commands."""


def as_options(message: str) -> str:
    """A message with arguments of Python functions written as options of the command line.

    >>> as_options('drop the pair with on_mismatch="drop", or use only_correct=True')
    'drop the pair with --on-mismatch drop, or use --only-correct'
    """

    def written(match: re.Match[str]) -> str:
        name, value = match["name"], (match["value"] or "").strip("\"'")
        trailing = "." if value.endswith(".") else ""
        value = value.removesuffix(".")
        if (flag := _FLAGS.get((name, value))) is not None:
            return flag + trailing
        if name not in _VALUED:
            return match[0]
        return f"--{name.replace('_', '-')} {value}".rstrip() + trailing

    return _ARGUMENT.sub(written, message)


def say(line: str) -> None:
    """A line on stderr, in which arguments of functions are options."""
    from patchlab.terminal import fitted, terminal_width

    typer.echo(fitted(as_options(line), terminal_width(sys.stderr)), err=True)


def task_options(texts: list[str] | None) -> dict[str, Any]:
    """Options of a task, ``key=value`` each, where the value is JSON (true, 3, "x") or else a plain string."""
    found: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key.isidentifier() and equals):
            raise typer.BadParameter(f"{text!r} is not of the form key=value.", param_hint="--option")
        try:
            read = json.loads(value)
        except json.JSONDecodeError:
            read = value
        if found.setdefault(key, read) != read:
            raise typer.BadParameter(f"{key} is given twice, as {found[key]!r} and as {read!r}; give it once.", param_hint="--option")
    return found


def task_settings(texts: list[str] | None, **named: Any) -> dict[str, Any]:
    """Options of a task with those settings of it that have options of their own; None and False are left out."""
    found = task_options(texts)
    for name, value in named.items():
        if value is None or value is False:
            continue
        if found.setdefault(name, value) != value:
            raise typer.BadParameter(f"{name} is given twice, as {found[name]!r} and as {value!r}; give it once.", param_hint="--option")
    return found
