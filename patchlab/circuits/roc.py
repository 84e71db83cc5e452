"""ROC curves: edge or node scores, and circuits, against a circuit that is known."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from patchlab.circuits.circuit import Circuit, common_graph
from patchlab.circuits.select import BY, Scores, check_direction, direction_of, mean_effects
from patchlab.errors import CircuitError, unknown
from patchlab.graph import Graph
from patchlab.scores import ScoreMap

LEVELS = ("edge", "node")
NOT_SCORED = ("error", "worst")


@dataclass(frozen=True, eq=False)
class ROC:
    """ROC curve: how well scores tell the parts of a known circuit from the others.

    Args:
        table: one row per distinct importance, largest first, after one where nothing is chosen: ``threshold``, ``chosen`` (parts at least that
            important), ``tp``, ``fp``, ``fn``, ``tn``, ``tpr`` (= recall), ``fpr``, ``precision``.
        auc: area under tpr against fpr: the probability that a part of the circuit is ranked above another (ties count half).
        average_precision: mean precision over the parts of the circuit, each at its threshold.
        level: ``edge`` or ``node``.
        n_true: parts of the known circuit.
        n_all: all parts.
        provenance: of the scores and the reference.
    """

    table: pd.DataFrame = field(repr=False)
    auc: float
    average_precision: float
    level: str
    n_true: int
    n_all: int
    provenance: dict[str, Any] = field(repr=False)

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()


def roc(
    scores: Scores,
    reference: Circuit,
    *,
    by: str = "abs",
    level: str = "edge",
    not_scored: str = "error",
    direction: str | None = None,
) -> ROC:
    """Receiver operating characteristic and precision against recall of edge scores.

    Every edge of the graph counts, whether or not a method would choose it: an edge of the reference that is ranked low is a false negative.

    Args:
        scores: a map of edges, or effects ``[writer, reader]`` or ``[writer, reader, pos]``.
        reference: the known circuit; position-resolved if the scores are.
        by: ``abs`` or ``signed`` importance.
        level: ``edge``; or ``node``, where a writer's score is the sum of its edges' effects and it is in the reference if it has an edge there.
        not_scored: edges without a score (NaN) are an ``error``, or count as ``worst``: below all others.
        direction: what an array of effects estimates, for ``signed`` importance; a map knows it.

    Raises:
        CircuitError: circuits of unlike graphs, edges without a score, a reference with all edges or none.

    Example:
        >>> graph = Graph(1, 1, 4)
        >>> effects = np.where(graph.mask(["input->m0", "m0->logits"]), -1.0, 0.0)
        >>> roc(effects, Circuit.of(graph, ["input->m0", "m0->logits"])).auc
        1.0
    """
    for what, got, valid in (("importance", by, BY), ("level", level, LEVELS), ("way to treat edges without a score", not_scored, NOT_SCORED)):
        if got not in valid:
            raise CircuitError(unknown(what, got, valid))
    graph, effects, provenance = reference.graph, scores, {}
    if isinstance(scores, ScoreMap):
        graph, direction = common_graph(scores.graph, graph, "the scores", "the reference"), direction_of(scores, direction)
        effects, provenance = mean_effects(scores)
    effects = np.asarray(effects)
    check_direction(direction, by)
    if effects.shape != reference.edges.shape:
        raise CircuitError(
            f"the scores have the shape {list(effects.shape)} and the reference {list(reference.edges.shape)}; compare like with like "
            f"(Circuit.collapsed drops positions)."
        )
    values, truth, names = _parts(graph, effects, reference, level)
    missing = np.isnan(values)
    if missing.any() and not_scored == "error":
        raise CircuitError(
            f"{missing.sum()} of {len(values)} {level}s have no score (NaN), {names(np.flatnonzero(missing)[0])} among them; "
            f"pass not_scored='worst' to rank them below all others, or score them."
        )
    importance = np.abs(values) if by == "abs" else values if direction == "denoising" else -values
    importance = np.where(missing, -np.inf, importance)
    if truth.all() or not truth.any():
        raise CircuitError(f"the reference has {'all' if truth.any() else 'none'} of the {len(truth)} {level}s, so nothing can be told apart.")
    table = _table(importance, truth)
    step = np.diff(table["tpr"].to_numpy())
    auc = float(np.trapezoid(table["tpr"].to_numpy(), table["fpr"].to_numpy()))
    record = {"scores": provenance, "reference": reference.provenance, "by": by, "not_scored": int(missing.sum())}
    return ROC(table, auc, float((step * table["precision"].to_numpy()[1:]).sum()), level, int(truth.sum()), len(truth), record)


def overlap(hypothesis: Circuit, reference: Circuit, *, level: str = "edge") -> dict[str, int | float]:
    """Counts of a circuit against a known one: ``tp``, ``fp``, ``fn``, ``tn``, ``precision``, ``recall``, ``f1``, ``fpr``.

    Every part of the graph is counted once; what only the reference has is a false negative. A ratio without a denominator is NaN.

    Raises:
        CircuitError: circuits of unlike graphs, or one with positions and one without.

    Example:
        >>> graph = Graph(1, 1, 4)
        >>> counts = overlap(Circuit.of(graph, ["input->m0"]), Circuit.of(graph, ["input->m0", "m0->logits"]))
        >>> counts["recall"], counts["precision"], counts["fn"]
        (0.5, 1.0, 1)
    """
    if level not in LEVELS:
        raise CircuitError(unknown("level", level, LEVELS))
    graph = common_graph(hypothesis.graph, reference.graph, "the hypothesis", "the reference")
    if level == "edge" and hypothesis.edges.shape != reference.edges.shape:
        raise CircuitError(
            f"the hypothesis has the shape {list(hypothesis.edges.shape)} and the reference {list(reference.edges.shape)}; "
            f"drop the positions of one with .collapsed()."
        )
    if level == "node":
        guess, truth = hypothesis.node_mask[1:-1], reference.node_mask[1:-1]  # every circuit has the input and the logits
    else:
        allowed = _cells(graph, reference.edges)
        guess, truth = hypothesis.edges[allowed], reference.edges[allowed]
    tp, fp, fn, tn = (int((a & b).sum()) for a, b in ((guess, truth), (guess, ~truth), (~guess, truth), (~guess, ~truth)))
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "fpr": _ratio(fp, fp + tn),
    }


def _ratio(top: int, bottom: int) -> float:
    return top / bottom if bottom else float("nan")


def _cells(graph: Graph, like: np.ndarray) -> Bool[np.ndarray, "writer reader *pos"]:
    return np.broadcast_to(graph.allowed.reshape(graph.allowed.shape + (1,) * (like.ndim - 2)), like.shape)


def _parts(graph: Graph, effects: np.ndarray, reference: Circuit, level: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """Values and truth of every part, and a function that names one."""
    allowed = _cells(graph, effects)
    if level == "edge":
        cells = np.argwhere(allowed)
        return effects[allowed], reference.edges[allowed], lambda i: graph.name(int(cells[i][0]), int(cells[i][1]))
    axes = tuple(range(1, effects.ndim))
    sums = np.where(allowed, effects, 0.0).sum(axes)[1:]
    return sums, reference.node_mask[1:-1], lambda i: graph.writers[i + 1]


def _table(importance: Float[np.ndarray, " part"], truth: Bool[np.ndarray, " part"]) -> pd.DataFrame:
    order = np.argsort(-importance, kind="stable")
    ranked, right = importance[order], truth[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # equal importance is chosen together
    tp = np.concatenate([[0], np.cumsum(right)[last]])
    chosen = np.concatenate([[0], last + 1])
    fp = chosen - tp
    positives, negatives = int(truth.sum()), int((~truth).sum())
    return pd.DataFrame(
        {
            "threshold": np.concatenate([[np.inf], ranked[last]]),
            "chosen": chosen,
            "tp": tp,
            "fp": fp,
            "fn": positives - tp,
            "tn": negatives - fp,
            "tpr": tp / positives,
            "fpr": fp / negatives,
            "precision": np.divide(tp, chosen, out=np.ones(len(tp)), where=chosen > 0),
        }
    )
