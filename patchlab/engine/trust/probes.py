"""Probes: whether a site means what it says, tried with random values, which tell a dead part from an edit that is dropped.

The stream into every block is held, so that each block answers for itself. Then, one row per probe in a single forward pass: what
follows a site (the pattern after q and k, ...) must be a function of what the site is given, must change with it, and may change
only at the positions and heads that were touched.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.engine.hooks import canonical
from patchlab.engine.literal import run
from patchlab.engine.program import Program, Target, row_numbers
from patchlab.engine.trust.trials import tolerance
from patchlab.interventions import Edit
from patchlab.sites import address

# given the first, the second is a function of them; attention and MLP are added to a stream that is held
STEPS = (
    (("q", "k"), "pattern"),
    (("pattern", "v"), "z"),
    (("z",), "attn_out"),
    (("mlp_post",), "mlp_out"),
    (("attn_out", "mlp_out"), "resid_post"),
    (("input",), "resid_pre"),
)


@dataclass(frozen=True)
class Place:
    """What a probe touches: one position, one query head and its KV head; of the pattern what the position takes from the one before."""

    pos: int
    head: int
    kv_head: int
    copies: int

    def touched(self, kind: str, own: Float[Tensor, "row *site"]) -> Bool[Tensor, " *site"]:
        """Entries of a site."""
        mask = torch.zeros(own.shape[1:], dtype=torch.bool, device=own.device)
        if kind == "pattern":
            mask[self.head, self.pos, self.pos - 1] = True
        elif kind in ("z", "q"):
            mask[self.pos, self.head] = True
        elif kind in ("k", "v"):
            mask[self.pos, self.kv_head] = True
        else:
            mask[self.pos] = True
        return mask

    def reached(self, kind: str, following: Float[Tensor, "row *site"]) -> Bool[Tensor, " *site"]:
        """Entries of the next quantity that may change."""
        mask = torch.zeros(following.shape[1:], dtype=torch.bool, device=following.device)
        heads = slice(self.kv_head * self.copies, (self.kv_head + 1) * self.copies)
        if kind == "q":
            mask[self.head, self.pos, : self.pos + 1] = True
        elif kind == "k":
            mask[heads, self.pos :] = True
        elif kind == "v":
            mask[self.pos :, heads] = True
        elif kind == "pattern":
            mask[self.pos, self.head] = True
        else:
            mask[self.pos] = True
        return mask


@dataclass(frozen=True)
class _Row:
    """One row of the run: the sites that are given random values, which of them is turned at one place, and the prompt."""

    step: int
    turned: str | None = None
    prompt: int = 0


def probe(model: BridgedModel, tokens: Int[Tensor, "two pos"]) -> dict[str, str]:
    """Sites of a model that fail a probe, and the reason."""
    arch = model.arch
    steps = {i: step for i, step in enumerate(STEPS) if not {*step[0], step[1]} & set(arch.absent)}
    rows = [_Row(i, prompt=prompt) for i in steps for prompt in (0, 1)] + [_Row(i, kind) for i, (kinds, _) in steps.items() for kind in kinds]
    if not rows:
        return {}
    head = arch.n_heads // 2
    place = Place(tokens.shape[1] // 2, head, head * arch.n_kv_heads // arch.n_heads, arch.n_heads // arch.n_kv_heads)
    ids = tokens[[row.prompt for row in rows]]
    sites = tuple(target for kind in arch.sites if kind != "resid_mid" for target in arch.targets(kind))
    plain = run(model, Program(ids, row_numbers(ids), keep=sites)).activations
    edits = _edits(steps, rows, place, plain)
    with _Received(model, [target for target in sites if target[0] in ("z", "mlp_post")]) as received:
        got = run(model, Program(ids, row_numbers(ids), edits=edits, keep=sites)).activations
    found: dict[str, str] = {}
    for i, (kinds, following) in steps.items():
        for layer in range(arch.n_layers) if kinds != ("input",) else (0,):
            value = got[following, layer]
            first = value[rows.index(_Row(i))]
            scale = max(float(first.abs().max()), 1e-30)
            apart = _most(value[rows.index(_Row(i, prompt=1))] - first) / scale
            if following != "resid_post" and apart > tolerance():
                reason = f"with {' and '.join(kinds)} given, {following} of layer {layer} still depends on the prompt (by {apart:.2g} of its scale)"
                found |= {kind: reason for kind in kinds if kind not in found}
                continue
            for kind in kinds:
                change = (value[rows.index(_Row(i, kind))] - first) / scale
                reached = place.reached(kind, value)
                if (elsewhere := _most(change[~reached])) > tolerance():
                    what = "head and position" if kind in ("q", "k", "v", "z", "pattern") else "position"
                    found.setdefault(
                        kind,
                        f"an edit at one {what} of layer {layer} changes {following} at others as well (by {elsewhere:.2g} of its scale)",
                    )
                elif _most(change[reached]) <= tolerance() and not received.as_given(kind, layer, got):
                    found.setdefault(kind, f"an edit is dropped: random values in layer {layer} do not change {following}")
    return found


def _edits(steps: dict[int, Any], rows: list[_Row], place: Place, plain: Mapping[Target, Tensor]) -> tuple[Edit, ...]:
    """Random values where a row gives a site some, and the stream held but where the row probes the stream itself."""
    generator = torch.Generator().manual_seed(2)
    edits: list[Edit] = []
    for (kind, layer), own in plain.items():
        given = [kind in steps[row.step][0] for row in rows]
        held = [steps[row.step][1] != "resid_pre" or layer != 0 for row in rows] if kind == "resid_pre" else given
        if not any(held):
            continue
        values, random = own.clone(), _random(kind, own, generator)
        for i, row in enumerate(rows):
            if given[i]:
                values[i] = torch.where(place.touched(kind, own), -random, random) if row.turned == kind else random
        edits.append(Edit(address(kind, layer), values, rows=torch.tensor(held, device=own.device)))
    return tuple(edits)


def _random(kind: str, own: Float[Tensor, "row *site"], generator: torch.Generator) -> Float[Tensor, " *site"]:
    """Random values of the site's scale; of heads with mean zero, so that turning one changes no norm over all of them."""
    values = torch.randn(own.shape[1:], generator=generator).to(own)
    if kind == "pattern":
        return values.abs().tril()
    if kind in ("q", "k", "v", "z") and values.shape[-1] > 1:
        values = values - values.mean(-1, keepdim=True)
    scale = own.float().std()
    return values * (scale if float(scale) > 0 else 1.0)


def _most(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


class _Received:
    """What the linear maps behind sites are given: with weights of zero nothing else shows that an edit got there."""

    def __init__(self, model: BridgedModel, where: Iterable[Target]) -> None:
        self.inputs: dict[Target, Tensor] = {}
        components = [module for module in cast(Iterable[Any], model.bridge.modules()) if hasattr(module, "hook_in")]
        maps = {str(component.hook_in.name): component.original_component for component in components}
        hosts = {target: canonical(model, model.arch.accessors[target[0]].host(target[1])) for target in where}
        self.maps = {target: maps[host] for target, host in hosts.items() if maps.get(host) is not None}

    def __enter__(self) -> "_Received":
        self.handles = [module.register_forward_pre_hook(partial(self._see, target)) for target, module in self.maps.items()]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, target: Target, module: Any, inputs: Any) -> None:
        self.inputs[target] = inputs[0].detach().clone()

    def as_given(self, kind: str, layer: int, got: Mapping[Target, Tensor]) -> bool:
        """Whether the map was given, bit for bit, what the site was set to."""
        own = self.inputs.get((kind, layer))
        return own is not None and own.numel() == got[kind, layer].numel() and torch.equal(own.reshape(got[kind, layer].shape), got[kind, layer])
