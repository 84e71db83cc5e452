"""The contract of patchlab.testing for every shipped method, and proof that the contract notices what it is there for."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from families import mixed_task, model_of, swap_task

import patchlab as pl
from patchlab.methods import LinearizedPatching, Method, get_method
from patchlab.methods.setting.unpatched import Scored
from patchlab.models import Model
from patchlab.testing import check_method, linear_toy, toy_task

ONE_POINT = ("atp", "relp", "relp-ah", "attnlrp", "cp-lrp", "gim")
SITES = ("input", "resid_pre", "resid_post", "attn_out", "mlp_out", "z[layer,pos,head]", "z", "q", "k", "v[layer,pos,kv_head]", "pattern", "mlp_post")
FEW = ("attn_out", "k")


def _small(family: str) -> Model:
    return model_of(family, layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("name", ONE_POINT)
def test_one_point_methods(name: str, family: str) -> None:
    check_method(get_method(name), _small(family), swap_task(), SITES)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize(
    "method",
    [
        get_method("exact"),
        pl.ActivationPatching(engine="literal"),
        get_method("ig:3"),
        get_method("relp+ig:2"),
        pl.IntegratedGradients(2, over="activations"),
        pl.IntegratedGradients(2, over="activations", rules="relp-ah"),
    ],
    ids=lambda method: method.name,
)
def test_other_methods(method: Method, family: str) -> None:
    check_method(method, _small(family), swap_task(), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["zero", "mean", "mean_positional"])
@pytest.mark.parametrize(
    "make",
    [
        pl.ActivationPatching,
        pl.AttributionPatching,
        lambda source: pl.RelevancePatching("relp", source=source),
        lambda source: pl.IntegratedGradients(2, source=source),
    ],
    ids=["exact", "atp", "relp", "ig"],
)
def test_sources(make: Any, source: str) -> None:
    check_method(make(source=source), _small("llama"), swap_task(), ("resid_pre", "v"))


@pytest.mark.parametrize("name", ["exact", "atp", "ig:2"])
def test_several_lengths_and_templates(name: str) -> None:
    check_method(get_method(name), _small("qwen3"), mixed_task(), ("resid_pre", "z"))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["logprob_diff", "prob_diff", "neg_kl"])
@pytest.mark.parametrize("name", ["exact", "atp", "ig:2"])
def test_metrics(name: str, metric: str) -> None:
    directions = ["denoising"] if (name, metric) == ("atp", "neg_kl") else ["denoising", "noising"]
    check_method(get_method(name), _small("native"), swap_task(metric=metric), "resid_pre", directions=directions)


@pytest.mark.parametrize("name", ONE_POINT)
def test_one_point_costs_two_forwards_and_one_backward_per_batch(name: str) -> None:
    model, task = model_of("gpt2"), swap_task(n=4, length=5)
    for size, batches in ((None, 1), (2, 2), (1, 4)):
        cost = get_method(name).run(model, task, "resid_pre", batch_size=size, progress=False).cost
        # the first token does not differ, so the second run starts behind it
        assert (cost.forwards, cost.backwards, cost.positions) == (2 * batches, batches, 4 * 5 + 4 * 4)


def test_costs_of_paths_means_and_cells() -> None:
    model, task = model_of("gpt2"), swap_task(n=4)
    # IG over inputs: the two unpatched runs, then one forward and one backward per point
    cost = pl.IntegratedGradients(3).run(model, task, "z", progress=False).cost
    assert (cost.forwards, cost.backwards) == (2 + 3, 3)
    # over activations: per layer, a path of its own and the whole patch that its completeness gap is measured against
    cost = pl.IntegratedGradients(3, over="activations").run(model, task, "z", progress=False).cost
    assert (cost.forwards, cost.backwards) == (2 + 3 * (3 + 1), 3 * 3)
    # a mean source: one more run per batch
    cost = pl.AttributionPatching(source="mean").run(model, task, "z", batch_size=2, progress=False).cost
    assert (cost.forwards, cost.backwards) == (2 * 3, 2)
    scores = pl.ActivationPatching(engine="literal").run(model, task, "resid_pre", progress=False)
    assert (scores.cost.forwards, scores.cost.backwards) == (2 + int(scores.live["resid_pre"].sum()), 0)


@dataclass(frozen=True)
class Broken(LinearizedPatching):
    """AtP with something wrong with it."""

    what: str = ""

    @property
    def name(self) -> str:
        return "broken"

    def score(self, setting: Any, runs: Any, meter: Any, notes: Any) -> Scored:
        found = super().score(setting, runs, meter, notes)
        scores = found.effects
        bridge = setting.model.bridge
        if self.what == "batch":
            return replace(found, effects={name: values - values.mean(0) for name, values in scores.items()})
        if self.what == "order":
            turned = {name: values * np.arange(1, 1 + len(values)).reshape(-1, *[1] * (values.ndim - 1)) for name, values in scores.items()}
            return replace(found, effects=turned)
        if self.what == "zeros":
            return replace(found, effects={name: values + 1 for name, values in scores.items()})
        if self.what == "parameters":
            next(bridge.parameters()).data.flatten()[0] += 1
        if self.what == "hooks":
            bridge.blocks[0].hook_in.register_forward_hook(_nothing)
        if self.what == "cost":
            meter.forwards += 1
        if self.what == "grad mode":
            torch.set_grad_enabled(False)
        if self.what == "random":
            torch.rand(1)
        return found

    def run(self, model: Any, task: Any, sites: Any, **options: Any) -> Any:
        if self.what == "exception":
            try:
                return super().run(model, task, sites, **options)
            except pl.PatchlabError:
                raise
            except Exception:
                model.bridge.blocks[0].hook_in.register_forward_hook(_nothing)
                raise
        if self.what == "refuses nothing":
            options = {
                **options,
                "direction": options.get("direction", "denoising").replace("sideways", "noising"),
                "batch_size": options.get("batch_size") or None,
            }
        result = super().run(model, task, sites, **options)
        if self.what == "provenance":
            return replace(result, provenance={**result.provenance, "direction": "denoising"})
        return result


def _nothing(module: Any, inputs: Any, output: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("batch", "batch_size=2"),
        ("order", "batch_size=2"),
        ("zeros", "structural zeros of resid_pre are not zero"),
        ("parameters", "parameters or buffers .* changed"),
        ("hooks", "hooks are left on"),
        ("cost", "the cost says"),
        ("grad mode", "torch settings changed"),
        ("random", "random state changed"),
        ("exception", "hooks are left on .*"),
        ("provenance", "the provenance says"),
        ("refuses nothing", "accepts"),
    ],
)
def test_the_contract_notices(what: str, message: str) -> None:
    model = linear_toy(1)
    try:
        with pytest.raises(AssertionError, match=message):
            check_method(Broken(what=what), model, toy_task(model), "resid_pre")
    finally:
        torch.set_grad_enabled(True)


def test_the_contract_accepts_a_method_that_keeps_it() -> None:
    model = linear_toy(1)
    check_method(Broken(), model, toy_task(model), "resid_pre")
