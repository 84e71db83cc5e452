"""Weight edits: they change what they say, undo themselves bit for bit, and are reported as they are."""

import threading

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, model_of, swap_task

from patchlab import weight_edit
from patchlab.errors import InterventionError, ModelError
from patchlab.models.model import fingerprint_of
from patchlab.weight_edit import Request, WeightEdit


def rows(n=4, length=6, seed=0):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.bridge.named_parameters()}


def same(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.bridge.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_neuron_writes_its_activation_times_the_change_on_every_family(family):
    model, tokens = model_of(family, torch.float64), rows()
    change = drawn(model.arch.d_model)
    keep = ["mlp_post", "mlp_out", "resid_post"]
    plain, before = model.run(tokens, keep=keep), bits(model)
    with weight_edit.edited(model, weight_edit.neuron_row(model, 1, 3, change)):
        found = model.run(tokens, keep=keep)
        assert not same(model, before)
    torch.testing.assert_close(found["L0.resid_post"], plain["L0.resid_post"])
    if family != "gemma2":  # whose MLP is followed by a norm
        expected = plain["L1.mlp_out"] + plain["L1.mlp_post"][..., 3:4] * change
        torch.testing.assert_close(found["L1.mlp_out"], expected)
    assert not torch.allclose(found.logits, plain.logits)
    assert same(model, before)
    torch.testing.assert_close(model.run(tokens).logits, plain.logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_fingerprint_come_back_bit_for_bit_also_after_an_exception(dtype):
    model = model_of("llama", dtype)
    before, fingerprint = bits(model), model.fingerprint
    huge = weight_edit.neuron_row(model, 0, 1, torch.full((model.arch.d_model,), 1e30))
    small = weight_edit.neuron_row(model, 0, 1, torch.full((model.arch.d_model,), 1e-3))
    with pytest.raises(RuntimeError, match="inside"), weight_edit.edited(model, [huge, small, small]):
        inner = model.fingerprint
        assert inner == fingerprint_of(model.bridge) != fingerprint
        with pytest.raises(ZeroDivisionError), weight_edit.edited(model, small):
            assert model.fingerprint not in ("", fingerprint)
            1 / 0  # noqa: B018
        assert model.fingerprint == inner
        raise RuntimeError("inside")
    assert same(model, before)
    assert model.fingerprint == fingerprint == fingerprint_of(model.bridge)


def test_weights_that_something_else_changed_are_noticed():
    model = model_of("gpt2")
    other = weight_edit.weight_of(model, "blocks.1.mlp.out")
    kept = other.detach().clone()
    with torch.no_grad(), pytest.raises(ModelError, match="something else changed them"):
        try:
            with weight_edit.edited(model, weight_edit.neuron_row(model, 0, 0, torch.ones(model.arch.d_model))):
                other.add_(1)
        finally:
            other.copy_(kept)
    model.fingerprint = fingerprint_of(model.bridge)


def test_other_threads_cannot_run_a_changed_model():
    model, problems = model_of("gpt2"), []

    def elsewhere():
        try:
            model.run(rows())
        except ModelError as error:
            problems.append(str(error))

    with weight_edit.edited(model, weight_edit.neuron_row(model, 0, 0, torch.ones(model.arch.d_model))):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(problems) == 1
    assert "in use" in problems[0]


def test_shared_runs_of_the_unchanged_model_are_not_used():
    """Inside a block that shares unpatched runs, a changed model has its own."""
    import patchlab as pl
    from patchlab.methods.setting.shared import sharing_runs

    model, task = model_of("gpt2"), swap_task()
    edit = weight_edit.neuron_row(model, 0, 0, torch.ones(model.arch.d_model) * 5)
    with weight_edit.edited(model, edit):
        alone = pl.AttributionPatching().run(model, task, "resid_pre").data["resid_pre"].to_numpy()
    with sharing_runs(model):
        plain = pl.AttributionPatching().run(model, task, "resid_pre").data["resid_pre"].to_numpy()
        with weight_edit.edited(model, edit):
            inside = pl.AttributionPatching().run(model, task, "resid_pre").data["resid_pre"].to_numpy()
        again = pl.AttributionPatching().run(model, task, "resid_pre").data["resid_pre"].to_numpy()
    np.testing.assert_array_equal(inside, alone)
    np.testing.assert_array_equal(again, plain)
    assert not np.array_equal(inside, plain)


@torch.no_grad()
def test_least_squares_solves_its_equations():
    """The normal equations of Σ ‖k (W + Δ) − (k W + r)‖² + strength · Σ over C ‖c Δ‖², and the values that they give."""
    model = model_of("gpt2", torch.float64)
    weight = weight_edit.weight_of(model, "blocks.1.mlp.out")
    d_in, d_out = weight.shape
    keys, residuals, others = drawn(3, d_in), drawn(3, d_out, seed=1), drawn(50, d_in, seed=2)
    c = others.T @ others / 50
    edit = weight_edit.least_squares(model, "blocks.1.mlp.out", keys, residuals, c, strength=2.0)
    delta = edit.change.clone().requires_grad_()
    with torch.enable_grad():
        loss = ((keys @ delta - residuals) ** 2).sum() + 2.0 * ((others @ delta) ** 2).sum() / 50
        (gradient,) = torch.autograd.grad(loss, delta)
    assert float(gradient.abs().max()) < 1e-9
    weak = weight_edit.least_squares(model, "blocks.1.mlp.out", keys, residuals, c, strength=1e-6)
    torch.testing.assert_close(keys @ weak.change, residuals, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_covariance_is_the_mean_over_tokens():
    model, tokens = model_of("gpt2", torch.float64), rows()
    k = model.run(tokens, keep="mlp_post")["L1.mlp_post"]
    expected = sum(torch.outer(k[row, t], k[row, t]) for row in range(4) for t in range(6)) / 24
    torch.testing.assert_close(weight_edit.covariance(model, 1, tokens), expected)


@torch.no_grad()
def test_the_report_counts_what_changed():
    model, tokens, elsewhere = model_of("gpt2", torch.float64), rows(5), rows(8, 7, seed=1)
    plain = model.run(tokens).logits[:, -1].argmax(-1)
    wanted = [int(plain[0]), *(int(token + 1) % VOCAB for token in plain[1:])]
    requests = [Request(tuple(row.tolist()), token) for row, token in zip(tokens, wanted, strict=True)]
    edits = [[weight_edit.neuron_row(model, 2, i, drawn(model.arch.d_model, seed=i) * 3)] for i in range(5)]
    found = weight_edit.report(model, requests, edits, others={"else": elsewhere}, together=[2, 5])
    before = model.run(elsewhere).logits[:, -1]
    for i, own in enumerate(edits):
        with weight_edit.edited(model, own):
            top, after = model.run(tokens).logits[:, -1].argmax(-1), model.run(elsewhere).logits[:, -1]
        row = found.alone.iloc[i]
        assert row["success"] == float(top[i] == wanted[i])
        assert row["others_kept"] == sum(float(top[j] == plain[j]) for j in range(5) if j != i) / 4
        assert row["kept else"] == float((after.argmax(-1) == before.argmax(-1)).double().mean())
        kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
        assert row["kl else"] == pytest.approx(float(kl))
        assert row["size"] == pytest.approx(float(own[0].change.norm()))
    with weight_edit.edited(model, [edits[0][0], edits[1][0]]):
        top = model.run(tokens).logits[:, -1].argmax(-1)
    row = found.together.iloc[0]
    assert row["edits"] == 2
    assert row["success"] == sum(float(top[j] == wanted[j]) for j in range(2)) / 2
    assert row["others_kept"] == sum(float(top[j] == plain[j]) for j in range(2, 5)) / 3
    assert np.isnan(found.together.iloc[1]["others_kept"]), "no request is left that should stay"
    mean, low, high = found.interval("success")
    assert low <= mean <= high
    assert "5 together: success" in repr(found)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda model: weight_edit.weight_of(model, "blocks.1.mlp.uot"), "did you mean 'blocks.1.mlp.out'"),
        (lambda model: weight_edit.neuron_row(model, 0, 999, torch.ones(model.arch.d_model)), "has the neurons 0 to"),
        (lambda model: weight_edit.neuron_row(model, 0, 0, torch.ones(3)), "vectors of 16 numbers"),
        (lambda model: enter(model, WeightEdit("blocks.0.mlp.out", torch.ones(2, 2))), r"and the change \[2, 2\]"),
        (lambda model: enter(model, weight_edit.neuron_row(model, 0, 0, torch.full((16,), torch.nan))), "NaN"),
        (lambda model: weight_edit.least_squares(model, "blocks.0.mlp.out", torch.ones(1, 3), torch.ones(1, 16), torch.eye(3)), "keys are"),
        (lambda model: weight_edit.report(model, [], []), "each request has its own"),
        (lambda model: weight_edit.report(model, [Request((1, 2), 3)], [[]], together=[2]), "between 1 and 1"),
    ],
)
def test_what_cannot_be_edited_is_refused(ask, says):
    with pytest.raises(InterventionError, match=says):
        ask(model_of("gpt2"))


def enter(model, edit):
    with weight_edit.edited(model, edit):
        pass


def test_keys_that_leave_directions_open_are_refused():
    model = model_of("gpt2")
    size = weight_edit.weight_of(model, "blocks.0.mlp.out").shape[0]
    with pytest.raises(InterventionError, match="directions without keys"):
        weight_edit.least_squares(model, "blocks.0.mlp.out", torch.ones(1, size), torch.ones(1, 16), torch.zeros(size, size))
