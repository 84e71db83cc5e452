"""The scripts that make pages and notebooks, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

SCRIPTS = ROOT / "scripts" / "pages"


def script(name: str, folder: Path = SCRIPTS) -> ModuleType:
    """A script of scripts/pages, or of another folder."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)  # as for a script that is run
        spec.loader.exec_module(module)
    return module
