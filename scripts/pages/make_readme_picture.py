"""Make the picture of the README: what exact patching, AtP and RelP say of the same cells, on a packaged model.

Run it in the repository: ``python scripts/pages/make_readme_picture.py`` (some ten seconds; it needs the extra ``images`` and a Chromium or Chrome).
"""

import argparse
from pathlib import Path

import patchlab as pl

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Score, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "readme.png")
    arguments = parser.parse_args()
    model = pl.load_model("demo-gpt2")
    task = pl.load_task("ioi", model, n=32, only_correct=True)
    methods = {"exact": pl.ActivationPatching(), "AtP": pl.AttributionPatching(), "RelP": pl.RelevancePatching()}
    scores = {name: method.run(model, task, "resid_pre", direction="denoising", progress=False) for name, method in methods.items()}
    pl.plots.save(pl.plots.heatmaps(scores), arguments.out, overwrite=True)


if __name__ == "__main__":
    main()
