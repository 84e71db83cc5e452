"""Methods by name, as the command line writes them."""

from patchlab.errors import MethodError, unknown
from patchlab.methods.exact import ActivationPatching
from patchlab.methods.linearized import LinearizedPatching
from patchlab.methods.method import Method
from patchlab.methods.named import AttributionPatching, RelevancePatching, parse_path_method
from patchlab.rules import PRESETS

METHODS: dict[str, str] = {
    "exact": "activation patching: one patched forward pass per cell; the ground truth",
    "exact-frozen": "edges only: exact, but a head's share of a norm after its attention in the baseline's denominator (Gemma 2)",
    "atp": "attribution patching: gradient at the baseline",
    "ig:N": "integrated gradients over the inputs, N points (midpoint rule)",
    "ig-left:N": "the same with the baseline's end of the path, not the source's (ig-right:N the other way round, ig-trapezoid:N both)",
    "ig-activations:N": "integrated gradients over activations: each layer's site moves alone",
    "eap-ig-inputs:N": "EAP-IG over inputs with its own points when noising; results show it as ig-right:N",
    "eap-ig-activations:N": "EAP-IG over activations, for edges: coefficients averaged over all groups that move",
    "clean-corrupted": "mean of the coefficients at the clean and at the corrupted run",
    "relp": "relevance patching: LN-, Identity- and Half-rule",
    "relp-ah": "relp with the attention pattern held constant (q and k are not scored)",
    "attnlrp": "relp with the uniform rule on attention's bilinear maps",
    "cp-lrp": "LN- and Identity-rule, attention pattern and gates held constant",
    "gim": "LN-rule, softmax temperature 2, uniform rule, gate and up ½ each",
    "PRESET+ig:N": "integrated relevance: a rule preset at N points, e.g. relp+ig:5",
    "atp*": "AtP*: atp with QK-fix (softmax recomputed for q and k) and GradDrop (one backward per layer; unsigned)",
    "METHOD+qk": "QK-fix on top of a gradient or relevance method, e.g. atp+qk, relp+qk, ig:5+qk",
    "METHOD+drop": "GradDrop on top of a gradient or relevance method, e.g. atp+drop, relp+qk+drop",
}


def get_method(name: str) -> Method:
    """The method that a name stands for.

    >>> get_method("relp+ig:5").name
    'relp+ig:5'

    Raises:
        MethodError: unknown name.
        RuleError: an unknown preset before ``+ig:N``.
    """
    if name == "exact":
        return ActivationPatching()
    if name == "exact-frozen":
        return ActivationPatching(post_norm="frozen")
    if name == "atp":
        return AttributionPatching()
    if name == "atp*":
        return AttributionPatching(qk_fix=True, grad_drop=True)
    for suffix, option in (("+drop", "grad_drop"), ("+qk", "qk_fix")):
        if name.endswith(suffix) and isinstance(inner := get_method(name.removesuffix(suffix)), LinearizedPatching):
            return inner.corrected(**{option: True})
    if name in PRESETS and name != "gradient":
        return RelevancePatching(name)
    if (method := parse_path_method(name)) is not None:
        return method
    raise MethodError(unknown("method", name, METHODS))
