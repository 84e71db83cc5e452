"""Dictionaries as sites: attaching, splicing, steering, and everything that goes with any kind of cells."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dictionary_cells import BY_POS, DICTIONARIES, KINDS, Literal, attached, cells, run, saes
from families import model_of, swap_task
from torch import Tensor

import patchlab as pl
from patchlab.engine import support
from patchlab.errors import MethodError, ModelError, ScoreError, SiteError
from patchlab.features import AbsTopK, JumpRelu, LayerNorm, Relu, TopK
from patchlab.methods import get_method
from patchlab.methods.cells import features, readings
from patchlab.plots._heatmaps import _prepare_heatmaps
from patchlab.testing.contract import check_method
from patchlab.testing.dictionaries import random_dictionary

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])


@pytest.fixture
def model() -> Iterator[pl.Model]:
    with attached(kind="topk", dtype=torch.float32) as model:
        yield model


@pytest.fixture
def task() -> Any:
    return swap_task(n=3)


@pytest.mark.parametrize("kind", KINDS)
def test_splicing_is_exact(kind: str) -> None:
    """Features, rest and error are the activation; a run patched with its own features and errors is the same, bit for bit."""
    with attached(kind=kind, dtype=torch.float32) as model:
        literal = Literal(model, swap_task(n=1).pairs[0])
        keep = [f"features.{literal.kind}", f"error.{literal.kind}", literal.kind]
        kept = model.run(TOKENS, keep=keep)
        for layer in literal.dictionaries:
            if kind.startswith("cross_layer"):
                seen = literal.values(tuple(TOKENS[0].tolist()))
                error = kept[f"L{layer}.error.{literal.kind}"][:1]
                assert float((error - literal.error(seen, layer)).abs().max()) <= 4e-6 * float(error.abs().max())
                continue
            x = kept.activations[literal.kind, layer].flatten(2)
            one = literal.point.of[layer]
            read = x if one.reads is None else model.run(TOKENS, keep=f"reads.{literal.kind}").activations[f"reads.{literal.kind}", layer]
            parts = kept[f"L{layer}.features.{literal.kind}"] @ one.rows() + one.rest(read) + kept[f"L{layer}.error.{literal.kind}"]
            assert float((parts - x).abs().max()) <= 4e-6 * float(x.abs().max())
        for site in keep[:2]:
            edits = [pl.Edit(f"L{layer}.{site}", kept) for _, layer in model.arch.targets(site)]
            assert torch.equal(model.run(TOKENS, edits=edits).logits, kept.logits)


@pytest.mark.parametrize("kind", ["relu", "topk", "layer_norm", "skip", "z"])
def test_the_spliced_model_is_the_model(kind: str) -> None:
    """A forward pass in which every dictionary's decoded features and its error stand in for the activation gives the same logits."""
    with attached(kind=kind, dtype=torch.float32) as model:
        literal = Literal(model, swap_task(n=1).pairs[0])
        if literal.kind == "resid_mid":
            return
        seen = {name: [] for name in {literal.read_hook(layer) for layer in literal.dictionaries}}

        def note(value: Tensor, hook: Any, name: str) -> None:
            seen[name].append(value)

        def splice(value: Tensor, hook: Any, layer: int) -> Tensor:
            dictionary = literal.dictionaries[layer]
            x = value if literal.read_hook(layer) == literal.hook(layer) else seen[literal.read_hook(layer)][-1]
            shaped = literal.shaped(layer, x.flatten(2))
            y = dictionary.reconstruct(shaped).reshape(value.shape)
            return y + (value - y)

        hooks: list[Any] = [(name, lambda value, hook, name=name: note(value, hook, name)) for name in seen]
        hooks += [(literal.hook(layer), lambda value, hook, layer=layer: splice(value, hook, layer)) for layer in literal.dictionaries]
        with torch.no_grad():
            plain, spliced = model.bridge(TOKENS), model.bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)
        assert float((plain - spliced).abs().max()) <= 1e-5 * float(plain.abs().max())


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "layer_norm", "resid_mid", "skip", "z", "cross_layer"])
@pytest.mark.parametrize("rules", ["atp", "relp"])
def test_gradients_can_go_through_the_dictionaries_alone(kind: str, rules: str) -> None:
    """The slope of the metric where each activation is its reconstruction plus a constant; under a rule for norms, with the scale a constant too."""
    task = swap_task(n=1)
    with attached(kind=kind) as model:
        literal, pair = Literal(model, task.pairs[0]), task.pairs[0]
        scores = run(f"{rules}+spliced", model, task, ["input"])
        assert any("through the model's dictionaries alone" in note for note in scores.provenance["notes"])
        plain = run(rules, model, task, ["input"])
        assert not np.allclose(scores.data["input"], plain.data["input"])
        if rules == "relp":
            return  # held scales are looked at below
        recorded: dict[str, Tensor] = {}
        leaf: list[Tensor] = []

        def embedded(value: Tensor, hook: Any) -> Tensor:
            leaf.append(value.detach().requires_grad_())
            return leaf[0]

        def note(value: Tensor, hook: Any, name: str) -> None:
            recorded[name] = value

        def splice(value: Tensor, hook: Any, layer: int) -> Tensor:
            recorded[literal.hook(layer)] = value
            if all(layer not in literal.written(start) for start in literal.dictionaries):
                return value
            found = literal.reconstruction(recorded, layer)
            if literal.kind == "resid_mid":
                found = found - recorded[f"blocks.{layer}.hook_resid_pre"]
            found = found.reshape(value.shape)
            new = found + (value - found).detach()
            recorded[literal.hook(layer)] = new
            return new

        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
        names += [name for layer in literal.dictionaries if (name := literal.read_hook(layer)) != literal.hook(layer)]
        hooks: list[Any] = [("hook_embed", embedded)]
        hooks += [(name, lambda value, hook, name=name: note(value, hook, name)) for name in names]
        hooks += [(literal.hook(layer), lambda value, hook, layer=layer: splice(value, hook, layer)) for layer in range(3)]
        with torch.enable_grad():
            logits = model.bridge.run_with_hooks(torch.tensor([pair.corrupted_ids]), fwd_hooks=hooks)
            value = logits[0, -1, list(pair.correct)].mean() - logits[0, -1, list(pair.incorrect)].mean()
            (gradient,) = torch.autograd.grad(value, leaf)
        with torch.no_grad():
            clean = model.bridge.run_with_cache(torch.tensor([pair.clean_ids]), names_filter=["hook_embed"])[1]["hook_embed"]
        wanted = ((clean - leaf[0].detach()) * gradient).sum(-1).numpy()
        np.testing.assert_allclose(scores.data["input"].to_numpy(), wanted, atol=1e-9 * np.abs(wanted).max())


def test_a_rule_for_norms_holds_the_scale_of_a_normalised_row() -> None:
    dictionary = random_dictionary(model_of("gpt2", torch.float64), normalise=LayerNorm())
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    held = replace(dictionary, normalise=dictionary.normalise.held(x))
    assert torch.allclose(held.reconstruct(x), dictionary.reconstruct(x), atol=1e-12)
    mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True).detach()
    pre = ((x - mean) / (scale + 1e-5) - (dictionary.b_dec if dictionary.subtract_b_dec else 0)) @ dictionary.w_enc + dictionary.b_enc
    by_hand = (pre.relu() @ dictionary.w_dec + dictionary.b_dec) * scale + mean
    g = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted, got, own = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for y in (by_hand, held.reconstruct(x), dictionary.reconstruct(x)))
    assert torch.allclose(got, wanted, atol=1e-12)
    assert not torch.allclose(own, wanted, atol=1e-3)


@pytest.mark.parametrize("activation", [Relu(), TopK(4), AbsTopK(4), JumpRelu(torch.full((24,), 0.3, dtype=torch.float64))])
def test_the_identity_rule_would_change_nothing(activation: Any) -> None:
    """f(z)/z is the slope: the mask."""
    pre = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    features = activation(pre)
    (slope,) = torch.autograd.grad(features.sum(), pre)
    assert torch.equal(slope, (features / pre).detach())
    assert 0 < int(slope.sum()) < slope.numel()


def test_dictionaries_come_and_go() -> None:
    model = model_of("gpt2")
    plain = model.arch
    with pytest.raises(SiteError, match=r"features: the model has no dictionaries.*model.add_dictionaries"):
        run("atp", model, swap_task(n=1), ["features"])
    with pytest.raises(SiteError, match="has no dictionary on resid_post, so there is no site features.resid_post"):
        model.run(TOKENS, edits=[pl.Edit("L0.F1.resid_post", 1.0)])
    try:
        model.add_dictionaries([*saes(model), *saes(model, "z"), random_dictionary(model, "attn_out", 1)])
        assert list(model.dictionaries) == ["resid_post", "z", "attn_out"]
        assert model.dictionaries["resid_post"][2].n_features == 28
        scores = run("atp", model, swap_task(n=2), ["features", "error[layer,pos]"])
        points = [f"features.{point}" for point in ("resid_post", "attn_out", "z")]
        assert scores.sites[:3] == points or set(points) <= set(scores.sites)
        with pytest.raises(ScoreError, match="unknown site"):
            scores.mean("features")
        assert set(scores.cells("features.attn_out")[:, 0].tolist()) == {1}
        with pytest.raises(SiteError, match=r"L0.F1.attn_out: layer 0 has no features.attn_out; the layers 1 have"):
            model.arch.check(pl.Site.parse("L0.F1.attn_out"))
        with pytest.raises(SiteError, match=r"names feature 28, but this model has 28 \(feature 0 to 27\)"):
            model.arch.check(pl.Site.parse("L2.F28.resid_post"))
        with pytest.raises(SiteError, match="has dictionaries on z already"):
            model.add_dictionaries(random_dictionary(model, "z", 0))
        with pytest.raises(SiteError, match="is named twice"):
            run("atp", model, swap_task(n=1), ["features", "features.z"])
    finally:
        model.drop_dictionaries()
    assert model.arch.sites == plain.sites
    model.arch = plain


def test_dictionaries_that_do_not_fit_are_refused() -> None:
    model = model_of("gpt2")
    plain = model.arch
    one = random_dictionary(model, layer=0)
    for given, said in (
        ([one, replace(one, name="other")], "random sae resid_post/0 are both on resid_post of layer 0"),
        ([replace(one, layer=3)], "is for layer 3, and the model has 3"),
        ([replace(one, reads="q", writes="q")], "writes to q, and dictionaries can be on resid_pre"),
        ([random_dictionary(model, kind="transcoder"), random_dictionary(model, "mlp_out", 1)], "are autoencoders and transcoders"),
        ([replace(random_dictionary(model, kind="transcoder"), reads="mlp.hook_nothing")], "reads the hook blocks.0.mlp.hook_nothing, which"),
        ([], "no dictionaries were given"),
    ):
        with pytest.raises(SiteError, match=said):
            model.add_dictionaries(given)
        assert model.arch is plain
    wide = random_dictionary(model_of("gpt2"), layer=0)
    wide = replace(wide, w_enc=torch.randn(20, 24), w_dec=torch.randn(24, 20), b_dec=torch.zeros(20))
    with pytest.raises((SiteError, ModelError, pl.errors.PatchlabError)):
        model.add_dictionaries(wide)
    assert model.arch is plain


@pytest.mark.parametrize("kind", ["topk", "transcoder", "cross_layer"])
def test_steering_does_what_the_arithmetic_says(kind: str) -> None:
    with attached(kind=kind) as model:
        literal = Literal(model, swap_task(n=1).pairs[0])
        point, layer, feature = literal.kind, 1, 5
        before = model.run(TOKENS, keep=[f"features.{point}", point])
        own = before[f"L{layer}.F{feature}.{point}"]
        where = f"L{layer}.F{feature}.{point}@END"
        for op, value, wanted in (
            ("replace", 2.5, torch.full_like(own, 2.5)),
            ("add", 1.5, own + 1.5),
            ("scale", -3.0, own * -3),
            ("at_least", 1.0, own.clamp_min(1.0)),
            ("at_most", -0.5, own.clamp_max(-0.5)),
        ):
            edits = [pl.Edit(where, value, op)]
            after = model.run(TOKENS, edits=edits, keep=point)
            for to in literal.written(layer):
                change = after[f"L{to}.{point}"] - before[f"L{to}.{point}"]
                if to == layer:
                    expected = torch.zeros_like(change)
                    expected[:, -1] = (wanted - own)[:, -1, None] * literal.row(layer, feature, to)
                    assert torch.allclose(change, expected, atol=1e-12)
            with pl.intervene(model, edits):
                assert torch.equal(model.run(TOKENS).logits, after.logits)
        # across layers the later ones are moved as well, beside what follows from the first
        if kind == "cross_layer":
            direct = model.run(TOKENS, edits=[pl.Edit(f"L{to}.{point}@END", 2.0 * literal.row(layer, feature, to), "add") for to in (1, 2)])
            assert torch.allclose(model.run(TOKENS, edits=[pl.Edit(where, 2.0, "add")]).logits, direct.logits, atol=1e-10)


def test_scores_inside_intervene_are_of_the_edited_model(model: pl.Model, task: Any) -> None:
    with pl.intervene(model, pl.Edit("L0.F3.resid_post", 4.0)):
        exact = run("exact", model, task, BY_POS)
        literal = run(pl.ActivationPatching(engine="literal"), model, task, BY_POS)
    for site in exact.sites:
        assert np.array_equal(exact.cells(site), literal.cells(site))
        values = literal.data[site].to_numpy()
        np.testing.assert_allclose(exact.data[site].to_numpy(), values, atol=2e-5 * np.abs(values).max())


@pytest.mark.parametrize("kind", ["topk", "transcoder", "cross_layer"])
def test_sets_of_cells_are_patched_at_once(kind: str) -> None:
    """Where an earlier layer is patched too, later features and errors get the source's values, not the source's change."""
    task = swap_task(n=2)
    with attached(kind=kind) as model:
        for family, number in (("features", 0), ("error", 1)):
            setting, batches, _ = pl.ActivationPatching().prepared(model, task, BY_POS[number], direction="denoising")
            (site,) = setting.sites
            kept = f"{family}.{site.kind.partition('.')[2]}"
            found = pl.VerifiedPatching(k=2, screen=get_method("atp"), sample=0, subsets=8).run(
                model, task, BY_POS[number], direction="denoising", progress=False
            )
            assert found.subsets is not None or len(found.table)
            clean = model.run(task.prompts("clean"), keep=kept)
            from patchlab.methods.setting.meter import Meter
            from patchlab.methods.setting.unpatched import unpatched
            from patchlab.progress import progress_bar

            with progress_bar("x", "cell", None, done=0, show=False) as bar:
                meter = Meter(bar, "cell")
                options = pl.ActivationPatching().baseline_options(setting)
                runs = unpatched(setting, batches[0], meter, source="paired", at=setting.targets, baseline=options)
                cells_kind = features.Features() if family == "features" else features.Errors()
                whole = [(site, cell) for cell in cells_kind.cells(setting, site, runs)]
                edits = [pl.Edit(cells_kind.label(setting, *cell), clean, joint="set") for cell in whole]
                base, moved = (model.run(task.prompts("corrupted"), edits=some).logits for some in ([], edits))
                effect = cells_kind.patch(setting, runs, meter, [whole], pl.ActivationPatching().how)[0]
            answers = [(list(pair.correct), list(pair.incorrect)) for pair in task.pairs]
            wanted = [
                float((moved - base)[row, -1, right].mean() - (moved - base)[row, -1, wrong].mean()) for row, (right, wrong) in enumerate(answers)
            ]
            np.testing.assert_allclose(effect, wanted, atol=1e-8 * np.abs(wanted).max())


@pytest.mark.parametrize("method", ["relp", "exact"])
def test_the_contract_of_methods(method: str, task: Any) -> None:
    with attached(kind="topk") as model:
        check_method(get_method(method), model, task, ["features", *BY_POS], directions=("noising",))


def test_named_positions_are_those_of_the_prompts() -> None:
    from families import mixed_task

    task = mixed_task()
    with attached(kind="relu") as model:
        named, whole = (run("atp", model, task, [site]) for site in (BY_POS[0], "features"))
        names = named.data["position"].to_numpy().tolist()
        assert "END" in names
        alone = run("atp", model, task.select([0]), BY_POS)
        end = {cell[::2]: float(values[0]) for cell, values in cells(named, BY_POS[0]).items() if cell[1] == names.index("END")}
        own = {cell[::2]: float(values[0]) for cell, values in cells(alone, BY_POS[0]).items() if cell[1] == len(task.pairs[0]) - 1}
        assert all(np.isclose(end[cell], value) for cell, value in own.items())
        assert len(whole.cells("features"))


def test_batches_files_and_checkpoints(model: pl.Model, task: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("exact", model, task, ["features", *BY_POS], batch_size=2)
    real, seen = features.Features.patch, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    path = tmp_path / "work.npz"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(features.Features, "patch", stopped)
        run("exact", model, task, ["features", *BY_POS], batch_size=2, checkpoint=path)
    again = run("exact", model, task, ["features", *BY_POS], batch_size=2, checkpoint=path)
    again.save(tmp_path / "features.nc")
    model.drop_dictionaries()
    loaded = pl.ScoreMap.load(tmp_path / "features.nc")
    for site in whole.sites:
        assert loaded.is_sparse(site)
        assert np.array_equal(loaded.cells(site), whole.cells(site))
        assert np.array_equal(loaded.data[site].to_numpy(), whole.data[site].to_numpy())
    cell = tuple(loaded.cells(BY_POS[0])[0].tolist())
    name = loaded.address(BY_POS[0], cell) if hasattr(loaded, "address") else f"L{cell[0]}.F{cell[2]}.resid_post@{cell[1]}"
    assert name == f"L{cell[0]}.F{cell[2]}.resid_post@{cell[1]}"
    assert {"layer", "feature", "pos"} <= set(loaded.to_dataframe().columns)


def test_two_dictionaries_are_two_sites(task: Any) -> None:
    with attached(kind="relu", dtype=torch.float32) as model:
        mine = run("atp", model, task)
    with attached(kind="topk", dtype=torch.float32) as model:
        other = run("relp", model, task)
        same = run("atp", model, task)
        table = pl.compare(other, {"atp": same}, n_boot=20)
        assert json.dumps(table.to_dict())
        with pytest.raises(ScoreError, match="the sites that were added to the model differ"):
            pl.compare(mine, {"other": other}, n_boot=20)


def test_verified_patching_and_pictures(model: pl.Model, task: Any) -> None:
    exact = run("exact", model, task, BY_POS)
    found = pl.VerifiedPatching(k=3, screen=get_method("relp"), sample=4).run(model, task, BY_POS, direction="denoising", progress=False)
    effects = {f"L{layer}.F{feature}.resid_post@{pos}": values for (layer, pos, feature), values in cells(exact, BY_POS[0]).items()}
    effects |= {f"L{layer}.error.resid_post@{pos}": values for (layer, pos), values in cells(exact, BY_POS[1]).items()}
    for address, value in zip(found.table["address"], found.table["effect"], strict=True):
        assert abs(float(np.mean(effects[address])) - value) < 1e-4
    for site in BY_POS:
        scores = run("relp", model, task, [site])
        assert _prepare_heatmaps(scores).rows
        assert pl.plots.heatmaps(scores).to_json()
    assert support(model).mode == "prefix"


def test_features_are_read_a_chunk_of_positions_at_a_time(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with attached(kind="topk") as model:
        whole = [run(method, model, task, BY_POS) for method in ("atp", "atp@mean_positional")]
        monkeypatch.setattr(readings, "CHUNK_BYTES", 1)
        monkeypatch.setattr(readings, "ENTRIES", 3)
        parts = [run(method, model, task, BY_POS) for method in ("atp", "atp@mean_positional")]
    for one, other in zip(whole, parts, strict=True):
        for site in one.sites:
            assert np.array_equal(one.cells(site), other.cells(site))
            np.testing.assert_allclose(one.data[site].to_numpy(), other.data[site].to_numpy(), atol=1e-12)


def test_what_is_not_defined_is_refused(model: pl.Model, task: Any) -> None:
    for method, said in (
        ("atp+qk", "Leave .qk out"),
        ("eap-ig-activations:3", "over='groups' averages over the readers of edges"),
        ("second-order:2", "second-order terms are of nodes, and features.resid_post are parts of them; ask for resid_post"),
        ("exact-frozen", "post_norm='frozen' says what an edge out of a head carries"),
    ):
        with pytest.raises(MethodError, match=said):
            run(method, model, task, ["features"])
    with pytest.raises(MethodError, match="sends gradients through dictionaries, and gpt2 has none"):
        bare = model_of("gpt2", torch.float64)
        run("atp+spliced", bare, task, ["resid_pre"])
    assert DICTIONARIES.keys() >= {"topk"}


def test_graddrop_counts_sizes(model: pl.Model, task: Any) -> None:
    scores = run("atp+drop", model, task, ["features"])
    assert scores.provenance["unsigned"]
    assert float(scores.data[scores.sites[0]].min()) >= 0.0
