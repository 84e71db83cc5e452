"""The setting of a run of a method: what it is about."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from patchlab.engine import Target, session_of
from patchlab.interventions import Edit
from patchlab.models import Model
from patchlab.sites import Site
from patchlab.sources import Average
from patchlab.tasks.task import PositionAxis, Task

Direction = Literal["denoising", "noising"]
DIRECTIONS = ("denoising", "noising")
SOURCES = ("paired", "zero", "mean", "mean_positional")


@dataclass(frozen=True)
class Setting:
    """The setting of one run: model, task, sites, direction, and what they entail.

    ``targets`` are the activations, every (kind, layer), whose values in both runs the scores of the sites need. ``axis`` is None where no
    site is scored by position. ``live`` says which cells can matter, per site; None for sites whose cells only the runs show.
    """

    model: Model
    task: Task
    sites: tuple[Site, ...]
    direction: Direction
    axis: PositionAxis | None
    live: dict[str, Bool[np.ndarray, "*cells"] | None]
    targets: tuple[Target, ...] = ()
    mean: Average | None = None
    max_memory: float | int | None = None

    @property
    def surrounding(self) -> tuple[Edit, ...]:
        """The edits of the ``pl.intervene`` blocks around the run."""
        return session_of(self.model).surrounding
