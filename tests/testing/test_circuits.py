"""The hand-made circuits: does every edge that the construction calls true matter, and no other one?"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import scores_of
from jaxtyping import Float
from torch import Tensor

from patchlab.circuits import evaluate
from patchlab.graph import Graph
from patchlab.methods import LinearizedPatching, get_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored
from patchlab.testing import TOY_CIRCUITS, ToyCircuit, auc_table, check_method, induction_toy, lookup_toy

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

    def embed(self, tokens: Tensor) -> Tensor:
        return self["tok_embed.weight"][tokens]

    def of_head(self, layer: int, letter: str, head: int) -> tuple[Tensor, Tensor]:
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        name = f"layers.{layer}.attn.{letter}"
        return self[f"{name}.weight"][rows], self[f"{name}.bias"][rows]


@dataclass
class Literal:
    """One run: what each writer wrote and each reader read ``[row, pos, width]``, and the logits at the last position."""

    written: dict[str, Tensor]
    inputs: dict[str, Tensor]
    logits: Tensor


def literal_run(weights: Weights, embedded: Tensor, edge: tuple[str, str] | None = None, other: Literal | None = None) -> Literal:
    """A forward pass in which the reader of ``edge`` gets its writer's output from another run."""
    written: dict[str, Tensor] = {}
    length = embedded.shape[1]
    constant = weights["pos.weight"][:length]
    hidden = torch.ones(length, length).triu(1).bool()
    inputs: dict[str, Tensor] = {}

    def read(reader: str) -> Tensor:
        total = constant
        for writer, value in written.items():
            total = total + (other.written[writer] if other is not None and edge == (writer, reader) else value)
        inputs[reader] = total
        return total

    written["input"] = embedded
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
    return Literal(written, inputs, read("logits")[:, -1] @ weights["head.weight"].T)


@dataclass
class Bench:
    """A toy with its literal model and both unpatched runs."""

    toy: ToyCircuit

    def __post_init__(self) -> None:
        (batch,) = self.toy.task.batches()
        self.weights, self.graph = Weights(self.toy), self.toy.model.arch.graph
        self.answers = [torch.tensor([getattr(pair, side) for pair in self.toy.task.pairs]) for side in ("correct", "incorrect")]
        self.embedded = [self.weights.embed(tokens) for tokens in (batch.clean, batch.corrupted)]
        self.clean, self.corrupted = (literal_run(self.weights, embedded) for embedded in self.embedded)

    def metric(self, run: Literal) -> Tensor:
        correct, incorrect = (run.logits.gather(1, answers)[:, 0] for answers in self.answers)
        return correct - incorrect

    def noised(self, writer: int, reader: int) -> Literal:
        """The clean run with one edge from the corrupted one."""
        return literal_run(self.weights, self.embedded[0], (self.graph.writers[writer], self.graph.readers[reader]), self.corrupted)

    @property
    def gap(self) -> np.ndarray:
        return (self.metric(self.clean) - self.metric(self.corrupted)).numpy()

    def effects(self) -> Float[np.ndarray, "example writer reader"]:
        """Effect of noising each edge alone."""
        effects = np.zeros((len(self.toy.task), *self.graph.allowed.shape))
        for pair in np.argwhere(self.graph.allowed).tolist():
            effects[:, *pair] = (self.metric(self.noised(*pair)) - self.metric(self.clean)).numpy()
        return effects

    def linear(self, steps: list[float]) -> Float[np.ndarray, "example writer reader"]:
        """Differences times gradients at what each reader reads, averaged over points between the clean and the corrupted embedding."""
        scores = np.zeros((len(self.toy.task), *self.graph.allowed.shape))
        start, end = self.embedded
        for step in steps:
            run = literal_run(self.weights, (start + step * (end - start)).requires_grad_())
            gradients = torch.autograd.grad(self.metric(run).sum(), list(run.inputs.values()))
            by_reader = dict(zip(run.inputs, gradients, strict=True))
            for writer, reader in np.argwhere(self.graph.allowed).tolist():
                name = self.graph.writers[writer]
                difference = self.corrupted.written[name] - self.clean.written[name]
                scores[:, writer, reader] += (difference * by_reader[self.graph.readers[reader]]).sum((1, 2)).numpy() / len(steps)
        return scores


@cache
def bench_of(name: str, sharpness: float = 12.0, seed: int = 0) -> Bench:
    return Bench(toy_of(name, sharpness, seed))


@cache
def literal_effects(name: str, sharpness: float = 12.0, seed: int = 0) -> Float[np.ndarray, "example writer reader"]:
    return bench_of(name, sharpness, seed).effects()


def literal_auc(toy: ToyCircuit, scores: Float[np.ndarray, "example writer reader"]) -> float:
    """Share of pairs of a true and another edge in which the true one's mean score is larger; ties count half."""
    graph, truth = toy.model.arch.graph, toy.circuit.edges
    sizes = np.abs(scores.mean(0))
    apart = sizes[truth][:, None] - sizes[graph.allowed & ~truth][None, :]
    return float(((apart > 0) + 0.5 * (apart == 0)).mean())


# ---------- the toys are what they say ----------


@every_toy
def test_the_literal_model_is_the_model(name: str) -> None:
    bench = bench_of(name)
    (batch,) = bench.toy.task.batches()
    for tokens, run in ((batch.clean, bench.clean), (batch.corrupted, bench.corrupted)):
        logits = bench.toy.model.run(tokens).logits
        assert logits is not None
        torch.testing.assert_close(run.logits, logits[:, -1], rtol=1e-12, atol=1e-12)


@every_toy
def test_the_model_solves_its_task(name: str) -> None:
    bench = bench_of(name)
    pairs = bench.toy.task.pairs
    words = n_tokens(bench.toy)
    assert bench.clean.logits[:, :words].argmax(-1).tolist() == [pair.correct[0] for pair in pairs]
    assert bool((bench.metric(bench.clean) > 3.9).all())
    assert bool((bench.metric(bench.corrupted) < 0).all())


@every_toy
@pytest.mark.parametrize("sharpness", [12.0, SATURATED])
@pytest.mark.parametrize("seed", [0, 1])
def test_noising_single_edges_literally_finds_exactly_the_true_edges(name: str, sharpness: float, seed: int) -> None:
    bench, effects = bench_of(name, sharpness, seed), literal_effects(name, sharpness, seed)
    toy, truth, allowed = bench.toy, bench.toy.circuit.edges, bench.graph.allowed
    assert float(effects[:, truth].max()) <= -toy.matters
    assert float(np.abs(effects[:, allowed & ~truth]).max()) <= toy.level
    # what matters takes most of the gap away, and what does not is far from it
    assert toy.matters > 0.7 * float(bench.gap.max())
    assert toy.level < 0.03 * float(bench.gap.min())
    assert literal_auc(toy, effects) == 1.0


@every_toy
def test_the_other_components_are_distractors_indeed(name: str) -> None:
    """What each of them writes moves with the prompt, and almost every edge leaves a trace: it is only too small to matter."""
    bench = bench_of(name)
    moved = {writer: float((bench.clean.written[writer] - bench.corrupted.written[writer]).norm(dim=-1).max()) for writer in bench.clean.written}
    assert min(moved.values()) > 0.05, moved
    others = np.abs(literal_effects(name)).max(0)[bench.graph.allowed & ~bench.toy.circuit.edges]
    assert float((others > 1e-9).mean()) > 0.5


@every_toy
def test_without_a_leak_no_other_edge_matters_at_all(name: str) -> None:
    bench = Bench(TOY_CIRCUITS[name](leak=0.0))
    assert bench.toy.level == 0.0
    words, others_move = n_tokens(bench.toy), False
    for pair in np.argwhere(bench.graph.allowed & ~bench.toy.circuit.edges).tolist():
        logits = bench.noised(*pair).logits
        torch.testing.assert_close(logits[:, :words], bench.clean.logits[:, :words], rtol=0, atol=1e-12, msg=bench.graph.name(*pair))
        others_move |= bool((logits[:, words:] - bench.clean.logits[:, words:]).abs().max() > 1e-3)
    assert others_move  # logits that the metric does not read


def n_tokens(toy: ToyCircuit) -> int:
    """Number of tokens that the prompts are made of; the other logits are there for what is idle."""
    return max(token for pair in toy.task.pairs for token in (*pair.clean_ids, *pair.corrupted_ids)) + 1


def test_the_words_of_a_toy_are_drawn_by_its_seed() -> None:
    one, other = toy_of("induction"), toy_of("induction", seed=1)
    assert one.task.fingerprint == induction_toy().task.fingerprint != other.task.fingerprint
    assert one.model.fingerprint == induction_toy().model.fingerprint != other.model.fingerprint
    assert repr(one) == "ToyCircuit(induction: 5 of 52 edges, 6 pairs)"
    assert repr(lookup_toy()) == "ToyCircuit(lookup: 8 of 75 edges, 6 pairs)"


# ---------- what the methods find in them ----------


@every_toy
@pytest.mark.parametrize("sharpness", [12.0, SATURATED])
def test_exact_patching_finds_exactly_the_true_edges(name: str, sharpness: float) -> None:
    toy = toy_of(name, sharpness)
    scores = scores_of(get_method("exact"), toy.model, toy.task, "edges", "noising").data["edges"].to_numpy()
    np.testing.assert_allclose(scores, literal_effects(name, sharpness), rtol=0, atol=1e-12)
    assert literal_auc(toy, scores) == 1.0


@every_toy
@pytest.mark.parametrize(("method", "steps"), [("atp", [0.0]), ("ig:3", [1 / 6, 1 / 2, 5 / 6]), ("clean-corrupted", [0.0, 1.0])])
def test_gradient_scores_are_those_of_the_literal_model(name: str, method: str, steps: list[float]) -> None:
    toy = toy_of(name)
    scores = scores_of(get_method(method), toy.model, toy.task, "edges", "noising").data["edges"].to_numpy()
    np.testing.assert_allclose(scores, bench_of(name).linear(steps), rtol=0, atol=1e-12)


def test_the_table_of_areas() -> None:
    toys = {f"{name} {sharpness:g}": toy_of(name, sharpness) for name in TOY_CIRCUITS for sharpness in (12.0, SATURATED)}
    table = auc_table(["exact", "atp", "ig:3", "relp", "gim", "relp-ah", "relp+ig:3"], toys=toys)
    assert list(table.columns) == list(toys)
    assert table.index.name == "method"
    for title, toy in toys.items():
        bench = bench_of(toy.name, float(title.split()[1]))
        assert table.loc["exact", title] == literal_auc(toy, bench.effects()) == 1.0
        for method, steps in (("atp", [0.0]), ("ig:3", [1 / 6, 1 / 2, 5 / 6])):
            # a score of 1e-17 may be 0 on the other side, which turns a tie
            np.testing.assert_allclose(table.loc[method, title], literal_auc(toy, bench.linear(steps)), rtol=0, atol=0.02)
    moderate, saturated = ([title for title in toys if title.endswith(end)] for end in (" 12", " 24"))
    assert bool((table.loc[["atp", "ig:3", "relp", "gim", "relp+ig:3"], moderate] == 1).all(axis=None))
    # where softmax passes no gradient, one point is blind to queries and keys; a path, or a softer softmax on the way back, is not
    assert bool((table.loc[["atp", "relp"], saturated] < 0.9).all(axis=None))
    assert bool((table.loc[["ig:3", "relp+ig:3"], saturated] == 1).all(axis=None))
    assert bool((table.loc["gim", saturated] > table.loc["atp", saturated] + 0.1).all())
    # a pattern held constant leaves out queries, keys and what only feeds them
    assert bool((table.loc["relp-ah"] < 0.9).all())


def test_the_table_covers_the_toys_unless_told_otherwise() -> None:
    table = auc_table(["atp"])
    assert table.shape == (1, 2 * len(TOY_CIRCUITS))
    assert table.columns[0] == "induction, sharpness 12"


@every_toy
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean", "mean_positional"])
def test_the_circuit_alone_is_faithful_complete_and_minimal(name: str, ablation: str) -> None:
    toy = toy_of(name)
    found = evaluate(toy.model, toy.circuit, toy.task, ablation=ablation, minimality="edge", progress=False)
    assert found.faithfulness() == pytest.approx(1, abs=1e-3)
    assert float(found.table["completeness"].to_numpy()[0]) == pytest.approx(0, abs=1e-3)
    assert set(found.minimality["part"]) == set(toy.edges)
    assert found.minimality["minimality"].to_numpy().min() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "atp", "relp-ah", "relp+ig:2"])
@pytest.mark.parametrize("site", ["edges", "edges[writer,reader,pos]"])
def test_edges_keep_the_contract_of_methods(method: str, site: str) -> None:
    toy = toy_of("lookup")
    check_method(get_method(method), toy.model, toy.task.select([0, 1]), [site])


class FillsGaps(LinearizedPatching):
    """Gives the readers that its rules cut off a score."""

    name = "fills-gaps"

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        found = super().score(setting, runs, meter, notes)
        return replace(found, effects={name: np.nan_to_num(values) for name, values in found.effects.items()})


def test_the_contract_notices_scores_of_readers_that_are_not_scored() -> None:
    toy = toy_of("lookup")
    with pytest.raises(AssertionError, match="edges has values for readers that are not scored"):
        check_method(FillsGaps(rules="relp-ah"), toy.model, toy.task.select([0, 1]), ["edges"])
