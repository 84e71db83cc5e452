"""Dictionaries on every architecture of the zoo: they are accepted, the fast engine does what whole runs do, and parts add up to node scores."""

import pytest
import torch

from patchlab.testing.family import features_gap
from patchlab.testing.zoo import ZOO, zoo_model

NOT_LOADED = {"falcon-new", "xglm", "gemma4"}
"""TransformerLens cannot split the first one's projection; the second has no double precision; the third fails its self-test."""
LIKE_OTHERS = {
    *("olmo3", "vaultgemma", "codegen", "gpt-bigcode", "nemotron", "arcee", "smollm3", "glm4", "ernie4.5", "exaone4", "apertus", "seed-oss"),
    *("granite-moe", "glm4-moe", "minimax-m2", "llama4", "deepseek-v2", "olmoe"),
}
"""What differs from another one in what dictionaries do not see; the page of families measures them all."""
QUICK = ("gemma3", "qwen3.5", "phi3")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO if name not in NOT_LOADED | LIKE_OTHERS],
    ids=lambda name: name,
)
def test_features_and_errors_are_scored_on_any_family(name: str) -> None:
    model = zoo_model(name, torch.float64)
    plain = model.arch
    assert features_gap(model) < 1e-6
    assert model.arch == plain
