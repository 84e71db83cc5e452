"""Shards: every run in exactly one, shared work together, folders that keep to theirs, and a union that equals the whole."""

import json
import random

import pytest
from sweeping import runs, same_tables, swept
from typer.testing import CliRunner

import patchlab as pl
from patchlab import cli
from patchlab.errors import SweepError
from patchlab.store.runs import RunStore
from patchlab.sweeps.executors.shards import Shard, split
from patchlab.sweeps.merge import merge

MANY = """
version: 1
models: [demo-gpt2-4l, demo-llama]
tasks:
  - {name: ioi, n: 8, seed: [0, 1, 2]}
  - {name: agreement, n: 8, options: {variant: [simple, across_rc]}}
directions: [denoising, noising]
runs:
  - {kind: score, methods: [exact, atp, relp], sites: [z]}
  - {kind: circuit, methods: [atp, relp], ablation: [zero, mean]}
"""
SCORES = """
version: 1
models: demo-gpt2-4l
tasks: [{name: ioi, n: 8, seed: [0, 1, 2]}]
runs: [{kind: score, methods: [exact, relp], sites: z}]
"""


def patchlab(*words: object):
    """The command line."""
    return CliRunner().invoke(cli.app, list(map(str, words)), prog_name="patchlab")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_every_run_is_in_one_shard_and_shared_work_stays_together(tmp_path, n):
    wanted = runs(tmp_path, MANY)
    parts = split(wanted, n)
    assert sorted(run.key for part in parts for run in part) == sorted(run.key for run in wanted)
    groups = [{run.group for run in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 40, "no group is in two"
    places = {run.key: i for i, run in enumerate(wanted)}
    assert all(here == sorted(here) for here in ([places[run.key] for run in part] for part in parts)), "in the order of the sweep"
    assert max(map(len, parts)) - min(map(len, parts)) <= 4, "the largest group has four runs"
    for what in (lambda run: run.model.name, lambda run: run.what.kind):  # what is slow is not all in one shard
        for value in {what(run) for run in wanted}:
            counts = [len({run.group for run in part if what(run) == value}) for part in parts]
            assert max(counts) - min(counts) <= 2
    assert [run.key for run in Shard(n, n).part(wanted)] == [run.key for run in parts[-1]]


def test_the_order_in_the_file_does_not_matter(tmp_path):
    wanted = runs(tmp_path, MANY)
    mixed = random.Random(0).sample(wanted, len(wanted))
    assert [{run.key for run in part} for part in split(wanted, 3)] == [{run.key for run in part} for part in split(mixed, 3)]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1.5/2", "1 /2", "²/2"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(SweepError, match=r"such as (2/8|1/8)"):
        Shard.parse(text)


def test_more_shards_than_groups_are_refused(tmp_path):
    with pytest.raises(SweepError, match=r"140 runs in 40 groups that share work cannot be cut into 41 shards; take 1 to 40\."):
        split(runs(tmp_path, MANY), 41)


@pytest.mark.slow
def test_shards_together_are_the_sweep(tmp_path):
    wanted = runs(tmp_path, SCORES)
    swept(wanted, tmp_path / "whole")
    for i in (3, 1, 2):
        found = patchlab("sweep", "run", tmp_path / "sweep.yaml", "--out", tmp_path / f"part-{i}", "--shard", f"{i}/3")
        assert found.exit_code == 0, found.output
    about = json.loads((tmp_path / "part-2" / "sweep.json").read_text())["about"]
    assert (about["shard"], about["sweep"]) == ("2/3", [run.key for run in wanted])
    pl.sweeps.open(tmp_path / "part-1").table()  # keeps what it derives, which a union leaves behind
    counts = merge(tmp_path / "merged", [tmp_path / f"part-{i}" for i in (2, 3, 1)])
    assert counts == {"planned": 6, "done": 6, "failed": 0, "pending": 0, "running": 0, "copied": 6}
    same_tables(tmp_path / "whole", tmp_path / "merged")
    counts, said = swept(wanted, tmp_path / "merged")
    assert "6 of 6 runs were done before" in said, "and it is the folder of the whole sweep from then on"


def test_a_folder_keeps_to_its_shard(tmp_path):
    runs(tmp_path, SCORES.replace("[exact, relp]", "relp").replace("[0, 1, 2]", "[0, 1]"))

    def run(out: str, *options: str):
        return patchlab("sweep", "run", tmp_path / "sweep.yaml", "--out", tmp_path / out, *options)

    assert run("one", "--shard", "1/2").exit_code == 0
    assert run("one", "--shard", "1/2").exit_code == 0
    for options, got in ((("--shard", "2/2"), "shard 2/2"), (("--shard", "1/1"), "shard 1/1"), ((), "a whole sweep")):
        refused = run("one", *options)
        assert refused.exit_code == 1
        assert f"was made for shard 1/2, and this is {got}. Give every shard a folder of its own" in refused.stderr
    assert len(RunStore.open(tmp_path / "one").planned()) == 1
    assert run("all").exit_code == 0
    assert "was made for a whole sweep, and this is shard 1/2" in run("all", "--shard", "1/2").stderr
    assert "cut into 3 shards; take 1 to 2." in run("other", "--shard", "1/3").stderr
    assert not (tmp_path / "other").exists()
