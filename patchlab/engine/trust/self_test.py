"""The load-time self-test: every site has to read and write what its name says, on this very model.

Looked for are a hook that does not fire once; an activation whose shape, or whose positions, are not those of its site; an edit that is
dropped on the way; a run patched with itself that changes; an edit that means something else than its address says
(:mod:`patchlab.engine.trust.probes`); and an edit that bypasses part of the model, found by patching a site with another prompt's values.

A model in half precision is tested in float32, one block at a time (:mod:`patchlab.engine.trust.precision`): no tolerance has to allow for its
rounding.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchlab.adapters import Accessor, Architecture, BridgedModel
from patchlab.adapters.dictionaries import SparseDictionary, points_of_dictionaries, sites_of
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Result, Target, row_numbers
from patchlab.engine.session import exclusive
from patchlab.engine.trust.places import checked_places
from patchlab.engine.trust.precision import in_single_precision
from patchlab.engine.trust.probes import probe
from patchlab.engine.trust.trials import every_logit, tolerance, trial
from patchlab.errors import InterventionError, ModelError, PatchlabError, SiteError
from patchlab.interventions import Edit
from patchlab.sites import KINDS, address
from patchlab.sources import Kept

_CONTRIBUTIONS: tuple[str, ...] = ("input", "attn_out", "mlp_out")
_SUM = ("resid_pre", "attn_out", "mlp_out", "resid_post")
_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
STEPS = (1e-2, 1e-3, 1e-4)
"""Sizes of the edit whose effect is held against the gradient, as shares of the size of the activation."""


@exclusive
def self_test(model: BridgedModel) -> Architecture:
    """The model's architecture with its sizes as measured, and with the sites and places that failed marked as such.

    Raises:
        ModelError: the model is not causal, the residual stream itself cannot be patched, or the test cannot be run.
    """
    with warnings.catch_warnings():
        # the Bridge warns of edits that it drops; finding those is what this test is for
        warnings.filterwarnings("ignore", message="A hook on", category=UserWarning)
        try:
            return _tested_architecture(model)
        except PatchlabError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
            why = (str(error).splitlines() or [""])[0][:200]
            raise ModelError(
                f"{model.name} ({model.arch.family}, {model.dtype}) cannot be trusted: the self-test of its sites does not run, "
                f"{type(error).__name__}: {why}. TransformerLens may not run this architecture, or not in this dtype."
            ) from error


@exclusive
def add_site(model: BridgedModel, accessor: Accessor, sizes: Mapping[str, int] = MappingProxyType({})) -> None:
    """Give a model one more site kind, read and written by an accessor, once it passes the tests that need not know what it means.

    Its hooks fire once; its activation has the shape of its axes and does not look ahead; a run patched with itself is the same run; and edits
    change the logits as the gradients say that come back. The fast engine is compared with the literal one at the new kind as well before it is
    used again.

    Raises:
        SiteError: as :meth:`patchlab.adapters.Architecture.with_site`.
        ModelError: it fails a test, or it cannot be told from another accessor.
    """
    arch = model.arch.with_site(accessor, sizes)
    _check_site(model, arch, accessor)
    model.arch = arch


@exclusive
def add_dictionaries(model: BridgedModel, dictionaries: Iterable[SparseDictionary]) -> None:
    """Give the model the features and errors of dictionaries as sites, once they pass the tests of :func:`add_site` and splitting an activation
    into features, rest and error gives it back.

    Raises:
        SiteError: as :func:`patchlab.adapters.dictionaries.points_of_dictionaries`, or a point that has dictionaries already.
        ModelError: a test fails.
    """
    dtype = torch.promote_types(model.dtype, torch.float32)
    moved = [one.to(device=model.device, dtype=dtype) for one in dictionaries]
    if not moved:
        raise SiteError("no dictionaries were given; give at least one, such as those of load_dictionaries(...).")
    arch = model.arch
    for name, point in points_of_dictionaries(moved, arch.accessors, arch.absent, arch.n_layers, model.hooks).items():
        if f"features.{name}" in arch.accessors:
            raise SiteError(
                f"{model.name} has dictionaries on {name} already; take them off with drop_dictionaries(), and add all of a point at once."
            )
        for accessor in sites_of(point):
            arch = arch.with_site(accessor)
            _check_site(model, arch, accessor)
    model.arch = arch


def drop_dictionaries(model: BridgedModel) -> None:
    """Take the sites of dictionaries off a model."""
    arch = model.arch
    model.arch = replace(arch, accessors={kind: one for kind, one in arch.accessors.items() if not KINDS[kind].of})


def _check_site(model: BridgedModel, arch: Architecture, accessor: Accessor) -> None:
    """Test one accessor alone.

    Raises:
        ModelError: it fails.
    """

    def refuse(why: str) -> ModelError:
        return ModelError(f"{model.name} gets no site {accessor.kind}: {why}.")

    where = arch.targets(accessor.kind)
    if missing := [host for _, layer in where if (host := accessor.host(layer)) not in model.hooks]:
        raise refuse(f"the model has no hook {missing[0]}, where its accessor reads")
    if accessor.identity is None:
        raise refuse(
            f"{type(accessor).__name__} holds something that cannot be told from another, so no result could say what it is of; let its fields be "
            f"numbers, texts and tensors, or give it an attribute `identity`"
        )
    alone = _with(model, replace(arch, accessors={accessor.kind: accessor}, absent={}))
    length = _length(arch)
    tokens = trial(model, length, seed=0).tokens
    tokens[1] = torch.cat([tokens[0, :-1], (tokens[0, -1:] + 1) % arch.vocab_size])
    with in_single_precision(model):
        problems = _silent(alone, tokens) or _shapeless(alone, tokens) or _changed_by_itself(alone, tokens)
    problems = problems or _dropped(alone, tokens) or _of_other_slope(alone, tokens)
    if problems:
        raise refuse(problems[accessor.kind].removesuffix("."))


def _shapeless(model: BridgedModel, tokens: Int[Tensor, "two pos"]) -> dict[str, str]:
    """A site kind whose activation has other axes than it says, or changes before the last token, in which the rows differ."""
    (kind,) = model.arch.sites
    about = KINDS[kind]
    rows, length = tokens.shape
    for layer, value in ((layer, value) for (_, layer), value in run(model, _program(tokens, keep=_every(model))).activations.items()):
        shape, entries = list(value.shape), model.arch.accessors[kind].at(layer).entries(layer)
        unit = [] if about.unit is None else [model.arch.size(about.unit) if entries is None else entries]
        expected = [rows, *unit, length, length] if about.source is not None else [rows, length, *unit]
        if shape[: len(expected)] != expected or len(shape) != len(expected) + (about.width is not None):
            width = [] if about.width is None else [about.width]
            return {kind: f"its activation has the shape {shape} in layer {layer} where {[*expected, *width]} is expected"}
        before = value.narrow(about.dim(about.position), 0, length - 1)
        if (worst := _difference(before[1], before[0])) > tolerance():
            return {kind: f"the last token changes it at earlier positions (by {worst:.2g} of its scale)"}
    return {}


def _of_other_slope(model: BridgedModel, tokens: Int[Tensor, "two pos"]) -> dict[str, str]:
    """A site kind where a small edit does not change the logits as the gradient says: it writes something else than it reads, or pulls wrongly."""
    (kind,) = model.arch.sites
    where, metric = model.arch.targets(kind), every_logit("all")
    ids, answers = tokens[:1], trial(model, tokens.shape[1]).answers
    answers = answers.rows(torch.zeros(1, dtype=torch.long, device=model.device))
    gradients = run(model, _program(ids, gradients=where, metric=metric, answers=answers)).gradients
    own_rounding = model.dtype not in (torch.float32, torch.float64)
    with in_single_precision(model):
        values = run(model, _program(ids, keep=where)).activations
        for target, value in values.items():
            slope = gradients[target].to(value)
            if not bool(slope.any()):
                continue  # a dead part, which no edit changes
            length = float(value.square().sum().sqrt()) if bool(value.any()) else 1.0
            changed = expected = 0.0
            for share in STEPS:  # what comes of curvature shrinks with the step; what comes of a wrong accessor stays
                step = slope * (share * length / float(slope.square().sum().sqrt()))
                ends = [
                    run(model, _program(ids, edits=(Edit(address(*target), sign * step, "add"),), metric=metric, answers=answers)) for sign in (-1, 1)
                ]
                changed = (_value(ends[1]) - _value(ends[0])) / 2
                expected = float((slope * step).sum())
                if abs(changed - expected) <= (0.3 if own_rounding else 0.1) * abs(expected):
                    break
            else:
                where_to = "" if target[1] is None else f" in layer {target[1]}"
                return {kind: f"an edit{where_to} changes the logits by {changed:.3g} where the gradient says {expected:.3g} (write, or pull?)"}
    return {}


def _tested_architecture(model: BridgedModel) -> Architecture:
    arch = model.arch
    length = _length(arch)
    tokens = trial(model, length, seed=0).tokens
    tokens[1] = (tokens[0] + 1 + torch.arange(length, device=model.device)) % arch.vocab_size
    with in_single_precision(model):
        arch = _measured(model, replace(arch, absent=arch.absent | _silent(model, tokens)), tokens[:1])
        absent = arch.absent | _changed_by_itself(_with(model, arch), tokens)
    absent |= _dropped(_with(model, replace(arch, absent=absent)), tokens)
    with in_single_precision(model):
        absent |= probe(_with(model, replace(arch, absent=absent)), tokens)
        tested = _with(model, replace(arch, absent=absent))
        absent |= _bypassing(tested, tokens)
        _check_stream(model, absent)
    return replace(arch, absent=absent, places=checked_places(tested, tokens[:1]))


def _length(arch: Architecture) -> int:
    """A length that is no other size of the model, so that a shape tells which axis is the position."""
    sizes = {arch.n_heads, arch.n_kv_heads, arch.d_head, arch.d_model, arch.d_mlp, 2}
    longest = arch.n_positions or 12
    return next((length for length in range(6, 12) if length not in sizes and length <= longest), min(6, longest))


def _check_stream(model: BridgedModel, absent: dict[str, str]) -> None:
    for kind in ("resid_pre", "resid_post"):
        if kind in absent:
            raise ModelError(f"{model.name} ({model.arch.family}) cannot be trusted: {kind} failed the self-test, {absent[kind]}.")


def _with(model: BridgedModel, arch: Architecture) -> BridgedModel:
    """The model with a provisional architecture."""
    return BridgedModel(model.bridge, model.hooks, model.name, arch, model.dtype, model.device)


def _program(tokens: Int[Tensor, "row pos"], **options: Any) -> Program:
    return Program(tokens, row_numbers(tokens), **options)


def _every(model: BridgedModel) -> tuple[Target, ...]:
    return _all(model.arch.sites, model.arch)


def _measured(model: BridgedModel, arch: Architecture, tokens: Int[Tensor, "one pos"]) -> Architecture:
    """The architecture with sizes read off a run, and without sites whose activations have another shape or look ahead.

    Structural zeros and prefixes rest on causality: no token may change anything before it.

    Raises:
        ModelError: not even the logits are causal.
    """
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % arch.vocab_size
    provisional, absent, n_rows, length = _with(model, arch), dict(arch.absent), 2, tokens.shape[1]
    hosts = {target: arch.accessors[target[0]].host(target[1]) for target in _all(arch.sites, arch)}
    result = run(provisional, _program(torch.cat([tokens, other]), hooks=tuple(dict.fromkeys(hosts.values())), logits="all"))
    _check_stream(model, absent)
    one, two = (logits := _logits(result))[:, :-1]
    if (worst := _difference(two, one)) > tolerance():
        raise ModelError(
            f"{model.name} ({arch.family}) is not a causal language model: the last token changes the logits before it (by {worst:.2g} "
            f"of their scale). patchlab needs a decoder-only model."
        )
    widths: dict[str, int] = {}
    for kind in arch.sites:
        shapes = {layer: tuple(result.hooks[hosts[kind, layer]].shape) for _, layer in arch.targets(kind)}
        problem, widths[kind] = _width(kind, shapes, arch, (n_rows, length))
        if problem is not None:
            absent[kind] = problem
            continue
        dim = KINDS[kind].dim(KINDS[kind].position)
        values = [arch.accessors[kind].shape(result.hooks[hosts[kind, layer]]).narrow(dim, 0, length - 1) for layer in shapes]
        if (worst := max(_difference(value[1], value[0]) for value in values)) > tolerance():
            absent[kind] = (
                f"the last token changes it at earlier positions (by {worst:.2g} of its scale), so its positions are not those of the prompt"
            )
    for one_kind, other_kind, what in (("q", "k", "a gate"), ("v", "z", "a norm or a gate")):
        if not {one_kind, other_kind} & set(absent) and widths[one_kind] != widths[other_kind]:
            absent[one_kind] = (
                f"it is {widths[one_kind]} wide per head and {other_kind} {widths[other_kind]}, so it is something else as well ({what}?)"
            )
    sizes: dict[str, Any] = {"vocab_size": int(logits.shape[-1])}
    sizes |= {} if "mlp_post" in absent else {"d_mlp": widths["mlp_post"]}
    sizes |= {} if "z" in absent else {"d_head": max(widths[kind] for kind in ("q", "z") if kind not in absent)}
    sizes |= {} if "input" in absent or widths["input"] == arch.d_model else {"d_input": widths["input"]}
    return replace(arch, absent=absent, **sizes)


def _width(kind: str, shapes: dict[int | None, tuple[int, ...]], arch: Architecture, rows_and_length: tuple[int, int]) -> tuple[str | None, int]:
    """What is wrong with the shapes of a site's activation, and its size per position (and head)."""
    rows, length = rows_and_length
    about = KINDS[kind]
    heads = None if about.unit is None or about.width is None else arch.size(about.unit)
    last = f"{heads} heads * d" if heads is not None else f"d_model {arch.d_model}" if about.width is not None else str(about.unit)
    expected = f"[row {rows}, pos {length}, {last}]"
    if about.source is not None:
        expected = f"[row {rows}, head {arch.n_heads}, dest {length}, src {length}]"
    first = next(iter(shapes.values()))
    for layer, shape in shapes.items():
        if about.source is not None:
            fits = shape == (rows, arch.n_heads, length, length)
        elif heads is not None:
            fits = shape[:2] == (rows, length) and (shape[2:3] == (heads,) if len(shape) == 4 else len(shape) == 3 and shape[2] % heads == 0)
        else:
            fits = len(shape) == 3 and shape[:2] == (rows, length) and (kind in ("input", "mlp_post") or shape[2] == arch.d_model)
        where = "" if layer is None else f" in layer {layer}"
        if not fits:
            return f"its activation has the shape {list(shape)}{where} where {expected} is expected", 0
        if shape != first:
            return f"its activation has the shape {list(shape)}{where} and {list(first)} in layer 0, so layers differ in size", 0
    return None, first[-1] if heads is None or len(first) == 4 else first[-1] // heads


def _silent(model: BridgedModel, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites whose hook does not fire exactly once."""
    try:
        run(model, _program(tokens, keep=_every(model)))
        return {}
    except InterventionError:
        pass  # some hook is silent: find out which
    found: dict[str, str] = {}
    for kind in model.arch.sites:
        try:
            run(model, _program(tokens, keep=model.arch.targets(kind)))
        except InterventionError as error:
            found[kind] = str(error)
    return found


def _changed_by_itself(model: BridgedModel, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites where patching a run with its own values changes a bit of the logits."""
    found: dict[str, str] = {}
    plain = run(model, _program(tokens, keep=_every(model), logits="all"))
    for kind in model.arch.sites:
        patched = run(model, _program(tokens, edits=_edits(model.arch.targets(kind), plain.as_source()), logits="all"))
        if not torch.equal(_logits(plain), _logits(patched)):
            found[kind] = f"a run patched with its own {kind} differs by {_difference(_logits(plain), _logits(patched)):.2g} in the logits"
    return found


def _dropped(model: BridgedModel, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites whose returned tensor is not what the rest of the model is computed from, or from which no gradient comes back.

    A gradient of zero alone says nothing: a part may be dead, and then no edit of it changes anything.
    """
    answers = trial(model, tokens.shape[1]).answers
    gradients: dict[Target, Tensor] = {}
    found: dict[str, str] = {}

    def collect(where: tuple[Target, ...]) -> None:
        gradients.update(run(model, _program(tokens, gradients=where, metric=every_logit("all"), answers=answers)).gradients)

    try:
        collect(_every(model))
    except InterventionError:  # some site is cut off: find out which
        for kind in model.arch.sites:
            try:
                collect(model.arch.targets(kind))
            except InterventionError:
                found[kind] = "an edit is dropped: the logits are not computed from what its hook returns"
    flat = [target for target, gradient in gradients.items() if not bool(gradient.any())]
    if not flat:
        return found
    one_row_each = torch.eye(len(flat) + 1, dtype=torch.bool, device=model.device)
    ids = tokens[:1].expand(len(flat) + 1, -1)
    with in_single_precision(model):
        own = run(model, _program(tokens[:1], keep=tuple(flat))).activations
        generator = torch.Generator().manual_seed(3)
        nudges = {
            target: 0.03 * torch.randn(value.shape, generator=generator).to(value) * max(float(value.std()), 1e-3) for target, value in own.items()
        }
        edits = tuple(Edit(address(*target), nudges[target], "add", rows=one_row_each[i]) for i, target in enumerate(flat))
        logits = _logits(run(model, _program(ids, edits=edits, logits="all")))
    for i, (kind, layer) in enumerate(flat):
        if _difference(logits[i], logits[-1]) > tolerance():
            found.setdefault(kind, f"an edit in layer {layer} changes the logits, but no gradient comes back")
    return found


def _bypassing(model: BridgedModel, tokens: Int[Tensor, "row pos"]) -> dict[str, str]:
    """Sites where a patch does not carry over to the next quantity downstream."""
    arch = model.arch
    both = run(model, _program(tokens, keep=_every(model), logits="all"))
    donor = Kept({key: value[:1] for key, value in both.activations.items()}, both.examples[:1])
    receiver = tokens[1:]
    found: dict[str, str] = {}

    def patched(where: tuple[Target, ...], keep: tuple[Target, ...] = (), rows: int = 1, edits: tuple[Edit, ...] | None = None) -> Result:
        return run(model, _program(receiver.expand(rows, -1), edits=_edits(where, donor) if edits is None else edits, keep=keep, logits="all"))

    residual = [(kind, layer) for kind in _RESIDUAL if kind not in arch.absent for layer in range(arch.n_layers)]
    one_row_each = torch.eye(len(residual), dtype=torch.bool, device=tokens.device)
    edits = tuple(Edit(address(kind, layer), donor, rows=one_row_each[i]) for i, (kind, layer) in enumerate(residual))
    logits = _logits(patched((), rows=len(residual), edits=edits))
    for i, (kind, layer) in enumerate(residual):
        worst = _difference(logits[i], _logits(both)[0])
        if worst > tolerance(whole=True):
            found.setdefault(kind, f"patching all of L{layer}.{kind} leaves the logits wrong by {worst:.2g} of their scale")
    if all(kind not in arch.absent for kind in _CONTRIBUTIONS):
        found |= _not_arriving(model, both, donor, patched)
    return found


def _not_arriving(model: BridgedModel, both: Result, donor: Kept, patched: Callable[..., Result]) -> dict[str, str]:
    """Contributions to the residual stream whose patch does not arrive there."""
    arch = model.arch
    found: dict[str, str] = {}
    if _imbalance(both, arch) <= tolerance(whole=True):  # the stream is a plain sum, so it must stay the sum of what is patched
        for kind in _CONTRIBUTIONS:
            got = patched(_all((kind,), arch), keep=_all(_SUM, arch))
            worst = _difference(got["L0.resid_pre"], donor.activations["resid_pre", 0]) if kind == "input" else _imbalance(got, arch)
            if worst > tolerance(whole=True):
                found[kind] = f"patching {kind} leaves the residual stream after it wrong by {worst:.2g} of its scale"
    worst = _difference(_logits(patched(_all(_CONTRIBUTIONS, arch))), _logits(both)[:1])
    if worst > tolerance(whole=True) and not found:
        found = dict.fromkeys(
            _CONTRIBUTIONS, f"patching the embedding and every attention and MLP output leaves the logits wrong by {worst:.2g} of their scale"
        )
    return found


def _all(kinds: tuple[str, ...], arch: Architecture) -> tuple[Target, ...]:
    return tuple(target for kind in kinds for target in arch.targets(kind))


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


def _value(result: Result) -> float:
    if result.values is None:
        raise ModelError("the run returned no metric.")
    return float(result.values)


def _difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the expected tensor's largest entry."""
    scale = float(expected.float().abs().max())
    return float((got.float() - expected.float()).abs().max()) / max(scale, 1e-30)
