"""Every kind of dictionary, with every activation and normalisation, against a literal computation in float64, one number at a time."""

import copy
import itertools
import math

import pytest
import torch
from families import model_of

from patchlab.errors import DictionaryError
from patchlab.features import AbsTopK, Codes, ConstantNorm, Dictionary, JumpRelu, LayerNorm, Relu, TopK, codebook, folded, gated
from patchlab.testing.dictionaries import random_dictionary

D, WIDTH = 16, 24
THRESHOLD = torch.linspace(-0.5, 1.5, WIDTH, dtype=torch.float64)
ACTIVATIONS = {"relu": Relu(), "jumprelu": JumpRelu(THRESHOLD), "topk": TopK(5), "abstopk": AbsTopK(5)}


def model():
    return model_of("gpt2", torch.float64)


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_activation(name: str, pre: list[float], k: int = 5) -> list[float]:
    if name == "relu":
        return [max(p, 0.0) for p in pre]
    if name == "jumprelu":
        return [p if p > 0 and p > t else 0.0 for p, t in zip(pre, THRESHOLD.tolist(), strict=True)]
    size = [abs(p) if name == "abstopk" else p for p in pre]
    largest = sorted(range(len(pre)), key=lambda i: -size[i])[:k]
    kept = [p if i in largest else 0.0 for i, p in enumerate(pre)]
    return [max(p, 0.0) for p in kept] if name == "topk" else kept


def literal(dictionary: Dictionary, activation: str, x: list[float], norm: str = "none") -> tuple[list[float], list[float]]:
    """Features and output for one vector."""
    w_enc, b_enc, w_dec, b_dec = (part.tolist() for part in (dictionary.w_enc, dictionary.b_enc, dictionary.w_dec, dictionary.b_dec))
    d_in, d_out, raw = len(x), len(b_dec), x
    if norm == "layer_norm":
        mean = sum(x) / d_in
        sd = math.sqrt(sum((v - mean) ** 2 for v in x) / (d_in - 1))
        x = [(v - mean) / (sd + 1e-5) for v in x]
    if norm == "constant_norm":
        factor = math.sqrt(d_in) / math.sqrt(sum(v * v for v in x))
        x = [v * factor for v in x]
    entered = [v - b_dec[i] for i, v in enumerate(x)] if dictionary.subtract_b_dec else x
    pre = [sum(entered[i] * w_enc[i][f] for i in range(d_in)) + b_enc[f] for f in range(len(b_enc))]
    features = literal_activation(activation, pre)
    y = [sum(features[f] * w_dec[f][o] for f in range(len(features))) + b_dec[o] for o in range(d_out)]
    if dictionary.w_skip is not None:
        skip = dictionary.w_skip.tolist()
        return features, [y[o] + sum(raw[i] * skip[i][o] for i in range(d_in)) for o in range(d_out)]
    if dictionary.kind == "transcoder":
        return features, y
    if norm == "layer_norm":
        y = [v * sd + mean for v in y]
    if norm == "constant_norm":
        y = [v / factor for v in y]
    return features, y


@pytest.mark.parametrize(
    ("activation", "norm", "subtract"), list(itertools.product(ACTIVATIONS, ("none", "layer_norm", "constant_norm"), (False, True))), ids=str
)
def test_autoencoder_is_its_formula(activation, norm, subtract):
    normalise = {"layer_norm": LayerNorm(), "constant_norm": ConstantNorm()}.get(norm)
    options = {} if normalise is None else {"normalise": normalise}
    dictionary = random_dictionary(model(), activation=ACTIVATIONS[activation], subtract_b_dec=subtract, **options)
    x = inputs(2, 3, D)
    features, y = dictionary.encode(x), dictionary.reconstruct(x)
    assert features.shape == (2, 3, WIDTH)
    assert y.shape == x.shape
    for row, pos in itertools.product(range(2), range(3)):
        expected = literal(dictionary, activation, x[row, pos].tolist(), norm)
        torch.testing.assert_close(features[row, pos], torch.tensor(expected[0], dtype=torch.float64))
        torch.testing.assert_close(y[row, pos], torch.tensor(expected[1], dtype=torch.float64))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_transcoder_is_its_formula(skip, norm):
    options = {"normalise": LayerNorm()} if norm == "layer_norm" else {}
    dictionary = random_dictionary(model(), kind="transcoder", skip=skip, activation=ACTIVATIONS["jumprelu"], **options)
    assert (dictionary.reads, dictionary.writes) == ("mlp_in", "mlp_out")
    x = inputs(4, D)
    assert dictionary.needs_input == skip
    assert torch.equal(dictionary.scale(x), torch.ones(4, 1, dtype=torch.float64))
    for row in range(4):
        _, y = literal(dictionary, "jumprelu", x[row].tolist(), norm)
        torch.testing.assert_close(dictionary.reconstruct(x)[row], torch.tensor(y, dtype=torch.float64))


@pytest.mark.parametrize("skip", [False, True])
def test_cross_layer_transcoder_writes_to_its_layer_and_later_ones(skip):
    dictionary = random_dictionary(model(), kind="cross_layer_transcoder", layer=1, skip=skip)
    x = inputs(4, D)
    features, y = dictionary.encode(x), dictionary.reconstruct(x)
    assert y.shape == (4, 2, D)
    own = dictionary.b_dec + (x @ dictionary.w_skip if skip else 0)
    for to in range(2):
        expected = sum(features[:, f, None] * dictionary.w_dec[f, to] for f in range(WIDTH)) + (own if to == 0 else 0)
        torch.testing.assert_close(y[:, to], expected)


def test_thresholds_are_not_passed_by_what_equals_them():
    pre = torch.tensor([[0.0, 0.5, 0.5, -0.2, 1.0]])
    features = JumpRelu(torch.tensor([0.0, 0.5, 0.49, -1.0, -1.0]))(pre)
    assert features.tolist() == [[0.0, 0.0, 0.5, 0.0, 1.0]]


def test_top_k_drops_what_is_negative_and_abs_top_k_keeps_it():
    pre = torch.tensor([[3.0, -4.0, -1.0, -0.5]])
    assert TopK(2)(pre).tolist() == [[3.0, 0.0, 0.0, 0.0]]
    assert AbsTopK(2)(pre).tolist() == [[3.0, -4.0, 0.0, 0.0]]


def test_gated_dictionary_is_a_threshold_on_its_magnitude():
    w_enc, x = inputs(D, WIDTH), inputs(50, D, seed=2)
    b_gate, b_mag, r_mag = (inputs(WIDTH, seed=3 + i) for i in range(3))
    encoder, bias, activation = gated(w_enc, b_gate, b_mag, r_mag)
    expected = torch.zeros(50, WIDTH, dtype=torch.float64)
    for row, f in itertools.product(range(50), range(WIDTH)):
        product = sum(x[row, i].item() * w_enc[i, f].item() for i in range(D))
        if product + b_gate[f] > 0:
            expected[row, f] = max(product * math.exp(r_mag[f]) + b_mag[f].item(), 0.0)
    torch.testing.assert_close(activation(x @ encoder + bias), expected)
    assert 0.1 < float((expected > 0).double().mean()) < 0.9


def test_gradient_is_the_mask():
    for name, activation in ACTIVATIONS.items():
        pre = inputs(7, WIDTH, seed=4).requires_grad_()
        features = activation(pre)
        features.sum().backward()
        assert torch.equal(pre.grad, activation.mask(pre).double()), name
        torch.testing.assert_close(features, pre * pre.grad)


def test_encoding_and_decoding_are_differentiable():
    dictionary = random_dictionary(model(), activation=Relu(), normalise=LayerNorm(), subtract_b_dec=True)
    assert torch.autograd.gradcheck(dictionary.reconstruct, (inputs(2, D).requires_grad_(),))


def test_constant_factor_belongs_into_the_weights():
    plain = random_dictionary(model())
    w_enc, w_dec = folded(plain.w_enc, plain.w_dec, 2.5)
    scaled = Dictionary("folded", "sae", 0, "resid_post", "resid_post", w_enc, plain.b_enc, w_dec, plain.b_dec / 2.5, Relu())
    x = inputs(3, D)
    torch.testing.assert_close(scaled.encode(x), plain.encode(x * 2.5))
    torch.testing.assert_close(scaled.reconstruct(x), plain.reconstruct(x * 2.5) / 2.5)


def test_heads_are_encoded_jointly():
    dictionary = random_dictionary(model(), reads="z")
    z = inputs(2, 3, 4, 4)
    joint = Dictionary(**{**vars_of(dictionary), "heads": None, "reads": "attn_out", "writes": "attn_out"})
    assert torch.equal(dictionary.encode(z), joint.encode(z.flatten(-2)))
    assert dictionary.reconstruct(z).shape == z.shape
    assert torch.equal(dictionary.reconstruct(z).flatten(-2), joint.reconstruct(z.flatten(-2)))
    with pytest.raises(DictionaryError, match=r"reads z of shape \[\.\.\., 4, 4\]; got \[2, 3, 16\]"):
        dictionary.encode(z.flatten(-2))


@pytest.mark.parametrize("cosine", [True, False])
def test_codebook_sums_the_nearest_codes(cosine):
    codes, x = inputs(WIDTH, D), inputs(6, D, seed=5)
    book = codebook("book", codes, k=3, layer=1, reads="mlp_out", cosine=cosine)
    for row in range(6):
        fit = [float(x[row] @ c / c.norm() / x[row].norm()) if cosine else -float((x[row] - c).norm()) for c in codes]
        best = sorted(range(WIDTH), key=lambda i: -fit[i])[:3]
        assert book.encode(x)[row].nonzero().flatten().tolist() == sorted(best)
        torch.testing.assert_close(book.reconstruct(x)[row], sum(codes[i] for i in best))
    only = torch.zeros(1, WIDTH, dtype=torch.float64)
    only[0, 7] = 1
    torch.testing.assert_close(book.decode(only)[0], codes[7])


def test_multi_layer_dictionary_has_no_layer():
    assert random_dictionary(model(), kind="multi_layer", layer=None).layer is None
    with pytest.raises(DictionaryError, match="a multi_layer dictionary has the layer 0"):
        random_dictionary(model(), kind="multi_layer", layer=0)
    with pytest.raises(DictionaryError, match="a sae dictionary has no layer"):
        random_dictionary(model(), layer=None)


def test_scale_is_what_features_are_multiplied_by():
    x = inputs(3, D)
    for normalise in (LayerNorm(), ConstantNorm()):
        dictionary = random_dictionary(model(), normalise=normalise)
        features = dictionary.encode(x)
        moved = features.clone()
        moved[:, 4] += 1.5
        change = dictionary.decode(moved, x) - dictionary.decode(features, x)
        torch.testing.assert_close(change, 1.5 * dictionary.scale(x) * dictionary.w_dec[4])
    assert torch.equal(random_dictionary(model()).scale(x), torch.ones(3, 1, dtype=torch.float64))


def test_identity_tells_what_computes_something_else():
    plain = random_dictionary(model())
    fields = vars_of(plain)
    assert Dictionary(**{**fields, "name": "other", "provenance": {"file": "x"}}).identity == plain.identity
    changes = [
        {"w_dec": plain.w_dec * 2},
        {"activation": TopK(3)},
        {"activation": TopK(4)},
        {"activation": JumpRelu(THRESHOLD)},
        {"subtract_b_dec": True},
        {"normalise": LayerNorm()},
        {"normalise": ConstantNorm()},
        {"layer": 1},
        {"reads": "resid_pre", "writes": "resid_pre"},
        {"w_skip": torch.eye(D, dtype=torch.float64)},
    ]
    others = [Dictionary(**{**fields, **change}).identity for change in changes]
    assert len({plain.identity, *others}) == len(changes) + 1


def test_precision_and_device_move_everything():
    half = random_dictionary(model(), activation=JumpRelu(THRESHOLD), skip=True, kind="transcoder").to(dtype=torch.float32)
    assert half.dtype == half.activation.threshold.dtype == half.w_skip.dtype == torch.float32
    assert half.encode(inputs(2, D)).dtype == half.reconstruct(inputs(2, D)).dtype == torch.float32
    assert half.to("cpu").identity == half.identity


def test_decoding_that_needs_the_input_says_so():
    for dictionary in (random_dictionary(model(), kind="transcoder", skip=True), random_dictionary(model(), normalise=LayerNorm())):
        with pytest.raises(DictionaryError, match=r"needs the input again; call decode\(features, x\)"):
            dictionary.decode(inputs(2, WIDTH))


def vars_of(dictionary: Dictionary) -> dict:
    return {name: getattr(dictionary, name) for name in dictionary.__dataclass_fields__}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "saae"}, "unknown kind of dictionary 'saae'; did you mean 'sae'"),
        ({"b_enc": torch.zeros(3)}, r"b_enc has the shape \[3\], where w_enc and w_dec make it \[24\]"),
        ({"b_dec": torch.zeros(3)}, r"b_dec has the shape \[3\]"),
        ({"w_dec": torch.zeros(D, WIDTH)}, r"w_dec has the shape \[16, 24\], where w_enc and w_dec make it \[24, 24\]"),
        ({"w_dec": torch.zeros(WIDTH, 2, D)}, r"w_dec of a sae \[feature, d_out\]; got \[16, 24\] and \[24, 2, 16\]"),
        ({"w_enc": torch.full((D, WIDTH), torch.nan)}, "w_enc holds 384 of 384 values that are NaN or infinite"),
        ({"activation": JumpRelu(torch.zeros(1))}, r"a threshold has one number per feature, \[24\]; got the shape \[1\]"),
        ({"activation": JumpRelu(torch.full((WIDTH,), torch.nan))}, "24 of 24 thresholds are NaN"),
        ({"activation": TopK(25)}, "k is from 1 to the number of features, 24; got 25"),
        ({"activation": Codes(2)}, "got the activation Codes in a sae"),
        ({"writes": "mlp_out"}, "reconstructs what it reads; this one reads resid_post"),
        ({"heads": 3}, "3 heads do not divide the width 16"),
        ({"w_skip": torch.zeros(D, 3)}, r"w_skip has the shape \[16, 3\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_together_is_refused(change, message):
    changed = copy.copy(random_dictionary(model()))
    for part, value in change.items():  # past the constructor, whose shapes are checked in tests before it can say something
        object.__setattr__(changed, part, value)
    with pytest.raises(DictionaryError, match=message):
        changed.__post_init__()


def test_repr_says_what_it_is():
    assert repr(random_dictionary(model(), kind="transcoder", skip=True, layer=2)) == (
        "Dictionary(random transcoder mlp_in/2: skip transcoder, mlp_in → mlp_out of layer 2, 16 -> 24 features, Relu)"
    )
