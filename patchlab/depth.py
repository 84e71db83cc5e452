"""Depth: what each layer adds to the stream, what later layers do without it, and which tokens could leave it out.

    >>> import patchlab as pl
    >>> from patchlab import depth
    >>> model = pl.load_model("demo-gpt2-4l")
    >>> effects = depth.skip_effects(model, pl.load_task("ioi", model, n=4))
    >>> effects.matrix().shape
    (4, 4)

The contribution of a layer is what its attention and its MLP add: ``a + m``. Without it the stream after the layer is that before it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.engine import Program, Target, run
from patchlab.engine.program import row_numbers
from patchlab.errors import LensError
from patchlab.host import precise
from patchlab.interventions import Edit
from patchlab.layer_metrics import LayerMetrics, States, collected, mean_of, states_of
from patchlab.lenses.head import head_logits
from patchlab.lenses.linear_map import LeastSquares
from patchlab.lenses.rows import Corpus, by_length
from patchlab.lenses.stream import allowed
from patchlab.metrics import divergence
from patchlab.models import Model
from patchlab.tasks.task import Task
from patchlab.texts import Texts

_TRIED = 32  # rows per forward pass
_CONTRIBUTIONS = {
    "attention_norm": "norm of what attention adds, over that of the stream it reads",
    "mlp_norm": "norm of what the MLP adds, over that of the stream it reads",
    "layer_norm": "norm of what both add, over that of the stream before the layer",
    "attention_cosine": "cosine of what attention adds with the stream it reads (0: new, below: erases, above: amplifies)",
    "mlp_cosine": "cosine of what the MLP adds with the stream it reads",
    "layer_cosine": "cosine of what both add with the stream before the layer",
}


def skip(model: Model, layers: int | Iterable[int], positions: Iterable[int] | None = None) -> tuple[Edit, ...]:
    """The edits that leave out whole layers (attention and MLP), at some positions or at all.

    Raises:
        LensError: layers that the model has not.

    Example:
        >>> model.run("When Mary and John", edits=list(depth.skip(model, [2, 3])))  # doctest: +SKIP
    """
    chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen or not all(0 <= layer < model.arch.n_layers for layer in chosen):
        raise LensError(f"layers to skip are numbers from 0 to {model.arch.n_layers - 1}, at least one; got {chosen}.")
    at = "" if positions is None else "@" + ",".join(map(str, positions))
    if at == "@":
        return ()
    return tuple(Edit(f"L{layer}.{kind}{at}", 0.0) for layer in chosen for kind in _sublayers(model))


def _sublayers(model: Model) -> tuple[str, ...]:
    if "attn_out" in model.arch.absent:
        raise LensError(f"{model.name} has no attn_out ({model.arch.absent['attn_out']}), so what a layer adds cannot be told.")
    return ("attn_out",) if "mlp_out" in model.arch.absent else ("attn_out", "mlp_out")


def _added(model: Model, kept: dict[Target, Tensor], layer: int) -> Float[Tensor, "row pos d_model"]:
    """What a layer added: its attention and its MLP, in float64."""
    return torch.stack([precise(kept[kind, layer]) for kind in _sublayers(model)]).sum(0)


def _check_sum(model: Model, kept: dict[Target, Tensor], layer: int) -> None:
    before, after = precise(kept["resid_pre", layer]), precise(kept["resid_post", layer])
    off = float((after - before - _added(model, kept, layer)).norm() / after.norm().clamp_min(1e-30))
    if off > allowed(model):
        raise LensError(
            f"in layer {layer} of {model.name} the stream is not what was there and what attention and MLP added (off by {off:.2g} of it), so layers "
            f"cannot be skipped by leaving these out."
        )


def _all_sites(model: Model) -> tuple[Target, ...]:
    return tuple((kind, layer) for layer in range(model.arch.n_layers) for kind in ("resid_pre", *_sublayers(model), "resid_post"))


def _kept(model: Model, tokens: Int[Tensor, "row pos"], edits: tuple[Edit, ...] = (), *, logits: bool = False) -> tuple[dict[Target, Tensor], Tensor]:
    with torch.no_grad():
        found = run(model, Program(tokens, row_numbers(tokens), edits=edits, keep=_all_sites(model), logits="all" if logits else "none"))
    return dict(found.activations), found.logits if found.logits is not None else torch.empty(0)


def _batches(model: Model, corpus: Corpus) -> list[tuple[Int[np.ndarray, " row"], Int[Tensor, "row pos"]]]:
    return [
        (numbers[start : start + _TRIED], tokens[start : start + _TRIED])
        for numbers, tokens in by_length(model, corpus)
        for start in range(0, len(numbers), _TRIED)
    ]


def _subject(model: Model, corpus: Corpus, n: int) -> str:
    return f"{model.name} × {corpus.name}[{n}]" if isinstance(corpus, (Task, Texts)) else f"{model.name} × {n} texts"


def _collect(model: Model, corpus: Corpus, per_text: dict[str, Float[np.ndarray, "text layer"]], what: dict[str, str]) -> LayerMetrics:
    """Means over texts of numbers of each text and layer, as layer metrics."""
    layers = range(model.arch.n_layers)
    found = {name: {layer: mean_of(array[:, layer]) for layer in layers} for name, array in per_text.items()}
    n = len(next(iter(per_text.values())))
    return collected(_subject(model, corpus, n), found, layers, what, {"model": model.name, "fingerprint": model.fingerprint, "texts": n})


def contributions(model: Model, corpus: Corpus, *, skip_first: int = 0) -> LayerMetrics:
    """Norms and cosines of what attention, MLP and layer add to the stream, means over the positions of each text.

    As Csordás et al. 2025 (arXiv 2505.13898): ``‖a‖/‖h‖``, ``‖m‖/‖h + a‖``, ``‖a + m‖/‖h‖`` and the cosines of the same pairs. Where attention and
    MLP read the same stream, ``m`` is compared with ``h``.

    Raises:
        LensError: a text without a position that counts, or a stream that is not the sum of what layers add.
    """
    batches = _batches(model, corpus)
    n = sum(len(numbers) for numbers, _ in batches)
    found = {name: np.full((n, model.arch.n_layers), np.nan) for name in _CONTRIBUTIONS}
    both = _sublayers(model)
    for numbers, tokens in batches:
        if tokens.shape[1] <= skip_first:
            raise LensError(f"a text of {tokens.shape[1]} tokens has no position after the first {skip_first}; give longer texts.")
        kept, _ = _kept(model, tokens)
        for layer in range(model.arch.n_layers):
            _check_sum(model, kept, layer)
            h, a = (precise(kept[kind, layer])[:, skip_first:] for kind in ("resid_pre", "attn_out"))
            parts = {"attention": (a, h), "layer": (_added(model, kept, layer)[:, skip_first:], h)}
            if len(both) > 1:
                parts["mlp"] = precise(kept["mlp_out", layer])[:, skip_first:], h if model.arch.parallel else h + a
            for name, (own, stream) in parts.items():
                norm = own.norm(dim=-1) / stream.norm(dim=-1).clamp_min(1e-30)
                cosine = torch.nn.functional.cosine_similarity(own, stream, dim=-1, eps=1e-30)
                found[f"{name}_norm"][numbers, layer] = norm.mean(1).cpu().numpy()
                found[f"{name}_cosine"][numbers, layer] = cosine.mean(1).cpu().numpy()
    what = {name: text for name, text in _CONTRIBUTIONS.items() if not (name.startswith("mlp") and len(both) == 1)}
    return _collect(model, corpus, {name: found[name] for name in what}, what)


def layer_influence(model: Model, corpus: Corpus) -> LayerMetrics:
    """Layer importance without running anything twice (``lim``), and by skipping the layer (``skip_kl``), means over positions.

    LIM is ``−cos(h, h')`` of the states before and after a layer (Dumitru et al. 2024, arXiv 2406.17415): a layer that turns the stream is important.
    ``skip_kl`` is the KL divergence in nats of the model's token distributions from those without the layer.
    """
    batches = _batches(model, corpus)
    n = sum(len(numbers) for numbers, _ in batches)
    found = {name: np.zeros((n, model.arch.n_layers)) for name in ("lim", "skip_kl")}
    for numbers, tokens in batches:
        kept, logits = _kept(model, tokens, logits=True)
        for layer in range(model.arch.n_layers):
            _check_sum(model, kept, layer)
            before, after = precise(kept["resid_pre", layer]), precise(kept["resid_post", layer])
            found["lim"][numbers, layer] = -torch.nn.functional.cosine_similarity(before, after, dim=-1).mean(1).cpu().numpy()
            with torch.no_grad():
                without = run(model, Program(tokens, row_numbers(tokens), edits=skip(model, layer), logits="all")).logits
            kl = divergence(precise(logits), precise(without)) / tokens.shape[1]  # pyright: ignore[reportArgumentType]
            found["skip_kl"][numbers, layer] = kl.cpu().numpy()
    what = {"lim": "minus the cosine of the states before and after the layer", "skip_kl": "KL divergence from the output without the layer, in nats"}
    return _collect(model, corpus, found, what)


@dataclass(frozen=True, eq=False)
class SkipEffects:
    """What skipping a layer does to the later ones.

    Attributes:
        subject: model and prompts.
        data: ``effect`` ``[example, skipped, layer]``, the largest ``‖c − c̃‖ / ‖c‖`` over positions, of the contributions c with and c̃ without
            the skipped layer (NaN at layers that are not later); unless ``local`` also ``output`` ``[example, skipped]``, the largest ``‖p − p̃‖`` of
            the token distributions, and ``kl``, in nats, mean over positions.
        local: the contribution was removed from the input of one later layer at a time.
        start: None, or the position before which layers were skipped and from which on effects were measured.
    """

    subject: str
    data: xr.Dataset
    local: bool = False
    start: int | None = None

    def matrix(self, over: str = "max") -> Float[np.ndarray, "skipped layer"]:
        """The effects over prompts: the largest (``max``, as in the paper) or the ``mean``.

        Raises:
            LensError: another word.
        """
        if over not in ("max", "mean"):
            raise LensError(f"effects over prompts are their 'max' or their 'mean'; got {over!r}.")
        values = self.data["effect"].to_numpy()
        return values.max(0) if over == "max" else values.mean(0)

    def table(self) -> pd.DataFrame:
        """One row per pair of layers: ``skipped, layer, max, mean``."""
        largest, mean = self.matrix(), self.matrix("mean")
        rows = [(int(s), int(layer), largest[s, layer], mean[s, layer]) for s, layer in np.argwhere(~np.isnan(largest))]
        return pd.DataFrame(rows, columns=["skipped", "layer", "max", "mean"])

    def __repr__(self) -> str:
        how = f"{'local' if self.local else 'propagated'}, {'all positions' if self.start is None else f'future of position {self.start}'}"
        return f"SkipEffects({self.subject}; {how}) {self.data.sizes['skipped']} layers"


def skip_effects(model: Model, corpus: Corpus, *, local: bool = False, future: int | None = None) -> SkipEffects:
    """Effects of skipping each layer on the contribution of each later one (Csordás et al. 2025, arXiv 2505.13898).

    Args:
        model: the model.
        corpus: a task (its clean prompts), texts, rows of token ids. One forward pass per layer, and with ``local`` one per pair of layers.
        local: remove the skipped layer's contribution from the input of one later layer only, instead of letting the change run through all.
        future: skip at positions before this one and measure from it on: only what later tokens compute from it then counts.

    Raises:
        LensError: no position before or after ``future``, or a stream that is not the sum of what layers add.
    """
    batches = _batches(model, corpus)
    if future is not None and (bad := [tokens.shape[1] for _, tokens in batches if not 0 < future < tokens.shape[1]]):
        raise LensError(f"future={future} leaves a prompt of {bad[0]} tokens without positions to skip at or to measure at; give 1 to {bad[0] - 1}.")
    n, layers = sum(len(numbers) for numbers, _ in batches), model.arch.n_layers
    effect, output, kl = np.full((n, layers, layers), np.nan), np.zeros((n, layers)), np.zeros((n, layers))
    for numbers, tokens in batches:
        skipped_at = None if future is None else range(future)
        kept, logits = _kept(model, tokens, logits=True)
        added = [_added(model, kept, layer) for layer in range(layers)]
        for layer in range(layers):
            _check_sum(model, kept, layer)
        for s in range(layers):
            if local:
                for layer in range(s + 1, layers):
                    removal = -_at_skipped(added[s], future)
                    edit = Edit(f"L{layer}.resid_pre", removal.to(model.dtype), op="add")
                    own, _ = _kept(model, tokens, (edit,))
                    effect[numbers, s, layer] = _change(added[layer], _added(model, own, layer), future)
                continue
            own, without = _kept(model, tokens, skip(model, s, skipped_at), logits=True)
            for layer in range(s + 1, layers):
                effect[numbers, s, layer] = _change(added[layer], _added(model, own, layer), future)
            p, q = (precise(part)[:, future or 0 :] for part in (logits, without))
            output[numbers, s] = (p.softmax(-1) - q.softmax(-1)).norm(dim=-1).amax(1).cpu().numpy()
            kl[numbers, s] = (divergence(p, q) / p.shape[1]).cpu().numpy()
    parts = {"effect": (("example", "skipped", "layer"), effect)}
    if not local:
        parts |= {"output": (("example", "skipped"), output), "kl": (("example", "skipped"), kl)}
    data = xr.Dataset(parts, coords={"skipped": np.arange(layers), "layer": np.arange(layers)})
    return SkipEffects(_subject(model, corpus, n), data, local, future)


def _at_skipped(added: Float[Tensor, "row pos d_model"], future: int | None) -> Float[Tensor, "row pos d_model"]:
    """A contribution at the positions that are skipped, zero at others."""
    if future is None:
        return added
    return torch.cat([added[:, :future], torch.zeros_like(added[:, future:])], 1)


def _change(own: Float[Tensor, "row pos d_model"], new: Float[Tensor, "row pos d_model"], future: int | None) -> Float[np.ndarray, " row"]:
    start = future or 0
    relative = (own - new)[:, start:].norm(dim=-1) / own[:, start:].norm(dim=-1).clamp_min(1e-30)
    return relative.amax(1).cpu().numpy()


def active_layers(norms: Float[Tensor, "row state pos"], alpha: float | int = 0.8) -> Bool[Tensor, "row layer pos"]:
    """Which layers are active at each token, by the norms of its states before the blocks and after each (the voids of L2 adaptive computation).

    With ``Δ = ‖h'‖ − ‖h‖`` of each layer, a layer is active where ``Δ ≥ alpha · (max Δ − min Δ)`` over the layers before it. The first two
    have no range to be compared with: they are active where the norm grows. (The authors' code takes the range of the first layer over the batch.)
    """
    delta = norms.diff(dim=1)
    active = torch.zeros_like(delta, dtype=torch.bool)
    for layer in range(delta.shape[1]):
        before = delta[:, :layer] if layer else torch.zeros_like(delta[:, :1])
        active[:, layer] = delta[:, layer] >= alpha * (before.amax(1) - before.amin(1))
    return active


def void_mask(model: Model, tokens: Int[Tensor, "row pos"], alpha: float | int = 0.8) -> Bool[Tensor, "row layer pos"]:
    """Which layers are active at each token of prompts of one length; see :func:`active_layers`."""
    if not alpha >= 0:
        raise LensError(f"alpha is {alpha}; it is a share of a range, at least 0.")
    targets = (("resid_pre", 0), *(("resid_post", layer) for layer in range(model.arch.n_layers)))
    with torch.no_grad():
        kept = run(model, Program(tokens, row_numbers(tokens), keep=targets)).activations
    return active_layers(torch.stack([precise(kept[target]).norm(dim=-1) for target in targets], 1), alpha)


def shuffled(active: Bool[Tensor, "row layer pos"], seed: int = 0) -> Bool[Tensor, "row layer pos"]:
    """Equally many layers of each token, drawn at random: the control of a mask."""
    noise = torch.rand(active.shape, generator=torch.Generator().manual_seed(seed)).to(active.device)
    rank = noise.argsort(1).argsort(1)
    return rank < active.sum(1, keepdim=True)


def skip_inactive(model: Model, active: Bool[Tensor, "row layer pos"]) -> tuple[Edit, ...]:
    """The edits that leave out layers at the tokens where they are not active; the run's rows and positions are those of the mask."""
    values = active.to(model.dtype)[..., None]
    return tuple(Edit(f"L{layer}.{kind}", values[:, layer], op="scale") for layer in range(model.arch.n_layers) for kind in _sublayers(model))


def read_last_active(model: Model, tokens: Int[Tensor, "row pos"], active: Bool[Tensor, "row layer pos"]) -> Float[Tensor, "row pos vocab"]:
    """The logits of each token's state after its last active layer, of a run that skips nothing (what the authors' code of voids does)."""
    targets = (("resid_pre", 0), *(("resid_post", layer) for layer in range(model.arch.n_layers)))
    with torch.no_grad():
        kept = run(model, Program(tokens, row_numbers(tokens), keep=targets)).activations
    states = torch.stack([kept[target] for target in targets], 1)
    number = torch.arange(1, active.shape[1] + 1, device=active.device)[None, :, None]
    last = (active * number).amax(1)
    picked = states.gather(1, last[:, None, :, None].expand(-1, 1, -1, states.shape[-1]))[:, 0]
    with torch.no_grad():
        return head_logits(model, picked)


def maps_between(first: Model, second: Model, corpus: Corpus, *, held_out: float | int = 0.25, seed: int = 0) -> xr.DataArray:
    """Held-out R² of affine maps from the states of one model to those of another that reads the same tokens, ``[layer, to_layer]``.

    Whether a deeper model does other things, or the same in smaller steps (Csordás et al. 2025): then each layer of the first is best mapped to one
    at the same relative depth. Layer −1 is before the blocks.

    Raises:
        LensError: vocabularies of two sizes, too few texts or states.
    """
    if first.vocab_size != second.vocab_size:
        raise LensError(f"{first.name} has {first.vocab_size} tokens and {second.name} {second.vocab_size}: they do not read the same texts.")
    x, y = (states_of(model, corpus, seed=seed) for model in (first, second))
    n = len(x)
    order = np.random.default_rng(seed).permutation(n)
    held, fitted = np.split(order, [max(1, round(held_out * n))])
    if not len(fitted):
        raise LensError(f"{n} texts cannot be cut into texts to fit on and texts to measure on; give more.")

    def rows(states: States, at: int, which: Int[np.ndarray, " text"]) -> Float[Tensor, "state d_model"]:
        return torch.from_numpy(np.concatenate([states.of[at][i] for i in which]))

    found = np.zeros((len(x.of), len(y.of)))
    width = y.of[0][0].shape[1]
    targets = torch.cat([rows(y, to, fitted) for to in range(len(y.of))], 1)
    wanted = torch.cat([rows(y, to, held) for to in range(len(y.of))], 1)
    for at in range(len(x.of)):
        sums = LeastSquares(x.of[0][0].shape[1], targets.shape[1], torch.device("cpu"))
        sums.add(rows(x, at, fitted), targets)
        left = (sums.solve(1e-6, torch.float64)(rows(x, at, held)) - wanted).square().sum(0)
        total = (wanted - wanted.mean(0)).square().sum(0)
        found[at] = (1 - left.unflatten(0, (-1, width)).sum(1) / total.unflatten(0, (-1, width)).sum(1)).numpy()
    coords = {"layer": np.arange(-1, len(x.of) - 1), "to_layer": np.arange(-1, len(y.of) - 1)}
    return xr.DataArray(found, dims=("layer", "to_layer"), coords=coords, name=f"R² of maps from {first.name} to {second.name}")
