"""Sites: the activations that can be read, edited and scored, and the grammar that names them.

A *kind* (``resid_pre``, ``z``, ...) is an activation that every layer has; it carries named axes. A
:class:`Site` is a kind at a granularity (which axes get a score of their own; the others are patched
jointly), optionally narrowed to one layer, head or neuron and some positions::

    resid_pre               one score per layer and position (its default granularity)
    input                   the token embedding: one score per position (it has no layer)
    z                       one score per layer and head, all positions jointly
    z[layer,pos,head]       one score per layer, position and head
    L9.H6.z@END             head 6 of layer 9 at the named position END
    L9.H6, a9.h6, m3        the names of nodes: what head 6 of layer 9 (z) or the MLP of layer 3 (mlp_out) gives
    L3.resid_pre@4          layer 3, position 4 (negative numbers count from the end)
    L3.resid_pre@S1,S2      two positions at once
    L2.N17.mlp_post         neuron 17 of layer 2, all positions
    L5.H1.pattern@END<S1    the attention of head 1 from END to S1

Dictionaries (:meth:`patchlab.Model.add_dictionaries`) give the points that they write to two more kinds each::

    features.resid_post                     one score per layer and feature of the dictionaries on resid_post, all positions jointly
    features.resid_post[layer,pos,feature]  also per position
    error.resid_post[layer,pos]             what they leave out, one score (of the whole vector) per position; by default per layer
    features, error[layer,pos]              the same at the point that has dictionaries; at each such point where there are several
    L3.F512.resid_post@END                  feature 512 of the dictionary on resid_post of layer 3, at END
    L3.error.resid_post                     what that dictionary leaves out
    L3.features.resid_post                  all of its features

Edges between components (:class:`patchlab.graph.Graph`) are scored like sites, but not edited::

    edges                           one score per writer and reader, all positions jointly
    edges[writer,reader,pos]        also per position at which the reader reads
    edges[writer,reader,dest,src]   also per pair of positions: what src holds, as used at dest
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from patchlab.errors import SiteError, unknown

Position = int | str


@dataclass(frozen=True)
class SiteKind:
    """What can be scored, and what everything else has to know about it: an activation that a transformer block offers, or edges.

    Args:
        name: as sites are written.
        axes: named axes in canonical order, which is that of the activation's own tensors (``[row, *axes without layer, *width]``).
        default: the axes scored when none are named.
        width: name of the vector axis that a score sums over; None for scalar entries.
        what: a description.
        unit: the axis that an address names an entry of (``H6``, ``N17``), if it has one.
        letter: the letter of such an entry.
        stream: it is the residual stream (or the input); what it holds has other ways to the output than what its own layer adds.
        first: where, in layer 0, it depends on the token at its own position alone: ``always``, ``parallel`` (where attention and MLP read the same
            stream), ``never``.
        attended: later positions attend to it within its own layer.
        granularities: the only combinations of axes that can be scored; None: any with the first axis.
        cells: name of the kind of cells that its scores are (:mod:`patchlab.methods.cells`).
        of: the point that it is a part of (``resid_post``), by which its entries are addressed: ``L3.F512.resid_post``.
        points: the kinds that it stands for, one per point; those that a model has are meant (:meth:`patchlab.adapters.Architecture.meant`).
    """

    name: str
    axes: tuple[str, ...]
    default: tuple[str, ...]
    width: str | None
    what: str
    unit: str | None = None
    letter: str = ""
    stream: bool = False
    first: Literal["always", "parallel", "never"] = "never"
    attended: bool = False
    granularities: tuple[tuple[str, ...], ...] | None = None
    cells: str = "nodes"
    of: str = ""
    points: tuple[str, ...] = ()

    @property
    def layered(self) -> bool:
        """Whether every layer has one."""
        return "layer" in self.axes

    def dim(self, axis: str) -> int:
        """Dimension of an axis in the activation's tensors, which have rows first and no layers.

        >>> KINDS["z"].dim("pos"), KINDS["pattern"].dim("src")
        (1, 3)
        """
        return 1 + [name for name in self.axes if name != "layer"].index(axis)

    @property
    def position(self) -> str:
        """The axis along which a position is computed: what is known of it before that position."""
        return next(axis for axis in self.axes if axis in POSITION_AXES)

    @property
    def source(self) -> str | None:
        """The axis of the positions that are attended to, if it has one."""
        return next((axis for axis in self.axes if axis in POSITION_AXES and axis != self.position), None) if self.granularities is None else None


KINDS: dict[str, SiteKind] = {}
"""All kinds, by name."""
POSITION_AXES = ("pos", "dest", "src")


def add_kind(kind: SiteKind) -> SiteKind:
    """Make a kind known to the grammar.

    Raises:
        SiteError: there is one of this name.
    """
    if kind.name in KINDS:
        raise SiteError(f"there is a site kind {kind.name!r} already; give another name.")
    KINDS[kind.name] = kind
    return kind


_BY_POS, _BY_HEAD, _BY_KV_HEAD = ("layer", "pos"), ("layer", "pos", "head"), ("layer", "pos", "kv_head")
_HEADS: dict[str, Any] = {"unit": "head", "letter": "H"}
_KV_HEADS: dict[str, Any] = {"unit": "kv_head", "letter": "H", "first": "always"}
for _kind in (
    SiteKind("input", ("pos",), ("pos",), "d_model", "token embedding, before positional embeddings", stream=True, first="always"),
    SiteKind("resid_pre", _BY_POS, _BY_POS, "d_model", "residual stream before the block", stream=True, first="always", attended=True),
    SiteKind("resid_mid", _BY_POS, _BY_POS, "d_model", "residual stream between attention and MLP", stream=True),
    SiteKind("resid_post", _BY_POS, _BY_POS, "d_model", "residual stream after the block", stream=True),
    SiteKind("attn_out", _BY_POS, _BY_POS, "d_model", "what the attention adds to the residual stream"),
    SiteKind("mlp_out", _BY_POS, _BY_POS, "d_model", "what the MLP adds to the residual stream", first="parallel"),
    SiteKind("z", _BY_HEAD, ("layer", "head"), "d_head", "head output before W_O", **_HEADS),
    SiteKind("q", _BY_HEAD, ("layer", "head"), "d_head", "query, before rotary embedding", first="always", **_HEADS),
    SiteKind("k", _BY_KV_HEAD, ("layer", "kv_head"), "d_head", "key, before rotary embedding", attended=True, **_KV_HEADS),
    SiteKind("v", _BY_KV_HEAD, ("layer", "kv_head"), "d_head", "value", attended=True, **_KV_HEADS),
    SiteKind("pattern", ("layer", "head", "dest", "src"), ("layer", "head"), None, "attention pattern", **_HEADS),
    SiteKind("mlp_post", ("layer", "pos", "neuron"), ("layer", "neuron"), None, "MLP neurons", unit="neuron", letter="N", first="parallel"),
    SiteKind(
        "edges",
        ("writer", "reader", "pos", "dest", "src"),
        ("writer", "reader"),
        None,
        "edges between components",
        granularities=(("writer", "reader"), ("writer", "reader", "pos"), ("writer", "reader", "dest", "src")),
        cells="edges",
    ),
    SiteKind(
        "sets",
        ("set",),
        ("set",),
        None,
        "sets of edges, each patched at once (patchlab.methods.patch_edges)",
        granularities=(("set",),),
        cells="sets",
    ),
):
    add_kind(_kind)

POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "z", "mlp_out")
"""Where dictionaries can be: the activations that they reconstruct."""
_FEATURES: dict[str, Any] = {"unit": "feature", "letter": "F"}
_ERROR: dict[str, Any] = {}
for _name, _axes, _default, _width, _what, _own in (
    ("features", ("layer", "pos", "feature"), ("layer", "feature"), None, "features of dictionaries", _FEATURES),
    ("error", _BY_POS, ("layer",), "d_model", "what dictionaries leave out", _ERROR),
):
    for _point in POINTS:
        add_kind(SiteKind(f"{_name}.{_point}", _axes, _default, _width, f"{_what} on {_point}", cells=_name, of=_point, **_own))
    _names = tuple(f"{_name}.{point}" for point in POINTS)
    add_kind(SiteKind(_name, _axes, _default, _width, f"{_what}, at each point that has any", cells=_name, points=_names))

for _point in POINTS:
    add_kind(SiteKind(f"reads.{_point}", _BY_POS, _BY_POS, "d_model", f"what dictionaries on {_point} read", of=_point))

_NAME = r"[a-z_]+(\.[a-z_]+)?"
_SCORED = re.compile(rf"(?P<kind>{_NAME})(\[(?P<axes>[^\]]*)\])?")
_POSITION = r"[A-Za-z0-9_\-]+"
_NARROWED = (
    r"(L(?P<layer>\d+)\.)?((?P<letter>[{letters}])(?P<index>\d+)\.)?(?P<kind>{name})"
    rf"(@(?P<pos>\*|{_POSITION}(,{_POSITION})*)(<(?P<src>\*|{_POSITION}(,{_POSITION})*))?)?"
)


@dataclass(frozen=True)
class Site:
    """An activation kind at a granularity, or narrowed to one part of one layer.

    ``axes`` are the axes that get a score each; the other axes are taken jointly. ``layer``, ``index`` (of the head, the KV head for ``k`` and
    ``v``, or the neuron), ``pos`` (the destination for ``pattern``) and ``src`` narrow it; None means all. Make one with :meth:`parse`.
    """

    kind: str
    axes: tuple[str, ...]
    layer: int | None = None
    index: int | None = None
    pos: tuple[Position, ...] | None = None
    src: tuple[Position, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise _unknown_kind(self.kind)
        kind = KINDS[self.kind]
        if kind.points and not self.axes:
            raise SiteError(
                f"an address names the point as well, as in L3.{'F512' if self.kind == 'features' else self.kind}.resid_post; "
                f"got {self.kind} without one of {', '.join(POINTS)}."
            )
        bad = [axis for axis in self.axes if axis not in kind.axes]
        if bad or len(set(self.axes)) != len(self.axes):
            raise SiteError(f"{self.kind} has the axes {list(kind.axes)}; got {list(self.axes)}. Name each of the axes to score once.")
        if not self.narrowed and kind.axes[0] not in self.axes:
            raise SiteError(f"the granularity of {self.kind} needs the axis {kind.axes[0]}; got {list(self.axes)}.")
        if list(self.axes) != [axis for axis in kind.axes if axis in self.axes]:
            raise SiteError(f"write the axes of {self.kind} in the order {list(kind.axes)}; got {list(self.axes)}.")
        if kind.granularities is not None and self.axes not in kind.granularities:
            valid = ", ".join(f"{self.kind}[{','.join(axes)}]" for axes in kind.granularities)
            got = f"the axes {list(self.axes)}" if self.axes else "an address"
            raise SiteError(f"{self.kind} are scored as a whole, as one of {valid}; got {got}.")
        if self.layer is not None and not kind.layered:
            raise SiteError(f"{self.kind} has no layers; drop L{self.layer}.")
        if self.narrowed and self.layer is None and kind.layered:
            raise SiteError(f"an address of {self.kind} needs its layer, as in L3.{self.kind}.")
        if self.axes and not (self.whole and self.layer is None):
            raise SiteError(f"{self.kind} has the axes {list(self.axes)} to score and is narrowed as well; give one or the other.")
        if self.index is not None and kind.unit is None:
            raise SiteError(f"{self.kind} has no heads, neurons or the like to choose {self.index} of; leave it out.")
        if self.src is not None and kind.source is None:
            raise SiteError(f"{self.kind} has no source positions; the '<' belongs to pattern, as in L5.H1.pattern@END<S1.")

    @staticmethod
    def parse(text: "str | Site") -> "Site":
        """The site that a text is: a kind, a kind with its axes in brackets, an address, or the name of a node.

        >>> Site.parse("z").axes
        ('layer', 'head')
        >>> Site.parse("L9.H6.z@END").index
        6
        >>> str(Site.parse("a9.h6"))
        'L9.H6.z'

        Raises:
            SiteError: unknown kind or axis, or text that is not a site.
        """
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise SiteError(f"a site is a string such as 'resid_pre' or 'L9.H6.z@END'; got {text!r}.")
        compact = _as_address(text.replace(" ", ""))
        if match := _SCORED.fullmatch(compact):
            kind = match["kind"]
            if kind not in KINDS:
                raise _unknown_kind(kind)
            axes = KINDS[kind].default if match["axes"] is None else tuple(match["axes"].split(","))
            return Site(kind, axes)
        if match := re.fullmatch(_NARROWED.replace("{letters}", "".join(sorted(_nouns()))).replace("{name}", _NAME), compact):
            if match["layer"] is None and match["kind"] in KINDS and KINDS[match["kind"]].layered:
                raise SiteError(f"the address {text!r} lacks its layer; write L0.{compact} (or another layer).")
            return Site(
                _kind_of(match["kind"], match["letter"], match["index"]),
                (),
                layer=None if match["layer"] is None else int(match["layer"]),
                index=None if match["index"] is None else int(match["index"]),
                pos=_positions(match["pos"]),
                src=_positions(match["src"]),
            )
        raise SiteError(
            f"cannot read the site {text!r}. Write a kind ({', '.join(_short())}), a kind with axes (z[layer,pos,head]) or an address (L9.H6.z@END)."
        )

    @property
    def narrowed(self) -> bool:
        """Whether the site is an address for an edit (one layer, or the input) rather than a whole sweep."""
        return not self.axes

    @property
    def whole(self) -> bool:
        """Whether nothing is narrowed but the layer: all positions, heads and neurons."""
        return self.pos is None and self.src is None and self.index is None

    def at(self, layer: int | None, *, index: int | None = None) -> "Site":
        """This kind, narrowed to one layer (and head or neuron), all positions."""
        return replace(self, axes=(), layer=layer, index=index)

    def __str__(self) -> str:
        if not self.narrowed:
            return self.kind if self.axes == KINDS[self.kind].default else f"{self.kind}[{','.join(self.axes)}]"
        text = "" if self.layer is None else f"L{self.layer}."
        if self.index is not None:
            text += f"{KINDS[self.kind].letter}{self.index}."
        text += self.kind if self.index is None else KINDS[self.kind].of or self.kind
        if self.pos is not None:
            text += "@" + ",".join(map(str, self.pos))
        if self.src is not None:
            text += ("@*" if self.pos is None else "") + "<" + ",".join(map(str, self.src))
        return text


def _as_address(text: str) -> str:
    """Names of nodes (``a9.h6``, ``m3``) as addresses; other text as it is."""
    if match := re.fullmatch(r"[mM](\d+)(@.*)?", text):
        return f"L{match[1]}.mlp_out{match[2] or ''}"
    if match := re.fullmatch(r"[aAlL](\d+)\.[hH](\d+)(\..*|@.*)?", text):
        rest = match[3] or ""
        return f"L{match[1]}.H{match[2]}{rest if rest.startswith('.') else '.z' + rest}"
    return text


def _positions(text: str | None) -> tuple[Position, ...] | None:
    if text is None or text == "*":
        return None
    return tuple(int(part) if re.fullmatch(r"-?\d+", part) else part for part in text.split(","))


def _nouns() -> dict[str, str]:
    """What the letters of addresses stand for: H for a head, N for a neuron."""
    return {kind.letter: kind.unit.removeprefix("kv_") for kind in KINDS.values() if kind.unit is not None}


def _kind_of(name: str, letter: str | None, index: str | None) -> str:
    """The kind whose entry an address names: ``features.resid_post`` of the name resid_post with an F.

    Raises:
        SiteError: a head of what has no heads.
    """
    if letter is None or index is None or name not in KINDS or KINDS[name].letter == letter or KINDS[name].points:
        return name
    owners = [kind for kind in KINDS.values() if kind.letter == letter]
    if own := [kind.name for kind in owners if kind.of == name]:
        return own[0]
    noun, points = _nouns()[letter], [kind.of or kind.name for kind in owners]
    where = f"Sites with {noun}s: {', '.join(points)}." if len(points) > 1 else f"The site with {noun}s is {points[0]}."
    raise SiteError(f"{name} has no {noun}s; drop {letter}{int(index)}. {where}")


def _unknown_kind(name: str) -> SiteError:
    """An error for a name that no kind has; kinds of single points go by what stands for them."""
    return SiteError(unknown("site", name, KINDS if "." in name else _short()))


def _short() -> list[str]:
    """The kinds, those of single points left to what stands for them."""
    return [kind.name for kind in KINDS.values() if not kind.of]


def address(kind: str, layer: int | None) -> Site:
    """The address of a whole site: of one layer, all positions and units."""
    return Site(kind, (), layer=layer)


def parse_sites(sites: "str | Site | Iterable[str | Site]") -> tuple[Site, ...]:
    """Parse the sites of a sweep: a name, a comma-separated list of names, or several names.

    >>> [str(site) for site in parse_sites("resid_pre, z[layer,pos,head]")]
    ['resid_pre', 'z[layer,pos,head]']

    Raises:
        SiteError: an empty list, a repeated site, or an address (a sweep scores whole kinds).
    """
    if isinstance(sites, Site):
        sites = [sites]
    elif isinstance(sites, str):
        sites = re.split(r",(?![^\[]*\])", sites)
    elif not isinstance(sites, Iterable):
        raise SiteError(f"sites are a name such as 'resid_pre', or a list of names; got {sites!r}.")
    parsed = tuple(Site.parse(site) for site in sites)
    if not parsed:
        raise SiteError(f"no sites given. Name at least one of: {', '.join(_short())}.")
    for site in parsed:
        if site.narrowed:
            raise SiteError(f"{site} is an address; a sweep scores a whole kind, such as {site.kind}. Use it in an edit instead.")
        if parsed.count(site) > 1:
            raise SiteError(f"the site {site} is named twice; name it once.")
    return parsed
