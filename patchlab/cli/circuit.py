"""``patchlab circuit``: find circuits from edge scores, evaluate, draw and convert them.

``find`` works on the first half of the pairs and ``evaluate`` on the other (the same ``--task``, ``--n``, ``--seed`` and ``--option`` give the same
halves), so that no circuit is judged by the pairs it was chosen on.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

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

METHODS = "atp,ig:5,relp"
EDGES = 200
FEWER = "fewer pairs (--n), another --method"

circuit = typer.Typer(
    context_settings=SETTINGS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Find, evaluate, draw and convert circuits: parts of a model's graph.",
)
Replace = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
Seed = Annotated[int, typer.Option(help="Seed of the task's generator, of the halves and of the resamples.")]
How = Annotated[str, typer.Option(help="top_n (the largest) or greedy (from the logits upwards).")]
By = Annotated[str, typer.Option(help="Importance: abs, or signed (what supports the behaviour first).")]
Stable = Annotated[
    int, typer.Option("--stability", help="Resamples of the pairs on which the choice is made again, to see how stable it is [0: none].")
]
Dictionaries = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of dictionaries, for features and errors [default: those packaged with the model].", show_default=False),
]
Whole = Annotated[bool, typer.Option("--all", help="Use all pairs, not one half of them.")]


@circuit.command(cls=Command)
def find(
    model: ModelName,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="File for the circuit, .json or .pt, as EAP-IG and MIB read it.")],
    method: Annotated[str, typer.Option(help="The method that scores the edges (patchlab methods).")] = "relp",
    edges: Annotated[int | None, typer.Option(help=f"How many edges to choose, before pruning [default: {EDGES}].", show_default=False)] = None,
    threshold: Annotated[float | None, typer.Option(help="All edges at least this important, instead of a number.", show_default=False)] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Choose nodes of these sites instead of edges, such as z,mlp_post; --edges says how many.", show_default=False),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(help="With --sites: choose this many nodes, and then --edges (or --threshold) edges between them.", show_default=False),
    ] = None,
    dictionaries: Dictionaries = None,
    how: How = "top_n",
    by: By = "abs",
    direction: Annotated[str, typer.Option(help="denoising or noising.")] = "noising",
    stability: Stable = 0,
    consistent: Annotated[
        float | None,
        typer.Option(help="Keep what is chosen on at least this share of resamples (--stability, default 100), such as 0.9.", show_default=False),
    ] = None,
    n: Pairs = None,
    seed: Seed = 0,
    whole: Whole = False,
    metric: MetricName = None,
    on_mismatch: OnMismatch = None,
    only_correct: OnlyCorrect = False,
    chat: Chat = False,
    device: Device = None,
    dtype: DType = None,
    batch_size: BatchSize = None,
    option: TaskOptions = None,
    force: Replace = False,
    json_: Json = False,
) -> None:
    """Score the edges (or nodes), choose the important ones, write them as a circuit.

    Works on the first half of the pairs; evaluate takes the other. With --sites features,error --nodes N the edges are those between the N most
    important features and errors.
    """
    options = task_settings(option, metric=metric, on_mismatch=on_mismatch, only_correct=only_correct, chat=chat)
    if edges is not None and threshold is not None:
        raise typer.BadParameter("give a number of edges or a threshold, not both.", param_hint="--edges, --threshold")
    if nodes is not None and (sites is None or how != "top_n" or stability or consistent is not None):
        raise typer.BadParameter(
            "edges between nodes need --sites, and are chosen by top_n or a threshold, once: leave --how, --stability and --consistent out.",
            param_hint="--nodes",
        )
    from patchlab import circuits
    from patchlab.circuits import threshold as above
    from patchlab.circuits.evaluation.curve import HOW
    from patchlab.circuits.files import SUFFIXES, write
    from patchlab.circuits.select import BY
    from patchlab.circuits.stability import DRAWS
    from patchlab.comparison.job import cost_line
    from patchlab.errors import CircuitError, OutputError, unknown
    from patchlab.methods.names import scoring_method
    from patchlab.sites import parse_sites
    from patchlab.terminal import fitted, terminal_width

    for what, got, valid in (("way to choose edges", how, HOW), ("importance", by, BY), ("kind of circuit file", out.suffix, SUFFIXES)):
        if got not in valid:
            raise CircuitError(unknown(what, got, valid))
    if out.exists() and not force:
        raise OutputError(f"{out} exists and is not overwritten; choose another name with --out, or replace it with --force.")
    scorer = scoring_method(method.strip())
    loaded, first, second = _load(model, task, n, seed, options, device, dtype, whole)
    scored = parse_sites("edges" if sites is None else sites)
    _add_dictionaries(loaded, model, dictionaries, [site.kind for site in scored])
    if (
        line := cost_line([scorer.name], loaded, first or second, list(map(str, scored)), direction=direction, batch_size=batch_size, lower=FEWER)
    ) is not None:
        say(line)
    scores: Any = scorer.run(loaded, first or second, scored, direction=direction, batch_size=batch_size)
    if (warning := scores.reversed_gap()) is not None:
        say(f"warning: {warning}")
    if nodes is not None:
        chosen: Any = circuits.top_n(scores, nodes, by=by)
        scores = circuits.node_edges(loaded, first or second, chosen, scorer, direction=direction, batch_size=batch_size)

    def choose(one: Any) -> Any:
        return HOW[how](one, EDGES if edges is None else edges, by=by) if threshold is None else above(one, threshold, by=by)

    if consistent is not None:
        found: Any = circuits.consistent(scores, choose, share=consistent, draws=stability or DRAWS, seed=seed)
    else:
        found = circuits.stability(scores, choose, draws=stability, seed=seed).choice if stability else choose(scores)
    if not (found.nodes if nodes is None else found.n_edges):
        raise CircuitError(
            f"nothing is left of the circuit: of the edges that were chosen ({found.provenance.get('how', '')}) none is on a path from the input to "
            f"the logits, so pruning took them all. Choose more with --edges."
        )
    write(found, out, overwrite=force)
    if json_ and nodes is not None:
        counts = {"n_edges": found.n_edges, "n_nodes": found.n_nodes, "n_candidates": found.nodes.size}
        _say_json({"out": str(out), **counts, "edges": found.edges, "provenance": found.provenance})
    elif json_ and sites is not None:
        counts = {"n_nodes": found.n_nodes, "n_candidates": found.size}
        _say_json({"out": str(out), **counts, "nodes": found.nodes, "provenance": found.provenance})
    elif json_:
        counts = {"n_edges": found.n_edges, "n_nodes": len(found.nodes), "graph_edges": found.graph.n_edges, "graph_nodes": len(found.graph.nodes)}
        _say_json({"out": str(out), **counts, "edges": found.edge_names, "provenance": found.provenance})
    else:
        typer.echo(fitted(f"{scores}\n{found.summary()}\nwrote {out}", terminal_width()))


@circuit.command(cls=Command)
def evaluate(
    model: ModelName,
    task: TaskName,
    files: Annotated[list[Path] | None, typer.Argument(metavar="CIRCUIT.json", help="Circuit files.", show_default=False)] = None,
    ablation: Annotated[
        str | None,
        typer.Option(help="What the rest carries: resample (edges), zero, mean, mean_positional (nodes), optimal.", show_default=False),
    ] = None,
    minimality: Annotated[str | None, typer.Option(help="Leave out each edge or node in turn.", show_default=False)] = None,
    dictionaries: Dictionaries = None,
    curve: Annotated[Path | None, typer.Option(help="Compare methods over sizes instead; a folder for the results.", show_default=False)] = None,
    methods: Annotated[str, typer.Option(help="With --curve: comma-separated (patchlab methods).")] = METHODS,
    sizes: Annotated[
        str | None, typer.Option(help="With --curve: numbers of edges to show, comma-separated [default: MIB's ten shares].", show_default=False)
    ] = None,
    how: How = "top_n",
    by: By = "abs",
    random: Annotated[int, typer.Option(help="With --curve: draws of random circuits of the same sizes.")] = 5,
    stability: Stable = 0,
    n: Pairs = None,
    seed: Seed = 0,
    whole: Whole = False,
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
    """Run the model with all edges outside circuits ablated: how faithful are they?

    Works on the second half of the pairs (the first fits means and constants). With --curve: which score finds the smaller faithful circuit. Three
    sets of pairs: every method scores the edges on the first half; the smallest size from which on all larger ones have f >= 0.9 is found on a
    quarter, among sizes at most a tenth apart; and its faithfulness is reported on the other quarter. CPR and CMD, over MIB's ten sizes, choose
    nothing and take both quarters.
    """
    options = task_settings(option, metric=metric, on_mismatch=on_mismatch, only_correct=only_correct, chat=chat)
    if bool(files) == (curve is not None):
        raise typer.BadParameter("give circuit files, or --curve and a folder.", param_hint="CIRCUIT.json, --curve")
    if curve is not None:
        if dictionaries is not None:
            raise typer.BadParameter("a curve is of edges of the model's graph.", param_hint="--dictionaries")
        if whole:
            raise typer.BadParameter("a curve chooses, finds the size and reports on three sets of pairs; leave --all out.", param_hint="--all")
        settings = {
            "sizes": None if sizes is None else _numbers(sizes),
            "how": how,
            "by": by,
            "ablation": ablation or "resample",
            "random": random,
            "stability": stability,
            "seed": seed,
            "batch_size": batch_size,
        }
        _curve(curve, methods, (model, task, n, seed, options, device, dtype), settings, force=force, as_json=json_)
        return
    from patchlab import circuits
    from patchlab.errors import CircuitError
    from patchlab.tables import records, table
    from patchlab.terminal import fitted, terminal_width

    paths = list(files or [])
    named = {path.stem: circuits.read(path) for path in paths}
    if len(named) < len(paths):
        raise CircuitError(f"circuits are named after their files, and two of them have one name; got {', '.join(map(str, paths))}.")
    loaded, first, second = _load(model, task, n, seed, options, device, dtype, whole)
    of = {name: one.nodes if isinstance(one, circuits.SparseCircuit) else one for name, one in named.items()}
    kinds = [site.site.kind for one in of.values() if isinstance(one, circuits.NodeCircuit) for site in one.universe]
    _add_dictionaries(loaded, model, dictionaries, kinds)
    train = None if ablation in (None, "resample", "zero") else first
    result = circuits.evaluate(loaded, named, second, ablation=ablation, train=train, minimality=minimality, seed=seed, batch_size=batch_size)
    if json_:
        _say_json({"table": records(result.table), "minimality": records(result.minimality), "provenance": result.provenance})
        return
    width = terminal_width()
    typer.echo(fitted(repr(result), width))
    if len(result.minimality):
        ranked = result.minimality.sort_values("minimality", ascending=False)
        typer.echo(table(ranked.assign(**{str(name): ranked[name].map("{:.4f}".format) for name in ranked.select_dtypes("float")}), width))


@circuit.command(cls=Command)
def plot(
    file: Annotated[Path, typer.Argument(metavar="CIRCUIT.json", help="A circuit file.")],
    out: Annotated[Path, typer.Option(help="File for the figure: .html, .png, .svg, .pdf, ..., or .dot for Graphviz.")],
    edges: Annotated[
        int | None,
        typer.Option(
            help="Edges shown first, those of largest |score|; the slider shows more [default: all up to 150, else 60].", show_default=False
        ),
    ] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Draw a matrix of writers and readers instead of a graph.")] = False,
    force: Replace = False,
    json_: Json = False,
) -> None:
    """Draw a circuit."""
    import warnings

    from patchlab import circuits, plots
    from patchlab.circuits.sparse import with_edges
    from patchlab.store.files import writing

    drawn = circuits.read(file)
    if out.suffix in (".dot", ".gv"):
        with writing(out, overwrite=force) as temporary:
            temporary.write_text(circuits.to_dot(drawn) + "\n", encoding="utf-8")
        written = out
    else:
        figure = plots.edge_heatmap(with_edges(drawn, "a matrix")) if matrix else plots.circuit(drawn, edges)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            written = plots.save(figure, out, overwrite=force)
        for warning in caught:
            typer.echo(f"warning: {warning.message}", err=True)
    if json_:
        counts = {"n_nodes": drawn.n_nodes} if isinstance(drawn, circuits.NodeCircuit) else {"n_edges": drawn.n_edges}
        _say_json({"out": str(written), **counts})
    else:
        typer.echo(f"wrote {written}")


@circuit.command(cls=Command)
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A circuit file, or a folder with such files (an MIB submission).")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A .json or .pt file, or a new folder.")],
    suffix: Annotated[str | None, typer.Option(help="Of a folder: .json or .pt for all files [default: the other].", show_default=False)] = None,
    force: Replace = False,
    json_: Json = False,
) -> None:
    """Convert circuits between JSON and .pt; every file is checked on the way."""
    from patchlab import circuits

    written = [str(path) for path in circuits.convert(src, dst, suffix=suffix, overwrite=force)]
    if json_:
        _say_json({"files": written})
    else:
        typer.echo("\n".join(f"wrote {path}" for path in written))


def _load(
    model: str, task: str, n: int | None, seed: int, options: dict[str, Any], device: str | None, dtype: str | None, whole: bool
) -> tuple[Any, Any, Any]:
    """The model, the half that circuits are chosen on (None with ``whole``), and the half that they are evaluated on (with ``whole`` all pairs)."""
    from transformers.utils.logging import disable_progress_bar

    from patchlab.comparison.job import named_task
    from patchlab.models import load_model

    disable_progress_bar()  # for files that load in a second
    loaded = load_model(model, device=device, dtype=dtype)
    pairs = named_task(task, loaded, n=n, seed=seed, options=options)
    first, second = (None, pairs) if whole else pairs.split(seed=seed)
    return loaded, first, second


def _add_dictionaries(loaded: Any, model: str, dictionaries: str | None, kinds: Sequence[str]) -> None:
    """Give the model the autoencoders that sites of features and errors are of: at the points that they name, else at all."""
    parts = [kind.partition(".") for kind in kinds]
    points = [point for part, _, point in parts if part in ("features", "error")]
    if not points:
        if dictionaries is not None:
            raise typer.BadParameter("no features or errors are asked for.", param_hint="--dictionaries")
        return
    from patchlab.features import load_dictionaries

    named = list(dict.fromkeys(filter(None, points)))
    loaded.add_dictionaries(load_dictionaries(dictionaries or model, loaded, kind="sae", sites=named or None))


def _curve(out: Path, methods: str, where: tuple[Any, ...], settings: dict[str, Any], *, force: bool, as_json: bool) -> None:
    from patchlab import __version__, circuits, report
    from patchlab.circuits.evaluation.curve import RANDOM, check_plan
    from patchlab.comparison import job as jobs
    from patchlab.grammar import split
    from patchlab.methods.names import scoring_method
    from patchlab.store import result_folder
    from patchlab.terminal import fitted, terminal_width

    names = tuple(scoring_method(name).name for name in split(methods))

    # what the scores depend on: the sizes and the ablation of the curve may be others when it is drawn again
    job = {"patchlab": __version__, "curve": list(names), "of": list(where), "batch_size": settings["batch_size"]}
    with result_folder(out, force=force, job=job, say=say) as folder:
        loaded, _, pairs = _load(*where, whole=True)
        sets = circuits.three_sets(pairs, seed=settings["seed"])
        held_out = pairs.split(seed=settings["seed"])[1]
        say(f"{loaded.name}, {pairs.name}: {sets}")
        plan = {key: settings[key] for key in ("how", "by", "ablation")}
        check_plan(loaded.arch.graph, {name: scoring_method(name) for name in names}, settings["sizes"], **plan)
        run = {"direction": "noising", "batch_size": settings["batch_size"]}
        maps = jobs.scored(names, loaded, sets.choosing, ["edges"], folder=folder, say=say, **run)
        train = None if settings["ablation"] in ("resample", "zero") else sets.choosing
        measured = {"train": train, **settings}
        started = time.perf_counter()
        found = circuits.faithfulness_curve(loaded, maps, held_out, **measured)
        seconds = time.perf_counter() - started
        runs = (len(found.table) + (settings["random"] - 1) * (found.table["method"] == RANDOM).sum()) * len(held_out)
        wanted = len(maps) * len(circuits.size_grid(maps))
        estimate = f"about {seconds * wanted * len(sets.finding) / runs:,.0f} s"
        say(f"circuits of {found.table['n_requested'].nunique()} sizes: {seconds:.1f} s")
        say(f"next, to find the smallest faithful ones: {wanted:,} circuits on {len(sets.finding)} pairs, {estimate}")
        only = {key: value for key, value in measured.items() if key not in ("sizes", "random")}
        smallest = circuits.smallest_faithful(loaded, maps, sets.finding, sets.reporting, **only)
        record = report.write_curve(folder, found, smallest, sets, say=say)
    target = out.expanduser().resolve()
    say(f"done: open {target / 'faithfulness.html'}")
    if as_json:
        _say_json({"out": str(target), **record})
    else:
        typer.echo(fitted(report.summary(found, smallest), terminal_width()))


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 10,20,50.", param_hint="--sizes") from None


def _say_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record, allow_nan=False))
