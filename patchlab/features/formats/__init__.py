"""Formats of dictionary files: one file each, and one line each below."""

from patchlab.features.formats.format import Format, Said
from patchlab.features.formats.saelens import SAELENS

FORMATS: tuple[Format, ...] = (SAELENS,)
"""In the order in which they are tried on a folder."""

__all__ = ["FORMATS", "Format", "Said"]
