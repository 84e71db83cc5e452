"""Models: a thin wrapper around a TransformerLens bridge, loaded from the package, a directory or the hub."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from patchlab.adapters import describe
from patchlab.engine import Program, Result, continues, run
from patchlab.engine.conservation import check_rules, soft_caps, uncovered
from patchlab.engine.points import points_of
from patchlab.engine.program import row_numbers, targets
from patchlab.engine.selftest import self_test
from patchlab.errors import InterventionError, ModelError, unknown
from patchlab.hub import hub_folder
from patchlab.interventions import Edit, as_edits
from patchlab.rules import Composite, SoftCap, Uncovered
from patchlab.sites import Site
from patchlab.tasks.base import Prompts

_FOLDER = Path(__file__).parent / "demo_models"
DEMO_MODELS: dict[str, Path] = {path.name: path for path in sorted(_FOLDER.glob("*/")) if (path / "config.json").is_file()}
_DTYPES = ("float32", "float64", "bfloat16", "float16")


class Model:
    """A language model that patchlab can run: a TransformerLens bridge in raw mode, in eval mode, with frozen parameters.

    Attributes:
        name: how results refer to it.
        bridge: the TransformerLens bridge.
        tokenizer: the Hugging Face tokenizer, or None.
        arch: sizes, block form, and which sites the model has (:class:`patchlab.adapters.Architecture`).
        ambient: the edits of the surrounding ``pl.intervene`` blocks.
        unfinished: what interrupted runs of methods left, for the same call to go on from.
    """

    def __init__(self, bridge: Any, name: str, tokenizer: Any = None, *, test: bool = True) -> None:
        self.bridge, self.name, self.tokenizer = bridge, name, tokenizer
        self.ambient: tuple[Edit, ...] = ()
        self.hooks: dict[str, Any] = points_of(bridge)
        self.support: Any = None
        self.continues: bool | None = None
        self.conserved: dict[Any, Any] = {}
        self.unfinished: dict[str, Any] = {}
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
            continues(self)
        self.fingerprint = _fingerprint(bridge)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.arch.vocab_size

    @property
    def n_positions(self) -> int | None:
        """Length of the longest prompt it reads; None where nothing limits it."""
        return self.arch.n_positions

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
        first = [] if self.bos_id is None or bos is False else [self.bos_id]
        if bos and not first:
            raise ModelError(f"the tokenizer of {self.name} has no bos token; use bos=False.")
        return [*first, *self.tokenizer.encode(text, add_special_tokens=False)]

    def run(
        self,
        tokens: str | list[str] | list[int] | list[list[int]] | Int[Tensor, "row pos"] | Prompts,
        *,
        edits: Edit | list[Edit] | tuple[Edit, ...] = (),
        keep: str | list[str | Site] | tuple[str | Site, ...] = (),
        positions: Mapping[str, int | Int[Tensor, " row"]] | None = None,
    ) -> Result:
        """Run prompts with edits, keeping activations.

        Args:
            tokens: a text, texts with the same number of tokens, token ids, or prompts of a task (``task.prompts("clean")``), which bring
                their named positions with them.
            edits: applied in order.
            keep: sites to keep: a kind (``"z"``, all layers) or an address (``"L9.z"``).
            positions: what named positions in the edits mean; END is the last position unless given.

        Returns:
            A result with ``logits`` ``[row, pos, vocab]`` in logits and the kept activations, which can be the source of other edits.

        Example:
            >>> clean = model.run("When Mary and John ...", keep="z")  # doctest: +SKIP
            >>> model.run("When ...", edits=[pl.Edit("L9.H6.z@END", clean)]).logits.shape  # doctest: +SKIP
        """
        prompts = tokens if isinstance(tokens, Prompts) else None
        ids = self._tokens(tokens if prompts is None else prompts.tokens)
        named = {"END": -1, **({} if prompts is None else prompts.positions), **(positions or {})}
        program = Program(
            ids,
            row_numbers(ids) if prompts is None else prompts.examples.to(self.device),
            positions={name: self._position(name, index, ids) for name, index in named.items()},
            edits=as_edits(edits),
            keep=self._targets(keep),
            logits="all",
        )
        return run(self, program)

    def check_rules(self, rules: Composite) -> None:
        """Check that backward rules cover this model, by a conservation test that is run once per model and kind of composite.

        Raises:
            RuleError: modules that no rule covers, unless ``rules.allow_gaps``.
        """
        check_rules(self, rules)

    def uncovered(self, rules: Composite) -> tuple[Uncovered, ...]:
        """The modules that backward rules do not cover (see :func:`patchlab.rules.coverage`)."""
        return uncovered(self, rules)

    def soft_caps(self) -> tuple[SoftCap, ...]:
        """The soft caps of this model, with what they lose of the relevance."""
        return soft_caps(self)

    def _targets(self, keep: Any) -> tuple[tuple[str, int | None], ...]:
        found = targets(keep, self.arch.n_layers)
        for kind, layer in found:
            self.arch.check(Site(kind, (), layer=layer))
        return found

    def _position(self, name: str, index: Any, ids: Int[Tensor, "row pos"]) -> Int[Tensor, " row"]:
        rows, length = ids.shape
        given = torch.as_tensor(index, device=self.device)
        if given.shape not in ((), (rows,)) or given.is_floating_point():
            raise InterventionError(f"the named position {name!r} is one index, or one per row ({rows} here); got {index!r}.")
        if not -length <= int(given.min()) <= int(given.max()) < length:
            raise InterventionError(f"the named position {name!r} is {index!r}, but the run has {length} positions (0 to {length - 1}).")
        return (given % length).expand(rows)

    def _tokens(self, tokens: Any) -> Int[Tensor, "row pos"]:
        if isinstance(tokens, str):
            tokens = [tokens]
        if isinstance(tokens, Tensor):
            ids = tokens[None] if tokens.ndim == 1 else tokens
            if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.dtype == torch.bool:
                raise InterventionError(f"token ids are whole numbers of shape [row, pos]; got shape {list(tokens.shape)} of {tokens.dtype}.")
        else:
            rows = [self.to_ids(row) if isinstance(row, str) else row for row in tokens]
            rows = [rows] if rows and isinstance(rows[0], int) else rows
            lengths = sorted({len(row) for row in rows})
            if len(lengths) != 1 or lengths[0] == 0:
                raise InterventionError(
                    f"a run needs prompts with one common number of tokens, at least 1; got {lengths or 'no prompts'}. Run lengths apart."
                )
            ids = torch.tensor(rows, dtype=torch.long)
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InterventionError(f"token ids must lie in 0 to {self.vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}.")
        if self.n_positions is not None and ids.shape[1] > self.n_positions:
            raise InterventionError(f"the prompts have {ids.shape[1]} tokens, and {self.name} reads {self.n_positions} at most. Shorten them.")
        return ids.to(self.device)

    def __repr__(self) -> str:
        a = self.arch
        heads = f"{a.n_heads} heads" + (f" ({a.n_kv_heads} kv)" if a.n_kv_heads != a.n_heads else "")
        absent = f"; absent: {', '.join(a.absent)}" if a.absent else ""
        return f"Model({self.name}: {a.family}, {a.n_layers} layers, {heads}, d_model {a.d_model}; {self.dtype}, {self.device}{absent})"


def load_model(
    name_or_path: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Model:
    """Load a packaged demo model, a local Hugging Face directory, or a hub name that TransformerLens can bridge; or take a model in memory.

    Args:
        name_or_path: ``demo-gpt2``, a directory with a config.json, a hub name such as ``gpt2``, or a Hugging Face causal language model.
            A model in memory is taken over as it is: bridged in place, frozen, in eval mode and with eager attention.
        tokenizer: a Hugging Face tokenizer, instead of the one that lies beside the weights; a model in memory has none of its own.
        device: default CUDA if present, else CPU; ``mps`` only on request. A model in memory stays where it is.
        dtype: default float32; a model in memory stays as it is.

    Raises:
        ModelError: unknown name, unreachable hub, unsupported architecture, missing device, or a failed self-test.

    Example:
        >>> load_model("demo-gpt2-4l").arch.n_layers  # doctest: +SKIP
        4
        >>> load_model(AutoModelForCausalLM.from_pretrained(path), tokenizer=AutoTokenizer.from_pretrained(path))  # doctest: +SKIP
    """
    if isinstance(name_or_path, nn.Module):
        return _taken_over(name_or_path, tokenizer, None if device is None else _device(device), None if dtype is None else _dtype(dtype))
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
        folder = hub_folder(name, DEMO_MODELS)
    return _load_folder(folder, name, where, kind, tokenizer)


def wrap_bridge(bridge: Any, name: str, tokenizer: Any = None) -> Model:
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
    return _with_bridge(module, name, tokenizer)


def bridge_module(module: Any, name: str, tokenizer: Any = None) -> Any:
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
    tokens = torch.arange(length)[None] % int(module.get_input_embeddings().num_embeddings)
    tokens = tokens.to(next(module.parameters()).device)
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
    for part, weight in module.named_parameters():
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


def _with_bridge(module: Any, name: str, tokenizer: Any) -> Model:
    # the Bridge gives its tokenizer special tokens that the model was not trained with, so it gets a copy
    return Model(bridge_module(module, name, copy.deepcopy(tokenizer)), name, tokenizer)


def _load_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype, tokenizer: Any = None) -> Model:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True
            )
            module, report = loaded
    except Exception as error:  # every file format has its own errors
        raise ModelError(f"{name}: the files in {folder} could not be loaded as a causal language model: {_first_line(error)}") from error
    # without this check, weights that are not in the files would be random numbers
    if wrong := sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"]):
        raise ModelError(f"{name}: {len(wrong)} weights are missing from {folder} or have another shape than config.json says, such as {wrong[0]}.")
    module.to(device)
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


def _device(device: str | torch.device | None) -> torch.device:
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
    return f"unknown device {str(device)!r}; give 'cpu', 'cuda', 'cuda:1' or 'mps' (one device; a model spread over several is not supported)."


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(unknown("dtype", name, _DTYPES))
    return getattr(torch, name)


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
    """A short hash of names, shapes, a sample and a checksum of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(bridge.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        # the bits as whole numbers: their sum does not depend on the order of summation, and every changed weight changes it
        bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]) if flat.is_floating_point() else flat
        digest.update(f"{name}{list(parameter.shape)}{int(bits.sum(dtype=torch.int64))}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
