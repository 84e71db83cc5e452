"""Runs of features: what a comparison on features computes, one method at a time; keys, plans, tables and pages of them."""

import shutil

import pandas as pd
import pytest
from sweeping import runs, swept

import patchlab as pl
from patchlab import feature_comparison as features
from patchlab.circuits.evaluation.node_runner import NodeRunner
from patchlab.errors import SweepError
from patchlab.report.sweep import write_sweep
from patchlab.sweeps.kinds import NODES
from patchlab.sweeps.plan import estimate
from patchlab.sweeps.spec import FeatureSpec, ModelSpec, RunSpec, TaskSpec
from patchlab.testing.dictionaries import random_dictionary

MODEL = ModelSpec.of("demo-gpt2-4l")
TEXT = """
version: 1
name: features
models: demo-gpt2-4l
tasks: {name: ioi, n: 8}
directions: noising
runs:
  - {kind: features, methods: [exact, relp], dictionaries: saes}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with dictionaries of two layers, of different widths."""
    model, folder = pl.load_model("demo-gpt2-4l"), tmp_path_factory.mktemp("features")
    for layer, width in ((1, 12), (3, 20)):
        random_dictionary(model, "resid_post", layer, width, seed=layer).save(folder / "saes" / f"resid_post-{layer}")
    return folder


@pytest.fixture(scope="module")
def out(folder):
    """The sweep, and how often circuits were run meanwhile by each method: unlike ones × batches."""
    counted: list[int] = []
    metric = NodeRunner.metric

    def counting(self, circuits, **options):
        found = len({circuit.key() for circuit in circuits})
        counted.append(found * len(self.task.batches(self.batch_size, self.model.device)))
        return metric(self, circuits, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NodeRunner, "metric", counting)
        counts, said = swept(runs(folder, TEXT), folder / "out", about={"name": "features"})
    assert (counts["done"], counts["failed"]) == (2, 0), said
    return folder / "out", counted


def spec(folder, **fields) -> RunSpec:
    what = FeatureSpec(**{"method": "relp", "dictionaries": "saes", **fields}).of(MODEL, folder)
    return RunSpec(model=MODEL, task=TaskSpec(name="ioi", n=8), direction="noising", what=what)


def test_keys_hold_what_is_in_the_dictionaries_and_not_where_they_are(folder, tmp_path):
    shutil.copytree(folder / "saes", tmp_path / "others")
    (tmp_path / "others" / ".cache").write_text("not part of them")
    here, there = spec(folder), spec(tmp_path, dictionaries="others")
    assert here.key == there.key
    assert here.group == there.group == spec(folder, method="exact").group, "which share the model's runs"
    assert here.key == spec(folder, points=()).key != spec(folder, points="resid_post").key
    assert spec(folder, points=["mlp_out", "resid_pre"]).key == spec(folder, points=["resid_pre", "mlp_out"]).key
    unlike = [spec(folder, ablation="mean"), spec(folder, method="atp"), spec(folder, points="resid_post")]
    with next((tmp_path / "others").rglob("*.safetensors")).open("ab") as file:
        file.write(b"0")
    unlike.append(spec(tmp_path, dictionaries="others"))
    assert len({one.key for one in (here, *unlike)}) == 5
    assert unlike[-1].group != here.group
    fields = here.fields()
    assert (fields["dictionaries"], fields["ablation"], fields["method"], fields["sites"]) == ("saes", "mean_positional", "relp", "features,error")
    assert not {"path", "content"} & {*fields}
    assert here.label.endswith("noising: features of saes by relp, mean_positional")
    assert RunSpec.model_validate_json(here.model_dump_json()).key == here.key


def test_packaged_dictionaries_are_those_of_the_model():
    model = ModelSpec.of("demo-gpt2")
    own, named = (FeatureSpec(method="relp", dictionaries=name).of(model) for name in (None, "demo-gpt2"))
    assert own.content == named.content is not None
    with pytest.raises(SweepError, match=r"no key; make it with FeatureSpec\.of"):
        _ = RunSpec(model=model, task=TaskSpec(name="ioi"), what=FeatureSpec(method="relp")).key
    with pytest.raises(SweepError, match="no dictionaries are packaged for the model demo-gpt2-4l"):
        FeatureSpec(method="relp").of(MODEL)


@pytest.mark.slow
def test_a_run_is_the_comparison_of_its_method(folder, out):
    """Numbers of the table, and the agreement with the run of exact patching, are those of ``patchlab features compare``."""
    job = features.FeatureJob("demo-gpt2-4l", "ioi", str(folder / "saes"), methods=("exact", "relp"), n=8, batch_size=32)
    alone = features.run(job)
    sweep = pl.sweeps.open(out[0])
    table = sweep.table()
    expected = alone.comparison.table.query("cells == 'live' and method == 'relp'").set_index("site")
    mine = table[table["method"] == "relp"].set_index(["site", "statistic"])["value"]
    for site in ("features.resid_post", "error.resid_post"):
        for statistic in ("pearson", "pearson_per_prompt", "slope"):
            assert mine[site, statistic] == pytest.approx(expected.loc[site, statistic], rel=1e-5)
    key = sweep.runs().set_index("method").loc["relp", "key"]
    stored = pd.read_csv(sweep.find(key).path(NODES)).query("method == 'relp'").set_index(["nodes", "n_nodes"])
    theirs = alone.circuits.query("method == 'relp'").set_index(["nodes", "n_nodes"])
    both = stored.index.intersection(theirs.index)
    assert set(both.get_level_values("nodes")) == set(features.NODES)
    for name in ("faithfulness", "completeness_lo"):
        assert stored.loc[both, name].to_numpy() == pytest.approx(theirs.loc[both, name].to_numpy(), abs=1e-5)
    for nodes, size in both:
        assert mine[nodes, f"faithfulness_{size}"] == pytest.approx(stored.loc[(nodes, size), "faithfulness"])
    areas = stored.groupby("nodes")["faithfulness"].agg(lambda values: (1 - values).abs().mean())
    assert {nodes: mine[nodes, "distance"] for nodes in features.NODES} == pytest.approx(dict(areas))


@pytest.mark.slow
def test_no_more_passes_are_taken_than_were_planned(folder, out):
    plan = estimate(runs(folder, TEXT))
    sweep = pl.sweeps.open(out[0])
    costs = sweep.table(costs=True).query("statistic in ['forwards', 'backwards']").set_index(["method", "statistic"])["value"]
    exact, relp = plan.runs
    taken = sum(out[1][len(out[1]) // 2 :])
    around = 2 * 3  # the whole model and the means, of each kind of nodes
    assert relp.backwards == costs["relp", "backwards"]
    assert taken + costs["relp", "forwards"] + around <= relp.forwards
    assert relp.forwards - (taken + costs["relp", "forwards"] + around) <= 2 * 3 * 4 + 3, "and few are planned in vain"
    assert exact.uncounted
    assert "at most" in str(plan)
    assert "at least" in str(plan)
    assert not pl.load_model("demo-gpt2-4l").dictionaries


@pytest.mark.slow
def test_the_page_shows_them(out, tmp_path):
    write_sweep(pl.sweeps.open(out[0]), tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<h2>Features</h2>" in page
    assert page.count(">features-without-errors<") >= 2
    assert list((tmp_path / "report").glob("nodes-*.js"))
    assert "features.resid_post" in page.partition("<h2>Agreement</h2>")[2].partition("<h2>")[0]


def test_a_run_whose_dictionaries_do_not_fit_fails_and_leaves_none(folder, tmp_path, demo_gpt2_4l):
    run = spec(folder, points="mlp_out")
    plan = estimate([run], load=lambda *_, **__: demo_gpt2_4l)
    assert "holds no dictionary with sites" in str(plan.runs[0].problem)
    counts, _ = swept([run], tmp_path / "out")
    assert counts["failed"] == 1
    assert not demo_gpt2_4l.dictionaries
