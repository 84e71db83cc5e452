"""Search for what activates features: the tokens and contexts of a corpus where they are most active."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.engine import Program, run
from patchlab.engine.program import row_numbers
from patchlab.engine.replay import unembed
from patchlab.errors import DictionaryError
from patchlab.features.contexts import Context, Examples, FeatureExamples, Weighted
from patchlab.features.dictionary import Dictionary
from patchlab.features.hooks import hook_of
from patchlab.models import Model
from patchlab.texts import Texts

_BUDGET = 2**24
"""Activations of features that are held at a time."""
_STREAM = ("input", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Site kinds of the residual stream, and of what is added to it: a direction there has an effect on the logits without any weights between."""


@torch.no_grad()
def examples(
    dictionary: Dictionary,
    texts: Texts,
    *,
    model: Model,
    features: Sequence[int] | None = None,
    n: int = 10,
    before: int = 10,
    after: int = 5,
    tokens: int = 8,
    layer: int | None = None,
    bos: bool = False,
) -> Examples:
    """The contexts that activate features most, how often they are active, and the tokens that their directions promote and suppress.

    The texts are run in batches, once to find the contexts and once more, as far as needed, to see what is around them; nothing of
    size tokens × features is kept. Where activations can be negative, the largest in absolute value count as most active.

    The effect on logits is that of the decoder direction alone, scaled as the final norm scales a direction, less the logits of none: what
    the feature does directly, and nothing of what later layers make of it. Dictionaries that write elsewhere than into the stream have none.

    Args:
        dictionary: of any kind.
        texts: token rows (:mod:`patchlab.texts`).
        model: the model that it belongs to.
        features: their numbers; default all that are active somewhere.
        n: contexts per feature, at most one of a row.
        before: tokens of the window before the most active one.
        after: tokens of the window behind it.
        tokens: how many promoted and suppressed tokens.
        layer: of a dictionary that reads every layer: only this one.
        bos: also look at bos tokens, whose activations are the same in every row.

    Raises:
        DictionaryError: features or a layer that are not there, a dictionary of another model.

    Example:
        >>> found = features.examples(dictionary, texts.sentences(model), model=model)  # doctest: +SKIP
        >>> found.save_html("examples.html")  # doctest: +SKIP
    """
    if n < 1 or before < 0 or after < 0 or tokens < 0:
        raise DictionaryError(
            f"examples need n of at least 1 and windows of at least 0 tokens; got n={n}, before={before}, after={after}, tokens={tokens}."
        )
    layers, chosen = _layers(dictionary, model, layer), _chosen(dictionary, features)
    source = _Source(dictionary, model, texts, layers, chosen, bos)
    best, acted, total, count = _best(source, n)
    kept = [slot for slot in range(len(chosen)) if features is not None or acted[slot] > 0]
    windows = _contexts(source, best, kept, before, after)
    found = _effects(dictionary, model, chosen[torch.tensor(kept, dtype=torch.long)], tokens)
    each = tuple(
        FeatureExamples(
            feature=int(chosen[slot]),
            address=_address(dictionary, int(chosen[slot])),
            density=float(acted[slot]) / max(1, count * len(layers)),
            mean=float(total[slot] / acted[slot]) if acted[slot] else float("nan"),
            contexts=tuple(windows[slot]),
            promoted=promoted,
            suppressed=suppressed,
        )
        for slot, (promoted, suppressed) in zip(kept, found, strict=True)
    )
    dead = int((acted == 0).sum())
    return Examples(dictionary.name, model.name, texts.name, count, dictionary.n_features, dead, each)


def _layers(dictionary: Dictionary, model: Model, layer: int | None) -> tuple[int, ...]:
    if dictionary.layer is not None:
        if layer not in (None, dictionary.layer):
            raise DictionaryError(f"{dictionary.name} reads layer {dictionary.layer}; got layer={layer}.")
        return (dictionary.layer,)
    if layer is not None and not 0 <= layer < model.arch.n_layers:
        raise DictionaryError(f"{model.name} has the layers 0 to {model.arch.n_layers - 1}; got layer={layer}.")
    return tuple(range(model.arch.n_layers)) if layer is None else (layer,)


def _chosen(dictionary: Dictionary, features: Sequence[int] | None) -> Int[Tensor, " slot"]:
    width = dictionary.n_features
    if features is None:
        return torch.arange(width)
    numbers = [int(feature) for feature in features]
    if not numbers or len(set(numbers)) != len(numbers) or not all(0 <= number < width for number in numbers):
        raise DictionaryError(f"features of {dictionary.name} are distinct numbers from 0 to {width - 1}, at least one; got {numbers[:8]}.")
    return torch.tensor(numbers)


def _address(dictionary: Dictionary, feature: int) -> str:
    return f"{'' if dictionary.layer is None else f'L{dictionary.layer}.'}F{feature}.{dictionary.writes}"


@dataclass(frozen=True, eq=False)
class _Source:
    """The features of texts, batch by batch. A *line* is a row at one layer: layer slot × rows + row."""

    dictionary: Dictionary
    model: Model
    texts: Texts
    layers: tuple[int, ...]
    chosen: Int[Tensor, " slot"]
    bos: bool

    def batches(self) -> Iterator[tuple[Int[np.ndarray, " row"], Int[Tensor, "row pos"]]]:
        """Row numbers and their tokens."""
        return self.texts.batches(max(1, _BUDGET // (self.dictionary.n_features * len(self.layers))))

    def lines(self, numbers: Int[np.ndarray, " row"]) -> Int[Tensor, " line"]:
        """The lines of rows, layer by layer."""
        rows = torch.from_numpy(numbers)
        return torch.cat([slot * len(self.texts) + rows for slot in range(len(self.layers))])

    def looked_at(self, ids: Int[Tensor, "row pos"]) -> Tensor:
        """Which tokens count [row, pos]."""
        counts = torch.ones_like(ids, dtype=torch.bool)
        if not self.bos and self.model.bos_id is not None:
            counts[:, 0] = ids[:, 0] != self.model.bos_id
        return counts

    def activations(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "line pos slot"]:
        """The chosen features of rows, with zeros where tokens do not count."""
        model, reads = self.model, self.dictionary.reads
        is_site, hooks = reads in model.arch.accessors, [hook_of(reads, layer) for layer in self.layers]
        keep = tuple((reads, layer) for layer in self.layers) if is_site else ()
        tokens = ids.to(model.device)
        result = run(model, Program(tokens, row_numbers(tokens), keep=keep, hooks=() if is_site else tuple(hooks)))
        values = [result.activations[key] for key in keep] if is_site else [result.hooks[hook] for hook in hooks]
        counts = self.looked_at(ids).to(self.dictionary.w_enc.device)
        parts = [self.dictionary.encode(value.to(counts.device))[..., self.chosen.to(counts.device)] * counts[..., None] for value in values]
        return torch.cat(parts).float().cpu()


@dataclass(frozen=True, eq=False)
class _Best:
    """The lines with the largest activations of each feature, and where in them."""

    size: Float[Tensor, "rank slot"]
    line: Int[Tensor, "rank slot"]
    position: Int[Tensor, "rank slot"]


def _best(source: _Source, n: int) -> tuple[_Best, Int[Tensor, " slot"], Float[Tensor, " slot"], int]:
    """The best lines; how many tokens activate each feature, the sum of its activations, and the number of tokens."""
    slots = len(source.chosen)
    best = _Best(torch.zeros(0, slots), torch.zeros(0, slots, dtype=torch.long), torch.zeros(0, slots, dtype=torch.long))
    acted, total, count = torch.zeros(slots, dtype=torch.long), torch.zeros(slots, dtype=torch.float64), 0
    for numbers, ids in source.batches():
        values = source.activations(ids)
        acted += (values != 0).sum((0, 1))
        total += values.sum((0, 1), dtype=torch.float64)
        count += int(source.looked_at(ids).sum())
        size, position = values.abs().max(1)
        lines = source.lines(numbers)[:, None].expand(-1, slots)
        joined = _Best(torch.cat([best.size, size]), torch.cat([best.line, lines]), torch.cat([best.position, position]))
        order = joined.size.sort(dim=0, descending=True, stable=True).indices[:n]
        best = _Best(*(part.gather(0, order) for part in (joined.size, joined.line, joined.position)))
    return best, acted, total, count


def _contexts(source: _Source, best: _Best, kept: Sequence[int], before: int, after: int) -> dict[int, list[Context]]:
    """The contexts of the best lines of some slots, by another run of their rows."""
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for slot in kept:
        for rank in range(len(best.size)):
            if best.size[rank, slot] > 0:
                wanted[int(best.line[rank, slot])].append((rank, slot))
    ranked: dict[int, dict[int, Context]] = {slot: {} for slot in kept}
    spell = _speller(source.model)
    rows = {line % len(source.texts) for line in wanted}
    for numbers, ids in source.batches():
        some = [i for i, number in enumerate(numbers) if int(number) in rows]
        if not some:
            continue
        values = source.activations(ids[some])
        for i, line in enumerate(source.lines(numbers[some]).tolist()):
            for rank, slot in wanted.get(line, ()):
                position = int(best.position[rank, slot])
                window = range(max(0, position - before), min(ids.shape[1], position + after + 1))
                row = ids[some[i % len(some)]]
                ranked[slot][rank] = Context(
                    row=line % len(source.texts),
                    layer=source.layers[line // len(source.texts)] if source.dictionary.layer is None else None,
                    position=position,
                    activation=float(values[i, position, slot]),
                    tokens=tuple(spell(int(row[place])) for place in window),
                    activations=tuple(values[i, window.start : window.stop, slot].tolist()),
                    at=position - window.start,
                )
    return {slot: [ranks[rank] for rank in sorted(ranks)] for slot, ranks in ranked.items()}


def _effects(dictionary: Dictionary, model: Model, chosen: Int[Tensor, " slot"], tokens: int) -> list[tuple[Weighted, Weighted]]:
    """The tokens that each direction promotes and suppresses."""
    if dictionary.writes not in _STREAM or not tokens:
        return [((), ())] * len(chosen)
    spell, k = _speller(model), min(tokens, model.vocab_size)
    found: list[tuple[Weighted, Weighted]] = []
    for some in chosen.split(max(1, _BUDGET // model.vocab_size)):
        directions = dictionary.w_dec[some.to(dictionary.w_dec.device)]
        directions = directions.sum(1) if directions.ndim == 3 else directions  # across layers: all that it writes
        rows = torch.cat([directions, torch.zeros_like(directions[:1])]).to(model.device, model.dtype)
        logits = unembed(model, rows[None], None)[0].float()
        effects = (logits[:-1] - logits[-1:]).cpu()
        high, low = effects.topk(k, -1), effects.topk(k, -1, largest=False)
        for up, up_ids, down, down_ids in zip(high.values, high.indices, low.values, low.indices, strict=True):
            found.append((_weighted(up, up_ids, spell), _weighted(down, down_ids, spell)))
    return found


def _weighted(values: Tensor, ids: Tensor, spell: Callable[[int], str]) -> Weighted:
    return tuple((spell(token), value) for value, token in zip(values.tolist(), ids.tolist(), strict=True))


def _speller(model: Model) -> Callable[[int], str]:
    """Texts of tokens; their numbers where there is no tokenizer."""
    tokenizer, known = model.tokenizer, dict[int, str]()

    def spell(token: int) -> str:
        if token not in known:
            known[token] = str(token) if tokenizer is None else tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return known[token]

    return spell
