"""MIB's circuits, CPR and CMD against a literal reading of their definition, and its submission folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchlab as pl
from patchlab.circuits import (
    MIB_FRACTIONS,
    Circuit,
    check_submission,
    faithfulness_curve,
    importances,
    mib_areas,
    read,
    sized,
    top_n,
    write_submission,
)
from patchlab.circuits.formats import mib
from patchlab.errors import CircuitError
from patchlab.graph import Graph
from patchlab.scores import ScoreMap
from patchlab.tasks import Task

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@pytest.fixture(scope="module")
def halves(demo_gpt2_4l) -> tuple[Task, Task]:
    return pl.load_task("ioi", demo_gpt2_4l, n=24).split()


@pytest.fixture(scope="module")
def edges(demo_gpt2_4l, halves) -> ScoreMap:
    return pl.AttributionPatching().run(demo_gpt2_4l, halves[0], "edges", direction="noising", progress=False)


@pytest.fixture(scope="module")
def nodes(demo_gpt2_4l, halves) -> ScoreMap:
    return pl.AttributionPatching().run(demo_gpt2_4l, halves[0], ["z", "mlp_out[layer]"], direction="noising", progress=False)


def literal_area(f: list[float], of: Any) -> float:
    """The trapezoids of the definition, one by one."""
    return sum((SHARES[i + 1] - SHARES[i]) * (of(f[i]) + of(f[i + 1])) / 2 for i in range(len(SHARES) - 1))


def literal_top(ranked: dict[str, float], n: int, by: str) -> set[str]:
    return set(sorted(ranked, key=lambda name: abs(ranked[name]) if by == "abs" else ranked[name], reverse=True)[:n])


def literally_pruned(graph: Graph, kept: set[str]) -> set[str]:
    """Edges whose writer is written to and whose reader is read from, again and again until nothing changes."""
    pairs = {name: tuple(name.split("->")) for name in kept}
    while True:
        writers, readers = {a for a, _ in pairs.values()} | {"logits"}, {b.partition("<")[0] for _, b in pairs.values()} | {"input"}
        left = {name: (a, b) for name, (a, b) in pairs.items() if a in readers and b.partition("<")[0] in writers}
        if left == pairs:
            return set(left)
        pairs = left


def test_the_areas_are_those_of_the_definition(demo_gpt2_4l, halves, edges):
    """Edges are ranked, cut, pruned and evaluated one circuit after the other, and the areas summed by hand; nothing of the curve is used."""
    graph, sign = demo_gpt2_4l.arch.graph, -1.0  # noising: what supports the behaviour has a negative effect
    effect = edges.mean("edges").to_numpy()
    ranked = {graph.name(w, r): sign * float(effect[w, r]) for w, r in np.argwhere(graph.allowed).tolist()}
    found: dict[str, list[float]] = {}
    for by in ("signed", "abs"):
        found[by] = []
        for share in SHARES:
            kept = literally_pruned(graph, literal_top(ranked, int(share * len(ranked)), by))
            one = {"cut": Circuit.of(graph, sorted(kept))}
            table = pl.circuits.evaluate(demo_gpt2_4l, one, halves[1], completeness=False, progress=False).table if kept else None
            found[by].append(0.0 if table is None else float(table["faithfulness"].iloc[0]))
    row = mib_areas(demo_gpt2_4l, {"atp": edges}, halves[1], progress=False).iloc[0]
    assert (row["method"], row["level"]) == ("atp", "edges")
    assert row["cpr"] == pytest.approx(literal_area(found["signed"], lambda f: f), abs=1e-4)
    assert row["cmd"] == pytest.approx(literal_area(found["abs"], lambda f: abs(1 - f)), abs=1e-4)
    assert [row[f"f({share:g})"] for share in SHARES] == pytest.approx(found["abs"], abs=1e-4)
    assert row["cpr_lo"] < row["cpr"] < row["cpr_hi"]
    # and the same as the curve's, of which one importance gives both
    curve = faithfulness_curve(demo_gpt2_4l, {"atp": edges}, halves[1], by="abs", random=0, progress=False).areas.iloc[0]
    assert row["cmd"] == pytest.approx(curve["cmd"], abs=1e-9)
    assert row["cpr"] != pytest.approx(curve["cpr"], abs=1e-3), "CPR is of signed circuits, not of these"


def test_circuits_of_nodes_carry_the_other_prompt_wherever_their_nodes_are_left_out(demo_gpt2_4l, halves, nodes):
    """Each f again by edits of whole runs: heads and MLPs that are left out are set to what they are on the corrupted prompts."""
    model, held = demo_gpt2_4l, halves[1]
    ranked = importances(nodes, graph=model.arch.graph)
    named = ranked.provenance["node_scores"]
    assert set(named) == set(model.arch.graph.writers) - {"input"}
    effects = nodes.mean("z").to_numpy()
    assert named["a1.h2"] == pytest.approx(-float(effects[1, 2]))
    corrupted = model.run(held.prompts("corrupted"), keep=["z", "mlp_out"])

    def metric(left_out: set[str]) -> float:
        edits = []
        for name in sorted(left_out):
            layer, _, head = name[1:].partition(".h")
            edits.append(pl.Edit(f"L{layer}.H{head}.z" if head else f"L{layer}.mlp_out", corrupted))
        logits = model.run(held.prompts("clean"), edits=edits).logits[:, -1]
        return float(held.metric(logits, held.batches()[0].answers).double().mean())

    everything = set(named)
    full, empty = metric(set()), float(held.metric(corrupted.logits[:, -1], held.batches()[0].answers).double().mean())
    found = {by: [] for by in ("signed", "abs")}
    for by, values in found.items():
        for share in SHARES:
            left_out = everything - literal_top(named, int(share * len(named)), by)
            values.append((metric(left_out) - empty) / (full - empty))
    row = mib_areas(model, nodes, held, progress=False).iloc[0]
    assert row["level"] == "nodes"
    assert [row[f"f({share:g})"] for share in SHARES] == pytest.approx(found["abs"], abs=1e-4)
    assert row["cpr"] == pytest.approx(literal_area(found["signed"], lambda f: f), abs=1e-4)
    assert row["cmd"] == pytest.approx(literal_area(found["abs"], lambda f: abs(1 - f)), abs=1e-4)


def test_examples_of_the_scores_are_refused(demo_gpt2_4l, halves, edges):
    with pytest.raises(CircuitError, match="allow_overlap"):
        mib_areas(demo_gpt2_4l, edges, halves[0], progress=False)
    with pytest.raises(CircuitError, match="give at least one map"):
        mib_areas(demo_gpt2_4l, {}, halves[1])


def test_what_is_no_ranking_is_refused(demo_gpt2_4l, halves, nodes):
    graph = demo_gpt2_4l.arch.graph
    with pytest.raises(CircuitError, match="pass graph=model.arch.graph; got .* without a graph"):
        importances(nodes)
    heads = pl.AttributionPatching().run(demo_gpt2_4l, halves[0], "z", progress=False)
    with pytest.raises(CircuitError, match=r"score the sites 'z\[layer,head\]' and 'mlp_out\[layer\]'"):
        importances(heads, graph=graph)
    with pytest.raises(CircuitError, match=r"the scores are of heads \[4, 4\] and .* has \[3, 4\]"):
        importances(nodes, graph=Graph(3, 4, 8))
    with pytest.raises(CircuitError, match="ranks nothing; make it with importances"):
        sized(Circuit.full(graph))
    with pytest.raises(CircuitError, match="unknown importance 'largest'"):
        sized(Circuit.full(graph), by="largest")


# --- the submission folder ---


def test_importances_have_the_sign_that_the_track_ranks_by(tmp_path, demo_gpt2_4l, edges, nodes):
    """The largest number of a file is what supports the behaviour most, whichever direction was patched."""
    graph = demo_gpt2_4l.arch.graph
    supports = edges.mean("edges").to_numpy()
    writer, reader = np.unravel_index(np.nanargmin(supports), supports.shape)  # of noising: the most negative effect
    chosen = top_n(edges, 40)
    write_submission({"ioi_gpt2": edges, "mcqa_qwen2.5": chosen, "arc-easy_llama3": importances(nodes, graph=graph)}, tmp_path / "mine")
    raw = torch.load(tmp_path / "mine" / "ioi_gpt2" / "importances.pt", weights_only=True)
    assert int(raw["edges_scores"].argmax()) == writer * len(graph.readers) + reader
    assert float(raw["edges_scores"].max()) == pytest.approx(-float(supports[writer, reader]))
    again = read(tmp_path / "mine" / "mcqa_qwen2.5" / "importances.pt")
    assert isinstance(again, Circuit)
    assert "direction" not in again.provenance
    np.testing.assert_allclose(again.scores[graph.allowed], -chosen.scores[graph.allowed])  # type: ignore[index]
    written = torch.load(tmp_path / "mine" / "arc-easy_llama3" / "importances.pt", weights_only=True)
    assert written["nodes_scores"].isnan().tolist() == [name == "input" for name in written["src_nodes"]]


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_a_submission_is_checked_as_the_track_does(suffix, tmp_path, monkeypatch, demo_gpt2_4l, edges, nodes):
    graph = demo_gpt2_4l.arch.graph
    monkeypatch.setattr(mib, "MIB_MODELS", dict.fromkeys(mib.MIB_MODELS, (graph.n_layers, graph.n_heads, graph.d_model)))
    nine = sized(importances(edges))[:-1]
    entries = {"ioi_gpt2": edges, "mcqa_gemma2": importances(nodes, graph=graph), "arc-easy_llama3": nine}
    write_submission(entries, tmp_path / "good", suffix=suffix)
    table = check_submission(tmp_path / "good").set_index("entry")
    assert table["holds"].to_dict() == {"ioi_gpt2": "importances of edges", "mcqa_gemma2": "importances of nodes", "arc-easy_llama3": "circuits"}
    assert table["n"].to_dict() == {"ioi_gpt2": graph.n_edges, "mcqa_gemma2": len(graph.writers) - 1, "arc-easy_llama3": nine[-1].n_edges}
    write_submission({"ioi_gpt2": edges, "mcqa_gpt2": edges, "ari_llama3": edges}, tmp_path / "bad", suffix=suffix)
    with pytest.raises(
        CircuitError, match="bad would not be taken: ari_llama3: unknown task of the track 'ari'.*mcqa_gpt2: unknown model of the track"
    ):
        check_submission(tmp_path / "bad")
    write_submission({"ioi_gpt2": edges}, tmp_path / "few", suffix=suffix)
    with pytest.raises(CircuitError, match="it has 1 model; .* it has 1 task; the track takes submissions of at least 2 models and 2 tasks"):
        check_submission(tmp_path / "few")
    monkeypatch.undo()
    with pytest.raises(CircuitError, match=r"ioi_gpt2: its circuits have \(4, 4, \d+\) layers, heads and width, and gpt2 has \(12, 12, 768\)"):
        check_submission(tmp_path / "good")


def test_scores_of_nodes_as_eap_ig_writes_them(tmp_path: Path):
    """JSON has NaN for the nodes without a score, which other tools write although JSON has no such number."""
    graph = Graph(1, 2, 8)
    nodes = {name: {"in_graph": True, "score": float("nan") if name == "input" else 0.5} for name in graph.nodes}
    data = {
        "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": nodes,
        "edges": {name: {"score": 0.0, "in_graph": True} for name in graph.names()},
    }
    path = tmp_path / "ioi.json"
    path.write_text(json.dumps(data))
    assert read(path).provenance["node_scores"] == {name: 0.5 for name in graph.nodes if name != "input"}  # type: ignore[union-attr]


def test_shares_are_those_of_the_track():
    assert MIB_FRACTIONS == SHARES
    for models in mib.MIB_TASKS.values():
        assert set(models) <= {*mib.MIB_MODELS, "interpbench"}
