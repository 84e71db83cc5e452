"""The packaged demo models: what their folders hold, and that they do what their cards say."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

from patchlab.models import DEMO_MODELS
from patchlab.tasks import load_task

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
    path = Path(__file__).resolve().parents[1] / "scripts" / "train_demo_models.py"
    spec = importlib.util.spec_from_file_location("train_demo_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_names_kept_for_measuring_never_meet_in_training(script):
    from patchlab.tasks.lexicon import Lexicon

    tokenizer = script.make_tokenizer()
    lexicon = Lexicon("demo", tokenizer, len(tokenizer), None)
    held_out = script.held_out_names(lexicon)
    assert len(held_out) == 112
    starts = {lexicon.token(word) for word in ("When", "While", "After")}
    names = {lexicon.token(" " + name) for name in script.words.NAMES}
    met = set()
    sentences = script.corpus(lexicon, 5)
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


def test_rows_begin_with_bos_and_weigh_answers(script):
    from patchlab.tasks.lexicon import Lexicon

    tokenizer = script.make_tokenizer()
    ids, weights = script.rows(Lexicon("demo", tokenizer, len(tokenizer), None), 50, 3)
    assert ids.shape == weights.shape == (50, script.ROW)
    assert (ids[:, 0] == 0).all()
    assert not (ids[:, 1:] == 0).any()
    assert set(weights[:, 1:].unique().tolist()) == {1.0, script.ANSWER_WEIGHT}


def test_a_model_that_misses_its_requirements_is_not_put_in_place(script, tmp_path, capsys):
    from patchlab.tasks.lexicon import Lexicon

    tokenizer = script.make_tokenizer()
    data = script.rows(Lexicon("demo", tokenizer, len(tokenizer), None), 2 * script.BATCH, 3)
    assert not script.make("demo-gpt2-4l", tokenizer, data, tmp_path, 2, 8)
    assert not (tmp_path / "demo-gpt2-4l").exists()
    assert "demo-gpt2-4l misses its requirements: {'ioi ABBA': " in capsys.readouterr().err
    assert "| ioi ABBA | 8 | " in (tmp_path / ".demo-gpt2-4l.new" / "README.md").read_text()
