"""Sweeps: what is done is kept, what is missing is run, and how a run ended is a result."""

import errno
import json
import os

import pytest
import torch
from sweeping import SMALL, runs, same_tables, swept

import patchlab as pl
from patchlab.errors import OutputError, SweepError
from patchlab.methods.linearized import LinearizedPatching
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.store.runs import RunStore
from patchlab.sweeps import driver, kinds, work
from patchlab.sweeps.driver import ATTEMPTS, Board
from patchlab.sweeps.executors.local import Local
from patchlab.sweeps.executors.processes import Processes
from patchlab.sweeps.spec import ModelSpec

SCORES = """
version: 1
models: demo-gpt2-4l
tasks: [{name: ioi, n: 8}]
runs: [{kind: score, methods: [exact, atp, relp], sites: [resid_pre, z]}]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    counts, _ = swept(runs(folder), folder / "out")
    assert counts == {"planned": 16, "done": 16, "failed": 0, "pending": 0, "running": 0}
    return folder / "out"


@pytest.mark.slow
def test_the_table_holds_what_the_python_interface_gives(whole):
    sweep = pl.sweeps.open(whole)
    table = sweep.table()
    model = pl.load_model("demo-gpt2-4l")
    task = pl.load_task("ioi", model, n=8, seed=1)
    exact, relp = (method.run(model, task, ["resid_pre", "z"], progress=False) for method in (pl.ActivationPatching(), pl.RelevancePatching()))
    expected = pl.compare(exact, {"relp": relp}).table.query("cells == 'live'").set_index("site")
    mine = table.query("seed == 1 and method == 'relp' and kind == 'score'")
    for site in ("resid_pre", "z"):
        for statistic in ("pearson", "pearson_per_prompt", "slope"):
            [row] = mine[(mine["site"] == site) & (mine["statistic"] == statistic)].to_dict("records")
            wanted = [expected.loc[site, f"{statistic}{end}"] for end in ("", "_lo", "_hi")]
            assert [row[name] for name in ("value", "lo", "hi")] == pytest.approx(wanted)
    key = mine["key"].iloc[0]
    stored = sweep.scores(key)
    torch.testing.assert_close(torch.tensor(stored.data["z"].values), torch.tensor(relp.data["z"].values))
    assert (stored.cost.forwards, stored.cost.backwards) == (relp.cost.forwards, relp.cost.backwards)


def test_each_kind_leaves_its_files_and_its_provenance(whole):
    sweep = pl.sweeps.open(whole)
    kept = {"score": {kinds.SCORES}, "verify": {kinds.SCORES, kinds.VERIFIED}, "circuit": {kinds.CURVE}}
    for stored, plan in sweep.done():
        assert set(stored.files) == kept[plan["fields"]["kind"]]
        record = stored.record
        assert set(record["fingerprints"]) == {"model", "task"}
        assert record["versions"]["patchlab"] == pl.__version__
        assert record["seconds"] > 0
        assert record["host"]["cpus"] >= 1
        assert record["code"] == work.code_digest()
    runs = sweep.runs()
    assert list(runs["status"]) == ["done"] * 16
    assert isinstance(sweep.scores(runs["key"][0][:12]), ScoreMap)
    circuit = runs.loc[runs["kind"] == "circuit", "key"].iloc[0]
    assert set(sweep.curve(circuit).table["method"]) == {"atp", "random"}
    with pytest.raises(SweepError, match=r"has no scores\.nc; it has curve\.json"):
        sweep.scores(circuit)
    for wrong, problem in (("", "no run begins with ''"), ("zz", "no run begins with 'zz'")):
        with pytest.raises(SweepError, match=problem):
            sweep.find(wrong)


def test_what_is_done_is_not_done_again_and_no_model_is_loaded(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *_: pytest.fail("nothing is left to do"))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("run.json")}
    counts, said = swept(runs(tmp_path), whole)
    assert counts["done"] == 16
    assert "16 of 16 runs were done before" in said
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("run.json")} == before


@pytest.mark.slow
def test_with_more_in_the_file_only_that_is_run(whole, tmp_path, monkeypatch):
    done: list[str] = []
    compute = kinds.compute
    monkeypatch.setattr(kinds, "compute", lambda run, *args, **options: done.append(run.label) or compute(run, *args, **options))
    swept(runs(tmp_path), tmp_path / "out")
    assert len(done) == 16
    counts, _ = swept(runs(tmp_path, SMALL.replace("atp, relp], sites", "atp, relp, 'ig:2'], sites")), tmp_path / "out")
    assert counts["done"] == 18
    assert [label.rpartition(" on ")[0][-4:] for label in done[16:]] == ["ig:2", "ig:2"]


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_to_the_very_same_numbers(whole, tmp_path, monkeypatch):
    """Interrupted five times, in the first run, the last, and between."""
    compute, finished, stops = kinds.compute, list[str](), [0, 1, 5, 11, 15]

    def interrupted(run, *args, **options):
        if stops and len(finished) == stops[0]:
            raise KeyboardInterrupt
        outcome = compute(run, *args, **options)
        finished.append(run.key)
        return outcome

    monkeypatch.setattr(kinds, "compute", interrupted)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            swept(runs(tmp_path), tmp_path / "out")
        left, at = pl.sweeps.open(tmp_path / "out").counts(), stops.pop(0)
        assert left == {"planned": 16, "done": at, "failed": 0, "pending": 16 - at, "running": 0}
    swept(runs(tmp_path), tmp_path / "out")
    assert len(finished) == len({*finished}) == 16, "nothing that was done is done again"
    same_tables(whole, tmp_path / "out")


@pytest.mark.slow
def test_finished_cells_of_an_interrupted_run_are_kept(tmp_path, monkeypatch):
    swept(runs(tmp_path, SCORES), tmp_path / "whole")
    monkeypatch.setattr("patchlab.methods.setting.checkpoint.SECONDS", 0.0)
    kept: list[int] = []
    take = Board.take

    def until(board, event):
        take(board, event)
        if isinstance(event, work.Kept):
            kept.append(len(event.data))
            if len(kept) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(Board, "take", until)
    with pytest.raises(KeyboardInterrupt):
        swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert len(list((tmp_path / "out" / "work").glob("*.checkpoint"))) == 1
    monkeypatch.setattr(Board, "take", take)
    found: list[bytes | None] = []
    monkeypatch.setattr(work, "_Sent", lambda key, data, tell, sent=work._Sent: found.append(data) or sent(key, data, tell))
    swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert found[0] is not None, "the run goes on from what was kept"
    assert not list((tmp_path / "out" / "work").glob("*.checkpoint"))
    same_tables(tmp_path / "whole", tmp_path / "out")


def test_a_checkpoint_of_other_code_is_said_and_not_used(tmp_path, monkeypatch):
    wanted = runs(tmp_path, SCORES)
    with RunStore.create(tmp_path / "out", {}) as store:
        store.plan({run.key: driver.planned(run) for run in wanted})
        store.work(wanted[0].key).write_bytes(b"PK no checkpoint at all")
    counts, _ = swept(wanted, tmp_path / "out")
    assert counts["done"] == 3
    assert any("what was finished before is not used" in line for line in pl.sweeps.open(tmp_path / "out").find(wanted[0].key).record["log"])


@pytest.mark.slow
def test_a_failure_is_a_result_and_the_others_go_on(tmp_path, monkeypatch):
    score = LinearizedPatching.score

    def out_of_memory(self, *args):
        if self.name == "atp":
            raise torch.OutOfMemoryError("no room for 3 TB")
        return score(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LinearizedPatching, "score", out_of_memory)
        counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert counts == {"planned": 3, "done": 2, "failed": 1, "pending": 0, "running": 0}
    assert any(line.startswith("failed: demo-gpt2-4l × ioi[8] seed 0, denoising: atp on") and "no room for 3 TB" in line for line in said)
    sweep = pl.sweeps.open(tmp_path / "out")
    [failed] = sweep.runs().query("status == 'failed'").to_dict("records")
    error = sweep.find(failed["key"]).record["error"]
    assert error["type"] == "OutOfMemoryError"
    assert "out_of_memory" in error["traceback"]
    assert set(sweep.table()["method"]) == {"exact", "relp"}
    counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert counts["failed"] == 1
    assert any("1 runs failed before" in line and "--retry-failed" in line for line in said)
    counts, _ = swept(runs(tmp_path, SCORES), tmp_path / "out", retry_failed=True)
    assert counts == {"planned": 3, "done": 3, "failed": 0, "pending": 0, "running": 0}


@pytest.mark.slow
def test_a_model_that_is_refused_fails_its_runs_and_no_others(tmp_path, monkeypatch):
    load = ModelSpec.load

    def refused(self, *args):
        if self.name == "demo-llama":
            raise pl.PatchlabError("the self-test refuses it")
        return load(self, *args)

    monkeypatch.setattr(ModelSpec, "load", refused)
    text = SCORES.replace("models: demo-gpt2-4l", "models: [demo-llama, demo-gpt2-4l]")
    counts, _ = swept(runs(tmp_path, text), tmp_path / "out")
    assert (counts["done"], counts["failed"]) == (3, 3)


@pytest.mark.slow
def test_models_are_loaded_once_and_unpatched_runs_and_edge_scores_are_shared(tmp_path, monkeypatch):
    loads, scored, saved = [], [], []
    load, edges, sharing = ModelSpec.load, LinearizedPatching.run, work.Worker.do
    monkeypatch.setattr(ModelSpec, "load", lambda self, *args: loads.append(self.name) or load(self, *args))
    monkeypatch.setattr(LinearizedPatching, "run", lambda self, *args, **options: scored.append(self.name) or edges(self, *args, **options))
    from patchlab.methods.setting import shared

    find = shared.SharedRuns.find
    monkeypatch.setattr(shared.SharedRuns, "find", lambda self, *args, **options: saved.append(found := find(self, *args, **options)) or found)
    assert sharing
    swept(runs(tmp_path), tmp_path / "out")
    assert loads == ["demo-gpt2-4l"]
    # per seed: atp, relp, the screen of the verified run, and one map of edge scores for both ablations of each method
    assert sorted(scored) == sorted(2 * ["atp", "relp", "relp", "atp", "relp"])
    assert sum(found is not None for found in saved) >= 2 * 3


def test_passes_are_those_that_were_planned(whole, tmp_path):
    from patchlab.sweeps.plan import estimate

    table = pl.sweeps.open(whole).table(costs=True)
    for one in estimate(runs(tmp_path)).runs:
        if one.run.what.kind != "score":
            continue
        mine = table[(table["key"] == one.run.key) & (table["site"] == "")].set_index("statistic")["value"]
        assert (mine["forwards"], mine["backwards"]) == (one.forwards, one.backwards)


@pytest.mark.slow
def test_results_of_another_model_or_task_are_stale_and_made_again(tmp_path, monkeypatch):
    swept(runs(tmp_path, SCORES), tmp_path / "out")
    with monkeypatch.context() as patch:  # made by other code, of what is now another model
        patch.setattr(driver, "code_digest", lambda: "another")
        patch.setattr(Model, "fingerprint", property(lambda self: "another", lambda self, value: None), raising=False)
        counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert counts["done"] == 3
    assert sum("its model had another fingerprint" in line for line in said) == 3
    assert len(list((tmp_path / "out" / "stale").iterdir())) == 3
    sweep = pl.sweeps.open(tmp_path / "out")
    assert {stored.record["fingerprints"]["model"] for stored, _ in sweep.done()} == {"another"}


@pytest.mark.slow
def test_results_of_other_code_are_kept_where_model_and_task_are_the_same(tmp_path, monkeypatch):
    swept(runs(tmp_path, SCORES), tmp_path / "out")
    monkeypatch.setattr(driver, "code_digest", lambda: "another")
    monkeypatch.setattr(kinds, "compute", lambda *_, **__: pytest.fail("everything is done"))
    counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert counts["done"] == 3
    assert not any("stale" in line for line in said)


@pytest.mark.slow
def test_batch_sizes_stay_those_of_the_plan(tmp_path, monkeypatch):
    swept(runs(tmp_path, SCORES), tmp_path / "out")
    more = SCORES.replace("relp]", "relp, 'ig:2']").replace("{kind: score,", "{kind: score, batch_size: 2,")
    sizes: list[int] = []
    compute = kinds.compute
    monkeypatch.setattr(kinds, "compute", lambda run, *args, **options: sizes.append(run.batch_size) or compute(run, *args, **options))
    counts, _ = swept(runs(tmp_path, more), tmp_path / "out")
    assert counts["done"] == 4
    assert sizes == [2], "the three others are the same runs, whatever their batches"


def test_a_second_runner_is_refused_at_once_and_told_who_holds_it(tmp_path):
    wanted = runs(tmp_path, SCORES)
    with RunStore.create(tmp_path / "out", {}), pytest.raises(OutputError, match=r"process \d+"):
        swept(wanted, tmp_path / "out")


def test_a_run_that_does_not_fit_fails_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "free_bytes", lambda device: 1000)
    counts, said = swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert counts["failed"] == 3
    assert any("predicted to need" in line for line in said)


def test_no_runs_and_no_workers_are_refused(tmp_path):
    with pytest.raises(SweepError, match="no runs"):
        swept([], tmp_path / "out")
    with pytest.raises(SweepError, match="at least 1"):
        Processes(0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_makes_a_failed_run(tmp_path):
    """By hand, without processes: the board counts deaths of workers, not of drivers."""
    wanted = runs(tmp_path, SCORES)

    class Dying:
        def run(self, board):
            name = board.names()[0]
            for _ in range(2):
                board.take(work.Started(wanted[0].key))
                board.died(name, work.Started(wanted[0].key), "SIGKILL")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swept(wanted, tmp_path / "out", Dying())
    sweep = pl.sweeps.open(tmp_path / "out")
    assert sweep.counts()["pending"] == 3

    class Last:
        def run(self, board):
            board.died(board.names()[0], work.Started(wanted[0].key), "SIGKILL")
            Local().run(board)

    counts, _ = swept(wanted, tmp_path / "out", Last())
    assert (counts["failed"], counts["done"]) == (1, 2)
    error = sweep.find(wanted[0].key).record["error"]
    assert error["message"] == f"{ATTEMPTS} workers died while they did this run; the last: SIGKILL"
    counts, _ = swept(wanted, tmp_path / "out", retry_failed=True)
    assert counts["done"] == 3


def test_a_death_in_the_middle_of_no_run_counts_against_none_and_not_for_ever(tmp_path):
    wanted, before = runs(tmp_path, SCORES), ATTEMPTS - 1

    class Unlucky:
        def run(self, board):
            [name] = board.names()
            for _ in range(before):
                board.died(name, None, "SIGKILL")
            board.take(work.Started(wanted[0].key))  # somebody gets on
            for _ in range(before):
                board.died(name, None, "SIGKILL")
            Local().run(board)

    counts, said = swept(wanted, tmp_path / "out", Unlucky())
    assert counts["done"] == 3
    assert said.count("a worker died (SIGKILL) while it did no run, which counts against none; another takes over") == 2 * before
    assert not any("checked against today's code" in line or "tried again" in line for line in said)

    class Doomed:
        def run(self, board):
            while board.left(board.names()[0]):
                board.died(board.names()[0], None, "exit status 3")

    with pytest.raises(SweepError, match="3 workers died before they began a run, the last of exit status 3: they do not get as far as starting"):
        swept(wanted, tmp_path / "other", Doomed())
    assert pl.sweeps.open(tmp_path / "other").counts()["pending"] == 3


def test_a_death_while_finished_runs_are_checked_leaves_them_as_they_are(tmp_path, monkeypatch):
    wanted = runs(tmp_path, SCORES)
    swept(wanted, tmp_path / "out")
    monkeypatch.setattr(driver, "code_digest", lambda: "another")

    class Unlucky:
        def run(self, board):
            [name] = board.names()
            told: list[work.Event] = []
            work.Worker().do(board.left(name), told.append)
            assert [type(event) for event in told] == [work.Checking, *[work.Checked] * 3]
            board.take(told[0])
            board.died(name, driver.doing(None, told[0]), "SIGKILL")
            assert board.left(name) is None

    counts, said = swept(wanted, tmp_path / "out", Unlucky())
    assert counts["done"] == 3
    assert "a worker died (SIGKILL) while finished runs were checked against today's code; they are used as they are" in said


def test_a_worker_does_a_run_from_its_beginning_to_its_end():
    doing, told = None, []
    for event in (work.Started("a"), work.Kept("a", b""), work.Checked("c", {}), work.Ended("a", "done", {}), work.Started("b"), work.Checking()):
        doing = driver.doing(doing, event)
        told.append(doing)
    assert told == [*[work.Started("a")] * 3, None, work.Started("b"), work.Checking()]


def test_records_are_plain_json(whole):
    for path in whole.glob("runs/*/run.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.slow
def test_a_full_disk_ends_it_clearly_and_the_same_command_goes_on(tmp_path, monkeypatch):
    swept(runs(tmp_path, SCORES), tmp_path / "whole")
    fsync, count = os.fsync, []

    def full(handle):
        count.append(handle)
        if len(count) > 12:  # in the middle of a result
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert pl.sweeps.open(tmp_path / "out").counts()["running"] == 0
    counts, _ = swept(runs(tmp_path, SCORES), tmp_path / "out")
    assert counts["done"] == 3
    same_tables(tmp_path / "whole", tmp_path / "out")
