"""``patchlab features``: sparse dictionaries from the command line."""

import json
from pathlib import Path
from typing import Annotated

import typer

from patchlab import __version__
from patchlab.cli.options import (
    SETTINGS,
    BatchSize,
    Chat,
    Command,
    Device,
    DType,
    Force,
    Json,
    MetricName,
    ModelName,
    OnlyCorrect,
    OnMismatch,
    Pairs,
    TaskName,
    TaskOptions,
    say,
    task_settings,
)

features = typer.Typer(
    context_settings=SETTINGS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Compare methods on the features of sparse dictionaries.",
)


@features.callback()
def _features() -> None:
    pass


@features.command(cls=Command)
def compare(
    model: ModelName,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dictionaries: Annotated[
        str | None, typer.Option(help="Folder or hub name of dictionaries [default: those packaged with the model].", show_default=False)
    ] = None,
    points: Annotated[str | None, typer.Option(help="Sites whose dictionaries are used, comma-separated [default: all].", show_default=False)] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated (patchlab methods); exact is the reference [default: gradients, relevance and IG].", show_default=False),
    ] = None,
    direction: Annotated[str, typer.Option(help="denoising or noising.")] = "noising",
    ablation: Annotated[str, typer.Option(help="What nodes outside a circuit carry: mean_positional, mean, resample or zero.")] = "mean_positional",
    n: Pairs = None,
    seed: Annotated[int, typer.Option(help="Seed of the task's generator, of the halves and of the resamples.")] = 0,
    metric: MetricName = None,
    on_mismatch: OnMismatch = None,
    only_correct: OnlyCorrect = False,
    chat: Chat = False,
    device: Device = None,
    dtype: DType = None,
    batch_size: BatchSize = None,
    option: TaskOptions = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Compare methods on features: agreement with exact patching, and how faithful the circuits are that they choose.

    Features and errors are scored on one half of the pairs; circuits of features, of features without the errors, and of neurons are measured on the
    other half, by number of nodes.
    """
    options = task_settings(option, metric=metric, on_mismatch=on_mismatch, only_correct=only_correct, chat=chat)
    from transformers.utils.logging import disable_progress_bar

    from patchlab import feature_comparison as jobs
    from patchlab.circuits import NODE_ABLATIONS
    from patchlab.errors import CircuitError, unknown
    from patchlab.grammar import split
    from patchlab.report.features import write_features
    from patchlab.store import result_folder
    from patchlab.terminal import prose, terminal_width

    disable_progress_bar()  # for files that load in a second
    if ablation not in NODE_ABLATIONS:
        raise CircuitError(unknown("ablation of nodes", ablation, NODE_ABLATIONS))
    chosen = () if points is None else tuple(word.strip() for word in points.split(","))
    scored = jobs.METHODS if methods is None else tuple(split(methods))
    job = jobs.FeatureJob(
        model, task, dictionaries, chosen, scored, direction, n, seed, ablation, device, dtype, batch_size, options
    )  # fmt: skip
    with result_folder(out, force=force, job={"patchlab": __version__, **job.as_dict()}, say=say) as folder:
        results = jobs.run(job, folder=folder, say=say, progress=True)
        say("writing tables and plots")
        run = write_features(folder, results, say=say)
    target = out.expanduser().resolve()
    say(f"done: open {target / 'index.html'}")
    if json_:
        typer.echo(json.dumps({"out": str(target), **run}, allow_nan=False))
        return
    width = terminal_width()
    for line in run["findings"]:
        typer.echo(prose(line, width))
