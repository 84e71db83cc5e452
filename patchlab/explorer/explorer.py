"""The explorer of score maps: a view in a notebook, and the same as a page."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchlab.circuits import Circuit, NodeCircuit
from patchlab.explorer.answers import Answers, Tick
from patchlab.explorer.maps import grouped
from patchlab.explorer.page import write_page
from patchlab.explorer.state import state_of
from patchlab.explorer.widget import missing, widget_of
from patchlab.methods.names import scoring_method
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.tasks.task import Task


class Explorer:
    """Score maps to click through; :func:`explore` makes one. As the last line of a notebook's cell it is shown.

    Attributes:
        answers: what has been worked out, also by the view: ``answers.exact`` holds the effects of the cells that were patched.
    """

    def __init__(self, answers: Answers, circuit: Circuit | NodeCircuit | None) -> None:
        self.answers, self.circuit = answers, circuit
        self._state: dict[str, Any] | None = None
        self._widget: Any = None

    @property
    def state(self) -> dict[str, Any]:
        """What is shown before anything is asked, as plain JSON."""
        if self._state is None:
            self._state = state_of(self.answers.model, self.answers.task, self.answers.groups, self.circuit)
        return self._state

    def ask(self, *question: Any, tick: Tick | None = None) -> dict[str, Any]:
        """The answer to a question of the view, as :meth:`patchlab.explorer.answers.Answers.answer` gives it.

        Example:
            >>> explorer.ask("exact", "denoising", "z", 7)["mean"]  # doctest: +SKIP
        """
        return self.answers.answer(question, tick)

    @property
    def widget(self) -> Any:
        """The view as an anywidget.

        Raises:
            OutputError: anywidget is not installed.
        """
        if self._widget is None:
            self._widget = widget_of(lambda: self.state, self.ask)
        return self._widget

    def save_html(self, path: str | os.PathLike[str], *, exact: int = 24, overwrite: bool = False, progress: bool = True) -> Path:
        """Write the view as one page that needs neither a server nor a network.

        What the view would work out when it is asked is worked out beforehand where that is affordable, and the page says where it is not: exact
        effects of the cells with the largest estimates (all that an exact map has, and those that were patched in the view), the largest cells
        together, attention patterns of the mean and of as many examples as fit, neurons and features of every MLP cell that is shown.

        Args:
            path: of the page, ``.html``.
            exact: cells per site and direction that are patched exactly where no map has them.
            overwrite: replace an existing file.
            progress: show a progress bar. After an interruption the same call goes on with what it has.

        Returns:
            The file.

        Raises:
            OutputError: the file exists and ``overwrite`` is False, or it cannot be written there.

        Example:
            >>> pl.explore(model, task, {"exact": exact, "RelP": relp}).save_html("explorer.html")  # doctest: +SKIP
        """
        return write_page(self.state, self.answers, Path(path), exact=exact, overwrite=overwrite, progress=progress)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        why = missing()
        return {"text/plain": f"{self!r}\n{why}"} if why else self.widget._repr_mimebundle_(**options)

    def __repr__(self) -> str:
        parts = [f"{direction}: {', '.join(maps.by_name)}" for direction, maps in self.answers.groups.items()]
        first = next(iter(self.answers.groups.values())).first
        return f"Explorer({first.subject}; {'; '.join(parts)}) {' '.join(first.sites)}"


def explore(
    model: Model,
    task: Task,
    scores: ScoreMap | Mapping[str, ScoreMap] | Sequence[ScoreMap],
    *,
    circuit: Circuit | NodeCircuit | None = None,
    screen: str = "relp",
) -> Explorer:
    """An explorer of score maps: click a cell of a heatmap to see what it is.

    A cell shows its effect per example with its interval, under every method; the attention pattern if it is a head; neurons, and features where the
    model has dictionaries, if it is an MLP; the prompts, with what differs. A button patches it exactly; several cells can be patched together.
    Heatmap, agreement with exact patching and circuit show the same selection.

    Args:
        model: the model.
        task: the task that was scored.
        scores: a map, maps by name, or several maps, which go by their method. They may be of both directions.
        circuit: what is drawn beside them.
        screen: the method that scores neurons and features (:mod:`patchlab.methods.names`).

    Raises:
        ScoreError: maps that are not of this model, task, metric and positions, or not of each other.
        MethodError: no such method.

    Example:
        >>> pl.explore(model, task, {"exact": exact, "RelP": relp})  # doctest: +SKIP
    """
    return Explorer(Answers(model, task, grouped(model, task, scores), scoring_method(screen)), circuit)
