"""Toys with known answers: a linear model on which AtP is exact, and a model of one neuron worked out on paper."""

import numpy as np
import pytest
import torch
from families import scores_of

import patchlab as pl
from patchlab.adapters.accessors import HOSTS
from patchlab.methods import get_method
from patchlab.rules import PRESETS
from patchlab.sites import KINDS
from patchlab.testing import linear_toy, micro_model, micro_task, toy_task

SITES = [kind.name for kind in KINDS.values() if kind.name in HOSTS and kind.name not in ("q", "k")] + [
    "z[layer,pos,head]",
    "v[layer,pos,kv_head]",
    "mlp_post[layer,pos,neuron]",
    "pattern[layer,head,dest,src]",
]


@pytest.fixture(scope="module")
def linear():
    model = linear_toy()
    return model, toy_task(model, n=3, length=4)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("source", ["paired", "zero", "mean_positional"])
def test_on_a_linear_model_attribution_is_exact(linear, source: str, direction: str) -> None:
    model, task = linear
    exact = scores_of(pl.ActivationPatching(source=source), model, task, SITES, direction)
    for method in (pl.AttributionPatching(source=source), pl.IntegratedGradients(2, over="activations", source=source)):
        scores = scores_of(method, model, task, SITES, direction)
        for site in exact.sites:
            assert float(np.abs(exact.data[site]).max()) > 1e-3 or site.startswith("pattern"), site  # positions alone make the pattern
            np.testing.assert_allclose(scores.data[site], exact.data[site], rtol=0, atol=1e-12, err_msg=f"{method.name} {site}")


def test_the_linear_model_stays_in_its_linear_region(linear) -> None:
    model, task = linear
    (batch,) = task.batches()
    for edits in ([], [pl.Edit("L0.resid_pre", pl.sources.zero())], [pl.Edit("L1.attn_out", pl.sources.zero())]):
        neurons = model.run(torch.cat([batch.clean, batch.corrupted]), keep="mlp_post", edits=edits)
        assert min(float(neurons[f"L{layer}.mlp_post"].min()) for layer in range(3)) > 1


def test_on_a_linear_model_paths_over_inputs_are_exact_and_complete(linear) -> None:
    model, task = linear
    exact = scores_of(pl.ActivationPatching(), model, task, ["input", "resid_mid", "z"])
    scores = scores_of(pl.IntegratedGradients(3), model, task, ["input", "resid_mid", "z"])
    for site in exact.sites:
        np.testing.assert_allclose(scores.data[site], exact.data[site], rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.provenance["completeness_gap"]["input"], 0, atol=1e-12)


def test_on_a_linear_model_every_rule_set_is_the_gradient_after_the_last_attention(linear) -> None:
    model, task = linear
    atp = scores_of(get_method("atp"), model, task, ["mlp_post", "resid_post"])
    for name in PRESETS:
        if name == "gradient":
            continue
        scores = scores_of(get_method(name), model, task, ["mlp_post", "resid_post"])
        last = {"layer": model.arch.n_layers - 1}
        for site in ("mlp_post", "resid_post"):
            np.testing.assert_allclose(scores.data[site].isel(last), atp.data[site].isel(last), atol=1e-12, err_msg=name)


def test_queries_and_keys_of_the_linear_model_do_nothing(linear) -> None:
    model, task = linear
    for name in ("exact", "atp", "relp"):
        scores = scores_of(get_method(name), model, task, ["q", "k"])
        for site in ("q", "k"):
            np.testing.assert_allclose(scores.data[site], 0, atol=1e-12)


# The micro-model on (0, 2) and (1, 2), second position, all by hand. E[0] = (4, 0), E[1] = (0, 2), E[2] = (1, 1).
#
#                 clean                              corrupted
#   attn_out      ((4,0) + (1,1)) / 2 = (2.5, 0.5)   ((0,2) + (1,1)) / 2 = (0.5, 1.5)
#   resid_mid     (1,1) + attn_out  = (3.5, 1.5)     (1.5, 2.5)
#   g = r₀ − 2    1.5                                −0.5
#   neuron        1.5                                0
#   mlp_out       (3, 0)                             (0, 0)
#   resid_post    (6.5, 1.5)                         (1.5, 2.5)
#   metric        6.5 − 1.5 = 5                      1.5 − 2.5 = −1
#
# Gradient of the metric: at resid_post (1, −1), at mlp_out the same, at the neuron 2 · 1 = 2; at resid_mid and attn_out
# (1 + 2 · ReLU'(g), −1): (1, −1) on the corrupted run, (3, −1) on the clean run.
ACTIVATIONS = {
    "attn_out": ([[4, 0], [2.5, 0.5]], [[0, 2], [0.5, 1.5]]),
    "resid_mid": ([[8, 0], [3.5, 1.5]], [[0, 4], [1.5, 2.5]]),
    "mlp_post": ([[6], [1.5]], [[0], [0]]),
    "mlp_out": ([[12, 0], [3, 0]], [[0, 0], [0, 0]]),
    "resid_post": ([[20, 0], [6.5, 1.5]], [[0, 4], [1.5, 2.5]]),
    "z": ([[[4, 0]], [[2.5, 0.5]]], [[[0, 2]], [[0.5, 1.5]]]),
    "pattern": ([[[1, 0], [0.5, 0.5]]], [[[1, 0], [0.5, 0.5]]]),
}


def test_micro_activations_and_metrics() -> None:
    model, task = micro_model(), micro_task()
    result = model.run([[0, 2], [1, 2]], keep=list(ACTIVATIONS))
    for site, (clean, corrupted) in ACTIVATIONS.items():
        torch.testing.assert_close(result[f"L0.{site}"], torch.tensor([clean, corrupted], dtype=torch.float64), atol=1e-15, rtol=0, msg=site)
    scores = scores_of(get_method("exact"), model, task, "resid_pre")
    assert (scores.data.metric_clean.item(), scores.data.metric_corrupted.item()) == (5, -1)


def _at_the_end(scores, site: str) -> float:
    array = scores.data[site].isel(example=0)
    return float(array.to_numpy().flatten()[-1])


# denoising, by hand: exact; AtP on the corrupted run (ReLU' = 0); IG over inputs with 1 and 4 midpoints.
#   attn_out  exact: clean attention gives the clean run, 5 − (−1) = 6. AtP: (1, −1)·(2, −1) = 3. Along the inputs g = −0.5 + 2α is
#             above 0 from α = ¼: the one midpoint ½ gives (3, −1)·(2, −1) = 7, of ⅛, ⅜, ⅝, ⅞ three do: (1 + ¾·2, −1)·(2, −1) = 6.
#   mlp_out   (3, 0)·(1, −1) = 3, also exactly: 1.5 + 3 − 2.5 = 2 = −1 + 3. The neuron: 1.5 · 2 = 3.
#   resid_post (5, −1)·(1, −1) = 6 = exact.
# noising: exact −6; AtP on the clean run: (3, −1)·(−2, 1) = −7; neuron −1.5 · 2 = −3.
DENOISING = {
    "attn_out": (6, 3, 7, 6),
    "z": (6, 3, 7, 6),
    "v": (6, 3, 7, 6),
    "resid_mid": (6, 3, 7, 6),
    "mlp_out": (3, 3, 3, 3),
    "mlp_post": (3, 3, 3, 3),
    "resid_post": (6, 6, 6, 6),
}
NOISING = {
    "attn_out": (-6, -7, -7, -6),
    "z": (-6, -7, -7, -6),
    "mlp_out": (-3, -3, -3, -3),
    "mlp_post": (-3, -3, -3, -3),
    "resid_post": (-6, -6, -6, -6),
}


@pytest.mark.parametrize(("direction", "effects"), [("denoising", DENOISING), ("noising", NOISING)])
def test_micro_effects(direction: str, effects: dict[str, tuple[float, ...]]) -> None:
    model, task = micro_model(), micro_task()
    for i, name in enumerate(("exact", "atp", "ig:1", "ig:4")):
        scores = scores_of(get_method(name), model, task, list(effects), direction)
        for site, expected in effects.items():
            assert _at_the_end(scores, site) == pytest.approx(expected[i], abs=1e-12), (name, site)


def test_micro_effects_per_position() -> None:
    """Only the first token changes. Its effect reaches the answer through the attention; position 1 is the same at resid_pre."""
    scores = scores_of(get_method("exact"), micro_model(), micro_task(), ["input", "resid_pre", "attn_out", "pattern"])
    assert scores.data["input"].to_numpy().tolist() == [[6, 0]]
    assert scores.data["resid_pre"].to_numpy().tolist() == [[[6, 0]]]
    assert scores.data["attn_out"].to_numpy().tolist() == [[[0, 6]]]
    assert scores.live["resid_pre"].to_numpy().tolist() == [[True, False]]
    assert scores.live["attn_out"].to_numpy().tolist() == [[False, True]]
    assert scores.data["pattern"].to_numpy().tolist() == [[[0]]]  # it may matter, but is the same in both runs here


def test_micro_identity_rule() -> None:
    """On the clean run f(g)/g = 1.5/1.5 = 1 and on the corrupted run 0/−0.5 = 0: the same coefficients as ReLU'."""
    model, task = micro_model(), micro_task()
    for direction, expected in (("denoising", 3), ("noising", -7)):
        assert _at_the_end(scores_of(get_method("relp"), model, task, "attn_out", direction), "attn_out") == pytest.approx(expected, abs=1e-12)


def test_micro_zero_and_mean_sources() -> None:
    """Denoising with zero: attn_out 0 gives resid_mid (1, 1), a silent neuron, metric 0: effect 1; AtP −(0.5, 1.5)·(1, −1) = 1.

    Noising with zero: effect 0 − 5 = −5; AtP −(2.5, 0.5)·(3, −1) = −7. Denoising with the mean of the clean run over positions,
    ((4, 0) + (2.5, 0.5)) / 2 = (3.25, 0.25): resid_mid (4.25, 1.25), neuron 2.25, metric 4.25 + 4.5 − 1.25 = 7.5, effect 8.5. The
    positional mean of one example is that example: 6.
    """
    model, task = micro_model(), micro_task()
    cases = [
        (pl.ActivationPatching(source="zero"), "denoising", 1),
        (pl.AttributionPatching(source="zero"), "denoising", 1),
        (pl.ActivationPatching(source="zero"), "noising", -5),
        (pl.AttributionPatching(source="zero"), "noising", -7),
        (pl.ActivationPatching(source="mean"), "denoising", 8.5),
        (pl.ActivationPatching(source="mean_positional"), "denoising", 6),
    ]
    for method, direction, expected in cases:
        assert _at_the_end(scores_of(method, model, task, "z", direction), "z") == pytest.approx(expected, abs=1e-12), (method, direction)


def test_micro_completeness_gap() -> None:
    """Σ input scores − (5 − (−1)): one midpoint gives 7 − 6 = 1 (the score of attn_out at α = ½ is that of the first token), four give 0."""
    for steps, gap in ((1, 1), (4, 0)):
        scores = scores_of(pl.IntegratedGradients(steps), micro_model(), micro_task(), "resid_pre")
        assert scores.provenance["completeness_gap"]["input"] == pytest.approx([gap], abs=1e-12)
