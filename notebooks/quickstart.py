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
import os

import plotly.io

import patchlab as pl

plotly.io.renderers.default = os.environ.get("PLOTLY_RENDERER", "plotly_mimetype+notebook")  # so that nbconvert keeps the figures, too

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
comparison

# %%
pl.plots.agreement(exact, {"AtP": atp, "RelP": relp}).show()

# %%
pl.plots.comparison(comparison).show()

# %% [markdown]
# ## Intervene by hand
# Methods use the same interface that is open to you: edits at sites, with values from a source. Patching the head with the largest exact effect by
# hand gives its score.

# %%
heads = exact.mean("z")
layer, head = (int(i) for i in divmod(int(heads.to_numpy().argmax()), heads.sizes["head"]))
site = f"L{layer}.H{head}.z"

batch = task.batches()[0]
clean = model.run(batch.clean, keep=["z"])
runs = (model.run(batch.corrupted), model.run(batch.corrupted, edits=[pl.Edit(site, clean)]))
before, after = (task.metric(run.logits[:, -1], batch.answers).mean().item() for run in runs)
print(f"{site}: {before:.3f} before, {after:.3f} after, effect {after - before:.3f}; exact score {float(heads.max()):.3f}")

# %% [markdown]
# Inside `with pl.intervene(...)` edits surround everything, methods included: a silenced head has no score, and the others change.

# %%
with pl.intervene(model, pl.Edit(site, pl.sources.zero())):
    silenced = pl.RelevancePatching().run(model, task, ["z"], progress=False)
for name, scores in {"as it is": relp, f"{site} silenced": silenced}.items():
    layers = scores.mean("z").sum("head").to_numpy()
    print(f"{name}: score of the head {float(scores.mean('z')[layer, head]):.2f}; sum over heads, by layer:", " ".join(f"{x:.1f}" for x in layers))
