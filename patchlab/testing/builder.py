"""Builders of small models, whose weights are set component by component, on named subspaces of its residual stream."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.models import Model, wrap_bridge
from patchlab.testing.toys import native

GAIN = 4.0
"""Logits of a token per unit of its coordinate in the subspace ``out``."""
_JUNK, _OTHERS = 6, 4  # width of junk; tokens that no prompt has
_STRETCH = 0.5  # norm of what a random component makes of a vector of norm 1, at most
_OPEN = 4.0  # what a neuron of a lookup reads when its gate is open


class Builder:
    """A model whose components all write junk, at random, until they are given something to do.

    Args:
        name: of the model.
        sizes: widths of the subspaces that do not overlap: ``token``, ``position``, ``out`` and what the circuit needs. ``junk`` is added.
        n_layers: blocks.
        n_heads: heads per block.
        d_mlp: neurons per block; None for attention alone.
        seed: of the random weights.
    """

    def __init__(self, name: str, sizes: Mapping[str, int], *, n_layers: int, n_heads: int, d_mlp: int | None = None, seed: int = 0) -> None:
        ends = np.cumsum([*sizes.values(), _JUNK]).tolist()
        self.name, self.n_layers, self.n_heads, self.d_mlp = name, n_layers, n_heads, d_mlp
        self.places = {space: slice(end - size, end) for (space, size), end in zip({**sizes, "junk": _JUNK}.items(), ends, strict=True)}
        self.width, self.n_tokens = ends[-1], sizes["token"]
        self.d_head = max(sizes["token"], sizes["position"])
        self.generator = torch.Generator().manual_seed(seed)
        self.written: dict[tuple[int, int | str], str] = {}
        form = {"attn_only": True} if d_mlp is None else {"d_mlp": d_mlp, "act_fn": "gelu"}
        shape = {"n_layers": n_layers, "n_heads": n_heads, "d_head": self.d_head, "d_model": self.width, "d_vocab": self.n_tokens + _OTHERS}
        self.bridge = native(name, {**shape, **form, "n_ctx": sizes["position"]}).bridge
        with torch.no_grad():
            for parameter in self.bridge.parameters():
                parameter.zero_()
            self._embed()
            for layer in range(n_layers):
                for head in range(n_heads):
                    for letter, size in (("q", 2 * self.d_head**0.5), ("k", 1.0), ("v", _STRETCH)):
                        self._rows(layer, letter, head).copy_(size * self._random(self.d_head, self.width))
                    self._columns(layer, head)[self.places["junk"]] = self._random(_JUNK, self.d_head)
                if d_mlp is not None:
                    self._neurons(layer, slice(None))

    def head(self, layer: int, head: int, *, query: str | int, key: str, value: str, write: str, sharpness: float, shift: int = 0) -> None:
        """Make a head attend where coordinate i of ``key`` meets coordinate i + shift of ``query``, and move ``value`` to ``write``.

        A whole number as ``query`` is the coordinate of ``key`` that every position looks for. The score of a match is ``sharpness``, any other zero.
        """
        scale = sharpness * self.d_head**0.5
        with torch.no_grad():
            if isinstance(query, int):
                self._rows(layer, "q", head).zero_()
                self._part(layer, "q").bias[head * self.d_head + query] = scale
            else:
                self._rows(layer, "q", head).copy_(scale * self._reads(query, shift))
            self._rows(layer, "k", head).copy_(self._reads(key))
            self._rows(layer, "v", head).copy_(self._reads(value))
            self._columns(layer, head)[:-_JUNK] = self._reads(write).T[:-_JUNK]
        self.written[layer, head] = write

    def lookup(self, layer: int, *, read: str, gate: int, write: str, rows: Sequence[int]) -> None:
        """Make neuron i write coordinate ``rows[i]`` of ``write`` where coordinate i of ``read`` is 1 and the token is ``gate``.

        It reads 4 there, −4 where one of both fails, −12 where both do. The neurons that are left write junk.
        """
        block, n = self.bridge.blocks[layer].mlp.original_component, len(rows)
        with torch.no_grad():
            self._neurons(layer, slice(n, None))
            block.fc_in.weight[:n] = 2 * _OPEN * self._reads(read)[:n]
            block.fc_in.weight[:n, self.places["token"].start + gate] = 2 * _OPEN
            block.fc_in.bias[:n] = -3 * _OPEN
            block.fc_out.weight[:, :n] = 0.0
            for neuron, row in enumerate(rows):
                block.fc_out.weight[self.places[write].start + row, neuron] = 1 / _OPEN
        self.written[layer, "mlp"] = write

    def model(self, leak: float) -> tuple[Model, float]:
        """The model, and a bound on the norm of junk in its stream, whichever writers are replaced by those of other runs.

        The logits of the tokens read ``out``, and junk with a vector of norm ``leak``; the other logits read the whole stream.
        """
        with torch.no_grad():
            unembed = self.bridge.unembed.original_component.weight
            for token in range(len(unembed)):
                if token < self.n_tokens:
                    unembed[token, self.places["out"].start + token] = GAIN
                    unembed[token, self.places["junk"]] = leak * self._random(1, _JUNK)[0]
                else:
                    unembed[token] = self._random(1, self.width)[0]
        return wrap_bridge(self.bridge, self.name), self._junk()

    def _junk(self) -> float:
        """Bound on junk. What a circuit's component writes has at most norm 1 (1.1 for a lookup, with all tails), so its junk has too."""
        signal, junk = 2.0, 1.0  # squared norm of token and position; norm of junk
        for layer in range(self.n_layers):
            for parts in (range(self.n_heads), () if self.d_mlp is None else ("mlp",)):
                heard = (signal + junk**2) ** 0.5
                for part in parts:
                    known = (layer, part) in self.written
                    signal += 1.21 * known
                    junk += 1.0 if known and part != "mlp" else _STRETCH * heard
        return junk

    def _embed(self) -> None:
        """Tokens and positions as unit vectors of their subspaces, and junk of norm 1 with every token."""
        token, position = self.bridge.embed.original_component.weight, self.bridge.pos_embed.original_component.weight
        token[: self.n_tokens, self.places["token"]] = torch.eye(self.n_tokens, dtype=torch.float64)
        position[:, self.places["position"]] = torch.eye(len(position), dtype=torch.float64)
        for row in token:
            row[self.places["junk"]] = self._random(1, _JUNK)[0]

    def _neurons(self, layer: int, which: slice) -> None:
        """Let neurons read the whole stream and write junk, and others do nothing."""
        mlp = self.bridge.blocks[layer].mlp.original_component
        mlp.fc_in.weight.zero_()
        mlp.fc_out.weight.zero_()
        mlp.fc_in.weight[which] = _STRETCH * self._random(*mlp.fc_in.weight[which].shape)
        mlp.fc_out.weight[self.places["junk"], which] = self._random(_JUNK, mlp.fc_in.weight[which].shape[0])

    def _part(self, layer: int, letter: str) -> torch.nn.Linear:
        return getattr(self.bridge.blocks[layer].attn, letter).original_component

    def _rows(self, layer: int, letter: str, head: int) -> Float[Tensor, "d_head width"]:
        return self._part(layer, letter).weight[head * self.d_head : (head + 1) * self.d_head]

    def _columns(self, layer: int, head: int) -> Float[Tensor, "width d_head"]:
        return self._part(layer, "o").weight[:, head * self.d_head : (head + 1) * self.d_head]

    def _random(self, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        """Random, of spectral norm 1."""
        matrix = torch.randn(rows, columns, generator=self.generator, dtype=torch.float64)
        return matrix / torch.linalg.matrix_norm(matrix, 2)

    def _reads(self, space: str, shift: int = 0) -> Float[Tensor, "d_head width"]:
        """Matrix whose row i reads coordinate i + shift of a subspace."""
        place = self.places[space]
        matrix = torch.zeros(self.d_head, self.width, dtype=torch.float64)
        for i in range(place.stop - place.start - shift):
            matrix[i, place.start + i + shift] = 1.0
        return matrix
