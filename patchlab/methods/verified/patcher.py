"""Single cells, to be patched in any order: where they are, what a screen gives them, and their exact effects."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from patchlab.errors import MethodError
from patchlab.interventions import Edit
from patchlab.methods.cells.exact_edges import EdgeCell, edge_cells, edge_effects, set_effects
from patchlab.methods.exact import ActivationPatching, addresses, patched
from patchlab.methods.method import free_bytes
from patchlab.methods.setting.runs import Meter, Runs, Setting, mean_source, unpatched
from patchlab.scores import ScoreMap
from patchlab.sites import Site
from patchlab.tasks.task import Batch


@dataclass(frozen=True)
class Cells:
    """All live cells of all sites, one after the other."""

    site: Int[np.ndarray, " cell"]
    index: list[tuple[int, ...]]
    where: list[Site | EdgeCell]
    screen: Float[np.ndarray, " cell"]

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
        site, index, where, scores = [], [], [], []
        for number, one in enumerate(setting.sites):
            mean = screen.mean(one).to_numpy()
            found = edge_cells(setting) if one.kind == "edges" else addresses(setting, one, setting.live[str(one)])
            for cell, address in found:
                site.append(number)
                index.append(cell)
                where.append(address)
                scores.append(mean[cell])
        return Cells(np.array(site), index, where, np.array(scores, dtype=np.float64))


class Patcher:
    """Patches lists of cells on all examples; keeps the unpatched runs where they fit into memory."""

    def __init__(self, exact: ActivationPatching, setting: Setting, batches: list[Batch], predicted: int, meter: Meter) -> None:
        if exact.source.startswith("mean"):
            mean = mean_source(setting, batches, meter, at=setting.targets, positional=exact.source == "mean_positional")
            setting = replace(setting, mean=mean)
        self.exact, self.setting, self.batches, self.meter = exact, setting, batches, meter
        budget = free_bytes(setting.model.device) // 2 if setting.max_memory is None else setting.max_memory
        self.keeps = predicted * len(batches) <= budget
        self.kept: dict[int, Runs] = {}
        examples = np.concatenate([batch.examples.cpu().numpy() for batch in batches])
        self.order = np.argsort(examples)

    def effects(self, cells: Sequence[Site | EdgeCell]) -> Float[np.ndarray, "cell example"]:
        """Exact effects, in metric units."""
        return self.joint([[cell] for cell in cells])

    def joint(self, sets: Sequence[Sequence[Site | EdgeCell]]) -> Float[np.ndarray, "set example"]:
        """Exact effects of sets of cells, each set patched at once, in metric units."""
        if not sets:
            return np.zeros((0, len(self.order)))
        return np.concatenate([self._patched(runs, sets) for runs in self.runs()], axis=1)[:, self.order]

    def runs(self) -> Iterator[Runs]:
        """The unpatched runs of every batch."""
        return map(self._runs, range(len(self.batches)))

    def _patched(self, runs: Runs, sets: Sequence[Sequence[Site | EdgeCell]]) -> Float[np.ndarray, "set batch"]:
        edges = [[cell.index for cell in cells if isinstance(cell, EdgeCell)] for cells in sets]
        if self.setting.edges is None:
            edits = [tuple(Edit(cell, runs.source) for cell in cells if isinstance(cell, Site)) for cells in sets]
            return patched(self.setting, runs, self.meter, edits, engine=self.exact.engine)
        if all(len(indices) == 1 for indices in edges):
            single = np.array([indices[0] for indices in edges])
            return edge_effects(self.setting, runs, self.meter, single, engine=self.exact.engine, post_norm=self.exact.post_norm)
        masks = np.zeros((len(edges), *self.setting.live[str(self.setting.edges)].shape), dtype=bool)
        for mask, indices in zip(masks, edges, strict=True):
            mask[tuple(np.array(indices).T)] = True
        return set_effects(self.setting, runs, self.meter, masks, post_norm=self.exact.post_norm)

    def _runs(self, number: int) -> Runs:
        if number in self.kept:
            return self.kept[number]
        batch = self.batches[number]
        resume, options = self.exact.resumes(self.setting), self.exact.baseline_options(self.setting)
        runs = unpatched(self.setting, batch, self.meter, source=self.exact.source, at=self.setting.targets, baseline=options, resume=resume)
        if self.keeps:
            self.kept[number] = runs
        return runs
