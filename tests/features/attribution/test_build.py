"""Every edge of an attribution graph against an intervention in the frozen model, one source at a time."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from families import model_of
from frozen_model import FrozenModel
from torch import Tensor

import patchlab as pl
from patchlab.errors import InterventionError, MethodError, RuleError
from patchlab.features import AbsTopK, Dictionary, JumpRelu, LayerNorm, TopK
from patchlab.features.attribution import AttributionGraph, attribution_graph
from patchlab.models import Model
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.zoo import zoo_model

TOKENS = [3, 7, 1, 20, 5]
F64 = torch.float64


def transcoders(model: Model, **options) -> list[Dictionary]:
    options = {"kind": "transcoder", "width": 9, **options}
    return [random_dictionary(model, layer=layer, seed=layer, **options) for layer in range(model.arch.n_layers)]


def decoders(one: Dictionary, feature: int | slice, n_layers: int) -> list[tuple[int, Tensor]]:
    """Layers and decoder rows, written out."""
    if one.kind == "transcoder":
        return [(one.layer, one.w_dec[feature])]
    return [(to, one.w_dec[feature, to - one.layer]) for to in range(one.layer, n_layers)]


@dataclass
class Twin:
    """Rows of the graph by interventions: what adding a source changes at every target; and what is left where all sources are taken away."""

    edges: Tensor
    constants: Tensor
    values: Tensor


def twin_of(model: Model, graph: AttributionGraph, given: list[Dictionary], skip_first: int = 0) -> Twin:
    n_layers, table, by_layer = model.arch.n_layers, graph.nodes, {one.layer: one for one in given}
    skips = {one.layer: (f"blocks.{one.layer}.mlp.hook_in", one.w_skip) for one in given if one.w_skip is not None}
    frozen = FrozenModel(model, TOKENS, skips)
    reads = [frozen.clean[f"blocks.{layer}.mlp.hook_in"][0] for layer in range(n_layers)]
    base = [frozen.clean[f"blocks.{layer}.hook_mlp_out"][0] - (reads[layer] @ skips[layer][1] if layer in skips else 0) for layer in range(n_layers)]
    active = {layer: one.encode(reads[layer]) for layer, one in by_layer.items()}
    bias = [torch.zeros_like(part) for part in base]
    for layer, one in by_layer.items():
        active[layer][:skip_first] = 0
        bias[layer][skip_first:] = one.b_dec
    errors = [base[layer] - bias[layer] for layer in range(n_layers)]
    for layer, one in by_layer.items():
        for to, decoder in decoders(one, slice(None), n_layers):
            errors[to] = errors[to] - active[layer] @ decoder
    n = len(table)
    embedding = frozen.clean["hook_embed"].repeat(n, 1, 1)
    outputs = [part.repeat(n, 1, 1) for part in base]
    for source in range(n):
        kind, layer, pos, unit = (int(column[source]) for column in (table.kind, table.layer, table.pos, table.unit))
        if kind == 0:
            assert table.activation[source] == pytest.approx(float(active[layer][pos, unit]), rel=1e-12)
            for to, decoder in decoders(by_layer[layer], unit, n_layers):
                outputs[to][source, pos] += active[layer][pos, unit] * decoder
        elif kind == 1:
            outputs[layer][source, pos] += errors[layer][pos]
        elif kind == 2:
            embedding[source, pos] *= 2
    changed = frozen.run(embedding, outputs)
    empty = frozen.run(torch.zeros_like(embedding[:1]), [part[None] for part in bias])
    unembed = model.bridge.unembed.original_component
    edges, constants, values = torch.zeros(n, n, dtype=F64), torch.full((n,), torch.nan, dtype=F64), torch.full((n,), torch.nan, dtype=F64)
    for target in range(n):
        kind, layer, pos, unit = (int(column[target]) for column in (table.kind, table.layer, table.pos, table.unit))
        if kind == 0:
            vector, hook, offset = (
                by_layer[layer].w_enc[:, unit],
                f"blocks.{layer}.mlp.hook_in",
                float(by_layer[layer].pre(reads[layer] * 0)[pos, unit]),
            )
        elif kind == 3:
            own = getattr(unembed, "bias", None)
            vector, hook = unembed.weight[unit] - unembed.weight.mean(0), "unembed.hook_in"
            offset = 0.0 if own is None else float(own[unit] - own.mean())
        else:
            continue
        edges[target] = (changed[hook][:, pos] - frozen.clean[hook][0, pos]) @ vector
        constants[target] = empty[hook][0, pos] @ vector + offset
        values[target] = frozen.clean[hook][0, pos] @ vector + offset
    return Twin(edges, constants, values)


def check(model: Model, graph: AttributionGraph, given: list[Dictionary], skip_first: int = 0) -> None:
    """Every edge, and the balance of every target, with nothing left out."""
    twin = twin_of(model, graph, given, skip_first)
    off = 1e-10 if model.arch.family.startswith(("GPT", "Bloom", "OPT")) else 5e-6  # RMSNorms of Hugging Face compute in float32
    np.testing.assert_allclose(graph.adjacency.toarray(), twin.edges.numpy(), rtol=off, atol=off)
    np.testing.assert_allclose(graph.nodes.constant, twin.constants.numpy(), rtol=off, atol=off)
    np.testing.assert_allclose(graph.nodes.value, twin.values.numpy(), rtol=off, atol=off)
    targets = ~np.isnan(graph.nodes.value)
    sums = graph.adjacency.sum(1) + graph.nodes.constant + graph.nodes.left_out
    np.testing.assert_allclose(sums[targets], graph.nodes.value[targets], rtol=1e-12, atol=1e-12)


FORMS = {
    "plain": {},
    "skip": {"skip": True},
    "across": {"kind": "cross_layer_transcoder"},
    "topk": {"activation": TopK(3), "subtract_b_dec": True},
    "abstopk": {"activation": AbsTopK(3)},
    "jumprelu": {"activation": JumpRelu(torch.full((9,), 0.2, dtype=F64))},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_edge_is_an_intervention_in_the_frozen_model(form):
    model = model_of("gpt2", F64)
    given = transcoders(model, **FORMS[form])
    graph = attribution_graph(model, TOKENS, given)
    assert graph.nodes.of("feature").sum() > 20
    check(model, graph, given)


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox", "qwen3"])
def test_every_edge_on_other_families(family):
    model = model_of(family, F64)
    given = transcoders(model, skip=True)
    check(model, attribution_graph(model, TOKENS, given), given)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["skip", "across"])
@pytest.mark.parametrize(
    "family", ["bloom", "opt", "gpt-j", "gpt-neo", "olmo2", "granite", "gemma3", "cohere", "mixtral", "phi3", "mistral", "falcon", "mpt"]
)
def test_every_edge_on_more_families(family, form):
    model = zoo_model(family, F64)
    given = transcoders(model, **FORMS[form])
    check(model, attribution_graph(model, TOKENS, given), given)


def test_errors_of_layers_without_a_transcoder_and_of_first_positions_are_all_that_the_mlp_gives():
    model = model_of("gpt2", F64)
    given = transcoders(model, skip=True)[1:]
    graph = attribution_graph(model, TOKENS, given, skip_first=2)
    feature = graph.nodes.of("feature")
    assert graph.nodes.pos[feature].min() == 2
    assert graph.nodes.layer[feature].min() == 1
    check(model, graph, given, skip_first=2)


def test_a_transcoder_that_reads_before_the_norm_has_its_weight_is_one_with_the_weight_folded_in():
    model = model_of("gpt2", F64)
    given = transcoders(model, skip=True)
    norms = {place.name: place for place in model.arch.places}
    raw = []
    for one in given:
        norm = norms[f"blocks.{one.layer}.ln2"].module.original_component
        w_enc, w_skip = norm.weight[:, None] * one.w_enc, norm.weight[:, None] * one.w_skip
        b_enc, b_dec = one.b_enc + norm.bias @ one.w_enc, one.b_dec + norm.bias @ one.w_skip
        raw.append(replace(one, reads="ln2.hook_normalized", w_enc=w_enc, w_skip=w_skip, b_enc=b_enc, b_dec=b_dec))
    folded, graph = attribution_graph(model, TOKENS, given), attribution_graph(model, TOKENS, raw)
    np.testing.assert_allclose(graph.adjacency.toarray(), folded.adjacency.toarray(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(graph.nodes.value, folded.nodes.value, rtol=1e-9)


def test_positional_embedding_is_told_from_other_constants():
    model = model_of("gpt2", F64)
    given = transcoders(model)
    graph = attribution_graph(model, TOKENS, given)
    frozen = FrozenModel(model, TOKENS)
    positions = model.bridge.pos_embed.original_component.weight[: len(TOKENS)]
    outputs = [frozen.clean[f"blocks.{layer}.hook_mlp_out"] for layer in range(3)]
    without = frozen.run(frozen.clean["hook_embed"] - positions, outputs)
    feature = int(np.flatnonzero(graph.nodes.of("feature"))[-1])
    layer, pos, unit = (int(column[feature]) for column in (graph.nodes.layer, graph.nodes.pos, graph.nodes.unit))
    hook = f"blocks.{layer}.mlp.hook_in"
    moved = (frozen.clean[hook] - without[hook])[0, pos] @ given[layer].w_enc[:, unit]
    assert graph.nodes.positional[feature] == pytest.approx(float(moved), rel=1e-9)
    assert attribution_graph(model_of("llama", F64), TOKENS, transcoders(model_of("llama", F64))).nodes.positional[-1] == 0


def test_logits_are_the_most_probable_ones_less_the_mean():
    model = model_of("gpt2", F64)
    logits = model.run(TOKENS).logits[0, -1]
    probability = logits.softmax(-1)
    graph = attribution_graph(model, TOKENS, transcoders(model), max_logits=4, cumulative=1.0)
    chosen = graph.nodes.of("logit")
    assert graph.nodes.unit[chosen].tolist() == probability.topk(4).indices.tolist()
    np.testing.assert_allclose(graph.nodes.probability[chosen], probability.topk(4).values, rtol=1e-12)
    np.testing.assert_allclose(graph.nodes.value[chosen], (logits - logits.mean()).topk(4).values, rtol=1e-9)
    enough = float(probability.topk(3).values[:2].sum()) + 1e-9
    assert attribution_graph(model, TOKENS, transcoders(model), cumulative=enough).nodes.of("logit").sum() == 3
    asked = attribution_graph(model, TOKENS, transcoders(model), logits=[30, 2])
    assert asked.nodes.unit[asked.nodes.of("logit")].tolist() == [30, 2]


def literal_choice(graph: AttributionGraph, n: int) -> set[str]:
    """The features that circuit-tracer's loop chooses one at a time, from the whole graph, with dense matrices."""
    table, names = graph.nodes, [graph.name(i) for i in range(len(graph.nodes))]
    matrix = np.abs(graph.adjacency.toarray())
    features, logits = np.flatnonzero(table.of("feature")), np.flatnonzero(table.of("logit"))
    there = list(logits)
    chosen: list[int] = []
    while len(chosen) < n:
        part = np.zeros_like(matrix)
        part[there] = matrix[there] / matrix[there].sum(1, keepdims=True)
        influence, step = np.zeros(len(table)), table.probability.copy()
        for _ in range(10):
            step = step @ part
            influence += step
        best = max((f for f in features if f not in chosen), key=lambda f: influence[f])
        chosen.append(best)
        there.append(best)
    return {names[i] for i in chosen}


def test_features_are_chosen_by_iterated_influence():
    model = model_of("gpt2", F64)
    given = transcoders(model)
    whole = attribution_graph(model, TOKENS, given)
    graph = attribution_graph(model, TOKENS, given, max_features=12, round_size=1)
    names = {graph.name(i) for i in np.flatnonzero(graph.nodes.of("feature")).tolist()}
    assert names == literal_choice(whole, 12)
    at_once = attribution_graph(model, TOKENS, given, max_features=12, round_size=100)
    assert at_once.nodes.of("feature").sum() == 12
    places = {whole.name(i): i for i in range(len(whole.nodes))}
    mine = [places[graph.name(i)] for i in range(len(graph.nodes))]
    targets = ~np.isnan(graph.nodes.value)
    np.testing.assert_allclose(graph.adjacency.toarray(), whole.adjacency.toarray()[mine][:, mine], rtol=1e-12, atol=1e-14)
    sums = graph.adjacency.sum(1) + graph.nodes.left_out + graph.nodes.constant
    np.testing.assert_allclose(sums[targets], graph.nodes.value[targets], rtol=1e-12, atol=1e-12)
    assert np.abs(graph.nodes.left_out[targets]).max() > 0.01


def test_batches_and_memory_change_no_edge():
    model = model_of("llama", F64)
    given = transcoders(model)
    graph = attribution_graph(model, TOKENS, given)
    small = attribution_graph(model, TOKENS, given, max_memory=80_000)
    np.testing.assert_allclose(small.adjacency.toarray(), graph.adjacency.toarray(), rtol=1e-10, atol=1e-13)
    with pytest.raises(MethodError, match=r"max_memory allows 0.00 GB. Give fewer max_features"):
        attribution_graph(model, TOKENS, given, max_memory=1000)


def test_the_model_is_left_as_it_was():
    model = model_of("gpt2", F64)
    before = model.run(TOKENS).logits
    attribution_graph(model, TOKENS, transcoders(model))
    assert torch.equal(model.run(TOKENS).logits, before)


def test_what_does_not_fit_is_refused():
    model = model_of("gpt2", F64)
    good = transcoders(model)
    cases = [
        ([], "needs transcoders; got none"),
        ([random_dictionary(model, reads="resid_post")], "stands in for no MLP"),
        ([good[0], replace(good[1], layer=0)], "is of the same layer"),
        ([replace(good[0], layer=7)], "the model has the layers 0 to 2"),
        ([replace(good[0], reads="attn_out")], "read one of mlp_in"),
        ([replace(good[0], writes="attn_out")], "needs what it gives to be mlp_out"),
        ([replace(good[0], normalise=LayerNorm())], "LayerNorm of each row is not linear"),
        ([replace(random_dictionary(model, kind="cross_layer_transcoder"), layer=1)], "must write to each of the 2 layers"),
    ]
    for given, words in cases:
        with pytest.raises(MethodError, match=words):
            attribution_graph(model, TOKENS, given)
    for options, words in (
        ({"max_features": 0}, "max_features is 0"),
        ({"max_logits": 0}, "max_logits is 0"),
        ({"cumulative": 0.0}, "share of probability"),
        ({"skip_first": 6}, "the prompt has 5 tokens"),
        ({"logits": [1, 1]}, "different token ids"),
        ({"logits": [40]}, "different token ids from 0 to 36"),
    ):
        with pytest.raises(MethodError, match=words):
            attribution_graph(model, TOKENS, good, **options)
    with pytest.raises(MethodError, match="one prompt"):
        attribution_graph(model, [TOKENS, TOKENS], good)
    with pl.intervene(model, pl.Edit("L0.attn_out", pl.sources.zero())), pytest.raises(InterventionError, match="take it outside of intervene"):
        attribution_graph(model, TOKENS, good)


def test_a_model_that_cannot_be_held_is_refused_by_name():
    model = zoo_model("qwen3-next", F64)
    with pytest.raises(RuleError, match=r"no attribution graph of qwen3-next: .* blocks.0.linear_attn.norm"):
        attribution_graph(model, TOKENS, transcoders(model))
