"""Scores of every method on two random models are those that were stored: nothing changes unnoticed while code is moved about."""

import importlib.util
import json

import pytest
import torch
from paths import ROOT


@pytest.mark.slow
def test_scores_are_those_that_were_stored() -> None:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    stored = json.loads((ROOT / "tests" / "golden.json").read_text())
    torch.manual_seed(0)
    found = {name: call() for name, call in golden.runs(None, short=True)}
    assert found.keys() == stored.keys()
    for name, sites in stored.items():
        assert found[name] == pytest.approx(sites, rel=1e-6, abs=1e-12), name
