"""Attention over the blocks of the cache on TPUs, of a step and of an extension, by Pallas.

Scores never leave the chip, and of the cache only those blocks are read that a query can see: none that is free, nor
any that a window has left behind.

jax's own paged kernels want keys and values interleaved with tokens first, have no sinks, and do not return sums that
could be added to those over shared blocks and new tokens.

Both kernels fetch a few blocks at a time into one of two buffers while they compute on the other:

    rows    many queries of few contexts (extend): a program has a tile of one context's queries for one head
    slots   few queries of many contexts (decode): a program has half of the slots or fewer, and all their blocks pass
            through it

On a mesh each device has the heads and the blocks that lie there, and what devices say of the same query is added up.

Axes: as in `cache`; A contexts (rows or slots), B blocks of a context, Q fetches of a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Callable, Iterable, Mapping, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from agentrl.models.layers import MASKED
from agentrl.sampling.cache import Cache, Partial, Reading
from agentrl.sharding import mesh as meshes

LANES = 128
TILE = 1_024  # queries of a program of `rows`: what it does with a byte of the cache hides the reading of it on any TPU
ROWS_KEYS = 512  # tokens of a fetch of `rows`
PART = 512  # queries that it computes at a time
SLOTS_BYTES = 512 * 1_024  # of a fetch of `slots`, keys and as much of values
MOST_FETCHED = 16  # blocks of a fetch
MOST_ROWS = 2_048  # queries of a program of `slots`, all of which it keeps on the chip
SUBLANES = 16  # rows of a tile of bfloat16
_NEVER = 2**30  # position of a key that no query sees


class Plan(NamedTuple):
  """Which blocks the slots of a call of `decode` read, sorted by slot: one part for each device that has blocks.

  Attributes:
    ids: [N] int32. Blocks by their place on the device, those of slot 0 first.
    begins: [N] int32. Position of the first token of each.
    slots: [Q] int32. Slot of each fetch.
    bases: [Q] int32. Place in `ids` of its first block.
    ends: [S] int32. Place behind each slot's last block.
    cuts: [programs + 1] int32. Fetches from cuts[p] to cuts[p + 1] are program p's.
  """

  ids: jax.Array
  begins: jax.Array
  slots: jax.Array
  bases: jax.Array
  ends: jax.Array
  cuts: jax.Array


@dataclasses.dataclass(frozen=True)
class TpuKernels:
  """`kernels.Kernels` by Pallas; what `plan` gives is by window.

  Attributes:
    where: How the cache is split; None if one device has it.
    interpret: Run without a TPU, slowly: True, or what `pl.pallas_call` takes.
  """

  where: NamedSharding | None = None
  interpret: Any = False

  def rows(self, keys: jax.Array, values: jax.Array, tables: jax.Array, positions: jax.Array, lengths: jax.Array,
           window: int) -> Callable[[jax.Array], Partial]:
    local = functools.partial(_rows_local, width=positions.shape[1], window=window, ways=self._ways,
                              interpret=self.interpret)

    def read(rows):
      parts = self._on_mesh(local, (self._of_rows, *self._of_cache, None, None, None), Partial(*(self._of_rows,) * 3))(
          rows, keys, values, tables, positions[:, 0], lengths)
      return parts._replace(total=jnp.where(parts.total > 0, parts.total, 1.0))  # of queries that nothing is said of

    return read

  def plan(self, reading: Reading, first: jax.Array, windows: Iterable[int], queries: int,
           cache: Cache) -> Mapping[int, Plan]:
    split, shape = PartitionSpec(self._axes[0]), cache.keys[0].shape
    if self.where is not None:
      shape = self.where.shard_shape(shape)
    make = functools.partial(_plan_local, block=shape[3], pages=_slots_pages(shape, cache.keys[0].dtype),
                             programs=_slots_programs(first.shape[0], shape[1] * _whole(queries)))
    return {window: self._on_mesh(functools.partial(make, window=window), (split, split, None), Plan(*(split,) * 6))(
        reading.owners, reading.starts, first) for window in sorted(set(windows))}

  def slots(self, keys: jax.Array, values: jax.Array, plans: Mapping[int, Plan], positions: jax.Array, first: jax.Array,
            window: int) -> Callable[[jax.Array], Partial]:
    split = PartitionSpec(self._axes[0])
    local = functools.partial(_slots_local, width=positions.shape[1], window=window, ways=self._ways,
                              interpret=self.interpret)
    function = self._on_mesh(local, (self._of_rows, *self._of_cache, Plan(*(split,) * 6), None, None),
                             Partial(*(self._of_rows,) * 3))
    return lambda rows: function(rows, keys, values, plans[window], positions[:, 0], first)

  @property
  def _axes(self) -> tuple[Any, Any]:
    """Mesh axes of blocks and of heads."""
    return tuple(self.where.spec) if self.where else (None, None)

  @property
  def _ways(self) -> tuple[str, ...]:
    return meshes.names_in(self._axes[0])

  @property
  def _of_rows(self) -> PartitionSpec:
    return PartitionSpec(None, self._axes[1])

  @property
  def _of_cache(self) -> tuple[PartitionSpec, PartitionSpec]:
    return (PartitionSpec(*self._axes),) * 2

  def _on_mesh(self, function: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
    if self.where is None:
      return function
    ins = jax.tree.map(lambda s: PartitionSpec() if s is None else s, ins,
                       is_leaf=lambda s: s is None or isinstance(s, PartitionSpec))
    return jax.shard_map(function, mesh=self.where.mesh, in_specs=ins, out_specs=outs, check_vma=False)


# ---- what a device does -------------------------------------------------------------------------


def _rows_local(rows, keys, values, tables, starts, lengths, *, width, window, ways, interpret) -> Partial:
  """`Kernels.rows` of one device: heads and blocks are its own."""
  (a, _, r, _), (n, _, _, block) = rows.shape, keys.shape
  group = r // width
  tiles = -(-r // TILE)
  tile = _whole(-(-r // tiles))
  rows = _padded(rows, tiles * tile)
  begins = jnp.broadcast_to(jnp.arange(tables.shape[1], dtype=jnp.int32)[None] * block, tables.shape)
  if ways:
    # Its own blocks first, in their order; the others begin where nobody looks.
    ids = tables - jax.lax.axis_index(ways) * n
    mine = (ids >= 0) & (ids < n)
    order = jnp.argsort(~mine, axis=1, stable=True)
    tables = jnp.take_along_axis(jnp.where(mine, ids, 0), order, axis=1)
    begins = jnp.take_along_axis(jnp.where(mine, begins, _NEVER), order, axis=1)
  # Of each tile, where its blocks are in its context's list: those not all behind its window, nor all before it.
  edges = jnp.arange(tiles, dtype=jnp.int32)[None] * tile
  low = starts[:, None] + edges // group - window + 1 if window else jnp.zeros((a, tiles), jnp.int32)
  high = jnp.minimum(starts[:, None] + (edges + tile - 1) // group + 1, lengths[:, None])
  count = lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32).reshape(-1)
  lows = count(begins[:, None] + block <= low[:, :, None])
  highs = count(begins[:, None] < high[:, :, None])
  parts = _call_rows(tables.reshape(-1), begins.reshape(-1), lows, highs, starts, lengths, rows, keys, values,
                     tile=tile, group=group, window=window, interpret=interpret)
  return _add_up(jax.tree.map(lambda x: x[:, :, :r], parts), ways)


def _plan_local(owners, starts, first, *, block, pages, programs, window) -> Plan:
  """`Kernels.plan` of one device."""
  (s,), (n,) = first.shape, owners.shape
  if window:
    behind = starts + block <= first[jnp.minimum(owners, s - 1)] - window + 1
    owners = jnp.where(behind, s, owners)
  ids = jnp.argsort(owners, stable=True).astype(jnp.int32)
  counts = jnp.sum(owners[None] == jnp.arange(s, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
  ends, fetches = jnp.cumsum(counts), -(-counts // pages)
  last = jnp.cumsum(fetches)
  slots = jnp.repeat(jnp.arange(s, dtype=jnp.int32), fetches, total_repeat_length=-(-n // pages) + s)
  bases = (ends - counts)[slots] + (jnp.arange(slots.shape[0], dtype=jnp.int32) - (last - fetches)[slots]) * pages
  cuts = jnp.concatenate([jnp.zeros(1, jnp.int32), last[s // programs - 1::s // programs]])
  return Plan(ids, starts[ids], slots, bases, ends, cuts)


def _slots_local(rows, keys, values, plan, starts, first, *, width, window, ways, interpret) -> Partial:
  """`Kernels.slots` of one device."""
  r = rows.shape[2]
  rows = _padded(rows, _whole(r))
  parts = _call_slots(plan, starts, first, rows, keys, values, group=r // width, window=window, interpret=interpret)
  return _add_up(jax.tree.map(lambda x: x[:, :, :r], parts), ways)


def _add_up(parts: Partial, ways: tuple[str, ...]) -> Partial:
  """Returns attention over the blocks of all devices along some axes of the mesh."""
  if not ways:
    return parts
  top = jax.lax.pmax(parts.top, ways)
  scale = jnp.exp(parts.top - top)
  return Partial(top, *jax.lax.psum((parts.total * scale, parts.mean * scale[..., None]), ways))


def _padded(rows: jax.Array, length: int) -> jax.Array:
  return jnp.pad(rows, ((0, 0), (0, 0), (0, length - rows.shape[2]), (0, 0)))


def _slots_pages(shape: tuple[int, ...], dtype: Any) -> int:
  """Returns the blocks of a fetch of `slots`, for keys [N, K, Dh, P] of a device."""
  return max(1, min(MOST_FETCHED, SLOTS_BYTES // (math.prod(shape[1:]) * jnp.dtype(dtype).itemsize)))


def _slots_programs(slots: int, rows: int) -> int:
  """Returns the programs of `slots`, each for as many slots of `rows` queries; chips of two cores share them."""
  fitting = (n for n in range(min(2, slots), slots) if slots % n == 0 and slots // n * rows <= MOST_ROWS)
  return next(fitting, slots)


def _whole(rows: int) -> int:
  """Returns a number of rows that fills tiles."""
  return -(-rows // SUBLANES) * SUBLANES


# ---- the kernels --------------------------------------------------------------------------------


def _call_rows(ids, begins, lows, highs, starts, lengths, rows, keys, values, *, tile, group, window,
               interpret) -> Partial:
  """Returns attention over ids[x * B + lows[x, i]:x * B + highs[x, i]] of tile i of context x's queries.

  Args:
    ids: [A * B] int32. Blocks of each context.
    begins: [A * B] int32. Position of the first token of each.
    lows: [A * I] int32. Of the I tiles of a context.
    highs: [A * I] int32.
    starts: [A] int32. Position of each context's first query.
    lengths: [A] int32. Tokens of each context.
    rows: [A, K, I * tile, Dh].
    keys: [N, K, Dh, P].
    values: [N, K, P, Dh].
    tile: Rows of a program.
    group: Rows at one position.
    window: See `Kernels.rows`.
    interpret: See `Kernels`.
  """
  (a, k, r, dh), block = rows.shape, keys.shape[-1]
  pages, tiles, most = max(1, ROWS_KEYS // block), r // tile, ids.shape[0] // a
  of_tile = lambda width: pl.BlockSpec((None, None, tile, width), lambda x, h, i, *_: (x, h, i, 0))
  stats = jax.ShapeDtypeStruct((a, k, r, LANES), jnp.float32)
  return _parts(*pl.pallas_call(
      functools.partial(_rows_kernel, most=most, pages=pages, group=group, window=window),
      name='attend_rows', interpret=interpret,
      out_shape=(jax.ShapeDtypeStruct(rows.shape, jnp.float32), stats),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=6, grid=(a, k, tiles),
          in_specs=[of_tile(dh), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=[of_tile(dh), of_tile(LANES)],
          scratch_shapes=[
              *_buffers((dh, pages * block), (pages * block, dh), keys.dtype),
              *(pltpu.VMEM((tile, LANES), jnp.float32),) * 2]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',) * 3),
      cost_estimate=pl.CostEstimate(
          flops=4 * a * k * r * most * block * dh, transcendentals=a * k * r * most * block,
          bytes_accessed=2 * a * k * tiles * most * block * dh * keys.dtype.itemsize + rows.size * 8),
  )(ids, begins, lows, highs, starts, lengths, rows, keys, values))


def _rows_kernel(ids, begins, lows, highs, starts, lengths, rows, keys, values, mean, stats, key_buffer, value_buffer,
                 semaphores, top, total, *, most, pages, group, window):
  """A program of `_call_rows`."""
  x, head, i = (pl.program_id(axis) for axis in range(3))
  (tile, _), block = rows.shape, keys.shape[-1]
  part = next(n for n in range(min(PART, tile), 0, -SUBLANES) if tile % n == 0)
  unit = x * pl.num_programs(2) + i
  low, high = x * most + lows[unit], x * most + highs[unit]
  fetches = jax.lax.div(high - low + pages - 1, pages)
  fetch = functools.partial(_fetch, ids, keys.at[:, head], values.at[:, head], key_buffer, value_buffer, semaphores,
                            high, pages)
  first, last = (starts[x] + jax.lax.div(i * tile + edge, group) for edge in (0, tile - 1))
  _begin(value_buffer, top, total, mean)
  fetch(low, 0, start=True)

  @pl.loop(0, fetches)
  def _(step):
    base, buffer = low + step * pages, step & 1
    fetch(base + pages, 1 - buffer, start=True)
    fetch(base, buffer, start=False)
    whole = (base + pages <= high) & (begins[jnp.minimum(base + pages, high) - 1] + block - 1 <= first)
    if window:
      whole &= begins[base] > last - window

    def compute(there=None):
      @pl.loop(0, tile // part)
      def _(at):
        some = pl.ds(pl.multiple_of(at * part, part), part)
        scores = jnp.dot(rows[some], key_buffer[buffer], preferred_element_type=jnp.float32)
        if there is not None:
          row = i * tile + at * part + jax.lax.broadcasted_iota(jnp.int32, (part, 1), 0)
          scores = jnp.where(_seen(starts[x] + jax.lax.div(row, group), there, window), scores, MASKED)
        _fold(scores, value_buffer[buffer], *(y.at[some] for y in (top, total, mean)))

    @pl.when(whole)
    def _():
      compute()

    @pl.when(~whole)
    def _():
      compute(_positions(begins, base, high, pages, block, lengths[x]))

  _end(top, total, stats)


def _call_slots(plan, starts, first, rows, keys, values, *, group, window, interpret) -> Partial:
  """Returns attention of rows [S, K, R, Dh], of which `group` are at each position from starts[s] on, by a plan."""
  (s, k, r, dh), block = rows.shape, keys.shape[-1]
  pages, programs = _slots_pages(keys.shape, keys.dtype), plan.cuts.shape[0] - 1
  of_program = lambda width: pl.BlockSpec((s // programs, k, r, width), lambda p, *_: (p, 0, 0, 0))
  state = (pltpu.VMEM((s // programs, k, r, LANES), jnp.float32),) * 2
  return _parts(*pl.pallas_call(
      functools.partial(_slots_kernel, pages=pages, group=group, window=window),
      name='attend_slots', interpret=interpret,
      out_shape=(jax.ShapeDtypeStruct(rows.shape, jnp.float32), jax.ShapeDtypeStruct((s, k, r, LANES), jnp.float32)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=8, grid=(programs,),
          in_specs=[of_program(dh), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=[of_program(dh), of_program(LANES)],
          scratch_shapes=[*_buffers((k, dh, pages * block), (k, pages * block, dh), keys.dtype), *state]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
      cost_estimate=pl.CostEstimate(flops=4 * r * keys.size, transcendentals=r * keys.size // dh,
                                    bytes_accessed=2 * keys.size * keys.dtype.itemsize),
  )(*plan, starts, first, rows, keys, values))


def _slots_kernel(ids, begins, slots, bases, ends, cuts, starts, first, rows, keys, values, mean, stats, key_buffer,
                  value_buffer, semaphores, top, total, *, pages, group, window):
  """A program of `_call_slots`."""
  program = pl.program_id(0)
  (here, heads, r, _), block = rows.shape, keys.shape[-1]
  stop = cuts[program + 1]

  def fetch(step, buffer, start):
    # Behind the last fetch there is none: its first block would lie past the end of its slot's.
    at = jnp.minimum(step, slots.shape[0] - 1)
    end = jnp.where(step < stop, ends[slots[at]], 0)
    _fetch(ids, keys, values, key_buffer, value_buffer, semaphores, end, pages, bases[at], buffer, start=start)

  _begin(value_buffer, top, total, mean)
  fetch(cuts[program], 0, start=True)

  @pl.loop(cuts[program], stop)
  def _(step):
    buffer, slot = (step - cuts[program]) & 1, slots[step]
    fetch(step + 1, 1 - buffer, start=True)
    fetch(step, buffer, start=False)
    mine = starts[slot] + jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (r, 1), 0), group)
    seen = _seen(mine, _positions(begins, bases[step], ends[slot], pages, block, first[slot]), window)
    at = slot - program * here
    for head in range(heads):
      scores = jnp.dot(rows[at, head], key_buffer[buffer, head], preferred_element_type=jnp.float32)
      _fold(jnp.where(seen, scores, MASKED), value_buffer[buffer, head],
            *(x.at[at, head] for x in (top, total, mean)))

  _end(top, total, stats)


def _buffers(of_keys, of_values, dtype):
  """Returns room for two fetches, and what tells that they have come."""
  return (pltpu.VMEM((2, *of_keys), dtype), pltpu.VMEM((2, *of_values), dtype), pltpu.SemaphoreType.DMA((2, 2)))


def _fetch(ids, keys, values, key_buffer, value_buffer, semaphores, end, pages, base, buffer, *, start):
  """Starts to copy, or waits for, blocks ids[base:base + pages] as far as they come before ids[end]."""
  block = keys.shape[-1]
  for page in range(pages):
    tokens = pl.ds(page * block, block)

    @pl.when(base + page < end)
    def _(page=page, tokens=tokens):
      at = ids[base + page]
      into = key_buffer.at[buffer], value_buffer.at[buffer]
      lanes = (slice(None),) * (len(into[0].shape) - 1) + (tokens,)
      sublanes = (slice(None),) * (len(into[1].shape) - 2) + (tokens,)
      for place, (source, target) in enumerate([(keys.at[at], into[0].at[lanes]), (values.at[at], into[1].at[sublanes])]):
        copy = pltpu.make_async_copy(source, target, semaphores.at[buffer, place])
        copy.start() if start else copy.wait()


def _begin(value_buffer, top, total, mean):
  # What no copy writes has no weight, but were it not a number, no weight would help.
  value_buffer[...] = jnp.zeros(value_buffer.shape, value_buffer.dtype)
  top[...] = jnp.full(top.shape, MASKED, jnp.float32)
  total[...] = jnp.zeros(total.shape, jnp.float32)
  mean[...] = jnp.zeros(mean.shape, jnp.float32)


def _positions(begins, base, end, pages, block, limit):
  """Returns [1, pages * P] int32: positions of the tokens of a fetch, `_NEVER` or more for those from `limit` on."""
  last = begins.shape[0] - 1
  offsets = jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
  there = [jnp.where(base + page < end, begins[jnp.minimum(base + page, last)], _NEVER) + offsets for page in range(pages)]
  there = jnp.concatenate(there, axis=1)
  return jnp.where(there < limit, there, _NEVER)


def _seen(mine, there, window):
  """Returns [R, C] bool: whether queries at `mine`, [R, 1], see keys at `there`, [1, C]."""
  distances = mine - there
  seen = distances >= 0
  return seen & (distances < window) if window else seen


def _fold(scores, values, top, total, mean):
  """Adds values [C, Dh] with scores [R, C] to attention over others.

  Args:
    scores: C a multiple of 128.
    values: See above.
    top: Largest score, [R, 128], the same in every lane.
    total: Sum of weights, [R, 128], still to be summed over lanes: that is done once, at the end.
    mean: [R, Dh].
  """
  lanes = lambda x: [x[:, at:at + LANES] for at in range(0, x.shape[1], LANES)]
  old = top[...]
  new = jnp.maximum(old, jnp.max(functools.reduce(jnp.maximum, lanes(scores)), axis=1, keepdims=True))
  weights, shrink = jnp.exp(scores - _wide(new, scores.shape[1])), jnp.exp(old - new)
  top[...] = new
  total[...] = shrink * total[...] + functools.reduce(jnp.add, lanes(weights))
  mean[...] = _wide(shrink, mean.shape[1]) * mean[...] + jnp.dot(weights.astype(values.dtype), values,
                                                                 preferred_element_type=jnp.float32)


def _wide(x, width):
  """Returns x [R, 128], the same in every lane, as [R, width]."""
  return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x[:, :width]


def _end(top, total, stats):
  """Puts largest scores and sums of weights side by side: each alone would take as much memory as both."""
  column = jax.lax.broadcasted_iota(jnp.int32, stats.shape, len(stats.shape) - 1)
  stats[...] = jnp.where(column == 0, top[...], jnp.sum(total[...], axis=-1, keepdims=True))


def _parts(mean, stats) -> Partial:
  return Partial(stats[..., 0], stats[..., 1], mean)
