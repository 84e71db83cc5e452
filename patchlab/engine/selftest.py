"""The load-time self-test: does every site read and write what its name says, on this very model?

Four kinds of silent failure are looked for: a hook that does not fire once; an edit that is dropped on the way (the
returned tensor gets no gradient); a run patched with itself that changes; and an edit that bypasses part of the model,
found by patching a site with another prompt's values and comparing the next quantity downstream with that prompt's own.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchlab.adapters import Architecture
from patchlab.engine.literal import run
from patchlab.engine.place_tests import checked_places
from patchlab.engine.program import Program, Result, Target, row_numbers, targets
from patchlab.errors import InterventionError, ModelError
from patchlab.interventions import Edit, Kept, address
from patchlab.metrics import Answers, Metric

_EVERYTHING = Metric(
    "sum of logits", lambda logits, answers: (logits * torch.linspace(-1, 1, logits.shape[-1]).to(logits)).flatten(1).sum(1), reads="all"
)

# patching all of the first gives the donor's value of the second, when all layers are patched at once
_NEXT = ((("q", "k"), "pattern"), (("pattern", "v"), "z"), (("z",), "attn_out"), (("mlp_post",), "mlp_out"))
_CONTRIBUTIONS: tuple[str, ...] = ("input", "attn_out", "mlp_out")
_SUM = ("resid_pre", "attn_out", "mlp_out", "resid_post")
_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")


def self_test(model: Any) -> Architecture:
    """The model's architecture with the sites and places that failed marked as such.

    Raises:
        ModelError: the model is not causal, or the residual stream itself cannot be patched.
    """
    with warnings.catch_warnings():
        # the Bridge warns of edits that it drops; finding those is what this test is for
        warnings.filterwarnings("ignore", message="A hook on", category=UserWarning)
        return _tested_architecture(model)


def _tested_architecture(model: Any) -> Architecture:
    generator = torch.Generator().manual_seed(0)
    length = min(6, model.arch.n_positions or 6)
    tokens = torch.randint(0, model.arch.vocab_size, (2, length), generator=generator).to(model.device)
    tokens[1] = (tokens[0] + 1 + torch.arange(length, device=model.device)) % model.arch.vocab_size
    _check_causal(model, tokens[:1])
    absent = dict(model.arch.absent)
    absent |= _silent(model, tokens)
    model = _Trial(model, replace(model.arch, absent=absent))
    absent |= _changed_by_itself(model, tokens)
    absent |= _dropped(model, tokens)
    model = _Trial(model, replace(model.arch, absent=absent))
    absent |= _bypassing(model, tokens)
    for kind in ("resid_pre", "resid_post"):
        if kind in absent:
            raise ModelError(f"{model.name} ({model.arch.family}) cannot be trusted: {kind} failed the self-test, {absent[kind]}.")
    return replace(model.arch, absent=absent, places=checked_places(model, tokens[:1]))


class _Trial:
    """A model with a provisional architecture."""

    def __init__(self, model: Any, arch: Architecture) -> None:
        self.bridge, self.hooks, self.name, self.dtype, self.device = model.bridge, model.hooks, model.name, model.dtype, model.device
        self.keeps_logits, self.ambient, self.arch = False, (), arch


def _program(tokens: Int[Tensor, "row pos"], **options: Any) -> Program:
    return Program(tokens, row_numbers(tokens), **options)


def _every(model: Any) -> tuple[Target, ...]:
    return _all(model.arch.sites, model.arch)


def _check_causal(model: Any, tokens: Int[Tensor, "one pos"]) -> None:
    """Structural zeros and prefixes rest on it: no token may change the logits before it."""
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % model.arch.vocab_size
    one, two = _logits(run(model, _program(torch.cat([tokens, other]), logits="all")))[:, :-1]
    if (worst := _difference(two, one)) > _tolerance(model) / 20:
        raise ModelError(
            f"{model.name} ({model.arch.family}) is not a causal language model: the last token changes the logits before it (by {worst:.2g} "
            f"of their scale). patchlab needs a decoder-only model."
        )


def _silent(model: Any, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites whose hook does not fire exactly once."""
    try:
        run(model, _program(tokens, keep=_every(model)))
        return {}
    except InterventionError:
        pass  # some hook is silent: find out which
    found = {}
    for kind in model.arch.sites:
        try:
            run(model, _program(tokens, keep=targets(kind, model.arch.n_layers)))
        except InterventionError as error:
            found[kind] = str(error)
    return found


def _changed_by_itself(model: Any, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites where patching a run with its own values changes a bit of the logits."""
    found = {}
    plain = run(model, _program(tokens, keep=_every(model), logits="all"))
    for kind in model.arch.sites:
        patched = run(model, _program(tokens, edits=_edits(targets(kind, model.arch.n_layers), plain.as_source()), logits="all"))
        if not torch.equal(_logits(plain), _logits(patched)):
            found[kind] = f"a run patched with its own {kind} differs by {_difference(_logits(plain), _logits(patched)):.2g} in the logits"
    return found


def _dropped(model: Any, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites whose returned tensor does not reach the logits."""
    answers = Answers.of([[0]] * 2, [[0]] * 2, model.device)

    def gradients(where: tuple[Target, ...]) -> dict[str, str]:
        found: dict[str, list[int | None]] = {}
        for (kind, layer), gradient in run(model, _program(tokens, gradients=where, metric=_EVERYTHING, answers=answers)).gradients.items():
            if not bool(gradient.any()):
                found.setdefault(kind, []).append(layer)
        return {kind: f"an edit has no effect in layers {layers}" for kind, layers in found.items()}

    try:
        return gradients(_every(model))
    except InterventionError:
        pass  # some site is cut off: find out which
    found = {}
    for kind in model.arch.sites:
        try:
            found |= gradients(targets(kind, model.arch.n_layers))
        except InterventionError as error:
            found[kind] = f"an edit is dropped: {error}"
    return found


def _bypassing(model: Any, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites where a patch does not carry over to the next quantity downstream."""
    arch = model.arch
    both = run(model, _program(tokens, keep=_every(model), logits="all"))
    donor = Kept({key: value[:1] for key, value in both.activations.items()}, both.examples[:1])
    receiver = tokens[1:]
    found = {}

    def patched(where: tuple[Target, ...], keep: tuple[Target, ...] = (), rows: int = 1, edits: tuple[Edit, ...] | None = None) -> Result:
        return run(model, _program(receiver.expand(rows, -1), edits=_edits(where, donor) if edits is None else edits, keep=keep, logits="all"))

    for kinds, following in _NEXT:
        if any(kind in arch.absent for kind in (*kinds, following)):
            continue
        where = tuple(target for kind in kinds for target in targets(kind, arch.n_layers))
        got = patched(where, keep=targets(following, arch.n_layers)).activations
        worst = max(_difference(got[key], donor.activations[key]) for key in got)
        if worst > _tolerance(model):
            found |= dict.fromkeys(kinds, f"patching {' and '.join(kinds)} leaves {following} wrong by {worst:.2g} of its scale")
    residual = [(kind, layer) for kind in _RESIDUAL if kind not in arch.absent for layer in range(arch.n_layers)]
    one_row_each = torch.eye(len(residual), dtype=torch.bool, device=tokens.device)
    edits = tuple(Edit(address(kind, layer), donor, rows=one_row_each[i]) for i, (kind, layer) in enumerate(residual))
    logits = _logits(patched((), rows=len(residual), edits=edits))
    for i, (kind, layer) in enumerate(residual):
        worst = _difference(logits[i], _logits(both)[0])
        if worst > _tolerance(model):
            found.setdefault(kind, f"patching all of L{layer}.{kind} leaves the logits wrong by {worst:.2g} of their scale")
    if all(kind not in arch.absent for kind in _CONTRIBUTIONS):
        found |= _not_arriving(model, both, donor, patched)
    return found


def _not_arriving(model: Any, both: Result, donor: Kept, patched: Callable[..., Result]) -> dict[str, str]:
    """Contributions to the residual stream whose patch does not arrive there."""
    arch = model.arch
    found: dict[str, str] = {}
    if _imbalance(both, arch) <= _tolerance(model):  # the stream is a plain sum, so it must stay the sum of what is patched
        for kind in _CONTRIBUTIONS:
            got = patched(_all((kind,), arch), keep=_all(_SUM, arch))
            worst = _difference(got["L0.resid_pre"], donor.activations["resid_pre", 0]) if kind == "input" else _imbalance(got, arch)
            if worst > _tolerance(model):
                found[kind] = f"patching {kind} leaves the residual stream after it wrong by {worst:.2g} of its scale"
    worst = _difference(_logits(patched(_all(_CONTRIBUTIONS, arch))), _logits(both)[:1])
    if worst > _tolerance(model) and not found:
        found = dict.fromkeys(
            _CONTRIBUTIONS, f"patching the embedding and every attention and MLP output leaves the logits wrong by {worst:.2g} of their scale"
        )
    return found


def _all(kinds: tuple[str, ...], arch: Architecture) -> tuple[Target, ...]:
    return tuple(target for kind in kinds for target in targets(kind, arch.n_layers))


def _imbalance(result: Result, arch: Architecture) -> float:
    """How far the residual stream after any block is from the stream before it plus what attention and MLP add."""
    values = result.activations
    sums = [sum(values[kind, layer] for kind in _SUM[:3]) for layer in range(arch.n_layers)]
    return max(_difference(torch.as_tensor(total), values["resid_post", layer]) for layer, total in enumerate(sums))


def _edits(where: tuple[Target, ...], source: Kept) -> tuple[Edit, ...]:
    return tuple(Edit(address(*target), source) for target in where)


def _logits(result: Result) -> Tensor:
    if result.logits is None:
        raise ModelError("the run returned no logits.")
    return result.logits


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the expected tensor's largest entry."""
    scale = float(expected.float().abs().max())
    return float((got.float() - expected.float()).abs().max()) / max(scale, 1e-30)


def _tolerance(model: Any) -> float:
    return 2e-3 if model.dtype in (torch.float32, torch.float64) else 0.15
