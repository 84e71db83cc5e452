"""The scripts that make pages, as modules."""

import importlib.util
from types import ModuleType

import pytest
from paths import ROOT

SCRIPTS = ROOT / "scripts" / "pages"


def script(name: str) -> ModuleType:
    """A script of scripts/pages."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(SCRIPTS)  # as for a script that is run
        spec.loader.exec_module(module)
    return module
