"""The contract that every method must pass."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlab.engine import session_of
from patchlab.errors import PatchlabError
from patchlab.methods.cells import cells_of
from patchlab.methods.method import Method
from patchlab.methods.setting.setting import DIRECTIONS
from patchlab.metrics import Answers, Metric
from patchlab.models import Model
from patchlab.scores import ScoreMap
from patchlab.sites import POSITION_AXES, Site, parse_sites
from patchlab.tasks.task import Task


def check_method(
    method: Method,
    model: Model,
    task: Task,
    sites: str | Iterable[str | Site] = ("resid_pre", "z"),
    *,
    directions: Iterable[str] = DIRECTIONS,
    rtol: float = 1e-4,
) -> None:
    """Check the contract that every method must pass.

    Scores have the right axes, are finite (or NaN throughout with a reason, edges reader by reader), read-only and zero at
    structural zeros; they do not depend on batch size or on the order of the examples; provenance, the literal engine's cost and
    the unpatched metrics are true; a saved map loads as it was; the model comes out bit for bit as it went in, also after an
    exception in the metric.

    Args:
        method: the method.
        model: a small model.
        task: a small task, of several examples.
        sites: the sites to score.
        directions: those that the method supports.
        rtol: tolerance, as a share of a site's largest score.

    Raises:
        AssertionError: naming the part of the contract that is broken.

    Example:
        >>> check_method(pl.AttributionPatching(), model, task)  # doctest: +SKIP
    """
    parsed = model.arch.meant(parse_sites(sites if isinstance(sites, str) else list(sites)))
    names = [str(site) for site in parsed]
    before = _State.of(model, task)
    order = list(range(len(task)))
    # what a model is tested for at its first run with a method is not part of what a run costs
    directions = tuple(directions)
    method.run(model, task.select([0]), names, direction=directions[0], progress=False)
    for direction in directions:
        watched = _Failing(task.metric, None)
        with _counting(model) as counter:
            whole = method.run(model, task.with_metric(replace(task.metric, function=watched)), names, direction=direction, progress=False)
        before.check(model, task, f"{method.name}, {direction}")
        _check_map(method, model, task, parsed, direction, whole)
        passes = (counter.forwards, counter.backwards, counter.positions)
        cost = (whole.cost.forwards, whole.cost.backwards, whole.cost.positions)
        _require(
            cost == passes or whole.provenance["engine"] != "literal",
            f"the cost says {cost} forwards, backwards and positions; counted were {passes}",
        )
        parts = method.run(model, task, names, direction=direction, batch_size=max(1, len(task) - 1), progress=False)
        _same(whole, parts, order, rtol, f"the scores change with batch_size={max(1, len(task) - 1)}")
        turned = method.run(model, task.select(order[::-1]), names, direction=direction, progress=False)
        _same(whole, turned, order[::-1], rtol, "the scores change with the order of the examples")
        _check_exceptions(method, model, task, names, direction, before, watched.calls)
    _check_saved(whole)
    for options in ({"direction": "sideways"}, {"batch_size": 0}):
        try:
            method.run(model, task, names, progress=False, **options)  # type: ignore[arg-type]
        except PatchlabError:
            continue
        raise AssertionError(f"{method.name} accepts {options}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


@dataclass(frozen=True)
class _State:
    """Everything about a model, and about torch, that a method must leave alone."""

    tensors: dict[str, Tensor]
    hooks: dict[str, int]
    facts: tuple[Any, ...]
    random: Tensor
    logits: tuple[Tensor, ...]

    @staticmethod
    def of(model: Model, task: Task) -> "_State":
        bridge = model.bridge
        tensors = {name: tensor.detach().clone() for name, tensor in (*bridge.named_parameters(), *bridge.named_buffers())}
        hooks = {name: _hooks_on(module) for name, module in bridge.named_modules()}
        gradients = tuple((parameter.requires_grad, parameter.grad is None) for parameter in bridge.parameters())
        facts = (
            gradients,
            bridge.training,
            session_of(model).surrounding,
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
        )
        logits = tuple(_logits(model, batch.clean) for batch in task.batches(device=model.device))
        return _State(tensors, hooks, facts, torch.random.get_rng_state(), logits)

    def check(self, model: Model, task: Task, where: str) -> None:
        """Compare with the state now."""
        now = _State.of(model, task)
        changed = [name for name, tensor in self.tensors.items() if name not in now.tensors or not torch.equal(tensor, now.tensors[name])]
        _require(not changed, f"{where}: the parameters or buffers {changed[:3]} changed")
        left = [name for name, number in now.hooks.items() if number != self.hooks.get(name)]
        _require(not left, f"{where}: hooks are left on {left[:3]}")
        _require(now.facts == self.facts, f"{where}: gradients, modes, surrounding edits or torch settings changed: {self.facts} became {now.facts}")
        _require(torch.equal(now.random, self.random), f"{where}: the global random state changed")
        _require(all(map(torch.equal, now.logits, self.logits)), f"{where}: the logits of an unpatched run changed")


def _logits(model: Model, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos vocab"]:
    logits = model.run(tokens).logits
    if logits is None:
        raise AssertionError("a run of the model returned no logits")
    return logits


def _hooks_on(module: Any) -> int:
    torch_hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return sum(map(len, torch_hooks)) + len(getattr(module, "fwd_hooks", ())) + len(getattr(module, "bwd_hooks", ()))


@dataclass
class _Counter:
    """Counts the passes through a bridge."""

    forwards: int = 0
    backwards: int = 0
    positions: int = 0

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.forwards += 1
        self.positions += inputs[0].numel()
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1


@contextmanager
def _counting(model: Model) -> Iterator[_Counter]:
    counter = _Counter()
    handle = model.bridge.register_forward_hook(counter)
    try:
        yield counter
    finally:
        handle.remove()


def _check_map(method: Method, model: Model, task: Task, sites: tuple[Site, ...], direction: str, scores: ScoreMap) -> None:
    needs_axis = any(set(site.axes) & set(POSITION_AXES) for site in sites)
    axis = task.position_axis() if needs_axis else None
    for site in sites:
        name = str(site)
        array, live = scores.data[name], scores.live[name].to_numpy()
        values = array.to_numpy()
        if scores.is_sparse(name):
            _check_cells(scores, name, cells_of(site).shape(model.arch, site, axis))
        else:
            _require(array.dims == ("example", *site.axes), f"{name} has the dims {array.dims}")
            _require(values.shape == (len(task), *cells_of(site).shape(model.arch, site, axis)), f"{name} has the shape {values.shape}")
        _require(not values.flags.writeable, f"the scores of {name} can be written to")
        if name in scores.provenance["not_scored"]:
            _require(bool(np.isnan(values).all()), f"{name} is not scored but has values")
            _require(len(scores.provenance["not_scored"][name]) > 10, f"{name} is not scored and nothing says why")
            continue
        there = scores.scored(name).to_numpy()
        if kinds := scores.provenance.get("readers_not_scored"):
            cut = np.isin(scores.graph.reader_kind, list(kinds))
            _require(bool(np.isnan(values[:, :, cut]).all()), f"{name} has values for readers that are not scored")
            _require(bool(there[scores.graph.allowed & ~cut].all()), f"{name} lacks values for readers that are scored")
        else:
            _require(bool(there[scores.exists(name).to_numpy()].all()), f"{name} has scores that are not finite")
        values, live = values[:, there], live[there]
        _require(bool(np.isfinite(values).all()), f"{name} has scores that are not finite")
        noise = None if scores.noise is None else scores.noise[name].to_numpy()
        _require(noise is not None and bool((noise > 0).any()), f"{name} has no noise floor")
        largest = float(np.abs(values).max(initial=0.0))
        _require(float(np.abs(values[:, ~live]).max(initial=0.0)) <= 1e-6 * largest, f"structural zeros of {name} are not zero")
    record = scores.provenance
    expected = {
        "method": method.name,
        "direction": direction,
        "metric": task.metric.name,
        "metric_unit": task.metric.unit,
        "task_fingerprint": task.fingerprint,
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    wrong = {key: record.get(key) for key, value in expected.items() if record.get(key) != value}
    _require(not wrong, f"the provenance says {wrong}; expected {expected}")
    for side in ("clean", "corrupted"):
        got = scores.data[f"metric_{side}"].to_numpy()
        true = _unpatched(model, task, side)
        _require(bool(np.allclose(got, true, rtol=1e-4, atol=1e-4)), f"metric_{side} is {got}; run by run it is {true}")


def _check_cells(scores: ScoreMap, name: str, shape: tuple[int, ...]) -> None:
    """The cells of a site of which only the runs show the cells: each once, in order, within its axes."""
    cells = scores.cells(name)
    _require(bool(len(cells)), f"{name} has no cells")
    _require(bool(((cells >= 0) & (cells < np.array(shape))).all()), f"{name} has cells outside of its axes, {shape}")
    _require(np.array_equal(cells, np.unique(cells, axis=0)), f"{name} has cells twice or out of order")
    _require(scores.data[name].dims == ("example", f"{name}.cell"), f"{name} has the dims {scores.data[name].dims}")


def _unpatched(model: Model, task: Task, side: str) -> Float[np.ndarray, " example"]:
    """The metric of each prompt, one by one."""
    values = []
    for pair in task.pairs:
        ids = {"clean": pair.clean_ids, "corrupted": pair.corrupted_ids}
        logits = {name: _logits(model, torch.tensor([tokens])) for name, tokens in ids.items()}
        if task.metric.reads == "answer":
            logits = {name: value[:, -1] for name, value in logits.items()}
        answers = Answers.of([list(pair.correct)], [list(pair.incorrect)], model.device)
        values.append(float(task.metric(logits[side], replace(answers, clean_logits=logits["clean"]))))
    return np.array(values)


def _same(first: ScoreMap, second: ScoreMap, order: list[int], rtol: float, message: str) -> None:
    for site in first.sites:
        one, other = first.data[site].to_numpy()[order], second.data[site].to_numpy()
        largest = float(np.nanmax(np.abs(one), initial=0.0))
        apart = float(np.nanmax(np.abs(one - other), initial=0.0))
        for before, after in ((first.noise, second.noise), (first.standard_error, second.standard_error)):
            if before is not None and after is not None:
                noise, again = before[site].to_numpy()[order], after[site].to_numpy()
                _require(np.allclose(noise, again, rtol=1e-2, atol=1e-6 * largest, equal_nan=True), f"{message}: the noise or error of {site}")
        _require(
            first.is_sparse(site) == second.is_sparse(site) and np.array_equal(first.cells(site), second.cells(site)), f"{message}: cells of {site}"
        )
        _require(np.array_equal(np.isnan(one), np.isnan(other)) and apart <= rtol * largest, f"{message}: {site} by {apart:.3g} of {largest:.3g}")


def _check_saved(scores: ScoreMap) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.nc"
        scores.save(path)
        loaded = ScoreMap.load(path)
    same = all(getattr(loaded, name).identical(getattr(scores, name)) for name in ("data", "live", "patterns", "no_path", "noise"))
    if scores.standard_error is not None:
        same = same and loaded.standard_error is not None and loaded.standard_error.identical(scores.standard_error)
    _require(same and loaded.provenance == scores.provenance and loaded.cost == scores.cost, "a saved map does not load as it was")


class _DeliberateError(Exception):
    """Raised by the failing metric."""


class _Failing:
    """A metric function that raises at a given call."""

    def __init__(self, metric: Metric, at: int | None) -> None:
        self.metric, self.at, self.calls = metric, at, 0

    def __call__(self, logits: Tensor, answers: Answers) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise _DeliberateError
        return self.metric.function(logits, answers)


def _check_exceptions(method: Method, model: Model, task: Task, names: list[str], direction: str, before: _State, calls: int) -> None:
    """Let the metric fail at its first, second and last evaluation."""
    for at in sorted({1, 2, calls}):
        failing = replace(task.metric, function=_Failing(task.metric, at))
        try:
            method.run(model, task.with_metric(failing), names, direction=direction, progress=False)
        except _DeliberateError:
            before.check(model, task, f"{method.name}, {direction}, after an exception in evaluation {at} of the metric")
            continue
        raise AssertionError(f"{method.name} swallows an exception in evaluation {at} of the metric")
