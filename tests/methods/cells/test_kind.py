"""A kind of cells that is defined here alone runs through every method, file, comparison and plot: nothing else knows it.

The kind is a random TopK dictionary on the residual stream after each block. Its cells are known only after the unpatched runs: the features
that are active in one prompt or the other.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from families import model_of, swap_task
from torch import Tensor

import patchlab as pl
from patchlab.adapters import Accessor
from patchlab.comparison.job import cost_line
from patchlab.engine import Result, Target, node_sweep, session_of, support
from patchlab.engine.trust.nodes import sweep_key
from patchlab.errors import MethodError, ModelError, ScoreError, SiteError
from patchlab.methods import get_method
from patchlab.methods.cells import CELLS, add_cells
from patchlab.methods.cells.kind import Index, Linear, Linearly
from patchlab.methods.cells.nodes import Nodes, change_of
from patchlab.methods.setting.meter import Meter
from patchlab.methods.setting.setting import Setting
from patchlab.methods.setting.unpatched import Runs, Scored
from patchlab.plots._heatmaps import _prepare_heatmaps
from patchlab.scores.arrays import Sparse
from patchlab.sites import KINDS, Site, SiteKind, add_kind

N_TRAITS, K = 24, 3
KIND = SiteKind(
    "traits",
    ("layer", "pos", "trait"),
    ("layer", "trait"),
    None,
    "traits of a dictionary on the residual stream",
    unit="trait",
    letter="T",
    cells="traits",
)
BOTH = ["traits", "traits[layer,pos,trait]"]


@dataclass(frozen=True)
class Dictionary(Accessor):
    """Reads the K largest coordinates of the stream along random directions; writing moves the stream by the difference."""

    kind: str = "traits"
    encoder: Tensor = field(default_factory=lambda: torch.zeros(0))
    decoder: Tensor = field(default_factory=lambda: torch.zeros(0))

    def host(self, layer: int | None) -> str:
        return f"blocks.{layer}.hook_resid_post"

    def pull(self, host: Tensor, gradient: Tensor) -> Tensor:
        return gradient @ self.decoder.to(gradient).T

    def read(self, host: Tensor, companion: Tensor | None = None) -> Tensor:
        code = host @ self.encoder.to(host)
        top = code.topk(K, -1)
        return torch.zeros_like(code).scatter(-1, top.indices, top.values.relu())

    def write(self, host: Tensor, companion: Tensor | None, value: Tensor) -> Tensor:
        return host + (value - self.read(host)) @ self.decoder.to(host)


class Traits(Nodes):
    """Traits that are active in one of the two runs."""

    name = "traits"

    def live(self, *_: Any) -> None:
        return None

    def exact_keeps(self, setting: Setting) -> tuple[Target, ...]:
        return setting.targets

    def cells(self, setting: Setting, site: Site, runs: Runs) -> list[Index]:
        changed = torch.stack([change_of(runs, target) for target in setting.targets], 1) != 0  # example, layer, pos, feature
        active = changed.any(0) if "pos" in site.axes else changed.any(0).any(1)
        return [tuple(cell) for cell in active.nonzero().tolist()]

    def linear(self, setting: Setting, runs: Runs, how: Linearly, drops: Sequence[int | None]) -> Linear:
        return Sums(self, setting, runs)


class Sums:
    """Difference times mean coefficient, at the cells of a batch."""

    def __init__(self, kind: Traits, setting: Setting, runs: Runs) -> None:
        self.kind, self.setting, self.runs = kind, setting, runs
        self.total: dict[Target, Tensor] = {}

    def add(self, point: Result, weight: float, moved: Target | None) -> None:
        self.total |= {key: point.gradients[key] * weight + self.total.get(key, 0) for key in self.setting.targets if key in point.gradients}

    def close(self, meter: Meter, notes: dict[str, Any], drop: int | None) -> None:
        pass

    def result(self, meter: Meter, notes: dict[str, Any]) -> Scored:
        products = torch.stack([change_of(self.runs, key) * self.total[key] for key in self.setting.targets], 1)
        effects, noise = {}, {}
        for site in self.setting.sites:
            index = np.array(self.kind.cells(self.setting, site, self.runs)).reshape(-1, len(site.axes))
            values = products if "pos" in site.axes else products.sum(2)
            found = values[(slice(None), *torch.as_tensor(index.T))].double().numpy()
            effects[str(site)], noise[str(site)] = Sparse(index, found), Sparse(index, np.full_like(found, 1e-9))
        return Scored(effects, noise)


@pytest.fixture
def model() -> Iterator[pl.Model]:
    """A GPT-2 with a dictionary, and a grammar that knows traits, until the test ends."""
    model = model_of("gpt2")
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(model.arch.d_model, N_TRAITS, generator=generator)
    decoder = torch.nn.functional.normalize(torch.randn(N_TRAITS, model.arch.d_model, generator=generator), dim=1)
    plain = model.arch
    add_kind(KIND)
    add_cells(Traits())
    try:
        model.add_site(Dictionary(encoder=encoder, decoder=decoder), {"trait": N_TRAITS})
        yield model
    finally:
        model.arch = plain
        del KINDS["traits"], CELLS["traits"]


@pytest.fixture
def task() -> Any:
    return swap_task(n=4)


def run(method: Any, model: pl.Model, task: Any, sites: Any = BOTH, **options: Any) -> pl.ScoreMap:
    return method.run(model, task, sites, direction="denoising", progress=False, **options)


def stop_after_one(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> None:
    """Interrupt a call when it patches its second batch of features."""
    real, seen = Traits.patch, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Traits, "patch", stopped)
        call()


def by_hand(model: pl.Model, task: Any) -> dict[tuple[int, int, int, int], float]:
    """Effect of patching each feature at each position, one example and one whole forward pass at a time, from nothing but hooks."""
    found = {}
    dictionary = model.arch.accessors["traits"]
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.arch.n_layers)]
    for example, pair in enumerate(task.pairs):
        clean, corrupted = (torch.tensor([ids]) for ids in (pair.clean_ids, pair.corrupted_ids))
        with torch.no_grad():
            _, wanted = model.bridge.run_with_cache(clean, names_filter=names)
            base, own = model.bridge.run_with_cache(corrupted, names_filter=names)
        score = base[0, -1, list(pair.correct)].mean() - base[0, -1, list(pair.incorrect)].mean()
        for layer, name in enumerate(names):
            new, old = dictionary.read(wanted[name]), dictionary.read(own[name])
            for _, pos, feature in (new != old).nonzero().tolist():
                change = (new - old)[0, pos, feature] * dictionary.decoder[feature]

                def move(value: Tensor, hook: Any, pos: int = pos, change: Tensor = change) -> Tensor:
                    moved = value.clone()
                    moved[0, pos] += change
                    return moved

                with torch.no_grad():
                    logits = model.bridge.run_with_hooks(corrupted, fwd_hooks=[(name, move)])
                patched = logits[0, -1, list(pair.correct)].mean() - logits[0, -1, list(pair.incorrect)].mean()
                found[example, layer, pos, feature] = float(patched - score)
    return found


def test_exact_effects_are_those_of_moving_the_stream_by_hand(model: pl.Model, task: Any) -> None:
    scores = run(pl.ActivationPatching(), model, task)
    name = BOTH[1]
    wanted = by_hand(model, task)
    assert wanted
    assert scores.is_sparse(name)
    cells = scores.cells(name)
    assert {tuple(cell) for cell in cells.tolist()} == {cell[1:] for cell in wanted}
    values = scores.data[name].to_numpy()
    expected = np.array([[wanted.get((example, *cell), 0.0) for cell in map(tuple, cells.tolist())] for example in range(len(task))])
    np.testing.assert_allclose(values, expected, atol=2e-5 * np.abs(expected).max())
    literal = run(pl.ActivationPatching(engine="literal"), model, task, name)
    np.testing.assert_allclose(literal.data[name].to_numpy(), values, atol=2e-5 * np.abs(values).max())


@pytest.mark.parametrize("name", ["relp", "atp", "ig:3"])
def test_scores_are_small_steps_of_the_exact_effect(model: pl.Model, task: Any, name: str) -> None:
    scores = run(get_method(name), model, task)
    assert scores.is_sparse("traits")
    by_pos, joint = scores.data[BOTH[1]].to_numpy(), scores.data["traits"].to_numpy()
    cells = [tuple(cell) for cell in scores.cells("traits").tolist()]
    sums = np.zeros_like(joint)
    for column, (layer, _, feature) in enumerate(scores.cells(BOTH[1]).tolist()):
        sums[:, cells.index((layer, feature))] += by_pos[:, column]
    np.testing.assert_allclose(joint, sums, atol=1e-5 * np.abs(joint).max())  # linear: positions add up
    assert np.abs(joint).max() > 0
    if name == "atp":
        model_twin = _directional(model, task, scores)
        np.testing.assert_allclose(by_pos[0], model_twin, rtol=2e-2, atol=1e-3 * np.abs(by_pos[0]).max())


def _directional(model: pl.Model, task: Any, scores: pl.ScoreMap) -> np.ndarray:
    """The slope of the metric along each feature's change, by a central difference on the first example."""
    dictionary, pair = model.arch.accessors["traits"], task.pairs[0]
    clean, corrupted = (torch.tensor([ids]) for ids in (pair.clean_ids, pair.corrupted_ids))
    found, step = [], 0.02
    for layer, pos, feature in scores.cells(BOTH[1]).tolist():
        name = f"blocks.{layer}.hook_resid_post"
        with torch.no_grad():
            new, old = (dictionary.read(model.bridge.run_with_cache(ids, names_filter=[name])[1][name]) for ids in (clean, corrupted))
            change = (new - old)[0, pos, feature] * dictionary.decoder[feature]
            ends = []
            for sign in (-step, step):

                def move(value: Tensor, hook: Any, pos: int = pos, by: Tensor = sign * change) -> Tensor:
                    moved = value.clone()
                    moved[0, pos] += by
                    return moved

                logits = model.bridge.run_with_hooks(corrupted, fwd_hooks=[(name, move)]).double()
                ends.append(float(logits[0, -1, list(pair.correct)].mean() - logits[0, -1, list(pair.incorrect)].mean()))
        found.append((ends[1] - ends[0]) / (2 * step))
    return np.array(found)


def test_batches_do_not_matter(model: pl.Model, task: Any) -> None:
    whole, parts = (run(pl.ActivationPatching(), model, task, batch_size=size) for size in (None, 1))
    for name in BOTH:
        assert np.array_equal(whole.cells(name), parts.cells(name))
        np.testing.assert_allclose(whole.data[name].to_numpy(), parts.data[name].to_numpy(), atol=1e-5)


def test_verified_patching_finds_what_a_sweep_finds(model: pl.Model, task: Any) -> None:
    name = BOTH[1]
    exact = run(pl.ActivationPatching(), model, task, name)
    found = pl.VerifiedPatching(k=3, screen=get_method("relp"), sample=0).run(model, task, name, direction="denoising", progress=False)
    mean = np.abs(exact.mean(name).to_numpy())
    effect = {f"L{layer}.T{feature}.traits@{pos}": value for (layer, pos, feature), value in zip(exact.cells(name).tolist(), mean, strict=True)}
    for address, value in zip(found.table["address"], found.table["effect"], strict=True):
        assert abs(effect[address] - abs(value)) < 1e-4
    with pytest.raises(MethodError, match="only known after a run"):
        pl.VerifiedPatching(k=3).price(model, task, name)


def test_an_interrupted_run_goes_on(model: pl.Model, task: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = run(pl.ActivationPatching(), model, task, batch_size=2), tmp_path / "work.npz"
    stop_after_one(monkeypatch, lambda: run(pl.ActivationPatching(), model, task, batch_size=2, checkpoint=path))
    assert path.is_file()
    again = run(pl.ActivationPatching(), model, task, batch_size=2, checkpoint=path)
    for name in BOTH:
        assert np.array_equal(again.cells(name), whole.cells(name))
        assert np.array_equal(again.data[name].to_numpy(), whole.data[name].to_numpy())


def test_a_file_gives_back_the_map(model: pl.Model, task: Any, tmp_path: Any) -> None:
    scores = run(get_method("relp"), model, task)
    scores.save(tmp_path / "traits.nc")
    loaded = pl.ScoreMap.load(tmp_path / "traits.nc")
    for name in BOTH:
        assert loaded.is_sparse(name)
        assert np.array_equal(loaded.cells(name), scores.cells(name))
        assert np.array_equal(loaded.data[name].to_numpy(), scores.data[name].to_numpy())
    table = loaded.to_dataframe()
    assert {"layer", "trait", "pos"} <= set(table.columns)
    assert len(table) == sum(loaded.data[name].size for name in BOTH)
    assert table.query("site == 'traits'")["pos"].isna().all()


def test_maps_are_compared_on_the_cells_of_either(model: pl.Model, task: Any) -> None:
    exact, relp = (run(get_method(name), model, task) for name in ("exact", "relp"))
    comparison = pl.compare(exact, {"relp": relp, "same": exact}, n_boot=20)
    rows = comparison.table.query("method == 'same' and site == 'traits'")
    assert np.allclose(rows["pearson"], 1)
    # a map that lacks the cells without any effect is the same map
    name = BOTH[1]
    with_more = np.concatenate([relp.cells(name), [[0, 0, 0]]]) if [0, 0, 0] not in relp.cells(name).tolist() else relp.cells(name)
    wider = relp.on_cells(name, with_more)
    assert wider.cells(name).tolist()[-1] == with_more[-1].tolist()
    both = pl.compare(exact, {"relp": relp, "wider": wider}, n_boot=20).table.query(f"site == '{name}' and cells == 'all'")
    assert both.set_index("method")["pearson"].nunique() == 1
    with pytest.raises(ScoreError, match="are not among those given"):
        relp.on_cells(name, relp.cells(name)[:1])
    assert json.dumps(comparison.to_dict())


@pytest.mark.parametrize("site", BOTH)
def test_heatmaps_and_agreement_are_drawn(model: pl.Model, task: Any, site: str) -> None:
    scores = run(get_method("relp"), model, task, site)
    data = _prepare_heatmaps(scores)
    (row,) = data.rows
    (facet,) = row
    mean = dict(zip(map(tuple, scores.cells(site).tolist()), scores.mean(site).to_numpy().tolist(), strict=True))
    assert np.isclose(np.abs(facet.values).max(), max(map(abs, mean.values())))
    assert all(text.startswith("L") and ".T" in text for text in facet.rows.names)
    for figure in (pl.plots.heatmaps(scores), pl.plots.agreement(scores, {"again": scores})):
        assert figure.to_json()


def test_traits_go_beside_nodes(model: pl.Model, task: Any) -> None:
    scores = run(get_method("relp"), model, task, ["traits", "z"])
    alone = run(get_method("relp"), model, task, "z")
    assert np.array_equal(scores.data["z"].to_numpy(), alone.data["z"].to_numpy())
    exact = run(pl.ActivationPatching(), model, task, ["traits", "z"])
    np.testing.assert_allclose(exact.data["z"].to_numpy(), run(pl.ActivationPatching(), model, task, "z").data["z"].to_numpy(), atol=1e-6)


def test_an_accessor_that_does_not_do_what_it_says_is_refused(model: pl.Model) -> None:
    own, plain = model.arch.accessors["traits"], model.arch
    model.arch = replace(plain, accessors={kind: one for kind, one in plain.accessors.items() if kind != "traits"}, sizes={})
    before = model.arch

    def made(**methods: Any) -> Dictionary:
        kind = dataclass(frozen=True)(type("Other", (Dictionary,), methods))
        return kind(encoder=own.encoder, decoder=own.decoder)

    def ahead(self: Any, host: Tensor, companion: Any = None) -> Tensor:
        return Dictionary.read(self, host.flip(1))

    for accessor, said in (
        (made(host=lambda self, layer: f"blocks.{layer}.hook_nothing"), "the model has no hook blocks.0.hook_nothing"),
        (made(read=lambda self, host, companion=None: host), r"has the shape \[2, \d+, 16\] in layer 0 where \[2, \d+, 24\] is expected"),
        (made(read=ahead), "the last token changes it at earlier positions"),
        (made(write=lambda self, host, companion, value: host + value.sum() * 1e-3), "a run patched with its own traits differs"),
        (made(write=lambda self, host, companion, value: host.clone()), "an edit in layer 0 changes the logits by 0 where the gradient says"),
        (made(pull=lambda self, host, gradient: gradient @ self.encoder), "an edit in layer 0 changes the logits by .* where the gradient says"),
        (made(identity=None), "holds something that cannot be told from another"),
    ):
        with pytest.raises(ModelError, match=f"gets no site traits: .*({said})"):
            model.add_site(accessor, {"trait": N_TRAITS})
        assert model.arch is before


def test_the_fast_engine_is_checked_at_the_new_site(model: pl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert support(model).mode == "prefix"
    right = node_sweep.sweep

    def wrong(model: Any, program: Any, cells: Any, **options: Any) -> Tensor:
        found = right(model, program, cells, **options)
        for row, cell in enumerate(cells):
            found[row] += 0.1 * found.abs().max() * (cell[0].address.kind == "traits")
        return found

    monkeypatch.setattr("patchlab.engine.trust.nodes.sweep", wrong)
    session_of(model).found.pop(sweep_key(model))
    try:
        found = support(model)
        assert (found.mode, "L0.traits@" in found.reason) == ("literal", True)
    finally:
        session_of(model).found.pop(sweep_key(model))


def test_results_of_two_dictionaries_are_kept_apart(model: pl.Model, task: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, path = run(get_method("relp"), model, task), tmp_path / "work.npz"
    stop_after_one(monkeypatch, lambda: run(pl.ActivationPatching(), model, task, batch_size=2, checkpoint=path))
    own = model.arch.accessors["traits"]
    other = replace(own, decoder=own.decoder.flip(0))
    assert replace(own).identity == own.identity != other.identity
    model.arch = replace(model.arch, accessors={**model.arch.accessors, "traits": other})
    with pytest.raises(MethodError, match="added_sites is 'traits "):
        run(pl.ActivationPatching(), model, task, batch_size=2, checkpoint=path)
    with pytest.raises(ScoreError, match="the sites that were added to the model differ .* score the same dictionary with both"):
        pl.compare(mine, {"other": run(get_method("atp"), model, task)}, n_boot=20)
    assert "added_sites" not in run(get_method("relp"), model, task, "z").provenance


def test_cells_that_nobody_has_counted_are_not_priced_as_none(model: pl.Model, task: Any) -> None:
    plan = pl.ActivationPatching().plan(model, task, ["z", *BOTH])
    assert plan.uncounted == tuple(BOTH)
    assert f"and one for each cell of {', '.join(BOTH)}, of which the unpatched runs show how many there are" in str(plan)
    assert pl.ActivationPatching().plan(model, task, "z").uncounted == get_method("relp").plan(model, task, BOTH).uncounted == ()
    line = cost_line(["exact", "relp"], model, task, BOTH)
    assert line is not None
    assert line.startswith("at least ")
    assert cost_line(["relp"], model, task, BOTH) is None


def test_kinds_are_added_once(model: pl.Model) -> None:
    with pytest.raises(SiteError, match="there is a site kind 'traits' already"):
        add_kind(KIND)
    with pytest.raises(MethodError, match="there is a kind of cells 'traits' already"):
        add_cells(Traits())
    with pytest.raises(SiteError, match="has a site traits already"):
        model.add_site(model.arch.accessors["traits"])
    with pytest.raises(SiteError, match=r"names trait 99, but this model has 24 \(trait 0 to 23\)"):
        model.arch.check(pl.Site.parse("L0.T99.traits"))
    with pytest.raises(SiteError, match="z has no traits; drop T3. The site with traits is traits"):
        pl.Site.parse("L0.T3.z")
