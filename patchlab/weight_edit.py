"""Weight edits: changes of a model's weights for the length of a block, and what they do to what was and was not to change.

    >>> import torch
    >>> import patchlab as pl
    >>> from patchlab import weight_edit
    >>> model = pl.load_model("demo-gpt2-4l")
    >>> before = model.fingerprint
    >>> with weight_edit.edited(model, weight_edit.neuron_row(model, 2, 7, torch.ones(64))):
    ...     model.fingerprint == before
    False
    >>> model.fingerprint == before
    True

An edit adds to a linear map. Nothing of it is left when the block ends, also after an exception: the weights are put back bit for bit.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import LinearPlace
from patchlab.adapters.weights import is_offloaded
from patchlab.engine import Program, run, session_of
from patchlab.engine.program import row_numbers
from patchlab.errors import InterventionError, ModelError, unknown
from patchlab.host import precise
from patchlab.lenses.rows import Corpus, by_length
from patchlab.metrics import divergence
from patchlab.models import Model
from patchlab.models.model import fingerprint_of
from patchlab.stats.bootstrap import interval, resampling_weights

_TRIED = 64  # rows per forward pass


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """A change that is added to the weight of a linear map ``x W + b``.

    Attributes:
        place: name of the map, such as ``blocks.3.mlp.out``.
        change: ``[d_in, d_out]``.
        what: in words.
    """

    place: str
    change: Float[Tensor, "d_in d_out"] = field(repr=False)
    what: str = ""

    @property
    def size(self) -> float:
        """Frobenius norm of the change."""
        return float(precise(self.change).norm())


def weight_of(model: Model, place: str) -> Float[Tensor, "d_in d_out"]:
    """The weight of a linear map as ``[d_in, d_out]``: a view of the model's own.

    Raises:
        InterventionError: no such map, or one that is no plain matrix.
    """
    found = {one.name: one for one in model.arch.places if isinstance(one, LinearPlace)}
    if place not in found:
        raise InterventionError(unknown(f"linear map of {model.name}", place, found))
    if found[place].problem is not None:
        raise InterventionError(f"{place} of {model.name} cannot be edited: {found[place].problem}.")
    return found[place].parameters()[0]


def neuron_row(model: Model, layer: int, neuron: int, change: Float[Tensor, " d_model"]) -> WeightEdit:
    """The edit that adds a vector to what one neuron writes per unit of its activation (a row of the MLP's output map).

    Raises:
        InterventionError: a neuron that is not there, a vector of another width, or an MLP without a plain output map.
    """
    weight = weight_of(model, f"blocks.{layer}.mlp.out")
    if not 0 <= neuron < weight.shape[0]:
        raise InterventionError(f"layer {layer} of {model.name} has the neurons 0 to {weight.shape[0] - 1}; got {neuron}.")
    if change.shape != weight.shape[1:]:
        raise InterventionError(f"a neuron of {model.name} writes vectors of {weight.shape[1]} numbers; got shape {list(change.shape)}.")
    whole = torch.zeros_like(weight)
    whole[neuron] = change.to(weight)
    return WeightEdit(f"blocks.{layer}.mlp.out", whole, f"row of neuron {neuron} of layer {layer}")


def least_squares(
    model: Model,
    place: str,
    keys: Float[Tensor, "key d_in"],
    residuals: Float[Tensor, "key d_out"],
    covariance: Float[Tensor, "d_in d_in"],
    strength: float | int = 1.0,
) -> WeightEdit:
    """The edit of a whole matrix that adds ``residuals`` at ``keys`` and as little as it can elsewhere (MEMIT, Meng et al. 2023, equation 14).

    With keys as rows of K and residuals as rows of R: ``(strength · C + Kᵀ K)⁻¹ Kᵀ R``, solved in float64. C is the mean of ``k kᵀ`` over keys
    that should keep their values (:func:`covariance`).

    Raises:
        InterventionError: shapes that do not fit the map, or a system that has no solution.
    """
    weight = weight_of(model, place)
    d_in, d_out = weight.shape
    if keys.shape[1:] != (d_in,) or residuals.shape != (len(keys), d_out) or covariance.shape != (d_in, d_in):
        raise InterventionError(
            f"{place} maps {d_in} to {d_out} numbers, so keys are [n, {d_in}], residuals [n, {d_out}] and the covariance [{d_in}, {d_in}]; got "
            f"{list(keys.shape)}, {list(residuals.shape)} and {list(covariance.shape)}."
        )
    k, r = precise(keys), precise(residuals)
    change, info = torch.linalg.solve_ex(strength * precise(covariance) + k.T @ k, k.T @ r)
    if int(info) or not bool(torch.isfinite(change).all()):
        raise InterventionError(f"no single change of {place} fits: the covariance has directions without keys. Take more texts, or add to it.")
    return WeightEdit(place, change.to(weight), f"least squares over {len(keys)} keys")


def covariance(model: Model, layer: int, corpus: Corpus) -> Float[Tensor, "neuron neuron"]:
    """The mean of ``k kᵀ`` over what goes into an MLP's output map (its neurons) at all tokens of a corpus, in float64."""
    total, count = torch.zeros(()), 0
    for _, tokens in by_length(model, corpus):
        for part in tokens.split(_TRIED):
            with torch.no_grad():
                found = run(model, Program(part, row_numbers(part), keep=(("mlp_post", layer),))).activations
            k = precise(found["mlp_post", layer]).flatten(0, 1)
            total, count = total + k.T @ k, count + len(k)
    return total / count


@contextmanager
def edited(model: Model, edits: WeightEdit | Iterable[WeightEdit]) -> Generator[Model, None, None]:
    """The model with changed weights for the length of the block; its fingerprint is then another. Blocks nest.

    The weights are put back bit for bit when the block ends, also after an exception, and the fingerprint is computed anew to prove it. Other
    threads cannot run the model meanwhile. Unpatched runs that methods share are those of the unchanged model, and are not used.

    Raises:
        InterventionError: an edit that does not fit.
        ModelError: another thread runs the model; or the weights are not what they were, because something else changed them.
    """
    chosen = [edits] if isinstance(edits, WeightEdit) else list(edits)
    if is_offloaded(model.bridge):
        raise InterventionError(
            f"weights of {model.name} are kept elsewhere and fetched for each use (device_map), so an edit would be lost. Load it on one device."
        )
    for edit in chosen:
        weight = weight_of(model, edit.place)
        if edit.change.shape != weight.shape:
            raise InterventionError(f"{edit.place} of {model.name} is {list(weight.shape)}, and the change {list(edit.change.shape)}.")
        if not bool(torch.isfinite(edit.change).all()):
            raise InterventionError(f"the change of {edit.place} holds NaN or infinity; nothing that is measured with it would mean anything.")
    session = session_of(model)
    with session.running():
        saved = {edit.place: weight_of(model, edit.place).detach().clone() for edit in chosen}
        fingerprint, shared = model.fingerprint, session.shared
        try:
            session.shared = None
            with torch.no_grad():
                for edit in chosen:
                    weight_of(model, edit.place).add_(edit.change.to(saved[edit.place]))
            model.fingerprint = fingerprint_of(model.bridge)
            yield model
        finally:
            with torch.no_grad():
                for place, weight in saved.items():
                    weight_of(model, place).copy_(weight)
            model.fingerprint, session.shared = fingerprint_of(model.bridge), shared
    if model.fingerprint != fingerprint:
        raise ModelError(
            f"the weights of {model.name} are not what they were before the edit ({fingerprint}): something else changed them. Load it again."
        )


@dataclass(frozen=True)
class Request:
    """A prompt, and the token that should follow it."""

    tokens: tuple[int, ...]
    wanted: int


@dataclass(frozen=True, eq=False)
class EditReport:
    """What edits of weights did.

    Attributes:
        alone: one row per request, whose edits were made alone: ``request``, ``success`` (the wanted token is the most likely), ``others_kept``
            (share of the other requests' prompts whose most likely token stayed), a column ``kept NAME`` and ``kl NAME`` (of the outputs from
            the unedited model's at the last position, in nats) per further corpus, and ``size`` of the change.
        together: one row per number of edits made at once, the first ones: ``edits``, ``success`` (share of these requests), ``others_kept`` (of the
            requests not yet edited), ``kept NAME``.
    """

    alone: pd.DataFrame
    together: pd.DataFrame

    def interval(self, column: str) -> tuple[float, float, float]:
        """The mean of a column of :attr:`alone`, with its 95 % bootstrap interval over requests."""
        values = self.alone[column].to_numpy(dtype=float)
        low, high = interval(resampling_weights(len(values), 1000, 0) @ values[:, None])
        return float(values.mean()), float(low[0]), float(high[0])

    def summary(self) -> str:
        """Success and specificity of edits alone, and of all together, in words."""
        last = self.together.iloc[-1]
        kept = [column for column in self.alone.columns if column == "others_kept" or column.startswith("kept ")]
        one = ", ".join(f"{column.replace('_', ' ')} {self.alone[column].mean():.3f}" for column in kept)
        all_ = ", ".join(f"{column.replace('_', ' ')} {last[column]:.3f}" for column in kept if not np.isnan(last[column]))
        return (
            f"alone: success {self.alone['success'].mean():.2f} of {len(self.alone)}, {one}\n"
            f"{int(last['edits'])} together: success {last['success']:.2f}{', ' if all_ else ''}{all_}"
        )

    def __repr__(self) -> str:
        return f"EditReport({len(self.alone)} requests)\n{self.summary()}"


def report(
    model: Model,
    requests: Sequence[Request],
    edits: Sequence[Sequence[WeightEdit]],
    *,
    others: Mapping[str, Corpus] | None = None,
    together: Iterable[int] | None = None,
) -> EditReport:
    """Measure edits, one set per request: success, specificity and composition.

    Args:
        model: the unedited model.
        requests: what each set is for.
        edits: in the order of the requests.
        others: prompts by name whose most likely next token should stay what it is.
        together: numbers of edits to make at once, the first ones; default 1, 2, 4, ... and all.

    Raises:
        InterventionError: not one set of edits per request, no requests, or numbers that are not there.
    """
    if not requests or len(edits) != len(requests):
        raise InterventionError(f"each request has its own set of edits; got {len(requests)} requests and {len(edits)} sets.")
    n = len(requests)
    sizes = sorted({*(2**k for k in range(n.bit_length()) if 2**k <= n), n}) if together is None else sorted(set(together))
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= n:
        raise InterventionError(f"numbers of edits to make together lie between 1 and {n}, at least one; got {sizes}.")
    prompts = [list(request.tokens) for request in requests]
    wanted = np.array([request.wanted for request in requests])
    corpora: dict[str, Any] = dict(others or {})
    plain = _last_logits(model, prompts).argmax(-1).numpy()
    before = {name: _last_logits(model, corpus) for name, corpus in corpora.items()}

    def kept(top: np.ndarray, out: np.ndarray) -> float:
        rest = np.setdiff1d(np.arange(n), out)
        return float((top[rest] == plain[rest]).mean()) if len(rest) else float("nan")

    alone: list[dict[str, Any]] = []
    for number, own in enumerate(edits):
        with edited(model, own):
            top = _last_logits(model, prompts).argmax(-1).numpy()
            row = {"request": number, "success": float(top[number] == wanted[number]), "others_kept": kept(top, np.array([number]))}
            alone.append(row | _kept_elsewhere(model, corpora, before, kl=True) | {"size": sum(edit.size for edit in own)})
    rows: list[dict[str, Any]] = []
    for size in sizes:
        with edited(model, [edit for own in edits[:size] for edit in own]):
            top = _last_logits(model, prompts).argmax(-1).numpy()
            row = {"edits": size, "success": float((top[:size] == wanted[:size]).mean()), "others_kept": kept(top, np.arange(size))}
            rows.append(row | _kept_elsewhere(model, corpora, before, kl=False))
    return EditReport(pd.DataFrame(alone), pd.DataFrame(rows))


def _kept_elsewhere(model: Model, corpora: Mapping[str, Any], before: Mapping[str, Tensor], *, kl: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, corpus in corpora.items():
        now = _last_logits(model, corpus)
        found[f"kept {name}"] = float((now.argmax(-1) == before[name].argmax(-1)).float().mean())
        if kl:
            found[f"kl {name}"] = float(divergence(before[name], now).mean())
    return found


def _last_logits(model: Model, corpus: Corpus) -> Float[Tensor, "row vocab"]:
    """The logits at the last position of each row of a corpus, in its order, in float64 on the CPU."""
    parts: list[tuple[Int[np.ndarray, " row"], Tensor]] = []
    for numbers, tokens in by_length(model, corpus):
        for start in range(0, len(numbers), _TRIED):
            part = tokens[start : start + _TRIED]
            with torch.no_grad():
                logits = run(model, Program(part, row_numbers(part), logits="answer")).logits
            parts.append((numbers[start : start + _TRIED], precise(logits).cpu()))  # pyright: ignore[reportArgumentType]
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
    return torch.cat([logits for _, logits in parts])[torch.from_numpy(order)]
