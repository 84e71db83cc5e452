"""Make docs/families.md: what works on which architecture, measured on tiny models with random weights.

Run it in the repository: ``python scripts/pages/make_families_page.py`` (about six minutes on one core). Every cell is measured by
:mod:`patchlab.testing.family`; nothing is looked up.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import transformers

from patchlab.testing.family import Family, measure_family
from patchlab.testing.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 2
RULES = ("relp", "relp-ah")
RIGHT = 1e-6
"""Share of the largest effect that rounding may make up: parts of some models compute in single precision whatever the model's dtype."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


class Notes:
    """Reasons, each written once and numbered."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        """The mark of a reason."""
        text = text.strip().rstrip(".") + "."
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}](#reasons)"

    def __str__(self) -> str:
        return "\n".join(f"{i}. {text}" for i, text in enumerate(self.texts, 1))


def agreement(gap: float, allowed: float) -> str:
    """``yes``, or how wrong."""
    return "yes" if gap <= allowed else f"**no, off by {gap:.2g}**"


def engine(text: str, notes: Notes) -> str:
    """The way cells are run, with a reason where it is not the fastest."""
    mode, _, reason = text.partition(" (")
    return mode if not reason else f"{mode} {notes(reason.removesuffix(')'))}"


def row(family: Family, notes: Notes) -> list[str]:
    """What the table says of a family."""
    name = f"`{family.name}`"
    if family.refused is not None:
        return [name, f"refused {notes(_general(family.refused, family.name))}", *["–"] * (5 + len(RULES))]
    allowed = 1e-4 if family.single else RIGHT
    exact = f"{agreement(family.gap, allowed)}, {engine(family.engine, notes)}"
    reasons: dict[str, list[str]] = {}
    for site, reason in family.absent.items():
        reasons.setdefault(re.sub(r"blocks\.\d+\.(attn\.|mlp\.)?hook_\w+", "for it", reason), []).append(site)
    absent = ", ".join(f"{', '.join(f'`{site}`' for site in sites)} {notes(reason)}" for reason, sites in reasons.items()) or "none"
    rules = ["conserves" if (why := family.rules[composite]) is None else f"refused {notes(_general(why, composite))}" for composite in RULES]
    if family.edges_gap is None:
        edges = ["refused " + notes(_general(family.no_edges or "", family.name)), "–"]
    else:
        edges = [engine(family.edges, notes), agreement(family.edges_gap, 1e-3 if family.single else RIGHT)]
    gap = family.features_gap
    features = f"refused {notes(_general(gap, family.name))}" if isinstance(gap, str) else agreement(gap, allowed)
    return [name, "yes", exact, absent, *rules, *edges, features]


def _general(reason: str, name: str) -> str:
    """A reason without what differs between models, so that it is written once."""
    reason = re.sub(r"get_composite\('[^']+'", "get_composite(name", reason.replace(f"the composite {name!r}", "the composite"))
    reason = re.sub(r"does not cover all of [\w.-]+:", "does not cover", reason).removeprefix(f"{name}: ")
    return re.sub(r"blocks\.\d+\.", "a block's ", re.sub(rf"^{re.escape(name)} (\(\w+\) )?", "it ", reason))


def page(families: Sequence[Family]) -> str:
    """The page."""
    notes = Notes()
    header = ["family", "loads", "exact = literal", "absent sites", *(f"`{name}`" for name in RULES), "edges", "edges of a node = node", "features"]
    body = table(header, [row(family, notes) for family in families])
    return f"""# Families

What works on which architecture. Each row is measured on a model of {LAYERS} layers with random weights (`patchlab.testing.zoo`), in float64 where
the architecture runs in it, with transformers {transformers.__version__} and TransformerLens {version("transformer-lens")};
`python scripts/pages/make_families_page.py` makes this page. A cell says what was found, or that patchlab refuses, with the reason.

- **loads**: the bridged model gives the logits of the Hugging Face model, and its residual stream passes the self-test.
- **exact = literal**: exact patching of every site, also by position and head, against one whole forward pass per cell. `prefix` computes
  only what a patch can change, `replay` whole prompts from the patched layer on, `literal` whole passes.
- **absent sites**: not offered on this model. A site is offered if its activation has the shape and the positions of its site, an edit
  arrives and arrives alone, and it changes only the positions and heads that its address names (tried with random values).
- **`relp`, `relp-ah`**: whether the rules cover the model. *Conserves*: every place computes what its rule takes it for, queries and keys get no
  gradient where the pattern is held, and with every non-linearity held the embedding, each block and the unembedding pass on all relevance, to
  1e-5 of it. Otherwise the rules refuse, and name the module.
- **edges**: how single edges are patched. **Edges of a node = node**: all edges out of a node patched together change the metric as
  patching the node does.
- **features**: exact patching of the features and errors of random dictionaries on `resid_post`, `attn_out` and `mlp_out` is that of whole passes,
  and under AtP and the rules that cover the model they add up to the scores of nodes.

In a mixture of experts, rules sit inside every expert, and routing weights are constants.

{body}

## Reasons

{notes}
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--only", nargs="*", default=ZOO, help="families to measure")
    options = parser.parse_args()
    families = []
    for name in options.only:
        sys.stderr.write(f"{name}\n")
        families.append(measure_family(name, layers=LAYERS, rules=RULES))
    options.out.write_text(page(families), encoding="utf-8")


if __name__ == "__main__":
    main()
