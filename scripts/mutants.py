"""Mutants: small mistakes put into a copy of patchlab, each of which some test must notice.

    python scripts/mutants.py                 # all of them: half an hour on two cores
    python scripts/mutants.py --only softmax test_graph  # those whose name, file or tests contain one of these

A mutant is a line as it is, the line with the mistake, and the tests that should fail. It is tried in a copy of the working tree with
``pytest -x``; those that survive are listed at the end, and make the exit status 1. Run it once for each larger change; a bug that was found adds the
mistake behind it to the list.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """A mistake: in which file, the text that it replaces (which stands there once), and the tests that should fail (file, and words for ``-k``)."""

    name: str
    file: str
    before: str
    after: str
    tests: str
    words: str = ""


NONLINEAR, LINEAR, METRICS = "rules/nonlinear.py", "rules/linear.py", "metrics.py"
MUTANTS = (
    Mutant("ln-rule lets the denominator move", NONLINEAR, "y = x / scale.detach()", "y = x / scale", "rules/test_rules"),
    Mutant("ln-rule does not centre", NONLINEAR, "x = x - x.mean(-1, keepdim=True)", "x = x - 0 * x.mean(-1, keepdim=True)", "rules/test_rules"),
    Mutant("half-rule passes everything", NONLINEAR, "return scale_gradient(a * u, 0.5)", "return scale_gradient(a * u, 1.0)", "rules/test_rules"),
    Mutant("gate is not held", NONLINEAR, "return a.detach() * u", "return a * u", "rules/test_rules"),
    Mutant("identity-rule at zero", NONLINEAR, "torch.where(x == 0, slope, f(x)", "torch.where(x == 0, 0 * slope, f(x)", "rules/test_rules"),
    Mutant("pattern is not held", NONLINEAR, "return pattern.detach()", "return pattern", "rules/test_rules"),
    Mutant("temperature of the softmax", NONLINEAR, "(scores / self.temperature).softmax(-1)", "scores.softmax(-1)", "rules/test_rules"),
    Mutant("sign of epsilon", LINEAR, "torch.where(wide >= 0, 1.0, -1.0)", "torch.where(wide >= 0, -1.0, 1.0)", "rules/test_rules"),
    Mutant(
        "gamma's bias", LINEAR, "below + bias + self.gamma * bias.clamp_max(0)", "below + bias + self.gamma * bias.clamp_min(0)", "rules/test_rules"
    ),
    Mutant("logit_diff against the other sign", METRICS, "- _mean(logits, a.incorrect,", "+ _mean(logits, a.incorrect,", "test_metrics"),
    Mutant(
        "wrong answers are padded with zero", METRICS, "a.incorrect_mask, -torch.inf).logsumexp", "a.incorrect_mask, 0.0).logsumexp", "test_metrics"
    ),
    Mutant(
        "divergence the other way round",
        METRICS,
        "return -divergence(a.clean_logits, logits)",
        "return -divergence(logits, a.clean_logits)",
        "test_metrics",
    ),
    Mutant("an edit adds twice", "interventions.py", "values = own + values", "values = own + 2 * values", "test_interventions"),
    Mutant("an edit ignores its rows", "interventions.py", "torch.where(mask, values, own)", "values", "test_interventions"),
    Mutant("noise does not depend on the example", "sources.py", "{self.seed}/{example}/", "{self.seed}/0/", "test_interventions"),
    Mutant(
        "points of the midpoint rule",
        "methods/quadrature.py",
        '"midpoint": 0.5,',
        '"midpoint": 0.4,',
        "methods/test_linearized",
        "quadrature or literal",
    ),
    Mutant(
        "first difference of all pairs", "methods/setting/unpatched.py", ".any(0).int().argmax()", ".all(0).int().argmax()", "engine/test_node_sweep"
    ),
    Mutant("second-order step in float32", "methods/second_order.py", "torch.float32: 1e-2", "torch.float32: 0.2", "methods/test_second_order"),
    Mutant("second-order probes are not centred", "methods/second_order.py", "/ (2 * step)", "/ (3 * step)", "methods/test_second_order"),
    Mutant(
        "logits of half precision are read as they are",
        "engine/literal.py",
        "read = read.float() if read.dtype in (torch.float16, torch.bfloat16) else read",
        "read = read",
        "engine/trust/test_precision engine/test_literal",
    ),
    Mutant(
        "swept logits of half precision are read as they are",
        "engine/node_sweep.py",
        "logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits",
        "logits = logits",
        "engine/trust/test_precision engine/test_node_sweep",
    ),
    Mutant(
        "the sweep starts one position late",
        "engine/node_sweep.py",
        "max(start, _start(cell, program))",
        "max(start, _start(cell, program)) + 1",
        "engine/test_node_sweep",
    ),
    Mutant(
        "degrees of freedom of the subset bound",
        "methods/verified/subsets.py",
        "outside).min()) - 1",
        "outside).min()) + 41",
        "methods/verified/test_search",
        "subset",
    ),
    Mutant(
        "subset bound without its error",
        "methods/verified/subsets.py",
        "* np.sqrt(spread[0] + spread[1])",
        "* 0",
        "methods/verified/test_search",
        "subset",
    ),
    Mutant(
        "one more cell may be missed",
        "methods/verified/bound.py",
        "return of - math.ceil(",
        "return of + 1 - math.ceil(",
        "methods/verified/test_bound",
        "recall or miss",
    ),
    Mutant(
        "grad-drop divides by all layers",
        "methods/corrections.py",
        "return size / (n_layers - 1)",
        "return size / n_layers",
        "methods/test_corrections",
    ),
    Mutant("grad-drop keeps the node's own layer", "methods/corrections.py", "size[:, layer] = 0.0", "pass", "methods/test_corrections"),
    Mutant(
        "bootstrap leaves out the last example",
        "stats/bootstrap.py",
        ".integers(n_examples, size",
        ".integers(max(1, n_examples - 1), size",
        "comparison/test_compare",
    ),
    Mutant(
        "a one-sided interval",
        "stats/bootstrap.py",
        "TAILS = (0.025, 0.975)",
        "TAILS = (0.05, 0.95)",
        "comparison/test_compare scores/test_score_map",
    ),
    Mutant(
        "pearson without centring",
        "stats/agreement.py",
        "values - values.mean(1, keepdims=True)",
        "values - 0 * values.mean(1, keepdims=True)",
        "comparison/test_compare",
    ),
    Mutant("top-k by sign", "stats/agreement.py", "(_top(np.abs(exact), k) *", "(_top(exact, k) *", "comparison/test_compare"),
    Mutant("spearman-brown", "stats/agreement.py", "return 2 * half / (1 + half)", "return 2 * half / (2 + half)", "comparison/test_compare"),
    Mutant(
        "faithfulness is a mean of ratios",
        "circuits/evaluation/scale.py",
        "(metric - self.empty).mean(-1) / (self.full - self.empty).mean()",
        "((metric - self.empty) / (self.full - self.empty)).mean(-1)",
        "circuits/evaluation/test_evaluate",
    ),
    Mutant(
        "pruning looks at inputs alone", "circuits/circuit.py", "keep = into & np.append(flat.any(1), True)", "keep = into", "circuits/test_circuit"
    ),
    Mutant(
        "circuits with fewer edges than asked",
        "circuits/select.py",
        "mask[order[:n]] = True",
        "mask[order[: n - 1]] = True",
        "circuits/test_select",
    ),
    Mutant("signed importance of noising", "circuits/select.py", "else effects if direction", "else -effects if direction", "circuits/test_select"),
    Mutant(
        "heads feed the MLP of their block in parallel models",
        "graph.py",
        "mask = stages[:-1, None] < ",
        "mask = stages[:-1, None] <= ",
        "test_graph",
    ),
    Mutant(
        "shared keys of the wrong group",
        "graph.py",
        "first = head // self.copies * self.copies",
        "first = head // self.copies",
        "test_graph methods/test_exact_edges",
    ),
    Mutant("a checkpoint of another task", "methods/setting/fingerprint.py", "({record['task_fingerprint']})", "", "methods/setting/test_checkpoint"),
    Mutant(
        "a fingerprint by shapes alone",
        "models/model.py",
        "{int(bits.sum(dtype=torch.int64))}",
        "",
        "models/test_load methods/setting/test_checkpoint",
    ),
    Mutant(
        "address of another position", "scores/addresses.py", "return names.index(value)", "return names.index(value) - 1", "scores/test_addresses"
    ),
    Mutant(
        "dictionaries are not told apart",
        "comparison/alignment.py",
        "if added[0] != added[1]:",
        "if False:",
        "methods/cells/test_kind methods/test_exact_edges",
    ),
    Mutant(
        "the fast engine is not asked about added sites",
        "engine/trust/nodes.py",
        'return ("node sweep", *model.arch.sites)',
        'return ("node sweep",)',
        "methods/cells/test_kind",
    ),
    *(
        Mutant(f"edges of features: {name}", file, before, after, tests, words)
        for name, file, before, after, tests, words in (
            (
                "the encoder in place of the decoder",
                "circuits/node_edges.py",
                "(gradient.flatten(3).to(change.dtype) @ one.rows()[units].T)",
                "(gradient.flatten(3).to(change.dtype) @ one.dictionary.w_enc[:, units])",
                "circuits/test_node_edges",
                "formula and gradient-noising",
            ),
            (
                "the reconstruction is dropped from the error",
                "circuits/node_edges.py",
                "- (through * x).sum(-1)",
                "- 0 * (through * x).sum(-1)",
                "circuits/test_node_edges",
                "formula and gradient-noising",
            ),
            (
                "sites between are not held",
                "engine/segments.py",
                "leaf = own.detach().requires_grad_()",
                "leaf = own.view_as(own) if own.requires_grad else own.detach().requires_grad_()",
                "circuits/test_node_edges",
                "formula and gradient-noising",
            ),
            (
                "what belongs to no feature is held",
                "engine/segments.py",
                "leaf = leaf + (part - part.detach())",
                "leaf = leaf + 0 * (part - part.detach())",
                "circuits/test_node_edges",
                "add_up and atp",
            ),
            (
                "a threshold is not reached by what is at it",
                "circuits/select_sparse.py",
                "np.flatnonzero(importance >= level)",
                "np.flatnonzero(importance > level)",
                "circuits/test_node_edges",
                "level",
            ),
            (
                "all candidates are parents",
                "circuits/evaluation/sparse_runner.py",
                "kept = self.outside.kept(own)",
                "kept = torch.ones_like(self.outside.kept(own))",
                "circuits/evaluation/test_sparse_runner",
                "hand or resample",
            ),
            (
                "means over clean prompts",
                "circuits/evaluation/node_ablations.py",
                "Program(batch.corrupted, batch.examples",
                "Program(batch.clean, batch.examples",
                "circuits/evaluation/test_sparse_runner",
                "kept_parents and mean_positional",
            ),
            (
                "b_dec is not subtracted",
                "features/dictionary.py",
                "(entered - self.b_dec if self.subtract_b_dec else entered)",
                "entered",
                "features/test_dictionary",
                "",
            ),
        )
    ),
)


def tried(mutant: Mutant, copy: Path) -> str | None:
    """Why the mutant is dead; None if it survives."""
    path = copy / "patchlab" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.before!r} stands {text.count(mutant.before)} times in {mutant.file}; bring the list up to date.")
    files = [f"tests/{name}.py" for name in mutant.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files, *(["-k", mutant.words] if mutant.words else [])]
    try:
        path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        ended = subprocess.run(
            command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
    finally:
        path.write_text(text, encoding="utf-8")
    if ended.returncode == 0:
        return None
    if ended.returncode != 1:
        raise SystemExit(f"{mutant.name}: the tests could not be run\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return next((line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "failed")


def main() -> None:
    """Try the mutants, then list the survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the name, file or tests")
    wanted = parser.parse_args().only
    chosen = [one for one in MUTANTS if any(word in f"{one.name} {one.file} {one.tests}" for word in wanted)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "patchlab"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.ipynb", "site", "__pycache__", "patchlab-demo"))
        for mutant in chosen:
            why = tried(mutant, copy)
            survivors += [mutant] if why is None else []
            print(f"{'SURVIVES' if why is None else 'dead    '}  {mutant.name}  ({why or mutant.tests})", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
