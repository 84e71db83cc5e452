"""Files, folders and stores of runs: written whole or not at all."""

from patchlab.store.files import writing
from patchlab.store.folder import result_folder
from patchlab.store.gc import Garbage, gc, remove
from patchlab.store.keeper import FileKeeper, Keeper
from patchlab.store.merge import merge
from patchlab.store.runs import RunStore, Stored

__all__ = ["FileKeeper", "Garbage", "Keeper", "RunStore", "Stored", "gc", "merge", "remove", "result_folder", "writing"]
