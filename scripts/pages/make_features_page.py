"""Write docs/results/features.md: the methods compared on the features of the packaged dictionaries, on the four agreement tasks and both models.

    python scripts/pages/make_features_page.py            # runs what is missing in --work, minutes on a CPU
    patchlab features compare --model demo-gpt2 --task agreement --option variant=across_rc --out DIR    # one of the eight, with plots

Every number comes from the tables that ``patchlab features compare`` writes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from patchlab import feature_comparison as features
from patchlab import plots
from patchlab.models import load_model
from patchlab.report.features import write_features
from patchlab.store import result_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "features.md"
FIGURES = ROOT / "docs" / "figures"
MODELS = ("demo-gpt2", "demo-llama")
VARIANTS = ("simple", "within_rc", "across_rc", "across_pp")
PAIRS = 32
DRAWN = "across_rc"
SHOWN = ("atp", "relp", "attnlrp", "gim", "ig:1", "ig:5", "ig:10", features.MARKS)
BOTH = ("relp", "atp")


def made(model: Any, name: str, variant: str, folder: Path) -> Path:
    """The folder of one comparison, made if it is not there."""
    target = folder / f"{name}-{variant}"
    if not (target / "run.json").exists():
        job = features.FeatureJob(name, "agreement", n=PAIRS, options={"variant": variant})
        with result_folder(target, job=job.as_dict(), say=print) as staging:
            write_features(staging, features.run(job, model=model, folder=staging, say=print), images=False)
    return target


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def interval(row: Any, name: str, digits: int = 2) -> str:
    """A value with its interval."""
    return f"{row[name]:.{digits}f} [{row[f'{name}_lo']:.{digits}f}, {row[f'{name}_hi']:.{digits}f}]"


def agreement(folders: dict[str, Path]) -> str:
    """Mean over settings of the correlations with exact patching, of features and of errors."""
    frames = [pd.read_csv(path / "comparison.csv").assign(setting=name) for name, path in folders.items()]
    rows = pd.concat(frames).query("cells == 'live'")
    rows = rows.assign(part=rows["site"].str.partition(".")[0])
    found = rows.groupby(["part", "method"])[["pearson_per_prompt", "pearson"]].mean()
    order = [name for name in SHOWN if name in set(rows["method"])]
    lines = [[name, *(f"{found.loc[(part, name), form]:.2f}" for part in ("features", "error") for form in found)] for name in order]
    header = ["method", "features, per prompt", "features, of means", "errors, per prompt", "errors, of means"]
    return table(header, lines)


def areas(folders: dict[str, Path]) -> tuple[str, dict[str, dict[str, tuple[int, int, int]]]]:
    """Mean |1 − f| of each method in each setting; how often relevance and gradients are better, alike and worse than the paper's IG."""
    parts, counts = [], {}
    for nodes, what in features.NODES.items():
        rows, counted = [], {method: [0, 0, 0] for method in BOTH}
        for name, path in folders.items():
            record = json.loads((path / "run.json").read_text(encoding="utf-8"))
            of = pd.read_csv(path / "areas.csv").query("nodes == @nodes").set_index("method")
            if of.empty:
                rows.append([name, *["–"] * (len(SHOWN) + 2)])
                continue
            rows.append([name, *(interval(of.loc[one], "distance") for one in ("exact", *SHOWN, features.RANDOM))])
            for row in record["differences"]:
                if row["nodes"] == nodes and row["method"] in BOTH:
                    counted[row["method"]][0 if row["hi"] < 0 else 2 if row["lo"] > 0 else 1] += 1
        parts += [f"### {nodes}\n", f"{what[0].upper()}{what[1:]}.\n", table(["setting", "exact", *SHOWN, features.RANDOM], rows) + "\n"]
        counts[nodes] = {method: tuple(values) for method, values in counted.items()}
    return "\n".join(parts), counts


def two_questions(folders: dict[str, Path]) -> str:
    """Which method agrees best with single effects, and which finds the most faithful circuits: two questions."""
    tables = [(pd.read_csv(path / "comparison.csv").query("cells == 'live'"), pd.read_csv(path / "areas.csv")) for path in folders.values()]
    agreement_of = pd.concat([one[one["site"].str.startswith("features")] for one, _ in tables]).groupby("method")["pearson_per_prompt"].mean()
    distance = pd.concat([one.query("nodes == 'features' and method != 'random'") for _, one in tables]).groupby("method")["distance"].mean()
    closest, best, worst = agreement_of.idxmax(), distance.idxmin(), distance.idxmax()
    said = [
        f"The exact effects of single features are met best by `{closest}` (r {agreement_of.max():.2f} per prompt, mean over settings; `relp` "
        f"{agreement_of['relp']:.2f}), whose circuits are at a mean distance |1 − f| of {distance[closest]:.3f}.",
        f"Exact effects themselves choose circuits at {distance['exact']:.3f}, `relp` at {distance['relp']:.3f}, `{features.MARKS}` at "
        f"{distance[features.MARKS]:.3f}; best are those of `{best}` ({distance[best]:.3f}), worst those of `{worst}` ({distance[worst]:.3f}).",
    ]
    return " ".join(["Agreement and circuits are two questions.", *said])


def cost(folders: dict[str, Path]) -> str:
    """Passes of each method, in the first setting."""
    record = json.loads((next(iter(folders.values())) / "run.json").read_text(encoding="utf-8"))
    rows = [[row["method"], f"{row['forwards']:,}", f"{row['backwards']:,}", f"{row['seconds']:.1f} s"] for row in record["costs"]]
    return table(["method", "forward passes", "backward passes", "time"], rows)


def page(folders: dict[str, Path]) -> str:
    """The whole page."""
    record = json.loads((next(iter(folders.values())) / "run.json").read_text(encoding="utf-8"))
    by_nodes, counts = areas(folders)
    said = [
        f"- {nodes}: circuits chosen by {method} are more faithful than those of {features.MARKS} in {better} of {better + alike + worse} settings, "
        f"less faithful in {worse}, and cannot be told apart in {alike}."
        for nodes, of in counts.items()
        for method, (better, alike, worse) in of.items()
    ]
    pictures = [f"![Faithfulness and completeness, {name}](../figures/features-{name}.png)\n" for name in MODELS]
    return "\n".join(
        [
            "# Features: which method finds the faithful circuit?\n",
            f"Made by `python scripts/pages/make_features_page.py`; do not edit. {len(folders)} settings: the packaged models {' and '.join(MODELS)} "
            f"with their packaged autoencoders, subject-verb agreement in four forms, {PAIRS} pairs each, half for choosing and half for measuring. "
            f"Noising: corrupted values are put into the clean run; everything outside a circuit carries its positional mean over "
            f"corrupted prompts, as in Marks et al. 2024 (arXiv 2403.19647). `{features.MARKS}` is that paper's integrated gradients, one "
            f"submodule at a time. {', '.join(f'{name} {version}' for name, version in record['versions'].items())}.\n",
            "## What came out\n",
            *said,
            "",
            f"The RelP paper reports circuits of features about as faithful as those of integrated gradients, at a fraction of the cost. Here `relp` "
            f"takes 2 forward passes and one backward pass per batch; what `{features.MARKS}` takes is below.\n",
            two_questions(folders) + "\n",
            *pictures,
            "## How faithful circuits are\n",
            "Mean |1 − f| over 12 numbers of nodes from 1 to all that have a score, with 95 % intervals over the measured pairs; low is good.\n",
            by_nodes,
            "## Agreement with exact patching of single features\n",
            "Pearson correlation with the exact effects over live cells, mean over settings and sites.\n",
            agreement(folders) + "\n",
            "## Cost\n",
            f"Of scoring features and errors, {next(iter(folders))}.\n",
            cost(folders) + "\n",
        ]
    )


def main() -> int:
    """Run what is missing, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "patchlab-demo" / "features", help="folder of the eight comparisons")
    arguments = parser.parse_args()
    folders: dict[str, Path] = {}
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        model = load_model(name)
        for variant in VARIANTS:
            folders[f"{name} {variant}"] = made(model, name, variant, arguments.work)
        circuits = pd.read_csv(arguments.work / f"{name}-{DRAWN}" / "features.csv")
        figure = plots.node_circuits(circuits, title=f"Circuits of nodes: agreement {DRAWN} on {name}")
        plots.save(figure, FIGURES / f"features-{name}.png", overwrite=True, scale=1)
    PAGE.write_text(page(folders), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
