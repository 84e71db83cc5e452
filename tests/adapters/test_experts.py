"""Mixtures of experts: relevance through router and experts by hand in float64, conservation, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import bridged, scores_of, swap_task
from torch import Tensor

import patchlab as pl
from patchlab.adapters import ExpertsPlace, MLPPlace
from patchlab.adapters.experts import find_experts
from patchlab.engine import Program, run
from patchlab.errors import RuleError
from patchlab.models import Model
from patchlab.rules import Composite, EpsilonRule, HalfRule, coverage, get_composite
from patchlab.testing.zoo import zoo_model, zoo_module

F64 = torch.float64
COVERED = ("mixtral", "qwen3-moe", "qwen2-moe", "olmoe", "gpt-oss", "deepseek-v3")
HALF_ROUTING = "lrp[ln,identity,half,gate,half-routing]"
TOKENS = torch.tensor([[3, 17, 8, 30, 11], [5, 2, 29, 14, 36]])


class ByHand:
    """A mixture of experts of a Hugging Face model, written out for one token at a time from its weights."""

    def __init__(self, family: str, module: Any) -> None:
        block = module.model.layers[1].mlp
        self.family, self.weights = family, {name: value.detach().to(F64) for name, value in block.named_parameters()}
        self.config = module.config
        self.gate = "router.weight" if family == "gpt-oss" else "gate.weight"

    def routing(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """The weights of the chosen experts, differentiable in x, and which they are."""
        logits = self.weights[self.gate] @ x + (self.weights["router.bias"] if self.family == "gpt-oss" else 0)
        if self.family == "gpt-oss":  # the softmax is over those that are chosen
            top = logits.topk(2)
            return top.values.softmax(0), top.indices.tolist()
        if self.family == "deepseek-v3":  # sigmoids; the better one of two groups of two
            scores = logits.sigmoid()
            group = int(scores.view(2, 2).sum(1).argmax())
            chosen = torch.tensor([2 * group, 2 * group + 1])
            return scores[chosen] / scores[chosen].sum() * self.config.routed_scaling_factor, chosen.tolist()
        top = logits.softmax(0).topk(2)
        divide = self.family == "mixtral" or self.config.norm_topk_prob
        return top.values / top.values.sum() if divide else top.values, top.indices.tolist()

    def expert(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weights [out, in] of gate, up and down, and the biases of both maps of neurons."""
        both, down = self.weights["experts.gate_up_proj"][number], self.weights["experts.down_proj"][number]
        zeros = torch.zeros(2 * down.shape[-1], dtype=F64)
        if self.family == "gpt-oss":
            bias = self.weights["experts.gate_up_proj_bias"][number]
            return both.T[::2], both.T[1::2], down.T, bias[::2], bias[1::2]
        half = len(both) // 2
        return both[:half], both[half:], down, zeros[:half], zeros[:half]

    def product(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The activated gate, its slope as a factor (a/g) and as a derivative, and the linear branch in the product with its own factor."""
        if self.family == "gpt-oss":
            low, limit = g.clamp(max=self.config.swiglu_limit), self.config.swiglu_limit
            a, clamped = low * (1.702 * low).sigmoid(), u.clamp(-limit, limit)
            return a, a / g, clamped + 1, clamped / u
        return g * g.sigmoid(), g.sigmoid(), u, torch.ones_like(u)

    def mlp(self, parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], x: Tensor, back: Tensor, rules: str) -> tuple[Tensor, Tensor]:
        """The output of one gated MLP without its bias, and what relevance takes back from ``back`` at the output to x."""
        gate, up, down, b_gate, b_up = parts
        g, u = gate @ x + b_gate, up @ x + b_up
        a, ratio, branch, u_ratio = self.product(g, u)
        at_neurons = down.T @ back
        if rules == "gim":
            s = g.sigmoid()
            return down @ (a * branch), gate.T @ (0.5 * (s + g * s * (1 - s)) * branch * at_neurons) + up.T @ (0.5 * a * at_neurons)
        if rules == "cp-lrp":
            return down @ (a * branch), up.T @ (a * u_ratio * at_neurons)
        return down @ (a * branch), gate.T @ (0.5 * ratio * branch * at_neurons) + up.T @ (0.5 * a * u_ratio * at_neurons)

    def back(self, x: Tensor, g: Tensor, rules: str) -> tuple[Tensor, Tensor]:
        """The output for one token, and the relevance gradient at x."""
        x = x.clone().requires_grad_()
        weights, chosen = self.routing(x)
        share = 0.5 if rules == HALF_ROUTING else 1.0
        total, found, by_weight = torch.zeros_like(g), torch.zeros_like(g), []
        for weight, number in zip(weights, chosen, strict=True):
            out, gradient = self.mlp(self.expert(number), x.detach(), weight.detach() * g, rules)
            out = out + (self.weights["experts.down_proj_bias"][number] if self.family == "gpt-oss" else 0)
            total, found = total + weight.detach() * out, found + share * gradient
            by_weight.append(weight * (out @ g))
        name = {"qwen2-moe": "shared_expert", "deepseek-v3": "shared_experts"}.get(self.family)
        if name is not None:
            maps = [self.weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            zeros = torch.zeros(len(maps[0]), dtype=F64)
            gate = (self.weights["shared_expert_gate.weight"] @ x).sigmoid()[0] if name == "shared_expert" else torch.ones((), dtype=F64)
            out, gradient = self.mlp((*maps, zeros, zeros), x.detach(), gate.detach() * g, rules)
            total, found = total + gate.detach() * out, found + (share if name == "shared_expert" else 1.0) * gradient
            by_weight.append(gate * (out @ g))
        if rules == HALF_ROUTING:
            found = found + 0.5 * torch.autograd.grad(torch.stack(by_weight).sum(), x)[0]
        return total, found.detach()


def moved(model: Model, rules: str) -> dict[str, Tensor]:
    """Input and output of a mixture of experts, and the gradients at both, ``[row, pos, d]``."""
    names = ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
    metric = swap_task().metric
    answers = pl.metrics.Answers.of([[0], [1]], [[2], [3]], model.device)
    program = Program(TOKENS, torch.arange(2), metric=metric, answers=answers, rules=get_composite(rules), hooks=names, hook_gradients=names)
    found = run(model, program)
    return {**found.hooks, **{f"{name} gradient": value for name, value in found.hook_gradients.items()}}


CASES = [(family, "relp") for family in COVERED]
CASES += [
    ("mixtral", "cp-lrp"),
    ("mixtral", "gim"),
    ("qwen2-moe", "cp-lrp"),
    ("mixtral", HALF_ROUTING),
    ("qwen2-moe", HALF_ROUTING),
    ("gpt-oss", HALF_ROUTING),
]


@pytest.mark.parametrize(("family", "rules"), CASES)
def test_relevance_through_experts_by_hand(family: str, rules: str) -> None:
    module = zoo_module(family, F64, 2)
    twin = ByHand(family, module)
    seen = moved(zoo_model(family, F64, 2), rules)
    clamped = 0
    for row in range(2):
        for pos in range(5):
            x, y, at_x, at_y = (seen[f"blocks.1.mlp.hook_{name}"][row, pos] for name in ("in", "out", "in gradient", "out gradient"))
            total, gradient = twin.back(x, at_y, rules)
            torch.testing.assert_close(total, y, rtol=1e-6, atol=1e-6)  # routers compute in single precision
            torch.testing.assert_close(gradient, at_x, rtol=1e-5, atol=1e-6)
            clamped += int(any(((twin.expert(e)[0] @ x + twin.expert(e)[3]) > 0.7).any() for e in twin.routing(x)[1]))
    assert clamped or family != "gpt-oss", "the clamp of GPT-OSS is reached"


@pytest.mark.parametrize("family", COVERED)
def test_rules_cover_experts_and_change_no_logit(family: str) -> None:
    model = zoo_model(family, F64, 2)
    names = ["relp", "relp-ah", "attnlrp", "cp-lrp", HALF_ROUTING]
    for name in names if family == "gpt-oss" else [*names, "gim"]:
        report = coverage(model, name)
        assert report.complete, str(report)
        assert ("blocks.1.mlp", "experts") in [row[:2] for row in report.rows]
    plain = run(model, Program(TOKENS, torch.arange(2), logits="all")).logits
    ruled = run(model, Program(TOKENS, torch.arange(2), logits="all", rules=get_composite("relp"))).logits
    assert torch.equal(plain, ruled)
    assert not any(value.requires_grad for place in model.arch.places if isinstance(place, ExpertsPlace) for value in place.experts.constants)


def test_half_precision_is_covered_too() -> None:
    model = bridged(zoo_module("gpt-oss", torch.bfloat16, 2), "half")
    assert coverage(model, "relp").complete
    assert scores_of(pl.RelevancePatching(), model, swap_task(), "mlp_out").cost.backwards == 1


def test_edges_of_relevance_out_of_experts_add_up_to_the_node() -> None:
    model, task = zoo_model("mixtral", F64, 2), swap_task()
    method = pl.RelevancePatching()
    edges = scores_of(method, model, task, "edges")
    nodes = scores_of(method, model, task, ["mlp_out", "z", "input"])
    total = edges.data["edges"].sum("reader").to_numpy()
    graph = model.arch.graph
    np.testing.assert_allclose(total[:, 0], nodes.data["input"].sum("pos"), rtol=1e-6, atol=1e-7)
    for layer in range(2):
        np.testing.assert_allclose(total[:, graph.mlp_of(layer)], nodes.data["mlp_out"].sel(layer=layer).sum("pos"), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(total[:, graph.heads_of(layer)], nodes.data["z"].sel(layer=layer), rtol=1e-6, atol=1e-7)


def test_rules_for_linear_maps_do_not_reach_into_experts() -> None:
    model = zoo_model("mixtral", F64, 2)
    with pytest.raises(RuleError, match=r"cannot cover blocks\.0\.mlp: the EpsilonRule does not reach the linear maps of its experts"):
        model.check_rules(Composite("linear", linear=EpsilonRule()))
    assert get_composite(HALF_ROUTING) == replace(get_composite("relp"), name="", routing=HalfRule())


def test_a_layer_that_computes_something_else_is_refused() -> None:
    module = zoo_module("mixtral", torch.float32, 2)
    experts = module.model.layers[1].mlp.experts
    forward = type(experts).forward
    experts.forward = lambda *args: 1.01 * forward(experts, *args)
    model = bridged(module, "louder")
    assert [place.problem is None for place in model.arch.places if isinstance(place, ExpertsPlace)] == [True, False]
    with pytest.raises(RuleError, match=r"cannot cover blocks\.1\.mlp: its output is not the sum of its experts' by their routing weights"):
        scores_of(pl.RelevancePatching(), model, swap_task(), "z")


def test_a_layer_put_together_in_another_way_is_refused_by_name() -> None:
    model = zoo_model("jamba", layers=2)
    assert [type(place) for place in model.arch.places if place.name.endswith(".mlp")] == [MLPPlace, ExpertsPlace]
    module = zoo_module("mixtral", torch.float32, 2)
    module.model.layers[0].mlp.experts.gate_up_proj = None
    assert find_experts(module.model.layers[0].mlp) is None
    assert find_experts(module.model.layers[1].mlp) is not None
