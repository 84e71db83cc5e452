"""Specs of runs: one canonical form and one key for all ways to write the same run."""

import itertools
import json
import shutil
from typing import Annotated, Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from patchlab.circuits import ABLATIONS
from patchlab.circuits.evaluation.curve import HOW
from patchlab.circuits.heldout import _LEAST
from patchlab.circuits.select import BY
from patchlab.errors import SweepError
from patchlab.methods.setting.setting import DIRECTIONS
from patchlab.models import DEMO_MODELS
from patchlab.models.load import _DTYPES
from patchlab.sweeps import spec as module
from patchlab.sweeps.content import file_content, folder_content, hub_content
from patchlab.sweeps.spec import Added, CircuitSpec, ModelSpec, RunSpec, ScoreSpec, TaskSpec, VerifySpec
from patchlab.tasks import GENERATORS

MODEL = ModelSpec(name="demo-gpt2-4l", content="sha256:0")


def run_of(what: Any, *, model: ModelSpec = MODEL, direction: Any = "denoising", batch_size: int = 32, **task: Any) -> RunSpec:
    return RunSpec(model=model, task=TaskSpec(**{"name": "ioi", **task}), direction=direction, what=what, batch_size=batch_size)


def score(method: str = "relp", sites: Any = "z") -> ScoreSpec:
    return ScoreSpec(method=method, sites=sites)


PINNED = {
    "score": lambda: run_of(score()),
    "several sites": lambda: run_of(score("exact", ["resid_pre", "z[layer,pos,head]"]), n=16, seed=1),
    "noising, integrated": lambda: run_of(score("relp+ig:5", "mlp_out"), direction="noising", name="agreement"),
    "options": lambda: run_of(score("atp"), name="agreement", options={"variant": "across_pp"}, metric="prob_diff"),
    "half precision": lambda: run_of(score("gim"), model=ModelSpec(name="x", dtype="bfloat16", content="hub:gpt2@abc"), name="greater_than"),
    "verified": lambda: run_of(VerifySpec(sites="z")),
    "verified, recall": lambda: run_of(VerifySpec(sites=["z", "mlp_out"], screen="atp@mean", k=10, recall=0.8, population=True, seed=3)),
    "circuit": lambda: run_of(CircuitSpec(method="relp")),
    "circuit, sizes": lambda: run_of(
        CircuitSpec(method="ig:5", ablation="mean", how="greedy", by="signed", sizes=(10, 20), random=0, smallest=False)
    ),
    "file": lambda: RunSpec(
        model=MODEL, task=TaskSpec(name="x.csv", path="/x.csv", content="sha256:1", options={"on_mismatch": "drop"}), what=score()
    ),
}
KEYS: dict[str, str] = {
    "score": "77f3e2b0563c68dee0555348ae915051c9d657f6075dd141cb2e79bf4f4a9b34",
    "several sites": "cfd72ad981abc232fafd808c82d73b8a7e085fb078bb81723afa4d624ce92b9d",
    "noising, integrated": "e4a07b279238049dabe0a3f9551b39b249579c4daa35a8ca5d6994f71e0c48ab",
    "options": "a89bb3485d2e91836429c1a29974c5833aa3305595f6a6cdf29519a552bd1c60",
    "half precision": "adf825efde7d00872630dc579a83b451fce5b6c24e30738b02cd0341e03e08aa",
    "verified": "2e25d36e3608c180316527b91e3ddd7102d07c587bbe8fe46d2c3413021bcfa7",
    "verified, recall": "3b4a3c3184c908e2be33bb23cf38b370b4a157e77b898b6714e36851150f59dc",
    "circuit": "6af670860b1a183c6825994fd216b057590a94bec3d715b66d35f9bbb60a8ae1",
    "circuit, sizes": "b672d0b3bf3f5b95a747f796079d101c48aaf01f24f9985e85369f8f573b6369",
    "file": "8d3ed1d12edf09d890b733d9b7a562cc7cd82dba18c89b03b706e944befb8c1c",
}


@pytest.mark.parametrize("name", PINNED)
def test_keys_stay_what_they_are(name):
    assert PINNED[name]().key == KEYS[name], "results that are stored would not be found again; mark a new field with Added"


def test_the_names_that_a_spec_lists_are_those_that_there_are():
    fields = CircuitSpec.model_fields
    assert set(get_args(fields["ablation"].annotation)) == set(ABLATIONS)
    assert set(get_args(fields["how"].annotation)) == set(HOW)
    assert set(get_args(fields["by"].annotation)) == set(BY)
    assert set(get_args(ModelSpec.model_fields["dtype"].annotation)) == set(_DTYPES)
    assert set(get_args(module.Direction)) == set(DIRECTIONS)
    assert CircuitSpec(method="relp").least == _LEAST


SAME = [
    (lambda: run_of(score("relp")), lambda: run_of(score("relp"), seed=0, n=32)),
    (lambda: run_of(score(sites="z")), lambda: run_of(score(sites=["z[layer,head]"]))),
    (lambda: run_of(score(sites="z, resid_pre")), lambda: run_of(score(sites=["resid_pre", "z[layer, head]"]))),
    (lambda: run_of(score("eap-ig:5")), lambda: run_of(score("ig-right:5"))),
    (lambda: run_of(score(), batch_size=8), lambda: run_of(score())),
    (lambda: run_of(score("exact[engine=auto]")), lambda: run_of(score("exact"))),
    (lambda: run_of(score(), metric="logit_diff"), lambda: run_of(score())),
    (lambda: run_of(score(), options={"order": "ABBA"}), lambda: run_of(score(), options={})),
    (lambda: run_of(score(), positions="S2, END"), lambda: run_of(score(), positions="S2,END")),
    (lambda: run_of(score(), model=MODEL.model_copy(update={"device": "cuda:1", "path": "/elsewhere", "name": "other"})), lambda: run_of(score())),
    (lambda: run_of(VerifySpec(sites="z", k=20)), lambda: run_of(VerifySpec(sites="z", screen="relp", confidence=0.95))),
    (lambda: run_of(VerifySpec(sites="z", target=1)), lambda: run_of(VerifySpec(sites="z", target="1e0"))),
    (lambda: run_of(CircuitSpec(method="relp", level=1)), lambda: run_of(CircuitSpec(method="relp", level=1.0))),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_runs_that_mean_the_same_have_one_key(one, other):
    assert one().canonical() == other().canonical()
    assert one().key == other().key


def test_runs_that_differ_in_anything_that_results_depend_on_have_unlike_keys():
    runs = [make() for make in PINNED.values()]
    runs += [
        run_of(score(), **task) for task in ({"seed": 1}, {"n": 31}, {"only_correct": True}, {"positions": "S2"}, {"options": {"order": "BABA"}})
    ]
    runs += [run_of(VerifySpec(sites="z", **fields)) for fields in ({"k": 19}, {"seed": 1}, {"subsets": 200}, {"sample": 0}, {"hierarchical": True})]
    runs += [run_of(score(), model=ModelSpec(name="demo-gpt2-4l", content=c, dtype=d)) for c, d in (("sha256:2", "float32"), ("sha256:0", "float64"))]
    runs += [run_of(VerifySpec(sites=["mlp_out", "z"])), run_of(VerifySpec(sites=["z", "mlp_out"])), run_of(score("relp@mean"))]
    assert len({run.key for run in runs}) == len(runs)


def test_a_field_that_is_added_later_leaves_the_keys_of_what_was_done_before():
    class Later(ScoreSpec):
        folds: Annotated[int, Added(old=1)] = 1
        scale: Annotated[float | None, Added(old=None)] = 2.0

    assert Later(method="relp", sites="z", scale=None).plain() == score().plain()
    assert Later(method="relp", sites="z", folds=2, scale=None).plain() == {**score().plain(), "folds": 2}
    assert Later(method="relp", sites="z").plain() == {**score().plain(), "scale": 2.0}, "a default may be another value than what was done before"


def test_an_old_value_counts_only_with_its_type():
    class Later(ScoreSpec):
        flag: Annotated[bool | int, Added(old=True)] = True

    assert "flag" in Later(method="relp", sites="z", flag=1).plain()


def test_an_option_of_a_generator_that_is_added_later_leaves_old_keys(monkeypatch):
    before = run_of(score()).key
    monkeypatch.setitem(module.ADDED_OPTIONS, ("ioi", "template"), "plain")
    without = run_of(score())
    assert "template" not in without.plain()["task"]["options"]
    assert without.key != before, "else the option would not have been in the key"
    assert run_of(score(), options={"template": "plain"}).key == without.key
    assert "mixed" in run_of(score(), options={"template": "mixed"}).canonical()


METHODS = st.sampled_from(["exact", "atp", "relp", "ig:5", "relp+ig:3", "lrp[ln,identity]@mean"])
SITES = st.lists(st.sampled_from(["z", "resid_pre", "q", "z[layer,pos,head]", "edges"]), min_size=1, unique=True)
FIELDS = {
    ScoreSpec: {"method": METHODS, "sites": SITES},
    VerifySpec: {
        "sites": SITES,
        "k": st.integers(1, 50),
        "recall": st.none() | st.floats(0.1, 1),
        "sample": st.none() | st.integers(0, 9),
        "confidence": st.floats(0.5, 0.99),
        "population": st.booleans(),
    },
    CircuitSpec: {
        "method": METHODS,
        "sizes": st.none() | st.sets(st.integers(0, 100), min_size=1).map(lambda found: tuple(sorted(found))),
        "level": st.floats(0.01, 1),
        "random": st.integers(0, 5),
    },
}
# made in the test and not by the strategy: making one imports modules that draw random numbers
WHAT = st.one_of([st.tuples(st.just(kind), st.fixed_dictionaries(fields)) for kind, fields in FIELDS.items()])


@settings(deadline=None, max_examples=60)
@given(what=WHAT, seed=st.integers(-5, 5), n=st.integers(8, 99), size=st.integers(1, 64), direction=st.sampled_from(["denoising", "noising"]))
def test_a_run_comes_back_from_json_with_its_key(what, seed, n, size, direction):
    kind, fields = what
    run = run_of(kind(**fields), direction=direction, seed=seed, n=n, batch_size=size)
    for again in (RunSpec.model_validate_json(run.model_dump_json()), RunSpec.model_validate(json.loads(json.dumps(run.model_dump(mode="json"))))):
        assert again == run
        assert again.key == run.key
        assert again.batch_size == size
    shuffled = json.dumps(dict(reversed(run.plain().items())), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert shuffled == run.canonical()
    assert json.loads(run.canonical()) == run.plain(), "nothing is lost on the way"


def test_runs_that_share_work_are_of_one_group():
    groups = [
        [run_of(score(method, sites)) for method in ("exact", "atp") for sites in (["z", "q"], ["q", "z"])],
        [run_of(score(sites="z"))],
        [run_of(score(sites=["z", "q"]), direction="noising")],
        [run_of(score(sites=["z", "q"]), seed=1)],
        [run_of(CircuitSpec(method=method, ablation=ablation)) for method in ("atp", "relp") for ablation in ("mean", "zero")],
        [run_of(score(sites="edges"))],
        [run_of(VerifySpec(sites=["q"])), run_of(score(sites="q"))],
    ]
    found = [{run.group for run in runs} for runs in groups]
    assert all(len(one) == 1 for one in found)
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(found, 2))


def test_fields_are_flat_and_keep_clashing_names_apart():
    verified = run_of(VerifySpec(sites="z", k=5, seed=7), seed=1).fields()
    assert (verified["seed"], verified["verify_seed"], verified["k"], verified["method"]) == (1, 7, 5, "relp")
    circuit = run_of(CircuitSpec(method="atp", sizes=(5, 9)), options={"order": "BABA"}).fields()
    assert (circuit["sizes"], circuit["sites"], circuit["order"], circuit["ablation"]) == ("5,9", "edges", "BABA", "resample")
    assert all(isinstance(value, str | int | float | bool | None) for value in {**verified, **circuit}.values())
    assert json.dumps(circuit)


def test_labels_tell_runs_apart():
    assert run_of(score("atp", "z"), options={"order": "BABA"}).label == "demo-gpt2-4l × ioi[32] order=BABA seed 0, denoising: atp on z"
    assert run_of(VerifySpec(sites="z")).label.endswith("verified by relp on z")
    assert run_of(CircuitSpec(method="atp", ablation="mean"), direction="noising").label.endswith("noising: circuits by atp, mean")


REFUSED = {
    "a truth value as a number": (lambda: TaskSpec(name="ioi", n=True), "valid integer"),
    "no pairs": (lambda: TaskSpec(name="ioi", n=0), "greater than or equal to 1"),
    "unknown task": (lambda: TaskSpec(name="ioii"), "did you mean 'ioi'"),
    "unknown option": (lambda: TaskSpec(name="ioi", options={"ordr": "ABBA"}), "did you mean 'order'"),
    "unknown value of an option": (lambda: TaskSpec(name="ioi", options={"order": "ABAB"}), "Valid: ABBA, BABA, mixed"),
    "type of an option": (lambda: TaskSpec(name="induction", options={"length": "8"}), "of type int"),
    "a field among options": (lambda: TaskSpec(name="ioi", options={"seed": 1}), "beside its name"),
    "option of a file": (lambda: TaskSpec(name="a.csv", content="sha256:0", options={"order": "ABBA"}), "on_mismatch"),
    "unknown metric": (lambda: TaskSpec(name="ioi", metric="logitdiff"), "did you mean 'logit_diff'"),
    "unknown method": (lambda: score("realp"), "did you mean 'relp'"),
    "a method without a map": (lambda: score("verified[relp]"), "gives no score map"),
    "unknown site": (lambda: score(sites="zz"), "did you mean 'z'"),
    "an address": (lambda: score(sites="L3.H1.z"), "is an address"),
    "no sites": (lambda: score(sites=[]), "no sites given"),
    "k and target": (lambda: VerifySpec(sites="z", k=3, target=0.1), "give one of them"),
    "recall above 1": (lambda: VerifySpec(sites="z", recall=1.5), "recall is 1.5"),
    "a text that is no number": (lambda: VerifySpec(sites="z", target="much"), "valid number"),
    "no number": (lambda: VerifySpec(sites="z", confidence=float("nan")), "finite"),
    "sizes that do not grow": (lambda: CircuitSpec(method="relp", sizes=(5, 5)), "each larger than the one before"),
    "level": (lambda: CircuitSpec(method="relp", level=0.0), "greater than 0"),
    "too few pairs": (lambda: run_of(CircuitSpec(method="relp"), n=7), "at least 8"),
    "too few pairs for halves": (lambda: run_of(CircuitSpec(method="relp", smallest=False), n=3), "at least 4"),
    "a seed of a file": (lambda: RunSpec(model=MODEL, task=TaskSpec(name="a.csv", content="sha256:0", seed=1), what=score()), "a file has no seed"),
    "unknown field": (lambda: ScoreSpec(method="relp", sites="z", site="q"), "Extra inputs"),  # type: ignore[call-arg]
    "device": (lambda: ModelSpec(name="x", device="gpu"), "cuda:1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValidationError, match=message):
        make()


def test_a_model_without_content_has_no_key():
    with pytest.raises(SweepError, match=r"content of the model x is not known.*ModelSpec\.of"):
        _ = run_of(score(), model=ModelSpec(name="x")).key


def test_specs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        run_of(score()).batch_size = 3


def test_a_model_is_known_by_what_is_in_it(tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(DEMO_MODELS["demo-gpt2-4l"], folder)
    packaged, copied = ModelSpec.of("demo-gpt2-4l"), ModelSpec.of("copy", folder=tmp_path)
    assert (packaged.content, packaged.path) == (copied.content, None)
    assert copied.path == str(folder)
    monkeypatch.chdir(tmp_path)
    assert ModelSpec.of(str(folder)).content == ModelSpec.of("./copy").content == copied.content
    (folder / "README.md").write_text("about it")
    assert folder_content(folder) == packaged.content
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        before = folder_content(folder)
        with (folder / name).open("ab") as file:
            file.write(b" ")
        assert folder_content(folder) != before


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SweepError, match="patchlab sweep prefetch"):
        ModelSpec.of("gpt2-that-nobody-has", folder=tmp_path)
    with pytest.raises(SweepError, match="there is no folder"):
        ModelSpec.of("./nowhere", folder=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SweepError, match=r"no config\.json"):
        ModelSpec.of("empty", folder=tmp_path)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(SweepError, match="no weights"):
        ModelSpec.of("empty", folder=tmp_path)


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(snapshot / file))
    with pytest.raises(SweepError, match="only in part in the hub cache"):
        hub_content("owner/name")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert hub_content("owner/name") == "hub:owner/name@c0ffee"
    assert ModelSpec.of("owner/name", folder=tmp_path).content == "hub:owner/name@c0ffee"


def test_a_task_file_is_known_by_what_is_in_it(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "copy.jsonl").write_text("{}\n")
    one, other = TaskSpec.of("pairs.jsonl", folder=tmp_path), TaskSpec.of(str(tmp_path / "copy.jsonl"))
    assert one.plain() == other.plain()
    assert one.path == str(tmp_path / "pairs.jsonl")
    (tmp_path / "copy.jsonl").write_text("{} \n")
    assert file_content(tmp_path / "copy.jsonl") != one.content
    with pytest.raises(SweepError, match="there is no task file"):
        TaskSpec.of("none.jsonl", folder=tmp_path)
    (tmp_path / "pairs.txt").write_text("")
    with pytest.raises(SweepError, match=r"ends in '\.txt'"):
        TaskSpec.of("pairs.txt", folder=tmp_path)


def test_a_data_set_is_known_by_the_files_of_its_split(tmp_path, monkeypatch):
    from huggingface_hub import constants

    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "0000.jsonl").write_text("{}\n")
    one, other = TaskSpec.of("data", folder=tmp_path), TaskSpec.of("data", folder=tmp_path, options={"split": "test"})
    (tmp_path / "data" / "train" / "0000.jsonl").write_text("{} \n")
    assert TaskSpec.of("data", folder=tmp_path).content != one.content
    assert TaskSpec.of("data", folder=tmp_path, options={"split": "test"}) == other
    with pytest.raises(SweepError, match="unknown split 'tset'"):
        TaskSpec.of("data", folder=tmp_path, options={"split": "tset"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SweepError, match=r"neither a generator nor a file or folder nor in the hub cache.*patchlab sweep prefetch"):
        TaskSpec.of("mib-bench/ioi", folder=tmp_path)
    repository = tmp_path / "hub" / "datasets--mib-bench--ioi"
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    assert TaskSpec.of("mib-bench/ioi", folder=tmp_path).content == "hub:mib-bench/ioi@c0ffee"
    assert TaskSpec.of("mib-bench/ioi", folder=tmp_path).path is None


def test_a_spec_loads_what_it_says(demo_gpt2_4l):
    found = TaskSpec(name="ioi", n=4, seed=2, metric="prob_diff", positions="S2,END", options={"order": "BABA"}).load(demo_gpt2_4l)
    assert (len(found), found.metric.name, found.scored_positions) == (4, "prob_diff", ("S2", "END"))
    assert found.provenance["seed"] == 2
    assert found.provenance["options"]["order"] == "BABA"
    asked = []
    ModelSpec(name="x", path="/folder", device="cpu", dtype="float64").load(lambda *names, **options: asked.append((names, options)))  # type: ignore[arg-type, return-value]
    assert asked == [(("/folder",), {"device": "cpu", "dtype": "float64"})]


def test_every_generator_has_a_spec():
    assert {TaskSpec(name=name).name for name in GENERATORS} == set(GENERATORS)
