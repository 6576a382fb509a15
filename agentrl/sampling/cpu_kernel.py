"""Attention of a decoding step over the blocks of the cache, by a kernel for CPUs.

`cache.attend` in plain XLA reads whole blocks and whole slots, and its products want what they read side by side. This
kernel follows the table of each context, reads its tokens and no others, and leaves the cache where it is. Contexts that
share blocks read them one after the other, so that all but the first find them in the processor's cache.

Compiled by numba, once a machine: the machine code is kept beside this file, or in the user's cache.

Axes: as in `cache`; B blocks of a context, C columns of the scores.
"""

from __future__ import annotations

import ctypes
import functools
import math

import jax
import jax.numpy as jnp
from llvmlite import ir
import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
import numpy as np

from agentrl.models.layers import MASKED
from agentrl.sampling.cache import Partial

_TARGET = 'agentrl_attend_tables'
_LANES = 16  # of a vector; the compiler cuts it into those of the processor
_UNROLL = 8  # rows of b that a turn of the inner loop takes
_AHEAD = 2  # blocks; what is fetched meanwhile comes in time
_MASKED, _LOG2_E, _LOWEST = np.float32(MASKED), np.float32(math.log2(math.e)), np.float32(-126)
_HALF = np.float32(0.5)
# 2^x = sum_k (x ln 2)^k / k!, to 1e-7 for |x| <= 1/2.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2)**k / math.factorial(k)) for k in range(1, 7))
_FLOAT, _BYTE, _INT = ir.FloatType(), ir.IntType(8), ir.IntType(32)


def attend(rows: jax.Array, keys: jax.Array, values: jax.Array, tables: jax.Array, positions: jax.Array,
           window: int) -> Partial:
  """Returns the attention of each slot's queries over its context, those tokens included.

  Args:
    rows: [S, K, R, Dh] float32. Scaled queries, W after each other for each head of a group.
    keys: [N, K, Dh, P] float32.
    values: [N, K, P, Dh] float32.
    tables: [S, B] int32. Blocks of each context, in order; what follows an id of N or more is not read.
    positions: [S, W] int32. Of the queries.
    window: Tokens back that a query sees, itself included; 0 for all.
  """
  register()
  (_, k, r, _), columns = rows.shape, tables.shape[1] * keys.shape[3]
  shapes = rows.shape[:3], rows.shape[:3], rows.shape, (k * r, columns)  # the last one is scratch
  call = jax.ffi.ffi_call(_TARGET, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
  return Partial(*call(rows, keys, values, tables, positions, np.array([window], np.int32))[:3])


@functools.cache
def register():
  """Tells XLA of the kernel, once a process.

  Raises:
    Exception: of XLA's, if it has another interface than this was written for.
  """
  capsule = ctypes.pythonapi.PyCapsule_New
  capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
  jax.ffi.register_ffi_target(_TARGET, capsule(_handle.address, None, None), platform='cpu')


# ---- what LLVM is to make of the inner loops ----------------------------------------------------


def _pointer_to(kind: types.Type):
  """Returns a function from an address to a pointer to numbers of a kind."""
  kind = types.CPointer(kind)

  @intrinsic
  def convert(typing, address):
    return kind(address), lambda context, builder, _, args: builder.inttoptr(args[0], context.get_value_type(kind))

  return convert


_words, _floats, _ints = map(_pointer_to, (types.int64, types.float32, types.int32))


def _product(rows: int, columns: int):
  """Returns a function that puts a @ b into `rows` x `columns` places of c, or, if `add`, adds it to what is there.

  Of each matrix it takes where its first element is, and how far apart its rows are; b has `count` of them. `ahead` is
  where the b of a later call begins.
  """
  lanes = min(columns, _LANES)
  vector = ir.VectorType(_FLOAT, lanes)
  parts = columns // lanes

  @intrinsic
  def product(typing, add, c, c_step, a, a_step, b, b_step, count, ahead):
    def generate(context, builder, signature, args):
      add, c, c_step, a, a_step, b, b_step, count, ahead = args
      index = lambda x: ir.Constant(count.type, x)
      at = lambda pointer, row, step: builder.gep(pointer, [builder.mul(row, step)])

      def places(pointer):
        return [builder.bitcast(builder.gep(pointer, [index(j * lanes)]), vector.as_pointer()) for j in range(parts)]

      def load(pointer):
        value = builder.load(pointer)
        value.align = 4
        return value

      targets = [places(at(c, index(r), c_step)) for r in range(rows)]
      left = [at(a, index(r), a_step) for r in range(rows)]
      nothing = ir.Constant(vector, [0.0] * lanes)
      # Two of each, so that an addition need not wait for the one before.
      sums = [[[cgutils.alloca_once_value(builder, nothing) for _ in range(parts)] for _ in range(rows)] for _ in range(2)]

      # What b is followed by is brought into the processor's cache meanwhile, a line for each that is read.
      prefetch = cgutils.get_or_insert_function(
          builder.module, ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT]), 'llvm.prefetch.p0')

      def step(i, sums):
        for line in places(at(ahead, i, b_step)):
          builder.call(prefetch, [builder.bitcast(line, _BYTE.as_pointer()), *(ir.Constant(_INT, x) for x in (0, 3, 1))])
        right = [load(x) for x in places(at(b, i, b_step))]
        for r in range(rows):
          one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.load(builder.gep(left[r], [i])),
                                       ir.Constant(_INT, 0))
          spread = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes))
          for j in range(parts):
            more = builder.fmul(spread, right[j], flags=('contract',))
            builder.store(builder.fadd(builder.load(sums[r][j]), more, flags=('contract',)), sums[r][j])

      whole = builder.udiv(count, index(_UNROLL))
      with cgutils.for_range(builder, whole) as loop:
        for i in range(_UNROLL):
          step(builder.add(builder.mul(loop.index, index(_UNROLL)), index(i)), sums[i % 2])
      with cgutils.for_range_slice(builder, builder.mul(whole, index(_UNROLL)), count, index(1)) as (i, _):
        step(i, sums[0])
      for r in range(rows):
        for j in range(parts):
          there = builder.select(add, load(targets[r][j]), nothing)
          total = builder.fadd(builder.load(sums[0][r][j]), builder.load(sums[1][r][j]))
          builder.store(builder.fadd(total, there), targets[r][j]).align = 4

    return types.void(add, c, c_step, a, a_step, b, b_step, count, ahead), generate

  return product


@intrinsic
def _two_to_the(typing, whole):
  """Returns 2^whole for a whole number from -126 to 127, float32: its bits are those of the exponent."""
  def generate(context, builder, signature, args):
    exponent = builder.add(builder.fptosi(args[0], _INT), ir.Constant(_INT, 127))
    return builder.bitcast(builder.shl(exponent, ir.Constant(_INT, 23)), _FLOAT)

  return types.float32(types.float32), generate


@intrinsic
def _larger(typing, a, b):
  """Returns the larger of two numbers, which a loop takes of many at once, as it does not with numba's max."""
  def generate(context, builder, signature, args):
    return builder.select(builder.fcmp_ordered('>', *args, flags=('fast',)), *args, flags=('fast',))

  return types.float32(types.float32, types.float32), generate


@intrinsic
def _at(typing, pointer, index):
  """Returns pointer + index."""
  return pointer(pointer, index), lambda context, builder, _, args: builder.gep(args[0], [args[1]])


_two_by_32, _two_by_8, _two_by_1 = (_product(2, n) for n in (32, 8, 1))
_one_by_32, _one_by_8, _one_by_1 = (_product(1, n) for n in (32, 8, 1))


@numba.njit(nogil=True)
def _multiply(add, c, c_step, a, a_step, b, width, rows, count, ahead):
  """Puts a[:rows, :count] @ b[:count, :width] into c[:rows, :width], or adds it; see `_product`."""
  r = 0
  while r < rows:
    two = r + 1 < rows
    c_row, a_row, x = _at(c, r * c_step), _at(a, r * a_step), 0
    while x + 32 <= width:
      if two:
        _two_by_32(add, _at(c_row, x), c_step, a_row, a_step, _at(b, x), width, count, _at(ahead, x))
      else:
        _one_by_32(add, _at(c_row, x), c_step, a_row, a_step, _at(b, x), width, count, _at(ahead, x))
      x += 32
    while x + 8 <= width:
      if two:
        _two_by_8(add, _at(c_row, x), c_step, a_row, a_step, _at(b, x), width, count, _at(ahead, x))
      else:
        _one_by_8(add, _at(c_row, x), c_step, a_row, a_step, _at(b, x), width, count, _at(ahead, x))
      x += 8
    while x < width:
      if two:
        _two_by_1(add, _at(c_row, x), c_step, a_row, a_step, _at(b, x), width, count, _at(ahead, x))
      else:
        _one_by_1(add, _at(c_row, x), c_step, a_row, a_step, _at(b, x), width, count, _at(ahead, x))
      x += 1
    r += 2 if two else 1


@numba.njit(fastmath=True, nogil=True)
def _softmax(scores, begin, end, stop):
  """Puts exp(score - top) in the place of scores[:stop], next to nothing before `begin` and from `end` on.

  Args:
    scores: Of columns from 0 on.
    begin: First column that counts.
    end: Behind the last one, at least one more.
    stop: Behind the last one that is read, a multiple of a vector if possible: what is left over takes as long as a vector.
  Returns:
    The largest score, and the sum.
  """
  for i in range(begin):
    scores[i] = _MASKED
  for i in range(end, stop):
    scores[i] = _MASKED
  top, total = _MASKED, np.float32(0)
  for i in range(stop):
    top = _larger(top, scores[i])
  for i in range(stop):
    exponent = _larger((scores[i] - top) * _LOG2_E, _LOWEST)
    whole = np.floor(exponent + _HALF)
    x = exponent - whole
    power = np.float32(1) + x * (_C1 + x * (_C2 + x * (_C3 + x * (_C4 + x * (_C5 + x * _C6)))))
    scores[i] = power * _two_to_the(whole)
    total += scores[i]
  return top, total


@numba.njit(nogil=True)
def _attend_slot(rows, keys, values, table, positions, sizes, window, scores, top, total, mean):
  """`attend` of one slot; the arrays are pointers, `scores` to scratch and the last three to results.

  Args:
    rows: [K, R, Dh].
    keys: [N, K, Dh, P].
    values: [N, K, P, Dh].
    table: [B] int32.
    positions: [W] int32.
    sizes: K, R, Dh, N, P, B, W.
    window: See `attend`.
    scores: [K, R, B * P].
    top: [K, R].
    total: [K, R].
    mean: [K, R, Dh].
  """
  k, r, dh, n, p, b, w = sizes
  columns, tile, group, last = b * p, dh * p, r // w, positions[w - 1]
  end = 0
  while end < b and table[end] < n and end * p <= last:
    end += 1
  begin = min(max(0, positions[0] - window + 1) // p if window else 0, end)
  for i in range(begin, end):
    block = _at(keys, table[i] * k * tile)
    soon = i + _AHEAD
    if soon < end:
      ahead = _at(keys, table[soon] * k * tile)
    else:
      ahead = _at(values, table[min(begin + soon - end, end - 1)] * k * tile)
    for h in range(k):
      _multiply(False, _at(scores, h * r * columns + i * p), columns, _at(rows, h * r * dh), dh, _at(block, h * tile), p, r,
                dh, _at(ahead, h * tile))
  for row in range(k * r):
    at = positions[row % r // group]
    first = max(0, at - window + 1 - begin * p) if window else 0
    behind = min(at + 1, end * p) - begin * p
    mine = _at(scores, row * columns + begin * p)
    top[row], total[row] = _MASKED, np.float32(1)
    if first < behind:
      top[row], total[row] = _softmax(mine, first, behind, (end - begin) * p)
    else:
      for c in range((end - begin) * p):
        mine[c] = np.float32(0)
  for i in range(k * r * dh):
    mean[i] = np.float32(0)
  for i in range(begin, end):
    block, ahead = _at(values, table[i] * k * tile), _at(values, table[min(i + _AHEAD, end - 1)] * k * tile)
    for h in range(k):
      _multiply(True, _at(mean, h * r * dh), dh, _at(scores, h * r * columns + i * p), columns, _at(block, h * tile), dh, r,
                min(p, last + 1 - i * p), _at(ahead, h * tile))


# ---- what XLA calls -----------------------------------------------------------------------------

# Of the structs in xla/ffi/api/c_api.h, in words of eight bytes.
_API_VERSION = 3 << 32  # minor and major
_FRAME_EXTENSION, _FRAME_OPERANDS, _FRAME_RESULTS = 1, 9, 14
_EXTENSION_KIND, _EXTENSION_METADATA, _METADATA_VERSION, _METADATA_TRAITS = 1, 3, 3, 4
_METADATA = 1  # kind of extension
_BUFFER_DATA, _BUFFER_SIZES = 3, 5


@numba.njit(nogil=True)
def _size(buffer, axis):
  return _words(_words(buffer)[_BUFFER_SIZES])[axis]


@numba.njit(nogil=True)
def _data(buffer):
  return _words(buffer)[_BUFFER_DATA]


@numba.cfunc(types.int64(types.CPointer(types.int64)), cache=True)
def _handle(frame):
  """`attend` as a handler of XLA's foreign function interface; returns no error."""
  extension = frame[_FRAME_EXTENSION]
  if extension and _words(extension)[_EXTENSION_KIND] & 0xFFFFFFFF == _METADATA:  # it is asked what it was written for
    metadata = _words(_words(extension)[_EXTENSION_METADATA])
    metadata[_METADATA_VERSION], metadata[_METADATA_TRAITS] = _API_VERSION, 0
    return 0
  operands, results = _words(frame[_FRAME_OPERANDS]), _words(frame[_FRAME_RESULTS])
  s, k, r, dh = _size(operands[0], 0), _size(operands[0], 1), _size(operands[0], 2), _size(operands[0], 3)
  n, p, b, w = _size(operands[1], 0), _size(operands[1], 3), _size(operands[3], 1), _size(operands[4], 1)
  rows, keys, values = _floats(_data(operands[0])), _floats(_data(operands[1])), _floats(_data(operands[2]))
  tables, positions, window = _ints(_data(operands[3])), _ints(_data(operands[4])), _ints(_data(operands[5]))[0]
  top, total, mean = _floats(_data(results[0])), _floats(_data(results[1])), _floats(_data(results[2]))
  scores = _floats(_data(results[3]))
  for slot in range(s):
    at = slot * k * r
    _attend_slot(_at(rows, at * dh), keys, values, _at(tables, slot * b), _at(positions, slot * w), (k, r, dh, n, p, b, w),
                 window, scores, _at(top, at), _at(total, at), _at(mean, at * dh))
  return 0
