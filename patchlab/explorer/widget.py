"""The view in a notebook: one anywidget, to which the browser puts its questions."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from plotly.offline import get_plotlyjs

from patchlab.errors import OutputError, PatchlabError

Ask = Callable[..., dict[str, Any]]
"""What answers questions: :meth:`patchlab.explorer.Explorer.ask`."""


class Stopped(Exception):
    """The browser has asked to end the work."""


class Desk:
    """A desk with one clerk, who answers questions in the order in which they come, in a thread: a kernel hears meanwhile that one is to stop.

    ``state()`` is what is shown first, ``ask`` answers questions about it, and ``send(content, buffers)`` reaches the browser. A question
    ``{"id": 3, "ask": [...]}`` gets ``{"id": 3, "answer": ...}`` or ``{"id": 3, "error": ...}``; before that ``{"id": 3, "progress": steps}``, and of
    a sweep ``["sweep", direction, site, cells]`` its parts. ``{"stop": 3}`` ends it.
    """

    def __init__(self, state: Callable[[], dict[str, Any]], ask: Ask, send: Callable[..., None]) -> None:
        self.state, self.ask, self.send = state, ask, send
        self.waiting: queue.Queue[tuple[int | str, list[Any]]] = queue.Queue()
        self.stopped: set[int | str] = set()
        self._thread: threading.Thread | None = None

    def receive(self, message: Mapping[str, Any]) -> None:
        """A message of the browser."""
        if "stop" in message:
            self.stopped.add(message["stop"])
        elif "ask" in message:
            self.waiting.put((message["id"], list(message["ask"])))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="explorer", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until all questions have been answered."""
        self.waiting.join()

    def _work(self) -> None:
        while True:
            number, question = self.waiting.get()
            try:
                self._answer(number, question)
            except Stopped:
                self.send({"id": number, "stopped": True})
            except PatchlabError as error:
                self.send({"id": number, "error": str(error)})
            except Exception as error:  # whatever it is, the browser waits for an answer
                self.send({"id": number, "error": f"{type(error).__name__}: {error}"})
            finally:
                self.waiting.task_done()

    def _answer(self, number: int | str, question: Sequence[Any]) -> None:
        def tick(n: int) -> None:
            if number in self.stopped:
                raise Stopped
            self.send({"id": number, "progress": n})

        if question[0] == "plotly":
            self.send({"id": number, "answer": {}}, [get_plotlyjs().encode()])
        elif question[0] == "state":
            self.send({"id": number, "answer": self.state()})
        elif question[0] == "sweep":
            _, direction, site, cells = question
            for cell in cells:
                if number in self.stopped:
                    raise Stopped
                self.send({"id": number, "part": [cell, self.ask("exact", direction, site, cell)]})
            self.send({"id": number, "answer": {}})
        else:
            self.send({"id": number, "answer": self.ask(*question, tick=tick)})


def script(tail: str) -> str:
    """The JavaScript of the view, with what mounts it in a ``page`` or a ``widget``."""
    folder = files("patchlab.explorer")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("explorer.js", f"{tail}.js"))


def style() -> str:
    """The style sheet of the view."""
    return files("patchlab.explorer").joinpath("explorer.css").read_text(encoding="utf-8")


def missing() -> str | None:
    """What to install where the view cannot be shown; None where it can."""
    if find_spec("anywidget") is not None:
        return None
    return (
        "The interactive view needs anywidget, which is not installed: pip install 'patchlab[notebooks]', then restart the kernel. "
        "explorer.save_html(path) writes it as a page without."
    )


def widget_of(state: Callable[[], dict[str, Any]], ask: Ask) -> Any:
    """The widget of an explorer. Only its script is part of a saved notebook: the scores, and plotly, are sent when it is shown.

    Raises:
        OutputError: anywidget is not installed.
    """
    if (why := missing()) is not None:
        raise OutputError(why)
    import anywidget  # pyright: ignore[reportMissingImports]

    class ExplorerWidget(anywidget.AnyWidget):
        _esm = script("widget")
        _css = style()

    widget = ExplorerWidget()
    desk = Desk(state, ask, lambda content, buffers=None: widget.send(content, buffers))
    widget.on_msg(lambda _, content, buffers: desk.receive(content))
    return widget
