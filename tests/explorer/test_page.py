import json
import re

import pytest
import torch
from families import model_of, scores_of, swap_task

import patchlab as pl
from patchlab.errors import OutputError
from patchlab.explorer import explore
from patchlab.explorer.page import key


@pytest.fixture(scope="module")
def model():
    return model_of("llama", torch.float64)


@pytest.fixture(scope="module")
def relp(model):
    return scores_of(pl.RelevancePatching(), model, swap_task(), ["z", "mlp_out"])


def held(page, name):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)[1])


@pytest.fixture(scope="module")
def saved(model, relp, tmp_path_factory):
    explored = explore(model, swap_task(), relp)
    explored.ask("exact", "denoising", "z", 0)
    return explored, explored.save_html(tmp_path_factory.mktemp("page") / "page.html", exact=3, progress=False)


def test_a_page_holds_the_state_and_the_answers_that_the_view_would_get(saved):
    explored, page = saved
    assert held(page, "state") == explored.state
    answers = held(page, "answers")
    for question, answer in answers.items():
        if json.loads(question)[0] != "parts":
            assert explored.ask(*json.loads(question)) == answer
        assert key(json.loads(question)) == question


def test_a_page_holds_the_exact_patches_of_the_largest_cells_and_those_of_the_view(saved, relp):
    answers = [json.loads(question) for question in held(saved[1], "answers")]
    patched = {question[3] for question in answers if question[:3] == ["exact", "denoising", "z"]}
    order = abs(relp.mean("z").to_numpy()).ravel().argsort()[::-1]
    assert patched == {0, *order[:3].tolist()}
    together = [[cell for _, cell in question[3]] for question in answers if question[0] == "together" and question[3][0][0] == "z"]
    assert together == [sorted(order[:2].tolist()), sorted(order[:3].tolist())]


def test_a_page_holds_the_patterns_of_all_heads_and_the_neurons_of_all_mlps(saved):
    answers = [json.loads(question) for question in held(saved[1], "answers")]
    heads = {tuple(question[1:]) for question in answers if question[0] == "attention"}
    assert len(heads) == 12 * 2 * 4
    state = held(saved[1], "state")
    shown = state["groups"]["denoising"]["sites"]["mlp_out"]["cells"]
    assert {question[3] for question in answers if question[0] == "parts"} == set(shown)


def test_a_page_with_an_exact_map_repeats_none_of_it(model, relp, tmp_path):
    maps = {"exact": scores_of(pl.ActivationPatching(), model, swap_task(), ["z", "mlp_out"]), "RelP": relp}
    page = explore(model, swap_task(), maps).save_html(tmp_path / "page.html", progress=False)
    assert not [question for question in held(page, "answers") if question.startswith('["exact"')]


def test_answers_that_do_not_fit_are_left_out_the_most_wanted_last(model, relp, tmp_path, monkeypatch):
    monkeypatch.setattr("patchlab.explorer.page.BYTES", 25_000)
    page = explore(model, swap_task(), relp).save_html(tmp_path / "page.html", exact=0, progress=False)
    heads = [json.loads(question)[2] for question in held(page, "answers") if question.startswith('["attention"')]
    assert heads == sorted(heads)
    assert 0 < len(heads) < 12 * 2 * 4
    assert not [question for question in held(page, "answers") if question.startswith('["together"')]


def test_a_page_loads_nothing(saved):
    text = saved[1].read_text(encoding="utf-8")
    own = text[: text.index("<script>")] + text[text.index("</script></head>") :]  # without plotly
    assert "http" not in own
    assert not re.search(r"(src|href)=", own)


def test_text_of_prompts_cannot_end_the_script_it_is_in(model, relp, tmp_path):
    explored = explore(model, swap_task(), relp)
    explored.state["title"] = "</script><script>alert(1)</script>"
    text = explored.save_html(tmp_path / "page.html", exact=0, progress=False).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert held(tmp_path / "page.html", "state")["title"] == "</script><script>alert(1)</script>"


def test_a_page_is_not_overwritten_unless_asked_and_is_whole_or_absent(saved, tmp_path, monkeypatch):
    explored, page = saved
    before = page.read_bytes()
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        explored.save_html(page, progress=False)
    with pytest.raises(OutputError, match=r"a page is written as \.html; got 'page\.pdf'"):
        explored.save_html(tmp_path / "page.pdf")
    with pytest.raises(OutputError, match="exact is -1"):
        explored.save_html(tmp_path / "page.html", exact=-1)

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("patchlab.explorer.page._document", broken)
    with pytest.raises(KeyboardInterrupt):
        explored.save_html(page, overwrite=True, progress=False)
    assert page.read_bytes() == before
    assert list(page.parent.iterdir()) == [page]
