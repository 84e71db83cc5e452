"""The store of runs: what is acknowledged is never lost, what is not is never half there."""

from patchlab.store import RunStore
from patchlab.testing.stores import StoreContract


class TestRunStore(StoreContract):
    store = RunStore
