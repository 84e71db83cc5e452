"""Write the frozen task files of datasets/, one per generator, for the packaged demo models, with a data card.

    python scripts/make_datasets.py

Exits with 1 if a file does not load again as exactly the task it was written from.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import patchlab as pl
from patchlab.models import DEMO_MODELS
from patchlab.tasks import TASKS, Task, load_task

OUT = Path(__file__).resolve().parents[1] / "datasets"
SEED, N = 1, 100

CARD = """# Task data for the demo models

One frozen file per task, written by `scripts/make_datasets.py` with `load_task(task, model, n={n}, seed={seed})` and the default options,
for the vocabulary that the packaged demo models share. The text comes from the generators in `patchlab/tasks`; nothing is taken from
another data set. They load as any task file does: `pl.load_task("datasets/ioi.jsonl", model)`.

| file | example (clean) | correct / incorrect | tokens | metric |
|---|---|---|---|---|
{files}

Share of pairs where a model prefers the clean prompt's answer, on the clean / on the corrupted prompt. The first should be near 1, the
second near 0 where the corruption turns the answer round. In `greater_than` the corrupted year ends in 01, so that nearly every year is
right; whether more probability lies above the clean year than below then depends on that year alone, about half of the time:

| file | {models} |
|---|{rules}|
{accuracies}

## Fields
One JSON object per line. `clean`, `corrupted`: text without `<bos>`. `clean_ids`, `corrupted_ids`: token ids with the leading `<bos>`; they
win over the text, and are checked against it. `correct`, `incorrect` and `correct_id`, `incorrect_id`: the answer tokens. `positions`: name ->
index into `clean_ids`. `template`: pairs with the same one are aligned token by token. `metric`: one per file.

The models were trained on sentences of these generators, so the pairs are no test of generalisation (`patchlab/models/demo/*/README.md`
has accuracies on held-out pairs of names).
"""


def record(task: Task, index: int) -> dict[str, Any]:
    """One pair as a line of a task file."""
    pair, bos = task.pairs[index], task.tokenizer.bos_token_id

    def text(ids: tuple[int, ...]) -> str:
        return task.tokenizer.decode([i for i in ids if i != bos])

    return {
        "clean": text(pair.clean_ids),
        "corrupted": text(pair.corrupted_ids),
        "correct": [text((i,)) for i in pair.correct],
        "incorrect": [text((i,)) for i in pair.incorrect],
        "clean_ids": pair.clean_ids,
        "corrupted_ids": pair.corrupted_ids,
        "correct_id": pair.correct,
        "incorrect_id": pair.incorrect,
        "positions": dict(pair.positions),
        "template": pair.template,
        "metric": task.metric.name,
    }


def main() -> int:
    """Write every file, load it again and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    models = [pl.load_model(name, device="cpu") for name in DEMO_MODELS]
    files, accuracies = [], []
    for name in TASKS:
        try:
            task = load_task(name, models[0], n=N, seed=SEED)
        except pl.errors.TaskError as error:  # digits and letters, which their vocabulary does not have
            print(f"no file of {name}: {error}", file=sys.stderr)
            continue
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record(task, i)) + "\n" for i in range(len(task))), encoding="utf-8")
        shares = []
        for model in models:
            again = load_task(path, model)
            if (again.pairs, again.metric) != (task.pairs, task.metric):
                print(f"{path} does not load again as the task it was written from", file=sys.stderr)
                return 1
            accuracy = again.accuracy(model)
            shares.append(f"{accuracy['clean']:.2f} / {accuracy['corrupted']:.2f}")
        first = record(task, 0)
        answers = " / ".join(f"{side[0]}, ... ({len(side)})" if len(side) > 1 else side[0] for side in (first["correct"], first["incorrect"]))
        files.append(f"| `{path.name}` | {first['clean']} | {answers} | {len(task.pairs[0])} | {task.metric.name} |")
        accuracies.append(f"| `{path.name}` | {' | '.join(shares)} |")
    names = " | ".join(model.name for model in models)
    card = CARD.format(n=N, seed=SEED, files="\n".join(files), models=names, rules="|".join("---" for _ in models), accuracies="\n".join(accuracies))
    (out / "README.md").write_text(card, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
