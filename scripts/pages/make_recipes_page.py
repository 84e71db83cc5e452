"""Write docs/results/recipes.md: every recipe on both packaged models, its numbers beside the published ones and its controls.

python scripts/pages/make_recipes_page.py                # runs what is missing in --work, a quarter of an hour on a CPU
patchlab recipe voids --model demo-llama --out DIR       # one of them, with its figures
"""

import argparse
import json
from pathlib import Path
from typing import Any

from patchlab.models import load_model
from patchlab.recipes import RECIPES
from patchlab.recipes.recipe import Number
from patchlab.store import result_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "recipes.md"
MODELS = ("demo-gpt2", "demo-llama")
SAID = {True: "shows", False: "does **not** show", None: "could not be tried"}


def made(model: Any, name: str, folder: Path) -> dict[str, Any]:
    """The result of one recipe on one model, made if it is not there."""
    target = folder / f"{name}-{model.name}"
    if not (target / "result.json").exists():
        with result_folder(target, force=True) as staging:
            RECIPES[name].run(model).write(staging)
        print(f"{name} on {model.name}: done", flush=True)
    return json.loads((target / "result.json").read_text(encoding="utf-8"))


def section(name: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """A recipe: its claim, whether it shows, and its numbers on each model."""
    one = RECIPES[name]
    lines = [f"## {name}", "", f"{one.paper}. Claim: {one.claim}", ""]
    for model, result in found.items():
        lines += [f"*{model}*: the claim {SAID[result['reproduces']]}. {result['verdict']}", ""]
    lines += [f"| number | {' | '.join(f'{model} | control' for model in found)} | published |", f"| --- |{' --- | --- |' * len(found)} --- |"]
    rows: dict[str, dict[str, Number]] = {}
    for model, result in found.items():
        for number in result["numbers"]:
            values = {key: float("nan") if value is None else value for key, value in number.items()}
            rows.setdefault(number["what"], {})[model] = Number(**values)
    for what, of_model in rows.items():
        published = next(iter(of_model.values())).published
        shown = [of_model[model].row() if model in of_model else {"here": "", "control": ""} for model in found]
        cells = [cell for row in shown for cell in (row["here"], row["control"])]
        lines.append(f"| {what.replace('|', '∣')} | {' | '.join(cells)} | {published} |")
    return [*lines, ""]


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("recipes-page"), help="where results are kept")
    work = parser.parse_args().work
    models = [load_model(name, device="cpu") for name in MODELS]
    found = {name: {model.name: made(model, name, work) for model in models} for name in RECIPES}
    shows = sum(result["reproduces"] is True for results in found.values() for result in results.values())
    total = sum(len(results) for results in found.values())
    lines = [
        "# Recipes: what neighbouring papers found, on the packaged models",
        "",
        f"Methods of {len(found)} papers on patchlab's nouns, with the defaults of `patchlab recipe NAME --model M`. The claim shows in {shows} of",
        f"{total} cases. The packaged models are small and were trained on synthetic text, so a claim about large models that does not show here is",
        'not refuted; nor is one confirmed that does. "unknown" is a number that we could not find out; where a paper states a tendency and no',
        'number that applies, it says "claim".',
        "",
    ]
    for name in sorted(found):
        lines += section(name, found[name])
    lines.append("Made by `scripts/pages/make_recipes_page.py` with seed 1.")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
