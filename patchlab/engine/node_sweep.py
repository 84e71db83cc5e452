"""The fast exact engine: many patched runs that share their baseline, computed only where they differ from it.

A *cell* is a set of edits. Its run equals the baseline's before the first edited layer and, because attention is causal,
before the first edited position; so it starts from the baseline's residual stream there, with the baseline's keys and
values standing in for the earlier positions. Cells with one start position form a wave: each joins at its layer, and the
model's own blocks run on all rows of the wave at once.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import Accessor, BridgedModel
from patchlab.engine.hooks import canonical, hooked
from patchlab.engine.pending import Pending, Room, in_parts
from patchlab.engine.program import Program
from patchlab.engine.replay import Baseline, Prefix, Template, baseline, empty_cache, template, unembed
from patchlab.engine.session import exclusive, session_of
from patchlab.errors import InterventionError
from patchlab.interventions import Edit
from patchlab.metrics import Answers, Metric
from patchlab.sites import KINDS

Cell = tuple[Edit, ...]
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 65536
"""Rows × positions of one block call: what a CPU's caches hold (measured best from d_model 64 to 768), enough work for a GPU."""


@dataclass
class Work:
    """Work of a sweep: block × row × position triples, whole forward passes, cells, and how many of these had room in memory at once."""

    block_positions: int = 0
    forwards: int = 0
    cells: int = 0
    room: Room = field(default_factory=Room)


@exclusive
def sweep(
    model: BridgedModel,
    program: Program,
    cells: Sequence[Cell],
    *,
    prefix: bool = True,
    max_tokens: int | None = None,
    start: int = 0,
    base: Baseline | None = None,
    done: Callable[[list[int], Tensor], Any] | None = None,
    skip: Collection[int] = (),
    work: Work | None = None,
) -> Float[Tensor, "cell row"]:
    """The metric of every cell's run, per row of the program.

    Args:
        model: the model.
        program: rows, examples, positions, metric and answers, shared by all cells; without edits of its own.
        cells: sets of edits; each set is one run.
        prefix: use the baseline's keys and values before the first edited position (causal attention); without, every run
            covers the whole sequence.
        max_tokens: rows × positions that go through a block at once; at most (and by default) what suits the device.
        start: no edit changes anything before this position.
        base: the baseline's run, if it was made before (with keys and values; block inputs matter from the start on).
        done: called with the numbers of the cells that are finished, and their metric, ``[cell, row]`` on the CPU; now and then on other devices.
        skip: numbers of cells whose metric is not needed. The others are computed together with the same cells as without it, so
            that not one bit changes; the values of those that are left out are NaN.
        work: counts what was computed.

    Raises:
        InterventionError: a cell at a site that no block computes.
        ModelError: non-finite logits or values of the metric.
    """
    if program.metric is None or program.answers is None:
        raise InterventionError("a sweep evaluates a metric; give the program a metric and answers.")
    for edit in (*session_of(model).surrounding, *(edit for cell in cells for edit in cell)):
        if not in_blocks(model, (edit,)):
            raise InterventionError(f"{edit.address} is read or written in several blocks; the literal engine edits it.")
    work = Work() if work is None else work
    usual = CPU_TOKENS if program.tokens.device.type == "cpu" else ACCELERATOR_TOKENS
    max_tokens = usual if max_tokens is None else min(max_tokens, usual)
    with torch.no_grad(), Pending(done, not_finite(model, program.metric)) as pending:
        if base is None:
            base, _ = baseline(model, program, cache=empty_cache() if prefix else None)
            work.forwards += 1
        rows, length = program.tokens.shape
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        values = torch.full((len(cells), rows), torch.nan, device=program.tokens.device, dtype=dtype)
        groups: dict[int, list[_Entry]] = {}
        first = dict(zip(program.positions, _lowest(program.positions), strict=True))
        for i, cell in enumerate(cells):
            entry = _entry(i, cell, program, model.arch.n_layers, max(start, _start(cell, first, length)) if prefix else 0)
            groups.setdefault(entry.start, []).append(entry)
        read = answer_columns(program)
        for where, entries in sorted(groups.items()):
            entries.sort(key=lambda entry: (entry.joins(), not entry.local))
            size = max(1, max_tokens // (rows * (length - where)))
            chunks = [entries[first : first + size] for first in range(0, len(entries), size)]
            chunks = [chunk for chunk in chunks if any(entry.index not in skip for entry in chunk)]
            spans = {length - where, *(1 for entry in entries if entry.local)} if chunks else set[int]()
            templates = {span: template(model, program, base, where, span) for span in spans}
            run = partial(_run, model, program, base, where, templates, work, read)
            for chunk in chunks:
                for some, found in in_parts(run, chunk, work.room):
                    numbers, found = [entry.index for entry in some], found.to(values.dtype)
                    values[torch.tensor(numbers, device=values.device)] = found
                    work.cells += len(some)
                    pending.add(numbers, found)
    return values


def _run(
    model: BridgedModel,
    program: Program,
    base: Baseline,
    start: int,
    templates: dict[int, Template],
    work: Work,
    read: "Columns",
    entries: Sequence["_Entry"],
) -> Float[Tensor, "cell row"]:
    return Wave(model, program, base, start, templates, entries, work, read).run()


def not_finite(model: BridgedModel, metric: Metric) -> str:
    """What to say where a patched run has no finite metric."""
    return (
        f"{model.name} gave non-finite logits in {model.dtype}, or the metric {metric.name!r} is not finite on them, in a patched run; load it in "
        f"another dtype (dtype='float32'), or check the edits."
    )


def in_blocks(model: BridgedModel, edits: Iterable[Edit]) -> bool:
    """Whether each of these edits stays within one block, as a sweep needs it."""
    return all(model.arch.in_block(edit.address.kind, edit.address.layer) for edit in edits)


@dataclass(frozen=True)
class _Entry:
    """A cell on its way into a wave: at which layer its first edit is, and whether it changes that layer at one position only."""

    index: int
    cell: Cell
    start: int
    layer: int
    local: bool

    def joins(self) -> int:
        """The first layer that runs on all positions from the start on."""
        return self.layer + self.local


def _entry(index: int, cell: Cell, program: Program, n_layers: int, start: int) -> _Entry:
    layers = [edit.address.layer for edit in cell if edit.address.layer is not None]
    if not cell or len(layers) < len(cell):
        raise InterventionError("a cell of a sweep needs edits in layers; the input is patched by the literal engine.")
    if any(edit.joint for edit in cell):
        raise InterventionError("edits that are joint are run by the literal engine, engine.run; a sweep takes them one after the other.")
    layer = min(layers)
    length = program.tokens.shape[1]
    local = start < length - 1 and layer < n_layers - 1 and all(_is_local(edit, layer, start, length) for edit in cell)
    return _Entry(index, cell, start, layer, local)


def _is_local(edit: Edit, layer: int, start: int, length: int) -> bool:
    """Whether an edit changes its layer's output only at the start position: nothing that later positions attend to within it."""
    site = edit.address
    return (
        KINDS[site.kind].layered
        and not KINDS[site.kind].attended
        and site.layer == layer
        and site.pos is not None
        and all(p % length == start for p in site.pos if isinstance(p, int))
        and all(isinstance(p, int) for p in site.pos)
    )


@dataclass
class Wave:
    """Cells with one start position, in the order in which they join; row ``c · n + e`` is cell c of example e."""

    model: BridgedModel
    program: Program
    base: Baseline
    start: int
    templates: dict[int, Template]
    entries: Sequence[_Entry]
    work: Work
    read: "Columns | None" = None
    companions: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    entering: bool = False

    def run(self) -> Float[Tensor, "cell example"]:
        """The metric of each cell."""
        span = self.program.tokens.shape[1] - self.start
        hidden = self.base.inputs[0][:0, self.start :]
        waiting = hidden
        for layer in range(self.entries[0].layer, self.model.arch.n_layers):
            hidden = torch.cat([hidden, waiting, self._whole(layer, [entry for entry in self.entries if entry.layer == layer and not entry.local])])
            waiting = self._local(layer, [entry for entry in self.entries if entry.layer == layer and entry.local])
            if hidden.shape[0]:
                active = [entry for entry in self.entries if entry.joins() <= layer]
                hidden = self.block(layer, hidden, self.templates[span], active)
        return self.metric(hidden)

    def _whole(self, layer: int, joining: list[_Entry]) -> Float[Tensor, "row pos d_model"]:
        return self.base.inputs[layer][:, self.start :].repeat(len(joining), 1, 1)

    def _local(self, layer: int, joining: list[_Entry]) -> Float[Tensor, "row pos d_model"]:
        """Rows for the next layer: the baseline's, but for the start position, which alone is computed."""
        if not joining:
            return self.base.inputs[0][:0, self.start :]
        here = self.base.inputs[layer][:, self.start : self.start + 1].repeat(len(joining), 1, 1)
        following = self._whole(layer + 1, joining)
        self.entering = True
        following[:, :1] = self.block(layer, here, self.templates[1], joining)
        self.entering = False
        return following

    def block(
        self, layer: int, hidden: Float[Tensor, "row pos d_model"], template: Template, active: list[_Entry]
    ) -> Float[Tensor, "row pos d_model"]:
        """The output of one block on rows of this wave, with the edits of the cells that are active."""
        args, kwargs = template.calls[layer]
        prefix = Prefix(self.base, self.start)
        kwargs = {name: prefix if value is not None and value is template.cache else value for name, value in kwargs.items()}
        args = tuple(prefix if value is not None and value is template.cache else value for value in args)
        if args:
            args = (hidden, *(_for_rows("", value, hidden.shape[0]) for value in args[1:]))
        else:
            kwargs["hidden_states"] = hidden
        kwargs = {name: _for_rows(name, value, hidden.shape[0]) for name, value in kwargs.items()}
        self.work.block_positions += hidden.shape[0] * hidden.shape[1]
        try:
            with hooked(self.model.hooks, self._hooks(layer, active, narrow=hidden.shape[1] > 1)):
                output: Tensor | tuple[Any, ...] | list[Any] = self.model.bridge.blocks[layer](*args, **kwargs)
        finally:
            self.companions.clear()
        return output[0] if isinstance(output, (tuple, list)) else output

    def _hooks(self, layer: int, active: list[_Entry], *, narrow: bool) -> dict[str, Callable[..., Tensor | None]]:
        """What to do at which hook of a block: edits of the surroundings on all rows, then each cell's own on its rows."""
        found: dict[str, list[tuple[Edit, int, int]]] = {}
        hooks: dict[str, Callable[..., Tensor | None]] = {}
        everywhere = [(edit, 0, len(active)) for edit in session_of(self.model).surrounding]
        own = [(edit, row, row + 1) for row, entry in enumerate(active) for edit in entry.cell]
        for edit, low, high in everywhere + own:
            site = edit.address
            if site.layer != layer:
                continue
            accessor = self.model.arch.accessors[site.kind].at(site.layer)
            companion = accessor.companion(layer)
            if isinstance(companion, str):
                hooks.setdefault(canonical(self.model, companion), partial(self._edit, [], canonical(self.model, companion), False))
            found.setdefault(canonical(self.model, accessor.host(layer)), []).append((edit, low, high))
        last = layer == self.model.arch.n_layers - 1 and self.program.metric is not None and self.program.metric.reads == "answer"
        names = (f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.mlp.hook_in")
        narrowed = {canonical(self.model, name) for name in names if name in self.model.hooks and not getattr(self.model.hooks[name], "flat", False)}
        if last and narrow:
            # past the attention of the last layer only the answer position is read; adding it to the stream broadcasts
            for name in narrowed:
                found.setdefault(name, [])
        return hooks | {host: partial(self._edit, edits, host, last and narrow and host in narrowed) for host, edits in found.items()}

    def _edit(self, edits: list[tuple[Edit, int, int]], host: str, narrow: bool, module: Any, inputs: Any, value: Tensor) -> Tensor:
        n = self.program.tokens.shape[0]
        value = value[:, -1:] if narrow else value
        value = value.clone() if edits else value
        for edit, low, high in edits:
            site = edit.address
            accessor = self.model.arch.accessors[site.kind].at(site.layer)
            name = accessor.companion(site.layer)
            rows = slice(low * n, high * n)
            companion = self.companions[canonical(self.model, name)][rows, -value.shape[1] :] if isinstance(name, str) else None
            value[rows] = self._edited(edit, accessor, value[rows], companion, high - low)
        self.companions[host] = value
        return value

    def _edited(self, edit: Edit, accessor: Accessor, host: Tensor, companion: Tensor | None, copies: int) -> Tensor:
        """The host of some rows after an edit, which sees whole sequences: positions that are not computed are blank to it."""
        own = accessor.read(host, companion)
        kind = KINDS[edit.address.kind]
        dim = kind.dim(kind.position)
        length, computed = self.program.tokens.shape[1], own.shape[dim]
        first = self.start if self.entering else length - computed
        whole = own.new_zeros([length if d == dim else size for d, size in enumerate(own.shape)])
        whole.narrow(dim, first, computed).copy_(own)
        if kind.source is not None:
            # a row of the pattern that ends at the start position lacks the later sources
            whole = torch.nn.functional.pad(whole, (0, length - whole.shape[-1]))
        examples = self.program.examples.repeat(copies)
        positions = {name: index.repeat(copies) for name, index in self.program.positions.items()}
        edited = edit.apply(whole, examples, positions).narrow(dim, first, computed)
        return accessor.write(host, companion, edited if kind.source is None else edited[..., : own.shape[-1]])

    def metric(self, hidden: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "cell example"]:
        """The metric of each cell, from the last block's output."""
        metric, answers = self.program.metric, self.program.answers
        if metric is None or answers is None:
            raise InterventionError("a sweep evaluates a metric; give the program a metric and answers.")
        n = self.program.tokens.shape[0]
        cells = hidden.shape[0] // n
        index = torch.arange(n, device=hidden.device).repeat(cells)
        if metric.reads == "all":
            logits = unembed(self.model, hidden, None)
            if self.base.logits is not None and self.start:
                logits = torch.cat([self.base.logits[:, : self.start].repeat(cells, 1, 1), logits], 1)
        else:
            columns, answers = answer_columns(self.program) if self.read is None else self.read
            logits = unembed(self.model, hidden[:, -1:], columns)[:, 0]
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        finite = torch.isfinite(logits).flatten(1).all(1)  # the host looks when it reads the values
        return torch.where(finite, metric(logits, answers.rows(index)), torch.nan).reshape(cells, n)


def _for_rows(name: str, value: Any, rows: int) -> Any:
    """An argument of a block that was seen on one row, on several: masks, and distances by row × head (BLOOM, Falcon)."""
    if not isinstance(value, Tensor):
        return value
    if name == "alibi" and value.ndim == 3:
        return value.repeat(rows, 1, 1)
    return value.expand(rows, *value.shape[1:]) if value.ndim == 4 and value.shape[0] == 1 else value


Columns = tuple[Int[Tensor, " column"] | None, Answers]


def answer_columns(program: Program) -> Columns:
    """The columns of the vocabulary that a program's metric reads (None: all), and the answers counted in them."""
    metric, answers = program.metric, program.answers
    if metric is None or answers is None:
        raise InterventionError("a sweep evaluates a metric; give the program a metric and answers.")
    if metric.columns != "answers":
        return None, answers
    columns = torch.bincount(torch.cat([answers.correct.flatten(), answers.incorrect.flatten()])).nonzero()[:, 0]
    clean = None if answers.clean_logits is None else answers.clean_logits[..., columns]
    correct, incorrect = (torch.searchsorted(columns, ids) for ids in (answers.correct, answers.incorrect))
    return columns, replace(answers, correct=correct, incorrect=incorrect, clean_logits=clean)


def _lowest(positions: Mapping[str, Int[Tensor, " row"]]) -> list[int]:
    """The lowest place of each named position, over all rows: one move for all names."""
    return torch.stack([index.amin() for index in positions.values()]).cpu().numpy().tolist() if positions else []


def _start(cell: Cell, first: Mapping[str, int], length: int) -> int:
    """First position that a cell edits, over all rows; ``first`` has that of every named position."""
    starts: list[int] = []
    for edit in cell:
        if edit.address.pos is None:
            return 0
        for position in edit.address.pos:
            starts.append(first[position] if isinstance(position, str) else position % length)
    return min(starts)
