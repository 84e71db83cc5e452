"""Plans of sweeps: passes as they are counted when runs are run, memory that does not suffice, and times in words."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mib_rows import COMMIT, arc, arithmetic, ioi, mcqa, put_in_cache
from paths import ROOT
from safetensors.torch import load_file

from patchlab import circuits
from patchlab.circuits import MIB_TASKS
from patchlab.circuits.evaluation.runner import Runner
from patchlab.circuits.heldout import three_sets
from patchlab.errors import ModelError, SweepError
from patchlab.methods.names import scoring_method
from patchlab.models import DEMO_MODELS
from patchlab.sweeps import plan as module
from patchlab.sweeps.file import read, runs_of
from patchlab.sweeps.plan import Plan, RunPlan, estimate, size, weight_bytes
from patchlab.sweeps.spec import CircuitSpec, ModelSpec, RunSpec, ScoreSpec, TaskSpec, VerifySpec

MODEL = ModelSpec.of("demo-gpt2-4l")


def run_of(what: Any, *, model: ModelSpec = MODEL, direction: Any = "denoising", batch_size: int = 3, **task: Any) -> RunSpec:
    return RunSpec(model=model, task=TaskSpec(**{"name": "ioi", "n": 8, **task}), direction=direction, what=what, batch_size=batch_size)


@pytest.fixture
def planned(demo_gpt2_4l):
    """The plan of runs of the packaged model, which is loaded already."""
    return lambda *runs, **options: estimate(runs, load=lambda *_, **__: demo_gpt2_4l, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "exact@zero", "exact@mean", "atp", "relp+ig:3", "atp+qk", "relp@mean"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_scores_take_the_passes_that_were_planned(planned, demo_gpt2_4l, method, direction):
    run = run_of(ScoreSpec(method=method, sites=["z", "q"]), direction=direction)
    (one,) = planned(run).runs
    found = scoring_method(method).run(
        demo_gpt2_4l, run.task.load(demo_gpt2_4l), list(run.what.sites), direction=direction, batch_size=run.batch_size, progress=False
    )
    assert (one.forwards, one.backwards) == (found.cost.forwards, found.cost.backwards)
    assert one.forwards > 2
    weights = sum(part.nbytes for part in (*demo_gpt2_4l.bridge.parameters(), *demo_gpt2_4l.bridge.buffers()))
    assert one.peak_bytes == found.cost.predicted_bytes + weights


@pytest.mark.parametrize("metric", ["neg_kl", "prob_diff"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("method", ["exact", "exact[engine=literal]@mean"])
def test_exact_patching_takes_the_passes_that_were_planned_with_every_metric(planned, demo_gpt2_4l, metric, direction, method):
    run = run_of(ScoreSpec(method=method, sites="z"), direction=direction, metric=metric)
    found = scoring_method(method).run(demo_gpt2_4l, run.task.load(demo_gpt2_4l), "z", direction=direction, batch_size=3, progress=False)
    assert planned(run).forwards == found.cost.forwards


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"k": 3},
        {"k": 3, "recall": 0.6},
        {"k": 2, "sample": 4, "hierarchical": True},
        {"k": 2, "sample": 0, "subsets": 32},
        {"target": 0.2},
        {"k": 16},
    ],
    ids=str,
)
def test_verified_patching_takes_no_more_than_was_planned(planned, demo_gpt2_4l, fields):
    run = run_of(VerifySpec(sites=["z[layer,pos,head]"], **fields))
    (one,) = planned(run).runs
    found = run.what.patching().run(demo_gpt2_4l, run.task.load(demo_gpt2_4l), list(run.what.sites), batch_size=run.batch_size, progress=False)
    assert found.cost.forwards <= one.forwards
    assert found.cost.backwards <= one.backwards
    assert "at most" in str(planned(run))


@pytest.mark.slow
def test_a_verified_sweep_is_a_sweep(planned, demo_gpt2_4l):
    run = run_of(VerifySpec(sites=["z"], k=16))
    (one,) = planned(run).runs
    found = run.what.patching().run(demo_gpt2_4l, run.task.load(demo_gpt2_4l), ["z"], batch_size=run.batch_size, progress=False)
    assert (one.forwards, one.backwards) == (found.cost.forwards, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        CircuitSpec(method="relp", random=2),
        CircuitSpec(method="relp-ah", sizes=(5, 50), random=0, ablation="mean"),
        CircuitSpec(method="atp", sizes=(10,), random=0, smallest=False, ablation="zero"),
    ],
    ids=lambda what: what.ablation,
)
def test_circuits_are_as_many_as_were_planned(planned, demo_gpt2_4l, monkeypatch, what):
    run = run_of(what, n=16, direction="noising")
    (one,) = planned(run).runs
    counted = []
    metric = Runner.metric

    def counting(self, some, **options):
        counted.append(len(some) * len(self.batches))
        return metric(self, some, **options)

    monkeypatch.setattr(Runner, "metric", counting)
    model, task = demo_gpt2_4l, run.task.load(demo_gpt2_4l)
    sets, (choosing, held) = three_sets(task, seed=run.task.seed), task.split(seed=run.task.seed)
    options: dict[str, Any] = {"batch_size": run.batch_size, "progress": False}
    scores = scoring_method(what.method).run(model, choosing, "edges", direction="noising", **options)
    options |= {"ablation": what.ablation, "train": choosing if what.ablation == "mean" else None, "n_boot": 0}
    circuits.faithfulness_curve(model, scores, held, sizes=what.sizes, random=what.random, **options)
    if what.smallest:
        circuits.smallest_faithful(model, scores, sets.finding, sets.reporting, level=0.01, **options)
    assert len(counted) == (3 if what.smallest else 1)
    batches = sum(len(part.batches(run.batch_size, model.device)) for part in ([held, sets.finding, sets.reporting] if what.smallest else [held]))
    means = len(counted) * len(choosing.batches(run.batch_size, model.device)) if what.ablation == "mean" else 0
    assert one.forwards == scores.cost.forwards + sum(counted) + 2 * batches + means
    assert one.backwards == scores.cost.backwards


def test_edge_scores_are_counted_once_for_the_circuits_that_share_them(planned):
    runs = [run_of(CircuitSpec(method=method, ablation=ablation, sizes=(5,))) for method in ("atp", "relp") for ablation in ("zero", "resample")]
    plan = planned(*runs, run_of(CircuitSpec(method="atp", ablation="zero", sizes=(5,)), seed=1))
    assert [one.shared for one in plan.runs] == [False, True, False, True, False]
    assert [one.backwards for one in plan.runs] == [2, 0, 2, 0, 2]
    assert [plan.runs[0].forwards - plan.runs[1].forwards, plan.runs[2].forwards - plan.runs[3].forwards] == [4, 4]
    assert "edge scores shared" in str(plan)


def test_constants_that_are_fitted_take_their_steps(planned):
    zero, optimal = planned(*(run_of(CircuitSpec(method="atp", ablation=one, sizes=(5,), random=0)) for one in ("zero", "optimal"))).runs
    assert optimal.backwards > 200 * 2
    assert optimal.seconds > 100 * zero.seconds


def test_a_run_that_would_fail_is_told_and_the_others_are_planned(planned):
    runs = [
        run_of(ScoreSpec(method="atp", sites="z")),
        run_of(ScoreSpec(method="atp", sites="z"), name="facts", n=5000),
        run_of(ScoreSpec(method="atp", sites="z"), positions="NOWHERE"),
        run_of(CircuitSpec(method="relp-ah")),
        run_of(CircuitSpec(method="atp", sizes=(10**9,))),
    ]
    plan = planned(*runs)
    assert [one.problem is None for one in plan.runs] == [True, False, False, False, False]
    for one, message in zip(plan.problems, ("distinct pairs", "NOWHERE", "scores", "sizes are whole numbers of edges"), strict=True):
        assert message in str(one.problem)
    assert "5 runs, 4 of which would fail" in str(plan)
    assert (plan.forwards, plan.backwards) == (plan.runs[0].forwards, plan.runs[0].backwards)


def test_a_model_that_cannot_be_loaded_leaves_the_others(demo_gpt2_4l):
    def load(name, **_):
        if name == "/broken":
            raise ModelError("the self-test refuses it")
        return demo_gpt2_4l

    broken = replace_model(path="/broken", content="sha256:1")
    plan = estimate([run_of(ScoreSpec(method="atp", sites="z"), model=broken), run_of(ScoreSpec(method="atp", sites="z"))], load=load)
    assert [one.problem for one in plan.runs] == ["the self-test refuses it", None]


def replace_model(**fields: Any) -> ModelSpec:
    return MODEL.model_copy(update=fields)


def test_a_run_that_cannot_fit_is_refused(planned, monkeypatch):
    run = run_of(ScoreSpec(method="exact", sites="resid_pre"))
    monkeypatch.setattr(module, "free_bytes", lambda device: 100_000)
    monkeypatch.setattr(module, "_check_weights", lambda *_: None)
    with pytest.raises(
        SweepError, match=r"ioi\[8\] seed 0, denoising: exact on resid_pre: it is predicted to need .* free on cpu\. Lower batch_size \(now 3\)"
    ):
        planned(run)


def test_a_model_whose_weights_cannot_fit_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: weight_bytes(MODEL) - 1)

    def load(*_, **__):
        raise AssertionError("it was loaded")

    with pytest.raises(SweepError, match=r"the weights of demo-gpt2-4l in float32 take 0\.9 MB, and .* are free on cpu\. Take a smaller dtype"):
        estimate([run_of(ScoreSpec(method="exact", sites="z"))], load=load)


def test_weights_take_what_their_files_say(demo_gpt2_4l, tmp_path):
    numbers = sum(part.numel() for part in load_file(DEMO_MODELS["demo-gpt2-4l"] / "model.safetensors").values())
    assert 0 < numbers <= sum(part.numel() for part in demo_gpt2_4l.bridge.parameters())
    assert weight_bytes(MODEL) == 4 * numbers
    assert weight_bytes(replace_model(dtype="bfloat16")) == 2 * numbers
    assert weight_bytes(ModelSpec(name="nobody-has-this", content="hub:x@y")) == 0
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(100))
    assert weight_bytes(ModelSpec(name="x", path=str(tmp_path))) == 100


def test_every_model_is_loaded_once_as_its_spec_says(demo_gpt2_4l):
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return demo_gpt2_4l

    runs = [run_of(ScoreSpec(method=m, sites="z"), model=replace_model(dtype=d)) for m in ("atp", "relp") for d in ("float32", "float64")]
    plan = estimate(runs, load=load)
    assert asked == [("demo-gpt2-4l", {"device": None, "dtype": dtype}) for dtype in ("float32", "float64")]
    assert [one.run for one in plan.runs] == runs
    assert list(plan.by_model) == ["demo-gpt2-4l", "demo-gpt2-4l (float64)"]
    assert sum(part.forwards for part in plan.by_model.values()) == plan.forwards


@pytest.mark.slow
def test_times_are_measured_while_there_is_time_and_scaled_after_that(planned):
    runs = [run_of(ScoreSpec(method="atp", sites="z"), model=replace_model(content=f"sha256:{i}")) for i in range(2)]
    assert "by the number of weights" not in planned(*runs, calibration=1e9).calibration
    plan = planned(*runs, calibration=0.0)
    assert "demo-gpt2-4l by the number of weights, for want of time" in plan.calibration
    assert all(0 < one.seconds < 10_000 for one in plan.runs)


def test_times_grow_with_the_work(planned):
    few, many = planned(*(run_of(ScoreSpec(method=method, sites="z")) for method in ("ig:5", "ig:50"))).runs
    assert 5 < many.seconds / few.seconds < 15
    shorter, longer = planned(*(run_of(ScoreSpec(method="atp", sites="z"), n=n) for n in (8, 80))).runs
    assert longer.seconds / shorter.seconds == pytest.approx(10, rel=0.2)


def test_a_plan_fits_the_terminal_and_is_plain_json(planned, monkeypatch):
    plan = planned(run_of(ScoreSpec(method="exact", sites=["resid_pre", "z", "q"])), run_of(VerifySpec(sites="z", k=3)))
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, str(plan).splitlines())) <= 60
    monkeypatch.delenv("COLUMNS")
    lines = str(plan).splitlines()
    assert lines[0] == "demo-gpt2-4l × ioi[8] seed 0, denoising"
    assert [line.split("  ")[1] for line in lines[1:3]] == ["exact on resid_pre,z,q", "verified by relp on z"]
    assert lines[3].startswith("demo-gpt2-4l: 2 runs; ")
    rows = json.loads(json.dumps([one.as_dict() for one in plan.runs], allow_nan=False))
    assert [row["key"] for row in rows] == [one.run.key for one in plan.runs]
    assert list(plan.table["forwards"]) == [one.forwards for one in plan.runs]
    unknown = Plan((RunPlan(plan.runs[0].run, problem="no"),))
    assert unknown.runs[0].as_dict()["seconds"] is None
    assert size(2e9) == "2.0 GB"


SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    # layers and heads of the papers' models in small: deeper models stay deeper, grouped heads stay grouped
    "gpt2": ("GPT2", {"n_layer": 2, "n_head": 2}),
    "gpt2-medium": ("GPT2", {"n_layer": 3, "n_head": 4}),
    "gpt2-large": ("GPT2", {"n_layer": 4, "n_head": 4}),
    "EleutherAI/pythia-70m": ("GPTNeoX", {"num_hidden_layers": 1, "num_attention_heads": 2}),
    "EleutherAI/pythia-410m": ("GPTNeoX", {"num_hidden_layers": 3, "num_attention_heads": 4}),
    "Qwen/Qwen2-0.5B": ("Qwen2", {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "Qwen/Qwen2-7B": ("Qwen2", {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "google/gemma-2-2b": ("Gemma2", {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
}


def small(folder: Path, family: str, sizes: dict[str, Any], vocabulary: int, tokenizer: Path = DEMO_MODELS["demo-gpt2"]) -> Path:
    """A folder with a model of a family with random weights, and a tokenizer, by default of the packaged models."""
    width = {"n_embd": 32, "n_positions": 64} if family == "GPT2" else {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=None, **width, **sizes)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    getattr(transformers, f"{family}{head}")(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.mark.slow
def test_the_study_of_the_paper_is_planned_without_a_network(tmp_path, demo_gpt2):
    file = read(ROOT / "examples" / "sweeps" / "relp_paper.yaml")
    assert set(file.model_names) == set(SHAPES)
    folders = {name: small(tmp_path / name, *shape, demo_gpt2.vocab_size) for name, shape in SHAPES.items()}
    runs = runs_of(file, models=folders)
    assert len(runs) == 8 * 3
    assert {(run.task.name, run.task.n, run.direction) for run in runs} == {("ioi", 100, "denoising")}
    assert {run.what.sites for run in runs} == {("resid_pre", "attn_out", "mlp_out")}
    assert {run.model.dtype for run in runs if run.model.name == "Qwen/Qwen2-7B"} == {"bfloat16"}
    plan = estimate(runs)
    assert not plan.problems
    cells = {}
    for name in SHAPES:
        exact, atp, relp = (one for one in plan.runs if one.run.model.name == name)
        batches = -(-100 // exact.run.batch_size)
        assert (atp.forwards, atp.backwards) == (relp.forwards, relp.backwards) == (2 * batches, batches)
        cells[name] = exact.forwards / batches - 2
    assert 0 < cells["gpt2"] < cells["gpt2-medium"] < cells["gpt2-large"], "deeper models have more cells"
    assert 0 < cells["EleutherAI/pythia-70m"] < cells["EleutherAI/pythia-410m"]
    assert 0 < cells["Qwen/Qwen2-0.5B"] < cells["Qwen/Qwen2-7B"] == cells["google/gemma-2-2b"]
    assert len(plan.by_model) == 8


MIB_SHAPES = {
    "gpt2": ("GPT2", {"n_layer": 2, "n_head": 4}),
    "Qwen/Qwen2.5-0.5B": ("Qwen2", {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "google/gemma-2-2b": ("Gemma2", {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
    "meta-llama/Llama-3.1-8B": ("Llama", {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1}),
}


@pytest.mark.slow
def test_the_track_of_mib_is_planned_without_a_network(tmp_path, shared_dir, monkeypatch):
    """Its models by small ones of their families, its data sets in a hub cache, made to their layout: every pair that the track has is a run."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = read(ROOT / "examples" / "sweeps" / "mib.yaml")
    assert set(file.model_names) == set(MIB_SHAPES)
    rows = {
        "ioi": ioi,
        "copycolors_mcqa": mcqa,
        "arithmetic_addition": arithmetic,
        "arithmetic_subtraction": arithmetic,
        "arc_easy": arc,
        "arc_challenge": arc,
    }
    assert set(file.task_names) == {f"mib-bench/{name}" for name in rows}
    people = ["Mary", "John", "Tom", "Anna", "Paul", "Mark", "Lisa", "Dan", "Kate", "James", "Peter"]
    for name, row in rows.items():
        data = {
            ioi: [ioi(one, other) for one in people for other in people if one != other],
            mcqa: [mcqa(("red", "blue", "green", colour), answer) for colour in ("gray", "black", "pink") for answer in range(4)],
            arithmetic: [arithmetic(one, two) for one in range(10, 21) for two in range(30, 40)],
            arc: [json.loads(json.dumps(arc()).replace("these", f"{i} things")) for i in range(100)],
        }[row]
        place = "4_answer_choices/train.jsonl" if row is mcqa else "data/train-00000-of-00001.jsonl"
        put_in_cache(tmp_path / "hub", f"mib-bench/{name}", *data, place=place)
    tokenizer = shared_dir / "data" / "tokenizers" / "gpt2"
    runs = runs_of(file, models={name: small(tmp_path / name, *shape, 50257, tokenizer) for name, shape in MIB_SHAPES.items()})
    pairs = {(run.model.name, run.task.name.removeprefix("mib-bench/")) for run in runs}
    assert len(pairs) == 12
    assert len(runs) == 6 * len(pairs)
    short = dict(zip(("gpt2", "qwen2.5", "gemma2", "llama3"), MIB_SHAPES, strict=True))
    tasks = {"ioi": "ioi", "mcqa": "copycolors_mcqa"} | {name: name.replace("-", "_") for name in MIB_TASKS if "-" in name}
    assert pairs == {(short[model], tasks[task]) for task, models in MIB_TASKS.items() for model in models if model in short}
    assert {run.model.dtype for run in runs if run.model.name != "gpt2"} == {"bfloat16"}
    plan = estimate([run for run in runs if run.what.method in ("atp", "relp")])
    reasons = {one.problem for one in plan.runs}
    assert reasons == {None}, reasons
    assert {one.run.task.content for one in plan.runs if "ioi" in one.run.task.name} == {f"hub:mib-bench/ioi@{COMMIT}"}


def test_studies_can_be_planned_with_other_batches(planned):
    run = run_of(ScoreSpec(method="exact", sites="resid_pre"))
    small_batch, large = planned(run.model_copy(update={"batch_size": 1}), run.model_copy(update={"batch_size": 8})).runs
    assert small_batch.forwards == 8 * large.forwards
    assert small_batch.peak_bytes < large.peak_bytes
    assert replace(small_batch, problem="x").as_dict()["problem"] == "x"
