"""Models and data sets of a sweep from the hub, fetched before the runs, which need no network then."""

from collections.abc import Callable
from functools import partial
from typing import Any

from patchlab.errors import ModelError, SweepError, TaskError
from patchlab.hub import is_offline
from patchlab.models import DEMO_MODELS
from patchlab.models.hub import hub_folder
from patchlab.sweeps.content import hub_content, hub_data_content, model_folder
from patchlab.sweeps.file import SweepFile
from patchlab.tasks import GENERATORS
from patchlab.tasks.files.hub import hub_data, is_hub_name


def fetch(file: SweepFile, *, say: Callable[[str], Any] = lambda _: None) -> dict[str, str]:
    """Fetch the hub's models and data sets that a file names and that are not in the cache yet; one that cannot be had does not keep the others
    from it.

    Args:
        file: from :func:`patchlab.sweeps.file.read`.
        say: told, in a line, what cannot be fetched and why.

    Returns:
        Where each model is, and each data set of the hub, in words, by its name.

    Raises:
        SweepError: a model folder that is not there, what cannot be fetched, or all of it without a network.
    """
    found: dict[str, str] = {}
    wanted: dict[str, tuple[Callable[[], object], Callable[[str], str]]] = {}
    for name in file.model_names:
        if (folder := model_folder(name, file.path.parent)) is not None:
            found[name] = "packaged" if name in DEMO_MODELS else f"the folder {folder}"
        else:
            wanted[name] = partial(hub_folder, name, DEMO_MODELS), hub_content
    data = [name for name in file.task_names if name not in GENERATORS and not (file.path.parent / name).exists() and is_hub_name(name)]
    wanted |= {name: (partial(hub_data, name), hub_data_content) for name in data}
    for name, (_, content) in list(wanted.items()):
        try:
            found[name] = f"in the cache ({content(name)})"
            del wanted[name]
        except SweepError:
            continue
    if wanted and is_offline():
        raise SweepError(f"HF_HUB_OFFLINE is set, so nothing is fetched: {', '.join(wanted)}. Unset it where there is a network.")
    missing: list[str] = []
    for name, (fetch_it, content) in wanted.items():
        try:
            fetch_it()
            found[name] = f"fetched ({content(name)})"
        except (ModelError, SweepError, TaskError) as error:
            say(f"{name}: {error}")
            missing.append(name)
    if missing:
        number = len(file.model_names) + len(data)
        what = "models and data sets" if data else "models"
        raise SweepError(f"{len(missing)} of {number} {what} cannot be fetched: {', '.join(missing)}. The same command tries again.")
    return {name: found[name] for name in (*file.model_names, *data)}
