"""Train the packaged dictionaries of the demo models on sentences like those that the models were trained on, and write them with a measured card.

    python scripts/train_demo_dictionaries.py                # both models, one after the other, some 10 minutes on an idle core
    python scripts/train_demo_dictionaries.py demo-llama     # one of them

The activations of a model are kept once, and all its dictionaries of one shape are trained on them together. Most are BatchTopK (Bussmann et al.
2024, arXiv 2412.06410): of a batch the largest k activations per token are kept, wherever they are, and afterwards the threshold is fixed that keeps
as many, so that the files hold JumpReLU dictionaries. The one dictionary for all layers keeps the largest k of each token (TopK), because the stream
grows from layer to layer.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from patchlab.features import Dictionary, JumpRelu, TopK, load_dictionaries
from patchlab.models import DEMO_MODELS, load_model
from patchlab.tasks.sentences import ROW
from patchlab.texts import sentences

OUT = Path(__file__).resolve().parents[1] / "patchlab" / "features" / "demo"
LIMIT = 12_000_000  # bytes of all files

ROWS, BATCH, RATE = 4096, 1024, 3e-3
"""Rows of text whose activations are kept; tokens of a step; the highest learning rate."""
EVERY, PATIENCE, UNTIL = 75, 30, 0.7
"""Features that did not act for PATIENCE steps start anew, every EVERY steps in the first UNTIL of them."""
TRAINING_SEED, HELD_OUT_SEED = 30_000, 40_000
CALIBRATION = 20_000  # tokens that thresholds are fixed on
HELD_OUT_ROWS, SPLICED_ROWS = 1024, 48  # that reconstructions are measured on, and losses


@dataclass(frozen=True)
class Spec:
    """What one dictionary is: its kind, what it reads and writes, its layer (None: all of them)."""

    kind: str
    reads: str
    writes: str
    layer: int | None

    @property
    def name(self) -> str:
        """The folder of its files, as resid_post/3."""
        point = "transcoder" if self.kind == "transcoder" else "multi_layer" if self.kind == "multi_layer" else self.reads
        return point if self.layer is None else f"{point}/{self.layer}"


@dataclass(frozen=True)
class Group:
    """Dictionaries of one shape, which are trained together: ``width`` features, of which ``k`` act per token."""

    specs: tuple[Spec, ...]
    width: int
    k: int
    steps: int
    per_token: bool = False

    def points(self, layers: int) -> set[tuple[str, int]]:
        """Whatever they read and write."""
        return {
            (point, layer)
            for spec in self.specs
            for point in (spec.reads, spec.writes)
            for layer in (range(layers) if spec.layer is None else (spec.layer,))
        }


def saes(points: Sequence[str], layers: int) -> tuple[Spec, ...]:
    """Autoencoders of every layer."""
    return tuple(Spec("sae", point, point, layer) for point in points for layer in range(layers))


def groups(name: str) -> tuple[Group, ...]:
    """The dictionaries of a model."""
    if name == "demo-llama":
        return (Group(saes(("resid_post", "mlp_out"), 6), 512, 12, steps=450),)
    transcoders = tuple(Spec("transcoder", "mlp_in", "mlp_out", layer) for layer in range(12))
    plain = saes(("resid_post", "attn_out", "mlp_out"), 12)
    return Group(plain + transcoders, 256, 8, steps=450), Group(
        (Spec("multi_layer", "resid_post", "resid_post", None),), 1024, 12, steps=800, per_token=True
    )


NAMES = ("demo-gpt2", "demo-llama")


# --- activations -----------------------------------------------------------------------------------------------------


def places(model: torch.nn.Module) -> dict[tuple[str, int], tuple[torch.nn.Module, bool]]:
    """(point, layer) -> the module that has it, and whether it is its input."""
    is_gpt2 = model.config.model_type == "gpt2"
    found = {}
    for layer, block in enumerate(model.transformer.h if is_gpt2 else model.model.layers):
        found["resid_post", layer] = block, False
        found["attn_out", layer] = block.attn if is_gpt2 else block.self_attn, False
        found["mlp_out", layer] = block.mlp, False
        found["mlp_in", layer] = block.mlp, True
    return found


@contextmanager
def at(model: torch.nn.Module, point: tuple[str, int], change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Let ``change`` see the activation at a point; what it returns takes its place."""

    def on_output(_: torch.nn.Module, __: object, output: Tensor | tuple) -> Tensor | tuple | None:
        new = change(output[0] if isinstance(output, tuple) else output)
        return new if new is None or not isinstance(output, tuple) else (new, *output[1:])

    def on_input(_: torch.nn.Module, inputs: tuple) -> tuple | None:
        new = change(inputs[0])
        return None if new is None else (new, *inputs[1:])

    module, is_input = places(model)[point]
    handle = module.register_forward_pre_hook(on_input) if is_input else module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def activations(model: torch.nn.Module, ids: Tensor, points: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
    """What a model has at some points, of all tokens [row, pos] one after the other: [token, d] in float16."""
    kept: dict[tuple[str, int], list[Tensor]] = {point: [] for point in points}

    def keep(parts: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda value: parts.append(value.flatten(0, 1).half())

    with ExitStack() as stack:
        for point, parts in kept.items():
            stack.enter_context(at(model, point, keep(parts)))
        for part in ids.split(64):
            model(part, use_cache=False)
    return {point: torch.cat(parts) for point, parts in kept.items()}


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Stack:
    """Dictionaries that are trained together, on activations that vary by 1 on average: tensors [dictionary, ...]."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    centre: Tensor | None  # of the inputs of transcoders; autoencoders subtract b_dec
    is_transcoder: Tensor
    idle: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.idle = torch.zeros(self.b_enc.shape)

    @staticmethod
    def new(group: Group, centre: Tensor, mean: Tensor, draws: torch.Generator) -> "Stack":
        """Untrained: random directions, the encoder the decoder's transpose; ``centre`` and ``mean`` of inputs and outputs [dictionary, d]."""
        w_dec = unit(torch.randn(len(group.specs), group.width, mean.shape[-1], generator=draws))
        is_transcoder = torch.tensor([spec.kind == "transcoder" for spec in group.specs])
        return Stack(w_dec.mT.clone(), torch.zeros(w_dec.shape[:2]), w_dec, mean.clone(), centre, is_transcoder)

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.w_enc, self.b_enc, self.w_dec, self.b_dec]

    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations [dictionary, token, feature], with nothing below zero."""
        origin = torch.where(self.is_transcoder[:, None], self.centre, self.b_dec)
        return torch.baddbmm(self.b_enc[:, None], x - origin[:, None], self.w_enc).relu()

    def decode(self, features: Tensor) -> Tensor:
        """Outputs [dictionary, token, d]."""
        return torch.baddbmm(self.b_dec[:, None], features, self.w_dec)

    @torch.no_grad()
    def start_anew(self, optimiser: torch.optim.Adam, x: Tensor, error: Tensor, draws: torch.Generator) -> int:
        """Point idle features at what is reconstructed worst: directions of errors, drawn by their squares."""
        weight, count = error.square().sum(-1), 0
        for one, idle in enumerate(self.idle > PATIENCE):
            new = idle.nonzero()[:, 0]
            if not len(new):
                continue
            rows = torch.multinomial(weight[one], len(new), generator=draws)
            self.w_dec[one, new] = unit(error[one, rows])
            self.w_enc[one][:, new] = 0.5 * unit(x[one, rows] - self.centre[one] if self.is_transcoder[one] else error[one, rows]).T
            self.b_enc[one, new] = 0.0
            for moment in ("exp_avg", "exp_avg_sq"):
                optimiser.state[self.w_enc][moment][one][:, new] = 0.0
                optimiser.state[self.w_dec][moment][one, new] = 0.0
                optimiser.state[self.b_enc][moment][one, new] = 0.0
            self.idle[one, new] = 0.0
            count += len(new)
        return count


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def largest(pre: Tensor, k: int, per_token: bool) -> Tensor:
    """The features that act: the k largest of each token, or k times as many as there are tokens of the batch (by the bar of a quarter of it,
    and what is at the bar).
    """
    if per_token:
        values, where = pre.topk(k, -1)
        return torch.zeros_like(pre).scatter(-1, where, values)
    some = pre.detach()[:, : max(1, pre.shape[1] // 4)]
    return pre * (pre >= bar(some, k)[:, None, None])


def bar(pre: Tensor, k: int) -> Tensor:
    """What a mean of k activations per token exceed, of each dictionary."""
    flat = pre.flatten(1)
    return flat.kthvalue(flat.shape[1] - k * pre.shape[1], -1).values


def train(group: Group, kept: dict[tuple[str, int], Tensor], seed: int, say: Callable[[str], None]) -> list[dict[str, Tensor]]:
    """Train the dictionaries of a group; their tensors in float32, for activations as the model has them."""
    draws = torch.Generator().manual_seed(seed)
    if group.specs[0].layer is None:  # every layer's stream, one below the other, each to count alike
        (reads,) = {spec.reads for spec in group.specs}
        layers = sorted(layer for point, layer in kept if point == reads)
        inputs = outputs = torch.cat([kept[reads, layer] for layer in layers])[None]
        variances = torch.stack([kept[reads, layer].float().var(0, correction=0).mean() for layer in layers])
        weights = (variances.mean() / variances).repeat_interleave(len(inputs[0]) // len(layers))
    else:
        inputs = torch.stack([kept[spec.reads, spec.layer] for spec in group.specs])
        outputs = torch.stack([kept[spec.writes, spec.layer] for spec in group.specs])
        weights = None

    def moments(values: Tensor) -> tuple[Tensor, Tensor]:
        some = values[:, :: max(1, values.shape[1] // CALIBRATION)].float()
        return some.mean(1), (some - some.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()

    (mean_in, scale_in), (mean_out, scale_out) = moments(inputs), moments(outputs)
    stack = Stack.new(group, mean_in / scale_in[:, None], mean_out / scale_out[:, None], draws)
    for parameter in stack.parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(stack.parameters, lr=RATE, betas=(0.9, 0.99))
    tokens, steps, start = inputs.shape[1], group.steps, time.perf_counter()
    order, used = torch.randperm(tokens, generator=draws), 0
    for step in range(steps):
        if used + BATCH > tokens:
            order, used = torch.randperm(tokens, generator=draws), 0
        chosen = order[used : used + BATCH]
        used += BATCH
        x = inputs[:, chosen].float() / scale_in[:, None, None]
        y = x if outputs is inputs else outputs[:, chosen].float() / scale_out[:, None, None]
        features = largest(stack.pre(x), group.k, group.per_token)
        error = y - stack.decode(features)
        squares = error.square().mean(-1)
        loss = (squares if weights is None else squares * weights[chosen]).mean(1)
        loss.sum().backward()
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps))
        with torch.no_grad():
            along = (stack.w_dec.grad * stack.w_dec).sum(-1, keepdim=True)
            stack.w_dec.grad -= along * stack.w_dec
            optimiser.step()
            optimiser.zero_grad()
            stack.w_dec.copy_(unit(stack.w_dec))
            stack.idle = torch.where((features > 0).any(1), 0.0, stack.idle + 1)
        if (step + 1) % EVERY == 0:
            new = stack.start_anew(optimiser, x, error.detach(), draws) if step < UNTIL * steps else 0
            seconds = time.perf_counter() - start
            say(f"step {step + 1}, variance left {loss.mean():.4f} (worst {loss.max():.4f}), {new} features anew, {seconds:.0f} s")
    with torch.no_grad():
        return [one(stack, i, group, inputs[i], scale_in[i], scale_out[i]) for i in range(len(group.specs))]


def one(stack: Stack, i: int, group: Group, inputs: Tensor, scale_in: Tensor, scale_out: Tensor) -> dict[str, Tensor]:
    """One dictionary of a stack for activations as they are: scales go into its tensors, and features are measured in the output's units."""
    w_enc, b_enc = stack.w_enc[i] * (scale_out / scale_in), stack.b_enc[i]
    if stack.is_transcoder[i]:
        b_enc = b_enc - stack.centre[i] @ stack.w_enc[i]
    found = {"w_enc": w_enc, "b_enc": b_enc * scale_out, "w_dec": stack.w_dec[i], "b_dec": stack.b_dec[i] * scale_out}
    if not group.per_token:
        some = inputs[:: max(1, len(inputs) // CALIBRATION)].float()
        origin = 0.0 if stack.is_transcoder[i] else found["b_dec"]
        pre = ((some - origin) @ w_enc + found["b_enc"]).relu()
        found["threshold"] = bar(pre[None], group.k).expand(group.width)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def dictionary(name: str, spec: Spec, group: Group, tensors: dict[str, Tensor]) -> Dictionary:
    """A trained dictionary, in float16 as it is stored."""
    activation = TopK(group.k) if group.per_token else JumpRelu(tensors["threshold"])
    parts = {part: tensors[part] for part in ("w_enc", "b_enc", "w_dec", "b_dec")}
    about = {"model_name": name, "metadata": {"context_size": ROW, "prepend_bos": True, "dataset_path": "patchlab.texts.sentences"}}
    subtract = spec.kind != "transcoder"
    found = Dictionary(
        spec.name, spec.kind, spec.layer, spec.reads, spec.writes, activation=activation, subtract_b_dec=subtract, provenance=about, **parts
    )
    return found.to(dtype=torch.float16)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a dictionary does on held-out text at one layer.

    Args:
        name: folder of the dictionary.
        layer: the layer.
        fvu: share of the variance that it leaves, of all tokens but bos.
        l0: features that act per token, likewise.
        dead: share of the features that act at no token (of a dictionary for all layers: in this one).
        loss: of the next token with the dictionary's output in place of the activation, in nats.
        zero_loss: with zeros in its place.
        plain_loss: of the model.
        largest: the share of the tokens at which the most frequent feature acts.
    """

    name: str
    layer: int
    fvu: float
    l0: float
    dead: float
    loss: float
    zero_loss: float
    plain_loss: float
    largest: float

    @property
    def recovered(self) -> float:
        """Loss recovered against zero ablation: 1 is as good as the model."""
        return (self.zero_loss - self.loss) / (self.zero_loss - self.plain_loss)


@torch.no_grad()
def measure(model: torch.nn.Module, dictionaries: Sequence[Dictionary], ids: Tensor, spliced: Tensor) -> tuple[list[Measured], dict[str, float]]:
    """What dictionaries do on held-out rows; and the share of the features of each that act nowhere."""
    layers = model.config.num_hidden_layers
    each = [(one, layer) for one in dictionaries for layer in (range(layers) if one.layer is None else (one.layer,))]
    points = {(point, layer) for one, layer in each for point in (one.reads, one.writes)}
    kept = activations(model, ids, sorted(points))
    counts = (torch.arange(ids.numel()) % ids.shape[1]) > 0
    plain, zeros, found, acting = loss(model, spliced), {}, [], {}
    for one, layer in each:
        x, y = kept[one.reads, layer][counts].float(), kept[one.writes, layer][counts].float()
        features = one.encode(x)
        fvu = float((y - one.decode(features, x)).double().square().sum() / (y - y.mean(0)).double().square().sum())
        shares = (features != 0).double().mean(0)
        acting[one.name] = acting.get(one.name, torch.zeros(one.n_features, dtype=torch.bool)) | (shares > 0)
        if (one.writes, layer) not in zeros:
            with at(model, (one.writes, layer), torch.zeros_like):
                zeros[one.writes, layer] = loss(model, spliced)
        read: list[Tensor] = []
        with (
            at(model, (one.reads, layer), lambda value, read=read: read.append(value)),
            at(model, (one.writes, layer), lambda value, read=read, one=one: one.reconstruct(read.pop())),
        ):
            with_it = loss(model, spliced)
        dead = float((shares == 0).double().mean())
        found.append(Measured(one.name, layer, fvu, float(shares.sum()), dead, with_it, zeros[one.writes, layer], plain, float(shares.max())))
    return found, {name: 1 - float(some.double().mean()) for name, some in acting.items()}


def loss(model: torch.nn.Module, ids: Tensor) -> float:
    """Mean loss of the next token, in nats."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


CARD = """# Dictionaries of {name}

{kinds}.

Trained by `scripts/train_demo_dictionaries.py` on {tokens:,} tokens of sentences like those that {name} was trained on (seed {seed}), stored
as float16, made to be loaded as float32, {size:.1f} MB together. They know these sentences and nothing else. Load them with
`pl.load_dictionaries("{name}", model)`, some of them with `sites=` and `kind=`.

Measured on the files, after the cast to float16, on text of another seed ({held_out}): fraction of variance unexplained (FVU), features
that are active per token (L0), and the share that never is (dead), on {n:,} tokens without `<bos>`; and the loss of the next
token with the dictionary's output in place of the activation at all positions, on {spliced:,} tokens. Recovered is its distance from
the loss with zeros in that place, as a share of the distance of the model's own ({plain:.3f} nats). Where zeros hardly matter,
because an activation is nearly constant, that share says little; the losses are in `card.json`.{columns}

| dictionary | layer | FVU | L0 | dead | loss recovered |
|---|---|---|---|---|---|
{rows}
"""


def describe(name: str, folder: Path, found: Sequence[Measured], dead: dict[str, float], dictionaries: Sequence[Dictionary]) -> str:
    """The card."""
    kinds = []
    for point in dict.fromkeys(one.name.split("/")[0] for one in dictionaries):
        some = [one for one in dictionaries if one.name.split("/")[0] == point]
        what = {"transcoder": "Transcoders (MLP input to `mlp_out`)", "multi_layer": "One autoencoder for `resid_post` of all layers"}
        each = f"of {len(some)} layers" if len(some) > 1 else "together"
        kinds.append(
            f"- {what.get(point, f'Sparse autoencoders of `{point}`')} {each}: {some[0].d_in} wide, {some[0].n_features} features, "
            f"{'TopK' if isinstance(some[0].activation, TopK) else 'JumpReLU'} (`{point}/`)"
        )
    rows = [f"| {one.name} | {one.layer} | {one.fvu:.3f} | {one.l0:.1f} | {one.dead:.1%} | {one.recovered:.3f} |" for one in found]
    all_layers = [one for one in dictionaries if one.layer is None]
    more = [f"\nOf the features of {one.name}, {dead[one.name]:.1%} are active in no layer." for one in all_layers]
    return CARD.format(
        name=name, kinds=";\n".join(kinds), tokens=ROWS * ROW, seed=TRAINING_SEED, held_out=HELD_OUT_SEED, size=size_of(folder) / 1e6,
        n=HELD_OUT_ROWS * (ROW - 1), spliced=SPLICED_ROWS * (ROW - 1), plain=found[0].plain_loss, rows="\n".join(rows), columns="".join(more),
    )  # fmt: skip


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def train_all(name: str, model: torch.nn.Module, ids: Tensor, say: Callable[[str], None]) -> list[Dictionary]:
    """Train the dictionaries of a model."""
    layers, all_groups = model.config.num_hidden_layers, groups(name)
    kept = activations(model, ids, sorted(set().union(*(group.points(layers) for group in all_groups))))
    found = []
    for group in all_groups:
        some = {point: kept[point] for point in group.points(layers)}
        found += [dictionary(name, spec, group, tensors) for spec, tensors in zip(group.specs, train(group, some, 0, say), strict=True)]
    return found


def make(name: str, out: Path, say: Callable[[str], None], trained: Sequence[Dictionary] | None = None) -> None:
    """Train (or take), save, measure and describe the dictionaries of one model."""
    wrapped = load_model(name)
    ids, held_out = (
        torch.from_numpy(np.stack(sentences(wrapped, n, seed=seed).rows)) for n, seed in ((ROWS, TRAINING_SEED), (HELD_OUT_ROWS, HELD_OUT_SEED))
    )
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODELS[name]).eval()  # the other one has been bridged
    trained = train_all(name, model, ids, say) if trained is None else trained
    new = out / f".{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    for one in trained:
        one.save(new / one.name)
    dictionaries = load_dictionaries(new, wrapped)
    say("measuring")
    found, dead = measure(model, dictionaries, held_out, held_out[:SPLICED_ROWS])
    rows = [{**asdict(one), "recovered": one.recovered} for one in found]
    (new / "card.json").write_text(json.dumps({"model": name, "dead": dead, "measured": rows}, indent=1) + "\n", encoding="utf-8")
    (new / "README.md").write_text(describe(name, new, found, dead, dictionaries), encoding="utf-8")
    shutil.rmtree(out / name, ignore_errors=True)
    new.rename(out / name)


def main() -> int:
    """Train the dictionaries of the models that are named, of both if none is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; both if none")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1, help="another number rounds otherwise, and so gives other dictionaries")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(NAMES)):
        parser.error(f"there are no dictionaries of {', '.join(unknown)}; valid: {', '.join(NAMES)}")
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or NAMES:
        make(name, arguments.out, lambda text, name=name: print(f"{name}: {text}", flush=True))
    if (size := sum(size_of(path) for path in arguments.out.iterdir() if path.is_dir())) > LIMIT:
        print(f"the files take {size / 1e6:.1f} MB, and {LIMIT / 1e6:g} MB are meant for them", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
