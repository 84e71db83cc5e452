"""patchlab circuit: what its commands write and print, that halves are kept apart, and how errors read."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from command_lines import instead
from typer.testing import CliRunner

import patchlab as pl
from patchlab import cli
from patchlab.circuits import Circuit, FaithfulnessCurve, read, write
from patchlab.circuits.heldout import shared_examples

WHERE = ["--model", "demo-gpt2-4l", "--task", "ioi", "--n", "12", "--device", "cpu"]


def patchlab(*arguments: object):
    return CliRunner().invoke(cli.app, ["circuit", *map(str, arguments)], prog_name="patchlab")


def printed(*arguments: object) -> dict:
    result = patchlab(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


def error_of(*arguments: object) -> str:
    """The one line that a command fails with."""
    result = patchlab(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="module")
def halves():
    model = pl.load_model("demo-gpt2-4l", device="cpu")
    return model, *pl.load_task("ioi", model, n=12).split()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A circuit that find made, and what it printed."""
    path = tmp_path_factory.mktemp("circuit") / "c.json"
    return path, printed("find", *WHERE, "--edges", 40, "--out", path)


# find


def test_find_chooses_from_the_scores_of_the_first_half(found, halves):
    path, record = found
    model, first, second = halves
    scores = pl.RelevancePatching().run(model, first, "edges", direction="noising", progress=False)
    wanted = pl.circuits.top_n(scores, 40)
    circuit = read(path)
    assert circuit.edge_names == wanted.edge_names == record["edges"]
    np.testing.assert_allclose(circuit.scores[circuit.edges], wanted.scores[wanted.edges], rtol=1e-5)
    assert record["n_edges"] == circuit.n_edges <= 40
    assert (record["n_nodes"], record["graph_edges"], record["graph_nodes"]) == (len(circuit.nodes), 479, 22)
    assert record["out"] == str(path)
    assert record["provenance"]["method"] == "relp"
    assert shared_examples(circuit.provenance, first) == len(first)
    assert shared_examples(circuit.provenance, second) == 0


@pytest.mark.slow
def test_find_says_how_stable_the_choice_is_and_can_choose_what_is(tmp_path, halves):
    model, first, _ = halves
    scores = pl.RelevancePatching().run(model, first, "edges", direction="noising", progress=False)

    def choose(one):
        return pl.circuits.top_n(one, 40)

    wanted = pl.circuits.stability(scores, choose, draws=10, seed=0)
    record = printed("find", *WHERE, "--edges", 40, "--stability", 10, "--out", tmp_path / "s.json")
    assert record["provenance"]["stability"]["jaccard"] == pytest.approx(wanted.jaccard, abs=0.02)  # batches round differently
    assert read(tmp_path / "s.json").provenance["stability"]["draws"] == 10
    told = patchlab("find", *WHERE, "--edges", 40, "--stability", 10, "--out", tmp_path / "s.json", "--force").stdout
    assert "Stability: Jaccard" in told
    core = printed("find", *WHERE, "--edges", 40, "--stability", 10, "--consistent", 0.9, "--out", tmp_path / "c.json")
    assert set(core["edges"]) <= set(wanted.table().query("share >= 0.9")["edge"])
    assert core["provenance"]["how"] == "in at least 90% of 10 resamples: top 40 by |effect|"
    assert "above 0 and at most 1; got 2" in error_of("find", *WHERE, "--consistent", 2, "--out", tmp_path / "d.json")


@pytest.mark.slow
def test_every_option_of_find_reaches_the_selection(tmp_path, halves):
    model = halves[0]
    scores = pl.AttributionPatching().run(
        model, pl.load_task("ioi", model, n=5, seed=3, order="BABA"), "edges", direction="denoising", progress=False
    )
    choose = [
        "find",
        *instead(WHERE, ["--n", 5]),
        "--seed",
        3,
        "--option",
        "order=BABA",
        "--all",
        "--method",
        "atp",
        "--direction",
        "denoising",
        "--batch-size",
        2,
    ]
    for number, (options, wanted) in enumerate(
        [
            (["--edges", 20, "--how", "greedy"], pl.circuits.greedy(scores, 20)),
            (["--edges", 20, "--by", "signed"], pl.circuits.top_n(scores, 20, by="signed")),
            (["--threshold", 0.5], pl.circuits.threshold(scores, 0.5)),
        ]
    ):
        record = printed(*choose, *options, "--out", tmp_path / f"{number}.pt")
        assert record["edges"] == wanted.edge_names
        assert read(tmp_path / f"{number}.pt").edge_names == wanted.edge_names


def test_a_circuit_without_edges_is_an_error_and_not_written(tmp_path):
    result = patchlab("find", *WHERE, "--edges", 1, "--how", "top_n", "--out", tmp_path / "c.json")
    assert result.exit_code == 1
    assert "nothing is left of the circuit: of the edges that were chosen (top 1 by |effect|) none is on a path" in result.stderr
    assert not (tmp_path / "c.json").exists()


def test_find_prints_a_summary_and_does_not_overwrite_unasked(found, tmp_path):
    path = tmp_path / "c.json"
    result = patchlab("find", *WHERE, "--edges", 10, "--out", path)
    assert result.exit_code == 0, result.output
    scored, _, rest = result.stdout.partition("\n")
    assert scored.startswith(
        "ScoreMap(relp, noising, logit_diff, demo-gpt2-4l × ioi[6]) edges[writer 21, reader 53]; edges add up to node scores within "
    )
    assert rest == f"{read(path).summary().replace(', c.json', '')}\nwrote {path}\n"
    before = path.read_bytes()
    assert "exists and is not overwritten" in error_of("find", *WHERE, "--edges", 20, "--out", path)
    assert path.read_bytes() == before
    assert printed("find", *WHERE, "--edges", 20, "--out", path, "--force")["n_edges"] > 0
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--how", "greedily"], "unknown way to choose edges 'greedily'; did you mean 'greedy'"),
        (["--by", "abss"], "unknown importance 'abss'; did you mean 'abs'"),
        (["--out", "c.txt"], "unknown kind of circuit file '.txt'"),
        (["--method", "realp"], "unknown method 'realp'; did you mean 'relp'"),
        (["--model", "demo-gtp2"], "unknown model 'demo-gtp2'"),
        (["--task", "iio"], "unknown task 'iio'"),
        (["--direction", "noisy"], "unknown direction 'noisy'"),
        (["--edges", "0"], "at least 1; got 0"),
        (["--edges", "480"], "480 edges were asked for"),
        (["--threshold", "-1"], "got -1.0"),
        (["--method", "relp-ah", "--edges", "400"], "Not scored: edges into q"),
        (["--n", "1"], "a part would be empty"),
        (["--option", "seed=3"], "seed is not an option of a task but a setting of its own (--seed)"),
    ],
)
def test_find_refuses_wrong_names_and_numbers_in_one_line(change, message, tmp_path):
    assert message in error_of("find", *instead([*WHERE, "--out", tmp_path / "c.json"], change))
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_exit_with_2(tmp_path):
    for arguments, message in (
        (["find", *WHERE, "--out", tmp_path / "c.json", "--edges", 3, "--threshold", 1], "not both"),
        (["find", *WHERE], "--out"),
        (["evaluate", *WHERE], "give circuit files, or --curve"),
        (["evaluate", "c.json", *WHERE, "--curve", tmp_path / "o"], "give circuit files, or --curve"),
        (["evaluate", *WHERE, "--curve", tmp_path / "o", "--all"], "leave --all out"),
        (["evaluate", *WHERE, "--curve", tmp_path / "o", "--sizes", "10,many"], "'10,many' is not a list of whole numbers"),
        (["paint"], "paint"),
    ):
        result = patchlab(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


# evaluate


def test_evaluate_runs_the_circuit_on_the_other_half(found, halves):
    path, _ = found
    model, first, second = halves
    wanted = pl.circuits.evaluate(model, {"c": read(path)}, second, ablation="mean", train=first, progress=False)
    record = printed("evaluate", path, *WHERE, "--ablation", "mean")
    assert record["table"][0]["circuit"] == "c"
    assert record["table"][0]["faithfulness"] == pytest.approx(wanted.faithfulness(), abs=1e-5)
    assert record["provenance"]["ablation"] == "mean"
    assert record["provenance"]["ablation_examples"] == "ioi[6]"
    assert record["provenance"]["selection"] == {"c": "disjoint"}
    text = patchlab("evaluate", path, *WHERE, "--ablation", "mean")
    assert text.stdout == f"{wanted!r}\n"


@pytest.mark.slow
def test_evaluate_prints_what_each_node_adds(found, tmp_path):
    path, _ = found
    other = tmp_path / "other.json"
    write(Circuit.of(read(path).graph, ["input->m0", "m0->logits"]), other)
    record = printed("evaluate", path, other, *WHERE, "--minimality", "node")
    assert [row["circuit"] for row in record["table"]] == ["c", "other"]
    parts = {row["part"] for row in record["minimality"] if row["circuit"] == "other"}
    assert parts == {"m0"}
    text = patchlab("evaluate", other, *WHERE, "--minimality", "edge").stdout
    assert "input->m0" in text
    assert "minimality" in text


@pytest.mark.slow
def test_evaluate_refuses_what_does_not_fit(found, tmp_path):
    path, _ = found
    assert "comes from 6 of the 12 examples" in error_of("evaluate", path, *WHERE, "--all")
    assert "belongs to" in error_of("evaluate", path, *instead(WHERE, ["--model", "demo-gpt2"]))
    assert "unknown ablation 'means'" in error_of("evaluate", path, *WHERE, "--ablation", "means")
    assert "unknown part for minimality 'head'" in error_of("evaluate", path, *WHERE, "--minimality", "head")
    assert "nowhere.json" in error_of("evaluate", tmp_path / "nowhere.json", *WHERE)
    broken = tmp_path / "c.json"
    broken.write_text("{")
    assert str(broken) in error_of("evaluate", broken, *WHERE)
    broken.write_bytes(path.read_bytes())
    assert "two of them have one name" in error_of("evaluate", path, broken, *WHERE)


# evaluate --curve


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    out = tmp_path_factory.mktemp("curve") / "out"
    arguments = [
        "evaluate",
        *WHERE,
        "--curve",
        out,
        "--methods",
        "atp, relp",
        "--sizes",
        "5,40,479",
        "--random",
        2,
        "--ablation",
        "zero",
        "--stability",
        8,
    ]
    return out, printed(*arguments), arguments


def test_curve_writes_tables_figure_and_the_smallest_circuits(curve):
    out, record, _ = curve
    names = {path.name for path in out.iterdir()}
    assert {"faithfulness.csv", "areas.csv", "curve.json", "faithfulness.html", "run.json"} <= names
    assert set(record["files"]) == names
    assert record["out"] == str(out)
    table = pd.read_csv(out / "faithfulness.csv")
    assert list(dict.fromkeys(table["method"])) == ["atp", "relp", "random"]
    assert [row["faithfulness"] for row in record["table"]] == pytest.approx(table["faithfulness"].tolist())
    assert set(table["n_requested"]) == {5, 40, 479}
    loaded = FaithfulnessCurve.load(out / "sizes.json")
    assert loaded.to_dataframe()["n_requested"].tolist() == pd.read_csv(out / "sizes.csv")["n_requested"].tolist()
    smallest = pd.read_csv(out / "smallest.csv").set_index("method")
    for name in ("atp", "relp"):
        best = record["smallest"][name]
        assert best["found_faithfulness"] >= 0.9
        assert best["n_edges"] == loaded.smallest(name)["n_edges"] == read(out / f"circuit.{name}.json").n_edges
        assert best["n_edges_lo"] <= best["n_edges"] <= best["n_edges_hi"]
        assert smallest.loc[name, "n_edges"] == best["n_edges"]
        assert smallest.loc[name, ["choosing_pairs", "finding_pairs", "reporting_pairs"]].tolist() == [6, 3, 3]
    assert record["provenance"]["ablation"] == "zero"
    assert record["provenance"]["selection"] == {"atp": "disjoint", "relp": "disjoint"}
    assert record["provenance"]["random_draws"] == 2
    assert "stability.html" in names
    assert table.query("method != 'random' and n_requested == 479")["jaccard"].tolist() == [1.0, 1.0], "nothing is chosen of all edges"
    for name in ("atp", "relp"):
        assert read(out / f"circuit.{name}.json").provenance["stability"]["jaccard"] == pytest.approx(smallest.loc[name, "jaccard"])


def test_curve_chooses_finds_and_reports_on_three_sets_of_pairs(curve, halves):
    out, record, _ = curve
    model, first, second = halves
    sets = pl.circuits.three_sets(pl.load_task("ioi", model, n=12))
    assert json.loads((out / "run.json").read_text())["sets"] == record["sets"] == sets.as_dict()
    parts = [set(record["sets"][name]["pairs"]) for name in ("choosing", "finding", "reporting")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    assert parts[0] == set(first.pair_fingerprints)
    assert record["provenance"]["task_pairs"] == list(second.pair_fingerprints), "areas choose nothing, and take both other sets"
    assert FaithfulnessCurve.load(out / "sizes.json").provenance["task_pairs"] == list(sets.finding.pair_fingerprints)
    scores = pl.RelevancePatching().run(model, first, "edges", direction="noising", progress=False)
    wanted = pl.circuits.smallest_faithful(model, scores, sets.finding, sets.reporting, ablation="zero", progress=False).table.iloc[0]
    for name in ("n_edges", "n_edges_lo", "n_edges_hi", "faithfulness", "lo", "hi"):
        assert record["smallest"]["relp"][name] == pytest.approx(wanted[name], abs=1e-4)


@pytest.mark.slow
def test_curve_does_not_replace_results_unasked(curve):
    out, _, arguments = curve
    before = (out / "run.json").stat().st_mtime_ns
    assert "already holds results" in error_of(*arguments)
    assert (out / "run.json").stat().st_mtime_ns == before
    result = patchlab(*arguments, "--force")
    assert result.exit_code == 0, result.output
    head, pairs, *lines, note = result.stdout.splitlines()
    assert head == "FaithfulnessCurve(demo-gpt2-4l × ioi[6], logit_diff, zero ablation)"
    assert re.fullmatch(
        r"  pairs: 6 for choosing, 3 for finding the size \(of \d+, a tenth apart\), 3 for reporting; CPR and CMD on the last two together", pairs
    )
    for name in ("atp", "relp"):
        areas, smallest, stable, *lines = lines
        assert re.fullmatch(rf"  {name}: CPR .* \[.*\], CMD .* \[.*\]", areas)
        assert re.fullmatch(r" +f ≥ 0.9 from \d+ edges on \(95 % interval \d+ to \d+\); f = .* there on the reporting pairs", smallest)
        assert re.fullmatch(r" +Jaccard .* between resamples \(.*8 resamples of 6 prompts; the bar of \.8 asks for 100\)", stable)
    assert [line.split(":")[0] for line in lines] == ["  random"]
    assert note.startswith("  CPR and CMD are over the sizes that were given, so they are not MIB's; CPR has no upper bound")
    assert "demo-gpt2-4l, ioi: 6 pairs for choosing, 3 for finding the size, 3 for reporting" in result.stderr
    assert re.search(r"next, to find the smallest faithful ones: \d+ circuits on 3 pairs, about \d+ s", result.stderr)
    assert f"done: open {out / 'faithfulness.html'}" in result.stderr


@pytest.mark.slow
def test_curve_errors_leave_nothing_behind(tmp_path):
    arguments = ["evaluate", *WHERE, "--curve", tmp_path / "o"]
    assert "unknown method 'realp'" in error_of(*arguments, "--methods", "realp")
    assert "unknown way to choose edges 'gredy'" in error_of(*arguments, "--methods", "atp", "--how", "gredy")
    assert "numbers of edges from 0 to 479" in error_of(*arguments, "--methods", "atp", "--sizes", "10,480")
    assert "unknown ablation 'means'" in error_of(*arguments, "--methods", "atp", "--ablation", "means")
    assert re.search(
        r"relp-ah scores \d+ of the 479 edges \(none into q and k\), and circuits of 400",
        error_of(*arguments, "--methods", "atp,relp-ah", "--sizes", "10,400"),
    )
    assert "cannot cut ioi with 7 pairs, 7 of them distinct, into three sets" in error_of(*instead(arguments, ["--n", 7]), "--methods", "atp")
    assert list(tmp_path.iterdir()) == []


def test_a_curve_without_a_browser_has_no_png_and_says_why(curve, tmp_path, monkeypatch):
    from patchlab import report

    def broken(*_):
        raise RuntimeError("no browser")

    monkeypatch.setattr("patchlab.plots._save._image", broken)
    said: list[str] = []
    run = report.write_curve(tmp_path, FaithfulnessCurve.load(curve[0] / "curve.json"), say=said.append)
    assert len(said) == 1
    assert "no browser" in said[0]
    assert "faithfulness.png" not in run["files"]
    assert "faithfulness.html" in run["files"]


# plot and convert


def test_plot_writes_html_and_dot(found, tmp_path):
    path, record = found
    for name, options in (("c.html", ["--edges", 10]), ("m.html", ["--matrix"])):
        assert printed("plot", path, "--out", tmp_path / name, *options) == {"out": str(tmp_path / name), "n_edges": record["n_edges"]}
    graph, matrix = ((tmp_path / name).read_text() for name in ("c.html", "m.html"))
    assert f"10 of {record['n_edges']} edges" in graph
    assert "q, k and v of a head" in matrix
    assert patchlab("plot", path, "--out", tmp_path / "c.dot").stdout == f"wrote {tmp_path / 'c.dot'}\n"
    assert (tmp_path / "c.dot").read_text() == pl.circuits.to_dot(read(path)) + "\n"
    for name in ("c.dot", "c.html"):
        assert "exists and is not overwritten" in error_of("plot", path, "--out", tmp_path / name)
        assert patchlab("plot", path, "--out", tmp_path / name, "--force").exit_code == 0
    assert "cannot tell the format of 'c.gif'" in error_of("plot", path, "--out", tmp_path / "c.gif")
    assert "draw at least 1 edge" in error_of("plot", path, "--out", tmp_path / "d.html", "--edges", 0)


def test_plot_without_a_browser_writes_html_and_warns(found, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no browser")

    monkeypatch.setattr("patchlab.plots._save._image", broken)
    result = patchlab("plot", found[0], "--out", tmp_path / "c.png", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["out"] == str(tmp_path / "c.html")
    assert "no browser" in result.stderr


def test_convert_between_json_and_pt_and_folders(found, tmp_path):
    path, _ = found
    assert printed("convert", path, tmp_path / "c.pt") == {"files": [str(tmp_path / "c.pt")]}
    assert patchlab("convert", tmp_path / "c.pt", tmp_path / "back.json").stdout == f"wrote {tmp_path / 'back.json'}\n"
    assert read(tmp_path / "back.json").equals(read(path))
    assert "exists and is not overwritten" in error_of("convert", path, tmp_path / "c.pt")
    assert patchlab("convert", path, tmp_path / "c.pt", "--force").exit_code == 0
    folder = tmp_path / "sub" / "ioi_demo"
    folder.mkdir(parents=True)
    (folder / "c.json").write_bytes(path.read_bytes())
    assert printed("convert", tmp_path / "sub", tmp_path / "new") == {"files": [str(tmp_path / "new" / "ioi_demo" / "c.pt")]}
    assert "nowhere" in error_of("convert", tmp_path / "nowhere.json", tmp_path / "d.pt")
    assert "unknown kind of circuit file '.npz'" in error_of("convert", path, tmp_path / "d.npz")


def test_help_names_the_commands():
    assert {"find", "evaluate", "plot", "convert"} <= set(patchlab("--help").stdout.split())


def test_nodes_are_found_evaluated_and_drawn(tmp_path):
    file = tmp_path / "nodes.json"
    record = printed("find", *WHERE, "--sites", "z,mlp_post", "--edges", 30, "--out", file)
    assert record["n_nodes"] == 30 == len(record["nodes"])
    assert tuple(record["nodes"]) == read(file).nodes
    about = printed("evaluate", *WHERE, file)
    assert about["table"][0]["n_nodes"] == 30
    assert about["provenance"]["ablation"] == "mean_positional"
    assert printed("plot", file, "--out", tmp_path / "nodes.html")["n_nodes"] == 30
    assert "it is a circuit of nodes" in error_of("convert", file, tmp_path / "nodes.pt")


# edges between nodes


def test_edges_between_nodes_are_found_evaluated_and_drawn(halves, tmp_path):
    model, first, second = halves
    path = tmp_path / "neurons.json"
    options = ["--sites", "mlp_post", "--nodes", 30, "--edges", 20]
    record = printed("find", *WHERE, *options, "--out", path)
    nodes = pl.circuits.top_n(pl.RelevancePatching().run(model, first, "mlp_post", direction="noising", progress=False), 30)
    expected = pl.circuits.top_n(pl.circuits.node_edges(model, first, nodes, "relp", direction="noising", progress=False), 20)
    assert record["edges"] == list(expected.edges)
    assert record["n_edges"] == read(path).n_edges == expected.n_edges > 1
    table = printed("evaluate", *WHERE, path)["table"]
    again = pl.circuits.evaluate(model, expected, second, progress=False)
    assert table[0]["faithfulness"] == pytest.approx(again.faithfulness(), abs=1e-5)
    assert printed("plot", path, "--out", tmp_path / "edges.html")["n_edges"] == expected.n_edges
    level = float(np.sort(np.abs(expected.scores))[-1])
    assert printed("find", *WHERE, "--sites", "mlp_post", "--nodes", 30, "--threshold", level * 0.999, "--out", tmp_path / "one.json")["n_edges"] <= 1


def test_nodes_and_dictionaries_are_for_sites_that_have_them(tmp_path):
    result = patchlab("find", *WHERE, "--nodes", 30, "--out", tmp_path / "a.json")
    assert result.exit_code == 2
    assert "edges between nodes need --sites" in " ".join(result.output.replace("│", "").split())
    result = patchlab("find", *WHERE, "--sites", "z", "--dictionaries", "demo-gpt2", "--out", tmp_path / "a.json")
    assert result.exit_code == 2
    assert "no features or errors are asked for" in " ".join(result.output.replace("│", "").split())
    assert "demo-gpt2-4l" in error_of("find", *WHERE, "--sites", "features", "--nodes", 5, "--out", tmp_path / "a.json"), "it has none packaged"
