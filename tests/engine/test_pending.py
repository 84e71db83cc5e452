"""The host does not wait for the device while a sweep goes on, and memory that runs out makes parts smaller and nothing else."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import model_of, swap_task
from other_device import NAME, elsewhere

import patchlab as pl
from patchlab.engine import pending
from patchlab.engine.pending import Pending, Room, in_parts, is_out_of_memory
from patchlab.errors import ModelError
from patchlab.methods import get_method
from patchlab.methods.setting.batches import cut_as, halved
from patchlab.models import Model, bridge_module, wrap_bridge
from patchlab.scores import ScoreMap
from patchlab.testing.dictionaries import random_dictionary
from patchlab.testing.zoo import zoo_module

FEATURES = "features[layer,pos,feature]"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """What a run on the device makes the host wait for."""
    monkeypatch.setattr(pending, "SECONDS", 1e9)
    with elsewhere() as device:
        model = wrap_bridge(bridge_module(zoo_module("gpt2", layers=2).to(NAME), "gpt2"), "gpt2")
        model.add_dictionaries([random_dictionary(model, layer=layer, width=8, seed=layer) for layer in range(2)])
        tested = set[str]()

        def run(name: str, sites: Any, pairs: int = 2, longer: int = 0) -> list[str]:
            for _ in range(2 - (f"{name} {sites}" in tested)):  # what a model is tested for at its first run with a method is found once
                device.waits.clear()
                get_method(name).run(model, swap_task(pairs, length=5 + longer), sites, progress=False)
            tested.add(f"{name} {sites}")
            return list(device.waits)

        yield run


RUNS = [("exact", "z[layer,pos,head]"), ("exact", "edges"), ("exact", FEATURES), ("relp", ["z", "mlp_post"]), ("relp", "edges")]


@pytest.mark.slow
def test_waits_do_not_grow_with_cells_or_examples(waits: Callable[..., list[str]]) -> None:
    for name, sites in RUNS:
        few = waits(name, sites)
        assert len(few) <= 40, (name, sites)
        assert sorted(waits(name, sites, pairs=5, longer=2)) == sorted(few), (name, sites)


def test_values_are_read_at_the_end_and_in_one_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "SECONDS", 1e9)
    found: list[tuple[list[int], list[list[float]]]] = []
    with elsewhere() as device:
        with Pending(lambda numbers, values: found.append((numbers, values.tolist())), "not finite") as values:
            for i in range(3):
                values.add([i], torch.full((1, 2), float(i)).to(NAME))
            device.waits.clear()
            assert not found
        assert device.waits == ["cpu"]
    assert found == [([i], [[i, i]]) for i in range(3)]
    with pytest.raises(ModelError, match="not finite"), Pending(None, "not finite") as values:
        values.add([0], torch.tensor([[torch.nan]]))
    with pytest.raises(KeyboardInterrupt), elsewhere(), Pending(lambda *one: found.append(one), "") as values:
        values.add([7], torch.ones(1, 1).to(NAME))
        raise KeyboardInterrupt
    assert found[-1][0] == [7]


def _with_room(room: int) -> Callable[[Any], int]:
    def run(items: Any) -> int:
        if len(items) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return len(items)

    return run


def test_parts_are_halved_where_memory_runs_out() -> None:
    room = Room()
    assert [(list(part), found) for part, found in in_parts(_with_room(3), list(range(10)), room)] == [
        ([0, 1], 2),
        ([2, 3], 2),
        ([4], 1),
        ([5, 6], 2),
        ([7, 8], 2),
        ([9], 1),
    ]
    assert room.most == 2
    assert [found for _, found in in_parts(_with_room(2), list(range(5)), room)] == [2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        list(in_parts(_with_room(0), [1, 2], Room()))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Small:
    """A model's blocks on a device with room for so many rows × positions; more raise, as CUDA does."""

    def __init__(self, model: Model, room: int) -> None:
        self.model, self.room, self.refused = model, room, 0

    def __enter__(self) -> "Small":
        self.handle = self.model.bridge.blocks[1].register_forward_pre_hook(self._look)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _look(self, module: Any, inputs: Any) -> None:
        if inputs[0].shape[0] * inputs[0].shape[1] > self.room:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def _numbers(scores: ScoreMap) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in scores.data.data_vars.items()}


@pytest.mark.parametrize(
    ("name", "sites"), [("exact", "z[layer,pos,head]"), ("exact", "edges"), ("relp", ["resid_pre", "z"]), ("relp", "edges"), ("ig:2", "mlp_out")]
)
def test_a_run_goes_on_in_smaller_parts(name: str, sites: Any) -> None:
    model, task, method = model_of("gpt2", layers=2), swap_task(6), get_method(name)
    whole = method.run(model, task, sites, progress=False)
    with Small(model, 12) as small:
        found = method.run(model, task, sites, progress=False)
    assert small.refused
    for key, values in _numbers(whole).items():
        np.testing.assert_allclose(_numbers(found)[key], values, atol=1e-5, err_msg=key)
    assert any(note.startswith("memory ran out") for note in found.provenance["notes"])
    assert not any(note.startswith("memory") for note in whole.provenance["notes"])
    with Small(model, 2), pytest.raises(torch.OutOfMemoryError) as caught:
        method.run(model, task, sites, progress=False)
    assert "one example" in caught.value.__notes__[0]


def test_circuits_go_on_in_smaller_parts() -> None:
    model, task = model_of("gpt2", layers=2), swap_task(6, metric="neg_kl")
    scores = get_method("relp").run(model, swap_task(6, seed=30), "edges", progress=False, direction="noising")
    options: dict[str, Any] = {"progress": False, "n_boot": 10, "sizes": [4, 20]}
    whole = pl.circuits.faithfulness_curve(model, scores, task, **options)
    with Small(model, 32) as small:
        found = pl.circuits.faithfulness_curve(model, scores, task, **options)
    assert small.refused
    for one, other in zip(found.table.select_dtypes("number").to_numpy(), whole.table.select_dtypes("number").to_numpy(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_run_that_was_halved_is_resumed(tmp_path: Any) -> None:
    """Its finished batches are smaller than those that the same call would make."""
    model, task, method = model_of("gpt2", layers=2), swap_task(6), get_method("relp")
    whole = method.run(model, task, "z", progress=False)
    calls = {"left": 5}

    def stop(module: Any, inputs: Any) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt

    handle = model.bridge.blocks[0].register_forward_pre_hook(stop)
    with Small(model, 12), pytest.raises(KeyboardInterrupt):
        method.run(model, task, "z", progress=False, checkpoint=tmp_path / "kept")
    handle.remove()
    assert (tmp_path / "kept").is_file()
    resumed = method.run(model, task, "z", progress=False, checkpoint=tmp_path / "kept")
    for key, values in _numbers(whole).items():
        np.testing.assert_allclose(_numbers(resumed)[key], values, atol=1e-5, err_msg=key)


def test_batches_keep_their_examples() -> None:
    batches = swap_task(7).batches(4)
    assert [batch.examples.tolist() for batch in cut_as(batches, [2, 2, 1])] == [[0, 1], [2, 3], [4], [5, 6]]
    assert [batch.examples.tolist() for batch in cut_as(batches, [])] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [batch.examples.tolist() for batch in halved(batches, 1)] == [[0, 1, 2, 3], [4, 5], [6]]
    for batch in halved(batches, 0):
        whole = batches[int(batch.examples[0]) // 4]
        rows = [whole.examples.tolist().index(one) for one in batch.examples.tolist()]
        assert torch.equal(batch.clean, whole.clean[rows])
        assert torch.equal(batch.answers.correct, whole.answers.correct[rows])
