"""Comparisons on features: every number of the tables again from the parts that they are made of, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import patchlab as pl
from patchlab import feature_comparison as features
from patchlab.circuits import evaluate, top_n
from patchlab.cli import app
from patchlab.errors import CircuitError, MethodError
from patchlab.feature_comparison import FeatureJob, sizes_of
from patchlab.plots._node_circuits import _prepare_node_circuits
from patchlab.report.features import command, write_features
from patchlab.testing.dictionaries import random_dictionary

METHODS = ("exact", "atp", "relp", "ig-activations-left:2")


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    """A folder with dictionaries of two layers, of different widths."""
    model, folder = pl.load_model("demo-gpt2-4l"), tmp_path_factory.mktemp("dictionaries")
    for layer, width in ((1, 24), (3, 40)):
        random_dictionary(model, "resid_post", layer, width, seed=layer).save(folder / f"resid_post-{layer}")
    return folder


@pytest.fixture(scope="module")
def results(dictionaries):
    """A small comparison."""
    monkey = pytest.MonkeyPatch()
    monkey.setattr(features, "MARKS", METHODS[-1])
    job = FeatureJob("demo-gpt2-4l", "ioi", str(dictionaries), methods=METHODS, n=8)
    yield features.run(job)
    monkey.undo()


@pytest.mark.slow
def test_rows_are_those_of_circuits_that_are_evaluated_by_themselves(results):
    assert results.points == ("resid_post",)
    table = results.circuits.set_index(["method", "nodes", "n_nodes"])
    assert set(table.index.get_level_values("nodes")) == set(features.NODES)
    for nodes, method, errors, sites in (
        ("features", "relp", "nodes", ["features.resid_post", "error.resid_post"]),
        ("features-without-errors", "atp", "ablated", ["features.resid_post"]),
        ("neurons", "exact", "nodes", ["mlp_post"]),
    ):
        maps = results.neurons if nodes == "neurons" else results.maps
        size = sorted(set(results.circuits.query("nodes == @nodes")["n_nodes"]))[4]
        alone = evaluate(results.model, top_n(maps[method], size, sites=sites), results.measuring, errors=errors, progress=False).table.iloc[0]
        row = table.loc[(method, nodes, size)]
        assert row["faithfulness"] == pytest.approx(alone["faithfulness"], abs=2e-5)
        assert row["completeness"] == pytest.approx(alone["completeness"], abs=2e-5)
    assert set(results.choosing.pair_fingerprints).isdisjoint(results.measuring.pair_fingerprints)


@pytest.mark.slow
def test_with_all_features_and_errors_a_circuit_is_the_model(results):
    """Features that are not among the scored ones are inactive or the same in both prompts: ablating them changes little."""
    of = results.circuits.query("nodes == 'features' and method == 'relp'").sort_values("n_nodes")
    assert of["faithfulness"].iloc[-1] == pytest.approx(1, abs=0.25)
    assert of["completeness"].iloc[-1] == pytest.approx(0, abs=0.25)
    at_random = results.circuits.query("method == 'random'")
    assert len(at_random) == len(results.circuits) / (len(METHODS) + 1)


@pytest.mark.slow
def test_areas_are_means_over_the_sizes(results):
    for row in results.areas.to_dict("records"):
        of = results.circuits.query("method == @row['method'] and nodes == @row['nodes']")
        assert row["distance"] == pytest.approx(np.abs(1 - of["faithfulness"]).mean())
        assert row["left"] == pytest.approx(of["completeness"].mean())
    areas = results.areas.set_index(["method", "nodes"])["distance"]
    for row in results.differences.to_dict("records"):
        assert row["value"] == pytest.approx(areas[row["method"], row["nodes"]] - areas[METHODS[-1], row["nodes"]])
        assert row["lo"] <= row["hi"]
    lines = features.sentences(results)
    assert any(line.startswith("features: circuits chosen by relp") for line in lines)


@pytest.mark.slow
def test_intervals_are_those_of_a_literal_bootstrap(results):
    """One draw of examples at a time, the same for both methods."""
    sites, other = ["features.resid_post", "error.resid_post"], METHODS[-1]
    sizes = sorted(set(results.circuits.query("nodes == 'features'")["n_nodes"]))
    circuits = {f"{name} {n}": top_n(results.maps[name], n, sites=sites) for name in ("relp", other) for n in sizes}
    found = evaluate(results.model, circuits, results.measuring, completeness=False, progress=False)
    distances = {"relp": [], other: []}
    examples = len(results.measuring)
    for chosen in np.random.default_rng(results.job.seed).integers(examples, size=(1000, examples)):
        empty = found.metric_empty[chosen].mean()
        gap = found.metric_full[chosen].mean() - empty
        for name, into in distances.items():
            into.append(np.mean([abs(1 - (found.metric[f"{name} {n}"][chosen].mean() - empty) / gap) for n in sizes]))
    relp, marks = np.array(distances["relp"]), np.array(distances[other])
    area = results.areas.query("method == 'relp' and nodes == 'features'").iloc[0]
    assert [area["distance_lo"], area["distance_hi"]] == pytest.approx(np.quantile(relp, [0.025, 0.975]), abs=1e-3)
    difference = results.differences.query("method == 'relp' and nodes == 'features'").iloc[0]
    assert [difference["lo"], difference["hi"]] == pytest.approx(np.quantile(relp - marks, [0.025, 0.975]), abs=1e-3)


@pytest.mark.slow
def test_the_folder_has_what_is_promised(results, tmp_path, monkeypatch):
    run = write_features(tmp_path, results, images=False)
    table = pd.read_csv(tmp_path / "features.csv")
    ends = [f"{name}{end}" for name in ("faithfulness", "completeness") for end in ("", "_lo", "_hi")]
    assert list(table) == ["method", "nodes", "n_nodes", *ends]
    assert set(table["nodes"]) == {"features", "features-without-errors", "neurons"}
    again = pd.read_csv(tmp_path / "comparison.csv")
    assert {"exact", *again["method"]} == set(METHODS)
    assert {"comparison.csv", "features.csv", "faithfulness.html", "agreement.html", "run.json"} <= {path.name for path in tmp_path.iterdir()}
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "https://" not in page.replace("https://plot.ly", "")
    for text in run["findings"]:
        assert text.split("(")[0].strip()[:40] in page.replace("&#x27;", "'")
    assert command(results.job).startswith("patchlab features compare --model demo-gpt2-4l --task ioi --dictionaries")
    drawn = _prepare_node_circuits(results.circuits, "title")
    assert drawn.methods[-1] == "random"
    (line,) = (one for one in drawn.panels["completeness", "neurons"] if one.method == "relp")
    of = results.circuits.query("method == 'relp' and nodes == 'neurons'").sort_values("n_nodes")
    assert np.array_equal(line.value, of["completeness"])


@pytest.mark.slow
def test_the_command_writes_a_folder_and_replaces_none(dictionaries, tmp_path):
    words = ["features", "compare", "--model", "demo-gpt2-4l", "--task", "ioi", "--n", "8", "--dictionaries", str(dictionaries), "--json"]
    words += ["--methods", "relp,exact", "--points", "resid_post", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    run = json.loads(done.stdout.strip().splitlines()[-1])
    assert run["job"]["direction"] == "noising"
    assert {"features.csv", "scores.relp.nc", "neurons.relp.nc"} <= {path.name for path in (tmp_path / "out").iterdir()}
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code != 0
    assert "already holds results" in refused.output


def test_sizes_grow_by_a_factor():
    assert sizes_of(1) == [1]
    found = sizes_of(1000)
    assert (found[0], found[-1]) == (1, 1000)
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("atp", "relp"), "needs exact patching"),
        (("exact",), "at least one other method"),
        (("exact", "relp", "relp"), "relp is named twice"),
        (("exact@mean", "relp@mean"), "by `exact` itself; got exact@mean"),
        (("exact", "relp@mean"), "cannot be compared"),
    ],
)
def test_methods_that_make_no_comparison_are_refused(methods, message):
    with pytest.raises(MethodError, match=message):
        FeatureJob("demo-gpt2-4l", "ioi", methods=methods)


def test_a_table_without_a_column_is_not_drawn():
    with pytest.raises(CircuitError, match="no column 'nodes'"):
        pl.plots.node_circuits(pd.DataFrame({"method": ["relp"]}))
    job = FeatureJob("demo-gpt2-4l", "ioi", methods=("relp", "exact"))
    assert job.methods[0] == "exact"
    assert replace(job, points=("resid_post",)).as_dict()["points"] == ["resid_post"]
