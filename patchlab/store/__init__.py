"""Files and folders: written whole or not at all."""

from patchlab.store.files import writing
from patchlab.store.folder import result_folder

__all__ = ["result_folder", "writing"]
