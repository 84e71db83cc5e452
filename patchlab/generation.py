"""Generation: texts that a model goes on with, token by token, while edits are made at chosen steps.

    >>> import patchlab as pl
    >>> from patchlab import generation
    >>> model = pl.load_model("demo-gpt2-4l")
    >>> found = generation.generate(model, "When Mary and John went to the store, John gave a drink to", 2)
    >>> found.texts(model)
    ['Mary .']

A *step* is one forward pass: step 0 reads the prompt and gives the first new token, step t reads the token that step t − 1 gave. An edit of a step
acts at the positions which that step reads, and what it changed there stays so for the steps that follow, as they attend to it. So keys and values of
earlier positions can be kept, and the result is that of reading the whole text at each step with the edits of all steps, each at its own positions.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.engine import Program, continues, empty_cache, run, session_of
from patchlab.engine.program import row_numbers
from patchlab.errors import InterventionError
from patchlab.host import precise
from patchlab.interventions import Edit, as_edits
from patchlab.models import Model
from patchlab.sites import KINDS, Position, Site
from patchlab.sources import Source, fitted
from patchlab.tasks.task import Prompts

StepEdits = Edit | Iterable[Edit] | Callable[[int, Int[Tensor, "row pos"]], Edit | Iterable[Edit]]
"""Edits of every step, or a function of the number of a step and the token rows so far that gives those of this step."""


@dataclass(frozen=True)
class Generated:
    """What a model went on with.

    Attributes:
        prompts: token ids ``[row, pos]``.
        tokens: new ids ``[row, step]``.
        logprobs: log probability of each new token in nats, ``[row, step]``, before temperature and cut.
        lengths: how many new tokens of each row count: all, or those up to a stop token, which is not one of them.
        cached: whether keys and values were kept from step to step.
    """

    prompts: Int[Tensor, "row pos"]
    tokens: Int[Tensor, "row step"]
    logprobs: Float[Tensor, "row step"]
    lengths: Int[Tensor, " row"]
    cached: bool

    def texts(self, model: Model) -> list[str]:
        """The new tokens of each row as text.

        Raises:
            InterventionError: a model without a tokenizer.
        """
        if model.tokenizer is None:
            raise InterventionError(f"{model.name} has no tokenizer; read the ids in tokens.")
        rows = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [str(model.tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)) for ids, length in rows]

    def __repr__(self) -> str:
        return f"Generated({self.tokens.shape[0]} rows, {self.tokens.shape[1]} tokens{', cached' if self.cached else ''})"


@dataclass(frozen=True)
class _AtStep:
    """A source as an edit of one step has it: of a text as long as it was at that step, for the positions that a run holds.

    ``first`` is the position that the run begins at, ``length`` that of the text at the step, ``dim`` that of positions.
    """

    source: Source
    first: int
    length: int
    dim: int

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        inside = min(self.length - self.first, own.shape[self.dim])
        shape = list(own.shape)
        shape[self.dim] = self.length
        whole = own.new_zeros(shape)
        whole.narrow(self.dim, self.first, inside).copy_(own.narrow(self.dim, 0, inside))
        found = fitted(self.source.values(site, whole, examples), site, whole)
        values = own.clone()
        values.narrow(self.dim, 0, inside).copy_(found.narrow(self.dim, self.first, inside))
        return values


def generate(
    model: Model,
    prompts: Any,
    n_tokens: int,
    *,
    edits: StepEdits = (),
    steps: Iterable[int] | None = None,
    temperature: float | int = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: int | Iterable[int] = (),
    cache: bool = True,
) -> Generated:
    """Go on with prompts of one length.

    Args:
        model: the model. Edits of ``pl.intervene`` around the call act on the whole text at each step (and nothing is cached then).
        prompts: a text, texts, token ids, or prompts of a task (``task.prompts("clean")``), whose named positions edits of step 0 can name.
        n_tokens: new tokens per row.
        edits: of every step, or a function of ``(step, token rows so far)``. An address without a position means all positions that the step reads;
            END is the last of them; others are positions of the prompt, and act in step 0 alone. A source with positions is one of the whole text
            so far: another model's run on the rows that the function is given, for instance.
        steps: the steps at which edits are made; default all.
        temperature: 0 takes the most likely token; else tokens are drawn from the distribution with logits divided by it.
        top_k: draw from so many of the most likely tokens only.
        seed: of the draws, which depend on (seed, row, step) alone and not on what else is generated.
        stop: ids of tokens that end a row.
        cache: keep keys and values, where the model's rest of a prompt runs as in the whole; the result is the same.

    Raises:
        InterventionError: no tokens to make, a temperature below 0, a text that grows longer than the model reads, an edit of attention patterns
            (their positions are pairs), or a position that is outside of the prompt.

    Example:
        >>> generation.generate(model, text, 3, edits=pl.Edit("L2.resid_pre@END", vector, op="add"), steps=[0])  # doctest: +SKIP
    """
    given = prompts if isinstance(prompts, Prompts) else None
    tokens = model.as_tokens(prompts if given is None else given.tokens)
    named = {} if given is None else {name: at.to(model.device) for name, at in given.positions.items() if name != "END"}
    examples = row_numbers(tokens) if given is None else given.examples.to(model.device)
    start = tokens.shape[1]
    if n_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise InterventionError(
            f"generation makes at least 1 token, at a temperature of at least 0, from at least 1 of the likeliest; got n_tokens={n_tokens}, "
            f"temperature={temperature}, top_k={top_k}."
        )
    if model.n_positions is not None and start + n_tokens - 1 > model.n_positions:
        raise InterventionError(
            f"{model.name} reads {model.n_positions} positions, and {start} of the prompt with {n_tokens} new ones are more. Make at most "
            f"{model.n_positions - start + 1}."
        )
    chosen = None if steps is None else set(steps)
    ends = {stop} if isinstance(stop, int) else set(stop)
    kept = empty_cache() if cache and not session_of(model).surrounding and continues(model) else None
    before: list[tuple[int, int, Edit]] = []  # where each edit so far acts, and what it is
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    new, logprobs, lengths = [], [], torch.full((len(tokens),), n_tokens, device=tokens.device)
    for step in range(n_tokens):
        length = tokens.shape[1]
        first = 0 if step == 0 else length - 1
        own = () if chosen is not None and step not in chosen else as_edits(edits(step, tokens) if callable(edits) else edits)
        before = [*before, *((first, length, edit) for edit in own)]
        offset = 0 if kept is None else first
        acting = [one for one in before if kept is None or one[:2] == (first, length)]
        placed = tuple(edit for one in acting for edit in _placed(*one, offset, set(named)))
        program = Program(tokens[:, offset:], examples, positions=named if offset == 0 else {}, edits=placed, logits="answer")
        with torch.no_grad():
            logits = run(model, program, cache=kept).logits
        picked, logprob = _next(precise(torch.as_tensor(logits)), examples, step, temperature, top_k, seed)
        picked = picked.to(tokens.device)
        lengths = torch.where(~stopped & _among(picked, ends), step, lengths)
        stopped |= _among(picked, ends)
        new.append(picked)
        logprobs.append(logprob)
        tokens = torch.cat([tokens, picked[:, None]], 1)
        if bool(stopped.all()):
            break
    made = torch.stack(new, 1)
    return Generated(tokens[:, :start], made, torch.stack(logprobs, 1), lengths.clamp_max(made.shape[1]), kept is not None)


def _among(tokens: Int[Tensor, " row"], ids: set[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(sorted(ids), device=tokens.device, dtype=tokens.dtype))


def _placed(first: int, length: int, edit: Edit, offset: int, named: set[str]) -> tuple[Edit, ...]:
    """An edit of the step that read the positions from ``first`` up to ``length``, for a run from ``offset`` on; none where it does not act."""
    site = edit.address
    kind = KINDS[site.kind]
    if kind.source is not None:
        raise InterventionError(f"{site} lies at pairs of positions, and generation edits what one step reads; edit z or v of the head instead.")
    where: tuple[Position, ...] = tuple(range(first - offset, length - offset))
    if site.pos is not None:
        wanted = [_position(site, position, first, length, named) for position in site.pos]
        where = tuple(one - offset if isinstance(one, int) else one for one in wanted if one is not None)
        if not where:
            return ()
    source = _AtStep(edit.values_from, offset, length, kind.dim(kind.position))
    return (replace(edit, site=replace(site, pos=where), source=source),)


def _position(site: Site, position: Position, first: int, length: int, named: set[str]) -> Position | None:
    """A position of an address at a step: a number, a name that rows have each their own of, or None where it does not act."""
    if position == "END":
        return length - 1
    if isinstance(position, str):
        if position not in named:
            raise InterventionError(
                f"{site} names the position {position!r}; this prompt knows {', '.join(sorted(named)) or 'no names'}, END and integers."
            )
        return position if first == 0 else None
    if first:
        return None
    if not -length <= position < length:
        raise InterventionError(f"{site} names position {position}, but the prompt has {length} positions (0 to {length - 1}).")
    return position % length


def _next(
    logits: Float[Tensor, "row vocab"], examples: Int[Tensor, " row"], step: int, temperature: float | int, top_k: int | None, seed: int
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """The next token of each row, and its log probability."""
    plain = logits.log_softmax(-1)
    if temperature == 0:
        picked = plain.argmax(-1)
    else:
        scaled = logits / temperature
        if top_k is not None and top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k, -1).values[:, -1:], -torch.inf)
        below = scaled.softmax(-1).cumsum(-1)
        drawn = torch.tensor([[_uniform(seed, example, step)] for example in examples.tolist()], dtype=below.dtype, device=below.device)
        picked = torch.searchsorted(below, drawn * below[:, -1:], right=True)[:, 0].clamp_max(below.shape[-1] - 1)
    return picked, plain.gather(-1, picked[:, None])[:, 0]


def _uniform(seed: int, example: int, step: int) -> float:
    """A number in [0, 1) for a row and a step, whatever else is generated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{example}/{step}".encode()).digest()[:6], "big") / 2**48


def sequence_logprobs(
    model: Model, prompts: Any, answers: Any, *, edits: Edit | Iterable[Edit] = (), positions: Mapping[str, Any] | None = None
) -> Float[Tensor, "row token"]:
    """Log probabilities in nats of answers of several tokens, each token given the prompt and the answer so far; their sum is the answer's.

    Args:
        model: the model.
        prompts: a text, texts, token ids or prompts of a task, of one length.
        answers: as many texts or rows of token ids, of one length (without a bos token), or one for all prompts.
        edits: as of :meth:`patchlab.Model.run`, on the prompt followed by the answer; END is the prompt's last position.
        positions: what other named positions in the edits mean.

    Raises:
        InterventionError: answers of several lengths, or not one per prompt.
    """
    given = prompts if isinstance(prompts, Prompts) else None
    tokens = model.as_tokens(prompts if given is None else given.tokens)
    wanted = _answer_ids(model, answers)
    if len(wanted) not in (1, len(tokens)):
        raise InterventionError(f"give one answer for all of the {len(tokens)} prompts, or one for each; got {len(wanted)}.")
    wanted = wanted.expand(len(tokens), -1)
    named = {
        "END": tokens.shape[1] - 1,
        **({} if given is None else {name: at for name, at in given.positions.items() if name != "END"}),
        **(positions or {}),
    }
    whole = torch.cat([tokens, wanted[:, :-1]], 1)
    with torch.no_grad():
        logits = model.run(whole, edits=list(as_edits(edits)), positions=named).logits
    read = precise(logits[:, tokens.shape[1] - 1 :]).log_softmax(-1)  # pyright: ignore[reportOptionalSubscript]
    return read.gather(-1, wanted.to(read.device)[..., None])[..., 0]


def _answer_ids(model: Model, answers: Any) -> Int[Tensor, "row token"]:
    if isinstance(answers, Tensor):
        return model.as_tokens(answers)
    rows = [answers] if isinstance(answers, str) or (len(answers) and isinstance(answers[0], int)) else list(answers)
    return model.as_tokens([model.to_ids(row, bos=False) if isinstance(row, str) else list(row) for row in rows])
