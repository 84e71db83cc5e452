"""The fit of a dictionary to a model: whether it can have been trained on it."""

from dataclasses import replace

import torch

from patchlab.adapters import NormPlace
from patchlab.errors import DictionaryError, unknown
from patchlab.features.dictionary import Dictionary
from patchlab.features.hooks import hook_of
from patchlab.features.normalisation import LayerNorm
from patchlab.models import Model

_SAME_MODEL = {"gpt2-small": "gpt2", "gpt-2": "gpt2", "gpt2-md": "gpt2-medium", "gpt2-lg": "gpt2-large"}
"""Other names of hub models, as files of dictionaries have them."""

_STREAM = ("input", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def fitted(dictionary: Dictionary, model: Model, *, trained_on: str | None = None, dtype: torch.dtype | None = None) -> Dictionary:
    """The dictionary on the model's device, with its heads known, after a look at whether it belongs to this model.

    Args:
        dictionary: as a file has it.
        model: the model.
        trained_on: the name of another model, where a dictionary of that one is meant.
        dtype: of its weights; default its own, at least float32 and at least that of the model.

    Raises:
        DictionaryError: another model, layer, site or width.
    """
    where = dictionary.provenance.get("file") or dictionary.name
    try:
        _check_model(dictionary, model, trained_on)
        dictionary = replace(dictionary, reads=_site(dictionary.reads, model), writes=_site(dictionary.writes, model))
        _check_layer(dictionary, model)
        for site, width, part in ((dictionary.reads, dictionary.d_in, "reads"), (dictionary.writes, dictionary.d_out, "writes")):
            _check_width(site, width, part, dictionary, model)
        dictionary = _unprocessed(dictionary.to(model.device, _dtype(dictionary, model)), model)
    except DictionaryError as error:
        raise DictionaryError(f"{where}: {error}") from None
    if dictionary.reads == "z":
        dictionary = replace(dictionary, heads=model.arch.n_heads)
    return dictionary if dtype is None else dictionary.to(dtype=dtype)


def _unprocessed(dictionary: Dictionary, model: Model) -> Dictionary:
    """The dictionary for a model as it is, where the file says that it was trained on one with processed weights.

    In models with LayerNorm, centred writing weights take the mean out of what is written to the residual stream: the encoder does that instead.

    Raises:
        DictionaryError: a processing that changes what it reads in another way.
    """
    metadata = dict(dictionary.provenance.get("metadata") or {})
    options = metadata.pop("model_from_pretrained_kwargs", None) or {}
    folds = {"z": ("fold_value_biases", "refactor_factored_attn_matrices"), "mlp_in": ("fold_ln",)}
    if changed := [name for name in folds.get(dictionary.reads, ()) if options.get(name)]:
        raise DictionaryError(
            f"it was trained on {dictionary.reads} of a model loaded with {changed[0]}=True, which is not that of the model as it is."
        )
    centres = any(isinstance(place, NormPlace) and place.centred for place in model.arch.places)
    if not options.get("center_writing_weights") or not centres or dictionary.reads not in _STREAM or isinstance(dictionary.normalise, LayerNorm):
        return dictionary
    if dictionary.normalise.per_row:
        raise DictionaryError("it was trained with center_writing_weights=True, which is not implemented together with its normalisation.")
    b_enc = dictionary.b_enc - dictionary.b_dec @ dictionary.w_enc if dictionary.subtract_b_dec else dictionary.b_enc
    w_enc = dictionary.w_enc - dictionary.w_enc.mean(0)
    return replace(dictionary, w_enc=w_enc, b_enc=b_enc, subtract_b_dec=False, provenance={**dictionary.provenance, "metadata": metadata})


def _dtype(dictionary: Dictionary, model: Model) -> torch.dtype:
    return torch.promote_types(torch.promote_types(dictionary.dtype, model.dtype), torch.float32)


def same_model(one: str, other: str) -> bool:
    """Whether two names are names of one model: without the owner, in any case.

    >>> same_model("gpt2-small", "openai-community/gpt2"), same_model("google/gemma-2-2b", "gemma-2-9b")
    (True, False)
    """
    short = [name.rstrip("/").split("/")[-1].lower() for name in (one, other)]
    return len({_SAME_MODEL.get(name, name) for name in short}) == 1


def _check_model(dictionary: Dictionary, model: Model, trained_on: str | None) -> None:
    said = dictionary.provenance.get("model_name")
    if said is None or same_model(said, model.name) or (trained_on is not None and same_model(said, trained_on)):
        return
    if trained_on is not None:
        raise DictionaryError(f"trained_on={trained_on!r}, but the file says that it was trained on {said}.")
    raise DictionaryError(
        f"it was trained on {said}, and this model is {model.name}. Load that model; or pass trained_on={said!r} if you mean to use it on this one."
    )


def _site(name: str, model: Model) -> str:
    """The site kind behind a hook of a block, where the model's kinds have it; else the name as it is."""
    arch = model.arch
    if name in arch.accessors or ("." not in name and "hook" not in name):
        return name
    point = model.hooks.get(hook_of(name, 0))
    for kind, accessor in arch.accessors.items():
        if point is not None and kind not in arch.absent and kind not in ("resid_mid", "input") and model.hooks.get(accessor.host(0)) is point:
            return kind
    return name


def _check_layer(dictionary: Dictionary, model: Model) -> None:
    n = model.arch.n_layers
    if dictionary.layer is not None and dictionary.layer >= n:
        raise DictionaryError(f"it reads layer {dictionary.layer}, and {model.name} has the layers 0 to {n - 1}. It belongs to another model.")
    left, writes = n - (dictionary.layer or 0), dictionary.w_dec.shape[1]
    if dictionary.kind == "cross_layer_transcoder" and left != writes:
        raise DictionaryError(f"it writes to {writes} layers from layer {dictionary.layer} on, and {model.name} has {left} from there.")


def _check_width(site: str, width: int, part: str, dictionary: Dictionary, model: Model) -> None:
    arch = model.arch
    if site in arch.absent:
        raise DictionaryError(f"it {part} {site}, which {model.name} does not have: {arch.absent[site]}.")
    hook = hook_of(site, dictionary.layer or 0)
    if site not in arch.accessors and hook not in model.hooks:
        valid = [kind for kind in arch.sites if kind not in ("q", "k", "v", "pattern")]
        raise DictionaryError(unknown("hook", hook, valid, more=f"It {part} that, and {model.name} has no such hook."))
    expected, what = {
        "z": (arch.n_heads * arch.d_head, f"{arch.n_heads} heads of {arch.d_head}"),
        "mlp_post": (arch.d_mlp, "d_mlp"),
        "input": (arch.d_input or arch.d_model, "the embedding"),
    }.get(site, (arch.d_model, "d_model"))
    if width != expected:
        raise DictionaryError(f"it {part} {site} {width} wide, and in {model.name} that is {expected} wide ({what}). It belongs to another model.")
