"""A hook of the documentation site's build: reading the site loads nothing from the network."""

import re
from pathlib import Path
from typing import Any

_TAG = re.compile(r"<(?:script|img|iframe|source|video|audio|embed|object|link)\b[^>]*>", re.I)
_FAR = re.compile(r"\b(?:src|srcset|href|data)=[\"']?(?:https?:)?//", re.I)
_ONLY_NAMED = re.compile(r"\brel=[\"']?(?:author|canonical|edit|license|next|prev)\b", re.I)
_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"';]*", re.I)


def loaded(text: str) -> list[str]:
    """What a page or a style sheet loads from another host when it is read."""
    tags = [tag for tag in _TAG.findall(text) if _FAR.search(tag) and not _ONLY_NAMED.search(tag)]
    return tags + _STYLE.findall(text)


def _refuse(name: str, text: str) -> None:
    if found := loaded(text):
        from mkdocs.exceptions import PluginError

        raise PluginError(f"{name} loads {found[0]} at reading time, and the site is to be read without a network.")


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Refuse a page that loads something."""
    _refuse(page.file.src_path, output)
    return output


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Refuse a style sheet that does."""
    for path in Path(config["site_dir"]).rglob("*.css"):
        _refuse(path.name, path.read_text(encoding="utf-8"))
