"""Two-edge paths against a head that is computed again by hand, with everything else as it was, and what is refused."""

import numpy as np
import pytest
import torch
from families import FAMILIES, HEADS, LAYERS, hf_module, model_of, swap_task

from patchlab import lenses
from patchlab.errors import LensError, SiteError


@torch.no_grad()
def test_paths_are_those_of_weights_written_out():
    """GPT-2 from its own weights: one neuron's output is taken off what the values of one head read; the rest is held."""
    model, task, module = model_of("gpt2", torch.float64), swap_task(), hf_module("gpt2", torch.float64)
    found = lenses.head_paths(model, task, "L0.mlp_post", entries=[2, 5])
    kept = model.run(task.prompts("clean"), keep=["resid_pre", "resid_post", "mlp_post", "pattern"])
    width, d_head = model.arch.d_model, model.arch.d_head
    for layer in range(1, LAYERS):
        block, x = module.transformer.h[layer], kept[f"L{layer}.resid_pre"]
        w_v = block.attn.c_attn.weight[:, 2 * width :]
        centred = x - x.mean(-1, keepdim=True)
        denominator = (centred.square().mean(-1, keepdim=True) + block.ln_1.eps).sqrt()
        for head in range(HEADS):
            part = slice(head * d_head, (head + 1) * d_head)
            for column, neuron in enumerate((2, 5)):
                written = kept["L0.mlp_post"][..., neuron, None] * module.transformer.h[0].mlp.c_proj.weight[neuron]
                change = (written - written.mean(-1, keepdim=True)) / denominator * block.ln_1.weight @ w_v[:, part]
                at_end = torch.einsum("rp,rpd->rd", kept[f"L{layer}.pattern"][:, head, -1], change) @ block.attn.c_proj.weight[part]
                last = kept[f"L{LAYERS - 1}.resid_post"][:, -1]
                spread = ((last - last.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + module.transformer.ln_f.eps).sqrt()
                read = (at_end - at_end.mean(-1, keepdim=True)) / spread * module.transformer.ln_f.weight
                logits = read @ module.lm_head.weight.T
                for row, pair in enumerate(task.pairs):
                    expected = float(logits[row, list(pair.correct)].mean() - logits[row, list(pair.incorrect)].mean())
                    got = float(found.effects.sel(layer=layer)[row, column, head])
                    assert got == pytest.approx(expected, rel=1e-5, abs=1e-9)
    torch.testing.assert_close(torch.tensor(found.stream), kept[f"L{LAYERS - 1}.resid_post"][:, -1].norm(dim=-1))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "native"])
@torch.no_grad()
def test_the_paths_of_parts_add_up_to_those_of_the_whole_on_every_family(family):
    """Neurons and the MLP's bias make the MLP; heads and the attention's bias the attention. Zero biases, or none, leave nothing over."""
    model, task = model_of(family, torch.float64), swap_task()
    whole = lenses.head_paths(model, task, "L0.attn_out").vectors.to_numpy()[:, 0]
    heads = lenses.head_paths(model, task, "L0.z").vectors.to_numpy()
    kept = model.run(task.prompts("clean"), keep=["z", "attn_out", "mlp_post", "mlp_out"])
    biased = bool(getattr(model.bridge.blocks[0].attn.o.original_component, "bias", None) is not None)
    if not biased:
        np.testing.assert_allclose(heads.sum(1), whole, rtol=1e-4, atol=1e-7)
    neurons = lenses.head_paths(model, task, "L0.mlp_post").vectors.to_numpy()
    if getattr(model.bridge.blocks[0].mlp.out.original_component, "bias", None) is None:
        np.testing.assert_allclose(neurons.sum(1), lenses.head_paths(model, task, "L0.mlp_out").vectors.to_numpy()[:, 0], rtol=1e-4, atol=1e-7)
    one = lenses.head_paths(model, task, "L0.N3.mlp_post").vectors.to_numpy()
    np.testing.assert_allclose(one[:, 0], neurons[:, 3], rtol=1e-6, atol=1e-12)
    assert kept["L0.mlp_post"].shape[-1] == neurons.shape[1]


@torch.no_grad()
def test_plain_prompts_have_vectors_and_no_effects():
    model, task = model_of("llama", torch.float64), swap_task()
    plain = lenses.head_paths(model, task.prompts("clean").tokens, "a0.h1")
    assert plain.effects is None
    np.testing.assert_allclose(plain.vectors, lenses.head_paths(model, task, "L0.z", entries=[1]).vectors)
    assert "1 entries" in repr(plain)


@pytest.mark.parametrize(
    ("writer", "options", "error", "says"),
    [
        ("L0.resid_pre", {}, SiteError, "a writer is one of"),
        ("z", {}, SiteError, "of a layer"),
        ("L0.z@END", {}, SiteError, "at all positions"),
        ("L2.mlp_out", {}, LensError, "no heads come after layer 2"),
        ("L0.z", {"entries": [4]}, SiteError, "entries 0 to 3"),
        ("L0.z", {"entries": []}, SiteError, r"got \[\]"),
    ],
)
def test_what_has_no_paths_is_refused(writer, options, error, says):
    with pytest.raises(error, match=says):
        lenses.head_paths(model_of("gpt2"), swap_task(), writer, **options)
