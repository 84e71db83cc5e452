"""The benchmarks run, on models so small that their ratios mean nothing, and print what the performance page needs."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from paths import ROOT


def report_of(script: str, *options: str) -> dict[str, Any]:
    """The last line of a benchmark's output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--tiny", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def page_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_performance_page", ROOT / "scripts" / "pages" / "make_performance_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_exact_sweep() -> None:
    report = report_of("exact_sweep.py")
    assert report["machine"]["threads"] == 1
    rows = {(row["model"], row["workload"], row["map"], row["asked"]): row for row in report["results"]}
    assert len(rows) == len(report["results"]) == 2 * (5 + 5 + 2)
    for row in rows.values():
        assert row["max_difference_of_scale"] < 1e-4
        assert 0 < row["flops"] < row["transformer_lens_flops"]
        assert row["ratio"] > 0
        assert row["goal"] > 0
        assert row["engine"].startswith(row["asked"])
    # 3 layers × 15 positions; only positions from the first difference on are live, and in the last layer all positions feed attention
    swap = rows["gpt2-shape", "S2", "resid_pre", "prefix"]
    assert (swap["cells"], swap["live_cells"]) == (45, 1 + 5 + 5)
    assert {row["idea"] for row in report["ideas"]} >= {"skip structural zeros", "keys and values of the prefix"}
    fewer = [
        row for row in report["ideas"] if row["idea"] in ("skip structural zeros", "keys and values of the prefix", "resume at the patched layer")
    ]
    assert all(row["block_positions"] < row["block_positions_without"] for row in fewer)
    assert {row["what"] for row in report["scaling"]} == {"layers", "width", "length", "pairs"}
    assert [row["precision"] for row in report["precision"]] == ["highest", "high", "medium"]
    assert [(row["model"], row["map"]) for row in report["bf16"]] == [("gpt2-shape", name) for name in ("resid_pre", "mlp_out", "z")]
    assert all(row["max_difference_of_largest_effect"] > 0 for row in report["bf16"])


@pytest.mark.slow
def test_linearized() -> None:
    report = report_of("linearized.py")
    assert len(report["results"]) == 4
    for row in report["results"]:
        assert set(row["ratios"]) == {"atp / plain", "relp / plain", "relp / atp"}
        assert row["max_difference"] < 1e-4
        assert row["positions"] < row["positions_of_plain"]


@pytest.mark.slow
def test_edges() -> None:
    report = report_of("edges.py")
    assert [row["workload"] for row in report["exact"]] == [row["workload"] for row in report["linearised"]] == ["S2", "ABC"]
    for row in report["exact"]:
        assert row["engine"] == "prefix"
        assert row["max_difference_of_scale"] < 1e-4
        assert row["edges"] == sum(stratum["edges"] for stratum in row["strata"]) == 262
        assert row["sampled_edges"] == sum(stratum["sampled"] for stratum in row["strata"])
        assert set(row["ratios"]) == {"plain", "split", "routed", "loop"}
        assert 0 < row["block_positions_per_edge"] < row["block_positions_of_a_forward"]
    for row in report["linearised"]:
        assert set(row["ratios"]) == {"atp / plain", "relp / plain"}
        assert set(row["extra_peak_gb"]) == {"atp", "relp"}


def test_the_page_says_what_was_measured() -> None:
    maker = page_maker()
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(maker.RESULTS.glob("*.json"))}
    assert {"exact_sweep", "linearized"} <= set(reports)
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(reports)


def test_results_are_replaced_row_by_row() -> None:
    old = {"results": [{"model": "a", "ratio": 1}, {"model": "b", "ratio": 2}], "ideas": [], "pairs": 8}
    new = {"results": [{"model": "b", "ratio": 3}], "scaling": [{"what": "width", "value": 1}]}
    found = page_maker().merged(old, new)
    assert found["results"] == [{"model": "a", "ratio": 1}, {"model": "b", "ratio": 3}]
    assert found["scaling"] == new["scaling"]
    assert found["pairs"] == 8


def test_store() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "store.py"), "--runs", "3", "--stored", "2", "--kilobytes", "1", "--json"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["runs"], report["stored"]) == (3, 2)
    assert report["store_ms"] > 0


@pytest.mark.slow
def test_features() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "features.py"), "--tiny", "--json"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["exact"]["max_difference"] < 1e-3
    assert report["cells"] > report["exact"]["cells"] > 0


HELP = """
import contextlib, io, json, os, runpy, sys
said = {}
for script in sys.argv[1:]:
    sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            said[script] = [end.code, out.getvalue()]
print(json.dumps(said))
"""


@pytest.mark.slow
def test_every_benchmark_says_what_it_does() -> None:
    names = ("edges", "exact_sweep", "features", "linearized", "store")
    scripts = [f"benchmarks/{name}.py" for name in names] + ["scripts/kill_store.py", "scripts/pages/make_performance_page.py"]
    command = [sys.executable, "-c", HELP, *(str(ROOT / script) for script in scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == len(scripts)
    for script, (code, text) in said.items():
        assert not code, script
        assert text.startswith("usage: "), script
        assert "--tiny" not in text


@pytest.mark.slow
def test_gpu(tmp_path: Any) -> None:
    """On the CPU: it measures every piece, goes on where it stopped, keeps what it has, and says what failed; the page is made from it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def gpu(*options: str) -> tuple[int, dict[str, Any], str]:
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--repeats", "1", "--out", str(tmp_path / "out"), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
        return done.returncode, json.loads((tmp_path / "out" / "gpu.json").read_text()), done.stdout + done.stderr

    code, found, _ = gpu("--minutes", "0", "--models", "gpt2", "--dtypes", "float32")
    assert (code, found["results"]) == (0, {})
    assert set(found["left_out"]) >= {"agree demo-gpt2 float32", "edges gpt2 float32"}
    code, found, said = gpu("--minutes", "30", "--models", "gemma-2-2b", "--dtypes", "bfloat16")
    assert code == 0, said
    assert not found["left_out"]
    assert {result["piece"] for result in found["results"].values()} == {"agree", "load", "linearised", "edges", "maps", "verified", "exact edges"}
    assert all(found["results"][f"agree {name} float32"]["agrees"] for name in ("demo-gpt2", "demo-llama"))
    page = page_maker().page({"gpu": found})
    assert "gemma-2-2b | bfloat16 | relp |" in page
    assert "Not measured yet: no number on this page comes from a GPU" in page_maker().page({})
    before = (tmp_path / "out" / "gpu.json").read_text()
    code, again, said = gpu("--minutes", "30", "--models", "gemma-2-2b", "--dtypes", "bfloat16")
    assert again["results"] == json.loads(before)["results"]
    assert "linearised gemma" not in said


@pytest.mark.slow
def test_scaling() -> None:
    """Ratios to the base of the same round, and a sweep whose passes are planned: both stand on the page."""
    report = report_of("scaling.py")
    assert {(row["what"], row["value"]) for row in report["growth"]} == {("layers", 3), ("pairs", 2)}
    for row in report["growth"]:
        assert row["range"][0] <= row["ratio"] <= row["range"][1]
    (one,) = report["sweep"]
    assert 0 < one["scores"] < one["work"]
    assert one["backwards"] > 0
    assert report["hours"] == pytest.approx(one["work"] * report["token_flops"] / report["speed"] / 3600)
    page = page_maker().scaling_page(report)
    assert f"Together **{report['hours']:.1f} GPU-hours**" in page
    assert f"| ioi | {one['tokens']} | {one['forwards']:,} | {one['backwards']:,} |" in page
