"""Layer metrics: numbers about the states of a corpus after each layer, with intervals over its texts.

    >>> import patchlab as pl
    >>> from patchlab import layer_metrics
    >>> model = pl.load_model("demo-gpt2-4l")
    >>> found = layer_metrics.measure(model, pl.texts.sentences(model, 8, seed=1), ["entropy", "curvature"])
    >>> found.layers
    (-1, 0, 1, 2, 3)

A metric is a function of states and an entry of :data:`METRICS`.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.spatial.distance import cdist

from patchlab.engine import Program, run
from patchlab.engine.program import row_numbers
from patchlab.errors import LensError, MetricError, unknown
from patchlab.host import to_array
from patchlab.lenses.linear_map import LeastSquares
from patchlab.lenses.rows import Corpus, by_length
from patchlab.models import Model
from patchlab.stats.bootstrap import interval, resampling_weights
from patchlab.tasks.task import Task
from patchlab.texts import Texts

_TRIED = 64  # rows per forward pass
_GROUPS = 10  # of texts, that a jackknife leaves out one after the other
_POINTS = 1000  # states of which distances are taken
_NEIGHBOURS = 24
_FOLDS = 5

Labels = Sequence[Any] | None


@dataclass(frozen=True, eq=False)
class States:
    """The states of texts before the blocks and after each of them.

    Attributes:
        tokens: ids of each text.
        of: one list per layer, first what is in the stream before the blocks, of the states ``[pos, d_model]`` of each text.
        labels: the class of each text, numbered from 0; None where there are none.
        seed: of draws.
    """

    tokens: tuple[Int[np.ndarray, " _"], ...]
    of: tuple[tuple[Float[np.ndarray, "_ d_model"], ...], ...] = field(repr=False)
    labels: Int[np.ndarray, " text"] | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def groups(self) -> tuple[Int[np.ndarray, " text"], ...]:
        """Texts in at most ten groups, drawn by the seed; a jackknife leaves out one after the other."""
        order = np.random.default_rng(self.seed).permutation(len(self))
        return tuple(np.array_split(order, min(_GROUPS, len(self))))

    @cached_property
    def distinct(self) -> tuple[Bool[np.ndarray, " _"], ...]:
        """The positions of each text whose tokens so far begin no earlier text: elsewhere a state is there already."""
        seen: set[tuple[int, ...]] = set()
        found = []
        for ids in self.tokens:
            prefixes = [tuple(ids[: end + 1].tolist()) for end in range(len(ids))]
            found.append(np.array([prefix not in seen for prefix in prefixes]))
            seen.update(prefixes)
        return tuple(found)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over texts, and the numbers of single texts where it is their mean."""

    value: float
    low: float
    high: float
    texts: Float[np.ndarray, " text"] | None = None


def mean_of(texts: Float[np.ndarray, " text"], seed: int = 0) -> Estimate:
    """The mean of one number per text, with a percentile bootstrap interval over texts."""
    low, high = interval(resampling_weights(len(texts), 1000, seed) @ texts[:, None])
    return Estimate(float(texts.mean()), float(low[0]), float(high[0]), texts)


def jackknifed(states: States, statistic: Callable[[Bool[np.ndarray, " text"]], float]) -> Estimate:
    """A statistic of a set of texts, with an interval of ±1.96 standard errors by the delete-a-group jackknife (Kott 2001).

    Resampling with replacement would give a state distance 0 to itself. The standard error is ``√((G − 1)/G · Σ (θ₋g − mean θ₋g)²)``
    over G groups of texts.
    """
    value = statistic(np.ones(len(states), dtype=bool))
    if len(states.groups) < 2:
        return Estimate(value, float("nan"), float("nan"))
    without = []
    for group in states.groups:
        kept = np.ones(len(states), dtype=bool)
        kept[group] = False
        without.append(statistic(kept))
    left = np.array(without)
    error = 1.96 * float(np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()))
    return Estimate(value, value - error, value + error)


LayerMetric = Callable[[States, int], Estimate]


@dataclass(frozen=True)
class Entry:
    """A metric by layer: what it is, and its function of states and a layer (0: before the blocks).

    ``labelled`` metrics need a class per text; ``steps`` compare a state with that of the layer before, and have none before the blocks.
    """

    what: str
    function: LayerMetric
    labelled: bool = False
    steps: bool = False


METRICS: dict[str, Entry] = {}
"""The metrics by name."""


def _metric(name: str, what: str, **options: bool) -> Callable[[LayerMetric], LayerMetric]:
    def register(function: LayerMetric) -> LayerMetric:
        METRICS[name] = Entry(what, function, **options)
        return function

    return register


def prompt_entropy(states: Float[np.ndarray, "pos d_model"]) -> float:
    """Entropy of the spectrum of a text's Gram matrix, as a share of the largest possible (Skean et al. 2025, arXiv 2502.02013).

    Tokens are centred on their mean and set to length 1; entries of the Gram matrix below 0 are set to 0, as the authors' code does; of its
    eigenvalues λ over their sum, ``−Σ λ log λ / log min(pos, d_model)``. 1: all directions alike; 0: one direction.
    """
    z = states - states.mean(0)
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    z = np.divide(z, norms, out=np.zeros_like(z), where=norms > 0)
    gram = np.maximum(z @ z.T, 0.0)
    share = np.clip(np.linalg.eigvalsh(gram), 0.0, None)
    if not share.sum() > 0:
        return 0.0
    share = share[share > 0] / share.sum()
    return float(-(share * np.log(share)).sum() / np.log(min(states.shape)))


def curvature(states: Float[np.ndarray, "pos d_model"]) -> float:
    """Mean angle in radians between a text's successive differences ``h[t+1] − h[t]`` and ``h[t+2] − h[t+1]`` (Hosseini and Fedorenko 2023)."""
    steps = np.diff(states, axis=0)
    norms = np.linalg.norm(steps, axis=1)
    size = norms[1:] * norms[:-1]
    cosine = np.divide((steps[1:] * steps[:-1]).sum(1), size, out=np.zeros_like(size), where=size > 0)
    return float(np.arccos(np.clip(cosine, -1.0, 1.0)).mean())


@_metric("entropy", "entropy of the spectrum of a text's tokens, as a share of the largest possible")
def _entropy(states: States, layer: int) -> Estimate:
    return mean_of(np.array([prompt_entropy(own) for own in states.of[layer]]))


@_metric("curvature", "mean angle between a text's successive steps from token to token, in radians")
def _curvature(states: States, layer: int) -> Estimate:
    return mean_of(np.array([curvature(own) for own in states.of[layer]]))


@_metric("anisotropy", "share of the variance of all states along its first direction")
def _anisotropy(states: States, layer: int) -> Estimate:
    count = np.array([len(own) for own in states.of[layer]])
    sums = np.stack([own.sum(0) for own in states.of[layer]])
    squares = [own.T @ own for own in states.of[layer]]
    width = sums.shape[1]
    # sums of groups of texts: a jackknife adds up nine of ten
    of_group = [(count[g].sum(), sums[g].sum(0), sum((squares[i] for i in g), np.zeros((width, width)))) for g in states.groups]

    def share(kept: Bool[np.ndarray, " text"]) -> float:
        parts = [part for part, g in zip(of_group, states.groups, strict=True) if kept[g].all()]
        n, total = sum(part[0] for part in parts), sum((part[1] for part in parts), np.zeros(width))
        spread = sum((part[2] for part in parts), np.zeros((width, width))) - np.outer(total, total) / n
        values = np.linalg.eigvalsh(spread)
        return float(values[-1] / values.sum())

    return jackknifed(states, share)


def two_nn(first: Float[np.ndarray, " point"], second: Float[np.ndarray, " point"], share: float | int = 0.9) -> float:
    """Intrinsic dimension of points by the distances to their nearest and second neighbours (Facco et al. 2017, TwoNN).

    The slope through the origin of ``−log(1 − F)`` on ``log(second / first)``, over the ``share`` of the points with the smallest ratios.
    """
    ratio = np.sort(np.log(second / first))
    n = len(ratio)
    kept = slice(0, max(1, min(int(share * n), n - 1)))
    x, y = ratio[kept], -np.log1p(-np.arange(1, n + 1)[kept] / n)
    return float((x * y).sum() / (x * x).sum())


@_metric("dimension", "intrinsic dimension of the states, by the distances to two neighbours (TwoNN)")
def _dimension(states: States, layer: int) -> Estimate:
    """At most a thousand states, drawn by the seed. Positions whose tokens so far are those of an earlier text are the same state, and left out."""
    points = np.concatenate([own[new] for own, new in zip(states.of[layer], states.distinct, strict=True)])
    text = np.concatenate([np.full(int(new.sum()), i) for i, new in enumerate(states.distinct)])
    if len(points) > _POINTS:
        drawn = np.random.default_rng(states.seed).permutation(len(points))[:_POINTS]
        points, text = points[drawn], text[drawn]
    # before the blocks a state is its token and perhaps its position
    points, once = np.unique(points, axis=0, return_index=True)
    text = text[once]
    if len(points) < 20:
        raise LensError(f"the intrinsic dimension needs at least 20 different states, and got {len(points)}. Give more or longer texts.")
    distances = cdist(points, points)
    np.fill_diagonal(distances, np.inf)
    near = np.argsort(distances, axis=1)[:, : min(_NEIGHBOURS, len(points) - 1)]
    near_distances = np.take_along_axis(distances, near, 1)

    def dimension(kept: Bool[np.ndarray, " text"]) -> float:
        own = kept[text]
        there = own[near] & np.isfinite(near_distances)
        enough = own & (there.sum(1) >= 2)
        ranked = np.sort(np.where(there, near_distances, np.inf)[enough], axis=1)
        return two_nn(ranked[:, 0], ranked[:, 1])

    return jackknifed(states, dimension)


def _linearity(states: States, layer: int, *, delta: bool) -> Estimate:
    """Held-out R² of the affine map from one layer's states to the next's, or to what the layer adds.

    Every fifth group of texts is held out; its interval is a bootstrap of the ratio of sums over its texts, for the map as it was fitted.
    """
    if len(states.groups) < 2:
        raise MetricError("linearity is measured on texts that the map was not fitted on; give at least two texts.")
    held = np.concatenate(states.groups[: max(1, len(states.groups) // 5)])
    fitted = np.setdiff1d(np.arange(len(states)), held)
    x, y = states.of[layer - 1], states.of[layer]
    target = [after - before if delta else after for before, after in zip(x, y, strict=True)]
    width = x[0].shape[1]
    sums = LeastSquares(width, width, torch.device("cpu"))
    for i in fitted:
        sums.add(torch.from_numpy(x[i]), torch.from_numpy(target[i]))
    try:
        linear = sums.solve(1e-6, torch.float64)
    except LensError as error:
        raise MetricError(f"linearity: {error}") from error
    mean = np.concatenate([target[i] for i in held]).mean(0)
    left = np.array([float(((linear(torch.from_numpy(x[i])).numpy() - target[i]) ** 2).sum()) for i in held])
    total = np.array([float(((target[i] - mean) ** 2).sum()) for i in held])
    weights = resampling_weights(len(held), 1000, states.seed)
    low, high = interval(1 - (weights @ left[:, None]) / (weights @ total[:, None]))
    return Estimate(float(1 - left.sum() / total.sum()), float(low[0]), float(high[0]))


@_metric("linearity", "held-out R² of an affine map from the state before the layer to that after it", steps=True)
def _linearity_of_state(states: States, layer: int) -> Estimate:
    return _linearity(states, layer, delta=False)


@_metric("linearity_of_delta", "held-out R² of an affine map from the state before the layer to what the layer adds", steps=True)
def _linearity_of_delta(states: States, layer: int) -> Estimate:
    return _linearity(states, layer, delta=True)


def lidar_rank(states: Float[np.ndarray, "text d_model"], labels: Int[np.ndarray, " text"], delta: float = 1e-4) -> float:
    """LiDAR: the effective rank of the linear discriminant (Thilak et al. 2023, arXiv 2312.04000).

    With the covariance ``B`` of the classes' means and the mean covariance ``W`` within classes plus ``delta`` times the identity:
    ``exp(−Σ p log p)`` of the eigenvalues of ``W^−½ B W^−½`` over their sum.
    """
    classes = np.unique(labels)
    means = np.stack([states[labels == one].mean(0) for one in classes])
    within = sum((np.cov(states[labels == one].T, bias=True) for one in classes), np.zeros((states.shape[1],) * 2)) / len(classes)
    between = np.cov(means.T, bias=True)
    values, vectors = np.linalg.eigh(within + delta * np.eye(states.shape[1]))
    root = vectors / np.sqrt(values) @ vectors.T
    spectrum = np.clip(np.linalg.eigvalsh(root @ between @ root), 0.0, None)
    share = spectrum[spectrum > 0] / spectrum.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _last(states: States, layer: int) -> Float[np.ndarray, "text d_model"]:
    """The state at the last position of each text."""
    return np.stack([own[-1] for own in states.of[layer]])


@_metric("lidar", "effective rank of the linear discriminant of the classes, at the last position", labelled=True)
def _lidar(states: States, layer: int) -> Estimate:
    labels, points = _labels(states), _last(states, layer)
    return jackknifed(states, lambda kept: lidar_rank(points[kept], labels[kept]))


def ridge_choice(
    x: Float[np.ndarray, "text d_model"], labels: Int[np.ndarray, " text"], new: Float[np.ndarray, "other d_model"], ridge: float = 1e-2
) -> Int[np.ndarray, " other"]:
    """The classes that ridge regression on one-hot labels gives to new states.

    States are centred on the mean of ``x`` and divided by the root of its mean squared entry; the penalty is ``ridge`` · n · ‖W‖².
    """
    classes = np.unique(labels)
    centre = x.mean(0)
    size = float(np.sqrt(((x - centre) ** 2).mean())) or 1.0
    z, wanted = (x - centre) / size, (labels[:, None] == classes).astype(np.float64)
    weights = np.linalg.solve(z.T @ z + ridge * len(z) * np.eye(z.shape[1]), z.T @ (wanted - wanted.mean(0)))
    return classes[((new - centre) / size @ weights + wanted.mean(0)).argmax(1)]


@_metric("probe", "held-out accuracy of a ridge probe of the class, at the last position", labelled=True)
def _probe(states: States, layer: int) -> Estimate:
    """Five folds of texts, drawn by the seed; equal texts are in one fold."""
    labels, points = _labels(states), _last(states, layer)
    number: dict[tuple[int, ...], int] = {}
    same = np.array([number.setdefault(tuple(ids.tolist()), len(number)) for ids in states.tokens])
    fold = np.random.default_rng(states.seed).permutation(len(number))[same] % _FOLDS
    right = np.zeros(len(states))
    for one in range(_FOLDS):
        test = fold == one
        if test.any() and not test.all():
            right[test] = ridge_choice(points[~test], labels[~test], points[test]) == labels[test]
    return mean_of(right)


def _labels(states: States) -> Int[np.ndarray, " text"]:
    if states.labels is None:
        raise MetricError("this metric needs a class of each text; give labels=[...], or a task, whose classes are the correct answers.")
    return states.labels


@dataclass(frozen=True, eq=False)
class LayerMetrics:
    """Numbers by layer, with 95 % intervals over texts.

    Attributes:
        subject: model and texts.
        data: ``value``, ``low`` and ``high``, ``[metric, layer]``; layer −1 is before the blocks, others are after that block. NaN where a
            metric has no value.
        texts: of metrics that are means over texts, the numbers of each, ``[text, layer]``.
        what: a description of each metric.
        provenance: model, fingerprint, texts, seed, left-out positions, number of classes and share of the largest where there are any.
    """

    subject: str
    data: xr.Dataset
    texts: Mapping[str, xr.DataArray] = field(default_factory=dict[str, xr.DataArray], repr=False)
    what: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics."""
        return tuple(str(name) for name in self.data["metric"].to_numpy())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers; −1 is before the blocks."""
        return tuple(int(layer) for layer in self.data["layer"].to_numpy())

    def __getitem__(self, name: str) -> Float[np.ndarray, " layer"]:
        if name not in self.names:
            raise MetricError(unknown("layer metric", name, self.names))
        return self.data["value"].sel(metric=name).to_numpy()

    def table(self) -> pd.DataFrame:
        """One row per metric and layer: ``metric, layer, value, low, high``."""
        rows = [
            {"metric": name, "layer": layer, **{part: float(self.data[part].to_numpy()[m, i]) for part in ("value", "low", "high")}}
            for m, name in enumerate(self.names)
            for i, layer in enumerate(self.layers)
        ]
        return pd.DataFrame([row for row in rows if not np.isnan(row["value"])])

    def show(self) -> None:
        """Write the values by layer (rows) and metric (columns) to standard output."""
        frame = pd.DataFrame(self.data["value"].to_numpy().T, columns=list(self.names), index=pd.Index(self.layers, name="layer"))
        sys.stdout.write(frame.to_string(float_format=lambda value: f"{value:.3f}", na_rep="") + "\n")

    def __repr__(self) -> str:
        return f"LayerMetrics({self.subject}) {', '.join(self.names)}; layers {self.layers[0]} to {self.layers[-1]}"


def collected(
    subject: str, found: Mapping[str, Mapping[int, Estimate]], layers: Sequence[int], what: Mapping[str, str], provenance: Mapping[str, Any]
) -> LayerMetrics:
    """Estimates by metric and layer as one result; NaN where there is none."""
    parts = {part: np.full((len(found), len(layers)), np.nan) for part in ("value", "low", "high")}
    texts: dict[str, xr.DataArray] = {}
    for m, (name, by_layer) in enumerate(found.items()):
        own: dict[int, np.ndarray] = {}
        for layer, one in by_layer.items():
            for part, array in parts.items():
                array[m, layers.index(layer)] = getattr(one, part)
            if one.texts is not None:
                own[layer] = one.texts
        if own:
            texts[name] = xr.DataArray(np.stack(list(own.values()), 1), dims=("text", "layer"), coords={"layer": list(own)}, name=name)
    data = xr.Dataset({part: (("metric", "layer"), array) for part, array in parts.items()}, coords={"metric": list(found), "layer": list(layers)})
    for array in data.data_vars.values():
        array.to_numpy().setflags(write=False)
    return LayerMetrics(subject, data, texts, dict(what), dict(provenance))


def states_of(model: Model, corpus: Corpus, *, labels: Labels = None, skip_first: int = 0, seed: int = 0) -> States:
    """The states of a corpus in float64 on the CPU, before the blocks and after each.

    Raises:
        LensError: no texts, texts without a position that counts, or not one label per text.
        SiteError: a model without resid_pre or resid_post.
    """
    groups = by_length(model, corpus)
    if short := [tokens.shape[1] for _, tokens in groups if tokens.shape[1] <= skip_first]:
        raise LensError(f"a text of {min(short)} tokens has no position after the first {skip_first}; give longer texts, or a smaller skip_first.")
    targets = (("resid_pre", 0), *(("resid_post", layer) for layer in range(model.arch.n_layers)))
    total = sum(len(numbers) for numbers, _ in groups)
    of: list[list[Any]] = [[None] * total for _ in targets]
    ids: list[Any] = [None] * total
    for numbers, tokens in groups:
        for start in range(0, len(numbers), _TRIED):
            part = tokens[start : start + _TRIED]
            with torch.no_grad():
                kept = run(model, Program(part, row_numbers(part), keep=targets)).activations
            for at, target in enumerate(targets):
                values = to_array(kept[target][:, skip_first:])
                for row, number in enumerate(numbers[start : start + _TRIED]):
                    of[at][number] = values[row]
            for row, number in enumerate(numbers[start : start + _TRIED]):
                ids[number] = part[row].cpu().numpy()
    if labels is None and isinstance(corpus, Task):
        labels = [min(pair.correct) for pair in corpus.pairs]
    if labels is not None and len(labels) != total:
        raise LensError(f"there are {len(labels)} labels for {total} texts; give one per text.")
    classes = None if labels is None else np.unique(np.array([str(label) for label in labels]), return_inverse=True)[1]
    # of the tokens, those whose states count: a state is that of all tokens so far, so the first ones stay in its prefix
    return States(tuple(ids), tuple(tuple(layer) for layer in of), classes, seed) if not skip_first else _cut(ids, of, classes, seed, skip_first)


def _cut(ids: list[Any], of: list[list[Any]], classes: Any, seed: int, skip_first: int) -> States:
    """States without leading positions; the first token of each text that is left stands for those before it as well."""
    number: dict[tuple[int, ...], int] = {}
    first = [-1 - number.setdefault(tuple(row[: skip_first + 1].tolist()), len(number)) for row in ids]
    tokens = tuple(np.concatenate([[one], row[skip_first + 1 :]]) for one, row in zip(first, ids, strict=True))
    return States(tokens, tuple(tuple(layer) for layer in of), classes, seed)


def measure(
    model: Model, corpus: Corpus, metrics: str | Iterable[str] | None = None, *, labels: Labels = None, skip_first: int = 0, seed: int = 0
) -> LayerMetrics:
    """Metrics of the states of a corpus, by layer.

    Args:
        model: the model.
        corpus: rows of :mod:`patchlab.texts`, a task (its clean prompts), texts or rows of token ids. Texts of one task vary little: maps fitted
            on them are all but exact. All states are held in memory, in float64.
        metrics: names of :data:`METRICS`; default all that the corpus has labels for.
        labels: a class per text, for ``lidar`` and ``probe``; a task's are its correct answers, unless given.
        skip_first: leading positions that are left out (the first token of many models has a state unlike all others).
        seed: of groups, folds and draws.

    Raises:
        MetricError: an unknown metric, or one that needs labels where there are none.
        LensError: texts that are too short or too few.

    Example:
        >>> layer_metrics.measure(model, pl.texts.sentences(model, 64, seed=1)).show()  # doctest: +SKIP
    """
    states = states_of(model, corpus, labels=labels, skip_first=skip_first, seed=seed)
    return measured(states, metrics, _subject(model, corpus, len(states)), _provenance(model, corpus, states, skip_first))


def measured(states: States, metrics: str | Iterable[str] | None, subject: str, provenance: Mapping[str, Any]) -> LayerMetrics:
    """Metrics of states that are there already; see :func:`measure`.

    Raises:
        MetricError: an unknown metric, one that needs labels where there are none, or two classes with less than two texts each.
    """
    given = [metrics] if isinstance(metrics, str) else metrics
    chosen = [name for name, entry in METRICS.items() if states.labels is not None or not entry.labelled] if given is None else list(given)
    if not chosen:
        raise MetricError(f"no metrics; name at least one of {', '.join(METRICS)}.")
    for name in chosen:
        if name not in METRICS:
            raise MetricError(unknown("layer metric", name, METRICS))
        if METRICS[name].labelled and np.sum(np.bincount(_labels(states)) >= 2) < 2:
            raise MetricError(f"{name} needs at least two classes with two texts each; got {np.bincount(_labels(states)).tolist()} texts per class.")
    if short := [own.shape[0] for own in states.of[0] if own.shape[0] < 3]:
        raise LensError(f"a text has {min(short)} positions that count, and metrics of a text need 3. Give longer texts.")
    found = {
        name: {at - 1: METRICS[name].function(states, at) for at in range(METRICS[name].steps, len(states.of))} for name in dict.fromkeys(chosen)
    }
    return collected(subject, found, range(-1, len(states.of) - 1), {name: METRICS[name].what for name in found}, provenance)


def _subject(model: Model, corpus: Corpus, n: int) -> str:
    return f"{model.name} × {corpus.name}[{n}]" if isinstance(corpus, (Task, Texts)) else f"{model.name} × {n} texts"


def _provenance(model: Model, corpus: Corpus, states: States, skip_first: int) -> dict[str, Any]:
    record: dict[str, Any] = {"model": model.name, "fingerprint": model.fingerprint, "texts": len(states), "seed": states.seed}
    record |= {"skip_first": skip_first, "corpus": corpus.name if isinstance(corpus, (Task, Texts)) else "rows"}
    if states.labels is not None:
        counts = np.bincount(states.labels)
        record |= {"classes": len(counts), "largest_class": float(counts.max() / counts.sum())}
    return record
