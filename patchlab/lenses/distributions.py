"""Distributions: the tokens that states make likely, by layer and position."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from patchlab.engine import Program, run
from patchlab.errors import LensError, MetricError
from patchlab.host import precise, to_array
from patchlab.lenses.head import head_logits
from patchlab.lenses.linear_map import LinearMap
from patchlab.lenses.rows import RowBatch, Rows, batch_rows, token_text
from patchlab.metrics import Answers, Metric
from patchlab.models import Model

Maps = Mapping[int, LinearMap | None]


@dataclass(frozen=True, eq=False)
class Distributions:
    """Token distributions of a readout, ``[example, layer, pos]``.

    Attributes:
        name: of the readout.
        subject: model and prompts.
        data: ``top_id`` and ``top_probability`` ``[example, layer, pos, rank]``; ``entropy`` and ``kl`` (of the model's own distribution from the
            readout's) in nats, ``[example, layer, pos]``. With a task also ``metric``, ``correct`` and ``incorrect`` (summed probability of the
            answers) and ``rank`` (how many tokens are likelier than the best correct one), ``[example, layer]``, at the last position.
            Coordinates: the number of the layer, and ``token`` ``[example, pos]``.
        texts: of the tokens in ``top_id``.
        metric: name and unit of the task's metric.
        roles: names of the positions, "" where there is none.
    """

    name: str
    subject: str
    data: xr.Dataset
    texts: Mapping[int, str]
    metric: tuple[str, str] | None = None
    roles: tuple[str, ...] = ()

    @property
    def layers(self) -> list[int]:
        """The layers."""
        return [int(layer) for layer in self.data["layer"].to_numpy()]

    def top(self, example: int = 0) -> np.ndarray:
        """The text of the most likely token, ``[layer, pos]``."""
        ids = self.data["top_id"].to_numpy()[example, :, :, 0]
        return np.array([[self.texts[int(token)] for token in row] for row in ids], dtype=object)

    def table(self, example: int = 0) -> pd.DataFrame:
        """The most likely token by layer (rows) and position (columns), with its probability."""
        probability = self.data["top_probability"].to_numpy()[example, :, :, 0]
        cells = [[f"{text!r} {p:.2f}" for text, p in zip(*row, strict=True)] for row in zip(self.top(example), probability, strict=True)]
        tokens = [f"{pos} {text!r}" for pos, text in enumerate(self.data["token"].to_numpy()[example])]
        return pd.DataFrame(cells, columns=tokens, index=pd.Index(self.layers, name="layer"))

    def trajectory(self) -> pd.DataFrame:
        """Means over examples, by layer, of the metric, the answers' probabilities and the rank of the best correct one.

        Raises:
            LensError: plain prompts, which have no answers.
        """
        if self.metric is None:
            raise LensError("plain prompts have no answers to follow; read a task.")
        names = [name for name in ("metric", "correct", "incorrect", "rank") if name in self.data]
        return pd.DataFrame({"layer": self.layers, **{name: self.data[name].mean("example").to_numpy() for name in names}})

    def show(self, example: int = 0) -> None:
        """Write :meth:`table` to standard output."""
        sys.stdout.write(self.table(example).to_string() + "\n")

    def __repr__(self) -> str:
        sizes = self.data.sizes
        return f"Distributions({self.name}, {self.subject}) {sizes['example']} examples, {sizes['layer']} layers, {sizes['pos']} positions"


def distributions(model: Model, rows: Rows, maps: Maps, *, name: str, site: str, top: int) -> Distributions:
    """Distributions of mapped states at every position of an axis.

    Raises:
        LensError: fewer or more top tokens than there are.
        MetricError: a metric of all positions, where the examples' positions do not line up by index.
    """
    if not 1 <= top <= model.vocab_size:
        raise LensError(f"top is {top}; {model.name} has {model.vocab_size} tokens, so it is from 1 to that.")
    if rows.metric is not None and rows.metric.reads == "all":
        raise MetricError(f"the metric {rows.metric.name} reads all positions, and a readout gives a value at the answer position. Use logit_diff.")
    sizes = {"example": len(rows), "layer": len(maps), "pos": len(rows.axis), "rank": top}
    found: dict[str, np.ndarray] = {
        "top_id": np.zeros(tuple(sizes.values()), dtype=np.int64),
        "top_probability": np.zeros(tuple(sizes.values())),
        **{part: np.zeros((sizes["example"], sizes["layer"], sizes["pos"])) for part in ("entropy", "kl")},
    }
    if rows.metric is not None:
        found |= {part: np.zeros((sizes["example"], sizes["layer"])) for part in ("metric", "correct", "incorrect", "rank")}
    for whole in rows.batches:
        for batch in _pieces(model, whole):
            _fill(model, rows, batch, maps, site, top, found)
    dims = {"top_id": ("example", "layer", "pos", "rank"), "top_probability": ("example", "layer", "pos", "rank")}
    shapes = {part: dims.get(part, ("example", "layer", "pos")[: array.ndim]) for part, array in found.items()}
    data = xr.Dataset({part: (shapes[part], array) for part, array in found.items()})
    data = data.assign_coords(layer=("layer", list(maps)), token=(("example", "pos"), np.array(rows.axis.tokens, dtype=object)))
    texts = {token: token_text(model, token) for token in np.unique(found["top_id"]).tolist()}
    metric = None if rows.metric is None else (rows.metric.name, rows.metric.unit)
    subject = rows.subject if rows.side == "clean" else f"{rows.subject}, {rows.side}"
    return Distributions(name, subject, data, texts, metric, rows.axis.roles)


def _pieces(model: Model, batch: RowBatch) -> list[RowBatch]:
    """Parts of a batch whose logits fit in memory."""
    size = batch_rows(model, batch.tokens.shape[1])
    parts = (torch.arange(i, min(i + size, len(batch))) for i in range(0, len(batch), size))
    return [
        RowBatch(
            batch.tokens[part],
            batch.examples[part],
            {name: at[part] for name, at in batch.positions.items()},
            None if batch.answers is None else batch.answers.rows(part),
            batch.clean[part],
        )
        for part in parts
    ]


def _fill(model: Model, rows: Rows, batch: RowBatch, maps: Maps, site: str, top: int, found: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        keep = tuple((site, layer) for layer in maps)
        plain = run(model, Program(batch.tokens, batch.examples, positions=batch.positions, keep=keep, logits="all"))
        at = rows.at(batch)
        examples, lines = batch.examples.cpu().numpy(), torch.arange(len(batch), device=at.device)[:, None]
        own = _wide(plain.logits)[lines, at].log_softmax(-1)
        answers = _with_reference(model, rows.metric, batch)
        for i, (layer, linear) in enumerate(maps.items()):
            states = plain.activations[site, layer]
            read, last = (_mapped(model, linear, part) for part in (states[lines, at], states[:, -1]))
            log_p = read.log_softmax(-1)
            likeliest, ids = log_p.topk(top, -1)
            found["top_id"][examples, i], found["top_probability"][examples, i] = _numpy(ids), _numpy(likeliest.exp())
            found["entropy"][examples, i] = _numpy(-_expected(log_p, log_p))
            found["kl"][examples, i] = _numpy(_expected(own, own - log_p))
            if rows.metric is not None and answers is not None:
                for name, value in _answered(rows.metric, last, answers).items():
                    found[name][examples, i] = _numpy(value)


def _wide(logits: Any) -> Float[Tensor, "*rows vocab"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mapped(model: Model, linear: LinearMap | None, states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows vocab"]:
    return _wide(head_logits(model, states if linear is None else linear(states)))


def _expected(log_p: Float[Tensor, "*rows vocab"], values: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """The mean of values under a distribution; where it is zero they do not count."""
    p = log_p.exp()
    return torch.where(p > 0, p * values, 0.0).sum(-1)


def _with_reference(model: Model, metric: Metric | None, batch: RowBatch) -> Answers | None:
    if metric is None or batch.answers is None or not metric.needs_clean:
        return batch.answers
    clean = run(model, Program(batch.clean, batch.examples, positions=batch.positions, logits="answer"))
    return replace(batch.answers, clean_logits=_wide(clean.logits))


def _answered(metric: Metric, logits: Float[Tensor, "row vocab"], answers: Answers) -> dict[str, Float[Tensor, " row"]]:
    p = logits.softmax(-1)
    chosen = logits.gather(-1, answers.correct).masked_fill(~answers.correct_mask, -torch.inf).amax(-1, keepdim=True)
    return {
        "metric": metric(logits, answers),
        "correct": p.gather(-1, answers.correct).masked_fill(~answers.correct_mask, 0.0).sum(-1),
        "incorrect": p.gather(-1, answers.incorrect).masked_fill(~answers.incorrect_mask, 0.0).sum(-1),
        "rank": (logits > chosen).sum(-1).to(logits.dtype),
    }


def _numpy(value: Tensor) -> np.ndarray:
    return value.cpu().numpy() if not value.is_floating_point() else to_array(value)


def fidelity(model: Model, rows: Rows, maps: Maps, *, skip_first: int) -> pd.DataFrame:
    """R², KL and agreement of readouts with the model's output, by layer, over the positions from ``skip_first`` on.

    Raises:
        LensError: no positions are left.
    """
    last = model.arch.n_layers - 1
    sums = {layer: np.zeros(3) for layer in maps}  # squared error, KL, agreement
    moments, count = [torch.zeros(()), torch.zeros(())], 0
    for whole in rows.batches:
        for batch in _pieces(model, whole):
            with torch.no_grad():
                keep = tuple(dict.fromkeys((*(("resid_post", layer) for layer in maps), ("resid_post", last))))
                plain = run(model, Program(batch.tokens, batch.examples, positions=batch.positions, keep=keep, logits="all"))
                own = _wide(plain.logits)[:, skip_first:].log_softmax(-1)
                final = precise(plain.activations["resid_post", last][:, skip_first:].flatten(0, 1))
                moments[0] = moments[0] + final.sum(0)
                moments[1] = moments[1] + final.square().sum(0)
                count += len(final)
                for layer, linear in maps.items():
                    states = plain.activations["resid_post", layer][:, skip_first:]
                    mapped = states if linear is None else linear(states)
                    log_p = _wide(head_logits(model, mapped)).log_softmax(-1)
                    error = (precise(mapped.flatten(0, 1)) - final).square().sum()
                    same = (log_p.argmax(-1) == own.argmax(-1)).sum()
                    sums[layer] += [float(error), float(_expected(own, own - log_p).sum()), float(same)]
    if not count:
        raise LensError(f"no positions are left after the first {skip_first}; give longer rows, or a smaller skip_first.")
    spread = float((moments[1] - moments[0].square() / count).sum())
    return pd.DataFrame(
        [{"layer": layer, "r2": 1 - error / spread, "kl": kl / count, "agreement": same / count} for layer, (error, kl, same) in sums.items()]
    )
