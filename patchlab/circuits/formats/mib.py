"""Folders as the MIB circuit track takes them: one per task and model, with importances of edges or nodes or with a circuit per size.

Source: Mueller et al. 2025 (arXiv 2504.13151); README and ``run_evaluation.py`` of hannamw/MIB-circuit-track, ``Graph`` of hannamw/EAP-IG.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.files import SUFFIXES, read, write_folder
from patchlab.circuits.nodes import NodeCircuit
from patchlab.circuits.select import BY, direction_of, mean_effects, top_n
from patchlab.circuits.select_nodes import of_nodes
from patchlab.circuits.sparse import AnyCircuit, SparseCircuit, with_edges
from patchlab.errors import CircuitError, unknown
from patchlab.graph import Graph
from patchlab.scores import ScoreMap
from patchlab.sites import Site

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges at which MIB evaluates; a submission of circuits has one for each but the last, which is the whole graph."""
_SIZES = MIB_FRACTIONS[:-1]
Submission = Mapping[str, AnyCircuit | Sequence[AnyCircuit] | ScoreMap]
MIB_MODELS = {"gpt2": (12, 12, 768), "qwen2.5": (24, 14, 896), "gemma2": (26, 8, 2304), "llama3": (32, 32, 4096)}
"""The track's names of its models (GPT-2 small, Qwen2.5-0.5B, Gemma-2-2B, Llama-3.1-8B), with their layers, heads and width."""
MIB_TASKS = {
    "ioi": ("gpt2", "qwen2.5", "gemma2", "llama3", "interpbench"),
    "mcqa": ("qwen2.5", "gemma2", "llama3"),
    "arithmetic-addition": ("llama3",),
    "arithmetic-subtraction": ("llama3",),
    "arc-easy": ("gemma2", "llama3"),
    "arc-challenge": ("llama3",),
}
"""The track's names of its tasks, and the models that it has each for."""
_LEAST = 2
"""Models, and tasks, that a submission has at least."""
IMPORTANCE = "importance"
_NODES = (("z", ("layer", "head")), ("mlp_out", ("layer",)))


def importances(scores: ScoreMap, *, graph: Graph | None = None) -> Circuit:
    """What MIB ranks, from a map of scores: of edges, or of nodes (``z[layer,head]`` and ``mlp_out[layer]``).

    The numbers are importances, higher = more of the behaviour: effects of denoising, or of noising with their sign turned, since MIB takes
    the largest first. Nodes without a score, such as the input, stay in every circuit there.

    Args:
        scores: the map.
        graph: of the model, for nodes (``model.arch.graph``); a map of edges knows its own.

    Raises:
        CircuitError: a map of neither, or of nodes of which some are missing, or without their graph.
    """
    if not of_nodes(scores):
        effects, provenance = mean_effects(scores)
        return _turned(Circuit(scores.graph, scores.graph.allowed, effects, provenance))
    sites = {(site.kind, site.axes): name for name in scores.sites for site in (Site.parse(name),)}
    if graph is None or set(sites) != set(_NODES):
        raise CircuitError(
            f"importances of nodes are those of all heads and MLPs: score the sites 'z[layer,head]' and 'mlp_out[layer]' and pass "
            f"graph=model.arch.graph; got {', '.join(scores.sites)}{' without a graph' if graph is None else ''}."
        )
    sign = -1.0 if direction_of(scores, None) == "noising" else 1.0
    heads, mlps = (sign * scores.mean(sites[site]).to_numpy() for site in _NODES)
    if heads.shape != (graph.n_layers, graph.n_heads) or np.isnan(heads).any() or np.isnan(mlps).any():
        raise CircuitError(f"the scores are of heads {list(heads.shape)} and {graph} has {[graph.n_layers, graph.n_heads]}, or some are not scored.")
    named = {f"a{layer}.h{head}": float(heads[layer, head]) for layer, head in np.ndindex(*heads.shape)}
    named |= {f"m{layer}": float(value) for layer, value in enumerate(mlps)}
    provenance = {key: value for key, value in scores.provenance.items() if key not in ("graph", "direction")}
    return Circuit(graph, graph.allowed, None, {**provenance, "node_scores": named, "scores": IMPORTANCE})


def _turned(circuit: Circuit) -> Circuit:
    """The circuit with importances for scores."""
    about = {key: value for key, value in circuit.provenance.items() if key != "direction"} | {"scores": IMPORTANCE}
    if circuit.scores is None or "direction" not in circuit.provenance:
        return circuit
    return replace(circuit, scores=-circuit.scores if circuit.provenance["direction"] == "noising" else circuit.scores, provenance=about)


def sized(ranked: Circuit, *, by: str = "abs") -> tuple[Circuit, ...]:
    """The circuits that MIB evaluates: one for each of :data:`MIB_FRACTIONS`, the last one with everything that is ranked.

    ``n = int(share · N)`` edges, or nodes that have a score, of the largest importance, then pruned; a node brings all its outgoing edges.

    Args:
        ranked: from :func:`importances`.
        by: ``abs`` (as for CMD) or ``signed`` (as for CPR).

    Raises:
        CircuitError: nothing is ranked, or an unknown importance.
    """
    graph, nodes = ranked.graph, ranked.provenance.get("node_scores")
    if by not in BY:
        raise CircuitError(unknown("importance", by, BY))
    if ranked.scores is not None:
        counts = [int(share * graph.n_edges) for share in MIB_FRACTIONS]
        whole = Circuit.full(graph)
        chosen = [whole if n == graph.n_edges else Circuit.empty(graph) if not n else _edges(ranked, n, by) for n in counts]
        return tuple(chosen)
    if not nodes:
        raise CircuitError("a circuit without scores ranks nothing; make it with importances(scores).")
    order = sorted(nodes, key=lambda name: -(abs(nodes[name]) if by == "abs" else nodes[name]))
    unscored = set(graph.writers) - set(nodes)
    found = []
    for share in MIB_FRACTIONS:
        inside = unscored | set(order[: int(share * len(nodes))])
        found.append(Circuit(graph, graph.allowed & np.array([name in inside for name in graph.writers])[:, None]).pruned())
    return tuple(found)


def _edges(ranked: Circuit, n: int, by: str) -> Circuit:
    made = top_n(ranked.scores, n, by=by, graph=ranked.graph, direction="denoising")  # type: ignore[arg-type]  # importances have the sign of denoising
    return replace(with_edges(made, "an MIB circuit"), provenance={**ranked.provenance, **made.provenance})


def read_submission(folder: str | os.PathLike[str]) -> dict[str, tuple[Circuit, ...]]:
    """Read a folder with one folder per task and model, ``ioi_gpt2``, ``arc-easy_llama3``.

    Each holds one file with importances (its scores of edges or nodes count) or nine with circuits of MIB's sizes. Returns the circuits by
    folder name, small ones first.

    Raises:
        CircuitError: no such folder, no circuits in it, a folder with another name or another number of files, circuits of unlike shapes in
            one, circuits larger than their size allows, or a file that :func:`read` refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CircuitError(f"there is no folder {folder}. Give the folder that holds one folder per task and model.")
    found: dict[str, tuple[Circuit, ...]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            _check_name(entry.name)
            files = sorted(path for path in entry.iterdir() if path.suffix in SUFFIXES)
            read_files = (with_edges(read(path), f"{path}: an MIB submission") for path in files)
            found[entry.name] = tuple(sorted(read_files, key=lambda circuit: circuit.n_edges))
            _check_entry(f"{entry}", found[entry.name])
    if not found:
        raise CircuitError(f"{folder} has no folders in it; a submission has one per task and model, such as ioi_gpt2, with .json or .pt files.")
    return found


def write_submission(circuits: Submission, folder: str | os.PathLike[str], *, suffix: str = ".pt") -> list[Path]:
    """Write a new submission folder, whole or not at all; returns its files.

    Args:
        circuits: by ``"<task>_<model>"`` (task names with hyphens): a map of scores of edges, or one circuit with scores, written as importances
            (:func:`importances`; where the direction of effects is known, with the sign that MIB ranks by), or nine circuits of at most 0.1,
            0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges (:func:`sized` without the last).
        folder: must not exist yet.
        suffix: ``.pt`` or ``.json``.

    Raises:
        CircuitError: names, numbers or sizes that MIB does not take; importances without scores; another suffix.
        OutputError: the folder exists or cannot be written.

    Example:
        >>> write_submission({"ioi_gpt2": scores}, "my-method")  # doctest: +SKIP
    """
    if suffix not in SUFFIXES:
        raise CircuitError(unknown("kind of circuit file", suffix, SUFFIXES))
    files: dict[str, Circuit] = {}
    for name, given in circuits.items():
        _check_name(name)
        given = importances(given) if isinstance(given, ScoreMap) else given
        several = [given] if isinstance(given, Circuit | NodeCircuit | SparseCircuit) else given
        entry = tuple(sorted((with_edges(one, "an MIB submission") for one in several), key=lambda circuit: circuit.n_edges))
        _check_entry(f"the entry {name}", entry)
        names = ["importances"] if len(entry) == 1 else [f"edges-{fraction:g}" for fraction in _SIZES]
        entry = (_turned(entry[0]),) if len(entry) == 1 else entry
        files |= {f"{name}/{stem}{suffix}": circuit for stem, circuit in zip(names, entry, strict=True)}
    if not files:
        raise CircuitError("there is nothing to submit; give circuits by '<task>_<model>'.")
    return write_folder(files, Path(folder))


def check_submission(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Check a folder as the track does before it takes it: names, models and tasks of the track, sizes of the models, two of each at least.

    Returns:
        A row per entry: ``entry``, ``task``, ``model``, ``holds`` (importances of edges, importances of nodes, or circuits), ``n`` (edges or nodes
        with an importance, or edges of the largest circuit).

    Raises:
        CircuitError: all that the track would refuse, one after the other; or what :func:`read_submission` refuses.
    """
    found = read_submission(folder)
    wrong: list[str] = []
    rows: list[dict[str, Any]] = []
    for entry, circuits in found.items():
        task, _, model = entry.partition("_")
        graph, first = circuits[0].graph, circuits[0]
        if task not in MIB_TASKS:
            wrong.append(f"{entry}: {unknown('task of the track', task, MIB_TASKS)}")
        elif model not in MIB_TASKS[task]:
            wrong.append(f"{entry}: {unknown(f'model of the track for {task}', model, MIB_TASKS[task])}")
        elif model in MIB_MODELS and (shape := (graph.n_layers, graph.n_heads, graph.d_model)) != MIB_MODELS[model]:
            wrong.append(f"{entry}: its circuits have {shape} layers, heads and width, and {model} has {MIB_MODELS[model]}; it is another model's.")
        nodes = first.provenance.get("node_scores", {})
        holds = "circuits" if len(circuits) > 1 else "importances of edges" if first.scores is not None else "importances of nodes"
        n = circuits[-1].n_edges if len(circuits) > 1 else len(nodes) if first.scores is None else int(np.isfinite(first.scores).sum())
        rows.append({"entry": entry, "task": task, "model": model, "holds": holds, "n": n})
    table = pd.DataFrame(rows)
    for what in ("model", "task"):
        if (number := table[what].nunique()) < _LEAST:
            wrong.append(f"it has {number} {what}; the track takes submissions of at least {_LEAST} models and {_LEAST} tasks. Add entries.")
    if wrong:
        raise CircuitError(f"{folder} would not be taken: " + " ".join(wrong))
    return table


def _check_name(name: str) -> None:
    task, _, model = name.partition("_")
    if not task or not model or "/" in name or name.startswith("."):
        raise CircuitError(
            f"{name!r} does not name a task and a model; MIB writes them with an underscore between, as in ioi_gpt2 or arc-easy_llama3."
        )


def _check_entry(where: str, circuits: Sequence[Circuit]) -> None:
    if len(circuits) not in (1, len(_SIZES)):
        raise CircuitError(f"{where} has {len(circuits)} circuits; MIB takes one with importances, or {len(_SIZES)}, one per size.")
    if len(circuits) == 1:
        if circuits[0].scores is None and not circuits[0].provenance.get("node_scores"):
            raise CircuitError(f"{where} has one circuit without scores; MIB takes one with importances, or {len(_SIZES)} circuits, one per size.")
        return
    graph = circuits[0].graph
    for circuit, fraction in zip(circuits, _SIZES, strict=True):
        if circuit.graph != graph:
            raise CircuitError(f"{where} has circuits of {graph} and of {circuit.graph}; they must belong to one model.")
        if circuit.n_edges > fraction * graph.n_edges:
            raise CircuitError(
                f"{where}: the circuit for {100 * fraction:g} % of the edges has {circuit.n_edges:,} of {graph.n_edges:,}, "
                f"more than {int(fraction * graph.n_edges):,}. Choose a smaller one."
            )
