"""Models with dictionaries, and forward passes by hand that read, reconstruct and move what they are on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from families import model_of
from torch import Tensor

import patchlab as pl
from patchlab.adapters.dictionaries import FeatureSite
from patchlab.features import AbsTopK, Dictionary, JumpRelu, LayerNorm, TopK
from patchlab.methods import get_method
from patchlab.models import Model
from patchlab.testing.dictionaries import random_dictionary

LAYERS = 3
BY_POS = ["features[layer,pos,feature]", "error[layer,pos]"]


def saes(model: Model, reads: str = "resid_post", **options: Any) -> list[Dictionary]:
    """A dictionary per layer, of different widths."""
    return [random_dictionary(model, reads, layer, width=20 + 4 * layer, seed=layer, **options) for layer in range(LAYERS)]


def jump(model: Model) -> list[Dictionary]:
    return [replace(one, activation=JumpRelu(torch.full((one.n_features,), 0.3, dtype=model.dtype))) for one in saes(model)]


DICTIONARIES: dict[str, Callable[[Model], list[Dictionary]]] = {
    "relu": saes,
    "topk": lambda model: saes(model, activation=TopK(4)),
    "abstopk": lambda model: saes(model, activation=AbsTopK(4), subtract_b_dec=True),
    "jumprelu": jump,
    "resid_pre": lambda model: saes(model, "resid_pre"),
    "resid_mid": lambda model: saes(model, "resid_mid"),
    "attn_out": lambda model: saes(model, "attn_out"),
    "mlp_out": lambda model: saes(model, "mlp_out"),
    "z": lambda model: saes(model, "z"),
    "layer_norm": lambda model: saes(model, normalise=LayerNorm()),
    "some_layers": lambda model: [random_dictionary(model, layer=1)],
    "multi_layer": lambda model: [random_dictionary(model, layer=None, kind="multi_layer")],
    "transcoder": lambda model: saes(model, kind="transcoder"),
    "skip": lambda model: saes(model, kind="transcoder", skip=True),
    "codebook": lambda model: [random_dictionary(model, layer=layer, kind="codebook", seed=layer) for layer in range(LAYERS)],
    "cross_layer": lambda model: saes(model, kind="cross_layer_transcoder"),
    "cross_layer_skip": lambda model: saes(model, kind="cross_layer_transcoder", skip=True),
}
KINDS = list(DICTIONARIES)


@contextmanager
def attached(family: str = "gpt2", kind: str = "relu", dtype: torch.dtype = torch.float64) -> Iterator[Model]:
    """A model with dictionaries, until the block ends."""
    model = model_of(family, dtype)
    plain = model.arch
    try:
        model.add_dictionaries(DICTIONARIES[kind](model))
        yield model
    finally:
        model.arch = plain


def run(method: Any, model: Model, task: Any, sites: Any = ("features", "error"), direction: str = "denoising", **options: Any) -> pl.ScoreMap:
    method = get_method(method) if isinstance(method, str) else method
    return method.run(model, task, list(sites), direction=direction, progress=False, **options)


def cells(scores: pl.ScoreMap, site: str) -> dict[tuple[int, ...], np.ndarray]:
    """Effects per example of each cell of a site."""
    name = scores.site_name(site)
    return dict(zip(map(tuple, scores.cells(name).tolist()), scores.data[name].to_numpy().T, strict=True))


class Literal:
    """A forward pass by hand: what is read, what is reconstructed and left out, and the metric with any of it moved."""

    def __init__(self, model: Model, pair: Any) -> None:
        self.model, self.pair = model, pair
        (accessor,) = (one for one in model.arch.accessors.values() if isinstance(one, FeatureSite))
        self.point = accessor.point
        self.kind = self.point.name
        self.dictionaries = {layer: one.dictionary for layer, one in self.point.of.items()}

    def hook(self, layer: int) -> str:
        return self.model.arch.accessors[self.kind].host(layer)

    def read_hook(self, layer: int) -> str:
        one = self.point.of[layer]
        return self.hook(layer) if one.reads is None else one.reads

    def values(self, ids: tuple[int, ...]) -> dict[str, Tensor]:
        """What stands at the hooks, detached."""
        names = {name for layer in range(LAYERS) for name in (self.hook(layer), *([self.read_hook(layer)] if layer in self.dictionaries else []))}
        names |= {f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS)}
        with torch.no_grad():
            _, cache = self.model.bridge.run_with_cache(torch.tensor([ids]), names_filter=sorted(names))
        return {name: cache[name].detach() for name in names}

    def activation(self, seen: dict[str, Tensor], layer: int) -> Tensor:
        """The point of a layer, [1, pos, d]."""
        value = seen[self.hook(layer)]
        if self.kind == "resid_mid":
            value = value + seen[f"blocks.{layer}.hook_resid_pre"]
        return value.flatten(2)

    def input(self, seen: dict[str, Tensor], layer: int) -> Tensor:
        return self.activation(seen, layer) if self.point.of[layer].reads is None else seen[self.read_hook(layer)]

    def shaped(self, layer: int, x: Tensor) -> Tensor:
        heads = self.dictionaries[layer].heads
        return x if heads is None else x.unflatten(-1, (heads, -1))

    def features(self, seen: dict[str, Tensor], layer: int) -> Tensor:
        """Features with their scale."""
        x = self.shaped(layer, self.input(seen, layer))
        return self.dictionaries[layer].encode(x) * self.dictionaries[layer].scale(x)

    def reconstruction(self, seen: dict[str, Tensor], layer: int) -> Tensor:
        found = torch.zeros_like(self.activation(seen, layer))
        for start, dictionary in self.dictionaries.items():
            if layer not in self.written(start):
                continue
            x = self.shaped(start, self.input(seen, start))
            whole = dictionary.reconstruct(x)
            found = found + whole[..., layer - start, :] if dictionary.kind == "cross_layer_transcoder" else whole.flatten(2)
        return found

    def error(self, seen: dict[str, Tensor], layer: int) -> Tensor:
        return self.activation(seen, layer) - self.reconstruction(seen, layer)

    def row(self, layer: int, feature: int, to: int) -> Tensor:
        w_dec = self.dictionaries[layer].w_dec[feature]
        return w_dec[to - layer] if w_dec.ndim == 2 else w_dec

    def written(self, layer: int) -> list[int]:
        return list(range(layer, LAYERS)) if self.dictionaries[layer].kind == "cross_layer_transcoder" else [layer]

    def metric(self, ids: tuple[int, ...], moves: dict[int, Tensor] | None = None, grad: bool = False) -> Any:
        """The metric with the point of some layers moved; its gradients at all points if asked for."""
        leaves: dict[int, Tensor] = {}

        def at(layer: int) -> Callable[..., Tensor]:
            def hook(value: Tensor, hook: Any) -> Tensor:
                moved = value if moves is None or layer not in moves else value + moves[layer].reshape(value.shape)
                leaves[layer] = moved.view_as(moved) if moved.requires_grad else moved.detach().requires_grad_()
                return leaves[layer]

            return hook

        hooks = [(self.hook(layer), at(layer)) for layer in range(LAYERS)]
        with torch.set_grad_enabled(grad):
            logits = self.model.bridge.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)
            value = logits[0, -1, list(self.pair.correct)].mean() - logits[0, -1, list(self.pair.incorrect)].mean()
            if not grad:
                return float(value)
            gradients = torch.autograd.grad(value, [leaves[layer] for layer in range(LAYERS)])
        return float(value.detach()), [gradient.flatten(2) for gradient in gradients]
