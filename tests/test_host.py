"""Nothing needs float64 on a device: every kind of run on a device that has none gives what it gives on the CPU."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import gap_task, model_of, swap_task
from other_device import NAME, There, elsewhere

import patchlab as pl
from patchlab import lenses
from patchlab.host import has_float64, precise, to_array
from patchlab.methods import get_method, kv_effects, patch_edges
from patchlab.models import Model, bridge_module, wrap_bridge
from patchlab.scores import ScoreMap
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.zoo import VOCAB, zoo_module

LAYERS = 2
SITES = ["input", "resid_pre", "resid_mid", "z[layer,pos,head]", "q", "k", "v", "pattern", "mlp_post"]
FEATURES = ["features[layer,pos,feature]", "error"]
EDGES, HEADS, MEANS = "edges", "z[layer,pos,head]", ["resid_pre", "z"]
RUNS: dict[str, Any] = {
    **dict.fromkeys(("exact", "atp", "ig:2", "relp", "relp-ah", "attnlrp", "cp-lrp", "gim", "relp+ig:2", "atp*", "atp+drop"), SITES),
    **dict.fromkeys(("atp@mean", "exact@mean", "relp@mean_positional", "ig:2@zero", "second-order:2"), MEANS),
    **dict.fromkeys(("second-order", "ig-activations:2", "verified[relp,k=2,sample=4,subsets=8]"), HEADS),
}
EDGE_RUNS = {"exact": EDGES, "relp": EDGES, "ig-groups:2": EDGES, "atp@mean": "edges[writer,reader,pos]", "gim": "edges[writer,reader,dest,src]"}


@cache
def task() -> Any:
    return gap_task(4, changed=(1, 3))


def on_cpu(family: str) -> Model:
    return model_of(family, layers=LAYERS)


def rows(n: int) -> Any:
    return torch.randint(0, VOCAB, (n, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def there() -> Iterator[Callable[..., Model]]:
    """A model of a family on the device."""
    with elsewhere():
        yield lambda family="gpt2": wrap_bridge(bridge_module(zoo_module(family, layers=LAYERS).to(NAME), family), family)


def arrays(found: Any) -> dict[str, np.ndarray]:
    """The numbers of a result."""
    if isinstance(found, ScoreMap):
        return {str(name): np.asarray(values) for name, values in found.data.data_vars.items()}
    if isinstance(found, lenses.Distributions):
        return {name: np.asarray(found.data[name]) for name in ("top_probability", "entropy", "kl")}
    if hasattr(found, "table"):
        table = found.table() if callable(found.table) else found.table
        return {name: values.to_numpy() for name, values in table.select_dtypes("number").items()}
    if hasattr(found, "maps"):
        return {str(layer): to_array(one.weight) for layer, one in found.maps.items()}
    if isinstance(found.data, np.ndarray):
        return {"all": found.data}
    return {str(name): np.asarray(values) for name, values in found.data.data_vars.items() if np.asarray(values).dtype.kind == "f"}


def check_same(device: Any, cpu: Any, what: str, within: float = 2e-3) -> None:
    got, expected = arrays(device), arrays(cpu)
    assert got.keys() == expected.keys(), what
    assert expected, what
    for name, values in expected.items():
        scale = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-3)
        np.testing.assert_allclose(got[name], values, rtol=0, atol=within * scale, err_msg=f"{what}: {name}")


def test_the_device_refuses_what_apples_does() -> None:
    with elsewhere() as device:
        x = torch.tensor([1.0, 2.0]).to(NAME)
        assert isinstance(x, There)
        for wrong in (lambda: x.double(), lambda: x.to("cpu", torch.float64), lambda: torch.zeros(2, dtype=torch.float64, device=NAME)):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        for other in (torch.ones(2), torch.ones(2, device=f"{NAME}:1")):
            with pytest.raises(RuntimeError, match="same device"):
                _ = x + other
        device.waits.clear()
        assert (x.sum().item(), x.cpu().tolist(), x[x > 1].tolist()) == (3.0, [1.0, 2.0], [2.0])
        assert device.waits == ["_local_scalar_dense", "cpu", "index by mask", "tolist"]


def test_memory_that_runs_out_is_not_taken_for_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    has_float64.cache_clear()
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(torch, "zeros", full)
        has_float64(torch.device("cpu"))
    assert has_float64(torch.device("cpu"))


def test_values_are_in_float64_wherever_they_come_from() -> None:
    values = torch.tensor([1.0, 1e-8, 3.0])
    assert has_float64(values.device)
    assert precise(values).dtype == torch.float64
    assert precise(values.bfloat16()).dtype == torch.float64
    with elsewhere():
        moved = values.to(NAME)
        assert not has_float64(moved.device)
        assert precise(moved).device.type == "cpu"
        assert torch.equal(precise(moved), values.double())
        assert np.array_equal(to_array(moved.requires_grad_()), values.double().numpy())
        assert np.array_equal(to_array(torch.tensor([True, False]).to(NAME)), [1.0, 0.0])


@pytest.mark.parametrize("name", ["exact", "relp"])
def test_methods(there: Callable[..., Model], name: str) -> None:
    device, cpu = (get_method(name).run(model, task(), RUNS[name], progress=False) for model in (there(), on_cpu("gpt2")))
    check_same(device, cpu, name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_method(there: Callable[..., Model], family: str) -> None:
    model = there(family)
    few = () if family == "gpt2" else ("exact", "relp", "second-order", "atp@mean")
    for name, sites in RUNS.items():
        if few and name not in few:
            continue
        device, cpu = (get_method(name).run(one, task(), sites, progress=False) for one in (model, on_cpu(family)))
        check_same(device, cpu, f"{name} on nodes")
    for name, sites in EDGE_RUNS.items():
        if few and name not in few:
            continue
        device, cpu = (get_method(name).run(one, task(), sites, progress=False) for one in (model, on_cpu(family)))
        check_same(device, cpu, f"{name} on edges")
    for run in (kv_effects, lambda one, of, **options: patch_edges(one, of, {"all": ["input->logits", "m0->m1"]}, **options)):
        check_same(*(run(one, task(), progress=False) for one in (model, on_cpu(family))), "sets of edges")


@pytest.mark.slow
def test_circuits(there: Callable[..., Model]) -> None:
    model, plain, train = there(), on_cpu("gpt2"), swap_task(4, seed=20)
    edges, nodes = (get_method("relp").run(plain, train, sites, progress=False, direction="noising") for sites in (EDGES, ["z", "mlp_out"]))
    circuit, certain = pl.circuits.top_n(edges, 60), swap_task(4, metric="neg_kl")
    for ablation in pl.circuits.ABLATIONS:
        of_train = {} if ablation in ("resample", "zero") else {"train": swap_task(5, seed=40)}
        fit = {"fit": pl.circuits.OptimalFit(steps=2)} if ablation == "optimal" else {}
        options: dict[str, Any] = {"ablation": ablation, "progress": False, "n_boot": 10, **of_train}
        check_same(*(pl.circuits.evaluate(one, circuit, certain, **options, **fit) for one in (model, plain)), ablation)
    for ablation in pl.circuits.NODE_ABLATIONS:
        options = {"ablation": ablation, "progress": False, "n_boot": 10, "sizes": [1, 4]}
        check_same(*(pl.circuits.faithfulness_curve(one, nodes, certain, **options) for one in (model, plain)), f"nodes, {ablation}")
    found = [pl.circuits.acdc(one, task(), 0.05, progress=False) for one in (model, plain)]
    assert np.array_equal(found[0][0.05].edges, found[1][0.05].edges)


@pytest.mark.slow
def test_lenses(there: Callable[..., Model]) -> None:
    model, plain, lens = there(), on_cpu("gpt2"), lenses.logit_lens()
    runs: dict[str, Callable[[Model], Any]] = {
        "logit lens": lambda one: lens.read(one, task(), top=3),
        "attribution": lambda one: lens.attribute(one, task()),
        "linear": lambda one: lenses.fit_linear(one, rows(40), progress=False),
        "jacobian": lambda one: lenses.fit_jacobian(one, rows(2), skip_first=1, progress=False),
        "attention": lambda one: lenses.attention(one, task()),
        "queries and keys": lambda one: lenses.qk_attribution(one, task(), "L1.H1.pattern@3<1"),
        "coefficients": lambda one: lenses.coefficients(one, task(), "z"),
        "relevance": lambda one: lenses.relevance(one, task(), "z"),
    }
    for name, run in runs.items():
        check_same(run(model), run(plain), name)


@pytest.mark.slow
def test_features(there: Callable[..., Model]) -> None:
    model = there()
    plain = wrap_bridge(bridge_module(zoo_module("gpt2", layers=LAYERS), "gpt2"), "gpt2")
    for one in (model, plain):
        one.add_dictionaries([random_dictionary(one, "resid_post", layer, width=20, seed=layer) for layer in range(LAYERS)])
    for name in ("exact", "relp", "ig-activations:2", "atp+spliced", "atp@mean", "atp@mean_positional", "atp@zero"):
        check_same(*(get_method(name).run(one, task(), FEATURES, progress=False) for one in (model, plain)), f"{name} on features")
    options: dict[str, Any] = {"progress": False, "direction": "noising"}
    maps = [(one, get_method("relp").run(one, swap_task(4, seed=20), FEATURES, **options)) for one in (model, plain)]
    certain = swap_task(4, metric="neg_kl")
    for ablation in ("mean", "resample"):
        options = {"ablation": ablation, "progress": False, "n_boot": 10, "sizes": [1, 4]}
        check_same(*(pl.circuits.faithfulness_curve(one, scores, certain, **options) for one, scores in maps), f"features, {ablation}")
    transcoders = [random_dictionary(plain, layer=layer, width=20, seed=layer, kind="transcoder") for layer in range(LAYERS)]
    graphs = [pl.features.attribution_graph(one, [1, 2, 3, 4], transcoders) for one in (model, plain)]
    np.testing.assert_allclose(graphs[0].adjacency.toarray(), graphs[1].adjacency.toarray(), atol=1e-4)
