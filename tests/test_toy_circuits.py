"""The hand-made circuits: does every edge that the construction calls true matter, and no other one?"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.graph import Graph
from patchlab.testing import TOY_CIRCUITS, ToyCircuit

SATURATED = 24.0
"""A sharpness at which softmax passes next to no gradient."""


@cache
def toy_of(name: str, sharpness: float = 12.0, seed: int = 0) -> ToyCircuit:
    return TOY_CIRCUITS[name](sharpness=sharpness, seed=seed)


every_toy = pytest.mark.parametrize("name", TOY_CIRCUITS)


# ---------- a literal model: each reader sums up what it reads, one writer after the other ----------


class Weights:
    """The parameters of a native model by their plain names."""

    def __init__(self, toy: ToyCircuit) -> None:
        self.graph: Graph = toy.model.arch.graph
        self.d_head = toy.model.arch.d_head
        self.values = {name.replace("._original_component", ""): value for name, value in toy.model.bridge.named_parameters()}

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def of_head(self, layer: int, letter: str, head: int) -> tuple[Tensor, Tensor]:
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        name = f"layers.{layer}.attn.{letter}"
        return self[f"{name}.weight"][rows], self[f"{name}.bias"][rows]


@dataclass
class Literal:
    """One run: what each writer wrote ``[row, pos, width]``, and the logits at the last position."""

    written: dict[str, Tensor]
    logits: Tensor


def literal_run(weights: Weights, tokens: Tensor, edge: tuple[str, str] | None = None, other: Literal | None = None) -> Literal:
    """A forward pass in which the reader of ``edge`` gets its writer's output from another run."""
    written: dict[str, Tensor] = {}
    constant = weights["pos.weight"][: tokens.shape[1]]
    hidden = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()

    def read(reader: str) -> Tensor:
        total = constant
        for writer, value in written.items():
            total = total + (other.written[writer] if other is not None and edge == (writer, reader) else value)
        return total

    written["input"] = weights["tok_embed.weight"][tokens]
    for layer in range(weights.graph.n_layers):
        new = {}
        for head in range(weights.graph.n_heads):
            name = f"a{layer}.h{head}"
            q, k, v = (read(f"{name}<{letter}>") @ weight.T + bias for letter in "qkv" for weight, bias in [weights.of_head(layer, letter, head)])
            scores = (q @ k.transpose(1, 2) / weights.d_head**0.5).masked_fill(hidden, -torch.inf)
            columns = slice(head * weights.d_head, (head + 1) * weights.d_head)
            new[name] = scores.softmax(-1) @ v @ weights[f"layers.{layer}.attn.o.weight"][:, columns].T
        written |= new
        constant = constant + weights[f"layers.{layer}.attn.o.bias"]
        if weights.graph.mlps:
            mlp = f"layers.{layer}.mlp"
            neurons = torch.nn.functional.gelu(read(f"m{layer}") @ weights[f"{mlp}.fc_in.weight"].T + weights[f"{mlp}.fc_in.bias"])
            written[f"m{layer}"] = neurons @ weights[f"{mlp}.fc_out.weight"].T + weights[f"{mlp}.fc_out.bias"]
    return Literal(written, read("logits")[:, -1] @ weights["head.weight"].T)


@cache
def literal_effects(
    name: str, sharpness: float = 12.0, seed: int = 0
) -> tuple[Float[np.ndarray, "example writer reader"], Float[np.ndarray, " example"]]:
    """Effect of noising each edge alone, and the gap between the unpatched runs."""
    toy = toy_of(name, sharpness, seed)
    (batch,) = toy.task.batches()
    weights = Weights(toy)
    graph = weights.graph
    correct, incorrect = (torch.tensor([getattr(pair, side) for pair in toy.task.pairs]) for side in ("correct", "incorrect"))

    def metric(run: Literal) -> np.ndarray:
        return (run.logits.gather(1, correct) - run.logits.gather(1, incorrect))[:, 0].numpy()

    clean, corrupted = literal_run(weights, batch.clean), literal_run(weights, batch.corrupted)
    effects = np.zeros((len(toy.task), *graph.allowed.shape))
    for pair in np.argwhere(graph.allowed).tolist():
        writer, _, reader = graph.name(*pair).partition("->")
        effects[:, *pair] = metric(literal_run(weights, batch.clean, (writer, reader), corrupted)) - metric(clean)
    return effects, metric(clean) - metric(corrupted)


def auc(scores: Float[np.ndarray, " edge"], truth: np.ndarray) -> float:
    """Share of pairs of a true and another edge in which the true one scores higher; ties count half."""
    above = scores[truth][:, None] - scores[~truth][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


# ---------- the toys are what they say ----------


@every_toy
def test_the_literal_model_is_the_model(name: str) -> None:
    toy = toy_of(name)
    (batch,) = toy.task.batches()
    for tokens in (batch.clean, batch.corrupted):
        logits = toy.model.run(tokens).logits
        assert logits is not None
        torch.testing.assert_close(literal_run(Weights(toy), tokens).logits, logits[:, -1], rtol=1e-12, atol=1e-12)


@every_toy
def test_the_model_solves_its_task(name: str) -> None:
    toy = toy_of(name)
    (batch,) = toy.task.batches()
    n_tokens = max(max(pair.clean_ids) for pair in toy.task.pairs) + 1
    for tokens, solved in ((batch.clean, True), (batch.corrupted, False)):
        logits = toy.model.run(tokens).logits
        assert logits is not None
        best = logits[:, -1, :n_tokens].argmax(-1).tolist()
        assert (best == [pair.correct[0] for pair in toy.task.pairs]) == solved


@every_toy
@pytest.mark.parametrize("sharpness", [12.0, SATURATED])
@pytest.mark.parametrize("seed", [0, 1])
def test_noising_single_edges_literally_finds_exactly_the_true_edges(name: str, sharpness: float, seed: int) -> None:
    toy = toy_of(name, sharpness, seed)
    effects, gap = literal_effects(name, sharpness, seed)
    graph, truth = toy.model.arch.graph, toy.truth
    assert graph.names(truth & (np.abs(effects) > toy.level).all(0)) == graph.names(truth)
    assert float(effects[:, truth].max()) <= -toy.matters
    others = effects[:, graph.allowed & ~truth]
    assert float(np.abs(others).max()) <= toy.level
    # what matters takes most of the gap away, and what does not is far from it
    assert toy.matters > 0.7 * float(gap.max())
    assert toy.level < 0.03 * float(gap.min())
    assert auc(np.abs(effects.mean(0))[graph.allowed], truth[graph.allowed]) == 1.0


@every_toy
def test_the_other_components_are_distractors_indeed(name: str) -> None:
    """Each of them moves with the prompt, as much as what the circuit writes; it is only not read."""
    toy = toy_of(name)
    (batch,) = toy.task.batches()
    weights = Weights(toy)
    clean, corrupted = literal_run(weights, batch.clean), literal_run(weights, batch.corrupted)
    moved = {writer: float((clean.written[writer] - corrupted.written[writer]).norm(dim=-1).max()) for writer in clean.written}
    assert min(moved.values()) > 0.05, moved
    effects, _ = literal_effects(name)
    graph = toy.model.arch.graph
    others = np.abs(effects).max(0)[graph.allowed & ~toy.truth]
    assert (others > 1e-9).mean() > 0.5  # most other edges leave a trace


@every_toy
def test_without_a_leak_no_other_edge_matters_at_all(name: str) -> None:
    toy = TOY_CIRCUITS[name](leak=0.0)
    assert toy.level == 0.0
    (batch,) = toy.task.batches()
    weights = Weights(toy)
    clean, corrupted = literal_run(weights, batch.clean), literal_run(weights, batch.corrupted)
    n_tokens = max(max(pair.clean_ids) for pair in toy.task.pairs) + 1
    graph = toy.model.arch.graph
    for edge in graph.names(graph.allowed & ~toy.truth):
        writer, _, reader = edge.partition("->")
        patched = literal_run(weights, batch.clean, (writer, reader), corrupted)
        torch.testing.assert_close(patched.logits[:, :n_tokens], clean.logits[:, :n_tokens], rtol=0, atol=1e-12, msg=edge)
