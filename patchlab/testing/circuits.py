"""Toy models with a hand-made circuit whose true edges follow from the weights, to judge edge scores by.

Both are built the same way. The residual stream is cut into named subspaces that do not overlap. The components of the circuit read
and write their own subspaces, and next to those every writer (the input too) writes *junk*, which no component of the circuit reads.
All other components have random weights, read the whole stream and write junk alone. The logits of the words read ``out``,
which the last component of the circuit alone writes, and junk with the small weight ``leak``; other tokens' logits read all there is.

So a patched edge either carries something that the circuit reads, or it moves the metric through junk alone. Random weights have
a spectral norm of at most 1 where they carry values, and GELU(x) is no larger than x, which bounds junk and so this effect, whatever
is patched: see :class:`ToyCircuit`. The circuit has one path for each thing it needs: whichever of its edges is corrupted, the
answer is lost (each docstring says why).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd

from patchlab.circuits import Circuit, roc
from patchlab.methods.names import scoring_method
from patchlab.metrics import METRICS
from patchlab.models import Model
from patchlab.tasks.task import Pair, Task
from patchlab.testing.builder import GAIN, Builder


@dataclass(frozen=True, eq=False)
class ToyCircuit:
    """A model, a task that its circuit solves, and the circuit.

    Args:
        name: how tables refer to it.
        model: a float64 model without norms.
        task: pairs whose clean side exercises the circuit; the corrupted side changes each thing that the circuit reads.
        edges: names of the true edges, in the model's graph.
        matters: noising any true edge alone lowers the metric by at least this, in logits.
        level: noising any other edge alone moves the metric by at most this, in logits.

    Example:
        >>> toy = induction_toy()
        >>> toy.edges[1], toy.model.arch.graph.n_edges
        ('a0.h0->a1.h0<k>', 52)
    """

    name: str
    model: Model
    task: Task
    edges: tuple[str, ...]
    matters: float
    level: float

    @property
    def circuit(self) -> Circuit:
        """The true edges as a circuit."""
        return Circuit.of(self.model.arch.graph, self.edges)

    def __repr__(self) -> str:
        return f"ToyCircuit({self.name}: {len(self.edges)} of {self.model.arch.graph.n_edges} edges, {len(self.task)} pairs)"


def induction_toy(*, sharpness: float = 12.0, leak: float = 1e-3, seed: int = 0) -> ToyCircuit:
    """Induction in two layers of attention alone: ``A B ... A`` is continued by ``B``.

    ``a0.h0`` attends to the position before (queries and keys read positional embeddings alone, which edges do not carry) and copies
    its token into ``previous``. ``a1.h0`` looks from the token at END (query) for the position with that token in ``previous`` (key)
    and copies the token there (value) to ``out``. Heads 1 and 2 of both layers write junk.

    A pair is ``x A B y z A`` (answer B), corrupted ``x C D y z E`` (against D), all different words. In the clean run a1.h0 attends to B.
    True edges, each corrupted alone:

    - ``input->a1.h0<q>``: E precedes nothing, so no key matches, attention is even over the 6 positions, and the gain g falls to g/6;
    - ``input->a0.h0<v>`` and ``a0.h0->a1.h0<k>``: the position of B has C as its predecessor, so again no key matches A: g/6;
    - ``input->a1.h0<v>``: the matching position has D as its token: −g;
    - ``a1.h0->logits``: what a1.h0 writes in the corrupted run, even attention with D for B: −g/6.

    No other edge into a0.h0 or a1.h0 carries a subspace that it reads.

    Args:
        sharpness: attention score of a match; all others are zero. The share of attention elsewhere is about 5·exp(−sharpness).
        leak: weight of junk in the logits of words.
        seed: of the random weights and the words of the pairs.
    """
    n_words, n_pairs, length = 10, 6, 6
    sizes = {"token": n_words, "position": length, "previous": n_words, "out": n_words}
    build = Builder("induction-toy", sizes, n_layers=2, n_heads=3, seed=seed)
    build.head(0, 0, query="position", shift=1, key="position", value="token", write="previous", sharpness=sharpness)
    build.head(1, 0, query="token", key="previous", value="token", write="out", sharpness=sharpness)
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n_pairs):
        x, y, z, a, b, c, d, e = rng.permutation(n_words)[:8].tolist()
        pairs.append(Pair((x, a, b, y, z, a), (x, c, d, y, z, e), (b,), (d,)))
    edges = ("input->a0.h0<v>", "a0.h0->a1.h0<k>", "input->a1.h0<q>", "input->a1.h0<v>", "a1.h0->logits")
    return _toy("induction", build, pairs, edges, sharpness, leak)


def lookup_toy(*, sharpness: float = 12.0, leak: float = 1e-3, seed: int = 0) -> ToyCircuit:
    """Copy, look up, copy: the MLP turns a subject into its key, and the answer is the word before that key.

    Words are subjects, keys (one per subject) and answers; tokens that are no words are ``.``, ``?`` and ``!``. From everywhere, ``a0.h0``
    attends to position 1 and copies the subject into ``copied``. Neuron s of ``m0`` is ``GELU(8·copied[s] + 8·[token is ?] − 12)``: it reads 4
    where the subject is s and the token is ``?``, −4 or less elsewhere; it writes the key of s into ``mapped``. ``a0.h1`` copies the token
    before into ``previous``. ``a1.h0`` looks from ``mapped`` at END (query) for the position whose token is that key and copies ``previous``
    there (value) to ``out``. ``a0.h2``, heads 1 and 2 of layer 1, ``m1`` and four neurons of ``m0`` write junk.

    A pair is ``. s a k b j ?`` with k the key of s (answer a), corrupted ``. t c l b j !`` (against c), where the key of t is
    neither k, l nor j. In the clean run a1.h0 attends to k. True edges, each corrupted alone (up to the tails of softmax and GELU):

    - ``input->a0.h0<v>`` and ``a0.h0->m0``: the subject is t, whose key is not there, so attention is even over the 7 positions,
      and the gain g falls to g/7;
    - ``input->m0`` and ``m0->a1.h0<q>``: at ``!`` every neuron is shut and ``mapped`` is empty, as in the corrupted run: g/7;
    - ``input->a1.h0<k>``: l stands in the place of k, and no key matches: g/7;
    - ``input->a0.h1<v>`` and ``a0.h1->a1.h0<v>``: c precedes the matching position: −g;
    - ``a1.h0->logits``: what a1.h0 writes in the corrupted run, even attention with c for a: −g/7.

    No other edge into these components carries a subspace that their part in the circuit reads.

    Args:
        sharpness: attention score of a match; all others are zero.
        leak: weight of junk in the logits of words.
        seed: of the random weights and the words of the pairs.
    """
    kinds, n_pairs, length = 5, 6, 7
    dot, ask, shout = 3 * kinds, 3 * kinds + 1, 3 * kinds + 2
    n_tokens = 3 * kinds + 3
    sizes = {"token": n_tokens, "position": length, "copied": kinds, "mapped": n_tokens, "previous": n_tokens, "out": n_tokens}
    build = Builder("lookup-toy", sizes, n_layers=2, n_heads=3, d_mlp=kinds + 4, seed=seed)
    build.head(0, 0, query=1, key="position", value="token", write="copied", sharpness=sharpness)
    build.head(0, 1, query="position", shift=1, key="position", value="token", write="previous", sharpness=sharpness)
    build.lookup(0, read="copied", gate=ask, write="mapped", rows=range(kinds, 2 * kinds))
    build.head(1, 0, query="mapped", key="token", value="previous", write="out", sharpness=sharpness)
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n_pairs):
        s, t, other, j = rng.permutation(kinds)[:4].tolist()
        a, b, c = (2 * kinds + rng.permutation(kinds)[:3]).tolist()
        clean, corrupted = (dot, s, a, kinds + s, b, kinds + j, ask), (dot, t, c, kinds + other, b, kinds + j, shout)
        pairs.append(Pair(clean, corrupted, (a,), (c,)))
    edges = (
        "input->a0.h0<v>",
        "a0.h0->m0",
        "input->m0",
        "m0->a1.h0<q>",
        "input->a1.h0<k>",
        "input->a0.h1<v>",
        "a0.h1->a1.h0<v>",
        "a1.h0->logits",
    )
    return _toy("lookup", build, pairs, edges, sharpness, leak)


TOY_CIRCUITS: Mapping[str, Callable[..., ToyCircuit]] = MappingProxyType({"induction": induction_toy, "lookup": lookup_toy})
"""The toys by name."""
AUC_METHODS = (
    "exact",
    "atp",
    "ig:5",
    "eap-ig-inputs:5",
    "eap-ig-activations:5",
    "clean-corrupted",
    "relp",
    "attnlrp",
    "gim",
    "cp-lrp",
    "relp-ah",
    "relp+ig:5",
)
"""The methods of :func:`auc_table`."""


def auc_table(methods: Iterable[str] = AUC_METHODS, *, toys: Mapping[str, ToyCircuit] | None = None) -> pd.DataFrame:
    """How well the edge scores of methods tell the true edges of toys from the others: AUC, one row per method, one column per toy.

    Scores are means over the examples in the noising direction, ranked by size; edges that a method cannot score rank last.

    Args:
        methods: by name.
        toys: by the names of the columns; default both at a sharpness of 12, where softmax still passes a gradient, and of 24, where it hardly does.

    Example:
        >>> auc_table(["exact", "atp"]).loc["exact"].min()  # doctest: +SKIP
        1.0
    """
    if toys is None:
        toys = {f"{name}, sharpness {sharpness:g}": make(sharpness=sharpness) for sharpness in (12.0, 24.0) for name, make in TOY_CIRCUITS.items()}
    rows = {}
    for name in methods:
        maps = {title: scoring_method(name).run(toy.model, toy.task, "edges", direction="noising", progress=False) for title, toy in toys.items()}
        rows[name] = {title: roc(scores, toys[title].circuit, not_scored="worst").auc for title, scores in maps.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _toy(name: str, build: Builder, pairs: list[Pair], edges: tuple[str, ...], sharpness: float, leak: float) -> ToyCircuit:
    model, junk = build.model(leak)
    n_positions = len(pairs[0])
    # two rows of the unembedding, each of norm leak, and the junk of two runs
    level = 4 * leak * junk
    # a few times the share of attention that misses its aim, once for each attention step
    tails = 4 * n_positions * math.exp(-sharpness)
    task = Task(f"{name}-toy", tuple(pairs), METRICS["logit_diff"])
    return ToyCircuit(name, model, task, edges, GAIN * (1 - 1 / n_positions - tails) - level, level)
