"""Edits and sources: what a run with them computes, against the untouched Hugging Face model; and what is refused."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import hf_module, model_of, scores_of, swap_task
from torch import Tensor

import patchlab as pl
from patchlab.engine import Program, run, session_of, sweep
from patchlab.errors import InterventionError, SiteError
from patchlab.metrics import METRICS, Answers
from patchlab.models import Model
from patchlab.sources import Kept, Own, Source, as_source

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
OTHER = torch.tensor([[2, 7, 1, 8, 2], [8, 1, 8, 2, 8], [4, 5, 9, 0, 4]])
LAYER, HEADS, D_HEAD = 1, 4, 4


@pytest.fixture
def model() -> Model:
    return model_of("llama")


def _native(module_name: str, change: Callable[[Tensor], Tensor], *, of: str, family: str = "llama") -> Tensor:
    """Logits of the plain Hugging Face model with the input or output of one of its modules changed."""
    module = hf_module(family)
    target = module.get_submodule(module_name)
    if of == "input":
        target.register_forward_pre_hook(lambda m, inputs: (change(inputs[0].clone()), *inputs[1:]))
    else:
        target.register_forward_hook(lambda m, inputs, output: change(output.clone()))
    with torch.no_grad():
        return module(TOKENS).logits


def _close(got: Tensor | None, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, D_HEAD))


# --- edits do what they say, on the untouched model ----------------------------------------------------------------------


def _set(index: Any, value: float, *, heads: bool = False) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        (_heads(x) if heads else x)[index] = value
        return x

    return change


END, EVERY = -1, slice(None)


@pytest.mark.parametrize(
    ("site", "module", "of", "change"),
    [
        ("L1.H2.z@END", "model.layers.1.self_attn.o_proj", "input", _set((EVERY, END, 2), 0.5, heads=True)),
        ("L1.z@0,-2", "model.layers.1.self_attn.o_proj", "input", _set((EVERY, [0, 3]), 0.5)),
        ("L1.H1.k@2", "model.layers.1.self_attn.k_proj", "output", _set((EVERY, 2, 1), 0.5, heads=True)),
        ("L1.H0.v", "model.layers.1.self_attn.v_proj", "output", _set((EVERY, EVERY, 0), 0.5, heads=True)),
        ("L1.H3.q@-1", "model.layers.1.self_attn.q_proj", "output", _set((EVERY, END, 3), 0.5, heads=True)),
        ("L1.N7.mlp_post@END", "model.layers.1.mlp.down_proj", "input", _set((EVERY, END, 7), 0.5)),
        ("L1.mlp_out@1", "model.layers.1.mlp", "output", _set((EVERY, 1), 0.5)),
        ("L1.resid_pre@1,3", "model.layers.1", "input", _set((EVERY, [1, 3]), 0.5)),
        ("L1.resid_mid@2", "model.layers.1.post_attention_layernorm", "skip", _set((EVERY, 2), 0.5)),
        ("L1.resid_post", "model.layers.1", "output", _set((EVERY, EVERY), 0.5)),
        ("input", "model.embed_tokens", "output", _set((EVERY, EVERY), 0.5)),
        ("input@0", "model.embed_tokens", "output", _set((EVERY, 0), 0.5)),
    ],
)
def test_an_edit_equals_the_same_change_of_the_hugging_face_model(site: str, module: str, of: str, change, model: Model) -> None:
    got = model.run(TOKENS, edits=[pl.Edit(site, 0.5)]).logits
    if of == "skip":  # the stream between attention and MLP is no module: set attention's output to what gives the value
        before = model.run(TOKENS, keep="L1.resid_pre")["L1.resid_pre"]
        expected = model.run(TOKENS, edits=[pl.Edit("L1.attn_out@2", 0.5 - before)]).logits
    else:
        expected = _native(module, change, of=of)
    _close(got, expected)
    assert (got - model.run(TOKENS).logits).abs().max() > 1e-2


def test_zeroing_the_scaled_embedding_of_gemma() -> None:
    got = model_of("gemma2").run(TOKENS, edits=[pl.Edit("input@2", pl.sources.zero())]).logits
    _close(got, _native("model.embed_tokens", _set((EVERY, 2), 0.0), of="output", family="gemma2"))


def test_an_edit_of_the_pattern_touches_one_entry(model: Model) -> None:
    before = model.run(TOKENS, keep=["L1.pattern", "L1.v"])
    after = model.run(TOKENS, edits=[pl.Edit("L1.H3.pattern@END<S1", 0.25)], positions={"S1": torch.tensor([1, 0, 3])}, keep=["L1.pattern", "L1.z"])
    expected = before["L1.pattern"].clone()
    expected[torch.arange(3), 3, -1, torch.tensor([1, 0, 3])] = 0.25
    assert torch.equal(after["L1.pattern"], expected)
    values = before["L1.v"].repeat_interleave(2, dim=2)  # two query heads share a key-value head
    _close(after["L1.z"], torch.einsum("bhds,bshw->bdhw", expected, values))


@pytest.mark.parametrize(("site", "index"), [("L1.pattern@3", (EVERY, EVERY, 3)), ("L1.pattern@*<0,-1", (EVERY, EVERY, EVERY, [0, 4]))])
def test_rows_and_columns_of_the_pattern(site: str, index: Any, model: Model) -> None:
    expected = model.run(TOKENS, keep="L1.pattern")["L1.pattern"].clone()
    expected[index] = 0.0
    assert torch.equal(model.run(TOKENS, edits=[pl.Edit(site, pl.sources.zero())], keep="L1.pattern")["L1.pattern"], expected)


# --- operations, rows, positions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "expected"),
    [("replace", lambda x: torch.full_like(x, 3.0)), ("add", lambda x: x + 3), ("scale", lambda x: x * 3)],
    ids=["replace", "add", "scale"],
)
def test_operations(op: str, expected: Callable[[Tensor], Tensor], model: Model) -> None:
    before = model.run(TOKENS, keep="L1.z")["L1.z"]
    after = model.run(TOKENS, edits=[pl.Edit("L1.H2.z@1", 3.0, op=op)], keep="L1.z")["L1.z"]
    wanted = before.clone()
    wanted[:, 1, 2] = expected(before[:, 1, 2])
    assert torch.equal(after, wanted)


def test_rows_select(model: Model) -> None:
    plain = model.run(TOKENS).logits
    edit = pl.Edit("L1.resid_pre", pl.sources.zero(), rows=torch.tensor([True, False, True]))
    got, everywhere = model.run(TOKENS, edits=[edit]).logits, model.run(TOKENS, edits=[pl.Edit("L1.resid_pre", pl.sources.zero())]).logits
    assert torch.equal(got[1], plain[1])
    _close(got[::2], everywhere[::2])


def test_named_positions_per_row(model: Model) -> None:
    where = torch.tensor([0, 3, 1])
    after = model.run(TOKENS, edits=[pl.Edit("L1.resid_pre@S,END", 2.0)], positions={"S": where}, keep="L1.resid_pre")["L1.resid_pre"]
    changed = (after == 2.0).all(-1)
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[torch.arange(3), where] = True
    expected[:, -1] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("index", [-2, 3, torch.tensor([3, 3, 3]), torch.tensor([-2, 3, -2])])
def test_named_positions_count_from_either_end(index: Any, model: Model) -> None:
    edit = pl.Edit("L1.resid_pre@X", 2.0)
    assert torch.equal(
        model.run(TOKENS, edits=[edit], positions={"X": index}).logits, model.run(TOKENS, edits=[pl.Edit("L1.resid_pre@3", 2.0)]).logits
    )


def test_end_can_be_moved(model: Model) -> None:
    got = model.run(TOKENS, edits=[pl.Edit("L1.resid_pre@END", 2.0)], positions={"END": 1}).logits
    assert torch.equal(got, model.run(TOKENS, edits=[pl.Edit("L1.resid_pre@1", 2.0)]).logits)


@pytest.mark.parametrize(
    ("site", "positions", "message"),
    [
        ("L1.z@S1", {}, "L1.z@S1 names the position 'S1'; this run knows END and integers"),
        ("L1.z@S1", {"S2": 1, "IO": 2}, "this run knows END, IO, S2 and integers"),
        ("L1.z@5", {}, r"L1.z@5 names position 5, but the run has 5 positions \(0 to 4\)"),
        ("L1.z@-6", {}, r"names position -6, but the run has 5 positions"),
        ("L1.pattern@END<7", {}, r"L1.pattern@END<7 names position 7"),
        ("L1.z@X", {"X": 5}, r"the named position 'X' is 5, but the run has 5 positions \(0 to 4\)"),
        ("L1.z@X", {"X": torch.tensor([0, 1, 9])}, r"the named position 'X' is tensor\(\[0, 1, 9\]\), but the run has 5 positions"),
    ],
)
def test_positions_that_are_not_there(site: str, positions: dict[str, Any], message: str, model: Model) -> None:
    with pytest.raises(InterventionError, match=message):
        model.run(TOKENS, edits=[pl.Edit(site, pl.sources.zero())], positions=positions)


@pytest.mark.parametrize("index", [torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0]), 1.5])
def test_positions_of_the_wrong_kind(index: Any, model: Model) -> None:
    with pytest.raises(InterventionError, match=r"the named position 'X' is one index, or one per row \(3 here\)"):
        model._position("X", index, TOKENS)


def test_rows_of_the_wrong_number(model: Model) -> None:
    with pytest.raises(InterventionError, match="rows has 2 entries and the run 3 rows; give one boolean per row"):
        model.run(TOKENS, edits=[pl.Edit("L1.z", 0.0, rows=torch.tensor([True, False]))])


# --- sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "shape"),
    [
        ("L1.z", (3, 5, 4, 4)),
        ("L1.z", (5, 4, 4)),
        ("L1.z", (4,)),
        ("L1.z", ()),
        ("L1.H2.z", (3, 5, 4, 4)),
        ("L1.H2.z", (3, 5, 4)),
        ("L1.H2.z", (5, 4)),
        ("L1.H2.z@END", (4,)),
        ("L1.H2.z@END", (3, 4)),
        ("L1.z@END", (4, 4)),
        ("L1.z@END", (3, 4, 4)),
        ("L1.resid_pre@3", (16,)),
        ("L1.resid_pre@3", (3, 16)),
        ("L1.resid_pre", (5, 16)),
        ("L1.N7.mlp_post", (5,)),
        ("L1.N7.mlp_post", (3, 5)),
        ("L1.N7.mlp_post@END", ()),
        ("L1.N7.mlp_post@END", (3,)),
        ("L1.H1.pattern@END<0", (3,)),
        ("L1.H1.pattern@END", (5,)),
        ("L1.H1.pattern@END", (3, 5)),
        ("L1.H1.pattern", (3, 5, 5)),
    ],
)
def test_a_tensor_may_leave_out_the_axes_that_the_address_fixes(site: str, shape: tuple[int, ...], model: Model) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    address = pl.Site.parse(site)
    whole = f"L1.{address.kind}"
    before = model.run(TOKENS, keep=whole)[whole]
    after = model.run(TOKENS, edits=[pl.Edit(site, value)], keep=whole)[whole]
    # the slice that the address names, with its single entries dropped, is the tensor, broadcast where rows are left out
    index: list[Any] = [slice(None)] * after.ndim
    pos, head = (2, 1) if address.kind == "pattern" else (1, 2)
    last = {"END": -1}
    if address.pos is not None:
        index[pos] = last.get(str(address.pos[0]), address.pos[0])
    if address.src is not None:
        index[3] = address.src[0]
    if address.index is not None:
        index[head] = address.index
    expected = before.clone()
    named = expected[tuple(index)]
    fits = value if value.ndim < 4 or address.index is None else value[:, :, address.index]
    expected[tuple(index)] = fits.expand(named.shape)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(("site", "shape"), [("L1.z", (3,)), ("L1.H2.z@END", (5,)), ("L1.resid_pre", (2, 5, 16)), ("L1.H1.pattern@END", (4,))])
def test_a_tensor_that_does_not_fit(site: str, shape: tuple[int, ...], model: Model) -> None:
    message = rf"a tensor of shape {list(shape)} does not fit {site}, whose activation is \[3, .*\] here; give that shape, or drop the axes".replace(
        "[", r"\[", 1
    )
    with pytest.raises(InterventionError, match=message):
        model.run(TOKENS, edits=[pl.Edit(site, torch.zeros(shape))])


def test_the_other_dtype_of_a_tensor_is_converted(model: Model) -> None:
    expected = model.run(TOKENS, edits=[pl.Edit("L1.z", 2.0)]).logits
    for value in (torch.tensor(2), torch.tensor(2.0, dtype=torch.float64), torch.full((5, 4, 4), 2, dtype=torch.int32)):
        assert torch.equal(model.run(TOKENS, edits=[pl.Edit("L1.z", value)]).logits, expected)


def _noisy(model: Model, examples: list[int], seed: int = 0, site: str = "L1.resid_pre") -> Tensor:
    index = torch.tensor(examples)
    kept = run(model, Program(TOKENS[index], index, edits=(pl.Edit(site, pl.sources.noise(0.5, seed)),), keep=(("resid_pre", 1), ("resid_pre", 2))))
    return kept[site]


def test_noise_belongs_to_its_example(model: Model) -> None:
    every = _noisy(model, [0, 1, 2])
    assert torch.equal(_noisy(model, [2, 0]), every[[2, 0]])
    assert torch.equal(torch.cat([_noisy(model, [i]) for i in range(3)]), every)
    assert not torch.equal(every[0], every[1])
    assert not torch.equal(_noisy(model, [0, 1, 2], seed=1), every)
    assert not torch.equal(_noisy(model, [0, 1, 2], site="L2.resid_pre"), every)
    assert float(every.std()) == pytest.approx(0.5, rel=0.15)
    assert float(every.mean()) == pytest.approx(0.0, abs=0.1)


def test_noise_leaves_the_global_generator_alone(model: Model) -> None:
    state = torch.get_rng_state()
    _noisy(model, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_is_over_rows_and_positions_but_never_over_heads(model: Model) -> None:
    kept = model.run(OTHER, keep=["L1.z", "L1.mlp_post", "L1.v"])
    edits = [pl.Edit(f"L1.{kind}", pl.sources.mean_of(kept)) for kind in ("z", "v", "mlp_post")]
    after = model.run(TOKENS, edits=edits, keep=["L1.z", "L1.v", "L1.mlp_post"])
    for kind in ("z", "v", "mlp_post"):
        expected = kept[f"L1.{kind}"].double().mean((0, 1)).float()
        # how torch sums over two axes at once depends on the number of threads, in the last bit
        torch.testing.assert_close(after[f"L1.{kind}"], expected.expand_as(after[f"L1.{kind}"]), rtol=2e-7, atol=1e-8)
    assert (kept["L1.z"].mean((0, 1)).std(0) > 1e-3).all(), "the heads must differ for this test to mean something"


def test_the_positional_mean_is_over_rows_only(model: Model) -> None:
    kept = model.run(OTHER, keep=["L1.z", "L1.pattern"])
    mean = pl.sources.mean_of(kept, positional=True)
    after = model.run(TOKENS, edits=[pl.Edit("L1.H1.z", mean), pl.Edit("L1.pattern", mean)], keep=["L1.z", "L1.pattern"])
    assert torch.equal(after["L1.H1.z"], kept["L1.H1.z"].double().mean(0).float().expand(3, -1, -1))
    assert torch.equal(after["L1.pattern"], kept["L1.pattern"].double().mean(0).float().expand(3, -1, -1, -1))


def test_means_that_do_not_fit(model: Model) -> None:
    kept = model.run(OTHER, keep=["L1.z", "L1.pattern"])
    with pytest.raises(InterventionError, match="the mean of a pattern over positions is not an attention pattern; use positional=True"):
        pl.sources.mean_of(kept)
    with pytest.raises(InterventionError, match="mean_of takes a run with kept activations; got float"):
        pl.sources.mean_of(1.0)
    kept = model.run(OTHER, keep="L1.z")
    with pytest.raises(InterventionError, match=r"the mean has no L2.z; it has L1.z. Add it to keep=\[...\] of the run"):
        model.run(TOKENS, edits=[pl.Edit("L2.z", pl.sources.mean_of(kept))])
    with pytest.raises(InterventionError, match=r"the positional mean of z has shape \[5, 4, 4\] and does not fit this run's \[3, 4, 4\] per row"):
        model.run(TOKENS[:, :3], edits=[pl.Edit("L1.z", pl.sources.mean_of(kept, positional=True))])
    with pytest.raises(InterventionError, match=r"the mean of v has shape \[1, 4, 4\] and does not fit this run's \[5, 2, 4\] per row"):
        model.run(TOKENS, edits=[pl.Edit("L1.v", pl.sources.mean_of(model_of("gpt2").run(TOKENS, keep="L1.v")))])


def test_a_blend_is_a_weighted_sum(model: Model) -> None:
    other, own = model.run(OTHER, keep="L1.z"), model.run(TOKENS, keep="L1.z")
    for weight in (0.0, 0.25, 1.0):
        after = model.run(TOKENS, edits=[pl.Edit("L1.z", pl.sources.blend(Own(), other, weight))], keep="L1.z")["L1.z"]
        _close(after, (1 - weight) * own["L1.z"] + weight * other["L1.z"])
    after = model.run(TOKENS, edits=[pl.Edit("L1.z", pl.sources.blend(pl.sources.zero(), 4.0, 0.5))], keep="L1.z")["L1.z"]
    assert torch.equal(after, torch.full_like(after, 2.0))


def test_a_kept_run_is_matched_by_example(model: Model) -> None:
    source = run(model, Program(OTHER, torch.tensor([7, 5, 6]), keep=(("z", 1),)))
    after = run(model, Program(TOKENS[:2], torch.tensor([6, 7]), edits=(pl.Edit("L1.z", source),), keep=(("z", 1),)))
    assert torch.equal(after["L1.z"], source["L1.z"][[2, 0]])
    with pytest.raises(InterventionError, match="the source run has no row for example 8"):
        run(model, Program(TOKENS[:2], torch.tensor([6, 8]), edits=(pl.Edit("L1.z", source),)))


def test_a_kept_run_of_one_row_serves_all(model: Model) -> None:
    source = model.run(OTHER[:1], keep="L1.z")
    after = model.run(TOKENS, edits=[pl.Edit("L1.z", source)], keep="L1.z")
    assert torch.equal(after["L1.z"], source["L1.z"].expand(3, -1, -1, -1))


def test_patching_everything_gives_the_other_run(model: Model) -> None:
    clean = model.run(OTHER, keep="resid_pre")
    _close(model.run(TOKENS, edits=[pl.Edit("L2.resid_pre", clean)]).logits, clean.logits)


def test_kept_runs_that_do_not_fit(model: Model) -> None:
    source = model.run(OTHER, keep=["L1.z", "input"])
    with pytest.raises(InterventionError, match=r"the source run did not keep L2.z; it kept L1.z, input. Add it to keep=\[...\] of that run"):
        model.run(TOKENS, edits=[pl.Edit("L2.z", source)])
    with pytest.raises(InterventionError, match="did not keep L2.z; it kept nothing"):
        model.run(TOKENS, edits=[pl.Edit("L2.z", model.run(OTHER))])
    with pytest.raises(
        InterventionError,
        match=r"the source run has z of shape \[5, 4, 4\] per row and this run \[4, 4, 4\]; patching needs prompts of the same number",
    ):
        model.run(TOKENS[:, :4], edits=[pl.Edit("L1.z", source)])
    with pytest.raises(InterventionError, match=r"the source run has no row for example 3 \(it has 3, this run 4\)"):
        model.run(TOKENS[[0, 1, 2, 0]], edits=[pl.Edit("L1.z", source)])


class _Twice:
    """A source of one's own."""

    def values(self, site: pl.Site, own: Tensor, examples: Tensor) -> Tensor:
        return own.double() * 2


class _TooWide:
    def values(self, site: pl.Site, own: Tensor, examples: Tensor) -> Tensor:
        return torch.zeros(2, *own.shape)


def test_a_source_of_ones_own(model: Model) -> None:
    assert isinstance(_Twice(), Source)
    after = model.run(TOKENS, edits=[pl.Edit("L1.z", _Twice())])
    assert torch.equal(after.logits, model.run(TOKENS, edits=[pl.Edit("L1.z", 2.0, op="scale")]).logits)
    with pytest.raises(InterventionError, match=r"a value of shape \[2, 3, 5, 4, 4\] does not fit L1.z, whose activation is \[3, 5, 4, 4\] here"):
        model.run(TOKENS, edits=[pl.Edit("L1.z", _TooWide())])


@pytest.mark.parametrize("value", [{}, {"z": 1}, "zero", None, pl.sources.zero, _Twice, [1.0]])
def test_things_that_are_no_source(value: Any) -> None:
    message = r"a source is a run with kept activations, pl.sources.zero\(\), pl.sources.noise\(...\), a tensor or a number; got "
    with pytest.raises(InterventionError, match=message):
        pl.Edit("L1.z", value)


def test_a_source_is_a_source() -> None:
    kept = Kept({}, torch.arange(2))
    assert as_source(kept) is kept


# --- what is refused when an edit is made --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        ("z", InterventionError, "an edit needs an address with a layer, such as L3.z@END; got 'z'"),
        ("resid_pre", InterventionError, "an edit needs an address with a layer, such as L3.resid_pre@END"),
        ("L1.zz", SiteError, "unknown site 'zz'"),
        ("z@END", SiteError, "lacks its layer"),
    ],
)
def test_addresses_that_cannot_be_edited(site: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pl.Edit(site, pl.sources.zero())


def test_unknown_operations() -> None:
    with pytest.raises(InterventionError, match="an edit's op is one of 'replace', 'add', 'scale', 'at_least', 'at_most'; got 'multiply'"):
        inspect.unwrap(pl.Edit.__post_init__)(_with_op("multiply"))


def _with_op(op: str) -> pl.Edit:
    edit = pl.Edit("L1.z", 0.0)
    object.__setattr__(edit, "op", op)
    return edit


def test_things_that_are_no_edits(model: Model) -> None:
    message = r"edits are pl.Edit\(site, source\), one or a list of them; got str"
    with pytest.raises(InterventionError, match=message):
        inspect.unwrap(Model.run)(model, TOKENS, edits=["L1.z"])
    with pytest.raises(InterventionError, match=message), contextmanager(inspect.unwrap(pl.intervene))(model, "L1.z"):
        pass
    with pytest.raises(InterventionError, match="got NoneType"):
        inspect.unwrap(Model.run)(model, TOKENS, edits=None)


# --- intervene -----------------------------------------------------------------------------------------------------------

FIRST, SECOND, THIRD = pl.Edit("L1.z", 1.0, op="add"), pl.Edit("L1.z", 3.0, op="scale"), pl.Edit("L1.z", 5.0, op="add")


def test_nested_blocks_compose_outer_first(model: Model) -> None:
    z = model.run(TOKENS, keep="L1.z")["L1.z"]
    with pl.intervene(model, FIRST):
        with pl.intervene(model, [SECOND]):
            inner = model.run(TOKENS, edits=[THIRD], keep="L1.z")
        outer = model.run(TOKENS, keep="L1.z")
    torch.testing.assert_close(inner["L1.z"], (z + 1) * 3 + 5)
    torch.testing.assert_close(outer["L1.z"], z + 1)
    assert torch.equal(model.run(TOKENS, keep="L1.z")["L1.z"], z)
    assert torch.equal(inner.logits, model.run(TOKENS, edits=[FIRST, SECOND, THIRD]).logits)


def test_blocks_end_after_an_exception(model: Model) -> None:
    plain = model.run(TOKENS).logits
    with pl.intervene(model, FIRST):
        with pytest.raises(ZeroDivisionError), pl.intervene(model, SECOND):
            raise ZeroDivisionError
        assert session_of(model).surrounding == (FIRST,)
    assert session_of(model).surrounding == ()
    assert torch.equal(model.run(TOKENS).logits, plain)


def test_an_edit_that_the_model_cannot_take_is_refused_at_once(model: Model) -> None:
    for edits, message in (
        (pl.Edit("L3.z", 0.0), "L3.z names layer 3"),
        ([FIRST, pl.Edit("L0.H2.k", 0.0)], r"names head 2, but this model has 2 \(kv_head"),
    ):
        with pytest.raises(SiteError, match=message), pl.intervene(model, edits):
            raise AssertionError("the block must not start")
    assert session_of(model).surrounding == ()


@pytest.mark.parametrize("method", ["exact", "atp", "relp", "ig:2", "relp-ah"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_method_honours_the_surrounding_edits(method: str, direction: str, model: Model) -> None:
    """Both unpatched runs of the method, and its scores, are those of the edited model."""
    task = swap_task()
    edit = pl.Edit("L1.H2.z@END", 2.0)
    plain = scores_of(pl.methods.get_method(method), model, task, ["resid_pre", "z"], direction)
    with pl.intervene(model, edit):
        edited = scores_of(pl.methods.get_method(method), model, task, ["resid_pre", "z"], direction)
    (batch,) = task.batches()
    for name, tokens in (("metric_clean", batch.clean), ("metric_corrupted", batch.corrupted)):
        logits = model.run(tokens, edits=[edit]).logits
        expected = METRICS["logit_diff"](logits[:, -1], batch.answers)
        torch.testing.assert_close(torch.tensor(edited.data[name].to_numpy()).float(), expected, rtol=1e-4, atol=1e-5)
        assert abs(edited.data[name].to_numpy() - plain.data[name].to_numpy()).max() > 1e-3
    assert edited.provenance["ambient"] == ["replace L1.H2.z@END"]
    assert abs(edited.data["resid_pre"].to_numpy() - plain.data["resid_pre"].to_numpy()).max() > 1e-3


def test_exact_scores_inside_a_block_are_runs_with_both_edits(model: Model) -> None:
    task, edit = swap_task(), pl.Edit("L0.mlp_out", 0.5, op="scale")
    with pl.intervene(model, edit):
        scores = scores_of(pl.ActivationPatching(), model, task, "z")
    (batch,) = task.batches()
    clean = model.run(batch.clean, edits=[edit], keep="z")
    metric = METRICS["logit_diff"]
    base = metric(model.run(batch.corrupted, edits=[edit]).logits[:, -1], batch.answers)
    for layer, head in ((0, 1), (2, 3)):
        patched = metric(model.run(batch.corrupted, edits=[edit, pl.Edit(f"L{layer}.H{head}.z", clean)]).logits[:, -1], batch.answers)
        got = torch.tensor(scores.data["z"].sel(layer=layer, head=head).to_numpy()).float()
        torch.testing.assert_close(got, patched - base, rtol=1e-3, atol=1e-5)


def test_public_names_are_reachable() -> None:
    assert str(pl.Edit("L9.H6.z@END", pl.sources.noise(0.1, 3)).address) == "L9.H6.z@END"
    for home, names in ((pl, ("Edit", "intervene", "wrap_bridge")), (pl.sources, ("zero", "noise", "mean_of", "blend"))):
        for name in names:
            assert name in dir(home)
            assert callable(getattr(home, name))


def test_wrong_shapes_raise_under_the_shape_checks() -> None:
    from jaxtyping import TypeCheckError

    edit = pl.Edit("L1.z", 0.0)
    for wrong in (
        lambda: edit.apply(torch.zeros(3, 5, 4, 4, dtype=torch.long), torch.arange(3), {}),
        lambda: edit.apply(torch.zeros(3, 5, 4, 4), torch.arange(2), {}),
        lambda: pl.Edit("L1.z", 0.0, rows=torch.tensor([1, 0, 1])),
        lambda: Kept({}, torch.zeros(2, 2, dtype=torch.long)),
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_joint_edits_read_what_the_first_of_them_read_and_their_changes_add_up() -> None:
    model, tokens = model_of("gpt2", torch.float64), torch.tensor([[3, 1, 4, 1, 5]])
    own = model.run(tokens, keep="mlp_out")["L1.mlp_out"]

    def kept(*edits: pl.Edit) -> torch.Tensor:
        return model.run(tokens, edits=list(edits), keep="mlp_out")["L1.mlp_out"]

    def doubled(joint: str) -> pl.Edit:
        return pl.Edit("L1.mlp_out", 2.0, "scale", joint=joint)

    torch.testing.assert_close(kept(doubled("sum"), doubled("sum")), 3 * own)
    torch.testing.assert_close(kept(doubled("sum"), doubled("other")), 4 * own)
    torch.testing.assert_close(kept(doubled(""), doubled("")), 4 * own)
    torch.testing.assert_close(kept(pl.Edit("L1.mlp_out", 1.0, "add"), doubled("sum"), doubled("sum")), 3 * (own + 1))
    torch.testing.assert_close(kept(doubled("sum"), doubled("sum"), doubled("")), 6 * own)
    with pytest.raises(InterventionError, match="edits that are joint are run by the literal engine"):
        sweep(model, Program(tokens, torch.arange(1), metric=METRICS["logit_diff"], answers=Answers.of([[1]], [[2]])), [(doubled("sum"),)])
