"""The command line: parse, call, print. Heavy modules are imported inside the commands, so ``--help`` is quick."""

import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from patchlab import __version__
from patchlab.cli.circuit import circuit
from patchlab.cli.explore import explore
from patchlab.cli.features import features
from patchlab.cli.options import (
    SETTINGS,
    BatchSize,
    Chat,
    Command,
    Device,
    DType,
    Force,
    Group,
    Json,
    MetricName,
    ModelName,
    N,
    OnlyCorrect,
    OnMismatch,
    Pairs,
    Positions,
    TaskName,
    TaskOptions,
    as_options,
    say,
    task_settings,
)
from patchlab.cli.recipes import recipe, recipes
from patchlab.cli.study import study
from patchlab.cli.sweep import sweep

DEMO = (("ioi", {}), ("agreement", {"variant": "across_rc"}))
METHODS = "exact,atp,ig:5,relp"
SITES = "resid_pre,attn_out,mlp_out,z"


app = typer.Typer(
    cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=SETTINGS
)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"patchlab {__version__}")
        raise typer.Exit
    return asked


@app.callback(help="Compare exact, gradient and relevance patching of transformer language models.")
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


app.add_typer(circuit, name="circuit")
app.add_typer(features, name="features")
app.add_typer(sweep, name="sweep")
app.command(cls=Command)(study)
app.command(cls=Command)(explore)
app.command(cls=Command)(recipes)
app.command(cls=Command)(recipe)


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("patchlab-demo"),
    n: Annotated[int, typer.Option(help="Number of prompt pairs.")] = N,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Compare four methods on two packaged models and two tasks.

    Both models have been trained to do indirect object identification and subject-verb agreement. The methods' agreement with exact patching is said
    in words, then tabulated; each comparison has a folder with a page of its own.
    """
    _demo(out, n, force=force, as_json=json_)


@app.command(cls=Command)
def compare(
    model: ModelName,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    methods: Annotated[str, typer.Option(help="Comma-separated (patchlab methods); exact is the reference.")] = METHODS,
    sites: Annotated[str, typer.Option(help="Comma-separated (patchlab sites), with axes where not the default: z[layer,pos,head].")] = SITES,
    direction: Annotated[str, typer.Option(help="denoising or noising.")] = "denoising",
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
    """Compare methods with exact patching on one task."""
    options = task_settings(option, metric=metric, positions=positions, on_mismatch=on_mismatch, only_correct=only_correct, chat=chat)
    _compare(model, task, methods, sites, out=out, direction=direction, n=n, seed=seed, device=device, dtype=dtype, batch_size=batch_size,
             options=options, force=force, as_json=json_)  # fmt: skip


@app.command(cls=Command)
def verify(
    model: ModelName,
    task: TaskName,
    sites: Annotated[str, typer.Option(help="Comma-separated (patchlab sites); their cells compete.")] = "z[layer,pos,head]",
    screen: Annotated[str, typer.Option(help="The method that says where to look (patchlab methods).")] = "relp",
    k: Annotated[int, typer.Option(help="How many cells are wanted.")] = 20,
    target: Annotated[float | None, typer.Option(help="All cells above this share of the gap, instead of k.", show_default=False)] = None,
    recall: Annotated[float | None, typer.Option(help="Share of them that must be there for certain, such as 0.85.", show_default=False)] = None,
    sample: Annotated[
        int | None,
        typer.Option(help="Most unverified cells patched at random [default: 30; with --recall as many as it takes].", show_default=False),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of what is said about cells and prompts that were not run.")] = 0.95,
    subsets: Annotated[int, typer.Option(help="Random subsets that are patched jointly; their bound assumes that effects add up.")] = 0,
    hierarchical: Annotated[bool, typer.Option("--hierarchical", help="Look at layers and positions as a whole first.")] = False,
    population: Annotated[bool, typer.Option("--population", help="Speak of prompts such as these, not only of these.")] = False,
    direction: Annotated[str, typer.Option(help="denoising or noising.")] = "denoising",
    n: Pairs = None,
    seed: Annotated[int, typer.Option(help="Seed of the task's generator and of the sample.")] = 0,
    metric: MetricName = None,
    positions: Positions = None,
    on_mismatch: OnMismatch = None,
    only_correct: OnlyCorrect = False,
    chat: Chat = False,
    device: Device = None,
    dtype: DType = None,
    batch_size: BatchSize = None,
    option: TaskOptions = None,
    json_: Json = False,
) -> None:
    """Find the cells with the largest exact effects, and say how many of them are certain.

    A cheap method says where to look, exact patching says what is there, cells at random say what may be missing. The price is printed
    first, on stderr; where a full sweep costs no more, it is run instead.
    """
    options = task_settings(option, metric=metric, positions=positions, on_mismatch=on_mismatch, only_correct=only_correct, chat=chat)
    from transformers.utils.logging import disable_progress_bar

    from patchlab.comparison.job import announced, named_task
    from patchlab.methods import VerifiedPatching
    from patchlab.methods.names import scoring_method
    from patchlab.models import load_model
    from patchlab.sites import parse_sites
    from patchlab.terminal import fitted, terminal_width

    disable_progress_bar()  # for files that load in a second
    method = VerifiedPatching(
        screen=scoring_method(screen.strip()), k=k, target=target, recall=recall, sample=sample, confidence=confidence, subsets=subsets,
        hierarchical=hierarchical, population=population, seed=seed,
    )  # fmt: skip
    wanted = parse_sites(sites)
    loaded = load_model(model, device=device, dtype=dtype)
    pairs = named_task(task, loaded, n=n, seed=seed, options=options)
    rows = method.price(loaded, pairs, wanted, direction=direction).rows
    lower = "Less is computed with fewer pairs (--n), a smaller --k or --sample, another --screen, or fewer --sites."
    if (line := announced({method.name: rows}, loaded, pairs, lower=lower, passes=f"{rows:,.0f} forward passes of every prompt")) is not None:
        say(line)
    result = method.run(loaded, pairs, wanted, direction=direction, batch_size=batch_size, say=say)
    if (warning := result.screen.reversed_gap()) is not None:
        say(f"warning: {warning}")
    typer.echo(json.dumps(result.to_dict(), allow_nan=False) if json_ else fitted(result.summary(), terminal_width()))


def _demo(out: Path, n: int, *, force: bool, as_json: bool) -> None:
    from contextlib import ExitStack

    from transformers.utils.logging import disable_progress_bar

    from patchlab import report
    from patchlab.comparison import job as jobs
    from patchlab.grammar import split
    from patchlab.store import result_folder
    from patchlab.tables import table
    from patchlab.terminal import prose, terminal_width

    disable_progress_bar()  # for files that load in a second
    target, sites = out.expanduser().resolve(), tuple(SITES.split(","))
    wanted = {
        f"{model}-{task}": jobs.Job(model, task, tuple(split(METHODS)), sites, n=n, options=options)
        for model in ("demo-gpt2", "demo-llama")
        for task, options in DEMO
    }
    report.check_overview(target, force=force)
    done: dict[str, jobs.Results] = {}
    records: dict[str, Any] = {}
    models: dict[str, Any] = {}
    with ExitStack() as stack:
        made = {"patchlab": __version__}
        kept = {
            name: stack.enter_context(result_folder(target / name, force=force, job={**made, **job.as_dict()}, say=say))
            for name, job in wanted.items()
        }
        for name, job in wanted.items():
            done[name] = jobs.run(job, model=models.get(job.model), folder=kept[name], say=say, progress=True)
            models[job.model] = done[name].model
            records[name] = report.write(kept[name], done[name], images=False, say=say)
    report.write_overview(target, done)
    say(f"done: open {target / 'index.html'}")
    found = {name: report.findings(one.comparison, one.maps[one.job.reference]) for name, one in done.items()}
    if as_json:
        comparisons = {name: {**record, "findings": found[name]} for name, record in records.items()}
        typer.echo(json.dumps({"out": str(target), "comparisons": comparisons}, allow_nan=False))
        return
    width = terminal_width()
    for name, one in done.items():
        typer.echo("\n".join([report.headline(one), *(f"  {prose(line, width and width - 2, indent='    ')}" for line in found[name]), ""]))
    typer.echo("Pearson correlation with exact patching over live cells, with 95 % intervals:\n")
    typer.echo(table(report.agreement_table(done), width, keys=3))


def _compare(
    model: str, task: str, methods: str, sites: str, *, out: Path, force: bool, as_json: bool, n: int | None = None, **settings: Any
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from patchlab import report
    from patchlab.comparison import job as jobs
    from patchlab.grammar import split
    from patchlab.sites import parse_sites
    from patchlab.store import result_folder
    from patchlab.terminal import terminal_width

    disable_progress_bar()  # for files that load in a second
    job = jobs.Job(model, task, tuple(split(methods)), tuple(map(str, parse_sites(sites))), n=n, **settings)
    with result_folder(out, force=force, job={"patchlab": __version__, **job.as_dict()}, say=say) as folder:
        results = jobs.run(job, folder=folder, say=say, progress=True)
        say("writing tables and plots")
        run = report.write(folder, results, say=say)
    target = out.expanduser().resolve()
    say(f"done: open {target / 'index.html'}")
    if as_json:
        typer.echo(json.dumps({"out": str(target), **run}, allow_nan=False))
    else:
        typer.echo(as_options(results.comparison.summary(width=terminal_width())))


@app.command(cls=Command)
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them, with its options and an example.", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """The task generators; with a name, the options of one."""
    from patchlab.errors import TaskError, unknown
    from patchlab.tasks import GENERATORS

    if name is None:
        _listing(((one.name, one.description) for one in GENERATORS.values()), json_)
        return
    if name not in GENERATORS:
        raise TaskError(unknown("task", name, GENERATORS))
    one = GENERATORS[name]
    if json_:
        typer.echo(json.dumps({"name": name, "description": one.description, "metric": one.metric, "options": dict(one.defaults)}))
        return
    from patchlab.terminal import fitted, prose, terminal_width

    paragraphs = (" ".join(paragraph.split()) for paragraph in one.help.split("\n\n"))
    width = terminal_width()
    lines = [f"Metric: {one.metric}. Options, with their defaults:"]
    for option, default in one.defaults.items():
        others = ", ".join(value for value in one.values.get(option, ()) if value != default)
        lines.append(f"  --option {option}={json.dumps(default) if isinstance(default, bool) else default}" + (f"  (or {others})" if others else ""))
    typer.echo("\n\n".join([*(prose(paragraph, width) for paragraph in paragraphs), fitted("\n".join(lines), width)]))


@app.command(cls=Command)
def models(json_: Json = False) -> None:
    """The packaged models.

    Local Hugging Face folders and hub names work as well.
    """
    from patchlab.models import DEMO_MODELS

    _listing(((name, _described(folder)) for name, folder in DEMO_MODELS.items()), json_)


@app.command(cls=Command)
def methods(json_: Json = False) -> None:
    """The methods: [RULES+]WORD[:N][[OPTION=VALUE,...]][+qk][+drop][@SOURCE], in this order, without what is left at its default."""
    from patchlab.methods import METHODS

    _listing(METHODS.items(), json_)


@app.command(cls=Command)
def sites(json_: Json = False) -> None:
    """The sites, with the default granularity in brackets."""
    from patchlab.sites import KINDS

    _listing(((kind.name, f"{kind.what} [{','.join(kind.default)}]") for kind in KINDS.values()), json_)


def _described(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, width = (config[old if old in config else new] for old, new in (("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size")))
    return f"{config['model_type']}, {layers} layers, d_model {width}, {config['vocab_size']} words"


def _listing(rows: Iterable[tuple[str, str]], as_json: bool) -> None:
    entries = dict(rows)
    if as_json:
        typer.echo(json.dumps(entries))
        return
    from patchlab.terminal import described, terminal_width

    typer.echo(described(entries, terminal_width()))


def main() -> None:
    """Entry point of the ``patchlab`` command. A request to end (SIGTERM) ends it as Ctrl-C does: finished work is kept."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(prog_name="patchlab")
