"""How many files a result travels through: distinct (caller file, callee file) pairs inside the package, and the statements of the package.

python scripts/trips.py
"""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import patchlab as pl
from patchlab.testing.toys import toy_task
from patchlab.testing.zoo import zoo_model

PACKAGE = Path(pl.__file__).parent


def pairs_of(call: Callable[[], Any]) -> set[tuple[str, str]]:
    """The pairs of one call."""
    found: set[tuple[str, str]] = set()

    def own(frame: FrameType | None) -> str | None:
        name = "" if frame is None else frame.f_code.co_filename
        return str(Path(name).relative_to(PACKAGE)) if name.startswith(str(PACKAGE)) else None

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (callee := own(frame)) is not None:
            caller = frame.f_back
            while caller is not None and own(caller) is None:  # through a library and back
                caller = caller.f_back
            if (above := own(caller)) is not None and above != callee:
                found.add((above, callee))

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def statements() -> int:
    """Statements of the package, as Python's grammar counts them."""
    return sum(isinstance(node, ast.stmt) for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def main() -> None:
    """Print the counts."""
    torch.set_num_threads(1)
    model = zoo_model("llama", torch.float32, 3)
    task = toy_task(model, n=4, length=5, seed=4)
    exact, relp, atp = (pl.methods.get_method(name) for name in ("exact", "relp", "atp"))

    def run(method: Any, sites: Any, direction: str = "noising") -> pl.ScoreMap:
        return method.run(model, task, sites, direction=direction, progress=False)

    maps = {name: run(method, ["resid_pre", "z"]) for name, method in (("exact", exact), ("atp", atp), ("relp", relp))}
    edges = run(atp, "edges")
    run(exact, "edges")  # what is tested once per model is tested now
    circuit = pl.circuits.top_n(edges, 120)

    def evaluate() -> Any:
        return pl.circuits.evaluate(model, circuit, task, ablation="zero", allow_overlap=True, n_boot=10, progress=False)

    try:
        evaluate()
    except pl.PatchlabError as error:
        print(f"circuits.evaluate: {error}", file=sys.stderr)
    trips = {
        "RelP nodes": lambda: run(relp, ["resid_pre", "z"]),
        "exact nodes": lambda: run(exact, ["resid_pre", "z"]),
        "exact edges": lambda: run(exact, "edges"),
        "circuits.evaluate": evaluate,
        "compare": lambda: pl.compare(maps["exact"], {"atp": maps["atp"], "relp": maps["relp"]}, n_boot=10),
    }
    for name, call in trips.items():
        print(f"{name:18} {len(pairs_of(call))}")
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    longest = max(lengths, key=lambda path: lengths[path])
    print(f"{'statements':18} {statements():,} in {len(lengths)} files; the longest is {longest.relative_to(PACKAGE)} with {lengths[longest]} lines")


if __name__ == "__main__":
    main()
