"""Train the packaged demo models on text that contains every task, and write them with a measured model card.

    python scripts/train_demo_models.py                 # all three, under 15 minutes on 2 idle cores
    python scripts/train_demo_models.py demo-gpt2-4l    # one of them

Exits with 1 if a model misses a requirement after the cast to float16; nothing is left in place of the old model then.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchlab.tasks import agreement, docstring, facts, ioi, words
from patchlab.tasks.base import Pair, Task
from patchlab.tasks.lexicon import Lexicon
from patchlab.tasks.registry import GENERATORS

OUT = Path(__file__).resolve().parents[1] / "patchlab" / "demo_models"
ROW, BATCH, STEPS, WARMUP, HOLD = 48, 32, 2500, 150, 0.4
ANSWER_WEIGHT = 10.0
SEED = 0
FILLERS = (
    "The {person} was in the {place}.",
    "The {thing} near the {place} was {adjective}.",
    "{name} was at the {place} with the {person}.",
    "The {adjective} {thing} was so {adjective}.",
    "{name} gave the {object} to the {person}.",
    "Then {name} and {name} went to the {place}.",
)
ADJECTIVES = ["happy", "green", "quick", "heavy", "yellow", "quiet", "simple", "strong", "young", "cold", "warm", "sweet"]

Sentence = tuple[list[int], list[float]]  # token ids, and the loss weight of each


# --- vocabulary ------------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every word of the templates and the word lists, in a fixed order."""
    split = pre_tokenizers.Whitespace()
    couples = (words.PEOPLE, words.VERBS, words.RELATIVE_VERBS, words.CAPITALS, words.LANGUAGES)
    lists = (words.NAMES, words.PLACES, words.OBJECTS, words.PREPOSITIONS, words.ADVERBS, words.EVENTS, words.CENTURIES, words.YEARS)
    lists += (words.FUNCTIONS, words.ARGUMENTS, words.COMMON, ADJECTIVES, ["he", "she", "it", "they"])
    templates = [*ioi.TEMPLATES.values(), *agreement.TEMPLATES.values(), docstring.TEMPLATE, *(text for text, _ in facts.RELATIONS.values())]
    templates += [sys.modules[f"patchlab.tasks.{name}"].TEMPLATE for name in ("greater_than", "pronoun")]
    text = [" ".join(templates + list(FILLERS)).replace("{", " {").replace("}", "} ")]
    text += [" ".join([*couple, *couple.values()]) for couple in couples] + [" ".join(words_) for words_ in lists]
    slots = {slot for word in text[0].split() if word.startswith("{") for slot in [word.strip("{}")]}
    found = [word for part in text for word, _ in split.pre_tokenize_str(" ".join(w for w in part.split() if w.strip("{}") not in slots))]
    # "):" and '"""' come out of the prompts as one token each
    return list(dict.fromkeys(["<bos>", "<unk>", "):", '"""', *found]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: words and runs of punctuation are tokens, white space is not."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>")


# --- corpus ----------------------------------------------------------------------------------------------------------


def held_out_names(lexicon: Lexicon) -> frozenset[frozenset[int]]:
    """One in ten unordered pairs of names: never the two names of an IOI sentence in training."""
    ids = [lexicon.token(" " + name) for name in words.NAMES]
    couples = [frozenset(couple) for couple in itertools.combinations(ids, 2)]
    return frozenset(Random("held out").sample(couples, len(couples) // 10))


def is_held_out(pair: Pair, held_out: frozenset[frozenset[int]]) -> bool:
    """Whether an IOI pair is one of those kept for measuring."""
    return frozenset((pair.correct[0], pair.incorrect[0])) in held_out


def corpus(lexicon: Lexicon, seed: int) -> Iterator[Sentence]:
    """An endless mix of complete sentences of all tasks and filler."""
    rng = Random(f"corpus:{seed}")
    held_out = held_out_names(lexicon)
    code = {text: list(lexicon.encode(text) or ()) for text in (".", ":")}
    adjectives = [lexicon.token(" " + word) for word in ADJECTIVES]
    common = [lexicon.token(" " + word) for word in (*words.COMMON, *words.PLACES, *words.OBJECTS)]

    def ends(name: str, tail: Callable[[], list[int]], **options: object) -> Iterator[Sentence]:
        for pair in GENERATORS[name].stream(lexicon, rng, **options):
            if name == "ioi" and is_held_out(pair, held_out):
                continue
            clean = rng.random() < 0.9 if name == "greater_than" else rng.random() < 0.5
            ids, right = (pair.clean_ids, pair.correct) if clean else (pair.corrupted_ids, pair.incorrect)
            weight = ANSWER_WEIGHT
            if options.get("corruption") == "abc":  # nobody can know which of the two it is
                roles = pair.corrupted_ids[pair.positions["IO"]], pair.corrupted_ids[pair.positions["S1"]]
                ids, right, weight = pair.corrupted_ids, roles, 1.0
                if frozenset(roles) in held_out:
                    continue
            if name == "greater_than" and not clean:
                right = tuple(lexicon.token(year) for year in words.YEARS[2:])
            end = tail()
            yield [*ids, rng.choice(right), *end], [1.0] * len(ids) + [weight] + [1.0] * len(end)

    def repeats() -> Iterator[Sentence]:
        while True:
            length = rng.randint(4, 12)
            ids = rng.sample(common, length)
            yield ids + ids + code["."], [1.0] * (length + 1) + [ANSWER_WEIGHT] * (length - 1) + [1.0]

    def filler() -> Iterator[Sentence]:
        lists = {"person": list(words.PEOPLE), "place": words.PLACES, "thing": words.COMMON[:12], "object": words.OBJECTS}
        lists |= {"adjective": ADJECTIVES, "name": words.NAMES}
        while True:
            text = rng.choice(FILLERS)
            for slot, options in lists.items():
                while "{" + slot + "}" in text:
                    text = text.replace("{" + slot + "}", rng.choice(options), 1)
            ids = list(lexicon.encode(text) or ())
            lexicon._cache.pop(text)
            yield ids, [1.0] * len(ids)

    def stop() -> list[int]:
        return code["."]

    def described() -> list[int]:
        return [rng.choice(adjectives), *code["."]]

    def documented() -> list[int]:
        return [*code[":"], *rng.sample(common, 2), *code["."]]

    mix: list[tuple[float, Iterator[Sentence]]] = [
        (4.0, ends("ioi", stop, order="mixed", template="plain")),
        (4.0, ends("ioi", stop, order="mixed", template="mixed")),
        (0.3, ends("ioi", stop, order="mixed", template="mixed", corruption="abc")),
        (3.0, ends("greater_than", stop)),
        *((1.0, ends("agreement", described, variant=variant)) for variant in agreement.TEMPLATES),
        (2.5, ends("pronoun", described)),
        (2.5, ends("docstring", documented, corruption="swap")),
        (0.5, ends("docstring", documented, corruption="rename")),
        (2.0, repeats()),
        (1.0, ends("facts", stop, relation="capital")),
        (1.0, ends("facts", stop, relation="language")),
        (2.0, filler()),
    ]
    weights, streams = zip(*mix, strict=True)
    while True:
        yield next(rng.choices(streams, weights)[0])


def rows(lexicon: Lexicon, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of <bos> and packed sentences, cut at ROW tokens; with the loss weight of each token."""
    sentences = corpus(lexicon, seed)
    ids, weights = torch.zeros(n, ROW, dtype=torch.int16), torch.zeros(n, ROW, dtype=torch.float16)
    bos = lexicon.token("<bos>")
    for i in range(n):
        row, weight = [bos], [0.0]
        while len(row) < ROW:
            more, more_weight = next(sentences)
            row += more
            weight += more_weight
        ids[i], weights[i] = torch.tensor(row[:ROW]), torch.tensor(weight[:ROW])
    return ids, weights


# --- models and training ---------------------------------------------------------------------------------------------


def build(name: str, vocab: int) -> torch.nn.Module:
    """An untrained model."""
    special = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(SEED)
    if name == "demo-llama":
        config = LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, tie_word_embeddings=True, **special,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    layers = {"demo-gpt2": 12, "demo-gpt2-4l": 4}[name]
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=layers, n_head=4, n_positions=64, activation_function="gelu_new", **dropout, **special))


def train(model: torch.nn.Module, ids: Tensor, weights: Tensor, steps: int, progress: Callable[[int, float], None]) -> None:
    """Muon on the matrices of the blocks, AdamW on the rest."""
    is_block_matrix = {name: p.ndim == 2 and (".h." in name or ".layers." in name) for name, p in model.named_parameters()}
    muon = torch.optim.Muon([p for name, p in model.named_parameters() if is_block_matrix[name]], lr=0.02, weight_decay=0.05)
    adam = torch.optim.AdamW([p for name, p in model.named_parameters() if not is_block_matrix[name]], lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP, 1.0, (steps - step) / (steps * (1 - HOLD)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in (muon, adam)]
    model.train()
    running = math.nan
    for step in range(steps):
        batch = ids[step * BATCH : (step + 1) * BATCH].long()
        weight = weights[step * BATCH : (step + 1) * BATCH, 1:].float()
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip((muon, adam), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        progress(step + 1, running)
    model.eval()


# --- measuring -------------------------------------------------------------------------------------------------------


def requirements() -> Iterator[tuple[str, str, dict[str, str], float]]:
    """(label, task, options, least value) of everything that is measured."""
    for order in ioi.ORDERS:
        yield f"ioi {order}", "ioi", {"order": order}, 0.98
    yield "ioi all templates", "ioi", {"order": "mixed", "template": "mixed"}, 0.98
    for variant in agreement.TEMPLATES:
        yield f"agreement {variant}", "agreement", {"variant": variant}, 0.98
    yield "induction", "induction", {}, 0.98
    for relation in facts.RELATIONS:
        yield f"facts {relation}", "facts", {"relation": relation}, 0.98
    for corruption in ("swap", "rename"):
        yield f"docstring {corruption}", "docstring", {"corruption": corruption}, 0.98
    yield "pronoun", "pronoun", {}, 0.95
    yield "greater_than", "greater_than", {}, 0.85


def measure(model: torch.nn.Module, lexicon: Lexicon, n: int) -> dict[str, tuple[float, int, float]]:
    """Forced-choice accuracy per task on new pairs (both prompts of each); for greater_than the mean probability of valid years."""
    with_bos = Lexicon(lexicon.model_name, lexicon.tokenizer, lexicon.vocab_size, 0)
    held_out = held_out_names(lexicon)
    plain = SimpleNamespace(
        name=lexicon.model_name,
        tokenizer=lexicon.tokenizer,
        bos_id=0,
        vocab_size=lexicon.vocab_size,
        n_positions=64,
        device="cpu",
        run=lambda tokens: model(tokens),
    )
    found = {}
    for label, name, options, least in requirements():
        pairs = GENERATORS[name].distinct(with_bos, 10_000, options)
        pairs = (pair for pair in pairs if name != "ioi" or is_held_out(pair, held_out))
        task = Task(name, tuple(itertools.islice(pairs, n)), GENERATORS[name].metric_object(), {}, lexicon.tokenizer)
        if name == "greater_than":
            values = []
            for batch in task.batches():
                with torch.no_grad():
                    probabilities = model(batch.clean).logits[:, -1].softmax(-1)
                values.append(probabilities.gather(-1, batch.answers.correct).masked_fill(~batch.answers.correct_mask, 0.0).sum(-1))
            value = torch.cat(values).mean().item()
        else:
            shares = task.accuracy(plain)
            value = (shares["clean"] + 1 - shares["corrupted"]) / 2
        found[label] = (value, len(task), least)
    return found


CARD = """# {name}

{what}, trained by `scripts/train_demo_models.py` (seed {seed}, {steps} steps of {batch} rows of {row} tokens) on generated
sentences of the patchlab tasks and filler. {parameters:,} parameters, stored as float16, made to be loaded as float32. Word-level
vocabulary of {vocab} words; prompts begin with `<bos>`. It knows these sentences and nothing else.

Measured after the cast to float16, on pairs of a seed that training does not use. Accuracy is forced choice: the share of
prompts (clean and corrupted) whose right answer has the higher logit. The IOI pairs have two names that never met in an IOI sentence of
the training text. For `greater_than` it is the mean probability of all valid years.

| task | pairs | measured | required |
|---|---|---|---|
{table}
"""
WHAT = {
    "demo-gpt2": "GPT-2 style model: 12 layers, d_model 64, 4 heads, GELU, LayerNorm, learned positions",
    "demo-llama": "Llama style model: 6 layers, d_model 128, 4 heads, 2 KV heads, rotary positions, RMSNorm, SwiGLU",
    "demo-gpt2-4l": "GPT-2 style model: 4 layers, d_model 64, 4 heads, GELU, LayerNorm, learned positions",
}


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face directory: float16 weights, a configuration that says float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit_json(folder / "config.json", dtype="float32")
    # transformers 5 names a class that older versions refuse
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "generation_config.json").unlink(missing_ok=True)


def edit_json(path: Path, **values: object) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


def make(name: str, tokenizer: PreTrainedTokenizerFast, data: tuple[Tensor, Tensor], out: Path, steps: int, n: int) -> bool:
    """Train, save, measure and describe one model; False if it misses a requirement."""
    lexicon = Lexicon(name, tokenizer, len(tokenizer), None)
    model = build(name, len(tokenizer))
    start = time.perf_counter()

    def progress(step: int, loss: float) -> None:
        if step % 500 == 0:
            model.eval()
            short = {label: round(value, 3) for label, (value, _, _) in measure(model, lexicon, 100).items()}
            model.train()
            print(f"{name} step {step} loss {loss:.3f} {time.perf_counter() - start:.0f} s {short}", flush=True)

    train(model, *data, steps, progress)
    new = out / f".{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    save(model, tokenizer, new)
    loaded = AutoModelForCausalLM.from_pretrained(new).eval()
    if loaded.dtype != torch.float32:
        print(f"{name} loads as {loaded.dtype}, not float32", file=sys.stderr)
        return False
    found = measure(loaded, lexicon, n)
    table = "\n".join(f"| {label} | {pairs} | {value:.3f} | {least} |" for label, (value, pairs, least) in found.items())
    parameters = sum(p.numel() for p in loaded.parameters())
    card = CARD.format(
        name=name, what=WHAT[name], seed=SEED, steps=steps, batch=BATCH, row=ROW, parameters=parameters, vocab=len(tokenizer), table=table
    )
    (new / "README.md").write_text(card)
    print(card, f"{time.perf_counter() - start:.0f} s", flush=True)
    if missed := {label: value for label, (value, _, least) in found.items() if value < least}:
        print(f"{name} misses its requirements: {missed}; see {new}", file=sys.stderr)
        return False
    shutil.rmtree(out / name, ignore_errors=True)
    new.rename(out / name)
    return True


def main() -> int:
    """Train the models that are named, all of them if none is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WHAT)}; all if none")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pairs", type=int, default=1000, help="pairs per measured task")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(WHAT)):
        parser.error(f"there is no model {', '.join(unknown)}; valid: {', '.join(WHAT)}")
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    start = time.perf_counter()
    data = rows(Lexicon("demo", tokenizer, len(tokenizer), None), arguments.steps * BATCH, SEED)
    print(f"{len(tokenizer)} words, {len(data[0])} rows in {time.perf_counter() - start:.0f} s", flush=True)
    done = [make(name, tokenizer, data, arguments.out, arguments.steps, arguments.pairs) for name in arguments.names or WHAT]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
