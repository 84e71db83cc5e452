"""Train the models of examples/sweeps/seeds.yaml: the demo recipe with other seeds.

    python scripts/train_seeds.py                # eight with 4 layers, into examples/sweeps/seeds/demo-4l-0 ... -7
    python scripts/train_seeds.py --layers 12    # eight with 12 layers, demo-12l-0 ... -7
    python scripts/train_seeds.py --seeds 4 & python scripts/train_seeds.py --first 4    # the same eight by two processes

What is there already stays, so that the same command goes on after an interruption. A model is kept whatever it has learnt: measured.json beside its
weights says how much of each task, and what the recipe requires of a packaged one.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from train_demo_models import RECIPES, fit, make_tokenizer, measure
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from patchlab.progress import duration
from patchlab.tasks.generators.lexicon import Lexicon

OUT = Path(__file__).resolve().parents[1] / "examples" / "sweeps" / "seeds"
LAYERS = {4: "demo-gpt2-4l", 12: "demo-gpt2"}
"""The packaged model whose recipe is taken, by layers."""


def make(layers: int, seed: int, tokenizer: PreTrainedTokenizerFast, out: Path, pairs: int, steps: int | None) -> None:
    """Train, save and measure one model."""
    name, recipe = f"demo-{layers}l-{seed}", replace(RECIPES[LAYERS[layers]], seed=seed)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    start, cpu = time.perf_counter(), time.process_time()
    new = out / f".{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    fit(LAYERS[layers], recipe, tokenizer, new)
    trained = time.process_time() - cpu
    found = measure(AutoModelForCausalLM.from_pretrained(new).eval(), Lexicon(name, tokenizer, len(tokenizer), None), pairs)
    rows = {label: {"measured": value, "pairs": n, "required": least} for label, (value, n, least) in found.items()}
    about = {"seed": seed, "layers": layers, "steps": recipe.steps, "cpu_seconds": trained, "threads": torch.get_num_threads(), "tasks": rows}
    (new / "measured.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    new.rename(out / name)
    missed = [f"{label} {row['measured']:.3f}" for label, row in rows.items() if row["measured"] < row["required"]]
    each = f"{duration(trained)} of processor time for training, {1000 * trained / recipe.steps:.0f} ms a step"
    says = f"below what is required of a packaged model: {', '.join(missed)}" if missed else "all tasks learnt"
    print(f"{name}: {duration(time.perf_counter() - start)} ({each}); {says}", flush=True)


def main() -> int:
    """Train the models that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, choices=list(LAYERS), default=4)
    parser.add_argument("--seeds", type=int, default=8, help="models, with the seeds 0, 1, ...")
    parser.add_argument("--first", type=int, default=0, help="begin with this seed, so that several processes can share the models")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pairs", type=int, default=200, help="pairs per measured task")
    parser.add_argument("--steps", type=int, help="instead of the recipe's, to see how long one takes")
    parser.add_argument("--threads", type=int, default=1, help="another number rounds otherwise, and so gives another model")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"there is no fewer than one model; got {arguments.seeds}")
    if not 0 <= arguments.first < arguments.seeds:
        parser.error(f"--first is one of the seeds 0 to {arguments.seeds - 1}; got {arguments.first}")
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.first, arguments.seeds):
        if (there := arguments.out / f"demo-{arguments.layers}l-{seed}").exists():
            print(f"{there.name}: there already", flush=True)
        else:
            make(arguments.layers, seed, tokenizer, arguments.out, arguments.pairs, arguments.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
