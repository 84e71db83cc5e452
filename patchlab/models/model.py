"""A model that patchlab can run: a thin wrapper around a TransformerLens bridge."""

import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from patchlab.adapters import Accessor, BridgedModel, describe
from patchlab.adapters.dictionaries import FeatureSite, SparseDictionary
from patchlab.adapters.weights import every_weight, is_offloaded
from patchlab.engine import Program, Result, continues, run, session_of
from patchlab.engine.hook_points import points_of
from patchlab.engine.program import row_numbers, targets
from patchlab.engine.trust.conservation import check_rules, soft_caps, uncovered
from patchlab.engine.trust.self_test import add_dictionaries, add_site, drop_dictionaries, self_test
from patchlab.errors import InterventionError, ModelError
from patchlab.interventions import Edit, as_edits
from patchlab.rules import Composite, SoftCap, Uncovered
from patchlab.sites import Site
from patchlab.tasks.task import Prompts


class Model(BridgedModel):
    """A language model that patchlab can run: a TransformerLens bridge in raw mode, in eval mode, with frozen parameters.

    Attributes:
        name: how results refer to it.
        bridge: the TransformerLens bridge.
        tokenizer: the Hugging Face tokenizer, or None.
        arch: sizes, block form, and which sites the model has (:class:`patchlab.adapters.Architecture`).
    """

    def __init__(self, bridge: TransformerBridge, name: str, tokenizer: Any = None, *, test: bool = True) -> None:
        bridge.eval()
        for parameter in bridge.parameters():
            parameter.requires_grad_(False)
        dtype = next(p.dtype for p in bridge.parameters() if p.is_floating_point())
        super().__init__(bridge, points_of(bridge), name, describe(bridge, vocab_size=_vocab_size(bridge)), dtype, _device(bridge, name, dtype))
        self.tokenizer = tokenizer
        if test:
            with session_of(self).running():
                self.arch = self_test(self)
                self.keeps_logits = _keeps_logits(self)
                continues(self)
        self.fingerprint = fingerprint_of(bridge)

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
        ids = self.as_tokens(tokens if prompts is None else prompts.tokens)
        named = {"END": -1, **({} if prompts is None else prompts.positions), **(positions or {})}
        program = Program(
            ids,
            row_numbers(ids) if prompts is None else prompts.examples,
            positions={name: self._position(name, index, ids) for name, index in named.items()},
            edits=as_edits(edits),
            keep=self._targets(keep),
            logits="all",
        )
        return run(self, program)

    def add_site(self, accessor: Accessor, sizes: Mapping[str, int] = MappingProxyType({})) -> None:
        """Give the model a site kind of its own, such as the features of a dictionary; it is tested first.

        Args:
            accessor: reads the site from a hook's tensor and writes it there. Its kind is known to :func:`patchlab.sites.add_kind`.
            sizes: lengths of the axes that only this kind has, such as ``{"feature": 16384}``.

        Raises:
            SiteError: an unknown kind, one that the model has already, or an axis of another length.
            ModelError: the accessor does not read and write what the kind says.
        """
        add_site(self, accessor, sizes)

    def add_dictionaries(self, dictionaries: SparseDictionary | Iterable[SparseDictionary]) -> None:
        """Give the model the features and errors of dictionaries as sites (:mod:`patchlab.adapters.dictionaries`); they are tested first.

        The forward pass is not changed: features are read off, and an edit moves the activation by the change of the decoded features. All
        dictionaries of a point (``resid_post``, say) are added at once, at most one per layer; their widths may differ, and layers may have none.

        Raises:
            SiteError: dictionaries that do not fit the model, two on one layer and point, or a point that has dictionaries already.
            ModelError: a dictionary fails the tests.

        Example:
            >>> model.add_dictionaries(pl.load_dictionaries("demo-gpt2", model, kind="sae"))  # doctest: +SKIP
            >>> scores = pl.RelevancePatching().run(model, task, ["features", "error"])  # doctest: +SKIP
        """
        add_dictionaries(self, [dictionaries] if isinstance(dictionaries, SparseDictionary) else dictionaries)

    def drop_dictionaries(self) -> None:
        """Take all dictionaries off the model."""
        drop_dictionaries(self)

    @property
    def dictionaries(self) -> Mapping[str, Mapping[int, Any]]:
        """The dictionaries of the model, by the point that they write to and the layer that they read."""
        sites = [one for one in self.arch.accessors.values() if isinstance(one, FeatureSite)]
        return {site.point.name: {layer: one.dictionary for layer, one in sorted(site.point.of.items())} for site in sites}

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
        found = targets(keep, self.arch)
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

    def as_tokens(self, tokens: Any) -> Int[Tensor, "row pos"]:
        """Token ids of a text, texts with one number of tokens, ids or rows of them, on the model's device.

        Raises:
            InterventionError: no prompts, unequal lengths, ids that the model lacks, or more tokens than it reads.
        """
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


def _device(bridge: TransformerBridge, name: str, dtype: torch.dtype) -> torch.device:
    """The device that a model runs on; weights may be kept elsewhere, in the CPU's memory or on disk, as accelerate's ``device_map`` says.

    Raises:
        ModelError: it runs on several devices, keeps weights in half precision elsewhere, or has weights that are nowhere.
    """
    if not is_offloaded(bridge):
        devices = {parameter.device for parameter in bridge.parameters()}
    else:
        hooks = [getattr(module, "_hf_hook", None) for module in bridge.modules()]
        devices = {torch.device(where) for hook in hooks if (where := getattr(hook, "execution_device", None)) is not None}
        devices |= {parameter.device for parameter in bridge.parameters()} - {torch.device("meta")}
        for where, module in bridge.named_modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)) and not hasattr(module, "_hf_hook"):
                raise ModelError(
                    f"{name} has weights that hold no numbers ({where} is on torch's meta device, and no hook of accelerate brings them). Load the "
                    f"model with load_model(..., device_map=...), or whole on one device."
                )
        if dtype in (torch.float16, torch.bfloat16):
            raise ModelError(
                f"{name} keeps weights elsewhere (its device_map offloads them) and is in {str(dtype).removeprefix('torch.')}: the tests at load "
                f"compute its blocks in float32, which offloaded weights cannot be turned into. Load it with dtype='float32', or on one device."
            )
    if len(devices) != 1:
        raise ModelError(
            f"{name} runs on {', '.join(sorted(map(str, devices)))}; scores, edits and rules of several layers meet on one device. Load it on "
            f"one (device=...); what does not fit there can be kept in the CPU's memory or on disk (device_map='auto' on one visible GPU)."
        )
    return devices.pop()


def _vocab_size(bridge: TransformerBridge) -> int:
    size = getattr(bridge.cfg, "d_vocab_out", None) or bridge.cfg.d_vocab
    return int(size if size and size > 0 else bridge.cfg.d_vocab)


def fingerprint_of(bridge: nn.Module) -> str:
    """A short hash of names, shapes, a sample and a checksum of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in every_weight(bridge):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        # the bits as whole numbers: their sum does not depend on the order of summation, and every changed weight changes it
        bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]) if flat.is_floating_point() else flat
        digest.update(f"{name}{list(parameter.shape)}{int(bits.sum(dtype=torch.int64))}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
