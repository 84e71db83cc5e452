"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 and before; also what patchlab itself writes.

Read from the source of SAELens 6.54.12. ``batchtopk`` and ``matryoshka_batchtopk`` dictionaries are written by it as ``jumprelu``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchlab.errors import DictionaryError, unknown
from patchlab.features.activations import AbsTopK, Activation, Codes, JumpRelu, Relu, SignedTopK, TopK, gated
from patchlab.features.dictionary import KINDS, Dictionary, folded
from patchlab.features.formats.format import Format, Said, needed, read_json
from patchlab.features.formats.tensors import Tensors, read_tensors
from patchlab.features.hooks import site_of
from patchlab.features.normalisation import UNCHANGED, ConstantNorm, LayerNorm, Normalisation
from patchlab.features.writer import CFG, OWN, WEIGHTS
from patchlab.store.files import sha256_of

SCALER = "activation_scaler.json"
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("standard", "jumprelu", "topk", "abstopk", "gated", *_TRANSCODERS, OWN)
_NOT_HERE = {
    "batchtopk": "SAELens itself writes these as jumprelu, with the threshold of inference, and reads no file of this name",
    "matryoshka_batchtopk": "SAELens itself writes these as jumprelu, with the threshold of inference, and reads no file of this name",
    "temporal": "its features depend on other positions than their own, which patchlab has no site for",
    "matching_pursuit": "its features come from an iteration rather than an encoder, which patchlab does not have",
}
_METADATA = (
    "model_name",
    "hook_name",
    "hook_name_out",
    "hook_head_index",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "context_size",
    "dataset_path",
    "neuronpedia_id",
    "sae_lens_version",
)


def _read(folder: Path, said: Said) -> Iterator[Dictionary]:
    file = folder / CFG
    cfg = read_json(file)
    version = cfg.get("sae_lens_version") or (cfg.get("metadata") or {}).get("sae_lens_version")
    if not _is_six(version):
        cfg = _from_before_six(cfg)
    architecture = needed(cfg, "architecture", str, file)
    if architecture not in ARCHITECTURES:
        raise DictionaryError(f"{file}: " + unknown("architecture", architecture, ARCHITECTURES, more=_why_not(architecture)))
    metadata = needed(cfg, "metadata", dict, file)
    weights = folder / WEIGHTS
    _check_digest(weights, metadata.get("patchlab"))
    tensors = read_tensors(weights)
    tensors.architecture = architecture
    yield _dictionary(cfg, metadata, tensors, folder, said)


def _is_six(version: Any) -> bool:
    major = str(version or "0").split(".")[0]
    return major.isdigit() and int(major) >= 6


def _from_before_six(cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a version before 6, with flat and other keys, as SAELens 6 reads it."""
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
    new = {renamed.get(key, key): value for key, value in cfg.items()}
    new.setdefault("architecture", "standard")
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in (new.get("hook_name") or "") else "none")
    if new.get("activation_fn") == "topk" and (k := (new.get("activation_fn_kwargs") or {}).get("k")) is not None:
        new |= {"architecture": "topk", "k": k}
    elif new.get("activation_fn", "relu") not in ("relu", None):
        new["architecture"] = f"{new['architecture']} with {new['activation_fn']}"
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    new["metadata"] = {key: value for key, value in new.items() if key in _METADATA}
    return new


def _why_not(architecture: str) -> str:
    return f"It is not read because {_NOT_HERE[architecture]}." if architecture in _NOT_HERE else ""


def _check_digest(weights: Path, ours: Any) -> None:
    """Check the weights of a folder that patchlab wrote against what it noted of them."""
    noted = ours.get("sha256") if isinstance(ours, dict) else None
    if noted is not None and weights.is_file() and sha256_of(weights) != noted:
        raise DictionaryError(f"{weights}: its bytes are not those that were written with {CFG}; it is damaged or from another dictionary.")


def _dictionary(cfg: dict[str, Any], metadata: dict[str, Any], tensors: Tensors, folder: Path, said: Said) -> Dictionary:
    file, architecture = folder / CFG, tensors.architecture
    own = metadata.get("patchlab") if architecture == OWN else None
    own = own if isinstance(own, dict) else {}
    d_in, d_sae = needed(cfg, "d_in", int, file), needed(cfg, "d_sae", int, file)
    needed(cfg, "dtype", str, file)
    transcodes = architecture in _TRANSCODERS
    d_out = needed(cfg, "d_out", int, file) if transcodes else cfg.get("d_out", d_in)
    subtract = bool(cfg.get("apply_b_dec_to_input", not transcodes))
    if transcodes and subtract:
        raise DictionaryError(
            f"{file}: apply_b_dec_to_input is true, which {architecture} does not have: input and output are different activations."
        )
    if metadata.get("hook_head_index") is not None:
        raise DictionaryError(f"{file}: it reads head {metadata['hook_head_index']} alone; patchlab reads dictionaries on all heads jointly.")
    hook = needed(metadata, "hook_name", str, file)
    try:
        reads, layer, all_layers = site_of(hook)
        out = metadata.get("hook_name_out")
        writes = own.get("writes") or (reads if not transcodes else site_of(out)[0] if out else "mlp_out")
    except DictionaryError as error:
        raise DictionaryError(f"{file}: {error}") from None
    if hook.endswith(".hook_mlp_in") and "layernorm.output" in str(metadata.get("hf_hook_name")):
        reads = "mlp_in"  # converted Gemma Scope 2 transcoders, which read what follows the norm
    kind = own.get("kind") or ("transcoder" if transcodes else "multi_layer" if all_layers else "sae")
    if kind not in KINDS:
        raise DictionaryError(f"{file}: " + unknown("kind of dictionary", kind, KINDS))
    to_layers = (None,) if kind == "cross_layer_transcoder" else ()

    w_enc = tensors.take("W_enc", (d_in, d_sae))
    w_dec = tensors.take("W_dec", (d_sae, *to_layers, d_out))
    b_dec = tensors.take("b_dec", (d_out,))
    if architecture == "gated":
        parts = (tensors.take(name, (d_sae,)) for name in ("b_gate", "b_mag", "r_mag"))
        w_enc, b_enc, activation = gated(w_enc, *parts)
    else:
        b_enc = tensors.take("b_enc", (d_sae,))
        activation = _activation(cfg, own.get("activation"), tensors, d_sae, file)
    if cfg.get("rescale_acts_by_decoder_norm") and architecture in ("topk", "abstopk"):
        norms = w_dec.norm(dim=-1)
        if not bool((norms > 0).all()):
            raise DictionaryError(f"{file}: rescale_acts_by_decoder_norm divides by the norms of W_dec, and {int((norms == 0).sum())} are zero.")
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    skips = architecture.endswith("skip_transcoder") or (architecture == OWN and "W_skip" in tensors)
    w_skip = tensors.take("W_skip", (d_out, d_in)).T.contiguous() if skips else None
    if "scaling_factor" in tensors and bool((tensors.values["scaling_factor"] == 1).all()):
        tensors.take("scaling_factor")  # versions before 6 wrote ones
    tensors.done()

    normalise, factor = _normalisation(cfg, file, said)
    if factor != 1:
        if transcodes:
            raise DictionaryError(f"{file}: a factor on the input of a transcoder (input_scale={factor:g}) is not implemented; 1 reads it unscaled.")
        w_enc, w_dec, b_dec = *folded(w_enc, w_dec, factor), b_dec / factor
    return Dictionary(
        name=(metadata.get("patchlab") or {}).get("name") or folder.name,
        kind=kind,
        layer=layer,
        reads=reads,
        writes=writes,
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        activation=activation,
        w_skip=w_skip,
        subtract_b_dec=subtract,
        normalise=normalise,
        provenance={
            "file": str(tensors.file),
            "format": "SAELens",
            "architecture": architecture,
            "model_name": metadata.get("model_name"),
            "metadata": {key: value for key, value in metadata.items() if key not in ("patchlab", "hook_name_out")},
        },
    )


def _activation(cfg: dict[str, Any], own: str | None, tensors: Tensors, d_sae: int, file: Path) -> Activation:
    name = own or tensors.architecture
    if "jumprelu" in name:
        return JumpRelu(tensors.take("threshold", (d_sae,)))
    kinds = {"topk": TopK, "abstopk": AbsTopK, "signedtopk": SignedTopK, "codes": Codes}
    if name not in kinds:
        return Relu()
    k = needed(cfg, "k", int, file)
    if not 1 <= k <= d_sae:
        raise DictionaryError(f"{file}: k is from 1 to the number of features, {d_sae}; got {k}.")
    return kinds[name](k)


def _normalisation(cfg: dict[str, Any], file: Path, said: Said) -> tuple[Normalisation, float]:
    """What is done to each row, and a factor that all rows share."""
    name = cfg.get("normalize_activations") or "none"
    if name == "expected_average_only_in":
        scaler = file.with_name(SCALER)
        factor = said.input_scale
        if factor is None and scaler.is_file():
            factor = read_json(scaler).get("scaling_factor")
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise DictionaryError(
                f"{file}: it was trained on activations scaled to the average norm √d_in (normalize_activations: expected_average_only_in), and the "
                f"factor is not in the file. Pass input_scale=√d_in / (mean norm in training); input_scale=1 reads it unscaled, as SAELens does."
            )
        return UNCHANGED, float(factor)
    known = {"none": UNCHANGED, "layer_norm": LayerNorm(), "constant_norm_rescale": ConstantNorm()}
    if name not in known:
        raise DictionaryError(
            f"{file}: " + unknown("normalisation", name, known, more="It is not implemented here, and without it every number would be wrong.")
        )
    return known[name], 1.0


SAELENS = Format("SAELens", (CFG, WEIGHTS, SCALER), (CFG, WEIGHTS), _read)
