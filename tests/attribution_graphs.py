"""Attribution graphs of random weights, and one by hand."""

import numpy as np
from scipy import sparse

from patchlab.features.attribution import AttributionGraph, Nodes


def made(kind, layer, pos, unit, edges, probability, *, n_layers=3, strings=("<s>", "the", " cat")) -> AttributionGraph:
    """A graph of a table and ``{(target, source): weight}`` or a matrix."""
    n = len(kind)
    if isinstance(edges, dict):
        matrix = np.zeros((n, n))
        for pair, weight in edges.items():
            matrix[pair] = weight
    else:
        matrix = edges
    column = {"activation": np.where(np.array(kind) == 0, 1.5, np.nan), "probability": np.array(probability, dtype=float)}
    rest = {name: np.full(n, np.nan) for name in ("value", "constant", "positional", "left_out")}
    integers = {"kind": kind, "layer": layer, "pos": pos, "unit": unit}
    nodes = Nodes(**{name: np.array(values) for name, values in integers.items()}, **column, **rest)
    provenance = {"model": "toy", "prompt": "<s>the cat", "logit_tokens": [(5, " sat"), (6, " ran")], "transcoders": ["a", "b", "c"]}
    provenance["settings"] = {"max_logits": 10, "cumulative": 0.95, "max_features": 100, "skip_first": 0}
    return AttributionGraph(nodes, sparse.csr_array(matrix), (0, 1, 2), strings, n_layers, provenance=provenance)


def by_hand() -> AttributionGraph:
    """Two features in a row, an error and two tokens before one logit: ``token 1 → f0 → f1 → logit``, with side ways."""
    # 0: L0.F1@1, 1: L1.F4@2, 2: L0.error@1, 3: L1.error@2 (leads nowhere), 4 and 5: tokens 1 and 2, 6: the logit
    kind, layer, pos, unit = [0, 0, 1, 1, 2, 2, 3], [0, 1, 0, 1, -1, -1, 3], [1, 2, 1, 2, 1, 2, 2], [1, 4, -1, -1, 1, 2, 5]
    edges = {(0, 4): 2.0, (1, 0): -3.0, (1, 2): 1.0, (6, 1): 3.0, (6, 5): -1.0}
    return made(kind, layer, pos, unit, edges, [0, 0, 0, 0, 0, 0, 1.0])


def random_graph(seed: int = 0, features: int = 30) -> AttributionGraph:
    """A random graph of three layers and three positions with features, all errors, tokens and two logits; edges run forwards."""
    draw = np.random.default_rng(seed)
    of_features = sorted(zip(draw.integers(0, 3, features), draw.integers(0, 3, features), draw.permutation(features), strict=True))
    rows = [(0, *row) for row in of_features] + [(1, layer, pos, -1) for layer in range(3) for pos in range(3)]
    rows += [(2, -1, pos, pos) for pos in range(3)] + [(3, 3, 2, 5), (3, 3, 2, 6)]
    kind, layer, pos, unit = map(np.array, zip(*rows, strict=True))
    allowed = (layer[:, None] > layer[None, :]) & (pos[:, None] >= pos[None, :]) & np.isin(kind, (0, 3))[:, None] & (kind != 3)[None, :]
    matrix = np.where(allowed, draw.standard_normal(allowed.shape) ** 3, 0.0)
    probability = np.where(kind == 3, 0.0, 0.0)
    probability[-2:] = 0.6, 0.3
    return made(kind, layer, pos, unit, matrix, probability)
