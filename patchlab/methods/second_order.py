"""The second-order term of each cell's effect: what linearised patching leaves out first."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.engine import Target, support
from patchlab.engine.memory import activation_bytes, block_numbers, itemsize
from patchlab.errors import MethodError
from patchlab.host import to_array
from patchlab.interventions import Edit
from patchlab.methods.cells import parts
from patchlab.methods.cells.nodes import addresses, patched
from patchlab.methods.method import Method
from patchlab.methods.registry import register_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.rounding import product_variance
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored, of_rows, program, reduced, required
from patchlab.sites import KINDS, POSITION_AXES, Site, address
from patchlab.sources import Kept, Source

STEPS = {torch.float32: 1e-2, torch.float64: 1e-4}
"""Share of the way to the source at which the second gradient is taken, per dtype of the model."""
PILOT = 8
"""Fewer probes say too little about their own spread."""
PROBE = 3.0
"""What a probe costs in forward passes over a whole prompt: a forward pass, and a backward pass as two (as in verified patching)."""
UNPAID = 0.1
"""Share of the price of patching a layer that may go into probes which do not do, so that as much is missing for patches."""
FIXED = 4.0
"""What comes on top for each prompt, in forward passes, at most: a gradient at the baseline, which exact patching needs not, in a run over
the whole prompt, where exact patching may run the rest only, and one such run more to patch from."""


@register_method("second-order:N", "the same from N random sign patterns for every layer and example", number="probes")
@register_method("second-order", "second-order terms, not effects: what linearised patching leaves out first, with their standard errors")
@dataclass(frozen=True)
class SecondOrder(Method):
    """``½ δᵀHδ`` of every cell: what linearised patching leaves out first. Not an effect, but how far to trust one.

    H is the Hessian of the metric in one layer's site at the baseline. One Hessian-vector product per layer and probe, along
    ``u = Σ_c s_c δ_c`` with a random sign per cell and example, gives ``½ s_c δ_c · Hu`` for all cells of the layer at once:
    exact where only one cell of a layer differs, elsewhere unbiased over the signs, since the cross terms between cells average out.
    (Without signs they would all be counted.) A cell's variance over probes is ``¼ Σ_d (δ_cᵀHδ_d)²`` over the other cells d, which can be
    many times the square of its own term; the spread of the probes shows it, as ``standard_error`` of the result.
    The product is a difference of two gradients, at the baseline and a small step along u.

    Each example's probes of a layer are doubled, from 8 on, until the standard error of a cell's mean over examples is at most ``tolerance``
    times what it is held against: the larger of its first- and its second-order term. (Every example gets there by itself, at √n times the
    tolerance for n examples, so that nothing depends on the batches.) Cells that would take more probes than patching them costs are
    patched: their value is then the whole remainder, effect − first-order score, without error.

    It never costs more than exact patching of the same cells: a probe counts 3 forward passes (a backward pass is two), and a layer gets what
    patching its live cells would take. Where that is less than ten pilots of 8 probes, nothing is probed and all is patched, which the
    price tells beforehand; the first-order scores come on top, with at most 4 forward passes for each prompt. What probes cost is missing for
    patches: where they turn out not to do, the cells with the largest standard errors are patched as far as it goes, and the others, at most
    a tenth of the layer by price, keep a standard error above the tolerance. The result says how many cells were patched
    (``patched_exactly``) and how many are left so (``above_tolerance``), and ``unreliable`` allows for their standard error.

    Source: arXiv 2606.09899 for the term, whose size over that of the first-order score ``|δᵀHδ| / (2 |∇m·δ|)`` tells how reliable the
    latter is (:func:`patchlab.comparison.reliability.unreliable`). There every component has a Hessian-vector product of its own, along its own δ;
    sharing one among the cells of a layer is ours (signs: Hutchinson 1989), as are the stopping rule and the difference in place of a second
    derivative.

    Args:
        tolerance: largest standard error, as a share of the larger of the first- and second-order term.
        probes: this many sign patterns for every layer and example instead, and no patches; one has no standard error.
        seed: of the signs.
        source: what is patched in; see :class:`patchlab.methods.Method`.

    Example:
        >>> doubtful = patchlab.comparison.reliability.unreliable(atp, SecondOrder().run(model, task, "z"))  # doctest: +SKIP
    """

    tolerance: float = 0.1
    probes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes is not None and self.probes < 1:
            raise MethodError(f"probes is {self.probes}; at least 1 sign pattern is needed, or None for as many as the tolerance takes.")
        if not 0 < self.tolerance < 1:
            raise MethodError(f"tolerance is {self.tolerance}; it must be above 0 and below 1 (0.1: a standard error of 10 %).")

    def check(self, setting: Setting) -> None:
        for kind, part in parts(setting):
            if (why := kind.second_order(part)) is not None:
                raise MethodError(why)
        if setting.model.dtype not in STEPS:
            raise MethodError(
                f"a second derivative needs a model in float32 or float64; {setting.model.name} is in "
                f"{str(setting.model.dtype).removeprefix('torch.')}. Load it with dtype='float32'."
            )

    def forwards(self, setting: Setting) -> int:
        return 2 + (self.probes or PILOT) * sum(len(_layers(setting, site)) for site in setting.sites)

    def backwards(self, setting: Setting) -> int:
        return self.forwards(setting) - 1

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        per_block = rows * length * block_numbers(setting.model, length)
        return 4 * activation_bytes(setting.model, setting.targets, rows, length) + itemsize(setting.model) * (
            setting.model.arch.n_layers * per_block + 2 * rows * length * setting.model.vocab_size
        )

    def provenance_of(self, setting: Setting, skipped: dict[str, str]) -> dict[str, Any]:
        record = super().provenance_of(setting, skipped)
        return {**record, "notes": [*record["notes"], "second-order terms, not effects"]}

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        return {"keep": setting.targets, "gradients": setting.targets}

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        found: dict[str, _Terms] = {}
        for site in setting.sites:
            layers = [self._of_layer(setting, runs, meter, site, layer) for layer in _layers(setting, site)]
            found[str(site)] = layers[0] if "layer" not in KINDS[site.kind].axes else _Terms.stacked(layers)
            notes.setdefault("probes", {})[str(site)] = np.stack([one.count for one in layers], 1).tolist()
        self._patch(setting, runs, meter, found)
        for name, terms in found.items():
            for note, cells in (("patched_exactly", terms.left), ("above_tolerance", terms.above)):
                notes.setdefault(note, {})[name] = cells.reshape(len(runs.batch), -1).sum(1).tolist()
        value, noise, error = ({name: getattr(one, part) for name, one in found.items()} for part in ("value", "noise", "error"))
        return Scored(value, noise, error)

    def _of_layer(self, setting: Setting, runs: Runs, meter: Meter, site: Site, layer: int | None) -> "_Terms":
        """The terms of one layer, from as many probes as each example takes."""
        own, gradient, target = runs.baseline.activations[site.kind, layer], runs.baseline.gradients[site.kind, layer], (site.kind, layer)
        difference = runs.source.values(address(*target), own, runs.batch.examples).to(own) - own
        first, differs = _cells(setting, runs, site, difference * gradient), _cells(setting, runs, site, (difference != 0).to(own)) > 0
        step = STEPS[setting.model.dtype]
        variance = product_variance(torch.zeros_like(own), difference, gradient, vectors=KINDS[site.kind].width is not None) / (4 * step**2)
        noise = runs.rounding.of_products(to_array(reduced(setting, runs, site, variance)), np.zeros_like(first))
        probed, rows = _Probed.of(first.shape, alone=differs.reshape(len(differs), -1).sum(1) <= 1), np.arange(len(first))

        def probe(rows: Int[np.ndarray, " row"], upto: int) -> None:
            some, index = of_rows(runs, rows), torch.as_tensor(rows, device=own.device)
            for number in range(int(probed.count[rows[0]]), upto):
                signs = self._signs(setting, some, site, target, own, number)
                nudge = Edit(address(*target), _Nudge(runs.source, signs, step))
                moved = meter.run(setting.model, program(setting, some, edits=(nudge,), gradients=(target,))).gradients[target]
                product = signs * difference[index] * (moved - gradient[index]) / (2 * step)
                probed.add(rows, _cells(setting, some, site, product))

        if self.probes is not None:
            probe(rows, self.probes)
            return _Terms(first, probed.mean, probed.error(), noise, np.zeros_like(differs), np.zeros_like(differs), probed.count)
        live = required(setting.live[str(site)]) if layer is None else required(setting.live[str(site)])[layer]
        price, left, probes = _prices(setting, runs, site, layer, first.shape), differs & live, PILOT
        budget = (price * live).reshape(len(price), -1).sum(1) - FIXED
        rows = rows[UNPAID * budget >= PROBE * PILOT]
        while len(rows):
            probe(rows, probes)
            allowed = self.tolerance * np.sqrt(len(setting.task)) * np.maximum(np.abs(first), np.abs(probed.mean))
            error = probed.error()
            excess = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
            left[rows] = (differs & live & (excess > 1))[rows]
            rows = np.array([row for row in rows if _worth_more(excess[row][left[row]], price[row][left[row]], probes, budget[row])], dtype=int)
            probes *= 2
        above = np.zeros_like(left)
        for row in np.flatnonzero(probed.count):
            above[row] = left[row] & ~_affordable(left[row], probed.error()[row], price[row], budget[row] - PROBE * probed.count[row])
        left &= ~above
        patch = np.sqrt(2) * runs.rounding.metric.reshape(-1, *[1] * (first.ndim - 1))
        return _Terms(
            first, probed.mean, np.where(left | ~(differs & live), 0.0, probed.error()), np.where(left, patch, noise), left, above, probed.count
        )

    def _patch(self, setting: Setting, runs: Runs, meter: Meter, found: "dict[str, _Terms]") -> None:
        """Put the whole remainder where probes did not reach the tolerance. Every example by itself: their cells differ."""
        for row in range(len(runs.batch)):
            one = of_rows(runs, np.array([row]))
            cells = [(terms, cell, where) for site in setting.sites for terms, cell, where in found[str(site)].patches(setting, site, row)]
            if cells:
                effects = patched(setting, one, meter, [(Edit(where, one.source),) for _, _, where in cells])[:, 0]
                for (terms, cell, _), effect in zip(cells, effects.tolist(), strict=True):
                    terms.value[row][cell] = effect - terms.first[row][cell]

    def _signs(self, setting: Setting, runs: Runs, site: Site, target: Target, own: Float[Tensor, "batch *site"], probe: int) -> Tensor:
        """A sign per example and cell, keyed by the example's tokens; it broadcasts to the site. 0 at positions that are no cell."""
        axes = [axis for axis in KINDS[site.kind].axes if axis != "layer"]
        shape = [size if axis in site.axes else 1 for axis, size in zip(axes, own.shape[1:], strict=False)]
        named = None if setting.axis is None or setting.axis.names is None else setting.axis.index
        rows: list[np.ndarray] = []
        for example in map(int, runs.batch.examples.cpu().numpy()):
            pair = setting.task.pairs[example]
            key = hashlib.sha256(repr((self.seed, probe, target[1], pair.clean_ids, pair.corrupted_ids)).encode()).digest()
            signs = np.random.default_rng(list(key)).choice([-1.0, 1.0], size=shape)
            for dim, axis in enumerate(axes):
                if named is not None and axis in site.axes and axis in POSITION_AXES:
                    elsewhere = np.setdiff1d(np.arange(shape[dim]), named[example])
                    signs[(slice(None),) * dim + (elsewhere,)] = 0.0
            rows.append(signs)
        found = torch.as_tensor(np.stack(rows), dtype=own.dtype, device=own.device)
        return found if KINDS[site.kind].width is None else found.unsqueeze(-1)


@dataclass(frozen=True)
class _Terms:
    """What was found of the cells of one layer or all, ``[batch, *cells]``: the first-order score, the second-order term, its standard
    error and noise floor, which cells are left to be patched, and which above the tolerance; and the number of probes per example (and layer).
    """

    first: Float[np.ndarray, "batch *cells"]
    value: Float[np.ndarray, "batch *cells"]
    error: Float[np.ndarray, "batch *cells"]
    noise: Float[np.ndarray, "batch *cells"]
    left: Bool[np.ndarray, "batch *cells"]
    above: Bool[np.ndarray, "batch *cells"]
    count: Int[np.ndarray, "batch *layer"]

    @staticmethod
    def stacked(layers: "Sequence[_Terms]") -> "_Terms":
        """All layers, as the second axis."""
        first, value, error, noise, left, above, count = (np.stack([getattr(one, field.name) for one in layers], 1) for field in fields(_Terms))
        return _Terms(first, value, error, noise, left, above, count)

    def patches(self, setting: Setting, site: Site, row: int) -> "Iterator[tuple[_Terms, tuple[int, ...], Site]]":
        """Index and address of the cells of one example that are left."""
        for cell, where in addresses(setting, site, self.left[row]):
            yield self, cell, where


@dataclass
class _Probed:
    """Mean and summed squared deviations over the probes so far, and their number per example; ``alone``: only one cell differs, so that a
    probe has no error.
    """

    mean: Float[np.ndarray, "batch *cells"]
    squares: Float[np.ndarray, "batch *cells"]
    count: Int[np.ndarray, " batch"]
    alone: Bool[np.ndarray, " batch"]

    @staticmethod
    def of(shape: tuple[int, ...], *, alone: Bool[np.ndarray, " batch"]) -> "_Probed":
        return _Probed(np.zeros(shape), np.zeros(shape), np.zeros(shape[0], dtype=np.int64), alone)

    def add(self, rows: Int[np.ndarray, " row"], values: Float[np.ndarray, "row *cells"]) -> None:
        """One more probe of some examples (Welford's update)."""
        self.count[rows] += 1
        deviation = values - self.mean[rows]
        self.mean[rows] += deviation / self._along(self.count[rows])
        self.squares[rows] += deviation * (values - self.mean[rows])

    def error(self) -> Float[np.ndarray, "batch *cells"]:
        """Standard error of the mean; NaN where fewer than two probes do not tell."""
        count = self._along(self.count).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.sqrt(self.squares / (count - 1) / count)
        return np.where(self._along(self.alone), 0.0, error)

    def _along(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, *[1] * (self.mean.ndim - 1))


def _cells(setting: Setting, runs: Runs, site: Site, values: Float[Tensor, "batch *site"]) -> Float[np.ndarray, "batch *cells"]:
    summed = values if KINDS[site.kind].width is None else values.sum(-1)
    return to_array(reduced(setting, runs, site, summed))


def _prices(setting: Setting, runs: Runs, site: Site, layer: int | None, shape: tuple[int, ...]) -> Float[np.ndarray, "batch *cells"]:
    """What patching each cell costs exact patching at least, in forward passes over a whole prompt: blocks × positions that it computes.

    Of a cell that differs it is what patching it costs here, to the position.
    """
    mode, depth = support(setting.model).mode, setting.model.arch.n_layers
    prices = np.ones(shape)
    if layer is None or mode == "literal":
        return prices
    length = runs.baseline_tokens.shape[1]
    axes = [axis for axis in site.axes if axis != "layer"]
    place = next((dim for dim, axis in enumerate(axes, 1) if axis in ("pos", "dest")), None)
    by_number = place is not None and setting.axis is not None and setting.axis.names is None
    for row, example in enumerate(map(int, runs.batch.examples.cpu().numpy())):
        paired = isinstance(runs.source, Kept) and not setting.surrounding
        start = np.array(runs.batch.rows(np.array([row])).first_difference if paired and mode == "prefix" else 0)
        at = start
        if place is not None and setting.axis is not None:
            at = setting.axis.index[example].reshape([-1 if dim == place else 1 for dim in range(1, len(shape))])
            start = np.maximum(start, at) if mode == "prefix" else start
        # the first block is run at one position only where nothing else of it can change
        alone = by_number and KINDS[site.kind].layered and not KINDS[site.kind].attended and layer < depth - 1
        local = np.full_like(at, alone, dtype=bool) if mode == "prefix" else alone & (at == 0)
        prices[row] = ((depth - layer - local) * (length - start) + local) / (depth * length)
    return prices


def _affordable(
    left: Bool[np.ndarray, "*cells"], error: Float[np.ndarray, "*cells"], price: Float[np.ndarray, "*cells"], budget: float
) -> Bool[np.ndarray, "*cells"]:
    """The cells with the largest standard errors, as many as can be patched."""
    order = np.argsort(-np.where(left, error, -np.inf), axis=None, kind="stable")[: int(left.sum())]
    chosen = order[np.cumsum(price.ravel()[order]) <= budget]
    found = np.zeros(left.size, dtype=bool)
    found[chosen] = True
    return found.reshape(left.shape)


def _worth_more(excess: Float[np.ndarray, " cell"], price: Float[np.ndarray, " cell"], probes: int, budget: float) -> bool:
    """Whether to double an example's probes rather than patch the cells that are left.

    ``excess`` is each cell's standard error as a multiple of what is allowed; it falls with the root of the number of probes. ``price``: of
    patching it; ``budget``: what the layer may cost, of which no more than a tenth is put at stake.
    """
    if not len(excess) or PROBE * 2 * probes + price.sum() > (1 + UNPAID) * budget:
        return False
    doublings = np.ceil(2 * np.log2(excess))
    tried = np.unique(doublings[np.isfinite(doublings)])
    costs = [PROBE * probes * (2.0**n - 1) + price[doublings > n].sum() for n in tried]
    return bool(costs and min(costs) < price.sum())


@dataclass(frozen=True)
class _Nudge:
    """A small step from the own value towards the source, each cell forwards or backwards."""

    source: Source
    signs: Tensor
    step: float

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        return own + self.step * self.signs * (self.source.values(site, own, examples).to(own) - own)


def _layers(setting: Setting, site: Site) -> list[int | None]:
    return [None] if "layer" not in KINDS[site.kind].axes else list(range(setting.model.arch.n_layers))
