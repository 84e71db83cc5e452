"""Architectures: the facts about one that everything else asks for."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from transformer_lens.model_bridge import TransformerBridge

from patchlab.adapters.accessors import Accessor, make_accessors
from patchlab.adapters.places import Place, find_places
from patchlab.errors import SiteError, unknown
from patchlab.graph import Graph
from patchlab.sites import KINDS, Site


@dataclass(frozen=True)
class Architecture:
    """Sizes, block form, accessors and places of one model.

    ``absent`` maps a site kind that this model lacks to the reason. ``parallel`` is True where attention and MLP read the
    same residual stream (GPT-NeoX's default). ``d_input`` is the width of the token embedding, where it is not d_model. ``sizes`` are the
    lengths of axes that were added with a site kind.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    vocab_size: int
    n_positions: int | None
    parallel: bool
    accessors: dict[str, Accessor] = field(repr=False)
    places: tuple[Place, ...] = field(repr=False)
    absent: dict[str, str] = field(default_factory=dict)
    d_input: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    def with_site(self, accessor: Accessor, sizes: Mapping[str, int] = MappingProxyType({})) -> "Architecture":
        """The same with one more site kind, and the lengths of axes that only it has. :meth:`patchlab.models.Model.add_site` also tests it.

        Raises:
            SiteError: a kind that the model has already, or that the grammar does not know; a length that differs from the one known.
        """
        if accessor.kind not in KINDS:
            raise SiteError(unknown("site", accessor.kind, KINDS, more="Make it known with patchlab.sites.add_kind."))
        if accessor.kind in self.accessors:
            raise SiteError(f"{self.family} has a site {accessor.kind} already; give the new kind another name.")
        if unlike := [axis for axis, size in sizes.items() if self.sizes.get(axis, size) != size]:
            raise SiteError(f"the axis {unlike[0]} has {self.sizes[unlike[0]]} entries already, and {accessor.kind} says {sizes[unlike[0]]}.")
        return replace(self, accessors={**self.accessors, accessor.kind: accessor}, sizes={**self.sizes, **sizes})

    @property
    def sites(self) -> tuple[str, ...]:
        """The site kinds that this model has."""
        return tuple(kind for kind in self.accessors if kind not in self.absent)

    def targets(self, kind: str) -> tuple[tuple[str, int | None], ...]:
        """A kind in every layer that has it."""
        if not KINDS[kind].layered:
            return ((kind, None),)
        return tuple((kind, layer) for layer in (self.accessors[kind].layers(self.n_layers) if kind in self.accessors else range(self.n_layers)))

    def in_block(self, kind: str, layer: int | None) -> bool:
        """Whether a site is read and written within one block; else only whole forward passes can edit it."""
        return self.accessors[kind].at(layer).in_block

    def meant(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """The sites of this model that are meant: in the place of ``features`` and ``error`` those of every point that has dictionaries.

        Raises:
            SiteError: the model has no dictionaries; a site is meant twice.
        """
        found: list[Site] = []
        for site in sites:
            points = [kind for kind in KINDS[site.kind].points if kind in self.sites]
            if KINDS[site.kind].points and not points:
                raise SiteError(f"{site}: the model has no dictionaries, so there are none. Give it some with model.add_dictionaries(...).")
            for one in [replace(site, kind=kind) for kind in points] or [site]:
                if one in found:
                    raise SiteError(f"the site {one} is named twice ({site} stands for it as well); name it once.")
                found.append(one)
        return tuple(found)

    def size(self, axis: str) -> int:
        """Length of a model axis: layer, head, kv_head, neuron, writer or reader."""
        if axis in ("writer", "reader"):
            return self.graph.allowed.shape[axis == "reader"]
        sizes = {"layer": self.n_layers, "head": self.n_heads, "kv_head": self.n_kv_heads, "neuron": self.d_mlp or 0, **self.sizes}
        return sizes[axis]

    def numbers(self, kind: str, length: int) -> int:
        """The size of a site's activation: numbers per layer, row and position of a prompt of some length."""
        about = KINDS[kind]
        sizes = [length if axis == about.source else self.size(axis) for axis in (about.unit, about.source) if axis is not None]
        return math.prod(sizes) * {"d_model": self.d_model, "d_head": self.d_head}.get(about.width or "", 1)

    @cached_property
    def graph(self) -> Graph:
        """Its components and the edges between them.

        Raises:
            SiteError: heads whose outputs, or MLPs whose inputs, cannot be reached.
        """
        for kind in ("input", "q", "k", "v", "z", "resid_post"):
            if kind in self.absent:
                raise SiteError(f"{self.family} has no graph of edges, which needs {kind}: {self.absent[kind]}.")
        if self.d_input is not None:
            raise SiteError(f"{self.family} has no graph of edges: its embedding is {self.d_input} wide and is projected to d_model {self.d_model}.")
        return Graph(self.n_layers, self.n_heads, self.d_model, self.parallel, self.n_kv_heads, "mlp_out" not in self.absent)

    def check(self, site: Site) -> None:
        """Check that the model has this site.

        Raises:
            SiteError: the kind is absent here, or the layer, head or neuron does not exist.
        """
        if site.kind == "edges":
            _ = self.graph
            return
        if site.kind in self.absent:
            raise SiteError(f"{self.family} has no site {site.kind}: {self.absent[site.kind]}. Sites of this model: {', '.join(self.sites)}.")
        about = KINDS[site.kind]
        if about.points:
            raise SiteError(f"{site} stands for several sites of a model; name one of {', '.join(about.points)}.")
        if about.of and site.kind not in self.accessors:
            raise SiteError(
                f"{self.family} has no dictionary on {about.of}, so there is no site {site.kind}. Give it one with model.add_dictionaries(...). "
                f"Sites of this model: {', '.join(self.sites)}."
            )
        entries = None
        if site.kind in self.accessors and site.layer is not None:
            layers = self.accessors[site.kind].layers(self.n_layers)
            if site.layer < self.n_layers and site.layer not in layers:
                raise SiteError(f"{site}: layer {site.layer} has no {site.kind}; the layers {', '.join(map(str, layers)) or '(none)'} have.")
            entries = self.accessors[site.kind].at(site.layer).entries(site.layer) if site.layer < self.n_layers else None
        unit = about.unit
        for what, value, axis in (("layer", site.layer, "layer"), ((unit or "").removeprefix("kv_"), site.index, unit)):
            size = 0 if value is None or axis is None else entries if axis == unit and entries is not None else self.size(axis)
            if value is not None and axis is not None and not 0 <= value < size:
                raise SiteError(f"{site} names {what} {value}, but this model has {size} ({axis} 0 to {size - 1}).")


def _in_some_layers(hook: str, missing: list[int | None], n_layers: int) -> str:
    numbers = ", ".join(map(str, missing[:6])) + (", ..." if len(missing) > 6 else "")
    return f"its layers are of several kinds, and {len(missing)} of {n_layers} (layers {numbers}) lack the hook {hook}"


def describe(bridge: TransformerBridge, *, vocab_size: int) -> Architecture:
    """Read the facts off a bridge. Whether each site works is found out by the self-test afterwards."""
    cfg = bridge.cfg
    n_layers = int(cfg.n_layers)
    n_heads = int(cfg.n_heads)
    d_mlp = getattr(cfg, "d_mlp", None)
    n_kv_heads = int(getattr(cfg, "n_key_value_heads", None) or n_heads)
    accessors = make_accessors(n_heads, n_kv_heads)
    parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
    absent: dict[str, str] = {}
    for kind, accessor in accessors.items():
        layers: list[int | None] = [None] if not KINDS[kind].layered else list(range(n_layers))
        missing = [layer for layer in layers if accessor.host(layer) not in bridge.hook_dict]
        if kind == "resid_mid" and parallel:
            absent[kind] = "attention and MLP run in parallel, so there is no stream between them"
        elif kind == "resid_mid" and "blocks.0.hook_mlp_out" not in bridge.hook_dict:
            absent[kind] = "its blocks have no MLP, so there is no stream between attention and MLP"
        elif (
            kind == "mlp_post"
            and not missing
            and any(bridge.hook_dict[accessor.host(i)] is bridge.hook_dict.get(f"blocks.{i}.hook_mlp_out") for i in layers)
        ):
            absent[kind] = "the hook that should show its neurons shows the MLP's output (a mixture of experts?)"
        elif missing:
            hook = accessor.host(missing[0])
            absent[kind] = f"it lacks the hook {hook}" if missing == layers else _in_some_layers(hook, missing, len(layers))
    return Architecture(
        family=str(getattr(cfg, "architecture", None) or type(bridge).__name__),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=int(cfg.d_model),
        d_head=int(cfg.d_head),
        d_mlp=None if d_mlp is None else int(d_mlp),
        vocab_size=vocab_size,
        n_positions=getattr(cfg, "n_ctx", None),
        parallel=parallel,
        accessors=accessors,
        places=find_places(bridge, n_layers),
        absent=absent,
    )
