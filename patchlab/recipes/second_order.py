"""Second-order effects: what neurons say through the values of later heads (Gandelsman et al. 2024)."""

import numpy as np
import torch
import xarray as xr

from patchlab import lenses
from patchlab.lenses.head import head_logits
from patchlab.lenses.rows import token_text
from patchlab.plots import bars, layer_grid
from patchlab.recipes.recipe import Inputs, Number, Outcome, recipe
from patchlab.tasks import Task

SIGNIFICANT = 0.05
TOP = 100


def first_share(vectors: np.ndarray) -> float:
    """The share of the sum of squares along the first direction, of vectors ``[n, d]`` (0: none that is not zero)."""
    squares = np.linalg.svd(vectors, compute_uv=False) ** 2
    return float(squares[0] / squares.sum()) if squares.sum() > 0 else 0.0


def layer_numbers(inputs: Inputs, task: Task, layer: int) -> tuple[float, float, float]:
    """Of one layer: the share of (neuron, prompt) that is significant, how far one direction goes per neuron, and the same for random vectors.

    An effect is significant if its norm is at least 5 % of the stream's. One direction: the first principal one of the up to 100 largest effects of a
    neuron over prompts, mean over neurons.
    """
    found = lenses.head_paths(inputs.model, task, f"L{layer}.mlp_post")
    vectors = found.vectors.to_numpy()
    norms = np.linalg.norm(vectors, axis=-1)
    share = float((norms >= SIGNIFICANT * found.stream[:, None]).mean())
    rng = np.random.default_rng(inputs.seed)
    largest = np.argsort(-norms, axis=0)[:TOP]
    neurons = np.argsort(-norms.max(0))[:64]
    own = [first_share(vectors[largest[:, neuron], neuron]) for neuron in neurons]
    random = [first_share(rng.normal(size=(len(largest), vectors.shape[-1])) * norms[largest[:, neuron], neuron, None]) for neuron in neurons]
    return share, float(np.mean(own)), float(np.mean(random))


@recipe(
    "second-order",
    paper="Gandelsman et al. 2024, Interpreting the Second-Order Effects of Neurons in CLIP (arXiv 2406.04341)",
    claim="a neuron's effect through later heads is significant for less than 2 % of inputs, and lies along one direction.",
)
def second_order(inputs: Inputs) -> Outcome:
    """Paths neuron → later heads' values → last position of every layer but the last, on IOI prompts, with logits in the place of images and text.

    Control: random vectors of the same norms, whose first direction is that of chance.
    """
    model, task = inputs.model, inputs.task("ioi", 96)
    task = task.select([i for i, pair in enumerate(task.pairs) if len(pair) == len(task.pairs[0])])
    layers = range(model.arch.n_layers - 1)
    found = np.array([layer_numbers(inputs, task, layer) for layer in layers])
    late = found[len(found) // 2 :] if len(found) > 1 else found
    numbers = (
        Number("share of (neuron, prompt) above 5 % of the stream's norm, all layers", float(found[:, 0].mean()), "below 0.02 of images"),
        Number("the same, second half of the layers", float(late[:, 0].mean()), "below 0.02 of images"),
        Number(
            "share of the sum of squares along one direction, mean over neurons",
            float(found[:, 1].mean()),
            "claim: one suffices",
            float(found[:, 2].mean()),
            "random vectors",
        ),
    )
    shown = lenses.head_paths(model, task, "L0.mlp_post")
    words = ", ".join(promoted(inputs, shown.vectors))
    reproduces = bool(found[:, 0].mean() < 0.02 and found[:, 1].mean() > 0.5)
    names = [f"layer {layer}" for layer in layers]
    figures = {
        "directions": bars(
            names,
            {"neurons": found[:, 1].tolist(), "control: random vectors": found[:, 2].tolist()},
            title="One direction per neuron",
            label="share of the sum of squares",
        ),
        "significant": bars(names, {"share": found[:, 0].tolist()}, title="Significant second-order effects", label="share of (neuron, prompt)"),
    }
    if shown.effects is not None:
        by_head = abs(shown.effects).mean("example").sum("entry")
        by_head = by_head.assign_coords(head=np.arange(by_head.sizes["head"]))
        figures["heads"] = layer_grid(by_head, title="Heads that carry what neurons of layer 0 say (Σ over neurons of mean absolute effects)")
    ends = f"{found[0, 0]:.3f} in layer 0, {late[:, 0].mean():.3f} in the second half"
    verdict = f"Significant: {ends}. The neuron of layer 0 with the largest effect promotes {words}."
    return Outcome(numbers, reproduces, verdict, figures)


def promoted(inputs: Inputs, vectors: xr.DataArray) -> list[str]:
    """The tokens that the first direction of the neuron with the largest effects raises most, read by the logit lens."""
    values = vectors.to_numpy()
    neuron = int(np.linalg.norm(values, axis=-1).mean(0).argmax())
    direction = np.linalg.svd(values[:, neuron], full_matrices=False)[2][0]
    direction = direction * np.sign((values[:, neuron] @ direction).sum() or 1.0)
    with torch.no_grad():
        logits = head_logits(inputs.model, torch.tensor(direction, dtype=inputs.model.dtype, device=inputs.model.device)[None])[0]
    return [repr(token_text(inputs.model, int(token)).strip()) for token in logits.topk(3).indices]
