"""Scripts for Slurm, really run: what a job does when it ends, fails, is asked to stop, and is cancelled."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from holding import Hold
from paths import ROOT
from sweeping import runs, same_tables, swept, wait_for
from typer.testing import CliRunner

from patchlab import cli
from patchlab.errors import OutputError, SweepError
from patchlab.store.runs import RunStore
from patchlab.sweeps.merge import merge
from patchlab.sweeps.slurm import Job, header_lines

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no bash")

TEXT = """
version: 1
name: two
models: demo-gpt2-4l
tasks: [{name: ioi, n: 8, seed: [0, 1]}]
batch_size: 4
runs: [{kind: score, methods: [relp, exact], sites: ["z[layer,pos,head]", "resid_pre"]}]
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/called"
if [ "$1" = show ]; then echo "JobId=7 JobName=x"; echo "   JobState=$STATE Reason=None"; fi
"""
WORK = """#!/bin/bash
trap 'exit CODE' TERM
if [ NOW = yes ]; then exit CODE; fi
touch started
while :; do sleep 0.05; done
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Cluster:
    """As much of Slurm as a job sees: its environment and ``scontrol``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        executable(folder / "bin" / "scontrol", SCONTROL)

    def start(self, script: Path, task: int, state: str = "RUNNING", **more: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "STATE": state, "PYTHONPATH": str(ROOT)}
        env |= {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "OMP_NUM_THREADS": "1", **more}
        env.pop("HF_HUB_OFFLINE", None)
        words = ["bash", str(script)]
        return subprocess.Popen(words, env=env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    @property
    def requeued(self) -> list[str]:
        called = self.folder / "bin" / "called"
        return [line for line in called.read_text().splitlines() if line.startswith("requeue")] if called.exists() else []


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path / "cluster")


def written(*words: object):
    return CliRunner().invoke(cli.app, ["sweep", "slurm", *map(str, words)], prog_name="patchlab")


@pytest.mark.parametrize(
    ("code", "asked", "state", "requeued"),
    [
        (0, False, "RUNNING", False),
        (1, False, "RUNNING", False),
        (143, False, "RUNNING", False),  # somebody ended the program, not Slurm
        (143, True, "RUNNING", True),
        (143, True, "CANCELLED", False),
        (143, True, "COMPLETING", False),
        (0, True, "RUNNING", False),  # it was done just then
        (1, True, "RUNNING", False),
    ],
)
def test_a_job_queues_again_only_when_its_time_is_up(tmp_path, cluster, code, asked, state, requeued):
    job = Job("x", tmp_path / "sweep.yaml", tmp_path / "out", 2)
    stub = executable(tmp_path / "stub", WORK.replace("CODE", str(code)).replace("NOW", "no" if asked else "yes"))
    script = executable(tmp_path / "job.sh", job.text().replace(sys.executable, str(stub)))
    process = cluster.start(script, 2, state)
    if asked:
        wait_for((cluster.folder / "started").exists)
        os.kill(process.pid, signal.SIGTERM)  # to the script alone, as B: says
    text, _ = process.communicate(timeout=600)
    assert process.returncode == code, text
    assert cluster.requeued == (["requeue 7_2"] if requeued else []), "the task, and never the whole array, whose number may be that of the job"
    assert ("cancelled, so it is not queued again" in text) == (asked and code == 143 and state != "RUNNING")


@pytest.mark.slow
def test_a_request_to_stop_keeps_the_checkpoint_and_the_shards_are_the_sweep(tmp_path, cluster):
    folder = tmp_path / "with 'spaces' & %"
    folder.mkdir()
    wanted = runs(folder, TEXT)
    out = folder / "o ut"
    found = written(folder / "sweep.yaml", "--out", out, "--header", "#SBATCH --time=1:00:00")
    assert found.exit_code == 0, found.output
    script = out / "two.sbatch"
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=1-2" in lines
    assert "#SBATCH --time=1:00:00" in lines
    assert f"#SBATCH --output=\"{folder.parent}/with 'spaces' & %%/o ut/logs/%A_%a.log\"" in lines
    assert (out / "logs").is_dir(), "sbatch makes none"

    hold = Hold(tmp_path / "hold")
    process = cluster.start(script, 1, **hold.environment)
    work = out / "shard-1" / "work"
    wait_for(lambda: hold.who() or process.poll() is not None)
    os.kill(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 143, text
    assert cluster.requeued == ["requeue 7_1"]
    assert RunStore.open(out / "shard-1").counts() == {"planned": 2, "done": 1, "failed": 0, "pending": 1, "running": 0}
    [kept] = work.glob("*.checkpoint")
    with np.load(kept) as found:
        assert len(found["cells"]) or "0/clean" in found, "finished cells, or batches of them"
    for task in (1, 2):  # as Slurm starts it again
        process = cluster.start(script, task)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
        if task == 1:
            assert "1 of 2 runs were done before" in text
    assert cluster.requeued == ["requeue 7_1"]
    assert not list(work.glob("*.checkpoint"))
    assert merge(out / "merged", [out / "shard-2", out / "shard-1"])["done"] == 4
    swept(wanted, tmp_path / "whole")
    same_tables(tmp_path / "whole", out / "merged")
    # a failed run is no reason to queue again
    (folder / "sweep.yaml").unlink()
    process = cluster.start(script, 1)
    process.communicate(timeout=600)
    assert process.returncode == 1
    assert cluster.requeued == ["requeue 7_1"]


def test_the_header_is_passed_through(tmp_path):
    runs(tmp_path, TEXT)
    lines = "#SBATCH --partition=gpu\n# a comment\n\nmodule load cuda\n"
    (tmp_path / "header").write_text(lines)
    script = tmp_path / "job.sh"
    options = ("--header", "#SBATCH --mem=8G", "--header", '#SBATCH --comment="a b"', "--header-file", tmp_path / "header", "--script", script)
    found = written(tmp_path / "sweep.yaml", "--out", tmp_path / "out", *options, "--shards", "1")
    assert found.exit_code == 0, found.output
    text = script.read_text()
    assert "#SBATCH --array=1-1\n" in text
    assert '#SBATCH --mem=8G\n#SBATCH --comment="a b"\n' + lines in text
    assert text.index("module load") < text.index("set -euo pipefail"), "what it does may use what is not set"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    again = written(tmp_path / "sweep.yaml", "--out", tmp_path / "out", "--script", script)
    assert again.exit_code == 1
    assert "exists and is not overwritten" in again.stderr
    assert "--force" in again.stderr
    assert written(tmp_path / "sweep.yaml", "--out", tmp_path / "out", "--script", script, "--force").exit_code == 0
    assert "#SBATCH --array=1-2\n" in script.read_text()
    many = written(tmp_path / "sweep.yaml", "--out", tmp_path / "other", "--shards", "3")
    assert "cut into 3 shards; take 1 to 2" in many.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--time=1:00:00", "a header is a line such as"),
        ("#SBATCH --array=1-9", "whose number is that of --shards"),
        ("#SBATCH -a 1-9", "whose number is that of --shards"),
        ("#SBATCH --no-requeue", "queues again"),
        ("#SBATCH --signal=USR1@60", "asked to stop by --signal=B:TERM@SECONDS"),
        ("#SBATCH --signal=TERM@60", "since the shell passes it on"),
        ("#SBATCH --signal B:TERM@60", "asked to stop by"),
    ],
)
def test_a_header_at_odds_with_the_script_is_refused(line, problem):
    with pytest.raises(SweepError, match=problem):
        header_lines([line])


def test_a_header_that_sbatch_would_not_see_is_refused(tmp_path):
    assert header_lines(["#SBATCH --signal=B:TERM@600", "#SBATCH --account=a"]) == ("#SBATCH --signal=B:TERM@600", "#SBATCH --account=a")
    file = tmp_path / "header"
    for text, problem in (
        ("module load x\n#SBATCH --mem=1G\n", "sbatch does not see '#SBATCH --mem=1G', which stands after a command"),
        ("#!/bin/bash\n#SBATCH --mem=1G\n", "leave '#!/bin/bash' out"),
    ):
        file.write_text(text)
        with pytest.raises(SweepError, match=problem):
            header_lines([], file)
    with pytest.raises(SweepError, match="cannot read"):
        header_lines([], tmp_path / "none")


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_a_folder_that_sbatch_cannot_name_is_refused(tmp_path, name):
    with pytest.raises(SweepError, match="sbatch cannot write logs into a folder with"):
        Job("x", tmp_path / "x.yaml", tmp_path / name, 1).text()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    wanted = runs(tmp_path, TEXT)
    with pytest.raises(OutputError, match="cannot make the folder"):
        Job("x", tmp_path / "sweep.yaml", tmp_path / "file", 1).write(wanted)
