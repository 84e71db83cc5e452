# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Your own model and task
#
# A folder with a model, a file with prompts, and what patchlab has to say about both. It checks a lot when things are loaded, because almost
# everything that goes wrong later goes wrong silently: a hook that does not fire, a prompt that is a token longer than its partner, a model that
# never had the behaviour. This notebook makes those mistakes on purpose.

# %%
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig
from transformers.utils.logging import disable_progress_bar

import patchlab as pl
from patchlab.models import DEMO_MODELS


def attempt(action):
    """What an error says, instead of a traceback."""
    try:
        return action()
    except pl.PatchlabError as error:
        print(f"{type(error).__name__}: {error}")


# %% [markdown]
# ## A model
# A folder is what Hugging Face's `save_pretrained` writes. Here one of the packaged models stands for yours.

# %%
disable_progress_bar()  # for files that load in a second
home = Path(tempfile.mkdtemp())
folder = home / "my-model"
AutoModelForCausalLM.from_pretrained(DEMO_MODELS["demo-llama"]).save_pretrained(folder)
AutoTokenizer.from_pretrained(DEMO_MODELS["demo-llama"]).save_pretrained(folder)
print(*sorted(path.name for path in folder.iterdir()))

model = pl.load_model(folder)
model

# %% [markdown]
# That is all for a folder. With a network a hub name does as well, and a model in memory needs its tokenizer:
#
# ```python
# model = pl.load_model("gpt2", dtype="float32", device="cpu") model = pl.load_model(in_memory, tokenizer=tokenizer)
# ```
#
# Without `device` it goes to the GPU if there is one; without `dtype` it is float32.
#
# ### What the self-test says
# Each activation (*site*) is tried when a model is loaded: is its hook called once, does an edit reach the logits, does a patch of a run with
# itself change nothing, does a patch of everything give the other run. What does not hold is left out, with the reason. `my-model` has all of
# them. A model of the GPT-NeoX family (Pythia) has no stream between attention and MLP, as both read the same one:

# %%
torch.manual_seed(0)  # their weights are random
sizes = {"vocab_size": model.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
neox = pl.load_model(AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes)), tokenizer=model.tokenizer)
print(neox)
neox.arch.absent

# %% [markdown]
# Backward rules, which relevance patching stands on, are checked the same way: which rule sits on which module, and is anything left without?

# %%
print(pl.rules.coverage(neox, "relp"))

# %% [markdown]
# A rule has conditions. The Identity-rule replaces an activation by the factor f(x)/x, which makes no sense of one that is not 0 at 0:

# %%
odd = pl.load_model(AutoModelForCausalLM.from_config(LlamaConfig(**sizes, hidden_act="sigmoid")), tokenizer=model.tokenizer)
attempt(lambda: pl.rules.coverage(odd, "relp"))

# %% [markdown]
# Relevance patching refuses such a model rather than give numbers that are half gradient and half something else. Exact patching and gradients
# work on it, and so do rules without that one (`lrp[ln]`). [The table of architectures](../docs/families.md) has what is known.
#
# ## A task
# A task file is CSV or JSONL, a row per pair: clean prompt, corrupted prompt, correct and incorrect answer.

# %%
rows = """clean,corrupted,correct,incorrect
"When Mary and John went to the store, John gave a drink to","When Mary and John went to the store, Mary gave a drink to",Mary,John
"When Paul and Anna went to the park, Anna gave a ring to","When Paul and Anna went to the park, Paul gave a ring to",Paul,Anna
"When Kate and Mark went to the school, Mark gave a book to","When Kate and Mark went to the school, Kate gave a book to",Kate,Mark
"When Dan and Lisa went to the garden, Lisa gave a ball to","When Dan and Lisa went to the garden, Dan gave a ball to",Dan,Lisa
"""
path = home / "pairs.csv"
path.write_text(rows)
task = pl.load_task(path, model)
task.show(1)

# %% [markdown]
# First of all: does the model do it?

# %%
print("my-model:", task.accuracy(model))
print("the untrained one:", task.accuracy(neox))

# %% [markdown]
# Where a model does not do the task, there is nothing to find, and no method says so by itself: scores are as colourful as ever. What says so is
# the gap between clean and corrupted prompts:

# %%
for name, each in (("my-model", model), ("the untrained one", neox)):
    scores = pl.RelevancePatching().run(each, task, "resid_pre", progress=False)
    low, high = scores.gap_interval()
    print(f"{name}: gap {scores.gap:.2f} [{low:.2f}, {high:.2f}] logits")

# %% [markdown]
# Effects as shares of the gap (`scores.normalised()`) raise where its interval contains 0. `only_correct=True` in `load_task` keeps the pairs
# that the model solves.

# %% [markdown]
# ## Alignment errors, and how to read them
# Position 7 of one run is put at position 7 of the other, so both prompts of a pair need the same number of tokens, *with this model's
# tokenizer*. The usual mistakes:

# %%
clean = "When Mary and John went to the store, John gave a drink to"
mistakes = {
    "a longer partner": (clean, "When Mary and John went to the store and the park, Mary gave a drink to", "Mary", "John"),
    "a word that the tokenizer does not know": (clean, "When Mary and John went to the store, Marianne gave a drink to", "Mary", "John"),
    "an answer of two tokens": (clean, "When Mary and John went to the store, Mary gave a drink to", "Mary and", "John"),
    "nothing corrupted": (clean, clean, "Mary", "John"),
    "one answer on both sides": (clean, "When Mary and John went to the store, Mary gave a drink to", "Mary", "Mary"),
}
for name, pair in mistakes.items():
    print(f"\n{name}:")
    attempt(lambda pair=pair: pl.Task.from_pairs(model, [pair]))

# %% [markdown]
# Each message names the pair, what was got, what was expected, and what to do. Where a few pairs of a long file do not fit, `on_mismatch="drop"`
# leaves them out, and notes how many:

# %%
good = ("When Paul and Anna went to the park, Anna gave a ring to", "When Paul and Anna went to the park, Paul gave a ring to", "Paul", "Anna")
dropped = pl.Task.from_pairs(model, [good, mistakes["a longer partner"]], on_mismatch="drop")
print(dropped, *dropped.provenance["notes"], sep="\n")

# %% [markdown]
# A file with another header is told, too:

# %%
(home / "other.csv").write_text(rows.replace("corrupted", "other", 1))
attempt(lambda: pl.load_task(home / "other.csv", model))

# %% [markdown]
# ## Prompts of several lengths, and names for positions
# *Pairs* may differ in length from each other. But then position 10 of one pair has nothing to do with position 10 of the next. Watch for the
# note:

# %%
longer = (
    "Then Dan and Lisa went to the garden, and Lisa gave a ball to",
    "Then Dan and Lisa went to the garden, and Dan gave a ball to",
    "Dan",
    "Lisa",
)
mixed = pl.Task.from_pairs(model, [good, longer])
print(pl.RelevancePatching().run(model, mixed, "resid_pre", progress=False))

# %% [markdown]
# Only the last position was scored: it is all that the two have in common. Name what corresponds, by index or by word (`S2` is the *second*
# occurrence of the word), and scores line up by name:

# %%
named = pl.Task.from_pairs(
    model,
    [
        {"clean": good[0], "corrupted": good[1], "correct": "Paul", "incorrect": "Anna", "positions": {"IO": "Paul", "S1": "Anna", "S2": "Anna"}},
        {"clean": longer[0], "corrupted": longer[1], "correct": "Dan", "incorrect": "Lisa", "positions": {"IO": "Dan", "S1": "Lisa", "S2": "Lisa"}},
    ],
    name="named",
)
both = {
    name: method.run(model, named, "resid_pre", progress=False)
    for name, method in (("exact", pl.ActivationPatching()), ("RelP", pl.RelevancePatching()))
}
pl.plots.heatmaps(both).show()

# %% [markdown]
# The same as lines of a JSONL file: `{"clean": "...", "corrupted": "...", "correct": "Paul", "incorrect": "Anna", "positions": {"S2": "Anna"}}`.
#
# ## A metric of your own
# The default is the logit of the correct minus that of the incorrect answer. Anything that gives one number per example from the logits at the
# last position does: here, by how much the correct answer beats the best of *all* others.


# %%
def margin(logits, answers):
    right = logits.gather(-1, answers.correct[:, :1]).squeeze(-1)
    others = logits.scatter(-1, answers.correct[:, :1], float("-inf"))
    return right - others.amax(-1)


scores = pl.RelevancePatching().run(model, task.with_metric(margin), ["resid_pre", "z"], progress=False)
scores.top(3).round(2)

# %% [markdown]
# ## Keep it
# A score map is one file, with everything that made it. The whole comparison is a command as well, which writes a page to read:
#
# ```sh
# patchlab compare --model path/to/my-model --task pairs.csv --methods exact,atp,relp --sites resid_pre,z --out results
# ```

# %%
scores.save(home / "relp.nc")
again = pl.ScoreMap.load(home / "relp.nc")
print(again.provenance["method"], again.provenance["direction"], again.provenance["metric"], again.data["z"].shape)
