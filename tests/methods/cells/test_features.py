"""Features and errors of dictionaries as cells: their scores against literal twins, their exact effects against hooks set by hand, their sums."""

from typing import Any

import numpy as np
import pytest
import torch
from dictionary_cells import BY_POS, KINDS, LAYERS, Literal, attached, cells, run
from families import swap_task
from torch import Tensor

import patchlab as pl
from patchlab.features import Dictionary


def ends(literal: Literal, direction: str) -> tuple[tuple[int, ...], dict[str, Tensor], dict[str, Tensor]]:
    pair = literal.pair
    ids = (pair.corrupted_ids, pair.clean_ids) if direction == "denoising" else (pair.clean_ids, pair.corrupted_ids)
    return ids[0], literal.values(ids[0]), literal.values(ids[1])


def close(scores: pl.ScoreMap, example: int, features: dict[Any, float], errors: dict[Any, float], rtol: float = 1e-8) -> None:
    """Hold the scores by position of one example against wanted ones; cells that are not there are wanted to be zero."""
    scale = max([abs(value) for value in (*features.values(), *errors.values())] + [1e-12])
    assert scale > 1e-9
    for site, wanted in zip(BY_POS, (features, errors), strict=True):
        got = {cell: float(values[example]) for cell, values in cells(scores, site).items()}
        for cell in wanted.keys() | got.keys():
            assert abs(got.get(cell, 0.0) - wanted.get(cell, 0.0)) <= rtol * scale, (site, cell)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_effects_are_those_of_moving_the_activation_by_hand(kind: str) -> None:
    task = swap_task(n=2)
    with attached(kind=kind) as model:
        scores = run("exact", model, task, BY_POS)
        for example, pair in enumerate(task.pairs):
            literal = Literal(model, pair)
            ids, own, other = ends(literal, "denoising")
            base = literal.metric(ids)
            features, errors = {}, {}
            for layer in literal.dictionaries:
                change = literal.features(other, layer) - literal.features(own, layer)
                for _, pos, feature in change.nonzero().tolist():
                    moves = {}
                    for to in literal.written(layer):
                        moves[to] = torch.zeros_like(literal.activation(own, to))
                        moves[to][0, pos] = change[0, pos, feature] * literal.row(layer, feature, to)
                    features[layer, pos, feature] = literal.metric(ids, moves) - base
            for layer in {to for start in literal.dictionaries for to in literal.written(start)}:
                change = literal.error(other, layer) - literal.error(own, layer)
                for pos in range(change.shape[1]):
                    moves = {layer: torch.zeros_like(change)}
                    moves[layer][0, pos] = change[0, pos]
                    errors[layer, pos] = literal.metric(ids, moves) - base
            close(scores, example, features, errors)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("kind", KINDS)
def test_attribution_is_the_change_times_the_gradient_along_the_row(kind: str, direction: str) -> None:
    task = swap_task(n=2)
    with attached(kind=kind) as model:
        scores = run("atp", model, task, BY_POS, direction)
        for example, pair in enumerate(task.pairs):
            literal = Literal(model, pair)
            ids, own, other = ends(literal, direction)
            _, gradients = literal.metric(ids, grad=True)
            features, errors = {}, {}
            for layer in literal.dictionaries:
                change = literal.features(other, layer) - literal.features(own, layer)
                for _, pos, feature in change.nonzero().tolist():
                    slope = sum(float(gradients[to][0, pos] @ literal.row(layer, feature, to)) for to in literal.written(layer))
                    features[layer, pos, feature] = float(change[0, pos, feature]) * slope
            for layer in {to for start in literal.dictionaries for to in literal.written(start)}:
                change = literal.error(other, layer) - literal.error(own, layer)
                errors |= {(layer, pos): float(change[0, pos] @ gradients[layer][0, pos]) for pos in range(change.shape[1])}
            close(scores, example, features, errors)


def test_integrated_gradients_are_those_of_marks_et_al() -> None:
    """``[1/N Σ_k ∇_a m at (1 − k/N)·a_clean + (k/N)·a_patch] ⊙ (a_patch − a_clean)``, k from 0, one submodule at a time; the error's one number."""
    task, steps = swap_task(n=2), 10
    with attached(kind="topk") as model:
        scores = run(f"ig-activations-left:{steps}", model, task, BY_POS, "noising")
        assert scores.cost.backwards == steps * LAYERS
        for example, pair in enumerate(task.pairs):
            literal = Literal(model, pair)
            ids, own, other = ends(literal, "noising")
            wanted: tuple[dict[Any, float], dict[Any, float]] = {}, {}
            for layer, dictionary in literal.dictionaries.items():
                f_clean, f_patch, e_clean, e_patch = (part(seen, layer) for part in (literal.features, literal.error) for seen in (own, other))
                sums = [torch.zeros_like(f_clean), torch.zeros_like(e_clean)]
                for k in range(steps):
                    f = torch.lerp(f_clean, f_patch, k / steps).requires_grad_()
                    e = torch.lerp(e_clean, e_patch, k / steps).requires_grad_()

                    def splice(value: Tensor, hook: Any, f: Tensor = f, e: Tensor = e, dictionary: Dictionary = dictionary) -> Tensor:
                        return dictionary.decode(f) + e

                    with torch.enable_grad():
                        logits = model.bridge.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(literal.hook(layer), splice)])
                        value = logits[0, -1, list(pair.correct)].mean() - logits[0, -1, list(pair.incorrect)].mean()
                        found = torch.autograd.grad(value, [f, e])
                    sums = [total + one / steps for total, one in zip(sums, found, strict=True)]
                effect = sums[0] * (f_patch - f_clean)
                wanted[0].update({(layer, pos, feature): float(effect[0, pos, feature]) for _, pos, feature in effect.nonzero().tolist()})
                contracted = (sums[1] * (e_patch - e_clean)).sum(-1)[0]
                wanted[1].update({(layer, pos): value for pos, value in enumerate(contracted.tolist())})
            close(scores, example, *wanted)


@pytest.mark.parametrize(
    ("kind", "source"), [("relu", "zero"), ("layer_norm", "mean"), ("resid_mid", "mean"), ("z", "mean_positional"), ("skip", "mean_positional")]
)
def test_other_sources_are_means_and_zeros_of_features(kind: str, source: str) -> None:
    """The mean is over the source prompts, which are not the prompts that are patched."""
    task = swap_task(n=2, length=4, changed=(1,))
    with attached(kind=kind) as model:
        exact, atp = (run(f"{name}@{source}", model, task, BY_POS) for name in ("exact", "atp"))
        literals = [Literal(model, pair) for pair in task.pairs]
        others = [literal.values(literal.pair.clean_ids) for literal in literals]
        for example, literal in enumerate(literals):
            ids, own, _ = ends(literal, "denoising")
            base, gradients = literal.metric(ids, grad=True)
            effects: tuple[dict[Any, float], dict[Any, float]] = {}, {}
            slopes: tuple[dict[Any, float], dict[Any, float]] = {}, {}
            for layer in literal.dictionaries:
                for number, part in enumerate((literal.features, literal.error)):
                    mine, theirs = part(own, layer), torch.cat([part(other, layer) for other in others])
                    end = {"zero": theirs * 0, "mean": theirs.mean((0, 1)), "mean_positional": theirs.mean(0)}[source]
                    end = end[0] if source == "zero" else end
                    change = (end - mine)[0]
                    for pos in range(change.shape[0]):
                        for feature in change[pos].nonzero()[:, 0].tolist() if number == 0 else [None]:
                            vector = change[pos] if feature is None else change[pos, feature] * literal.row(layer, feature, layer)
                            cell = (layer, pos) if feature is None else (layer, pos, feature)
                            slopes[number][cell] = float(vector @ gradients[layer][0, pos])
                            if layer == 1 and slopes[number][cell]:
                                move = torch.zeros_like(literal.activation(own, layer))
                                move[0, pos] = vector
                                effects[number][cell] = literal.metric(ids, {layer: move}) - base
            close(atp, example, *slopes)
            for got, wanted in zip((cells(exact, site) for site in BY_POS), effects, strict=True):
                scale = max(map(abs, wanted.values()))
                assert all(abs(float(got[cell][example]) - value) <= 1e-8 * scale for cell, value in wanted.items())


METHODS = ["atp", "relp", "relp-ah", "attnlrp", "cp-lrp", "gim", "ig:3", "relp+ig:2", "ig-activations-left:3", "clean-corrupted"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["relu", "topk", "layer_norm", "skip", "z", "some_layers", "cross_layer_skip"])
def test_features_error_and_rest_are_the_node_score(kind: str, method: str) -> None:
    """With no rest but biases, features and error alone are the node; what is left is that of the skip or of the normalisation."""
    task = swap_task(n=2)
    with attached("llama", kind) as model:
        literal = Literal(model, task.pairs[0])
        point = literal.kind
        site = f"{point}[layer,pos]" if point == "z" else point
        if kind == "cross_layer_skip" and "activations" in method:
            pytest.skip("each layer's features have a path of their own, and the site another")
        scores = run(method, model, task, [*BY_POS, site])
        check = scores.provenance["self_check"]
        assert max(check["mismatch"]) <= 1e-9 * max(check["largest_node_score"])
        if kind in ("layer_norm", "skip", "cross_layer_skip"):
            return
        node = scores.data[site].sum("pos").to_numpy()
        sums = np.zeros_like(node)
        for part in BY_POS:
            for cell, values in cells(scores, part).items():
                sums[:, cell[0]] += values
        layers = sorted(literal.dictionaries)
        assert np.abs(node).max() > 1e-6
        np.testing.assert_allclose(sums[:, layers], node[:, layers], atol=1e-9 * np.abs(node).max())


@pytest.mark.parametrize("kind", ["skip", "layer_norm"])
def test_the_rest_is_the_skip_or_what_normalisation_adds(kind: str) -> None:
    task = swap_task(n=1)
    with attached(kind=kind) as model:
        literal = Literal(model, task.pairs[0])
        scores = run("atp", model, task, [*BY_POS, literal.kind])
        ids, own, other = ends(literal, "denoising")
        _, gradients = literal.metric(ids, grad=True)
        node = scores.data[literal.kind].sum("pos").to_numpy()[0]
        for layer, dictionary in literal.dictionaries.items():
            x, y = (literal.input(seen, layer) for seen in (own, other))
            rest = [dictionary.decode(torch.zeros(*z.shape[:-1], dictionary.n_features, dtype=z.dtype), z) for z in (x, y)]
            wanted = float(((rest[1] - rest[0]) * gradients[layer]).sum())
            parts = sum(float(values[0]) for site in BY_POS for cell, values in cells(scores, site).items() if cell[0] == layer)
            assert abs(parts + wanted - node[layer]) <= 1e-9 * np.abs(node).max()
            assert abs(wanted) > 1e-6 * np.abs(node).max()
