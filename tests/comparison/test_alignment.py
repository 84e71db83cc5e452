"""Alignment: which maps can be compared, and under which names."""

import numpy as np
import pytest
from score_maps import altered, make_map, random_map

from patchlab.comparison.alignment import check_names
from patchlab.comparison.compare import compare
from patchlab.errors import ScoreError
from patchlab.scores import Cost

SITES = ("resid_pre", "z")


def same(site: str, values: np.ndarray) -> np.ndarray:
    return values


@pytest.fixture(scope="module")
def exact():
    return random_map(*SITES, cost=Cost(40, 0, 9000, 3.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_fingerprint": "t1"}, r"cannot compare AtP with exact: the tasks differ \(toy t1 against toy t0\)"),
        ({"model_fingerprint": "m1", "model": "huge"}, r"the models differ \(huge m1 against tiny m0\)"),
        ({"direction": "noising"}, r"the directions differ \(noising against denoising\)"),
        ({"metric": "prob_diff"}, r"the metrics differ \(prob_diff against logit_diff\)"),
        ({"method_options": {"source": "zero"}}, r"the sources differ \(zero against paired\)"),
        ({"ambient": ["zero L0.z"]}, r"the surrounding interventions differ \(zero L0\.z against none\)"),
    ],
)
def test_unlike_provenance_is_refused(exact, changes, message):
    with pytest.raises(ScoreError, match=message):
        compare(exact, {"AtP": altered(exact, same, **changes)})


def test_unlike_maps_are_refused(exact):
    def refused(message: str, other) -> None:
        with pytest.raises(ScoreError, match=message):
            compare(exact, {"AtP": other})

    refused(r"the examples differ \(0, 1, 2, 3, 4, 5, 6 against 0, 1", random_map(*SITES, n=7))
    refused(r"the examples differ \(1, 2, 3, 4, 5, 6, 7, 8 against", random_map("z", "resid_pre", examples=range(1, 9)))
    refused(r"the sites differ \(z against resid_pre, z\)", random_map("z"))
    refused(r"the axes of resid_pre differ", random_map(*SITES, n_layers=4))
    refused(r"the position coordinates of resid_pre differ \(P0, P1, .* against none\)", random_map(*SITES, named=True))
    base = exact.data.metric_clean.to_numpy()
    refused(r"the unpatched metrics \[clean, corrupted\] differ", random_map(*SITES, clean=base + 0.1))
    live = {site: mask.to_numpy().copy() for site, mask in exact.live.items()}
    live["z"][0, 1] = False
    refused("structural zeros of z differ in 1 cells", make_map({site: exact.data[site].to_numpy() for site in SITES}, live=live))


def test_small_differences_of_the_baselines_are_rounding(exact):
    base = exact.data["metric_clean"].to_numpy()
    compare(exact, {"x": random_map(*SITES, clean=base + 1e-5)}, n_boot=2)
    half = {"clean": base + 0.05, "dtype": "bfloat16"}
    compare(exact, {"x": random_map(*SITES, **half)}, n_boot=2)


@pytest.mark.parametrize("name", ["", "  ", 3, None])
def test_a_method_needs_a_name(name):
    with pytest.raises(ScoreError, match="a method needs a name to appear under; got"):
        check_names("exact", ["AtP", name])


def test_names_are_taken_once(exact):
    with pytest.raises(ScoreError, match=r"the name 'exact' is taken \(the reference has it\)"):
        compare(exact, {"exact": exact})
    with pytest.raises(ScoreError, match=r"the name 'AtP ' is taken \(it is given twice\)"):
        compare(exact, {"AtP": exact, "AtP ": exact})
    with pytest.raises(ScoreError, match="nothing to compare with the reference"):
        compare(exact, {})
