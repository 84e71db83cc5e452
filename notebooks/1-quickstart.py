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
# # 1 · Quickstart: where does a model keep the indirect object?
#
# A prompt such as *When Jack and John went to the store, John gave a ball to* has one sensible next word. We look for the activations of a
# transformer that decide it: exactly, by putting each of them into another run of the model (*activation patching*), and approximately, from one
# backward pass. You need to know what a transformer is, and some PyTorch.
#
# Task: [Wang et al. 2022](https://arxiv.org/abs/2211.00593). Attribution patching (AtP): [Syed et al. 2023](https://arxiv.org/abs/2310.10348).
# Relevance patching (RelP): [Jafari et al. 2025](https://arxiv.org/abs/2508.21258).

# %%
import patchlab as pl

# %% [markdown]
# ## A model and a task
# `demo-gpt2` comes with patchlab: 12 layers of 4 heads, 64 wide, trained on synthetic sentences. `ioi` makes *pairs* of prompts: the clean one
# has the behaviour, the corrupted one differs from it as little as it can and does not. Here the second mention of the subject is replaced by the
# other name, which turns the answer round.

# %%
model = pl.load_model("demo-gpt2")
task = pl.load_task("ioi", model, n=16)
task.show(1)

# %% [markdown]
# Both prompts have the same number of tokens, and differ at one position, `S2`. Is the model any good at it? *clean* is how often the clean
# prompt gets the clean answer as the model's first choice; *corrupted* how often the corrupted prompt gets that same answer, which it should not.

# %%
task.accuracy(model)

# %% [markdown]
# ## Three methods
# A **score** is what moving one activation from the clean run into the corrupted run does to the *metric*: the logit of the right name minus the
# logit of the wrong one. Positive means: towards the clean answer. That is called *denoising*.
#
# - `ActivationPatching` really does that, one activation after another. It is the truth that the others estimate.
# - `AttributionPatching` multiplies the difference of the two activations with the gradient of the metric: all activations at once, from two
#   forward passes and one backward pass.
# - `RelevancePatching` does the same with the coefficients of layer-wise relevance propagation in the gradient's place, at the same cost.
#
# The sites are the stream before each layer (`resid_pre`), what each MLP adds to it (`mlp_out`), and the heads of the attention (`z`).

# %%
sites = ["resid_pre", "mlp_out", "z"]
exact = pl.ActivationPatching().run(model, task, sites, progress=False)
atp = pl.AttributionPatching().run(model, task, sites, progress=False)
relp = pl.RelevancePatching().run(model, task, sites, progress=False)
for scores in (exact, atp, relp):
    print(scores)

# %%
pl.plots.heatmaps(exact).show()

# %% [markdown]
# Read it from the top. The information is at `S2`, where the prompts differ, and stays there until about layer 5. Between layers 5 and 7 heads
# carry it to `END`, the last position, where the answer is read off. The first MLP at `S2` is as important as the stream itself, since nothing
# about the changed token gets further without it. Grey cells cannot matter, and are known beforehand: no path leads from them to the answer, or
# both prompts are the same up to there.
#
# ## How well do the approximations agree with the exact scores?

# %%
pl.plots.agreement(exact, {"AtP": atp, "RelP": relp}).show()

# %% [markdown]
# A point is a cell of the heatmaps. On the dashed line the approximation is right. Both find the right cells, and both are too small where
# effects are large, AtP more so: a slope of .46 says that it predicts half of what patching the stream does. Correlations do not see that. In
# numbers, with intervals over prompts:

# %%
comparison = pl.compare(exact, {"AtP": atp, "RelP": relp})
columns = {"pearson_per_prompt": "per prompt", "pearson": "of means", "pearson_pooled": "pooled", "spearman": "Spearman", "slope": "slope"}
table = comparison.table.query("cells == 'live'").set_index(["site", "method"]).sort_index()
table[list(columns)].rename(columns=columns).round(2)

# %% [markdown]
# *Per prompt* is the mean over prompts of Pearson's correlation on one prompt; *of means* is that of the maps of example means, which the figure
# shows, where errors that cancel do not show; *pooled* takes all prompts' effects at once. *Spearman* is the correlation of ranks.
#
# Is RelP surely better, or by luck of these 16 prompts? The difference of the two, with its 95 % interval over resamples of the prompts, the same
# ones for both methods:

# %%
difference = comparison.differences.query("cells == 'live'").set_index("site")
difference[["method", "other", "pearson_per_prompt", "pearson_per_prompt_lo", "pearson_per_prompt_hi"]].round(3)

# %% [markdown]
# Each interval lies above 0: surely better, if only a little on heads. That is not so on every task; [notebook
# 2](2-gradients-and-relevance.ipynb) has one where RelP loses. `comparison` by itself shows all statistics with intervals, costs, and how many
# cells one has to patch exactly to be sure of the largest; `pl.plots.comparison(comparison)` draws them.

# %% [markdown]
# ## Intervene by hand
# Methods use the same interface that is open to you: *edits* at sites, with values from a *source*. Patching the head with the largest exact
# effect by hand gives its score.

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

# %% [markdown]
# ## The same on your own prompts
# Pairs can be written down: clean prompt, corrupted prompt, right and wrong answer. Both prompts need the same number of tokens, and an answer is
# one token; what does not fit is refused with the word that is to blame ([notebook 4](4-your-own-model-and-task.ipynb) has all about that). These
# have the names the other way round, with the giver first.

# %%
pairs = [
    ("When Mary and John went to the store, Mary gave a drink to", "When Mary and John went to the store, John gave a drink to", "John", "Mary"),
    ("When Paul and Anna went to the park, Paul gave a ring to", "When Paul and Anna went to the park, Anna gave a ring to", "Anna", "Paul"),
    ("When Kate and Mark went to the school, Kate gave a book to", "When Kate and Mark went to the school, Mark gave a book to", "Mark", "Kate"),
    ("When Dan and Lisa went to the garden, Dan gave a ball to", "When Dan and Lisa went to the garden, Lisa gave a ball to", "Lisa", "Dan"),
]
mine = pl.Task.from_pairs(model, pairs, name="mine")
mine.accuracy(model)

# %%
methods = {"exact": pl.ActivationPatching(), "AtP": pl.AttributionPatching(), "RelP": pl.RelevancePatching()}
own = {name: method.run(model, mine, "resid_pre", progress=False) for name, method in methods.items()}
pl.plots.heatmaps({name: own[name] for name in ("exact", "RelP")}).show()

# %% [markdown]
# The same picture. Does RelP do better than AtP here, too? On the mean of these four prompts it does worse, and the interval of the difference is
# so wide that nothing can be said: four prompts are too few. Look at the width of the intervals before you believe a difference.

# %%
difference = pl.compare(own["exact"], {"AtP": own["AtP"], "RelP": own["RelP"]}).differences.query("cells == 'live'")
difference[["method", "other", "pearson_per_prompt", "pearson_per_prompt_lo", "pearson_per_prompt_hi"]].round(2)

# %% [markdown]
# ## Where to go next
# - [2](2-gradients-and-relevance.ipynb) why gradients fail where relevance does not, and where relevance fails
# - [3](3-ioi-circuit.ipynb) the circuit of this task, found and tested
# - [4](4-your-own-model-and-task.ipynb) your own model and task
# - [5](5-agreement-is-not-circuit-quality.ipynb) agreement is not circuit quality
# - [6](6-features.ipynb) sparse feature circuits and attribution graphs
# - [7](7-sweeps-and-reports.ipynb) many runs from one file, and their report
