"""What a circuit's graph says: whether two graphs have one shape, why a pair is no edge, the key-value heads behind query heads."""

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from patchlab.errors import CircuitError, SiteError
from patchlab.graph import Graph

_SHAPE = ("n_layers", "n_heads", "d_model", "parallel", "mlps")


def common_graph(one: Graph, two: Graph, what_one: str, what_two: str) -> Graph:
    """The graph that two circuits share; of two that differ only in knowing their key-value heads, the one that does.

    Raises:
        CircuitError: graphs of unlike shape; the message names both and where they differ.
    """
    unlike = [f"{name} {getattr(one, name)} and {getattr(two, name)}" for name in _SHAPE if getattr(one, name) != getattr(two, name)]
    if one.n_kv_heads and two.n_kv_heads and one.n_kv_heads != two.n_kv_heads:
        unlike.append(f"n_kv_heads {one.n_kv_heads} and {two.n_kv_heads}")
    if unlike:
        raise CircuitError(
            f"{what_one} belongs to {one} and {what_two} to {two} ({', '.join(unlike)}); circuits go with models of their own shape only."
        )
    return one if one.n_kv_heads else two


def refuse_pair(graph: Graph, writer: int, reader: int) -> None:
    """Say why a kept pair is no edge.

    Raises:
        CircuitError: always, if the pair is no edge.
    """
    try:
        graph.edge(graph.name(writer, reader))
    except SiteError as error:
        raise CircuitError(f"a pair is kept that is no edge of {graph}: {error}") from error


def kv_view(graph: Graph, edges: Bool[np.ndarray, "writer reader"], scores: Float[np.ndarray, "writer reader"] | None = None) -> xr.Dataset:
    """Edges into the keys and values, per key-value head instead of per query head.

    Under grouped-query attention several query heads share one key and value, and ``<k>``, ``<v>`` index its query-head copies. The score of
    the key-value head is the sum over its copies (to first order, the effect of patching what it reads); the exact effect is another run.

    Returns:
        A Dataset with dims ``writer``, ``kv_reader``: ``score`` (sum over copies in metric units; NaN if any copy is not scored), ``kept``
        (any copy is), ``copies`` (how many are), and the coordinates ``writer_name`` and ``kv_reader_name`` (``a3.kv1<k>``).

    Example:
        >>> graph = Graph(1, 4, 8, n_kv_heads=2)
        >>> kv_view(graph, graph.mask(["input->a0.h2<k>", "input->a0.h3<k>"]))["copies"].values[0].tolist()
        [0, 2, 0, 0]
    """
    groups, columns, names = graph.n_heads // graph.copies, [], []
    for layer in range(graph.n_layers):
        start = graph.reader_slice(layer).start
        for i, letter in enumerate("kv", start=1):
            columns.append(np.arange(graph.n_heads).reshape(groups, graph.copies) + start + i * graph.n_heads)
            names += [f"a{layer}.kv{group}<{letter}>" for group in range(groups)]
    copies = np.concatenate(columns)
    values = np.full(edges.shape, np.nan) if scores is None else scores
    dims = ("writer", "kv_reader")
    return xr.Dataset(
        {
            "score": (dims, values[:, copies].sum(2)),
            "kept": (dims, edges[:, copies].any(2)),
            "copies": (dims, edges[:, copies].sum(2)),
        },
        coords={"writer_name": ("writer", np.array(graph.writers)), "kv_reader_name": ("kv_reader", np.array(names))},
    )
