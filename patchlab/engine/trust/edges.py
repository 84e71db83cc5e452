"""Trust in the edge sweep, which is compared with whole routed forward passes before its first use on a model."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.engine.contributions import Contributions, contributions, written_at
from patchlab.engine.edge_sweep import Differences, edge_sweep
from patchlab.engine.literal import run
from patchlab.engine.masked import run_circuits
from patchlab.engine.program import Program, row_numbers
from patchlab.engine.session import found_once
from patchlab.engine.trust.nodes import Support
from patchlab.engine.trust.precision import in_single_precision
from patchlab.engine.trust.trials import tolerance, trial
from patchlab.errors import PatchlabError
from patchlab.sources import Kept


def edge_support(model: BridgedModel) -> Support:
    """The fastest way to patch single edges that agrees with routed forward passes on this model; found out once per model.

    ``prefix`` and ``replay`` as for sweeps of sites; ``literal`` is one whole routed forward pass per edge. Random prompts are patched
    at edges into every kind of reader in the first, middle and last layer.
    """
    return found_once(model, "edge sweep", lambda: _find(model))


def edge_mask(model: BridgedModel, edge: Int[np.ndarray, "2"], *, grouped: bool = False) -> Bool[Tensor, "writer reader"]:
    """The set of one edge, or (grouped) of its copies in all query heads that share the reader's key or value."""
    graph = model.arch.graph
    writer, reader = map(int, edge)
    mask = torch.zeros(graph.allowed.shape, dtype=torch.bool, device=model.device)
    if grouped and graph.reader_kind[reader] in ("k", "v"):
        alike = graph.readers_of(int(graph.reader_layer[reader]), graph.reader_kind[reader])
        mask[writer, alike][graph.sharing(int(graph.reader_head[reader]))] = True
    else:
        mask[writer, reader] = True
    return mask


def run_edge_sets(
    model: BridgedModel,
    program: Program,
    sets: Iterable[Bool[Tensor, "writer reader *where"]],
    differences: Differences,
    *,
    max_bytes: int | float | None = None,
    done: Callable[[list[int], Tensor], Any] | None = None,
) -> Float[Tensor, "set row"]:
    """The metric of a run with a whole set of edges patched, for every set, by routed forward passes.

    What is between two edges of a set changes, and is carried on as it is then along all edges that the set leaves alone.

    Args:
        model: the model.
        program: as for :func:`patchlab.engine.edge_sweep.edge_sweep`.
        sets: masks over the graph's edges, ``[writer, reader]`` or with ``[row, pos]`` behind.
        differences: what the writers' outputs change by.
        max_bytes: memory of one forward pass.
        done: called with the numbers of the sets that are finished, and their metric.
    """
    graph = model.arch.graph
    found: list[Tensor] = []
    allowed = torch.as_tensor(graph.allowed.copy(), device=model.device)
    with torch.no_grad():
        current = contributions(model, program.tokens, differences.form).values
        for writer in range(len(graph.writers)):
            current[writer] += differences.contributed(writer)
        changed = Contributions(current, differences.form)
        for numbers, masks in _several(sets):
            keep = allowed[(..., *[None] * (masks.ndim - 3))] & ~masks
            found.append(run_circuits(model, program, changed, keep, max_bytes=max_bytes))
            if done is not None:
                done(numbers, found[-1])
    return torch.cat(found) if found else current.new_zeros(0, len(program.tokens))


def _several(sets: Iterable[Bool[Tensor, "writer reader *where"]]) -> Iterator[tuple[list[int], Bool[Tensor, "set writer reader *where"]]]:
    """Up to 16 sets at a time, with their numbers."""
    each = iter(sets)
    first = 0
    while masks := list(islice(each, 16)):
        yield list(range(first, first + len(masks))), torch.stack(masks)
        first += len(masks)


def _find(model: BridgedModel) -> Support:
    with in_single_precision(model):
        return _compared(model)


def _compared(model: BridgedModel) -> Support:
    reasons: list[str] = []
    program, edges, differences = _trial(model)
    expected = run_edge_sets(model, program, [edge_mask(model, edge) for edge in edges], differences)
    allowed = tolerance() * float(expected.abs().max())
    for mode in ("prefix", "replay"):
        try:
            got = edge_sweep(model, program, edges, differences, prefix=mode == "prefix", start=1)
        except (PatchlabError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            reasons.append(f"{mode}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
            continue
        worst = (got - expected).abs().amax(1)
        if float(worst.max()) <= allowed:
            return Support(mode, "; ".join(reasons))
        reasons.append(
            f"{mode}: {model.arch.graph.name(*edges[int(worst.argmax())].tolist())} differs by {float(worst.max()):.2g}, allowed is {allowed:.2g}"
        )
    return Support("literal", "; ".join(reasons))


def _trial(model: BridgedModel) -> tuple[Program, Int[np.ndarray, "edge 2"], Differences]:
    arch, graph = model.arch, model.arch.graph
    prompts = trial(model)
    tokens, donor = prompts.tokens, prompts.other(slice(prompts.middle, None))
    examples = row_numbers(tokens)
    own, other = (run(model, Program(ids, examples, keep=written_at(arch))).activations for ids in (tokens, donor))
    readers = [len(graph.readers) - 1]
    for layer in sorted({0, arch.n_layers // 2, arch.n_layers - 1}):
        readers += [graph.readers_of(layer, letter).start + layer % graph.n_heads for letter in "qkv"]
        readers += [graph.readers_of(layer, "mlp").start] if graph.mlps else []
    edges = np.array([(int(np.flatnonzero(graph.allowed[:, reader])[-1]), reader) for reader in readers])
    return prompts.program(), edges, Differences.of(model, own, Kept(other, examples), examples)
