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
# # 7 · Many runs from one file, and their report
#
# One model, one task and one seed say little. A *sweep* describes many runs in one file, does what is missing of them, and reads everything back
# as one table. Nothing that is finished is done again, and nothing is lost by Ctrl-C, a crash or a full disk. The notebook uses Python; the
# commands that do the same are given beside it. You should have seen [notebook 1](1-quickstart.ipynb).

# %%
import tempfile
from pathlib import Path

import patchlab as pl
from patchlab.report.sweep import write_sweep
from patchlab.sweeps.driver import run_sweep
from patchlab.sweeps.executors.local import Local
from patchlab.sweeps.file import read, runs_of
from patchlab.sweeps.plan import estimate

# %% [markdown]
# ## The file
# Models × tasks × directions × methods; a list anywhere is a grid. A word that is misspelt is refused, with the line and the words there are.

# %%
home = Path(tempfile.mkdtemp())
file = home / "methods.yaml"
text = """version: 1
name: methods
models: [demo-gpt2-4l, demo-llama]
tasks:
  - {name: ioi, n: 16}
  - {name: agreement, n: 16, options: {variant: across_rc}}
directions: [denoising]
runs:
  - {kind: score, methods: [exact, atp, relp], sites: [resid_pre, z]}
"""
file.write_text(text)
runs = runs_of(read(file))
print(len(runs), "runs, such as", runs[0].label)

# %% [markdown]
# ## What will it take?
# `patchlab sweep plan methods.yaml`: passes, memory and time (which is left out here, since it is this machine's).

# %%
plan = estimate(runs)
print(f"{plan.forwards} forward and {plan.backwards} backward passes of a batch, at most {plan.peak_bytes / 1e6:.0f} MB for activations")

# %% [markdown]
# ## Run it
# `patchlab sweep run methods.yaml --out out`; with `--workers 4` in four processes, with `--ray` on a cluster, with `--shard 2/8` a part of it as
# a job of an array ([how to](../docs/howto/sweeps.md)).

# %%
out = home / "out"
run_sweep(runs, out, Local(), about={"name": "methods", "file": text}, progress=False)

# %% [markdown]
# Now somebody asks for GIM as well. Change the file and give the same command: 12 runs are there already, 4 are missing.

# %%
text = text.replace("atp, relp]", "atp, relp, gim]")
runs = runs_of(read(file)) if file.write_text(text) else []
run_sweep(runs, out, Local(), about={"name": "methods", "file": text}, progress=False, say=lambda line: print(line) if "before" in line else None)

# %% [markdown]
# ## Read it
# One row per run, site and statistic, with 95 % intervals over prompts. What does not depend on how the methods compare is there as well (`gap`,
# `largest_effect`, ...).

# %%
sweep = pl.sweeps.open(out)
table = sweep.table()
print(sweep, "\n", len(table), "rows;", ", ".join(table["statistic"].unique()))

# %%
agreement = table.query("statistic == 'pearson_per_prompt'")
agreement.pivot_table(index=["site", "model", "task"], columns="method", values="value").round(2)

# %% [markdown]
# Read across a row. On the stream of demo-llama in the agreement task AtP is at .7 and RelP at .96; on its heads (`z`) it is the other way round,
# as in [notebook 2](2-gradients-and-relevance.ipynb). On IOI the two are close, and GIM behind them.
#
# ## Is it the method or the prompts?
# Paired differences: both methods see the same resamples of the prompts, so the interval of their difference can exclude 0 where their own
# intervals overlap. Over all settings:

# %%
settings = agreement.assign(setting=agreement["model"] + " · " + agreement["task"])[["key", "setting", "site", "method", "value"]]
differences = sweep.differences().query("statistic == 'pearson_per_prompt'").merge(settings[["key", "site", "setting"]], on=["key", "site"])
pl.plots.ranking(settings[["site", "setting", "method", "value"]], differences).show()

# %% [markdown]
# With four settings a rank is not worth much; look at the differences on the right. On the stream RelP is first, and surely better than the
# others in every setting. On heads AtP is first by rank, but mostly by next to nothing: RelP is surely worse in two settings, surely better in
# one.
#
# ## Any run in full
# A run is found by its key, and is the same score map as if it had been made by hand.

# %%
key = table.query("model == 'demo-llama' and task == 'agreement' and method == 'relp'")["key"].iloc[0]
scores = sweep.scores(key)
print(scores)
pl.plots.heatmaps(scores).show()

# %% [markdown]
# ## The report
# `patchlab sweep report out` writes a folder that needs no network: what ran and what failed, the table above to sort and filter, ranks and
# differences, agreement against cost, and for each run a button that shows its heatmaps. Open its `index.html`.

# %%
report = write_sweep(sweep)
sizes = sorted(((path.stat().st_size, path.name) for path in (out / "report").iterdir()), reverse=True)
print(
    f"{report['figures']} figures; a page of {(out / 'report' / 'index.html').stat().st_size / 1000:.0f} kB and plotly beside it; {len(sizes)} files"
)

# %% [markdown]
# Bigger questions have files of their own in `examples/sweeps`: the models and sites of the RelP paper, its rules one by one, models of other
# seeds. [Studies](../docs/results/sweeps.md) has what came out. And for *one* model and task, `patchlab study` asks the usual questions in a
# sensible order and stops when the time you gave it is used up ([how to](../docs/howto/study.md)).
