"""Multi-layer SAE: are latents of one autoencoder of all layers active at one layer, or at many? (Lawson et al. 2024)."""

import numpy as np
import torch
from torch import Tensor

import patchlab as pl
from patchlab.errors import DictionaryError, TextError
from patchlab.features import Dictionary, TopK
from patchlab.host import precise
from patchlab.layer_metrics import states_of
from patchlab.models import Model
from patchlab.plots import bars
from patchlab.recipes.recipe import Inputs, Number, Outcome, recipe
from patchlab.texts import Texts

LATENTS, K, STEPS, ROWS = 1024, 16, 400, 1536


def states(model: Model, texts: Texts) -> Tensor:
    """The states after each layer at each token, ``[token, layer, d_model]``, without the first of each text."""
    found = states_of(model, texts, skip_first=1)
    return torch.stack([torch.from_numpy(np.concatenate(layer)) for layer in found.of[1:]], 1).to(torch.float32)


def trained(model: Model, texts: Texts, seed: int) -> Dictionary:
    """A TopK autoencoder of the states of all layers, trained for minutes at most: Adam, unit decoder rows, inputs in units of their spread."""
    x = states(model, texts).flatten(0, 1)
    centre = x.mean(0)
    size = (x - centre).square().mean().sqrt()
    x = (x - centre) / size
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(LATENTS, x.shape[1], generator=generator), dim=1)
    w_dec, w_enc = decoder.clone().requires_grad_(), decoder.T.contiguous().requires_grad_()
    b_enc = torch.zeros(LATENTS, requires_grad=True)
    optimiser = torch.optim.Adam([w_dec, w_enc, b_enc], lr=2e-3)
    with torch.enable_grad():
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, 3 * (1 - step / STEPS))
            batch = x[torch.randint(len(x), (ROWS,), generator=generator)]
            values, where = (batch @ w_enc + b_enc).topk(K, -1)
            loss = (torch.zeros(len(batch), LATENTS).scatter(1, where, values.relu()) @ w_dec - batch).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                w_dec /= w_dec.norm(dim=1, keepdim=True)
    enc, dec = w_enc.detach() / size, w_dec.detach() * size
    zero = b_enc.detach() - (centre / size) @ w_enc.detach()
    return Dictionary("multi-layer", "multi_layer", None, "resid_post", "resid_post", enc, zero, dec, centre, TopK(K), subtract_b_dec=False)


def layer_variance(weights: Tensor) -> tuple[float, float]:
    """Variance of the layer that a latent is active at, of activations ``[token, layer, latent]``: over all tokens, and within one."""
    w = precise(weights)
    layer = torch.arange(w.shape[1], dtype=w.dtype)[None, :, None]

    def variance(mass: Tensor) -> Tensor:
        total = mass.sum(-2).clamp_min(1e-30)
        mean = (mass * layer[0]).sum(-2) / total
        return (mass * (layer[0] - mean[..., None, :]) ** 2).sum(-2) / total

    over = w.sum(0)
    used = over.sum(0) > 0
    mass = w.sum(1)
    within = (variance(w) * mass).sum(0) / mass.sum(0).clamp_min(1e-30)
    return float(variance(over)[used].mean()), float(within[used].mean())


@recipe(
    "multi-layer-sae",
    paper="Lawson et al. 2024, Residual Stream Analysis with Multi-Layer SAEs (arXiv 2409.04185)",
    claim="over many prompts a latent is active at several layers, within one prompt at few.",
)
def multi_layer_sae(inputs: Inputs) -> Outcome:
    """The packaged autoencoder of all layers where there is one, else one that is trained here. Control: layers shuffled within a token."""
    model, test = inputs.model, inputs.texts(48)
    try:
        dictionary = pl.load_dictionaries(model.name, model, sites=["resid_post"], kind="multi_layer")[0]
        whose = "packaged"
    except (DictionaryError, IndexError):
        every = pl.texts.sentences(model, 256, seed=inputs.seed + 1) if inputs.file is None else inputs.texts(48 + 256)
        if inputs.file is not None and len(every) <= len(test):
            raise TextError(
                f"{inputs.file} has {len(test)} rows, all of them needed to test the autoencoder; give a file with more to train it on."
            ) from None
        dictionary = trained(model, every if inputs.file is None else every[len(test) :], inputs.seed)
        whose = "trained here"
    x = states(model, test)
    with torch.no_grad():
        active = dictionary.encode(x)
        left = (dictionary.reconstruct(x) - x).square().sum() / (x - x.mean((0, 1))).square().sum()
    over, within = layer_variance(active)
    order = torch.rand(active.shape[:2], generator=torch.Generator().manual_seed(inputs.seed)).argsort(1)
    shuffled = layer_variance(active.gather(1, order[..., None].expand_as(active)))
    n = model.arch.n_layers
    uniform = (n * n - 1) / 12
    dead = float((active.sum((0, 1)) == 0).float().mean())
    numbers = (
        Number("unexplained share of the variance (FVU)", float(left)),
        Number("active latents per state", float((active > 0).float().sum(-1).mean()), "32"),
        Number("dead latents, share", dead),
        Number("variance of the layer of a latent over all tokens, layers²", over, "unknown", uniform, "even over layers"),
        Number("the same within one token", within, "unknown", shuffled[1], "layers shuffled"),
    )
    verdict = f"Over tokens a latent's layer has variance {over:.2f}, within one {within:.2f} (even: {uniform:.1f}); dictionary {whose}."
    figure = bars(
        ["over tokens", "within one token"],
        {"latents": [over, within], "control: layers shuffled": list(shuffled)},
        title=f"At how many layers latents of {model.name} are active",
        label="variance of the layer, layers²",
    )
    return Outcome(numbers, bool(within < 0.75 * over and within < shuffled[1]), verdict, {"layers": figure})
