"""LLM-Microscope: how linear layers are, and how many dimensions states have (Razzhigaev et al. 2025)."""

from dataclasses import replace

import numpy as np

from patchlab import layer_metrics
from patchlab.plots import layers
from patchlab.recipes.recipe import Inputs, Number, Outcome, recipe


@recipe(
    "llm-microscope",
    paper="Razzhigaev et al. 2025, LLM-Microscope (arXiv 2502.15007)",
    claim="layers are all but linear from state to state, and much less so in what they add to it.",
)
def llm_microscope(inputs: Inputs) -> Outcome:
    """Held-out R² of the affine map of each layer, to the next state and to the difference; anisotropy and intrinsic dimension.

    Control: next states of another text, which a map cannot know. Contextual memory needs a trained decoder and is left out.
    """
    model = inputs.model
    states = layer_metrics.states_of(model, inputs.texts(160), skip_first=1, seed=inputs.seed)
    names = ["linearity", "linearity_of_delta", "anisotropy", "dimension"]
    found = layer_metrics.measured(states, names, f"{model.name} × {len(states)} texts", {"model": model.name})
    length = min(len(own) for own in states.of[0])
    cut = [[own[:length] for own in layer] for layer in states.of]
    # every other layer gets the states of the next text in the place of its own
    wrong = replace(states, tokens=tuple(ids[:length] for ids in states.tokens), of=tuple(tuple(c[i:] + c[:i]) for i, c in enumerate(cut)))
    control = layer_metrics.measured(wrong, ["linearity"], "shuffled", {})
    state, delta = found["linearity"][1:], found["linearity_of_delta"][1:]
    numbers = (
        Number(
            "R² from state to state, mean over layers after the first",
            float(state[1:].mean()),
            "claim: near 1",
            float(control["linearity"][2:].mean()),
            "states of another text",
        ),
        Number("R² from state to difference, mean over layers after the first", float(delta[1:].mean()), "claim: lower"),
        Number("R² from state to state, first layer", float(state[0])),
        Number("intrinsic dimension over layers after the first, most", float(found["dimension"][2:].max())),
        Number("intrinsic dimension over layers after the first, least", float(found["dimension"][2:].min())),
        Number("anisotropy after the last layer", float(found["anisotropy"][-1])),
    )
    linear = bool(state[1:].mean() > 0.9 and np.all(delta <= state + 1e-9))
    ranges = [f"between {part.min():.2f} and {part.max():.2f}" for part in (state, delta)]
    verdict = f"R² from state to state lies {ranges[0]}, and that of what layers add {ranges[1]}."
    return Outcome(numbers, linear, verdict, {"layers": layers(found, title=f"Linearity and dimension of {model.name} by layer")})
