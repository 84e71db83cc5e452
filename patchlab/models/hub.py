"""Hub models: the local copy of a Hugging Face repository, from the cache or downloaded."""

import json
from collections.abc import Iterable
from pathlib import Path

from patchlab.errors import ModelError, unknown
from patchlab.hub import HUB_TIMEOUT, hub_endpoint, is_offline, refusal

_SMALL_FILES = ("*.json", "*.txt", "*.model")
_NOT_NEEDED = ("*/*", "consolidated*")  # other formats, and second copies of the weights


def hub_folder(name: str, packaged: Iterable[str]) -> Path:
    """The folder of a hub model: from the cache if it is whole there, else downloaded after one short question whether it exists.

    ``packaged`` are the names that need no hub, for the error messages.

    Raises:
        ModelError: no such model, no access, or no network.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    known = list(packaged)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise ModelError(unknown("model", name, known, more="Or give a local directory or a hub name.")) from error
    if isinstance(cached, str) and has_weights(Path(cached).parent):
        return Path(cached).parent
    if is_offline():
        state = "Its files in the hub cache are incomplete" if isinstance(cached, str) else "It is not in the hub cache"
        raise ModelError(unknown("model", name, known, more=f"{state}, and HF_HUB_OFFLINE is set. Or give a local directory."))
    endpoint = hub_endpoint()
    _ask(name, endpoint, known)
    return _download(name, endpoint)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, with every part that an index of parts names."""
    indices = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    if indices:
        return any(all((folder / part).is_file() for part in json.loads(index.read_text())["weight_map"].values()) for index in indices)
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _ask(name: str, endpoint: str, known: list[str]) -> None:
    """One HEAD request, no retry, so that a missing network is an error within seconds."""
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi(endpoint, token=get_token()).get_hf_file_metadata(url=hf_hub_url(name, "config.json", endpoint=endpoint), timeout=HUB_TIMEOUT)
    except HfHubHTTPError as error:
        why = refusal(error.response.status_code, endpoint, "model", ", or it has no config.json")
        raise ModelError(
            unknown("model", name, known, more=f"There is no such directory, it is not cached, and {why}. Or give a local directory.")
        ) from error
    except Exception as error:  # those of the transport are not the client's
        raise ModelError(
            unknown(
                "model",
                name,
                known,
                more=f"There is no such directory, it is not cached, and {endpoint} did not answer within {HUB_TIMEOUT:g} s ({error}).",
            )
        ) from error


def _download(name: str, endpoint: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        for weights in ("*.safetensors", "*.bin"):
            patterns = [*_SMALL_FILES, weights]
            folder = Path(snapshot_download(name, endpoint=endpoint, allow_patterns=patterns, ignore_patterns=list(_NOT_NEEDED)))
            if has_weights(folder):
                return folder
    except Exception as error:  # the client's errors share no base class
        raise ModelError(
            f"downloading {name} from {endpoint} failed: {str(error).strip() or type(error).__name__}. Try again, or give a local directory."
        ) from error
    raise ModelError(f"{name} has no weights that can be loaded (*.safetensors or *.bin) at {endpoint}; give another model or a local directory.")
