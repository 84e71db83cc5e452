"""Edge scores of the linearised methods: against published numbers, their sums, positions, grouped heads and messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, mixed_task, model_of, scores_of, swap_task
from reference_cases import CASES
from safetensors.torch import load_file

import patchlab as pl
from patchlab.adapters import NormPlace
from patchlab.engine import Program, run
from patchlab.errors import MethodError
from patchlab.methods import IntegratedGradients, LinearizedPatching, get_method
from patchlab.methods.cells import edges
from patchlab.metrics import METRICS
from patchlab.rules import Composite, EpsilonRule, LNRule
from patchlab.rules.jacobian import norm_jvp, norm_vjp
from patchlab.rules.rule import NormRule

PUBLISHED = {
    "atp": "EAP",
    "eap-ig-inputs:5": "EAP-IG-inputs",
    "clean-corrupted": "clean-corrupted",
    "eap-ig-activations:5": "EAP-IG-activations",
}
METHODS = ("atp", "relp", "attnlrp", "cp-lrp", "gim", "relp-ah", "ig:2", "relp+ig:2", "ig-activations:2", "eap-ig-activations:2", "clean-corrupted")
ROUNDING = dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2"), 1e-6)
"""Their norms compute in float32 whatever the model's dtype."""


def off_by(family: str, method: str, direction: str = "noising", **options: Any) -> float:
    scores = scores_of(get_method(method), model_of(family, torch.float64), swap_task(**options), "edges", direction)
    check = scores.provenance["self_check"]
    return max(check["mismatch"]) / max(check["largest_node_score"])


@pytest.mark.slow
@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize(("model_name", "task_name"), CASES)
def test_published_edge_scores(reference_of: Callable[[str], Path], model_name: str, task_name: str, method: str) -> None:
    reference_dir = reference_of(model_name)
    model = pl.load_model(reference_dir / "models" / model_name)
    task = pl.load_task(reference_dir / "tasks" / f"{model_name}.{task_name}.jsonl", model)
    values = load_file(reference_dir / "values" / f"{model_name}.{task_name}.safetensors")
    names = json.loads((reference_dir / "edge_names.json").read_text())[model_name]
    scores = scores_of(get_method(method), model, task, "edges", "noising")
    writers, readers = np.array([scores.graph.edge(name) for name in names]).T
    found = scores.data["edges"].to_numpy()[:, writers, readers]
    if method.startswith("eap-ig-activations") and "gpt2" not in model_name:
        # While the embedding is set to a constant, the library's layer-0 inputs need no gradient in models without learned positions:
        # its backward hooks stay silent there, and the input's group is missing from those edges.
        lost = scores_of(IntegratedGradients(5, quadrature="left"), model, task, "edges", "noising").data["edges"].to_numpy()[:, writers, readers]
        first = [scores.graph.reader_kind[r] != "logits" and not scores.graph.allowed[1:, r].any() for r in readers]
        found = found - lost * np.array(first) / (2 * scores.graph.n_layers + 1)
    # where a norm follows the attention, the library multiplies what a head writes before it with the gradient behind it
    theirs = [not (model_name.startswith("gemma2") and name.startswith("a")) for name in names]
    np.testing.assert_allclose(found.mean(0)[theirs], values[f"edge.{PUBLISHED[method]}"].numpy()[theirs], rtol=0, atol=2e-5)
    if (key := f"edge_per_example.{PUBLISHED[method]}") in values:
        np.testing.assert_allclose(found[:, theirs], values[key].numpy()[:, theirs], rtol=0, atol=5e-5)
    assert scores.graph.n_edges == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_writers_edges_add_up_to_its_node_score(family: str, method: str) -> None:
    assert off_by(family, method) < ROUNDING.get(family, 1e-12)


@pytest.mark.parametrize("method", ["atp", "relp", "ig:2"])
def test_a_writers_edges_add_up_when_denoising(method: str) -> None:
    assert off_by("gemma2", method, "denoising") < ROUNDING["gemma2"]


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "gemma2"])
def test_node_scores_are_those_of_a_run_on_nodes(family: str) -> None:
    model, task = model_of(family, torch.float64), swap_task()
    for method in ("atp", "relp", "attnlrp", "gim", "ig:2"):
        scores = scores_of(get_method(method), model, task, "edges", "noising")
        nodes = scores_of(get_method(method), model, task, ["input", "z", "mlp_out"], "noising")
        sums, graph = scores.data["edges"].sum("reader").to_numpy(), scores.graph
        tolerance = ROUNDING.get(family, 1e-12) * float(np.abs(sums).max())
        np.testing.assert_allclose(sums[:, 0], nodes.data["input"].sum("pos"), atol=tolerance)
        for layer in range(graph.n_layers):
            np.testing.assert_allclose(sums[:, graph.heads_of(layer)], nodes.data["z"].sel(layer=layer), atol=tolerance, err_msg=method)
            np.testing.assert_allclose(sums[:, graph.mlp_of(layer)], nodes.data["mlp_out"].sel(layer=layer).sum("pos"), atol=tolerance)


@pytest.mark.parametrize("family", ["gpt2", "neox", "qwen3", "gemma2"])
@pytest.mark.parametrize("method", ["atp", "relp", "ig:2"])
def test_positions_add_up(family: str, method: str) -> None:
    model, task = model_of(family, torch.float64), swap_task()
    joint, by_pos, by_pair = (
        scores_of(get_method(method), model, task, site, "noising") for site in ("edges", "edges[writer,reader,pos]", "edges[writer,reader,dest,src]")
    )
    total = joint.data["edges"].to_numpy()
    np.testing.assert_allclose(by_pos.data["edges[writer,reader,pos]"].sum("pos"), total, rtol=0, atol=ROUNDING.get(family, 1e-12))
    pairs = by_pair.data["edges[writer,reader,dest,src]"]
    np.testing.assert_allclose(pairs.sum("dest"), by_pos.data["edges[writer,reader,pos]"], rtol=0, atol=ROUNDING.get(family, 1e-12))
    for scores in (joint, by_pos, by_pair):
        (site,) = scores.sites
        dead = ~scores.live[site].to_numpy()
        assert dead.any()
        assert float(np.abs(scores.data[site].to_numpy()[:, dead]).max()) < 1e-15, site
        # what is live is so for a reason: nearly all of it has a score (a sliding window hides some keys)
        assert float((scores.data[site].to_numpy()[:, ~dead] != 0).mean()) > 0.8, site


def test_attention_edges_cross_positions() -> None:
    scores = scores_of(pl.AttributionPatching(), model_of("gpt2", torch.float64), swap_task(), "edges[writer,reader,dest,src]", "noising")
    pairs, kinds = np.abs(scores.mean("edges[writer,reader,dest,src]").to_numpy()), np.array(scores.graph.reader_kind)
    for kind in ("q", "k", "v", "mlp", "logits"):
        crossing = pairs[:, kinds == kind].sum((0, 1))
        assert (np.triu(crossing, 1) == 0).all()
        assert (np.tril(crossing, -1).sum() > 0) == (kind in "kv")


def test_named_positions_are_read_for_pairs_of_several_lengths() -> None:
    model, task = model_of("gpt2", torch.float64), mixed_task()
    scores = scores_of(pl.AttributionPatching(), model, task, "edges[writer,reader,pos]", "noising")
    assert scores.data["position"].to_numpy().tolist() == ["A", "B", "END"]
    for example, pair in enumerate(task.pairs):
        alone = scores_of(pl.AttributionPatching(), model, task.select([example]), "edges[writer,reader,pos]", "noising")
        at = [pair.positions[name] for name in ("A", "B", "END")]
        np.testing.assert_allclose(
            scores.data["edges[writer,reader,pos]"].to_numpy()[example],
            alone.data["edges[writer,reader,pos]"].to_numpy()[0][:, :, at],
            atol=1e-13,
        )


def test_scores_do_not_depend_on_batches_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = model_of("gemma2", torch.float64), swap_task(5)
    whole = scores_of(pl.RelevancePatching(), model, task, "edges", "noising").data["edges"]
    batched = scores_of(pl.RelevancePatching(), model, task, "edges", "noising", batch_size=2).data["edges"]
    np.testing.assert_allclose(batched, whole, atol=1e-14)
    monkeypatch.setattr(edges, "CHUNK_BYTES", 1)
    np.testing.assert_allclose(scores_of(pl.RelevancePatching(), model, task, "edges", "noising").data["edges"], whole, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_grouped_heads_have_a_gradient_for_each_query_head(family: str) -> None:
    model, task = model_of(family, torch.float64), swap_task()
    (batch,) = task.batches()
    at = tuple((kind, layer) for kind in ("k", "v", "z") for layer in range(model.arch.n_layers))
    options: dict[str, Any] = {"gradients": at, "metric": METRICS["logit_diff"], "answers": batch.answers}
    joint = run(model, Program(batch.clean, batch.examples, **options)).gradients
    heads = run(model, Program(batch.clean, batch.examples, attention="head", **options)).gradients
    dests = run(model, Program(batch.clean, batch.examples, attention="dest", **options)).gradients
    for kind, layer in at[: 2 * model.arch.n_layers]:
        whole, copies = joint[kind, layer], model.arch.n_heads // model.arch.n_kv_heads
        torch.testing.assert_close(heads[kind, layer].unflatten(2, (-1, copies)).sum(3), whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(dests[kind, layer].sum(1), heads[kind, layer], rtol=0, atol=1e-6)
        assert float((heads[kind, layer][:, :, 0] - heads[kind, layer][:, :, 1]).abs().max()) > 1e-3


def test_one_point_costs_what_node_scores_cost() -> None:
    cost = scores_of(pl.RelevancePatching(), model_of("gpt2"), swap_task(), "edges", "noising").cost
    assert (cost.forwards, cost.backwards) == (2, 1)
    path = scores_of(IntegratedGradients(3), model_of("gpt2"), swap_task(), "edges", "noising").cost
    assert (path.forwards, path.backwards) == (5, 3)


def test_readers_behind_a_constant_pattern_are_not_scored() -> None:
    model, task = model_of("gpt2", torch.float64), swap_task()
    held = scores_of(pl.RelevancePatching("relp-ah"), model, task, "edges", "noising")
    blocked = np.isin(held.graph.reader_kind, ["q", "k"])
    values = held.data["edges"].to_numpy()
    assert np.isnan(values[:, :, blocked]).all()
    assert np.isfinite(values[:, :, ~blocked]).all()
    assert "holds the attention pattern constant" in held.provenance["readers_not_scored"]["q"]
    comparison = pl.compare(scores_of(pl.AttributionPatching(), model, task, "edges", "noising"), {"held": held}, n_boot=10)
    assert comparison.table["n_cells"].max() == int(held.graph.allowed[:, ~blocked].sum())
    assert comparison.table[["pearson_per_prompt", "pearson_pooled"]].notna().all(axis=None)
    assert any("edges into <q>, edges into <k> not scored and left out" in note for note in comparison.notes)


def test_saved_edges_come_back(tmp_path: Path) -> None:
    scores = scores_of(pl.RelevancePatching("relp-ah"), model_of("llama"), swap_task(), "edges", "noising")
    scores.save(tmp_path / "edges.nc")
    loaded = pl.ScoreMap.load(tmp_path / "edges.nc")
    assert loaded.data.identical(scores.data)
    assert loaded.graph == scores.graph
    assert loaded.data["reader_name"].to_numpy().tolist() == list(scores.graph.readers)


def test_the_table_of_edges_names_them() -> None:
    scores = scores_of(pl.AttributionPatching(), model_of("gpt2"), swap_task(), "edges[writer,reader,pos]", "noising")
    table = scores.to_dataframe()
    assert len(table) == 3 * scores.graph.n_edges * 5
    assert set(table["edge"]) == set(scores.graph.names())
    row = table.query("edge == 'a0.h1->a2.h3<k>' and example == 1 and pos == 3").iloc[0]
    writer, reader = scores.graph.edge("a0.h1->a2.h3<k>")
    assert row["effect"] == scores.data["edges[writer,reader,pos]"].to_numpy()[1, writer, reader, 3]
    assert (row["writer"], row["reader"], row["live"]) == (writer, reader, True)


class _Halved(NormRule):
    """A rule that no closed form is known for."""

    def surrogate(self, place: NormPlace, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(x) / scale.detach()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("rule", [None, LNRule(), _Halved()])
def test_norms_are_differentiated_as_autograd_does(family: str, rule: NormRule | None) -> None:
    model = model_of(family, torch.float64)
    place = next(place for place in model.arch.places if isinstance(place, NormPlace) and place.name == "blocks.1.ln1")
    generator = torch.Generator().manual_seed(0)
    close = {"rtol": 0, "atol": 1e-12 if family == "gpt2" else 1e-5}
    x, g, t = (torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64) for shape in ((16,), (5, 16), (5, 16)))
    seen = {}
    handle = place.module.hook_scale.register_forward_hook(lambda _m, _i, out: seen.update(scale=out))
    try:
        place.module(x)
    finally:
        handle.remove()

    def norm(value: torch.Tensor) -> torch.Tensor:
        return place.module.original_component(value) if rule is None else rule.surrogate(place, value, seen["scale"])

    back, forth = norm_vjp(rule, place, x, seen["scale"], g), norm_jvp(rule, place, x, seen["scale"], t)
    for i in range(5):
        _, expected = torch.autograd.functional.vjp(norm, x, g[:, :, i])
        torch.testing.assert_close(back[:, :, i], expected, **close)
        _, expected = torch.autograd.functional.jvp(norm, x, t[:, :, i])
        torch.testing.assert_close(forth[:, :, i], expected, **close)


@pytest.mark.parametrize(
    ("method", "sites", "message"),
    [
        (pl.AttributionPatching(qk_fix=True), "edges", "QK-fix and GradDrop are not defined for edges"),
        (pl.AttributionPatching(grad_drop=True), "edges", "QK-fix and GradDrop are not defined for edges"),
        (pl.AttributionPatching(), ["edges", "z"], "got them together with 1 other sites"),
        (LinearizedPatching(rules=Composite(linear=EpsilonRule())), "edges", "edges need the 0-rule on linear maps"),
        (get_method("eap-ig-activations:2"), "z", "over='groups' averages over the readers of edges; for nodes use over='activations'"),
    ],
)
def test_what_edges_do_not_go_with(method: Any, sites: Any, message: str) -> None:
    with pytest.raises(MethodError) as error:
        method.run(model_of("gpt2"), swap_task(), sites, direction="noising", progress=False)
    assert message in str(error.value)


def test_edges_are_not_scored_inside_intervene() -> None:
    with pl.intervene(model_of("gpt2"), pl.Edit("L0.attn_out", pl.sources.zero())), pytest.raises(MethodError, match="got them inside intervene"):
        pl.AttributionPatching().run(model_of("gpt2"), swap_task(), "edges", progress=False)


def test_a_graph_that_does_not_add_up_is_refused() -> None:
    setting = pl.AttributionPatching().prepared(model_of("gpt2"), swap_task(), "edges")[0]
    with pytest.raises(MethodError, match=r"the edges of gpt2 do not add up: .* differs from its node score by 0\.5"):
        edges.check_sums(setting, 0.5, 1.0)


@pytest.mark.parametrize(
    "name", ["ig-left:3", "ig-right:3", "ig-trapezoid:3", "ig-activations:3", "eap-ig-activations:3", "clean-corrupted", "relp+clean-corrupted"]
)
def test_paths_have_names(name: str) -> None:
    assert get_method(name).name == name
    assert get_method("eap-ig-inputs:5").name == "ig-right:5"


def test_an_unknown_quadrature_is_refused() -> None:
    with pytest.raises(MethodError, match="unknown quadrature 'simpson'"):
        IntegratedGradients(3, quadrature="simpson")
