"""Circuits as DOT text, the language of Graphviz."""

import numpy as np

from patchlab.circuits.sparse import AnyCircuit, with_edges

_STYLES = {"q": "dashed", "k": "dotted"}
_COLOURS = {"denoising": ("#b2182b", "#2166ac"), "noising": ("#2166ac", "#b2182b")}
"""Of a negative and a positive effect: blue supports the behaviour, red works against it."""
_WIDEST = 6.0


def to_dot(circuit: AnyCircuit) -> str:
    """The circuit as a digraph in DOT, layers from bottom to top.

    An edge into a head carries its letter ``q``, ``k`` or ``v`` as label; width grows with |score|. Blue edges support the behaviour, red ones work
    against it (purple and green, a negative and a positive score, where the circuit does not say in which direction was patched), grey ones have
    no score. A position-resolved circuit is collapsed, and says so in a comment. Graphviz (``dot -Tsvg``) draws it; patchlab does not need it.

    Example:
        >>> from patchlab.circuits import Circuit
        >>> from patchlab.graph import Graph
        >>> print(to_dot(Circuit.of(Graph(1, 1, 4), ["input->a0.h0<v>", "a0.h0->logits"])))
        digraph circuit {
          // a graph of 1 layers × 1 heads, width 4: 2 of 8 edges
          rankdir=BT; node [shape=box, fontname="Helvetica"]; edge [fontname="Helvetica", fontsize=9];
          { rank=same; "input"; }
          { rank=same; "a0.h0"; }
          { rank=same; "logits"; }
          "input" -> "a0.h0" [label="v", color="#8b949e", penwidth=1.00, style=solid, tooltip="input->a0.h0<v>"];
          "a0.h0" -> "logits" [color="#8b949e", penwidth=1.00, style=solid, tooltip="a0.h0->logits"];
        }
    """
    circuit = with_edges(circuit, "a graph in DOT")
    flat, graph = circuit.collapsed(), circuit.graph
    pairs = np.argwhere(flat.edges)
    scores = np.full(len(pairs), np.nan) if flat.scores is None else flat.scores[tuple(pairs.T)]
    negative, positive = _COLOURS.get(circuit.provenance.get("direction", ""), ("#762a83", "#1b7837"))
    largest = float(np.nan_to_num(np.abs(scores)).max(initial=0.0)) or 1.0
    lines = ["digraph circuit {", f"  // {graph}: {flat.n_edges:,} of {graph.n_edges:,} edges"]
    if circuit.n_positions is not None:
        lines.append(f"  // {circuit.n_positions} positions collapsed: an edge is there if it is kept at any, its score is the sum")
    lines.append('  rankdir=BT; node [shape=box, fontname="Helvetica"]; edge [fontname="Helvetica", fontsize=9];')
    rows: dict[tuple[str, int | None], list[str]] = {}
    for node, kept in zip(graph.node_table, circuit.node_mask, strict=True):
        if kept:
            rows.setdefault((node.kind, node.layer), []).append(node.name)
    for row in rows.values():
        lines.append("  { rank=same; " + " ".join(f'"{node}";' for node in row) + " }")
    for (writer, reader), score in zip(pairs.tolist(), scores.tolist(), strict=True):
        kind, known = graph.reader_kind[reader], not np.isnan(score)
        label = f'label="{kind}", ' if len(kind) == 1 else ""
        colour = "#8b949e" if not known else negative if score < 0 else positive
        width = 1.0 + (_WIDEST - 1.0) * abs(score) / largest if known else 1.0
        tooltip = graph.name(writer, reader) + (f" {score:+.4g}" if known else "")
        look = f'{label}color="{colour}", penwidth={width:.2f}, style={_STYLES.get(kind, "solid")}, tooltip="{tooltip}"'
        lines.append(f'  "{graph.writers[writer]}" -> "{graph.nodes[graph.reader_node[reader]]}" [{look}];')
    return "\n".join([*lines, "}"])
