"""Head paths: what a component says through the values of one later head, and through nothing else.

A path has two edges: writer → head → logits. The pattern of the head, the denominators of the norms on the way and all other components are held
at what they are, so the path is linear in what the writer writes (the second-order lens of Gandelsman et al. 2024, for images).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from patchlab.engine import Program, Result, Target, run
from patchlab.engine.contributions import Layer, layers_of
from patchlab.errors import LensError, SiteError
from patchlab.host import to_array
from patchlab.lenses.head import head_view
from patchlab.lenses.rows import Prompts, RowBatch, rows_of
from patchlab.lenses.stream import norm_after, output_map
from patchlab.models import Model
from patchlab.rules import LNRule
from patchlab.rules.jacobian import norm_jvp
from patchlab.sites import Site

WRITERS = ("mlp_post", "mlp_out", "z", "attn_out")
_AT_ONCE = 2**26  # numbers of changes that are pushed through a norm together


@dataclass(frozen=True, eq=False)
class HeadPaths:
    """What the entries of a writer add at the last position by way of later heads.

    Attributes:
        subject: model and prompts.
        writer: the site, such as ``L2.mlp_post``.
        vectors: ``[example, entry, d_model]``, what arrives in the stream, summed over heads. Coordinate: the number of the neuron or head.
        effects: ``[example, entry, layer, head]``, what each head carries to the metric, the denominator of the final norm held; None for plain
            prompts.
        stream: norm of the stream after the last block at the last position, ``[example]``.
    """

    subject: str
    writer: str
    vectors: xr.DataArray
    effects: xr.DataArray | None
    stream: Float[np.ndarray, " example"]

    def __repr__(self) -> str:
        return f"HeadPaths({self.subject}; {self.writer} → later heads → logits) {self.vectors.sizes['entry']} entries"


def head_paths(model: Model, prompts: Prompts, writer: str | Site, *, entries: Iterable[int] | None = None, side: str = "clean") -> HeadPaths:
    """Two-edge paths from a component of one layer through the values of each later head to the last position.

    Args:
        model: with causal attention.
        prompts: a task, texts or token rows of one length.
        writer: an address with a layer: ``L2.mlp_post`` (each neuron), ``L2.N17.mlp_post``, ``L2.z`` (each head), ``a2.h1``, ``L2.mlp_out``,
            ``L2.attn_out``.
        entries: neurons or heads; default all, or the one in the address.
        side: of a task.

    Raises:
        SiteError: another kind of site, positions, or entries that are not there.
        LensError: a layer without later heads, or a model whose head cannot be read.
        MetricError: a metric that is not linear in the logits.

    Example:
        >>> lenses.head_paths(model, task, "L2.mlp_post").effects.sum(["layer", "head"])  # doctest: +SKIP
    """
    site = Site.parse(writer)
    if site.kind not in WRITERS or site.layer is None or site.pos is not None:
        raise SiteError(f"a writer is one of {', '.join(WRITERS)} of a layer, at all positions, such as L2.mlp_post; got {site}.")
    model.arch.check(site)
    layer, n_layers = site.layer, model.arch.n_layers
    if layer + 1 >= n_layers:
        raise LensError(f"no heads come after layer {layer} of {model.name}, which has the layers 0 to {n_layers - 1}.")
    count = {"mlp_post": model.arch.d_mlp or 0, "z": model.arch.n_heads}.get(site.kind, 1)
    chosen = list(range(count)) if entries is None and site.index is None else [site.index] if entries is None else list(entries)
    if not chosen or not all(isinstance(entry, int) and 0 <= entry < count for entry in chosen):
        raise SiteError(f"{site.kind} of {model.name} has the entries 0 to {count - 1}; got {chosen}.")
    numbers = [int(entry) for entry in chosen if entry is not None]
    blocks, rows = layers_of(model), rows_of(model, prompts, side=side)
    vectors = np.zeros((len(rows), len(numbers), model.arch.d_model))
    effects = np.zeros((len(rows), len(numbers), n_layers, model.arch.n_heads))
    stream = np.zeros(len(rows))
    for batch in rows.batches:
        examples = batch.examples.cpu().numpy()
        kept = _run(model, batch, site, blocks)
        last = kept.activations["resid_post", n_layers - 1][:, -1]
        stream[examples] = to_array(last.norm(dim=-1))
        towards = None
        if rows.metric is not None and batch.answers is not None:
            towards = head_view(model, last, rows.metric, batch.answers).coefficient
        size = max(1, _AT_ONCE // (len(batch) * batch.tokens.shape[1] * model.arch.d_model))
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            with torch.no_grad():
                change = _written(model, kept, site, part, blocks)
                for later in range(layer + 1, n_layers):
                    carried = _carried(kept, blocks[later], later, change)
                    vectors[examples, start : start + size] += to_array(carried.sum(2))
                    if towards is not None:
                        effects[examples, start : start + size, later] = to_array(torch.einsum("rnhd,rd->rnh", carried, towards.to(carried)))
    coords = {"entry": numbers}
    found = xr.DataArray(vectors, dims=("example", "entry", "d_model"), coords=coords, name="vectors")
    layered = None
    if rows.metric is not None:
        dims = ("example", "entry", "layer", "head")
        layered = xr.DataArray(effects, dims=dims, coords={**coords, "layer": np.arange(n_layers)}, name="effect").isel(layer=slice(layer + 1, None))
    subject = rows.subject if side == "clean" else f"{rows.subject}, {side}"
    return HeadPaths(subject, str(site), found, layered, stream)


def _run(model: Model, batch: RowBatch, site: Site, blocks: list[Layer]) -> Result:
    layer = site.layer or 0
    later = range(layer + 1, model.arch.n_layers)
    keep: list[Target] = [(site.kind, layer), ("resid_post", model.arch.n_layers - 1)]
    keep += [(kind, one) for one in later for kind in ("pattern", "z")]
    places = [blocks[one].before for one in later] + [norm_after(model, f"blocks.{layer}.ln2_post")]
    hooks = tuple(dict.fromkeys(hook for place in places if place is not None for hook in place.reads))
    with torch.no_grad():
        return run(model, Program(batch.tokens, batch.examples, positions=batch.positions, keep=tuple(dict.fromkeys(keep)), hooks=hooks))


def _written(model: Model, kept: Result, site: Site, entries: list[int], blocks: list[Layer]) -> Float[Tensor, "row pos entry d_model"]:
    """What each entry writes into the stream, norms after attention and MLP with their denominators held."""
    layer = site.layer or 0
    value = kept.activations[site.kind, layer]
    if site.kind in ("mlp_out", "attn_out"):
        return value[:, :, None]
    if site.kind == "z":
        return blocks[layer].shares(value[None])[0][0].permute(1, 2, 0, 3)[:, :, entries]
    weight, _ = output_map(model, f"blocks.{layer}.mlp.out")
    scale = float(getattr(model.bridge.blocks[layer], "residual_contribution_scale", 1.0))
    written = scale * value[:, :, entries, None] * weight[entries].to(value.dtype)
    place = norm_after(model, f"blocks.{layer}.ln2_post")
    if place is None:
        return written
    x, denominator = (kept.hooks[hook] for hook in place.reads)
    return norm_jvp(LNRule(), place, x, denominator, written)


def _carried(kept: Result, block: Layer, layer: int, change: Float[Tensor, "row pos entry d_model"]) -> Float[Tensor, "row entry head d_model"]:
    """A change of what a block reads as its heads carry it to the last position by their values alone."""
    if block.before is not None:
        x, denominator = (kept.hooks[hook] for hook in block.before.reads)
        change = norm_jvp(LNRule(), block.before, x, denominator, change)
    weight, _ = block.read["v"]
    pattern = kept.activations["pattern", layer][:, :, -1]
    seen = torch.einsum("rhp,rpnd->rnhd", pattern.to(change), change)
    out = torch.einsum("rnhd,hde,hef->rnhf", seen, weight.to(change), block.write.to(change))
    if block.post is None:
        return out
    z = kept.activations["z", layer][:, -1:]
    return block.scaled(out) * block.inverse_denominator(block.heads(z[None])[0].sum(0))[:, :, None]
