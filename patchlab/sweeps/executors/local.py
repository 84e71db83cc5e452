"""This process as the only worker."""

from patchlab.models import Model
from patchlab.sweeps.driver import Board
from patchlab.sweeps.spec import ModelSpec
from patchlab.sweeps.work import Worker


class Local:
    """The executor that does everything in this process, group by group.

    Args:
        progress: show the progress of cells on stderr.
        loaded: a model that is in memory already, and what it is.
    """

    def __init__(self, *, progress: bool = False, loaded: tuple[ModelSpec, Model] | None = None) -> None:
        self._worker = Worker(progress=progress, loaded=loaded)

    def run(self, board: Board) -> None:
        """Do every group; Ctrl-C goes through, with the finished cells of the run under way kept."""
        for name in board.names():
            while (group := board.left(name)) is not None:
                self._worker.do(group, board.take)
