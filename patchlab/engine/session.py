"""Sessions: what is going on with a loaded model. The model itself holds nothing of it.

Runs put hooks on a model, so one thread at a time runs it: another one gets an error, and no scores that are mixed with the hooks of the first.
"""

import threading
from collections.abc import Callable, Generator, Hashable, Iterable
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from patchlab.adapters import BridgedModel
from patchlab.errors import ModelError
from patchlab.interventions import Edit, as_edits

Given = ParamSpec("Given")
Found = TypeVar("Found")


class _Turn:
    """Whose turn it is to run a bridge."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.RLock(), ""


class Session:
    """The session of one model: what is going on with it.

    Attributes:
        surrounding: the edits of the ``pl.intervene`` blocks around what runs now, outer first.
        found: what tests found out about the model, by name (:func:`found_once`).
        unfinished: what interrupted runs of methods left, for the same call to go on from.
        shared: unpatched runs that several methods start from, inside a block that shares them.
    """

    def __init__(self, name: str, turn: _Turn) -> None:
        self.surrounding: tuple[Edit, ...] = ()
        self.found: dict[Hashable, Any] = {}
        self.unfinished: dict[str, Any] = {}
        self.shared: Any = None
        self._name, self._turn = name, turn

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """The model in the hands of this thread for the duration of the block; blocks nest.

        Raises:
            ModelError: another thread has it.
        """
        if not self._turn.lock.acquire(blocking=False):
            raise ModelError(
                f"{self._name} is in use by the thread {self._turn.thread!r} (a run, or an intervene block), and {threading.current_thread().name!r} "
                f"would run it too. Runs put hooks on a model, so one thread at a time can run it: wait for the other, or load it once per thread."
            )
        try:
            self._turn.thread = threading.current_thread().name
            yield
        finally:
            self._turn.lock.release()

    @contextmanager
    def surrounded(self, edits: tuple[Edit, ...]) -> Generator[None, None, None]:
        """The model with these edits around every run, and no others, for the duration of the block."""
        with self.running():
            before, self.surrounding = self.surrounding, edits
            try:
                yield
            finally:
                self.surrounding = before


_sessions: WeakKeyDictionary[BridgedModel, Session] = WeakKeyDictionary()
_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_opening = threading.Lock()


def session_of(model: BridgedModel) -> Session:
    """The session of a model, which lasts as long as the model. Models of one bridge have sessions of their own and take turns."""
    found = _sessions.get(model)
    if found is None:
        with _opening:
            turn = _turns.setdefault(model.bridge, _Turn())
            found = _sessions.setdefault(model, Session(model.name, turn))
    return found


def exclusive(
    function: Callable[Concatenate[BridgedModel, Given], Found],
) -> Callable[Concatenate[BridgedModel, Given], Found]:
    """A function of a model that no other thread can run at the same time; see :meth:`Session.running`."""

    @wraps(function)
    def alone(model: BridgedModel, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        with session_of(model).running():
            return function(model, *args, **kwargs)

    return alone


def found_once(model: BridgedModel, name: Hashable, find: Callable[[], Found]) -> Found:
    """The finding of a test about a model, which it is run for once: alone, without what surrounds the call."""
    session = session_of(model)
    if name not in session.found:
        with session.surrounded(()):
            session.found[name] = find()
    return session.found[name]


@contextmanager
def intervene(model: BridgedModel, edits: Edit | Iterable[Edit]) -> Generator[None, None, None]:
    """Apply edits to every ``model.run`` and every method inside the block; nested blocks compose, outer first.

    Nothing is left behind when the block ends, also after an exception. Other threads cannot run the model meanwhile.

    Raises:
        SiteError: a site that the model lacks.
        ModelError: another thread runs the model.

    Example:
        >>> with pl.intervene(model, pl.Edit("L0.attn_out", pl.sources.zero())):  # doctest: +SKIP
        ...     scores = pl.ActivationPatching().run(model, task, "resid_pre")
    """
    new, session = as_edits(edits), session_of(model)
    for edit in new:
        model.arch.check(edit.address)
    with session.running(), session.surrounded(session.surrounding + new):
        yield
