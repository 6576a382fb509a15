"""Keys and values in blocks of tokens, and attention over them: pure functions, to be jitted with the cache donated.

A context is a list of blocks, which the host keeps. Several contexts may hold the same block, so what they have in
common is stored once, and memory follows the tokens that are there.

A call of `decode` reads and writes in one of two ways:

    by block   Each block meets the queries of the one slot that reads it, and what the blocks say of a slot is added up.
               Blocks that many slots read, such as those of a system prompt, are read in one product for all. The cache
               is only read; new keys and values go to a buffer, and `store` moves them to their blocks at the end. On
               accelerators and meshes.
    by table   A kernel follows the table of each context's blocks, and new keys and values go to their blocks at once. On
               a single CPU device, where the same kernel reads for extensions.

Axes: N blocks, P tokens of a block, S slots, W tokens of a step, R queries of a key/value head (W x H/K), K key/value
heads, Dh head width, F columns of the buffer, B blocks of a context, L layers.
"""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from agentrl.models.config import ModelConfig
from agentrl.models.layers import MASKED
from agentrl.sharding import mesh as meshes

# Blocks of which a step of the loops over shared blocks, and over those of an extension, reads this many tokens.
STRIDE = 256
_EXACT = jax.lax.Precision.HIGHEST


class Cache(NamedTuple):
  """Keys and values of all blocks, one buffer a layer, never stacked, so that each is written in place.

  Attributes:
    keys: L of [N, K, Dh, P]: with the tokens last the scores of a step are plain matrix products.
    values: L of [N, K, P, Dh].
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]

  @property
  def blocks(self) -> int:
    """N."""
    return self.values[0].shape[0]

  @property
  def block(self) -> int:
    """P."""
    return self.values[0].shape[2]


class Fresh(NamedTuple):
  """Where a call of `decode` puts what is new: keys, L of [S, K, Dh, F], and values, L of [S, K, F, Dh].

  A row is a slot's, and begins with its first new token. By table these are the cache's own keys and values.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


class Reading(NamedTuple):
  """Which blocks the slots of a call read, and where what they draw is to be kept.

  Attributes:
    owners: [N] int32. The slot that alone reads a block; S for none.
    fills: [N] int32. Tokens that the owner sees of it.
    starts: [N] int32. Position of its first token.
    shared: [M] int32. Blocks that several slots read, all of them full; 0 behind `shared_count`.
    shared_starts: [M] int32.
    shared_count: int32 scalar.
    sharers: [S, M] bool.
    targets: [S, J] int32. Blocks for what is new, from that of the first new position on; N where there is none.
    tables: [S, B] int32. Blocks of each context, in order, then N, to read and write by; the others do not matter then.
      None to read by block.
  """

  owners: jax.Array
  fills: jax.Array
  starts: jax.Array
  shared: jax.Array
  shared_starts: jax.Array
  shared_count: jax.Array
  sharers: jax.Array
  targets: jax.Array
  tables: jax.Array | None = None


class Partial(NamedTuple):
  """Attention over some of the keys, not yet divided: largest score and sum of weights [S, K, R], sum [S, K, R, Dh]."""

  top: jax.Array
  total: jax.Array
  mean: jax.Array


def init(config: ModelConfig, blocks: int, block: int, dtype: str = '') -> Cache:
  """Returns an empty cache of `blocks` blocks of `block` tokens; '' for the compute dtype."""
  def zeros(*shape):
    shape = (blocks, config.num_kv_heads, *shape)
    return tuple(jnp.zeros(shape, dtype or config.compute_dtype) for _ in range(config.num_layers))

  return Cache(zeros(config.head_dim, block), zeros(block, config.head_dim))


def init_fresh(cache: Cache, reading: Reading, columns: int) -> Fresh:
  """Returns an empty buffer for `columns` tokens of each slot, or, by table, the cache itself."""
  if reading.tables is not None:
    return Fresh(*cache)
  slots, (_, k, dh, _) = reading.targets.shape[0], cache.keys[0].shape
  keys = tuple(jnp.zeros((slots, k, dh, columns), x.dtype) for x in cache.keys)
  return Fresh(keys, tuple(jnp.zeros((slots, k, columns, dh), x.dtype) for x in cache.values))


def resize(cache: Cache, blocks: int) -> Cache:
  """Returns the cache with `blocks` blocks; those past them are lost."""
  def one(x):
    kept = x[:min(blocks, x.shape[0])]
    return jnp.pad(kept, [(0, blocks - kept.shape[0])] + [(0, 0)] * (x.ndim - 1))

  return jax.tree.map(one, cache)


def copy(cache: Cache, sources: jax.Array, targets: jax.Array) -> Cache:
  """Returns the cache with block targets[r] a copy of block sources[r].

  Args:
    cache: Donate it.
    sources: [R] int32.
    targets: [R] int32, distinct; one that is N or more is skipped.
  """
  return jax.tree.map(lambda x: x.at[targets].set(x[sources], mode='drop'), cache)


def take(cache: Cache, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns keys [L, R, K, Dh, P] and values [L, R, K, P, Dh] of blocks [R] int32."""
  return jnp.stack([x[blocks] for x in cache.keys]), jnp.stack([x[blocks] for x in cache.values])


def put(cache: Cache, blocks: jax.Array, keys: jax.Array, values: jax.Array) -> Cache:
  """Returns the cache with what `take` gave in `blocks`, [R] int32, distinct; one that is N or more is skipped."""
  return Cache(tuple(x.at[blocks].set(new, mode='drop') for x, new in zip(cache.keys, keys)),
               tuple(x.at[blocks].set(new, mode='drop') for x, new in zip(cache.values, values)))


def store(cache: Cache, fresh: Fresh, reading: Reading, first: jax.Array, counts: jax.Array) -> Cache:
  """Returns the cache with what is new in `fresh` at the positions from first[s] to first[s] + counts[s].

  Args:
    cache: Donate it.
    fresh: After the last step.
    reading: As it was made for.
    first: [S] int32.
    counts: [S] int32.
  """
  if reading.tables is not None:
    return Cache(*fresh)
  write = functools.partial(write_rows, tables=reading.targets, starts=first % cache.block, counts=counts)
  keys = tuple(write(x, new.transpose(0, 3, 1, 2), axis=3) for x, new in zip(cache.keys, fresh.keys))
  return Cache(keys, tuple(write(x, new.transpose(0, 2, 1, 3), axis=2) for x, new in zip(cache.values, fresh.values)))


def write_rows(buffer: jax.Array, new: jax.Array, tables: jax.Array, starts: jax.Array, counts: jax.Array,
               axis: int) -> jax.Array:
  """Returns a layer's keys or values with new[r, :counts[r]] at the positions from starts[r] on of the context tables[r].

  Args:
    buffer: Keys [N, K, Dh, P] or values [N, K, P, Dh].
    new: [A, T, K, Dh].
    tables: [A, B] int32. Blocks of each context, in order; those written belong to no other.
    starts: [A] int32.
    counts: [A] int32, at most T.
    axis: Of the tokens in the buffer, 3 or 2.
  """
  return jax.lax.platform_dependent(buffer, new, tables, starts, counts, tpu=functools.partial(write_blocks, axis=axis),
                                    default=functools.partial(write_tokens, axis=axis))


def write_tokens(buffer, new, tables, starts, counts, *, axis):
  """`write_rows` as a scatter of tokens, which is the fastest on CPU."""
  columns, block = jnp.arange(new.shape[1])[None], buffer.shape[axis]
  positions = starts[:, None] + columns
  which, places = positions // block, positions % block
  blocks = jnp.take_along_axis(tables, jnp.minimum(which, tables.shape[1] - 1), axis=1)
  # What is not to be kept goes to a block past the end, and with it nowhere.
  blocks = jnp.where((columns < counts[:, None]) & (which < tables.shape[1]), blocks, buffer.shape[0])
  at = buffer.at[blocks, :, :, places] if axis == 3 else buffer.at[blocks, :, places]
  return at.set(new.astype(buffer.dtype), mode='drop')


def write_blocks(buffer, new, tables, starts, counts, *, axis):
  """`write_rows` by whole blocks, read and written back, in place.

  Of a scatter of many tokens XLA's TPU backend makes one over another layout, and copies the buffer there and back.
  """
  (a, t, k, dh), block = new.shape, buffer.shape[axis]
  reach = (t + block - 2) // block + 1  # most blocks that a row writes to
  which = starts[:, None] // block + jnp.arange(reach)[None]
  ids = jnp.take_along_axis(tables, jnp.minimum(which, tables.shape[1] - 1), axis=1)
  touched = (which * block < (starts + counts)[:, None]) & (counts > 0)[:, None]
  ids = jnp.where(touched, ids, buffer.shape[0])
  first = starts % block
  spread = jax.vmap(lambda row, at: jax.lax.dynamic_update_slice_in_dim(
      jnp.zeros((reach * block, k, dh), buffer.dtype), row, at, 0))(new.astype(buffer.dtype), first)
  columns = (jnp.arange(reach * block)[None] - first[:, None]).reshape(a, reach, block)
  is_new = (columns >= 0) & (columns < counts[:, None, None])
  spread = spread.reshape(a, reach, block, k, dh).transpose((0, 1, 3, 4, 2) if axis == 3 else (0, 1, 3, 2, 4))
  is_new = is_new[:, :, None, None, :] if axis == 3 else is_new[:, :, None, :, None]
  old = buffer[jnp.minimum(ids, buffer.shape[0] - 1)]
  return buffer.at[ids].set(jnp.where(is_new, spread, old), mode='drop')


def append(buffer: jax.Array, new: jax.Array, positions: jax.Array, first: jax.Array, reading: Reading,
           active: jax.Array | None, axis: int) -> jax.Array:
  """Returns keys or values of `Fresh` with those of new tokens, [S, W, K, Dh].

  Args:
    buffer: F columns along `axis`.
    new: W tokens of each slot. If that is 1, by block, all slots write the last of their columns: those behind have ended.
    positions: [S, W] int32. Theirs.
    first: [S] int32. Position of each slot's first new token.
    reading: Where slots write.
    active: [S] bool. Those that write by table; None for all.
    axis: Of the columns, 3 or 2.
  """
  new = new.astype(buffer.dtype)
  if reading.tables is not None:
    counts = jnp.full(new.shape[0], new.shape[1]) if active is None else jnp.where(active, new.shape[1], 0)
    return write_tokens(buffer, new, reading.tables, positions[:, 0], counts, axis=axis)
  columns = positions[:, 0] - first
  new = new.transpose((0, 2, 3, 1) if axis == 3 else (0, 2, 1, 3))
  if new.shape[axis] == 1:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, jnp.max(columns), axis)
  return jax.vmap(lambda row, some, at: jax.lax.dynamic_update_slice_in_dim(row, some, at, axis - 1))(
      buffer, new, columns)


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, fresh_keys: jax.Array, fresh_values: jax.Array,
           reading: Reading, positions: jax.Array, first: jax.Array, *, window: int = 0, scale: float = 0.0,
           sinks: jax.Array | None = None, own: Callable[[jax.Array], Partial] | None = None) -> jax.Array:
  """Returns the attention of the last tokens of each slot over its blocks and what is new.

  Args:
    q: [S, W, K, H/K, Dh].
    keys: [N, K, Dh, P].
    values: [N, K, P, Dh].
    fresh_keys: As in `Fresh`, those of the queries among them.
    fresh_values: As in `Fresh`.
    reading: Which blocks are whose.
    positions: [S, W] int32. Of the queries.
    first: [S] int32. Position of each slot's first new token: all before it is in blocks.
    window: Tokens back that a query sees, itself included; 0 for all.
    scale: 0 for Dh^-1/2.
    sinks: [K, H/K], see `layers.attention_weights`.
    own: From scaled queries [S, K, R, Dh] to attention over the blocks that each slot alone reads, or, by table, over all;
      None for plain products, by block.
  Returns:
    [S, W, K, H/K, Dh].
  Raises:
    ValueError: if the reading is by table and `own` is missing.
  """
  rows = _rows(q, scale)
  if reading.tables is not None:
    if own is None:
      raise ValueError('a reading by table needs kernels, see kernels.choose; without them read by block')
    return _finish(own(rows), q, sinks)
  if own is None:
    parts = _own(rows, keys, values, fresh_keys, fresh_values, reading, positions, first, window)
  else:
    there = first[:, None] + jnp.arange(fresh_keys.shape[-1])[None]
    parts = merge(own(rows), _weigh(rows, fresh_keys, fresh_values, _seen(positions, there, window)))
  return _finish(_shared(rows, keys, values, reading, positions, window, parts), q, sinks)


def attend_rows(q: jax.Array, keys: jax.Array, values: jax.Array, tables: jax.Array, positions: jax.Array,
                longest: jax.Array, *, window: int = 0, scale: float = 0.0, sinks: jax.Array | None = None,
                read: Callable[[jax.Array], Partial] | None = None) -> jax.Array:
  """Returns the attention of many tokens of some contexts over these contexts' blocks, themselves included.

  Args:
    q: [A, T, K, H/K, Dh].
    keys: [N, K, Dh, P].
    values: [N, K, P, Dh].
    tables: [A, B] int32. Blocks of each context, in order.
    positions: [A, T] int32. Of the queries.
    longest: int32 scalar. Tokens of the longest context.
    window: As for `attend`.
    scale: As for `attend`.
    sinks: As for `attend`.
    read: From scaled queries [A, K, R, Dh] to attention over all of it; None for plain products.
  Returns:
    [A, T, K, H/K, Dh].
  """
  rows, (a, _, k, _, dh), block = _rows(q, scale), q.shape, keys.shape[-1]
  if read is not None:
    return _finish(read(rows), q, sinks)
  stride = max(1, min(STRIDE // block, tables.shape[1]))
  tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % stride)))

  def body(carry):
    at, parts = carry
    ids = jax.lax.dynamic_slice_in_dim(tables, at, stride, axis=1)
    key = keys[ids].transpose(0, 2, 3, 1, 4).reshape(a, k, dh, stride * block)
    value = values[ids].transpose(0, 2, 1, 3, 4).reshape(a, k, stride * block, dh)
    seen = _seen(positions, (at * block + jnp.arange(stride * block))[None], window)
    return at + stride, merge(parts, _weigh(rows, key, value, seen))

  carry = jnp.int32(0), _nothing(rows)
  _, parts = jax.lax.while_loop(lambda c: c[0] * block < longest, body, carry)
  return _finish(parts, q, sinks)


def merge(a: Partial, b: Partial) -> Partial:
  """Returns attention over the keys of both."""
  top = jnp.maximum(a.top, b.top)
  scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
  return Partial(top, a.total * scale_a + b.total * scale_b,
                 a.mean * scale_a[..., None] + b.mean * scale_b[..., None])


def _rows(q: jax.Array, scale: float) -> jax.Array:
  """Returns queries [S, W, K, H/K, Dh], scaled, as [S, K, R, Dh]."""
  s, w, k, g, dh = q.shape
  scaled = (q.astype(jnp.float32) * (scale or dh**-0.5)).astype(q.dtype)
  return scaled.transpose(0, 2, 1, 3, 4).reshape(s, k, w * g, dh)


def _finish(parts: Partial, q: jax.Array, sinks: jax.Array | None) -> jax.Array:
  """Returns the attention, of q's shape and dtype, that the parts come to."""
  s, w, k, g, dh = q.shape
  total, mean = parts.total, parts.mean
  if sinks is not None:
    sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None], (1, k, w, g)).reshape(1, k, w * g)
    top = jnp.maximum(parts.top, sink)
    shrunk = jnp.exp(parts.top - top)
    total, mean = total * shrunk + jnp.exp(sink - top), mean * shrunk[..., None]
  out = (mean / total[..., None]).astype(q.dtype)
  return out.reshape(s, k, w, g, dh).transpose(0, 2, 1, 3, 4)


def _nothing(rows: jax.Array) -> Partial:
  """Returns attention over no key."""
  shape = rows.shape[:-1]
  return Partial(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(rows.shape))


def _seen(positions: jax.Array, there: jax.Array, window: int) -> jax.Array:
  """Returns [A, W, P] bool: whether queries at positions [A, W] see keys at `there`, [A or 1, P]."""
  distances = positions[:, :, None] - there[:, None]
  seen = distances >= 0
  return seen & (distances < window) if window else seen


def _scores(rows: jax.Array, keys: jax.Array, seen: jax.Array) -> jax.Array:
  """Returns the scores, [A, K, R, P] float32, of rows [A, K, R, Dh] for keys [A, K, Dh, P] or, of all, [K, Dh, P].

  Args:
    rows: Scaled queries.
    keys: Of each row, or of all.
    seen: [A, W, P] bool, W dividing R: where a query may look.
  """
  each = 'a' if keys.ndim == 4 else ''
  scores = jnp.einsum(f'akrd,{each}kdp->akrp', rows, keys, preferred_element_type=jnp.float32)
  seen = jnp.repeat(seen, rows.shape[2] // seen.shape[1], axis=1) if seen.shape[1] > 1 else seen
  return jnp.where(seen[:, None], scores, MASKED)


def _mean(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Returns the sums, [A, K, R, Dh] float32, of values [A, K, P, Dh] or [K, P, Dh] with weights [A, K, R, P]."""
  each = 'a' if values.ndim == 4 else ''
  return jnp.einsum(f'akrp,{each}kpd->akrd', weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _weigh(rows: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> Partial:
  """Returns attention of `rows` over `keys` and `values`, see `_scores` and `_mean`."""
  scores = _scores(rows, keys, seen)
  top = jnp.max(scores, axis=-1)
  weights = jnp.exp(scores - top[..., None])
  return Partial(top, jnp.sum(weights, axis=-1), _mean(weights, values))


def _own(rows: jax.Array, keys: jax.Array, values: jax.Array, fresh_keys: jax.Array, fresh_values: jax.Array,
         reading: Reading, positions: jax.Array, first: jax.Array, window: int) -> Partial:
  """Returns attention of each slot over what is new and the blocks that it alone reads.

  All blocks are read once, each with its owner's queries; those without an owner have nothing to see.
  """
  slots = rows.shape[0]
  owner = jnp.minimum(reading.owners, slots - 1)
  offsets = jnp.arange(keys.shape[-1])[None]
  seen = (offsets < reading.fills[:, None])[:, None]
  if window:
    seen &= _seen(positions[owner], reading.starts[:, None] + offsets, window)
  scores = _scores(rows[owner], keys, seen)
  there = first[:, None] + jnp.arange(fresh_keys.shape[-1])[None]
  new_scores = _scores(rows, fresh_keys, _seen(positions, there, window))

  # On a mesh that splits blocks each device adds up its own: what they say is not gathered.
  mine = meshes.constrain(reading.owners[None] == jnp.arange(slots)[:, None], (None, 'slots'))
  top = jnp.max(jnp.where(mine[:, :, None, None], jnp.max(scores, axis=-1)[None], MASKED), axis=1)
  top = jnp.maximum(top, jnp.max(new_scores, axis=-1))
  weights, new_weights = jnp.exp(scores - top[owner][..., None]), jnp.exp(new_scores - top[..., None])
  add_up = lambda x: meshes.constrain(jnp.einsum('sn,nkr...->skr...', mine.astype(jnp.float32), x, precision=_EXACT),
                                      (None, 'kv_heads', *(None,) * (x.ndim - 2)))
  total = add_up(jnp.sum(weights, axis=-1)) + jnp.sum(new_weights, axis=-1)
  return Partial(top, total, add_up(_mean(weights, values)) + _mean(new_weights, fresh_values))


def _shared(rows: jax.Array, keys: jax.Array, values: jax.Array, reading: Reading, positions: jax.Array, window: int,
            parts: Partial) -> Partial:
  """Returns `parts` and attention over the blocks that several slots read, in one product for all slots."""
  (k, dh, block), rows = keys.shape[1:], rows.astype(keys.dtype)
  stride = max(1, min(STRIDE // block, reading.shared.shape[0]))
  pad = -reading.shared.shape[0] % stride
  ids, starts = jnp.pad(reading.shared, (0, pad)), jnp.pad(reading.shared_starts, (0, pad))
  sharers = jnp.pad(reading.sharers, ((0, 0), (0, pad)))

  def body(carry):
    at, parts = carry
    some = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, at, stride, axis)
    there = (some(starts)[:, None] + jnp.arange(block)[None]).reshape(1, -1)
    seen = jnp.repeat(some(sharers, 1), block, axis=1)[:, None]
    if window:
      seen &= _seen(positions, there, window)
    key = keys[some(ids)].transpose(1, 2, 0, 3).reshape(k, dh, -1)
    value = values[some(ids)].transpose(1, 0, 2, 3).reshape(k, -1, dh)
    return at + stride, merge(parts, _weigh(rows, key, value, seen))

  return jax.lax.while_loop(lambda c: c[0] < reading.shared_count, body, (jnp.int32(0), parts))[1]
