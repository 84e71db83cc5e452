"""A JupyterLab of its own, for one browser on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIMIT = 180.0
"""Seconds that a server may take to start."""


@contextmanager
def jupyter_lab(folder: Path, scratch: Path) -> Iterator[str]:
    """The address of a server that shows a folder; it ends with the block. What it writes for itself goes to ``scratch``."""
    runtime = scratch / "runtime"
    runtime.mkdir(parents=True)
    own = {"JUPYTER_RUNTIME_DIR": runtime, "JUPYTER_CONFIG_DIR": scratch / "config", "JUPYTERLAB_SETTINGS_DIR": scratch / "settings",
           "JUPYTERLAB_WORKSPACES_DIR": scratch / "workspaces", "IPYTHONDIR": scratch / "ipython"}  # fmt: skip
    options = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--ServerApp.allow_root=True", "--IdentityProvider.token=",
               "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    log = scratch / "lab.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "jupyterlab", *options]
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **{k: str(v) for k, v in own.items()}}, start_new_session=True)
    try:
        yield _address(process, runtime, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(process: "subprocess.Popen[bytes]", runtime: Path, log: Path) -> str:
    began = time.monotonic()
    while time.monotonic() < began + LIMIT:
        for file in runtime.glob("jpserver-*.json"):
            with suppress(json.JSONDecodeError):  # it is being written
                return str(json.loads(file.read_text(encoding="utf-8"))["url"]).rstrip("/")
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-3000:]}")
