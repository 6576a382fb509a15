"""Tests of the sampler's device functions against the learner's view and against each other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import ParamSpec, param_specs
from agentrl.sampling import functions
from agentrl.sampling.draw import SamplingParams

CONFIG = ModelConfig(vocab_size=50, num_layers=2, width=16, ff_width=24, num_heads=4,
                     num_kv_heads=2, head_dim=8, qkv_bias=True)
SLOTS, CAPACITY, WIDTH = 4, 24, 8
TOKENS = np.random.default_rng(0).integers(0, 50, (SLOTS, CAPACITY + 1)).astype(np.int32)


@functools.cache
def params():
  rng = np.random.default_rng(1)
  draw = lambda s: (float(s.scale is None) + (s.scale or 0.2) * rng.normal(size=s.shape)).astype(
      np.float32)
  return jax.tree.map(draw, param_specs(CONFIG), is_leaf=lambda x: isinstance(x, ParamSpec))


view = functools.cache(lambda: functions.sampler_view(params(), CONFIG))
jit_extend = jax.jit(functools.partial(functions.extend, config=CONFIG))
jit_logits = jax.jit(functools.partial(functions.next_logits, config=CONFIG))


def empty():
  return functions.init_cache(CONFIG, SLOTS, CAPACITY)


def noise(seed=0):
  """A cache full of rubbish."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype), empty())


def extend(cache, *writes):
  """Writes (slot, tokens, start) triples in one call of two rows of WIDTH."""
  slots = np.full(2, SLOTS, np.int32)
  tokens = np.full((2, WIDTH), 49, np.int32)
  starts, counts = np.zeros(2, np.int32), np.zeros(2, np.int32)
  for r, (slot, new, start) in enumerate(writes):
    slots[r], starts[r], counts[r] = slot, start, len(new)
    tokens[r, :len(new)] = new
  return jit_extend(view(), cache, slots, tokens, starts, counts)


def prefill(cache, slot, tokens, cuts=()):
  """Writes tokens from 0 on in parts that end at `cuts` and wherever WIDTH is full."""
  edges = sorted({0, *cuts, *range(0, len(tokens), WIDTH), len(tokens)})
  for a, b in zip(edges, edges[1:]):
    cache = extend(cache, (slot, tokens[a:b], a))
  return cache


def logits_after(cache, lengths):
  """Logits of what follows TOKENS[s, :lengths[s] + 1] in each slot."""
  pending = TOKENS[np.arange(SLOTS), lengths]
  return jax.device_get(jit_logits(view(), cache, pending, np.asarray(lengths, np.int32))[1])


@jax.jit
def learner_logits(p, tokens):
  """[S, C + 1, V]: place t predicts what follows tokens[:, :t + 1]."""
  positions = np.tile(np.arange(CAPACITY + 1), (SLOTS, 1))
  hidden = transformer.hidden_states(p, CONFIG, tokens, positions, np.ones_like(positions))
  return transformer.logits(p, hidden)


def snapshot(cache, slot, upto=None):
  """Keys and values of a slot's first positions."""
  keys = [np.asarray(x)[slot, :, :, :upto] for x in cache.keys]
  return keys + [np.asarray(x)[slot, :, :upto] for x in cache.values]


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


def test_prefill_then_decode_predicts_what_the_learner_does():
  lengths = [3, 8, 13, CAPACITY - 1]
  cache = noise()
  for slot, n in enumerate(lengths):
    cache = prefill(cache, slot, TOKENS[slot, :n])
  expected = learner_logits(params(), TOKENS)[np.arange(SLOTS), lengths]
  np.testing.assert_allclose(logits_after(cache, lengths), expected, atol=2e-5)


def test_one_go_and_several_and_token_by_token_fill_the_same_cache():
  n = 15
  whole = prefill(noise(), 1, TOKENS[1, :n])
  parts = prefill(noise(), 1, TOKENS[1, :n], cuts=(1, 2, 5, 6, 13))
  single = noise()
  for t in range(n):
    lengths = np.full(SLOTS, t, np.int32)
    single = jit_logits(view(), single, np.full(SLOTS, TOKENS[1, t]), lengths)[0]
  same(snapshot(whole, 1, n), snapshot(parts, 1, n), 1e-5)
  same(snapshot(whole, 1, n), snapshot(single, 1, n), 1e-5)


@pytest.mark.parametrize('start', range(CAPACITY - WIDTH - 1, CAPACITY))
def test_extension_near_the_end_of_the_capacity(start):
  cache = prefill(noise(), 2, TOKENS[2, :start])
  before = snapshot(cache, 2, start)
  new = TOKENS[2, start:CAPACITY][:WIDTH - 1]
  cache = extend(cache, (2, new, start))
  # What stood there stays, bit for bit, though the window written moves back over it.
  same(snapshot(cache, 2, start), before)
  end = start + len(new)
  same(snapshot(cache, 2, end), snapshot(prefill(noise(), 2, TOKENS[2, :end]), 2, end), 1e-5)


def test_an_extension_wider_than_the_cache():
  small = functions.init_cache(CONFIG, SLOTS, 5)
  cache = extend(small, (0, TOKENS[0, :3], 0))
  cache = extend(cache, (0, TOKENS[0, 3:5], 3))
  same(snapshot(cache, 0), snapshot(prefill(empty(), 0, TOKENS[0, :5]), 0, 5), 1e-5)


def test_extension_writes_its_tokens_alone():
  before = noise()
  after = extend(before, (2, TOKENS[2, :3], 10))  # The second row is padding.
  for slot in (0, 1, 3):
    same(snapshot(before, slot), snapshot(after, slot))
  for x, y in zip(before.keys + tuple(v.swapaxes(2, 3) for v in before.values),
                  after.keys + tuple(v.swapaxes(2, 3) for v in after.values)):
    changed = np.flatnonzero(np.any(np.asarray(x != y)[2], axis=(0, 1)))
    assert changed.tolist() == [10, 11, 12]


def test_fork_copies_whole_slots_and_skips_targets_out_of_range():
  before = noise()
  after = jax.jit(functions.fork)(before, np.asarray([1, 1, 3]), np.asarray([0, 2, SLOTS]))
  for slot, source in enumerate([1, 1, 1, 3]):
    same(snapshot(after, slot), snapshot(before, source))


def test_resize_keeps_what_fits():
  before = noise()
  grown = functions.resize(before, CAPACITY + 9)
  assert grown.capacity == CAPACITY + 9 and grown.slots == SLOTS
  back = functions.resize(grown, CAPACITY)
  shrunk = functions.resize(before, 5)
  for slot in range(SLOTS):
    same(snapshot(grown, slot, CAPACITY), snapshot(before, slot))
    same(snapshot(back, slot), snapshot(before, slot))
    same(snapshot(shrunk, slot), snapshot(before, slot, 5))
  assert not np.asarray(grown.values[0])[:, :, CAPACITY:].any()


# ---- decode --------------------------------------------------------------------------------------

STEPS = 6
jit_decode = {
    t: jax.jit(functools.partial(functions.decode, steps=STEPS, config=CONFIG,
                                 sampling=SamplingParams(temperature=t))) for t in (1.0, 0.0)}


def decode(cache, lengths, budgets, stops=(), floor=0, temperature=1.0):
  table = np.full((SLOTS, 2), -1, np.int32)
  for slot, ids in stops:
    table[slot, :len(ids)] = ids
  seeds = np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)
  cache, out = jit_decode[temperature](
      view(), cache, TOKENS[np.arange(SLOTS), lengths], np.asarray(lengths, np.int32),
      np.asarray(budgets, np.int32), seeds, table, np.int32(floor))
  return cache, jax.device_get(out)


def filled(lengths):
  cache = noise()
  for slot, n in enumerate(lengths):
    cache = prefill(cache, slot, TOKENS[slot, :n])
  return cache


LENGTHS = [4, 9, 2, 6]


def test_budgets_end_slots_one_by_one_and_idle_slots_keep_their_cache():
  before = filled(LENGTHS)
  after, out = decode(before, LENGTHS, [3, 0, 6, 1])
  assert out.counts.tolist() == [3, 0, 6, 1] and not out.stopped.any()
  # A slot that waits for its tool: all it holds, its pending token not yet among them.
  same(snapshot(after, 1, LENGTHS[1]), snapshot(before, 1, LENGTHS[1]))
  # Slots that draw too: nothing before the pending token changes.
  for slot in (0, 2, 3):
    same(snapshot(after, slot, LENGTHS[slot]), snapshot(before, slot, LENGTHS[slot]))


def test_greedy_decode_follows_the_learner():
  _, out = decode(filled(LENGTHS), LENGTHS, [STEPS] * SLOTS, temperature=0.0)
  contexts = TOKENS.copy()
  for slot, n in enumerate(LENGTHS):
    contexts[slot, n + 1:n + 1 + STEPS] = out.tokens[slot]
  best = learner_logits(params(), contexts).argmax(-1)
  for slot, n in enumerate(LENGTHS):
    np.testing.assert_array_equal(best[slot, n:n + STEPS], out.tokens[slot])


def test_a_turn_cut_into_calls_draws_the_same():
  whole_cache, whole = decode(filled(LENGTHS), LENGTHS, [5] * SLOTS)
  cache, first = decode(filled(LENGTHS), LENGTHS, [2] * SLOTS)
  pending = first.tokens[:, 1]
  seeds = np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)
  cache, rest = jit_decode[1.0](view(), cache, pending, np.asarray(LENGTHS, np.int32) + 2,
                                np.full(SLOTS, 3, np.int32), seeds,
                                np.full((SLOTS, 2), -1, np.int32), np.int32(0))
  np.testing.assert_array_equal(whole.tokens[:, :5],
                                np.c_[first.tokens[:, :2], np.asarray(rest.tokens)[:, :3]])
  for slot, n in enumerate(LENGTHS):
    same(snapshot(whole_cache, slot, n + 5), snapshot(cache, slot, n + 5), 1e-5)


def test_stop_tokens_end_a_slot_with_the_stop_drawn():
  cache = filled(LENGTHS)
  _, free = decode(cache, LENGTHS, [STEPS] * SLOTS)
  # The stop is what is drawn third, unless it is drawn before as well.
  stop = int(free.tokens[2, 2])
  at = int(np.flatnonzero(free.tokens[2] == stop)[0])
  _, out = decode(cache, LENGTHS, [STEPS] * SLOTS, stops=[(2, (49, stop))])
  others = [0, 1, 3]
  assert out.counts[2] == at + 1 and out.stopped.tolist() == [False, False, True, False]
  np.testing.assert_array_equal(out.tokens[2, :at + 1], free.tokens[2, :at + 1])
  np.testing.assert_array_equal(out.tokens[others], free.tokens[others])


def test_a_stop_of_minus_one_never_stops_and_floor_returns_early():
  cache = filled(LENGTHS)
  _, out = decode(cache, LENGTHS, [1, 2, 4, 6], floor=2)
  # After two steps no more than two slots are left.
  assert out.counts.tolist() == [1, 2, 2, 2] and not out.stopped.any()


def test_seeds_of_equal_slots_make_them_differ():
  lengths = [4] * SLOTS
  cache = prefill(noise(), 0, TOKENS[0, :4])
  cache = functions.fork(cache, np.asarray([0, 0, 0]), np.asarray([1, 2, 3]))
  pending = np.full(SLOTS, TOKENS[0, 4])
  stops, budgets = np.full((SLOTS, 2), -1, np.int32), np.full(SLOTS, STEPS, np.int32)
  run = lambda seeds: np.asarray(jit_decode[1.0](
      view(), cache, pending, np.asarray(lengths, np.int32), budgets, np.asarray(seeds, np.uint32),
      stops, np.int32(0))[1].tokens)
  tokens = run([[0, 1], [0, 2], [1, 1], [0, 1]])
  assert len({tuple(row) for row in tokens.tolist()}) == 3
  np.testing.assert_array_equal(tokens[0], tokens[3])
