"""The saved page, opened from its file with the network cut off."""

import numpy as np
import pytest
from families import mixed_task, model_of
from view import SOUND, View

import patchlab as pl

SITES = ["resid_pre", "z[layer,pos,head]", "mlp_out"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Maps of a packaged model with grouped heads, their circuit, and the page without an exact map."""
    model = pl.load_model("demo-llama", device="cpu")
    task = pl.load_task("ioi", model, n=8)
    maps = {"AtP": pl.AttributionPatching(), "RelP": pl.RelevancePatching()}
    found = {name: method.run(model, task, [*SITES, "k"], progress=False) for name, method in maps.items()}
    noising = pl.RelevancePatching().run(model, task, [*SITES, "k"], direction="noising", progress=False)
    circuit = pl.circuits.top_n(pl.RelevancePatching().run(model, task, "edges", direction="noising", progress=False), 40)
    explorer = pl.explore(model, task, {**found, "RelP noising": noising}, circuit=circuit)
    page = explorer.save_html(tmp_path_factory.mktemp("page") / "page.html", exact=12, progress=False)
    assert page.stat().st_size < 10_000_000
    exact = pl.ActivationPatching().run(model, task, SITES, progress=False)
    return page.as_uri(), found, noising, exact, task


@pytest.fixture(scope="module")
def strongest(made):
    """The head with the largest estimate: layer, position, head."""
    return largest(made[1]["AtP"], "z[layer,pos,head]")


def largest(scores, site):
    """The cell with the largest mean effect."""
    values = np.abs(scores.mean(site).to_numpy())
    return np.unravel_index(int(values.argmax()), values.shape)


def test_a_clicked_cell_shows_its_numbers_and_its_exact_patch(made, opened, strongest):
    address, maps, _, exact, task = made
    layer, pos, head = map(int, strongest)
    site, heads = "z[layer,pos,head]", maps["AtP"].data.sizes["head"]
    with opened(address, network=False) as page:
        view = View(page).ready()
        view.choose("site", site)
        view.click(pos, layer * heads + head)
        name = maps["AtP"].data["position"].to_numpy()[pos] or pos
        view.wait_for(f"L{layer}.H{head}.z@{name}")
        for method, scores in maps.items():
            assert view.effect(method) == pytest.approx(float(scores.mean(site)[layer, pos, head]), rel=1e-6)
        assert view.tokens("clean", "here") == [task.token_text(task.pairs[0].clean_ids[pos]).strip()]
        changed = [a != b for a, b in zip(task.pairs[0].clean_ids, task.pairs[0].corrupted_ids, strict=True)]
        assert len(view.tokens("corrupted", "changed")) == sum(changed)
        view.part("patch").click()
        page.wait_for_selector(".plx tr[data-method=patched]")
        assert view.effect("patched") == pytest.approx(float(exact.mean(site)[layer, pos, head]), rel=1e-3)
        assert f"Attention of a{layer}.h{head}, mean over examples" in view.part("cell").inner_text()
        assert len(view.drawn("scatter")[1]["x"]) == 1, "the cell that was patched"
        # one example
        view.choose("view", "one")
        view.part("example").fill("5")
        view.part("example").press("Enter")
        page.wait_for_selector(".plx tr[data-method=AtP] [data-role=one]")
        page.wait_for_function("document.querySelector('.plx [data-role=prompts]').innerText.includes('example 5')")
        assert view.effect("AtP", "one") == pytest.approx(float(maps["AtP"].data[site][5, layer, pos, head]), rel=1e-5)
        assert view.effect("patched", "one") == pytest.approx(float(exact.data[site][5, layer, pos, head]), rel=1e-3, abs=1e-4)
        z = view.drawn("heatmap")[1]["z"]
        assert z[layer * heads + head][pos] == pytest.approx(float(maps["AtP"].data[site][5, layer, pos, head]), rel=1e-5)


def test_a_site_a_method_and_a_direction_are_those_chosen(made, opened):
    address, maps, noising, _, _ = made
    layer, pos = map(int, largest(maps["AtP"], "resid_pre"))
    with opened(address, network=False) as page:
        view = View(page).ready()
        view.click(pos, layer)
        shown = view.label
        assert shown.startswith(f"L{layer}.resid_pre@")
        view.choose("method", "RelP")
        assert view.label == shown, "another method keeps the cell"
        assert view.drawn("heatmap")[1]["z"][layer][pos] == pytest.approx(float(maps["RelP"].mean("resid_pre")[layer, pos]), rel=1e-6)
        limits = [(one["zmin"], one["zmax"]) for one in view.drawn("heatmap")[1:]]
        assert limits[0][0] == -limits[0][1], "0 is in the middle"
        view.choose("method", "AtP")
        assert [(one["zmin"], one["zmax"]) for one in view.drawn("heatmap")[1:]] == limits, "one scale for all methods"
        view.choose("site", "mlp_out")
        assert view.label == "", "another site has no selection yet"
        view.choose("site", "resid_pre")
        view.click(pos, layer)
        view.choose("direction", "noising")
        assert view.label == shown
        assert view.effect("RelP noising") == pytest.approx(float(noising.mean("resid_pre")[layer, pos]), rel=1e-6)
        assert page.locator(".plx tr[data-method=AtP]").count() == 0, "nothing of the other direction is left"


def test_heads_that_share_a_key_are_told_apart_from_it(made, opened):
    with opened(made[0], network=False) as page:
        view = View(page).ready()
        view.choose("site", "k")
        live = made[1]["AtP"].live["k"].to_numpy()
        layer, head = np.argwhere(live)[-1]
        view.click(int(head), int(layer))
        view.wait_for(f"L{layer}.H{head}.k")
        share = 4 // live.shape[1]
        names = [f"a{layer}.h{h}" for h in range(head * share, (head + 1) * share)]
        assert page.locator(".plx [data-role=head] option").all_inner_texts() == names
        assert view.part("circuit").get_attribute("data-nodes") == " ".join(names)


def test_neurons_add_up_to_the_cell(made, opened):
    scores = made[1]["RelP"]
    with opened(made[0], network=False) as page:
        view = View(page).ready()
        view.choose("site", "mlp_out")
        view.choose("method", "RelP")
        layer, pos = largest(scores, "mlp_out")
        view.click(int(pos), int(layer))
        page.wait_for_selector(".plx [data-role=neurons]")
        assert view.number("[data-role=neurons] tr[data-label='sum of all']") == pytest.approx(float(scores.mean("mlp_out")[layer, pos]), rel=1e-3)


def test_heatmap_scatter_and_circuit_share_their_selection(made, opened, strongest):
    layer, pos, head = map(int, strongest)
    with opened(made[0], network=False) as page:
        view = View(page).ready()
        view.choose("site", "z[layer,pos,head]")
        view.part("largest-2").click()
        view.click(pos, layer * 4 + head)
        view.part("patch").click()
        page.wait_for_selector(".plx tr[data-method=patched]")
        assert view.part("circuit").get_attribute("data-nodes") == f"a{layer}.h{head}"
        shown = view.label
        page.keyboard.press("Escape")
        view.choose("site", "mlp_out")
        names = next(one for one in view.drawn("circuit") if (one.get("meta") or {}).get("circuit") == "names" and one.get("visible") is not False)
        nodes = zip(names["meta"]["nodes"], names["meta"]["places"], strict=True)
        name, place = next((name, place) for name, place in nodes if name.startswith("a"))
        view.click(place[0], place[1] + 5, "circuit")
        page.wait_for_function("document.querySelector('.plx').dataset.cell.includes('.z@')")
        assert view.label.startswith(f"L{name[1:].split('.')[0]}.H{name.split('.h')[1]}.z@")
        view.click(pos, layer * 4 + head)
        point = view.drawn("scatter")[1]
        view.choose("site", "resid_pre")
        view.choose("site", "z[layer,pos,head]")
        assert view.label == ""
        view.click(point["x"][0], point["y"][0], "scatter")
        view.wait_for(shown)


def test_cells_together_are_those_that_the_page_has(made, opened):
    with opened(made[0], network=False) as page:
        view = View(page).ready()
        view.choose("site", "z[layer,pos,head]")
        view.part("largest-5").click()
        view.part("together").click()
        page.wait_for_selector(".plx [data-role=result] [data-role=effect]")
        before, after, effect = (view.number("[data-role=result]", role) for role in ("before", "after", "effect"))
        assert before + effect == pytest.approx(after, rel=1e-4)
        assert before == pytest.approx(float(made[1]["AtP"].data["metric_corrupted"].mean()), rel=1e-4)
        page.locator(".plx .chip").first.click()
        assert page.locator(".plx [data-role=result] table").count() == 0, "the numbers of another set are gone"
        view.part("together").click()
        page.wait_for_selector(".plx [data-role=result] .why")
        assert "the largest cells together only" in view.part("result").inner_text()


def test_it_works_from_the_keyboard(made, opened):
    with opened(made[0], network=False) as page:
        view = View(page).ready()
        view.part("heatmap").focus()
        page.keyboard.press("ArrowDown")
        first = view.label
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert (first, view.label) == ("L0.resid_pre@0", "L1.resid_pre@1")
        assert "L1.resid_pre@1" in view.part("said").inner_text()
        page.keyboard.press("Enter")
        assert "L1.resid_pre@1" in view.part("tray").inner_text()
        page.keyboard.press("Enter")
        assert "L1.resid_pre@1" not in view.part("tray").inner_text()


@pytest.mark.parametrize("width", [1400, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_wide_and_narrow_windows_light_and_dark(made, opened, strongest, shots, width, scheme):
    layer, pos, head = map(int, strongest)
    with opened(made[0], width=width, scheme=scheme, network=False) as page:
        view = View(page).ready()
        assert ("dark" in (page.locator(".plx").get_attribute("class") or "").split()) == (scheme == "dark")
        for site, row in (("resid_pre", 3), ("mlp_out", 3), ("z[layer,pos,head]", layer * 4 + head)):
            view.choose("site", site)
            view.click(pos, row)
            page.wait_for_timeout(600)
            assert view.faults() == SOUND, site
            assert view.part("circuit").bounding_box()["height"] > 300
            page.screenshot(path=shots / f"page-{site.partition('[')[0]}-{width}-{scheme}.png", full_page=True)


def test_prompts_that_do_not_line_up(opened, tmp_path):
    model, task = model_of("gpt2"), mixed_task()
    scores = pl.RelevancePatching().run(model, task, ["resid_pre", "z"], progress=False)
    page_file = pl.explore(model, task, scores).save_html(tmp_path / "page.html", exact=2, progress=False)
    with opened(page_file.as_uri(), network=False) as page:
        view = View(page).ready()
        names = list(task.position_axis().names)
        view.click(names.index("B"), 1)
        view.wait_for("L1.resid_pre@B")
        for example in (0, 1):
            view.choose("view", "one")
            view.part("example").fill(str(example))
            view.part("example").press("Enter")
            page.wait_for_function(f"document.querySelector('.plx [data-role=prompts]').innerText.includes('example {example}')")
            assert len(view.tokens("clean")) == len(task.pairs[example])
            token = task.token_text(task.pairs[example].clean_ids[task.pairs[example].positions["B"]])
            assert view.tokens("clean", "here") == [token]
        view.choose("view", "mean")
        view.choose("site", "z")
        view.click(1, 1)
        view.wait_for("L1.H1.z")
        page.wait_for_selector(".plx [data-role=attention]")
        assert "Attention of a1.h1, example 0" in view.part("cell").inner_text(), "no mean over patterns that do not line up"
