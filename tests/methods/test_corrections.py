"""QK-fix and GradDrop against slow, literal float64 twins on plain Hugging Face models; and how they combine with the rest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import HEADS, LAYERS, hf_module, mixed_task, model_of, scores_of, swap_task, untested
from raw_model import Key, RawModel
from torch import Tensor

import patchlab as pl
from patchlab.errors import MethodError, ScoreError
from patchlab.methods import LinearizedPatching, get_method
from patchlab.models import Model
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import Pair, Task
from patchlab.testing import check_method, linear_toy, toy_task

KV_HEADS = {"gpt2": 4, "llama": 2, "qwen2": 2, "qwen3": 2, "gemma2": 2}
CLOSE = {"gpt2": 1e-9, "llama": 1e-5, "qwen2": 1e-5, "qwen3": 1e-5, "gemma2": 1e-5}
"""All but GPT-2 compute softmax and norms in float32 whatever their dtype."""


@cache
def plain(family: str) -> Any:
    return hf_module(family, torch.float64)


@contextmanager
def projections(module: Any, family: str, change: Callable[[str, int, Tensor], Tensor]) -> Iterator[None]:
    """Let ``change(kind, layer, value[pos, head, d_head])`` see and replace all queries and keys, as they leave their projection."""

    def joint(layer: int) -> Any:
        def hook(layer_module: Any, args: Any, out: Tensor) -> Tensor:
            q, k, v = out[0].chunk(3, -1)
            q, k = (change(kind, layer, x.unflatten(-1, (HEADS, -1))).flatten(-2) for kind, x in (("q", q), ("k", k)))
            return torch.cat([q, k, v], -1)[None]

        return hook

    def split(kind: str, layer: int, n: int) -> Any:
        return lambda m, args, out: change(kind, layer, out[0].unflatten(-1, (n, -1))).flatten(-2)[None]

    handles = []
    for layer in range(LAYERS):
        if family == "gpt2":
            handles.append(module.transformer.h[layer].attn.c_attn.register_forward_hook(joint(layer)))
        else:
            attention = module.model.layers[layer].self_attn
            handles.append(attention.q_proj.register_forward_hook(split("q", layer, HEADS)))
            handles.append(attention.k_proj.register_forward_hook(split("k", layer, KV_HEADS[family])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _metric(logits: Tensor, one: Pair) -> Tensor:
    return logits[0, -1, one.correct[0]] - logits[0, -1, one.incorrect[0]]


def queries_and_keys(family: str, tokens: tuple[int, ...]) -> dict[tuple[str, int], Tensor]:
    seen: dict[tuple[str, int], Tensor] = {}

    def look(kind: str, layer: int, value: Tensor) -> Tensor:
        seen[kind, layer] = value
        return value

    with torch.no_grad(), projections(plain(family), family, look):
        plain(family)(torch.tensor([tokens]))
    return seen


def literal_qk(family: str, task: Task, name: str, *, queries_for_keys: bool = False) -> np.ndarray:
    """One prompt, one cell, one forward pass: change of that layer's attentions times their gradient."""
    module, site = plain(family), Site.parse(name)
    kind, per_pos = site.kind, "pos" in site.axes
    heads = HEADS if kind == "q" else KV_HEADS[family]
    rows = []
    for one in task.pairs:
        with torch.enable_grad():
            out = module(torch.tensor([one.corrupted_ids]), output_attentions=True, use_cache=False)
            gradients = torch.autograd.grad(_metric(out.logits, one), out.attentions)
        attentions = [attention.detach() for attention in out.attentions]
        source = queries_and_keys(family, one.clean_ids)
        length = len(one.clean_ids)
        cells = np.zeros((LAYERS, length, heads) if per_pos else (LAYERS, heads))
        for index in np.ndindex(*cells.shape):
            layer, head = index[0], index[-1]
            where = slice(None) if not per_pos else index[1]

            def patch(at: str, here: int, value: Tensor, layer: int = layer, head: int = head, where: Any = where, source: Any = source) -> Tensor:
                if (at, here) != (kind, layer):
                    return value
                value = value.clone()
                value[where, head] = source["q" if queries_for_keys else kind, layer][where, head]
                return value

            with torch.no_grad(), projections(module, family, patch):
                patched = module(torch.tensor([one.corrupted_ids]), output_attentions=True, use_cache=False).attentions[layer]
            cells[index] = float(((patched - attentions[layer]) * gradients[layer]).sum())
        rows.append(cells)
    return np.stack(rows)


def _agree(got: np.ndarray, expected: np.ndarray, rtol: float, what: str) -> None:
    largest = float(np.abs(expected).max())
    assert largest > 1e-4, what
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * largest, err_msg=what)


def _double(family: str) -> Model:
    return model_of(family, torch.float64)


@pytest.mark.parametrize("family", KV_HEADS)
def test_qk_fix_against_its_literal_twin(family: str) -> None:
    """With fused and separate projections, rotary embedding, q/k-norms, grouped keys, softcaps and sliding windows."""
    task, sites = swap_task(n=1), ("q", "k", "q[layer,pos,head]", "k[layer,pos,kv_head]")
    scores = scores_of(get_method("atp+qk"), _double(family), task, sites)
    for name in sites:
        _agree(scores.data[name].to_numpy(), literal_qk(family, task, name), CLOSE[family], name)
    without = scores_of(get_method("atp"), _double(family), task, sites)
    for name in sites:
        assert float(np.abs(scores.data[name] - without.data[name]).max()) > 0.02 * float(np.abs(scores.data[name]).max()), name


def test_keys_are_fixed_with_keys() -> None:
    """Putting the other run's queries where its keys belong, a mistake that has been shipped, gives clearly other scores."""
    task = swap_task(n=2)
    scores = scores_of(get_method("atp+qk"), _double("gpt2"), task, "k").data["k"].to_numpy()
    right, wrong = (literal_qk("gpt2", task, "k", queries_for_keys=wrong) for wrong in (False, True))
    _agree(scores, right, 1e-9, "k")
    assert np.abs(right - wrong).max() > 0.5 * np.abs(right).max()


def literal_drop(raw: RawModel, task: Task, name: str) -> np.ndarray:
    """Prompt by prompt, layer by layer: what the layer adds is cut out of the graph, and everything inside it scores nothing."""
    site, kind = Site.parse(name), Site.parse(name).kind
    inside = kind not in ("input", "resid_pre", "resid_mid", "resid_post")
    rows = []
    for one in task.pairs:
        other = raw.run(one.clean_ids)[1]
        terms = []
        for drop in range(LAYERS):
            cut: dict[Key, Any] = {(where, drop): torch.detach for where in ("attn_out", "mlp_out")}
            logits, seen = raw.run(one.corrupted_ids, cut, grad=True)
            layers = [None] if kind == "input" else list(range(LAYERS))
            found = torch.autograd.grad(_metric(logits[None, None], one), [seen[kind, layer] for layer in layers], allow_unused=True)
            products = []
            for layer, gradient in zip(layers, found, strict=True):
                own = seen[kind, layer].detach()
                dead = gradient is None or (inside and layer == drop)
                products.append(torch.zeros_like(own) if dead else (other[kind, layer] - own) * gradient)
            product = products[0] if kind == "input" else torch.stack(products)
            names = [*KINDS[kind].axes, "width"][: product.ndim]
            terms.append(product.sum([dim for dim, axis in enumerate(names) if axis not in site.axes]).abs())
        rows.append(torch.stack(terms).sum(0) / (LAYERS - 1 if inside else LAYERS))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_grad_drop_against_its_literal_twin(family: str) -> None:
    task = swap_task(n=2)
    sites = ("input", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "v[layer,pos,kv_head]")
    scores = scores_of(get_method("atp+drop"), _double(family), task, sites)
    raw = RawModel(hf_module(family, torch.float64), HEADS, KV_HEADS[family])
    for name in sites:
        expected = literal_drop(raw, task, name)
        _agree(scores.data[name].to_numpy(), expected, CLOSE[family], name)
        assert (scores.data[name].to_numpy() >= 0).all()
    assert (scores.cost.forwards, scores.cost.backwards) == (2 + LAYERS, LAYERS)


def test_atp_star_is_grad_drop_of_the_fixed_scores() -> None:
    """Per dropped layer the pattern's gradient changes; its change does not. Last-layer queries feel only the other layers' drops: none."""
    task = swap_task(n=2)
    star, fixed = (scores_of(get_method(name), _double("llama"), task, ["q", "k"]) for name in ("atp*", "atp+qk"))
    for name in ("q", "k"):
        last = fixed.data[name].isel(layer=LAYERS - 1).to_numpy()
        np.testing.assert_allclose(star.data[name].isel(layer=LAYERS - 1).to_numpy(), np.abs(last), rtol=1e-5, atol=1e-9)
        first = fixed.data[name].isel(layer=0).to_numpy()
        assert np.abs(star.data[name].isel(layer=0).to_numpy() - np.abs(first)).max() > 0.02 * np.abs(first).max()


@cache
def _nearly_linear() -> Model:
    """GPT-2 with attention scores so small that the softmax is a straight line."""
    module = hf_module("gpt2", torch.float64)
    for block in module.transformer.h:
        block.attn.c_attn.weight.data[:, :32] *= 1e-2
        block.attn.c_attn.bias.data[:32] *= 1e-2
    return untested(module, "nearly linear")


@pytest.mark.parametrize("name", ["atp", "relp", "attnlrp", "gim"])
def test_qk_fix_changes_nothing_where_the_softmax_is_linear(name: str) -> None:
    """Shares of the bilinear rules stay as they are."""
    task, sites = swap_task(n=2), ["q", "k[layer,pos,kv_head]"]
    fixed, without = (scores_of(get_method(which), _nearly_linear(), task, sites) for which in (f"{name}+qk", name))
    for site in sites:
        expected = without.data[site].to_numpy()
        np.testing.assert_allclose(fixed.data[site].to_numpy(), expected, rtol=0, atol=5e-3 * np.abs(expected).max())


def test_qk_fix_touches_only_queries_and_keys() -> None:
    task, sites = swap_task(n=2), ["resid_pre", "z", "v", "pattern", "q"]
    fixed, without = (scores_of(get_method(name), model_of("llama"), task, sites) for name in ("relp+qk", "relp"))
    for site in sites[:-1]:
        np.testing.assert_array_equal(fixed.data[site], without.data[site])
    assert float(np.abs(fixed.data["q"] - without.data["q"]).max()) > 0


def test_qk_fix_scores_queries_and_keys_of_a_constant_pattern() -> None:
    task = swap_task(n=2)
    scores = scores_of(get_method("relp-ah+qk"), _double("llama"), task, ["q", "k"])
    assert scores.provenance["not_scored"] == {}
    assert float(np.abs(scores.data["q"]).max()) > 1e-3
    assert any("QK-fix" in note and "AHRule" in note for note in scores.provenance["notes"])
    assert "q" in scores_of(get_method("relp-ah"), _double("llama"), task, ["q"]).provenance["not_scored"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atp*", "atp+qk", "relp+qk+drop", "ig:2+qk", "ig:2+drop", "relp-ah+qk"])
def test_corrected_methods_keep_the_contract(name: str) -> None:
    check_method(get_method(name), model_of("qwen3", layers=2), swap_task(), ("resid_pre", "z", "mlp_post", "q", "k", "k[layer,pos]", "pattern"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["zero", "mean", "mean_positional"])
def test_sources(source: str) -> None:
    method = pl.AttributionPatching(source=source, qk_fix=True, grad_drop=True)
    check_method(method, model_of("neox", layers=2), swap_task(), ("attn_out", "q", "k[layer,pos,kv_head]"))


def test_positions_by_name_are_direct_indices() -> None:
    task, sites = mixed_task(), ["q[layer,pos,head]", "k[layer,pos,kv_head]"]
    model, method = _double("qwen2"), get_method("atp+qk")
    scores = scores_of(method, model, task, sites)
    names = scores.data["position"].to_numpy().tolist()
    for e, one in enumerate(task.pairs):
        alone = scores_of(method, model, Task("alone", (one,), task.metric), sites)
        index = [one.positions[name] for name in names]
        for site in sites:
            np.testing.assert_allclose(scores.data[site][e], alone.data[site].isel(example=0, pos=index), rtol=1e-4, atol=1e-6)


def test_surrounding_edits_are_honoured() -> None:
    """Freezing a layer's attention to zero from outside: queries and keys there no longer matter, those before it still do."""
    model, task = _double("gpt2"), swap_task(n=2)
    with pl.intervene(model, pl.Edit("L1.attn_out", pl.sources.zero())):
        fixed, exact = (scores_of(get_method(name), model, task, ["q", "k"]) for name in ("atp+qk", "exact"))
    for site in ("q", "k"):
        for scores in (fixed, exact):
            assert float(np.abs(scores.data[site].isel(layer=1)).max()) < 1e-12
        assert np.corrcoef(fixed.data[site].to_numpy().ravel(), exact.data[site].to_numpy().ravel())[0, 1] > 0.9


def test_names_and_costs() -> None:
    for name in ("atp*", "atp+qk", "atp+drop", "relp+qk", "relp+qk+drop", "ig:3+drop", "relp+ig:2+qk", "gim+qk+drop"):
        assert get_method(name).name == name
    assert get_method("atp+qk+drop").name == "atp*"
    assert pl.RelevancePatching(qk_fix=True).name == "relp+qk"
    assert pl.IntegratedGradients(2, grad_drop=True).name == "ig:2+drop"
    model, task = model_of("gpt2"), swap_task(n=4, length=5, changed=(1, 3))
    # q and k need a forward pass each; k by position one per position that is not a structural zero (four of five)
    for sites, passes in ((["q", "q[layer,pos,head]"], 1), (["q", "k"], 2), (["k", "k[layer,pos]", "k[layer,pos,kv_head]"], 1 + 4), (["z"], 0)):
        cost = scores_of(get_method("atp+qk"), model, task, sites).cost
        assert (cost.forwards, cost.backwards) == (2 + passes, 1), sites


def test_grad_drop_is_unsigned_and_compared_as_such() -> None:
    task, sites = swap_task(), ["z", "q"]
    exact, star, atp = (scores_of(get_method(name), model_of("gpt2"), task, sites) for name in ("exact", "atp*", "atp"))
    assert star.provenance["unsigned"]
    assert not atp.provenance["unsigned"]
    assert any("unsigned" in note for note in star.provenance["notes"])
    comparison = pl.compare(exact, {"AtP*": star, "AtP": atp}, n_boot=20)
    row = comparison.table.set_index(["method", "site", "cells"]).loc["AtP*", "z", "all"]
    assert np.isnan(row["sign_agreement"])
    size, other = (np.abs(scores.data["z"].mean("example").to_numpy()).ravel() for scores in (exact, star))
    assert row["pearson"] == pytest.approx(np.corrcoef(size, other)[0, 1])
    assert row["slope"] == pytest.approx((size * other).sum() / (size**2).sum())
    signed = comparison.table.set_index(["method", "site", "cells"]).loc["AtP", "z", "all"]
    mean, own = (scores.data["z"].mean("example").to_numpy().ravel() for scores in (exact, atp))
    assert signed["pearson"] == pytest.approx(np.corrcoef(mean, own)[0, 1])
    assert any(note.startswith("AtP*: its scores are unsigned") for note in comparison.notes)
    with pytest.raises(ScoreError, match=r"reference atp\* is unsigned"):
        pl.compare(star, {"AtP": atp})


def test_what_cannot_be_corrected_is_refused() -> None:
    with pytest.raises(MethodError, match="QK-fix needs the coefficient of the pattern"):
        LinearizedPatching(n_steps=3, over="activations", qk_fix=True)
    model = linear_toy(1)
    with pytest.raises(MethodError, match="only one; use"):
        scores_of(get_method("atp+drop"), model, toy_task(model), "resid_pre")
    with pytest.raises(MethodError, match="unknown method 'exact\\+qk'"):
        get_method("exact+qk")
