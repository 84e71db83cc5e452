"""Trust in the node sweep, which is compared with the literal engine before its first use on a model."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters import Architecture, BridgedModel
from patchlab.engine.literal import run
from patchlab.engine.node_sweep import Cell, sweep
from patchlab.engine.program import Program, row_numbers
from patchlab.engine.session import found_once
from patchlab.engine.trust.precision import in_single_precision
from patchlab.engine.trust.trials import tolerance, trial
from patchlab.errors import PatchlabError
from patchlab.interventions import Edit
from patchlab.sites import Site


@dataclass(frozen=True)
class Support:
    """The way in which cells can be run on a model.

    ``mode`` is ``prefix`` (only what a patch can change is computed), ``replay`` (whole sequences from the patched layer on) or
    ``literal`` (one whole forward pass per cell); ``reason`` says why it is not the first.
    """

    mode: str
    reason: str = ""

    def __str__(self) -> str:
        return self.mode + (f" ({self.reason})" if self.reason else "")


def support(model: BridgedModel) -> Support:
    """The fastest way that agrees with the literal engine on this model; found out once for its sites.

    Random prompts are patched at every site kind, in the first, middle and last layer, at one position and at all.
    """
    return found_once(model, sweep_key(model), lambda: _find(model))


def sweep_key(model: BridgedModel) -> tuple[str, ...]:
    """What a session keeps :func:`support` under: a site that is added is another question."""
    return ("node sweep", *model.arch.sites)


def _find(model: BridgedModel) -> Support:
    reasons: list[str] = []
    for mode in ("prefix", "replay"):
        if (problem := _problem(model, prefix=mode == "prefix")) is None:
            return Support(mode, "; ".join(reasons))
        reasons.append(f"{mode}: {problem}")
    return Support("literal", "; ".join(reasons))


def _problem(model: BridgedModel, *, prefix: bool) -> str | None:
    """What goes wrong on random prompts, or None."""
    try:
        with in_single_precision(model):
            program, cells = _trial(model)
            expected = _literally(model, program, cells)
            got = sweep(model, program, cells, prefix=prefix)  # a block may have no use for what it is given
    except (
        PatchlabError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
    ) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
    allowed = tolerance(model.dtype)
    worst = (got - expected).abs().amax(1)
    index = int(worst.argmax())
    scale = float(expected.abs().max())
    return None if float(worst[index]) <= allowed * scale else f"{cells[index][0].address} differs by {float(worst[index]) / scale:.2g} of the scale"


def _trial(model: BridgedModel) -> tuple[Program, list[Cell]]:
    arch = model.arch
    prompts = trial(model)
    middle, length = prompts.middle, prompts.tokens.shape[1]
    donor = prompts.other(slice(middle, middle + 1))
    kinds = [kind for kind in arch.sites if kind != "input" and all(arch.in_block(*target) for target in arch.targets(kind))]
    keep = tuple(target for kind in kinds for target in arch.targets(kind))
    source = run(model, Program(donor, row_numbers(donor), keep=keep)).as_source()
    layers = sorted({0, arch.n_layers // 2, arch.n_layers - 1})
    where: list[tuple[int, ...] | None] = [(middle,), (length - 1,), None]
    here = [(kind, layer) for kind in kinds for layer in (layers if set(layers) <= _layers(arch, kind) else sorted(_layers(arch, kind))[-2:])]
    cells: list[Cell] = [(Edit(Site(kind, (), layer=layer, pos=pos), source),) for kind, layer in here for pos in where]
    return prompts.program(), cells


def _layers(arch: Architecture, kind: str) -> set[int]:
    return {layer for _, layer in arch.targets(kind) if layer is not None}


def _literally(model: BridgedModel, program: Program, cells: list[Cell]) -> Float[Tensor, "cell row"]:
    """All cells as rows of one literal run."""
    n, answers = program.tokens.shape[0], program.answers
    if answers is None:
        raise ValueError("the trial has answers")
    index = torch.arange(n).repeat(len(cells))
    owner = torch.arange(len(cells), device=program.tokens.device).repeat_interleave(n)
    edits = tuple(Edit(edit.site, edit.source, edit.op, rows=owner == i) for i, cell in enumerate(cells) for edit in cell)
    with torch.no_grad():
        values = run(model, Program(program.tokens[index], index, edits=edits, metric=program.metric, answers=answers.rows(index))).values
    if values is None:
        raise ValueError("the trial has a metric")
    return values.reshape(len(cells), n)
