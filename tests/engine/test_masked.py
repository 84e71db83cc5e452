"""Running models as circuits, against a slow literal twin that only patches whole runs, and against published values."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, bridged, hf_module, model_of, native_model, swap_task
from reference_cases import CASES
from routed import literal
from safetensors.torch import load_file
from torch import Tensor

import patchlab as pl
from patchlab.engine import Program, run
from patchlab.engine.contributions import Contributions, contributions
from patchlab.engine.masked import run_circuits
from patchlab.errors import InterventionError, ModelError
from patchlab.models import Model


def setting(model: Model, n: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Program, Contributions, Tensor]:
    task = swap_task(n=n)
    (batch,) = task.batches()
    program = Program(batch.clean, batch.examples, metric=task.metric, answers=batch.answers)
    return program, contributions(model, batch.corrupted), batch.corrupted


def values(program: Program, logits: Tensor) -> Tensor:
    return program.metric(logits, program.answers)


def tolerance(model: Model) -> float:
    """Hugging Face computes RMS norms in float32, and behind the attention of Gemma 2 their parts are told apart."""
    return 5e-6 if model.name == "gemma2" else 1e-10


def masks(model: Model, n: int, share: float, *where: int, seed: int = 0) -> Tensor:
    allowed = torch.as_tensor(model.arch.graph.allowed.copy())
    draw = torch.rand(n, *allowed.shape, *where, generator=torch.Generator().manual_seed(seed)) < share
    return draw & allowed.reshape(1, *allowed.shape, *[1] * len(where))


@pytest.fixture(params=[*FAMILIES, "attention-only"])
def model(request) -> Model:
    if request.param == "attention-only":
        return native_model(dtype=torch.float64, attn_only=True)
    return model_of(request.param, torch.float64)


def test_whole_and_empty_graph_are_the_two_unpatched_runs(model: Model) -> None:
    program, ablated, corrupted = setting(model)
    allowed = torch.as_tensor(model.arch.graph.allowed.copy())
    full, empty = run_circuits(model, program, ablated, torch.stack([allowed, torch.zeros_like(allowed)]))
    for got, tokens in ((full, program.tokens), (empty, corrupted)):
        logits = run(model, Program(tokens, program.examples, logits="answer")).logits
        torch.testing.assert_close(got, values(program, logits), atol=tolerance(model), rtol=0)
    assert (full - empty).abs().min() > 1e-3


@pytest.mark.slow
def test_circuits_equal_the_literal_twin(model: Model) -> None:
    program, ablated, _ = setting(model)
    graph = model.arch.graph
    without = masks(model, 4, 2.0)
    pairs = [graph.edge("input->a1.h2<k>"), graph.edge("a0.h1->a2.h3<v>"), graph.edge("a1.h0->logits")]
    pairs.append(graph.edge("m0->a1.h1<k>" if graph.mlps else "a0.h0->a1.h1<k>"))
    for i, pair in enumerate(pairs):
        without[i][pair] = False
    keep = torch.cat([without, masks(model, 3, 0.5), masks(model, 1, 0.9)])
    got = run_circuits(model, program, ablated, keep)
    length = program.tokens.shape[1]
    expected = torch.stack([values(program, literal(model, program.tokens, ablated.values, k[..., None].expand(-1, -1, length))) for k in keep])
    torch.testing.assert_close(got, expected, atol=tolerance(model), rtol=0)
    assert (got - got[0]).abs().amax(1)[1:].min() > 1e-6, "each circuit differs from the others"


def test_circuits_with_held_denominators_equal_the_literal_twin() -> None:
    model = model_of("gemma2", torch.float64)
    program, _, corrupted = setting(model)
    ablated, keep = contributions(model, corrupted, "frozen"), masks(model, 3, 0.6, program.tokens.shape[1])
    got = run_circuits(model, program, ablated, keep)
    expected = torch.stack([values(program, literal(model, program.tokens, ablated.values, k, "frozen")) for k in keep])
    torch.testing.assert_close(got, expected, atol=tolerance(model), rtol=0)
    renormalised = run_circuits(model, program, contributions(model, corrupted), keep)
    assert (got - renormalised).abs().min() > 1e-3


@pytest.mark.slow
def test_position_resolved_circuits_equal_the_literal_twin(model: Model) -> None:
    program, ablated, _ = setting(model)
    keep = masks(model, 2, 0.6, program.tokens.shape[1])
    got = run_circuits(model, program, ablated, keep)
    expected = torch.stack([values(program, literal(model, program.tokens, ablated.values, k)) for k in keep])
    torch.testing.assert_close(got, expected, atol=tolerance(model), rtol=0)
    by_row = torch.stack([keep, keep.flip(0)], 3)
    crossed = torch.stack([expected[:, 0], expected.flip(0)[:, 1]], 1)
    torch.testing.assert_close(run_circuits(model, program, ablated, by_row), crossed, atol=tolerance(model), rtol=0)


def test_results_do_not_depend_on_how_the_work_is_cut() -> None:
    model = model_of("llama", torch.float64)
    program, ablated, _ = setting(model, n=3)
    keep = masks(model, 5, 0.5, program.tokens.shape[1])
    finished: list[int] = []
    whole = run_circuits(model, program, ablated, keep, max_bytes=1e9, done=finished.append)
    assert finished == [15]
    for budget in (1, 1.5e5):
        finished.clear()
        torch.testing.assert_close(run_circuits(model, program, ablated, keep, max_bytes=budget, done=finished.append), whole, atol=1e-12, rtol=0)
        assert sum(finished) == 15
        assert len(finished) > 2
    by_row = keep[:, :, :, None].expand(-1, -1, -1, 3, -1)
    torch.testing.assert_close(run_circuits(model, program, ablated, by_row, max_bytes=1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2"])
def test_gradients_in_the_ablated_contributions(family: str) -> None:
    """Against differences of the forward pass, in one direction per writer."""
    model = model_of(family, torch.float64)
    program, ablated, _ = setting(model)
    keep = masks(model, 2, 0.5)
    constants = ablated.values.mean((1, 2), keepdim=True)[None].repeat(2, 1, 1, 1, 1).requires_grad_()
    run_circuits(model, program, Contributions(constants), keep, max_bytes=1).sum().backward()
    direction = torch.randn(constants.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size, rtol = (1e-3, 1e-3) if family == "gemma2" else (1e-6, 1e-6)
    with torch.no_grad():
        up, down = (run_circuits(model, program, Contributions(constants + sign * size * direction), keep) for sign in (1, -1))
    slope = (up - down).sum(1) / (2 * size)
    torch.testing.assert_close((constants.grad * direction).sum((1, 2, 3, 4)), slope, rtol=rtol, atol=0)
    assert slope.abs().min() > 1e-2


def test_constants_for_each_circuit_are_its_own() -> None:
    model = model_of("qwen2", torch.float64)
    program, ablated, _ = setting(model)
    keep = masks(model, 3, 0.5)
    sets = torch.stack([ablated.values, torch.zeros_like(ablated.values), ablated.values.mean((1, 2), keepdim=True).expand_as(ablated.values)])
    together = run_circuits(model, program, Contributions(sets), keep, max_bytes=1)
    for i in range(3):
        torch.testing.assert_close(run_circuits(model, program, Contributions(sets[i]), keep[i : i + 1])[0], together[i], atol=1e-12, rtol=0)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = bridged(hf_module("gpt2"), "fresh")
    program, ablated, _ = setting(model)
    before = {name: len(hook._forward_hooks) for name, hook in model.hooks.items()}
    run_circuits(model, program, ablated, masks(model, 1, 0.5))
    broken = pl.Metric("broken", lambda logits, answers: logits.new_full(logits.shape[:1], float("nan")))
    with pytest.raises(pl.PatchlabError, match="not finite"):
        run_circuits(model, replace(program, metric=broken), ablated, masks(model, 1, 0.5))
    assert {name: len(hook._forward_hooks) for name, hook in model.hooks.items()} == before


def test_refuses_what_does_not_fit() -> None:
    model = model_of("gpt2")
    program, ablated, _ = setting(model)
    keep = masks(model, 1, 0.5)
    with pytest.raises(InterventionError, match=r"shape \[1, 16, 39\], but gpt2 is a graph of 3 layers × 4 heads"):
        run_circuits(model, program, ablated, keep[..., :-1])
    with pytest.raises(InterventionError, match=r"after the readers comes nothing, \[5\] or \[2, 5\]. Got \[4\]"):
        run_circuits(model, program, ablated, masks(model, 1, 0.5, 4))
    with pytest.raises(InterventionError, match="pairs that are no edges"):
        run_circuits(model, program, ablated, torch.ones_like(keep))
    with pytest.raises(InterventionError, match="Ablation data must have the length of the prompts"):
        run_circuits(model, program, Contributions(ablated.values[:, :, :4]), keep)
    with pytest.raises(InterventionError, match="one set per circuit"):
        run_circuits(model, program, Contributions(ablated.values[None].repeat(2, 1, 1, 1, 1)), keep)
    with pytest.raises(InterventionError, match="give the program a metric and answers"):
        run_circuits(model, replace(program, metric=None), ablated, keep)
    with pytest.raises(InterventionError, match="on the model as it is"), pl.intervene(model, pl.Edit("L0.z", pl.sources.zero())):
        run_circuits(model, program, ablated, keep)


def test_refuses_a_model_that_is_put_together_in_another_way(monkeypatch) -> None:
    module = hf_module("gpt2")
    model = bridged(module, "odd")
    program, ablated, _ = setting(model)
    # attention output is scaled on its way into the stream, which no norm or linear map shows
    handle = model.bridge.blocks[1].attn.hook_out.register_forward_hook(lambda module, inputs, value: value * 2)
    with pytest.raises(ModelError, match="odd .* cannot be run as a circuit: with (all edges|none|all) kept"):
        run_circuits(model, program, ablated, masks(model, 1, 0.5))
    handle.remove()
    assert run_circuits(model, program, ablated, masks(model, 1, 0.5)).shape == (1, 2)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request, reference_of: Callable[[str], Path]):
    model_name, task_name = request.param
    reference_dir = reference_of(model_name)
    model = pl.load_model(reference_dir / "models" / model_name)
    task = pl.load_task(reference_dir / "tasks" / f"{model_name}.{task_name}.jsonl", model)
    stored = load_file(reference_dir / "values" / f"{model_name}.{task_name}.safetensors")
    names = json.loads((reference_dir / "edge_names.json").read_text())[model_name]
    return model, task, stored, names


@pytest.mark.slow
def test_published_circuits(case) -> None:
    model, task, stored, names = case
    found = [name for name in stored if name.startswith("circuit.") and name.endswith(".metric")]
    assert found
    keep = torch.zeros(len(found), *model.arch.graph.allowed.shape, dtype=torch.bool)
    for i, name in enumerate(found):
        kept = stored[name.replace(".metric", ".in_graph")].numpy()
        keep[i] = torch.as_tensor(model.arch.graph.mask(np.array(names)[kept]))
    (batch,) = task.batches()
    program = Program(batch.clean, batch.examples, metric=task.metric, answers=batch.answers)
    got = run_circuits(model, program, contributions(model, batch.corrupted), keep)
    torch.testing.assert_close(got, torch.stack([stored[name] for name in found]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_published_exact_edges(case) -> None:
    model, task, stored, names = case
    (batch,) = task.batches()
    program = Program(batch.clean, batch.examples, metric=task.metric, answers=batch.answers)
    step = 5 if model.name.startswith("trained") else 1
    keep = torch.as_tensor(model.arch.graph.allowed.copy()).repeat(len(names[::step]), 1, 1)
    for i, name in enumerate(names[::step]):
        keep[i][model.arch.graph.edge(name)] = False
    got = run_circuits(model, program, contributions(model, batch.corrupted), keep) - stored["metric.clean"]
    torch.testing.assert_close(got.mean(1), stored["edge.exact"][::step], atol=1e-4, rtol=0)
    torch.testing.assert_close(got.T, stored["edge_per_example.exact"][:, ::step], atol=1e-4, rtol=0)
