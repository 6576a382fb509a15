"""Contexts laid out in blocks by hand, for tests of the functions that read and write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.sampling import cache as caches


class Pages:
  """A cache whose slots have `row` blocks each, strewn over it, among others that nobody has.

  Attributes:
    tables: [S, B] int32.
  """

  def __init__(self, config, slots, row, block, reach):
    self.config, self.slots, self.row, self.block, self.reach = config, slots, row, block, reach
    self.blocks = slots * row + 3
    order = np.random.default_rng(7).permutation(self.blocks)
    self.tables = order[:slots * row].reshape(slots, row).astype(np.int32)

  @property
  def capacity(self):
    """Tokens a slot has room for."""
    return self.row * self.block

  def noise(self, seed=0):
    """A cache full of rubbish."""
    rng = np.random.default_rng(seed)
    empty = caches.init(self.config, self.blocks, self.block)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype), empty)

  def held(self, cache, slot, upto=None, start=0):
    """Keys [K, Dh, n] and values [K, n, Dh] of a slot's positions, of every layer."""
    ids = self.tables[slot]
    keys = [np.concatenate(list(np.asarray(x)[ids]), axis=-1)[:, :, start:upto] for x in cache.keys]
    return keys + [np.concatenate(list(np.asarray(x)[ids]), axis=-2)[:, start:upto] for x in cache.values]

  def reading(self, lengths, shared=(), row=0):
    """What slots that hold `lengths` tokens read; the `shared` first blocks of slot 0 are everybody's.

    In place, or gathered into rows of `row` blocks, strewn over the buffer, as many as a slot needs; if that is one, then
    into that of its number.
    """
    s, n, p = self.slots, self.blocks, self.block
    owners, fills, starts = np.full(n, s, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
    spread = (self.reach + p - 2) // p + 1
    targets = np.full((s, spread), n, np.int32)
    for slot, length in enumerate(lengths):
      for i, block in enumerate(self.tables[slot][:-(-length // p)]):
        if i not in shared:
          owners[block], fills[block], starts[block] = slot, min(p, length - i * p), i * p
      new = self.tables[slot][length // p:][:spread]
      targets[slot, :len(new)] = new
    ids, begins, sharers = np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros((s, n), bool)
    ids[:len(shared)], begins[:len(shared)] = self.tables[0][list(shared)], [i * p for i in shared]
    sharers[:, :len(shared)] = True
    rows = None
    if row:
      own = self.tables[:, len(shared):]
      count = -(-own.shape[1] // row)
      blocks = np.pad(own, ((0, 0), (0, count * row - own.shape[1]))).reshape(s, count, row)
      starts_of = (len(shared) + np.arange(count) * row) * p
      if count == 1:
        rows = caches.Rows(blocks[:, 0], None, np.tile(starts_of, s), np.arange(s, dtype=np.int32))
      else:
        order = np.random.default_rng(8).permutation(s)  # and a row in front that is nobody's
        rows = caches.Rows(
            np.pad(blocks[order].reshape(-1, row), ((1, 0), (0, 0))),
            np.pad(np.repeat(order, count), (1, 0), constant_values=s).astype(np.int32),
            np.pad(np.tile(starts_of, s), (1, 0)).astype(np.int32), (1 + np.argsort(order) * count).astype(np.int32))
    return caches.Reading(owners, fills, starts, ids, begins, np.int32(len(shared)), sharers, targets, rows)



@pytest.fixture(scope='session')
def pages():
  """Returns the class."""
  return Pages


@pytest.fixture(params=[0, 2, 6], ids=['in place', 'gathered', 'gathered into one row each'])
def row(request):
  """Returns of how many blocks the rows are that what slots read alone is gathered into; 0 for in place."""
  return request.param
