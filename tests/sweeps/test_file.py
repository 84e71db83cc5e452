"""Files of sweeps: what they expand to, and what is said of files that cannot be read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from paths import ROOT

from patchlab.errors import SweepError
from patchlab.models import DEMO_MODELS
from patchlab.sweeps.document import LIMIT, Document
from patchlab.sweeps.file import MOST, read, runs_of, schema
from patchlab.tasks import TASKS

EXAMPLES = sorted((ROOT / "examples" / "sweeps").glob("*.yaml"))
ISSUE = """
version: 1
name: methods
models: [demo-gpt2-4l, demo-llama]
tasks:
  - {name: ioi, n: 16, seed: [0, 1]}        # a list anywhere is a grid
  - {name: agreement, n: 16, options: {variant: across_rc}}
directions: [denoising]
runs:
  - {kind: score, methods: [exact, atp, relp], sites: [resid_pre, z]}
  - {kind: circuit, methods: [atp, relp], ablation: [resample, mean]}
"""
HEAD = "version: 1\nmodels: [demo-gpt2-4l]\ntasks: [ioi]\n"
RUNS = "runs:\n  - {kind: score, methods: [relp], sites: [z]}\n"


@pytest.fixture
def expanded(tmp_path):
    """The runs of a text."""

    def runs(text, name="sweep.yaml", **options):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return runs_of(read(path), **options)

    return runs


def labels(runs):
    return [run.label for run in runs]


def test_a_file_is_the_product_of_its_lists(expanded):
    runs = expanded(ISSUE)
    assert len(runs) == 3 * 2 * 3 + 3 * 2 * 2 * 2 == 42
    assert len({run.key for run in runs}) == 42
    assert {run.batch_size for run in runs} == {32}
    first = "demo-gpt2-4l × ioi[16] seed 0, denoising: "
    assert labels(runs)[:7] == [
        *(f"{first}{method} on resid_pre,z" for method in ("exact", "atp", "relp")),
        *(f"{first}circuits by {method}, {ablation}" for method in ("atp", "relp") for ablation in ("resample", "mean")),
    ]
    about = [(run.model.name, run.task.name, run.task.seed) for run in runs]
    tasks = [("ioi", 0), ("ioi", 1), ("agreement", 0)]
    assert list(dict.fromkeys(about)) == [(model, *task) for model in ("demo-gpt2-4l", "demo-llama") for task in tasks]
    assert about == sorted(about, key=list(dict.fromkeys(about)).index), "the runs of one model and task stand together"


def test_the_same_runs_in_other_words_have_the_same_keys(expanded, tmp_path):
    shutil.copytree(DEMO_MODELS["demo-gpt2-4l"], tmp_path / "copy")
    other = """
    runs:
      - sites: ["z[layer,head]", resid_pre]
        methods: ["exact[engine=auto]", eap, relp]
        kind: score
      - {methods: [eap, relp], kind: circuit, ablation: [resample, mean], level: 0.9}
    tasks:
      - {seed: [0, 1], n: 16, name: ioi, options: {order: ABBA}}
      - {name: agreement, n: 16, metric: logit_diff}
    models: [COPY, {name: demo-llama, dtype: float32, device: cpu, batch_size: 4}]
    version: 1
    """
    wanted = sorted(run.key for run in expanded(ISSUE))
    for name in ("copy", "./copy", str(tmp_path / "copy")):
        assert sorted(run.key for run in expanded(other.replace("COPY", name))) == wanted


def test_every_list_is_a_grid_but_those_that_belong_together(expanded):
    runs = expanded(
        """
version: 1
models: {name: demo-gpt2-4l, dtype: [float32, float64]}
tasks: {name: [ioi], n: [8, 16], options: [{order: [ABBA, BABA]}, {corruption: abc}], positions: [S2, "S2,END"], only_correct: [true, false]}
runs:
  - {kind: score, methods: relp, sites: [[z, q], [z]]}
  - {kind: circuit, methods: relp, sizes: [[5, 10], null], random: [0, 1], smallest: false}
"""
    )
    assert len(runs) == 2 * (2 * 3 * 2 * 2) * (2 + 2 * 2)
    assert {run.what.sites for run in runs} == {("z", "q"), ("z",), ("edges",)} or {run.what.sites for run in runs} == {
        ("q", "z"),
        ("z",),
        ("edges",),
    }
    assert {getattr(run.what, "sizes", "-") for run in runs} == {(5, 10), None, "-"}


def test_a_list_of_sites_is_one_run(expanded):
    (run,) = expanded(HEAD + "runs: {kind: score, methods: relp, sites: [z, resid_pre, mlp_out]}")
    assert set(run.what.sites) == {"z", "resid_pre", "mlp_out"}
    (run,) = expanded(HEAD + 'runs: {kind: score, methods: relp, sites: "z, resid_pre"}')
    assert set(run.what.sites) == {"z", "resid_pre"}
    (run,) = expanded(HEAD + "runs: {kind: circuit, methods: relp, sizes: [5, 10, 20]}")
    assert run.what.sizes == (5, 10, 20)


def test_directions_and_batch_sizes_of_items_go_before_those_of_the_file(expanded):
    runs = expanded(
        """
version: 1
models: [demo-gpt2-4l, {name: demo-llama, batch_size: 4}]
tasks: [ioi]
directions: [denoising, noising]
batch_size: 8
runs:
  - {kind: score, methods: atp, sites: z}
  - {kind: score, methods: relp, sites: z, directions: noising, batch_size: 2}
"""
    )
    found = [(run.model.name, run.direction, run.what.method, run.batch_size) for run in runs]
    assert found == [
        ("demo-gpt2-4l", "denoising", "atp", 8),
        ("demo-gpt2-4l", "noising", "atp", 8),
        ("demo-gpt2-4l", "noising", "relp", 2),
        ("demo-llama", "denoising", "atp", 4),
        ("demo-llama", "noising", "atp", 4),
        ("demo-llama", "noising", "relp", 2),
    ]


def test_include_adds_runs_of_models_and_tasks_of_their_own(expanded):
    included = """
include:
  - {kind: verify, sites: z, k: [5, 10], models: demo-llama, tasks: [{name: induction, n: 8}], directions: noising}
  - {kind: score, methods: atp, sites: z, models: [demo-gpt2-4l], tasks: ioi}
"""
    runs = expanded(HEAD + RUNS + included)
    assert labels(runs) == [
        "demo-gpt2-4l × ioi[32] seed 0, denoising: relp on z",
        "demo-gpt2-4l × ioi[32] seed 0, denoising: atp on z",
        *["demo-llama × induction[8] seed 0, noising: verified by relp on z"] * 2,
    ]
    assert labels(expanded("version: 1\n" + included)) == [labels(runs)[i] for i in (2, 3, 1)]


def test_exclude_takes_out_what_matches_all_of_its_fields(expanded):
    text = """
version: 1
models: [demo-gpt2-4l, demo-llama]
tasks: [{name: ioi, seed: [0, 1], options: {order: [ABBA, BABA]}}]
runs:
  - {kind: score, methods: [exact, relp], sites: [[z, q], [z]]}
  - {kind: circuit, methods: relp, ablation: [resample, mean]}
exclude:
"""
    everything = expanded(text.replace("exclude:", ""))
    assert len(everything) == 2 * 4 * (4 + 2)
    cases = {
        "- {model: demo-llama}": lambda f: f["model"] == "demo-llama",
        "- {model: demo-llama, seed: 1, order: BABA}": lambda f: (f["model"], f["seed"], f["order"]) == ("demo-llama", 1, "BABA"),
        "- {method: eap, sites: z}\n": None,
        "- {method: exact, sites: [q, 'z[layer,head]']}": lambda f: (f["method"], f["sites"]) == ("exact", "z,q"),
        "- {ablation: [mean, resample], seed: 0}\n  - {kind: score, seed: 1}": lambda f: (f["kind"] == "score") == (f["seed"] == 1),
    }
    for item, gone in cases.items():
        if gone is None:
            with pytest.raises(SweepError, match='no run has method "atp"'):
                expanded(f"{text}  {item}")
            continue
        left = [run.key for run in everything if not gone(run.fields())]
        assert 0 < len(left) < len(everything)
        assert [run.key for run in expanded(f"{text}  {item}")] == left


def test_exclude_leaves_what_is_included(expanded):
    included = "include: {kind: score, methods: atp, sites: z, models: demo-gpt2-4l, tasks: ioi}"
    runs = expanded(HEAD + RUNS.replace("[relp]", "[relp, atp]") + "exclude: {method: atp}\n" + included)
    assert [run.what.method for run in runs] == ["relp", "atp"]


def test_files_are_looked_for_beside_the_sweep(expanded, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    text = HEAD.replace("[ioi]", "[FILE]") + RUNS
    keys = {expanded(text.replace("FILE", name))[0].key for name in ("pairs.jsonl", "./pairs.jsonl", str(tmp_path / "pairs.jsonl"))}
    assert len(keys) == 1


def test_models_can_be_replaced_for_a_trial(expanded):
    text = HEAD.replace("demo-gpt2-4l", "gpt2, demo-llama") + RUNS
    one, other = expanded(text, models={"gpt2": DEMO_MODELS["demo-gpt2-4l"]})
    assert (one.model.name, one.model.path, other.model.path) == ("gpt2", str(DEMO_MODELS["demo-gpt2-4l"]), None)
    with pytest.raises(SweepError, match="unknown model to replace 'gpt3'; did you mean 'gpt2'"):
        expanded(text, models={"gpt3": "x"})


def test_a_number_as_yaml_1_2_writes_it_is_a_number_where_one_is_wanted(expanded):
    (run,) = expanded(HEAD + "runs: {kind: verify, sites: z, target: 1e-2}")
    assert run.what.target == 0.01
    assert expanded(HEAD + "runs: {kind: verify, sites: z, target: 0.01}")[0].key == run.key


def test_the_name_of_a_sweep_is_that_in_the_file_or_of_it(tmp_path):
    for text, name in ((HEAD + RUNS, "a.b"), (HEAD + RUNS + "name: c\n", "c")):
        (tmp_path / "a.b.yaml").write_text(text)
        assert read(tmp_path / "a.b.yaml").name == name


def task(text):
    return HEAD.replace("[ioi]", f"[{text}]") + RUNS


def run(text, head=HEAD):
    return f"{head}runs:\n  - {text}\n"


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
BAD = {
    "empty": ("", 0, "is empty; a sweep begins with 'version: 1'"),
    "comments only": ("# later\n", 0, "is empty"),
    "two documents": (f"---\n{HEAD}{RUNS}---\nversion: 1\n", 7, "a second document begins here"),
    "a text": ("just text\n", 1, 'a mapping that begins with .version: 1.; got "just text"'),
    "a list": ("- version: 1\n", 1, "a mapping that begins with"),
    "no version": (HEAD.replace("version: 1\n", "") + RUNS, 1, "'version' is missing; add 'version: ...'"),
    "another version": (HEAD.replace("1", "2") + RUNS, 1, "version: this is version 2 of the format, and this patchlab reads version 1"),
    "version as a text": (HEAD.replace("1", "'1'") + RUNS, 1, 'version: version is the number 1; got "1"'),
    "unknown key": (HEAD + RUNS.replace("runs", "rnus"), 4, "rnus: unknown key 'rnus'; did you mean 'runs'? Valid: batch_size, "),
    "unknown key of a run": (run("{kind: score, method: relp, sites: z}"), 5, "runs[0].score.method: unknown key 'method'; did you mean 'methods'?"),
    "key of another kind": (
        run("{kind: score, methods: relp, sites: z, ablation: mean}"),
        5,
        "unknown key 'ablation'; Valid: batch_size, directions",
    ),
    "unknown kind": (run("{kind: scroe, methods: relp}"), 5, "runs[0]: unknown kind of run 'scroe'; did you mean 'score'? Valid: circuit, features"),
    "no kind": (run("{methods: relp, sites: z}"), 5, "runs[0]: an item of runs says what kind it is: 'kind: score' (or verify, circuit, features)"),
    "no sites": (run("{kind: score, methods: relp}"), 5, "runs[0].score: 'sites' is missing"),
    "unknown method": (
        run("{kind: score, methods: [relp, realp], sites: z}"),
        5,
        "runs[0].score.methods[1]: unknown method 'realp'; did you mean 'relp'?",
    ),
    "unknown method in a block": (
        run("kind: score\n    sites: z\n    methods:\n      - relp\n      - atpp"),
        9,
        "runs[0].score.methods[1]: unknown method 'atpp'; did you mean 'atp'?",
    ),
    "unknown site of dictionaries": (
        run("{kind: features, methods: relp, points: [mlp_out, mlp_uot]}"),
        5,
        "runs[0].features.points[1]: unknown site of dictionaries 'mlp_uot'; did you mean 'mlp_out'?",
    ),
    "dictionaries that are not there": (
        run("{kind: features, methods: relp, dictionaries: [demo-gpt2, saes]}"),
        5,
        "runs[0].features.dictionaries[1]: there is no folder of dictionaries ",
    ),
    "a model without dictionaries": (
        run("{kind: features, methods: relp}"),
        5,
        "runs[0].features: no dictionaries are packaged for the model demo-gpt2-4l; give 'dictionaries: FOLDER'. Packaged are those of: demo-",
    ),
    "features in a mean": (run("{kind: features, methods: [relp, relp@mean]}"), 5, "runs[0].features.methods[1]: features are compared between the"),
    "one resample": (run("{kind: circuit, methods: relp, stability: [0, 1]}"), 5, "runs[0].circuit.stability[1]: stability compares resamples"),
    "unknown screen": (run("{kind: verify, screen: [relp, rleap], sites: z}"), 5, "runs[0].verify.screen[1]: unknown method 'rleap'"),
    "unknown site": (run("{kind: score, methods: relp, sites: [z, zz]}"), 5, "runs[0].score.sites[1]: unknown site 'zz'; did you mean 'z'?"),
    "unknown site in a grid": (run("{kind: score, methods: relp, sites: [[z], [q, zz]]}"), 5, "runs[0].score.sites[1][1]: unknown site 'zz'"),
    "sites and a list of sites": (run("{kind: score, methods: relp, sites: [[z], q]}"), 5, "sites: either one list, whose values belong together"),
    "site twice": (run("{kind: score, methods: relp, sites: [z, 'z[layer,head]']}"), 5, "runs[0].score.sites: the site z is named twice"),
    "empty grid": (run("{kind: score, methods: [], sites: z}"), 5, "runs[0].score.methods: methods is empty; give at least one value"),
    "no sites in a list": (run("{kind: score, methods: relp, sites: []}"), 5, "runs[0].score.sites: no sites given"),
    "no runs": (HEAD + "runs: []\n", 4, "runs: runs is empty"),
    "nothing to run": (HEAD, 1, "the file has no runs; give at least one item under 'runs:'"),
    "runs without tasks": (HEAD.replace("tasks: [ioi]\n", "") + RUNS, 3, "runs without tasks; list at least one under 'tasks:'"),
    "models that nothing uses": (
        "version: 1\nmodels: [demo-llama]\ninclude: {kind: score, methods: relp, sites: z, models: demo-llama, tasks: ioi}\n",
        2,
        "models: models without runs would be ignored",
    ),
    "a method twice": (
        run("{kind: score, methods: [relp, atp, relp], sites: z}"),
        5,
        "runs[0].score.methods[2]: the same run as runs[0].score.methods[0] in line 5",
    ),
    "a run twice, in other words": (
        HEAD + "runs:\n  - {kind: score, methods: eap-ig:5, sites: z}\n  - {kind: score, methods: 'ig-right:5', sites: ['z[layer,head]']}\n",
        6,
        "runs[1].score: the same run as runs[0].score in line 5: demo-gpt2-4l × ioi[32]",
    ),
    "a task twice": (task("ioi, {name: ioi, n: 32}"), 3, "tasks[1]: the same run as tasks[0] in line 3"),
    "a seed twice": (task("{name: ioi, seed: [0, 1, 0]}"), 3, "tasks[0].seed[2]: the same run as tasks[0].seed[0]"),
    "a direction twice": (HEAD + RUNS + "directions: [noising, noising]\n", 6, "directions[1]: the direction noising stands twice"),
    "a key twice": (HEAD + RUNS + "tasks: [agreement]\n", 6, "the key 'tasks' stands twice, here and in line 3"),
    "a name with brackets": (run("{kind: score, methods: [lrp[ln,identity]], sites: z}"), 5, 'stand in quotes: "lrp[ln,identity]"'),
    "a number as a text": (task("{name: ioi, n: '16'}"), 3, 'tasks[0].n: n is a whole number; got "16". Write the number without quotes'),
    "1e3 as a whole number": (run("{kind: verify, sites: z, k: 1e3}"), 5, 'runs[0].verify.k: k is a whole number; got "1e3". Write the number'),
    "a truth value as a number": (task("{name: ioi, n: true}"), 3, "tasks[0].n: n is a whole number; got true."),
    "a number as a truth value": (
        run("{kind: verify, sites: z, population: 1}"),
        5,
        "runs[0].verify.population: population is true or false; got 1.",
    ),
    "a fraction of a pair": (task("{name: ioi, n: 16.5}"), 3, "tasks[0].n: n is a whole number; got 16.5"),
    "an octal number": (task("{name: ioi, n: 010}"), 3, "010 is another number in YAML than it looks like"),
    "minutes and seconds": (task("{name: ioi, n: 1:30}"), 3, "1:30 is another number in YAML than it looks like"),
    "no pairs": (task("{name: ioi, n: [16, 0]}"), 3, "tasks[0].n[1]: n must be at least 1; got 0."),
    "not a number": (run("{kind: verify, sites: z, recall: .nan}"), 5, "runs[0].verify.recall: recall is a finite number"),
    "a batch of nothing": (
        HEAD.replace("demo-gpt2-4l", "{name: demo-gpt2-4l, batch_size: 0}") + RUNS,
        2,
        "models[0].batch_size: batch_size must be at least 1",
    ),
    "a grid of batch sizes": (HEAD + RUNS + "batch_size: [8, 16]\n", 6, "batch_size: batch_size is a whole number; got [8, 16]"),
    "unknown task": (task("ioi, ioii"), 3, "tasks[1]: unknown task 'ioii'; did you mean 'ioi'? Valid: agreement, "),
    "no such file": (task("none.jsonl"), 3, "tasks[0]: there is no task file "),
    "a task without name": (task("{n: 3}"), 3, "tasks[0]: 'name' is missing"),
    "unknown option": (
        task("{name: ioi, options: {ordr: ABBA}}"),
        3,
        "tasks[0].options.ordr: unknown option of the task ioi 'ordr'; did you mean 'order'?",
    ),
    "unknown value of an option": (
        task("{name: ioi, options: {order: [ABBA, ABAB]}}"),
        3,
        "tasks[0].options.order[1]: unknown order 'ABAB'; did you mean 'BABA'?",
    ),
    "an option that is none": (task("{name: ioi, options: {n: 3}}"), 3, "tasks[0].options.n: n is not an option of a task"),
    "a mapping as an option": (task("{name: ioi, options: {order: {a: b}}}"), 3, "tasks[0].options.order: a text, a number or a truth value"),
    "unknown metric": (task("{name: ioi, metric: logitdiff}"), 3, "tasks[0].metric: unknown metric 'logitdiff'; did you mean 'logit_diff'?"),
    "unknown model": (HEAD.replace("demo-gpt2-4l", "demo-gpt3") + RUNS, 2, "models[0]: the model 'demo-gpt3' is neither packaged nor a folder"),
    "no such folder": (HEAD.replace("demo-gpt2-4l", "./nowhere") + RUNS, 2, "models[0]: there is no folder "),
    "unknown dtype": (
        HEAD.replace("demo-gpt2-4l", "{name: demo-gpt2-4l, dtype: [float32, float31]}") + RUNS,
        2,
        "models[0].dtype[1]: unknown dtype 'float31'",
    ),
    "unknown device": (
        HEAD.replace("demo-gpt2-4l", "{name: demo-gpt2-4l, device: gpu}") + RUNS,
        2,
        "models[0].device: unknown device 'gpu'; give cpu",
    ),
    "a truth value as a name": (
        HEAD.replace("demo-gpt2-4l", "yes") + RUNS,
        2,
        "models[0]: an item is a name or a mapping such as {name: gpt2}; got true",
    ),
    "a date as a name": (
        HEAD.replace("demo-gpt2-4l", "{name: 2024-01-01}") + RUNS,
        2,
        "models[0].name: name is a text; got 2024-01-01. Put a text in quotes.",
    ),
    "unknown direction": (HEAD + "directions: [nosing]\n" + RUNS, 4, "directions[0]: unknown direction 'nosing'; did you mean 'noising'?"),
    "unknown ablation": (
        run("{kind: circuit, methods: relp, ablation: [mean, men]}"),
        5,
        "runs[0].circuit.ablation[1]: unknown ablation 'men'; did you mean 'mean'?",
    ),
    "a level beyond reach": (run("{kind: circuit, methods: relp, level: 1.5}"), 5, "runs[0].circuit.level: level must be at most 1; got 1.5"),
    "sizes that shrink": (run("{kind: circuit, methods: relp, sizes: [10, 5]}"), 5, "runs[0].circuit.sizes: sizes are numbers of edges"),
    "a size that is none": (run("{kind: circuit, methods: relp, sizes: [10, x]}"), 5, 'runs[0].circuit.sizes[1]: sizes is a whole number; got "x"'),
    "too few pairs for a circuit": (
        run("{kind: circuit, methods: relp}", HEAD.replace("ioi", "{name: ioi, n: [16, 6]}")),
        3,
        "tasks[0].n[1]: 6 pairs cannot be cut",
    ),
    "k and target": (run("{kind: verify, sites: z, k: 3, target: 0.1}"), 5, "runs[0].verify.target: k and target say in two ways"),
    "exact patching as a screen": (run("{kind: verify, sites: z, screen: exact}"), 5, "runs[0].verify: the screen is exact patching itself"),
    "an exclude that matches nothing": (
        HEAD + RUNS + "exclude:\n  - {method: [relp, atp]}\n",
        7,
        'exclude[0].method[1]: this exclude matches nothing: no run has method "atp"',
    ),
    "an exclude of an unknown field": (
        HEAD + RUNS + "exclude: [{methd: relp}]\n",
        6,
        "exclude[0].methd: unknown field of a run 'methd'; did you mean 'method'?",
    ),
    "an exclude of everything": (HEAD + RUNS + "exclude: [{method: relp}]\n", 6, "exclude: every run is excluded"),
    "an empty exclude": (HEAD + RUNS + "exclude: [{}]\n", 6, "exclude[0]: exclude is empty"),
    "an include without models": (
        HEAD + RUNS + "include:\n  - {kind: score, methods: atp, sites: z, tasks: ioi}\n",
        7,
        "include[0].score: 'models' is missing",
    ),
    "an include that is there already": (
        HEAD + RUNS + "include:\n  - {kind: score, methods: relp, sites: z, models: demo-gpt2-4l, tasks: ioi}\n",
        7,
        "include[0].score: the same run as runs[0].score in line 5",
    ),
    "a tab": ("version: 1\ntasks:\n\t- ioi\n", 3, "a tab where YAML has spaces"),
    "an anchor in itself": ("version: 1\nmodels: &a [*a]\n", 2, "this anchor (&NAME) contains itself"),
    "an anchor in itself, further down": ("version: 1\nmodels: &a\n  - {name: [x, *a]}\n", 2, "contains itself"),
    "aliases of aliases of aliases": (f"version: 1\n{BOMB}", 2, "with its aliases (*NAME) written out the file has more than 100,000 values"),
    "an alias of nothing": ("version: 1\nmodels: *nobody\n", 2, "undefined alias"),
    "a bracket that is not closed": ("version: 1\nmodels: [a\ntasks: [b]\n", 3, "expected ',' or ']'"),
    "a tag": ("version: 1\nmodels: !!python/object/apply:os.system [ls]\n", 2, "the tag tag:yaml.org,2002:python/object/apply:os.system is not read"),
    "a merge key": ("version: 1\n<<: {tasks: ioi}\n", 2, "merge keys (<<) are not read"),
    "a number as a key": ("version: 1\n3: ioi\n", 2, "a key is a text; got '3'"),
    "nested too deeply": (f"version: 1\nmodels: {'[' * 3000}{']' * 3000}\n", 0, "nested too deeply"),
    "a control character": ("version: 1\nmodels: [\x01]\n", 2, r"the character '\x01' cannot stand in YAML"),
    "too many runs": (task(f"{{name: ioi, seed: {list(range(400))}, n: {list(range(1, 400))}}}"), 1, f"a sweep has at most {MOST:,}"),
    "far too many runs": (
        task(f"{{name: ioi, seed: {list(range(4000))}, n: {list(range(1, 4000))}, metric: [a, b]}}").replace("[a, b]", "[logit_diff, prob_diff]"),
        1,
        "make at least 31,992,000 runs",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_told_with_place_and_fix(name, tmp_path):
    text, line, message = BAD[name]
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SweepError) as caught:
        runs_of(read(path))
    found = str(caught.value)
    assert found.startswith(f"{path}, line {line}" if line else f"{path} "), found
    assert re.search(message, found) if "." in message and message not in found else message in found, found
    assert "\n" not in found
    assert "pydantic" not in found


def test_files_that_are_no_text_are_told(tmp_path, monkeypatch):
    path = tmp_path / "sweep.yaml"
    with pytest.raises(SweepError, match=r"cannot read .*sweep\.yaml: No such file"):
        read(path)
    with pytest.raises(SweepError, match="Is a directory"):
        read(tmp_path)
    path.write_bytes(b"version: 1\nname: caf\xe9\n")
    with pytest.raises(SweepError, match="line 2: the byte 0xe9 is not UTF-8; save the file as UTF-8"):
        read(path)
    path.write_bytes((HEAD + RUNS).encode("utf-16"))
    with pytest.raises(SweepError, match="not UTF-8"):
        read(path)
    path.write_bytes(b"#" * 10_000_000)
    with pytest.raises(SweepError, match=f"more than {LIMIT:,} bytes"):
        read(path)
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + RUNS).encode())
    assert len(runs_of(read(path))) == 1, "a byte order mark is no hindrance"

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(SweepError, match=r"cannot read .*sweep\.yaml: Permission denied"):
        read(path)


def test_an_alias_is_what_it_stands_for(expanded):
    runs = expanded(HEAD + "runs:\n  - {kind: score, methods: &m [atp, relp], sites: z}\n  - {kind: circuit, methods: *m}\n")
    assert [run.what.method for run in runs] == ["atp", "relp"] * 2


def test_the_first_error_of_several_is_told_and_how_many_follow(expanded):
    with pytest.raises(SweepError, match=r"line 3, tasks\[0\]\.n: .* \(2 more to correct after that\.\)"):
        expanded(run("{kind: score, methods: [realp], sites: [zz]}", HEAD.replace("ioi", "{name: ioi, n: 0}")))


def test_the_place_of_a_value(tmp_path):
    (tmp_path / "a.yaml").write_text("version: 1\nruns:\n  - kind: score\n    sites:\n      - z\n      - q\n")
    document = Document.read(tmp_path / "a.yaml")
    place = ("runs", 0, "score", "sites", 1)
    assert (document.line(place), document.path_of(place), document.has(place)) == (6, "runs[0].score.sites[1]", True)
    assert not document.has((*place, 0))
    assert not document.has(("runs", 0, "circuit"))
    assert document.line(("runs", 0, "score", "methods", 3)) == 3


def test_the_schema_takes_what_is_read_and_refuses_what_is_not():
    checker = Draft202012Validator(schema())
    Draft202012Validator.check_schema(schema())
    for path in EXAMPLES:
        assert not list(checker.iter_errors(yaml.safe_load(path.read_text())))
    good = yaml.safe_load(ISSUE)
    assert not list(checker.iter_errors(good))
    for change in ({"rnus": []}, {"version": 2}, {"models": []}, {"directions": "nosing"}, {"runs": [{"kind": "scroe"}]}, {"tasks": [{"n": 3}]}):
        assert list(checker.iter_errors({**good, **change})), change
    for item in (
        {"kind": "score", "methods": "relp"},
        {"kind": "circuit", "methods": "relp", "ablation": ["men"]},
        {"kind": "verify", "sites": "z", "method": "a"},
    ):
        assert list(checker.iter_errors({**good, "runs": [item]})), item
    assert json.dumps(schema())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_shipped_studies_have_a_head_and_their_own_name(path):
    assert read(path).name == path.stem
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"patchlab sweep plan examples/sweeps/{path.name}" in text


@pytest.mark.parametrize(("name", "n_runs"), [("methods", 2 * (6 + 4) * 2 * 10 + 2 * 3 * (10 + 8)), ("relp_rules", 2 * 3 * 11)])
def test_shipped_studies_of_packaged_models_expand(name, n_runs):
    runs = runs_of(read(ROOT / "examples" / "sweeps" / f"{name}.yaml"))
    assert len(runs) == len({run.key for run in runs}) == n_runs
    assert {run.model.name for run in runs} == {"demo-gpt2", "demo-llama"}
    assert "exact" in {run.what.method for run in runs}
    if name == "methods":
        untrained = {"arithmetic", "coloured_objects"}  # which the packaged models have never seen
        assert {run.task.name for run in runs} == set(TASKS) - untrained


def test_the_study_of_seeds_finds_its_models_beside_it(tmp_path):
    shutil.copy(ROOT / "examples" / "sweeps" / "seeds.yaml", tmp_path)
    with pytest.raises(SweepError, match=r"line 12, models\[0\]: .*seeds/demo-4l-0"):
        runs_of(read(tmp_path / "seeds.yaml"))
    for seed in range(8):
        folder = tmp_path / "seeds" / f"demo-4l-{seed}"
        shutil.copytree(DEMO_MODELS["demo-gpt2-4l"], folder)
        (folder / "config.json").write_text((folder / "config.json").read_text() + " " * seed)  # other models
    runs = runs_of(read(tmp_path / "seeds.yaml"))
    assert len(runs) == len({run.key for run in runs}) == 8 * 3 * 2 * (8 + 7)
    about = {(run.what.kind, run.direction, run.what.method) for run in runs}
    assert {method for kind, _, method in about if kind == "score"} - {method for kind, _, method in about if kind == "circuit"} == {"relp-ah"}
    assert {(kind, direction) for kind, direction, _ in about} == {("score", "denoising"), ("circuit", "noising")}
