"""Models from the package, a directory, the hub or memory."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from patchlab.adapters.weights import every_weight
from patchlab.errors import ModelError, unknown
from patchlab.models.hub import hub_folder
from patchlab.models.model import Model

_FOLDER = Path(__file__).parent / "demo"
DEMO_MODELS: dict[str, Path] = {path.name: path for path in sorted(_FOLDER.glob("*/")) if (path / "config.json").is_file()}
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def load_model(
    name_or_path: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> Model:
    """Load a packaged demo model, a local Hugging Face directory, or a hub name that TransformerLens can bridge; or take a model in memory.

    Args:
        name_or_path: ``demo-gpt2``, a directory with a config.json, a hub name such as ``gpt2``, or a Hugging Face causal language model.
            A model in memory is taken over as it is: bridged in place, frozen, in eval mode and with eager attention.
        tokenizer: a Hugging Face tokenizer, instead of the one that lies beside the weights; a model in memory has none of its own.
        device: default CUDA if present, else CPU; ``mps`` only on request. A model in memory stays where it is.
        dtype: default float32; a model in memory stays as it is.
        device_map: where weights are kept, as Hugging Face takes it, instead of a device: ``{"": "cpu", "model.layers.3": "disk"}``. The model
            runs on one device all the same; weights that are kept elsewhere are fetched for each use, which is slow.
        offload_folder: for weights on disk.

    Raises:
        ModelError: unknown name, unreachable hub, unsupported architecture, missing device, or a failed self-test.

    Example:
        >>> load_model("demo-gpt2-4l").arch.n_layers  # doctest: +SKIP
        4
        >>> load_model(AutoModelForCausalLM.from_pretrained(path), tokenizer=AutoTokenizer.from_pretrained(path))  # doctest: +SKIP
    """
    if device_map is not None and (device is not None or isinstance(name_or_path, nn.Module)):
        what = "device=" if device is not None else "a model in memory, which is where it is"
        raise ModelError(f"device_map= says where weights are kept, and so does {what}; give one of them.")
    if isinstance(name_or_path, nn.Module):
        return _taken_over(name_or_path, tokenizer, None if device is None else chosen_device(device), None if dtype is None else _dtype(dtype))
    where: Any = chosen_device(device) if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    kind = _dtype(dtype)
    name = str(name_or_path)
    if name in DEMO_MODELS:
        folder = DEMO_MODELS[name]
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise ModelError(f"the directory {folder} has no config.json; give a Hugging Face model directory.")
        name = folder.name
    elif name.startswith(("/", ".", "~")):
        raise ModelError(f"there is no directory {name}; give a Hugging Face model directory, a hub name, or one of: {', '.join(DEMO_MODELS)}.")
    else:
        folder = hub_folder(name, DEMO_MODELS)
    return _load_folder(folder, name, where, kind, tokenizer)


def wrap_bridge(bridge: TransformerBridge, name: str, tokenizer: Any = None) -> Model:
    """Wrap a TransformerLens bridge that you built yourself (it is frozen and set to eval mode)."""
    return Model(bridge, name, tokenizer)


def _taken_over(module: nn.Module, tokenizer: Any, device: torch.device | None, dtype: torch.dtype | None) -> Model:
    """A model that is already in memory."""
    config: Any = getattr(module, "config", None)
    name = str(getattr(config, "name_or_path", "") or type(module).__name__)
    if hasattr(module, "hook_dict"):
        raise ModelError(f"{name} is a TransformerLens bridge already; use patchlab.wrap_bridge.")
    if config is None or not hasattr(module, "set_attn_implementation"):
        raise ModelError(f"a model in memory is a Hugging Face causal language model; got {type(module).__name__}. For a bridge use wrap_bridge.")
    try:
        module.set_attn_implementation("eager")  # type: ignore[operator]
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{name}: its attention cannot be made eager, which hooks need: {_first_line(error)}") from error
    module.to(device=device, dtype=dtype)
    return _with_bridge(cast(PreTrainedModel, module), name, tokenizer)


def bridge_module(module: PreTrainedModel, name: str, tokenizer: Any = None) -> TransformerBridge:
    """A TransformerLens bridge of a Hugging Face model, which it changes, after a look at whether it still computes the same.

    Raises:
        ModelError: TransformerLens cannot bridge the model, or the bridge gives other logits.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    kind = type(module).__name__
    if any(isinstance(part, GeneralizedComponent) for part in module.modules()):
        raise ModelError(f"{name}: this {kind} has been bridged before, which changes it; load or build it again, or use the first Model.")
    _check_weights(module, name)
    length = min(6, int(getattr(module.config, "max_position_embeddings", None) or 6))
    embeddings: Any = module.get_input_embeddings()
    tokens = torch.arange(length)[None] % int(embeddings.num_embeddings)
    tokens = tokens.to(_first_device(module))
    where, errors = "", (ValueError, KeyError, NotImplementedError, AttributeError, RuntimeError)
    with torch.no_grad():
        try:
            where = f"{kind} does not run in {module.dtype}"
            expected = module.eval()(tokens, use_cache=False).logits
            where = f"TransformerLens cannot bridge {kind}"
            bridge = build_bridge_from_module(module, kind, hf_config=module.config, tokenizer=tokenizer)
            where = f"{kind}, bridged by TransformerLens, does not run in {module.dtype}"
            got = bridge.eval()(tokens, return_type="logits", use_cache=False)
        except errors as error:
            raise ModelError(f"{name}: {where}: {_first_line(error)}") from error
    # both ways round differently, in half precision by up to a tenth where experts are chosen by a narrow margin
    allowed = 0.25 if expected.dtype in (torch.float16, torch.bfloat16) else 2e-3
    if (off := float((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))) > allowed:
        raise ModelError(
            f"{name}: bridged by TransformerLens, {kind} gives other logits than by itself (off by {off:.2g} of their size), so nothing measured on "
            f"it would be about the model. Its configuration may have an option that the Bridge does not know."
        )
    return bridge


def _check_weights(module: nn.Module, name: str) -> None:
    """Check that every weight is a number.

    Raises:
        ModelError: NaN or infinite weights, with what was found where.
    """
    found, count = [], 0
    for part, weight in every_weight(module):
        count += 1
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            kinds = ((int(torch.isnan(weight).sum()), "NaN"), (int(torch.isinf(weight).sum()), "infinite"))
            found.append(f"{part} ({' and '.join(f'{n:,} {what}' for n, what in kinds if n)} of {weight.numel():,} values)")
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ModelError(
            f"{name}: {len(found)} of {count} parameters hold weights that are no numbers: {', '.join(found[:3])}{more}. Every score would be "
            f"NaN. The file is damaged, training diverged, or {str(next(module.parameters()).dtype).removeprefix('torch.')} is too small for the "
            f"weights: load another checkpoint, or with dtype='float32'."
        )


def _first_device(module: PreTrainedModel) -> torch.device:
    """Where a model's tokens go."""
    embeddings: Any = module.get_input_embeddings()
    first = next(embeddings.parameters()).device
    return first if first.type != "meta" else torch.device(embeddings._hf_hook.execution_device)


def _with_bridge(module: PreTrainedModel, name: str, tokenizer: Any) -> Model:
    # the Bridge gives its tokenizer special tokens that the model was not trained with, so it gets a copy
    return Model(bridge_module(module, name, copy.deepcopy(tokenizer)), name, tokenizer)


def _load_folder(folder: Path, name: str, where: torch.device | dict[str, Any], dtype: torch.dtype, tokenizer: Any = None) -> Model:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **(where if isinstance(where, dict) else {}),
            )
            module, report = loaded
    except Exception as error:  # every file format has its own errors
        raise ModelError(f"{name}: the files in {folder} could not be loaded as a causal language model: {_first_line(error)}") from error
    # without this check, weights that are not in the files would be random numbers
    if wrong := sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"]):
        raise ModelError(f"{name}: {len(wrong)} weights are missing from {folder} or have another shape than config.json says, such as {wrong[0]}.")
    if isinstance(where, torch.device):
        module.to(where)
    return _with_bridge(module, name, _tokenizer(folder, name) if tokenizer is None else tokenizer)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar for loading weights; the user's setting comes back afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(folder: Path, name: str) -> Any:
    """The directory's tokenizer, after a round trip; None where there are no tokenizer files.

    Tried in turn: the class that the directory names, then tokenizer.json as it is, because a class chosen by the model type
    can ignore tokenizer.json and return no ids at all.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")):
        return None
    why = "it does not turn its own tokens into ids and back"
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # every file format has its own errors
            why = _first_line(error)
            continue
        if _round_trips(tokenizer):
            return tokenizer
    raise ModelError(f"{name}: the tokenizer in {folder} cannot be used: {why}. Check tokenizer.json.")


def _round_trips(tokenizer: Any) -> bool:
    """Whether most of a sample of the vocabulary survives decoding and encoding."""
    special = set(tokenizer.all_special_ids)
    ids = [token_id for token_id in range(len(tokenizer)) if token_id not in special]
    texts = [tokenizer.decode([token_id]) for token_id in ids[:: max(1, len(ids) // 50)]]
    back = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    kept = sum(bool(text.strip()) and text.strip() == again.strip() for text, again in zip(texts, back, strict=True))
    return kept > len(texts) / 2


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for; None for CUDA if present, else the CPU.

    Raises:
        ModelError: an unknown device, or one that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(_unknown_device(device)) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(device)!r} was asked for, but this machine (or this build of torch) has no CUDA. Use device='cpu'.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {str(device)!r} was asked for, but this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' was asked for, but it is not available here. Use device='cpu'.")
    if found.type not in ("cpu", "cuda", "mps"):
        raise ModelError(_unknown_device(device))
    return found


def _unknown_device(device: str | torch.device) -> str:
    return f"unknown device {str(device)!r}; give 'cpu', 'cuda', 'cuda:1' or 'mps' (one device; device_map= keeps elsewhere what does not fit there)."


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(unknown("dtype", name, _DTYPES))
    return getattr(torch, name)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
