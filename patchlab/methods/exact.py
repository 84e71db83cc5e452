"""Activation patching: the ground truth, one patched forward pass per cell."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from patchlab.engine import Cell, Support, Work, continues, support, sweep
from patchlab.engine.edge_support import edge_support
from patchlab.engine.wiring import POST_NORMS
from patchlab.errors import MethodError, unknown
from patchlab.interventions import Edit, Kept
from patchlab.methods.base import Method
from patchlab.methods.exact_edges import check_edges, edge_bytes, edge_record, score_edges
from patchlab.methods.runs import Meter, Runs, Scored, Setting, activation_bytes, first_difference, itemsize, program, required, token_bytes
from patchlab.sites import Position, Site, parse_site


@dataclass(frozen=True)
class ActivationPatching(Method):
    """Patch every cell and read the metric: effect = patched metric − baseline metric.

    Axes that a site does not name are patched jointly (``z`` patches a head at all positions). Structural zeros are not
    run; their effect is zero. Source: Vig et al. 2020; Meng et al. 2022; as in TransformerLens' ``patching``.

    Args:
        source: what is patched in; see :class:`patchlab.methods.Method`.
        engine: ``auto`` computes only what a patch can change, where that agrees with whole forward passes on this model
            (the result's provenance says which way was taken and why); ``literal`` runs a whole forward pass per cell.
        post_norm: for edges of models with a norm after the attention (Gemma 2 and 3, OLMo 2). ``renormalised``: a reader gets the norm
            of the whole attention output with the changed head in it, as running the model does, so that all edges out of a head
            together are the head. ``frozen`` (named ``exact-frozen``): the change of the head in the denominator of the baseline run.

    Example:
        >>> ActivationPatching().run(model, task, "resid_pre")  # doctest: +SKIP
    """

    engine: str = "auto"
    post_norm: str = "renormalised"
    unit: ClassVar[str] = "cell"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in ("auto", "literal"):
            raise MethodError(unknown("engine", self.engine, ("auto", "literal")))
        if self.post_norm not in POST_NORMS:
            raise MethodError(unknown("form of the norm after attention (post_norm)", self.post_norm, POST_NORMS))

    @property
    def name(self) -> str:
        return "exact" if self.post_norm == "renormalised" else f"exact-{self.post_norm}"

    def forwards(self, setting: Setting) -> int:
        return sum(int(live.sum()) for live in setting.live.values())

    def work(self, setting: Setting) -> float:
        """The unpatched runs, and for each cell the share of the model that comes after it."""
        return 2 + sum(float(self._share(setting, name).sum()) for name in setting.live)

    def _share(self, setting: Setting, name: str) -> Float[np.ndarray, " cell"]:
        """Of each live cell of a site, the layers and positions from it on, where no more than these are computed."""
        site, cells, n_layers = parse_site(name), np.argwhere(setting.live[name]), setting.model.arch.n_layers
        tested = edge_support if site.kind == "edges" else support
        way = tested(setting.model).mode if self.engine == "auto" else "literal"
        share = np.ones(len(cells))
        if way != "literal" and site.kind == "edges":
            starts = [setting.model.arch.graph.reader_slice(layer).start for layer in (*range(n_layers), None)]
            share -= (np.searchsorted(starts, cells[:, 1], side="right") - 1) / n_layers
        elif way != "literal" and "layer" in site.axes:
            share -= cells[:, site.axes.index("layer")] / n_layers
        if way == "prefix":
            length = max(len(pair) for pair in setting.task.pairs)
            start = 0 if self.source != "paired" else min(first_difference(batch) for batch in setting.task.batches(len(setting.task), "cpu"))
            axis = next((axis for axis in ("pos", "dest") if axis in site.axes), None)
            named = setting.axis is None or setting.axis.names is not None
            where = np.full(len(cells), start) if axis is None or named else np.maximum(start, cells[:, site.axes.index(axis)])
            share *= 1 - where / length
        return share

    def check(self, setting: Setting) -> None:
        check_edges(setting, self.post_norm)

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        return {} if setting.edges is None else {"keep": setting.targets}

    def resumes(self, setting: Setting) -> bool:
        return self.engine == "auto" and support(setting.model).mode == "prefix" and continues(setting.model)

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        if setting.edges is not None:
            return edge_bytes(setting, rows, length)
        arch = setting.model.arch
        kept = 3 * arch.n_layers * rows * length * arch.d_model
        return (
            activation_bytes(setting, rows, length)
            + itemsize(setting) * (rows * arch.vocab_size + kept)
            + rows * length * token_bytes(setting, length)
        )

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        if setting.edges is not None:
            return Scored({str(setting.edges): score_edges(setting, runs, meter, engine=self.engine, post_norm=self.post_norm)})
        scores = {str(site): np.zeros((len(runs.batch), *setting.live[str(site)].shape)) for site in setting.sites}
        cells = [(str(site), index, where) for site in setting.sites for index, where in addresses(setting, site, setting.live[str(site)])]
        edits = [(Edit(where, runs.source),) for _, _, where in cells]
        effects = patched(setting, runs, meter, edits, engine=self.engine, finished=meter.cells)
        for (name, index, _), effect in zip(cells, effects, strict=True):
            scores[name][(slice(None), *index)] = effect
        return Scored(scores)

    def _provenance(self, setting: Setting, skipped: dict[str, str]) -> dict[str, Any]:
        return {**super()._provenance(setting, skipped), **edge_record(setting, self.post_norm)}


def patched(
    setting: Setting, runs: Runs, meter: Meter, cells: list[Cell], *, engine: str = "auto", finished: dict[int, np.ndarray] | None = None
) -> Float[np.ndarray, "cell batch"]:
    """Exact effects of cells (sets of edits) on one batch, in metric units.

    ``finished`` holds those that were found before, by number, and gets the others as they are found.
    """
    way = support(setting.model) if engine == "auto" else Support("literal", "asked for")
    finished = {} if finished is None else finished
    base = runs.baseline_values.double()

    def found(numbers: list[int], values: Tensor) -> None:
        finished.update(zip(numbers, (values.double() - base).cpu().numpy(), strict=True))
        meter.keep()

    fast = [i for i, cell in enumerate(cells) if way.mode != "literal" and all(edit.address.layer is not None for edit in cell)]
    meter.engine = str(way)
    skip = {place for place, i in enumerate(fast) if i in finished}
    if len(skip) < len(fast):
        work = Work()

        def done(places: list[int], values: Tensor) -> None:
            meter.bar.update(len(places))
            found([fast[place] for place in places], values)

        try:
            sweep(
                setting.model,
                program(setting, runs),
                [cells[i] for i in fast],
                prefix=way.mode == "prefix",
                start=first_difference(runs.batch) if isinstance(runs.source, Kept) and not setting.model.ambient else 0,
                base=runs.base if way.mode == "prefix" else None,
                max_tokens=_max_tokens(setting, runs),
                done=done,
                skip=skip,
                work=work,
            )
        finally:
            meter.forwards += work.forwards + work.cells
            meter.positions += round(work.block_positions / setting.model.arch.n_layers) + work.forwards * runs.baseline_tokens.numel()
    for i in sorted(set(range(len(cells))) - set(fast) - finished.keys()):
        result = meter.run(setting.model, program(setting, runs, edits=cells[i]))
        meter.bar.update(meter.unit == "cell")
        found([i], required(result.values)[None])
    return np.stack([finished[i] for i in range(len(cells))]) if cells else np.zeros((0, len(runs.batch)))


def _max_tokens(setting: Setting, runs: Runs) -> int | None:
    """Rows × positions of a block call that fit into the budget; None for the engine's own choice."""
    if setting.max_memory is None:
        return None
    rows, length = runs.baseline_tokens.shape
    left = setting.max_memory - activation_bytes(setting, rows, length)
    return max(1, int(left // token_bytes(setting, length)))


def addresses(setting: Setting, site: Site, live: np.ndarray) -> Iterator[tuple[tuple[int, ...], Site]]:
    """Index and address of every cell that the mask has."""
    names = None if setting.axis is None else setting.axis.names

    def position(index: dict[str, int], axis: str) -> tuple[Position, ...] | None:
        if axis not in index:
            return None
        return (index[axis] if names is None else names[index[axis]],)

    for cell in map(tuple, np.argwhere(live).tolist()):
        index = dict(zip(site.axes, cell, strict=True))
        yield (
            cell,
            Site(
                site.kind,
                (),
                layer=index.get("layer"),
                head=index.get("head", index.get("kv_head")),
                neuron=index.get("neuron"),
                pos=position(index, "dest" if site.kind == "pattern" else "pos"),
                src=position(index, "src"),
            ),
        )
