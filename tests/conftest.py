"""Fixtures that several test files share. patchlab is imported inside them: the shape checks must be installed first."""

import http.server
import inspect
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub
from hypothesis import HealthCheck, settings
from paths import ROOT

os.environ["HF_HUB_OFFLINE"] = "1"
# the models of the tests are too small for several threads to help, and where cores are shared they hinder
os.environ.setdefault("OMP_NUM_THREADS", "1")

# what is printed fits a terminal of so many columns, where this is set; workers of pytest-xdist have it
os.environ.pop("COLUMNS", None)
# readline, which pytest imports, sets it where os.environ does not show it and what the tests start inherits it
os.unsetenv("COLUMNS")


# the same examples every time, however long they take: a test fails for what was changed, and not for what else the machine does
settings.register_profile("patchlab", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("patchlab")


LONG = {
    "sweeps/test_processes.py": 150,
    "sweeps/test_ray.py": 60,
    "sweeps/test_slurm.py": 60,
    "sweeps/test_driver.py": 60,
    "sweeps/test_study.py": 40,
    "test_notebooks.py": 200,
    "benchmarks/test_benchmarks.py": 60,
    "cli/test_commands.py": 50,
    "cli/test_interruptions.py": 20,
    "report/test_sweep.py": 50,
    "methods/test_corrections.py": 40,
    "scripts/test_results_page.py": 40,
    "scripts/test_sweeps_page.py": 40,
    "sweeps/test_features.py": 20,
    "test_docs.py": 60,
}
"""Seconds, roughly, of files that take far longer than the number of their tests lets expect."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: of what several workers share file by file, the last should be short, or all but one wait for it."""
    seconds = Counter[str]()
    for item in items:
        seconds[str(item.path)] += 3 if item.get_closest_marker("slow") else 0.4
    for path in seconds:
        seconds[path] += LONG.get("/".join(Path(path).parts[-2:]), LONG.get(Path(path).name, 0))
    items.sort(key=lambda item: -seconds[str(item.path)])


def _missing(variable: str, reason: str) -> None:
    """Skip for want of something optional, or fail where ``variable`` says that it has to be there."""
    if os.environ.get(variable) == "1":
        pytest.fail(f"{reason} ({variable}=1 requires it)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with task data and reference numbers, beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        _missing("PATCHLAB_REQUIRE_REFERENCE", "the reference data (../shared) is not part of the repository and is not here")
    return folder


@pytest.fixture(scope="session")
def reference_dir(shared_dir: Path) -> Path:
    """Outputs of published implementations on small models."""
    return shared_dir / "reference"


@pytest.fixture(scope="session")
def reference_of(shared_dir: Path):
    """The folder with the outputs for a model of a given name: models with norms after attention and MLP have one of their own."""
    return lambda model: shared_dir / ("reference_postnorm" if model.startswith("gemma2") else "reference")


@pytest.fixture(scope="session")
def browser() -> str:
    """A Chromium or Chrome, which PNG export needs."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        _missing("PATCHLAB_REQUIRE_IMAGES", "no Chromium or Chrome here, which PNG export needs")
    return str(found)


@pytest.fixture(scope="session", autouse=True)
def other_device() -> None:
    """The device of tests/other_device.py: torch has to know it before the first backward pass of a process."""
    from other_device import known

    known()


@pytest.fixture(scope="session", autouse=True)
def patience():
    """A browser may take minutes for a picture where the machine is busy; what it is given by default is for one that hangs."""
    from patchlab.plots import save

    defaults = inspect.unwrap(save).__kwdefaults__
    defaults["timeout"] = 600.0


@pytest.fixture
def no_images(monkeypatch):
    """Comparisons without PNG files: images take seconds, and tests of their own make them."""
    monkeypatch.setattr("patchlab.report.files.write_images", lambda *_: "")


@pytest.fixture(scope="session")
def demo_gpt2():
    """The packaged 12-layer model."""
    import patchlab as pl

    return pl.load_model("demo-gpt2", device="cpu")


@pytest.fixture(scope="session")
def demo_gpt2_4l():
    """The packaged 4-layer model, for tests where depth does not matter."""
    import patchlab as pl

    return pl.load_model("demo-gpt2-4l", device="cpu")


@pytest.fixture(scope="session")
def demo_llama():
    """The packaged Llama-style model (RoPE, RMSNorm, gated MLP, grouped KV heads)."""
    import patchlab as pl

    return pl.load_model("demo-llama", device="cpu")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def online(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub may be asked; nobody is logged in."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return empty_cache


@pytest.fixture
def hub(online: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A hub on this machine. It answers with ``status``, or serves ``folder`` as someone/tiny; it keeps its ``requests``."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.status, server.requests = None, 404, []  # type: ignore[attr-defined]
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
