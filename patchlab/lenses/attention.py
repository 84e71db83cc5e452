"""Attention: where heads look, and on how many tokens."""

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float

from patchlab.engine import Program, run
from patchlab.errors import LensError
from patchlab.lenses.rows import Prompts, rows_of, token_text
from patchlab.models import Model

STATISTICS = ("entropy", "effective", "count", "share")


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention patterns of every head, and how spread out they are.

    Attributes:
        subject: model and prompts.
        patterns: ``[example, layer, head, dest, src]``; rows sum to 1. Coordinates: ``token[example, dest]`` and ``src_token[example, src]``.
        positions: of named positions, ``[example]`` each.
        mass: the share of attention that :meth:`statistics` counts tokens for.
    """

    subject: str
    patterns: xr.DataArray
    positions: dict[str, np.ndarray]
    mass: float = 0.9

    def pattern(self, head: str, example: int | None = 0) -> Float[np.ndarray, "dest src"]:
        """The pattern of a head such as ``a5.h3`` on one example (None: the mean over examples).

        Raises:
            LensError: no such head or example.
        """
        layer, number = self._head(head)
        own = self.patterns.sel(layer=layer).isel(head=number)
        if example is not None and not 0 <= example < own.sizes["example"]:
            raise LensError(f"example is {example}; there are {own.sizes['example']}, from 0.")
        return (own.mean("example") if example is None else own.isel(example=example)).to_numpy()

    def statistics(self) -> xr.Dataset:
        """How spread out each row of each pattern is, ``[example, layer, head, dest]``.

        ``entropy`` in nats; ``effective``, the effective number of tokens attended to, is its exponential; ``count`` is the smallest number of tokens
        that hold :attr:`mass` of the attention, and ``share`` the same over the number of tokens that there are up to the position.
        """
        p = self.patterns.to_numpy().astype(np.float64)
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)
        largest = -np.sort(-p, axis=-1)
        held = np.cumsum(largest, -1)
        # a row in float32 sums to a little less than 1
        count = 1 + (held < self.mass * held[..., -1:] - 1e-9).sum(-1)
        share = count / np.arange(1, p.shape[-1] + 1)
        dims = ("example", "layer", "head", "dest")
        found = {"entropy": entropy, "effective": np.exp(entropy), "count": count, "share": share}
        coords = {name: self.patterns.coords[name] for name in ("layer", "token")}
        return xr.Dataset({name: (dims, value) for name, value in found.items()}).assign_coords(coords)

    def at(self, statistic: str, position: str | int = "END") -> xr.DataArray:
        """Means over examples of a statistic at one position, ``[layer, head]``.

        Raises:
            LensError: an unknown statistic, or a position that not all prompts have.
        """
        if statistic not in STATISTICS:
            raise LensError(f"unknown statistic {statistic!r}; there are {', '.join(STATISTICS)}.")
        values = self.statistics()[statistic]
        n = values.sizes["example"]
        if isinstance(position, str):
            if position not in self.positions:
                raise LensError(f"not all prompts have a position {position!r}; they have {', '.join(self.positions)}, and numbers.")
            where = self.positions[position]
        else:
            where = np.full(n, position)
            if not -values.sizes["dest"] <= position < values.sizes["dest"]:
                raise LensError(f"position {position} is outside of prompts of {values.sizes['dest']} tokens.")
        picked = values.to_numpy()[np.arange(n), :, :, where]
        return xr.DataArray(picked.mean(0), dims=("layer", "head"), coords={"layer": values["layer"]}, name=statistic)

    def table(self, position: str | int = "END") -> pd.DataFrame:
        """The statistics of every head at a position, means over examples."""
        parts = {statistic: self.at(statistic, position) for statistic in STATISTICS}
        first = parts["entropy"]
        names = [f"a{int(layer)}.h{head}" for layer in first["layer"].to_numpy() for head in range(first.sizes["head"])]
        return pd.DataFrame({"head": names, **{statistic: part.to_numpy().ravel() for statistic, part in parts.items()}})

    def show(self, position: str | int = "END") -> None:
        """Write :meth:`table` to standard output."""
        sys.stdout.write(self.table(position).to_string(index=False, float_format=lambda value: f"{value:.2f}") + "\n")

    def _head(self, head: str) -> tuple[int, int]:
        layer, _, number = head.lower().replace("l", "a", 1).removeprefix("a").partition(".h")
        layers = self.patterns["layer"].to_numpy().tolist()
        if not (layer.isdigit() and number.isdigit()) or int(layer) not in layers or int(number) >= self.patterns.sizes["head"]:
            heads = self.patterns.sizes["head"]
            raise LensError(
                f"there is no head {head!r}; heads are written a5.h3, with layers {layers[0]} to {layers[-1]} and heads 0 to {heads - 1}."
            )
        return int(layer), int(number)

    def __repr__(self) -> str:
        sizes = self.patterns.sizes
        return f"Attention({self.subject}) {sizes['layer']} layers × {sizes['head']} heads, {sizes['example']} examples of {sizes['dest']} tokens"


def attention(model: Model, prompts: Prompts, *, side: str = "clean", mass: float = 0.9, batch_size: int | None = None) -> Attention:
    """Attention patterns of every head on prompts of one length.

    Args:
        model: the model.
        prompts: a task, a text, texts or rows of token ids.
        side: of a task, ``clean`` or ``corrupted``.
        mass: the share of attention that tokens are counted for.
        batch_size: rows per forward pass.

    Raises:
        SiteError: a model whose patterns no hook shows.
        LensError: prompts of several lengths, or patterns whose rows do not sum to 1 (attention sinks).
    """
    if not 0 < mass < 1:
        raise LensError(f"mass is {mass}; it is a share of the attention between 0 and 1.")
    rows = rows_of(model, prompts, side=side, batch_size=batch_size)
    lengths = sorted({batch.tokens.shape[1] for batch in rows.batches})
    if len(lengths) > 1:
        raise LensError(f"patterns of prompts of {lengths} tokens do not line up; choose prompts of one length (task.select(...)).")
    n, layers = len(rows), model.arch.n_layers
    found = np.zeros((n, layers, model.arch.n_heads, lengths[0], lengths[0]), dtype=np.float32)
    ids = np.zeros((n, lengths[0]), dtype=int)
    names = set(rows.batches[0].positions).intersection(*(batch.positions for batch in rows.batches))
    positions = {name: np.zeros(n, dtype=int) for name in names}
    keep = tuple(("pattern", layer) for layer in range(layers))
    for batch in rows.batches:
        with torch.no_grad():
            kept = run(model, Program(batch.tokens, batch.examples, positions=batch.positions, keep=keep)).activations
        examples = batch.examples.cpu().numpy()
        for layer in range(layers):
            found[examples, layer] = kept["pattern", layer].float().cpu().numpy()
        ids[examples] = batch.tokens.cpu().numpy()
        for name in names:
            positions[name][examples] = batch.positions[name].cpu().numpy()
    off = float(np.abs(found.sum(-1) - 1).max())
    if off > 0.02:
        raise LensError(f"rows of attention patterns of {model.name} do not sum to 1 (off by {off:.2g}: attention sinks?), so they have no entropy.")
    texts = np.array([[token_text(model, token) for token in row] for row in ids.tolist()], dtype=object)
    coords = {"layer": np.arange(layers), "token": (("example", "dest"), texts), "src_token": (("example", "src"), texts)}
    data = xr.DataArray(found, dims=("example", "layer", "head", "dest", "src"), coords=coords, name="pattern")
    subject = rows.subject if side == "clean" else f"{rows.subject}, {side}"
    return Attention(subject, data, positions, mass)
