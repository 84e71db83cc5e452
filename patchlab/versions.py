"""Versions of patchlab and of the libraries that its numbers depend on."""

import importlib.metadata


def library_versions() -> dict[str, str]:
    """Versions by name, as provenance holds them."""
    from patchlab import __version__

    names = ("torch", "transformer-lens", "transformers", "numpy")
    return {"patchlab": __version__, **{name.replace("-", "_"): importlib.metadata.version(name) for name in names}}
