"""The computational graph of a transformer: which components write to the residual stream, which read from it, and the edges between.

Writers are the input (token embedding), every head and every MLP; readers are the query, key and value inputs of every head,
every MLP and the logits. Names and the order of both are those of EAP-IG and the MIB benchmark: ``a0.h2->m0``,
``input->a0.h0<q>``, ``m3->logits``. Edges live in arrays ``[writer, reader]``; ``allowed`` says which pairs are edges.
Two tables, of the nodes and of the readers, say what stands at each index; every other index comes from them.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from patchlab.errors import SiteError

READERS = ("q", "k", "v", "mlp", "logits")
"""Kinds of readers."""
_EDGE = re.compile(r"(?P<writer>input|a\d+\.h\d+|m\d+)->(?P<reader>a\d+\.h\d+<[qkv]>|m\d+|logits)")
_HEAD = re.compile(r"\b[al](\d+)\.h(\d+)")
_NAMES = {"input": "input", "head": "a{0}.h{1}", **{letter: f"a{{0}}.h{{1}}<{letter}>" for letter in "qkv"}, "mlp": "m{0}", "logits": "logits"}
_NAME = re.compile(r"(?P<end>input|logits)|m(?P<mlp>\d+)|a(?P<layer>\d+)\.h(?P<head>\d+)(<(?P<letter>[qkv])>)?")


class Node(NamedTuple):
    """A node, or one input of a head: a row of a graph's tables.

    Attributes:
        kind: ``input``, ``head``, ``mlp`` or ``logits``; of the inputs of a head ``q``, ``k`` or ``v``.
        layer: its block; None for the input and the logits.
        unit: which query head it is, or belongs to; None where there is one in a block, or in the model.

    Example:
        >>> Node.parse("a3.h1<q>"), Node.parse("a3.h1<q>").node.name
        (Node(kind='q', layer=3, unit=1), 'a3.h1')
    """

    kind: str
    layer: int | None = None
    unit: int | None = None

    @staticmethod
    def parse(name: str) -> "Node":
        """The node, or the input of one, of a name.

        Raises:
            SiteError: no such name.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise SiteError(f"cannot read the node {name!r}. Write 'input', 'a0.h1', 'm1' or 'logits'; 'a0.h1<q>' for one input of a head.")
        if match["end"]:
            return Node(match["end"])
        if match["mlp"]:
            return Node("mlp", int(match["mlp"]))
        return Node(match["letter"] or "head", int(match["layer"]), int(match["head"]))

    @property
    def name(self) -> str:
        """Its name in the graph."""
        return _NAMES[self.kind].format(self.layer, self.unit)

    @property
    def node(self) -> "Node":
        """The node that it is an input of; itself, if it is none."""
        return self if self.unit is None else Node("head", self.layer, self.unit)


@dataclass(frozen=True)
class Graph:
    """The graph of one model shape.

    Args:
        n_layers: blocks.
        n_heads: query heads per block; ``<k>`` and ``<v>`` index them too, also where several share one key-value head.
        d_model: width of the residual stream.
        parallel: attention and MLP read the same stream, so a head does not feed the MLP of its own block.
        n_kv_heads: key-value heads per block; None for as many as query heads.
        mlps: whether the blocks have MLPs.

    Example:
        >>> graph = Graph(n_layers=12, n_heads=12, d_model=768)
        >>> graph.n_edges, len(graph.writers) + 1
        (32491, 158)
        >>> graph.writers[3], graph.readers[-2:]
        ('a0.h2', ('m11', 'logits'))
    """

    n_layers: int
    n_heads: int
    d_model: int
    parallel: bool = False
    n_kv_heads: int | None = None
    mlps: bool = True

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "d_model"):
            if getattr(self, name) < 1:
                raise SiteError(f"a graph needs {name} of at least 1; got {getattr(self, name)}.")
        if self.n_heads % (self.n_kv_heads or self.n_heads):
            raise SiteError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads evenly; give a divisor of {self.n_heads}.")

    @property
    def copies(self) -> int:
        """Query heads per key-value head."""
        return self.n_heads // (self.n_kv_heads or self.n_heads)

    @cached_property
    def node_table(self) -> tuple[Node, ...]:
        """The nodes: the writers in the order in which they are computed, then the logits."""
        table = [Node("input")]
        for layer in range(self.n_layers):
            table += [*(Node("head", layer, head) for head in range(self.n_heads)), *[Node("mlp", layer)] * self.mlps]
        return (*table, Node("logits"))

    @cached_property
    def reader_table(self) -> tuple[Node, ...]:
        """The readers: queries, keys and values of the heads and then the MLP, layer by layer, then the logits."""
        table: list[Node] = []
        for layer in range(self.n_layers):
            table += [*(Node(letter, layer, head) for letter in "qkv" for head in range(self.n_heads)), *[Node("mlp", layer)] * self.mlps]
        return (*table, Node("logits"))

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes: the writers and the logits."""
        return tuple(node.name for node in self.node_table)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers."""
        return self.nodes[:-1]

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers."""
        return tuple(reader.name for reader in self.reader_table)

    @cached_property
    def reader_kind(self) -> tuple[str, ...]:
        """Kind of each reader, one of :data:`READERS`."""
        return tuple(reader.kind for reader in self.reader_table)

    @cached_property
    def reader_layer(self) -> Int[np.ndarray, " reader"]:
        """The layer of each reader; of the logits one above the last."""
        return np.array([self.n_layers if reader.layer is None else reader.layer for reader in self.reader_table])

    @cached_property
    def reader_head(self) -> Int[np.ndarray, " reader"]:
        """The query head of each reader; -1 for MLPs and logits."""
        return np.array([-1 if reader.unit is None else reader.unit for reader in self.reader_table])

    @cached_property
    def reader_node(self) -> Int[np.ndarray, " reader"]:
        """The node that each reader belongs to (index into :attr:`nodes`)."""
        place = {node: i for i, node in enumerate(self.node_table)}
        return np.array([place[reader.node] for reader in self.reader_table])

    @cached_property
    def allowed(self) -> Bool[np.ndarray, "writer reader"]:
        """The pairs that are edges: the writer is computed before the reader reads."""
        stages = np.array([self._stage(node) for node in self.node_table])
        mask = stages[:-1, None] < stages[self.reader_node][None, :]
        mask.setflags(write=False)
        return mask

    @cached_property
    def writers_before(self) -> Int[np.ndarray, " reader"]:
        """The number of writers that are computed before each reader reads; they are the first ones."""
        return self.allowed.sum(0)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.allowed.sum())

    def heads_of(self, layer: int) -> slice:
        """The place of a layer's heads among the writers."""
        return self._writers_at["head", layer]

    def mlp_of(self, layer: int) -> int:
        """The place of a layer's MLP among the writers.

        Raises:
            SiteError: there is none.
        """
        if not self.mlps:
            raise SiteError(f"there is no m{layer} in {self}.")
        return self._writers_at["mlp", layer].start

    def readers_of(self, layer: int | None, *kinds: str) -> slice:
        """The place of a layer's readers (None: of the logits), all of them or those of some kinds, which must stand side by side.

        >>> graph = Graph(2, 2, 8)
        >>> graph.readers[graph.readers_of(1, "k")], graph.readers[graph.readers_of(1, "v", "mlp")]
        (('a1.h0<k>', 'a1.h1<k>'), ('a1.h0<v>', 'a1.h1<v>', 'm1'))

        Raises:
            SiteError: there are none, or others stand between them.
        """
        found = sorted((at.start, at.stop) for kind in kinds or READERS if (at := self._readers_at.get((kind, layer))) is not None)
        if not found or any(stop != start for (_, stop), (start, _) in pairwise(found)):
            raise SiteError(f"the readers {', '.join(kinds)} of layer {layer} do not stand side by side in {self}; ask for each kind alone.")
        return slice(found[0][0], found[-1][1])

    def sharing(self, head: int) -> slice:
        """The query heads that share the key-value head of a query head, itself among them.

        >>> Graph(1, 4, 8, n_kv_heads=2).sharing(3)
        slice(2, 4, None)
        """
        first = head // self.copies * self.copies
        return slice(first, first + self.copies)

    def kv_name(self, reader: int) -> str:
        """Name of the key or value behind a reader of it, by its key-value head.

        >>> graph = Graph(1, 4, 8, n_kv_heads=2)
        >>> graph.kv_name(graph.readers.index("a0.h3<k>"))
        'a0.kv1<k>'
        """
        return f"a{self.reader_layer[reader]}.kv{self.reader_head[reader] // self.copies}<{self.reader_kind[reader]}>"

    def edge(self, name: str) -> tuple[int, int]:
        """Writer and reader of an edge by its name; heads may also be written as in addresses, ``L0.H1``.

        >>> Graph(2, 2, 8).edge("a0.h1->m1"), Graph(2, 2, 8).edge("L0.H1->m1")
        ((2, 13), (2, 13))

        Raises:
            SiteError: a name that is no edge here, with the reason.
        """
        match = _EDGE.fullmatch(_HEAD.sub(r"a\1.h\2", name.replace(" ", "").lower())) if isinstance(name, str) else None
        if match is None:
            raise SiteError(
                f"cannot read the edge {name!r}. Write 'input->a0.h1<q>', 'a0.h1->m1' or 'm1->logits'; heads read through <q>, <k> or <v>."
            )
        writer, reader = match["writer"], match["reader"]
        for end, known in ((writer, self.writers), (reader, self.readers)):
            if end not in known:
                raise SiteError(f"there is no {end} in {self}; the edge {name!r} belongs to another model.")
        pair = self.writers.index(writer), self.readers.index(reader)
        if not self.allowed[pair]:
            why = "a node does not feed itself" if reader.startswith(writer) else f"{writer} is not computed before {reader} reads"
            raise SiteError(f"{name!r} is not an edge: {why}. Information flows from earlier to later components.")
        return pair

    def name(self, writer: int, reader: int) -> str:
        """Name of the edge of a pair.

        >>> Graph(2, 2, 8).name(2, 13)
        'a0.h1->m1'
        """
        return f"{self.writers[writer]}->{self.readers[reader]}"

    def names(self, mask: Bool[np.ndarray, "writer reader"] | None = None) -> list[str]:
        """Names of the edges of a mask (None: of all)."""
        return [self.name(*pair) for pair in np.argwhere(self.allowed if mask is None else mask).tolist()]

    def mask(self, names: Iterable[str]) -> Bool[np.ndarray, "writer reader"]:
        """The mask that holds the named edges.

        Raises:
            SiteError: a name that is no edge here.
        """
        mask = np.zeros(self.allowed.shape, dtype=bool)
        for name in names:
            mask[self.edge(name)] = True
        return mask

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        form = ", parallel attention and MLP" if self.parallel else ""
        mlps = "" if self.mlps else ", no MLPs"
        return f"a graph of {self.n_layers} layers × {self.n_heads} heads, width {self.d_model}{form}{mlps}"

    @cached_property
    def _writers_at(self) -> dict[tuple[str, int | None], slice]:
        return _runs(self.node_table)

    @cached_property
    def _readers_at(self) -> dict[tuple[str, int | None], slice]:
        return _runs(self.reader_table)

    def _stage(self, node: Node) -> int:
        """When a node is computed; all it reads has a smaller number."""
        if node.layer is None:
            return -1 if node.kind == "input" else 2 * self.n_layers
        return 2 * node.layer + int(node.kind == "mlp" and not self.parallel)


def _runs(table: tuple[Node, ...]) -> dict[tuple[str, int | None], slice]:
    """Where the rows of each kind and layer are, which stand side by side."""
    found: dict[tuple[str, int | None], slice] = {}
    start = 0
    for key, rows in groupby(table, key=lambda row: (row.kind, row.layer)):
        stop = start + len(list(rows))
        found[key] = slice(start, stop)
        start = stop
    return found
