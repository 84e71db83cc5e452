"""``patchlab recipes`` and ``patchlab recipe``: what neighbouring papers do, on a model of one's own."""

import json
from pathlib import Path
from typing import Annotated

import typer

from patchlab import __version__
from patchlab.cli.options import Device, DType, Force, Json, ModelName, say


def recipes(json_: Json = False) -> None:
    """The recipes: methods of neighbouring papers, with their claims."""
    from patchlab.recipes import RECIPES

    if json_:
        typer.echo(json.dumps({one.name: {"paper": one.paper, "claim": one.claim} for one in RECIPES.values()}))
        return
    from patchlab.terminal import described, terminal_width

    typer.echo(described({one.name: f"{one.paper}: {one.claim}" for one in RECIPES.values()}, terminal_width()))


def recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of patchlab recipes.", show_default=False)],
    model: ModelName,
    out: Annotated[Path | None, typer.Option(help="Folder for the result and its figures [default: none is written].", show_default=False)] = None,
    other: Annotated[
        str | None, typer.Option(help="A second model with the same vocabulary, for recipes that compare two.", show_default=False)
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="A text file [default: sentences of the packaged models].", show_default=False)] = None,
    scale: Annotated[float, typer.Option(help="Multiplies numbers of prompts and texts.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts, texts and draws.")] = 1,
    device: Device = None,
    dtype: DType = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Run the method of a paper: its numbers beside the published ones, the control, and whether the claim shows.

    A claim that does not show on this model is said so, and its numbers stay.
    """
    from contextlib import nullcontext

    from transformers.utils.logging import disable_progress_bar

    from patchlab.models import load_model
    from patchlab.recipes import Inputs, get_recipe
    from patchlab.store import result_folder
    from patchlab.terminal import terminal_width

    disable_progress_bar()  # for files that load in a second
    wanted = get_recipe(name)
    options = {"name": name, "model": model, "other": other, "texts": None if texts is None else str(texts), "scale": scale, "seed": seed}
    job = {"patchlab": __version__, "recipe": options, "device": device, "dtype": dtype}
    with nullcontext() if out is None else result_folder(out, force=force, job=job, say=say) as folder:
        loaded = load_model(model, device=device, dtype=dtype)
        second = None if other is None else load_model(other, device=device, dtype=dtype)
        result = wanted.run(Inputs(loaded, second, texts, scale, seed))
        if folder is not None:
            result.write(folder)
    if out is not None:
        say(f"done: {out.expanduser().resolve()}")
    typer.echo(json.dumps(result.to_dict(), allow_nan=False) if json_ else result.summary(terminal_width()))
