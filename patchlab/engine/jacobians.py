"""Jacobians of a run: of one state of the residual stream by others, and of an attention score by queries and keys.

A program gives the gradient of a metric; here the whole derivative is taken, row by row of the matrix, from the graph of one forward pass,
under backward rules or none.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.adapters.places import CapPlace, ClipPlace, GatePlace, NormPlace, Place
from patchlab.engine.hooks import ruled
from patchlab.engine.session import exclusive, session_of
from patchlab.engine.trust.conservation import check_rules
from patchlab.errors import InterventionError, SiteError
from patchlab.host import precise
from patchlab.rules import Composite, LNRule


@exclusive
def state_jacobians(
    model: BridgedModel,
    tokens: Int[Tensor, "row pos"],
    layers: Sequence[int],
    target: int,
    *,
    valid: Bool[Tensor, " pos"],
    rules: Composite | None = None,
    qk_norms: bool = True,
) -> Float[Tensor, "row layer d_out d_in"]:
    """Mean over valid positions t of ``Σ_{t'} ∂resid_post[target, t'] / ∂resid_post[layer, t]``, t' valid, for each row and layer.

    One forward pass of all rows, and one backward pass per dimension of the stream: a one-hot cotangent at every valid position of the
    target at once. That of positions before t is zero where attention is causal.

    Args:
        model: with causal attention.
        tokens: rows of one length; they do not interact.
        layers: below the target.
        target: the layer whose output is differentiated.
        valid: the positions that count, as source and as target.
        rules: backward rules; None for the plain derivative.
        qk_norms: whether rules for norms also sit on norms of queries and keys.

    Raises:
        RuleError: rules that cannot cover the model.
        InterventionError: a surrounding ``intervene``, which this pass would not see.
    """
    _alone(model, "a fit of Jacobians")
    places: tuple[Place, ...] = () if rules is None else _places(model, rules, qk_norms)
    names = {layer: f"blocks.{layer}.hook_resid_post" for layer in (*layers, target)}
    attached = () if rules is None else rules.attach(places)
    with torch.enable_grad(), ruled(model, attached, names.values()) as leaves:
        model.bridge(tokens, return_type="logits", use_cache=False, **({"logits_to_keep": 1} if model.keeps_logits else {}))
        output, sources = leaves[names[target]], [leaves[names[layer]] for layer in layers]
        width = output.shape[-1]
        found = torch.zeros(len(tokens), len(layers), width, width, dtype=torch.promote_types(output.dtype, torch.float32), device=output.device)
        cotangent = torch.zeros_like(output)
        for dim in range(width):
            cotangent.zero_()
            cotangent[:, valid, dim] = 1.0
            gradients = torch.autograd.grad(output, sources, cotangent, retain_graph=dim < width - 1)
            for i, gradient in enumerate(gradients):
                found[:, i, dim] = gradient[:, valid].to(found.dtype).mean(1)
    return found


def _places(model: BridgedModel, rules: Composite, qk_norms: bool) -> tuple[Place, ...]:
    check_rules(model, rules)
    left_out = () if qk_norms else (".attn.q_norm", ".attn.k_norm")
    return tuple(place for place in model.arch.places if not place.name.endswith(left_out))


@exclusive
def score_forms(
    model: BridgedModel,
    tokens: Int[Tensor, "row pos"],
    layer: int,
    head: int,
    dest: Int[Tensor, " row"],
    src: Int[Tensor, " row"],
) -> tuple[Float[Tensor, "row d_q d_k"], Float[Tensor, " row"], Float[Tensor, "row d_q"], Float[Tensor, "row d_k"]]:
    """The bilinear form M of an attention score, ``score = q·M·k + rest``, before any soft cap, and the score, query and key themselves.

    M holds the scale of the scores and the rotation of both positions; norms of queries and keys are linear with their denominators held
    at this run's. It is the second derivative of the score by query (at ``dest``) and key (at ``src``): d_head backward passes through the attention.

    Raises:
        SiteError: scores that no hook shows, or queries and keys that are clamped or gated on their way.
        InterventionError: a surrounding ``intervene``.
    """
    _alone(model, "an attribution of attention scores")
    name = f"blocks.{layer}.attn"
    inside = [place for place in model.arch.places if place.name.startswith(f"{name}.")]
    _check_bilinear(model, name, inside)
    norms = tuple(place for place in inside if isinstance(place, NormPlace) and place.name.endswith(("q_norm", "k_norm")))
    hooks = [f"{name}.hook_q", f"{name}.hook_k", f"{name}.hook_attn_scores", f"{name}.hook_pattern"]
    rows = torch.arange(len(tokens), device=tokens.device)
    with torch.enable_grad(), ruled(model, Composite("held", norm=LNRule()).attach(norms), hooks) as leaves:
        model.bridge(tokens, return_type="logits", use_cache=False, **({"logits_to_keep": 1} if model.keeps_logits else {}))
        q, k, scores, pattern = (leaves[hook] for hook in hooks)
        _check_scores(model, name, scores[rows, head, dest].detach(), pattern[rows, head, dest].detach(), src)
        wide = torch.promote_types(scores.dtype, torch.float32)
        score = scores[rows, head, dest, src].to(wide)
        for place in inside:
            if isinstance(place, CapPlace):
                score = place.cap * (score / place.cap).atanh()
        by_query = model.arch.accessors["q"].shape(torch.autograd.grad(score.sum(), q, create_graph=True)[0])[rows, dest, head]
        kv_head = head * model.arch.n_kv_heads // model.arch.n_heads
        forms: list[Tensor] = []
        for dim in range(by_query.shape[-1]):
            (gradient,) = torch.autograd.grad(by_query[:, dim].sum(), k, retain_graph=True)
            forms.append(model.arch.accessors["k"].shape(gradient)[rows, src, kv_head].to(wide))
        query, key = model.arch.accessors["q"].shape(q)[rows, dest, head], model.arch.accessors["k"].shape(k)[rows, src, kv_head]
    return torch.stack(forms, 1).detach(), score.detach(), query.detach().to(wide), key.detach().to(wide)


def _check_scores(
    model: BridgedModel, name: str, scores: Float[Tensor, "row src"], pattern: Float[Tensor, "row src"], src: Int[Tensor, " row"]
) -> None:
    """Check that the pattern is the softmax of what the hook of the scores shows, on the entries that are attended to."""
    tiny = torch.finfo(pattern.dtype).tiny
    if not bool((pattern.gather(1, src[:, None]) > 0).all()):
        raise SiteError(f"{name} of {model.name} does not attend there: the position is masked (later than the other, or outside of its window).")
    pattern, scores = precise(pattern), precise(scores)
    seen = pattern > tiny
    off = pattern.log() - scores
    spread = off.masked_fill(~seen, -torch.inf).amax(1) - off.masked_fill(~seen, torch.inf).amin(1)
    if bool((spread > 0.05 + 0.01 * scores.masked_fill(~seen, 0.0).abs().amax(1)).any()):
        raise SiteError(
            f"the hook {name}.hook_attn_scores of {model.name} does not show the scores whose softmax is the pattern (the softmax runs where no hook "
            f"of the Bridge reaches it), so there is no score to take apart."
        )


def _check_bilinear(model: BridgedModel, name: str, inside: Sequence[Place]) -> None:
    missing = [hook for hook in ("hook_q", "hook_k", "hook_attn_scores", "hook_pattern") if f"{name}.{hook}" not in model.hooks]
    if missing:
        raise SiteError(f"{model.name} has no hooks {', '.join(missing)} at {name}, so the scores of its attention cannot be taken apart.")
    for place in inside:
        if isinstance(place, (ClipPlace, GatePlace)):
            what = "clamped" if isinstance(place, ClipPlace) else "gated"
            raise SiteError(f"queries and keys of {model.name} are {what} ({place.name}), so an attention score is no sum over pairs of their parts.")


def _alone(model: BridgedModel, what: str) -> None:
    if session_of(model).surrounding:
        raise InterventionError(f"{what} does not see the edits of a surrounding pl.intervene; run it outside of the block.")
