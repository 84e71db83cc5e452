"""What should hold on every architecture, tried on the zoo: each cell of docs/families.md is right or refused with a reason."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

import patchlab as pl
from patchlab.engine import hook_points as points
from patchlab.engine.trust.precision import in_single_precision
from patchlab.errors import ModelError, SiteError
from patchlab.models import Model
from patchlab.testing.family import measure_family
from patchlab.testing.zoo import HEADS, ZOO, zoo_bridge, zoo_model, zoo_module

PARALLEL = ("gpt-j", "neox", "phi", "falcon", "cohere", "cohere2")
ATTENTION = {"q", "k", "v", "z", "pattern", "attn_out", "resid_mid"}
ABSENT = {
    **{name: {"resid_mid"} for name in PARALLEL},
    **{name: {"pattern"} for name in ("gpt-neo", "opt", "opt-projected", "opt-postnorm", "xglm")},
    "gpt-j": {"resid_mid", "pattern"},
    **{name: {"mlp_post"} for name in ("mixtral", "qwen3-moe", "deepseek-v3")},
    **{name: ATTENTION | {"mlp_post"} for name in ("jamba", "qwen3-next")},
    "qwen3.5": ATTENTION,
    **{name: ATTENTION | {"mlp_out", "mlp_post"} for name in ("mamba", "rwkv")},
}
NO_EDGES = ("olmo2", "opt-projected", "opt-postnorm", "openai-gpt", "deepseek-v3", "qwen3-next", "qwen3.5", "rwkv", "mamba", "jamba")
CHEAP = ("gpt-j", "opt", "openai-gpt", "bloom", "mistral", "falcon", "cohere", "granite", "deepseek-v3", "xglm", "jamba", "mamba", "olmo2")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_a_family_is_right_or_refused(name: str) -> None:
    family = measure_family(name, layers=2, rules=(), features=False)
    assert family.refused is None
    assert set(family.absent) == ABSENT.get(name, set())
    assert all(len(reason) > 20 for reason in family.absent.values())
    assert family.gap < (1e-4 if family.single else 1e-6)
    assert (family.edges_gap is None) == (name in NO_EDGES)
    if family.edges_gap is None:
        assert re.search("has no graph of edges|cannot be run as a circuit", family.no_edges or "")
    else:
        assert family.edges_gap < (1e-3 if family.single else 1e-6)


def test_the_zoo_has_the_families_that_are_asked_for() -> None:
    wanted = "gpt2 gpt-j gpt-neo neox opt bloom llama mistral mixtral qwen2 qwen3 qwen3-moe gemma gemma2 gemma3 olmo2 phi phi3 falcon mpt stablelm"
    assert set(f"{wanted} cohere granite deepseek-v3 mamba jamba".split()) <= set(ZOO)
    with pytest.raises(ModelError, match="unknown model of the zoo 'lama'"):
        zoo_module("lama")


def test_a_model_that_cannot_be_bridged_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelError, match="falcon-new: TransformerLens cannot bridge FalconForCausalLM: "):
        zoo_model("falcon-new")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [("xglm", torch.float64, "xglm: XGLMForCausalLM does not run in torch.float64: "), ("olmo", torch.bfloat16, "does not run in torch.bfloat16: ")],
)
def test_a_dtype_that_an_architecture_does_not_run_in(name: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        zoo_model(name, dtype, 2)


def test_a_bridge_that_computes_something_else_is_refused() -> None:
    from transformers import AutoModelForCausalLM, StableLmConfig

    # a rotary embedding of one dimension: the Bridge and transformers disagree on it
    config = StableLmConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    with pytest.raises(ModelError, match="gives other logits than by itself"):
        pl.models.bridge_module(module, "odd")


def _edited(model: Model, site: str, tokens: Tensor, keep: str) -> tuple[Tensor, Tensor]:
    plain = model.run(tokens, keep=keep)
    edited = model.run(tokens, edits=[pl.Edit(site, pl.sources.zero())], keep=keep)
    return plain[f"L0.{keep}"][0], edited[f"L0.{keep}"][0]


def test_one_head_of_latent_attention_at_all_positions() -> None:
    model = zoo_model("deepseek-v3", layers=2)
    tokens = torch.arange(6)[None]
    q, edited = _edited(model, "L0.H2.q", tokens, "q")
    assert q.shape == (6, HEADS, 6)
    assert not edited[:, 2].any()
    assert torch.equal(edited[:, [0, 1, 3]], q[:, [0, 1, 3]])
    pattern, after = _edited(model, "L0.H2.q@3", tokens, "pattern")
    changed = (pattern != after).any(-1)
    assert changed.nonzero().tolist() == [[2, 3]]


def test_latent_attention_seen_by_head_first_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "_stand_ins", lambda bridge: iter(()))
    absent = pl.wrap_bridge(zoo_bridge(zoo_module("deepseek-v3", layers=2)), "naive").arch.absent
    assert {"q", "k", "v"} <= set(absent)
    assert re.match(r"its activation has the shape \[2, 4, \d, 6\] in layer 0 where \[row 2, pos \d, 4 heads \* d\] is expected", absent["q"])


def test_heads_in_another_order_are_found_out() -> None:
    bridge = zoo_bridge(zoo_module("llama", layers=2))
    hook = bridge.hook_dict["blocks.1.attn.hook_z"]

    class Turned(type(hook)):
        def __call__(self, value: Tensor) -> Tensor:
            return super().__call__(value.unflatten(-1, (HEADS, -1)).flip(2).flatten(2)).unflatten(-1, (HEADS, -1)).flip(2).flatten(2)

    hook.__class__ = Turned
    absent = pl.wrap_bridge(bridge, "turned").arch.absent
    assert "changes z at others as well" in absent["v"]
    assert "changes z at others as well" in absent["pattern"]


def test_what_is_added_is_scaled_as_the_model_scales_it() -> None:
    model = zoo_model("granite", layers=2)
    kept = model.run(torch.arange(6)[None], keep=["input", "resid_pre", "attn_out", "mlp_out", "resid_post"])
    for layer in range(2):
        total = kept[f"L{layer}.resid_pre"] + kept[f"L{layer}.attn_out"] + kept[f"L{layer}.mlp_out"]
        assert torch.allclose(total, kept[f"L{layer}.resid_post"], atol=1e-5)
    assert torch.allclose(kept["input"], kept["L0.resid_pre"])


@pytest.mark.parametrize("name", ["opt", "falcon"])
def test_sizes_are_those_of_the_activations(name: str) -> None:
    model = zoo_model(name, layers=2)
    assert model.arch.d_mlp == model.run([1, 2, 3], keep="mlp_post")["L0.mlp_post"].shape[-1] == 12
    with pytest.raises(SiteError, match="neuron 12, but this model has 12"):
        model.run([1, 2, 3], edits=[pl.Edit("L0.N12.mlp_post", pl.sources.zero())])


def test_dead_parts_are_no_dropped_edits() -> None:
    module = zoo_module("gpt2", layers=2)
    with torch.no_grad():
        module.transformer.h[0].attn.c_attn.weight.zero_()
        module.transformer.h[0].attn.c_attn.bias.zero_()
        module.transformer.h[1].attn.c_proj.weight.zero_()
        module.transformer.h[1].attn.c_proj.bias.zero_()
        module.transformer.h[1].mlp.c_proj.weight.zero_()
        module.transformer.h[1].mlp.c_proj.bias.zero_()
    assert pl.wrap_bridge(zoo_bridge(module), "half dead").arch.absent == {}


def test_a_dropped_edit_of_a_dead_part_is_found_all_the_same() -> None:
    module = zoo_module("gpt2", layers=2)
    with torch.no_grad():
        module.transformer.h[1].mlp.c_proj.weight.zero_()
    bridge = zoo_bridge(module)
    hook = bridge.hook_dict["blocks.1.mlp.hook_post"]

    class Deaf(type(hook)):
        def __call__(self, value: Tensor) -> Tensor:
            return 0 * super().__call__(value) + value

    hook.__class__ = Deaf
    absent = pl.wrap_bridge(bridge, "deaf").arch.absent
    assert absent == {"mlp_post": "an edit is dropped: random values in layer 1 do not change mlp_out"}


def test_a_site_without_its_gradient_is_found() -> None:
    bridge = zoo_bridge(zoo_module("gpt2", layers=2))
    hook = bridge.hook_dict["blocks.1.mlp.hook_post"]

    class Cut(type(hook)):
        def __call__(self, value: Tensor) -> Tensor:
            out = super().__call__(value)
            return out.detach() + 0 * out

    hook.__class__ = Cut
    assert pl.wrap_bridge(bridge, "cut").arch.absent == {"mlp_post": "an edit in layer 1 changes the logits, but no gradient comes back"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_tested_as_strictly_as_single(dtype: torch.dtype) -> None:
    bridge = zoo_bridge(zoo_module("llama", dtype, layers=2))
    weights = {key: value.clone() for key, value in bridge.state_dict().items()}
    model = pl.wrap_bridge(bridge, "half")
    assert model.arch.absent == {}
    assert not [place for place in model.arch.places if place.problem]
    assert all(torch.equal(weights[key], value) and value.dtype == weights[key].dtype for key, value in bridge.state_dict().items())
    hook = bridge.hook_dict["blocks.1.attn.hook_z"]

    class Leaking(type(hook)):
        def __call__(self, value: Tensor) -> Tensor:
            return 0.99 * super().__call__(value) + 0.01 * value

    hook.__class__ = Leaking
    assert list(pl.wrap_bridge(bridge, "leaking").arch.absent) == ["z"]


def test_single_precision_holds_one_block_at_a_time() -> None:
    bridge = zoo_bridge(zoo_module("llama", torch.bfloat16, layers=3))
    model = Model(bridge, "half", test=False)
    widest: list[int] = []
    blocks = [dict(block.named_parameters()) for block in bridge.blocks]
    handle = bridge.hook_dict["blocks.1.mlp.hook_post"].register_forward_hook(
        lambda *_: widest.append(sum(next(iter(block.values())).dtype == torch.float32 for block in blocks))
    )
    with in_single_precision(model):
        logits = bridge(torch.tensor([[1, 2, 3]]), return_type="logits", use_cache=False)
    handle.remove()
    assert widest == [1]
    assert logits.dtype == torch.float32
    assert {parameter.dtype for parameter in bridge.parameters()} == {torch.bfloat16}
    assert np.isfinite(logits.numpy()).all()
