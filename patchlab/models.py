"""Models: a thin wrapper around a TransformerLens bridge, loaded from the package, a directory or the hub."""

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from patchlab.adapters import describe
from patchlab.engine import Program, Result, run
from patchlab.engine.program import targets
from patchlab.engine.selftest import self_test
from patchlab.errors import InterventionError, ModelError, unknown
from patchlab.interventions import Edit
from patchlab.sites import Site

_FOLDER = Path(__file__).parent / "demo_models"
DEMO_MODELS: dict[str, Path] = {path.name: path for path in sorted(_FOLDER.glob("*/")) if (path / "config.json").is_file()}
HUB_TIMEOUT = 2.0
"""Seconds to wait for the hub's answer about a model that is not in the cache."""


class Model:
    """A language model that patchlab can run: a TransformerLens bridge in raw mode, in eval mode, with frozen parameters.

    Attributes:
        name: how results refer to it.
        bridge: the TransformerLens bridge.
        tokenizer: the Hugging Face tokenizer, or None.
        arch: sizes, block form, and which sites the model has (:class:`patchlab.adapters.Architecture`).
        ambient: the edits of the surrounding ``pl.intervene`` blocks.
    """

    def __init__(self, bridge: Any, name: str, tokenizer: Any = None, *, test: bool = True) -> None:
        self.bridge, self.name, self.tokenizer = bridge, name, tokenizer
        self.ambient: tuple[Edit, ...] = ()
        bridge.eval()
        for parameter in bridge.parameters():
            parameter.requires_grad_(False)
        devices = {parameter.device for parameter in bridge.parameters()}
        if len(devices) != 1:
            raise ModelError(f"{name} is spread over {', '.join(sorted(map(str, devices)))}; patchlab runs on one device for now. Load it on one.")
        self.device: torch.device = devices.pop()
        self.dtype: torch.dtype = next(p.dtype for p in bridge.parameters() if p.is_floating_point())
        self.keeps_logits = False
        self.arch = describe(bridge, vocab_size=_vocab_size(bridge))
        if test:
            self.arch = self_test(self)
            self.keeps_logits = _keeps_logits(self)
        self.fingerprint = _fingerprint(bridge)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.arch.vocab_size

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, if the tokenizer has one."""
        return None if self.tokenizer is None else self.tokenizer.bos_token_id

    def to_ids(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Token ids of a text, with the bos token in front (default: if the tokenizer has one).

        Raises:
            ModelError: no tokenizer, or bos asked for where there is none.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self.name} has no tokenizer; give token ids instead of text.")
        bos = self.bos_id is not None if bos is None else bos
        if bos and self.bos_id is None:
            raise ModelError(f"the tokenizer of {self.name} has no bos token; use bos=False.")
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        return [self.bos_id, *ids] if bos else ids

    def run(
        self,
        tokens: str | list[str] | list[int] | list[list[int]] | Int[Tensor, "row pos"],
        *,
        edits: Edit | list[Edit] | tuple[Edit, ...] = (),
        keep: str | list[str | Site] | tuple[str | Site, ...] = (),
        positions: Mapping[str, int | Int[Tensor, " row"]] | None = None,
    ) -> Result:
        """Run prompts with edits, keeping activations.

        Args:
            tokens: a text, texts with the same number of tokens, or token ids.
            edits: applied in order.
            keep: sites to keep: a kind (``"z"``, all layers) or an address (``"L9.z"``).
            positions: what named positions in the edits mean; END is the last position unless given.

        Returns:
            A result with ``logits`` ``[row, pos, vocab]`` in logits and the kept activations, which can be the source of other edits.

        Example:
            >>> clean = model.run("When Mary and John ...", keep="z")  # doctest: +SKIP
            >>> model.run("When ...", edits=[pl.Edit("L9.H6.z@END", clean)]).logits.shape  # doctest: +SKIP
        """
        ids = self._tokens(tokens)
        rows = ids.shape[0]
        named = {"END": ids.shape[1] - 1} | dict(positions or {})
        indices = {
            name: index.to(self.device) if isinstance(index, Tensor) else torch.full((rows,), int(index), device=self.device) for name, index in named.items()
        }
        program = Program(
            ids,
            torch.arange(rows, device=self.device),
            positions=indices,
            edits=(edits,) if isinstance(edits, Edit) else tuple(edits),
            keep=self._targets(keep),
            logits="all",
        )
        return run(self, program)

    def _targets(self, keep: Any) -> tuple[tuple[str, int | None], ...]:
        found = targets(keep, self.arch.n_layers)
        for kind, layer in found:
            self.arch.check(Site(kind, (), layer=layer))
        return found

    def _tokens(self, tokens: Any) -> Int[Tensor, "row pos"]:
        if isinstance(tokens, str):
            tokens = [tokens]
        if isinstance(tokens, Tensor):
            ids = tokens if tokens.ndim == 2 else tokens[None]
        else:
            rows = [self.to_ids(row) if isinstance(row, str) else row for row in tokens]
            rows = [rows] if rows and isinstance(rows[0], int) else rows
            lengths = sorted({len(row) for row in rows})
            if len(lengths) != 1 or lengths[0] == 0:
                raise InterventionError(f"a run needs prompts with one common number of tokens, at least 1; got {lengths or 'no prompts'}. Run lengths apart.")
            ids = torch.tensor(rows, dtype=torch.long)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InterventionError(f"token ids must lie in 0 to {self.vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}.")
        return ids.to(self.device)

    def __repr__(self) -> str:
        a = self.arch
        heads = f"{a.n_heads} heads" + (f" ({a.n_kv_heads} kv)" if a.n_kv_heads != a.n_heads else "")
        absent = f"; absent: {', '.join(a.absent)}" if a.absent else ""
        return f"Model({self.name}: {a.family}, {a.n_layers} layers, {heads}, d_model {a.d_model}; {self.dtype}, {self.device}{absent})"


def load_model(name_or_path: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Model:
    """Load a packaged demo model, a local Hugging Face directory, or a hub name that TransformerLens can bridge.

    Args:
        name_or_path: ``demo-gpt2``, a directory with a config.json, or a hub name such as ``gpt2``.
        device: default CUDA if present, else CPU; ``mps`` only on request.
        dtype: default float32.

    Raises:
        ModelError: unknown name, unreachable hub, unsupported architecture, missing device, or a failed self-test.

    Example:
        >>> load_model("demo-gpt2-4l").arch.n_layers  # doctest: +SKIP
        4
    """
    where, kind = _device(device), _dtype(dtype)
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
        folder = _from_hub(name)
    return _load_folder(folder, name, where, kind)


def wrap_bridge(bridge: Any, name: str, tokenizer: Any = None) -> Model:
    """Wrap a TransformerLens bridge that you built yourself (it is frozen and set to eval mode)."""
    return Model(bridge, name, tokenizer)


def _load_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Model:
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: the files in {folder} could not be loaded as a causal language model: {_first_line(error)}") from error
    module.to(device)
    tokenizer = _tokenizer(folder, name)
    try:
        bridge = build_bridge_from_module(module, type(module).__name__, hf_config=module.config, tokenizer=tokenizer)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"{name}: TransformerLens cannot bridge {type(module).__name__}: {_first_line(error)}") from error
    return Model(bridge, name, tokenizer)


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
    """The directory's tokenizer, after a round trip; None where there are no tokenizer files."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not _round_trips(tokenizer) and (folder / "tokenizer.json").is_file():
        # a class named by the model type can ignore tokenizer.json and return no ids at all
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not _round_trips(tokenizer):
        raise ModelError(f"{name}: the tokenizer in {folder} does not turn its own tokens into ids and back; check tokenizer.json.")
    return tokenizer


def _round_trips(tokenizer: Any) -> bool:
    special = set(tokenizer.all_special_ids)
    some = [token_id for token_id in range(min(len(tokenizer), 300)) if token_id not in special][-20:]
    tried = [(i, tokenizer.encode(tokenizer.decode([i]), add_special_tokens=False)) for i in some]
    return bool(tried) and sum(ids == [i] for i, ids in tried) >= len(tried) // 2


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub model: from the cache, else downloaded, after one short question whether it exists."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    hint = f"Packaged models: {', '.join(DEMO_MODELS)}; or give a local directory."
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise ModelError(unknown("model", name, DEMO_MODELS, more="Or give a local directory or a hub name.")) from error
    if isinstance(cached, str):
        return Path(cached).parent
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ModelError(unknown("model", name, DEMO_MODELS, more=f"It is not in the hub cache, and HF_HUB_OFFLINE is set. {hint}"))
    _ask_hub(name, hint)
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    folder = Path(snapshot_download(name, allow_patterns=patterns))
    if not list(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, allow_patterns=[*patterns, "*.bin"]))
    return folder


def _ask_hub(name: str, hint: str) -> None:
    """One HEAD request, no retry, so that a missing network is an error within seconds."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    headers = {"Authorization": f"Bearer {token}"} if (token := os.environ.get("HF_TOKEN")) else {}
    request = urllib.request.Request(f"{endpoint}/{name}/resolve/main/config.json", method="HEAD", headers=headers)
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError as error:
        why = {401: "it does not exist or is private", 403: "access to it is restricted", 404: "the hub has no such model"}.get(error.code, f"HTTP {error.code}")
        raise ModelError(unknown("model", name, DEMO_MODELS, more=f"Not cached, and {why}. Set HF_TOKEN for gated models. {hint}")) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ModelError(
            unknown("model", name, DEMO_MODELS, more=f"Not cached, and the hub at {endpoint} did not answer within {HUB_TIMEOUT:g} s ({reason}). {hint}")
        ) from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {str(device)!r}; give 'cpu', 'cuda', 'cuda:1' or 'mps' (one device; a model spread over several is not supported).") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(device)!r} was asked for, but this machine (or this build of torch) has no CUDA. Use device='cpu'.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' was asked for, but it is not available here. Use device='cpu'.")
    return found


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {dtype!r}; give 'float32', 'float64', 'bfloat16' or 'float16'.")
    return found


def _keeps_logits(model: Model) -> bool:
    """Whether the model can be asked for the last position's logits only."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        try:
            short = model.bridge(tokens, return_type="logits", use_cache=False, logits_to_keep=1)
        except TypeError:
            return False
        full = model.bridge(tokens, return_type="logits", use_cache=False)[:, -1]
        return short.shape[1] == 1 and torch.allclose(short[:, -1], full, rtol=1e-3, atol=1e-3 * float(full.abs().max()))


def _vocab_size(bridge: Any) -> int:
    size = getattr(bridge.cfg, "d_vocab_out", None) or bridge.cfg.d_vocab
    return int(size if size and size > 0 else bridge.cfg.d_vocab)


def _fingerprint(bridge: nn.Module) -> str:
    """A short hash of names, shapes and a sample of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(bridge.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
