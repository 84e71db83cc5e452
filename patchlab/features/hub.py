"""Dictionaries of the hub: the local copy of a repository's folder, from the cache or downloaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from patchlab.errors import DictionaryError
from patchlab.hub import HUB_TIMEOUT, hub_endpoint, is_offline, refusal

_NAME = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+?)(?:[:/](?P<folder>[^@:?]+?))?/?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubName:
    """A repository, a folder of it, and a revision.

    Args:
        repo: ``owner/repository``.
        folder: within it; empty for the whole.
        revision: a branch, a tag or a commit; None for the default.
    """

    repo: str
    folder: str = ""
    revision: str | None = None

    @staticmethod
    def parse(text: str) -> "HubName | None":
        """The name that a text is; None if it is no name of the hub.

        >>> HubName.parse("owner/saes:layer_3/width_16k@main")
        HubName(repo='owner/saes', folder='layer_3/width_16k', revision='main')
        >>> HubName.parse("owner/saes/layer_3").folder, HubName.parse("demo-gpt2")
        ('layer_3', None)
        """
        match = _NAME.fullmatch(text)
        return None if match is None or text.startswith(("/", ".", "~")) else HubName(match["repo"], match["folder"] or "", match["revision"])

    def __str__(self) -> str:
        return self.repo + (f":{self.folder}" if self.folder else "") + (f"@{self.revision}" if self.revision else "")


def hub_dictionaries(name: HubName, markers: Sequence[str], belonging: Sequence[str], *, single: bool) -> Path:
    """The local folder of dictionaries of the hub; what is not in the cache is downloaded, without the rest of the repository.

    Args:
        name: where they are.
        markers: patterns of file names that mark a folder as that of a dictionary.
        belonging: patterns of the names of all files that belong to dictionaries.
        single: whether one folder is wanted, so that of several none is downloaded.

    Raises:
        DictionaryError: no such repository or folder, no access, no network and not in the cache, or several where one is wanted.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name.repo)
    except HFValidationError as error:
        raise DictionaryError(f"{name.repo!r} is no folder here and no name of the hub: {error}") from error
    return _cached(name) if is_offline() else _asked(name, markers, belonging, single)


def _cached(name: HubName, why: str = "HF_HUB_OFFLINE is set") -> Path:
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"
    reference = repository / "refs" / (name.revision or "main")
    snapshot = repository / "snapshots" / (reference.read_text().strip() if reference.is_file() else str(name.revision))
    if not snapshot.is_dir():
        raise DictionaryError(f"there is no folder {name}; as a name of the hub it is not in the hub cache, and {why}. Give a local folder.")
    if not (snapshot / name.folder).is_dir():
        raise DictionaryError(f"{name}: the hub cache has other parts of {name.repo}, but not {name.folder}, and {why}.")
    return snapshot / name.folder


def _asked(name: HubName, markers: Sequence[str], belonging: Sequence[str], single: bool) -> Path:
    """One short question what the repository has, then the download of what is wanted and not in the cache."""
    from huggingface_hub import HfApi, get_token, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = hub_endpoint()
    try:
        info = HfApi(endpoint, token=get_token()).model_info(name.repo, revision=name.revision, timeout=HUB_TIMEOUT)
    except HfHubHTTPError as error:
        why = refusal(error.response.status_code, endpoint, "repository")
        raise DictionaryError(f"there is no folder {name}, and as a name of the hub: {why}.") from error
    except Exception as error:  # those of the transport are not the client's
        return _cached(name, f"{endpoint} did not answer within {HUB_TIMEOUT:g} s ({error})")
    files = [PurePosixPath(sibling.rfilename) for sibling in info.siblings or ()]
    folders = _outermost({file.parent for file in files if file.is_relative_to(name.folder) and _any(file.name, markers)})
    if not folders:
        raise DictionaryError(f"{name} at {endpoint} holds no files of dictionaries ({', '.join(markers)}). Name a folder as in {name.repo}:FOLDER.")
    if single and len(folders) > 1:
        raise DictionaryError(
            f"{name} at {endpoint} holds {len(folders)} folders of dictionaries; name one, as in {name.repo}:{folders[0]}. Others: "
            f"{', '.join(map(str, folders[1:6]))}{', ...' if len(folders) > 6 else ''}."
        )
    wanted = [str(file) for file in files if file.parent in folders and _any(file.name, belonging)]
    try:
        return Path(snapshot_download(name.repo, revision=name.revision, endpoint=endpoint, allow_patterns=wanted)) / name.folder
    except Exception as error:  # the client's errors share no base class
        raise DictionaryError(
            f"downloading {name} from {endpoint} failed: {str(error).strip() or type(error).__name__}. Try again, or give a local folder."
        ) from error


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _outermost(folders: set[PurePosixPath]) -> list[PurePosixPath]:
    """The folders that lie in no other one of them."""
    return sorted(folder for folder in folders if not any(parent in folders for parent in folder.parents))
