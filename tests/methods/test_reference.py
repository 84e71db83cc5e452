"""Scores against the outputs of published implementations (../shared/reference, ../shared/reference_postnorm), number by number."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_cases import CASES
from safetensors.torch import load_file

import patchlab as pl
from patchlab.engine import Program, run
from patchlab.rules import get_composite

SITES = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "z_head": "z",
    "z_pos_head": "z[layer,pos,head]",
    "q_head": "q",
    "q_pos_head": "q[layer,pos,head]",
    "k_head": "k",
    "k_pos_head": "k[layer,pos,kv_head]",
    "v_head": "v",
    "v_pos_head": "v[layer,pos,kv_head]",
    "pattern_head": "pattern",
    "mlp_post_neuron": "mlp_post",
}
NAMES = {
    "grad": "gradient",
    "ln": "lrp[ln]",
    "ln_id": "lrp[ln,identity]",
    "ln_id_half": "lrp[ln,identity,half]",
    "ln_id_half_ah": "lrp[ln,identity,half,ah]",
}
RULES = {key: get_composite(name) for key, name in NAMES.items()}


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request, reference_of: Callable[[str], Path]):
    model_name, task_name = request.param
    reference_dir = reference_of(model_name)
    model = pl.load_model(reference_dir / "models" / model_name)
    task = pl.load_task(reference_dir / "tasks" / f"{model_name}.{task_name}.jsonl", model)
    values = load_file(reference_dir / "values" / f"{model_name}.{task_name}.safetensors")
    dims = json.loads((reference_dir / "manifest.json").read_text())["models"][model_name]["tasks"][task_name]["tensors"]
    return model, task, values, dims


def _site(name: str) -> str:
    """The reference's ``[layer, ...]`` as patchlab writes it (k and v always have kv_head)."""
    return SITES[name]


def _tolerance(rules: str) -> float:
    return 5e-3 if "id" in rules else 2e-4


@pytest.mark.slow
def test_unpatched_metrics_and_logits(case) -> None:
    model, task, values, _ = case
    exact = pl.ActivationPatching().run(model, task, "input", progress=False)
    np.testing.assert_allclose(exact.data.metric_clean, values["metric.clean"], atol=5e-5)
    np.testing.assert_allclose(exact.data.metric_corrupted, values["metric.corrupted"], atol=5e-5)
    (batch,) = task.batches()
    for name, tokens in (("clean", batch.clean), ("corrupted", batch.corrupted)):
        logits = run(model, Program(tokens, batch.examples, logits="answer")).logits
        torch.testing.assert_close(logits, values[f"logits.{name}_last"], atol=5e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_exact_patching(case, direction: str) -> None:
    model, task, values, _ = case
    prefix = f"exact.{direction}."
    stored = [name for name in values if name.startswith(prefix)]
    assert stored
    scores = pl.ActivationPatching().run(model, task, [_site(name.removeprefix(prefix)) for name in stored], direction=direction, progress=False)
    baseline = values["metric.corrupted" if direction == "denoising" else "metric.clean"].numpy()
    for name in stored:
        expected = values[name].numpy() - baseline.reshape(-1, *[1] * (values[name].ndim - 1))
        got = scores.data[_site(name.removeprefix(prefix))].to_numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
def test_linearised_scores(case, rules: str) -> None:
    model, task, values, _ = case
    for direction in ("denoising", "noising"):
        prefix = f"attr.{rules}.{direction}."
        stored = [name for name in values if name.startswith(prefix)]
        if not stored:
            assert rules == "ln_id_half", f"the reference lost {prefix}"
            continue
        method = pl.RelevancePatching(RULES[rules])
        scores = method.run(model, task, [_site(name.removeprefix(prefix)) for name in stored], direction=direction, progress=False)
        for name in stored:
            got = scores.data[_site(name.removeprefix(prefix))].to_numpy()
            expected = values[name].numpy()
            got = got.mean(0) if "mlp_post" in name else got
            np.testing.assert_allclose(got, expected, atol=_tolerance(rules), err_msg=name)


@pytest.mark.parametrize("rules", RULES)
def test_raw_gradients(case, rules: str) -> None:
    model, task, values, _ = case
    name = f"resid_pre_grad.{rules}"
    if name not in values:
        assert rules == "ln_id_half"
        return
    (batch,) = task.batches()
    targets = tuple(("resid_pre", layer) for layer in range(model.arch.n_layers))
    composite = None if RULES[rules].plain else RULES[rules]
    result = run(
        model,
        Program(batch.corrupted, batch.examples, rules=composite, gradients=targets, metric=task.metric, answers=batch.answers),
    )
    expected = values[name].double()
    got = torch.stack([result.gradients[target] for target in targets], 1)[: len(expected)].double()
    difference = got - expected
    row_norms = expected.flatten(2).norm(dim=-1)
    absolute, relative = (2e-2, 5e-3) if "id" in rules else (2e-4, 2e-5)
    assert float(difference.abs().max()) <= absolute
    assert float((difference.flatten(2).norm(dim=-1) / row_norms.clamp_min(1e-3)).max()) <= relative
