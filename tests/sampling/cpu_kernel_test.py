"""The kernel for CPUs against attention over contexts put together by hand, in sizes that fill vectors and that do not."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from agentrl.sampling import cpu_kernel

SLOTS, BLOCKS, ROW = 3, 14, 4


@functools.partial(jax.jit, static_argnames='window')
def attend(rows, keys, values, tables, positions, window):
  order = cpu_kernel.reading_order(tables, rows.shape, keys.shape)
  return cpu_kernel.attend(rows, keys, values, tables, order, positions, window)


class Case:
  """Contexts of one token, of about half of their blocks and of nearly all, strewn over a cache."""

  def __init__(self, heads=2, group=2, width=1, dh=32, block=32, seed=0):
    self.group, self.width, self.block = group, width, block
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    self.rows = draw(SLOTS, heads, width * group, dh) / np.float32(dh**0.5)
    self.keys, self.values = draw(BLOCKS, heads, dh, block), draw(BLOCKS, heads, block, dh)
    self.tables = rng.permutation(BLOCKS)[:SLOTS * ROW].reshape(SLOTS, ROW).astype(np.int32)
    lengths = np.array([0, ROW * block // 2, ROW * block - width])
    self.positions = (lengths[:, None] + np.arange(width)).astype(np.int32)

  def got(self, window=0, **changed):
    """Attention, [S, K, R, Dh], and the logarithms of the sums of exponentials that it was divided by."""
    arrays = {name: changed.get(name, getattr(self, name)) for name in ('rows', 'keys', 'values', 'tables', 'positions')}
    parts = attend(*arrays.values(), window=window)
    return np.asarray(parts.mean / parts.total[..., None]), np.asarray(parts.top + np.log(parts.total))

  def want(self, window=0):
    """The same in double precision, query by query."""
    out, sums = np.zeros(self.rows.shape), np.zeros(self.rows.shape[:3])
    for s, h, r in np.ndindex(sums.shape):
      at = self.positions[s, r // self.group]
      seen = slice(max(0, at - window + 1) if window else 0, at + 1)
      keys = np.concatenate(list(self.keys[self.tables[s], h].astype(np.float64)), axis=-1)[:, seen]
      values = np.concatenate(list(self.values[self.tables[s], h].astype(np.float64)), axis=0)[seen]
      weights = np.exp(self.rows[s, h, r] @ keys)
      sums[s, h, r] = np.log(weights.sum())
      out[s, h, r] = weights @ values / weights.sum()
    return out, sums


def near(got, want):
  np.testing.assert_allclose(got[0], want[0], atol=2e-6)
  np.testing.assert_allclose(got[1], want[1], atol=2e-6)


@pytest.mark.parametrize('sizes', [
    dict(), dict(heads=1, group=1, dh=2, block=8), dict(group=3, dh=6, block=12), dict(group=8, dh=128, block=16),
    dict(width=3), dict(width=4, group=3, dh=40, block=8)], ids=str)
@pytest.mark.parametrize('window', [0, 5, 33])
def test_it_is_the_softmax_over_what_each_query_sees(sizes, window):
  case = Case(**sizes)
  near(case.got(window), case.want(window))


def test_the_largest_scores_are_taken_off_before_the_exponential():
  case = Case()
  case.rows *= 150
  scores = case.rows[2, 0] @ np.concatenate(list(case.keys[case.tables[2], 0]), axis=-1)[:, :case.positions[2, 0] + 1]
  assert scores.max() > 200  # whose exponential is no float32
  got = case.got()[0]
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got[2, 0], _softmax(scores) @ np.concatenate(list(case.values[case.tables[2], 0]))[
      :case.positions[2, 0] + 1], atol=1e-4)


def _softmax(scores):
  weights = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def test_nothing_behind_a_query_and_nothing_behind_the_end_of_a_table_is_read():
  case = Case(width=2)
  want, behind = case.got()[0], {}
  for name in ('keys', 'values'):
    spoiled = getattr(case, name).copy()
    for s in range(SLOTS):
      block, place = divmod(case.positions[s, -1] + 1, case.block)
      for i in range(block, ROW):
        at = (case.tables[s, i], slice(None), *((slice(None),) if name == 'keys' else ()))
        spoiled[at][..., place if i == block else 0:, *([] if name == 'keys' else [slice(None)])] = np.nan
    behind[name] = spoiled
  np.testing.assert_array_equal(case.got(**behind)[0], want)
  # A table that ends early: its context then has the tokens of the blocks before.
  cut = case.tables.copy()
  cut[2, 2:] = BLOCKS + 5
  short = Case(width=2)
  short.positions[2] = 2 * case.block - 1
  near([x[2] for x in case.got(tables=cut)], [x[2] for x in short.want()])


def test_an_idle_slot_gets_numbers():
  case = Case()
  idle = case.tables.copy()
  idle[1] = BLOCKS
  got, want = case.got(tables=idle)[0], case.got()[0]
  np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])
  np.testing.assert_array_equal(got[1], 0)


def test_neither_what_is_read_together_nor_where_blocks_lie_changes_a_bit(monkeypatch):
  case = Case(width=3)
  want = case.got()
  monkeypatch.setattr(cpu_kernel, '_SCORES', 1)  # one slot at a time
  attend.clear_cache()
  jax.tree.map(np.testing.assert_array_equal, case.got(), want)
  monkeypatch.undo()
  attend.clear_cache()
  to = np.random.default_rng(1).permutation(BLOCKS)
  keys, values = np.empty_like(case.keys), np.empty_like(case.values)
  keys[to], values[to] = case.keys, case.values
  got = case.got(keys=keys, values=values, tables=to[case.tables].astype(np.int32))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('at_once', [3, 2, 1])
def test_blocks_are_read_as_they_lie_and_each_contexts_in_its_order(monkeypatch, at_once):
  rows, keys = (3, 1, 2, 4), (9, 1, 4, 8)
  # The second context shares a block with the first; the third has its blocks the wrong way round, and one less.
  tables = np.array([[0, 3, 6], [0, 4, 7], [8, 1, 9]], np.int32)
  monkeypatch.setattr(cpu_kernel, '_SCORES', at_once * 2 * 24)
  order = np.asarray(cpu_kernel.reading_order(tables, rows, keys))
  want = {3: [0, 3, 1, 4, 2, 5, 6, 7, 8], 2: [0, 3, 1, 4, 2, 5, 0, 1, 2], 1: [0, 1, 2] * 3}[at_once]
  np.testing.assert_array_equal(order, want)
