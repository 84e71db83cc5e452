"""Fits of lenses: affine maps by least squares, and mean Jacobians, plain or under backward rules."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchlab.engine import Program, run
from patchlab.engine.jacobians import state_jacobians
from patchlab.engine.memory import block_numbers, free_bytes, itemsize
from patchlab.engine.program import row_numbers
from patchlab.errors import LensError
from patchlab.host import precise
from patchlab.lenses.distributions import fidelity
from patchlab.lenses.linear_map import LeastSquares, LinearMap
from patchlab.lenses.readout import Readout
from patchlab.lenses.rows import Corpus, by_length, rows_of
from patchlab.models import Model
from patchlab.progress import progress_bar
from patchlab.rules import Composite, get_composite
from patchlab.tasks.task import Task
from patchlab.texts import Texts

_TRIED = 64  # rows at a time in a least-squares fit


def fit_linear(
    model: Model,
    rows: Corpus,
    *,
    layers: Iterable[int] | None = None,
    held_out: float | int = 0.25,
    ridge: float | int = 1e-4,
    skip_first: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Readout:
    """Affine maps from the state after each layer to the last state, by least squares in closed form.

    A tuned lens (Belrose et al. 2023, arXiv 2303.08112) minimises the KL divergence of the output instead; here the KL is what is measured. Both on
    rows that the fit does not see: :attr:`Readout.quality` has R² and KL of every layer, with those of the logit lens beside.

    Args:
        model: whose states are mapped.
        rows: :func:`patchlab.texts.sentences` or :func:`~patchlab.texts.read` of a file, texts, rows of token ids, or a task, whose prompts vary
            little, so that maps fitted on them fit little else.
        layers: which; default all but the last.
        held_out: the share of the rows that the fit does not see, drawn by ``seed``; equal rows stay together.
        ridge: penalty on squared weights, as a share of the mean squared entry of the states.
        skip_first: leading positions that are left out.
        seed: of the draw.
        progress: show a progress bar.

    Raises:
        LensError: too few states for the width of the model, an empty part, or layers that it has not.
    """
    chosen = _layers(model, layers, model.arch.n_layers - 1)
    groups = [tokens for _, tokens in by_length(model, rows)]
    fitted, kept_back = _split(groups, held_out, seed)
    last = model.arch.n_layers - 1
    sums = {layer: LeastSquares(model.arch.d_model, model.arch.d_model, model.device) for layer in chosen}
    batches = [part for group in fitted for part in group.split(_TRIED)]
    with progress_bar("linear lens", "batch", len(batches), show=progress) as bar, torch.no_grad():
        for tokens in batches:
            keep = tuple(("resid_post", layer) for layer in (*chosen, last))
            kept = run(model, Program(tokens, row_numbers(tokens), keep=keep)).activations
            target = kept["resid_post", last][:, skip_first:].flatten(0, 1)
            for layer in chosen:
                sums[layer].add(kept["resid_post", layer][:, skip_first:].flatten(0, 1), target)
            bar.update()
    dtype = torch.promote_types(model.dtype, torch.float32)
    maps = {layer: one.solve(ridge, dtype) for layer, one in sums.items()}
    record = {
        **_record(model, fitted, rows, last, skip_first),
        "estimator": "least_squares",
        "ridge": ridge,
        "held_out_rows": sum(map(len, kept_back)),
        "seed": seed,
    }
    quality = _quality(model, kept_back, maps, skip_first)
    return Readout("linear lens", maps, last, record, quality)


def _quality(model: Model, groups: list[Int[Tensor, "row pos"]], maps: dict[int, LinearMap], skip_first: int) -> pd.DataFrame:
    """R² and KL of maps and of the logit lens on held-out rows; groups of several lengths are weighed by their positions."""
    frames = []
    for group in groups:
        rows = rows_of(model, group)
        own, plain = (fidelity(model, rows, given, skip_first=skip_first) for given in (maps, dict.fromkeys(maps)))
        frame = own.merge(plain, on="layer", suffixes=("", "_logit_lens"))
        frames.append((frame.set_index("layer"), group.numel() - len(group) * skip_first))
    total = sum(weight for _, weight in frames)
    return pd.concat([frame * (weight / total) for frame, weight in frames]).groupby(level="layer").sum().reset_index()


def fit_jacobian(
    model: Model,
    rows: Corpus,
    *,
    rules: str | Composite = "gradient",
    layers: Iterable[int] | None = None,
    target_layer: int | None = None,
    skip_first: int = 16,
    max_length: int = 128,
    batch_size: int | None = None,
    progress: bool = True,
    corpus: str = "",
) -> Readout:
    """A Jacobian lens: ``J_l = E_prompt[mean over t of Σ_{t'≥t} ∂h_target,t' / ∂h_l,t]``, read as unembedding of norm(J_l h_l).

    Source: Gurnee et al. 2026 (transformer-circuits.pub/2026/workspace). With ``rules`` the derivative is that of a relevance backward pass: with
    ``relp`` (LN-, Identity- and Half-rule, softmax as it is, and no rule on norms of queries and keys) this is the relevance lens (R-lens). Mixtures
    of experts have rules inside every expert and constant routing weights. A model that the rules cannot cover is refused.

    TransformerLens' own ``JacobianLens.fit`` gives the same matrices without rules; this one takes token rows, any length of a batch and rules.

    Args:
        model: with causal attention.
        rows: as for :func:`fit_linear`. A hundred rows are enough for a usable lens, by the source.
        rules: backward rules, by name or as a composite.
        layers: which; default all below the target.
        target_layer: whose output is differentiated; default the last. Published relevance lenses take the last but one.
        skip_first: leading positions that do not count, as source or as target; the last position does not either.
        max_length: rows are cut after so many tokens.
        batch_size: rows at a time; default as many as fit in memory. The result does not depend on it.
        progress: show a progress bar.
        corpus: what the rows are, for the record.

    Raises:
        LensError: no position is left, or layers that the model has not.
        RuleError: rules that cannot cover the model.
        InterventionError: inside ``pl.intervene``.
    """
    target = model.arch.n_layers - 1 if target_layer is None else target_layer
    if not 0 < target < model.arch.n_layers:
        raise LensError(f"target_layer is {target_layer}; {model.name} has the layers 0 to {model.arch.n_layers - 1}, and one below it is needed.")
    chosen, composite = _layers(model, layers, target), get_composite(rules)
    groups = [tokens[:, :max_length] for _, tokens in by_length(model, rows)]
    if short := [group.shape[1] for group in groups if group.shape[1] < skip_first + 2]:
        raise LensError(
            f"rows of {min(short)} tokens have no position that counts: the first {skip_first} and the last are left out. Give longer rows, "
            f"or skip_first={max(0, min(short) - 2)} at most."
        )
    total = precise(torch.zeros(len(chosen), model.arch.d_model, model.arch.d_model, device=model.device))
    size = batch_size or _rows_at_once(model, max(group.shape[1] for group in groups), len(chosen))
    batches = [part for group in groups for part in group.split(size)]
    with progress_bar("Jacobian lens", "batch", len(batches), show=progress) as bar:
        for tokens in batches:
            given = None if composite.plain else composite
            valid = _valid(tokens.shape[1], skip_first).to(model.device)
            found = state_jacobians(model, tokens, chosen, target, valid=valid, rules=given, qk_norms=False).sum(0)
            total += found.to(total.device)
            bar.update()
    count = sum(map(len, groups))
    means = (total / count).to(torch.promote_types(model.dtype, torch.float32))
    record = {**_record(model, groups, rows, target, skip_first, corpus), "max_seq_len": max_length, **_estimator(composite)}
    maps = {layer: LinearMap(means[i].contiguous()) for i, layer in enumerate(chosen)}
    return Readout("Jacobian lens" if composite.plain else f"relevance lens ({composite.name})", maps, target, record)


def _estimator(composite: Composite) -> dict[str, Any]:
    """How a file says what was fitted: TransformerLens' name without rules, that of published relevance lenses with them."""
    if composite.plain:
        return {"estimator": "jacobian_lens"}
    rules = {
        "ln_rule": composite.norm is not None,
        "identity_rule": composite.activation is not None,
        "half_rule": composite.product is not None,
        "half_rule_beta": 0.5,
        "include_qk_norms": False,
        "composite": composite.name,
        "composite_is": repr(composite),
    }
    return {"estimator": "relp", "rules": rules}


def _valid(length: int, skip_first: int) -> Bool[Tensor, " pos"]:
    valid = torch.zeros(length, dtype=torch.bool)
    valid[skip_first : length - 1] = True
    return valid


def _rows_at_once(model: Model, length: int, n_layers: int) -> int:
    row = itemsize(model) * (model.arch.n_layers * length * block_numbers(model, length) + length * model.vocab_size) + 8 * (
        n_layers * model.arch.d_model**2
    )
    return max(1, min(64, free_bytes(model.device) // 4 // row))


def _layers(model: Model, layers: Iterable[int] | None, end: int) -> list[int]:
    chosen = list(range(end)) if layers is None else sorted(set(layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < end:
        raise LensError(f"layers to fit are numbers from 0 to {end - 1}, at least one; got {chosen}.")
    return chosen


def _split(groups: list[Int[Tensor, "row pos"]], share: float | int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Rows to fit on and rows to measure on; equal rows stay together.

    Raises:
        LensError: a part would be empty.
    """
    if not 0 < share < 1:
        raise LensError(f"held_out is {share}; give a share of the rows between 0 and 1.")
    keys = [(g, tuple(row)) for g, group in enumerate(groups) for row in group.tolist()]
    distinct = list(dict.fromkeys(keys))
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = {distinct[i] for i in order[: max(1, round(share * len(distinct)))]}
    if len(held) == len(distinct):
        raise LensError(f"{len(distinct)} different rows cannot be cut into rows to fit on and rows to measure on; give more.")
    fitted, back = [], []
    for g, group in enumerate(groups):
        mask = torch.tensor([(g, tuple(row)) in held for row in group.tolist()], device=group.device)
        fitted += [group[~mask]] if bool((~mask).any()) else []
        back += [group[mask]] if bool(mask.any()) else []
    return fitted, back


def _record(model: Model, groups: list[Tensor], rows: Corpus, target: int, skip_first: int, corpus: str = "") -> dict[str, Any]:
    """What a lens was fitted on, in the words of published lenses."""
    given = f"task {rows.name}, clean prompts" if isinstance(rows, Task) else rows.name if isinstance(rows, Texts) else "rows"
    digest = hashlib.sha256(b"".join(group.cpu().numpy().tobytes() for group in groups)).hexdigest()[:16]
    return {
        "model_name": model.name,
        "model_fingerprint": model.fingerprint,
        "hook_convention": "blocks.{layer}.hook_out",
        "corpus": corpus or given,
        "corpus_sha256": digest,
        "n_prompts": sum(map(len, groups)),
        "fit_dtype": str(model.dtype).removeprefix("torch."),
        "target_layer": target,
        "skip_first_positions": skip_first,
        "versions": {
            "patchlab": _own_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformer-lens", "transformers")},
        },
    }


def _own_version() -> str:
    from patchlab import __version__

    return __version__
