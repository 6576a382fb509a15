"""Tests of the sampler's device functions against the learner's view and against each other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs
from agentrl.sampling import cache as caches
from agentrl.sampling import cpu_kernel, functions
from agentrl.sampling.draw import SamplingParams

CONFIG = ModelConfig(vocab_size=50, num_layers=2, width=16, ff_width=24, num_heads=4,
                     num_kv_heads=2, head_dim=8, qkv_bias=True)
# A layer that sees the last five tokens only, with sinks, beside one that sees all.
LOCAL = dataclasses.replace(CONFIG, windows=(0, 5), attention_sinks=True)
SLOTS, CAPACITY, WIDTH, BLOCK, STEPS = 4, 24, 8, 4, 6
TOKENS = np.random.default_rng(0).integers(0, 50, (SLOTS, CAPACITY + 1)).astype(np.int32)


@functools.cache
def params(config=CONFIG):
  rng = np.random.default_rng(1)
  draw = lambda s: (float(s.scale is None) + (s.scale or 0.2) * rng.normal(size=s.shape)).astype(
      np.float32)
  return jax.tree.map(draw, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


view = functools.cache(lambda config=CONFIG: functions.sampler_view(params(config), config))
jit_extend = jax.jit(functions.extend, static_argnames=('config', 'kernels'))


@functools.partial(jax.jit, static_argnames=('config', 'kernels'))
def jit_logits(p, cache, fresh, reading, pending, lengths, first, config, kernels):
  plans = kernels and kernels.plan(reading, first, config.kinds, config.num_heads // config.num_kv_heads, cache)
  return functions.next_logits(p, cache, fresh, reading, pending, lengths, first, config, kernels, plans)



class Lab:
  """Contexts in blocks of 4, and the functions under test on them."""

  def __init__(self, pages, by_table, config=CONFIG):
    self.config, self.by_table = config, by_table
    self.kernels = cpu_kernel.CpuKernels() if by_table else None
    self.pages = pages(config, SLOTS, CAPACITY // BLOCK, BLOCK, STEPS)
    self.noise, self.held = self.pages.noise, self.pages.held

  def extend(self, cache, *writes):
    """Writes (slot, tokens, start) triples in one call of two rows of WIDTH."""
    tokens = np.full((2, WIDTH), 49, np.int32)
    starts, counts = np.zeros(2, np.int32), np.zeros(2, np.int32)
    tables = np.zeros((2, self.pages.row), np.int32)
    for r, (slot, new, start) in enumerate(writes):
      starts[r], counts[r], tables[r] = start, len(new), self.pages.tables[slot]
      tokens[r, :len(new)] = new
    return jit_extend(view(self.config), cache, tokens, starts, counts, tables, config=self.config, kernels=self.kernels)

  def prefill(self, cache, slot, tokens, cuts=()):
    """Writes tokens from 0 on in parts that end at `cuts` and wherever WIDTH is full."""
    edges = sorted({0, *cuts, *range(0, len(tokens), WIDTH), len(tokens)})
    for a, b in zip(edges, edges[1:]):
      cache = self.extend(cache, (slot, tokens[a:b], a))
    return cache

  def filled(self, lengths):
    cache = self.noise()
    for slot, n in enumerate(lengths):
      cache = self.prefill(cache, slot, TOKENS[slot, :n])
    return cache

  def logits_after(self, cache, lengths, first=None, shared=(), tokens=TOKENS):
    """Logits of what follows tokens[s, :lengths[s] + 1] in each slot, those before `first` from blocks."""
    lengths = np.asarray(lengths, np.int32)
    first = lengths if first is None else np.asarray(first, np.int32)
    reading = self.pages.reading(first, shared, self.by_table)
    fresh = caches.init_fresh(cache, reading, STEPS)
    for at in range(max(lengths - first) + 1):
      now = np.minimum(first + at, lengths)
      pending = tokens[np.arange(SLOTS), now][:, None]
      fresh, logits = jit_logits(view(self.config), cache, fresh, reading, pending, now, first, self.config, self.kernels)
    return np.asarray(logits)[:, 0]


@pytest.fixture(name='lab')
def make_lab(pages, by_table):
  return Lab(pages, by_table)


@functools.partial(jax.jit, static_argnums=2)
def learner_logits(p, tokens, config=CONFIG):
  """[S, C + 1, V]: place t predicts what follows tokens[:, :t + 1]."""
  positions = np.tile(np.arange(CAPACITY + 1), (SLOTS, 1))
  hidden = transformer.hidden_states(p, config, tokens, positions, np.ones_like(positions))
  return transformer.logits(p, hidden)


def same(a, b, tolerance=0.0):
  for x, y in zip(a, b):
    np.testing.assert_allclose(x, y, atol=tolerance, rtol=0)


def test_the_view_holds_the_same_weights_without_value_head():
  config = dataclasses.replace(CONFIG, compute_dtype='bfloat16')
  got = jax.eval_shape(lambda p: functions.sampler_view({**p, 'value': {}}, config), params())
  assert set(got) == {'embedding', 'final_norm', 'layers'} and len(got['layers']) == 2
  assert {x.dtype.name for x in jax.tree.leaves(got)} == {'bfloat16'}
  for i, layer in enumerate(view()['layers']):
    for name, leaf in layer.items():
      np.testing.assert_array_equal(leaf, params()['layers'][name][i])


@pytest.mark.parametrize('config', [CONFIG, LOCAL], ids=['plain', 'window and sinks'])
def test_prefill_then_decode_predicts_what_the_learner_does(pages, config, by_table):
  lab, lengths = Lab(pages, by_table, config), [3, 8, 13, CAPACITY - 1]
  cache = lab.filled(lengths)
  expected = learner_logits(params(config), TOKENS, config)[np.arange(SLOTS), lengths]
  np.testing.assert_allclose(lab.logits_after(cache, lengths), expected, atol=2e-5)


@pytest.mark.parametrize('config', [CONFIG, LOCAL], ids=['plain', 'window and sinks'])
def test_what_is_new_and_what_is_in_blocks_make_one_context(pages, config, by_table):
  lab, first, lengths = Lab(pages, by_table, config), [3, 8, 11, 17], [8, 13, 16, 22]
  expected = learner_logits(params(config), TOKENS, config)[np.arange(SLOTS), lengths]
  np.testing.assert_allclose(lab.logits_after(lab.filled(first), lengths, first), expected, atol=2e-5)


@pytest.mark.parametrize('config', [CONFIG, LOCAL], ids=['plain', 'window and sinks'])
def test_blocks_that_all_slots_read_are_read_as_if_they_were_each_slots_own(pages, config, by_table):
  lab, lengths = Lab(pages, by_table, config), [11, 8, 13, 20]
  tokens = TOKENS.copy()
  tokens[:, :8] = tokens[0, :8]
  cache = lab.noise()
  for slot, n in enumerate(lengths):
    cache = lab.prefill(cache, slot, tokens[slot, :n])
  # The first two blocks of the others are rubbish: nobody may look there.
  rubbish = lab.pages.tables[1:, :2].reshape(-1)
  cache = jax.tree.map(lambda x: x.at[rubbish].set(9.0), cache)
  expected = learner_logits(params(config), tokens, config)[np.arange(SLOTS), lengths]
  got = lab.logits_after(cache, lengths, shared=(0, 1), tokens=tokens)
  np.testing.assert_allclose(got, expected, atol=2e-5)


def test_one_go_and_several_fill_the_same_cache(lab):
  n = 15
  whole = lab.prefill(lab.noise(), 1, TOKENS[1, :n])
  parts = lab.prefill(lab.noise(), 1, TOKENS[1, :n], cuts=(1, 2, 5, 6, 13))
  same(lab.held(whole, 1, n), lab.held(parts, 1, n), 1e-5)


def test_extension_writes_its_tokens_alone(lab):
  before = lab.noise()
  after = lab.extend(before, (2, TOKENS[2, :3], 10))  # The second row is padding.
  changed = [np.asarray(x != y) for x, y in zip(before.keys, after.keys)]
  changed += [np.asarray(x != y).swapaxes(2, 3) for x, y in zip(before.values, after.values)]
  # Positions 10 and 11 are the last places of the third block, 12 is the first of the fourth.
  third, fourth = lab.pages.tables[2, 2:4]
  expected = np.zeros((lab.pages.blocks, BLOCK), bool)
  expected[third, 2:], expected[fourth, 0] = True, True
  for c in changed:
    np.testing.assert_array_equal(c.any(axis=(1, 2)), expected)


def test_copies_take_and_put_move_whole_blocks_and_skip_targets_out_of_range(lab):
  before, n = lab.noise(), lab.pages.blocks
  after = jax.jit(caches.copy)(before, np.asarray([5, 5, 8]), np.asarray([0, 2, n]))
  moved = jax.jit(caches.put)(before, np.asarray([0, n, 2]), *caches.take(before, np.asarray([5, 8, 5])))
  for x, y, z in zip(jax.tree.leaves(before), jax.tree.leaves(after), jax.tree.leaves(moved)):
    expected = np.asarray(x).copy()
    expected[[0, 2]] = expected[5]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(z, expected)


def test_resize_keeps_what_fits(lab):
  before = lab.noise()
  n = before.blocks
  grown, shrunk = caches.resize(before, n + 9), caches.resize(before, 5)
  assert (grown.blocks, shrunk.blocks, grown.block) == (n + 9, 5, BLOCK)
  for x, y, z in zip(jax.tree.leaves(before), jax.tree.leaves(grown), jax.tree.leaves(shrunk)):
    np.testing.assert_array_equal(x, y[:n])
    np.testing.assert_array_equal(x[:5], z)
    assert not np.asarray(y[n:]).any()


# ---- decode --------------------------------------------------------------------------------------

jit_decode = {
    t: jax.jit(functools.partial(functions.decode, steps=STEPS, config=CONFIG, sampling=SamplingParams(temperature=t)),
               static_argnames='kernels') for t in (1.0, 0.0)}
SEEDS = np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)


def decode(lab, cache, lengths, budgets, stops=(), floor=0, temperature=1.0, pending=None, seeds=SEEDS):
  table = np.full((SLOTS, 2), -1, np.int32)
  for slot, ids in stops:
    table[slot, :len(ids)] = ids
  pending = TOKENS[np.arange(SLOTS), lengths] if pending is None else pending
  cache, out = jit_decode[temperature](
      view(), cache, lab.pages.reading(lengths, (), lab.by_table), pending, np.asarray(lengths, np.int32),
      np.asarray(budgets, np.int32), np.asarray(seeds, np.uint32), table, np.int32(floor), kernels=lab.kernels)
  return cache, jax.device_get(out)


LENGTHS = [4, 9, 2, 6]


def test_budgets_end_slots_one_by_one_and_only_what_was_drawn_is_written(lab):
  before = lab.filled(LENGTHS)
  after, out = decode(lab, before, LENGTHS, [3, 0, 6, 1])
  assert out.counts.tolist() == [3, 0, 6, 1] and not out.stopped.any()
  for slot, (length, count) in enumerate(zip(LENGTHS, out.counts)):
    same(lab.held(after, slot, length), lab.held(before, slot, length))
    same(lab.held(after, slot, start=length + count), lab.held(before, slot, start=length + count))


def test_greedy_decode_follows_the_learner(lab):
  after, out = decode(lab, lab.filled(LENGTHS), LENGTHS, [STEPS] * SLOTS, temperature=0.0)
  contexts = TOKENS.copy()
  for slot, n in enumerate(LENGTHS):
    contexts[slot, n + 1:n + 1 + STEPS] = out.tokens[slot]
  best = learner_logits(params(), contexts).argmax(-1)
  expected = lab.noise()
  for slot, n in enumerate(LENGTHS):
    np.testing.assert_array_equal(best[slot, n:n + STEPS], out.tokens[slot])
    # All but the last token drawn are in the cache, as a prefill would have left them.
    expected = lab.prefill(expected, slot, contexts[slot, :n + STEPS])
    same(lab.held(after, slot, n + STEPS), lab.held(expected, slot, n + STEPS), 1e-5)


def test_a_turn_cut_into_calls_draws_the_same(lab):
  whole_cache, whole = decode(lab, lab.filled(LENGTHS), LENGTHS, [5] * SLOTS)
  cache, first = decode(lab, lab.filled(LENGTHS), LENGTHS, [2] * SLOTS)
  later = np.asarray(LENGTHS) + 2
  cache, rest = decode(lab, cache, later, [3] * SLOTS, pending=first.tokens[:, 1])
  np.testing.assert_array_equal(whole.tokens[:, :5], np.c_[first.tokens[:, :2], rest.tokens[:, :3]])
  for slot, n in enumerate(LENGTHS):
    same(lab.held(whole_cache, slot, n + 5), lab.held(cache, slot, n + 5), 1e-5)


def test_stop_tokens_end_a_slot_with_the_stop_drawn(lab):
  cache = lab.filled(LENGTHS)
  _, free = decode(lab, cache, LENGTHS, [STEPS] * SLOTS)
  # The stop is what is drawn third, unless it is drawn before as well.
  stop = int(free.tokens[2, 2])
  at = int(np.flatnonzero(free.tokens[2] == stop)[0])
  _, out = decode(lab, cache, LENGTHS, [STEPS] * SLOTS, stops=[(2, (49, stop))])
  others = [0, 1, 3]
  assert out.counts[2] == at + 1 and out.stopped.tolist() == [False, False, True, False]
  np.testing.assert_array_equal(out.tokens[2, :at + 1], free.tokens[2, :at + 1])
  np.testing.assert_array_equal(out.tokens[others], free.tokens[others])


def test_a_stop_of_minus_one_never_stops_and_floor_returns_early(lab):
  _, out = decode(lab, lab.filled(LENGTHS), LENGTHS, [1, 2, 4, 6], floor=2)
  # After two steps no more than two slots are left.
  assert out.counts.tolist() == [1, 2, 2, 2] and not out.stopped.any()


def test_seeds_of_equal_slots_make_them_differ(lab):
  cache = lab.noise()
  for slot in range(SLOTS):
    cache = lab.prefill(cache, slot, TOKENS[0, :4])
  pending = np.full(SLOTS, TOKENS[0, 4])
  _, out = decode(lab, cache, [4] * SLOTS, [STEPS] * SLOTS, pending=pending, seeds=[[0, 1], [0, 2], [1, 1], [0, 1]])
  assert len({tuple(row) for row in out.tokens.tolist()}) == 3
  np.testing.assert_array_equal(out.tokens[0], out.tokens[3])


@pytest.mark.parametrize('axis', [3, 2])
def test_tokens_written_by_whole_blocks_are_those_written_one_by_one(axis):
  """TPUs write whole blocks; starts within a block, rows that end in one, that fill several, and that write nothing."""
  rng = np.random.default_rng(0)
  shape = (9, 2, 8, BLOCK) if axis == 3 else (9, 2, BLOCK, 8)
  buffer, new = rng.normal(size=shape).astype(np.float32), rng.normal(size=(4, 6, 2, 8)).astype(np.float32)
  tables = np.array([[1, 2, 3], [4, 5, 0], [6, 7, 8], [0, 0, 0]], np.int32)
  starts, counts = np.array([3, 0, 5, 0], np.int32), np.array([6, 4, 3, 0], np.int32)
  want = buffer.copy()
  for r in range(4):
    for t in range(counts[r]):
      block, place = divmod(starts[r] + t, BLOCK)
      at = (tables[r, block], slice(None), slice(None), place) if axis == 3 else (tables[r, block], slice(None), place)
      want[at] = new[r, t]
  for write in (caches.write_tokens, caches.write_blocks, caches.write_rows):
    np.testing.assert_array_equal(jax.jit(functools.partial(write, axis=axis))(buffer, new, tables, starts, counts), want)


def test_reading_by_table_without_kernels_says_what_is_missing(pages):
  lab = Lab(pages, True)
  lab.kernels = None
  with pytest.raises(ValueError, match='by table needs kernels'):
    decode(lab, lab.noise(), LENGTHS, [1] * SLOTS)
