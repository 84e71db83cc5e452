"""JupyterLab: the first notebook is run as a whole, then the explorer on its scores."""

import json

import jupytext
import numpy as np
import pytest
from lab import jupyter_lab
from nbformat.v4 import new_code_cell
from paths import ROOT
from view import SOUND, View

from patchlab.scores import ScoreMap

EXPLORE = """
import json
chosen = ["L9.H2.z", "L6.H1.z"]
zeroed = model.run(batch.clean, edits=[pl.Edit(cell, pl.sources.zero()) for cell in chosen])
json.dump({"zeroed": task.metric(zeroed.logits[:, -1], batch.answers).mean().item()}, open("wanted.json", "w"))
for name, scores in {"exact": exact, "AtP": atp, "RelP": relp}.items():
    scores.save(f"{name}.nc", overwrite=True)
edges = pl.RelevancePatching().run(model, task, "edges", direction="noising", progress=False)
pl.explore(model, task, {"AtP": atp, "RelP": relp}, circuit=pl.circuits.top_n(edges, 60))
"""
"""What is run after the notebook, which has model, task and the maps exact, atp and relp. The view gets no exact map: it has to patch."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab, and the folder that it shows."""
    folder = tmp_path_factory.mktemp("notebooks")
    with jupyter_lab(folder, tmp_path_factory.mktemp("lab")) as address:
        yield address, folder


def test_the_explorer_in_jupyterlab(lab, opened, shots):
    address, folder = lab
    notebook = jupytext.read(ROOT / "notebooks" / "1-quickstart.py")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells.append(new_code_cell(EXPLORE))
    jupytext.write(notebook, folder / "first.ipynb")
    with opened(f"{address}/lab/tree/first.ipynb?reset") as page:
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_selector("#jp-bottom-panel >> text=/\\| Idle/")  # the kernel is there
        page.click("li.lm-MenuBar-item:has-text('Run')")
        page.click("li.lm-Menu-item[data-command='runmenu:run-all']")
        page.wait_for_selector(".jp-InputPrompt:has-text('[*]')")
        page.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
        view = View(page).ready()
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
        exact, atp, relp = (ScoreMap.load(folder / f"{name}.nc") for name in ("exact", "AtP", "RelP"))
        # a head, by a click on the heatmap
        view.choose("site", "z")
        view.click(2, 9)
        view.wait_for("L9.H2.z")
        for name, scores in {"AtP": atp, "RelP": relp}.items():
            assert view.effect(name) == pytest.approx(float(scores.mean("z")[9, 2]), rel=1e-6)
        page.wait_for_selector(".plx [data-role=attention] .main-svg")
        assert "Attention of a9.h2, mean over examples" in view.part("cell").inner_text()
        view.part("patch").click()
        page.wait_for_selector(".plx tr[data-method=patched]")
        assert view.effect("patched") == pytest.approx(float(exact.mean("z")[9, 2]), rel=1e-3, abs=1e-5)
        # all heads: each is a point of the scatter
        view.part("sweep").click()
        count = int(exact.live["z"].sum())
        page.wait_for_function(f"(document.querySelector('.plx [data-role=scatter]').data || [0, {{ x: [] }}])[1].x.length === {count}")
        points = view.drawn("scatter")[1]
        assert sorted(points["x"]) == pytest.approx(sorted(exact.mean("z").to_numpy()[exact.live["z"].to_numpy()]), rel=1e-3, abs=1e-4)
        # two heads zeroed together on the clean prompts
        view.part("toggle").click()
        view.click(1, 6)
        view.wait_for("L6.H1.z")
        view.part("toggle").click()
        view.choose("into", "noising")
        view.choose("source", "zero")
        view.part("together").click()
        page.wait_for_selector(".plx [data-role=result] [data-role=after]")
        assert view.number("[data-role=result]", "after") == pytest.approx(json.loads((folder / "wanted.json").read_text())["zeroed"], rel=1e-3)
        page.screenshot(path=shots / "lab-1400-light.png")
        # another site has no selection yet; a cell of it is named by its position
        view.choose("site", "mlp_out")
        assert view.label == ""
        column = exact.data["position"].to_numpy().tolist().index("S2")
        view.click(column, 1)
        view.wait_for("L1.mlp_out@S2")
        page.wait_for_selector(".plx [data-role=neurons]")
        total = view.number("[data-role=neurons] tr[data-label='sum of all']")
        assert total == pytest.approx(float(relp.mean("mlp_out")[1, column]), rel=1e-3, abs=1e-5)
        # long work is stopped, and what is finished is kept
        view.choose("site", "resid_pre")
        layer, pos = np.argwhere(exact.live["resid_pre"].to_numpy())[-1]
        view.click(int(pos), int(layer))
        view.part("sweep").click()
        page.wait_for_function("(document.querySelector('.plx [data-role=scatter]').data || [0, { x: [] }])[1].x.length > 0")
        view.part("stop").click()
        page.wait_for_function("document.querySelector('.plx [data-role=stop]') === null")
        kept = len(view.drawn("scatter")[1]["x"])
        assert 0 < kept <= int(exact.live["resid_pre"].sum())
        # dark, as JupyterLab says it
        page.evaluate("document.body.dataset.jpThemeLight = 'false'")
        page.wait_for_selector(".plx.dark")
        page.screenshot(path=shots / "lab-1400-dark.png")
        page.evaluate("document.body.dataset.jpThemeLight = 'true'")
        page.set_viewport_size({"width": 800, "height": 1000})
        page.wait_for_timeout(1500)
        assert {**view.faults(), "wide": False} == SOUND
        page.screenshot(path=shots / "lab-800-light.png")
        page.set_viewport_size({"width": 1400, "height": 1000})
        # a saved notebook has no plotly and no scores of the view in it
        page.click("li.lm-MenuBar-item:has-text('File')")
        page.click("li.lm-Menu-item[data-command='docmanager:save']")
        page.wait_for_selector(".jp-NotebookPanel .jp-mod-dirty", state="detached")
        page.wait_for_timeout(1000)
        saved = json.loads((folder / "first.ipynb").read_text(encoding="utf-8"))
        own = saved["cells"][-1]["outputs"]
        assert own
        assert len(json.dumps(own)) + len(json.dumps(saved["metadata"])) < 100_000
