"""Commands that wait in the middle of exact patching until a test stops them, however fast or slow the machine is."""

import os
from pathlib import Path

from paths import ROOT

_SITE = """
import os, time
if "HOLD" in os.environ:
    from patchlab.methods.setting import checkpoint
    checkpoint.SECONDS = 0.0
    save = checkpoint.Checkpoint.save
    def held(self):
        save(self)
        marker = os.environ["HOLD"]
        if self.keeper is None or len(self.cells[1]) < 3 or os.path.exists(marker):
            return
        with open(marker + ".new", "x") as file:
            print(os.getpid(), getattr(self.keeper, "_key", ""), file=file)
        os.rename(marker + ".new", marker)
        while True:
            time.sleep(1)
    checkpoint.Checkpoint.save = held
"""


class Hold:
    """The first run with a checkpoint that has finished three cells of exact patching waits there; what is started after that does not.

    Args:
        folder: where its files go.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_SITE)
        self.marker = folder / "held"
        self.environment = {"HOLD": str(self.marker), "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

    def who(self) -> tuple[int, str] | None:
        """The process that waits and the key of its run in a sweep, once there is one."""
        if not self.marker.exists():
            return None
        pid, _, key = self.marker.read_text().strip().partition(" ")
        return int(pid), key
