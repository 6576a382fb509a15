"""A cache with the compiled functions that work on it, in a few fixed shapes."""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from agentrl.models.config import ModelConfig
from agentrl.models.params import Params
from agentrl.sampling import functions
from agentrl.sampling import speculation as speculations
from agentrl.sampling.constrain import Cursor, MaskTable
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.speculation import Speculation
from agentrl.sharding import mesh as meshes

MAX_STOPS = 8


class Extension(NamedTuple):
  """Tokens to write into a slot that holds `start` tokens already."""

  slot: int
  tokens: Sequence[int]
  start: int


class SlotRequest(NamedTuple):
  """What a slot is to decode.

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
  """What one slot drew: ids, log-probs and entropies (nats) of equal length, and whether a stop token ended it.

  `masks` are the packed sets of tokens that each was drawn from, None for all; () where nothing is constrained.
  """

  tokens: np.ndarray
  log_probs: np.ndarray
  entropies: np.ndarray
  stopped: bool
  masks: tuple[bytes | None, ...] = ()


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
  """Returns sizes with two significant bits from `smallest` on, the last at least `largest`.

  >>> buckets(64, 200)
  (64, 96, 128, 192, 256)
  """
  sizes, power = [], 1
  while not sizes or sizes[-1] < largest:
    sizes.extend(s for s in (power, power * 3 // 2) if s >= smallest and (not sizes or sizes[-1] < largest))
    power *= 2
  return tuple(dict.fromkeys(sizes))


class Sampler:
  """S slots of cache and the functions that fill and read them.

  Shapes are taken from fixed sets, so that nothing compiles after `warm_up`. Calls block until the device is done,
  except `extend` and `fork`, which return at once.
  """

  def __init__(self, config: ModelConfig, *, slots: int, context: int, chunk: int = 16,
               sampling: SamplingParams = SamplingParams(), capacities: Sequence[int] | None = None,
               row_buckets: Sequence[int] | None = None, token_buckets: Sequence[int] | None = None,
               mesh: Mesh | None = None, speculation: Speculation | None = None,
               constrained: bool = False):
    """Makes a sampler without parameters; see `set_params`.

    Args:
      config: Of the policy.
      slots: S.
      context: Longest context, tokens.
      chunk: Passes through the network in one call of `decode`, at most.
      sampling: The distribution drawn from.
      capacities: Sizes the cache may have; attention reads no more than the one in use.
      row_buckets: Numbers of rows an extension may have.
      token_buckets: Numbers of tokens of a row that one extension may write; longer ones take several.
      mesh: Of this process's devices, where parameters and cache are to live; None for where the parameters lie. It
        has all the devices that they lie on, or, in a run of one process, none of them.
      speculation: Guess tokens from the slot's own text, so that a pass may draw several; None for one a pass.
      constrained: Whether turns may follow a grammar: the host is then asked for masks at every step.
    """
    self.config = config
    self.slots = slots
    self.chunk = chunk
    self.reach = chunk * (1 + speculation.tokens if speculation else 1)  # most tokens a slot draws in one `decode`
    self.sampling = sampling
    self.speculation = speculation
    self.masks = None
    if constrained:
      self.masks = MaskTable(slots, config.vocab_size, 1 + speculation.tokens if speculation else 1)
    self.steps = 0  # passes through the network so far
    self.capacities = tuple(sorted(capacities or buckets(min(64, context), context)))
    if self.capacities[-1] < context:
      raise ValueError(f'the largest cache capacity {self.capacities[-1]} is below the context of {context} tokens')
    if speculation and speculation.tokens >= self.capacities[0]:
      raise ValueError(f'{speculation} proposes more tokens than the smallest cache capacity {self.capacities[0]} holds')
    # What is guessed from: the tokens that each slot holds, and the pending one.
    self._tokens = np.zeros((slots, self.capacities[-1] + 1 if speculation else 0), np.int32)
    self.row_buckets = tuple(sorted(row_buckets or {min(2, slots), min(8, slots), slots}))
    self.token_buckets = tuple(sorted(token_buckets or {min(16, context), min(64, context)}))
    self._params: Params | None = None
    self._mesh = mesh
    self._view = jax.jit(functools.partial(functions.sampler_view, config=config)) if mesh is None else None
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
    self._extend = jit(functools.partial(functions.extend, config=self.config), donate_argnums=1)
    self._fork = jit(functions.fork, donate_argnums=0)
    self._resize = jit(functions.resize, static_argnums=1)
    settings = dict(config=self.config, steps=self.chunk, sampling=self.sampling, masks=self.masks)
    decode = functools.partial(functions.decode, **settings)
    if self.speculation:
      decode = functools.partial(speculations.decode, **settings, speculation=self.speculation)
    self._decode = jax.jit(decode, donate_argnums=1, out_shardings=(where, None))

  def set_params(self, params: Params):
    """Takes new weights, learner's view. What the cache holds is of the old ones from here on.

    Given a mesh, every process of the run must call it: each is sent what its devices lack.
    """
    if self._view is None:
      self._view = self._make_view(params)
    self._params = self._view(params)
    if self._mesh is not None:
      self._params = meshes.own_part(self._params, self._mesh)
    of = self._params['embedding'].sharding
    if isinstance(of, NamedSharding):
      spec = meshes.spec_of(('slots', 'kv_heads'), (self.slots, self.config.num_kv_heads), of.mesh)
      where = NamedSharding(of.mesh, spec)
      if where != self._where:
        self._place(where)
        self.reset()

  def _make_view(self, params: Params) -> Callable[[Params], Params]:
    view = functools.partial(functions.sampler_view, config=self.config)
    everywhere = meshes.every_process(self._mesh)
    where = meshes.shardings(functions.view_axes(self.config), jax.eval_shape(view, params), everywhere)
    held = {d for x in jax.tree.leaves(params) if isinstance(x, jax.Array) for d in x.devices()}
    if held.isdisjoint(everywhere.devices.flat):
      # One program cannot span them: made where the parameters lie, then sent.
      made = jax.jit(view)
      return lambda params: jax.device_put(made(params), where)
    return jax.jit(view, out_shardings=where)

  def reset(self):
    """Empties the cache and makes it small again."""
    self.cache = functions.init_cache(self.config, self.slots, self.capacities[0])
    if self._where is not None:
      self.cache = jax.device_put(self.cache, self._where)
    # An idle slot's place in a decode writes rubbish; this is where it does no harm.
    self._held = np.zeros(self.slots, np.int32)

  def reserve(self, tokens: int):
    """Makes room for contexts of `tokens` tokens, keeping what the cache holds.

    Raises:
      ValueError: if the largest capacity is smaller.
    """
    if tokens <= self.cache.capacity:
      return
    fitting = [c for c in self.capacities if c >= tokens]
    if not fitting:
      raise ValueError(f'a context of {tokens} tokens does not fit the largest cache capacity {self.capacities[-1]}')
    # One step at a time: the sequence of shapes is then the one that `warm_up` compiled.
    for capacity in self.capacities[self.capacities.index(self.cache.capacity) + 1:]:
      self.cache = self._resize(self.cache, capacity)
      if capacity == fitting[0]:
        return

  def extend(self, extensions: Sequence[Extension]):
    """Writes tokens into slots; each slot at most once a call. The cache must have room."""
    todo = [e for e in extensions if len(e.tokens)]
    while todo:
      widest = self.token_buckets[-1]
      by_width: dict[int, list[Extension]] = {}
      rest = []
      for e in todo:
        width = next((b for b in self.token_buckets if b >= len(e.tokens)), widest)
        by_width.setdefault(width, []).append(Extension(e.slot, e.tokens[:width], e.start))
        if len(e.tokens) > width:
          rest.append(Extension(e.slot, e.tokens[width:], e.start + width))
      for width, rows in by_width.items():
        for part in _split_rows(rows, self.row_buckets):
          self._extend_rows(part, width)
      todo = rest

  def _extend_rows(self, part: list[Extension], width: int):
    rows = next(b for b in self.row_buckets if b >= len(part))
    slots = np.full(rows, self.slots, np.int32)
    tokens = np.zeros((rows, width), np.int32)
    starts, counts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for r, e in enumerate(part):
      slots[r], starts[r], counts[r] = e.slot, e.start, len(e.tokens)
      tokens[r, :len(e.tokens)] = e.tokens
      self._held[e.slot] = e.start + len(e.tokens)
      self._remember(e.slot, e.start, e.tokens)
    self.cache = self._extend(self._params, self.cache, slots, tokens, starts, counts)

  def _remember(self, slot: int, start: int, tokens: Sequence[int]):
    if self.speculation:
      self._tokens[slot, start:start + len(tokens)] = tokens

  def fork(self, pairs: Sequence[tuple[int, int]]):
    """Copies slots: (source, target) pairs; no target may be another pair's source or target."""
    for part in _split_rows(list(pairs), self.row_buckets):
      rows = next(b for b in self.row_buckets if b >= len(part))
      sources, targets = np.zeros(rows, np.int32), np.full(rows, self.slots, np.int32)
      for r, (source, target) in enumerate(part):
        sources[r], targets[r] = source, target
        self._held[target] = self._held[source]
        self._tokens[target] = self._tokens[source]
      self.cache = self._fork(self.cache, sources, targets)

  def decode(self, requests: dict[int, SlotRequest], floor: int = 0) -> dict[int, Draws]:
    """Draws up to `chunk` tokens for each requested slot, up to `reach` with speculation.

    Args:
      requests: By slot.
      floor: Return once no more than this many slots are still drawing.
    Returns:
      By slot; a slot that met no stop and has budget left may simply go on in the next call.
    """
    s = self.slots
    pending, budgets, lengths = np.zeros(s, np.int32), np.zeros(s, np.int32), self._held.copy()
    seeds = np.zeros((s, 2), np.uint32)
    stops = np.full((s, MAX_STOPS), -1, np.int32)
    for slot, r in requests.items():
      pending[slot], lengths[slot], budgets[slot], seeds[slot] = r.pending, r.length, r.budget, r.seed
      stops[slot, :len(r.stops)] = r.stops
    cursors = {slot: r.cursor for slot, r in requests.items() if r.cursor is not None}
    if self.masks:
      self.masks.begin(cursors)
    elif cursors:
      raise ValueError('a turn has a grammar, and this sampler was not made with constrained=True')
    history = (self._tokens[:, :self.cache.capacity],) if self.speculation else ()
    self.cache, out = self._decode(self._params, self.cache, pending, lengths, budgets, seeds, stops,
                                   np.int32(floor), *history)
    out = jax.device_get(out)
    self.steps += int(out.steps)
    draws = {}
    for slot in requests:
      n = out.counts[slot]
      self._held[slot] = lengths[slot] + n
      self._remember(slot, lengths[slot], [requests[slot].pending, *out.tokens[slot, :n]])
      draws[slot] = Draws(out.tokens[slot, :n], out.log_probs[slot, :n], out.entropies[slot, :n],
                          bool(out.stopped[slot]), self.masks.drawn(slot, n) if self.masks else ())
    return draws

  def warm_up(self):
    """Compiles every shape; parameters must be set. Empties the cache."""
    self.reset()
    while True:
      for rows in self.row_buckets:
        for width in self.token_buckets:
          # Slots out of range: compiled and run, but nothing is written.
          nothing = np.zeros(rows, np.int32)
          self.cache = self._extend(self._params, self.cache, nothing + self.slots,
                                    np.zeros((rows, width), np.int32), nothing, nothing)
        self.cache = self._fork(self.cache, nothing, nothing + self.slots)
      self.decode({0: SlotRequest(0, 0, 1, (0, 0), ())})
      if self.cache.capacity == self.capacities[-1]:
        break
      self.reserve(self.cache.capacity + 1)
    self.reset()
    jax.block_until_ready(jax.tree.map(jnp.asarray, self.cache))


def _split_rows(rows: list, sizes: Sequence[int]) -> list[list]:
  """Cuts rows into parts that fill one of `sizes` at least to half, where that is possible."""
  parts = []
  while rows:
    size = next((s for s in reversed(sizes) if len(rows) > s // 2), sizes[0])
    parts.append(rows[:size])
    rows = rows[size:]
  return parts
