"""The packaged demo models: what their folders hold, and that they do what their cards say."""

import importlib.util
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from paths import ROOT

from patchlab.models import DEMO_MODELS
from patchlab.tasks import load_task
from patchlab.tasks import sentences as corpus
from patchlab.tasks.generators import words
from patchlab.tasks.generators.lexicon import Lexicon

NAMES = ("demo-gpt2", "demo-gpt2-4l", "demo-llama")
LEAST = {"pronoun": 0.95, "greater_than": 0.85}
MEASURED = {
    "ioi ABBA": ("ioi", {"order": "ABBA"}),
    "ioi BABA": ("ioi", {"order": "BABA"}),
    "ioi all templates": ("ioi", {"order": "mixed", "template": "mixed"}),
    **{f"agreement {variant}": ("agreement", {"variant": variant}) for variant in ("simple", "within_rc", "across_rc", "across_pp")},
    "induction": ("induction", {}),
    **{f"facts {relation}": ("facts", {"relation": relation}) for relation in ("capital", "language")},
    **{f"docstring {corruption}": ("docstring", {"corruption": corruption}) for corruption in ("swap", "rename")},
    "pronoun": ("pronoun", {}),
    "greater_than": ("greater_than", {}),
}


@pytest.fixture(params=NAMES)
def model(request):
    return request.getfixturevalue(request.param.replace("-", "_"))


@pytest.fixture(scope="module")
def script():
    """The training script, as a module."""
    path = ROOT / "scripts" / "train_demo_models.py"
    spec = importlib.util.spec_from_file_location("train_demo_models", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lexicon(script):
    tokenizer = script.make_tokenizer()
    return Lexicon("demo", tokenizer, len(tokenizer), None)


def card(name: str) -> dict[str, tuple[int, float, float]]:
    """Label -> (pairs, measured, required)."""
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", (DEMO_MODELS[name] / "README.md").read_text(), re.M)
    return {label: (int(pairs), float(value), float(least)) for label, pairs, value, least in rows}


def test_the_three_models_are_there_and_small():
    assert tuple(DEMO_MODELS) == NAMES
    assert sum(file.stat().st_size for folder in DEMO_MODELS.values() for file in folder.iterdir()) <= 6_000_000


@pytest.mark.parametrize("name", NAMES)
def test_folders(name):
    from safetensors import safe_open

    folder = DEMO_MODELS[name]
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118  (not a dictionary)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_they_load_in_float32_with_a_bos(model):
    assert model.dtype == torch.float32
    assert model.bos_id == 0
    assert model.tokenizer.decode([0]) == "<bos>"
    text = "When Mary and John went to the store, John gave a drink to"
    assert model.tokenizer.encode(text) == model.tokenizer.encode(text.replace(",", " ,"))
    assert model.tokenizer.unk_token_id not in model.tokenizer.encode(text)


def test_shapes(demo_gpt2, demo_gpt2_4l, demo_llama):
    sizes = [(m.arch.n_layers, m.arch.d_model, m.arch.n_heads, m.arch.n_kv_heads) for m in (demo_gpt2, demo_gpt2_4l, demo_llama)]
    assert sizes == [(12, 64, 4, 4), (4, 64, 4, 4), (6, 128, 4, 2)]


def measure(model, label: str, n: int) -> float:
    """What the card lists, on pairs of another seed."""
    name, options = MEASURED[label]
    task = load_task(name, model, n=n, seed=77, **options)
    if name != "greater_than":
        accuracy = task.accuracy(model)
        return (accuracy["clean"] + 1 - accuracy["corrupted"]) / 2
    batch = task.batches(device=model.device)[0]
    probabilities = model.run(batch.clean).logits[:, -1].softmax(-1).gather(-1, batch.answers.correct)
    return float(probabilities.masked_fill(~batch.answers.correct_mask, 0.0).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("label", MEASURED)
def test_requirements_and_card(model, label):
    n = 64
    pairs, listed, least = card(model.name)[label]
    assert least == LEAST.get(label, 0.98)
    assert listed >= least
    found = measure(model, label, n)
    # two binomial samples of one rate, four standard errors apart at most (greater_than varies less than a coin does)
    rate = min(max(listed, 0.005), 0.995)
    error = math.sqrt(rate * (1 - rate) * (1 / n + 1 / pairs))
    assert abs(found - listed) <= 4 * error
    assert found >= least - 2 * math.sqrt(least * (1 - least) / n)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_lists_everything(name):
    assert set(card(name)) == set(MEASURED)


def test_names_kept_for_measuring_never_meet_in_training(script, lexicon):
    held_out = corpus.held_out_names(lexicon)
    assert len(held_out) == 112
    starts = {lexicon.token(word) for word in ("When", "While", "After")}
    names = {lexicon.token(" " + name) for name in words.NAMES}
    met = set()
    sentences = corpus.corpus(lexicon, 5, lambda: 0.08)
    for _ in range(4000):
        ids, weights = next(sentences)
        assert len(ids) == len(weights)
        here = [token for token in ids if token in names]
        if ids[0] in starts and len(here) >= 3:
            met.add(frozenset(here[:2]))
    assert len(met) > 300
    assert not met & held_out


def test_the_tokenizer_in_the_package_is_the_one_the_script_makes(script, demo_gpt2):
    assert script.make_tokenizer().get_vocab() == demo_gpt2.tokenizer.get_vocab()
    assert len(script.make_tokenizer()) == demo_gpt2.vocab_size


def figures(name: str) -> dict[str, tuple[float, float, float]]:
    """Label -> (measured, least, most) of the card's second table."""
    text = (DEMO_MODELS[name] / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) (?:to ([\d.]+)|or more) \|$", text, re.M)
    return {label: (float(value), float(least), float(most or "inf")) for label, value, least, most in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_figures_on_the_card(script, lexicon, name):
    """Where IOI is done, measured again on 16 of the pairs and a sixteenth of the text: counts of what lies near a bar may differ by a few."""
    listed = figures(name)
    found = script.spread(DEMO_MODELS[name], lexicon, 16, script.RECIPES[name].swaps)
    assert [label for label, *_ in found.figures()] == list(listed)
    for (label, _, value, *bounds), (stated, *limits) in zip(found.figures(), listed.values(), strict=True):
        assert bounds == limits
        # a mean over 16 pairs of what varies by up to 0.43 of it (three standard errors), a fit, and counts
        tolerance = {"IOI gap in logits": 0.3 * stated, "temperature that fits new text best": 0.01}.get(label, max(2, 0.15 * stated))
        assert abs(value - stated) <= tolerance, label


def test_demo_gpt2_beside_what_is_wanted():
    """It is calibrated and hands S2 on by heads of four layers in the middle, but is surer and does it with fewer heads than a model of real text."""
    listed = figures("demo-gpt2")
    missed = {label for label, (value, least, most) in listed.items() if not least <= value <= most}
    assert missed == {
        "IOI gap in logits",
        "resid_pre cells above 1 % of the gap, of 56 live ones",
        "heads with at least 5 % of the gap",
    }
    assert listed["IOI gap in logits"][0] < 14


def test_figures_by_hand(script):
    resid_pre = np.array([[1.0, 0.0, 0.0], [0.5, 0.011, -0.011], [0.6, 0.01, 0.4]])
    live = np.array([[True, False, False], [True, True, True], [True, True, False]])
    z = np.array([[0.049, 0.0], [-0.05, 0.2], [0.3, 0.01]])
    found = script.Spread(8, 5.5, 1.01, resid_pre, live, z, 0, ())
    assert [float(value) for _, _, value, *_ in found.figures()] == [5.5, 1.01, 2, 5, 3, 2]
    assert list(found.figures())[3][0] == "resid_pre cells above 1 % of the gap, of 6 live ones"


def test_the_temperature_is_what_the_logits_were_multiplied_by(script, lexicon, demo_gpt2):
    model = script.AutoModelForCausalLM.from_pretrained(DEMO_MODELS["demo-gpt2"]).eval()
    plain = script.temperature(model, lexicon, 0.08, 16)
    with torch.no_grad():
        model.transformer.ln_f.weight *= 2.0
        model.transformer.ln_f.bias *= 2.0
    assert script.temperature(model, lexicon, 0.08, 16) == pytest.approx(2 * plain, rel=1e-3)


@pytest.mark.slow
def test_answers_are_swapped_but_the_years(script, lexicon):
    """A share of the answers, for the answer of the pair's other prompt: read off IOI sentences, whose answer is the name not said twice."""
    names = {lexicon.token(" " + name) for name in words.NAMES}
    starts = {lexicon.token(word) for word in ("When", "While", "After")}

    def share(swaps: float) -> float:
        wrong = []
        sentences = corpus.corpus(lexicon, 5, lambda: swaps)
        for ids, weights in (next(sentences) for _ in range(3000)):
            answer = int(np.argmax(weights))
            said = [token for token in ids[:answer] if token in names]
            if ids[0] in starts and len(said) == 3 and len(set(said)) == 2 and weights[answer] == corpus.ANSWER_WEIGHT:
                wrong.append(ids[answer] == said[2])
        assert len(wrong) > 500
        return float(np.mean(wrong))

    assert share(0.0) == 0
    assert share(0.3) == pytest.approx(0.3, abs=0.07)


def test_attention_while_training(script, lexicon):
    """The attention that training uses is the model's own where nothing is dropped and sentences see each other; far attention is as defined."""
    recipe = script.Recipe(steps=1, calm=0, apart=0.0, head_dropout=0.5, layer_dropout=0.2)
    ids, _, places = corpus.rows(lexicon, 2, 3, lambda _: 0.1)
    ids = ids.long()
    for name in ("demo-gpt2-4l", "demo-llama"):
        model = script.build(name, lexicon.vocab_size, 0).eval()
        model.set_attn_implementation("eager")
        plain = model(ids, output_attentions=True)
        regulariser = script.Regulariser(model, recipe)
        torch.testing.assert_close(model(ids).logits, plain.logits, atol=1e-5, rtol=1e-4)
        n = corpus.ROW
        expected = []
        for pattern in plain.attentions[: model.config.num_hidden_layers // 3]:
            shares = [pattern[..., i, j].mean() for i in range(n) for j in range(1, i - script.REACH)]
            expected.append(torch.stack(shares).sum() / n)
        torch.testing.assert_close(torch.stack(regulariser.far), torch.stack(expected))
        regulariser.begin(torch.zeros_like(places), dropping=True)
        assert not torch.allclose(model(ids).logits, plain.logits, atol=1e-3)
        regulariser.end()


def test_sentences_apart(script, lexicon):
    """While the tasks are learnt no sentence depends on the one before it."""
    model = script.build("demo-gpt2-4l", lexicon.vocab_size, 0).eval()
    ids, _, places = corpus.rows(lexicon, 1, 3, lambda _: 0.0)
    regulariser = script.Regulariser(model, script.Recipe(steps=1, calm=0, apart=0.0))
    regulariser.begin(places, dropping=False)
    packed = model(ids.long()).logits
    regulariser.end()
    regulariser.begin(places, dropping=False)
    other = ids.clone()
    other[:, places[0] == 1] = 7
    torch.testing.assert_close(model(other.long()).logits[:, places[0] == 2], packed[:, places[0] == 2])
    regulariser.end()
    assert not torch.allclose(model(other.long()).logits[:, places[0] == 2], packed[:, places[0] == 2], atol=1e-4)


def test_what_is_dropped(script):
    model = script.build("demo-gpt2-4l", 50, 0)
    regulariser = script.Regulariser(model, script.Recipe(steps=1, calm=0, apart=0.0))
    ones = torch.ones(500, 4, 3, 2)
    assert regulariser.drop(ones, 0.5, 2) is ones, "nothing before a step begins"
    regulariser.begin(torch.zeros(1, corpus.ROW), dropping=True)
    dropped = regulariser.drop(ones, 0.25, 2)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert (dropped == dropped[:, :, :1, :1]).all(), "a head at once"
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert regulariser.drop(ones, 0.0) is ones
    regulariser = script.Regulariser(model, script.Recipe(steps=1, calm=0, apart=0.0, whole=0.3))
    regulariser.begin(torch.zeros(1, corpus.ROW), dropping=True)
    dropped = regulariser.drop(ones, 0.25, 2)
    assert (dropped[:150] == 1).all(), "rows of which nothing is dropped"
    assert (dropped[150:] == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_moves_of_muon_are_orthogonal(script):
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (3, 20, 8)):
        stack = torch.randn(shape)
        moves = script.orthogonal(stack)
        u, _, v = torch.linalg.svd(stack, full_matrices=False)
        values = (u.mT @ moves @ v.mT).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(u @ torch.diag_embed(values) @ v, moves, atol=1e-4, rtol=1e-4)
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_rows_begin_with_bos_and_weigh_answers(script, lexicon):
    ids, weights, places = corpus.rows(lexicon, 50, 3, lambda _: 0.0)
    assert ids.shape == weights.shape == places.shape == (50, corpus.ROW)
    assert (ids[:, 0] == 0).all()
    assert not (ids[:, 1:] == 0).any()
    assert set(weights[:, 1:].unique().tolist()) == {1.0, corpus.ANSWER_WEIGHT}
    assert (places[:, 0] == 0).all()
    steps = places[:, 1:] - places[:, :-1]
    assert (places[:, 1] == 1).all()
    assert set(steps.unique().tolist()) == {0, 1}
    assert (ids[:, 1:-1][steps[:, 1:] == 1] == lexicon.token(".")).all(), "a sentence ends where the next begins"


def test_no_swapped_answers_while_calm(script, lexicon):
    recipes = [script.Recipe(steps=20, calm=calm, apart=0.0, batch=2, swaps=swaps) for swaps, calm in ((0.0, 0), (0.5, 0), (0.5, 10), (0.5, 20))]
    plain, swapped, both, none = (corpus.rows(lexicon, 40, 3, recipe.swapped)[0] for recipe in recipes)
    assert not torch.equal(plain, swapped)
    assert not torch.equal(both, swapped)
    assert torch.equal(plain[:20], both[:20])
    assert torch.equal(plain, none)


def test_the_share_of_swapped_answers_falls(script):
    recipe = script.Recipe(steps=100, calm=10, apart=0.0, batch=4, swaps=0.1, first_swaps=0.3, fall=20)
    assert [recipe.swapped(row) for row in (0, 39, 40, 80, 120, 399)] == pytest.approx([0, 0, 0.3, 0.2, 0.1, 0.1])
    constant = script.Recipe(steps=100, calm=10, apart=0.0, batch=4, swaps=0.1)
    assert [constant.swapped(row) for row in (39, 40, 399)] == [0, 0.1, 0.1]


def test_weights_beside_that_of_the_answer(script, lexicon):
    """What the recipe weighs apart: a docstring's earlier arguments, IOI answers that are either name, years. The text is the same."""
    recipe = script.Recipe(steps=100, calm=50, apart=0.0, batch=2, arguments=7.0, either=3.0, years=5.0)
    plain = corpus.rows(lexicon, 200, 3, lambda _: 0.1)
    weighed = corpus.rows(lexicon, 200, 3, lambda _: 0.1, recipe.arguments, recipe.uncertain_weights)
    assert torch.equal(plain[0], weighed[0])
    sevens, threes, fives = (weighed[1] == weight for weight in (7, 3, 5))
    for other in (threes, fives):
        assert not other[:100].any()
        assert other[100:].any()
    assert not torch.equal(sevens[:100], torch.zeros_like(sevens[:100]))
    expected = torch.where(fives, corpus.ANSWER_WEIGHT, torch.where(sevens | threes, 1.0, weighed[1].float()))
    assert torch.equal(expected, plain[1].float())
    assert (weighed[0][:, :-1][sevens[:, 1:]] == lexicon.token("param")).all(), "an argument follows :param"
    assert set(weighed[0][threes].tolist()) <= {lexicon.token(" " + name) for name in words.NAMES}
    assert set(weighed[0][fives].tolist()) <= {lexicon.token(year) for year in words.YEARS}


@pytest.mark.slow
def test_a_model_that_misses_its_requirements_is_not_put_in_place(script, tmp_path, capsys):
    recipe = script.Recipe(steps=2, calm=1, apart=0.5, batch=4)
    assert not script.make("demo-gpt2-4l", recipe, script.make_tokenizer(), tmp_path, 8)
    assert not (tmp_path / "demo-gpt2-4l").exists()
    assert "demo-gpt2-4l misses its requirements: {'ioi ABBA': " in capsys.readouterr().err
    assert "| ioi ABBA | 8 | " in (tmp_path / ".demo-gpt2-4l.new" / "README.md").read_text()
