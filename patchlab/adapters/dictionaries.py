"""Sites of dictionaries: their features, what they leave out, and what they read.

A dictionary at a point splits the activation there into three parts: its features, each times its row of the decoder; a *rest* that belongs to no
feature (biases, the mean of a normalised row, a skip); and the *error*, which is all that is left. The forward pass is not changed by this. Writing a
feature moves the point by the change of the feature times its row, and keeps the rest and the error; writing the error moves the point by its change.

Where a dictionary normalises each row, a feature carries what its row is multiplied by to undo that (the standard deviation, for a layer norm):
its value is ``encode(x) · scale(x)``, so that rows are constants.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from patchlab.adapters.accessors import HOSTS, Accessor
from patchlab.digest import digest
from patchlab.errors import SiteError
from patchlab.sites import POINTS


@runtime_checkable
class SparseDictionary(Protocol):
    """What sites ask of a :class:`patchlab.features.Dictionary`."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def layer(self) -> int | None:
        """The layer that it reads; None for every layer."""
        ...

    @property
    def reads(self) -> str:
        """The site kind, ``mlp_in``, or the hook within its block that it encodes."""
        ...

    @property
    def writes(self) -> str:
        """The site kind that it reconstructs."""
        ...

    @property
    def n_features(self) -> int:
        """Number of features."""
        ...

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        ...

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        ...

    @property
    def heads(self) -> int | None:
        """The number of heads that what it reads is split into; None where it is not."""
        ...

    @property
    def identity(self) -> Any:
        """A text, the same for dictionaries that compute the same."""
        ...

    @property
    def w_enc(self) -> Tensor:
        """Encoder, ``[d_in, feature]``."""
        ...

    @property
    def w_dec(self) -> Tensor:
        """Decoder, ``[feature, d_out]`` or, across layers, ``[feature, to_layer, d_out]``."""
        ...

    @property
    def b_dec(self) -> Tensor:
        """Added to the output."""
        ...

    @property
    def w_skip(self) -> Tensor | None:
        """A linear path from input to output."""
        ...

    @property
    def normalise(self) -> Any:
        """What is done to each row first, and undone on the output."""
        ...

    @property
    def encode(self) -> Any:
        """Features of inputs."""
        ...

    @property
    def scale(self) -> Any:
        """What rows of the decoder are multiplied by, for inputs."""
        ...

    @property
    def to(self) -> Any:
        """The same elsewhere."""
        ...


@dataclass(frozen=True, eq=False)
class Attached:
    """A dictionary at one layer of a model.

    Args:
        dictionary: the dictionary, on the model's device.
        layer: the layer that it reads.
        point: the kind of site that it reconstructs.
        base: how that is read and written.
        reads: the hook that it reads, where that is not the point itself.
    """

    dictionary: Any
    layer: int
    point: str
    base: Accessor
    reads: str | None = None

    @property
    def span(self) -> int:
        """The number of layers that it writes to, from its own on."""
        return 1 if self.dictionary.w_dec.ndim == 2 else int(self.dictionary.w_dec.shape[1])

    def flat(self, value: Float[Tensor, "row pos *site"]) -> Float[Tensor, "row pos d"]:
        """A value of the point with its heads side by side, in the dictionary's dtype."""
        return value.flatten(2).to(self.dictionary.w_enc.dtype)

    def values(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows feature"]:
        """Its features, with the scale of each row."""
        heads: int | None = self.dictionary.heads
        shaped = x if heads is None else x.unflatten(-1, (heads, -1))
        features: Tensor = self.dictionary.encode(shaped)
        return features * self.dictionary.scale(shaped) if self.dictionary.normalise.per_row else features

    def held(self, x: Float[Tensor, "*rows d_in"]) -> "Attached":
        """The same with the scale of every row a constant, that of these inputs."""
        if not self.dictionary.normalise.per_row:
            return self
        return replace(self, dictionary=replace(self.dictionary, normalise=self.dictionary.normalise.held(x)))

    def rows(self, step: int = 0) -> Float[Tensor, "feature d_out"]:
        """The decoder, of the layer so many steps after its own."""
        w_dec: Tensor = self.dictionary.w_dec
        return w_dec if w_dec.ndim == 2 else w_dec[:, step]

    def row_sizes(self, step: int = 0) -> Float[Tensor, " feature"]:
        """Squared lengths of the rows of the decoder."""
        if step not in self._sizes:
            self._sizes[step] = self.rows(step).square().sum(-1)
        return self._sizes[step]

    @cached_property
    def column_sizes(self) -> Float[Tensor, " feature"]:
        """Squared lengths of the columns of the encoder."""
        return self.dictionary.w_enc.square().sum(0)

    @cached_property
    def _sizes(self) -> dict[int, Tensor]:
        return {}

    def rest(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """The part of its output in its own layer that belongs to no feature."""
        d = self.dictionary
        own: Tensor = d.b_dec.expand(*x.shape[:-1], -1)
        if d.w_skip is not None:
            own = own + d.normalise.enter(x) @ d.w_skip
        return d.normalise.leave(own, x) if d.normalise.per_row else own


@dataclass(frozen=True, eq=False)
class Point:
    """The dictionaries on one kind of site, by the layer that they read."""

    name: str
    of: Mapping[int, Attached]

    @cached_property
    def identity(self) -> str:
        """A text that tells its dictionaries from others."""
        found = digest([(layer, one.dictionary.identity) for layer, one in sorted(self.of.items())], self.name)
        if found is None:
            raise SiteError(f"a dictionary on {self.name} cannot be told from others; give it a text as its identity.")
        return found

    def into(self, layer: int) -> tuple[Attached, ...]:
        """The dictionaries that write to a layer."""
        return tuple(one for start, one in sorted(self.of.items()) if start <= layer < start + one.span)

    @property
    def written(self) -> tuple[int, ...]:
        """The layers that are written to."""
        return tuple(sorted({start + step for start, one in self.of.items() for step in range(one.span)}))

    def reconstruct(self, layer: int, inputs: Mapping[int, Float[Tensor, "*rows d_in"]], *, held: bool = False) -> Float[Tensor, "*rows d_out"]:
        """What all dictionaries give a layer, from what each reads; with the scales of normalised rows ``held``, they are constants."""
        into = {one.layer: one.held(inputs[one.layer]) if held else one for one in self.into(layer)}
        found: list[Tensor] = [one.values(inputs[start]) @ one.rows(layer - start) for start, one in into.items()]
        if layer in into:
            found.append(into[layer].rest(inputs[layer]))
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]


@dataclass(frozen=True)
class _OfPoint(Accessor):
    """A site of the dictionaries on a point, in all layers."""

    kind: str = ""
    heads: int | None = None
    point: Point = field(default_factory=lambda: Point("", {}))

    @cached_property
    def identity(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.point.identity

    def layers(self, n_layers: int) -> tuple[int, ...]:
        return tuple(sorted(self.point.of))

    def host(self, layer: int | None) -> str:
        return self.at(layer).host(layer)

    def companion(self, layer: int | None) -> str | tuple[str, ...] | None:
        return self.at(layer).companion(layer)


@dataclass(frozen=True)
class FeatureSite(_OfPoint):
    """The features of the dictionaries on a point."""

    def at(self, layer: int | None) -> "LayerFeatures":
        return LayerFeatures(self.kind, one=_one(self.point, layer))

    def entries(self, layer: int | None) -> int:
        return int(_one(self.point, layer).dictionary.n_features)


@dataclass(frozen=True)
class ErrorSite(_OfPoint):
    """What the dictionaries on a point leave out; heads side by side."""

    def layers(self, n_layers: int) -> tuple[int, ...]:
        return self.point.written

    def at(self, layer: int | None) -> "LayerError":
        return LayerError(self.kind, layer=0 if layer is None else layer, point=self.point)


@dataclass(frozen=True)
class InputSite(_OfPoint):
    """What the dictionaries on a point read, where that is not the point itself."""

    def at(self, layer: int | None) -> "LayerInput":
        return LayerInput(self.kind, hook=str(_one(self.point, layer).reads))


@dataclass(frozen=True)
class LayerFeatures(Accessor):
    """The features of one dictionary. Across layers an edit goes to every layer that it writes to, so many ``step`` after its own."""

    one: Attached | None = None
    step: int = 0

    @property
    def _one(self) -> Attached:
        if self.one is None:
            raise SiteError(f"{self.kind} has no dictionary.")
        return self.one

    def parts(self) -> tuple["LayerFeatures", ...]:
        return tuple(LayerFeatures(self.kind, one=self.one, step=step) for step in range(self._one.span))

    def host(self, layer: int | None) -> str:
        return self._one.base.host(self._one.layer + self.step)

    def companion(self, layer: int | None) -> str | tuple[str, ...] | None:
        one = self._one
        return one.base.companion(one.layer) if one.reads is None else one.reads

    def entries(self, layer: int | None) -> int:
        return int(self._one.dictionary.n_features)

    def pull(self, host: Tensor, gradient: Tensor) -> Tensor:
        return self._one.flat(gradient) @ self._one.rows(self.step).T

    def read(self, host: Tensor, companion: Any = None) -> Tensor:
        one = self._one
        x = one.base.read(host, companion) if one.reads is None else companion
        return one.values(one.flat(x))

    def write(self, host: Tensor, companion: Any, value: Tensor) -> Tensor:
        change = (value - self.read(host, companion)) @ self._one.rows(self.step)
        return moved(host, change)


@dataclass(frozen=True)
class LayerError(Accessor):
    """What the dictionaries on a point leave out of one layer, ``[row, pos, d]``."""

    layer: int = 0
    point: Point = field(default_factory=lambda: Point("", {}))

    @property
    def _into(self) -> tuple[Attached, ...]:
        return self.point.into(self.layer)

    def host(self, layer: int | None) -> str:
        return self._into[0].base.host(self.layer)

    def companion(self, layer: int | None) -> str | tuple[str, ...] | None:
        read = tuple(one.reads for one in self._into if one.reads is not None)
        return self._into[0].base.companion(self.layer) if not read else read[0] if len(read) == 1 else read

    @property
    def in_block(self) -> bool:
        return all(one.layer == self.layer for one in self._into)

    def pull(self, host: Tensor, gradient: Tensor) -> Tensor:
        return self._into[0].flat(gradient)

    def read(self, host: Tensor, companion: Any = None) -> Tensor:
        into = self._into
        if into[0].reads is None:
            own = into[0].flat(into[0].base.read(host, companion))
            return own - self.point.reconstruct(self.layer, {self.layer: own})
        read = companion if isinstance(companion, tuple) else (companion,)
        inputs = {one.layer: one.flat(x) for one, x in zip(into, read, strict=True)}
        return into[0].flat(host) - self.point.reconstruct(self.layer, inputs)

    def write(self, host: Tensor, companion: Any, value: Tensor) -> Tensor:
        return moved(host, value - self.read(host, companion))


@dataclass(frozen=True)
class LayerInput(Accessor):
    """What one dictionary reads, at a hook of its own."""

    hook: str = ""

    def host(self, layer: int | None) -> str:
        return self.hook


def moved(host: Float[Tensor, "row pos *rest"], change: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos *rest"]:
    """An activation moved by a change, whose heads may be side by side; where there is none, not one bit changes."""
    return host + change.to(host.dtype).reshape(host.shape)


def _one(point: Point, layer: int | None) -> Attached:
    if layer is None or layer not in point.of:
        raise SiteError(f"no dictionary on {point.name} reads layer {layer}; layers with one: {', '.join(map(str, sorted(point.of)))}.")
    return point.of[layer]


def sites_of(point: Point) -> tuple[Accessor, ...]:
    """The accessors of a point's sites: features, error and, where they read elsewhere, inputs."""
    found: list[Accessor] = [FeatureSite(f"features.{point.name}", point=point), ErrorSite(f"error.{point.name}", point=point)]
    if any(one.reads is not None for one in point.of.values()):
        found.append(InputSite(f"reads.{point.name}", point=point))
    return tuple(found)


def points_of_dictionaries(
    dictionaries: Iterable[SparseDictionary],
    accessors: Mapping[str, Accessor],
    absent: Mapping[str, str],
    n_layers: int,
    hooks: Iterable[str],
) -> dict[str, Point]:
    """Dictionaries by the point that they write to.

    Raises:
        SiteError: a dictionary that writes to what is no point or is absent, reads a hook that the model lacks, or has a layer too many; two on one
            layer and point.
    """
    known, found = set(hooks), dict[str, dict[int, Attached]]()
    for d in dictionaries:
        if d.writes not in POINTS:
            raise SiteError(f"{d.name} writes to {d.writes}, and dictionaries can be on {', '.join(POINTS)}.")
        if d.writes in absent or d.writes not in accessors:
            raise SiteError(f"{d.name} writes to {d.writes}, which the model lacks: {absent.get(d.writes, 'there is no such site')}.")
        for layer in range(n_layers) if d.layer is None else (d.layer,):
            if not 0 <= layer < n_layers:
                raise SiteError(f"{d.name} is for layer {layer}, and the model has {n_layers} (0 to {n_layers - 1}).")
            own = found.setdefault(d.writes, {})
            if layer in own:
                raise SiteError(
                    f"{d.name} and {own[layer].dictionary.name} are both on {d.writes} of layer {layer}; a layer and point has one dictionary "
                    "at most. Choose one."
                )
            reads = None if d.reads == d.writes else _hook(d, layer, known)
            base = accessors[d.writes]
            own[layer] = Attached(d, layer, d.writes, base, reads)
            if layer + own[layer].span > n_layers:
                raise SiteError(f"{d.name} writes to layers {layer} to {layer + own[layer].span - 1}, and the model has {n_layers}.")
    for name, own in found.items():
        if len({one.reads is None for one in own.values()}) > 1:
            raise SiteError(
                f"the dictionaries on {name} are autoencoders and transcoders; a point has one or the other. Add them one kind at a time."
            )
    return {name: Point(name, own) for name, own in found.items()}


def _hook(d: SparseDictionary, layer: int, known: set[str]) -> str:
    """The hook that a transcoder reads in a layer."""
    inside = {"mlp_in": "mlp.hook_in"}.get(d.reads) or HOSTS.get(d.reads, d.reads)
    name = f"blocks.{layer}.{inside}"
    if d.reads == "resid_mid":
        raise SiteError(f"{d.name} reads resid_mid and writes {d.writes}; a transcoder reads mlp_in or one hook. Give it the hook that it reads.")
    if name not in known:
        raise SiteError(f"{d.name} reads the hook {name}, which the model does not have.")
    return name
