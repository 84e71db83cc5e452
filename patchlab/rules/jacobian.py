"""A norm's derivative at given inputs, under a rule or none, applied to many vectors at once.

Edges need it outside of a backward pass: what reaches one head's queries is taken back through the norm before them, and what one
head writes is pushed through a norm that follows the attention.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import NormPlace
from patchlab.rules.nonlinear import LNRule
from patchlab.rules.rule import NormRule


def norm_vjp(
    rule: NormRule | None,
    place: NormPlace,
    x: Float[Tensor, "row pos d"],
    scale: Float[Tensor, "row pos 1"],
    gradients: Float[Tensor, "row pos n d"],
) -> Float[Tensor, "row pos n d"]:
    """Gradients at the norm's output as gradients at its input ``x``: ``Jᵀg``, with ``scale`` the norm's denominator there.

    Without a rule ``Jᵀg = (u − mean(u) − x̂ · mean(x̂u)) / s``, ``u = wg`` (no centring for RMSNorm); the LN-rule drops the last term.
    """
    weighted = gradients.to(scale.dtype)
    if place.weight is not None:
        weighted = weighted * place.weight
    if rule is None or type(rule) is LNRule:
        return _project(rule, place, x, scale, weighted)
    wide = x.to(scale.dtype).unsqueeze(2).expand_as(gradients).detach().requires_grad_()
    with torch.enable_grad():
        y = rule.surrogate(place, wide, scale.detach().unsqueeze(2))
        return torch.autograd.grad(y, wide, gradients.to(y.dtype))[0]


def norm_jvp(
    rule: NormRule | None,
    place: NormPlace,
    x: Float[Tensor, "row pos d"],
    scale: Float[Tensor, "row pos 1"],
    changes: Float[Tensor, "row pos n d"],
) -> Float[Tensor, "row pos n d"]:
    """Small changes of the norm's input as changes of its output: ``Jδ``."""
    if rule is None or type(rule) is LNRule:
        change = _project(rule, place, x, scale, changes.to(scale.dtype))
        return change if place.weight is None else change * place.weight
    wide = x.to(scale.dtype).unsqueeze(2).expand_as(changes).detach().requires_grad_()
    with torch.enable_grad():
        # Jᵀu is linear in u: its derivative in the direction of the changes is Jδ
        y = rule.surrogate(place, wide, scale.detach().unsqueeze(2))
        u = torch.zeros_like(y, requires_grad=True)
        back = torch.autograd.grad(y, wide, u, create_graph=True)[0]
        return torch.autograd.grad(back, u, changes.to(back.dtype))[0]


def _project(
    rule: NormRule | None, place: NormPlace, x: Float[Tensor, "row pos d"], scale: Float[Tensor, "row pos 1"], vectors: Float[Tensor, "row pos n d"]
) -> Float[Tensor, "row pos n d"]:
    """The symmetric part of the Jacobian: centring, minus (without a rule) what changes the denominator."""
    if place.centred:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    if rule is None:
        unit = x.to(scale.dtype)
        unit = (((unit - unit.mean(-1, keepdim=True)) if place.centred else unit) / scale).unsqueeze(2)
        vectors = vectors - unit * (vectors @ unit.mT) / x.shape[-1]
    return vectors / scale.unsqueeze(2)
