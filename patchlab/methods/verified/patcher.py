"""Single cells, to be patched in any order: where they are, what a screen gives them, and their exact effects."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from patchlab.engine.memory import free_bytes
from patchlab.errors import MethodError
from patchlab.methods.cells import cells_of, parts
from patchlab.methods.cells.kind import Index, listed, summed
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, mean_source, unpatched
from patchlab.scores import ScoreMap
from patchlab.sites import KINDS, Site
from patchlab.tasks.task import Batch

Cell = tuple[Site, Index]
"""A cell of a site; of a coarser one where cells are patched in groups."""


@dataclass(frozen=True)
class Cells:
    """All live cells of all sites, one after the other."""

    site: Int[np.ndarray, " cell"]
    where: list[Cell]
    screen: Float[np.ndarray, " cell"]
    setting: Setting

    @staticmethod
    def of(setting: Setting, screen: ScoreMap) -> "Cells":
        for name, reason in screen.not_scored.items():
            raise MethodError(
                f"the screen {screen.provenance['method']} does not score {name} ({reason}); leave the site out or take another screen."
            )
        for kind, reason in screen.provenance.get("readers_not_scored", {}).items():
            raise MethodError(
                f"the screen {screen.provenance['method']} does not score edges into {kind} ({reason}); take another screen, such as 'relp'."
            )
        site: list[int] = []
        where: list[Cell] = []
        scores: list[float] = []
        for number, one in enumerate(setting.sites):
            mean, live = screen.mean(one).to_numpy(), setting.live[str(one)]
            found = listed(live) if live is not None else [tuple(cell) for cell in screen.cells(one).tolist()]
            site += [number] * len(found)
            where += [(one, cell) for cell in found]
            scores += mean.tolist() if live is None else mean[live].tolist()
        return Cells(np.array(site), where, np.array(scores, dtype=np.float64), setting)

    def label(self, cell: Cell) -> str:
        """A cell by name."""
        return cells_of(cell[0]).label(self.setting, *cell)


class Patcher:
    """Patches lists of cells on all examples; keeps the unpatched runs where they fit into memory."""

    def __init__(self, exact: ActivationPatching, setting: Setting, batches: list[Batch], predicted: int, meter: Meter) -> None:
        if exact.source.startswith("mean"):
            positional = exact.source == "mean_positional"
            mean = mean_source(setting, batches, meter, at=setting.targets, positional=positional, summed=summed(setting, positional=positional))
            setting = replace(setting, mean=mean)
        self.exact, self.setting, self.batches, self.meter = exact, setting, batches, meter
        budget = free_bytes(setting.model.device) // 2 if setting.max_memory is None else setting.max_memory
        self.keeps = predicted * len(batches) <= budget
        self.kept: dict[int, Runs] = {}
        examples = np.concatenate([batch.examples.cpu().numpy() for batch in batches])
        self.order = np.argsort(examples)

    def joint(self, sets: Sequence[Sequence[Cell]]) -> Float[np.ndarray, "set example"]:
        """Exact effects of sets of cells, each set patched at once, in metric units."""
        if not sets:
            return np.zeros((0, len(self.order)))
        return np.concatenate([self._patched(runs, sets) for runs in self.runs()], axis=1)[:, self.order]

    def runs(self) -> Iterator[Runs]:
        """The unpatched runs of every batch."""
        return map(self._runs, range(len(self.batches)))

    def _patched(self, runs: Runs, sets: Sequence[Sequence[Cell]]) -> Float[np.ndarray, "set batch"]:
        found = np.zeros((len(sets), len(runs.batch)))
        kinds = [{KINDS[site.kind].cells for site, _ in cells} for cells in sets]
        if any(len(names) > 1 for names in kinds):
            raise MethodError("cells of several kinds cannot be patched at once; find them in runs of their own.")
        for kind, part in parts(self.setting):
            mine = [i for i, names in enumerate(kinds) if names == {kind.name}]
            if mine:
                found[mine] = kind.patch(part, runs, self.meter, [sets[i] for i in mine], self.exact.how)
        return found

    def _runs(self, number: int) -> Runs:
        if number in self.kept:
            return self.kept[number]
        batch = self.batches[number]
        resume, options = self.exact.resumes(self.setting), self.exact.baseline_options(self.setting)
        runs = unpatched(self.setting, batch, self.meter, source=self.exact.source, at=self.setting.targets, baseline=options, resume=resume)
        if self.keeps:
            self.kept[number] = runs
        return runs
