"""Attention concentration: on how few tokens heads look, layer by layer."""

import numpy as np

from patchlab import lenses
from patchlab.plots import head_grid
from patchlab.recipes.recipe import UNKNOWN, Inputs, Number, Outcome, recipe


@recipe(
    "attention-concentration",
    paper="Attention concentration (per-head entropy, effective number of tokens, tokens for 90 % of the mass)",
    claim="heads look at few tokens: far fewer than there are hold 90 % of their attention.",
)
def attention_concentration(inputs: Inputs) -> Outcome:
    """Statistics of every head at the last position; attention spread evenly over all tokens is the control, by arithmetic."""
    model = inputs.model
    task = inputs.task("ioi", 32)
    length = len(task.pairs[0])
    task = task.select([i for i, pair in enumerate(task.pairs) if len(pair) == length])
    found = lenses.attention(model, task)
    effective, count, share = (found.at(name) for name in ("effective", "count", "share"))
    even = np.ceil(0.9 * length - 1e-9)
    first = found.patterns.to_numpy()[:, :, :, -1, 0].mean()
    numbers = (
        Number("effective number of tokens, mean over heads", float(effective.mean()), UNKNOWN, float(length), "even attention"),
        Number("tokens that hold 90 % of the mass, mean over heads", float(count.mean()), UNKNOWN, float(even), "even attention"),
        Number("the same as a share of the tokens", float(share.mean()), UNKNOWN, float(even / length), "even attention"),
        Number("share of heads with 90 % on at most a fifth of the tokens", float((share <= 0.2).mean()), UNKNOWN, 0.0, "even attention"),
        Number("mean attention to the first token", float(first), UNKNOWN, 1 / length, "even attention"),
    )
    by_layer = effective.mean("head").to_numpy()
    ends = f"least in layer {int(by_layer.argmin())}, most in layer {int(by_layer.argmax())}"
    verdict = f"Heads look at {float(effective.mean()):.1f} of {length} tokens; {ends}."
    figures = {
        "effective": head_grid(effective, title="Effective number of tokens at END"),
        "share": head_grid(share, title="Share of the tokens that holds 90 % of the mass"),
    }
    return Outcome(numbers, bool(share.mean() < 0.5 * even / length), verdict, figures)
