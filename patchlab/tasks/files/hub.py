"""Data sets of the Hugging Face hub: the local copy, from the cache or downloaded."""

import re
from pathlib import Path

from patchlab.errors import TaskError
from patchlab.hub import HUB_TIMEOUT, hub_endpoint, is_offline, refusal
from patchlab.tasks.files.folder import DATA_SUFFIXES, split_files

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(name: str) -> bool:
    """Whether a text has the form of a data set's name, ``owner/name``.

    >>> is_hub_name("mib-bench/ioi"), is_hub_name("ioi"), is_hub_name("./ioi/x"), is_hub_name("../ioi")
    (True, False, False, False)
    """
    return bool(_NAME.fullmatch(name)) and not name.startswith(".")


def cached_data(name: str) -> Path | None:
    """The folder of a data set in the hub cache; None if it is not there."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    reference = repository / "refs" / "main"
    snapshot = repository / "snapshots" / (reference.read_text().strip() if reference.is_file() else "none")
    return snapshot if snapshot.is_dir() else None


def hub_data(name: str, split: str | None = None, subset: str | None = None) -> Path:
    """The folder of a data set: from the cache if the split is there, else downloaded after one short question whether it exists.

    Raises:
        TaskError: no such data set, no access, no network, or no such split.
    """
    cached = cached_data(name)
    if cached is not None and (is_offline() or _has(cached, split, subset)):
        return cached
    if is_offline():
        raise TaskError(
            f"{name!r} is no generator and no file here; as a data set of the hub it is not in the cache, and HF_HUB_OFFLINE is set. "
            f"Fetch it where there is a network, or give a local folder with its files."
        )
    return _downloaded(name)


def _has(folder: Path, split: str | None, subset: str | None) -> bool:
    try:
        return bool(split_files(folder, split, subset).paths)
    except TaskError:
        return False


def _downloaded(name: str) -> Path:
    from huggingface_hub import HfApi, get_token, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = hub_endpoint()
    try:
        HfApi(endpoint, token=get_token()).dataset_info(name, timeout=HUB_TIMEOUT)
    except HfHubHTTPError as error:
        why = refusal(error.response.status_code, endpoint, "data set")
        raise TaskError(f"{name!r} is no generator and no file here, and as a data set of the hub: {why}. Or give a local folder.") from error
    except Exception as error:  # those of the transport are not the client's
        raise TaskError(
            f"{name!r} is no generator and no file here, and {endpoint} did not answer within {HUB_TIMEOUT:g} s ({error}). Give a local folder."
        ) from error
    try:
        return Path(snapshot_download(name, repo_type="dataset", endpoint=endpoint, allow_patterns=[f"*{suffix}" for suffix in DATA_SUFFIXES]))
    except Exception as error:  # the client's errors share no base class
        raise TaskError(
            f"downloading {name} from {endpoint} failed: {str(error).strip() or type(error).__name__}. Try again, or give a local folder."
        ) from error
