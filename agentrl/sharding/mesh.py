"""Meshes, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

MESH_AXES = ('data', 'fsdp', 'tensor', 'expert')

# Logical axis -> mesh axes it is split over. Anything not named here is replicated.
LOGICAL_AXES: Mapping[str, str | tuple[str, ...]] = {
    'batch': ('data', 'fsdp'),
    'slots': ('data', 'fsdp'),
    'vocab': 'tensor',
    'width': 'fsdp',
    'kv_heads': 'tensor',
    'ff': 'tensor',
    'experts': 'expert',
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with all of `MESH_AXES`.

  Args:
    shape: Devices along each axis; axes left out have 1, and one axis may be -1 for all that remain.
    devices: To lay out; all of the process group's if None.
  Raises:
    ValueError: if an axis is unknown, a size is below 1, or the product is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  unknown = sorted(set(shape) - set(MESH_AXES))
  if unknown:
    raise ValueError(f'mesh axis {unknown[0]!r} is unknown; known: {", ".join(MESH_AXES)}')
  sizes = [shape.get(axis, 1) for axis in MESH_AXES]
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    named = ' x '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes))
    raise ValueError(f'{named} is no mesh: axes must be at least 1, and only one may be -1')
  if sizes.count(-1) == 1:
    rest = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = max(1, len(devices) // rest)
  if math.prod(sizes) != len(devices):
    named = ' x '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, sizes))
    raise ValueError(f'a mesh of {named} needs {math.prod(sizes)} devices, but there are {len(devices)}; '
                     'set one axis to -1 to take all that remain')
  return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def spec_of(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Returns how an array with these logical axes is split; a dimension the mesh does not divide is replicated."""
  parts = []
  for axis, size in zip(axes, shape, strict=True):
    part = LOGICAL_AXES.get(axis) if axis else None
    names = (part,) if isinstance(part, str) else part or ()
    ways = math.prod(mesh.shape[n] for n in names)
    parts.append(part if ways > 1 and size % ways == 0 else None)
  return PartitionSpec(*parts)


def shardings(axes: Any, values: Any, mesh: Mesh) -> Any:
  """Returns a tree of shardings for a tree of arrays (or shapes) and its tree of logical axis tuples."""
  return jax.tree.map(lambda v, a: NamedSharding(mesh, spec_of(a, v.shape, mesh)), values, axes,
                      is_leaf=lambda x: hasattr(x, 'shape'))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())
