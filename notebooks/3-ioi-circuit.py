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
# # 3 · The IOI circuit of demo-gpt2, found and tested
#
# *When Jack and John went to the store, John gave a ball to* → *Jack*. [Wang et al. 2022](https://arxiv.org/abs/2211.00593) took the circuit of
# this behaviour in GPT-2 small apart, head by head. We do the same with a small model in a minute: which heads matter, what each does, along
# which paths they talk, and, above all, whether the story survives being tested. You should have seen [notebook 1](1-quickstart.ipynb).

# %%
import numpy as np
import pandas as pd

import patchlab as pl
from patchlab import lenses

model = pl.load_model("demo-gpt2")
sets = pl.circuits.three_sets(pl.load_task("ioi", model, n=96, only_correct=True))
task = sets.choosing
sets

# %% [markdown]
# All pairs are ones that the model solves. They are split in three, because whoever chooses and tests on the same prompts fools himself: 48 to
# look at, 24 to find the size of a circuit on, 24 to report.
#
# ## Which heads
# The exact effect of patching each head, and of its queries, keys and values apart.

# %%
exact = pl.ActivationPatching().run(model, task, ["z", "q", "k", "v"], direction="denoising", progress=False)
pl.plots.heatmaps(exact).show()

# %%
exact.top(8, "z").round(2)

# %% [markdown]
# Few heads, of two kinds. a8.h0 and a9.h0 (head 0 of layers 8 and 9) matter through their **queries**: *where* they look is what changes. a6.h2,
# a5.h3, a5.h0 and a7.h2 matter through their **values**: *what* they carry is what changes. Keys hardly matter anywhere.
#
# ## What do they look at?
# Mean attention from the last position, `END`, on the clean prompts:

# %%
movers, inhibitors = ["a8.h0", "a9.h0"], ["a6.h2", "a5.h3", "a5.h0", "a7.h2"]
seen = lenses.attention(model, task)


def attention(head, source, destination="END"):
    layer, index = (int(part) for part in head.removeprefix("a").split(".h"))
    patterns = seen.patterns.to_numpy()[:, layer, index]
    return np.mean([patterns[i, seen.positions[destination][i], seen.positions[source][i]] for i in range(len(task))])


pd.DataFrame({head: {source: attention(head, source) for source in ("IO", "S1", "S2")} for head in movers + inhibitors}).T.round(2)

# %%
pl.plots.attention(seen, ["a6.h2", "a8.h0"]).show()

# %% [markdown]
# a8.h0 and a9.h0 look at the indirect object (IO): **name movers**. The others look at the second subject, a6.h2 most of all, and are what Wang
# et al. call **S-inhibition heads**, if they tell the movers where *not* to look. That is a guess so far. What we do not see is a head that looks
# from S2 back to S1 (*duplicate-token* and *induction heads* of GPT-2 small):

# %%
heads = {f"a{layer}.h{head}": attention(f"a{layer}.h{head}", "S1", "S2") for layer in range(12) for head in range(4)}
pd.Series(heads).sort_values(ascending=False).head(5).round(2)

# %% [markdown]
# A quarter is the most, in a head that hardly matters. These pairs replace the *name* at S2, so there is no need to notice that it is a
# repetition: it is enough to say which name it is.
#
# ## Who writes the answer?
# *Direct logit attribution*: what each component wrote into the stream at `END`, times what the unembedding makes of it for right minus wrong
# name. It adds up to the metric.

# %%
direct = lenses.logit_lens().attribute(model, task, by="head")
direct.show(8)

# %% [markdown]
# The two movers lead, MLPs of the last layers follow, and a9.h3 writes *against* the answer, as GPT-2's negative name movers do. Two of the
# S-inhibition heads write something towards the answer themselves, too.
#
# ## Along which paths?
# *Path patching* ([Goldowsky-Dill et al. 2023](https://arxiv.org/abs/2304.05969)) moves what one component writes only as another one reads it.
# If the story is right, the four heads act on the movers' queries, and neither on their keys nor on their values.

# %%
pairs = [(source, mover) for source in inhibitors for mover in movers]
paths = {
    "m0 → values of S-inhibition": [f"m0->{source}<v>" for source in inhibitors],
    "S-inhibition → queries of movers": [f"{source}->{mover}<q>" for source, mover in pairs],
    "S-inhibition → keys of movers": [f"{source}->{mover}<k>" for source, mover in pairs],
    "S-inhibition → values of movers": [f"{source}->{mover}<v>" for source, mover in pairs],
    "S-inhibition → logits": [f"{source}->logits" for source in inhibitors],
    "movers → logits": [f"{mover}->logits" for mover in movers],
    "movers → later MLPs and logits": [f"{mover}->{reader}" for mover in movers for reader in ("m9", "m10", "m11", "logits")],
}
effects = pl.methods.patch_edges(model, task, paths, progress=False)
print(f"the whole gap: {effects.gap:.2f} logits")
effects.top().drop(columns="site").round(2)

# %% [markdown]
# It holds up, with an addition. The first MLP turns the token at S2 into something that the four heads carry to END: patching only these four
# edges brings back three quarters of the gap. From there 3.6 logits go through the movers' queries and nothing through their keys and values; but
# 1.9 go straight to the logits. And what the movers write counts for half as much again with what later MLPs make of it. Effects of paths need
# not add up: they overlap, and norms divide by everything.
#
# ## All edges at once
# With relevance patching all 4,555 edges of the model get a score from one backward pass. The largest become a circuit, the rest of the model is
# replaced by what it does on the other prompt, and *faithfulness* is how much of the behaviour is left: 1 is the whole model, 0 is everything
# replaced.

# %%
edges = pl.RelevancePatching().run(model, task, "edges", direction="noising", progress=False)
curve = pl.circuits.faithfulness_curve(model, {"edge-RelP": edges}, sets.finding, progress=False)
found = pl.circuits.smallest_faithful(model, {"edge-RelP": edges}, sets.finding, sets.reporting, progress=False)
print(found)

# %%
pl.plots.faithfulness(curve).show()

# %%
circuit = pl.circuits.top_n(edges, int(found.table["n_requested"][0]))
pl.plots.circuit(circuit).show()

# %%
print(circuit.summary(8))
print(pl.circuits.evaluate(model, circuit, sets.reporting, progress=False))

# %% [markdown]
# 1 % of the edges hold 90 % of the behaviour on prompts that nobody looked at; all the others together hold nothing (completeness 0). The six
# heads are in it, and so are three we left out: a4.h1, a4.h3 and a5.h1, which do in a small way what the four do. Read the interval: 50 to 62
# edges would have been as good a choice.
#
# ## Take it away
# The other direction. Replace heads in the clean run by their mean over corrupted prompts. If the story is right, the movers' loss hurts, and
# random heads' does not.

# %%
batch = task.batches()[0]
corrupted = model.run(batch.corrupted, keep=["z"])
knocked = {
    "nothing": [],
    "a8.h0": ["a8.h0"],
    "both movers": movers,
    "S-inhibition": inhibitors,
    "all six": movers + inhibitors,
    "negative a9.h3": ["a9.h3"],
    "three others": ["a1.h1", "a3.h1", "a7.h1"],
}
rows = {}
for name, heads in knocked.items():
    run = model.run(batch.clean, edits=[pl.Edit(head, pl.sources.mean_of(corrupted, positional=True)) for head in heads])
    rows[name] = {"logit difference": task.metric(run.logits[:, -1], batch.answers).mean().item()}
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# It hurts, though less than one may expect: without all six heads the model still prefers the right name, by half a logit. A mean is not a wrong
# name: it takes away what the heads knew, while patching in the corrupted prompt, as for faithfulness, tells the model a lie. GPT-2 small has
# *backup name movers* that step in where a mover is missing. Do other heads step in here?

# %%
with pl.intervene(model, [pl.Edit("a8.h0", pl.sources.mean_of(corrupted, positional=True))]):
    without = lenses.logit_lens().attribute(model, task, by="head")
contributions = {"as it is": direct, "without a8.h0": without}
table = pd.DataFrame({name: found.table(None).set_index("component")["contribution"] for name, found in contributions.items()})
table.loc[["a8.h0", "a9.h0", "a6.h2", "a9.h3", "m9", "m10", "m11"]].round(2)

# %% [markdown]
# No head makes up for the .9 that are missing. Heads gain a little, since the final norm divides by a smaller stream, and the late MLPs, which
# built on a8.h0, lose.
#
# ## Did we miss a head?
# RelP led us. It might have ranked low what matters much. *Verified patching* patches what RelP ranks high exactly, then cells at random, and
# bounds how many of the true top ten are missing. It says what it costs first:

# %%
method = pl.VerifiedPatching(k=10, recall=0.8)
print(method.price(model, task, "z[layer,pos,head]", direction="denoising"))

# %%
verified = method.run(model, task, "z[layer,pos,head]", direction="denoising", progress=False)
print(verified.recall)
verified.top[["address", "effect", "screen", "place", "found"]].round(2)

# %% [markdown]
# The ten largest were RelP's first ten, in nearly the right order (`place`), and none of 129 random ones came in. With 224 cells a bound costs
# two thirds of a full sweep: on a model of this size certainty is hardly cheaper than patching everything. On large ones it is
# ([AtP*](https://arxiv.org/abs/2403.00745) has the idea).
