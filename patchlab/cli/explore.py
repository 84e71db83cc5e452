"""``patchlab explore``: a page to click through."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchlab.cli.options import (
    BatchSize,
    Chat,
    Device,
    DType,
    Force,
    Json,
    MetricName,
    ModelName,
    OnlyCorrect,
    OnMismatch,
    Pairs,
    Positions,
    TaskName,
    TaskOptions,
    say,
    task_settings,
)

if TYPE_CHECKING:
    from patchlab.models import Model
    from patchlab.tasks import Task


def explore(
    model: ModelName,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="The page to write, .html.")],
    methods: Annotated[
        str, typer.Option(help="Comma-separated (patchlab methods); without exact, the largest cells are patched.")
    ] = "exact,atp,relp",
    sites: Annotated[str, typer.Option(help="Comma-separated (patchlab sites).")] = "resid_pre,z[layer,pos,head],mlp_out",
    direction: Annotated[str, typer.Option(help="denoising or noising.")] = "denoising",
    exact: Annotated[int, typer.Option(help="Cells per site that are patched exactly where no method does.")] = 24,
    edges: Annotated[int, typer.Option(help="Edges of the circuit that is drawn, by relp; 0 draws none.")] = 60,
    n: Pairs = None,
    seed: Annotated[int, typer.Option(help="Seed of the task's generator.")] = 0,
    metric: MetricName = None,
    positions: Positions = None,
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
    """Write a page to click through: heatmaps, agreement with exact patching, a circuit, and what is in each cell.

    It needs neither a server nor a network. In a notebook, pl.explore shows the same and patches whatever is clicked.
    """
    options = task_settings(option, metric=metric, positions=positions, on_mismatch=on_mismatch, only_correct=only_correct, chat=chat)
    from transformers.utils.logging import disable_progress_bar

    from patchlab.comparison.job import named_task, scored
    from patchlab.explorer import explore as look
    from patchlab.explorer.page import check_target
    from patchlab.grammar import split
    from patchlab.models import load_model
    from patchlab.sites import parse_sites

    disable_progress_bar()  # for files that load in a second
    check_target(out, exact=exact, overwrite=force)
    wanted = list(map(str, parse_sites(sites)))
    loaded = load_model(model, device=device, dtype=dtype)
    pairs = named_task(task, loaded, n=n, seed=seed, options=options)
    maps = scored(split(methods), loaded, pairs, wanted, say=say, direction=direction, batch_size=batch_size)
    page = look(loaded, pairs, maps, circuit=_circuit(loaded, pairs, edges, batch_size) if edges else None)
    page.save_html(out, exact=exact, overwrite=force)
    size = out.stat().st_size
    say(f"done: open {out.resolve()}")
    if json_:
        typer.echo(json.dumps({"out": str(out.resolve()), "bytes": size, "methods": list(maps), "sites": wanted}, allow_nan=False))


def _circuit(model: "Model", task: "Task", edges: int, batch_size: int | None) -> Any:
    """The largest edges by relevance; None where they cannot be scored, which is said."""
    from patchlab.circuits import top_n
    from patchlab.errors import PatchlabError
    from patchlab.methods import RelevancePatching

    try:
        scores = RelevancePatching().run(model, task, "edges", direction="noising", batch_size=batch_size)
        return top_n(scores, min(edges, int(scores.live["edges"].sum())))
    except PatchlabError as error:
        say(f"no circuit is drawn: {error}")
        return None
