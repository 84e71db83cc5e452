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
# # 2 · Why gradients fail where relevance does not, and where relevance fails
#
# Attribution patching ([Syed et al. 2023](https://arxiv.org/abs/2310.10348)) estimates what a patch does by *difference × gradient*. Relevance
# patching ([RelP](https://arxiv.org/abs/2508.21258)) keeps the difference, and replaces the gradient by another backward pass, in which each
# non-linear module acts as if it were linear. Both cost one backward pass; neither is a law of nature. This notebook looks at what the two
# assume, first on one neuron and one norm that fit on a napkin, then on models with 12 and 6 layers. You should have seen [notebook
# 1](1-quickstart.ipynb).

# %%
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch.nn.functional import gelu

import patchlab as pl
from patchlab import lenses

# %% [markdown]
# ## One neuron: the activation
# A neuron computes $f(x)$ with $f$ = GELU. The run that we patch has the pre-activation $x$, the other one $x'$, and putting $x'$ in changes the
# output by $f(x') - f(x)$. The two estimates are
#
# - gradient: $f'(x)\,(x' - x)$, the tangent at $x$;
# - relevance, by the *Identity-rule*: $\frac{f(x)}{x}\,(x' - x)$, the line through $(x, f(x))$ and the origin.

# %%
cases = {
    "remove (x = 2, x' = 0)": (2.0, 0.0),
    "remove (x = -0.75, x' = 0)": (-0.75, 0.0),
    "turn on (x = -0.75, x' = 2)": (-0.75, 2.0),
    "turn on (x = -3, x' = 2)": (-3.0, 2.0),
}
rows = {}
for name, (x, other) in cases.items():
    at = torch.tensor(x, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(at), at)
    y, new = gelu(at).item(), gelu(torch.tensor(other)).item()
    rows[name] = {"exact": new - y, "gradient": slope.item() * (other - x), "relevance": y / x * (other - x)}
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# Relevance is exact when a neuron is *removed*, because GELU(0) = 0 and its line goes through the origin; there the gradient may be too large, or
# be nothing at all: at −0.75 GELU has its minimum and the tangent is flat. Neither is any good at saying what happens when a neuron that is off
# is *turned on*. The Identity-rule is better at one question, and no cure for curvature.
#
# ## One norm: the denominator
# LayerNorm and RMSNorm divide by the size of the whole stream. Let the stream have a part $a$ that carries the answer and a rest of size 1, so
# that what comes out is $y(a) = a / \sqrt{a^2 + 1}$. In a prompt pair the answer is turned round: $a = -4$ in the corrupted run, $+4$ in the
# clean one. The gradient at −4 sees that the output is saturated, and predicts nothing. The *LN-rule* holds the denominator, so its line has the
# slope $1/\sqrt{17}$.

# %%
a = np.linspace(-4.5, 4.5, 181)
size = np.sqrt(17.0)
figure = go.Figure(layout={"template": "plotly_white", "width": 640, "height": 340, "margin": {"l": 50, "r": 20, "t": 30, "b": 45}})
figure.add_scatter(x=a, y=a / np.sqrt(a**2 + 1), name="exact: a / √(a² + 1)", line={"color": "#1f2328", "width": 3})
figure.add_scatter(x=a, y=-4 / size + (a + 4) / size**3, name="gradient at −4", line={"color": "#0072b2", "dash": "dash"})
figure.add_scatter(x=a, y=a / size, name="LN-rule at −4", line={"color": "#009e73", "dash": "dash"})
figure.update_xaxes(title="a").update_yaxes(title="normalised", range=[-1.3, 1.3]).update_layout(legend={"x": 0.02, "y": 0.98})
figure.show()

# %%
patches = {"all of it, −4 → 4": 4.0, "three quarters, −4 → 2": 2.0, "half of it, −4 → 0": 0.0, "a quarter, −4 → −2": -2.0}
before = -4 / size
rows = {
    name: {"exact": new / np.sqrt(new**2 + 1) - before, "gradient": (new + 4) / size**3, "LN-rule": (new + 4) / size} for name, new in patches.items()
}
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# Patch all of the evidence and the LN-rule is exact, because the stream is as large before as after; the gradient misses nearly everything. (Half
# of it is a removal, as for the neuron: exact, too.) Patch a quarter, and it is the other way round: the output hardly moves, the gradient is off
# by .05, and the LN-rule is six times too large. **Relevance extrapolates to the whole switch; the gradient, to a small step.** Which of them is
# right depends on how much of the evidence one patch moves. Keep that in mind until the end.
#
# ## The same on a model
# Back to the IOI task on `demo-gpt2`. We take the residual stream at `S2` before layer 3, and move it in steps from its corrupted to its clean
# value. The metric should turn round, and it does. What do the two lines make of it at the corrupted end?

# %%
model = pl.load_model("demo-gpt2")
task = pl.load_task("ioi", model, n=32)
batch = task.batches()[0]
cell = "L3.resid_pre@S2"

clean, corrupted = (model.run(batch.prompts(side), keep=["resid_pre"]) for side in ("clean", "corrupted"))
steps = np.linspace(0, 1, 21)
metric = []
for step in steps:
    run = model.run(batch.prompts("corrupted"), edits=[pl.Edit(cell, pl.sources.blend(corrupted, clean, float(step)))])
    metric.append(task.metric(run.logits[:, -1], batch.answers).mean().item())

sites = ["resid_pre", "mlp_out", "z"]
names = ["exact", "atp", "lrp[ln]", "lrp[identity]", "lrp[half]", "relp", "relp-ah", "ig:5"]
scores = {name: pl.methods.get_method(name).run(model, task, sites, direction="denoising", progress=False) for name in names}
at_cell = {name: float(scores[name].sel("L3.resid_pre@10").mean()) for name in ("exact", "atp", "relp", "ig:5")}
{name: round(value, 2) for name, value in at_cell.items()}

# %%
figure = go.Figure(layout={"template": "plotly_white", "width": 640, "height": 340, "margin": {"l": 50, "r": 20, "t": 30, "b": 45}})
figure.add_scatter(x=steps, y=metric, name="the model", line={"color": "#1f2328", "width": 3})
for name, method, colour in (("AtP: the gradient at 0", "atp", "#0072b2"), ("RelP: the relevance at 0", "relp", "#009e73")):
    figure.add_scatter(x=[0, 1], y=[metric[0], metric[0] + at_cell[method]], name=name, mode="lines", line={"color": colour, "dash": "dash"})
figure.update_xaxes(title="share of the clean stream at S2").update_yaxes(title="logit difference").update_layout(legend={"x": 0.02, "y": 0.98})
figure.show()

# %% [markdown]
# An S, as for the norm above. The tangent at 0 gets a third of the effect, relevance two thirds. Integrated gradients (`ig:5`, [Sundararajan et
# al. 2017](https://arxiv.org/abs/1703.01365)) average the gradient over five points of that path and get nearly all of it, for five backward
# passes.
#
# ## Rule by rule
# `relp` is three rules at once. Which does the work? `lrp[...]` takes any of them; `relp-ah` adds a fourth, which holds the attention pattern,
# too.


# %%
def brief(comparison, site):
    columns = {"pearson_per_prompt": "per prompt", "pearson": "of means", "pearson_pooled": "pooled", "spearman": "Spearman", "slope": "slope"}
    table = comparison.table.query("cells == 'live' and site == @site").set_index("method")
    return table[list(columns)].rename(columns=columns).round(2)


comparison = pl.compare(scores["exact"], {name: scores[name] for name in names[1:]})
brief(comparison, "resid_pre")

# %% [markdown]
# The LN-rule does nearly all of it; the Identity-rule adds a little. The Half-rule is about gated MLPs, which this model does not have, so
# `lrp[half]` is `atp`. Holding the attention pattern (`relp-ah`) makes it worse here, since what is patched at `S2` acts through *where* later
# heads look, and a held pattern cannot move.
#
# ## Mean maps, and single prompts
# *Of means* compares maps of example means; *per prompt* takes the correlation on each prompt, then their mean; *pooled* takes all prompts'
# effects as one long vector. They are different questions. At the outputs of MLPs:

# %%
brief(comparison, "mlp_out").loc[["atp", "relp", "ig:5"]]

# %%
live = scores["exact"].live_per_example("mlp_out")
figure = go.Figure(layout={"template": "plotly_white", "width": 640, "height": 320, "margin": {"l": 50, "r": 20, "t": 30, "b": 45}})
for method, colour in (("atp", "#0072b2"), ("relp", "#009e73")):
    pairs = [
        (scores["exact"].data["mlp_out"].to_numpy()[i][live[i]], scores[method].data["mlp_out"].to_numpy()[i][live[i]]) for i in range(len(task))
    ]
    per_prompt = sorted(float(np.corrcoef(*pair)[0, 1]) for pair in pairs)
    figure.add_scatter(x=list(range(1, len(task) + 1)), y=per_prompt, name=method, mode="markers+lines", line={"color": colour})
figure.update_xaxes(title="prompts, the worst first").update_yaxes(title="correlation on the prompt").update_layout(legend={"x": 0.8, "y": 0.1})
figure.show()

# %% [markdown]
# The maps of means look fine for both (.97 and .99). Prompt by prompt there is a tail of four prompts on which either method is far off, in ways
# that cancel in the mean; on the worst one RelP's correlation is 0, and AtP's worst is a little better. If you want to say something about single
# prompts, look at single prompts.
#
# ## Slope and rank
# Pearson does not see a factor, and one large cell can carry it. Look at the last two columns of the tables above. By rank (Spearman) AtP is as
# good as RelP on the stream, and *better* at the MLPs, although its slope is half as large: it gets the order of the many small cells right, and
# the size of the few large ones wrong. So the two are good at different things. If all you do is sort, check the rank; if you add effects up or
# compare them, check the slope.
#
# ## Conservation
# Where each non-linearity is a constant factor, relevance is conserved: at every layer the stream's relevance plus the share of the biases is the
# metric. How far is each rule set from it?

# %%
balance = lenses.conservation(model, task)
table = balance.table()
print(table[table["layer"].isin([0, 6, 12])].round(2).to_string(index=False))
pl.plots.conservation(balance).show()

# %% [markdown]
# `relp-ah` conserves, by construction: the total is 1 at every layer. Of the gradient nothing is left already before the final norm (*before
# layer* 12): a norm's output does not change when the stream is scaled, so gradient times stream is 0. `relp` has up to five times too much,
# since the softmax keeps its gradient on top of what goes through the values. And yet `relp` agrees best with patching in the tables above, and
# `relp-ah`, which conserves, no better than the plain gradient. Conservation is a property of the backward pass. It is not the same as being
# right about interventions.
#
# ## A task where RelP loses
# Subject-verb agreement on `demo-llama` (6 layers, RMSNorm, gated MLPs): *The leaders that the lawyer likes usually* → *go*. The corrupted prompt
# has *leader* in the singular.

# %%
llama = pl.load_model("demo-llama")
agreement = pl.load_task("agreement", llama, n=32, variant="across_rc")
sites = ["resid_pre", "attn_out", "z"]
names = ["exact", "atp", "lrp[ln]", "relp", "ig:5"]
scores = {name: pl.methods.get_method(name).run(llama, agreement, sites, direction="denoising", progress=False) for name in names}
comparison = pl.compare(scores["exact"], {name: scores[name] for name in names[1:]})
pd.concat({site: brief(comparison, site) for site in sites})

# %% [markdown]
# On the stream and the attention outputs RelP wins by far. On single heads (`z`) it loses, and with the LN-rule alone it loses badly, at a slope
# of 4. Which heads are to blame?

# %%
heads = pd.DataFrame({name: scores[name].mean("z").to_series() for name in names})
heads.loc[heads["exact"].abs().sort_values(ascending=False).index[:8]].round(2)

# %% [markdown]
# The heads of layer 0, which read the subject's number at `SUBJECT`. The gradient says too little of them, RelP far too much. Now patch all four
# *together*, which is the site `attn_out` at that position:

# %%
rows = {}
for name in ("exact", "atp", "relp"):
    rows[name] = {
        "four heads of layer 0, one by one, added up": float(scores[name].mean("z")[0].sum()),
        "all four together": float(scores[name].mean("attn_out")[0, 2]),
    }
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# That is the napkin again. One head is a part of the evidence; the other three still say *singular*, the stream is as saturated as before, and
# little moves: .7 if one adds up the four. Together they are all of it, and the metric turns round: 5.0, the whole gap. Linear estimates cannot
# have both: what they say of the four together *is* what they say of each, added up. The gradient says .2 and is nearer to single heads, RelP
# says 2.1 and is nearer to all four. **Where many parts carry the same evidence, expect relevance to overestimate each of them**, and check with
# exact patching; [notebook 5](5-agreement-is-not-circuit-quality.ipynb) shows that what looks worse here can still be what you want.
