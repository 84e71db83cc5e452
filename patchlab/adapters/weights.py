"""Weights as code reads them that does not run the module: fetched from where accelerate keeps them, if they are offloaded.

A model that was loaded with a ``device_map`` to the CPU's memory or to disk has placeholders for weights, which a hook of accelerate fills
when the module itself is called, and only then.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from patchlab.errors import ModelError


def fetched(module: Any, name: str) -> Tensor | None:
    """A weight of a module, wherever it is kept; None for a module without it.

    Raises:
        ModelError: a weight that is nowhere.
    """
    found = getattr(module, name, None)
    if not isinstance(found, Tensor) or found.device.type != "meta":
        return found
    from accelerate.utils import align_module_device  # transformer-lens brings it

    with align_module_device(module):
        value = getattr(module, name)
    if value.device.type == "meta":
        raise ModelError(
            f"the weight {name} of a {type(module).__name__} holds no numbers (it is on torch's meta device, and no hook of accelerate brings them). "
            f"Load the model with load_model(..., device_map=...), or without offloading."
        )
    return value.detach()


def every_weight(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, in the order of names, one at a time."""
    owners = {id(own): (module, leaf) for module in root.modules() for leaf, own in module.named_parameters(recurse=False)}
    for name, parameter in sorted(root.named_parameters(), key=lambda item: item[0]):
        value = fetched(*owners[id(parameter)]) if parameter.device.type == "meta" else parameter
        yield name, parameter if value is None else value


def is_offloaded(root: nn.Module) -> bool:
    """Whether some weights of a model are kept elsewhere than where they are used."""
    return any(parameter.device.type == "meta" for parameter in root.parameters())
