"""A cache with the compiled functions that work on it, in a few fixed shapes, and the books of what it holds."""

from __future__ import annotations

import functools
import time
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from agentrl.models.config import ModelConfig
from agentrl.models.params import Params
from agentrl.sampling import cache as caches
from agentrl.sampling import functions
from agentrl.sampling import kernels as kernel_choice
from agentrl.sampling import readings
from agentrl.sampling import speculation as speculations
from agentrl.sampling.cache import Reading
from agentrl.sampling.constrain import Cursor, MaskTable
from agentrl.sampling.contexts import Contexts, Copy, Parked, Write
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.sizes import block_of, buckets, split_rows, thinned
from agentrl.sampling.speculation import Speculation
from agentrl.sharding import mesh as meshes

MAX_STOPS = 8
TPU_BLOCK = 128  # columns of a tile: of fewer, what extend and decode want of the cache's layout differs, and it is copied
CPU_BLOCK = 32
# Blocks that one call copies, and that one call takes out of the cache or puts back.
COPY_ROWS = 8
PARK_ROWS = 4


class Extension(NamedTuple):
  """Tokens to write into a seat that holds `start` tokens already."""

  seat: int
  tokens: Sequence[int]
  start: int


class SlotRequest(NamedTuple):
  """What the context of a seat is to draw.

  Attributes:
    pending: Last token of its context.
    length: Tokens before it, all in the cache.
    budget: Tokens it may draw, at least 1.
    seed: Key of its trajectory, two uint32.
    stops: At most `MAX_STOPS` token ids that end its turn.
    cursor: Where the turn stands in its grammar; None to draw freely.
  """

  pending: int
  length: int
  budget: int
  seed: tuple[int, int]
  stops: tuple[int, ...]
  cursor: Cursor | None = None


class Draws(NamedTuple):
  """What one seat drew: ids, log-probs and entropies (nats) of equal length, and whether a stop token ended it.

  `masks` are the packed sets of tokens that each was drawn from, None for all; () where nothing is constrained.
  """

  tokens: np.ndarray
  log_probs: np.ndarray
  entropies: np.ndarray
  stopped: bool
  masks: tuple[bytes | None, ...] = ()


def cache_sharding(config: ModelConfig, blocks: int, mesh: Mesh) -> NamedSharding:
  """Returns where a cache of `blocks` blocks lies on a mesh."""
  return NamedSharding(mesh, meshes.spec_of(('slots', 'kv_heads'), (blocks, config.num_kv_heads), mesh))


def jit_extend(config: ModelConfig, block: int, where: NamedSharding | None) -> Callable[..., Any]:
  """Returns `functions.extend`, jitted for a cache of blocks of `block` tokens that lives `where`, to be donated."""
  extend = functools.partial(functions.extend, config=config, kernels=kernel_choice.choose(config, block, where))
  return jax.jit(_on_mesh(extend, where), donate_argnums=1, out_shardings=where)


def jit_decode(decode: Callable[..., Any], config: ModelConfig, block: int,
               where: NamedSharding | None) -> Callable[..., Any]:
  """Returns `functions.decode`, or what has its signature, with its other static arguments bound; see `jit_extend`."""
  decode = functools.partial(decode, config=config, kernels=kernel_choice.choose(config, block, where))
  return jax.jit(_on_mesh(decode, where), donate_argnums=1, out_shardings=(where, None))


def _on_mesh(function: Callable[..., Any], where: NamedSharding | None) -> Callable[..., Any]:
  """Has a function told how its arrays are split: guessing, the compiler gathers weights at every step.

  Not where slots are split over 'data': products of fewer rows round otherwise, and the draws of a run would depend on the
  number of devices.
  """
  if where is None or where.mesh.shape['data'] * where.mesh.shape['fsdp'] > 1:
    return function
  return meshes.under(where.mesh, function, meshes.SAMPLER_AXES)


class Sampler:
  """A cache, the contexts in it, of which S draw at a time, and the functions that fill and read it.

  A context has a seat while it is in the cache, and a slot during a call of `decode` that it draws in.

  Shapes are taken from fixed sets, so that nothing compiles after `warm_up`. What is to be computed of known tokens is
  noted, and done in as few calls as possible before the next draw. Only `decode` waits for the device.
  """

  def __init__(self, config: ModelConfig, *, slots: int, context: int, chunk: int = 16,
               sampling: SamplingParams = SamplingParams(), capacities: Sequence[int] | None = None,
               row_buckets: Sequence[int] | None = None, token_buckets: Sequence[int] | None = None,
               block: int = 0, mesh: Mesh | None = None, speculation: Speculation | None = None,
               constrained: bool = False, share: bool = True, seats: int = 0, room: int = 0):
    """Makes a sampler without parameters; see `set_params`.

    Args:
      config: Of the policy.
      slots: S, how many contexts may draw in a call.
      context: Longest context, tokens.
      chunk: Passes through the network in one call of `decode`, at most.
      sampling: The distribution drawn from.
      capacities: Sizes of the cache, in tokens a slot on average; it has the first that is enough. The largest may be below
        `context`: then not all slots can be long at once.
      row_buckets: Numbers of rows an extension may have.
      token_buckets: Numbers of tokens of a row that one extension may write; longer ones take several.
      block: Tokens of a block of the cache; 0 for about 64, on CPUs 32, on TPUs 128.
      mesh: Of this process's devices, where parameters and cache are to live; None for where the parameters lie. It
        has all the devices that they lie on, or, in a run of one process, none of them.
      speculation: Guess tokens from the slot's own text, so that a pass may draw several; None for one a pass.
      constrained: Whether turns may follow a grammar: the host is then asked for masks at every step.
      share: Whether contexts that begin alike share blocks; if not, each is computed whole, to measure what that saves.
      seats: Contexts that may be in the cache at a time; 0 for as many as slots.
      room: Tokens that the cache can hold, a slot on average; 0 for the largest of `capacities`.
    Raises:
      ValueError: if the cache could not hold one context, or there are fewer seats than slots.
    """
    if 0 < seats < slots:
      raise ValueError(f'{seats} seats are too few for {slots} slots; give at least as many, or 0')
    self.config = config
    self.slots = slots
    self.context = context
    self.chunk = chunk
    self.reach = chunk * (1 + speculation.tokens if speculation else 1)  # most tokens a slot draws in one `decode`
    self.sampling = sampling
    self.speculation = speculation
    self.masks = None
    if constrained:
      self.masks = MaskTable(slots, config.vocab_size, 1 + speculation.tokens if speculation else 1)
    self.steps = 0  # passes through the network so far, of `decode`
    self.prefill_seconds = 0.0  # waited for known tokens so far, in `decode` and `park`
    on = jax.default_backend()
    self.block = min(block or (TPU_BLOCK if on == 'tpu' else block_of(context, CPU_BLOCK if on == 'cpu' else 64)), context)
    capacities = sorted(capacities or buckets(min(64, context), context))
    room = room or capacities[-1]
    # Where a step reads by table, and not all of the cache, its size hardly matters: few are compiled.
    rooms = [*(c for c in capacities if c < room), room]
    rooms = thinned(rooms) if on == 'cpu' else rooms
    even = min(slots, 8)  # a mesh splits the blocks evenly
    sizes = sorted({-(-slots * tokens // (self.block * even)) * even for tokens in rooms})
    if sizes[-1] * self.block < context:
      raise ValueError(f'the cache would have room for {sizes[-1] * self.block} tokens, {slots} slots of {rooms[-1]}, '
                       f'but one context may have {context}; raise room or capacities, or lower context')
    sizes[-1] = max(sizes[-1], -(-context // self.block) + 1)  # a block may have to be copied
    self.row_buckets = tuple(sorted(row_buckets or {min(2, slots), min(8, slots), slots}))
    self.token_buckets = tuple(sorted(token_buckets or {min(16, context), min(64, context)}))
    self.contexts = Contexts(slots, context, self.block, sizes, self.reach, share, seats)
    self._params: dict[str, Params] = {}
    self._mesh = mesh
    self._view: Callable[[Params], Params] | None = None
    self._place(None)
    self.reset()

  def _place(self, where: NamedSharding | None):
    """Makes the functions anew for a cache that lives `where`; on the default device if None.

    Left to the compiler, their outputs live elsewhere than an empty cache, and each would be compiled twice.
    """
    jit = functools.partial(jax.jit, out_shardings=where)
    self._where = where
    if self.masks and where is not None:
      self.masks.everywhere = NamedSharding(where.mesh, PartitionSpec())
    self._extend = jit_extend(self.config, self.block, where)
    self._copy = jit(caches.copy, donate_argnums=0)
    self._put = jit(caches.put, donate_argnums=0)
    self._take = jax.jit(caches.take)
    self._resize = jit(caches.resize, static_argnums=1)
    settings = dict(steps=self.chunk, sampling=self.sampling, masks=self.masks)
    of, settings = (speculations, dict(settings, speculation=self.speculation)) if self.speculation else (functions, settings)
    self._by_table = kernel_choice.reads_by_table(self.config, where)
    self._decode = jit_decode(functools.partial(of.decode, **settings), self.config, self.block, where)

  def set_params(self, params: Params, policy: str = ''):
    """Takes new weights, learner's view. What the cache holds is of the old ones from here on.

    Given a mesh, every process of the run must call it: each is sent what its devices lack.

    Args:
      params: Of the sampler's config.
      policy: Of several that share the cache, which one.
    """
    if self._view is None:
      self._view = self._make_view(params)
    view = self._view(params)
    if self._mesh is not None:
      view = meshes.own_part(view, self._mesh)
    self._params[policy] = view
    of = view['embedding'].sharding
    if isinstance(of, NamedSharding):
      where = cache_sharding(self.config, self.contexts.sizes[0], of.mesh)
      if where != self._where:
        self._place(where)
        self.reset()

  def _make_view(self, params: Params) -> Callable[[Params], Params]:
    view = functools.partial(functions.sampler_view, config=self.config)
    laid_out = functools.partial(meshes.shardings, functions.view_axes(self.config), jax.eval_shape(view, params),
                                 table=meshes.SAMPLER_AXES)
    if self._mesh is None:
      table = params['embedding']
      of = table.sharding if isinstance(table, jax.Array) else None
      return jax.jit(view, out_shardings=laid_out(of.mesh) if isinstance(of, NamedSharding) else None)
    everywhere = meshes.every_process(self._mesh)
    where = laid_out(everywhere)
    held = {d for x in jax.tree.leaves(params) if isinstance(x, jax.Array) for d in x.devices()}
    if held.isdisjoint(everywhere.devices.flat):
      # One program cannot span them: made where the parameters lie, then sent.
      made = jax.jit(view)
      return lambda params: jax.device_put(made(params), where)
    return jax.jit(view, out_shardings=where)

  @property
  def policies(self) -> tuple[str, ...]:
    """Those whose parameters are set."""
    return tuple(self._params)

  def reset(self):
    """Empties the cache and makes it small again."""
    self.contexts.clear()
    # What CPUs can multiply, whatever the shapes.
    dtype = 'float32' if kernel_choice.platform_of(self._where) == 'cpu' else ''
    self.cache = caches.init(self.config, self.contexts.size, self.block, dtype)
    if self._where is not None:
      self.cache = jax.device_put(self.cache, self._where)
    self.block_bytes = sum(x.nbytes for x in jax.tree.leaves(self.cache)) // self.cache.blocks  # in all layers

  def outdate(self):
    """Has no context that is opened from here on share what is in the cache; those that are there go on."""
    self.flush()
    self.contexts.outdate()

  # ---- contexts ---------------------------------------------------------------------------------

  def open(self, seat: int, tokens: np.ndarray, policy: str = '') -> int:
    """Gives a seat what the cache has of the beginning of a context, and returns how many tokens that are.

    Args:
      seat: What it held before is let go.
      tokens: [n] int32. What the context is to begin with.
      policy: Whose context it is.
    """
    self._settle(seat)
    return self.contexts.open(seat, np.asarray(tokens, np.int32), policy)

  def close(self, seat: int):
    """Empties a seat. Contexts that begin as its did find what it held, while there is room."""
    self._settle(seat)
    self.contexts.close(seat)

  def note(self, seat: int):
    """Lets contexts that are opened from here on begin as the seat's does."""
    self.contexts.note(seat)

  def fork(self, pairs: Sequence[tuple[int, int]]):
    """Gives seats the contexts of others: (source, target) pairs."""
    for source, target in pairs:
      self.contexts.note(source)
      context = self.contexts.contexts[source]
      self.open(target, self.contexts.tokens[source, :context.held], context.policy)

  def truncate(self, seat: int, length: int):
    """Cuts a seat's context to `length` tokens."""
    context = self.contexts.contexts[seat]
    if context is not None and length < context.held:
      self._settle(seat)
      self.contexts.truncate(seat, length)

  def extend(self, extensions: Sequence[Extension]):
    """Has tokens written into seats, which are cut where these start; each seat at most once a call.

    Raises:
      CacheFull: if there is no room; extensions before the one at fault are taken.
    """
    for seat, tokens, start in extensions:
      if len(tokens):
        self._cut(seat, start)
        self.contexts.write(seat, start, tokens)

  def park(self, seat: int) -> Parked:
    """Empties a seat and returns what it held, for `unpark`. Waits for the device."""
    self._finish()
    return self.contexts.park(seat, self._take_blocks)

  def unpark(self, seat: int, parked: Parked) -> int:
    """Gives an empty seat what was parked, and returns how many tokens that are: 0 if the cache was emptied since.

    Raises:
      CacheFull: if there is no room.
    """
    blocks = self.contexts.unpark(seat, parked)
    if blocks:
      self._fit()
      for at in range(0, len(blocks), PARK_ROWS):
        part = slice(at, at + PARK_ROWS)
        ids = _filled(blocks[part], PARK_ROWS, self.cache.blocks)
        pad = [(0, 0), (0, PARK_ROWS - len(blocks[part]))] + [(0, 0)] * 3
        self.cache = self._put(self.cache, ids, np.pad(parked.keys[:, part], pad), np.pad(parked.values[:, part], pad))
    return self.contexts.contexts[seat].held

  def _take_blocks(self, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for at in range(0, len(blocks), PARK_ROWS):
      some = blocks[at:at + PARK_ROWS]
      keys, values = self._take(self.cache, _filled(some, PARK_ROWS, 0))
      parts.append((np.asarray(keys)[:, :len(some)], np.asarray(values)[:, :len(some)]))
    keys, values = zip(*parts)
    return np.concatenate(keys, axis=1), np.concatenate(values, axis=1)

  def _cut(self, seat: int, length: int):
    """Cuts a seat's context, which is empty if it was never opened."""
    if self.contexts.contexts[seat] is None:
      self.contexts.open(seat, np.zeros(0, np.int32))
    self.truncate(seat, length)

  def _settle(self, seat: int):
    """Sees to it that no work is noted for a seat's blocks."""
    if self.contexts.is_due(seat):
      self.flush()

  # ---- the device -------------------------------------------------------------------------------

  def _fit(self):
    """Makes the cache as large as the books say, a size at a time: the shapes are then those that `warm_up` compiled."""
    sizes = self.contexts.sizes
    while self.cache.blocks != self.contexts.size:
      at = sizes.index(self.cache.blocks) + (1 if self.contexts.size > self.cache.blocks else -1)
      self.cache = self._resize(self.cache, sizes[at])

  def flush(self) -> bool:
    """Hands what is noted to the device and returns at once, whether anything was."""
    steps = self.contexts.take_steps()
    if steps:
      self._fit()
    for work in steps:
      self._copy_blocks([w for w in work if isinstance(w, Copy)])
      for policy in dict.fromkeys(w.policy for w in work if isinstance(w, Write)):
        self._write([w for w in work if isinstance(w, Write) and w.policy == policy], policy)
    return bool(steps)

  def _finish(self):
    """Waits until the device has done what is noted."""
    started = time.perf_counter()
    if self.flush():
      jax.block_until_ready(self.cache)
      self.prefill_seconds += time.perf_counter() - started

  def held_bytes(self, seat: int) -> int:
    """Returns the bytes of the blocks of a seat's context."""
    context = self.contexts.contexts[seat]
    return len(context.blocks) * self.block_bytes if context else 0

  def _copy_blocks(self, copies: Sequence[Copy]):
    for at in range(0, len(copies), COPY_ROWS):
      part = copies[at:at + COPY_ROWS]
      self.cache = self._copy(self.cache, _filled([c.source for c in part], COPY_ROWS, 0),
                              _filled([c.target for c in part], COPY_ROWS, self.cache.blocks))

  def _write(self, writes: Sequence[Write], policy: str):
    todo, widest = [(w, 0) for w in writes], self.token_buckets[-1]
    while todo:
      by_width: dict[int, list[tuple[Write, int]]] = {}
      for w, done in todo:
        width = next((b for b in self.token_buckets if b >= len(w.tokens) - done), widest)
        by_width.setdefault(width, []).append((w, done))
      for width, rows in by_width.items():
        for part in split_rows(rows, self.row_buckets):
          self._write_rows(part, width, policy)
      todo = [(w, done + widest) for w, done in todo if len(w.tokens) - done > widest]

  def _write_rows(self, part: list[tuple[Write, int]], width: int, policy: str):
    rows = next(b for b in self.row_buckets if b >= len(part))
    tokens, tables = np.zeros((rows, width), np.int32), np.zeros((rows, self.contexts.row), np.int32)
    starts, counts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for r, (w, done) in enumerate(part):
      some = w.tokens[done:done + width]
      starts[r], counts[r] = w.start + done, len(some)
      tokens[r, :len(some)] = some
      tables[r, :len(w.blocks)] = [b.id for b in w.blocks]
    self.cache = self._extend(self._params[policy], self.cache, tokens, starts, counts, tables)

  def decode(self, requests: dict[int, SlotRequest], floor: int = 0) -> dict[int, Draws]:
    """Draws up to `chunk` tokens for each requested seat, up to `reach` with speculation.

    Args:
      requests: By seat, no more than there are slots.
      floor: Return once no more than this many slots are still drawing; with several policies, of one of them that many
        less.
    Returns:
      By seat; a seat that met no stop and has budget left may simply go on in the next call.
    Raises:
      CacheFull: if there is no room for what may be drawn, before anything is.
      ValueError: if there are more requests than slots, or a seat holds another number of tokens.
    """
    if len(requests) > self.slots:
      raise ValueError(f'{len(requests)} seats are to draw in {self.slots} slots')
    for seat, r in requests.items():
      self._cut(seat, r.length)
      if self.contexts.contexts[seat].held != r.length:
        raise ValueError(f'seat {seat} holds {self.contexts.contexts[seat].held} tokens, not the {r.length} before the '
                         'pending one')
      self.contexts.tokens[seat, r.length] = r.pending
      self.contexts.reach(seat, r.length + min(r.budget, self.reach))
    if not self._by_table:
      self.contexts.unshare(list(requests))
    self._finish()
    self._copy_blocks(self.contexts.tidy())
    self._fit()
    draws, done = {}, len(requests) - floor
    for policy in dict.fromkeys(self.contexts.contexts[seat].policy for seat in requests):
      own = {s: r for s, r in requests.items() if self.contexts.contexts[s].policy == policy}
      draws.update(self._decode_own(own, max(0, len(own) - done), policy))
    return draws

  def _reading(self, seats: Sequence[int]) -> Reading:
    return (readings.by_table if self._by_table else readings.by_block)(self.contexts, seats)

  def _decode_own(self, requests: dict[int, SlotRequest], floor: int, policy: str) -> dict[int, Draws]:
    """`decode` of seats with one policy."""
    s, seats = self.slots, list(requests)
    pending, budgets, lengths = np.zeros(s, np.int32), np.zeros(s, np.int32), np.zeros(s, np.int32)
    seeds = np.zeros((s, 2), np.uint32)
    stops = np.full((s, MAX_STOPS), -1, np.int32)
    for slot, r in enumerate(requests.values()):
      pending[slot], lengths[slot], budgets[slot], seeds[slot] = r.pending, r.length, r.budget, r.seed
      stops[slot, :len(r.stops)] = r.stops
    cursors = {slot: r.cursor for slot, r in enumerate(requests.values()) if r.cursor is not None}
    if self.masks:
      self.masks.begin(cursors)
    elif cursors:
      raise ValueError('a turn has a grammar, and this sampler was not made with constrained=True')
    self.cache, out = self._decode(self._params[policy], self.cache, self._reading(seats), pending, lengths, budgets, seeds,
                                   stops, np.int32(floor), *self._history(seats))
    out = jax.device_get(out)
    self.steps += int(out.steps)
    draws = {}
    for slot, seat in enumerate(seats):
      n = out.counts[slot]
      self.contexts.drew(seat, out.tokens[slot, :n])
      draws[seat] = Draws(out.tokens[slot, :n], out.log_probs[slot, :n], out.entropies[slot, :n],
                          bool(out.stopped[slot]), self.masks.drawn(slot, n) if self.masks else ())
    return draws

  def _history(self, seats: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Returns what speculation guesses from: the tokens of the slots' contexts."""
    if not self.speculation:
      return ()
    tokens = np.zeros((self.slots, self.contexts.tokens.shape[1]), np.int32)
    tokens[:len(seats)] = self.contexts.tokens[seats]
    return (tokens,)

  def warm_up(self):
    """Compiles every shape; parameters must be set. Empties the cache."""
    self.reset()
    params = next(iter(self._params.values()))
    for size in self.contexts.sizes:
      self.contexts.size = size
      self._fit()
      for rows in self.row_buckets:
        for width in self.token_buckets:
          # No tokens: compiled and run, but nothing is written.
          nothing = np.zeros(rows, np.int32)
          self.cache = self._extend(params, self.cache, np.zeros((rows, width), np.int32), nothing, nothing,
                                    np.zeros((rows, self.contexts.row), np.int32))
      self._copy_blocks([Copy(0, size)])
      nowhere = np.full(PARK_ROWS, size, np.int32)
      self.cache = self._put(self.cache, nowhere, *jax.device_get(self._take(self.cache, np.zeros(PARK_ROWS, np.int32))))
      none = np.zeros(self.slots, np.int32)
      self.cache, _ = self._decode(params, self.cache, self._reading([]), none, none, none, np.zeros((self.slots, 2), np.uint32),
                                   np.full((self.slots, MAX_STOPS), -1, np.int32), np.int32(0), *self._history([]))
    self.contexts.size = self.contexts.sizes[0]
    self._fit()
    self.reset()
    jax.block_until_ready(jax.tree.map(jnp.asarray, self.cache))


def _filled(values: Sequence[int], length: int, rest: int) -> np.ndarray:
  """Returns values as int32, followed by `rest` up to `length`."""
  out = np.full(length, rest, np.int32)
  out[:len(values)] = values
  return out
