"""What edge scores owe to scores that do not know of edges, checked on separate runs: two sums and a limit.

Differentiating what flows along all edges at once gives nodes back. What a writer does is what its edges do together: the sum of its
edges is its node score. And all that passes a layer passes through its residual stream: the sum of the edges from before a cut
through the network to behind it is the score of the stream at the cut. Both hold for any coefficients that a single backward
pass gives, whatever its rules, at one point of a path or summed over its points. The limit: where the corrupted tokens are embedded
close to the clean ones, every single edge's exact effect is its EAP score.
"""

import numpy as np
import pytest
import torch
from families import FAMILIES, bridged, hf_module, mixed_task, model_of, scores_of, swap_task
from jaxtyping import Float

from patchlab.graph import Graph
from patchlab.methods import get_method
from patchlab.metrics import METRICS
from patchlab.models import Model
from patchlab.rules import PRESETS
from patchlab.tasks.task import Pair, Task
from patchlab.testing import TOY_CIRCUITS, linear_toy, toy_task

METHODS = ("atp", *(name for name in PRESETS if name != "gradient"), "ig:3", "relp+ig:3")
ROUNDING: dict[str, float] = dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2"), 1e-6)
"""Their norms compute in float32 whatever the model's dtype."""


def node_scores(method: str, model: Model, task: Task, direction: str) -> Float[np.ndarray, "example writer"]:
    """The node score of each writer, in the order of the graph, from runs of their own."""
    graph = model.arch.graph
    sites = ["input", "z", *(["mlp_out[layer]"] if graph.mlps else [])]  # inputs differ at named positions alone, the others everywhere
    scores = scores_of(get_method(method), model, task, sites, direction)
    parts = [scores.data["input"].to_numpy().sum(1, keepdims=True)]
    heads = scores.data["z"].to_numpy()
    for layer in range(graph.n_layers):
        parts.append(heads[:, layer])
        if graph.mlps:
            parts.append(scores.data["mlp_out[layer]"].to_numpy()[:, layer, None])
    return np.concatenate(parts, 1)


def edge_scores(method: str, model: Model, task: Task, direction: str) -> Float[np.ndarray, "example writer reader"]:
    """The scores of edges, 0 where none is; readers that the rules cut off must be NaN throughout, and pass nothing on."""
    scores = scores_of(get_method(method), model, task, "edges", direction)
    graph, values = model.arch.graph, scores.data["edges"].to_numpy().copy()
    cut = np.isin(graph.reader_kind, list(scores.provenance.get("readers_not_scored", {})))
    assert cut.any() == ("relp-ah" in method or "cp-lrp" in method)
    assert np.isnan(values[:, :, cut]).all()
    values[:, :, cut] = 0
    assert np.isfinite(values).all()
    assert not values[:, ~graph.allowed].any()
    return values


def check_nodes(method: str, model: Model, task: Task, direction: str, rtol: float = 1e-10) -> None:
    nodes, edges = node_scores(method, model, task, direction), edge_scores(method, model, task, direction)
    assert float(np.abs(nodes).max()) > 1e-6
    np.testing.assert_allclose(edges.sum(2), nodes, rtol=0, atol=rtol * float(np.abs(nodes).max()), err_msg=f"{model.name} {method} {direction}")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_edges_of_a_writer_add_up_to_its_node_score(family: str) -> None:
    model = model_of(family, torch.float64)
    for method in METHODS:
        check_nodes(method, model, swap_task(), "denoising" if method in ("relp", "ig:3") else "noising", ROUNDING.get(family, 1e-10))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ig-activations:2", "ig-left:3", "ig-right:3", "clean-corrupted"])
@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2"])
def test_it_holds_for_the_other_paths_too(family: str, method: str) -> None:
    check_nodes(method, model_of(family, torch.float64), mixed_task(), "noising", ROUNDING.get(family, 1e-10))


@pytest.mark.parametrize("name", TOY_CIRCUITS)
def test_it_holds_on_the_toys(name: str) -> None:
    toy = TOY_CIRCUITS[name]()
    for method in METHODS:
        for direction in ("noising", "denoising"):
            check_nodes(method, toy.model, toy.task, direction)


# ---------- cuts ----------


def stream_scores(method: str, model: Model, task: Task, direction: str, site: str) -> Float[np.ndarray, "example layer"]:
    return scores_of(get_method(method), model, task, f"{site}[layer]", direction).data[f"{site}[layer]"].to_numpy()


def crossing(edges: Float[np.ndarray, "example writer reader"], graph: Graph, layer: int, *, mid: bool = False) -> Float[np.ndarray, " example"]:
    """Sum over the edges whose writer comes before a layer (or its middle) and whose reader does not."""
    writers, readers = graph.heads_of(layer).start, graph.readers_of(layer).start
    if mid:
        writers, readers = graph.heads_of(layer).stop, graph.readers_of(layer, "v").stop
    return edges[:, :writers, readers:].sum((1, 2))


# gemma2: its streams differ by more than the sum of what its heads' contributions do to first order
@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_the_edges_across_a_cut_add_up_to_the_stream(family: str) -> None:
    model = model_of(family, torch.float64)
    graph, tolerance = model.arch.graph, ROUNDING.get(family, 1e-10)
    for method in ("atp", "relp-ah", "gim", "relp+ig:3"):
        edges = edge_scores(method, model, swap_task(), "noising")
        for site in ("resid_pre", "resid_mid")[: 1 + ("resid_mid" in model.arch.sites)]:
            streams = stream_scores(method, model, swap_task(), "noising", site)
            found = np.stack([crossing(edges, graph, layer, mid=site == "resid_mid") for layer in range(graph.n_layers)], 1)
            np.testing.assert_allclose(found, streams, rtol=0, atol=tolerance * float(np.abs(streams).max()), err_msg=f"{method} {site}")


def test_on_the_linear_model_the_edges_across_a_cut_are_its_exact_effect() -> None:
    model = linear_toy()
    task = toy_task(model)
    exact = stream_scores("exact", model, task, "noising", "resid_mid")
    for method in ("atp", "ig:2"):
        edges = edge_scores(method, model, task, "noising")
        found = np.stack([crossing(edges, model.arch.graph, layer, mid=True) for layer in range(model.arch.n_layers)], 1)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12)


def test_the_sums_notice_an_edge_that_is_missing() -> None:
    model, task = model_of("native", torch.float64), swap_task()
    edges, nodes = edge_scores("relp", model, task, "noising"), node_scores("relp", model, task, "noising")
    share = np.abs(edges[:, model.arch.graph.allowed]).max(0) / np.abs(nodes).max()
    assert np.median(share) > 1e-4  # most edges are far above the tolerance


# ---------- the limit of small differences ----------


def nearby(family: str, step: float) -> tuple[Model, Task]:
    """A model, and two pairs of one clean prompt whose corrupted tokens are embedded a step to either side of the clean ones."""
    module = hf_module(family, torch.float64)
    embedding = module.get_input_embeddings().weight
    clean, changed, spare = [0, 1, 2, 3, 4], (1, 3), iter(range(10, 20))
    pairs = []
    for sign in (1, -1):
        corrupted = list(clean)
        for i in changed:
            corrupted[i] = next(spare)
            with torch.no_grad():
                embedding[corrupted[i]] = embedding[clean[i]] + sign * step * embedding[20 + i]
        pairs.append(Pair(tuple(clean), tuple(corrupted), (30,), (31,)))
    return bridged(module, family), Task("nearby", tuple(pairs), METRICS["logit_diff"])


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "native"])
def test_exact_edges_of_nearby_tokens_are_their_eap_scores(family: str) -> None:
    rounds = family in ROUNDING
    model, task = nearby(family, 3e-3 if rounds else 1e-4)
    exact, linear = (edge_scores(method, model, task, "noising") for method in ("exact", "atp"))
    # what is of second order is the same on either side
    exact, linear = exact[0] - exact[1], linear[0] - linear[1]
    largest = np.abs(linear).max()
    assert np.median(np.abs(linear[linear != 0])) > 1e-3 * largest
    np.testing.assert_allclose(exact, linear, rtol=0, atol=(3e-4 if rounds else 1e-7) * largest)
