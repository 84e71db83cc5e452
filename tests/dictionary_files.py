"""Files of dictionaries made by hand, and what a dictionary of that file computes, literally, in float64."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D, WIDTH = 16, 24


def draw(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    """Random numbers, exact in float32."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).double()


def weights(d_in: int = D, width: int = WIDTH, d_out: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """The four tensors in the layout of SAELens, float64."""
    d_out = d_in if d_out is None else d_out
    return {
        "W_enc": draw(d_in, width, seed=seed, size=d_in**-0.5),
        "b_enc": draw(width, seed=seed + 1, size=0.2),
        "W_dec": draw(width, d_out, seed=seed + 2, size=width**-0.5),
        "b_dec": draw(d_out, seed=seed + 3, size=0.3),
    }


def relu(pre: Tensor) -> Tensor:
    return torch.where(pre > 0, pre, torch.zeros_like(pre))


def topk(pre: Tensor, k: int, *, absolute: bool = False) -> Tensor:
    """The k largest of each row, the others zero; one row at a time."""
    out = torch.zeros_like(pre)
    for row, kept in zip(pre.flatten(0, -2), out.flatten(0, -2), strict=True):
        for i in sorted(range(len(row)), key=lambda i: -abs(float(row[i])) if absolute else -float(row[i]))[:k]:
            kept[i] = row[i]
    return out


def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files have them."""
    return {name: value.to(torch.float32).contiguous() if value.is_floating_point() else value for name, value in tensors.items()}


def write_saelens(folder: Path, tensors: dict[str, Tensor], cfg: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(single(tensors), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def saelens_cfg(architecture: str = "standard", hook: str = "blocks.1.hook_resid_post", model: str = "gpt2", **more: Any) -> dict[str, Any]:
    """The configuration of a SAELens 6 folder."""
    metadata = {"sae_lens_version": "6.54.12", "model_name": model, "hook_name": hook, "hook_head_index": None, **more.pop("metadata", {})}
    return {
        "d_in": D,
        "d_sae": WIDTH,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
        "architecture": architecture,
        **more,
    }
