"""Parts of recipes against what they stand for, written out."""

import numpy as np
import pytest
import torch
from families import model_of, swap_task

import patchlab as pl
from patchlab.errors import TextError
from patchlab.recipes import multi_layer_sae
from patchlab.recipes.das import as_dictionary
from patchlab.recipes.mint import basis_step
from patchlab.recipes.multi_layer_sae import layer_variance
from patchlab.recipes.recipe import Inputs
from patchlab.recipes.second_order import first_share


def test_a_subspace_as_a_dictionary_is_interchanged_like_one():
    """Its features set to another run's: h + (h' − h) B Bᵀ."""
    model, task = model_of("gpt2", torch.float64), swap_task()
    basis = torch.linalg.qr(torch.randn(model.arch.d_model, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    clean, corrupted = task.prompts("clean"), task.prompts("corrupted")
    model.add_dictionaries(as_dictionary(basis, 1))
    try:
        kept = model.run(clean, keep=["features.resid_post", "resid_post"])
        edited = model.run(corrupted, edits=[pl.Edit("L1.features.resid_post", kept)], keep=["resid_post"])
    finally:
        model.drop_dictionaries()
    own = model.run(corrupted, keep=["resid_post"])["L1.resid_post"]
    torch.testing.assert_close(edited["L1.resid_post"], own + (kept["L1.resid_post"] - own) @ basis @ basis.T)


def test_the_step_of_a_repair_moves_two_logits_apart_and_no_other():
    model = model_of("gpt2", torch.float64)
    step = basis_step(model, 3, 7)
    assert float(step.norm()) == pytest.approx(1)
    unembed = model.bridge.unembed.original_component.weight
    change = unembed @ step
    projection = unembed @ torch.linalg.pinv(unembed)
    expected = projection[:, 3] - projection[:, 7]
    torch.testing.assert_close(change / change.norm(), expected / expected.norm())


def test_layer_variances_by_hand():
    weights = torch.zeros(2, 3, 2)
    weights[0, 0, 0] = weights[1, 2, 0] = 1  # one layer per token, two over tokens
    weights[0, :, 1] = 1  # all layers of one token
    over, within = layer_variance(weights)
    assert over == pytest.approx((1 + 2 / 3) / 2)
    assert within == pytest.approx((0 + 2 / 3) / 2)


def test_the_share_of_one_direction():
    assert first_share(np.outer([1.0, 2, 3], [1.0, 1])) == pytest.approx(1)
    assert first_share(np.eye(4)) == pytest.approx(0.25)
    assert first_share(np.zeros((2, 2))) == 0


def test_an_autoencoder_is_not_tested_on_rows_that_it_was_trained_on(demo_gpt2_4l, tmp_path, monkeypatch):
    """Of a file the first rows are the test; a file without more is refused."""
    lines = [demo_gpt2_4l.bridge.tokenizer.decode(row[1:]) for row in pl.texts.sentences(demo_gpt2_4l, 60, seed=3)]
    (tmp_path / "text.txt").write_text("\n".join(lines * 20), encoding="utf-8")
    (tmp_path / "short.txt").write_text(lines[0], encoding="utf-8")
    seen = []

    def trained(model, rows, seed):
        seen.append(rows)
        raise RuntimeError("trained")

    monkeypatch.setattr(multi_layer_sae, "trained", trained)
    inputs = Inputs(demo_gpt2_4l, file=tmp_path / "text.txt", scale=0.2)
    with pytest.raises(RuntimeError, match="trained"):
        multi_layer_sae.multi_layer_sae(inputs)
    every, test = inputs.texts(48 + 256), inputs.texts(48)
    assert [row.tolist() for row in seen[0]] == [row.tolist() for row in every][len(test) :]
    with pytest.raises(TextError, match="give a file with more to train it on"):
        multi_layer_sae.multi_layer_sae(Inputs(demo_gpt2_4l, file=tmp_path / "short.txt"))
