"""Accessors: how a site is read from, and written to, the hook that hosts it.

Every site lives in the tensor of one hook of the Bridge. Most are that tensor; heads are a slice of its last axis; the
residual stream between attention and MLP is reached through the attention output, because the hook named
``hook_resid_mid`` feeds only the MLP and an edit there would miss the skip connection.
"""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from patchlab.digest import digest
from patchlab.sites import KINDS

HOSTS = {
    "input": "hook_embed",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_attn_out",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "mlp_post": "mlp.hook_post",
}


@dataclass(frozen=True)
class Accessor:
    """Reads a site kind from its host activation and writes it back.

    ``companion`` names a second hook whose value the accessor needs (resid_pre, for resid_mid). ``heads`` is the number of
    heads that share the last axis of the host.
    """

    kind: str
    heads: int | None = None

    @cached_property
    def identity(self) -> str | None:
        """The identity of the accessor among others of its kind: a hash of its fields and, outside patchlab, of what it does; None if it has no such.

        Results of a site that was added to a model keep it: two dictionaries are two sites.
        """
        return digest(self, self.kind)

    def at(self, layer: int | None) -> "Accessor":
        """The accessor of one layer, where layers differ."""
        return self

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers of a model that have the site."""
        return tuple(range(n_layers))

    def parts(self) -> tuple["Accessor", ...]:
        """The accessors that together write the site of a layer: several where it has parts in other layers as well."""
        return (self,)

    @property
    def in_block(self) -> bool:
        """Whether it reads and writes within the block of its layer."""
        return len(self.parts()) == 1

    def entries(self, layer: int | None) -> int | None:
        """How many entries (features) the site has in a layer, where no axis of the model says it."""
        return None

    @staticmethod
    def _name(layer: int | None, hook: str) -> str:
        return hook if layer is None else f"blocks.{layer}.{hook}"

    def host(self, layer: int | None) -> str:
        """Name of the hook that hosts the site."""
        return self._name(layer, HOSTS[self.kind])

    def companion(self, layer: int | None) -> str | tuple[str, ...] | None:
        """Name of the second hook that is needed, if any; or of several."""
        return self._name(layer, HOSTS["resid_pre"]) if self.kind == "resid_mid" else None

    def shape(self, host: Float[Tensor, "row *rest"]) -> Float[Tensor, "row *site"]:
        """A host-shaped tensor (an activation or a gradient) in the site's shape: heads get an axis of their own."""
        if self.heads is None or host.ndim == 4:
            return host
        return host.unflatten(-1, (self.heads, -1))  # once per cell of a sweep, where einops would take 4 μs more

    def pull(self, host: Float[Tensor, "row *rest"], gradient: Float[Tensor, "row *rest"]) -> Float[Tensor, "row *site"]:
        """The gradient at the site, from the host's value and the gradient there."""
        return self.shape(gradient)

    def read(self, host: Float[Tensor, "row *rest"], companion: Float[Tensor, "row *rest"] | None = None) -> Float[Tensor, "row *site"]:
        """The site's value: ``[row, pos, d_model]``, ``[row, pos, head, d_head]``, ``[row, pos, neuron]`` or ``[row, head, dest, src]``."""
        return self.shape(host) if companion is None else companion + host

    def write(
        self, host: Float[Tensor, "row *rest"], companion: Float[Tensor, "row *rest"] | None, value: Float[Tensor, "row *site"]
    ) -> Float[Tensor, "row *rest"]:
        """The host with the site set to ``value``.

        For resid_mid the host moves by the difference, which leaves the bits alone where nothing changes.
        """
        return value.reshape(host.shape) if companion is None else host + (value - (companion + host))


def make_accessors(n_heads: int, n_kv_heads: int) -> dict[str, Accessor]:
    """One accessor per site kind that a hook of the Bridge hosts."""
    sizes = {"head": n_heads, "kv_head": n_kv_heads}
    return {name: Accessor(name, sizes.get(KINDS[name].unit or "") if KINDS[name].width else None) for name in KINDS if name in HOSTS}
