"""Models of a sweep from the hub, fetched before the runs, which need no network then."""

from collections.abc import Callable
from typing import Any

from patchlab.errors import ModelError, SweepError
from patchlab.models import DEMO_MODELS
from patchlab.models.hub import hub_folder, is_offline
from patchlab.sweeps.content import hub_content, model_folder
from patchlab.sweeps.file import SweepFile


def fetch(file: SweepFile, *, say: Callable[[str], Any] = lambda _: None) -> dict[str, str]:
    """Fetch the hub models that a file names and that are not in the cache yet; one that cannot be had does not keep the others from it.

    Args:
        file: from :func:`patchlab.sweeps.file.read`.
        say: told, in a line, what cannot be fetched and why.

    Returns:
        Where each model is, in words, by its name.

    Raises:
        SweepError: a model folder that is not there, models that cannot be fetched, or all of them without a network.
    """
    found: dict[str, str] = {}
    wanted: list[str] = []
    for name in file.model_names:
        if (folder := model_folder(name, file.path.parent)) is not None:
            found[name] = "packaged" if name in DEMO_MODELS else f"the folder {folder}"
            continue
        try:
            found[name] = f"in the cache ({hub_content(name)})"
        except SweepError:
            wanted.append(name)
    if wanted and is_offline():
        raise SweepError(f"HF_HUB_OFFLINE is set, so nothing is fetched: {', '.join(wanted)}. Unset it where there is a network.")
    missing: list[str] = []
    for name in wanted:
        try:
            hub_folder(name, DEMO_MODELS)
            found[name] = f"fetched ({hub_content(name)})"
        except (ModelError, SweepError) as error:
            say(f"{name}: {error}")
            missing.append(name)
    if missing:
        number = len(file.model_names)
        raise SweepError(f"{len(missing)} of {number} models cannot be fetched: {', '.join(missing)}. The same command tries again.")
    return {name: found[name] for name in file.model_names}
