"""A parameter in the making: tensors of a checkpoint written into the arrays of the devices that keep them."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.core import threads
from agentrl.models.convert import Piece

# Transposed so many columns at a time: what is read of each row then stays in the processor's cache.
_COLUMNS = 64
_ALIGNMENT = 64  # bytes, at which jax's CPU backend takes a numpy array as it is
_BITS = {2: np.uint16, 4: np.uint32}


class Assembly:
  """The parts of a parameter that this process's devices hold, each written in place.

  Written part by part on each device, no piece is sent where it does not belong and nothing is gathered. An accelerator
  is sent tensors as they lie in the file and turns them itself; on CPU, where the array's memory is the host's, they are
  turned while they are copied there.
  """

  def __init__(self, shape: tuple[int, ...], dtype: Any, where: jax.sharding.Sharding):
    self._shape, self._where = shape, where
    self._bounds, self._parts = {}, {}
    for device, index in where.addressable_devices_indices_map(shape).items():
      bounds = [s.indices(size)[:2] for s, size in zip(index, shape)]
      sizes = [end - start for start, end in bounds]
      self._bounds[device] = bounds
      self._parts[device] = _empty(sizes, dtype) if _is_host(device) else jnp.zeros(sizes, dtype, device=device)

  def write(self, piece: Piece, tensor: np.ndarray):
    """Writes a piece; returns when it no longer needs the tensor."""
    region = [(i, i + 1) if isinstance(i, int) else i.indices(size)[:2] for i, size in zip(piece.index, self._shape)]
    region += [(0, size) for size in self._shape[len(region):]]
    values = piece.ours(tensor).reshape([end - start for start, end in region], copy=False)
    for device, bounds in self._bounds.items():
      low = [max(a, c) for (a, _), (c, _) in zip(region, bounds)]
      high = [min(b, d) for (_, b), (_, d) in zip(region, bounds)]
      if any(a >= b for a, b in zip(low, high)):
        continue
      part = values[tuple(slice(a - r, b - r) for a, b, (r, _) in zip(low, high, region))]
      start = [a - c for a, (c, _) in zip(low, bounds)]
      if _is_host(device):
        copy(self._parts[device][tuple(slice(s, s + n) for s, n in zip(start, part.shape))], part)
      else:
        self._parts[device] = _send(self._parts[device], part, start, device)
        # One device after the other, or the parts of all of them would be in host memory at a time.
        jax.block_until_ready(self._parts[device])

  def array(self) -> jax.Array:
    """Returns the parameter."""
    parts = [jax.device_put(part, device) for device, part in self._parts.items()]
    return jax.make_array_from_single_device_arrays(self._shape, self._where, parts)


def copy(target: np.ndarray, source: np.ndarray):
  """Writes source into target, of one shape, fast also where their axes lie in another order in memory."""
  if source.dtype == target.dtype and target.dtype.itemsize in _BITS:
    # numpy copies whole numbers faster than types it does not know.
    source, target = (x.view(_BITS[target.dtype.itemsize]) for x in (source, target))
  nearest = min(range(source.ndim), key=lambda i: (source.shape[i] == 1, source.strides[i]), default=0)
  if not source.ndim or nearest == source.ndim - 1:
    np.copyto(target, source, casting='unsafe')
    return
  others = [range(n) if i not in (nearest, source.ndim - 1) else (slice(None),) for i, n in enumerate(source.shape)]

  def stripe(index, start):
    columns = (..., slice(start, start + _COLUMNS))
    np.copyto(target[index][columns], source[index][columns], casting='unsafe')

  starts = range(0, source.shape[-1], _COLUMNS)
  threads.each(stripe, itertools.product(itertools.product(*others), starts), source.nbytes)


def _is_host(device: jax.Device) -> bool:
  return device.platform == 'cpu'


def _empty(shape: list[int], dtype: Any) -> np.ndarray:
  """Returns memory that jax's CPU backend takes as it is; the whole of it is going to be written."""
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  room = np.empty(size + _ALIGNMENT, np.uint8)
  start = -room.ctypes.data % _ALIGNMENT
  return room[start:start + size].view(dtype).reshape(shape)


def _send(array: jax.Array, part: np.ndarray, start: list[int], device: jax.Device) -> jax.Array:
  """Returns an accelerator's array with a part of a piece written into it; the device turns it as it has to lie."""
  order = sorted(range(part.ndim), key=lambda i: -part.strides[i])
  as_stored = np.ascontiguousarray(part.transpose(order))
  return _place(array, jax.device_put(as_stored, device), np.asarray(start, np.int32), tuple(np.argsort(order)))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _place(array, part, start, order):
  return jax.lax.dynamic_update_slice(array, part.transpose(order).astype(array.dtype), start)
