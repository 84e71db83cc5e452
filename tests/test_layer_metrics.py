"""Layer metrics against their formulas, written out once more, and what is refused."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from families import VOCAB, model_of, swap_task

import patchlab as pl
from patchlab import layer_metrics
from patchlab.errors import LensError, MetricError
from patchlab.layer_metrics import METRICS, States, curvature, jackknifed, lidar_rank, prompt_entropy, ridge_choice, two_nn
from patchlab.texts import Texts


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def corpus(n=24, lengths=(7, 9), seed=0):
    rng = np.random.default_rng(seed)
    return Texts("random", tuple(rng.integers(0, VOCAB, lengths[i % len(lengths)]) for i in range(n)))


def made(*texts, labels=None, layers=2, seed=0):
    """States of given first-layer texts; a later layer is a fixed curved function of them."""
    tokens = tuple(np.arange(len(own)) + 100 * i for i, own in enumerate(texts))
    of = tuple(tuple(np.tanh(own * (1 + layer)) if layer else own for own in texts) for layer in range(layers))
    return States(tokens, of, None if labels is None else np.array(labels), seed)


def test_prompt_entropy_is_that_of_the_gram_matrix():
    x = drawn(6, 4)
    z = [row - x.mean(0) for row in x]
    z = [row / math.sqrt(sum(v * v for v in row)) for row in z]
    gram = np.array([[max(sum(a * b for a, b in zip(i, j, strict=True)), 0) for j in z] for i in z])
    values = [v.real for v in np.linalg.eigvals(gram) if v.real > 0]
    expected = -sum(v / sum(values) * math.log(v / sum(values)) for v in values) / math.log(4)
    assert prompt_entropy(x) == pytest.approx(expected, rel=1e-9)
    assert prompt_entropy(np.ones((5, 3))) == 0
    assert prompt_entropy(np.array([[1.0, 0], [-1, 0], [2, 0], [-2, 0]])) == pytest.approx(1.0), "two opposite directions, whose product is cut to 0"


def test_curvature_is_the_mean_angle_of_successive_steps():
    assert curvature(np.array([[0.0, 0], [1, 0], [2, 0], [2, 1]])) == pytest.approx((0 + math.pi / 2) / 2)
    x = drawn(5, 3)
    angles = []
    for t in range(3):
        a, b = x[t + 1] - x[t], x[t + 2] - x[t + 1]
        angles.append(math.acos(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))))
    assert curvature(x) == pytest.approx(sum(angles) / 3)


def test_anisotropy_is_the_share_of_the_largest_singular_value():
    texts = [drawn(5, 4, seed=i) * [3, 1, 1, 0.5] for i in range(12)]
    found = METRICS["anisotropy"].function(made(*texts), 1)
    x = np.tanh(np.concatenate(texts) * 2)
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert found.value == pytest.approx(singular[0] ** 2 / (singular**2).sum())
    assert found.low < found.value < found.high


def test_the_dimension_is_the_slope_over_neighbour_ratios():
    texts = [drawn(6, 3, seed=i) for i in range(9)]
    points = np.concatenate(texts)
    ratios = []
    for i in range(len(points)):
        ranked = sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)
        ratios.append(math.log(ranked[1] / ranked[0]))
    ratios.sort()
    n, top = len(ratios), int(0.9 * len(ratios))
    pairs = [(r, -math.log(1 - (i + 1) / n)) for i, r in enumerate(ratios[:top])]
    expected = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    assert METRICS["dimension"].function(made(*texts), 0).value == pytest.approx(expected)


def test_the_dimension_of_a_plane_in_space_is_two():
    plane = np.random.default_rng(0).uniform(size=(900, 2)) @ drawn(2, 10, seed=1)
    found = METRICS["dimension"].function(made(*np.split(plane, 30)), 0)
    assert found.value == pytest.approx(2, abs=0.25)
    assert found.low < 2 < found.high
    assert two_nn(np.array([1.0, 1.0]), np.array([math.e, math.e**2])) == pytest.approx(math.log(2) / 1, abs=1e-12)


def test_states_of_one_beginning_count_once():
    """The first token of all texts is one state: distances of 0 would have no ratio."""
    texts = [np.concatenate([np.ones((1, 3)), drawn(5, 3, seed=i)]) for i in range(6)]
    tokens = tuple(np.array([0, *range(10 * i + 1, 10 * i + 6)]) for i in range(6))
    states = States(tokens, (tuple(texts),))
    assert [own.tolist() for own in states.distinct] == [[True] * 6] + [[False] + [True] * 5] * 5
    assert np.isfinite(METRICS["dimension"].function(states, 0).value)


@pytest.mark.parametrize("delta", [False, True])
def test_linearity_is_held_out_r2(delta):
    states = made(*(drawn(6, 3, seed=i) for i in range(15)))
    name = "linearity_of_delta" if delta else "linearity"
    found = METRICS[name].function(states, 1)
    held = [i for group in states.groups[:2] for i in group]
    stack = lambda which, layer: np.concatenate([states.of[layer][i] for i in which])  # noqa: E731
    fitted = [i for i in range(15) if i not in held]
    x, y = stack(fitted, 0), stack(fitted, 1) - (stack(fitted, 0) if delta else 0)
    wide = np.concatenate([x, np.ones((len(x), 1))], 1)
    weights = np.linalg.lstsq(wide, y, rcond=None)[0]
    new, wanted = stack(held, 0), stack(held, 1) - (stack(held, 0) if delta else 0)
    left = ((np.concatenate([new, np.ones((len(new), 1))], 1) @ weights - wanted) ** 2).sum()
    assert found.value == pytest.approx(1 - left / ((wanted - wanted.mean(0)) ** 2).sum(), rel=1e-4)
    assert found.low <= found.value <= found.high


def test_an_affine_layer_is_linear_and_its_map_is_not_fitted_to_the_texts_that_measure_it():
    texts = [drawn(6, 3, seed=i) for i in range(15)]
    affine = States(made(*texts).tokens, (tuple(texts), tuple(own @ drawn(3, 3, seed=9) + 2 for own in texts)))
    assert METRICS["linearity"].function(affine, 1).value == pytest.approx(1, abs=1e-5)
    noise = States(affine.tokens, (tuple(texts), tuple(drawn(6, 3, seed=50 + i) for i in range(15))))
    assert METRICS["linearity"].function(noise, 1).value < 0.1


def test_lidar_is_the_rank_of_the_generalised_eigenvalues():
    x, labels = drawn(30, 4), np.arange(30) % 5
    x = x + drawn(5, 4, seed=3)[labels] * 2
    means = np.array([x[labels == c].mean(0) for c in range(5)])
    within = sum((x[labels == c] - means[c]).T @ (x[labels == c] - means[c]) / 6 for c in range(5)) / 5 + 1e-4 * np.eye(4)
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / 5
    values = scipy.linalg.eigh(between, within, eigvals_only=True)
    share = values / values.sum()
    assert lidar_rank(x, labels) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-6)


def test_the_probe_is_ridge_regression_on_one_hot_labels():
    x, new, labels = drawn(20, 3), drawn(9, 3, seed=5), np.array([3, 7] * 10)
    z = (x - x.mean(0)) / math.sqrt(((x - x.mean(0)) ** 2).mean())
    wide = np.concatenate([z, math.sqrt(0.01 * 20) * np.eye(3)])
    choice = []
    for one in (3, 7):
        target = (labels == one) - (labels == one).mean()
        choice.append(np.linalg.lstsq(wide, np.concatenate([target, np.zeros(3)]), rcond=None)[0])
    scores = (new - x.mean(0)) / math.sqrt(((x - x.mean(0)) ** 2).mean()) @ np.array(choice).T
    assert ridge_choice(x, labels, new).tolist() == [(3, 7)[i] for i in scores.argmax(1)]


def test_a_probe_finds_what_is_there_and_not_what_is_not():
    labels = np.arange(40) % 2
    states = made(*(drawn(4, 3, seed=i) + 3 * (i % 2) for i in range(40)), labels=labels)
    assert METRICS["probe"].function(states, 0).value == 1
    noise = made(*(drawn(4, 3, seed=i) for i in range(40)), labels=labels)
    assert 0.2 < METRICS["probe"].function(noise, 0).value < 0.8
    same = States(tuple(np.arange(4) for _ in range(40)), noise.of, np.arange(40) % 2)
    assert METRICS["probe"].function(same, 0).value == 0, "texts that are equal are never on both sides"


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = drawn(10)
    states = made(*(np.full((3, 1), value) for value in x))
    found = jackknifed(states, lambda kept: float(x[kept].mean()))
    error = x.std(ddof=1) / math.sqrt(10)
    assert (found.value, found.low, found.high) == pytest.approx((x.mean(), x.mean() - 1.96 * error, x.mean() + 1.96 * error))


def test_states_are_those_of_the_run_in_the_order_of_the_texts():
    model, texts = model_of("llama", torch.float64), corpus()
    states = layer_metrics.states_of(model, texts, skip_first=2)
    for i in (0, 1, 23):
        run = model.run(texts[i].tolist(), keep=["resid_pre", "resid_post"])
        np.testing.assert_allclose(states.of[0][i], run["L0.resid_pre"][0, 2:], atol=1e-12)
        for layer in range(model.arch.n_layers):
            np.testing.assert_allclose(states.of[layer + 1][i], run[f"L{layer}.resid_post"][0, 2:], atol=1e-12)
    assert all(new.all() for new in states.distinct)


def test_measuring_gives_labelled_numbers_with_intervals():
    model = model_of("gpt2")
    labels = ["a", "b"] * 12
    found = layer_metrics.measure(model, corpus(lengths=(17, 19)), labels=labels)
    assert found.names == tuple(METRICS)
    assert found.layers == (-1, 0, 1, 2)
    table = found.table()
    assert set(table.columns) == {"metric", "layer", "value", "low", "high"}
    assert not table.isna().any().any()
    assert (table["low"] <= table["value"] + 1e-9).all()
    assert (table["value"] <= table["high"] + 1e-9).all()
    assert np.isnan(found["linearity"][0]), "nothing comes before the state before the blocks"
    np.testing.assert_allclose(found.texts["entropy"].mean("text"), found["entropy"])
    assert found.provenance["classes"] == 2
    with pytest.raises(ValueError, match="read-only"):
        found.data["value"].to_numpy()[0, 0] = 1
    again = layer_metrics.measure(model, Texts("random", corpus(lengths=(17, 19)).rows[::-1]), ["entropy"])
    np.testing.assert_allclose(again["entropy"], found["entropy"], atol=1e-6)


def test_a_task_brings_its_classes():
    found = layer_metrics.measure(model_of("gpt2"), swap_task(), ["entropy"])
    assert found.provenance["classes"] == len({min(one.correct) for one in swap_task().pairs})


@pytest.mark.parametrize(
    ("ask", "error", "says"),
    [
        (lambda model: layer_metrics.measure(model, corpus(), "entrpy"), MetricError, "did you mean 'entropy'"),
        (lambda model: layer_metrics.measure(model, corpus(), []), MetricError, "name at least one"),
        (lambda model: layer_metrics.measure(model, corpus(), "probe"), MetricError, "needs a class of each text"),
        (lambda model: layer_metrics.measure(model, corpus(), "lidar", labels=list(range(24))), MetricError, "two classes with two texts"),
        (lambda model: layer_metrics.measure(model, corpus(), "entropy", labels=[1]), LensError, "1 labels for 24 texts"),
        (lambda model: layer_metrics.measure(model, corpus(), "entropy", skip_first=7), LensError, "no position after the first 7"),
        (lambda model: layer_metrics.measure(model, corpus(lengths=(2,)), "entropy"), LensError, "need 3"),
        (lambda model: layer_metrics.measure(model, corpus(2), "linearity"), MetricError, "more than"),
        (lambda model: layer_metrics.measure(model, corpus(2), "dimension"), LensError, "at least 20"),
        (lambda model: layer_metrics.measure(model, corpus(), "curvature")["entropy"], MetricError, "unknown layer metric"),
        (lambda model: layer_metrics.measure(model, "a text"), LensError, "texts.read"),
    ],
)
def test_what_cannot_be_measured_is_refused(ask, error, says):
    with pytest.raises(error, match=says):
        ask(model_of("gpt2"))


def test_figures_show_what_was_measured():
    from patchlab.plots._layers import _prepare_layers

    model = model_of("gpt2")
    first, second = (layer_metrics.measure(model, corpus(lengths=(17, 19), seed=seed), ["entropy", "linearity"]) for seed in (0, 1))
    data = _prepare_layers({"one": first, "two": second}, "title")
    assert [panel.metric for panel in data.panels] == ["entropy", "linearity"]
    for (panel, line), result in zip([(p, k) for p in range(2) for k in range(2)], [first, second, first, second], strict=True):
        drawn_line = data.panels[panel].lines[line]
        own = result.data.sel(metric=data.panels[panel].metric).dropna("layer")
        np.testing.assert_array_equal(drawn_line.mean, own["value"])
        np.testing.assert_array_equal(drawn_line.layers, own["layer"])
        np.testing.assert_array_equal(drawn_line.low, own["low"])
    assert data.panels[0].lines[0].colour != data.panels[0].lines[1].colour
    assert len(pl.plots.layers(first).data) == 4
    with pytest.raises(MetricError, match="nothing to draw"):
        pl.plots.layers({})
