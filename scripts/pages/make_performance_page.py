"""Write docs/performance.md from what the benchmarks measured.

    python benchmarks/exact_sweep.py --json > sweep.txt
    python scripts/pages/make_performance_page.py sweep.txt

Every file named is the output of a benchmark run with ``--json``; its last line goes into ``benchmarks/results/``, where rows
of earlier runs that it does not measure again stay. The ``gpu.json`` of benchmarks/gpu.py is put there as it is. Without files the page is written
from what is there.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
_KEYS = {
    "results": ("model", "workload", "map", "asked"),
    "ideas": ("workload", "map", "idea"),
    "scaling": ("what", "value"),
    "growth": ("what", "value", "work"),
    "precision": ("precision",),
    "bf16": ("model", "map"),
    "exact": ("model", "workload"),
    "linearised": ("model", "workload"),
}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new report, with the rows of an old one that it does not replace."""
    found = {**old, **new}
    for part, names in _KEYS.items():
        if isinstance(new.get(part), dict):
            continue  # numbers, no rows
        rows = {tuple(row.get(name) for name in names): row for row in old.get(part, [])}
        rows |= {tuple(row.get(name) for name in names): row for row in new.get(part, [])}
        if rows:
            found[part] = list(rows.values())
    return found


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def _number(value: float | None, unit: str = "", digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}{unit}"


def _machine(report: dict[str, Any]) -> str:
    m = report["machine"]
    gpu = f", {m['gpu']}" if "gpu" in m else ""
    return (
        f"{m['cpu']} ({m['torch_cpu_capability']}){gpu}, {m['threads']} thread{'s' if m['threads'] > 1 else ''}, {m['clock']}; "
        f"torch {m['torch']}, transformer-lens {m['transformer-lens']}, transformers {m['transformers']}; matmul precision {m['matmul_precision']}."
    )


def sweep_page(report: dict[str, Any]) -> str:
    """Exact maps."""
    rows = [
        [
            row["model"],
            row["workload"],
            row["map"],
            row["asked"],
            _number(row["ratio"], "×"),
            _number(row["goal"], "×"),
            f"{row['live_cells']} / {row['cells']}",
            _number(row["seconds"], " s"),
            _number(row["cells"] * row["transformer_lens_seconds_per_cell"], " s"),
            f"{row['transformer_lens_flops'] / row['flops']:.3g}×",
            f"{row['max_difference_of_scale']:.0e}",
        ]
        for row in sorted(report["results"], key=lambda row: (row["model"], row["asked"], row["workload"] == "ABC"))
    ]
    header = ["model", "workload", "map", "engine", "ratio", "goal", "live / all cells", "patchlab", "TransformerLens", "fewer FLOPs", "difference"]
    parts = [
        "## Exact maps\n",
        _machine(report) + "\n",
        f"`ActivationPatching().run` against TransformerLens' `generic_activation_patch` on the same bridge, {report['pairs']} pairs of "
        f"{report['length']} tokens. S2: one token differs (position 10); ABC: three (2, 4, 10). TransformerLens runs all cells of a map, dead "
        "ones too, so its time is that of a random sample of live cells × all cells, plus its clean run; patchlab's is the whole call, both "
        "unpatched runs and the score map included. `prefix` is the engine that these models get by themselves, `replay` (whole sequences from the "
        "patched layer on) what a model without a usable cache gets; both skip structural zeros. *Difference*: largest difference of a patched "
        "metric to TransformerLens', per pair, on the sampled cells, as a share of the metric's scale. Ratios are medians of interleaved repeats.\n",
        table(header, rows),
    ]
    if "ideas" in report:
        names = list(dict.fromkeys(row["map"] for row in report["ideas"]))
        gains = {(row["idea"], row["map"]): row for row in report["ideas"]}
        ideas = list(dict.fromkeys(row["idea"] for row in report["ideas"]))
        parts += [
            "\n### What each idea gains\n",
            "Time of the sweep with this idea off and all others on, over the time with all on (GPT-2 shape, S2; head × position on a quarter of the "
            "heads). The factors are not independent, so they do not multiply to the whole.\n",
            table(["idea", *names], [[idea, *(_number(gains[idea, name]["gain"], "×") for name in names)] for idea in ideas]),
        ]
    if "scaling" in report:
        parts += [
            "\n### How it scales\n",
            "resid_pre, S2, one size varied at a time around 6 layers, width 512, 15 tokens, 8 pairs. The token that differs is at two thirds of the "
            "length. TransformerLens also pays for the logits of all positions, which weigh more in a small model.\n",
            table(
                ["varied", "value", "ratio", "live / all cells", "patchlab"],
                [
                    [row["what"], row["value"], _number(row["ratio"], "×"), f"{row['live_cells']} / {row['cells']}", _number(row["seconds"], " s")]
                    for row in report["scaling"]
                ],
            ),
        ]
    if "precision" in report:
        parts += [
            "\n### `torch.set_float32_matmul_precision`\n",
            "patchlab never sets it, nor the number of threads. Setting it yourself changes the matrix products of everything in the process: on "
            "processors with bfloat16 instructions and on GPUs with TF32 they get faster and lose digits. It is good for screening; "
            "the literal and the fast engine then agree only to the rounding below. Measured on the S2 resid_pre map:\n",
            table(
                ["precision", "patchlab", "largest change, as a share of the largest effect"],
                [
                    [row["precision"], _number(row["seconds"], " s"), _number(row["max_difference_of_largest_effect"], "", 2)]
                    for row in report["precision"]
                ],
            ),
        ]
    if "bf16" in report:
        parts += [
            "\n### Models in bfloat16\n",
            "The same maps on the same weights in bfloat16, against float32: S2 on the shape's random weights, IOI (32 pairs) on the packaged "
            "models. Effects that are small against the logits' rounding are lost, which random weights have many of: for screening.\n",
            table(
                ["model", "map", "largest difference, as a share of the largest effect", "Pearson over live cells", "time of float32"],
                [
                    [
                        row["model"],
                        row["map"],
                        _number(row["max_difference_of_largest_effect"], "", 2),
                        f"{row['pearson']:.3f}",
                        _number(row["time_of_float32"], "×", 2),
                    ]
                    for row in report["bf16"]
                ],
            ),
        ]
    return "\n".join(parts)


def linearized_page(report: dict[str, Any]) -> str:
    """AtP and RelP."""
    rows = [
        [
            row["model"],
            row["workload"],
            _number(row["ratios"]["atp / plain"], "×"),
            _number(row["ratios"]["relp / plain"], "×"),
            _number(row["ratios"]["relp / atp"], "×"),
            row["cells"],
            f"{row['positions']} / {row['positions_of_plain']}",
            f"{row['max_difference']:.0e}",
        ]
        for row in report["results"]
    ]
    return "\n".join(
        [
            "## Linearised scores\n",
            _machine(report) + "\n",
            "AtP and RelP for all cells of resid_pre, attn_out, mlp_out and z by head and position, against two forwards and one backward of "
            "the plain Hugging Face model (eager attention, no hooks, no parameter gradients, all logits). Goals: AtP at most 0.8× that, RelP at "
            "most 1.15× AtP. The second forward and the backward start at the first difference, with the first run's keys and values "
            "before it; only the answer position's logits are computed. "
            "*Difference*: to plain autograd at the first residual stream, share of the largest score.\n",
            table(["model", "workload", "AtP / plain", "RelP / plain", "RelP / AtP", "cells", "forward positions", "difference"], rows),
        ]
    )


def verified_page(report: dict[str, Any]) -> str:
    """Verified top-k."""
    rows = [
        [
            screen,
            f"{found['recall']:.2f}",
            f"{found['strict_recall']:.2f}",
            f"{found['share']:.2f}",
            f"{found['needed']:.2f}",
            f"{100 * found['held']:.0f} %",
            found["runs"],
        ]
        for screen, found in report["screens"].items()
    ]
    header = ["screen", "recall", "strict recall", "share of a sweep", "needed for all of the top k", "bound held", "runs"]
    return "\n".join(
        [
            "## Verified top-k\n",
            _machine(report) + "\n",
            f"`VerifiedPatching` on {report['site']} of the demo models, medians over tasks, seeds and samples. *Recall* of the full sweep's top k "
            "(within 1 % of the gap is a tie; *strict* without ties: on these models the k-th effect is mostly below 1 % of the gap, so ties "
            "forgive much); *share*: rows patched, screen and sample included, over those of all live cells.\n",
            table(header, rows),
        ]
    )


def edges_page(report: dict[str, Any]) -> str:
    """Exact and linearised edges."""
    linearised = [
        [
            row["model"],
            row["workload"],
            f"{row['edges']:,}",
            *(_number(row["ratios"][f"{name} / plain"], "×") for name in ("atp", "relp")),
            *(f"{row['extra_peak_gb'][name]:+.2f} GB" for name in ("atp", "relp")),
        ]
        for row in report["linearised"]
    ]
    ways = {"plain": "plain forward", "split": "split inputs", "routed": "routed pass", "loop": "two passes"}
    exact = [
        [
            row["model"],
            row["workload"],
            _number(1000 * row["seconds_per_edge"]["exact"], " ms"),
            f"{60 * row['hours_for_all_edges_extrapolated']:.0f} min",
            *(_number(row["ratios"][way], "×") for way in ways),
            f"{row['block_positions_of_a_forward'] / row['block_positions_per_edge']:.3g}×",
            f"{row['max_difference_of_scale']:.0e}",
        ]
        for row in report["exact"]
    ]
    goal, most = report["exact"][0]["goal"], report["linearised"][0]
    return "\n".join(
        [
            "## Edges\n",
            _machine(report) + "\n",
            f"EAP (`atp`) and edge-RelP (`relp`) for all edges at one point, score map included, against two forwards and one backward of the plain "
            f"Hugging Face model; the goal is at most {most['goal']}×, with at most {most['goal_extra_peak_gb']} GB more at the peak (resident "
            f"memory, which is a rough measure).\n",
            table(["model", "workload", "edges", "EAP / plain", "RelP / plain", "extra peak, EAP", "extra peak, RelP"], linearised),
            "\nExact patching of single edges: time per edge on a sample of every layer and kind of reader, weighted by how many edges each has; the "
            "time for all edges is an extrapolation. Ratios are to what takes whole passes for every edge: *plain forward*, one forward pass of "
            "TransformerLens, in which no edge can be patched, so it is the least that any such way needs; *split inputs*, the same with split q, k "
            "and v inputs; *routed pass*, a forward pass of patchlab's in which every reader has an input of its own; *two passes*, that and a "
            f"corrupted pass, as published edge-by-edge loops make them (ours, not their code). The goal is {goal:.0f}×. An edge needs the blocks "
            f"after its reader, at the positions from the first difference on, and matrix products are most of the time: *fewer block positions* "
            f"bounds what is left to gain against a plain forward, whose other cost is the logits of all positions. "
            f"*Difference*: to the routed pass, share of the metric's scale.\n",
            table(["model", "workload", "per edge", "all edges", *ways.values(), "fewer block positions", "difference"], exact),
        ]
    )


def features_page(report: dict[str, Any]) -> str:
    """Features of dictionaries."""
    goals, exact = report["goals"], report["exact"]
    rows = [
        [
            "AtP of one layer's features / its nodes",
            _number(report["features of one layer / nodes"], "×"),
            f"at most {goals['features of one layer / nodes']:g}×",
        ],
        [
            f"one forward each / exact patching of {exact['cells']:,} single features at single positions",
            _number(exact["ratio"], "×"),
            f"at least {goals['one forward each / exact']:g}×",
        ],
    ]
    if "long" in report:
        long = report["long"]
        what = f"{long['length']:,} tokens, features of one layer: most memory beside the model"
        rows.append([what, f"{long['peak, bytes'] / 1e6:,.0f} MB", f"at most {long['max_memory'] / 1e6:,.0f} MB (`max_memory`)"])
    return "\n".join(
        [
            "## Features of dictionaries\n",
            _machine(report) + "\n",
            f"Random dictionaries {report['width']:,} wide on resid_post of the GPT-2 shape, about 100 features active per position, S2, "
            f"{exact['pairs']} pairs, features by layer and position. A feature is active in {exact['pairs of a feature']:.1f} of the "
            f"{exact['pairs']} pairs on average, and features that change different pairs share a run: {exact['cells']:,} features take "
            f"{exact['runs']:,} runs. On prompts that share more features fewer runs are saved. *One forward each* is the literal engine "
            f"with the answer position's logits, for a sample of the same features; effects differ by at most "
            f"{exact['max_difference']:.0e} of the largest (effects of single features are near the rounding of float32; in float64 both agree).\n",
            table(["what", "measured", "goal"], rows),
        ]
    )


def scaling_page(report: dict[str, Any]) -> str:
    """How cost grows with each size, and what a sweep over an 8B model takes by the plan."""
    base, works = report["base"], list(dict.fromkeys(row["work"] for row in report["growth"]))
    cells = {(row["what"], row["value"], row["work"]): row for row in report["growth"]}
    sizes = list(dict.fromkeys((row["what"], row["value"], row["size"]) for row in report["growth"]))

    def cell(what: str, value: int, work: str) -> str:
        row = cells[what, value, work]
        return f"{row['ratio']:.2f}× ({row['range'][0]:.2f} to {row['range'][1]:.2f})"

    grown = [[what, f"{value} ({size:g}×)", *(cell(what, value, work) for work in works)] for what, value, size in sizes]
    planned = [
        [
            row["task"],
            row["tokens"],
            f"{row['forwards']:,}",
            f"{row['backwards']:,}",
            f"{row['work'] * report['token_flops'] / report['speed'] / 3600:.2f}",
        ]
        for row in report["sweep"]
    ]
    scores = sum(row["scores"] for row in report["sweep"]) * report["token_flops"] / report["speed"] / 3600
    return "\n".join(
        [
            "## How cost grows\n",
            _machine(report) + "\n",
            f"One size varied at a time around {base['layers']} layers, width {base['width']}, {base['length']} tokens, {base['pairs']} pairs "
            f"(GPT-2 shape, S2): time over that of the base in the same round, the median of the rounds and in brackets smallest and largest. "
            f"The machine did other work beside, and small settings are mostly fixed cost. *Two circuits*: the whole graph and the empty one, other "
            f"edges on the other prompt; a circuit on a prompt takes {report['circuit']:.1f} plain forward passes at the base. GPUs: see below.\n",
            table(["varied", "value", *works], grown) + "\n",
            "### A sweep over an 8B model, on paper\n",
            f"Circuits of edges by {len(report['methods'])} methods ({', '.join(f'`{name}`' for name in report['methods'])}) on "
            f"{len(report['sweep'])} tasks of 100 pairs: edges are scored on half of them, circuits of MIB's ten sizes, five random ones of each and "
            f"the smallest faithful one are measured on the rest. Passes (of batches of 10) are those of `patchlab sweep plan` on a model of "
            f"Llama-3.1-8B's depth and heads with tiny width, times its {report['token_flops'] / 2e9:.1f} billion weights, at an assumed "
            f"{report['speed'] / 1e12:g} "
            f"TFLOP/s in bfloat16; a circuit is priced as measured above. Nothing of this was run on a GPU; attention, memory traffic and loading "
            f"come on top.\n",
            table(["task", "tokens", "forward passes", "backward passes", "GPU-hours"], planned) + "\n",
            f"Together **{report['hours']:.1f} GPU-hours**, of which the scores take {scores:.2f}: the rest measures circuits.\n",
        ]
    )


def gpu_page(report: dict[str, Any]) -> str:
    """Everything on a GPU; or that nobody has run it yet."""
    title = "## On a GPU\n"
    how = "`python -m benchmarks.gpu --minutes 10 --out DIR`"
    if not report:
        return f"{title}\nNot measured yet: no number on this page comes from a GPU. {how} measures it in ten minutes, with nothing to download.\n"
    results: dict[str, dict[str, Any]] = report["results"]
    parts = [title, f"{_machine(report)} Made by {how}; {report['pairs']} pairs of {report['length']} tokens of which one differs.\n"]
    of: dict[str, list[dict[str, Any]]] = {}
    for result in results.values():
        of.setdefault(result["piece"], []).append(result)
    for row in of.get("agree", []):
        worst = row["worst"]
        parts.append(
            f"{row['model']}: {len(row['rows'])} score maps on the GPU and on the CPU differ by {worst['off']:.1e} of the largest score at most "
            f"({worst['method']}, {worst['site']}; {row['within']:.0e} allowed).\n"
        )
    for piece, what in (("linearised", "All node sites"), ("edges", "All edges")):
        rows = [
            [row["model"], row["dtype"], method, _number(row["seconds"][method], " s"), _number(ratio, "×"), _number(row["peak_gb"][method], " GB")]
            for row in of.get(piece, [])
            for method, ratio in row["ratios"].items()
        ]
        if rows:
            parts += [f"{what}, against two forward passes and one backward pass of the plain model.\n"]
            parts.append(table(["model", "dtype", "method", "time", "of the plain passes", "peak memory"], rows) + "\n")
    rows = [
        [
            row["model"],
            row["dtype"],
            one["map"],
            one["engine"],
            _number(one["ratio"], "×"),
            _number(one["seconds"], " s"),
            _number(one["peak_gb"], " GB"),
        ]
        for row in of.get("maps", [])
        for one in row["rows"]
    ]
    if rows:
        parts += ["Exact maps, against TransformerLens' patching on the same GPU.\n"]
        parts.append(table(["model", "dtype", "map", "engine", "ratio", "patchlab", "peak memory"], rows) + "\n")
    rows = [
        [row["model"], row["dtype"], row["edges"], f"{row['hours_for_all_edges_extrapolated']} h", *(_number(v, "×") for v in row["ratios"].values())]
        for row in of.get("exact edges", [])
    ]
    if rows:
        parts += ["Exact edges, a sample extrapolated to all, against whole passes for every edge (as above).\n"]
        parts.append(table(["model", "dtype", "edges", "all edges", *of["exact edges"][0]["ratios"]], rows) + "\n")
    rows = [
        [row["model"], row["dtype"], _number(row["seconds"]["verified"], " s"), _number(row["ratio"], "×"), row["recall"]]
        for row in of.get("verified", [])
    ]
    if rows:
        parts += ["Verified patching of the 10 largest heads at positions, against the whole map.\n"]
        parts.append(table(["model", "dtype", "time", "faster", "recall"], rows) + "\n")
    missing = {**{name: f"failed: {row['error']}" for name, row in report["failed"].items()}, **report["left_out"]}
    if missing:
        parts.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + ".\n")
    return "\n".join(parts)


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "exact_sweep": sweep_page,
    "linearized": linearized_page,
    "edges": edges_page,
    "verified": verified_page,
    "features": features_page,
    "scaling": scaling_page,
}


def page(reports: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    parts = [
        "# Performance\n",
        "Made by `python scripts/pages/make_performance_page.py` from `benchmarks/results/`; do not edit. Models have random weights of the shapes "
        "of GPT-2 small and of a small Llama (12 layers, width 768, 12 heads, 4 of them for keys and values).\n",
    ]
    return "\n".join([*parts, *(PARTS[name](reports[name]) + "\n" for name in PARTS if name in reports), gpu_page(reports.get("gpu", {}))])


def main() -> None:
    """Take in new results, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="*", type=Path, help="outputs of benchmarks run with --json")
    for path in parser.parse_args().outputs:
        new = next(json.loads(line) for line in reversed(path.read_text(encoding="utf-8").splitlines()) if line.startswith("{"))
        file = RESULTS / f"{new['benchmark']}.json"
        old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(merged(old, new), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
