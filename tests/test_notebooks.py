"""The notebooks: executed once, in order, with the outputs that are committed; small, and with pictures."""

import copy
import re
from types import ModuleType

import jupytext
import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from page_scripts import script
from paths import ROOT

notebooks: ModuleType = script("notebooks", ROOT / "scripts")
SOURCES = notebooks.SOURCES


def committed(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_outputs_are_those_that_are_committed(source):
    found = notebooks.differences(committed(source), notebooks.execute(source, pictures=False))
    assert not found, "\n".join(["look at what changed, and make it anew: make notebooks", *found])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_committed_notebooks_are_executed_in_order_small_and_in_step_with_their_scripts(source):
    notebook = committed(source)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert not [output for output in shown if output.get("name") == "stderr"], "warnings name the machine it was run on"
    figures = [output.data for output in shown if notebooks.FIGURE in output.get("data", {})]
    assert figures
    assert all(notebooks.PICTURE in data for data in figures), "figures show without running it"
    assert not [output for output in shown if "/tmp/" in str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))]
    assert source.with_suffix(".ipynb").stat().st_size < 500_000


def test_notebooks_are_numbered_and_link_to_each_other():
    assert [path.name.partition("-")[0] for path in SOURCES] == [str(number) for number in range(1, len(SOURCES) + 1)]
    for source in SOURCES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", source.read_text(encoding="utf-8")):
            assert (source.parent / link).exists(), f"{source.name} links to {link}"


def notebook_of(*data, text="1 of 2 cells, r 0.53, 0.4 s"):
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text), *(nbformat.v4.new_output("display_data", data=each) for each in data)]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])


def drawn(*values, title="effect 0.53", typed=False):
    figure = go.Figure(go.Scatter(x=["a", "b"], y=np.array(values) if typed else list(values), text=["0.5 logits", "3e-7 logits"]), {"title": title})
    return {notebooks.FIGURE: figure.to_plotly_json() if typed else {**figure.to_plotly_json(), "data": [figure.data[0].to_plotly_json()]}}


@pytest.mark.parametrize(
    "text",
    ["1 of 2 cells, r 0.53, 12 s", "1 of 2 cells, r 0.54, 0.4 s", "1 of 2  cells, r 0.53, 0.4 s"],
    ids=["time", "last digit", "spaces"],
)
def test_rounding_time_and_spaces_are_no_differences(text):
    assert notebooks.differences(notebook_of(), notebook_of(text=text)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 of 2 cells, r 0.55, 0.4 s", "0.53 is now 0.55"),
        ("1 of 3 cells, r 0.53, 0.4 s", "2 is now 3"),
        ("1 of 2 cells, r -0.53, 0.4 s", "0.53 is now -0.53"),
        ("1 of 2 heads, r 0.53, 0.4 s", "heads"),
        ("1 of 2 cells, r nan, 0.4 s", "nan"),
        ("1 of 2 cells", "0.4"),
    ],
)
def test_another_number_or_word_is_a_difference(text, says):
    (found,) = notebooks.differences(notebook_of(), notebook_of(text=text))
    assert says in found or "(time)" in found
    assert found.startswith("cell 0")


def test_a_table_is_compared_and_the_text_beside_it_is_not():
    before = notebook_of({"text/html": "<td>1.25</td>", "text/plain": "1.25"})
    assert notebooks.differences(before, notebook_of({"text/html": "<td>1.25</td>", "text/plain": "1.2500"})) == []
    assert notebooks.differences(before, notebook_of({"text/html": "<td>1.35</td>", "text/plain": "1.25"})) == ["cell 0, text/html: 1.25 is now 1.35"]


@pytest.mark.parametrize("typed", [False, True], ids=["lists", "base64"])
def test_data_of_figures_are_compared(typed):
    before = notebook_of(drawn(1.0, 2.0, typed=typed))
    assert notebooks.differences(before, notebook_of(drawn(1.0, 2.001, typed=typed))) == []
    (found,) = notebooks.differences(before, notebook_of(drawn(1.0, 2.01, typed=typed)))
    assert "y[1]: 2 is now 2.01" in found
    assert notebooks.differences(before, notebook_of(drawn(1.0, float("nan"), typed=True)))
    assert notebooks.differences(before, notebook_of(drawn(1.0, 2.0, title="effect 0.93", typed=typed)))
    assert notebooks.differences(before, notebook_of(drawn(1.0, 2.0, 3.0, typed=typed)))
    assert notebooks.differences(before, notebook_of())


def test_pictures_and_what_is_below_the_noise_are_not_compared():
    before, after = notebook_of({**drawn(1.0, 2.0), notebooks.PICTURE: "old"}), notebook_of({**drawn(1.0, 2.0), notebooks.PICTURE: "new"})
    after.cells[0].outputs[1].data[notebooks.FIGURE]["data"][0]["text"][1] = "-2e-7 logits"  # of a figure whose numbers go up to 2
    assert notebooks.differences(before, after) == []
    after.cells[0].outputs[1].data[notebooks.FIGURE]["data"][0]["text"][1] = "-2e-3 logits"
    assert notebooks.differences(before, after)


def test_another_source_or_a_missing_cell_is_a_difference():
    before = notebook_of()
    other = copy.deepcopy(before)
    other.cells[0].source = "y"
    assert notebooks.differences(before, other) == ["cell 0: the source is another one"]
    assert notebooks.differences(before, nbformat.v4.new_notebook()) == ["1 cells are committed, the script has 0"]


def test_a_notebook_as_text_reads_back():
    notebook = notebook_of(drawn(1.0, 2.0), {notebooks.FIGURE: {"data": [], "layout": {"title": "(figure 0)"}}})
    text = notebooks.as_text(notebook)
    assert nbformat.reads(text, as_version=4) == notebook
    assert '"y":[1.0,2.0]' in text
