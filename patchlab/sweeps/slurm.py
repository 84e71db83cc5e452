"""Scripts for Slurm: a job array in which every job does a shard of a sweep, and queues again when its time is nearly up."""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchlab.errors import OutputError, SweepError
from patchlab.store.files import writing
from patchlab.sweeps.executors.shards import split
from patchlab.sweeps.spec import RunSpec

SHARDS = 8
"""Jobs of an array, where there are so many groups of runs."""
GRACE = 120
"""Seconds before its time is up that a job is asked to stop."""

_SCRIPT = r"""#!/bin/bash
# Written by `patchlab sweep slurm`: submit it with sbatch. Submitted again, it goes on with what is missing.
# When all jobs have ended: patchlab sweep merge MERGED FOLDERS
#SBATCH --job-name=NAME
#SBATCH --array=1-SHARDS
#SBATCH --output="LOGS/%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@GRACE
HEADER
set -euo pipefail
export HF_HUB_OFFLINE=1  # nodes may have no network: see patchlab sweep prefetch

child= asked= again=
stop() {
  asked=yes again=yes
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM

COMMAND &
child=$!
if [ -n "$asked" ]; then kill -TERM "$child" 2>/dev/null || true; fi
while :; do # a signal ends `wait`, and not what it waits for
  status=0 again=
  wait "$child" || status=$?
  if [ -z "$again" ]; then break; fi
done

if [ -n "$asked" ] && [ "$status" = 143 ]; then # stopped when asked to, with its checkpoint kept
  job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
  case "$(scontrol show job "$job" || true)" in
    *JobState=RUNNING*) scontrol requeue "$job" ;;
    *) echo "cancelled, so it is not queued again; submitted again, it goes on from here" >&2 ;;
  esac
fi
exit "$status"
"""


@dataclass(frozen=True)
class Job:
    """A job array that does a sweep.

    Args:
        name: of the sweep.
        file: its file.
        out: the folder in which the shards have theirs, beside the logs.
        shards: jobs of the array.
        header: lines that stand at the top of the script.
        options: words that every run of the sweep is given as well.
    """

    name: str
    file: Path
    out: Path
    shards: int
    header: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def text(self) -> str:
        """The script.

        Raises:
            SweepError: a name that a line for sbatch cannot hold.
        """
        if bad := re.search(r'["\\\n\r]', str(self.out)):
            raise SweepError(f"sbatch cannot write logs into a folder with {bad[0]!r} in its name: {self.out}. Give another with --out.")
        run = [sys.executable, "-m", "patchlab", "sweep", "run", str(self.file), *self.options]
        shard = [f'{shlex.quote(str(self.out))}/shard-"$SLURM_ARRAY_TASK_ID"', f'"$SLURM_ARRAY_TASK_ID"/{self.shards}']
        values = {
            "NAME": re.sub(r"[^\w.-]", "_", self.name),
            "SHARDS": str(self.shards),
            "LOGS": str(self.out / "logs").replace("%", "%%"),
            "GRACE": str(GRACE),
            "HEADER": "\n".join((*self.header, "")),
            "COMMAND": f"{shlex.join(run)} --out {shard[0]} --shard {shard[1]}",
            "MERGED": shlex.quote(str(self.out / "merged")),
            "FOLDERS": self.folders(),
        }
        return re.sub(rf"\b({'|'.join(values)})\b", lambda found: values[found[0]], _SCRIPT)

    def folders(self) -> str:
        """The folders of the shards, as a shell takes them."""
        numbers = "1" if self.shards == 1 else f"{{1..{self.shards}}}"
        return f"{shlex.quote(str(self.out))}/shard-{numbers}"

    def write(self, runs: Sequence[RunSpec], path: Path | None = None, *, overwrite: bool = False) -> Path:
        """Write the script, and make the folder for its logs: sbatch writes none where there is none.

        Args:
            runs: of the sweep.
            path: of the script; default one named as the sweep in ``out``.
            overwrite: replace an existing one.

        Raises:
            SweepError: more shards than groups of runs, or a name that a line for sbatch cannot hold.
            OutputError: the script exists, or something cannot be written.
        """
        split(runs, self.shards)
        text = self.text()
        path = self.out / f"{self.name}.sbatch" if path is None else path.expanduser().absolute()
        try:
            (self.out / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {self.out / 'logs'}: {error.strerror or error}. Give another with --out.") from error
        with writing(path, overwrite=overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path


def header_lines(lines: Iterable[str], file: Path | None = None) -> tuple[str, ...]:
    """The lines that stand at the top of a script, ``lines`` before those of a file.

    Raises:
        SweepError: a line that sbatch would not see, or that is at odds with the script; a file that cannot be read.
    """
    given = list(lines)
    if bad := next((line for line in given if not line.startswith("#SBATCH ") or "\n" in line), None):
        raise SweepError(f"a header is a line such as '#SBATCH --time=4:00:00'; got {bad!r}. Commands go into a file, for --header-file.")
    try:
        given += file.read_text(encoding="utf-8").splitlines() if file is not None else []
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"cannot read {file}: {error}.") from error
    begun = None
    for line in given:
        if line.startswith("#!"):
            raise SweepError(f"the script has a first line of its own; leave {line!r} out of {file}.")
        if line.strip() and not line.startswith("#"):
            begun = begun or line
        elif line.startswith("#SBATCH"):
            if begun is not None:
                raise SweepError(f"sbatch does not see {line!r}, which stands after a command ({begun!r}). Put it before.")
            _check(line)
    return tuple(given)


def _check(line: str) -> None:
    """Refuse what the script decides."""
    words = shlex.split(line, comments=False)[1:]
    for word in words:
        if re.match(r"--array\b|-a", word):
            raise SweepError(f"the jobs of the array are the shards, whose number is that of --shards; leave {line!r} out.")
        if re.match(r"--no-requeue\b", word):
            raise SweepError(f"a job whose time is up queues again; leave {line!r} out.")
        if word.startswith("--signal") and not re.fullmatch(r"--signal=B:(SIG)?TERM@[0-9]+", word):
            raise SweepError(f"jobs are asked to stop by --signal=B:TERM@SECONDS, since the shell passes it on; got {line!r}.")
