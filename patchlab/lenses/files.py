"""Files of lenses: the ``.pt`` layout in which Jacobian lenses are published, and an own one for affine maps."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from patchlab.errors import LensError
from patchlab.lenses.linear_map import LinearMap
from patchlab.store.files import writing


def write_maps(
    path: str | os.PathLike[str], maps: Mapping[int, LinearMap], direct_from: int, record: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Write maps; see :meth:`patchlab.lenses.Readout.save`.

    Raises:
        LensError: no maps, or numbers that float16 cannot hold.
        OutputError: an existing file, or a place that cannot be written to.
    """
    if not maps:
        raise LensError("the readout has no maps to write; the logit lens needs no file.")
    metadata = {**_plain(record), "target_layer": direct_from}
    payload: dict[str, Any] = {
        "n_prompts": int(record.get("n_prompts", 0)),
        "source_layers": sorted(maps),
        "d_model": len(next(iter(maps.values())).weight),
        "metadata": metadata,
    }
    weights = {layer: maps[layer].weight.detach().cpu() for layer in sorted(maps)}
    if all(one.bias is None for one in maps.values()):
        payload["J"] = {layer: weight.to(torch.float16) for layer, weight in weights.items()}
        if bad := [layer for layer, weight in payload["J"].items() if not bool(torch.isfinite(weight).all())]:
            raise LensError(f"the maps of layers {bad} hold numbers beyond float16, in which the published layout is written.")
    else:
        payload["A"] = weights
        payload["b"] = {layer: torch.zeros(len(weights[layer])) if (b := maps[layer].bias) is None else b.detach().cpu() for layer in weights}
    path = Path(path)
    with writing(path, overwrite=overwrite) as temporary:
        torch.save(payload, temporary)
    return path


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as ``weights_only=True`` reads it: plain values, by a trip through JSON."""
    return json.loads(json.dumps(dict(record), default=str))


def read_maps(path: str | os.PathLike[str]) -> tuple[dict[int, LinearMap], int | None, dict[str, Any]]:
    """The maps of a file, the layer whose output they lead to (None: the last), and what the file says about them.

    Raises:
        LensError: a file that is missing, no lens, or would have to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise LensError(f"there is no file {path}.")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LensError(
            f"{path} holds objects that would have to be unpickled, which can run any code, so it is not read ({_reason(error)}). Convert it where "
            f"that is safe: torch.load(..., weights_only=False) in a throw-away environment, then torch.save of J, n_prompts, source_layers, "
            f"d_model and a provenance of plain texts and numbers."
        ) from error
    except Exception as error:  # whatever is wrong with the bytes
        raise LensError(f"{path} cannot be read as a .pt file: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(payload, dict) or not {"J", "A", "jacobian_sum"} & payload.keys():
        keys = ", ".join(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
        raise LensError(f"{path} is no lens: it needs a key J (Jacobians by layer), jacobian_sum or A (affine maps); it has {keys or 'nothing'}.")
    given = cast(dict[str, Any], payload)
    record = _record(given)
    share = 1.0
    if "jacobian_sum" in given and "J" not in given:  # what a fit had summed up when it was interrupted
        share = float(given.get("n_done", 0))
        if share < 1:
            raise LensError(f"{path} is an unfinished fit without a single prompt (n_done is {given.get('n_done')}).")
    matrices = given.get("J", given.get("A", given.get("jacobian_sum")))
    biases = cast(dict[Any, Tensor], given.get("b", {})) if "A" in given else {}
    maps = {int(layer): LinearMap(_matrix(path, layer, matrix) / share, biases.get(layer)) for layer, matrix in _items(path, matrices)}
    width = int(given.get("d_model", len(next(iter(maps.values())).weight)))
    if wrong := [layer for layer, one in maps.items() if tuple(one.weight.shape) != (width, width)]:
        raise LensError(f"{path} says d_model {width}, and the map of layer {wrong[0]} has the shape {list(maps[wrong[0]].weight.shape)}.")
    target = record.get("target_layer")
    return maps, None if target is None else int(target), record


def _items(path: Path, matrices: Any) -> list[tuple[Any, Any]]:
    if not isinstance(matrices, dict) or not matrices:
        raise LensError(f"{path} holds no maps: expected a dictionary from layers to matrices, got {type(matrices).__name__}.")
    return list(matrices.items())


def _matrix(path: Path, layer: Any, matrix: Any) -> Tensor:
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point() or not bool(torch.isfinite(matrix).all()):
        raise LensError(f"{path}: the map of layer {layer} is no matrix of finite numbers.")
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _record(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about its maps: TransformerLens' ``metadata``, the ``provenance`` of relevance lenses with its ``config_json``, flat keys."""
    record: dict[str, Any] = {name: payload[name] for name in ("n_prompts", "target_layer", "model_name", "corpus") if name in payload}
    provenance = payload.get("provenance")
    if isinstance(provenance, dict):
        record["provenance"] = provenance
        text = provenance.get("config_json")
        config = _json(text) if isinstance(text, str) else text
        if isinstance(config, dict):
            record |= config
    metadata = payload.get("metadata")
    return {**record, **(metadata if isinstance(metadata, dict) else {})}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or [type(error).__name__])[0][:200]
