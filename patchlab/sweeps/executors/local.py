"""This process as the only worker."""

from patchlab.sweeps.driver import Board
from patchlab.sweeps.work import Worker


class Local:
    """The executor that does everything in this process, group by group."""

    def __init__(self, *, progress: bool = False) -> None:
        self._worker = Worker(progress=progress)

    def run(self, board: Board) -> None:
        """Do every group; Ctrl-C goes through, with the finished cells of the run under way kept."""
        for name in board.names():
            while (group := board.left(name)) is not None:
                self._worker.do(group, board.take)
