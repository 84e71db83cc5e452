"""Methods: what they refuse, before the first forward pass where that is known."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import HEADS, mixed_task, model_of, pair, scores_of, swap_task
from torch import Tensor

import patchlab as pl
from patchlab.engine import session_of
from patchlab.errors import InterventionError, MethodError, MetricError, ModelError, SiteError
from patchlab.methods import LinearizedPatching, get_method
from patchlab.metrics import METRICS, Answers, Metric
from patchlab.models import Model
from patchlab.tasks.task import Pair, Task

LAYERS = 3


METHOD_NAMES = ("exact", "atp", "ig:2", "relp", "relp-ah", "gim", "relp+ig:2")


@contextmanager
def _forwards(model: Model) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = model.bridge.register_forward_hook(lambda module, inputs, output: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["exact", "atp", "ig:2"])
def test_memory_is_refused_before_the_first_forward(name: str) -> None:
    model, task, method = model_of("gpt2"), swap_task(n=4), get_method(name)
    scores = scores_of(method, model, task, "z", batch_size=4)
    needed = scores.cost.predicted_bytes
    with _forwards(model) as seen:
        with pytest.raises(MethodError, match=rf"{name} is predicted to need .* for a batch of 4 examples, and max_memory is .*Lower batch_size"):
            scores_of(method, model, task, "z", batch_size=4, max_memory=needed - 1)
        with pytest.raises(MethodError, match="for a batch of 1 examples"):
            scores_of(method, model, task, "z", max_memory=10)
        assert seen == []
    enough = scores_of(method, model, task, "z", max_memory=needed)
    np.testing.assert_allclose(enough.data["z"], scores.data["z"], atol=1e-6)
    # without a batch size, memory decides on one
    few = scores_of(method, model, task, "z", max_memory=needed - 1)
    assert few.cost.predicted_bytes < needed
    assert few.cost.forwards > scores.cost.forwards
    np.testing.assert_allclose(few.data["z"], scores.data["z"], atol=1e-5)


@pytest.mark.parametrize("name", ["exact", "atp", "ig:2"])
def test_bad_arguments_are_refused_before_the_first_forward(name: str) -> None:
    method, model, task = get_method(name), model_of("neox"), swap_task()
    with _forwards(model) as seen:
        with pytest.raises(MethodError, match=r"unknown direction 'denoise'; did you mean 'denoising'\? Valid: denoising, noising"):
            scores_of(method, model, task, "z", "denoise")
        for size in (0, -3):
            with pytest.raises(MethodError, match=f"batch_size is {size}; it must be at least 1"):
                scores_of(method, model, task, "z", batch_size=size)
        with pytest.raises(SiteError, match="no site resid_mid: attention and MLP run in parallel.*Sites of this model: input, resid_pre"):
            scores_of(method, model, task, "resid_mid")
        with pytest.raises(SiteError, match=r"unknown site 'resid_prr'; did you mean 'resid_pre'\?"):
            scores_of(method, model, task, "resid_prr")
        with pytest.raises(SiteError, match="is an address"):
            scores_of(method, model, task, "L0.z")
        large = Task("large", (Pair((1, 2, 99), (1, 3, 99), (4,), (5,)),), METRICS["logit_diff"])
        with pytest.raises(MethodError, match="task large has token id 99, but neox has 37 tokens"):
            scores_of(method, model, large, "z")
        long = Task("long", (pair(5, (1,), 0), Pair((1, 2) * 20, (1, 3) * 20, (4,), (5,))), METRICS["logit_diff"])
        with pytest.raises(MethodError, match="prompts of 40 tokens, but neox reads 24 at most"):
            scores_of(method, model, long, "z")
        assert seen == []


def test_options_that_make_no_sense() -> None:
    with pytest.raises(MethodError, match="n_steps is 0; integrated gradients need at least 1"):
        pl.IntegratedGradients(0)
    with pytest.raises(MethodError, match="n_steps is -2"):
        get_method("ig:-2")
    with pytest.raises(MethodError, match=r"unknown source 'man'; did you mean 'mean'\? Valid: mean, mean_positional, paired, zero"):
        pl.ActivationPatching(source="man")
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_steps'"):
        pl.AttributionPatching(n_steps=5)  # type: ignore[call-arg]
    method = object.__new__(LinearizedPatching)  # the type checks of the tests would stop it earlier
    for field, value in {"source": "paired", "rules": "gradient", "n_steps": 2, "over": "everything"}.items():
        object.__setattr__(method, field, value)
    with pytest.raises(MethodError, match="over is 'everything'; valid: 'inputs', 'activations'"):
        method.__post_init__()


def test_means_that_make_no_sense() -> None:
    model = model_of("gpt2")
    with _forwards(model) as seen:
        with pytest.raises(MethodError, match="mean of a pattern over positions is not an attention pattern; use source='mean_positional'"):
            scores_of(pl.ActivationPatching(source="mean"), model, swap_task(), "pattern")
        with pytest.raises(MethodError, match="positional means need examples of one length and template"):
            scores_of(pl.ActivationPatching(source="mean_positional"), model, mixed_task(), "z")
        assert seen == []
    assert scores_of(pl.ActivationPatching(source="mean_positional"), model, swap_task(), "pattern").data["pattern"].shape == (3, LAYERS, HEADS)


def _mixing(logits: Tensor, answers: Answers) -> Tensor:
    own = METRICS["logit_diff"](logits, answers)
    return own - own.mean()


@pytest.mark.parametrize("name", ["exact", "atp", "ig:2"])
def test_a_metric_that_mixes_examples_is_refused(name: str) -> None:
    model, method = model_of("gpt2"), get_method(name)
    for label in ("centred", "logit_diff"):  # a name from the registry makes no difference
        metric = Metric(label, _mixing)
        with pytest.raises(MetricError, match=rf"metric '{label}' mixes examples: example 0 gives 0 alone"):
            scores_of(method, model, swap_task(metric=metric), "z")
    # the first length has one example, which shows nothing; the second tells
    pairs = (pair(4, (1,), 1), pair(5, (1,), 2), pair(5, (1,), 3))
    with pytest.raises(MetricError, match="mixes examples"):
        scores_of(method, model, Task("lengths", pairs, Metric("centred", _mixing)), "z")


def test_metrics_of_the_wrong_shape_or_value_are_refused() -> None:
    model = model_of("gpt2")
    for function, message in (
        (lambda logits, a: logits.mean(), r"returned shape \[\] for 3 examples"),
        (lambda logits, a: 1.0, "returned float for 3"),
    ):
        with pytest.raises(MetricError, match=message):
            scores_of(pl.ActivationPatching(), model, swap_task(metric=Metric("bad", function)), "z")
    infinite = Metric("infinite", lambda logits, a: logits[:, 0] / 0)
    with pytest.raises(MetricError, match="metric 'infinite' is not finite for 3 of 3 rows, though the logits are"):
        scores_of(pl.AttributionPatching(), model, swap_task(metric=infinite), "z")
    constant = Metric("constant", lambda logits, a: torch.ones(len(logits)))
    with pytest.raises(InterventionError, match="must be differentiable in the logits"):
        scores_of(pl.AttributionPatching(), model, swap_task(metric=constant), "z")


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_logits_that_are_not_finite_are_refused(name: str) -> None:
    model = model_of("gpt2")
    with (
        pytest.raises(ModelError, match=r"gpt2 gave non-finite logits .* for 3 of 3 rows in torch\.float32.*check the edits"),
        pl.intervene(model, pl.Edit("L1.resid_pre", float("nan"))),
    ):
        scores_of(get_method(name), model, swap_task(), "z")
    assert session_of(model).surrounding == ()
