"""A hook of the documentation site's build: reading the site loads nothing from the network."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LOADS = re.compile(r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s\"'>]+|<link\b[^>]*>", re.I)
_FAR = re.compile(r"(?:href|src)=[\"']?(?:https?:)?//")
_HARMLESS = re.compile(r"rel=[\"']?(?:canonical|edit|next|prev)\b")
_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"';]*", re.I)


def loaded(html: str) -> list[str]:
    """The tags of a page that load something from another host."""
    return [tag for tag in _LOADS.findall(html) if _FAR.search(tag) and not _HARMLESS.search(tag)] + _STYLE.findall(html)


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Refuse a page that loads something from another host."""
    if found := loaded(output):
        raise PluginError(f"{page.file.src_path} loads {found[0]} at reading time; the site is read without a network.")
    return output


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Refuse a style sheet that does."""
    for path in Path(config["site_dir"]).rglob("*.css"):
        if found := _STYLE.findall(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.name} loads {found[0]} at reading time; the site is read without a network.")
