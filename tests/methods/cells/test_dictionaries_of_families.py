"""Dictionaries on every architecture of the zoo: they are accepted, the fast engine does what whole runs do, and parts add up to node scores."""

import numpy as np
import pytest
import torch
from families import scores_of, swap_task

import patchlab as pl
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.zoo import ZOO, zoo_model

NOT_LOADED = {"falcon-new", "xglm"}
"""TransformerLens cannot split the one's projection; the other has no double precision."""
QUICK = ("gemma3", "qwen3.5", "phi3")
POINTS = ("resid_post", "attn_out", "mlp_out")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO if name not in NOT_LOADED], ids=lambda name: name
)
def test_features_and_errors_are_scored_on_any_family(name: str) -> None:
    model = zoo_model(name, torch.float64)
    plain = model.arch
    points = [point for point in POINTS if point in model.arch.sites]
    model.add_dictionaries([random_dictionary(model, point, 1, 16) for point in points])
    try:
        sites = [f"{part}.{point}" for point in points for part in ("features", "error")]
        fast, whole = (scores_of(pl.ActivationPatching(engine=engine), model, swap_task(), sites) for engine in ("auto", "literal"))
        for site in sites:
            values = whole.data[site].to_numpy()
            assert values.size
            assert float(np.abs(values).max()) > 1e-6
            np.testing.assert_allclose(fast.data[site].to_numpy(), values, rtol=0, atol=1e-6 * float(np.abs(values).max()), err_msg=site)
        scores_of(pl.AttributionPatching(), model, swap_task(), sites)  # its self-check: features + error + rest = the node score
    finally:
        model.drop_dictionaries()
    assert model.arch == plain
