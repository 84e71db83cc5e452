"""A run that is asked to end keeps what is finished, and the same command goes on from there."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from patchlab.scores import ScoreMap
from patchlab.store.folder import UNFINISHED

ARGUMENTS = ["compare", "--model", "demo-gpt2-4l", "--task", "ioi", "--n", "4", "--methods", "exact,ig:5", "--sites", "z", "--device", "cpu"]
START = "import patchlab.report.files as f; f.write_images = lambda *_: 'not here'; from patchlab.cli import main; main()"
"""The command without pictures, which would take most of the time."""
HOLD = """
import sys, time
from patchlab.methods.linearized import LinearizedPatching
def score(*_):
    print("under way", file=sys.stderr, flush=True)
    while True:
        time.sleep(1)
LinearizedPatching.score = score
"""
"""The second method waits until it is stopped."""


def started(out: Path, before: str = "") -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", before + START, *ARGUMENTS, "--out", str(out)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal on Windows")
def test_a_request_to_end_keeps_finished_scores_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "out"
    with started(out, HOLD) as run:
        assert run.stderr is not None
        lines = [line for line in iter(run.stderr.readline, "under way\n") if line or pytest.fail("it ended by itself")]
        assert any(re.match(r"exact: [\d.]+ s", line) for line in lines)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=600)
    assert run.returncode == 128 + signal.SIGTERM
    kept = out / UNFINISHED / "scores.exact.nc"
    assert f"what is finished is kept in {kept.parent}: scores.exact.nc. The same command goes on from there." in said
    assert not (out / "run.json").exists()
    assert not [path.name for path in kept.parent.iterdir() if path.suffix == ".nc" and path != kept], "the second method had not finished"
    before, values = kept.read_bytes(), ScoreMap.load(kept).data["z"].to_numpy()
    assert values.shape[0] == 4
    assert np.abs(values).max() > 0

    with started(out) as again:
        _, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert f"going on from {kept.parent}: scores.exact.nc" in said
    assert re.search(r"^exact: finished before, [\d.]+ s then$", said, re.M)
    assert not re.search(r"^exact: [\d.]+ s$", said, re.M), "it is not computed again"
    assert re.search(r"^ig:5: [\d.]+ s$", said, re.M)
    assert (out / "scores.exact.nc").read_bytes() == before
    assert {"run.json", "comparison.csv", "scores.ig-5.nc", "index.html"} <= {path.name for path in out.iterdir()}
    assert not kept.parent.exists()
