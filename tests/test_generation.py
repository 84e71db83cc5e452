"""Generation against whole forward passes, one per token, with and without a cache, and with edits at chosen steps."""

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, model_of, native_model

import patchlab as pl
from patchlab import generation
from patchlab.errors import InterventionError
from patchlab.tasks.task import Prompts


def rows(n=3, length=5, seed=0):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def literal(model, tokens, n, edits_of=lambda step, tokens: []):
    """Greedy generation by whole passes. ``edits_of`` gives (site, vector to add) for each step."""
    acting, start = [], tokens.shape[1]
    for step in range(n):
        length = tokens.shape[1]
        first = 0 if step == 0 else length - 1
        acting += [(first, length, *one) for one in edits_of(step, tokens)]
        edits = []
        for a, b, address, value in acting:
            edits.append(pl.Edit(f"{address}@{','.join(map(str, range(a, b)))}", value, op="add"))
        tokens = torch.cat([tokens, model.run(tokens, edits=edits).logits[:, -1].argmax(-1)[:, None]], 1)
    return tokens[:, start:]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_changes_nothing_on_any_family(family):
    model, tokens = model_of(family, torch.float64), rows()
    vector = torch.randn(model.arch.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    edit = pl.Edit("L1.resid_post", vector, op="add")
    for options in ({}, {"edits": edit, "steps": [0, 2]}, {"edits": edit, "steps": [1]}):
        kept, whole = (generation.generate(model, tokens, 4, cache=cache, **options) for cache in (True, False))
        assert (kept.cached, whole.cached) == (family != "native", False)
        assert torch.equal(kept.tokens, whole.tokens)
        torch.testing.assert_close(kept.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
        steps = options.get("steps", [])
        expected = literal(model, tokens, 4, lambda step, _, steps=steps: [("L1.resid_post", vector)] if step in steps else [])
        assert torch.equal(kept.tokens, expected)


@torch.no_grad()
def test_edits_at_chosen_steps_matter():
    model, tokens = model_of("gpt2", torch.float64), rows(20)
    vector = torch.randn(model.arch.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 9
    edit = pl.Edit("L2.resid_post@END", vector, op="add")
    plain, first, second = (generation.generate(model, tokens, 3, edits=edit, steps=steps).tokens for steps in ([], [0], [1]))
    assert not torch.equal(plain[:, 0], first[:, 0])
    assert torch.equal(plain[:, 0], second[:, 0])
    assert not torch.equal(plain[:, 1], second[:, 1])


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_another_models_activations_are_patched_in_token_by_token(cache):
    """A function of the step and the rows so far; its source is a run of the other model on all of them."""
    model, other = model_of("gpt2", torch.float64), model_of("qwen2", torch.float64)
    assert model.arch.d_model == other.arch.d_model
    tokens = rows()

    def from_other(step, so_far):
        return [pl.Edit("L1.resid_post", other.run(so_far, keep="L1.resid_post"))]

    found = generation.generate(model, tokens, 3, edits=from_other, cache=cache)
    whole = tokens
    for _ in range(3):
        logits = model.run(whole, edits=[pl.Edit("L1.resid_post", other.run(whole, keep="L1.resid_post"))]).logits
        whole = torch.cat([whole, logits[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(found.tokens, whole[:, 5:])


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_positions_of_the_prompt_act_in_the_first_step_and_end_in_each(cache):
    model, name = model_of("gpt2", torch.float64), "A"
    prompts = Prompts(rows(), torch.arange(3), {name: torch.tensor([1, 2, 3]), "END": torch.tensor([4, 4, 4])})
    kept = model.run(rows(seed=9), keep="resid_pre")
    edits = [pl.Edit(f"L1.resid_pre@{name}", kept), pl.Edit("L1.resid_pre@-2", 1.0, op="add"), pl.Edit("L2.attn_out@END", 0.0)]
    found = generation.generate(model, prompts, 2, edits=edits, cache=cache)
    first = model.run(prompts, edits=edits).logits[:, -1].argmax(-1)
    assert torch.equal(found.tokens[:, 0], first)
    longer = torch.cat([prompts.tokens, first[:, None]], 1)
    length = longer.shape[1]
    wider = torch.cat([kept["L1.resid_pre"], torch.zeros(len(longer), 1, model.arch.d_model, dtype=torch.float64)], 1)
    again = [
        pl.Edit(f"L1.resid_pre@{name}", wider),
        pl.Edit(f"L1.resid_pre@{length - 3}", 1.0, op="add"),
        pl.Edit(f"L2.attn_out@{length - 2},{length - 1}", 0.0),
    ]
    second = model.run(longer, edits=again, positions={name: prompts.positions[name]}).logits[:, -1].argmax(-1)
    assert torch.equal(found.tokens[:, 1], second)


@torch.no_grad()
def test_edits_that_surround_act_on_the_whole_text():
    model, tokens = model_of("gpt2", torch.float64), rows(8)
    with pl.intervene(model, pl.Edit("L1.mlp_out", 0.0)):
        found = generation.generate(model, tokens, 3)
    assert not found.cached
    assert torch.equal(found.tokens, generation.generate(model, tokens, 3, edits=pl.Edit("L1.mlp_out", 0.0)).tokens)
    assert not torch.equal(found.tokens, generation.generate(model, tokens, 3).tokens)


@torch.no_grad()
def test_draws_follow_the_distribution_and_depend_on_row_and_step_alone():
    model = model_of("gpt2", torch.float64)
    tokens = rows(1).expand(2000, -1)
    found = generation.generate(model, tokens, 1, temperature=0.7, seed=3)
    p = (model.run(tokens[:1]).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(found.tokens[:, 0], minlength=model.vocab_size) / 2000
    assert float((counts - p).abs().max()) < 4 * math.sqrt(0.25 / 2000)
    expected = model.run(tokens[:1]).logits[0, -1].log_softmax(-1)[found.tokens[:, 0]]
    torch.testing.assert_close(found.logprobs[:, 0], expected, rtol=1e-5, atol=1e-5)
    few = generation.generate(model, tokens[:3], 1, temperature=0.7, seed=3)
    assert torch.equal(few.tokens, found.tokens[:3])
    assert not torch.equal(generation.generate(model, tokens, 1, temperature=0.7, seed=4).tokens, found.tokens)
    two = generation.generate(model, tokens, 1, temperature=5, top_k=2).tokens
    assert set(two.ravel().tolist()) == set(p.topk(2).indices.tolist())
    assert torch.equal(generation.generate(model, tokens[:4], 2, temperature=1, top_k=1).tokens, generation.generate(model, tokens[:4], 2).tokens)


@torch.no_grad()
def test_a_stop_token_ends_a_row():
    model, tokens = model_of("gpt2", torch.float64), rows(6)
    plain = generation.generate(model, tokens, 5)
    stop = int(plain.tokens[0, 2])
    found = generation.generate(model, tokens, 5, stop=stop)
    for row in range(6):
        where = (plain.tokens[row] == stop).nonzero().ravel().tolist()
        assert int(found.lengths[row]) == (where[0] if where else 5)
    one = generation.generate(model, tokens[:1], 5, stop=[stop])
    assert one.tokens.shape[1] == int(one.lengths[0]) + 1
    assert plain.lengths.tolist() == [5] * 6


@torch.no_grad()
def test_sequence_logprobs_are_those_of_one_token_after_the_other():
    model, tokens, answers = model_of("llama", torch.float64), rows(), rows(3, 3, seed=5)
    edit = pl.Edit("L1.resid_pre@END", 2.0, op="add")
    found = generation.sequence_logprobs(model, tokens, answers, edits=edit)
    for row in range(3):
        so_far = tokens[row].tolist()
        for i, wanted in enumerate(answers[row].tolist()):
            logits = model.run(so_far, edits=[pl.Edit("L1.resid_pre@4", 2.0, op="add")]).logits[0, -1]
            p = np.exp(logits.numpy() - logits.max().item())
            assert float(found[row, i]) == pytest.approx(math.log(p[wanted] / p.sum()), rel=1e-6)
            so_far.append(wanted)
    one = generation.sequence_logprobs(model, tokens, answers[:1])
    assert torch.equal(one, generation.sequence_logprobs(model, tokens, answers[:1].expand(3, -1)))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda model: generation.generate(model, rows(), 0), "at least 1 token"),
        (lambda model: generation.generate(model, rows(), 1, temperature=-1), "temperature of at least 0"),
        (lambda model: generation.generate(model, rows(), 1, top_k=0), "from at least 1"),
        (lambda model: generation.generate(model, rows(), 99), "Make at most"),
        (lambda model: generation.generate(model, rows(), 1, edits=pl.Edit("L0.pattern", 0.0)), "pairs of positions"),
        (lambda model: generation.generate(model, rows(), 1, edits=pl.Edit("L0.z@5", 0.0)), r"0 to 4"),
        (lambda model: generation.generate(model, rows(), 1, edits=pl.Edit("L0.z@S1", 0.0)), "names the position 'S1'"),
        (lambda model: generation.generate(model, rows(), 1).texts(model), "has no tokenizer"),
        (lambda model: generation.sequence_logprobs(model, rows(), rows(2, 2)), "one answer for all"),
        (lambda model: generation.sequence_logprobs(model, rows(), [[1, 2], [1], [2]]), "one common number"),
    ],
)
def test_what_cannot_be_generated_is_refused(ask, says):
    with pytest.raises(InterventionError, match=says):
        ask(model_of("gpt2"))


def test_as_many_tokens_as_the_model_reads_can_be_made():
    model = native_model("short", n_ctx=8)
    assert generation.generate(model, rows(1), 4).tokens.shape == (1, 4)
