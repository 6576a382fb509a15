"""Attention over the blocks of the cache, of a step and of an extension, by a kernel for CPUs.

In plain XLA `cache` reads whole blocks and whole slots, and its products want what they read side by side. This
kernel follows the table of each context, reads its tokens and no others, and leaves the cache where it is. Blocks are read
in the order in which they lie there. Contexts that share blocks read them one after the other, so that all but the first
find them in the processor's cache.

Compiled by numba, once a machine: the machine code is kept beside this file, or in the user's cache.

Axes: as in `cache`; B blocks of a context, C columns of the scores.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from typing import Callable, Iterable, NamedTuple

import jax
import jax.numpy as jnp
from llvmlite import ir
import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
import numpy as np

from agentrl.models.layers import MASKED
from agentrl.sampling.cache import Cache, Partial, Reading

_TARGET = 'agentrl_attend_tables'
_LANES = 16  # of a vector; the compiler cuts it into those of the processor
_UNROLL = 8  # rows of b that a turn of the inner loop takes
_SCORES = 2**17  # of slots that are read together: half a megabyte
_MASKED, _LOG2_E, _LOWEST = np.float32(MASKED), np.float32(math.log2(math.e)), np.float32(-126)
_HALF = np.float32(0.5)
# 2^x = sum_k (x ln 2)^k / k!, to 1e-7 for |x| <= 1/2.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2)**k / math.factorial(k)) for k in range(1, 7))
_FLOAT, _BYTE, _INT = ir.FloatType(), ir.IntType(8), ir.IntType(32)


class TablePlan(NamedTuple):
  """How slots read: the blocks of their contexts, [S, B], and in which order, see `reading_order`."""

  tables: jax.Array
  order: jax.Array


@dataclasses.dataclass(frozen=True)
class CpuKernels:
  """`kernels.Kernels` of a single CPU device. `slots` needs a reading by table, and attends to all that the tables hold."""

  def rows(self, keys: jax.Array, values: jax.Array, tables: jax.Array, positions: jax.Array, lengths: jax.Array,
           window: int) -> Callable[[jax.Array], Partial]:
    del lengths
    return lambda rows: attend(rows, keys, values, tables, reading_order(tables, rows.shape, keys.shape), positions, window)

  def plan(self, reading: Reading, first: jax.Array, windows: Iterable[int], queries: int, cache: Cache) -> TablePlan:
    del first, windows
    shape = cache.keys[0].shape
    rows = (len(reading.tables), shape[1], queries, shape[2])
    return TablePlan(reading.tables, reading_order(reading.tables, rows, shape))

  def slots(self, keys: jax.Array, values: jax.Array, plans: TablePlan, positions: jax.Array, first: jax.Array,
            window: int) -> Callable[[jax.Array], Partial]:
    del first
    return lambda rows: attend(rows, keys, values, *plans, positions, window)


def reading_order(tables: jax.Array, rows: tuple[int, ...], keys: tuple[int, ...]) -> jax.Array:
  """Returns in which order `attend` is to read: as the blocks lie in memory, as far as each context's stay in theirs.

  What lies side by side is read about a fifth faster than what is strewn. A context's own order is that of its sums, which
  are to be the same wherever its blocks are.

  Args:
    tables: [S, B] int32. Blocks of each context, in order; ids of N or more for none.
    rows: Shape of the queries, (S, K, R, Dh).
    keys: Shape of the keys, (N, K, Dh, P).
  Returns:
    [S * B] int32. Places in `tables`, those of the slots that are read together after each other, from the first of them on.
  """
  at_once = _at_once(rows, tables.shape[1] * keys[3])
  reached = jax.lax.cummax(jnp.minimum(tables, keys[0]), axis=1)
  group = jnp.arange(len(tables), dtype=jnp.int32)[:, None] // at_once
  places = jnp.argsort((group * (keys[0] + 1) + reached).reshape(-1), stable=True).astype(jnp.int32)
  return places - jnp.broadcast_to(group * at_once * tables.shape[1], tables.shape).reshape(-1)


def attend(rows: jax.Array, keys: jax.Array, values: jax.Array, tables: jax.Array, order: jax.Array, positions: jax.Array,
           window: int) -> Partial:
  """Returns the attention of each slot's queries over its context, those tokens included.

  Args:
    rows: [S, K, R, Dh]. Scaled queries, W after each other for each head of a group.
    keys: [N, K, Dh, P] float32.
    values: [N, K, P, Dh] float32.
    tables: [S, B] int32. Blocks of each context, in order; what follows an id of N or more is not read.
    order: [S * B] int32. See `reading_order`.
    positions: [S, W] int32. Of the queries.
    window: Tokens back that a query sees, itself included; 0 for all.
  """
  register()
  columns = tables.shape[1] * keys.shape[3]
  at_once = _at_once(rows.shape, columns)
  shapes = rows.shape[:3], rows.shape[:3], rows.shape, (at_once, *rows.shape[1:3], columns)
  results = [*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), jax.ShapeDtypeStruct((at_once, 2), jnp.int32)]
  call = jax.ffi.ffi_call(_TARGET, results)  # the last two are scratch
  window = np.array([window], np.int32)
  return Partial(*call(rows.astype(jnp.float32), keys, values, tables, order, positions, window)[:3])


def _at_once(rows: tuple[int, ...], columns: int) -> int:
  """Returns how many slots are read together: so many that their scores stay in the processor's caches, evenly."""
  slots, k, r, _ = rows
  return math.ceil(slots / min(slots, math.ceil(slots * k * r * columns / _SCORES)))


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


def _strip(columns: int):
  """Returns a function that does what those of `_product` do for any number of rows."""
  four, two, one = (_product(n, columns) for n in (4, 2, 1))

  @numba.njit(nogil=True)
  def strip(add, c, c_step, a, a_step, b, b_step, rows, count, ahead):
    r = 0
    while r + 4 <= rows:
      four(add, _at(c, r * c_step), c_step, _at(a, r * a_step), a_step, b, b_step, count, ahead)
      r += 4
    if r + 2 <= rows:
      two(add, _at(c, r * c_step), c_step, _at(a, r * a_step), a_step, b, b_step, count, ahead)
      r += 2
    if r < rows:
      one(add, _at(c, r * c_step), c_step, _at(a, r * a_step), a_step, b, b_step, count, ahead)

  return strip


_by_32, _by_8, _by_1 = map(_strip, (32, 8, 1))


@numba.njit(nogil=True)
def _multiply(add, c, c_step, a, a_step, b, width, rows, count, ahead):
  """Puts a[:rows, :count] @ b[:count, :width] into c[:rows, :width], or adds it; see `_product`."""
  x = 0
  while x + 32 <= width:
    _by_32(add, _at(c, x), c_step, a, a_step, _at(b, x), width, rows, count, _at(ahead, x))
    x += 32
  while x + 8 <= width:
    _by_8(add, _at(c, x), c_step, a, a_step, _at(b, x), width, rows, count, _at(ahead, x))
    x += 8
  while x < width:
    _by_1(add, _at(c, x), c_step, a, a_step, _at(b, x), width, rows, count, _at(ahead, x))
    x += 1


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
def _span(table, positions, sizes, window):
  """Returns the first and behind the last of a context's blocks that its queries see; see `_attend_slots`."""
  _, _, _, n, p, b, w, _ = sizes
  end = 0
  while end < b and table[end] < n and end * p <= positions[w - 1]:
    end += 1
  return min(max(0, positions[0] - window + 1) // p if window else 0, end), end


@numba.njit(nogil=True)
def _block(entry, tables, spans, row):
  """Returns the block of tables[entry], or -1 if its context's queries see nothing of it."""
  slot, i = entry // row, entry % row
  return tables[entry] if spans[2 * slot] <= i < spans[2 * slot + 1] else -1


@numba.njit(nogil=True)
def _attend_slots(rows, keys, values, tables, order, positions, sizes, window, spans, scores, top, total, mean):
  """`attend` of some slots; the arrays are pointers, `spans` and `scores` to scratch and the last three to results.

  Args:
    rows: [S, K, R, Dh].
    keys: [N, K, Dh, P].
    values: [N, K, P, Dh].
    tables: [S, B] int32.
    order: [S * B] int32.
    positions: [S, W] int32.
    sizes: K, R, Dh, N, P, B, W, S.
    window: See `attend`.
    spans: [S, 2] int32.
    scores: [S, K, R, B * P].
    top: [S, K, R].
    total: [S, K, R].
    mean: [S, K, R, Dh].
  """
  k, r, dh, _, p, b, w, slots = sizes
  columns, tile, group, entries = b * p, dh * p, r // w, slots * b
  for slot in range(slots):
    spans[2 * slot], spans[2 * slot + 1] = _span(_at(tables, slot * b), _at(positions, slot * w), sizes, window)

  for e in range(entries):
    block, slot, i = _block(order[e], tables, spans, b), order[e] // b, order[e] % b
    if block >= 0:
      later = _block(order[min(e + 1, entries - 1)], tables, spans, b)
      here, there = _at(keys, block * k * tile), _at(keys, (later if later >= 0 else block) * k * tile)
      for h in range(k):
        row = (slot * k + h) * r
        ahead = _at(here, (h + 1) * tile) if h + 1 < k else there  # what is fetched meanwhile comes in time
        _multiply(False, _at(scores, row * columns + i * p), columns, _at(rows, row * dh), dh, _at(here, h * tile), p, r, dh,
                  ahead)

  for row in range(slots * k * r):
    slot = row // (k * r)
    begin, end, at = spans[2 * slot], spans[2 * slot + 1], positions[slot * w + row % r // group]
    first = max(0, at - window + 1 - begin * p) if window else 0
    behind = min(at + 1, end * p) - begin * p
    mine = _at(scores, row * columns + begin * p)
    top[row], total[row] = _MASKED, np.float32(1)
    if first < behind:
      top[row], total[row] = _softmax(mine, first, behind, (end - begin) * p)
    else:
      for c in range((end - begin) * p):
        mine[c] = np.float32(0)

  for i in range(slots * k * r * dh):
    mean[i] = np.float32(0)
  for e in range(entries):
    block, slot, i = _block(order[e], tables, spans, b), order[e] // b, order[e] % b
    if block >= 0:
      later = _block(order[min(e + 1, entries - 1)], tables, spans, b)
      here, there = _at(values, block * k * tile), _at(values, (later if later >= 0 else block) * k * tile)
      count = min(p, positions[slot * w + w - 1] + 1 - i * p)
      for h in range(k):
        row = (slot * k + h) * r
        ahead = _at(here, (h + 1) * tile) if h + 1 < k else there
        _multiply(True, _at(mean, row * dh), dh, _at(scores, row * columns + i * p), columns, _at(here, h * tile), dh, r,
                  count, ahead)


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
  n, p, b, w = _size(operands[1], 0), _size(operands[1], 3), _size(operands[3], 1), _size(operands[5], 1)
  rows, keys, values = _floats(_data(operands[0])), _floats(_data(operands[1])), _floats(_data(operands[2]))
  tables, order, positions = _ints(_data(operands[3])), _ints(_data(operands[4])), _ints(_data(operands[5]))
  window = _ints(_data(operands[6]))[0]
  top, total, mean = _floats(_data(results[0])), _floats(_data(results[1])), _floats(_data(results[2]))
  scores, spans, at_once = _floats(_data(results[3])), _ints(_data(results[4])), _size(results[3], 0)
  for slot in range(0, s, at_once):
    at, sizes = slot * k * r, (k, r, dh, n, p, b, w, min(at_once, s - slot))
    _attend_slots(_at(rows, at * dh), keys, values, _at(tables, slot * b), _at(order, slot * b), _at(positions, slot * w),
                  sizes, window, spans, scores, _at(top, at), _at(total, at), _at(mean, at * dh))
  return 0
