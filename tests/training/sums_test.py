"""Tests of updates by losses of sums: how rows are packed and cut changes nothing.

Expected values are the gradient of the same loss written directly on unpacked sequences, one forward pass each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import preference
from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params, param_axes
from agentrl.sharding import mesh as meshes
from agentrl.training import packing
from agentrl.training.optimizer import make_optimizer
from agentrl.training.preference import PairBatch, make_pair_update, plan_pairs
from agentrl.training.state import LearnerState

pytestmark = pytest.mark.usefixtures('quick_compile')

VOCAB, LENGTH, PAIRS = 40, 24, 3
CONFIG = ModelConfig(VOCAB, num_layers=2, width=16, ff_width=24, num_heads=2, num_kv_heads=2, head_dim=8,
                     unroll_layers=False, tied_embeddings=False)
RATE = 1e-2


@functools.cache
def _params():
  return jax.device_get(jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0)))


def _sequences():
  """Prompt, turn, observation, turn; the two of a pair share their first six tokens."""
  rng, made = np.random.default_rng(0), []
  for p in range(PAIRS):
    shared = rng.integers(1, VOCAB, 6)
    for k in range(2):
      mask = np.concatenate([np.zeros(3), np.ones(3), np.zeros(1 + k), np.ones(2 + p)]).astype(bool)
      tokens = np.concatenate([shared, rng.integers(1, VOCAB, len(mask) - 6)]).astype(np.int32)
      made.append(packing.TokenSequence(tokens, mask, np.full(len(mask), -3.0, np.float32), np.zeros(len(mask), np.int32),
                                        2 * p + k))
  return made


def _batch(layout, micro_batches=1):
  n = 2 * PAIRS
  outcome = packing.Outcome(np.zeros(n, np.int32), np.zeros(n, np.float32), np.ones(n, np.float32), np.ones(n, bool))
  plan = {'packed': None, 'rows': packing.Plan([[i] for i in range(n)]),
          'reversed': packing.Plan([[i] for i in reversed(range(n))]),
          'pairs': plan_pairs(_sequences(), 8 // micro_batches, LENGTH),
          'shared': plan_pairs(_sequences(), 8 // micro_batches, LENGTH, share=True)}[layout]
  batch, used = packing.pack(_sequences(), outcome, rows=8, row_length=LENGTH, plan=plan, micro_batches=micro_batches)
  return batch._replace(reference_log_probs=np.where(batch.loss_mask, np.float32(-3.2), 0)), used


PAIR_BATCH = PairBatch(np.float32([1, 2, 1]), np.int32([0, 1, 0]))


@functools.cache
def _optimizer():
  return make_optimizer('adamw', RATE, max_grad_norm=0.0, b1=0.0, b2=0.0)


@functools.cache
def _updated(layout, micro_batches, loss='dpo', heads=False, change=None, together=False):
  """Returns parameters, heads and metrics after one update."""
  params = jax.tree.map(jnp.array, _params())
  side = {'heads': jnp.stack([params['head'], 1.5 * params['head']])} if heads else {}
  trained = {'heads': side['heads'], 'policy': {k: v for k, v in params.items() if k != 'head'}} if heads else params
  state = LearnerState(params, _optimizer().init(trained), np.int32(0), side=side)
  mix = np.float32([0.25, 0.75]) if heads else None
  update = make_pair_update(CONFIG, _optimizer(), preference.make(loss), micro_batches=micro_batches, mix=mix,
                            together=together)
  batch, used = _batch(layout, micro_batches)
  if change == 'unsampled':
    # Only what the loss mask keeps is scored: another target where it does not is no difference. The last token
    # is context of nothing.
    batch = batch._replace(reference_log_probs=np.where(batch.loss_mask, batch.reference_log_probs, 7.0).astype(np.float32))
  state, metrics = update(state, batch, PAIR_BATCH, np.int32(used))
  return jax.device_get((state.params, state.side, metrics))


def _plain_loss(params, loss='dpo', heads=None):
  """The loss on single, unpacked sequences."""
  sums = []
  for s in _sequences():
    own = params if heads is None else {**params, 'head': heads[PAIR_BATCH.labels[s.trajectory // 2]]}
    n = len(s.tokens)
    got = transformer.evaluate(own, CONFIG, s.tokens[None], np.arange(n, dtype=np.int32)[None], np.ones((1, n), np.int32))
    sums.append(jnp.sum(jnp.where(s.loss_mask, got.log_probs[0], 0.0)))
  counts = np.array([s.loss_mask.sum() for s in _sequences()], np.float32)
  sums, reference = jnp.stack(sums), -3.2 * counts
  w, l = slice(0, None, 2), slice(1, None, 2)
  each = preference.make(loss).function(preference.PairScores(
      sums[w], sums[l], reference[w], reference[l], counts[w], counts[l]), 0)
  weights = PAIR_BATCH.weights
  if heads is None:
    return jnp.sum(weights * each) / weights.sum()
  return sum(jnp.sum(jnp.where(PAIR_BATCH.labels == h, weights * each, 0)) / weights[PAIR_BATCH.labels == h].sum()
             for h in range(2)) / 2


def test_the_loss_and_its_direction_are_those_of_the_definition():
  value, grads = jax.jit(jax.value_and_grad(_plain_loss))(_params())
  params, _, metrics = _updated('packed', 1)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)
  # With both moments switched off Adam moves each parameter by the rate against the sign of its gradient.
  for new, old, grad in zip(jax.tree.leaves(params), jax.tree.leaves(_params()), jax.tree.leaves(grads)):
    clear = np.abs(grad) > 1e-5
    np.testing.assert_allclose((new - old)[clear], -RATE * np.sign(grad)[clear], rtol=1e-2)


@pytest.mark.parametrize('layout, micro_batches', [('rows', 1), ('reversed', 1), ('shared', 1), ('packed', 2), ('rows', 2), ('rows', 4)])
@pytest.mark.parametrize('loss', ['dpo', 'orpo'])
def test_packing_order_and_micro_batches_change_nothing(layout, micro_batches, loss):
  _, _, want = _updated('packed', 1, loss)
  _, _, got = _updated(layout, micro_batches, loss)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('loss', ['dpo', 'orpo'])
def test_pairs_that_lie_together_need_no_pass_of_their_own(loss):
  # A row of 24 tokens a micro-batch: one pair each, so that none of them sees the others.
  _, _, want = _updated('packed', 1, loss)
  batch, used = _batch('pairs', 8)
  assert used == PAIRS
  for m in range(used):
    held = batch.trajectory_ids[m]
    assert set(held[held >= 0]) == {2 * m, 2 * m + 1}
  _, _, got = _updated('pairs', 8, loss, together=True)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_pairs_are_laid_out_whole():
  rng = np.random.default_rng(0)
  for rows in (1, 2, 5):
    lengths = rng.integers(6, LENGTH // 2 + 1, 40).tolist()
    # Those of a pair share their first five tokens and draw the rest.
    sequences = [packing.TokenSequence(np.r_[np.full(5, i // 2), np.full(n - 5, 100 + i)].astype(np.int32), np.arange(n) >= 5,
                                       np.zeros(n, np.float32), np.zeros(n, np.int32), i) for i, n in enumerate(lengths)]
    for share in (False, True):
      plan, starts = plan_pairs(sequences, rows, LENGTH, share)
      assert sorted(i for row in plan for i in row) == list(range(40))
      assert all(sum(lengths[i] - starts[i] for i in row) <= LENGTH for row in plan)
      where = {i: r // rows for r, row in enumerate(plan) for i in row}
      assert all(where[i] == where[i + 1] for i in range(0, 40, 2))
      # As many micro-batches as pairs at their longest would take, at most.
      assert -(-len(plan) // rows) <= -(-20 // rows)
      assert any(starts) == share
      assert not share or (sorted(starts) == [0] * 20 + [4] * 20 if rows == 1 else sum(starts) >= 40)


def test_devices_change_nothing():
  mesh = meshes.make_mesh({'data': -1})
  assert mesh.size > 1
  shapes = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))
  params = jax.device_put(_params(), meshes.shardings(param_axes(CONFIG), shapes, mesh))
  before = params['embedding'].sharding
  update = make_pair_update(CONFIG, _optimizer(), preference.make('dpo'), micro_batches=1, mesh=mesh)
  batch, used = _batch('rows')
  state, got = update(LearnerState(params, _optimizer().init(params), np.int32(0)), batch, PAIR_BATCH, np.int32(used))
  _, _, want = _updated('rows', 1)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)
  # Laid out as it came, so that the next update is the same program.
  assert state.params['embedding'].sharding.is_equivalent_to(before, 2)


def test_what_was_not_sampled_is_not_read():
  want, _, before = _updated('packed', 1)
  got, _, after = _updated('packed', 1, change='unsampled')
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert before == after


def test_tokens_that_no_sampled_token_follows_get_no_gradient():
  # The embedding of a token that only stands at the end of sequences, outside the loss, cannot matter.
  sequences = [s._replace(tokens=np.append(np.minimum(s.tokens, VOCAB - 2), VOCAB - 1).astype(np.int32),
                          loss_mask=np.append(s.loss_mask, False), log_probs=np.append(s.log_probs, np.nan),
                          turns=np.append(s.turns, 0)) for s in _sequences()]
  n = 2 * PAIRS
  outcome = packing.Outcome(np.zeros(n, np.int32), np.zeros(n, np.float32), np.ones(n, np.float32), np.ones(n, bool))
  batch, used = packing.pack(sequences, outcome, rows=8, row_length=LENGTH)
  params = jax.tree.map(jnp.array, _params())
  update = make_pair_update(CONFIG, _optimizer(), preference.make('dpo'), micro_batches=1)
  state, _ = update(LearnerState(params, _optimizer().init(params), np.int32(0)), batch, PAIR_BATCH, np.int32(used))
  moved = np.abs(np.asarray(state.params['embedding']) - _params()['embedding']).max(axis=1)
  assert moved[VOCAB - 1] == 0 and moved[sequences[0].tokens[0]] > 0


def test_heads_take_their_own_pairs_and_the_policy_is_their_mix():
  head = _params()['head']
  heads = jnp.stack([head, 1.5 * head])
  value, grads = jax.jit(jax.value_and_grad(lambda h: _plain_loss(_params(), heads=h)))(heads)
  for micro_batches in (1, 2):
    params, side, metrics = _updated('rows', micro_batches, heads=True)
    np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
    clear = np.abs(grads) > 1e-5
    np.testing.assert_allclose((side['heads'] - heads)[clear], -RATE * np.sign(grads)[clear], rtol=1e-2)
    np.testing.assert_allclose(params['head'], 0.25 * side['heads'][0] + 0.75 * side['heads'][1], rtol=1e-6, atol=1e-7)
  # Logits are linear in the head, so mixing heads mixes logits.
  states = jnp.asarray(np.random.default_rng(0).normal(size=(5, CONFIG.width)), jnp.float32)
  of = lambda h: transformer.logits({**_params(), 'head': h}, states)
  np.testing.assert_allclose(of(jnp.asarray(params['head'])), 0.25 * of(side['heads'][0]) + 0.75 * of(side['heads'][1]),
                             rtol=1e-4, atol=1e-5)


def test_an_update_that_is_not_finite_is_not_applied():
  params = jax.tree.map(jnp.array, _params())
  update = make_pair_update(CONFIG, _optimizer(), preference.make('dpo'), micro_batches=1)
  batch, used = _batch('packed')
  batch.reference_log_probs[batch.loss_mask] = np.nan
  state, metrics = update(LearnerState(params, _optimizer().init(params), np.int32(0)), batch, PAIR_BATCH, np.int32(used))
  assert metrics['applied'] == 0 and state.updates == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), _params())
