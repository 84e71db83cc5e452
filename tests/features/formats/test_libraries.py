"""Files that the field's libraries wrote, with what those libraries computed from them (scripts/make_dictionary_fixtures.py)."""

import shutil
from pathlib import Path

import pytest
import torch
from families import model_of
from safetensors.torch import load_file

import patchlab as pl
from patchlab.features import Dictionary

FIXTURES = Path(__file__).parents[1] / "fixtures"
SINGLE = [
    path.relative_to(FIXTURES).as_posix()
    for library in ("saelens", "dictionary_learning", "gemma_scope", "gemma_scope_2")
    for path in sorted((FIXTURES / library).iterdir())
    if path.name != "clt"
]
SETS = ["circuit_tracer/set_relu", "circuit_tracer/set_jumprelu_skip", "circuit_tracer/clt_relu", "circuit_tracer/clt_jump_relu", "gemma_scope_2/clt"]


@pytest.fixture(scope="module")
def model():
    return model_of("gpt2", torch.float64)


def expected(name: str) -> dict[str, torch.Tensor]:
    return {part: value.double() for part, value in load_file(FIXTURES / name / "expected.safetensors").items()}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The library computed in float32."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)


def test_every_library_has_its_files():
    assert len(SINGLE) == 18 + 7 + 1 + 1


@pytest.mark.parametrize("name", SINGLE)
def test_one_dictionary_computes_what_its_library_does(model, name):
    options = {"reads": "ln2.hook_normalized"} if name.startswith("gemma_scope/") else {}
    dictionary, want = pl.load_dictionary(FIXTURES / name, model, **options), expected(name)
    assert dictionary.layer == 1
    features = dictionary.encode(want["x"])
    assert torch.equal(features != 0, want["features"] != 0)
    assert 0.05 < float((features != 0).double().mean()) < 0.95
    close(features, want["features"])
    close(dictionary.decode(features, want["x"]), want["output"])


@pytest.mark.parametrize("name", SETS)
def test_sets_compute_what_their_library_does(model, name):
    dictionaries, want = pl.load_dictionaries(FIXTURES / name, model), expected(name)
    assert [dictionary.layer for dictionary in dictionaries] == [0, 1, 2]
    total = torch.zeros_like(want["output"])
    for layer, dictionary in enumerate(dictionaries):
        features = dictionary.encode(want["x"][layer])
        close(features, want["features"][layer])
        output = dictionary.decode(features, want["x"][layer])
        if dictionary.kind == "cross_layer_transcoder":
            total[layer:] += output.movedim(-2, 0)
        else:
            total[layer] = output
    close(total, want["output"])


def test_what_the_files_say_of_themselves(model):
    def of(name: str) -> Dictionary:
        return pl.load_dictionary(FIXTURES / name, model)

    places = {
        "saelens/standard": ("sae", "resid_post", "resid_post"),
        "saelens/standard_z": ("sae", "z", "z"),
        "saelens/skip_transcoder": ("transcoder", "mlp_in", "mlp_out"),
        "dictionary_learning/AutoEncoderTopK": ("sae", "resid_post", "resid_post"),
        "gemma_scope_2/transcoder": ("transcoder", "mlp_in", "mlp_out"),
    }
    for name, place in places.items():
        found = of(name)
        assert (found.kind, found.reads, found.writes) == place
        assert found.provenance["model_name"] == "gpt2"
    found = pl.load_dictionary(FIXTURES / "circuit_tracer" / "clt_relu", model, layer=2)
    assert (found.kind, found.reads, found.writes, found.w_dec.shape) == ("cross_layer_transcoder", "resid_mid", "mlp_out", (24, 1, 16))


@pytest.mark.parametrize("name", [name for name in SINGLE if not name.startswith("gemma_scope/")])
def test_what_is_read_is_written_and_read_again(model, name, tmp_path):
    dictionary = pl.load_dictionary(FIXTURES / name, model)
    dictionary.save(tmp_path / "again")
    assert pl.load_dictionary(tmp_path / "again", model).identity == dictionary.identity


def test_a_whole_library_of_folders_is_found(model, tmp_path):
    shutil.copytree(FIXTURES / "dictionary_learning", tmp_path / "dl")
    shutil.copytree(FIXTURES / "circuit_tracer" / "set_relu", tmp_path / "ct")
    found = pl.load_dictionaries(tmp_path, model)
    assert len(found) == 7 + 3
    assert len({dictionary.identity for dictionary in found}) == 10
