"""Studies: a planted head is named, a model that does not do the task has nothing found in it, and a budget decides what is measured."""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import patchlab as pl
from patchlab.cli import app
from patchlab.errors import SweepError
from patchlab.report.study import answer, write_study
from patchlab.sweeps import study as studies
from patchlab.sweeps.spec import ModelSpec, TaskSpec
from patchlab.sweeps.study import study

LAYERS, HEADS, WIDTH, VOCAB = 2, 4, 32, 16


def planted(folder, layer: int | None, head: int = 2, sign: float = 1.0):
    """A GPT-2 whose one head, if any, tells all positions what stands at the third; all other heads write nothing.

    The first coordinate of the stream marks the third position, and the next ones hold the token.
    """
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, n_positions=8, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    size = WIDTH // HEADS
    with torch.no_grad():
        model.transformer.wte.weight.mul_(0.1)
        model.transformer.wte.weight[:, 1 : 1 + size] = torch.nn.functional.normalize(torch.randn(VOCAB, size), dim=1)
        model.transformer.wpe.weight.mul_(0.1)
        model.transformer.wpe.weight[2, 0] = 3.0
        for number, block in enumerate(model.transformer.h):
            block.mlp.c_proj.weight.mul_(0.01)
            block.attn.c_proj.weight.zero_()
            if number == layer:
                first, weight = head * size, block.attn.c_attn.weight
                block.attn.c_attn.bias[first] = 20.0
                weight[0, WIDTH + first] = 5.0
                weight[:, 2 * WIDTH + first : 2 * WIDTH + first + size] = torch.eye(WIDTH)[:, 1 : 1 + size]
                block.attn.c_proj.weight[first : first + size] = 5 * sign * torch.eye(WIDTH)[1 : 1 + size]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    """A file of pairs: the answer is the token that stands at the third position, which differs between the prompts."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(32):
        first, second, *others = generator.choice(np.arange(1, VOCAB), size=6, replace=False).tolist()
        clean, corrupted = [others[0], others[1], first, others[2], others[3]], [others[0], others[1], second, others[2], others[3]]
        rows.append({"clean_ids": clean, "corrupted_ids": corrupted, "correct_id": first, "incorrect_id": second})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def made(folder, pairs, out, **options):
    spec = ModelSpec.of(str(folder))
    return study(spec, TaskSpec.of(str(pairs)), out, progress=False, **options)


@pytest.mark.parametrize(("layer", "head"), [(0, 3), (1, 2)])
def test_a_planted_head_is_named_and_nothing_else(tmp_path, pairs, layer, head):
    found = made(planted(tmp_path / "model", layer, head), pairs, tmp_path / "out")
    assert found.verdict == studies.FOUND
    assert found.found == [f"a{layer}.h{head}"]
    assert not found.opposing
    assert found.together["share"] == pytest.approx(1.0, abs=0.02), "the one head is all that passes anything on"
    assert answer(found)[0].startswith(f"Found: one attention head carries pairs in model: a{layer}.h{head}.")
    # by hand: the effect of the head on the measuring half is that of the python interface
    task = found.measuring
    exact = pl.ActivationPatching().run(found.model, task, "z", progress=False).mean("z").to_numpy()
    row = found.heads.set_index("address").loc[f"a{layer}.h{head}"]
    assert row["effect"] == pytest.approx(exact[layer, head], rel=1e-5)
    assert row["lo"] < row["effect"] < row["hi"]
    assert set(found.choosing.pair_fingerprints).isdisjoint(task.pair_fingerprints)
    record = write_study(found, tmp_path / "out")
    assert record == json.loads((tmp_path / "out" / "study.json").read_text())
    assert record["verdict"] == "found"
    assert [row["address"] for row in record["heads"] if row["found"]] == found.found


def test_a_model_that_does_not_do_the_task_ends_in_not_found(tmp_path, pairs):
    found = made(planted(tmp_path / "model", None), pairs, tmp_path / "out")
    assert found.verdict == studies.NOT_FOUND
    assert not len(found.heads)
    assert set(found.keys) == {"relp z"}, "nothing else is worth computing"
    record = write_study(found, tmp_path / "out")
    assert record["verdict"] == "not found"
    assert record["answer"][0] == "Not found: model does not do pairs, so there is nothing to locate."
    page = (tmp_path / "out" / "index.html").read_text()
    assert "not above 0" in page
    assert "Which heads" not in page


def test_a_head_that_works_the_other_way_round_means_that_the_task_is_not_done(tmp_path, pairs):
    found = made(planted(tmp_path / "model", 1, sign=-1.0), pairs, tmp_path / "out")
    assert found.verdict == studies.NOT_FOUND


def test_a_small_budget_leaves_out_what_is_dear_and_says_so(tmp_path, pairs):
    found = made(planted(tmp_path / "model", 1), pairs, tmp_path / "out", budget=1e-6)
    assert set(found.keys) == {"relp z", "relp places"}
    assert found.found == ["a1.h2"], "the heads that the screen brings up are measured whatever the budget"
    left = [one for one in found.decisions if one.how == "left out"]
    assert {one.what for one in left} >= {"every head, patched by itself", "circuits of edges, chosen by relp"}
    assert all("of the budget were left" in one.why for one in left)
    write_study(found, tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Estimated with relp" in page
    assert "Circuits of edges would have taken longer than the budget." in page


@pytest.mark.slow
def test_verified_heads_take_the_place_of_a_sweep_that_is_too_dear(tmp_path, pairs, monkeypatch):
    prices = studies._prices

    def dear(runs, loaded):
        found = prices(runs, loaded)
        return [(1e9, None) if run.what.kind == "score" and run.what.method == "exact" else one for run, one in zip(runs, found, strict=True)]

    monkeypatch.setattr(studies, "_prices", dear)
    found = made(planted(tmp_path / "model", 1), pairs, tmp_path / "out")
    assert "verified" in found.keys
    assert "exact z" not in found.keys
    assert found.found == ["a1.h2"]
    write_study(found, tmp_path / "out")
    assert "the largest were verified by patching" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_the_same_study_goes_on_from_its_runs(tmp_path, pairs, monkeypatch):
    folder = planted(tmp_path / "model", 1)
    first = made(folder, pairs, tmp_path / "out")
    from patchlab.sweeps import kinds

    monkeypatch.setattr(kinds, "compute", lambda *_, **__: pytest.fail("all runs are there"))
    again = made(folder, pairs, tmp_path / "out")
    assert again.found == first.found
    assert again.heads.equals(first.heads)


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"budget": 0}, "budget is 0 seconds"), ({"budget": float("nan")}, "budget is nan")],
)
def test_what_makes_no_sense_is_refused(tmp_path, pairs, options, problem):
    folder = planted(tmp_path / "model", 1)
    with pytest.raises(SweepError, match=problem):
        made(folder, pairs, tmp_path / "out", **options)
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(pairs.read_text().splitlines()[:15]))
    with pytest.raises(SweepError, match=r"needs 16 pairs or more.*has 15"):
        made(folder, few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "heads"), [("demo-gpt2", 2), ("demo-llama", 1)])
def test_the_command_on_the_packaged_models(tmp_path, model, heads):
    words = ["study", "--model", model, "--task", "ioi", "--n", "32", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.strip().splitlines()[-1])
    assert record["verdict"] == "found"
    assert sum(row["found"] for row in record["heads"]) >= heads
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<script") == page.count("</script>")
    assert "plotly.min.js" in page
    assert (tmp_path / "out" / "plotly.min.js").stat().st_size > 1e6
    for section in ("The short answer", "Which heads", "What the heads look at", "The circuit of edges", "What each method would have said"):
        assert f"<h2>{section}</h2>" in page
