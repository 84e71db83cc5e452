"""Labelled arrays: the parts of xarray that score maps stand on, with types where its own annotations leave them open."""

import os
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr


class Variable(NamedTuple):
    """One variable of a dataset, as datasets are built from them."""

    dims: tuple[str, ...]
    data: np.ndarray
    attrs: dict[Any, Any]


def variables_of(data: xr.Dataset) -> dict[Hashable, Variable]:
    """The variables of a dataset by name, coordinates among them."""
    return {name: Variable(tuple(map(str, one.dims)), one.to_numpy(), one.attrs) for name, one in data.variables.items()}


def coords_of(array: xr.DataArray) -> dict[Hashable, xr.DataArray]:
    """The coordinates of an array by name."""
    return dict(array.coords.items())


def bare_coords(data: xr.Dataset, dim: str) -> dict[Hashable, xr.DataArray]:
    """The coordinates of a dataset that do not run along a dimension."""
    return {name: coord for name, coord in data.coords.items() if dim not in coord.dims}


def with_coords(data: xr.Dataset, coords: Mapping[str, Any]) -> xr.Dataset:
    """A dataset with more coordinates."""
    return data.assign_coords(coords)


def with_attrs(data: xr.Dataset, attrs: Mapping[str, Any]) -> xr.Dataset:
    """A dataset with more attributes on each of its arrays."""
    return data.map(lambda one: one.assign_attrs(attrs), keep_attrs=True)


def in_double(array: xr.DataArray) -> xr.DataArray:
    """An array in float64."""
    return array.astype(np.float64)


def write(data: xr.Dataset, path: str | os.PathLike[str], *, group: str | None = None) -> None:
    """Write a dataset to a new netCDF file, or to a group of one that is there; NaN is a value like any other."""
    encoding = {name: {"_FillValue": None} for name, part in data.variables.items() if part.dtype.kind == "f"}
    data.to_netcdf(path, engine="h5netcdf", group=group, mode="w" if group is None else "a", encoding=encoding)


def read(path: str | os.PathLike[str], group: str | None = None) -> xr.Dataset:
    """Read a dataset from a netCDF file or a group of it."""
    return xr.load_dataset(path, engine="h5netcdf", group=group)
