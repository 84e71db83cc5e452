"""DAS: one direction that carries a variable, found by TransformerLens' distributed alignment search (Geiger et al. 2024)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.tools.analysis.interchange import (
    SubspaceInterchange,
    arbitrary_targets,
    collect_activations,
    fit_das,
    intervened_logits,
    random_basis,
)

import patchlab as pl
from patchlab.features import Dictionary
from patchlab.features.activations import Linear
from patchlab.plots import bars
from patchlab.recipes.recipe import Inputs, Number, Outcome, recipe

RANK, PAIRS, EPOCHS = 1, 128, 8


def as_dictionary(basis: Float[Tensor, "d_model rank"], layer: int) -> Dictionary:
    """A subspace as a dictionary whose features are its coordinates, so that methods score and edit it like other sites."""
    zeros = basis.new_zeros(basis.shape[1]), basis.new_zeros(basis.shape[0])
    return Dictionary("subspace", "sae", layer, "resid_post", "resid_post", basis, zeros[0], basis.T.contiguous(), zeros[1], Linear())


@recipe(
    "das",
    paper="Geiger et al. 2024, Finding Alignments Between Causal Variables and Distributed Representations (arXiv 2303.02536)",
    claim="a learned subspace carries a variable: setting it as in another run changes the answer as the variable would.",
)
def das(inputs: Inputs) -> Outcome:
    """The gender of a pronoun in one direction of the stream at END, after a few layers, by ``fit_das``; accuracy on pairs of held-out prompts.

    Controls: the same with arbitrary labels (what fitting alone achieves), and a random direction. The subspace is then given to the model as a
    site, and its exact patching effect measured.
    """
    model = inputs.model
    train, test = inputs.task("pronoun", 160).split(seed=inputs.seed)
    answers = sorted({token for pair in train.pairs for token in pair.correct})
    length = len(train.pairs[0])
    n_classes = len(answers)

    def rows(task: pl.Task, seed: int) -> tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"], Int[Tensor, " pair"]]:
        """Bases, sources and the class of each source, of prompts drawn at random."""
        own = [pair for pair in task.pairs if len(pair) == length and pair.correct[0] in answers]
        draw = torch.randint(0, len(own), (2, PAIRS), generator=torch.Generator().manual_seed(seed))
        tokens = torch.tensor([pair.clean_ids for pair in own], device=model.device)
        classes = torch.tensor([answers.index(pair.correct[0]) for pair in own])
        return tokens[draw[0]], tokens[draw[1]], classes[draw[1]]

    columns = torch.tensor(answers, device=model.device)

    def read(tokens: Tensor) -> Tensor:
        return model.bridge(tokens, return_type="logits")[:, -1, columns]

    end = torch.full((PAIRS,), length - 1)
    base, source, wanted = rows(train, inputs.seed)
    new_base, new_source, new_wanted = rows(test, inputs.seed + 1)
    layers = sorted({0, model.arch.n_layers // 2, model.arch.n_layers - 1})

    def accuracy(basis: Tensor, layer: int, labels: Tensor) -> float:
        with torch.no_grad():
            step: Callable[[Tensor, Tensor], Tensor] = SubspaceInterchange(basis.to(model.device))
            hook = f"blocks.{layer}.hook_resid_post"
            at_source = collect_activations(model.bridge, hook, new_source, read, positions=end)
            found = intervened_logits(model.bridge, hook, step, new_base, at_source, read, positions=end)
        return float((found.argmax(-1).cpu() == labels).float().mean())

    def learned(layer: int, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            fit = fit_das(
                model.bridge, f"blocks.{layer}.hook_resid_post", base, source, targets, read, rank=RANK, base_positions=end, source_positions=end,
                epochs=EPOCHS, batch_size=32, lr=3e-2, seed=inputs.seed,
            )  # fmt: skip
        return fit.subspace.basis.detach()

    keys = [str(row.tolist()) for row in source]
    new_keys = [str(row.tolist()) for row in new_source]
    found: dict[int, tuple[float, float, float]] = {}
    bases: dict[int, Tensor] = {}
    chance = random_basis(model.arch.d_model, RANK, inputs.seed)
    for layer in layers:
        bases[layer] = learned(layer, wanted)
        arbitrary = learned(layer, arbitrary_targets(keys, n_classes, inputs.seed))
        placebo = accuracy(arbitrary, layer, arbitrary_targets(new_keys, n_classes, inputs.seed))
        found[layer] = accuracy(bases[layer], layer, new_wanted), placebo, accuracy(chance, layer, new_wanted)
    best = max(found, key=lambda layer: found[layer][0])
    effect = site_effect(inputs, bases[best], best, test)
    at_random = site_effect(inputs, chance, best, test)
    numbers = (
        Number(
            f"interchange accuracy of one direction after layer {best}, held-out pairs", found[best][0], "unknown", found[best][1], "arbitrary labels"
        ),
        Number("the same against a random direction", found[best][0], "unknown", found[best][2], "random direction"),
        Number("normalised exact effect of the direction as a site, denoising", effect, "unknown", at_random, "random direction"),
    )
    works = found[best][0] > 0.9 and found[best][0] > found[best][1] + 0.2
    by_layer = [f"{layer}: {own:.2f} (arbitrary labels {placebo:.2f}, random {random:.2f})" for layer, (own, placebo, random) in found.items()]
    verdict = f"After layer {'; '.join(by_layer)}."
    names = [f"layer {layer}" for layer in layers]
    series = {
        name: [found[layer][i] for layer in layers] for i, name in enumerate(("learned", "control: arbitrary labels", "control: random direction"))
    }
    figure = bars(names, series, title=f"Interchange accuracy of one direction at END, {model.name}", label="accuracy on held-out pairs")
    return Outcome(numbers, works, verdict, {"accuracy": figure})


def site_effect(inputs: Inputs, basis: Tensor, layer: int, task: pl.Task) -> float:
    """The normalised effect of exact patching of a subspace at all positions, given to the model as a dictionary and taken off again."""
    model = inputs.model
    model.add_dictionaries(as_dictionary(basis.to(model.device, model.dtype), layer))
    try:
        scores = pl.ActivationPatching().run(model, task, "features.resid_post")
    finally:
        model.drop_dictionaries()
    return float(scores.sel(f"L{layer}.F0.resid_post").mean()) / scores.gap
