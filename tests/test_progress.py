"""Progress without a terminal: lines, not bars."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from patchlab import progress
from patchlab.progress import Lines, duration, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(stderr: io.StringIO, lines: int) -> None:
    end = time.monotonic() + 600
    while len(stderr.getvalue().splitlines()) < lines:
        assert time.monotonic() < end, "no line came"
        time.sleep(0.01)


def test_a_terminal_gets_a_bar_and_a_file_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 600.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("relp", "forward", 4) as bar:
        assert isinstance(bar, tqdm)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("relp", "forward", 4) as bar:
        assert isinstance(bar, Lines)
    assert sys.stderr.getvalue() == "", "work of less time than between two lines says nothing"


def test_nothing_is_shown_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress_bar("relp", "forward", 4, show=False) as bar:
            bar.update(4)
        assert stderr.getvalue() == ""


def test_a_line_says_what_how_many_and_how_long() -> None:
    lines = Lines("exact", "cell", 1200, done=200)
    assert lines.line(10) == "exact: 200 of 1,200 cells, 10 s elapsed"
    lines.update(250)
    assert lines.line(20) == "exact: 450 of 1,200 cells, 20 s elapsed, about 1 min remaining"
    lines.update(750)
    assert lines.line(80) == "exact: 1,200 of 1,200 cells, 1 min 20 s elapsed"
    assert Lines("verified(relp)", "forward").line(100) == "verified(relp): 0 forwards, 1 min 40 s elapsed"


def test_lines_come_also_while_one_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar("ig:5", "forward", 10) as bar:
        wait_for(stderr, 2)
        bar.update(5)
        wait_for(stderr, len(stderr.getvalue().splitlines()) + 2)
    said = stderr.getvalue().splitlines()
    assert said[0].startswith("ig:5: 0 of 10 forwards, ")
    assert said[-1].startswith("ig:5: 5 of 10 forwards, ")
    time.sleep(0.06)
    assert stderr.getvalue().splitlines() == said, "nothing is written after the work"


def test_a_reader_that_is_gone_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    stderr = io.StringIO()
    stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Lines("exact", "cell", 3) as lines:
        lines._thread.join(timeout=600)
        assert not lines._thread.is_alive()
        lines.update(3)
    assert lines.n == 3


def test_a_command_whose_stderr_is_a_file_writes_lines(tmp_path: Path) -> None:
    file = tmp_path / "stderr"
    code = (
        "import sys, time; from patchlab import progress; progress.SECONDS = 0.05\n"
        "with progress.progress_bar('exact', 'cell', 10**9) as bar:\n"
        "    while open(sys.argv[1]).read().count('\\n') < 3: time.sleep(0.01); bar.update(1)"
    )
    with file.open("w") as stderr:
        subprocess.run([sys.executable, "-c", code, str(file)], stderr=stderr, check=True, timeout=600)
    said = file.read_text()
    assert "\r" not in said
    assert len(said.splitlines()) > 2
    assert all(line.startswith("exact: ") for line in said.splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3600, "1 h"), (86_400 + 59, "1 day"), (3e9, "95 years"), (7200 + 59, "2 h")],
)
def test_durations(seconds: float | int, text: str) -> None:
    assert duration(seconds) == text
