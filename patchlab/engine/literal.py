"""The literal engine: one forward pass of the bridged model, with hooks for what the program says.

Each hook must fire exactly once, or the run raises: a hook that stays silent is a wrong result.
"""

from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import LOGITS, BridgedModel
from patchlab.engine.hooks import Execution, hooked, plan_of
from patchlab.engine.program import Program, Result, Target
from patchlab.engine.session import exclusive, session_of
from patchlab.engine.trust.conservation import check_rules
from patchlab.errors import InterventionError, MetricError, ModelError
from patchlab.sites import address


@exclusive
def run(model: BridgedModel, program: Program, *, cache: Any = None) -> Result:
    """Run one program literally: one forward pass, and one backward pass if it asks for gradients.

    ``cache`` is a key-value cache: the tokens follow those it holds, and the run adds their keys and values.

    Raises:
        SiteError: a site that this model lacks.
        InterventionError: an edit that does not fit, or a hook that did not fire once.
        RuleError: a composite that cannot cover a module, or a model with modules that no rule covers.
        ModelError: non-finite logits.
        MetricError: non-finite values, or a metric of the wrong shape.
    """
    if program.rules is not None:
        check_rules(model, program.rules)
    edits = session_of(model).surrounding + program.edits
    for site in [edit.address for edit in edits] + [address(*target) for target in (*program.keep, *program.gradients)]:
        model.arch.check(site)
    plan = plan_of(model, program, edits)
    at_logits = plan.pop(LOGITS, None)
    execution = Execution(model, program)
    hooks = {name: partial(execution.at_hook, name, hook) for name, hook in plan.items()}
    with torch.set_grad_enabled(bool(program.gradients or program.hook_gradients)), hooked(model.hooks, hooks):
        logits = forward(model, program, cache)
        if at_logits is not None:
            logits = execution.at_hook(LOGITS, at_logits, None, None, logits)
        for name, hook in plan.items():
            if hook.fired != 1:
                raise InterventionError(
                    f"the hook {name} fired {hook.fired} times in one forward pass of {model.name}; a site must be computed exactly once."
                )
        read = logits.float() if logits.dtype == torch.float16 and torch.is_grad_enabled() else logits
        values = None if program.metric is None else evaluate(model, program, read)
        gradients, at_hooks = _gradients(model, program, logits, read, values, execution)
    kept = {"all": logits, "answer": logits[:, -1], "none": None}[program.logits]
    rows, length = program.tokens.shape
    return Result(
        program.examples,
        None if kept is None else kept.detach(),
        None if values is None else values.detach(),
        {target: execution.activations[target] for target in program.keep},
        gradients,
        execution.hooks,
        at_hooks,
        (1, 1 if gradients or at_hooks else 0, rows * length),
    )


def forward(model: BridgedModel, program: Program, cache: Any) -> Float[Tensor, "row pos vocab"]:
    """The logits of one forward pass on the tokens of a program, of the last position alone where no more is needed."""
    needs_all = program.logits == "all" or (program.metric is not None and program.metric.reads == "all")
    options: dict[str, Any] = {} if needs_all or not model.keeps_logits else {"logits_to_keep": 1}
    options |= {"use_cache": False} if cache is None else {"past_key_values": cache}
    if "logits_to_keep" not in options:
        return model.bridge(program.tokens, return_type="logits", **options)
    # the model unembeds a strided view of the last position, with which torch would read the weights once per row
    handle = model.bridge.unembed.register_forward_pre_hook(_contiguous)
    try:
        return model.bridge(program.tokens, return_type="logits", **options)
    finally:
        handle.remove()


def _contiguous(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)


def evaluate(model: BridgedModel, program: Program, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
    """The program's metric on logits, checked to be finite.

    Raises:
        ModelError: non-finite logits.
        MetricError: non-finite values, or a metric of the wrong shape.
    """
    metric, answers = program.metric, program.answers
    if metric is None or answers is None:
        raise InterventionError("a metric needs the answers of its rows; give Program(answers=...).")
    read = logits[:, -1] if metric.reads == "answer" else logits
    read = read.float() if read.dtype in (torch.float16, torch.bfloat16) else read
    values = metric(read, answers)
    if bool((torch.isfinite(read).all() & torch.isfinite(values).all()).logical_not()):
        bad = int((~torch.isfinite(read.flatten(1)).all(1)).sum())
        if bad:
            raise ModelError(
                f"{model.name} gave non-finite logits (NaN or infinity) for {bad} of {read.shape[0]} rows in {model.dtype}. "
                f"Load it in another dtype (dtype='float32'), or check the edits."
            )
        raise MetricError(
            f"metric {metric.name!r} is not finite for {int((~torch.isfinite(values)).sum())} of {values.shape[0]} rows, though the logits are."
        )
    return values


def _gradients(
    model: BridgedModel,
    program: Program,
    logits: Float[Tensor, "row pos vocab"],
    read: Float[Tensor, "row pos vocab"],
    values: Float[Tensor, " row"] | None,
    execution: Execution,
) -> tuple[dict[Target, Tensor], dict[str, Tensor]]:
    """Gradients of the summed metric: examples do not interact, so each row is its own example's gradient.

    Where edits replace everything downstream of a site, its gradient is zero. Without them a site that no gradient reaches is an error.
    In float16, where small gradients (of a probability near 0 or 1) would be lost, every row's gradient is multiplied by the power of
    two that makes its largest entry at the logits about 1, and is divided by it at the end, in float32. ``read`` is then the float32 copy
    of the logits that the metric was given.

    Raises:
        InterventionError: no gradient reaches a site.
        ModelError: a gradient overflows in float16.
    """
    accessors, leaves = model.arch.accessors, {**execution.leaves, **execution.raw_leaves, **execution.more_leaves}
    if not leaves or values is None:
        return {}, {}
    lift = None
    if values.requires_grad:
        unique = list({id(leaf): leaf for leaf in leaves.values()}.values())
        split = program.attention != "joint"
        if read is logits:
            grads = torch.autograd.grad(values.sum(), unique, allow_unused=True, retain_graph=split)
        else:
            (at_logits,) = torch.autograd.grad(values.sum(), read)
            lift = torch.ldexp(torch.ones_like(values), -torch.frexp(at_logits.flatten(1).abs().amax(1)).exponent)
            arriving = (at_logits * _along_rows(lift, at_logits)).to(logits.dtype)
            grads = torch.autograd.grad(logits, unique, arriving, allow_unused=True, retain_graph=split)
        found = dict(zip(map(id, unique), grads, strict=True))
    elif session_of(model).surrounding and not logits.requires_grad:
        found, split = {}, False
    else:
        raise InterventionError("the metric does not depend on the sites whose gradient is asked for (it must be differentiable in the logits).")
    gradients: dict[Any, Tensor] = {}
    for key, leaf in leaves.items():
        gradient = found.get(id(leaf))
        if gradient is None and not (session_of(model).surrounding or program.edits):
            target = key[0] if isinstance(key[0], tuple) else key
            where = f"the hook {key}" if isinstance(key, str) else f"{target[0]} of layer {target[1]}"
            raise InterventionError(f"no gradient reaches {where}; under these rules it cannot be scored.")
        gradients[key] = torch.zeros_like(leaf) if gradient is None else gradient
    at_sites = {key: accessors[key[0]].at(key[1]).pull(leaf, gradients[key]) for key, leaf in execution.leaves.items()}
    for (target, part), leaf in execution.more_leaves.items():
        accessor = accessors[target[0]].at(target[1]).parts()[part]
        at_sites[target] = at_sites[target] + accessor.pull(leaf, gradients[target, part])
    if split:
        at_sites |= _split(model, program, execution, gradients)
    at_hooks = {name: gradients[name] for name in execution.raw_leaves}
    if lift is None:
        return at_sites, at_hooks
    return {key: _lowered(model, key, value, lift) for key, value in at_sites.items()}, {
        name: _lowered(model, name, value, lift) for name, value in at_hooks.items()
    }


def _along_rows(factor: Float[Tensor, " row"], value: Float[Tensor, "row *rest"]) -> Float[Tensor, "row *ones"]:
    return factor.reshape(-1, *[1] * (value.ndim - 1))


def _lowered(model: BridgedModel, key: Target | str, value: Float[Tensor, "row *rest"], lift: Float[Tensor, " row"]) -> Float[Tensor, "row *rest"]:
    """A gradient in float32 without the factor that it was multiplied by."""
    if not bool(torch.isfinite(value).all()):
        where = key if isinstance(key, str) else str(address(*key))
        raise ModelError(f"the gradient at {where} of {model.name} overflows in float16. Load it with dtype='bfloat16' or 'float32'.")
    return value.float() / _along_rows(lift, value)


def _split(model: BridgedModel, program: Program, execution: Execution, gradients: dict[Any, Tensor]) -> dict[Target, Tensor]:
    """Gradients at k and v by the query head (and position) that reads them: from the gradient at z of that head alone, through its layer."""
    arch = model.arch
    found: dict[Target, Tensor] = {}
    for layer in sorted({layer for kind, layer in program.gradients if kind in ("k", "v") and layer is not None}):
        kinds = [kind for kind in ("k", "v") if (kind, layer) in execution.leaves]
        z, inputs = execution.leaves["z", layer], [execution.leaves[kind, layer] for kind in kinds]
        at_z = arch.accessors["z"].shape(gradients["z", layer])
        copies = arch.n_heads // arch.n_kv_heads
        dests = list(range(at_z.shape[1])) if program.attention == "dest" else [None]
        parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        for dest in dests:
            shares: list[tuple[Tensor, ...]] = []
            for copy in range(copies):
                mask = torch.zeros_like(at_z)
                chosen = slice(None) if dest is None else slice(dest, dest + 1)
                mask[:, chosen, copy::copies] = at_z[:, chosen, copy::copies]
                shares.append(torch.autograd.grad(z, inputs, mask.reshape(z.shape), retain_graph=True, allow_unused=True))
            for kind, leaf, *of_copies in zip(kinds, inputs, *shares, strict=True):
                whole = [arch.accessors[kind].shape(torch.zeros_like(leaf) if share is None else share) for share in of_copies]
                parts[kind].append(rearrange(whole, "copy row pos kv_head d -> row pos (kv_head copy) d"))  # query head = kv head * copies + copy
        for kind in kinds:
            found[kind, layer] = parts[kind][0] if dests == [None] else torch.stack(parts[kind], 1)
    return found
