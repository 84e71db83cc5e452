"""CPR and CMD as the MIB circuit track prints them, from scores of edges or of nodes."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from patchlab.circuits.circuit import Circuit
from patchlab.circuits.evaluation.runner import Runner, checked
from patchlab.circuits.evaluation.scale import Scale, areas
from patchlab.circuits.formats.mib import MIB_FRACTIONS, importances, sized
from patchlab.circuits.heldout import check_disjoint
from patchlab.errors import CircuitError
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.tasks.task import Task


def mib_areas(
    model: Model,
    scores: ScoreMap | Mapping[str, ScoreMap],
    task: Task,
    *,
    allow_overlap: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    max_memory: int | float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """CPR of circuits by signed importance and CMD of those by absolute importance, over MIB's ten shares of the edges or nodes.

    As the track's board: ``f = (m(C) − m(∅)) / (m(M) − m(∅))`` of means over examples, everything else carrying the counterfactual run; CPR = ∫ f and
    CMD = ∫ |1 − f| by trapezoids over the shares .001 to 1 (``evaluate_area_under_curve`` of hannamw/MIB-circuit-track). What may still differ from
    published numbers: which examples, their dtype, and how a norm after the attention is treated; see docs/howto/mib.md.

    Args:
        model: the model.
        scores: one map, or several by name; of edges, or of ``z[layer,head]`` and ``mlp_out[layer]``.
        task: examples to evaluate on: others than those of the scores.
        allow_overlap: accept examples that the scores were computed on.
        n_boot: resamples behind each interval.
        seed: of the resamples.
        batch_size: examples per batch; results do not depend on it.
        max_memory: bytes for the activations of one forward pass.
        progress: show a progress bar on stderr.

    Returns:
        A row per map: ``method``, ``level`` (edges or nodes), ``cpr``, ``cmd`` and their 95 % intervals over examples (``cpr_lo``, ...), and f at
        each share by absolute importance (``f(0.001)``, ...).

    Raises:
        CircuitError: scores of something else, of another model or of the same examples.
        ScoreError: the full model cannot be told from the fully ablated one.

    Example:
        >>> mib_areas(model, {"RelP": relp}, held_out)[["method", "cpr", "cmd"]]  # doctest: +SKIP
    """
    maps = {str(scores.provenance.get("method", "scores")): scores} if isinstance(scores, ScoreMap) else dict(scores)
    if not maps:
        raise CircuitError("there is nothing to evaluate; give at least one map of scores.")
    for name, one in maps.items():
        check_disjoint(one.provenance, task, f"the map {name!r}", allow_overlap=allow_overlap)
    ranked = {name: importances(one, graph=model.arch.graph) for name, one in maps.items()}
    chosen = {(name, by): sized(one, by=by) for name, one in ranked.items() for by in ("signed", "abs")}
    circuits = [checked(one, model, task, f"{name!r}") for (name, _), some in chosen.items() for one in some]
    runner = Runner.of(model, task, "resample", allow_overlap=allow_overlap, batch_size=batch_size, max_memory=max_memory)
    metric = runner.metric([Circuit.empty(model.arch.graph), *circuits], progress=progress).metric
    scale, found = Scale(runner.full(), metric[0], n_boot, seed), metric[1:].reshape(len(maps), 2, len(MIB_FRACTIONS), -1)
    shares, rows = np.array(MIB_FRACTIONS), []
    for (name, one), (signed, absolute) in zip(ranked.items(), found, strict=True):
        measured = {by: areas(scale.value(of), scale.resampled(of), shares) for by, of in (("cpr", signed), ("cmd", absolute))}
        numbers = {f"{by}{end}": measured[by][f"{by}{end}"] for by in measured for end in ("", "_lo", "_hi")}
        curve = {f"f({share:g})": float(value) for share, value in zip(MIB_FRACTIONS, scale.value(absolute), strict=True)}
        rows.append({"method": name, "level": "nodes" if one.scores is None else "edges", **numbers, **curve})
    return pd.DataFrame(rows)
