"""Layer by layer: are the best states in the middle, where they are compressed? (Skean et al. 2025)."""

import numpy as np

from patchlab import layer_metrics
from patchlab.plots import layers
from patchlab.recipes.recipe import Inputs, Number, Outcome, rank_correlation, recipe


@recipe(
    "layer-by-layer",
    paper="Skean et al. 2025, Layer by Layer: Uncovering Hidden Representations in Language Models (arXiv 2502.02013)",
    claim="states of middle layers are the most compressed (lowest prompt entropy) and serve tasks best; the metrics tell which layer.",
)
def layer_by_layer(inputs: Inputs) -> Outcome:
    """Entropy and curvature of texts, LiDAR and a ridge probe of the answer (he or she) by layer; labels in random order are the control."""
    model = inputs.model
    texts = layer_metrics.measure(model, inputs.texts(64), ["entropy", "curvature"])
    task = inputs.task("pronoun", 96)
    labels = [pair.correct for pair in task.pairs]
    probed = layer_metrics.measure(model, task, ["lidar", "probe"], labels=labels, seed=inputs.seed)
    shuffled = [labels[i] for i in np.random.default_rng(inputs.seed).permutation(len(labels))]
    control = layer_metrics.measure(model, task, ["probe"], labels=shuffled, seed=inputs.seed)
    n = model.arch.n_layers
    after = slice(1, None)  # the state before the blocks is no layer's
    lowest, best = (int(at) + 1 for at in (texts["entropy"][after].argmin(), probed["probe"][after].argmax()))
    against = rank_correlation(-texts["entropy"][after], probed["probe"][after])
    numbers = (
        Number("depth of the lowest prompt entropy (0 to 1)", lowest / n, "claim: middle"),
        Number("depth of the best probe (0 to 1)", best / n, "claim: middle"),
        Number("accuracy of the best probe", float(probed["probe"][best]), "unknown", float(control["probe"][after].max()), "labels shuffled"),
        Number("accuracy of the probe after the last layer", float(probed["probe"][-1])),
        Number("rank correlation over layers of low entropy and the probe", against, "claim: positive"),
        Number("prompt entropy after the first and the last layer, difference", float(texts["entropy"][-1] - texts["entropy"][1])),
    )
    middle = 0.25 <= lowest / n <= 0.75 and best < n and probed["probe"][best] > probed["probe"][-1]
    verdict = (
        f"The lowest entropy is after layer {lowest - 1} of {n}, the best probe after layer {best - 1}"
        f"{' (ties: the first of them)' if np.sum(probed['probe'][after] == probed['probe'][best]) > 1 else ''}."
    )
    figure = layers({"texts": texts, "pronoun": probed, "labels shuffled": control}, title=f"States of {model.name} by layer")
    return Outcome(numbers, bool(middle), verdict, {"layers": figure})
