"""Cells of score maps by their addresses."""

import re
from typing import Any

import numpy as np
import pytest
from families import mixed_task, model_of, swap_task

import patchlab as pl
from patchlab.errors import ScoreError, SiteError
from patchlab.scores.addresses import address_of

SITES = ["z", "z[layer,pos,head]", "v", "resid_pre", "pattern[layer,head,dest,src]", "mlp_out", "mlp_post", "input"]


def scores_of(sites: Any, task: Any = None, family: str = "llama") -> pl.ScoreMap:
    return pl.AttributionPatching().run(model_of(family), task or swap_task(n=3), sites, progress=False)


@pytest.fixture(scope="module")
def scores() -> pl.ScoreMap:
    return scores_of(SITES)


@pytest.fixture(scope="module")
def edges() -> pl.ScoreMap:
    return scores_of("edges[writer,reader,pos]")


@pytest.mark.parametrize(
    ("address", "site", "cell"),
    [
        ("L1.H2.z", "z", (1, 2)),
        ("a1.h2", "z", (1, 2)),
        ("A1.H2", "z", (1, 2)),
        ("L1.H2", "z", (1, 2)),
        ("L1.H2.z@3", "z[layer,pos,head]", (1, 3, 2)),
        ("a1.h2@END", "z[layer,pos,head]", (1, 4, 2)),
        ("L2.H1.v", "v", (2, 1)),
        ("L0.resid_pre@4", "resid_pre", (0, 4)),
        ("L1.H0.pattern@4<2", "pattern[layer,head,dest,src]", (1, 0, 4, 2)),
        ("L1.H0.pattern@END<2", "pattern[layer,head,dest,src]", (1, 0, 4, 2)),
        ("m2@1", "mlp_out", (2, 1)),
        ("L0.N5.mlp_post", "mlp_post", (0, 5)),
        ("input@3", "input", (3,)),
    ],
)
def test_a_cell_by_its_address(scores: pl.ScoreMap, address: str, site: str, cell: tuple[int, ...]) -> None:
    found = scores.sel(address)
    assert found.dims == ("example",)
    assert np.array_equal(found, scores.data[site].to_numpy()[:, *cell])
    assert np.array_equal(scores.sel(pl.Site.parse(address)), found)


@pytest.mark.parametrize(
    ("address", "site", "dims", "at"),
    [
        ("L1.z", "z", ("example", "head"), (1,)),
        ("z", "z", ("example", "layer", "head"), ()),
        ("z[layer, pos, head]", "z[layer,pos,head]", ("example", "layer", "pos", "head"), ()),
        ("L1.z@3", "z[layer,pos,head]", ("example", "head"), (1, 3)),
        ("m1", "mlp_out", ("example", "pos"), (1,)),
        ("L1.H0.pattern@4", "pattern[layer,head,dest,src]", ("example", "src"), (1, 0, 4)),
    ],
)
def test_axes_that_an_address_leaves_open_stay(scores: pl.ScoreMap, address: str, site: str, dims: tuple[str, ...], at: tuple[int, ...]) -> None:
    found = scores.sel(address)
    assert found.dims == dims
    assert np.array_equal(found, scores.data[site].to_numpy()[:, *at])


def test_an_edge_by_its_name(edges: pl.ScoreMap) -> None:
    writer, reader = edges.graph.edge("a0.h1->m2")
    by_position = edges.data["edges[writer,reader,pos]"].to_numpy()[:, writer, reader]
    for name in ("a0.h1->m2", "L0.H1 -> m2"):
        assert np.array_equal(scores_of("edges").sel(name), scores_of("edges").data["edges"].to_numpy()[:, writer, reader])
        assert np.array_equal(edges.sel(name), by_position)
    assert np.array_equal(edges.sel("a0.h1->m2@3"), by_position[:, 3])
    assert np.array_equal(edges.sel("a0.h1->m2@END"), by_position[:, 4])
    between = scores_of("edges[writer,reader,dest,src]", family="gpt2")
    whole = between.data["edges[writer,reader,dest,src]"].to_numpy()[:, *between.graph.edge("m0->a1.h0<k>")]
    assert np.array_equal(between.sel("m0->a1.h0<k>@4<1"), whole[:, 4, 1])
    assert between.sel("m0->a1.h0<k>").dims == ("example", "dest", "src")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("L9.H1.z", "there is no layer 9 in z; it has 0 to 2"),
        ("L1.H9.z", "there is no head 9 in z; it has 0 to 3"),
        ("L1.H2.v", "there is no kv_head 2 in v; it has 0 to 1"),
        ("L1.H1.z@9", r"there is no pos 9 in z\[layer,pos,head\]; it has 0 to 4"),
        ("L1.H1.z@-1", "there is no pos -1"),
        ("L1.H1.z@EMD", "unknown position of L1.H1.z@EMD 'EMD'; did you mean 'END'"),
        ("L1.H1.z@1,END", "names 2 positions, and a cell is at one; name one of 1, END"),
        ("L1.H1.q", "needs a site q with the axes layer, head; this map has z, "),
        ("m1->logits", "m1->logits is an edge, and the map scores none"),
        ("q", "unknown site of this score map 'q'"),
    ],
)
def test_what_the_map_does_not_hold_is_said(scores: pl.ScoreMap, address: str, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        scores.sel(address)


def test_what_is_no_address_is_said(scores: pl.ScoreMap, edges: pl.ScoreMap) -> None:
    with pytest.raises(SiteError, match="cannot read the site 'L1..z'"):
        scores.sel("L1..z")
    with pytest.raises(SiteError, match="m2 is not computed before m1 reads"):
        edges.sel("m2->m1")
    with pytest.raises(ScoreError, match="needs a site mlp_out"):
        edges.sel("m1")


def test_named_positions_are_read_by_name() -> None:
    named = scores_of("z[layer,pos,head]", mixed_task())
    words = named.data["position"].to_numpy().tolist()
    assert "END" in words
    assert np.array_equal(named.sel("L1.H1.z@END"), named.data["z[layer,pos,head]"].to_numpy()[:, 1, words.index("END"), 1])
    with pytest.raises(ScoreError, match="the positions of this map are those with names; write "):
        named.sel("L1.H1.z@0")
    assert named.top(1)["address"][0].partition("@")[2] in words


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_cell_has_an_address_that_leads_to_it(family: str) -> None:
    for sites in (SITES, ["edges"], ["edges[writer,reader,pos]"]):
        for task in (swap_task(n=2), mixed_task()):
            wanted = [site for site in sites if task.position_axis().names is None or "dest" not in site]
            found = scores_of(wanted, task, family)
            for site in found.sites:
                cells = found.cells(site)[found.exists(site).to_numpy().ravel()]
                for cell in map(tuple, cells[:: max(1, len(cells) // 40)].tolist()):
                    address = address_of(found.data, site, cell)
                    assert np.array_equal(found.sel(address), found.data[site].to_numpy()[:, *cell]), address


def test_the_largest_cells(scores: pl.ScoreMap, edges: pl.ScoreMap) -> None:
    top = scores.top(10)
    assert list(top.columns) == ["address", "site", "effect", "low", "high"]
    everything = np.concatenate([scores.mean(site).to_numpy()[scores.live[site].to_numpy()] for site in scores.sites])
    np.testing.assert_allclose(top["effect"].abs(), np.sort(np.abs(everything))[::-1][:10])
    for row in top.to_dict("records"):
        assert float(scores.sel(row["address"]).mean()) == pytest.approx(row["effect"])
        assert row["low"] <= row["effect"] <= row["high"]
    assert set(scores.top(3, "z")["site"]) == {"z"}
    assert len(scores.top(10_000, "z")) == int(scores.live["z"].sum())
    assert re.fullmatch(r".*->.*", edges.top(1)["address"][0])
    one = scores_of("z", swap_task(n=1)).top(2)
    assert one[["low", "high"]].isna().all(axis=None)
    with pytest.raises(ScoreError, match="n is 0; ask for at least 1 cell"):
        scores.top(0)
    with pytest.raises(ScoreError, match="unknown site of this score map 'q'"):
        scores.top(2, "q")
    held = pl.RelevancePatching("relp-ah").run(model_of("gpt2"), swap_task(n=2), ["q", "z"], progress=False)
    assert set(held.not_scored) == {"q"} <= set(held.sites)
    assert set(held.top(500)["site"]) == {"z"}
