"""Hook names in dictionary files, as site kinds and layers.

Files name hooks as TransformerLens does: ``blocks.3.hook_resid_post``. One dictionary for all layers names ``blocks.{layer}.hook_resid_post``.
"""

import re

from patchlab.errors import DictionaryError

ALL_LAYERS = "{layer}"
MLP_IN = "mlp.hook_in"
"""What an MLP itself reads, after the norm and its weights."""

_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "z",
    MLP_IN: "mlp_in",
    "mlp.hook_post": "mlp_post",
    "hook_mlp_in": "resid_mid",  # a copy of the stream, before the norm
}
_WRITTEN = {reads: hook for hook, reads in _HOOKS.items() if hook != "hook_mlp_in"}


def site_of(hook: str) -> tuple[str, int | None, bool]:
    """Site kind (or hook within the block), layer, and whether it stands for all layers.

    >>> site_of("blocks.3.attn.hook_z"), site_of("blocks.{layer}.hook_resid_pre"), site_of("blocks.3.ln2.hook_normalized")
    (('z', 3, False), ('resid_pre', None, True), ('ln2.hook_normalized', 3, False))

    Raises:
        DictionaryError: no hook of a block, nor the embedding.
    """
    if hook == "hook_embed":
        return "input", None, False
    match = re.fullmatch(r"blocks\.(\d+|\{layer\})\.(\S+)", hook)
    if match is None:
        raise DictionaryError(f"cannot tell the site from the hook {hook!r}; expected a name such as 'blocks.3.hook_resid_post' or 'hook_embed'.")
    layer = None if match[1] == ALL_LAYERS else int(match[1])
    return _HOOKS.get(match[2], match[2]), layer, layer is None


def kind_of(hook: str) -> str:
    """The site kind of a hook within a block, or the hook itself.

    >>> kind_of("hook_resid_mid"), kind_of("ln2.hook_normalized")
    ('resid_mid', 'ln2.hook_normalized')
    """
    return _HOOKS.get(hook, hook)


def hook_of(reads: str, layer: int | None) -> str:
    """The hook of a site kind, or of a hook within a block, of one layer or all.

    >>> hook_of("z", 3), hook_of("ln2.hook_normalized", None)
    ('blocks.3.attn.hook_z', 'blocks.{layer}.ln2.hook_normalized')
    """
    if reads == "input":
        return "hook_embed"
    return f"blocks.{ALL_LAYERS if layer is None else layer}.{within_block(reads)}"


def within_block(reads: str) -> str:
    """The hook of a site kind within its block."""
    return _WRITTEN.get(reads, reads)
