"""Train the packaged demo models on text that contains every task, and write them with a measured model card.

    python scripts/train_demo_models.py                 # all three, some 15 minutes on an idle core
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchlab.methods import ActivationPatching
from patchlab.models import load_model
from patchlab.tasks.generators import agreement, docstring, facts, ioi, words
from patchlab.tasks.generators.lexicon import Lexicon
from patchlab.tasks.registry import GENERATORS
from patchlab.tasks.sentences import ADJECTIVES, ANSWER_WEIGHT, FILLERS, ROW, held_out_names, is_held_out, rows
from patchlab.tasks.task import Task

OUT = Path(__file__).resolve().parents[1] / "patchlab" / "models" / "demo"
WARMUP, HOLD = 50, 0.4
REACH = 3
MUON, ADAM = 0.006, 3e-3


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Args:
        steps: batches.
        batch: rows of a batch.
        seed: of the weights, of the text and of what is dropped.
        calm: steps at the start while the tasks are learnt: no swapped answers, no dropout, and no sentence sees the ones before it.
        apart: share of the rows of a batch where no sentence sees the ones before it after that.
        swaps: share of the training answers that are swapped at the end.
        first_swaps: that share right after ``calm``; it falls evenly from there.
        fall: steps of the fall; with 0 there is none, and ``first_swaps`` does nothing.
        penalty: what is added to the loss, times the mean share of attention (over rows, queries and heads of the first third of the
            layers) that goes to tokens more than REACH back, <bos> apart.
        head_dropout: share of the heads that are dropped, drawn anew for each row and step.
        layer_dropout: share of the attention layers that are dropped, likewise.
        whole: share of the rows of a batch of which nothing is dropped.
        arguments: weight in the loss of the arguments that a docstring names before its answer; they too follow from the signature.
        either: weight, after ``calm``, of IOI answers of which nobody can know which of two names it is.
        years: weight, after ``calm``, of the answers of greater_than.
    """

    steps: int
    calm: int
    apart: float
    batch: int = 16
    seed: int = 0
    swaps: float = 0.08
    first_swaps: float = 0.0
    fall: int = 0
    penalty: float = 1.0
    head_dropout: float = 0.15
    layer_dropout: float = 0.15
    whole: float = 0.0
    arguments: float = 1.0
    either: float = 1.0
    years: float = ANSWER_WEIGHT

    def uncertain_weights(self, row: int) -> tuple[float, float]:
        """``either`` and ``years`` in a row of the training text; what they are without a recipe until ``calm`` is over."""
        return (1.0, ANSWER_WEIGHT) if row < self.calm * self.batch else (self.either, self.years)

    def swapped(self, row: int) -> float:
        """The share of the answers that are swapped in a row of the training text."""
        since = row / self.batch - self.calm
        if since < 0:
            return 0.0
        return self.swaps + (self.first_swaps - self.swaps) * (max(0.0, 1 - since / self.fall) if self.fall else 0.0)


RECIPES = {
    "demo-gpt2": Recipe(
        steps=2400,
        calm=900,
        apart=0.75,
        swaps=0.1,
        first_swaps=0.3,
        fall=500,
        head_dropout=0.15,
        layer_dropout=0.0,
        whole=0.3,
        arguments=10.0,
        either=10.0,
        years=20.0,
    ),
    "demo-llama": Recipe(steps=2000, calm=800, apart=0.75, layer_dropout=0.1),
    "demo-gpt2-4l": Recipe(steps=3500, calm=2000, apart=0.75, head_dropout=0.1, layer_dropout=0.0),
}
WANTED = {"demo-gpt2": "wanted", "demo-llama": "wanted of demo-gpt2", "demo-gpt2-4l": "wanted of demo-gpt2"}
RUNS = {
    "demo-gpt2": (
        "17 runs were tried, 11 of them stopped early; of the 6 others 2 have\nthe accuracies, and of these this one comes nearer to what is wanted"
    ),
    "demo-llama": "one run was tried",
    "demo-gpt2-4l": "2 runs were tried, and the first did not learn docstring",
}


# --- vocabulary ------------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every word of the templates and the word lists, in a fixed order."""
    split = pre_tokenizers.Whitespace()
    couples = (words.PEOPLE, words.VERBS, words.RELATIVE_VERBS, words.CAPITALS, words.LANGUAGES)
    lists = (words.NAMES, words.PLACES, words.OBJECTS, words.PREPOSITIONS, words.ADVERBS, words.EVENTS, words.CENTURIES, words.YEARS)
    lists += (words.FUNCTIONS, words.ARGUMENTS, words.COMMON, ADJECTIVES, ["he", "she", "it", "they"])
    templates = [*ioi.TEMPLATES.values(), *agreement.TEMPLATES.values(), docstring.TEMPLATE, *(text for text, _ in facts.RELATIONS.values())]
    templates += [sys.modules[f"patchlab.tasks.generators.{name}"].TEMPLATE for name in ("greater_than", "pronoun")]
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


# --- models and training ---------------------------------------------------------------------------------------------


def build(name: str, vocab: int, seed: int) -> torch.nn.Module:
    """An untrained model."""
    special = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(seed)
    if name == "demo-llama":
        config = LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, tie_word_embeddings=True, **special,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    layers = {"demo-gpt2": 12, "demo-gpt2-4l": 4}[name]
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=layers, n_head=4, n_positions=64, activation_function="gelu_new", **dropout, **special))
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")  # what gelu_new is, in one step
    return model


class Regulariser:
    """What a model has while it is trained, and nothing of which is saved: heads and layers that are dropped, a price on attention that goes far.

    ``far`` has the share of it per layer of the first third, from the forward passes since it was last cleared.
    """

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        self.recipe, self.dropping = recipe, False
        self.far: list[Tensor] = []
        self.draws = torch.Generator().manual_seed(recipe.seed)
        back = torch.arange(ROW)[:, None] - torch.arange(ROW)
        self.future = torch.zeros(ROW, ROW).masked_fill(back < 0, -torch.inf)
        self.mask = self.future
        self.is_far = ((back > REACH) & (torch.arange(ROW) > 0)).float()
        self.local_layers = model.config.num_hidden_layers // 3
        AttentionInterface.register("demo_training", self.attend)
        model.set_attn_implementation("demo_training")

    def begin(self, places: Tensor, dropping: bool) -> None:
        """Get ready for a training step, where a token sees <bos> and those of the same place [row, pos]."""
        self.far.clear()
        apart = (places[:, :, None] != places[:, None, :]) & (places[:, None, :] > 0)
        self.dropping, self.mask = dropping, self.future.masked_fill(apart, -torch.inf)[:, None]

    def end(self) -> None:
        """Let the model run on anything, as it will without this."""
        self.dropping, self.mask = False, self.future

    def attend(self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: object) -> tuple[Tensor, None]:
        """Causal attention, as transformers calls it: q [batch, head, pos, d] -> z [batch, pos, head, d]."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        n = q.shape[2]
        pattern = (q @ k.transpose(-1, -2) * scaling + self.mask[..., :n, :n]).softmax(-1)
        if module.layer_idx < self.local_layers:
            self.far.append((pattern.mean((0, 1)) * self.is_far[:n, :n]).sum(-1).mean())
        z = self.drop(self.drop(pattern @ v, self.recipe.head_dropout, 2), self.recipe.layer_dropout)
        return z.transpose(1, 2), None

    def drop(self, output: Tensor, share: float, axes: int = 1) -> Tensor:
        """An output [row, ...] with a share of its slices along the first axes set to zero, and the others scaled up for that.

        The first rows stay as they are, a share ``whole`` of the recipe.
        """
        if not self.dropping or not share:
            return output
        shape = output.shape[:axes] + (1,) * (output.ndim - axes)
        factors = (torch.rand(shape, generator=self.draws) >= share) / (1 - share)
        factors[: round(self.recipe.whole * len(factors))] = 1.0
        return output * factors


class Muon:
    """Muon (Jordan et al. 2024) for matrices: momentum, its singular values set to about 1; all matrices of one shape at once."""

    def __init__(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        self.rate, self.decay = rate, decay
        self.groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            self.groups[matrix.shape].append(matrix)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Move the matrices by their gradients, with the learning rate times ``factor``, and forget the gradients."""
        rate = self.rate * factor
        for (rows_, columns), group in self.groups.items():
            gradients = torch.stack([matrix.grad for matrix in group])
            momentum = self.momenta[group[0].shape].lerp_(gradients, 0.05)
            moves = orthogonal(gradients.lerp(momentum, 0.95)) * max(1, rows_ / columns) ** 0.5
            for matrix, move in zip(group, moves, strict=True):
                matrix.mul_(1 - rate * self.decay).sub_(move, alpha=rate)
                matrix.grad = None


def orthogonal(stack: Tensor) -> Tensor:
    """Matrices [n, a, b] with their singular values set to about 1, by five steps of Newton and Schulz."""
    if stack.shape[1] > stack.shape[2]:
        return orthogonal(stack.mT).mT
    x = stack / stack.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def train(model: torch.nn.Module, text: tuple[Tensor, Tensor, Tensor], recipe: Recipe, progress: Callable[[int, float], None]) -> None:
    """Muon on the matrices of the blocks, AdamW on the rest."""
    plain = model.config._attn_implementation
    regulariser = Regulariser(model, recipe)
    is_block_matrix = {name: p.ndim == 2 and (".h." in name or ".layers." in name) for name, p in model.named_parameters()}
    muon = Muon([p for name, p in model.named_parameters() if is_block_matrix[name]], MUON, 0.05)
    adam = torch.optim.AdamW([p for name, p in model.named_parameters() if not is_block_matrix[name]], lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    running = math.nan
    for step in range(recipe.steps):
        batch, weight, places = (part[step * recipe.batch : (step + 1) * recipe.batch] for part in text)
        batch, weight = batch.long(), weight[:, 1:].float()
        share = 1.0 if step < recipe.calm else recipe.apart
        is_apart = torch.arange(len(places))[:, None] < share * len(places)
        regulariser.begin(places * is_apart, dropping=step >= recipe.calm)
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum()
        (loss + recipe.penalty * torch.stack(regulariser.far).mean()).backward()
        regulariser.end()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min((step + 1) / WARMUP, 1.0, (recipe.steps - step) / (recipe.steps * (1 - HOLD)))
        muon.step(factor)
        adam.param_groups[0]["lr"] = ADAM * factor
        adam.step()
        adam.zero_grad(set_to_none=True)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        progress(step + 1, running)
    model.eval()
    model.set_attn_implementation(plain)


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


def new_pairs(name: str, lexicon: Lexicon, n: int, options: dict[str, str]) -> Task:
    """Pairs of a seed that training does not use; of IOI those of two names that never met in an IOI sentence of the training text."""
    held_out = held_out_names(lexicon)
    with_bos = Lexicon(lexicon.model_name, lexicon.tokenizer, lexicon.vocab_size, 0)
    pairs = (pair for pair in GENERATORS[name].distinct(with_bos, 10_000, options) if name != "ioi" or is_held_out(pair, held_out))
    return Task(name, tuple(itertools.islice(pairs, n)), GENERATORS[name].metric_object(), {}, lexicon.tokenizer)


def temperature(model: torch.nn.Module, lexicon: Lexicon, swaps: float, n: int = 512) -> float:
    """What the logits must be divided by for the lowest loss on text of another seed, every token of it counting alike: 1 is calibrated."""
    ids = rows(lexicon, n, 20_000, lambda _: swaps)[0].long()
    with torch.no_grad():
        logits = torch.cat([model(part, use_cache=False).logits[:, :-1] for part in ids.split(64)]).flatten(0, 1)
    log_scale = torch.zeros((), requires_grad=True)
    search = torch.optim.LBFGS([log_scale], line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = torch.nn.functional.cross_entropy(logits * log_scale.exp(), ids[:, 1:].flatten())
        value.backward()
        return value

    search.step(loss)
    return math.exp(-log_scale.item())


@dataclass(frozen=True)
class Spread:
    """Where a model does IOI: exact denoising on new pairs, effects as a share of the gap (clean − corrupted, in logits).

    ``resid_pre`` is [layer, pos], ``z`` [layer, head]; ``live`` marks the cells of resid_pre that can matter; ``heads`` describes the
    heads of at least 5 % of the gap in order: "L5.H3 +0.41, at END, looks at S2 (0.97)".
    """

    pairs: int
    gap: float
    temperature: float
    resid_pre: np.ndarray
    live: np.ndarray
    z: np.ndarray
    s2: int
    heads: tuple[str, ...]

    def figures(self) -> Iterator[tuple[str, str, float, float, float]]:
        """(label, form, measured, least, most) of what is wanted of demo-gpt2."""
        strong = abs(self.z) >= 0.05
        yield "IOI gap in logits", ".2f", self.gap, 4, 10
        yield "temperature that fits new text best", ".3f", self.temperature, 0.9, 1.1
        yield "layers where S2 holds more than half of the gap", ".0f", (self.resid_pre[:, self.s2] > 0.5).sum(), 3, math.inf
        cells = abs(self.resid_pre[self.live]) > 0.01
        yield f"resid_pre cells above 1 % of the gap, of {len(cells)} live ones", ".0f", cells.sum(), 16, math.inf
        yield "heads with at least 5 % of the gap", ".0f", strong.sum(), 5, math.inf
        yield "layers with such heads", ".0f", strong.any(1).sum(), 4, math.inf


def spread(folder: Path, lexicon: Lexicon, n: int, swaps: float) -> Spread:
    """Patch a saved model exactly on new IOI pairs."""
    task = new_pairs("ioi", lexicon, n, {})
    found = ActivationPatching().run(load_model(str(folder), device="cpu"), task, ["resid_pre", "z", "z[layer,pos,head]"])
    resid_pre, z, by_place = (found.mean(site).values / found.gap for site in found.sites)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = torch.tensor([pair.clean_ids for pair in task.pairs])
    with torch.no_grad():
        patterns = torch.stack(eager(tokens, output_attentions=True).attentions).mean(1).numpy()  # layer, head, dest, src
    axis = task.position_axis()
    names = [role or text.strip() for role, text in zip(axis.roles, axis.tokens[0], strict=True)]
    heads = []
    for layer, head in np.argwhere(abs(z) >= 0.05):
        place = abs(by_place[layer, :, head]).argmax()
        looks = patterns[layer, head, place]
        heads.append(f"L{layer}.H{head} {z[layer, head]:+.2f}, at {names[place]}, looks at {names[looks.argmax()]} ({looks.max():.2f})")
    fitted = temperature(eager, lexicon, swaps)
    return Spread(len(task), found.gap, fitted, resid_pre, found.live["resid_pre"].values, z, task.pairs[0].positions["S2"], tuple(heads))


def measure(model: torch.nn.Module, lexicon: Lexicon, n: int) -> dict[str, tuple[float, int, float]]:
    """Forced-choice accuracy per task on new pairs (both prompts of each); for greater_than the mean probability of valid years."""
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
        task = new_pairs(name, lexicon, n, options)
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

To bring it nearer to models of real text, {swaps} of the training answers were swapped for wrong ones (the years of `greater_than`, uncertain
anyway, were not), attention in the first third of the layers that went more than {reach} tokens back (`<bos>` apart) cost {penalty:g} times its mean
share, and {dropped} were dropped at each step{where}. The first {calm} steps were
without swaps and dropout, and no sentence saw the ones before it ({apart} of the rows stayed so).{more} Nothing of this is left when the model runs.

Measured after the cast to float16, on pairs of a seed that training does not use. Accuracy is forced choice: the share of
prompts (clean and corrupted) whose right answer has the higher logit. The IOI pairs have two names that never met in an IOI sentence of
the training text. For `greater_than` it is the mean probability of all valid years.

| task | pairs | measured | required |
|---|---|---|---|
{table}

Where it does IOI: exact patching (denoising) on {ioi} such pairs with the task's defaults, effects as a share of the gap between clean and corrupted.
The temperature is what the logits are divided by for the lowest loss on text of another seed.

| figure | measured | {wanted} |
|---|---|---|
{figures}

Recipe and seed were chosen by these figures and accuracies alone, never by which patching method comes out ahead; {runs}.
Heads with at least 5 % of the gap, patched at all positions; the position where they matter most, and what they look at from there (mean attention):

{heads}
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


def describe(name: str, recipe: Recipe, model: torch.nn.Module, found: dict[str, tuple[float, int, float]], ioi_found: Spread) -> str:
    """The card of a model."""
    swaps, more = f"{recipe.swaps:.0%}", ""
    if recipe.fall:
        overall = np.mean([recipe.swapped(row) for row in range(recipe.steps * recipe.batch)])
        swaps += f" (at first {recipe.first_swaps:.0%}, falling over {recipe.fall} steps; {overall:.1%} in all)"
    if recipe.arguments != 1:
        more += f"\nThe arguments that a docstring names before its answer weighed {recipe.arguments:g} times another word in the loss."
    if recipe.either != 1:
        more += f"\nAfter those steps IOI answers that can be either of two names weighed {recipe.either:g} times."
    if recipe.years != ANSWER_WEIGHT:
        more += f"\nAfter those steps answers of `greater_than` weighed {recipe.years:g} times, other answers {ANSWER_WEIGHT:g} times."
    figures = []
    for label, form, value, least, most in ioi_found.figures():
        wanted = f"{least} or more" if most == math.inf else f"{least} to {most}"
        figures.append(f"| {label} | {value:{form}} | {wanted} |")
    return CARD.format(
        name=name, what=WHAT[name], seed=recipe.seed, steps=recipe.steps, batch=recipe.batch, row=ROW, vocab=model.config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()), swaps=swaps, more=more, reach=REACH, penalty=recipe.penalty,
        dropped=f"{recipe.head_dropout:.0%} of the heads and {recipe.layer_dropout:.0%} of the attention layers",
        where=f" in {1 - round(recipe.whole * recipe.batch) / recipe.batch:.0%} of the rows" if recipe.whole else "",
        calm=recipe.calm, apart=f"{recipe.apart:.0%}",
        table="\n".join(f"| {label} | {pairs} | {value:.3f} | {least} |" for label, (value, pairs, least) in found.items()),
        ioi=ioi_found.pairs, wanted=WANTED[name], figures="\n".join(figures), runs=RUNS[name],
        heads="\n".join(f"- {head}" for head in ioi_found.heads),
    )  # fmt: skip


def fit(
    name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path, report: Callable[[int, float, torch.nn.Module], None] | None = None
) -> None:
    """Train a model and save it into a folder; ``report`` gets the step, the running loss and the model after each step."""
    lexicon = Lexicon(name, tokenizer, len(tokenizer), None)
    model = build(name, len(tokenizer), recipe.seed)
    text = rows(lexicon, recipe.steps * recipe.batch, recipe.seed, recipe.swapped, recipe.arguments, recipe.uncertain_weights)
    train(model, text, recipe, lambda step, loss: report(step, loss, model) if report else None)
    save(model, tokenizer, folder)


def make(name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, out: Path, n: int) -> bool:
    """Train, save, measure and describe one model; False if it misses a requirement."""
    lexicon = Lexicon(name, tokenizer, len(tokenizer), None)
    start = time.perf_counter()

    def report(step: int, loss: float, model: torch.nn.Module) -> None:
        if step % 500 == 0:
            model.eval()
            short = {label: round(value, 3) for label, (value, _, _) in measure(model, lexicon, 100).items()}
            model.train()
            print(f"{name} step {step} loss {loss:.3f} {time.perf_counter() - start:.0f} s {short}", flush=True)

    new = out / f".{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    fit(name, recipe, tokenizer, new, report)
    loaded = AutoModelForCausalLM.from_pretrained(new).eval()
    if loaded.dtype != torch.float32:
        print(f"{name} loads as {loaded.dtype}, not float32", file=sys.stderr)
        return False
    found = measure(loaded, lexicon, n)
    ioi_found = spread(new, lexicon, min(n, 64), recipe.swaps)
    card = describe(name, recipe, loaded, found, ioi_found)
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
    parser.add_argument("--pairs", type=int, default=1000, help="pairs per measured task")
    parser.add_argument("--threads", type=int, default=1, help="another number rounds otherwise, and so gives another model")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(WHAT)):
        parser.error(f"there is no model {', '.join(unknown)}; valid: {', '.join(WHAT)}")
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    done = [make(name, RECIPES[name], tokenizer, arguments.out, arguments.pairs) for name in arguments.names or RECIPES]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
