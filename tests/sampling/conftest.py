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

  def reading(self, lengths, shared=(), by_table=False):
    """What slots that hold `lengths` tokens read; the `shared` first blocks of slot 0 are everybody's."""
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
    tables = None
    if by_table:
      tables = self.tables.copy()
      tables[:, list(shared)] = self.tables[0, list(shared)]
    return caches.Reading(owners, fills, starts, ids, begins, np.int32(len(shared)), sharers, targets, tables)


@pytest.fixture(scope='session')
def pages():
  """Returns the class."""
  return Pages


@pytest.fixture(params=[False, True], ids=['by block', 'by table'])
def by_table(request):
  """Returns whether slots read by table."""
  return request.param
