"""Edges between nodes, against gradients of a model that is cut by hand, against interventions, and against the scores of the nodes themselves."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from families import gap_task, mixed_task, model_of, scores_of
from torch import Tensor

import patchlab as pl
from patchlab.circuits import NodeCircuit, SparseCircuit, candidates, node_edges, threshold, top_n
from patchlab.engine.hooks import ruled
from patchlab.errors import CircuitError, InterventionError
from patchlab.features import Dictionary, LayerNorm, TopK
from patchlab.methods import get_method
from patchlab.models import Model
from patchlab.rules import get_composite
from patchlab.tasks.task import Task
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.toys import micro_model, micro_task

DTYPE = torch.float64
POINTS = {"resid_post": (0, 1), "mlp_out": (1, 2), "attn_out": (1,)}
SITES = [f"{part}.{point}" for point in POINTS for part in ("features", "error")]


@contextmanager
def attached(family: str, dictionaries: Any) -> Iterator[Model]:
    """A model with dictionaries, until the block ends."""
    own = model_of(family, DTYPE)
    before = own.arch
    try:
        if own.dictionaries:
            own.drop_dictionaries()
        own.add_dictionaries(dictionaries(own))
        yield own
    finally:
        own.arch = before


def several(model: Model) -> list[Dictionary]:
    """Dictionaries on several points, of some layers."""
    points = [(i, point, layer) for i, (point, at) in enumerate(POINTS.items()) for layer in at]
    return [random_dictionary(model, point, layer, 10 + layer, seed=3 * layer + i) for i, point, layer in points]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with attached("gpt2", several) as own:
        yield own


def every(model: Model, sites: list[str], task: Task, direction: str = "noising") -> NodeCircuit:
    """All candidates as nodes."""
    universe = candidates(model.arch, sites, task.position_axis())
    return NodeCircuit(universe, {one.name: one.cells(one.every()) for one in universe}, provenance={"direction": direction})


def found(edges: SparseCircuit) -> dict[str, float]:
    assert edges.scores is not None
    return dict(zip(edges.edges, edges.scores.tolist(), strict=True))


class Cut:
    """One prompt pair, by hand: features and errors of dictionaries (or whole activations of neurons) at every cut are leaves; what is read there
    before is kept with its graph.
    """

    def __init__(self, model: Model, rules: str) -> None:
        self.model, composite = model, get_composite(rules)
        self.attached = () if composite.plain else composite.attach(model.arch.places)

    def run(
        self, ids: tuple[int, ...], cuts: dict[str, Any], stop: bool = True, grad: bool = True
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Logits, and per hook what was read and the leaf that flows on (or the same tensor, where nothing is stopped)."""
        before, leaves = {}, {}

        def write(value: Tensor, hook: Any, name: str) -> Tensor:
            before[name] = value
            leaves[name] = value.detach().clone().requires_grad_() if stop or not value.requires_grad else value.view_as(value)
            return leaves[name]

        with ExitStack() as stack, torch.set_grad_enabled(grad):
            stack.enter_context(ruled(self.model, self.attached))
            for name in cuts:
                handle = self.model.hooks[name].register_forward_hook(lambda m, i, value, name=name: write(value, m, name))
                stack.callback(handle.remove)
            logits = self.model.bridge(torch.tensor([ids]), return_type="logits", use_cache=False)
        return logits[0, -1], before, leaves

    def moved(self, ids: tuple[int, ...], name: str, value: Tensor) -> Tensor:
        """Logits with one activation set."""
        handle = self.model.hooks[name].register_forward_hook(lambda m, i, own: value)
        try:
            return self.model.bridge(torch.tensor([ids]), return_type="logits", use_cache=False)[0, -1]
        finally:
            handle.remove()


def hook_of(point: str, layer: int) -> str:
    return f"blocks.{layer}.{'mlp.hook_post' if point == 'mlp_post' else f'hook_{point}'}"


def literal(
    model: Model, task: Task, rules: str, points: dict[str, tuple[int, ...]], direction: str = "noising", steps: int | None = None
) -> dict[str, float]:
    """Every edge, one target at a time, from the formulas of the paper: ``(coefficient of d) · ∂d/∂u · Δu`` by autograd."""
    cut, total = Cut(model, rules), {}
    order = sorted(((layer, ["attn_out", "mlp_post", "mlp_out", "resid_post"].index(point), point) for point, at in points.items() for layer in at))
    hooks = {hook_of(point, layer): (point, layer) for layer, _, point in order}
    dictionary = {key: model.dictionaries[key[0]][key[1]] if key[0] != "mlp_post" else None for key in hooks.values()}
    for pair in task.pairs:
        base, other = (pair.clean_ids, pair.corrupted_ids) if direction == "noising" else (pair.corrupted_ids, pair.clean_ids)

        def metric(logits: Tensor, pair: Any = pair) -> Tensor:
            return logits[list(pair.correct)].mean() - logits[list(pair.incorrect)].mean()

        logits, _, joint = cut.run(base, hooks, stop=False)
        coefficient = dict(zip(joint, torch.autograd.grad(metric(logits), list(joint.values())), strict=True))
        source = cut.run(other, hooks, grad=False)[1]
        for name in hooks if steps else ():  # the left sum of the published code: the whole activation of one layer moves alone
            ends = joint[name].detach(), source[name]
            points = [((1 - k / steps) * ends[0] + k / steps * ends[1]).requires_grad_() for k in range(steps)]
            coefficient[name] = sum(torch.autograd.grad(metric(cut.moved(base, name, point)), point)[0] for point in points) / steps
        logits, before, leaves = cut.run(base, hooks)

        def parts(d: Dictionary | None, x: Tensor) -> tuple[Tensor, Tensor]:
            if d is None:
                return x, x[..., :0]
            features = torch.where(d.activation.mask(x @ d.w_enc + d.b_enc), x @ d.w_enc + d.b_enc, 0.0)
            return features, x - features @ d.w_dec - d.b_dec

        targets: dict[str, Tensor] = {"logits": metric(logits)}
        for name, (point, layer) in hooks.items():
            d, g = dictionary[point, layer], coefficient[name]
            values, error = parts(d, before[name])
            for i in range(values.shape[-1]):
                by = g[..., i] if d is None else g @ d.w_dec[i]
                targets[f"L{layer}.{'N' if d is None else 'F'}{i}.{point}"] = (by * values[..., i]).sum()
            if d is not None:
                targets[f"L{layer}.error.{point}"] = (g * error).sum()
        for target, quantity in targets.items():
            if not quantity.requires_grad:
                continue
            gradients = torch.autograd.grad(quantity, list(leaves.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is None:
                    continue
                point, layer = hooks[name]
                d = dictionary[point, layer]
                (own, left), (new, rest) = parts(d, leaves[name].detach()), parts(d, source[name])
                for i in range(own.shape[-1]):
                    slope = gradient[..., i] if d is None else gradient @ d.w_dec[i]
                    key = f"L{layer}.{'N' if d is None else 'F'}{i}.{point}->{target}"
                    total[key] = total.get(key, 0.0) + float((slope * (new[..., i] - own[..., i])).sum()) / len(task)
                if d is not None:
                    key = f"L{layer}.error.{point}->{target}"
                    total[key] = total.get(key, 0.0) + float((gradient * (rest - left)).sum()) / len(task)
    return total


def assert_same(got: dict[str, float], expected: dict[str, float]) -> None:
    largest = max(map(abs, expected.values()))
    assert largest > 1e-3
    assert {name for name, value in expected.items() if abs(value) > 1e-12 * largest} <= got.keys()
    for name, value in got.items():
        assert value == pytest.approx(expected[name], abs=1e-9 * largest), name


@pytest.mark.parametrize(("rules", "direction"), [("gradient", "noising"), ("relp", "noising"), ("gim", "denoising")])
def test_edges_of_features_and_errors_are_the_formula_of_the_paper(model: Model, rules: str, direction: str) -> None:
    task = gap_task(2)
    nodes = every(model, SITES, task, direction)
    edges = node_edges(model, task, nodes, "atp" if rules == "gradient" else rules, progress=False)
    assert_same(found(edges), literal(model, task, rules, POINTS, direction))
    kinds = {tuple("error" if "error" in end else end[:1] for end in name.split("->")) for name in edges.edges}
    assert {("L", "L"), ("L", "error"), ("error", "L"), ("error", "error"), ("error", "l"), ("L", "l")} <= kinds


@pytest.mark.parametrize("rules", ["gradient", "relp"])
def test_edges_of_neurons_are_the_formula_of_the_paper(rules: str) -> None:
    own, task = model_of("gpt2", DTYPE), gap_task(2)
    universe = candidates(own.arch, ["mlp_post"])
    rng = np.random.default_rng(0)
    some = NodeCircuit(universe, {"mlp_post": universe[0].cells(universe[0].drawn(20, rng))})
    edges = node_edges(own, task, some, "atp" if rules == "gradient" else rules, progress=False)
    expected = literal(own, task, rules, {"mlp_post": (0, 1, 2)})
    among = {name: value for name, value in expected.items() if set(name.split("->")) <= {*some.nodes, "logits"}}
    assert_same(found(edges), among)


def test_along_a_path_the_coefficient_is_its_mean_as_in_the_published_code(model: Model) -> None:
    task = gap_task(2)
    nodes = every(model, SITES, task)
    edges = found(node_edges(model, task, nodes, "ig-activations-left:3", progress=False))
    assert_same(edges, literal(model, task, "gradient", POINTS, steps=3))
    gradient = found(node_edges(model, task, nodes, "atp", progress=False))
    last = {key for key in edges if key.endswith("->logits")}
    assert max(abs(edges[key] - gradient[key]) for key in edges.keys() - last) > 1e-3, "the gradient at one point is another"
    assert {key: edges[key] for key in last} == pytest.approx({key: gradient[key] for key in last})


def saes(model: Model, reads: str, layers: tuple[int, ...] = (0, 1, 2), **options: Any) -> list[Dictionary]:
    return [random_dictionary(model, reads, layer, seed=layer, **options) for layer in layers]


BY_POS = ["features[layer,pos,feature]", "error[layer,pos]"]


@pytest.mark.parametrize(
    ("family", "method", "sites", "dictionaries"),
    [
        ("neox", "gim", ["features", "error"], lambda m: saes(m, "mlp_out", activation=TopK(4))),
        ("gemma2", "relp", ["features", "error"], lambda m: saes(m, "resid_mid", (0, 2))),
        ("gpt2", "attnlrp", BY_POS, lambda m: saes(m, "resid_post", normalise=LayerNorm())),
        ("llama", "cp-lrp", ["features", "error"], lambda m: saes(m, "z")),
        ("gpt2", "atp", BY_POS, lambda m: saes(m, "mlp_in", kind="transcoder", skip=True)),
        ("gpt2", "relp-ah", ["features", "error"], lambda m: saes(m, "resid_post", kind="codebook")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_edges_out_of_a_node_add_up_to_its_score(family: str, method: str, sites: list[str], dictionaries: Any) -> None:
    with attached(family, dictionaries) as own:
        task = gap_task(2, family=family)
        nodes = every(own, sites, task)
        scores = scores_of(get_method(method), own, task, sites, "noising")
        edges = node_edges(own, task, nodes, method, batch_size=1, progress=False)
    out = np.zeros(nodes.n_nodes)
    np.add.at(out, edges.source, edges.scores)
    start, largest = 0, max(np.abs(scores.mean(site).to_numpy()).max() for site in scores.sites)
    assert largest > 1e-2
    for one in nodes.universe:
        known = dict(zip(one.ids(scores.cells(one.name)).tolist(), scores.mean(one.name).to_numpy().ravel().tolist(), strict=True))
        expected = [known.get(node, 0.0) for node in one.every().tolist()]
        np.testing.assert_allclose(out[start : start + one.size], expected, atol=1e-6 * largest)
        start += one.size


def test_in_a_linear_stretch_an_edge_is_what_an_intervention_does() -> None:
    model, task = micro_model(), micro_task()
    nodes = every(model, ["resid_pre", "attn_out", "mlp_post", "resid_post"], task)
    edges = found(node_edges(model, task, nodes, "atp", progress=False))
    # clean (4, 0), (1, 1); corrupted (0, 2), (1, 1): at the last position attention gives (2.5, .5) and (.5, 1.5); the neuron reads 3.5 - 2 and
    # writes (2, 0) per unit; the metric is the first coordinate less the second
    expected = {
        "L0.resid_pre@0->L0.attn_out@1": -2.0 * 3 + (-1.0),  # half of the change (-4, 2), times the coefficient (1 + 2, -1)
        "L0.attn_out@1->L0.N0.mlp_post": -2.0 * 2,
        "L0.attn_out@1->L0.resid_post@1": -2.0 - 1.0,
        "L0.N0.mlp_post->L0.resid_post@1": -1.5 * 2,
        "L0.resid_post@1->logits": -6.0,
    }
    assert {name: edges.get(name) for name in expected} == pytest.approx(expected)
    assert not any("resid_pre@1->" in name or "attn_out@0->logits" in name for name in edges), "nothing changes there, and nothing jumps over a cut"


def test_named_positions_and_batches() -> None:
    own, task = model_of("gpt2", DTYPE), gap_task(task=mixed_task())
    nodes = every(own, ["z[layer,pos,head]", "mlp_out"], task)
    nodes = NodeCircuit(nodes.universe, nodes.listed, provenance={"direction": "noising", "positions": ["A", "B", "END"]})
    edges = node_edges(own, task, nodes, "relp", progress=False)
    apart = node_edges(own, task, nodes, "relp", batch_size=1, progress=False)
    assert found(edges) == pytest.approx(found(apart), abs=1e-12)
    assert any("@A->" in name and name.endswith("@END") for name in edges.edges)


def test_a_level_leaves_out_what_is_below_it_and_selection_takes_what_is_at_it(model: Model) -> None:
    task = gap_task(2)
    nodes = every(model, ["features.resid_post", "error.resid_post"], task)
    edges = node_edges(model, task, nodes, "relp", progress=False)
    values = np.sort(np.abs(edges.scores))[::-1]
    chosen = threshold(edges, float(values[4]), prune=False)
    assert chosen.n_edges == 5
    assert chosen.equals(top_n(edges, 5, prune=False))
    assert node_edges(model, task, nodes, "relp", level=float(values[4]), progress=False).n_edges == 5
    helpful = top_n(edges, 3, by="signed", prune=False)
    assert (helpful.scores <= np.sort(edges.scores)[2] + 1e-12).all(), "noising: what helps has a negative effect"
    with pytest.raises(CircuitError, match=rf"from 1 to the {edges.n_edges:,} that are not zero; got 0"):
        top_n(edges, 0)
    with pytest.raises(CircuitError, match="unknown importance 'size'"):
        threshold(edges, 0.1, by="size")
    with pytest.raises(CircuitError, match="edges between nodes know theirs"):
        top_n(edges, 1, sites=["z"])


def test_refuses_what_has_no_edges(model: Model) -> None:
    task = gap_task(2)
    nodes = every(model, ["features.resid_post", "error.resid_post"], task)
    for method, why in (
        ("exact", "edges between nodes are derivatives; exact takes none"),
        ("relp+drop", r"GradDrop \(\+drop\)"),
        ("atp+spliced", r"\+spliced says how nodes are scored"),
    ):
        with pytest.raises(CircuitError, match=why):
            node_edges(model, task, nodes, method, progress=False)
    with pytest.raises(CircuitError, match="all but the listed ones"):
        node_edges(model, task, NodeCircuit.full(nodes.universe), progress=False)
    with pytest.raises(CircuitError, match="there are no nodes"):
        node_edges(model, task, NodeCircuit.empty(nodes.universe), progress=False)
    with pytest.raises(CircuitError, match="level is a size"):
        node_edges(model, task, nodes, level=-1.0, progress=False)
    with pytest.raises(CircuitError, match="relp-ah leaves q without a coefficient"):
        node_edges(model_of("gpt2", DTYPE), task, every(model_of("gpt2", DTYPE), ["q"], task), "relp-ah", progress=False)
    with pytest.raises(InterventionError, match="cut at sites has no edits"), pl.intervene(model, pl.Edit("L0.mlp_out", pl.sources.zero())):
        node_edges(model, task, nodes, "relp", progress=False)


def test_dictionaries_across_layers_have_no_single_activation_to_be_cut_at() -> None:
    with attached("gpt2", lambda m: [random_dictionary(m, layer=0, kind="cross_layer_transcoder")]) as across:
        task = gap_task(2)
        with pytest.raises(CircuitError, match=r"writes to 3 layers.*attribution_graph has edges of cross-layer transcoders"):
            node_edges(across, task, every(across, ["features"], task), progress=False)
