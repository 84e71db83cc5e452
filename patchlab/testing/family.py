"""Family reports: what works on a model of the zoo, measured: exact patching against whole passes, the absent sites, rules, edges."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from patchlab.engine.edge_sweep import Differences
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Target, row_numbers
from patchlab.engine.trust.edges import edge_support, run_edge_sets
from patchlab.engine.trust.nodes import support
from patchlab.errors import ModelError, PatchlabError, RuleError
from patchlab.interventions import Edit
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.named import AttributionPatching, RelevancePatching
from patchlab.metrics import METRICS, Answers
from patchlab.models import Model
from patchlab.rules import coverage, get_composite
from patchlab.sources import Kept
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.toys import toy_task
from patchlab.testing.zoo import zoo_model

FINEST = {
    "z": "z[layer,pos,head]",
    "q": "q[layer,pos,head]",
    "k": "k[layer,pos,kv_head]",
    "v": "v[layer,pos,kv_head]",
    "mlp_post": "mlp_post[layer,pos,neuron]",
}
"""Granularities besides the default at which sites are compared."""


@dataclass(frozen=True)
class Family:
    """What works on one model of the zoo.

    ``refused`` says why the model does not load. ``gap`` is the largest difference between exact patching and whole passes, and ``edges_gap``
    between all edges out of a node patched together and the node, as shares of the largest effect; None where there are no edges,
    and ``no_edges`` says why.
    ``features_gap`` is that of features and errors of dictionaries between the engine and whole passes, or why there are none.
    ``single``: the architecture does not run in float64. ``rules`` maps a composite to why it refuses, or to None.
    """

    name: str
    refused: str | None = None
    engine: str = ""
    gap: float = np.nan
    absent: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str | None] = field(default_factory=dict)
    features_gap: float | str = ""
    edges: str = ""
    edges_gap: float | None = None
    no_edges: str | None = None
    single: bool = False


def measure_family(name: str, *, layers: int = 3, rules: tuple[str, ...] = ("relp", "relp-ah"), features: bool = True) -> Family:
    """Try a model of the zoo on random prompts, in float64 where it can."""
    try:
        try:
            model = zoo_model(name, torch.float64, layers)
        except ModelError:
            model = zoo_model(name, torch.float32, layers)
    except ModelError as error:
        return Family(name, refused=str(error))
    found = Family(
        name,
        engine=str(support(model)),
        gap=_exact_gap(model),
        absent=dict(model.arch.absent),
        rules={composite: _refusal(model, composite) for composite in rules},
        features_gap=_features(model, rules) if features else "not tried",
        single=model.dtype != torch.float64,
    )
    try:
        return replace(found, edges=str(edge_support(model)), edges_gap=_edges_gap(model))
    except PatchlabError as error:
        return replace(found, no_edges=str(error))


def _exact_gap(model: Model) -> float:
    """Every site, by itself and at its finest granularity, both ways."""
    sites = [*model.arch.sites, *(finest for kind, finest in FINEST.items() if kind in model.arch.sites)]
    task = toy_task(model, n=2, length=5, seed=4)
    one, two = (
        method.run(model, task, sites, direction="denoising", progress=False)
        for method in (ActivationPatching(), ActivationPatching(engine="literal"))
    )
    worst = 0.0
    for site in one.sites:
        got, expected = (scores.data[site].to_numpy() for scores in (one, two))
        if not np.array_equal(np.isnan(got), np.isnan(expected)):
            return np.inf
        worst = max(worst, float(np.nanmax(np.abs(got - expected))) / max(float(np.nanmax(np.abs(expected))), 1e-30))
    return worst


def features_gap(model: Model, rules: tuple[str, ...] = ()) -> float:
    """Features and errors of random dictionaries on layer 1: exact patching by the engine against whole passes, as a share of the largest effect.

    AtP, and every composite that covers the model, score them too: each run checks that features, errors and rests add up to the scores of nodes.

    Raises:
        PatchlabError: they cannot be scored, or do not add up.
    """
    points = [point for point in ("resid_post", "attn_out", "mlp_out") if point in model.arch.sites]
    task, worst = toy_task(model, n=2, length=5, seed=4), 0.0
    model.add_dictionaries([random_dictionary(model, point, 1, 16) for point in points])
    try:
        sites = [f"{part}.{point}" for point in points for part in ("features", "error")]
        methods = [ActivationPatching(), ActivationPatching(engine="literal")]
        fast, whole = (method.run(model, task, sites, direction="denoising", progress=False) for method in methods)
        for site in sites:
            got, expected = (scores.data[site].to_numpy() for scores in (fast, whole))
            scale = float(np.abs(expected).max())
            worst = max(worst, float(np.abs(got - expected).max()) / scale if scale > 1e-6 else np.inf)
        for method in (AttributionPatching(), *(RelevancePatching(name) for name in rules if not model.uncovered(get_composite(name)))):
            method.run(model, task, sites, direction="denoising", progress=False)
    finally:
        model.drop_dictionaries()
    return worst


def _features(model: Model, rules: tuple[str, ...]) -> float | str:
    try:
        return features_gap(model, rules)
    except PatchlabError as error:
        return str(error)


def _refusal(model: Model, composite: str) -> str | None:
    """Why rules refuse; None if they run."""
    sites = [kind for kind in ("resid_pre", "attn_out", "mlp_out") if kind in model.arch.sites]
    try:
        RelevancePatching(composite).run(model, toy_task(model, n=1, length=5, seed=4), sites, direction="denoising", progress=False)
    except RuleError as error:
        return str(error)
    left = coverage(model, composite).uncovered
    return f"{left[0][0]}: {left[0][1]}" if left else None


def _edges_gap(model: Model) -> float:
    """All edges out of a node, patched together, against the node: the input, a head and the MLP of the first and of the last layer but one."""
    arch, graph = model.arch, model.arch.graph
    tokens = torch.randint(0, arch.vocab_size, (2, 5), generator=torch.Generator().manual_seed(5)).to(model.device)
    donor = tokens.clone()
    donor[:, 2:] = (donor[:, 2:] + 1) % arch.vocab_size
    kinds = ("z", "mlp_out") if graph.mlps else ("z",)
    keep: tuple[Target, ...] = (("input", None), *((kind, layer) for kind in kinds for layer in range(arch.n_layers)))
    examples = row_numbers(tokens)
    own, other = (run(model, Program(ids, examples, keep=keep)).activations for ids in (tokens, donor))
    source = Kept(other, examples)
    answers = Answers.of([[0], [1]], [[2], [3]], model.device)
    program = Program(tokens, examples, metric=METRICS["logit_diff"], answers=answers)
    nodes = {0: "input"}
    for layer in {0, max(0, arch.n_layers - 2)}:
        nodes |= {graph.heads_of(layer).start + head: f"L{layer}.H{head}.z" for head in (0, graph.n_heads - 1)}
        nodes |= {graph.mlp_of(layer): f"L{layer}.mlp_out"} if graph.mlps else {}
    allowed = torch.as_tensor(graph.allowed.copy(), device=model.device)
    writers = torch.arange(len(graph.writers), device=model.device)
    masks = [allowed & (writers == writer)[:, None] for writer in nodes]
    together = run_edge_sets(model, program, masks, Differences.of(model, own, source, examples))
    plain = _values(model, program)
    alone = torch.stack([_values(model, program, Edit(site, source)) for site in nodes.values()])
    return float((together - alone).abs().max() / (alone - plain).abs().max())


def _values(model: Model, program: Program, *edits: Edit) -> Any:
    with torch.no_grad():
        return run(model, Program(program.tokens, program.examples, metric=program.metric, answers=program.answers, edits=edits)).values
