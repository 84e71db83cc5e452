"""Small models with hand-computable answers, and tasks for them."""

from typing import Any

import torch

from patchlab.metrics import METRICS, Metric
from patchlab.models import Model, wrap_bridge
from patchlab.tasks.task import Pair, Task


def linear_toy(n_layers: int = 3, seed: int = 0) -> Model:
    """A float64 model whose logits are an affine function of every site taken alone, so that AtP is exact.

    Its attention pattern depends on positions only (q and k are their biases, turned by rotary embeddings), it has no norms, and
    its ReLUs stay in their linear region.

    Example:
        >>> linear_toy().dtype
        torch.float64
    """
    model = native(
        "linear-toy",
        {
            "n_layers": n_layers,
            "d_model": 6,
            "n_heads": 2,
            "d_head": 4,
            "d_mlp": 5,
            "d_vocab": 11,
            "positional_embedding_type": "rotary",
            "rotary_dim": 4,
        },
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.bridge.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.4)
            if name.endswith("weight") and any(part in name for part in (".q.", ".k.")):
                parameter.zero_()
        for block in model.bridge.blocks:
            mlp = block.mlp.original_component
            mlp.fc_in.weight.mul_(0.2)
            mlp.fc_in.bias.fill_(20.0)  # far from the kink, also with a neuron upstream at zero; the output's bias takes the constant out again
            mlp.fc_out.bias.copy_(-mlp.fc_out.weight @ mlp.fc_in.bias)
    return wrap_bridge(model.bridge, "linear-toy")


def micro_model() -> Model:
    """A float64 model of one layer, one head and one neuron that can be worked out on paper.

    Token embeddings ``E[0] = (4, 0)``, ``E[1] = (0, 2)``, ``E[2] = (1, 1)``, ``E[3] = (0, 0)``; no positional embedding, no norm. The head looks
    evenly at all positions so far and copies: ``attn_out[p] = mean(x[0..p])``. The neuron reads the first coordinate of the
    residual stream, ``ReLU(r₀ − 2)``, and writes ``(2, 0)`` per unit. The logits of tokens 0 and 1 are the two coordinates
    of the stream; those of tokens 2 and 3 are zero.
    """
    model = native("micro-model", {"n_layers": 1, "d_model": 2, "n_heads": 1, "d_head": 2, "d_mlp": 1, "d_vocab": 4})
    identity = torch.eye(2)
    values = {
        "embed": torch.tensor([[4.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]]),
        "v": identity,
        "o": identity,
        "fc_in": torch.tensor([[1.0, 0.0]]),
        "fc_out": torch.tensor([[2.0], [0.0]]),
        "unembed": torch.cat([identity, torch.zeros(2, 2)]),
    }
    bridge, block = model.bridge, model.bridge.blocks[0]
    modules = {
        "embed": bridge.embed.original_component,
        "v": block.attn.v.original_component,
        "o": block.attn.o.original_component,
        "fc_in": block.mlp.original_component.fc_in,
        "fc_out": block.mlp.original_component.fc_out,
        "unembed": bridge.unembed.original_component,
    }
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.zero_()
        for name, module in modules.items():
            module.weight.copy_(values[name])
        block.mlp.original_component.fc_in.bias.fill_(-2.0)
    return Model(bridge, "micro-model", test=False)  # zero weights pass no self-test


def micro_task(metric: str | Metric = "logit_diff") -> Task:
    """One pair for :func:`micro_model`: clean tokens (0, 2), corrupted (1, 2), logit of 0 minus logit of 1."""
    return Task("micro", (Pair((0, 2), (1, 2), (0,), (1,)),), METRICS[metric] if isinstance(metric, str) else metric)


def toy_task(model: Model, n: int = 3, length: int = 5, *, metric: str | Metric = "logit_diff", seed: int = 0) -> Task:
    """Pairs of random tokens of one length; the second token and the one before the last differ."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(n):
        tokens = torch.randint(0, model.vocab_size, (length,), generator=generator)
        corrupted = tokens.clone()
        corrupted[[1, length - 2]] = (corrupted[[1, length - 2]] + 1) % model.vocab_size
        correct, incorrect = torch.randperm(model.vocab_size, generator=generator)[:2].tolist()
        pairs.append(Pair(tuple(tokens.tolist()), tuple(corrupted.tolist()), (correct,), (incorrect,)))
    return Task("toy", tuple(pairs), METRICS[metric] if isinstance(metric, str) else metric)


def native(name: str, config: dict[str, Any]) -> Model:
    """A TransformerLens-native model in float64, without norms unless asked for; its self-test waits for its weights."""
    from transformer_lens.model_bridge.sources.native import boot

    options = {"n_ctx": 16, "act_fn": "relu", "normalization_type": None, "seed": 0, **config}
    return Model(boot(options, dtype=torch.float64), name, test=False)
