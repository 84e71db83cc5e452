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
# # Quickstart: where does a model keep the indirect object?
#
# A prompt such as *When Mary and John went to the store, John gave a drink to* has one sensible next word. We look for the activations
# that decide it: exactly, by patching each of them, and approximately, from a backward pass.

# %%
import patchlab as pl

# %% [markdown]
# ## A model and a task
# `demo-gpt2` is a packaged model with 12 layers. `ioi` makes pairs of prompts: the clean one, and a corrupted one in which the second mention of the
# subject is replaced by the other name, so that the answer turns round.

# %%
model = pl.load_model("demo-gpt2")
task = pl.load_task("ioi", model, n=16)
task

# %%
first = task.pairs[0]
for ids in (first.clean_ids, first.corrupted_ids):
    print(" ".join(task.token_text(token) for token in ids))
print("correct:", task.token_text(first.correct[0]), "  incorrect:", task.token_text(first.incorrect[0]))
task.accuracy(model)

# %% [markdown]
# ## Three methods
# Every method has the same interface. A score is the effect of moving one activation from the clean run into the corrupted one, in logits:
# positive = towards the clean answer.

# %%
sites = ["resid_pre", "attn_out", "mlp_out", "z"]
exact = pl.ActivationPatching().run(model, task, sites, progress=False)
atp = pl.AttributionPatching().run(model, task, sites, progress=False)
relp = pl.RelevancePatching().run(model, task, sites, progress=False)
for scores in (exact, atp, relp):
    print(scores)

# %%
pl.plots.heatmaps(exact).show()

# %% [markdown]
# ## How well do the two approximations agree with the exact scores?

# %%
comparison = pl.compare(exact, {"AtP": atp, "RelP": relp})
comparison.summary()

# %%
pl.plots.agreement(exact, {"AtP": atp, "RelP": relp}).show()

# %%
pl.plots.comparison(comparison).show()

# %% [markdown]
# ## Intervene by hand
# Methods run on the same interface that is open to you: edits at sites. Here the head with the largest exact effect is silenced on the clean prompts.

# %%
heads = exact.mean("z")
layer, head = (int(i) for i in divmod(int(heads.to_numpy().argmax()), heads.sizes["head"]))
site = f"L{layer}.H{head}.z"
tokens = task.batches()[0].clean
answer = first.correct[0]

before = model.run(tokens).logits[0, -1].softmax(-1)[answer]
after = model.run(tokens, edits=[pl.Edit(site, pl.zero())]).logits[0, -1].softmax(-1)[answer]
print(f"{site}: effect {float(heads.max()):.2f} logits; probability of the answer {float(before):.3f}, without the head {float(after):.3f}")

# %% [markdown]
# Inside `with pl.intervene(...)` the same edit surrounds everything, methods included.

# %%
with pl.intervene(model, pl.Edit(site, pl.zero())):
    print(task.accuracy(model))
print(task.accuracy(model))
