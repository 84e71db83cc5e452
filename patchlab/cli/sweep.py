"""``patchlab sweep``: many runs from one file, done so that nothing finished is lost, and read as one table."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from patchlab.cli.options import SETTINGS, Command, Json, say

sweep = typer.Typer(
    context_settings=SETTINGS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Many runs from one file: what is done is kept, what is missing is run.",
)
File = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The sweep: models, tasks and runs.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a sweep.", show_default=False)]
Models = Annotated[
    list[str] | None,
    typer.Option("--model-folder", help="NAME=FOLDER: take a folder in place of a model of the file; repeat for several.", show_default=False),
]


@sweep.command(cls=Command)
def run(
    file: File,
    out: Annotated[Path, typer.Option(help="Folder for the results, new or of an earlier call.")],
    workers: Annotated[int | None, typer.Option(help="Processes on this machine [default: this one alone].", show_default=False)] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or local to start one.", show_default=False)] = None,
    per_gpu: Annotated[int, typer.Option(help="With --ray: workers that share a GPU.")] = 1,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Part I of N, in a folder of its own.", show_default=False)] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    models: Models = None,
    json_: Json = False,
) -> None:
    """Do the runs of a file that the folder does not hold yet.

    The same command goes on after Ctrl-C, a crash or a power cut, and with more runs in the file does those. A run that fails is stored as
    failed, with its traceback, and the others go on.
    """
    from transformers.utils.logging import disable_progress_bar

    from patchlab.sweeps.driver import run_sweep

    if workers is not None and ray is not None:
        raise typer.BadParameter("give processes on this machine or a cluster, not both.", param_hint="--workers, --ray")
    executor = _executor(workers, ray, per_gpu)
    disable_progress_bar()  # for files that load in a second
    name, runs = _runs(file, models)
    about = {"name": name, "file": file.read_text(encoding="utf-8")}
    if shard is not None:
        from patchlab.sweeps.executors.shards import Shard

        part = Shard.parse(shard)
        about |= {"shard": str(part), "sweep": [one.key for one in runs]}
        runs = part.part(runs)
    counts = run_sweep(runs, out, executor, retry_failed=retry_failed, about=about, say=say)
    if json_:
        typer.echo(json.dumps({"out": str(out.expanduser().resolve()), **counts}))
    else:
        typer.echo(", ".join(f"{number} {what}" for what, number in counts.items()))
    if counts["failed"]:
        raise typer.Exit(1)


@sweep.command(cls=Command)
def plan(file: File, models: Models = None, json_: Json = False) -> None:
    """What a file asks for: its runs, and about what they take, before anything starts."""
    from patchlab.sweeps.plan import estimate
    from patchlab.terminal import fitted, terminal_width

    _, runs = _runs(file, models)
    found = estimate(runs)
    if json_:
        totals = {name: getattr(found, name) for name in ("forwards", "backwards", "seconds", "peak_bytes")}
        typer.echo(json.dumps({"planned": len(runs), **totals, "runs": [one.as_dict() for one in found.runs]}, allow_nan=False))
    else:
        typer.echo(fitted(str(found), terminal_width()))


@sweep.command(cls=Command)
def schema() -> None:
    """The JSON schema of a file, from which editors complete and check."""
    from patchlab.sweeps.file import schema as described

    typer.echo(json.dumps(described(), indent=2))


@sweep.command(cls=Command)
def prefetch(file: File) -> None:
    """Fetch the hub models that a file names, on a machine that has a network."""
    from patchlab.sweeps.file import read
    from patchlab.sweeps.prefetch import fetch

    for name, where in fetch(read(file), say=say).items():
        typer.echo(f"{name}: {where}")


@sweep.command(cls=Command)
def slurm(
    file: File,
    out: Annotated[Path, typer.Option(help="Folder for the shards' folders, the logs and the script.")],
    shards: Annotated[int | None, typer.Option(help="Jobs of the array [default: 8, or as many as can be].", show_default=False)] = None,
    header: Annotated[list[str] | None, typer.Option(help="A line such as '#SBATCH --time=4:00:00'; repeat for several.", show_default=False)] = None,
    header_file: Annotated[Path | None, typer.Option(help="Lines that stand at the top: #SBATCH, then any commands.", show_default=False)] = None,
    script: Annotated[Path | None, typer.Option(help="The script [default: NAME.sbatch in the folder].", show_default=False)] = None,
    models: Models = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing script.")] = False,
) -> None:
    """Write a script for sbatch: a job array in which every job does a shard, and goes on after its time is up."""
    from patchlab.sweeps.slurm import SHARDS, Job, header_lines

    name, runs = _runs(file, models)
    job = Job(
        name=name,
        file=file.resolve(),
        out=out.expanduser().resolve(),
        shards=min(SHARDS, len({run.group for run in runs})) if shards is None else shards,
        header=header_lines(header or (), header_file),
        options=tuple(word for model, folder in _instead(models).items() for word in ("--model-folder", f"{model}={folder.expanduser().resolve()}")),
    )
    path = job.write(runs, script, overwrite=force)
    typer.echo(f"wrote {path}: {job.shards} jobs for {len(runs)} runs. Next: sbatch {shlex.quote(str(path))}")
    typer.echo(f"When all have ended: patchlab sweep merge {shlex.quote(str(job.out / 'merged'))} {job.folders()}")


@sweep.command(cls=Command)
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for all results, new or of a sweep.", show_default=False)],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of sweeps or shards.", show_default=False)],
    json_: Json = False,
) -> None:
    """Put the results of several folders into one, or change nothing if results of one run disagree."""
    from patchlab.sweeps.merge import merge as merged

    counts = merged(out, folders, say=say)
    if json_:
        typer.echo(json.dumps({"out": str(out.expanduser().resolve()), **counts}))
    else:
        typer.echo(", ".join(f"{number} {what}" for what, number in counts.items()))


@sweep.command(cls=Command)
def gc(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
    json_: Json = False,
) -> None:
    """What nobody needs in the folder of a sweep: replaced results, leftovers of writes, what was computed from results that are gone."""
    from patchlab.store.gc import gc as collected
    from patchlab.store.gc import remove
    from patchlab.store.runs import RunStore

    with RunStore.open(folder, write=yes, say=say) as store:
        garbage = collected(store)
        if not json_:
            for one in garbage:
                typer.echo(str(one))
        if yes:
            remove(store, garbage)
    total = sum(one.bytes for one in garbage)
    if json_:
        listed = [{"path": str(one.path), "why": one.why, "bytes": one.bytes} for one in garbage]
        typer.echo(json.dumps({"removed": yes, "bytes": total, "garbage": listed}))
    elif garbage:
        what = f"{len(garbage)} file{'s' if len(garbage) > 1 else ''} or folders, {total:,} bytes"
        typer.echo(f"removed {what}" if yes else f"{what}; --yes removes them")
    else:
        typer.echo("nothing to remove")


@sweep.command(cls=Command)
def status(folder: Folder, json_: Json = False) -> None:
    """How far a sweep is, also while it runs."""
    from patchlab.sweeps.results import Sweep
    from patchlab.tables import table
    from patchlab.terminal import fitted, terminal_width

    found = Sweep(folder)
    counts = found.counts()
    if json_:
        typer.echo(json.dumps(counts))
        return
    rows = found.runs()
    typer.echo(f"{found.name}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    left = rows[rows["status"] != "done"]
    if len(left):
        shown = left.assign(key=left["key"].str[:10], error=left["error"].str.split("\n").str[0].str[:60])[["key", "status", "label", "error"]]
        typer.echo(fitted(table(shown, terminal_width()), terminal_width()))


@sweep.command(cls=Command)
def show(folder: Folder, key: Annotated[str, typer.Argument(help="The beginning of a run's key.")], json_: Json = False) -> None:
    """All that is known of one run: what was asked, what came of it, where and how it ran."""
    from patchlab.sweeps.results import Sweep
    from patchlab.tables import table
    from patchlab.terminal import fitted, terminal_width

    found = Sweep(folder).find(key)
    if json_:
        typer.echo(json.dumps({"key": found.key, "status": found.status, "files": list(found.files), **found.record}, allow_nan=False))
        return
    import pandas as pd

    record, width = found.record, terminal_width()
    lines = [record["label"], f"key {found.key}", f"status {found.status}, ended {record['ended']}"]
    lines += [f"files {', '.join(str(found.folder / name) for name in found.files)}"] if found.files else []
    lines += [*record.get("log", ()), *record.get("warnings", ())]
    typer.echo(fitted("\n".join(lines), width))
    if "statistics" in record:
        shown = pd.DataFrame(record["statistics"])
        numbers = {name: ["" if pd.isna(value) else f"{value:.4g}" for value in shown[name]] for name in ("value", "lo", "hi")}
        typer.echo(table(shown.assign(**numbers), width))
    if "error" in record:
        typer.echo(record["error"]["traceback"])


@sweep.command(cls=Command)
def export(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="A .csv or .parquet file.", show_default=False)],
    costs: Annotated[bool, typer.Option("--costs", help="Also the passes and seconds of each run, which depend on interruptions.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write everything that was measured as one table: a row per run, site and statistic, in a fixed order."""
    from patchlab.errors import OutputError
    from patchlab.store.files import writing
    from patchlab.sweeps.results import Sweep

    if file.suffix not in (".csv", ".parquet"):
        raise OutputError(f"a table is a .csv or a .parquet file; got {file}.")
    if file.exists() and not force:
        raise OutputError(f"{file} exists and is not overwritten; choose another name, or replace it with --force.")
    table = Sweep(folder).table(costs=costs)
    with writing(file, overwrite=force) as temporary:
        if file.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            _to_parquet(table, temporary)
    typer.echo(f"wrote {len(table):,} rows to {file}")


@sweep.command(cls=Command)
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder for the report [default: DIR/report].", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of another result there.")] = False,
    json_: Json = False,
) -> None:
    """Write what came of a sweep as a page that needs no network: also while it runs, of what is finished.

    An earlier report of the same sweep is replaced.
    """
    from patchlab.report.sweep import PAGE, write_sweep
    from patchlab.sweeps.results import Sweep

    found = Sweep(folder)
    target = found.folder / "report" if out is None else out.expanduser().resolve()
    written = write_sweep(found, target, force=force, say=say)
    if json_:
        counts = {name: written[name] for name in ("counts", "figures", "bytes")}
        typer.echo(json.dumps({"out": str(target), "page": str(target / PAGE), **counts}))
    else:
        typer.echo(f"wrote {target / PAGE}")


def _executor(workers: int | None, ray: str | None, per_gpu: int) -> Any:
    from patchlab.sweeps.executors.local import Local
    from patchlab.sweeps.executors.on_ray import OnRay
    from patchlab.sweeps.executors.processes import Processes

    if ray is not None:
        return OnRay(ray, per_gpu=per_gpu)
    return Local(progress=True) if workers is None else Processes(workers)


def _to_parquet(table: Any, path: Path) -> None:
    from patchlab.errors import OutputError

    try:
        import pyarrow as _  # noqa: F401
    except ImportError as error:
        raise OutputError("parquet files need pyarrow: pip install 'patchlab[parquet]', or export to .csv.") from error
    table.to_parquet(path, index=False)


def _runs(file: Path, models: list[str] | None) -> tuple[str, list[Any]]:
    """The name of a sweep and its runs."""
    from patchlab.sweeps.file import read, runs_of

    found = read(file)
    instead = _instead(models)
    return found.name, runs_of(found, **({"models": instead} if instead else {}))


def _instead(models: list[str] | None) -> dict[str, Path]:
    """Folders in place of models, by their names."""
    instead: dict[str, Path] = {}
    for text in models or []:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise typer.BadParameter(f"{text!r} is not of the form NAME=FOLDER.", param_hint="--model-folder")
        instead[name] = Path(folder)
    return instead
