"""Cells that share a run: which they are, that each has its own effect, and that what is finished stays as it was."""

import numpy as np
import pytest
from dictionary_cells import attached, cells, run
from families import swap_task

from patchlab.methods import ActivationPatching
from patchlab.methods.cells.packs import Changed, Unpacked, packs_of


def rows(text: str) -> np.ndarray:
    return np.array([letter == "x" for letter in text])


def test_sets_of_one_place_that_change_different_rows_share_a_run() -> None:
    sets = [Changed("a", rows("xx..")), None, Changed("a", rows(".x..")), Changed("a", rows("..x.")), Changed("b", rows("..xx"))]
    sets += [Changed("a", rows("...x")), Changed("a", rows("x...")), Changed("a", rows("...."))]
    assert packs_of(sets) == [[0, 3, 5, 7], [1], [2, 6], [4]]


def test_effects_of_a_pack_are_those_of_its_sets() -> None:
    sets, finished, counted = [Changed("a", rows("xx.")), Changed("a", rows("..x")), None], {}, []
    found = Unpacked(finished, packs_of(sets), sets, counted.append)
    found.update({0: np.array([1.0, 2.0, 3.0])})
    assert {i: value.tolist() for i, value in finished.items()} == {0: [1, 2, 0], 1: [0, 0, 3]}
    assert (list(found), len(found), counted, found[0].tolist()) == ([0], 1, [1], [1, 2, 3])
    assert 1 not in found
    del found[0]
    assert not finished


@pytest.mark.parametrize("kind", ["jumprelu", "cross_layer", "topk"])
def test_features_that_share_runs_have_the_effects_of_whole_passes(kind: str) -> None:
    task, site = swap_task(n=4), "features[layer,pos,feature]"
    with attached("gpt2", kind) as model:
        fast = run(ActivationPatching(), model, task, [site])
        whole = run(ActivationPatching(engine="literal"), model, task, [site])
    got, expected = cells(fast, site), cells(whole, site)
    assert got.keys() == expected.keys()
    for cell, effects in expected.items():
        np.testing.assert_allclose(got[cell], effects, atol=1e-9)
    if kind != "cross_layer":  # its edits reach several blocks, and go through whole passes
        assert sum(bool((effects == 0).any()) for effects in got.values()) > 5, "features that some prompts do not have"
        assert fast.cost.forwards < 0.95 * whole.cost.forwards


def test_what_was_finished_is_taken_and_the_rest_is_not_changed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchlab.methods.cells import features as module

    task, site, seen = swap_task(n=4), "features[layer,pos,feature]", []
    original = module.patched

    def recording(setting, runs, meter, edits, **options):
        seen.append((setting, runs, meter, edits, options))
        return original(setting, runs, meter, edits, **options)

    monkeypatch.setattr(module, "patched", recording)
    with attached("gpt2", "jumprelu") as model:
        run(ActivationPatching(), model, task, [site])
        setting, runs, meter, edits, options = seen[0]
        whole = dict(options["finished"].finished.items())
        packs = options["finished"].packs
        assert any(len(pack) > 1 for pack in packs)
        # all sets of the packs but the last one of the first pack of several
        several = next(pack for pack in packs if len(pack) > 1)
        finished = {i: value for i, value in whole.items() if i != several[-1]}
        marked = several[0]
        again = Unpacked(finished, packs, options["finished"].sets)
        before = meter.forwards
        original(setting, runs, meter, edits, engine="auto", finished=again)
        assert meter.forwards > before, "the pack that is not whole is run"
        np.testing.assert_array_equal(finished[several[-1]], whole[several[-1]])
        np.testing.assert_array_equal(finished[marked], whole[marked])
