"""The command line and the folder it leaves: what is in it, what is refused, and how errors read."""

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
from command_lines import instead
from html_page import parsed
from paths import ROOT
from typer.testing import CliRunner

from patchlab import cli
from patchlab.cli.options import as_options, task_options
from patchlab.comparison import job as jobs
from patchlab.comparison.job import scores_file
from patchlab.errors import PatchlabError, TaskError
from patchlab.methods.method import Method
from patchlab.report.files import command
from patchlab.scores import ScoreMap

ARGUMENTS = [
    "compare",
    "--model",
    "demo-gpt2-4l",
    "--task",
    "ioi",
    "--methods",
    "relp+ig:2,atp,exact",
    "--sites",
    "resid_pre,attn_out[layer]",
    "--n",
    "6",
]


def patchlab(*arguments: str):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="patchlab")


def error_of(*arguments: str) -> str:
    """The one line that a command fails with."""
    result = patchlab(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def compared(out):
    """One real comparison: its folder, what it printed, and the JSON object on stdout."""
    result = patchlab(*ARGUMENTS, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    return out, result, json.loads(result.stdout)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Without images, which take seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("patchlab.report.files.write_images", lambda *_: "")
        return compared(tmp_path_factory.mktemp("cli") / "deep" / "out")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """With images."""
    return compared(tmp_path_factory.mktemp("drawn") / "out")


@pytest.mark.slow
def test_folder_holds_scores_tables_plots_page_and_a_list_of_them(drawn):
    out, _, printed = drawn
    names = {path.name for path in out.iterdir()}
    wanted = {
        "scores.exact.nc",
        "scores.atp.nc",
        "scores.relp-ig-2.nc",
        "comparison.csv",
        "comparison.json",
        "differences.csv",
        "index.html",
        "run.json",
        "plotly.min.js",
    }
    wanted |= {f"{name}.html" for name in ("heatmaps", "agreement", "comparison", "differences")}
    assert wanted <= names
    run = json.loads((out / "run.json").read_text())
    assert set(run["files"]) == names
    assert run["job"]["methods"] == ["exact", "relp+ig:2", "atp"], "the reference comes first"
    assert {"load model", "load task", "exact", "atp", "compare"} <= set(run["seconds"])
    assert run["versions"]["patchlab"] == run["patchlab"]
    assert printed == {"out": str(out), **run, "comparison": json.loads((out / "comparison.json").read_text())}


def test_saved_scores_are_the_ones_compared(done):
    out, _, _ = done
    exact, atp = (ScoreMap.load(out / scores_file(name)) for name in ("exact", "atp"))
    assert exact.sites == ("resid_pre", "attn_out[layer]")
    assert exact.data.sizes["example"] == 6
    table = pd.read_csv(out / "comparison.csv").query("method == 'atp' and cells == 'all'").set_index("site")
    for site in exact.sites:
        a, b = (pd.Series(scores.mean(site).to_numpy().ravel()) for scores in (exact, atp))
        assert table.loc[site, "pearson"] == pytest.approx(a.corr(b), abs=1e-6)
        rows = [[pd.Series(scores.data[site].to_numpy()[e].ravel()) for scores in (exact, atp)] for e in range(6)]
        assert table.loc[site, "pearson_per_prompt"] == pytest.approx(np.mean([x.corr(y) for x, y in rows]), abs=1e-6)
        assert table.loc[site, "pearson_pooled"] == pytest.approx(pd.concat([x for x, _ in rows]).corr(pd.concat([y for _, y in rows])), abs=1e-6)


def test_differences_between_methods_are_in_every_file(done):
    out, _, printed = done
    rows = json.loads((out / "comparison.json").read_text())["differences"]
    assert rows == printed["comparison"]["differences"]
    assert {(row["method"], row["other"]) for row in rows} == {("atp", "relp+ig:2")}
    table = pd.read_csv(out / "comparison.csv").set_index(["method", "site", "cells"])
    csv = pd.read_csv(out / "differences.csv").to_dict("records")
    for row, same in zip(rows, csv, strict=True):
        for name in ("pearson", "pearson_per_prompt", "pearson_pooled"):
            first, second = (table.loc[(row[which], row["site"], row["cells"]), name] for which in ("method", "other"))
            assert row[name] == pytest.approx(first - second)
            assert row[f"{name}_lo"] <= row[f"{name}_hi"]
            assert same[name] == pytest.approx(row[name])


def test_progress_goes_to_stderr_and_says_where_to_look(done):
    out, result, _ = done
    assert len(result.stdout.splitlines()) == 1
    assert re.search(r"^demo-gpt2-4l: .*accuracy", result.stderr, re.M)
    assert f"done: open {out / 'index.html'}" in result.stderr


def test_page_needs_no_network_and_its_links_lead_somewhere(done):
    out, _, _ = done
    page = parsed(out / "index.html")
    assert len(page.ids) == len(set(page.ids)), "a figure and a section with one id land in one place"
    assert "plotly.min.js" in page.references
    for reference in page.references:
        assert reference.removeprefix("#") in page.ids if reference.startswith("#") else (out / reference).is_file(), reference
    assert {"figure-comparison", "figure-agreement", "figure-heatmaps", "figure-differences"} <= set(page.ids)
    markup = re.sub(r"<script.*?</script>", "", (out / "index.html").read_text(), flags=re.S)
    assert "http" not in markup


def test_page_shows_the_numbers_of_the_comparison(done):
    out, _, printed = done
    text = " ".join(parsed(out / "index.html").text)
    for row in printed["comparison"]["table"]:
        for part in ("site", "method"):
            assert row[part] in text
        for name in ("pearson", "pearson_per_prompt", "pearson_pooled"):
            assert f"{row[name]:.2f}".replace("-", "−") in text
        assert "quartiles " + " ".join(f"{row[f'pearson_per_prompt_{q}']:.2f}".replace("-", "−") for q in ("q25", "q50", "q75")) in text
    for row in printed["comparison"]["differences"]:
        assert f"{row['pearson_pooled_lo']:+.2f} to {row['pearson_pooled_hi']:+.2f}".replace("-", "−") in text
    assert len(printed["comparison"]["verified_recall"]) == 4
    for row in printed["comparison"]["verified_recall"]:
        assert f"{row['cells_100']} ({row['share_100']:.0%})" in text
    assert printed["task"]["fingerprint"] in text
    assert printed["command"] in text


@pytest.mark.slow
def test_images_are_written_where_a_browser_is(drawn, browser):
    out, result, _ = drawn
    assert "no PNG files" not in result.stderr
    for name in ("heatmaps", "agreement", "comparison", "differences"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_repeating_the_recorded_command_is_the_same_job(done):
    _, _, printed = done
    words = shlex.split(printed["command"])
    assert words[:2] == ["patchlab", "compare"]
    assert words[words.index("--sites") + 1] == "resid_pre,attn_out[layer]"
    job = jobs.Job("m", "t", ("exact", "atp"), ("z",), n=3, batch_size=2, options={"order": "BABA", "bos": True, "names": "a b"})
    assert command(job).endswith("""--n 3 --seed 0 --batch-size 2 --option order=BABA --option bos=true --option 'names=a b'""")
    given = task_options(["order=BABA", "bos=true", "names=a b", "bos=true"])
    assert given == job.options


def test_existing_results_stay_without_force_and_nothing_is_computed(done, monkeypatch):
    out, _, _ = done
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(jobs, "run", lambda *_, **__: pytest.fail("computed before the folder was checked"))
    assert re.search(r"already holds results; choose another folder with --out, or .*--force", error_of(*ARGUMENTS, "--out", out))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.fixture
def captured(monkeypatch):
    """Jobs as the commands make them; running one ends there."""
    made = []

    def run(job, **_):
        made.append(job)
        raise PatchlabError("stop\nhere")

    monkeypatch.setattr(jobs, "run", run)
    return made


def test_demo_begins_with_ioi_on_the_first_packaged_model(captured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of("demo") == "error: stop here", "a message of two lines becomes one"
    assert captured == [jobs.Job("demo-gpt2", "ioi", ("exact", "atp", "ig:5", "relp"), ("resid_pre", "attn_out", "mlp_out", "z"), n=32)]
    assert list(tmp_path.iterdir()) == []


def test_every_option_reaches_the_job(captured, tmp_path):
    options = {"model": "m", "task": "t", "methods": "exact, relp", "sites": "attn_out[layer],q", "direction": "noising", "n": 5, "seed": 3}
    options |= {"device": "cpu", "batch-size": 2, "out": tmp_path / "o"}
    error_of(
        "compare",
        *(word for name, value in options.items() for word in (f"--{name}", value)),
        "--option",
        "order=BABA",
        "--option",
        "only_correct=true",
    )
    given = {"order": "BABA", "only_correct": True}
    wanted = jobs.Job("m", "t", ("exact", "relp"), ("attn_out[layer]", "q"), "noising", 5, 3, "cpu", batch_size=2, options=given)
    assert captured == [wanted]


def test_settings_of_the_task_and_the_model_have_options_of_their_own(captured, tmp_path):
    more = ["--metric", "prob_diff", "--positions", "S2,END", "--on-mismatch", "drop", "--only-correct", "--chat", "--dtype", "bfloat16"]
    error_of(*ARGUMENTS, *more, "--out", tmp_path / "o")
    (job,) = captured
    assert job.dtype == "bfloat16"
    assert job.options == {"metric": "prob_diff", "positions": "S2,END", "on_mismatch": "drop", "only_correct": True, "chat": True}
    assert "--dtype bfloat16" in command(job)


def test_named_positions_are_scored_alone(demo_gpt2_4l):
    task = jobs.named_task("ioi", demo_gpt2_4l, n=2, options={"positions": "S2, END"})
    assert task.position_axis().names == ("S2", "END")
    with pytest.raises(TaskError, match="unknown position of all pairs 'S3'"):
        jobs.named_task("ioi", demo_gpt2_4l, n=2, options={"positions": "S3"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n", "7"], "given twice, as '6' and as '7'"),
        (["--task=facts"], "given twice, as 'ioi' and as 'facts'"),
        (["--option", "order=ABBA", "--option", "order=BABA"], "order is given twice, as 'ABBA' and as 'BABA'"),
        (["--metric", "prob_diff", "--option", "metric=logit_diff"], "metric is given twice, as 'logit_diff' and as 'prob_diff'"),
    ],
)
def test_an_option_with_two_values_is_refused(more, message, captured, tmp_path):
    result = patchlab(*ARGUMENTS, *more, "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert captured == []


def test_an_option_given_twice_alike_is_harmless(captured, tmp_path):
    error_of(*ARGUMENTS, "--n", "6", "--option", "order=ABBA", "--option", "order=ABBA", "--out", tmp_path / "o")
    assert captured[0].n == 6


@pytest.mark.parametrize("arguments", [["-h"], ["compare", "-h"], ["circuit", "-h"], ["circuit", "find", "-h"]])
def test_h_is_help(arguments):
    result = patchlab(*arguments)
    assert result.exit_code == 0
    assert "Usage: patchlab" in result.stdout


def test_the_options_of_a_task(demo_gpt2_4l):
    text = patchlab("tasks", "ioi").stdout
    assert "--option order=ABBA  (or BABA, mixed)" in text
    assert text.startswith("Indirect object")
    about = json.loads(patchlab("tasks", "ioi", "--json").stdout)
    assert about["options"] == {"order": "ABBA", "corruption": "s2_io", "template": "plain"}
    assert "unknown task 'iio'; did you mean 'ioi'" in error_of("tasks", "iio")


@pytest.mark.parametrize(
    ("message", "worded"),
    [
        ('drop the pair with on_mismatch="drop".', "drop the pair with --on-mismatch drop."),
        ("only pairs that the model solves (only_correct=True).", "only pairs that the model solves (--only-correct)."),
        ("Use device='cpu'.", "Use --device cpu."),
        ("got n=5 with only_correct.", "got --n 5 with only_correct."),
        ("write L0.z, and x=3 stays", "write L0.z, and x=3 stays"),
        ("pass overwrite=True.", "pass --force."),
    ],
)
def test_errors_speak_of_options(message, worded):
    assert as_options(message) == worded


def test_pairs_of_unequal_length_name_the_option(tmp_path):
    row = {
        "clean": "When Mary and John went to the store, John gave a drink to",
        "corrupted": "When Mary and John",
        "correct": "Mary",
        "incorrect": "John",
    }
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    message = error_of(*ARGUMENTS[:4], tmp_path / "mine.jsonl", "--out", tmp_path / "o")
    assert "or drop the pair with --on-mismatch drop." in message
    assert "=" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "demo-gtp2"], "unknown model 'demo-gtp2'; did you mean 'demo-gpt2'"),
        (["--task", "iio"], "unknown task 'iio'; did you mean 'ioi'"),
        (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--methods", "exact,realp"], "unknown method 'realp'; did you mean 'relp'"),
        (["--methods", "atp,relp"], "a comparison needs exact patching (the reference) and at least one other method; got atp, relp"),
        (["--methods", "exact"], "a comparison needs exact patching (the reference) and at least one other method; got exact"),
        (["--methods", "exact,atp,atp"], "the method atp is named twice"),
        (["--sites", "resid_pst"], "unknown site 'resid_pst'; did you mean"),
        (["--sites", "L3.z"], "L3.z is an address"),
        (["--direction", "noisy"], "unknown direction 'noisy'; did you mean 'noising'"),
        (["--n", "0"], "n is 0; a task needs at least 1 pair"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--option", "n=3"], "n is not an option of a task but a setting of its own (--n)"),
        (["--option", "oder=BABA"], "unknown option of the task ioi 'oder'; did you mean 'order'"),
    ],
)
def test_wrong_names_and_numbers_are_one_line_that_helps(change, message, tmp_path):
    assert message in error_of(*instead(ARGUMENTS, change), "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_place_that_cannot_be_written_to_is_found_out_before_computing(captured, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in error_of(*ARGUMENTS, "--out", tmp_path / "file")
    assert "cannot write to" in error_of(*ARGUMENTS, "--out", tmp_path / "file" / "out")
    assert captured == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--task", "ioi", "--out", "x"], "--model"),
        ([*ARGUMENTS], "--out"),
        ([*ARGUMENTS, "--out", "x", "--option", "order"], "'order' is not of the form key=value"),
        ([*ARGUMENTS, "--out", "x", "--n", "many"], "--n"),
        (["paint"], "paint"),
    ],
)
def test_usage_errors_exit_with_2(arguments, message):
    result = patchlab(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


VERIFY = ["verify", "--model", "demo-gpt2-4l", "--task", "ioi", "--sites", "z,attn_out", "--n", "4", "--k", "3", "--sample", "6", "--device", "cpu"]


@pytest.mark.slow
def test_verify_prints_the_verified_cells_and_the_bounds():
    import patchlab as pl

    model = pl.load_model("demo-gpt2-4l", device="cpu")
    method = pl.VerifiedPatching(screen=pl.AttributionPatching(), k=3, sample=6, subsets=8, seed=1)
    wanted = method.run(model, pl.load_task("ioi", model, n=4, seed=1), ["z", "attn_out"], direction="noising", progress=False)
    arguments = [*VERIFY, "--screen", "atp", "--subsets", "8", "--seed", "1", "--direction", "noising", "--batch-size", "4"]
    text, as_json = patchlab(*arguments), patchlab(*arguments, "--json")
    assert text.exit_code == as_json.exit_code == 0, text.output
    assert text.stdout == f"{wanted.summary()}\n"
    assert text.stderr == f"{wanted.price}\n"
    assert "With 95 % confidence at least" in text.stdout
    assert "With 95 % confidence at most" in text.stdout
    assert "If the effects of cells add up" in text.stdout
    assert len(as_json.stdout.splitlines()) == 1
    printed, expected = json.loads(as_json.stdout), json.loads(json.dumps(wanted.to_dict()))
    assert printed["provenance"].pop("method_options") == expected["provenance"].pop("method_options")
    assert printed == expected
    assert {row["found"] for row in printed["table"]} <= {"screen", "sample"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--k", "0"], "k is 0; ask for at least 1 cell"),
        (["--target", "-1"], "target is -1.0; give a share of the gap above 0"),
        (["--recall", "85"], "recall is 85.0; give a share above 0 and at most 1"),
        (["--population", "--n", "1"], "one prompt pair says nothing about other prompts"),
        (["--confidence", "95"], "confidence is 95.0; it must be between 0 and 1"),
        (["--subsets", "3"], "subsets is 3; give 0 for none, or at least 8"),
        (["--screen", "exact"], "the screen is exact patching itself"),
        (["--screen", "realp"], "unknown method 'realp'; did you mean 'relp'"),
        (["--sites", "zz"], "unknown site 'zz'"),
        (["--model", "demo-gtp2"], "unknown model 'demo-gtp2'"),
        (["--task", "iio"], "unknown task 'iio'"),
        (["--direction", "noisy"], "unknown direction 'noisy'"),
        (["--option", "seed=3"], "seed is not an option of a task but a setting of its own (--seed)"),
    ],
)
def test_verify_refuses_wrong_names_and_numbers_in_one_line(change, message):
    assert message in error_of(*instead(VERIFY, change))


def test_verify_says_that_it_ran_the_sweep_and_ranks_every_cell():
    result = patchlab(*instead(VERIFY, ["--k", "20", "--sample", "30"]))
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Price: ")
    assert result.stderr.endswith("so the sweep is run.\n")
    # 16 heads; attention outputs from S2 on, 5 positions, in the last layer at END alone
    assert "20 cells were asked for; all 32 live cells were patched, so this is the whole ranking:" in result.stdout
    assert sum(line.lstrip().startswith(("+", "-")) for line in result.stdout.splitlines()) == 16 + 3 * 5 + 1


@pytest.mark.slow
def test_verify_reaches_a_recall_that_is_asked_for_and_speaks_of_other_prompts():
    result = patchlab(*instead(VERIFY[:-2], ["--sample", "100"]), "--recall", "0.3", "--confidence", "0.8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["recall"]["at_least"] >= 1
    assert found["recall"]["reached"]
    assert found["recall"]["confidence"] == 0.8
    assert "With 80 % confidence" in found["price"]["statement"]
    assert "17 of" not in found["price"]["statement"]
    result = patchlab(*VERIFY, "--population")
    assert result.exit_code == 0, result.output
    assert "are about prompts such as these (drawn independently from the same source)" in result.stdout


def test_verify_looks_at_groups_first_if_told_to():
    result = patchlab(*VERIFY, "--hierarchical", "--target", "0.05")
    assert result.exit_code == 0, result.output
    assert "no effects cancel inside a group" in result.stdout
    assert "|effect| >" in result.stdout


@pytest.mark.parametrize(
    ("listing", "name"), [("tasks", "greater_than"), ("models", "demo-llama"), ("methods", "PRESET+ig:N"), ("sites", "mlp_post")]
)
def test_listings_name_and_describe(listing, name):
    text, as_json = patchlab(listing), patchlab(listing, "--json")
    assert text.exit_code == as_json.exit_code == 0
    described = json.loads(as_json.stdout)
    assert len(described[name]) > 10
    assert [line.split(maxsplit=1) for line in text.stdout.splitlines()] == [[key, what] for key, what in described.items()]


@pytest.mark.slow
@pytest.mark.parametrize("width", [44, 80, 200])
@pytest.mark.parametrize("command", [("methods",), ("sites",), ("tasks",), ("tasks", "ioi"), tuple(VERIFY)], ids=" ".join)
def test_what_is_printed_fits_the_terminal(command, width, monkeypatch):
    plain = patchlab(*command)
    monkeypatch.setenv("COLUMNS", str(width))
    result = patchlab(*command)
    assert result.exit_code == 0, result.output
    for text, whole in ((result.stdout, plain.stdout), (result.stderr, plain.stderr)):
        assert text.split() == whole.split(), "nothing is lost"
        longest = max(text.splitlines(), key=len, default="")
        assert len(longest) <= width or len(longest.split()) == 1, longest


def test_version_and_help():
    import patchlab as pl

    assert patchlab("--version").stdout == f"patchlab {pl.__version__}\n"
    assert {"demo", "compare", "verify", "tasks", "models", "methods", "sites"} <= set(patchlab("--help").stdout.split())


@pytest.mark.slow
def test_finished_methods_are_kept_and_the_same_command_goes_on(tmp_path, monkeypatch, no_images):
    arguments = [*instead(ARGUMENTS, ["--methods", "exact,atp,relp"]), "--out", tmp_path / "out"]
    run, ran = Method.run, []

    def stopped(self, *args, **settings):
        ran.append(self.name)
        if self.name == "relp" and len(ran) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **settings)

    monkeypatch.setattr("patchlab.methods.method.Method.run", stopped)
    result = patchlab(*arguments)
    assert result.exit_code != 0
    kept = tmp_path / "out" / ".patchlab-unfinished"
    assert f"what is finished is kept in {kept}: scores.atp.nc, scores.exact.nc. The same command goes on from there." in result.stderr
    assert ScoreMap.load(kept / "scores.exact.nc").sites == ("resid_pre", "attn_out[layer]")
    assert "holds what another command has finished" in error_of(*instead(arguments, ["--n", "5"]))
    again = patchlab(*arguments)
    assert again.exit_code == 0, again.output
    assert ran == ["exact", "atp", "relp", "relp"]
    assert "exact: finished before" in again.stderr
    assert not list((tmp_path / "out").glob(".patchlab-*"))
    fresh = patchlab(*instead(arguments, ["--out", tmp_path / "fresh"]))
    assert fresh.exit_code == 0
    for name in ("comparison.csv", "comparison.json"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("out", "fresh")]
        assert len(set(texts)) == 1 or name.endswith("json")  # costs are of the runs themselves


@pytest.mark.slow
@pytest.mark.usefixtures("no_images")
def test_compare_of_edges(tmp_path):
    arguments = ["--model", "demo-gpt2-4l", "--task", "ioi", "--n", "4", "--methods", "atp,exact", "--sites", "edges"]
    result = patchlab("compare", *arguments, "--direction", "noising", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "edges" in result.stdout
    assert "Paired differences" not in result.stdout, "there is one method"
    assert not (tmp_path / "out" / "differences.csv").exists()
    assert {"heatmaps.html", "agreement.html", "scores.atp.nc"} <= {path.name for path in (tmp_path / "out").iterdir()}


def documented_commands() -> list[list[str]]:
    """The patchlab commands of the shell blocks on the page about the command line, in order."""
    text = (ROOT / "docs" / "command-line.md").read_text()
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in shell.splitlines() if line.startswith("patchlab ")]


@pytest.mark.slow
@pytest.mark.usefixtures("no_images")
def test_the_commands_of_the_page_work_in_order_in_one_folder(tmp_path, monkeypatch):
    """With fewer pairs than the page has, and the smallest model."""
    monkeypatch.chdir(tmp_path)
    lines = documented_commands()
    assert [words[0] for words in lines] == ["compare", "tasks", *["circuit"] * 6]
    for words in lines:
        fewer = ["--model", "demo-gpt2-4l", "--n", "8"] if "--model" in words else []
        result = patchlab(*instead(words, fewer))
        assert result.exit_code == 0, f"{words}: {result.output}"
    assert {path.name for path in tmp_path.iterdir()} == {"results", "circuit.json", "nodes.json", "core.json", "circuit.html", "curve"}


SWAPPED = {"clean": "John gave a drink to", "corrupted": "Mary gave a drink to", "correct": " John", "incorrect": " Mary"}


@pytest.mark.usefixtures("no_images")
@pytest.mark.parametrize(
    "command",
    [["compare", "--methods", "exact,atp", "--sites", "z", "--out", "o"], ["verify", "--k", "2"], ["circuit", "find", "--all", "--out", "o.json"]],
)
def test_swapped_answers_warn(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    story = "When Mary and John went to the store, "
    rows = [{**SWAPPED, "clean": story + SWAPPED["clean"], "corrupted": story + SWAPPED["corrupted"]}] * 2
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = patchlab(*command, "--model", "demo-gpt2-4l", "--task", "swapped.jsonl")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"^warning: the gap is negative: logit_diff is -\S+ on the clean and \S+ on the corrupted prompts.*--direction", result.stderr, re.M
    )
