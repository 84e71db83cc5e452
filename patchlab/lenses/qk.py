"""QK attribution: which components, at the position that looks and at the one that is looked at, make an attention score."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import NormPlace
from patchlab.engine import Program, Target, run
from patchlab.engine.contributions import Layer, layers_of
from patchlab.engine.jacobians import score_forms
from patchlab.errors import LensError, SiteError
from patchlab.lenses.rows import RowBatch, rows_of
from patchlab.lenses.stream import allowed
from patchlab.models import Model
from patchlab.sites import Site
from patchlab.tasks.task import Task


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """An attention score as a sum over pairs of components.

    Attributes:
        site: the head and both positions, ``L5.H1.pattern@END<S1``.
        subject: model and prompts.
        data: ``pairs`` ``[example, query, key]``: what a component at the query's position and one at the key's make; ``score`` ``[example]``
            and ``rest`` ``[example]``, what does not come from queries and keys (the position bias of ALiBi). ``pairs`` and ``rest`` add up to
            ``score``, in the unit of the softmax's input, before any soft cap. Both axes are components: ``input``, ``positions``, heads, MLPs
            and ``bias``.
        capped: whether the model caps its scores.
    """

    site: str
    subject: str
    data: xr.Dataset
    capped: bool

    def table(self, n: int | None = 10) -> pd.DataFrame:
        """The n pairs with the largest mean (None: all)."""
        mean = self.data["pairs"].mean("example").to_numpy()
        order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:n]
        query, key = np.unravel_index(order, mean.shape)
        names = self.data["query"].to_numpy()
        return pd.DataFrame({"query": names[query], "key": names[key], "score": mean[query, key]})

    def show(self, n: int | None = 10) -> None:
        """Write :meth:`table` to standard output."""
        sys.stdout.write(self.table(n).to_string(index=False, float_format=lambda value: f"{value:+.3f}") + "\n")

    def __repr__(self) -> str:
        cap = ", before its soft cap" if self.capped else ""
        mean = float(self.data["score"].mean())
        return f"QKAttribution({self.site}, {self.subject}) {self.data.sizes['query']} components; mean score {mean:.3g}{cap}"


def qk_attribution(model: Model, task: Task, site: str | Site, *, side: str = "clean") -> QKAttribution:
    """The score of one head between two positions, taken apart exactly into pairs of components.

    Queries and keys are linear in what earlier components wrote into the stream at their position, when the denominator of the norm before the
    attention is held at its value (and those of norms of queries and keys); the score is bilinear in queries and keys, rotations of positions
    included. So it is a sum over pairs: one component at the position that looks, one at the position that is looked at.

    Args:
        model: the model.
        task: its prompts.
        site: head and both positions, such as ``L5.H1.pattern@END<S1``; positions are names or numbers.
        side: ``clean`` or ``corrupted``.

    Raises:
        SiteError: no head or not one position each, one that is not attended to, or scores that are not bilinear in queries and keys.
        LensError: a stream that is not the sum of what its blocks write.
        InterventionError: inside ``pl.intervene``.

    Example:
        >>> pl.lenses.qk_attribution(model, task, "L5.H1.pattern@END<S1").show()  # doctest: +SKIP
    """
    wanted = Site.parse(site)
    model.arch.check(wanted)
    layer, head, pos, src = wanted.layer, wanted.index, wanted.pos, wanted.src
    if wanted.kind != "pattern" or layer is None or head is None or pos is None or src is None or len(pos) != 1 or len(src) != 1:
        raise SiteError(f"a score is of one head between two positions, written L5.H1.pattern@END<S1; got {wanted}.")
    blocks = layers_of(model)
    rows = rows_of(model, task, side=side)
    found: dict[int, tuple[np.ndarray, float, float]] = {}
    names: tuple[str, ...] = ()
    for batch in rows.batches:
        dest, source = _at(task, batch, pos[0]), _at(task, batch, src[0])
        form, score, query, key = score_forms(model, batch.tokens, layer, head, dest, source)
        names, parts = _written(model, batch, blocks, layer, torch.stack([dest, source], 1))
        queries = _read(model, blocks[layer], layer, head, "q", parts[0], dest, batch, query)
        keys = _read(model, blocks[layer], layer, head, "k", parts[1], source, batch, key)
        pairs = torch.einsum("rqi,rij,rkj->rqk", queries.double(), form.double(), keys.double())
        whole = torch.einsum("ri,rij,rj->r", query.double(), form.double(), key.double())
        _check(model, site, pairs, whole)
        for row, example in enumerate(batch.examples.tolist()):
            found[example] = pairs[row].cpu().numpy(), float(score[row]), float(score[row] - pairs[row].sum())
    order = sorted(found)
    data = xr.Dataset(
        {
            "pairs": (("example", "query", "key"), np.stack([found[example][0] for example in order])),
            "score": (("example",), np.array([found[example][1] for example in order])),
            "rest": (("example",), np.array([found[example][2] for example in order])),
        },
        coords={"query": [*names, "bias"], "key": [*names, "bias"]},
    )
    capped = any(place.name == f"blocks.{layer}.attn.softcap" for place in model.arch.places)
    return QKAttribution(str(wanted), rows.subject if side == "clean" else f"{rows.subject}, {side}", data, capped)


def _at(task: Task, batch: RowBatch, position: int | str) -> Int[Tensor, " row"]:
    """The token position of each row that a name or number stands for.

    Raises:
        SiteError: a position that not all prompts have.
    """
    found: list[int] = []
    for example in batch.examples.tolist():
        pair = task.pairs[example]
        where = pair.positions.get(position) if isinstance(position, str) else position
        if where is None or not -len(pair) <= where < len(pair):
            raise SiteError(f"pair {example} of {task.name} has no position {position!r}; all have {', '.join(task.position_names())}, and numbers.")
        found.append(where % len(pair))
    return torch.tensor(found, device=batch.tokens.device)


def _written(
    model: Model, batch: RowBatch, blocks: list[Layer], layer: int, at: Int[Tensor, "row end"]
) -> tuple[tuple[str, ...], list[Float[Tensor, "row component d_model"]]]:
    """What every component before a layer wrote at the two positions of each row.

    Raises:
        LensError: a stream that is not the sum of what its blocks write.
    """
    absent = model.arch.absent
    kinds = [kind for kind in ("z", "mlp_out") if kind not in absent]
    layered: tuple[Target, ...] = tuple((kind, i) for kind in kinds for i in range(layer))
    ends: tuple[Target, ...] = (("resid_pre", 0), ("resid_pre", layer), *([] if "input" in absent else [("input", None)]))
    with torch.no_grad():
        kept = run(model, Program(batch.tokens, batch.examples, positions=batch.positions, keep=(*layered, *ends))).activations
    rows = torch.arange(len(batch), device=batch.tokens.device)
    parts: list[Float[Tensor, "row component d_model"]] = []
    names: list[str] = []
    for end in range(2):
        own = {target: value[rows, at[:, end]] for target, value in kept.items()}
        names, columns = _before(model, own)
        biases = torch.zeros_like(columns[0])
        for i in range(layer):
            shares, rest = blocks[i].shares(own["z", i][None, :, None])
            names += [f"a{i}.h{head}" for head in range(shares.shape[1])]
            columns += list(shares[0, :, :, 0])
            biases = biases + (rest[0, :, 0] if isinstance(rest, Tensor) and rest.ndim > 1 else rest)
            if "mlp_out" not in absent:
                names.append(f"m{i}")
                columns.append(own["mlp_out", i])
        if bool(torch.any(biases)):
            names.append("attention biases")
            columns.append(biases)
        whole = torch.stack([column.to(torch.promote_types(column.dtype, torch.float32)) for column in columns], 1)
        stream = own["resid_pre", layer].to(whole.dtype)
        off = float((whole.sum(1) - stream).abs().max() / stream.abs().max().clamp_min(1e-30))
        if off > allowed(model):
            raise LensError(f"what the blocks of {model.name} write does not add up to its stream before layer {layer} (off by {off:.2g}).")
        parts.append(whole)
    return tuple(names), parts


def _before(model: Model, own: dict[Target, Tensor]) -> tuple[list[str], list[Tensor]]:
    """The stream before the first block: token embedding and learned positions, or both as one where it is not their sum."""
    first, token = own["resid_pre", 0], own.get(("input", None))
    if token is None or token.shape != first.shape:
        return ["embedding"], [first]
    if not bool((first - token).any()):
        return ["input"], [token]
    return (["input", "positions"], [token, first - token]) if hasattr(model.bridge, "pos_embed") else (["embedding"], [first])


def _read(
    model: Model,
    block: Layer,
    layer: int,
    head: int,
    letter: str,
    parts: Float[Tensor, "row component d_model"],
    at: Int[Tensor, " row"],
    batch: RowBatch,
    whole: Float[Tensor, "row d_head"],
) -> Float[Tensor, "row component_and_bias d_head"]:
    """What a head's query or key is made of, by component, with the norm's denominator held; the last one is the bias.

    Raises:
        LensError: they do not add up to the query or key.
    """
    weight, bias = block.read[letter]
    weight = weight[head].to(parts.dtype)
    fixed: Any = 0.0 if bias is None else bias[head].to(parts.dtype)
    if block.before is not None:
        parts, shift = _normed(model, block.before, parts, at, batch)
        fixed = fixed if shift is None else fixed + shift.to(parts.dtype) @ weight
    made = parts @ weight
    made = torch.cat([made, torch.zeros_like(made[:, :1]) + fixed], 1)
    off = float((made.sum(1) - whole.to(made.dtype)).abs().max() / whole.abs().max().clamp_min(1e-30))
    if off > allowed(model):
        raise LensError(
            f"parts of the {'queries' if letter == 'q' else 'keys'} of layer {layer} of {model.name} do not add up to them (off by {off:.2g})."
        )
    return made


def _normed(
    model: Model, place: NormPlace, parts: Float[Tensor, "row component d_model"], at: Int[Tensor, " row"], batch: RowBatch
) -> tuple[Float[Tensor, "row component d_model"], Float[Tensor, " d_model"] | None]:
    """Parts through a norm whose denominator is this run's, and its bias."""
    scale_hook = place.reads[1]
    with torch.no_grad():
        seen = run(model, Program(batch.tokens, batch.examples, positions=batch.positions, hooks=(scale_hook,))).hooks[scale_hook]
    scale = seen[torch.arange(len(batch), device=at.device), at][:, None].to(parts.dtype)
    parts = (parts - parts.mean(-1, keepdim=True) if place.centred else parts) / scale
    parts = parts if place.weight is None else parts * place.weight.to(parts.dtype)
    return parts, getattr(place.module.original_component, "bias", None)


def _check(model: Model, site: str | Site, pairs: Float[Tensor, "row query key"], whole: Float[Tensor, " row"]) -> None:
    off = float(((pairs.sum((1, 2)) - whole).abs() / pairs.abs().sum((1, 2)).clamp_min(1e-30)).max())
    if off > allowed(model):
        raise LensError(f"the pairs of {site} do not add up to what queries and keys make of the score on {model.name} (off by {off:.2g}).")
