"""The grammar of sites: what is read, how it is printed, and what is said about text that is not a site."""

import inspect
from typing import Any

import pytest
from families import model_of
from hypothesis import given, settings
from hypothesis import strategies as st

import patchlab as pl
from patchlab.errors import SiteError
from patchlab.sites import KINDS, Site, SiteKind, parse_sites

ACTIVATIONS = [kind for kind in KINDS.values() if kind.granularities is None]
ADDRESSED = [kind for kind in ACTIVATIONS if not kind.points]
LAYERED = [kind for kind in KINDS if "layer" in KINDS[kind].axes and not (KINDS[kind].of or KINDS[kind].points)]


POSITIONS = st.none() | st.lists(st.integers(-50, 50) | st.sampled_from(["END", "S1", "a-b", "x_2"]), min_size=1, max_size=3).map(tuple)
NUMBER = st.none() | st.integers(0, 99)


@settings(deadline=None)
@given(kind=st.sampled_from(ACTIVATIONS), kept=st.tuples(*[st.booleans()] * 4))
def test_a_printed_sweep_is_read_back(kind: SiteKind, kept: tuple[bool, ...]) -> None:
    site = Site(kind.name, (kind.axes[0], *(axis for axis, keep in zip(kind.axes[1:], kept, strict=False) if keep)))
    assert Site.parse(str(site)) == site


@settings(deadline=None)
@given(kind=st.sampled_from(ADDRESSED), layer=st.integers(0, 99), index=NUMBER, pos=POSITIONS, src=POSITIONS)
def test_a_printed_address_is_read_back(kind: SiteKind, layer: int, index: int | None, pos: Any, src: Any) -> None:
    axes = set(kind.axes)
    site = Site(
        kind.name,
        (),
        layer=layer if "layer" in axes else None,
        index=index if axes & {"head", "kv_head", "neuron", "feature"} else None,
        pos=pos,
        src=src if "src" in axes else None,
    )
    # the bare input prints as the sweep over its positions: it has no layer to tell them apart
    assert Site.parse(str(site)) == (Site("input", ("pos",)) if site == Site("input", ()) else site)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resid_pre", Site("resid_pre", ("layer", "pos"))),
        ("input", Site("input", ("pos",))),
        ("z", Site("z", ("layer", "head"))),
        ("v", Site("v", ("layer", "kv_head"))),
        ("z[layer,pos,head]", Site("z", ("layer", "pos", "head"))),
        (" z[layer, pos] ", Site("z", ("layer", "pos"))),
        ("pattern[layer,head,dest,src]", Site("pattern", ("layer", "head", "dest", "src"))),
        ("mlp_post[layer]", Site("mlp_post", ("layer",))),
        ("L9.H6.z@END", Site("z", (), layer=9, index=6, pos=("END",))),
        ("L3.resid_pre@4", Site("resid_pre", (), layer=3, pos=(4,))),
        ("L3.resid_pre@-1", Site("resid_pre", (), layer=3, pos=(-1,))),
        ("L3.resid_pre@S1,S2", Site("resid_pre", (), layer=3, pos=("S1", "S2"))),
        ("L2.N17.mlp_post", Site("mlp_post", (), layer=2, index=17)),
        ("L5.H1.pattern@END<S1", Site("pattern", (), layer=5, index=1, pos=("END",), src=("S1",))),
        ("L5.H1.pattern@*<S1,2", Site("pattern", (), layer=5, index=1, src=("S1", 2))),
        ("L5.pattern@END<*", Site("pattern", (), layer=5, pos=("END",))),
        ("input@0", Site("input", (), pos=(0,))),
        ("features", Site("features", ("layer", "feature"))),
        ("features[layer,pos,feature]", Site("features", ("layer", "pos", "feature"))),
        ("features.resid_post", Site("features.resid_post", ("layer", "feature"))),
        ("features.z[layer,pos,feature]", Site("features.z", ("layer", "pos", "feature"))),
        ("error", Site("error", ("layer",))),
        ("error.mlp_out[layer,pos]", Site("error.mlp_out", ("layer", "pos"))),
        ("L3.F512.resid_post", Site("features.resid_post", (), layer=3, index=512)),
        ("L3.F512.features.resid_post", Site("features.resid_post", (), layer=3, index=512)),
        ("L3.F512.z@END", Site("features.z", (), layer=3, index=512, pos=("END",))),
        ("L3.F512.mlp_out@S1,S2", Site("features.mlp_out", (), layer=3, index=512, pos=("S1", "S2"))),
        ("L3.F512.resid_mid@-1", Site("features.resid_mid", (), layer=3, index=512, pos=(-1,))),
        ("L3.features.attn_out", Site("features.attn_out", (), layer=3)),
        ("L3.error.resid_post", Site("error.resid_post", (), layer=3)),
        ("L3.error.resid_post@END", Site("error.resid_post", (), layer=3, pos=("END",))),
    ],
)
def test_read(text: str, expected: Site) -> None:
    assert Site.parse(text) == expected
    assert Site.parse(expected) is expected


@pytest.mark.parametrize(
    "text", ["L3.F512.resid_post@END", "L3.error.resid_post", "L3.features.z@1,-1", "features.mlp_out[layer,pos,feature]", "error.z", "features"]
)
def test_names_of_features_are_printed_as_they_are_written(text: str) -> None:
    assert str(Site.parse(text)) == text


def test_default_granularity_is_not_printed_but_others_are() -> None:
    assert [str(Site.parse(text)) for text in ("z[layer,head]", "z[layer]", "L3.resid_pre@*")] == ["z", "z[layer]", "L3.resid_pre"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resid_pree", r"unknown site 'resid_pree'; did you mean 'resid_pre'\? Valid: attn_out, edges, error, features, input, k, "),
        ("L3.attnout", r"unknown site 'attnout'; did you mean 'attn_out'\?"),
        ("z[layer,neuron]", r"z has the axes \['layer', 'pos', 'head'\]; got \['layer', 'neuron'\]"),
        ("z[layer,layer]", r"got \['layer', 'layer'\]. Name each of the axes to score once"),
        ("z[]", r"z has the axes .*; got \[''\]"),
        ("k[layer,head]", r"k has the axes \['layer', 'pos', 'kv_head'\]"),
        ("z[head]", r"the granularity of z needs the axis layer; got \['head'\]"),
        ("z[layer,head,pos]", r"write the axes of z in the order \['layer', 'pos', 'head'\]; got \['layer', 'head', 'pos'\]"),
        ("H6.z@END", r"the address 'H6.z@END' lacks its layer; write L0.H6.z@END"),
        ("resid_pre@3", r"the address 'resid_pre@3' lacks its layer; write L0.resid_pre@3"),
        ("L3.input", r"input has no layers; drop L3"),
        ("L3.H2.mlp_out", r"mlp_out has no heads; drop H2. Sites with heads: z, q, k, v, pattern"),
        ("L3.N2.z", r"z has no neurons; drop N2. The site with neurons is mlp_post"),
        ("L3.z@END<S1", r"z has no source positions; the '<' belongs to pattern"),
        ("L3.H1.N2.z", r"cannot read the site 'L3.H1.N2.z'. Write a kind \(input, resid_pre, .*\), a kind with axes .* or an address"),
        ("L3.z@", r"cannot read the site 'L3.z@'"),
        ("L3.F2.pattern", r"pattern has no features; drop F2. Sites with features: resid_pre, resid_mid, resid_post, attn_out, z, mlp_out"),
        ("L3.H1.error.z", r"error.z has no heads; drop H1"),
        ("L3.error", r"an address names the point as well, as in L3.error.resid_post; got error without one of resid_pre, resid_mid, "),
        ("L3.F7.features", r"an address names the point as well, as in L3.F512.resid_post; got features without"),
        ("features.resid", r"unknown site 'features.resid'; did you mean 'features.resid_"),
        ("error[layer,feature]", r"error has the axes \['layer', 'pos'\]; got \['layer', 'feature'\]"),
        ("L3.F2.resid_post@END<S1", r"features.resid_post has no source positions"),
        ("L3.z@*,END", r"cannot read the site 'L3.z@\*,END'"),
        ("", r"cannot read the site ''"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        Site.parse(text)


def test_sites_built_by_hand_are_checked_too() -> None:
    with pytest.raises(SiteError, match=r"an address of z needs its layer, as in L3\.z"):
        Site("z", ())
    with pytest.raises(SiteError, match=r"z has the axes \['layer', 'head'\] to score and is narrowed as well"):
        Site("z", ("layer", "head"), index=3)
    with pytest.raises(SiteError, match="narrowed as well"):
        Site("z", ("layer", "head"), layer=3)
    with pytest.raises(SiteError, match="unknown site 'Z'"):
        Site("Z", ("layer",))


def test_lists_of_sites() -> None:
    assert [str(site) for site in parse_sites("resid_pre, z[layer,pos,head],z")] == ["resid_pre", "z[layer,pos,head]", "z"]
    assert parse_sites(["z", Site.parse("v")]) == (Site.parse("z"), Site.parse("v"))
    assert parse_sites(Site.parse("v")) == (Site.parse("v"),)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([], r"no sites given. Name at least one of: input, resid_pre"),
        (["z", "q", "z"], r"the site z is named twice"),
        (["z", "z[layer,head]"], r"the site z is named twice"),
        ("L3.z", r"L3.z is an address; a sweep scores a whole kind, such as z"),
        ("z,", r"cannot read the site ''"),
    ],
)
def test_messages_about_lists(sites, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        parse_sites(sites)


def test_things_that_are_no_sites() -> None:
    # unwrapped: the shape checks of the test run would be faster than the message
    with pytest.raises(SiteError, match=r"a site is a string such as 'resid_pre' or 'L9.H6.z@END'; got 3"):
        inspect.unwrap(Site.parse)(3)
    with pytest.raises(SiteError, match=r"sites are a name such as 'resid_pre', or a list of names; got 3"):
        inspect.unwrap(parse_sites)(3)


@pytest.mark.parametrize("kind", LAYERED)
def test_absent_parts_of_a_model_are_refused(kind: str) -> None:
    arch = model_of("llama").arch
    with pytest.raises(SiteError, match=r"names layer 3, but this model has 3 \(layer 0 to 2\)"):
        arch.check(Site.parse(f"L3.{kind}"))
    axes = set(KINDS[kind].axes)
    if "head" in axes:
        with pytest.raises(SiteError, match=r"names head 4, but this model has 4 \(head 0 to 3\)"):
            arch.check(Site.parse(f"L0.H4.{kind}"))
    if "kv_head" in axes:
        with pytest.raises(SiteError, match=r"names head 2, but this model has 2 \(kv_head 0 to 1\)"):
            arch.check(Site.parse(f"L0.H2.{kind}"))
    if "neuron" in axes:
        with pytest.raises(SiteError, match=r"names neuron 12, but this model has 12 \(neuron 0 to 11\)"):
            arch.check(Site.parse(f"L0.N12.{kind}"))
    arch.check(Site.parse(f"L2.{kind}"))


@pytest.mark.parametrize("axes", KINDS["edges"].granularities or ())
def test_edges_are_scored_at_three_granularities(axes: tuple[str, ...]) -> None:
    assert Site.parse(str(Site("edges", axes))).axes == axes


@pytest.mark.parametrize("text", ["edges[writer]", "edges[writer,reader,dest]", "edges@3", "edges<3"])
def test_edges_have_no_other_granularity_and_no_address(text: str) -> None:
    with pytest.raises(SiteError, match="scored as a whole, as one of edges\\[writer,reader\\], |cannot read"):
        Site.parse(text)


def test_public_names() -> None:
    assert pl.Site is Site
    assert pl.Site.parse is Site.parse


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a9.h6", "L9.H6.z"), ("L9.H6", "L9.H6.z"), ("A9.H6", "L9.H6.z"), ("l9.h6.q@END", "L9.H6.q@END"), ("a9.h6@S1,S2", "L9.H6.z@S1,S2"),
        ("m3", "L3.mlp_out"), ("M3@END", "L3.mlp_out@END"), ("a5.h1.pattern@END<S1", "L5.H1.pattern@END<S1"),
    ],
)  # fmt: skip
def test_names_of_nodes_are_addresses(text, address):
    assert str(Site.parse(text)) == address
    assert Site.parse(text) == Site.parse(address)


@pytest.mark.parametrize("text", ["a9", "h6", "a9.h", "m", "a9.m3", "a9.h6.resid_pre", "L9.H6.h"])
def test_half_names_of_nodes_are_refused(text):
    with pytest.raises(SiteError):
        Site.parse(text)
