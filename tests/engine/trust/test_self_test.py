"""The load-time self-test against models that were damaged on purpose: each silent failure must be found and named."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, hf_module, model_of
from torch import Tensor, nn

import patchlab as pl
from patchlab.adapters import Accessor, accessors
from patchlab.errors import ModelError, RuleError, SiteError


def _bridge(family: str = "gpt2", dtype: torch.dtype = torch.float32) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = hf_module(family, dtype=dtype)
    return build_bridge_from_module(module, type(module).__name__, hf_config=module.config, tokenizer=None)


def _replace_hook(bridge: Any, name: str, wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let a hook point return ``wrong(what the hooks made of it, what came in)``."""
    hook = bridge.hook_dict[name]

    class Damaged(type(hook)):
        def __call__(self, value: Tensor) -> Tensor:
            return wrong(super().__call__(value), value)

    hook.__class__ = Damaged


def _replace_forward(module: Any, forward: Callable[[Any, Tensor], Tensor]) -> None:
    module.__class__ = type("Damaged", (type(module),), {"forward": forward})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_has_every_site(family: str) -> None:
    model = model_of(family)
    assert list(model.arch.absent) == (["resid_mid"] if family == "neox" else [])
    assert [(place.name, place.problem) for place in model.arch.places if place.problem] == []


def test_the_parallel_block_has_no_middle_and_says_so() -> None:
    model = model_of("neox")
    assert model.arch.absent == {"resid_mid": "attention and MLP run in parallel, so there is no stream between them"}
    message = (
        r"GPTNeoXForCausalLM has no site resid_mid: attention and MLP run in parallel, so there is no stream between them. "
        r"Sites of this model: input, resid_pre, resid_post, attn_out, mlp_out, z, q, k, v, pattern, mlp_post\."
    )
    with pytest.raises(SiteError, match=message):
        model.run([1, 2, 3], keep="resid_mid")
    with pytest.raises(SiteError, match=message):
        model.run([1, 2, 3], edits=[pl.Edit("L0.resid_mid", pl.sources.zero())])
    with pytest.raises(SiteError, match=message), pl.intervene(model, pl.Edit("L0.resid_mid", pl.sources.zero())):
        pass


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.1.mlp.hook_post", "mlp_post"),
        ("blocks.2.attn.hook_z", "z"),
        ("blocks.0.attn.hook_v", "v"),
        ("blocks.1.hook_mlp_out", "mlp_out"),
        ("hook_embed", "input"),
    ],
)
def test_a_hook_that_drops_what_it_is_given(hook: str, site: str) -> None:
    bridge = _bridge()
    _replace_hook(bridge, hook, lambda hooked, given: given)
    model = pl.wrap_bridge(bridge, "damaged")
    assert list(model.arch.absent) == [site]
    assert model.arch.absent[site] == "an edit is dropped: the logits are not computed from what its hook returns"
    with pytest.raises(SiteError, match=f"has no site {site}: an edit is dropped"):
        model.run([1, 2, 3], keep=site)


@pytest.mark.parametrize(
    ("hook", "site", "problem"),
    [
        ("blocks.1.attn.hook_z", "z", "with z given, attn_out of layer 1 still depends on the prompt"),
        ("blocks.2.mlp.hook_post", "mlp_post", "with mlp_post given, mlp_out of layer 2 still depends on the prompt"),
        ("blocks.1.hook_mlp_out", "mlp_out", "patching mlp_out leaves the residual stream after it wrong"),
        ("hook_embed", "input", "with input given, resid_pre of layer 0 still depends on the prompt"),
    ],
)
def test_a_hook_that_passes_on_only_a_part(hook: str, site: str, problem: str) -> None:
    bridge = _bridge()
    _replace_hook(bridge, hook, lambda hooked, given: 0.5 * (hooked + given))
    absent = pl.wrap_bridge(bridge, "damaged").arch.absent
    assert list(absent) == [site]
    assert re.match(rf"{problem} (by|\(by) 0\.", absent[site])


def test_a_residual_hook_that_passes_on_only_a_part_makes_the_model_unusable() -> None:
    bridge = _bridge()
    _replace_hook(bridge, "blocks.1.hook_resid_pre", lambda hooked, given: 0.5 * (hooked + given))
    with pytest.raises(
        ModelError, match=r"damaged \(GPT2LMHeadModel\) cannot be trusted: resid_pre failed the self-test, patching all of L1.resid_pre leaves"
    ):
        pl.wrap_bridge(bridge, "damaged")


def test_a_hook_that_never_fires() -> None:
    bridge = _bridge()
    _replace_forward(bridge.blocks[1].mlp.out, lambda out, x: out.hook_out(out.original_component(x)))
    absent = pl.wrap_bridge(bridge, "damaged").arch.absent
    # what the MLP adds is hooked one module further on, and stays
    assert absent == {
        "mlp_post": "the hook blocks.1.mlp.out.hook_in fired 0 times in one forward pass of damaged; a site must be computed exactly once."
    }


def test_a_site_that_is_computed_twice() -> None:
    bridge = _bridge()
    _replace_forward(bridge.blocks[1].mlp.out, lambda out, x: out.hook_out(out.original_component(out.hook_in(out.hook_in(x)))))
    absent = pl.wrap_bridge(bridge, "damaged").arch.absent
    assert list(absent) == ["mlp_post"]
    assert "blocks.1.mlp.out.hook_in fired 2 times" in absent["mlp_post"]


def test_the_hook_named_resid_mid_is_not_the_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accessors.HOSTS, "resid_mid", "hook_resid_mid")
    monkeypatch.setattr(Accessor, "companion", lambda self, layer: None)
    absent = pl.wrap_bridge(_bridge(), "naive").arch.absent
    assert list(absent) == ["resid_mid"]
    assert "resid_mid leaves the logits wrong by 0." in absent["resid_mid"]


def test_a_lens_on_the_wrong_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accessors.HOSTS, "q", "attn.hook_k")
    absent = pl.wrap_bridge(_bridge(), "naive").arch.absent
    assert list(absent) == ["q", "k"]
    assert absent["q"].startswith("with q and k given, pattern of layer 0 still depends on the prompt (by ")


def test_a_hook_that_the_bridge_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accessors.HOSTS, "mlp_post", "mlp.hook_neurons")
    assert pl.wrap_bridge(_bridge(), "naive").arch.absent == {"mlp_post": "it lacks the hook blocks.0.mlp.hook_neurons"}


def test_a_lens_that_does_not_give_the_bits_back(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Accessor.write
    monkeypatch.setattr(Accessor, "write", lambda self, host, beside, value: write(self, host, beside, value) + (1e-3 if self.kind == "v" else 0))
    absent = pl.wrap_bridge(_bridge(), "naive").arch.absent
    assert absent["v"].startswith("a run patched with its own v differs by ")


def test_a_model_that_answers_differently_each_time_is_unusable() -> None:
    bridge = _bridge()
    calls: list[int] = []

    def drifting(hooked: Tensor, given: Tensor) -> Tensor:
        calls.append(1)
        return hooked * (1 + 1e-3 * len(calls))

    _replace_hook(bridge, "blocks.2.hook_mlp_out", drifting)
    with pytest.raises(ModelError, match="cannot be trusted: resid_pre failed the self-test, a run patched with its own resid_pre differs by"):
        pl.wrap_bridge(bridge, "damaged")


def test_a_model_that_looks_ahead_is_unusable() -> None:
    bridge = _bridge()
    _replace_hook(bridge, "blocks.1.hook_mlp_out", lambda hooked, given: hooked + hooked.mean(1, keepdim=True))
    with pytest.raises(ModelError, match=r"damaged \(GPT2LMHeadModel\) is not a causal language model: the last token changes the logits before it"):
        pl.wrap_bridge(bridge, "damaged")


@pytest.mark.parametrize(
    ("hook", "place", "problem"),
    [
        ("blocks.1.ln1.hook_out", "blocks.1.ln1", r"its output is not w · x / s"),
        ("blocks.2.mlp.hook_post", "blocks.2.mlp", r"its output is not f\(g\)"),
    ],
)
def test_a_module_that_is_not_what_rules_take_it_for(hook: str, place: str, problem: str) -> None:
    bridge = _bridge()
    _replace_hook(bridge, hook, lambda hooked, given: given * 1.5 if given is hooked else hooked)
    # the factor lies between the formula's inputs and the hook, as an unknown module would put it
    target = bridge.hook_dict[hook]
    type(target).__call__ = lambda self, value: nn.Module.__call__(self, value * 1.5)
    model = pl.wrap_bridge(bridge, "damaged")
    assert model.arch.absent == {}
    with pytest.raises(RuleError, match=rf"the composite 'relp' cannot cover {place}: {problem}"):
        pl.rules.get_composite("relp").attach(model.arch.places)
    report = pl.rules.coverage(model, "relp")
    assert [name for name, _ in report.uncovered] == [place]


def test_the_self_test_leaves_nothing_behind() -> None:
    bridge = _bridge("llama")
    bridge(torch.tensor([[1, 2]]))  # the Bridge adds some of its own at its first run
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in bridge.modules()]
    weights = {name: parameter.clone() for name, parameter in bridge.named_parameters()}
    with warnings.catch_warnings(record=True) as seen:
        pl.wrap_bridge(bridge, "llama")
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in bridge.modules()] == before
    assert all(torch.equal(weights[name], parameter) for name, parameter in bridge.named_parameters())
    assert seen == []
    assert torch.is_grad_enabled()


def test_short_contexts_are_tested_too() -> None:
    from transformer_lens.model_bridge.sources.native import boot

    config = {
        "n_layers": 1,
        "d_model": 8,
        "n_ctx": 3,
        "d_head": 4,
        "n_heads": 2,
        "d_mlp": 8,
        "d_vocab": VOCAB,
        "act_fn": "gelu",
        "normalization_type": "LN",
    }
    assert pl.wrap_bridge(boot({**config, "seed": 0}), "short").arch.absent == {}
