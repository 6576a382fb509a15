"""Tensor files in the safetensors format, read and written one tensor at a time.

    8 bytes, little endian: length of the header
    header: JSON, name -> {"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from its own end
    data

The `safetensors` library writes a file from arrays that are all in memory; here only one is.
"""

from __future__ import annotations

import json
import math
import os
from typing import Callable, Mapping, NamedTuple

import ml_dtypes
import numpy as np

from agentrl.core import threads

_PART = 4 << 20  # bytes that a thread reads at a time
DTYPES: Mapping[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
    'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
  """A tensor in a file.

  Attributes:
    path: Of the file.
    dtype: Of the tensor.
    shape: Of the tensor.
    start: Byte of the file at which it begins.
  """

  path: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  @property
  def nbytes(self) -> int:
    """Its size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self) -> np.ndarray:
    """Returns the tensor, copied into host memory."""
    out = np.empty(self.shape, self.dtype)
    # A view of bytes: not every dtype has a buffer protocol.
    flat = out.reshape(-1).view(np.uint8)

    def part(start):
      with open(self.path, 'rb') as file:
        file.seek(self.start + start)
        file.readinto(flat[start:start + _PART])

    threads.each(part, ((start,) for start in range(0, flat.size, _PART)), flat.size)
    return out


def read_header(path: str | os.PathLike) -> dict[str, Stored]:
  """Returns the tensors of a file by name; their data is not read.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, and the tensor where one is to blame, if the file is cut short or is something else.
  """
  path = os.fspath(path)
  size = os.path.getsize(path)
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
      raise ValueError(f'{path} has {size} bytes, fewer than its header says ({length + 8} for the header alone): it '
                       'is cut short or no safetensors file; copy or download it again')
    try:
      header = json.loads(file.read(length))
      header.pop('__metadata__', None)
      entries = {name: (e['dtype'], tuple(e['shape']), *e['data_offsets']) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{path} is no safetensors file: its header cannot be read ({error})') from error
  stored = {}
  for name, (dtype, shape, begin, end) in entries.items():
    if dtype not in DTYPES:
      raise ValueError(f'{path}: tensor {name!r} has dtype {dtype!r}; known: {", ".join(DTYPES)}')
    found = Stored(path, DTYPES[dtype], shape, 8 + length + begin)
    if found.nbytes != end - begin:
      raise ValueError(f'{path}: tensor {name!r} of shape {shape} and dtype {dtype} takes {found.nbytes} bytes, but '
                       f'the header gives it {end - begin}')
    if 8 + length + end > size:
      raise ValueError(f'{path} is cut short: tensor {name!r} ends at byte {8 + length + end}, but the file has '
                       f'{size}; copy or download it again')
    stored[name] = found
  return stored


def write(path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype,
          tensor: Callable[[str], np.ndarray]):
  """Writes a file, asking for its tensors one by one; nothing is left under `path` if that fails.

  Args:
    path: Of the file.
    shapes: By name, in the order in which tensors are asked for.
    dtype: Of all of them.
    tensor: Returns the tensor of a name.
  """
  header, at = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape in shapes.items():
    end = at + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': _NAMES[dtype], 'shape': list(shape), 'data_offsets': [at, end]}
    at = end
  encoded = json.dumps(header, separators=(',', ':')).encode()
  encoded += b' ' * (-len(encoded) % 8)  # data begins where any dtype is aligned
  temporary = f'{os.fspath(path)}.tmp{os.getpid()}'
  try:
    with open(temporary, 'wb') as file:
      file.write(len(encoded).to_bytes(8, 'little') + encoded)
      for name, shape in shapes.items():
        values = np.ascontiguousarray(tensor(name).reshape(shape), dtype)
        file.write(values.reshape(-1).view(np.uint8).data)
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)
