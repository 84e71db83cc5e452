"""Models whose weights are kept elsewhere than where they run: everything comes out as on the undivided model, or is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import swap_task
from other_device import NAME, elsewhere

import patchlab as pl
from patchlab import lenses, weight_edit
from patchlab.adapters.weights import every_weight, fetched, is_offloaded
from patchlab.errors import InterventionError, ModelError
from patchlab.methods import get_method
from patchlab.models import Model, bridge_module, load_model, wrap_bridge
from patchlab.testing.zoo import zoo_module

CPU = ("model.embed_tokens", "model.rotary_emb", "lm_head", "model.layers.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model") / "tiny"
    zoo_module("llama", layers=2).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """The same model with one layer and its last norm on disk, and undivided."""
    where = {**dict.fromkeys(CPU, "cpu"), "model.layers.1": "disk", "model.norm": "disk"}
    offloaded = load_model(folder, device_map=where, offload_folder=tmp_path_factory.mktemp("disk"))
    return offloaded, load_model(folder)


def test_it_is_the_same_model(models: tuple[Model, Model]) -> None:
    offloaded, whole = models
    assert is_offloaded(offloaded.bridge)
    assert not is_offloaded(whole.bridge)
    assert offloaded.fingerprint == whole.fingerprint
    assert offloaded.arch.absent == whole.arch.absent
    assert offloaded.device == whole.device
    for (name, weight), (other, expected) in zip(every_weight(offloaded.bridge), every_weight(whole.bridge), strict=True):
        assert name == other
        assert torch.equal(weight, expected), name
    for place, other in zip(offloaded.arch.places, whole.arch.places, strict=True):
        assert (place.name, place.problem) == (other.name, other.problem)


def test_weights_that_are_fetched_are_not_edited(models: tuple[Model, Model]) -> None:
    offloaded, whole = models
    edit = weight_edit.neuron_row(whole, 1, 0, torch.ones(whole.arch.d_model))
    with pytest.raises(InterventionError, match=r"kept elsewhere .* Load it on one device"), weight_edit.edited(offloaded, edit):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sites"), [("exact", ["resid_pre", "z"]), ("relp", ["resid_pre", "mlp_post"]), ("relp", "edges"), ("exact", "edges"), ("gim", "z")]
)
def test_scores_are_those_of_the_undivided_model(models: tuple[Model, Model], name: str, sites: str | list[str]) -> None:
    found, expected = (get_method(name).run(model, swap_task(), sites, progress=False) for model in models)
    assert found.provenance["engine"] == expected.provenance["engine"]
    for site in expected.sites:
        values = expected.data[site].to_numpy()
        np.testing.assert_allclose(found.data[site].to_numpy(), values, atol=1e-5 * np.nanmax(np.abs(values)), err_msg=site)


@pytest.mark.slow
def test_edits_lenses_and_circuits_are_those_of_the_undivided_model(models: tuple[Model, Model]) -> None:
    task = swap_task(metric="neg_kl")
    edit = pl.Edit("L1.z", pl.sources.zero())
    logits = [model.run(task.prompts("clean"), edits=edit).logits for model in models]
    torch.testing.assert_close(*logits)
    read = [lenses.logit_lens().read(model, swap_task(), top=2).data["top_probability"] for model in models]
    np.testing.assert_allclose(*read, atol=1e-6)
    scores = get_method("relp").run(models[1], swap_task(4, seed=9), "edges", progress=False, direction="noising")
    found = [pl.circuits.evaluate(model, pl.circuits.top_n(scores, 60), task, progress=False, n_boot=10).table for model in models]
    np.testing.assert_allclose(*(table.select_dtypes("number").to_numpy() for table in found), atol=1e-4)


def test_what_cannot_work_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = {"": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ModelError, match="says where weights are kept, and so does device="):
        load_model(folder, device="cpu", device_map=disk)
    with pytest.raises(ModelError, match="a model in memory"):
        load_model(zoo_module("llama", layers=1), device_map=disk)
    monkeypatch.setattr("patchlab.models.model.is_offloaded", lambda bridge: True)
    with pytest.raises(ModelError, match="is in bfloat16.*dtype='float32'"):
        load_model(folder, dtype="bfloat16")
    lost = torch.nn.Linear(2, 2, device="meta")
    assert fetched(torch.nn.Linear(2, 2, bias=False), "bias") is None
    with pytest.raises(ModelError, match="the weight weight of a Linear holds no numbers"):
        fetched(lost, "weight")


def test_several_devices_are_refused() -> None:
    with elsewhere():
        bridge = bridge_module(zoo_module("gpt2", layers=1).to(NAME), "spread")
        bridge.blocks[0].mlp.original_component.to(f"{NAME}:1")
        with pytest.raises(ModelError, match=f"spread runs on {NAME}:0, {NAME}:1; .* meet on one device"):
            wrap_bridge(bridge, "spread")
