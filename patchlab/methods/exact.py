"""Activation patching: the ground truth, one patched forward pass per cell."""

from dataclasses import dataclass
from typing import Any, ClassVar

from patchlab.engine import continues, support
from patchlab.engine.contributions import POST_NORMS
from patchlab.errors import MethodError, unknown
from patchlab.methods.cells.kind import Exactly, gathered, parts, shifted
from patchlab.methods.method import Method
from patchlab.methods.registry import register_method
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored


@register_method(
    "exact-frozen",
    "edges only: exact, but a head's share of a norm after its attention in the baseline's denominator (Gemma 2)",
    post_norm="frozen",
)
@register_method("exact", "activation patching: one patched forward pass per cell; the ground truth")
@dataclass(frozen=True)
class ActivationPatching(Method):
    """Patch every cell and read the metric: effect = patched metric − baseline metric.

    Axes that a site does not name are patched jointly (``z`` patches a head at all positions). Structural zeros are not
    run; their effect is zero. Source: Vig et al. 2020; Meng et al. 2022; as in TransformerLens' ``patching``.

    Args:
        source: what is patched in; see :class:`patchlab.methods.Method`.
        engine: ``auto`` computes only what a patch can change, where that agrees with whole forward passes on this model
            (the result's provenance says which way was taken and why); ``literal`` runs a whole forward pass per cell.
        post_norm: for edges of models with a norm after the attention (Gemma 2 and 3, OLMo 2). ``renormalised``: a reader gets the norm
            of the whole attention output with the changed head in it, as running the model does, so that all edges out of a head
            together are the head. ``frozen`` (named ``exact-frozen``): the change of the head in the denominator of the baseline run.

    Example:
        >>> ActivationPatching().run(model, task, "resid_pre")  # doctest: +SKIP
    """

    engine: str = "auto"
    post_norm: str = "renormalised"
    unit: ClassVar[str] = "cell"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in ("auto", "literal"):
            raise MethodError(unknown("engine", self.engine, ("auto", "literal")))
        if self.post_norm not in POST_NORMS:
            raise MethodError(unknown("form of the norm after attention (post_norm)", self.post_norm, POST_NORMS))

    @property
    def how(self) -> Exactly:
        """The way in which cells are patched."""
        return Exactly(self.engine, self.post_norm, self.source == "paired")

    def forwards(self, setting: Setting) -> int:
        return sum(0 if live is None else int(live.sum()) for live in setting.live.values())

    def work(self, setting: Setting) -> float:
        """The unpatched runs, and for each cell the share of the model that comes after it."""
        return 2 + sum(float(kind.exact_work(part, self.how).sum()) for kind, part in parts(setting))

    def check(self, setting: Setting) -> None:
        for kind, part in parts(setting):
            kind.check_exact(part, self.how)

    def baseline_options(self, setting: Setting) -> dict[str, Any]:
        keep = tuple(dict.fromkeys(target for kind, part in parts(setting) for target in kind.exact_keeps(part)))
        return {"keep": keep} if keep else {}

    def resumes(self, setting: Setting) -> bool:
        return self.engine == "auto" and support(setting.model).mode == "prefix" and continues(setting.model)

    def predicted_bytes(self, setting: Setting, rows: int, length: int) -> int:
        return sum(kind.exact_bytes(part, rows, length) for kind, part in parts(setting))

    def score(self, setting: Setting, runs: Runs, meter: Meter, notes: dict[str, Any]) -> Scored:
        effects: dict[str, Any] = {}
        before = 0
        for kind, part in parts(setting):
            cells = [(site, cell) for site in part.sites for cell in kind.cells(part, site, runs)]
            found = kind.patch(part, runs, meter, [[one] for one in cells], self.how, shifted(meter.cells, before))
            before += len(cells)
            effects |= gathered(part, cells, found)
        return Scored(effects)

    def provenance_of(self, setting: Setting, skipped: dict[str, str]) -> dict[str, Any]:
        record = super().provenance_of(setting, skipped)
        for kind, part in parts(setting):
            record |= kind.exact_record(part, self.how)
        return record
