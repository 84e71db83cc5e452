"""Sources: where the values of an edit come from: zeros, constants, noise, the activations of another run, means, blends."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.errors import InterventionError
from patchlab.host import precise
from patchlab.sites import KINDS, Site, address


@runtime_checkable
class Source(Protocol):
    """Where an edit's values come from."""

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        """Values that broadcast to ``own``, the site's current value, for rows that belong to the given examples."""
        ...


@dataclass(frozen=True)
class Zero:
    """Zeros."""

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        return torch.zeros_like(own)


@dataclass(frozen=True)
class Constant:
    """A given number or tensor.

    A tensor has the shape of the site (``[row, pos, head, d_head]`` for z, ...) or broadcasts to it; where the address names
    one head, neuron or position, that axis may be left out, and so may the rows.
    """

    value: float | Tensor

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        if not isinstance(self.value, Tensor):
            return torch.full_like(own, self.value)
        value = self.value.to(device=own.device, dtype=own.dtype)
        single = _single_axes(site)
        kept = [dim for dim in range(1, own.ndim) if dim not in single]
        if value.ndim != own.ndim and value.ndim in (len(kept), len(kept) + 1):
            without_rows = int(value.ndim == len(kept))
            for dim in sorted(single):
                value = value.unsqueeze(dim - without_rows)
        return fitted(value, site, own, f"a tensor of shape {list(self.value.shape)}")


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of the given standard deviation, the same for the same (seed, example, site) whatever the batch."""

    std: float
    seed: int = 0

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        rows = []
        for example in examples.tolist():
            key = f"{self.seed}/{example}/{site.layer}/{site.kind}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
            rows.append(torch.randn(own.shape[1:], generator=generator))
        return torch.stack(rows).to(device=own.device, dtype=own.dtype) * self.std


@dataclass(frozen=True)
class Kept:
    """The activations of another run, matched by example.

    ``activations`` maps ``(kind, layer)`` to ``[example, ...]``; ``examples`` says which example each row is. A run of one
    row serves every row.
    """

    activations: Mapping[tuple[str, int | None], Tensor] = field(repr=False)
    examples: Int[Tensor, " row"] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", self.examples.cpu())

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        key = (site.kind, site.layer)
        if key not in self.activations:
            raise InterventionError(
                f"the source run did not keep {address(*key)}; it kept {_listed(self.activations)}. Add it to keep=[...] of that run."
            )
        value = self.activations[key]
        if value.shape[0] != 1 and not torch.equal(self.examples, examples := examples.cpu()):
            value = value[self._rows(examples)]
        if value.shape[1:] != own.shape[1:]:
            raise InterventionError(
                f"the source run has {site.kind} of shape {list(value.shape[1:])} per row and this run {list(own.shape[1:])}; "
                f"patching needs prompts of the same number of tokens on the same model."
            )
        return value.to(device=own.device, dtype=own.dtype)

    def _rows(self, examples: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        where = {example: row for row, example in enumerate(self.examples.tolist())}
        missing = [example for example in examples.tolist() if example not in where]
        if missing:
            raise InterventionError(
                f"the source run has no row for example {missing[0]} (it has {len(where)}, this run {examples.shape[0]}). Run the source on the same "
                f"prompts, or on one prompt that serves all."
            )
        return torch.tensor([where[example] for example in examples.tolist()])


@dataclass(frozen=True)
class Average:
    """Mean activations, ``(kind, layer)`` to a tensor without rows; one position stands for all unless the mean is positional."""

    means: Mapping[tuple[str, int | None], Tensor] = field(repr=False)
    positional: bool = False

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        key = (site.kind, site.layer)
        if key not in self.means:
            raise InterventionError(
                f"the mean has no {address(*key)}; it has {_listed(self.means)}. Add it to keep=[...] of the run that the mean is taken of."
            )
        mean = self.means[key].to(device=own.device, dtype=own.dtype)
        if mean.shape != (own.shape[1:] if self.positional else (1, *own.shape[2:])):
            which = "positional mean" if self.positional else "mean"
            raise InterventionError(
                f"the {which} of {site.kind} has shape {list(mean.shape)} and does not fit this run's {list(own.shape[1:])} per row."
            )
        return torch.broadcast_to(mean, own.shape)


@dataclass(frozen=True)
class Own:
    """The site's current value (useful in a blend)."""

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        return own


@dataclass(frozen=True)
class Blend:
    """``(1 - weight) · first + weight · second``."""

    first: Source
    second: Source
    weight: float

    def values(self, site: Site, own: Float[Tensor, "row *site"], examples: Int[Tensor, " row"]) -> Float[Tensor, "*values"]:
        first, second = (fitted(source.values(site, own, examples), site, own) for source in (self.first, self.second))
        return torch.lerp(first, second, self.weight)


def zero() -> Zero:
    """A source of zeros."""
    return Zero()


def noise(std: float, seed: int = 0) -> Noise:
    """A source of Gaussian noise keyed by (seed, example, site); mostly used with ``op="add"``."""
    return Noise(std, seed)


def blend(first: Any, second: Any, weight: float) -> Blend:
    """A source that mixes two: ``(1 - weight) · first + weight · second``."""
    return Blend(as_source(first), as_source(second), weight)


def mean_of(run: Any, *, positional: bool = False) -> Average:
    """The mean of a run's kept activations over its rows, and over positions unless ``positional``.

    Heads and neurons are never averaged over. A pattern has no mean over positions.
    """
    kept = as_source(run)
    if not isinstance(kept, Kept):
        raise InterventionError(f"mean_of takes a run with kept activations; got {type(run).__name__}. Use model.run(tokens, keep=[...]).")
    means: dict[tuple[str, int | None], Tensor] = {}
    for (kind, layer), value in kept.activations.items():
        if KINDS[kind].source is not None and not positional:
            raise InterventionError("the mean of a pattern over positions is not an attention pattern; use positional=True.")
        mean = precise(value).mean(0)
        means[kind, layer] = mean if positional else mean.mean(0, keepdim=True)
    return Average(means, positional)


def as_source(value: Any) -> Source:
    """A source from what people write: a source, a kept run, a number or a tensor.

    Raises:
        InterventionError: anything else.
    """
    if isinstance(value, (int, float, Tensor)):
        return Constant(value)
    if hasattr(value, "as_source"):
        return value.as_source()
    if isinstance(value, Source) and not isinstance(value, (type, Mapping)):  # a dict has values() too
        return value
    raise InterventionError(
        f"a source is a run with kept activations, pl.sources.zero(), pl.sources.noise(...), a tensor or a number; got {type(value).__name__}."
    )


def _listed(activations: Mapping[tuple[str, int | None], Tensor]) -> str:
    return ", ".join(str(address(*key)) for key in activations) or "nothing"


def fitted(values: Tensor, site: Site, own: Tensor, what: str | None = None) -> Tensor:
    """Values in the shape, dtype and place of the site's own value."""
    try:
        return torch.broadcast_to(values.to(own), own.shape)
    except RuntimeError as error:
        what = what or f"a value of shape {list(values.shape)}"
        raise InterventionError(
            f"{what} does not fit {site}, whose activation is {list(own.shape)} here; give that shape, or drop the axes that the address fixes."
        ) from error


def _single_axes(site: Site) -> set[int]:
    """Dimensions of ``[row, ...]`` that the address fixes to one entry."""
    kind = KINDS[site.kind]
    fixed = {kind.position: site.pos is not None and len(site.pos) == 1}
    fixed |= {} if kind.unit is None else {kind.unit: site.index is not None}
    fixed |= {} if kind.source is None else {kind.source: site.src is not None and len(site.src) == 1}
    return {kind.dim(axis) for axis, single in fixed.items() if single}
