"""Corrections of linearised patching: AtP*'s QK-fix for queries and keys and GradDrop for effects that cancel; gradients through dictionaries.

Source: Kramár et al. 2024 (arXiv 2403.00745). Both work under any rules and along any path over inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import Place
from patchlab.adapters.dictionaries import FeatureSite, Point
from patchlab.engine import Target
from patchlab.errors import MethodError
from patchlab.host import to_array
from patchlab.interventions import Edit
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.rounding import product_variance
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, program, reduced, required
from patchlab.rules import Composite, scale_gradient
from patchlab.rules.attachments import Attachment, Recorded
from patchlab.rules.rule import graft
from patchlab.sites import KINDS, Site, address


@dataclass(frozen=True)
class Extended(Composite):
    """A composite with more attachments than its rules: stops at what one layer adds to the stream, dictionaries that gradients go through."""

    more: tuple[Attachment, ...] = ()

    @property
    def plain(self) -> bool:
        return False

    def attach(self, places: tuple[Place, ...]) -> tuple[Attachment, ...]:
        return (*super().attach(places), *self.more)


def extended(composite: Composite, more: tuple[Attachment, ...]) -> Extended:
    """The composite with more attachments."""
    own = composite.more if isinstance(composite, Extended) else ()
    return Extended(**{field.name: getattr(composite, field.name) for field in fields(Composite)}, more=(*own, *more))


def _stop(value: Tensor, recorded: Recorded) -> Tensor:
    return scale_gradient(value, 0.0)


def dropping(composite: Composite, setting: Setting, layer: int) -> Extended:
    """The composite with the gradient through one layer's attention and MLP outputs stopped."""
    arch = setting.model.arch
    stops = tuple(arch.accessors[kind].host(layer) for kind in ("attn_out", "mlp_out") if kind not in arch.absent)
    return extended(composite, tuple(Attachment(hook, (), _stop) for hook in stops))


def splicing(composite: Composite, setting: Setting) -> Extended:
    """The composite with gradients to earlier layers going through the model's dictionaries alone, wherever it has one.

    The forward pass stays as it is. What a dictionary reconstructs has the dictionary's own gradient, mask and all, and what it leaves out is a
    constant; a transcoder's gradient takes the place of the MLP's. Where the dictionary normalises each row, a composite with a rule for norms holds
    the scale; activations need no rule, since f(z)/z of a mask is its slope.
    """
    arch, held = setting.model.arch, composite.norm is not None
    points = [accessor.point for accessor in arch.accessors.values() if isinstance(accessor, FeatureSite)]
    if not points:
        raise MethodError(f"+spliced sends gradients through dictionaries, and {setting.model.name} has none; model.add_dictionaries(...) adds some.")
    found: list[Attachment] = []
    for point in points:
        for layer in point.written:
            accessor = arch.accessors[f"error.{point.name}"].at(layer)
            names = accessor.companion(layer)
            reads = () if names is None else (names,) if isinstance(names, str) else names
            found.append(Attachment(accessor.host(layer), reads, partial(_spliced, point, layer, held, reads)))
    return extended(composite, tuple(found))


def _spliced(point: Point, layer: int, held: bool, reads: tuple[str, ...], value: Tensor, recorded: Recorded) -> Tensor:
    """The value with the gradient of its reconstruction."""
    into = point.into(layer)
    stream = into[0].reads is None and bool(reads)  # the point is its host and another stream together
    if into[0].reads is None:
        whole = into[0].base.read(value, recorded[reads[0]] if stream else None)
        inputs = {layer: into[0].flat(whole)}
    else:
        read = dict.fromkeys(name for name in reads)
        inputs = {one.layer: one.flat(recorded[name]) for one, name in zip(into, read, strict=True)}
    found = point.reconstruct(layer, inputs, held=held).to(value.dtype).reshape(value.shape)
    return graft(value, found - recorded[reads[0]] if stream else found)


def drop_term(scores: Float[np.ndarray, "batch *cells"], kind: str, layer: int, n_layers: int) -> Float[np.ndarray, "batch *cells"]:
    """The share of one dropped layer in GradDrop's score.

    ``(1 / n) Σ_l |score with layer l dropped|`` over the layers l that leave the node a way out: the n = L − 1 other layers for
    a node inside a layer, as in the paper (the mean over all L layers times L / (L − 1): the layer that contains the node adds nothing).
    The residual stream and the input lie in no layer, and the paper has no such nodes; for them all n = L layers count here.
    """
    size = np.abs(scores)
    if KINDS[kind].stream:
        return size / n_layers
    size[:, layer] = 0.0
    return size / (n_layers - 1)


def every_layer(setting: Setting, kind: str) -> tuple[Target, ...]:
    """A kind in all layers."""
    return tuple((kind, layer) for layer in range(setting.model.arch.n_layers))


def _patches(setting: Setting, kind: str) -> list[tuple[tuple[str, ...], int | None]]:
    """The runs that QK-fix needs for a kind: the sites each serves, and the cell of the position axis it patches (None: all).

    Queries of different heads and positions never meet in a pattern, so one run serves them all; keys of different positions do, in
    the softmax.
    """
    names = {str(site): site for site in setting.sites if site.kind == kind}
    joint = tuple(name for name, site in names.items() if kind == "q" or "pos" not in site.axes)
    apart = [name for name in names if name not in joint]
    found: list[tuple[tuple[str, ...], int | None]] = [(joint, None)] if joint else []
    if apart and setting.axis is not None:
        for cell in range(len(setting.axis)):
            served = tuple(name for name in apart if bool(required(setting.live[name]).take(cell, axis=names[name].axes.index("pos")).any()))
            found += [(served, cell)] if served else []
    return found


def qk_forwards(setting: Setting) -> int:
    """Forward passes that QK-fix takes per batch: one for q, one for k, one per live position for k by position."""
    return sum(len(_patches(setting, kind)) for kind in ("q", "k"))


def pattern_changes(setting: Setting, runs: Runs, meter: Meter) -> Iterator[tuple[str, tuple[str, ...], int | None, dict[int, Tensor]]]:
    """Kind, site names, position cell, and per layer how the pattern changes if q or k is patched there, all else at the baseline.

    One run serves all layers: every block gets the baseline's residual stream, so that no patch reaches the next layer. Rotary
    embedding, q/k-norms, softcaps and masks are the model's own.
    """
    held = runs.baseline.as_source()
    reset = [Edit(address(*target), held) for target in every_layer(setting, "resid_pre")]
    patterns = every_layer(setting, "pattern")
    for kind in ("q", "k"):
        for names, cell in _patches(setting, kind):
            pos = None
            if cell is not None and setting.axis is not None:
                pos = (cell if setting.axis.names is None else setting.axis.names[cell],)
            edits = [Edit(Site(kind, (), layer=layer, pos=pos), runs.source) for _, layer in patterns]
            planned = replace(program(setting, runs, edits=(*reset, *edits), keep=patterns), metric=None, answers=None)
            found = meter.run(setting.model, planned).activations
            changes = {layer: found["pattern", layer] - runs.baseline.activations["pattern", layer] for layer in range(len(patterns))}
            yield kind, names, cell, changes


def qk_product(
    kind: str, change: Float[Tensor, "batch head dest src"], gradient: Float[Tensor, "batch head dest src"], n_kv_heads: int
) -> Float[Tensor, "batch *cells"]:
    """Change of the pattern × its gradient: ``[batch, pos, head]`` for q, ``[batch, kv_head]`` for k (summed over the heads that share it)."""
    product = change.to(torch.promote_types(change.dtype, torch.float32)) * gradient
    if kind == "q":
        return rearrange(product.sum(-1), "batch head dest -> batch dest head")
    return rearrange(product.sum((2, 3)), "batch (kv_head copy) -> batch kv_head copy", kv_head=n_kv_heads).sum(-1)


def qk_scores(setting: Setting, runs: Runs, meter: Meter, gradients: list[dict[int, Tensor]]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Scores of the q and k sites and their noise floors, ``[batch, *cells]`` for each set of gradients at the patterns (``layer`` to
    ``[batch, head, dest, src]``).
    """
    sites, copies = {str(site): site for site in setting.sites if site.kind in ("q", "k")}, setting.model.arch.n_kv_heads
    shapes = {name: (len(runs.batch), *required(setting.live[name]).shape) for name in sites}
    found = {name: [(np.zeros(shape), np.zeros(shape)) for _ in gradients] for name, shape in shapes.items()}
    for kind, names, cell, changes in pattern_changes(setting, runs, meter):
        for number, gradient in enumerate(gradients):
            products = [qk_product(kind, change, gradient[layer], copies) for layer, change in changes.items()]
            off = [_variance(runs.baseline.activations["pattern", layer], change, gradient[layer]) for layer, change in changes.items()]
            off = [qk_product(kind, one, torch.ones_like(one), copies) for one in off]
            where = (slice(None), slice(None)) if cell is None else (slice(None), slice(None), cell)
            for name in names:
                values, variance = (to_array(torch.stack([_reduced(setting, runs, sites[name], one) for one in part], 1)) for part in (products, off))
                found[name][number][0][where] = values
                found[name][number][1][where] = runs.rounding.of_products(variance, values)
    return found


def _variance(own: Float[Tensor, "batch head dest src"], change: Tensor, gradient: Tensor) -> Float[Tensor, "batch head dest src"]:
    return product_variance(change.to(torch.promote_types(change.dtype, torch.float32)), own, gradient, vectors=False)


def _reduced(setting: Setting, runs: Runs, site: Site, product: Float[Tensor, "batch *site"]) -> Float[Tensor, "batch *cells"]:
    if site.kind == "q":
        return reduced(setting, runs, site, product)
    return product if "kv_head" in site.axes else product.sum(-1)
