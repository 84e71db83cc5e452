"""Make the tables of the README: how well each approximation agrees with exact patching on the packaged models.

Run it in the repository: ``python scripts/readme_table.py`` (about a minute on two cores; ``--models`` and ``--tasks`` do a part,
which is kept in ``--out`` and joined with the parts done before). Exact denoising maps, 32 pairs that the model solves, seed 0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import patchlab as pl
from patchlab.methods import get_method

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("demo-gpt2", "demo-llama")
TASKS: dict[str, dict[str, Any]] = {"ioi": {}, "agreement": {"variant": "across_rc"}, "greater_than": {}}
METHODS = {"AtP": "atp", "IG-5": "ig:5", "RelP": "relp", "RelP-AH": "relp-ah", "GIM": "gim"}
SITES = ("resid_pre", "attn_out", "mlp_out", "z")
BASE = "AtP"
FORMS = {"pearson": "m", "pearson_per_prompt": "p", "pearson_pooled": "a"}
INTRODUCTION = f"""Pearson correlation with exact denoising patching on the packaged models, over the live cells, with 95 % bootstrap intervals over
examples, in three forms: **m**, of the maps of example means; **p**, per prompt (mean over prompts); **a**, of the effects on all prompts pooled.
Errors that cancel over prompts do not show in m. ▲ (▼): better (worse) than {BASE}, the interval of the paired difference excludes 0; each
interval is of one pair. Made by [scripts/readme_table.py](scripts/readme_table.py)."""
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def measure(model: Any, task: str, n: int, seed: int) -> dict[str, Any]:
    """One comparison on the live cells, as plain values."""
    pairs = pl.load_task(task, model, n=n, seed=seed, only_correct=True, **TASKS[task])
    maps = {label: get_method(name).run(model, pairs, SITES) for label, name in {"exact": "exact", **METHODS}.items()}
    exact = maps.pop("exact")
    comparison = pl.compare(exact, maps, seed=seed)
    return {"n": n, "seed": seed, "options": TASKS[task], "accuracy": pairs.accuracy(model), **comparison.to_dict()}


def number(value: float | None) -> str:
    """Two digits, without the zero before the point: ``.89``."""
    return "–" if value is None else f"{value:.2f}".replace("-", "−").replace("0.", ".", 1 if abs(value) < 0.995 else 0)


def cell(row: dict[str, Any], difference: dict[str, Any] | None) -> str:
    """The three forms with their intervals, a line each, marked where the paired difference from the base excludes 0."""
    lines = []
    for name, title in FORMS.items():
        low, high = (None, None) if difference is None else (difference[f"{name}_lo"], difference[f"{name}_hi"])
        mark = " ▲" if low is not None and low > 0 else " ▼" if high is not None and high < 0 else ""
        lines.append(f"{title} {number(row[name])} [{number(row[f'{name}_lo'])}, {number(row[f'{name}_hi'])}]{mark}")
    return "<br>".join(lines)


def section(model: str, task: str, result: dict[str, Any]) -> str:
    """The table of one model and task: a row per method, a column per site."""
    rows = {(row["method"], row["site"]): row for row in result["table"] if row["cells"] == "live"}
    against = [row for row in result["differences"] if row["cells"] == "live" and row["other"] == BASE]
    differences = {(row["method"], row["site"]): row for row in against}
    option = "".join(f" {value}" for value in result["options"].values())
    setting = result["setting"]
    unit = f" {setting['metric_unit']}" if setting["metric_unit"] else ""
    known = [row for row in result["reliability"] if row["cells"] == "live" and row["reliability"] is not None]
    reliability = ", ".join(f"{row['site']} {row['reliability']:.2f}" for row in known)
    lines = [f"**{model}, {task}{option}** ({result['n']} pairs, {setting['metric']}, gap {setting['gap']:.2f}{unit})", ""]
    lines += [f"| method | {' | '.join(SITES)} |", "|---" * (len(SITES) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(cell(rows[label, site], differences.get((label, site))) for site in SITES)} |" for label in METHODS]
    return "\n".join([*lines, "", f"Split-half reliability of the exact maps: {reliability}."])


def insert(readme: Path, text: str) -> None:
    """Put the text between the markers of the README."""
    whole = readme.read_text(encoding="utf-8")
    head, begin, rest = whole.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme} has no lines {BEGIN} and {END}; put them where the table shall be.")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Measure what is asked for, then write the table of everything measured so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "readme_table.json", help="where the numbers are kept")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file whose table is replaced")
    arguments = parser.parse_args()
    done: dict[str, Any] = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        model = pl.load_model(name)
        for task in arguments.tasks:
            print(f"{name}, {task}", flush=True)
            done[f"{name} {task}"] = measure(model, task, arguments.n, arguments.seed)
            arguments.out.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    sections = [section(model, task, done[key]) for model in MODELS for task in TASKS if (key := f"{model} {task}") in done]
    insert(arguments.readme, "\n\n".join([INTRODUCTION, *sections]))


if __name__ == "__main__":
    main()
