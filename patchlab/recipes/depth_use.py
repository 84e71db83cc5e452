"""Depth use: do later layers compute with what earlier ones wrote, or refine the output? (Csordás et al. 2025)."""

import math

import numpy as np

from patchlab import depth
from patchlab.plots import layer_grid, layers, skip_effects
from patchlab.recipes.recipe import Inputs, Number, Outcome, rank_correlation, recipe


@recipe(
    "depth-use",
    paper="Csordás et al. 2025, Do Language Models Use Their Depth Efficiently? (arXiv 2505.13898)",
    claim="layers of the second half contribute less and are used less by later tokens; the first half erases, the second amplifies; "
    "a deeper model does the same in smaller steps.",
)
def depth_use(inputs: Inputs) -> Outcome:
    """Contributions, effects of skipped layers on what later tokens compute, and maps to a shallower model.

    Controls: halves drawn at random in the place of the first and the second.
    """
    model = inputs.model
    task = inputs.task("ioi", 32)
    found = depth.contributions(model, inputs.texts(48), skip_first=1)
    n = model.arch.n_layers
    middle = n // 2
    rng = np.random.default_rng(inputs.seed)
    shuffles = [rng.permutation(n) for _ in range(200)]

    def ratio(values: np.ndarray, order: np.ndarray) -> float:
        return float(values[order[middle:]].mean() / values[order[:middle]].mean())

    norms, cosines = found["layer_norm"], found["layer_cosine"]
    straight = np.arange(n)
    effects = depth.skip_effects(model, task, future=min(len(pair) for pair in task.pairs) // 2)
    # the last layer has no later one to be used by; the first is skipped at the price of everything
    used = np.array([np.nanmean(row) for row in effects.matrix("mean")[:-1]])
    early, late = used[1:middle], used[middle:]
    numbers = [
        Number(
            "size of contributions: second half over first",
            ratio(norms, straight),
            "claim: below 1",
            float(np.mean([ratio(norms, s) for s in shuffles])),
            "random halves",
        ),
        Number("the same without the first layer", ratio(norms[1:], np.arange(n - 1)), "claim: below 1"),
        Number("mean cosine with the stream, first half without layer 0", float(cosines[1:middle].mean()), "claim: below 0"),
        Number("mean cosine with the stream, second half", float(cosines[middle:].mean()), "claim: above 0"),
        Number(
            "effect on later tokens: second half over first (without layer 0)",
            float(late.mean() / early.mean()) if len(early) and len(late) else math.nan,
            "claim: below 1",
        ),
    ]
    figures = {"contributions": layers(found, title="What layers add to the stream"), "skip-effects": skip_effects(effects, "mean")}
    other, agreement = inputs.second, math.nan
    if other is not None:
        maps = depth.maps_between(other, model, inputs.texts(96)).isel(layer=slice(1, None), to_layer=slice(1, None))
        best = maps.to_numpy().argmax(1)
        agreement = rank_correlation(range(len(best)), best)
        shuffled = float(np.mean([rank_correlation(range(len(best)), rng.permutation(best)) for _ in range(200)]))
        numbers.append(
            Number(
                f"rank correlation of a layer of {other.name} with the layer here it maps to best",
                agreement,
                "claim: near 1",
                shuffled,
                "layers shuffled",
            )
        )
        figures["maps"] = layer_grid(maps, title=f"R² of maps from {other.name} to {model.name}")
    smaller, amplifies, less_used = numbers[1].value < 1, numbers[2].value < numbers[3].value, numbers[4].value < 1
    parts = [
        f"Without layer 0, contributions {'shrink' if smaller else 'GROW'} in the second half",
        f"the cosine {'rises' if amplifies else 'does not rise'} from half to half",
        f"later tokens use the second half {'less' if less_used else 'NOT less'}",
    ]
    if other is not None:
        parts.append(f"layers of {other.name} map to layers here {'in order' if agreement > 0.8 else 'NOT in order'} (four of them say little)")
    return Outcome(tuple(numbers), smaller and amplifies and less_used, "; ".join(parts) + ".", figures)
