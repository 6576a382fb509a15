"""Tests of the sampler's shapes: whatever it is asked for, it is done in those it compiled."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from agentrl.metrics.timing import CompileCounter
from agentrl.models.params import init_params, param_axes
from agentrl.sampling.contexts import CacheFull
from agentrl.sampling.sampler import Extension, Sampler, SlotRequest
from agentrl.sampling.sizes import buckets
from agentrl.sharding import mesh as meshes

TOKENS = np.random.default_rng(0).integers(2, 300, 80).astype(np.int32)


@pytest.mark.parametrize('smallest, largest', [(1, 1), (7, 7), (64, 1000), (5, 4), (48, 96)])
def test_buckets_reach_the_largest_and_waste_at_most_a_third(smallest, largest):
  sizes = buckets(smallest, largest)
  assert sizes[0] >= smallest and sizes[-1] >= largest
  assert list(sizes) == sorted(set(sizes))
  for a, b in zip(sizes, sizes[1:]):
    # One token more than the smaller bucket pads the larger by at most a third.
    assert (b - a - 1) / b <= 1 / 3 and a < largest


def request(length, budget=6, seed=(1, 2), stops=()):
  return SlotRequest(int(TOKENS[length]), length, budget, seed, stops)


def test_extensions_of_any_number_and_length_are_cut_into_the_compiled_shapes(tiny):
  """Whatever the parts, the draws that follow are the same: 40 tokens in a 16-token bucket."""
  sampler = tiny.sampler()
  drawn = []
  for parts in ([40], [16, 24], [1, 39], [17, 3, 20]):
    sampler.reset()
    at = 0
    for n in parts:
      sampler.extend([Extension(2, TOKENS[at:at + n], at)])
      at += n
    drawn.append(sampler.decode({2: request(40)})[2])
  for other in drawn[1:]:
    np.testing.assert_array_equal(other.tokens, drawn[0].tokens)
    np.testing.assert_allclose(other.log_probs, drawn[0].log_probs, atol=1e-5)
  assert len(drawn[0].tokens) == len(drawn[0].log_probs) == len(drawn[0].entropies) == 6


def test_extension_of_all_slots_at_once_equals_one_by_one(tiny):
  sampler = tiny.sampler()
  lengths = [20, 3, 33, 17]
  results = []
  for at_once in (True, False):
    sampler.reset()
    rows = [Extension(s, TOKENS[:n], 0) for s, n in enumerate(lengths)]
    for part in ([rows] if at_once else [[r] for r in rows]):
      sampler.extend([*part, Extension(0, [], 0)] if part[0].seat else part)
    results.append(sampler.decode({s: request(n) for s, n in enumerate(lengths)}))
  for slot in range(4):
    np.testing.assert_array_equal(results[0][slot].tokens, results[1][slot].tokens)


def test_forked_slots_continue_as_their_source(tiny):
  sampler = tiny.sampler()
  sampler.reset()
  sampler.extend([Extension(1, TOKENS[:20], 0)])
  sampler.fork([(1, 3), (1, 0)])
  draws = sampler.decode({s: request(20) for s in (0, 1, 3)})
  np.testing.assert_array_equal(draws[0].tokens, draws[1].tokens)
  np.testing.assert_array_equal(draws[3].tokens, draws[1].tokens)


def test_the_cache_grows_with_what_it_holds_and_becomes_small_again(tiny):
  sampler = tiny.sampler()  # Blocks of 16; 4 x 3 or 4 x 6 of them.
  sampler.reset()
  sampler.extend([Extension(0, TOKENS[:30], 0)])
  small = sampler.decode({0: request(30)})[0]
  assert sampler.cache.blocks == 12
  sampler.extend([Extension(s, TOKENS[s:60 + s], 0) for s in (1, 2, 3)])  # 3 x 4 blocks and what slot 0 has
  np.testing.assert_array_equal(sampler.decode({0: request(30)})[0].tokens, small.tokens)
  assert sampler.cache.blocks == 24 and sampler.contexts.used == 3 + 3 * 4
  third = sampler.decode({3: request(60)})[3]
  for slot in (1, 2):
    sampler.truncate(slot, 0)
  np.testing.assert_array_equal(sampler.decode({0: request(30)})[0].tokens, small.tokens)
  assert sampler.cache.blocks == 12
  np.testing.assert_array_equal(sampler.decode({3: request(60)})[3].tokens, third.tokens)


def test_no_more_than_the_largest_cache_is_taken_and_what_is_held_stays(tiny):
  sampler = tiny.sampler(4, capacities=(24,))  # 4 x 2 blocks: one context of 96 tokens and 32 more
  sampler.reset()
  sampler.extend([Extension(0, TOKENS[:70], 0), Extension(1, TOKENS[30:50], 0)])
  with pytest.raises(CacheFull, match='all 8 blocks of 16 tokens'):
    sampler.extend([Extension(2, TOKENS[20:40], 0)])
  first = sampler.decode({0: request(70)})[0]
  sampler.close(2)
  sampler.truncate(1, 0)
  sampler.extend([Extension(2, TOKENS[20:40], 0)])
  np.testing.assert_array_equal(sampler.decode({0: request(70)})[0].tokens, first.tokens)


@pytest.mark.parametrize('attention', ['auto', 'xla'])
def test_half_precision_draws_what_it_would_without_sharing(tiny, attention):
  """One query a head: XLA's CPU backend has no such product of bfloat16."""
  config = dataclasses.replace(tiny.config, num_kv_heads=4, compute_dtype='bfloat16', attention=attention)
  params, drawn = init_params(config, jax.random.key(0)), []
  for share in (True, False):
    sampler = Sampler(config, slots=4, context=96, chunk=4, capacities=(96,), row_buckets=(4,), token_buckets=(16,), share=share)
    sampler.set_params(params)
    for seat in range(3):
      sampler.extend([Extension(seat, TOKENS[sampler.open(seat, TOKENS[:70]):70], sampler.contexts.contexts[seat].held)])
    drawn.append(sampler.decode({seat: request(70, budget=4, seed=(1, seat)) for seat in range(3)}))
  for seat in range(3):
    np.testing.assert_allclose(drawn[0][seat].log_probs[0], drawn[1][seat].log_probs[0], atol=0.02)
    assert drawn[0][seat].tokens[0] == drawn[1][seat].tokens[0]


def test_of_more_seats_than_slots_any_may_draw(tiny):
  few, plain = tiny.sampler(2, seats=5, capacities=(96,), room=240), tiny.sampler(4)
  for sampler, seats in ((few, (4, 1, 3)), (plain, (0, 1, 2))):
    sampler.reset()
    sampler.extend([Extension(seat, TOKENS[i:20 + i], 0) for i, seat in enumerate(seats)])
  want = plain.decode({i: SlotRequest(9, 20, 6, (1, i), ()) for i in range(3)})
  got = {**few.decode({seat: SlotRequest(9, 20, 6, (1, i), ()) for i, seat in ((2, 3), (0, 4))}),
         **few.decode({1: SlotRequest(9, 20, 6, (1, 1), ())})}
  for i, seat in enumerate((4, 1, 3)):
    np.testing.assert_array_equal(got[seat].tokens, want[i].tokens)
    np.testing.assert_allclose(got[seat].log_probs, want[i].log_probs, atol=1e-5)
  with pytest.raises(ValueError, match='3 seats are to draw in 2 slots'):
    few.decode({seat: SlotRequest(9, 20, 6, (1, 0), ()) for seat in (1, 3, 4)})
  with pytest.raises(ValueError, match='3 seats are too few for 4 slots'):
    Sampler(tiny.config, slots=4, context=96, seats=3)


def test_idle_slots_survive_calls_at_the_edge_of_the_cache(tiny):
  """A waiting slot that is all but full, while another decodes to the last place."""
  sampler = tiny.sampler()
  sampler.reset()
  sampler.extend([Extension(0, TOKENS[:47], 0), Extension(1, TOKENS[:41], 0)])
  alone = sampler.decode({0: request(47, budget=1)})[0]
  sampler.extend([Extension(0, TOKENS[:47], 0)])
  sampler.decode({1: request(41, budget=7)})
  again = sampler.decode({0: request(47, budget=1)})[0]
  np.testing.assert_array_equal(alone.tokens, again.tokens)
  np.testing.assert_allclose(alone.log_probs, again.log_probs, atol=1e-6)


def test_new_weights_change_the_draws(tiny):
  sampler = tiny.sampler()
  sampler.reset()
  sampler.extend([Extension(0, TOKENS[:20], 0)])
  old = sampler.decode({0: request(20)})[0]
  try:
    sampler.set_params(jax.tree.map(lambda x: -x, tiny.params))
    sampler.reset()
    sampler.extend([Extension(0, TOKENS[:20], 0)])
    assert not np.array_equal(sampler.decode({0: request(20)})[0].tokens, old.tokens)
  finally:
    sampler.set_params(tiny.params)


def test_a_cache_that_one_context_could_not_fit_is_refused(tiny):
  with pytest.raises(ValueError, match='room for 96 tokens, 3 slots of 32, but one context may have 100'):
    Sampler(tiny.config, slots=3, context=100, capacities=(8, 32), block=32)


def test_a_parked_context_goes_on_as_if_it_had_stayed(tiny):
  sampler = tiny.sampler()
  sampler.reset()
  sampler.extend([Extension(0, TOKENS[:40], 0)])
  stayed = sampler.decode({0: request(40)})[0]
  sampler.truncate(0, 40)
  sampler.fork([(0, 1)])  # Two whole blocks are both slots'.
  parked = sampler.park(0)
  assert len(parked.kept) == 2 and parked.keys.shape[1] == 1 and parked.nbytes == sampler.block_bytes
  sampler.extend([Extension(2, TOKENS[10:60], 0)])
  sampler.close(1)
  assert sampler.unpark(3, parked) == 40
  np.testing.assert_array_equal(sampler.decode({3: request(40)})[3].tokens, stayed.tokens)
  old = sampler.park(3)
  sampler.reset()
  assert sampler.unpark(3, old) == 0


def test_prompts_that_begin_alike_are_computed_once_even_when_they_come_together(tiny):
  """40 common tokens, then 10 of each slot's own: 40 + 3 x 10 are computed, in steps that wait for each other."""
  sampler = tiny.sampler()
  drawn = {}
  for shared in (True, False):
    sampler.reset()
    computed = 0
    for slot in range(3):
      prompt = np.r_[TOKENS[:40], TOKENS[50 + 10 * slot:60 + 10 * slot]]
      held = sampler.open(slot, prompt) if shared else 0
      sampler.extend([Extension(slot, prompt[held:], held)])
      computed += len(prompt) - held
    assert computed == (40 + 30 if shared else 150)
    drawn[shared] = sampler.decode({s: SlotRequest(5, 50, 6, (1, s), ()) for s in range(3)})
  for slot in range(3):
    np.testing.assert_array_equal(drawn[True][slot].tokens, drawn[False][slot].tokens)
    np.testing.assert_allclose(drawn[True][slot].log_probs, drawn[False][slot].log_probs, atol=1e-5)


def test_policies_share_the_cache_and_nothing_in_it(tiny):
  sampler = tiny.sampler()
  sampler.set_params(jax.tree.map(lambda x: -x, tiny.params), 'other')
  sampler.reset()
  alone = {}
  for slot, policy in ((0, ''), (1, 'other')):
    assert sampler.open(slot, TOKENS[:20], policy) == 0
    sampler.extend([Extension(slot, TOKENS[:20], 0)])
    alone[slot] = sampler.decode({slot: request(20)})[slot]
  assert alone[0].tokens.tolist() != alone[1].tokens.tolist()
  together = sampler.decode({0: request(20), 1: request(20)})
  for slot in (0, 1):
    np.testing.assert_array_equal(together[slot].tokens, alone[slot].tokens)
  # Back once one is done: each of the two calls would be, before its first pass, were one left out of both.
  assert min(len(d.tokens) for d in sampler.decode({0: request(20), 1: request(20)}, floor=1).values()) > 0
  # A slot opened anew finds its own policy's beginning.
  assert sampler.open(2, TOKENS[:20], 'other') == 20


@pytest.mark.parametrize('shape, learner', [
    (dict(data=2, tensor=2), None), ({}, None), (dict(data=2, tensor=2), dict(fsdp=4)),
], ids=str)
def test_a_sharded_policy_draws_the_same_and_compiles_nothing_after_warm_up(tiny, shape, learner):
  plain = tiny.sampler()
  devices = jax.devices()[:math.prod(shape.values())]
  mesh = meshes.make_mesh(shape, devices)
  # The policy is trained on a mesh of its own, if `learner` gives one.
  theirs = meshes.make_mesh(learner, devices) if learner else mesh
  params = jax.device_put(tiny.params, meshes.shardings(param_axes(tiny.config), tiny.params, theirs))
  sharded = Sampler(tiny.config, slots=4, context=96, chunk=8, capacities=(48, 96),
                    row_buckets=(4,), token_buckets=(16,), block=16, mesh=mesh if learner else None)
  sharded.set_params(params)
  sharded.warm_up()
  [blocks, heads, *_] = sharded.cache.keys[0].addressable_shards[0].data.shape
  assert blocks == 12 // math.prod(shape.get(a, 1) for a in ('data', 'fsdp')) and heads == 2 // shape.get('tensor', 1)
  counter = CompileCounter()
  try:
    counter.mark()
    draws = []
    for sampler in (sharded, plain):
      sampler.reset()
      sampler.extend([Extension(0, TOKENS[:20], 0)])
      sampler.fork([(0, 1)])
      draws.append(sampler.decode({0: request(20), 1: request(20, seed=(5, 6))}))
      if sampler is sharded:
        sampler.set_params(params)
        assert counter.count == 0, counter.names
  finally:
    counter.close()
  for slot in (0, 1):
    np.testing.assert_array_equal(draws[0][slot].tokens, draws[1][slot].tokens)
    np.testing.assert_allclose(draws[0][slot].log_probs, draws[1][slot].log_probs, atol=1e-4)
