"""Dictionaries: sparse autoencoders, transcoders and codebooks as frozen values."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.digest import digest
from patchlab.errors import DictionaryError, unknown
from patchlab.features.activations import Activation, Codes, Linear
from patchlab.features.normalisation import UNCHANGED, Normalisation
from patchlab.features.writer import write

KINDS = {
    "sae": "reads an activation and reconstructs it",
    "transcoder": "reads what an MLP reads and reconstructs what it writes",
    "cross_layer_transcoder": "a transcoder that writes to its own layer and all later ones",
    "multi_layer": "one sparse autoencoder for the same site of every layer",
    "codebook": "the sum of the k codes that fit an activation best",
}
"""Kinds of dictionaries. A skip transcoder is a transcoder with ``w_skip``."""


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """An encoder of an activation into sparse features, and a decoder.

    The pre-activations are ``(n(x) − b_dec) @ w_enc + b_enc`` (without ``− b_dec`` unless ``subtract_b_dec``), the features are the activation of
    those, and the output is ``n⁻¹(features @ w_dec + b_dec) + x @ w_skip``, where n is the normalisation; a transcoder, whose output is
    another activation than its input, does not undo it.

    All numbers are in units of the activation. Inputs are converted to the dtype of the weights, which is that of features and outputs.

    Args:
        name: for people: ``resid_post/3``, a repository, a folder.
        kind: one of :data:`KINDS`.
        layer: the layer that it reads; None for all (``multi_layer``).
        reads: the site kind that is encoded (``resid_post``, ``z``, ...), ``mlp_in`` (what the MLP itself reads, after the norm), or the name of a
            hook within its block (``ln2.hook_normalized``).
        writes: the site kind that is reconstructed: ``reads`` for an autoencoder, ``mlp_out`` for a transcoder.
        w_enc: encoder.
        b_enc: its bias.
        w_dec: decoder, a row per feature. Of a cross-layer transcoder one row per feature and layer, beginning with its own.
        b_dec: added to the output; of a cross-layer transcoder to that of its own layer.
        activation: which features are active.
        w_skip: a linear path from input to output.
        subtract_b_dec: whether the encoder reads the input less ``b_dec``.
        normalise: what is done to each row first, and undone on the output of an autoencoder.
        heads: the number of heads of ``z``, whose activations are ``[*rows, head, d_head]`` and are encoded jointly; else None.
        provenance: file, format, model name, versions.

    Raises:
        DictionaryError: an unknown kind, shapes that do not fit together, weights that are no numbers.

    Example:
        >>> dictionary.encode(torch.randn(2, 5, 64)).shape  # doctest: +SKIP
        torch.Size([2, 5, 512])
    """

    name: str
    kind: str
    layer: int | None
    reads: str
    writes: str
    w_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, " feature"]
    w_dec: Float[Tensor, "feature *to_layer d_out"]
    b_dec: Float[Tensor, " d_out"]
    activation: Activation
    w_skip: Float[Tensor, "d_in d_out"] | None = None
    subtract_b_dec: bool = False
    normalise: Normalisation = UNCHANGED
    heads: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        try:
            self._check()
        except DictionaryError as error:
            raise DictionaryError(f"{self.name}: {error}") from None

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise DictionaryError(unknown("kind of dictionary", self.kind, KINDS))
        across = self.kind == "cross_layer_transcoder"
        if self.w_enc.ndim != 2 or self.w_dec.ndim != 2 + across:
            wanted = "[feature, to_layer, d_out]" if across else "[feature, d_out]"
            raise DictionaryError(
                f"w_enc is [d_in, feature] and w_dec of a {self.kind} {wanted}; got {list(self.w_enc.shape)} and {list(self.w_dec.shape)}."
            )
        d_in, width, d_out = self.d_in, self.n_features, self.d_out
        expected = {"b_enc": (width,), "w_dec": (width, *self.w_dec.shape[1:]), "b_dec": (d_out,), "w_skip": (d_in, d_out)}
        for part, shape in expected.items():
            value = getattr(self, part)
            if value is not None and value.shape != shape:
                raise DictionaryError(f"{part} has the shape {list(value.shape)}, where w_enc and w_dec make it {list(shape)}.")
        for part in ("w_enc", *expected):
            value = getattr(self, part)
            if value is not None and not bool(torch.isfinite(value).all()):
                bad = int((~torch.isfinite(value)).sum())
                raise DictionaryError(f"{part} holds {bad:,} of {value.numel():,} values that are NaN or infinite; the file is damaged.")
        if (self.layer is None) != (self.kind == "multi_layer" or self.reads == "input"):
            raise DictionaryError(f"a {self.kind} dictionary has {'no layer' if self.layer is None else f'the layer {self.layer}'}.")
        if self.kind in ("sae", "multi_layer", "codebook") and (self.reads != self.writes or d_in != d_out):
            raise DictionaryError(
                f"a {self.kind} dictionary reconstructs what it reads; this one reads {self.reads} ({d_in} wide) and writes {self.writes} "
                f"({d_out} wide)."
            )
        if isinstance(self.activation, Codes) != (self.kind == "codebook"):
            raise DictionaryError(f"a codebook has codes and nothing else has; got the activation {type(self.activation).__name__} in a {self.kind}.")
        if self.subtract_b_dec and d_in != d_out:
            raise DictionaryError(f"b_dec ({d_out} wide) cannot be subtracted from the input ({d_in} wide); use subtract_b_dec=False.")
        if self.heads is not None and (d_in % self.heads or self.reads != self.writes):
            raise DictionaryError(f"{self.heads} heads do not divide the width {d_in} of {self.reads}.")
        self.activation.check(width)

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.w_enc.shape[1]

    @property
    def d_in(self) -> int:
        """Width of what it reads, all heads together."""
        return self.w_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.w_dec.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights, features and outputs."""
        return self.w_enc.dtype

    @cached_property
    def identity(self) -> str:
        """A text that is the same for dictionaries that compute the same from the same site, and survives a restart."""
        parts = (self.w_enc, self.b_enc, self.w_dec, self.b_dec, self.w_skip, self.activation, self.subtract_b_dec, self.normalise, self.heads)
        text = digest((self.kind, self.layer, self.reads, self.writes, *parts), "dictionary")
        if text is None:
            raise DictionaryError(f"{self.name}: an activation or normalisation of your own must be a frozen dataclass of plain values.")
        return text

    def pre(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*rows feature"]:
        """Pre-activations of inputs ``[*rows, d_in]`` (``[*rows, head, d_head]`` where it reads heads)."""
        entered = self.normalise.enter(self._flat(x))
        return (entered - self.b_dec if self.subtract_b_dec else entered) @ self.w_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*rows feature"]:
        """Features of inputs ``[*rows, d_in]`` (``[*rows, head, d_head]`` where it reads heads); differentiable."""
        return self.activation(self.pre(x))

    def decode(self, features: Float[Tensor, "*rows feature"], x: Float[Tensor, "*shape"] | None = None) -> Float[Tensor, "*out"]:
        """The output ``[*rows, d_out]`` of features: ``[*rows, head, d_head]`` where it reads heads, ``[*rows, to_layer, d_out]`` across layers.

        Args:
            features: one number each.
            x: the input, where ``needs_input``.

        Raises:
            DictionaryError: the input is needed and not given.
        """
        if self.needs_input and x is None:
            what = "a skip" if self.w_skip is not None else f"the normalisation {type(self.normalise).__name__}"
            raise DictionaryError(f"{self.name} has {what}, which needs the input again; call decode(features, x).")
        flat = None if x is None or not self.needs_input else self._flat(x)
        if self.kind == "cross_layer_transcoder":
            y = torch.einsum("...f,ftd->...td", features, self.w_dec)
            own = self.b_dec if flat is None or self.w_skip is None else self.b_dec + flat @ self.w_skip
            return torch.cat([y[..., :1, :] + own[..., None, :], y[..., 1:, :]], -2)
        y = features @ self.w_dec + self.b_dec
        if flat is not None and self.inverts:
            y = self.normalise.leave(y, flat)
        if flat is not None and self.w_skip is not None:
            y = y + flat @ self.w_skip
        return y if self.heads is None else y.unflatten(-1, (self.heads, -1))

    @property
    def inverts(self) -> bool:
        """Whether the normalisation of each row is undone on the output."""
        return self.normalise.per_row and self.reads == self.writes

    @property
    def needs_input(self) -> bool:
        """Whether decoding needs the input again: for a skip, or to undo the normalisation of each row."""
        return self.w_skip is not None or self.inverts

    def reconstruct(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*out"]:
        """The output for inputs, of the same shape for an autoencoder."""
        return self.decode(self.encode(x), x)

    def scale(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*rows 1"]:
        """What the rows of ``w_dec`` are multiplied by in the output for inputs: 1 but where the normalisation of each row is undone."""
        return (self.normalise if self.inverts else UNCHANGED).scale(self._flat(x))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Dictionary":
        """The same on another device or in another precision."""
        where = None if device is None else torch.device(device)
        moved = {
            part: None if (value := getattr(self, part)) is None else value.to(device=where, dtype=dtype)
            for part in ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip")
        }
        return replace(self, activation=self.activation.to(where, dtype), **moved)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write it as ``cfg.json`` and ``sae_weights.safetensors``, as SAELens has them.

        What SAELens has no architecture for (codebooks, cross-layer transcoders, transcoders with TopK) has the architecture ``patchlab`` there,
        which only patchlab reads.

        Args:
            folder: made if it is not there.
            overwrite: replace a dictionary that is there.

        Raises:
            OutputError: the folder holds a dictionary and ``overwrite`` is False, or it cannot be written to.
            DictionaryError: an activation or a normalisation that is not patchlab's own.
        """
        write(Path(folder), {part.name: getattr(self, part.name) for part in fields(self)}, overwrite=overwrite)

    def _flat(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*rows d_in"]:
        wanted = (self.d_in,) if self.heads is None else (self.heads, self.d_in // self.heads)
        if x.shape[-len(wanted) :] != wanted:
            raise DictionaryError(f"{self.name} reads {self.reads} of shape [..., {', '.join(map(str, wanted))}]; got {list(x.shape)}.")
        x = x.to(self.dtype)
        return x if self.heads is None else x.flatten(-2)

    @property
    def where(self) -> str:
        """What it reads and writes, and in which layer."""
        layer = "every layer" if self.kind == "multi_layer" else f"layer {self.layer}"
        return f"{self.reads if self.reads == self.writes else f'{self.reads} → {self.writes}'} of {layer}"

    def __repr__(self) -> str:
        kind = self.kind.replace("_", " ") if self.w_skip is None else f"skip {self.kind.replace('_', ' ')}"
        return f"Dictionary({self.name}: {kind}, {self.where}, {self.d_in} -> {self.n_features} features, {type(self.activation).__name__})"


def folded(w_enc: Float[Tensor, "d_in feature"], w_dec: Float[Tensor, "feature d_out"], factor: float) -> tuple[Tensor, Tensor]:
    """Encoder and decoder of a dictionary that reads ``x · factor`` and whose output is divided by it, for the activation itself.

    ``b_dec`` is to be divided by the factor as well.
    """
    return w_enc * factor, w_dec / factor


def identity_dictionary(d: int, *, layer: int, reads: str, heads: int | None = None, dtype: torch.dtype = torch.float32) -> Dictionary:
    """The identity as a dictionary: every coordinate of an activation is a feature, and nothing is left out.

    The baseline that Marks et al. 2024 (arXiv 2403.19647) call neurons: the coordinates of what attention and MLP write and of the stream, which
    are not the neurons inside the MLP (the site ``mlp_post``).

    Args:
        d: width of the activation, all heads together.
        layer: the layer that it reads.
        reads: the site kind.
        heads: the number of heads of ``z``.
        dtype: precision.

    Example:
        >>> identity_dictionary(64, layer=3, reads="mlp_out").n_features
        64
    """
    one, zero = torch.eye(d, dtype=dtype), torch.zeros(d, dtype=dtype)
    return Dictionary(f"identity {reads}/{layer}", "sae", layer, reads, reads, one, zero, one, zero, Linear(), heads=heads)


def codebook(
    name: str, codes: Float[Tensor, "feature d"], *, k: int, layer: int, reads: str, heads: int | None = None, cosine: bool = True
) -> Dictionary:
    """A codebook: every activation becomes the sum of the k codes that it fits best.

    Args:
        name: for people.
        codes: one per row.
        k: codes per activation.
        layer: the layer that it reads.
        reads: the site kind.
        heads: the number of heads of ``z``.
        cosine: fit is cosine similarity (Tamkin et al. 2023, arXiv 2310.17230); False for the Euclidean distance of vector quantisation.

    Raises:
        DictionaryError: shapes, layer or k do not fit, or a code is zero under cosine similarity.
    """
    norms = codes.norm(dim=-1)
    if cosine and not bool((norms > 0).all()):
        raise DictionaryError(f"{name}: {int((norms == 0).sum())} codes are zero and have no direction; use cosine=False or leave them out.")
    w_enc = (codes / norms[:, None] if cosine else codes).T.contiguous()
    b_enc = torch.zeros_like(norms) if cosine else -norms.square() / 2
    zero = codes.new_zeros(codes.shape[-1])
    return Dictionary(name, "codebook", layer, reads, reads, w_enc, b_enc, codes, zero, Codes(k), heads=heads)
