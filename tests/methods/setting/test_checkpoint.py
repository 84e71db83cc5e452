"""Interrupted runs: what is kept, how they go on, and what is refused."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import mixed_task, model_of, native_model, swap_task
from paths import ROOT
from torch import Tensor

import patchlab as pl
from patchlab.digest import digest
from patchlab.engine import node_sweep, session_of, support
from patchlab.errors import MethodError, OutputError
from patchlab.methods import get_method
from patchlab.methods.setting import checkpoint
from patchlab.methods.setting.checkpoint import KEPT, Checkpoint, Finished, batch_rows, described
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.unpatched import Scored
from patchlab.metrics import METRICS, Metric
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.store import FileKeeper
from patchlab.tasks.task import Task

SITES = ("resid_pre", "z[layer,pos,head]", "mlp_out")
EXACT = pl.ActivationPatching()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    session_of(model_of("gpt2")).unfinished.clear()  # of tests elsewhere, which share the model
    support(model_of("gpt2"))  # found out now, so that evaluations of the metric are those of the run
    monkeypatch.setattr(node_sweep, "CPU_TOKENS", 40)
    yield
    session_of(model_of("gpt2")).unfinished.clear()


def scores(model: Model | None = None, task: Task | None = None, method: Any = EXACT, sites: Any = SITES, **options: Any) -> ScoreMap:
    return method.run(model or model_of("gpt2"), task or swap_task(), sites, progress=False, **options)


class Interrupts:
    """Lets the metric raise KeyboardInterrupt at its n-th evaluation, and counts the others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.calls, self.at = monkeypatch, 0, 0
        self.right = Metric.__call__

    def __enter__(self) -> "Interrupts":
        self.patch.setattr(Metric, "__call__", lambda metric, logits, answers: self._called(metric, logits, answers))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.setattr(Metric, "__call__", self.right)

    def _called(self, metric: Metric, logits: Tensor, answers: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.right(metric, logits, answers)


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, run: Callable[[], object]) -> list[str]:
    """Run until the metric's n-th evaluation, which a keyboard interrupt ends; the notes that it carries."""
    with Interrupts(monkeypatch) as metric:
        metric.at = at
        with pytest.raises(KeyboardInterrupt) as caught:
            run()
    return getattr(caught.value, "__notes__", [])


def evaluations(monkeypatch: pytest.MonkeyPatch, run: Callable[[], ScoreMap]) -> tuple[ScoreMap, int]:
    with Interrupts(monkeypatch) as metric:
        return run(), metric.calls


def same(first: ScoreMap, second: ScoreMap) -> None:
    """Bit for bit, but for the cost."""
    assert first.data.identical(second.data)
    assert first.live.identical(second.live)
    assert first.provenance == second.provenance


# in memory


@pytest.mark.parametrize(("engine", "at"), [("auto", 7), ("literal", 40), ("auto", 5)])
def test_the_same_call_goes_on_with_the_cells_that_are_left(monkeypatch: pytest.MonkeyPatch, engine: str, at: int) -> None:
    method = pl.ActivationPatching(engine=engine)
    whole, calls = evaluations(monkeypatch, lambda: scores(method=method))
    notes = interrupted(monkeypatch, at, lambda: scores(method=method))
    (work,) = session_of(model_of("gpt2")).unfinished.values()
    done = len(work.cells[1])
    assert done > 0
    assert notes == [f"patchlab: the finished work ({done} cells of a batch) is kept on the model; the same call again goes on from there."]
    rest, more = evaluations(monkeypatch, lambda: scores(method=method))
    same(rest, whole)
    assert more == calls - (at - 1) + 3  # what the first part did not reach, the unpatched runs again, and how far they are rounded
    assert rest.cost.forwards == whole.cost.forwards + 2  # those two, and no cell twice
    assert rest.cost.positions > whole.cost.positions
    assert not session_of(model_of("gpt2")).unfinished


def test_an_interrupt_may_come_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scores()
    for _ in range(3):
        interrupted(monkeypatch, 5, scores)
    rest = scores()
    same(rest, whole)
    assert rest.cost.forwards == whole.cost.forwards + 3 * 2


def test_seconds_are_those_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 5, scores)
    (work,) = session_of(model_of("gpt2")).unfinished.values()
    work.before = (*work.before[:3], 1000.0)
    assert 1000 < scores().cost.seconds < 1100


@pytest.mark.parametrize("name", ["atp", "ig:2", "exact"])
@pytest.mark.parametrize("source", ["paired", "mean"])
def test_finished_batches_are_not_run_again(monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    method = replace(get_method(name), source=source) if name in ("atp", "exact") else pl.IntegratedGradients(2, source=source)
    run = lambda: scores(task=mixed_task(), method=method, sites=("resid_pre", "z"), batch_size=1)  # noqa: E731
    whole, calls = evaluations(monkeypatch, run)
    interrupted(monkeypatch, calls - 1, run)
    (work,) = session_of(model_of("gpt2")).unfinished.values()
    assert len(work.batches) == 3
    rest, more = evaluations(monkeypatch, run)
    same(rest, whole)  # with the notes of integrated gradients
    assert more <= calls // 4 + 2


def test_another_call_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 6, scores)
    other, whole = scores(direction="noising"), evaluations(monkeypatch, lambda: scores(direction="noising"))[0]
    same(other, whole)
    assert other.cost.forwards == whole.cost.forwards
    assert len(session_of(model_of("gpt2")).unfinished) == 1  # and leaves what there was


def test_a_model_remembers_only_a_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(KEPT + 2):
        interrupted(monkeypatch, 6, lambda seed=seed: scores(task=swap_task(seed=10 * seed)))
    assert len(session_of(model_of("gpt2")).unfinished) == KEPT
    last = swap_task(seed=10 * (KEPT + 1))
    assert any(last.fingerprint in str(work.identity["task"]) for work in session_of(model_of("gpt2")).unfinished.values())


def test_nothing_is_kept_of_a_run_that_had_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert interrupted(monkeypatch, 1, scores) == []
    assert interrupted(monkeypatch, 1, lambda: scores(checkpoint=tmp_path / "run")) == []
    assert not session_of(model_of("gpt2")).unfinished
    assert list(tmp_path.iterdir()) == []


def test_the_default_batches_are_those_of_the_unfinished_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They follow from the free memory, which changes."""
    for options in ({}, {"checkpoint": str(tmp_path / "run")}):
        monkeypatch.setattr("patchlab.methods.method.free_bytes", lambda device: 0)
        whole, calls = evaluations(monkeypatch, scores)
        interrupted(monkeypatch, calls - 1, lambda options=options: scores(**options))
        monkeypatch.setattr("patchlab.methods.method.free_bytes", lambda device: 10**12)
        rest = scores(**options)
        same(rest, whole)
        assert rest.cost.forwards == whole.cost.forwards + 2
    assert batch_rows({}, {"batches": described([3, 1])}, None) is None


def test_other_errors_keep_the_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("cable pulled")

    whole = scores()
    right = node_sweep.unembed
    calls = iter(range(100))
    monkeypatch.setattr(node_sweep, "unembed", lambda *given: broken() if next(calls) == 3 else right(*given))
    with pytest.raises(RuntimeError, match="cable pulled") as caught:
        scores()
    assert "kept on the model" in caught.value.__notes__[0]
    same(scores(), whole)


# surroundings and metrics


def test_surrounding_edits_are_part_of_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    kept = model.run([[1, 2, 3, 4, 5]], keep="attn_out")
    edits = [pl.Edit("L1.attn_out@2", kept, op="add"), pl.Edit("L0.H1.z", 2.0, op="scale"), pl.Edit("L2.mlp_out", pl.sources.noise(0.1), op="add")]
    with pl.intervene(model, edits):
        whole = scores()
        interrupted(monkeypatch, 8, scores)
    assert len(session_of(model).unfinished) == 1
    plain = scores()
    assert len(session_of(model).unfinished) == 1  # a run without the edits is another one
    changed = [pl.Edit("L1.attn_out@2", model.run([[1, 2, 3, 4, 6]], keep="attn_out"), op="add"), *edits[1:]]
    with pl.intervene(model, changed):
        scores()
    assert len(session_of(model).unfinished) == 1
    with pl.intervene(model, [replace(edit) for edit in edits]):
        rest = scores()
    assert not session_of(model).unfinished
    same(rest, whole)
    assert not rest.data.identical(plain.data)


class Doubled:
    """A source that nobody can compare."""

    def values(self, site: Any, own: Tensor, examples: Tensor) -> Tensor:
        return 2 * own


def test_surroundings_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = model_of("gpt2")
    with pl.intervene(model, pl.Edit("L0.attn_out", Doubled())):
        notes = interrupted(monkeypatch, 8, scores)
        with pytest.raises(MethodError, match="cannot have a checkpoint: its surroundings cannot be compared .* Surround it with edits whose"):
            scores(checkpoint=tmp_path / "run")
    assert len(notes) == 1
    assert "is not kept: the surroundings cannot be compared with that of a later call" in notes[0]
    assert not session_of(model).unfinished
    assert list(tmp_path.iterdir()) == []


SCALE = 2.0


def _scaled(logits: Tensor, answers: Any) -> Tensor:
    return SCALE * logits.amax(-1)


def test_a_metric_is_known_by_its_code_and_what_it_refers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(factor: Any, power: int = 1) -> Metric:
        return Metric("made", lambda logits, a, power=power: factor * logits.amax(-1) ** power)

    def told(metric: Metric) -> str | None:
        return digest(metric, metric.name)

    assert told(made(2.0)) == told(made(2.0)) != told(made(3.0))
    assert told(made(2.0, 2)) not in (None, told(made(2.0)))
    assert told(made(torch.tensor([1.0, 2.0]))) not in (None, told(made(torch.tensor([1.0, 3.0]))))
    assert told(Metric("made", lambda logits, a: logits.amax(-1))) != told(Metric("made", lambda logits, a: logits.amin(-1)))
    assert told(replace(made(2.0), reads="all")) != told(made(2.0))
    before = told(Metric("scaled", _scaled))
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert told(Metric("scaled", _scaled)) not in (None, before)
    assert told(Metric("object", made)) is not None
    assert told(made(object())) is None
    assert told(Metric("callable", type("Stateful", (), {"__call__": lambda self, logits, a: logits.amax(-1)})())) is None
    assert {told(metric) for metric in METRICS.values()}.isdisjoint({None})


def test_a_metric_of_a_cell_that_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = [swap_task(metric=Metric("top", lambda logits, a: logits.amax(-1))) for _ in range(2)]
    whole = scores(task=tasks[0])
    interrupted(monkeypatch, 8, lambda: scores(task=tasks[0]))
    same(scores(task=tasks[1]), whole)
    assert not session_of(model_of("gpt2")).unfinished
    with pytest.raises(MethodError, match="its metric cannot be compared .* Use a named metric or a plain function"):
        scores(task=swap_task(metric=Metric("bound", METRICS["logit_diff"].__call__)), checkpoint=tmp_path / "run")


# in a file


def test_a_new_model_goes_on_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    models = [native_model() for _ in range(2)]
    whole = scores(models[0])
    notes = interrupted(monkeypatch, 9, lambda: scores(models[0], checkpoint=path))
    assert f"is kept in {path}; the same call again goes on from there" in notes[0]
    assert not session_of(models[0]).unfinished
    rest = scores(models[1], checkpoint=path)
    same(rest, whole)
    assert whole.cost.forwards < rest.cost.forwards <= whole.cost.forwards + 4
    assert list(tmp_path.iterdir()) == []
    assert rest.provenance["engine"] == whole.provenance["engine"]


class InMemory:
    """A keeper that keeps bytes in memory."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.calls: list[str] = []

    def read(self) -> bytes | None:
        self.calls.append("read")
        return self.data

    def write(self, data: bytes) -> None:
        self.calls.append("write")
        self.data = data

    def remove(self) -> None:
        self.calls.append("remove")
        self.data = None

    def __str__(self) -> str:
        return "the memory of the test"


def test_a_run_goes_on_from_whatever_keeps_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    models, keeper = [native_model() for _ in range(2)], InMemory()
    whole = scores(models[0])
    notes = interrupted(monkeypatch, 9, lambda: scores(models[0], checkpoint=keeper))
    assert "is kept in the memory of the test; the same call again goes on from there" in notes[0]
    assert keeper.data
    with pytest.raises(MethodError, match="the checkpoint the memory of the test is of another run: direction"):
        scores(models[1], checkpoint=keeper, direction="noising")
    rest = scores(models[1], checkpoint=keeper)
    same(rest, whole)
    assert whole.cost.forwards < rest.cost.forwards <= whole.cost.forwards + 4
    assert keeper.data is None
    assert keeper.calls[-1] == "remove"
    keeper.data = b"my notes"
    with pytest.raises(MethodError, match="the memory of the test is no checkpoint of patchlab"):
        scores(models[1], checkpoint=keeper)
    assert keeper.data == b"my notes"


def test_a_checkpoint_begins_with_what_the_model_remembers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, model = scores(), model_of("gpt2")
    interrupted(monkeypatch, 8, scores)
    with pytest.raises(OutputError, match="there is no folder"):
        scores(checkpoint=tmp_path / "no" / "run")
    assert len(session_of(model).unfinished) == 1
    interrupted(monkeypatch, 5, lambda: scores(checkpoint=tmp_path / "run"))
    assert not session_of(model).unfinished
    rest = scores(checkpoint=tmp_path / "run")
    same(rest, whole)
    assert rest.cost.forwards == whole.cost.forwards + 4


def test_batches_and_notes_survive_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(**options: Any) -> ScoreMap:
        return scores(task=mixed_task(), method=get_method("ig:2"), sites="resid_pre", batch_size=1, **options)

    whole, calls = evaluations(monkeypatch, run)
    interrupted(monkeypatch, calls - 1, lambda: run(checkpoint=tmp_path / "run"))
    rest, more = evaluations(monkeypatch, lambda: run(checkpoint=tmp_path / "run"))
    same(rest, whole)
    assert more < calls / 2
    assert set(whole.provenance) & {"completeness_gap"}


def test_a_whole_run_leaves_no_file_and_the_same_numbers(tmp_path: Path) -> None:
    plain, with_path = scores(), scores(checkpoint=tmp_path / "run")
    same(plain, with_path)
    assert plain.cost.forwards == with_path.cost.forwards
    assert plain.cost.positions == with_path.cost.positions
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_written_now_and_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writings = []
    right = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda work: (writings.append(str(work)), right(work)))
    scores(checkpoint=tmp_path / "run")
    assert writings == [""]  # at the start, to see that it can be written; a short run needs no more
    monkeypatch.setattr(checkpoint, "SECONDS", -1.0)
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: 0.0)  # no time passes in writing
    scores(checkpoint=tmp_path / "run")
    assert len(writings) > 5
    sizes = [int(text.split()[0]) for text in writings[2:] if text.endswith("cells of a batch")]
    assert sizes == sorted(sizes)


def test_writing_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter([100.0, 102.0])
    work = Checkpoint({"batches": "1"}, FileKeeper(tmp_path / "run"))
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: next(clock))
    work.save()
    assert work.due == 102.0 + 20 * 2.0


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "method": (lambda path: scores(method=pl.ActivationPatching(source="zero"), checkpoint=path), r"method is 'exact \(source=paired"),
    "engine": (lambda path: scores(method=pl.ActivationPatching(engine="literal"), checkpoint=path), "engine=auto.*engine=literal"),
    "model": (lambda path: scores(model_of("llama"), checkpoint=path), "model is 'gpt2 .* and 'llama"),
    "task": (lambda path: scores(task=swap_task(seed=5), checkpoint=path), "task is"),
    "sites": (lambda path: scores(sites="resid_pre", checkpoint=path), "sites is .* and 'resid_pre' here"),
    "direction": (lambda path: scores(direction="noising", checkpoint=path), "direction is 'denoising' there and 'noising' here"),
    "metric": (lambda path: scores(task=swap_task(metric="prob_diff"), checkpoint=path), "metric is 'logit_diff.*'prob_diff"),
    "dtype": (lambda path: scores(model_of("gpt2", torch.float64), checkpoint=path), "dtype is 'float32' there and 'float64' here"),
    "batches": (lambda path: scores(batch_size=2, checkpoint=path), "batches is '1 batches of at most 3 examples' there and '2 batches of at most 2"),
    "memory": (lambda path: scores(max_memory=10**9, checkpoint=path), "max_memory is 'None' there and '1000000000' here"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    path = tmp_path / "run"
    interrupted(monkeypatch, 8, lambda: scores(checkpoint=path))
    before = path.read_bytes()
    run, message = OTHERS[what]
    with pytest.raises(MethodError, match=f"is of another run: .*{message}.* It is left as it is: repeat the call that made it"):
        run(path)
    assert path.read_bytes() == before
    same(scores(checkpoint=path), scores())


def test_other_versions_are_another_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "run"
    interrupted(monkeypatch, 8, lambda: scores(checkpoint=path))
    monkeypatch.setattr(pl, "__version__", "0.0.0")
    with pytest.raises(MethodError, match=r"versions is .* and 'patchlab 0\.0\.0, torch"):
        scores(checkpoint=path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "array", "format"])
def test_a_damaged_or_foreign_file_is_refused_and_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run"
    interrupted(monkeypatch, 8, lambda: scores(checkpoint=path))
    data = path.read_bytes()
    place = data.index(b"effects.npy") + 200
    changed = {"cut": data[:-100], "text": b"my notes", "empty": b"", "flipped": data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]}
    if damage in changed:
        path.write_bytes(changed[damage])
    elif damage == "array":
        with path.open("wb") as stream:
            np.savez(stream, mine=np.arange(3))
    else:
        monkeypatch.setattr(checkpoint, "FORMAT", 99)
    before = path.read_bytes()
    with pytest.raises(MethodError, match=f"{path} is no checkpoint of patchlab, or it is damaged .* give another path, or remove the file"):
        scores(checkpoint=path)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        scores(checkpoint=tmp_path / "no" / "run")
    with pytest.raises(OutputError, match="it is a folder"):
        scores(checkpoint=tmp_path)


def test_a_last_writing_that_fails_does_not_hide_the_interrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, calls = Checkpoint.save, iter(range(10))

    def save(work: Checkpoint) -> None:
        if next(calls):
            raise OutputError("no space left")
        right(work)

    monkeypatch.setattr(Checkpoint, "save", save)
    notes = interrupted(monkeypatch, 8, lambda: scores(checkpoint=tmp_path / "run"))
    assert len(notes) == 1
    assert "could not be kept: no space left" in notes[0]


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from families import model_of, swap_task
import patchlab as pl
from patchlab.engine import node_sweep
from patchlab.methods.setting import checkpoint
node_sweep.CPU_TOKENS = 40
checkpoint.SECONDS = 0.0
right, calls = node_sweep.unembed, iter(range(10**6))
def slow(*given):
    if next(calls) >= 4:
        print("under way", flush=True)
        time.sleep(6000)
    return right(*given)
model = model_of("gpt2")
pl.engine.support(model)
node_sweep.unembed = slow
pl.ActivationPatching().run(model, swap_task(), {sites!r}, progress=False, checkpoint={path!r})
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = textwrap.dedent(KILLED).format(tests=str(ROOT / "tests"), sites=SITES, path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.is_file()
    whole, calls = evaluations(monkeypatch, scores)
    rest, more = evaluations(monkeypatch, lambda: scores(checkpoint=path))
    np.testing.assert_allclose(rest.data["resid_pre"], whole.data["resid_pre"], rtol=0, atol=1e-6)
    same(rest, whole)
    assert more < calls
    assert not path.exists()


# the progress bar


class Bar:
    """Records a progress bar."""

    made: list["Bar"] = []  # noqa: RUF012

    def __init__(self, what: str, unit: str, total: int, *, done: int = 0, show: bool = True) -> None:
        self.unit, self.total, self.initial, self.n = unit, total, done, done
        Bar.made.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, n: int | bool) -> None:
        self.n += n


@pytest.mark.parametrize("source", ["paired", "zero", "mean"])
@pytest.mark.parametrize("engine", ["auto", "literal"])
def test_the_bar_of_a_sweep_counts_cells(monkeypatch: pytest.MonkeyPatch, engine: str, source: str) -> None:
    monkeypatch.setattr("patchlab.methods.method.progress_bar", Bar)
    Bar.made.clear()
    method, sites = pl.ActivationPatching(source=source, engine=engine), ("input", "resid_pre", "z")
    result = scores(task=mixed_task(), method=method, sites=sites)
    live = sum(int(result.live[site].sum()) for site in result.sites)
    (bar,) = Bar.made
    assert bar.unit == "cell"
    assert bar.n == bar.total == 2 * live  # two batches


@pytest.mark.parametrize("name", ["atp", "relp", "ig:3"])
def test_the_bar_of_other_methods_counts_forward_passes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("patchlab.methods.method.progress_bar", Bar)
    Bar.made.clear()
    result = scores(task=mixed_task(), method=get_method(name), sites="resid_pre")
    (bar,) = Bar.made
    assert bar.unit == "forward"
    assert bar.n == bar.total == result.cost.forwards


def test_the_bar_goes_on_where_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 8, scores)
    (work,) = session_of(model_of("gpt2")).unfinished.values()
    done = len(work.cells[1])
    monkeypatch.setattr("patchlab.methods.method.progress_bar", Bar)
    Bar.made.clear()
    scores()
    (bar,) = Bar.made
    assert bar.initial == done
    assert bar.n == bar.total


def test_work_says_what_it_holds() -> None:
    work = Checkpoint({"batches": described([2, 2, 1])})
    assert str(work) == ""
    work.cells_of(0)[4] = np.zeros(2)
    assert str(work) == "1 cells of a batch"
    work.add(Finished(Scored({}), np.zeros(2), np.zeros(2), {}))
    assert str(work) == "1 of 3 batches of at most 2 examples"
    assert work.cells_of(1) == {}
    assert work.spent()[:3] == (0, 0, 0)
    work.begin(Meter(None))
    assert work.spent()[3] <= time.perf_counter()
