"""How an attribution graph is made: one run with everything but the residual stream held, and its reverse map, a row per target.

Gradients run along the residual stream and through the values of attention. Attention patterns and the denominators of norms are held by
the LN- and AH-rules; the output of every MLP is a constant, so that features, decoder biases and errors stand in for it; only a skip
transcoder passes a gradient, through its skip. This map is affine, so edges are exact: ``A[t, s] = e_t · J · (a_s d_s)`` with the target's
encoder row, the Jacobian of that map and the source's decoder row times its activation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from patchlab.adapters import NormPlace
from patchlab.adapters.weights import fetched
from patchlab.engine.pullback import Pullback, pullback
from patchlab.engine.trust.conservation import check_rules
from patchlab.errors import MethodError, RuleError
from patchlab.features.attribution.graph import AttributionGraph
from patchlab.features.attribution.nodes import Nodes
from patchlab.features.dictionary import Dictionary
from patchlab.host import precise, to_array
from patchlab.models import Model
from patchlab.rules import get_composite
from patchlab.rules.attachments import Attachment, Recorded
from patchlab.rules.rule import graft

_RULES = "cp-lrp"
"""LN and AH, with clamps and gates on what attention gives held too; its rules for MLPs are behind the stop."""
_BATCH_BYTES = 2**28
READS = {"mlp_in": "mlp.hook_in", "ln2.hook_normalized": "mlp.hook_in", "resid_mid": "hook_resid_mid", "resid_pre": "hook_resid_pre"}
"""What a transcoder can read, and the hook from which it is known."""


def attribution_graph(
    model: Model,
    prompt: str | Sequence[Any] | Int[Tensor, "*pos"],
    transcoders: Sequence[Dictionary],
    *,
    max_logits: int = 10,
    cumulative: float = 0.95,
    logits: Sequence[int] | None = None,
    max_features: int = 7500,
    round_size: int = 2048,
    skip_first: int = 0,
    max_memory: int | None = None,
) -> AttributionGraph:
    """The attribution graph of a prompt: what tokens, transcoder features and errors give to features and to the last position's logits.

    Source: circuit-tracer's graph (Ameisen et al. 2025, "Circuit tracing"; Hanna et al. 2025). Targets at the logits are
    ``logit − mean logit`` before any soft cap or scale of the logits. A layer without a transcoder has its whole MLP as an error.

    Args:
        model: with sequential or parallel blocks.
        prompt: a text, or token ids.
        transcoders: per-layer transcoders (with or without skip), or cross-layer ones; at most one for a layer.
        max_logits: the most logits that are targets,
        cumulative: and the share of probability at which there are enough of them, most probable first.
        logits: token ids that are targets instead.
        max_features: the most features in the graph, chosen by their influence on the logits.
        round_size: features whose edges are found between two rankings by influence.
        skip_first: at so many first positions no feature is used, and the errors hold all that the MLPs give (circuit-tracer leaves out
            position 0).
        max_memory: bytes for the edges and for the gradients of a batch of targets.

    Raises:
        MethodError: dictionaries that are no transcoders of this model or that are not affine in what they read; options that make no sense;
            too little memory.
        RuleError: a module outside of the MLPs that cannot be held.
        InterventionError: inside ``intervene``.
    """
    _check(max_logits=max_logits, max_features=max_features, round_size=round_size)
    if not 0 < cumulative <= 1:
        raise MethodError(f"cumulative is a share of probability, above 0 and at most 1; got {cumulative}.")
    tokens = _tokens(model, prompt)
    if not 0 <= skip_first <= tokens.shape[1]:
        raise MethodError(f"skip_first is {skip_first}, and the prompt has {tokens.shape[1]} tokens.")
    held = _Held.of(model, tokens, transcoders, skip_first)
    ids, probabilities = _targets(held.run.logits[0, -1], max_logits, cumulative, logits)
    rows = _Rows(held, ids, probabilities, min(max_features, len(held.features)), round_size, max_memory)
    rows.fill()
    text = partial(_text, model)
    strings = tuple(map(text, tokens[0].tolist()))
    record = {
        "model": model.name,
        "prompt": prompt if isinstance(prompt, str) else _text(model, *tokens[0].tolist()),
        "transcoders": [transcoder.name for transcoder in transcoders],
        "kinds": sorted({transcoder.kind for transcoder in transcoders}),
        "logit_tokens": [(i, text(i)) for i in ids],
        "settings": {"max_logits": max_logits, "cumulative": cumulative, "max_features": max_features, "skip_first": skip_first},
        "active_features": len(held.features),
    }
    return AttributionGraph(*rows.result(), tuple(tokens[0].tolist()), strings, model.arch.n_layers, provenance=record)


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise MethodError(f"{name} is {number}; give at least 1.")


def _tokens(model: Model, prompt: str | Sequence[Any] | Int[Tensor, "*pos"]) -> Int[Tensor, "row pos"]:
    given = prompt if isinstance(prompt, str) else torch.as_tensor(prompt, dtype=torch.long)
    if isinstance(given, Tensor) and (given.ndim != 1 or not len(given)):
        raise MethodError(f"a graph is of one prompt: a text, or its token ids in one row; got shape {list(given.shape)}.")
    return model.as_tokens(given)


def _text(model: Model, *tokens: int) -> str:
    return " ".join(f"#{token}" for token in tokens) if model.tokenizer is None else str(model.tokenizer.decode(list(tokens)))


def _targets(
    logits: Float[Tensor, " vocab"], max_logits: int, cumulative: float, chosen: Sequence[int] | None
) -> tuple[list[int], Float[np.ndarray, " logit"]]:
    """The tokens whose logits are targets, and their probabilities."""
    probabilities = precise(logits).softmax(-1)
    if chosen is None:
        top = probabilities.topk(min(max_logits, len(probabilities)))
        enough = int((top.values.cumsum(0) < cumulative).sum()) + 1
        chosen = top.indices[:enough].tolist()
    elif not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < len(probabilities) for i in chosen):
        raise MethodError(f"logits are different token ids from 0 to {len(probabilities) - 1}, at least one; got {list(chosen)}.")
    return list(chosen), probabilities[list(chosen)].cpu().numpy()


@dataclass(frozen=True, eq=False)
class _Transcoder:
    """A transcoder in its place: it reads ``(value − shift) / divisor`` of the value at a hook."""

    dictionary: Dictionary
    layer: int
    hook: str
    shift: Float[Tensor, " d_in"] | None = None
    divisor: Float[Tensor, " d_in"] | None = None

    def read(self, value: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """What it reads."""
        value = value if self.shift is None else value - self.shift
        return value if self.divisor is None else value / self.divisor

    def encoder_rows(self, features: Int[Tensor, " some"]) -> Float[Tensor, "some d_in"]:
        """The gradient of features' pre-activations at the hook."""
        rows = self.dictionary.w_enc[:, features].T
        return rows if self.divisor is None else rows / self.divisor

    def decoders(self, stop: int) -> Iterator[tuple[int, Float[Tensor, "feature d_model"]]]:
        """The layers below ``stop`` that it writes to, with its decoders."""
        weight = self.dictionary.w_dec
        if weight.ndim == 2:
            yield self.layer, weight
        else:
            yield from ((to, weight[:, to - self.layer]) for to in range(self.layer, stop))

    def skipped(self, value: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"] | None:
        """What its skip makes of the value at the hook; None where it has none."""
        return None if self.dictionary.w_skip is None else self.read(value) @ self.dictionary.w_skip


@dataclass(frozen=True, eq=False)
class _Held:
    """The run, and what the transcoders make of it."""

    model: Model
    tokens: Int[Tensor, "row pos"]
    run: Pullback
    transcoders: dict[int, _Transcoder]
    features: Int[Tensor, "feature 3"]
    """Layer, position and number of every active feature, in this order."""
    activations: Float[Tensor, " feature"]
    pre: Float[Tensor, " feature"]
    errors: dict[int, Float[Tensor, "pos d_model"]]

    @staticmethod
    def of(model: Model, tokens: Int[Tensor, "row pos"], given: Sequence[Dictionary], skip_first: int) -> "_Held":
        transcoders = _by_layer(model, given)
        n_layers = model.arch.n_layers
        attachments = [*_held_places(model), *(_mlp(layer, transcoders.get(layer)) for layer in range(n_layers))]
        hooks = ["hook_embed", "unembed.hook_in", *map(_out, range(n_layers)), *(one.hook for one in transcoders.values())]
        learned = "pos_embed.hook_out" in model.hooks
        run = pullback(model, tokens, attachments, [*hooks, *["pos_embed.hook_out"] * learned])
        features: list[Tensor] = []
        activations: list[Tensor] = []
        pre: list[Tensor] = []
        errors = {layer: run.values[_out(layer)][0].clone() for layer in range(n_layers)}
        for layer, one in transcoders.items():
            value = run.values[one.hook][0]
            before = one.dictionary.pre(one.read(value))
            found = one.dictionary.activation(before)
            found[:skip_first] = 0
            where = found.nonzero()
            features.append(torch.cat([torch.full_like(where[:, :1], layer), where], 1))
            activations.append(found[tuple(where.T)])
            pre.append(before[tuple(where.T)])
            for to, decoder in one.decoders(n_layers):
                errors[to] -= found @ decoder
            errors[layer][skip_first:] -= one.dictionary.b_dec
            if (skipped := one.skipped(value)) is not None:
                errors[layer] -= skipped
        empty = tokens.new_zeros(0, 3)
        blank = errors[0].new_zeros(0) if errors else torch.zeros(0)
        return _Held(
            model, tokens, run, transcoders, torch.cat([empty, *features]), torch.cat([blank, *activations]), torch.cat([blank, *pre]), errors
        )

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.run.logits.shape[1]

    @cached_property
    def places(self) -> dict[tuple[int, int], slice]:
        """Where the features of a layer and position stand."""
        keys = (self.features[:, 0] * self.length + self.features[:, 1]).cpu()
        found, counts = torch.unique_consecutive(keys, return_counts=True)
        stops = counts.cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        return {divmod(key, self.length): slice(a, b) for key, a, b in zip(found.tolist(), starts, stops, strict=True)}

    @cached_property
    def columns(self) -> int:
        """Features, errors and tokens."""
        return len(self.features) + (self.model.arch.n_layers + 1) * self.length

    def row(self, at: str, layer: int, cotangents: Float[Tensor, "n pos d"]) -> tuple[Float[Tensor, "n column"], Float[Tensor, " n"]]:
        """What every source gives to targets at a hook of a layer, and what the positional embedding does."""
        n_layers, learned = self.model.arch.n_layers, "pos_embed.hook_out" in self.run.values
        before = [_out(i) for i in range(min(layer, n_layers))]
        found = self.run(at, cotangents[:, None], [*before, "hook_embed", *["pos_embed.hook_out"] * learned])
        back = {name: gradient[:, 0] for name, gradient in found.items()}
        row = cotangents.new_zeros(len(cotangents), self.columns)
        for (own, pos), part in self.places.items():
            if own >= layer:
                break
            one, numbers = self.transcoders[own], self.features[part, 2]
            for to, decoder in one.decoders(len(before)):
                row[:, part] += back[_out(to)][:, pos] @ decoder[numbers].T
            row[:, part] *= self.activations[part]
        start = len(self.features)
        for i in range(n_layers):
            if i < len(before):
                row[:, start : start + self.length] = (back[_out(i)] * self.errors[i]).sum(-1)
            start += self.length
        row[:, start:] = (back["hook_embed"] * self.run.values["hook_embed"][0]).sum(-1)
        positional = (back["pos_embed.hook_out"] * self.run.values["pos_embed.hook_out"][0]).sum((1, 2)) if learned else row.new_zeros(len(row))
        return row, positional


def _out(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


def _by_layer(model: Model, given: Sequence[Dictionary]) -> dict[int, _Transcoder]:
    """The transcoders by layer, as this model has them.

    Raises:
        MethodError: none, two for a layer, or one that is of another kind or shape.
    """
    arch, found = model.arch, dict[int, _Transcoder]()
    if not given:
        raise MethodError("an attribution graph needs transcoders; got none. Load some with pl.load_dictionaries(folder, model, kind='transcoder').")
    for one in given:
        problem = None
        if one.kind not in ("transcoder", "cross_layer_transcoder"):
            problem = "it stands in for no MLP: give transcoders (kind 'transcoder' or 'cross_layer_transcoder')"
        elif one.layer is None or not 0 <= one.layer < arch.n_layers:
            problem = f"the model has the layers 0 to {arch.n_layers - 1}"
        elif one.layer in found:
            problem = f"{found[one.layer].dictionary.name} is of the same layer, and a layer has one"
        elif one.writes != "mlp_out":
            problem = "a graph needs what it gives to be mlp_out"
        elif one.reads not in READS or f"blocks.{one.layer}.{READS[one.reads]}" not in model.hooks:
            problem = f"a graph needs it to read one of {', '.join(READS)}"
        elif (one.d_in, one.d_out) != (arch.d_model, arch.d_model):
            problem = f"the model is {arch.d_model} wide"
        elif one.kind == "cross_layer_transcoder" and one.w_dec.shape[1] != arch.n_layers - one.layer:
            problem = f"it must write to each of the {arch.n_layers - one.layer} layers from its own on, and writes to {one.w_dec.shape[1]}"
        elif one.normalise.per_row:
            problem = f"its {type(one.normalise).__name__} of each row is not linear in what it reads"
        if problem is not None:
            raise MethodError(
                f"{one.name} ({one.kind}, layer {one.layer}, {one.reads} → {one.writes}, {one.d_in} → {one.d_out}) fits no graph: {problem}."
            )
        found[int(one.layer)] = _placed(model, one, int(one.layer))  # type: ignore[arg-type]
    return dict(sorted(found.items()))


def _placed(model: Model, dictionary: Dictionary, layer: int) -> _Transcoder:
    """A transcoder in its place. What lies before a norm's weight and bias is known from what comes after them.

    Raises:
        MethodError: the norm has a weight of zero.
    """
    moved, hook = dictionary.to(model.device, model.dtype), f"blocks.{layer}.{READS[dictionary.reads]}"
    norm = next((place for place in model.arch.places if isinstance(place, NormPlace) and place.name == f"blocks.{layer}.ln2"), None)
    if dictionary.reads != "ln2.hook_normalized" or norm is None:
        return _Transcoder(moved, layer, hook)
    weight = norm.weight
    if weight is not None and not bool(weight.all()):
        raise MethodError(f"{dictionary.name} reads before the weight of {norm.name}, which is zero in {int((weight == 0).sum())} channels.")
    return _Transcoder(moved, layer, hook, norm.bias, weight)


def _held_places(model: Model) -> tuple[Attachment, ...]:
    """Rules on everything that is not linear outside of the MLPs; what is in the MLPs lies behind the stop.

    Raises:
        RuleError: a module that cannot be held.
    """
    composite = get_composite(_RULES)
    try:
        check_rules(model, composite)
    except RuleError as error:
        raise RuleError(f"no attribution graph of {model.name}: what is not linear outside of its MLPs must be held. {error}") from error
    return composite.attach(model.arch.places)


def _mlp(layer: int, transcoder: _Transcoder | None) -> Attachment:
    """The MLP's output as a constant, or with the gradient of a skip alone."""
    if transcoder is None or transcoder.dictionary.w_skip is None:
        return Attachment(_out(layer), (), _stopped)
    return Attachment(_out(layer), (transcoder.hook,), partial(_skipped, transcoder))


def _stopped(value: Tensor, seen: Recorded) -> Tensor:
    return value.detach()


def _skipped(transcoder: _Transcoder, value: Tensor, seen: Recorded) -> Tensor:
    surrogate = transcoder.skipped(seen[transcoder.hook])
    return value.detach() if surrogate is None else graft(value, surrogate)


class _Rows:
    """The rows of the graph as they are found: the logits first, then features, the most influential first."""

    def __init__(self, held: _Held, ids: list[int], probabilities: np.ndarray, n: int, round_size: int, max_memory: int | None) -> None:
        self.held, self.ids, self.probabilities, self.round_size = held, ids, probabilities, round_size
        self.n_logits = len(ids)
        model = held.model
        size = torch.finfo(model.dtype).bits // 8
        needed = (self.n_logits + n) * held.columns * size
        each = 3 * size * held.length * model.arch.d_model * (model.arch.n_layers + 2) + 2 * size * held.columns
        budget = _BATCH_BYTES if max_memory is None else max_memory - needed
        if budget < each:
            raise MethodError(
                f"the edges of {n:,} features into {held.columns:,} nodes take {needed / 1e9:.2f} GB and one row of gradients {each / 1e6:.0f} MB, "
                f"and max_memory allows {(max_memory or 0) / 1e9:.2f} GB. Give fewer max_features, a shorter prompt or more memory."
            )
        self.batch = max(1, min(512, int(budget // each)))
        self.rows = held.activations.new_zeros(self.n_logits + n, held.columns)
        self.positional = self.rows.new_zeros(len(self.rows))
        self.values = self.rows.new_zeros(len(self.rows))
        self.order: list[int] = []

    def fill(self) -> None:
        """Find the rows of the logits, then rank the features by their influence and find those of the next ones, until there are enough."""
        self._logits()
        wanted, n = len(self.rows) - self.n_logits, len(self.held.features)
        while len(self.order) < wanted:
            if wanted == n:
                chosen = list(range(n))
            else:
                influence = self._influence()[:n]
                influence[self.order] = -1.0
                chosen = influence.argsort(descending=True, stable=True)[: min(self.round_size, wanted - len(self.order))].sort().values.tolist()
            self._features(chosen)

    def _logits(self) -> None:
        unembed: Any = self.held.model.bridge.unembed.original_component
        weight: Any = fetched(unembed, "weight")
        bias, x = fetched(unembed, "bias"), self.held.run.values["unembed.hook_in"][0]
        vectors = weight[self.ids] - weight.mean(0)
        for start in range(0, self.n_logits, self.batch):
            some = vectors[start : start + self.batch]
            cotangents = x.new_zeros(len(some), *x.shape)
            cotangents[:, -1] = some
            self._put(slice(start, start + len(some)), "unembed.hook_in", self.held.model.arch.n_layers, cotangents)
        self.values[: self.n_logits] = vectors @ x[-1] + (0.0 if bias is None else bias[self.ids] - bias.mean())

    def _features(self, chosen: list[int]) -> None:
        held, start = self.held, self.n_logits + len(self.order)
        where = held.features[chosen]
        for layer, one in held.transcoders.items():
            own = (where[:, 0] == layer).nonzero()[:, 0]
            for part in own.split(self.batch) if len(own) else ():
                pos, number = where[part, 1], where[part, 2]
                cotangents = held.activations.new_zeros(len(part), held.length, one.dictionary.d_in)
                cotangents[torch.arange(len(part)), pos] = one.encoder_rows(number)
                self._put(start + part, one.hook, layer, cotangents)
        self.values[start : start + len(chosen)] = held.pre[chosen]
        self.order += chosen

    def _put(self, where: slice | Tensor, at: str, layer: int, cotangents: Float[Tensor, "n pos d"]) -> None:
        self.rows[where], self.positional[where] = self.held.row(at, layer, cotangents)

    def _influence(self) -> Float[Tensor, " column"]:
        """Influence of every column on the logits over the rows that are there."""
        there = self.n_logits + len(self.order)
        size = self.rows[:there].abs().sum(1).clamp_min(1e-10)
        about = torch.tensor(self.order, dtype=torch.long, device=self.rows.device)
        shares = self.rows.new_zeros(there)
        shares[: self.n_logits] = torch.as_tensor(self.probabilities).to(shares)
        total = self.rows.new_zeros(self.held.columns)
        while bool(shares.any()):
            found = torch.zeros_like(total)
            for start in range(0, there, 256):
                part = slice(start, min(start + 256, there))
                found += (shares[part] / size[part]) @ self.rows[part].abs()
            total += found
            shares = torch.cat([shares.new_zeros(self.n_logits), found[about]])
        return total

    def result(self) -> tuple[Nodes, sparse.csr_array]:
        """The table of nodes and the edges among them."""
        held, n_layers, n = self.held, self.held.model.arch.n_layers, len(self.held.features)
        order = np.argsort(self.order, kind="stable")
        kept = np.array(self.order, dtype=int)[order]
        rows = np.concatenate([self.n_logits + order, np.arange(self.n_logits)]).astype(int)
        columns = np.concatenate([kept, np.arange(n, held.columns)]).astype(int)
        left_out = np.setdiff1d(np.arange(n), kept)
        sums = to_array(precise(self.rows).sum(1))
        gone = to_array(precise(self.rows[:, left_out]).sum(1))
        value, positional = to_array(self.values), to_array(self.positional)
        length = held.length
        first, second = len(kept), n_layers * length
        count = first + second + length + self.n_logits
        features = held.features.cpu().numpy()[kept]
        grid = np.mgrid[:n_layers, :length].reshape(2, -1)
        ids = held.tokens[0].cpu().numpy()

        sizes = (first, second, length, self.n_logits)

        def column(*parts: Any) -> np.ndarray:
            return np.concatenate([np.broadcast_to(np.asarray(part), (size,)) for part, size in zip(parts, sizes, strict=True)])

        def of_targets(per_row: np.ndarray) -> np.ndarray:
            return column(per_row[rows[:first]], np.nan, np.nan, per_row[rows[first:]])

        nodes = Nodes(
            kind=column(0, 1, 2, 3),
            layer=column(features[:, 0], grid[0], -1, n_layers),
            pos=column(features[:, 1], grid[1], np.arange(length), length - 1),
            unit=column(features[:, 2], -1, ids, self.ids),
            activation=column(to_array(held.activations)[kept], np.nan, np.nan, np.nan),
            probability=column(0.0, 0.0, 0.0, self.probabilities),
            value=of_targets(value),
            constant=of_targets(value - sums),
            positional=of_targets(positional),
            left_out=of_targets(gone),
        )
        targets = [sparse.csr_array(self.rows[rows[i : i + 256]][:, columns].cpu().numpy()) for i in range(0, len(rows), 256)]
        edges = sparse.coo_array(sparse.vstack(targets))
        places = np.concatenate([np.arange(first), np.arange(count - self.n_logits, count)])
        return nodes, sparse.csr_array((edges.data, (places[edges.row], edges.col)), shape=(count, count))
