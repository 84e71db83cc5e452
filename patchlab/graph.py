"""The computational graph of a transformer: which components write to the residual stream, which read from it, and the edges between.

Writers are the input (token embedding), every head and every MLP; readers are the query, key and value inputs of every head,
every MLP and the logits. Names and the order of both are those of EAP-IG and the MIB benchmark: ``a0.h2->m0``,
``input->a0.h0<q>``, ``m3->logits``. Edges live in arrays ``[writer, reader]``; ``allowed`` says which pairs are edges.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from patchlab.errors import SiteError

READERS = ("q", "k", "v", "mlp", "logits")
"""Kinds of readers."""
_EDGE = re.compile(r"(?P<writer>input|a\d+\.h\d+|m\d+)->(?P<reader>a\d+\.h\d+<[qkv]>|m\d+|logits)")
_HEAD = re.compile(r"\b[al](\d+)\.h(\d+)")


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
    def writers(self) -> tuple[str, ...]:
        """Names of the writers."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + ([f"m{layer}"] if self.mlps else [])
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers."""
        names: list[str] = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<{letter}>" for letter in "qkv" for head in range(self.n_heads)] + ([f"m{layer}"] if self.mlps else [])
        return (*names, "logits")

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The writers and the logits."""
        return (*self.writers, "logits")

    @cached_property
    def reader_kind(self) -> tuple[str, ...]:
        """Kind of each reader, one of :data:`READERS`."""
        return tuple("logits" if name == "logits" else "mlp" if name[0] == "m" else name[-2] for name in self.readers)

    @cached_property
    def reader_layer(self) -> Int[np.ndarray, " reader"]:
        """The layer of each reader; of the logits one above the last."""
        return np.arange(len(self.readers)) // (3 * self.n_heads + self.mlps)

    @cached_property
    def reader_node(self) -> Int[np.ndarray, " reader"]:
        """Which node each reader belongs to (index into :attr:`nodes`)."""
        place = {name: i for i, name in enumerate(self.nodes)}
        return np.array([place[name.partition("<")[0]] for name in self.readers])

    @cached_property
    def allowed(self) -> Bool[np.ndarray, "writer reader"]:
        """Which pairs are edges: the writer is computed before the reader reads."""
        stages = {name: self._stage(name) for name in self.nodes}
        writers = np.array([stages[name] for name in self.writers])
        readers = np.array([stages[name.partition("<")[0]] for name in self.readers])
        mask = writers[:, None] < readers[None, :]
        mask.setflags(write=False)
        return mask

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.allowed.sum())

    def writer_slice(self, layer: int | None) -> slice:
        """Where the heads and then the MLP of a layer are among the writers (None: the input)."""
        size = self.n_heads + self.mlps
        return slice(0, 1) if layer is None else slice(1 + layer * size, 1 + (layer + 1) * size)

    def reader_slice(self, layer: int | None) -> slice:
        """Where q, k, v of the heads and then the MLP of a layer are among the readers (None: the logits)."""
        size = 3 * self.n_heads + self.mlps
        return slice(self.n_layers * size, self.n_layers * size + 1) if layer is None else slice(layer * size, (layer + 1) * size)

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

    def _stage(self, node: str) -> int:
        """When a node is computed; all it reads has a smaller number."""
        if node == "input":
            return -1
        if node == "logits":
            return 2 * self.n_layers
        layer = int(node[1:].partition(".")[0])
        return 2 * layer + int(node[0] == "m" and not self.parallel)
