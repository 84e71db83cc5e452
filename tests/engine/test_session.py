"""Sessions: one thread at a time runs a model, and what goes on with a model ends with it."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import hf_module, model_of, native_model, swap_task, untested

import patchlab as pl
from patchlab.engine import Support, session_of, support
from patchlab.engine.contributions import contributions
from patchlab.engine.trust.edges import edge_support
from patchlab.engine.trust.nodes import sweep_key
from patchlab.errors import ModelError
from patchlab.models import Model, wrap_bridge
from patchlab.rules import get_composite

TOKENS = torch.tensor([[3, 11, 7, 29, 5]])


def elsewhere(function: Callable[[], Any]) -> Any:
    """What a function gives, or raises, in another thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        return pool.submit(function).result(timeout=600)


@contextmanager
def in_use(model: Model) -> Iterator[None]:
    """A run of the model that another thread is in the middle of."""
    reached, go_on, failed = threading.Event(), threading.Event(), []

    def stop(module: Any, inputs: Any) -> None:
        reached.set()
        if not go_on.wait(600):
            failed.append("the run was left waiting")

    def run() -> None:
        model.run(TOKENS)

    handle = model.bridge.blocks[0].register_forward_pre_hook(stop)
    thread = threading.Thread(target=run, name="first")
    thread.start()
    try:
        assert reached.wait(600)
        yield
    finally:
        go_on.set()
        thread.join(600)
        handle.remove()
    assert not thread.is_alive()
    assert not failed


IN_USE = r"gpt2 is in use by the thread 'first' .* and 'MainThread' would run it too\..* wait for the other, or load it once per thread"


def fresh() -> Model:
    """A model that nothing has been found out about."""
    return untested(hf_module("gpt2", layers=2), "gpt2")


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.run(TOKENS),
        lambda model: pl.ActivationPatching().run(model, swap_task(), "z", progress=False),
        lambda model: pl.RelevancePatching().run(model, swap_task(), "edges", progress=False),
        lambda model: contributions(model, TOKENS),
        lambda model: pl.intervene(model, pl.Edit("L0.z", pl.sources.zero())).__enter__(),
        support,
        edge_support,
        lambda model: model.check_rules(get_composite("relp")),
    ],
    ids=["run", "exact", "edges", "contributions", "intervene", "support", "edge_support", "rules"],
)
def test_a_second_thread_is_refused_and_nothing_is_found_out_wrongly(use: Callable[[Model], Any]) -> None:
    model = fresh()
    before = dict(session_of(model).found)
    with in_use(model), pytest.raises(ModelError, match=IN_USE):
        use(model)
    assert session_of(model).found == before
    assert not session_of(model).surrounding
    use(model)  # when the first is done


def test_threads_take_turns() -> None:
    model = model_of("gpt2")
    plain = model.run(TOKENS).logits
    assert torch.equal(elsewhere(lambda: model.run(TOKENS).logits), plain)
    with pl.intervene(model, pl.Edit("L0.z", pl.sources.zero())), pl.intervene(model, pl.Edit("L1.z", pl.sources.zero())):
        edited = model.run(TOKENS).logits
        with pytest.raises(ModelError, match=r"in use by the thread 'MainThread' \(a run, or an intervene block\), and 'other_0' would"):
            elsewhere(lambda: model.run(TOKENS))
    assert not torch.equal(edited, plain)
    assert torch.equal(elsewhere(lambda: model.run(TOKENS).logits), plain)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_model_is_free_after_an_exception(error: type[BaseException]) -> None:
    model = model_of("gpt2")

    def fail(*_: Any) -> None:
        raise error

    handle = model.bridge.blocks[1].register_forward_pre_hook(fail)
    try:
        for use in (lambda: model.run(TOKENS), lambda: pl.ActivationPatching().run(model, swap_task(), "z", progress=False)):
            with pytest.raises(error), pl.intervene(model, pl.Edit("L0.z", pl.sources.zero())):
                use()
    finally:
        handle.remove()
    assert elsewhere(lambda: model.run(TOKENS)).logits is not None
    assert not session_of(model).surrounding


def test_models_of_one_bridge_take_turns_and_share_nothing_else() -> None:
    one = native_model("one")
    two = wrap_bridge(one.bridge, "two")
    session_of(one).found[sweep_key(one)] = Support("literal", "set by hand")
    assert support(one).reason == "set by hand"
    assert support(two).mode == "replay"
    with pl.intervene(one, pl.Edit("L0.z", pl.sources.zero())):
        assert not session_of(two).surrounding
        with pytest.raises(ModelError, match="two is in use by the thread 'MainThread'"):
            elsewhere(lambda: two.run(TOKENS))


def test_different_models_run_at_the_same_time() -> None:
    with in_use(fresh()):
        assert model_of("llama").run(TOKENS).logits is not None


def test_a_session_ends_with_its_model() -> None:
    model = fresh()
    support(model)
    edge_support(model)
    model.check_rules(get_composite("relp"))
    session, gone = session_of(model), weakref.ref(model)
    assert len(session.found) > 2
    del model
    gc.collect()
    assert gone() is None, "what a session holds must not keep its model alive"
