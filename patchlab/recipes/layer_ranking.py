"""Layer ranking: layers that turn the stream least can be stored in fewer bits (layer-wise quantisation)."""

from collections.abc import Sequence

import numpy as np
import torch

from patchlab import depth
from patchlab.adapters import LinearPlace
from patchlab.metrics import divergence
from patchlab.models import Model
from patchlab.plots import bars, layers
from patchlab.recipes.recipe import Inputs, Number, Outcome, rank_correlation, recipe
from patchlab.texts import Texts
from patchlab.weight_edit import WeightEdit, edited, weight_of

BITS = 3


def rounded(model: Model, layer: int, bits: int) -> list[WeightEdit]:
    """The edits that round all linear maps of a layer to so many bits, with one step size per output."""
    edits = []
    for place in model.arch.places:
        if isinstance(place, LinearPlace) and place.problem is None and place.name.startswith(f"blocks.{layer}."):
            weight = weight_of(model, place.name).detach()
            step = weight.abs().amax(0, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            edits.append(WeightEdit(place.name, (weight / step).round() * step - weight, f"layer {layer} in {bits} bits"))
    return edits


def divergences(model: Model, texts: Texts, plain: Sequence[torch.Tensor], chosen: Sequence[int]) -> float:
    """Mean KL divergence in nats per token of the model's outputs from those with these layers rounded."""
    with edited(model, [edit for layer in chosen for edit in rounded(model, layer, BITS)]):
        parts = [
            (divergence(p, torch.as_tensor(model.run(ids).logits)).sum(), ids.numel()) for p, (_, ids) in zip(plain, texts.batches(), strict=True)
        ]
    return float(sum(total for total, _ in parts) / sum(count for _, count in parts))


@recipe(
    "layer-ranking",
    paper="Dumitru et al. 2024, Layer-Wise Quantization (arXiv 2406.17415)",
    claim="the cosine of the states before and after a layer (LIM) ranks layers by importance: rounding the less important half costs least.",
)
def layer_ranking(inputs: Inputs) -> Outcome:
    """LIM against the KL divergence of skipping a layer, and half of the layers rounded to 3 bits: least important, random, most important."""
    model, texts = inputs.model, inputs.texts(32)
    found = depth.layer_influence(model, texts)
    n = model.arch.n_layers
    order = found["lim"].argsort()
    plain = [torch.as_tensor(model.run(ids).logits) for _, ids in texts.batches()]
    rng = np.random.default_rng(inputs.seed)
    least, most = (divergences(model, texts, plain, part.tolist()) for part in (order[: n // 2], order[::-1][: n // 2]))
    random = float(np.mean([divergences(model, texts, plain, rng.permutation(n)[: n // 2].tolist()) for _ in range(6)]))
    with_first = rank_correlation(found["lim"], found["skip_kl"])
    without = rank_correlation(found["lim"][1:], found["skip_kl"][1:])
    shuffled = float(np.mean([rank_correlation(found["lim"], rng.permutation(found["skip_kl"])) for _ in range(200)]))
    numbers = (
        Number("rank correlation of LIM with the KL of skipping", with_first, "claim: positive", shuffled, "layers shuffled"),
        Number("the same without layer 0", without),
        Number("KL with the half that LIM calls least important in 3 bits, nats", least, "unknown", random, "random halves"),
        Number("KL with the half that LIM calls most important in 3 bits, nats", most, "unknown", random, "random halves"),
    )
    works = least < random < most
    verdict = f"Rounding the least important half costs {least:.3g} nats, random halves {random:.3g}, the most important {most:.3g}."
    names = ["least important half", "random halves", "most important half"]
    figure = bars(
        names, {"KL": [least, random, most]}, title=f"Half of the layers of {model.name} in {BITS} bits", label="KL divergence, nats per token"
    )
    return Outcome(numbers, works, verdict, {"influence": layers(found, title="Importance of layers"), "quantised": figure})
