"""What the benchmarks share: models of a shape with random weights, random prompt pairs, clocks, and how results are printed."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from patchlab.metrics import METRICS
from patchlab.models import Model, wrap_bridge
from patchlab.tasks.task import Pair, Task

WORKLOADS = {"S2": (10 / 15,), "ABC": (2 / 15, 4 / 15, 10 / 15)}
"""Which tokens of a pair differ, as shares of the length: the second subject of an IOI prompt, or all three names."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``kv_heads`` and ``inner`` are for the families of Llama and Gemma-2 only."""

    family: str
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 4
    inner: int = 2048
    vocab: int = 50257
    positions: int = 1024

    @property
    def d_head(self) -> int:
        """Width of a head: Gemma-2's is not its share of the width."""
        return 256 if self.family == "gemma2" and self.width >= 2048 else self.width // self.heads

    @property
    def block_parameters(self) -> int:
        """Weights of one block that every token passes through."""
        d = self.width
        if self.family == "gpt2":
            return 12 * d * d
        return 2 * d * self.d_head * (self.heads + self.kv_heads) + 3 * d * self.inner

    def forward_flops(self, tokens: int) -> int:
        """Of a whole forward pass with logits everywhere, without attention scores."""
        return 2 * tokens * (self.layers * self.block_parameters + self.vocab * self.width)


GPT2, LLAMA = Shape("gpt2"), Shape("llama", vocab=32000)
TINY_GPT2, TINY_LLAMA = Shape("gpt2", 3, 32, 4, vocab=120), Shape("llama", 3, 32, 4, 2, 48, 120)


def hf_module(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A Hugging Face model with random weights and eager attention, built on the device in its dtype: another one has other weights."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    if shape.family == "gpt2":
        config: Any = GPT2Config(vocab_size=shape.vocab, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads, n_positions=shape.positions)
    else:
        sizes: dict[str, Any] = {
            "vocab_size": shape.vocab,
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
        }
        config = Gemma2Config(head_dim=shape.d_head, **sizes) if shape.family == "gemma2" else LlamaConfig(**sizes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval().to(device)


def bridged(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Model:
    """The same model, the way patchlab and TransformerLens run it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = hf_module(shape, device).to(dtype)
    bridge = build_bridge_from_module(module, type(module).__name__, hf_config=module.config, tokenizer=None)
    return wrap_bridge(bridge, f"{shape.family}-shape")


def random_task(workload: str, vocab: int, *, pairs: int = 8, length: int = 15, seed: int = 0) -> Task:
    """Random prompt pairs that differ where a workload says."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(pairs):
        clean = torch.randint(0, vocab, (length,), generator=generator).tolist()
        corrupted = list(clean)
        for share in WORKLOADS[workload]:
            corrupted[round(share * length)] = (clean[round(share * length)] + 7) % vocab
        correct, incorrect = torch.randperm(vocab, generator=generator)[:2].tolist()
        found.append(Pair(tuple(clean), tuple(corrupted), (correct,), (incorrect,), {}))
    return Task(workload, tuple(found), METRICS["logit_diff"])


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result: CPU time of this process, or on a GPU the time until it is done."""
    on_gpu = device != "cpu"
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started, result


def quietly(work: Callable[[], Any]) -> Any:
    """Run something without what it writes to stderr (progress bars of other packages)."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        return work()


def median(values: list[float]) -> float:
    """The median, to four digits."""
    return float(f"{statistics.median(values):.4g}")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads")
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer maps and repeats")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # seconds, for the tests: ratios mean nothing
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats; medians of ratios are reported")
    return parser


def machine(device: str) -> dict[str, Any]:
    """What a ratio depends on: processor, threads, versions."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformer-lens", "transformers")}
    found = {"cpu": _processor(), "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(), **packages}
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    clock = "process CPU time" if device == "cpu" and torch.get_num_threads() == 1 else "wall time"
    return {**found, "device": device, "matmul_precision": torch.get_float32_matmul_precision(), "clock": clock}


def _processor() -> str:
    try:
        listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
        return next(line.split(":", 1)[1].strip() for line in listed.splitlines() if line.startswith("Model name"))
    except (OSError, subprocess.SubprocessError, StopIteration):
        return platform.processor() or platform.machine()


def finish(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print the JSON object if it was asked for."""
    if options.json:
        print(json.dumps(report))
