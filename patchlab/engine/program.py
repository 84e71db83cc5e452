"""Programs and results: the value that describes a run, and the value that comes back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.adapters import Architecture
from patchlab.errors import InterventionError
from patchlab.interventions import Edit
from patchlab.metrics import Answers, Metric
from patchlab.rules import Composite
from patchlab.sites import KINDS, Site, address
from patchlab.sources import Kept

Target = tuple[str, int | None]
"""A site kind at one layer, e.g. ``("z", 9)``; ``("input", None)`` for the embedding."""


@dataclass(frozen=True)
class Program:
    """These token rows, with these edits, under these backward rules: keep these, differentiate there, evaluate this metric.

    Args:
        tokens: token ids; rows of one length.
        examples: which example each row belongs to; on the CPU, and put there, since the host looks rows up by them.
        positions: named positions, one index per row.
        edits: applied in order at each hook, after the rules and before anything is kept.
        rules: backward rules; None for the plain gradient.
        keep: site activations to return.
        gradients: sites at which the gradient of each row's metric is returned.
        hooks: hooks of the Bridge, by name, whose values are returned as they are.
        hook_gradients: hooks of the Bridge at which the gradient is returned.
        attention: how gradients at k and v are told apart: ``joint``; by the query ``head`` that reads them
            (``[row, pos, head, d_head]`` also where several share a key-value head); also by the position that does
            (``dest``: ``[row, dest, pos, head, d_head]``). The last two need the gradient at z of the same layers.
        metric: evaluated per row; needs ``answers``.
        logits: which logits to return: of all positions, of the answer position (the last), or none.
    """

    tokens: Int[Tensor, "row pos"]
    examples: Int[Tensor, " row"]
    positions: Mapping[str, Int[Tensor, " row"]] = field(default_factory=dict[str, Tensor])
    edits: tuple[Edit, ...] = ()
    rules: Composite | None = None
    keep: tuple[Target, ...] = ()
    gradients: tuple[Target, ...] = ()
    hooks: tuple[str, ...] = ()
    hook_gradients: tuple[str, ...] = ()
    attention: Literal["joint", "head", "dest"] = "joint"
    metric: Metric | None = None
    answers: Answers | None = None
    logits: Literal["all", "answer", "none"] = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", self.examples.cpu())
        if (self.gradients or self.hook_gradients) and (self.metric is None or self.answers is None):
            raise InterventionError("gradients need a metric and its answers; give both or ask for no gradients.")


@dataclass(frozen=True)
class Result:
    """The result of a run. It can itself be the source of an edit.

    ``activations`` and ``gradients`` map ``(kind, layer)`` to tensors ``[row, pos, d_model]``, ``[row, pos, head, d_head]``,
    ``[row, pos, neuron]`` or ``[row, head, dest, src]``. ``hooks`` and
    ``hook_gradients`` map hook names to tensors as the Bridge has them. ``work`` counts forwards, backwards and rows × positions computed.
    """

    examples: Int[Tensor, " row"]
    logits: Float[Tensor, "row *rest"] | None = None
    values: Float[Tensor, " row"] | None = None
    activations: Mapping[Target, Tensor] = field(default_factory=dict[Target, Tensor], repr=False)
    gradients: Mapping[Target, Tensor] = field(default_factory=dict[Target, Tensor], repr=False)
    hooks: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    hook_gradients: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    work: tuple[int, int, int] = (0, 0, 0)

    def as_source(self) -> Kept:
        """This run's kept activations as an edit's source."""
        return Kept(self.activations, self.examples)

    def __getitem__(self, site: str | Site) -> Tensor:
        """A kept activation by address; a head or neuron in the address selects it.

        >>> result["L9.H6.z"].shape  # doctest: +SKIP
        torch.Size([4, 15, 64])
        """
        wanted = Site.parse(site)
        key = (wanted.kind, wanted.layer)
        if key not in self.activations:
            kept = ", ".join(str(address(*k)) for k in self.activations) or "nothing"
            raise InterventionError(f"this run did not keep {wanted}; it kept {kept}. Add it to keep=[...].")
        if wanted.pos is not None or wanted.src is not None:
            raise InterventionError(f"select positions of a kept activation by indexing the tensor; got {wanted}. Drop everything from '@' on.")
        value = self.activations[key]
        kind = KINDS[wanted.kind]
        return value if wanted.index is None or kind.unit is None else value.select(kind.dim(kind.unit), wanted.index)

    def __repr__(self) -> str:
        kept = ", ".join(str(address(*key)) for key in self.activations) or "nothing"
        logits = "no logits" if self.logits is None else f"logits {list(self.logits.shape)}"
        return f"Result({self.examples.shape[0]} rows, {logits}; kept {kept})"


def targets(sites: str | Site | list[str | Site] | tuple[str | Site, ...], arch: Architecture) -> tuple[Target, ...]:
    """The (kind, layer) pairs that site names stand for: a bare kind means every layer that has it.

    >>> targets(["L2.z", "mlp_out"], model.arch)  # doctest: +SKIP
    (('z', 2), ('mlp_out', 0), ('mlp_out', 1))

    Raises:
        SiteError: a name that is no site, or that stands for none here.
    """
    if isinstance(sites, (str, Site)):
        sites = [sites]
    found: list[Target] = []
    for site in (site for name in sites for site in arch.meant([Site.parse(name)])):
        found += [(site.kind, site.layer)] if site.layer is not None else arch.targets(site.kind)
    return tuple(dict.fromkeys(found))


def row_numbers(tokens: Int[Tensor, "row pos"]) -> Int[Tensor, " row"]:
    """Examples 0, 1, 2, ... for rows that are examples of their own."""
    return torch.arange(tokens.shape[0])
