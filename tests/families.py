"""Small models with random weights, one of each architecture, and small tasks of random tokens for them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

import patchlab as pl
from patchlab.methods.method import Method
from patchlab.metrics import METRICS, Metric
from patchlab.models import Model, wrap_bridge
from patchlab.scores import ScoreMap
from patchlab.tasks.task import Pair, Task
from patchlab.testing.zoo import D_MLP, HEADS, LAYERS, VOCAB, WIDTH, zoo_bridge, zoo_model, zoo_module

FAMILIES = ("gpt2", "neox", "neox-sequential", "llama", "qwen2", "qwen3", "gemma2", "native")
SITES = (
    "input",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "z[layer,pos,head]",
    "q",
    "k[layer,pos,kv_head]",
    "v",
    "mlp_post",
)
"""Every kind of site but the pattern, some at a finer granularity."""
GATED = ("llama", "qwen2", "qwen3", "gemma2")
GROUPED = GATED


def hf_module(family: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS, seed: int = 0) -> Any:
    """A Hugging Face model of the zoo."""
    return zoo_module(family, dtype, layers, seed)


def bridged(module: Any, name: str) -> Model:
    """A Hugging Face module as a model."""
    return wrap_bridge(zoo_bridge(module), name)


def untested(module: Any, name: str) -> Model:
    """The same without the load-time self-test, for weights that it would refuse."""
    return Model(zoo_bridge(module), name, test=False)


def native_model(name: str = "native", *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Model:
    """A TransformerLens-native model with random weights."""
    from transformer_lens.model_bridge.sources.native import boot

    config = {"n_layers": LAYERS, "d_model": WIDTH, "n_ctx": 24, "d_head": 4, "n_heads": HEADS, "d_mlp": D_MLP, "d_vocab": VOCAB}
    bridge = boot({**config, "act_fn": "gelu", "normalization_type": "LN", "seed": 0, **options}, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in bridge.named_parameters():
            is_scale = "ln" in parameter_name and parameter_name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 + float(is_scale))
    return wrap_bridge(bridge, name)


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Model:
    """The model of a family, built once; nothing that runs may change it."""
    if family == "native":
        return native_model(dtype=dtype, n_layers=layers)
    return zoo_model(family, dtype, layers)


def pair(length: int, changed: Sequence[int], seed: int, *, template: str = "", **positions: int) -> Pair:
    """A pair of random tokens that differ at the given positions."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randperm(VOCAB, generator=generator).tolist()
    clean = draw[:length]
    corrupted = [draw[length + 3 + i] if i in changed else token for i, token in enumerate(clean)]
    return Pair(tuple(clean), tuple(corrupted), (draw[-1],), (draw[-2],), positions, template)


def swap_task(n: int = 3, length: int = 5, changed: Sequence[int] = (1, 3), metric: str | Metric = "logit_diff", seed: int = 0) -> Task:
    """Pairs of one length that differ at the same positions."""
    chosen = METRICS[metric] if isinstance(metric, str) else metric
    return Task("swap", tuple(pair(length, changed, seed + i) for i in range(n)), chosen)


def mixed_task(metric: str | Metric = "logit_diff") -> Task:
    """Pairs of two lengths, interleaved, with a named position that moves."""
    chosen = METRICS[metric] if isinstance(metric, str) else metric
    pairs = (
        pair(5, (1,), 11, template="short", A=1, B=2),
        pair(6, (2,), 12, template="long", A=2, B=4),
        pair(5, (2, 3), 13, template="other", A=3, B=2),
        pair(6, (4,), 14, template="long", A=1, B=4),
    )
    return Task("mixed", pairs, chosen)


def scores_of(method: Method, model: Model, task: Task, sites: Any, direction: str = "denoising", **options: Any) -> ScoreMap:
    """Run a method without a progress bar."""
    return method.run(model, task, sites, direction=direction, progress=False, **options)


def gap_task(n: int = 3, family: str = "gpt2", task: Task | None = None, **options) -> Task:
    """Random pairs, the answers ordered so that the clean metric is the higher one."""
    task = swap_task(n, **options) if task is None else task
    exact = scores_of(pl.ActivationPatching(), model_of(family, torch.float64), task, "input")
    higher = (exact.data["metric_clean"] > exact.data["metric_corrupted"]).to_numpy()
    return replace(
        task, pairs=tuple(p if up else replace(p, correct=p.incorrect, incorrect=p.correct) for p, up in zip(task.pairs, higher, strict=True))
    )
