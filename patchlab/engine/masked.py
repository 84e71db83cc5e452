"""Circuit runs of a model: every reader gets the stream with all writers ablated, plus what its kept edges restore.

``x_r = rest + Σ_u ablated_u + Σ_u keep[u, r] · (current_u − ablated_u)`` over the writers u before the reader r, where ``current_u`` is
what u writes in this very run, so that an ablation acts through everything downstream. ``rest`` is what no writer brings: positional
embeddings and output biases of the attention. Many circuits are rows of one forward pass of the Bridge: the queries, keys and values
are written at their hooks, the MLPs' inputs and the last block's output at theirs, each from ``x_r`` through the model's own norm and
linear map; what the blocks add up in between is not read.

Where query heads share a key-value head, each row is run once per copy, with copy j's keys and values in row copy j, and a head's output
is taken from its own. Where a norm follows the attention (Gemma 2), the heads' outputs before it are mixed, and every reader gets the norm
of its own mixture: ``norm(Σ_h ablated_h + keep[h, r] · (current_h − ablated_h) + bias)``, as if the model ran with these heads. In the
``frozen`` form the norm's denominator is that of the run itself, and heads are writers like all others.

Source: Goldowsky-Dill et al. 2023 (path patching); Conmy et al. 2023; the interface is that of EAP-IG's ``evaluate_graph``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from patchlab.adapters import BridgedModel
from patchlab.engine.contributions import Contributions, Layer, contributions, has_post_norm, layers_of, norm_over_heads
from patchlab.engine.hooks import canonical, hooked
from patchlab.engine.literal import evaluate, forward, run
from patchlab.engine.memory import block_numbers, itemsize
from patchlab.engine.pending import empty_cache, is_out_of_memory
from patchlab.engine.program import Program
from patchlab.engine.session import exclusive, found_once, session_of
from patchlab.engine.trust.precision import in_single_precision
from patchlab.engine.trust.trials import every_logit, tolerance, trial
from patchlab.errors import InterventionError, ModelError
from patchlab.graph import Graph
from patchlab.interventions import Edit

CPU_BYTES, ACCELERATOR_BYTES = 2**26, 2**33
"""Memory for the activations of one forward pass, unless a budget is given: what is fastest on a CPU, enough work for a GPU."""


@exclusive
def run_circuits(
    model: BridgedModel,
    program: Program,
    ablated: Contributions,
    keep: Bool[Tensor, "circuit writer reader *where"],
    *,
    max_bytes: int | float | None = None,
    done: Callable[[int], Any] | None = None,
) -> Float[Tensor, "circuit row"]:
    """The metric of every circuit, per row of the program.

    Args:
        model: the model.
        program: rows, metric and answers; the tokens on which the kept edges run (the clean ones). Without edits or rules.
        ablated: what the edges outside a circuit carry. The result is differentiable in it.
        keep: the edges of each circuit; ``[circuit, writer, reader, pos]`` where they depend on the position that reads, and
            ``[circuit, writer, reader, row, pos]`` where that differs from row to row.
        max_bytes: memory for the activations of one forward pass; circuits and rows are cut into as many passes as it takes, and into smaller
            ones where memory runs out.
        done: called with the number of circuits × rows finished, after each pass.

    Returns:
        Values in the metric's unit.

    Raises:
        InterventionError: shapes that do not fit, pairs that are no edges, a program with edits, surrounding edits.
        ModelError: a model whose blocks are not put together as the graph says, or non-finite logits.

    Example:
        >>> empty = torch.zeros(1, *model.arch.graph.allowed.shape, dtype=torch.bool)  # doctest: +SKIP
        >>> run_circuits(model, program, contributions(model, batch.corrupted), empty)  # doctest: +SKIP
    """
    _check(model, program, ablated, keep)
    found_once(model, ("circuits", ablated.form), lambda: _check_model(model, ablated.form))
    budget = pass_bytes(model) if max_bytes is None else max_bytes
    fitting = max(1, int(budget // row_bytes(model, program.tokens.shape[1])))
    while True:
        try:
            return _passes(model, program, ablated, keep, fitting, done)
        except RuntimeError as error:
            if fitting == 1 or not is_out_of_memory(error):
                raise
        empty_cache()
        fitting //= 2


def _passes(
    model: BridgedModel,
    program: Program,
    ablated: Contributions,
    keep: Bool[Tensor, "circuit writer reader *where"],
    fitting: int,
    done: Callable[[int], Any] | None,
) -> Float[Tensor, "circuit row"]:
    """The metric of every circuit, of ``fitting`` rows of circuits at once."""
    rows = program.tokens.shape[0]
    each, layers = min(rows, fitting), layers_of(model)
    parts: list[Tensor] = []
    for circuits in slices(keep.shape[0], max(1, fitting // rows)):
        of_rows: list[Tensor] = []
        for part in slices(rows, each):
            chunk = keep[circuits][:, :, :, part] if keep.ndim == 5 and keep.shape[3] > 1 else keep[circuits]
            of_rows.append(_one_pass(model, layers, _part(program, part), ablated.circuits(circuits).rows(part), chunk))
            if done is not None:
                done(of_rows[-1].numel())
        parts.append(torch.cat(of_rows, 1))
    return torch.cat(parts)


def pass_bytes(model: BridgedModel) -> int:
    """Memory for the activations of one forward pass where no budget is given, in bytes."""
    return CPU_BYTES if model.device.type == "cpu" else ACCELERATOR_BYTES


def row_bytes(model: BridgedModel, length: int) -> int:
    """Memory that one row of one circuit takes, in bytes: the writers' differences, the inputs of one kind of reader, a block."""
    arch = model.arch
    read = 12 if has_post_norm(model) else 4  # the norm of what each reader reads of one attention, beside the sum so far
    width = (len(arch.graph.writers) + read * arch.n_heads) * arch.d_model
    return length * (width + arch.graph.copies * block_numbers(model, length)) * itemsize(model)


@dataclass
class _Pass:
    """One forward pass over circuits × copies × rows: what the writers have written so far, and the stream with all of them ablated."""

    graph: Graph
    layers: list[Layer]
    ablated: Float[Tensor, "sets writer own_rows own_pos d_model"]
    keep: Bool[Tensor, "circuit writer reader *where"]
    rows: int
    base: Float[Tensor, "circuit row pos d_model"] = field(init=False)
    behind: Float[Tensor, "circuit row pos d_model"] = field(init=False)
    embedding: Float[Tensor, "row pos d_model"] = field(init=False)
    form: str = "renormalised"
    sums: dict[int, Float[Tensor, "sets own_rows own_pos d_model"]] = field(default_factory=dict[int, Tensor])
    written: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    buffer: Tensor | None = None
    fired: list[str] = field(default_factory=list[str])

    def hooks(self, model: BridgedModel) -> dict[str, Callable[..., Tensor | None]]:
        """What to do at which hook of the Bridge."""
        steps: dict[str, Callable[[Tensor], Tensor | None]] = {"hook_embed": self._embedded, "blocks.0.hook_resid_pre": self._started}
        for i in range(self.graph.n_layers):
            steps |= {f"blocks.{i}.attn.hook_{letter}": partial(self._into_head, i, letter) for letter in "qkv"}
            steps[f"blocks.{i}.attn.hook_z"] = partial(self._from_heads, i)
            if self.graph.mlps:
                steps |= {f"blocks.{i}.mlp.hook_in": partial(self._into_mlp, i), f"blocks.{i}.hook_mlp_out": partial(self._from_mlp, i)}
        steps[f"blocks.{self.graph.n_layers - 1}.hook_resid_post"] = self._into_logits
        missing = [name for name in steps if name not in model.hooks]
        if missing:
            raise ModelError(f"{model.name} cannot be run as a circuit: it lacks the hooks {missing[:3]}.")
        return {canonical(model, name): partial(self._fire, name, step) for name, step in steps.items()}

    def _fire(self, name: str, step: Callable[[Tensor], Tensor | None], module: Any, inputs: Any, value: Tensor) -> Tensor | None:
        self.fired.append(name)
        return step(value)

    def _embedded(self, value: Tensor) -> None:
        self.embedding = value[: self.rows]
        self._wrote(slice(0, 1), value[None, None, : self.rows])

    def _started(self, value: Tensor) -> None:
        rest = value[: self.rows] - self.embedding
        self.base = rest + self.ablated[:, 0]

    def _into_head(self, layer: int, letter: str, value: Tensor) -> Tensor:
        x = self._read(self.base, self.graph.readers_of(layer, letter))
        heads = self.layers[layer].inputs(letter, x)
        copies = self.graph.copies
        # query head = key-value head · copies + copy
        if letter == "q":
            return repeat(heads, "circuit head row pos d -> circuit copy row pos head d", copy=copies).reshape(value.shape)
        return rearrange(heads, "circuit (head copy) row pos d -> circuit copy row pos head d", copy=copies).reshape(value.shape)

    def _from_heads(self, layer: int, value: Tensor) -> None:
        copies, heads = self.graph.copies, self.graph.heads_of(layer)
        z = value.reshape(-1, copies, self.rows, value.shape[1], self.graph.n_heads // copies, copies, self.layers[layer].write.shape[1])
        z = z.diagonal(dim1=1, dim2=5).movedim(-1, 4).flatten(3, 4)  # of each head, from the rows with its own keys and values
        ablated = self.ablated[:, heads].sum(1)
        if self.form == "renormalised" and self.layers[layer].post is not None:
            self._wrote(heads, self.layers[layer].heads(z))
            self.behind, self.sums[layer] = self.base, ablated
        else:
            parts, rest = self.layers[layer].shares(z)
            self._wrote(heads, parts)
            self.behind = self.base + ablated + rest
        if not self.graph.mlps:
            self.base = self.behind

    def _into_mlp(self, layer: int, value: Tensor) -> Tensor:
        x = self._read(self.base if self.graph.parallel else self.behind, self.graph.readers_of(layer, "mlp"))
        return self._repeated(self.layers[layer].into_mlp(x)[:, 0]).reshape(value.shape)

    def _from_mlp(self, layer: int, value: Tensor) -> None:
        own = self.graph.mlp_of(layer)
        once = value.reshape(-1, self.graph.copies, self.rows, *value.shape[-2:])[:, 0]
        self._wrote(slice(own, own + 1), once[:, None])
        self.base = self.behind + self.ablated[:, own]

    def _into_logits(self, value: Tensor) -> Tensor:
        x = self._read(self.base, self.graph.readers_of(None))
        return self._repeated(x[:, 0]).reshape(value.shape)

    def _repeated(self, x: Float[Tensor, "circuit row pos d_model"]) -> Float[Tensor, "circuit copy row pos d_model"]:
        return x[:, None].expand(-1, self.graph.copies, -1, -1, -1)

    def _wrote(self, where: slice, current: Float[Tensor, "circuit writer row pos d_model"]) -> None:
        """Note the difference between what writers write in this run and what they are ablated to."""
        difference = current - self.ablated[:, where]
        if difference.requires_grad:
            self.written[where.start] = difference
            return
        if self.buffer is None:
            writers, circuits = len(self.graph.writers), self.keep.shape[0]
            self.buffer = difference.new_empty(circuits, writers, self.rows, *difference.shape[-2:])
        self.buffer[:, where] = difference

    def _read(self, base: Tensor, readers: slice) -> Float[Tensor, "circuit reader row pos d_model"]:
        """What readers read: the ablated stream plus the differences along the kept edges of the writers before them."""
        used = int(self.graph.writers_before[readers.start])
        if self.buffer is None:
            circuits = self.keep.shape[0]
            written = torch.cat([part.expand(circuits, -1, -1, -1, -1) for start, part in sorted(self.written.items()) if start < used], 1)
        else:
            written = self.buffer[:, :used]
        keep = self.keep[:, :used, readers].to(written.dtype)
        if not self.sums:
            return base[:, None] + self._restored(keep, written)
        heads = {layer: at for layer in self.sums if (at := self.graph.heads_of(layer)).stop <= used}
        inside = {writer for at in heads.values() for writer in range(at.start, at.stop)}
        others = [writer for writer in range(used) if writer not in inside]
        x = base[:, None] + self._restored(keep[:, others], written[:, others])
        for layer, here in heads.items():
            x = x + self.layers[layer].after(self.sums[layer][:, None] + self._restored(keep[:, here], written[:, here]))
        return x

    def _restored(
        self, keep: Float[Tensor, "circuit writer reader *where"], written: Float[Tensor, "circuit writer row pos d_model"]
    ) -> Float[Tensor, "circuit reader row pos d_model"]:
        """What kept edges bring back."""
        if keep.ndim == 3:
            back = torch.matmul(keep.transpose(1, 2), rearrange(written, "circuit writer row pos d -> circuit writer (row pos d)"))
            return rearrange(back, "circuit reader (row pos d) -> circuit reader row pos d", row=written.shape[2], pos=written.shape[3])
        by_row = keep[:, :, :, None] if keep.ndim == 4 else keep
        by_row = by_row.expand(-1, -1, -1, self.rows, -1)
        return einsum(by_row, written, "circuit writer reader row pos, circuit writer row pos d -> circuit reader row pos d")


def _one_pass(
    model: BridgedModel, layers: list[Layer], program: Program, ablated: Contributions, keep: Bool[Tensor, "circuit writer reader *where"]
) -> Float[Tensor, "circuit row"]:
    graph, circuits, rows = model.arch.graph, keep.shape[0], program.tokens.shape[0]
    values = ablated.values if ablated.values.ndim == 5 else ablated.values[None]
    state = _Pass(graph, layers, values, keep, rows, form=ablated.form)
    hooks = state.hooks(model)
    whole = replace(program, tokens=program.tokens.repeat(circuits * graph.copies, 1), examples=program.examples.repeat(circuits * graph.copies))
    with torch.set_grad_enabled(values.requires_grad), hooked(model.hooks, hooks):
        logits = forward(model, whole, None)
        if len(state.fired) != len(hooks):
            silent = [name for name in hooks if name not in map(partial(canonical, model), state.fired)]
            raise ModelError(f"{model.name} cannot be run as a circuit: of its hooks {silent or 'some'} did not fire once in a forward pass.")
        copied = rearrange(logits, "(circuit copy row) ... -> circuit copy row ...", circuit=circuits, row=rows)
        logits = rearrange(copied[:, 0], "circuit row ... -> (circuit row) ...")
        index = torch.arange(rows, device=logits.device).repeat(circuits)
        answers = None if program.answers is None else program.answers.rows(index)
        return evaluate(model, replace(program, answers=answers), logits).reshape(circuits, rows)


def _part(program: Program, part: slice) -> Program:
    index = torch.arange(program.tokens.shape[0], device=program.tokens.device)[part]
    answers = None if program.answers is None else program.answers.rows(index)
    return replace(program, tokens=program.tokens[part], examples=program.examples[part], answers=answers, positions={})


def slices(total: int, size: int) -> list[slice]:
    """Cuts of at most ``size``."""
    return [slice(start, min(total, start + size)) for start in range(0, total, size)]


def _check(model: BridgedModel, program: Program, ablated: Contributions, keep: Bool[Tensor, "circuit writer reader *where"]) -> None:
    if program.metric is None or program.answers is None:
        raise InterventionError("a run of circuits evaluates a metric; give the program a metric and answers.")
    if program.edits or program.rules is not None or program.gradients or session_of(model).surrounding:
        raise InterventionError("circuits are run on the model as it is; got edits, rules or gradients. Leave them out (also the surrounding ones).")
    graph, (rows, length) = model.arch.graph, program.tokens.shape
    if graph.copies > 1 and (shared := norm_over_heads(model)) is not None:
        raise ModelError(
            f"{model.name} ({model.arch.family}) cannot be run as a circuit: {shared} is one norm over the keys of all heads, and {graph.copies} "
            f"query heads share each of them, so what an edge into the key of one query head does to the others is not defined. Score nodes instead."
        )
    allowed = torch.as_tensor(graph.allowed.copy(), device=keep.device)
    if tuple(keep.shape[1:3]) != tuple(allowed.shape) or not keep.shape[0]:
        raise InterventionError(
            f"the masks have the shape {list(keep.shape)}, but {model.name} is {graph}: expected [circuit, {allowed.shape[0]}, {allowed.shape[1]}]."
        )
    if (where := tuple(keep.shape[3:])) not in ((), (length,), (rows, length), (1, length)):
        raise InterventionError(
            f"the masks have the shape {list(keep.shape)} and the run {rows} rows of {length} positions; after the readers comes "
            f"nothing, [{length}] or [{rows}, {length}]. Got {list(where)}."
        )
    if bool((keep.flatten(3).any(3) if where else keep)[:, ~allowed].any()):
        raise InterventionError("the masks keep pairs that are no edges; a writer must be computed before its reader reads (Graph.allowed).")
    expected = (len(graph.writers), rows, length, graph.d_model)
    got = tuple(ablated.values.shape[-4:])
    fits = all(have in (want, 1) if i in (1, 2) else have == want for i, (have, want) in enumerate(zip(got, expected, strict=True)))
    if not fits or (ablated.values.ndim == 5 and ablated.values.shape[0] not in (1, keep.shape[0])):
        raise InterventionError(
            f"the ablated contributions have the shape {list(ablated.values.shape)}; expected [writer {expected[0]}, row {rows}, pos {length}, "
            f"d_model {expected[3]}] (1 row or position for all), with {keep.shape[0]} in front for one set per circuit. "
            f"Ablation data must have the length of the prompts."
        )


def _check_model(model: BridgedModel, form: str) -> None:
    """See on random prompts that the full graph is the model itself, the empty one the run that the ablated values come from, and all
    edges but those out of a head the model with that head's output from there (the last but in the frozen form).

    Raises:
        ModelError: it is not; the blocks of this model are put together in another way.
    """
    arch, graph = model.arch, model.arch.graph
    prompts = trial(model)
    program, donor = prompts.program(every_logit("answer")), prompts.other(slice(None))
    allowed = torch.as_tensor(graph.allowed.copy(), device=model.device)
    sets, layer = [allowed, torch.zeros_like(allowed)], arch.n_layers // 2
    with torch.no_grad(), in_single_precision(model):
        wanted: list[Any] = [evaluate(model, program, forward(model, replace(program, tokens=row), None)) for row in (program.tokens, donor)]
        if form == "renormalised":
            sets.append(allowed.clone())
            sets[-1][graph.heads_of(layer).start] = False
            other = run(model, Program(donor, program.examples, keep=(("z", layer),))).as_source()
            wanted.append(run(model, replace(program, edits=(Edit(f"L{layer}.H0.z", other),))).values)
        got = _one_pass(model, layers_of(model), program, contributions(model, donor, form), torch.stack(sets))
    off = (got - torch.stack(wanted)).abs().amax(1) / max(float(torch.stack(wanted[:2]).abs().max()), 1e-30)
    worst = int(off.argmax())
    if float(off[worst]) > tolerance(whole=True):
        kept = ("all edges kept", "none kept", f"all kept but those out of {graph.writers[graph.heads_of(layer).start]}")[worst]
        raise ModelError(
            f"{model.name} ({arch.family}) cannot be run as a circuit: with {kept}, it differs by {float(off[worst]):.2g} of the scale "
            f"from the run of the model that it should equal. Its blocks are put together in a way that patchlab does not know."
        )
