"""Edge scores of the linearised methods: what a writer's output would change, times the coefficient at one reader's input.

An edge's score is ``Σ (u_source − u_baseline) · g_r`` over positions and channels, where ``g_r`` is the part of the gradient (or
relevance coefficient) at the residual stream that comes through reader r alone. It is never computed by a backward pass of its
own: the gradients at q, k, v and at the MLP's input, from the pass that node scores take, go back through W and the norm before it.
Source: EAP, Syed et al. 2023 (arXiv 2310.10348); EAP-IG, Hanna et al. 2024 (arXiv 2403.17806).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import NormPlace
from patchlab.engine import Result, Target
from patchlab.engine.contributions import Layer, layers_of
from patchlab.errors import MethodError
from patchlab.interventions import Kept
from patchlab.methods.setting.runs import Runs, Setting, at_positions, first_difference, itemsize
from patchlab.rules import Composite
from patchlab.rules.jacobian import norm_jvp, norm_vjp

CHUNK_BYTES = 2**26
"""What the outputs of all writers may take at once; more examples than fit are scored in chunks."""


def edge_options(setting: Setting, composite: Composite) -> dict[str, Any]:
    """What a run must return for its point of the path to be scored: fields of its program.

    Raises:
        MethodError: rules that edges cannot be scored under.
    """
    if composite.linear is not None:
        raise MethodError(
            f"edges need the 0-rule on linear maps, and the composite {composite.name!r} puts {type(composite.linear).__name__} on them: "
            f"what reaches one head is then no longer a part of what reaches the stream. Use a composite with linear=None."
        )
    arch = setting.model.arch
    layers = range(arch.n_layers)
    letters = [letter for letter in "qkv" if letter not in composite.not_scored]
    gradients: list[Target] = [*setting.targets, *((letter, layer) for letter in letters for layer in layers), ("resid_post", arch.n_layers - 1)]
    norms = [place for layer in layers_of(setting.model) for place in layer.norms]
    by_dest = setting.edges is not None and "dest" in setting.edges.axes
    return {
        "gradients": tuple(gradients),
        "hooks": tuple(dict.fromkeys(name for place in norms for name in place.reads)),
        "hook_gradients": tuple(f"blocks.{layer}.mlp.hook_in" for layer in layers if arch.graph.mlps),
        "attention": "dest" if by_dest else "head",
    }


def edge_bytes(setting: Setting, rows: int, length: int) -> int:
    """Bytes that the scores of a batch and one chunk of their computation take."""
    writers, readers = setting.model.arch.graph.allowed.shape
    cells = writers * readers * (1 if setting.edges is None else length ** (len(setting.edges.axes) - 2))
    one = _writer_bytes(setting, 1, length)
    return 2 * rows * cells * (8 + 4) + 3 * max(one, min(rows * one, _chunk_bytes(setting)))


class EdgeScores:
    """Sums the scores of one batch over the points of a path, with the node scores of the same points beside them."""

    def __init__(self, setting: Setting, runs: Runs, composite: Composite, differences: dict[Target, Tensor]) -> None:
        self.setting, self.runs, self.composite = setting, runs, composite
        arch, site = setting.model.arch, setting.edges
        if site is None:
            raise MethodError("the setting asks for no edges.")
        self.graph, self.axes = arch.graph, site.axes[2:]
        n, length = runs.baseline_tokens.shape
        start = first_difference(runs.batch) if isinstance(runs.source, Kept) else 0
        self.span = length - start
        self.differences = {key: value[:, -self.span :] for key, value in differences.items()}
        self.parts = layers_of(setting.model)
        shape = (n, *self.graph.allowed.shape, *[length] * len(self.axes))
        kind = torch.float64 if setting.model.dtype == torch.float64 else torch.float32
        self.total = torch.zeros(shape, dtype=kind, device=runs.baseline_tokens.device)
        self.variance = torch.zeros_like(self.total)
        self.nodes = self.total.new_zeros(n, len(self.graph.writers))

    def add(self, point: Result, weight: float, group: Target | None = None) -> None:
        """Add the scores at one point of the path; of the writers of one group only, where one is named."""
        rows = slice(None) if group is None else self.graph.writer_slice(group[1])
        if group is not None and group[0] != "input":
            heads = rows.start + self.graph.n_heads
            rows = slice(rows.start, heads) if group[0] == "z" else slice(heads, rows.stop)
        n = len(self.total)
        step = max(1, int(_chunk_bytes(self.setting) // _writer_bytes(self.setting, 1, self.span)))
        for first in range(0, n, step):
            chunk = slice(first, first + step)
            scores, off = self.total.new_zeros(2, *self.total[chunk].shape).unbind(0)
            written = self._written(point, chunk)
            sizes = self._sizes(written, chunk).unsqueeze(-1)
            for readers, before, coefficients in self._readers(point, chunk):
                low, high = rows.start or 0, before if rows.stop is None else min(rows.stop, before)
                if low < high:
                    self._contract(scores[:, low:high, readers], written[:, low:high], coefficients)
                    slopes = coefficients.to(written.dtype).square().sum(-1, keepdim=True)
                    self._contract(off[:, low:high, readers], sizes[:, low:high], slopes)
            self.total[chunk] += weight * scores
            self.variance[chunk] += weight * off / written.shape[-1]
            del scores, off, written
        self._add_nodes(point, weight, rows)

    def result(self) -> tuple[Float[np.ndarray, "batch writer reader *positions"], Float[np.ndarray, "batch writer reader *positions"]]:
        """The scores and their noise floors; NaN for readers that the rules cut off."""
        found = []
        for values in (self.total, self.variance):
            for dim in range(3, values.ndim):
                values = at_positions(self.setting, self.runs, values, dim)
            found.append(values.double().cpu().numpy())
            found[-1][:, :, np.isin(self.graph.reader_kind, list(self.composite.not_scored))] = np.nan
        scores, variance = found
        return scores, self.runs.rounding.of_products(variance, scores)

    def mismatch(self) -> tuple[float, float]:
        """Largest |Σ of a writer's edges − its node score|, and the largest |node score| to hold it against."""
        sums = self.total.flatten(2).sum(2)
        return float((sums - self.nodes).abs().max()), float(self.nodes.abs().max())

    def _written(self, point: Result, chunk: slice) -> Float[Tensor, "batch writer pos d_model"]:
        """How the output of every writer differs, as it reaches the residual stream at this point of the path."""
        embedded = self.differences["input", None][chunk]
        n, span, width = embedded.shape
        written = embedded.new_empty(n, len(self.graph.writers), span, width)
        written[:, 0] = embedded
        for layer, part in enumerate(self.parts):
            where = self.graph.writer_slice(layer)
            heads = torch.einsum("bphk,hkd->bphd", self.differences["z", layer][chunk], part.write.to(written.dtype))
            if part.post is not None:
                heads = norm_jvp(self.composite.norm, part.post, *self._norm_inputs(point, part.post, chunk), heads)
            written[:, where.start : where.start + self.graph.n_heads] = heads.transpose(1, 2)
            if self.graph.mlps:
                written[:, where.stop - 1] = self.differences["mlp_out", layer][chunk]
        return written

    def _sizes(self, written: Float[Tensor, "batch writer pos d_model"], chunk: slice) -> Float[Tensor, "batch writer pos"]:
        """Squared lengths of what every writer writes in both runs and of their difference, which rounding is a share of.

        Of a head they are taken at z, with the gain that the difference has from there to the residual stream.
        """
        change = written.square().sum(-1)
        shares = torch.zeros_like(change)
        for (kind, layer), difference in self.differences.items():
            own = self.runs.baseline.activations[kind, layer][chunk, -self.span :].to(difference.dtype)
            moved = difference[chunk].square().sum(-1)
            lengths = (own.square() + (own + difference[chunk]).square()).sum(-1)
            share = torch.where(moved > 0, lengths / torch.where(moved > 0, moved, 1.0), 0.0)
            where = self.graph.writer_slice(layer)
            if kind == "z":
                shares[:, where.start : where.start + self.graph.n_heads] = share.transpose(1, 2)
            else:
                shares[:, where.stop - 1] = share
        return change * (1 + shares)

    def _readers(self, point: Result, chunk: slice) -> Iterator[tuple[slice, int, Tensor]]:
        """Readers, the number of writers before them, and their coefficients ``[batch, pos, reader, d_model]`` (or with dest first)."""
        heads, arch = self.graph.n_heads, self.setting.model.arch
        letters = [letter for letter in "qkv" if letter not in self.composite.not_scored]
        for layer, part in enumerate(self.parts):
            first, before = self.graph.reader_slice(layer).start, self.graph.writer_slice(layer).start
            found = {letter: self._head_readers(part, letter, point.gradients[letter, layer], point, chunk) for letter in letters}
            if "dest" not in self.axes:  # one product for all
                yield slice(first + 3 * heads - len(letters) * heads, first + 3 * heads), before, torch.cat(list(found.values()), 2)
            for i, letter in enumerate("qkv"):
                if "dest" in self.axes and letter in found:
                    yield slice(first + i * heads, first + (i + 1) * heads), before, found[letter]
            if self.graph.mlps:
                gradient = point.hook_gradients[f"blocks.{layer}.mlp.hook_in"][chunk, -self.span :].unsqueeze(2)
                earlier = before if self.graph.parallel else before + heads
                yield slice(first + 3 * heads, first + 3 * heads + 1), earlier, self._through(part.mlp, point, chunk, gradient)
        final = point.gradients["resid_post", arch.n_layers - 1][chunk, -self.span :].unsqueeze(2)
        yield self.graph.reader_slice(None), len(self.graph.writers), final

    def _head_readers(self, part: Layer, letter: str, gradient: Tensor, point: Result, chunk: slice) -> Tensor:
        split = gradient.ndim == 5
        gradient = gradient[chunk, -self.span :, -self.span :] if split else gradient[chunk, -self.span :]
        stream = torch.einsum("...hk,hdk->...hd", gradient, part.read[letter][0].to(gradient.dtype))
        back = [self._through(part.before, point, chunk, one) for one in (stream.unbind(1) if split else [stream])]
        return torch.stack(back, 1) if split else back[0]

    def _contract(self, into: Tensor, written: Tensor, coefficients: Tensor) -> None:
        coefficients = coefficients.to(written.dtype)
        if not self.axes:
            into.copy_(written.flatten(2) @ coefficients.transpose(1, 2).flatten(2).mT)
            return
        by_pos = written.transpose(1, 2)
        start = into.shape[-1] - self.span
        if coefficients.ndim == 5:
            for dest in range(self.span):
                into[:, :, :, start + dest, start:] = (by_pos @ coefficients[:, dest].mT).movedim(1, -1)
            return
        found = (by_pos @ coefficients.mT).movedim(1, -1)
        if self.axes == ("pos",):
            into[..., start:] = found
        else:
            into[..., start:, start:] = torch.diag_embed(found)

    def _through(self, place: NormPlace | None, point: Result, chunk: slice, gradient: Tensor) -> Tensor:
        if place is None:
            return gradient
        return norm_vjp(self.composite.norm, place, *self._norm_inputs(point, place, chunk), gradient)

    def _norm_inputs(self, point: Result, place: NormPlace, chunk: slice) -> tuple[Tensor, Tensor]:
        x, scale = (point.hooks[name][chunk, -self.span :] for name in place.reads)
        return x, scale

    def _add_nodes(self, point: Result, weight: float, rows: slice) -> None:
        found = torch.zeros_like(self.nodes)
        for (kind, layer), difference in self.differences.items():
            product = difference * point.gradients[kind, layer][:, -self.span :].to(difference.dtype)
            where = self.graph.writer_slice(layer)
            if kind == "z":
                found[:, where.start : where.start + self.graph.n_heads] = product.sum((1, 3))
            else:
                found[:, where.stop - 1] = product.sum((1, 2))
        self.nodes[:, rows] += weight * found[:, rows]


def _writer_bytes(setting: Setting, rows: int, length: int) -> int:
    arch = setting.model.arch
    return rows * length * len(arch.graph.writers) * arch.d_model * max(4, itemsize(setting))


def _chunk_bytes(setting: Setting) -> int | float:
    return CHUNK_BYTES if setting.max_memory is None else min(CHUNK_BYTES, setting.max_memory / 4)


def check_sums(setting: Setting, off: float, scale: float) -> None:
    """Hold the sums of the writers' edges against their node scores.

    Raises:
        MethodError: they do not add up, so the model is not what the graph says.
    """
    allowed = {torch.float64: 1e-5, torch.float32: 1e-3}.get(setting.model.dtype, 0.2)
    if off > allowed * scale:
        raise MethodError(
            f"the edges of {setting.model.name} do not add up: the sum of a writer's edges differs from its node score by {off:.2g}, and the largest "
            f"node score is {scale:.2g}. This architecture has a path that the graph lacks; score nodes instead (sites z, mlp_out)."
        )
