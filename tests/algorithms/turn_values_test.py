"""Value-based advantages of turns: against the definition, and equal to the plain ones where they must be."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import choices, clips, make, turn_values
from agentrl.algorithms.examples import example_batch


@functools.cache
def _batch():
  return example_batch(2, groups=2, reads=['s'])


def _estimate(name, batch, **options):
  return choices.advantage(name, whiten=False, **options).function(batch, batch.loss_mask)


def _turns(batch):
  for i in range(batch.weights.size):
    tokens = [tuple(x) for x in np.argwhere(batch.loss_mask & (batch.trajectory_ids == i))]
    yield i, [list(g) for _, g in itertools.groupby(tokens, lambda x: batch.turn_ids[x])]


@pytest.mark.parametrize('turn_part', ['', 's'])
def test_steps_are_turns_and_their_value_is_that_of_their_first_token(turn_part):
  batch, _ = _batch()
  got = _estimate('turn_gae', batch, gamma=.9, lam=.8, turn_part=turn_part)
  advantages, returns = np.zeros(batch.values.shape), np.zeros(batch.values.shape)
  for i, own in _turns(batch):
    last, next_value = 0.0, 0.0
    for k in reversed(range(len(own))):
      reward = batch.rewards[i] if k == len(own) - 1 else 0.0
      reward += batch.token_parts['s'][own[k][-1]] if turn_part else 0.0
      value = batch.values[own[k][0]]
      last = reward + .9 * next_value - value + .9 * .8 * last
      next_value = value
      for x in own[k]:
        advantages[x], returns[x] = last, last + value
  np.testing.assert_allclose(got.advantages, advantages, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got.returns, returns, rtol=1e-4, atol=1e-5)


def test_turns_are_whitened_as_turns():
  batch, _ = _batch()
  got = np.asarray(choices.advantage('turn_gae').function(batch, batch.loss_mask).advantages)
  firsts = np.array([got[turn[0]] for _, own in _turns(batch) for turn in own])
  np.testing.assert_allclose([firsts.mean(), firsts.var(ddof=1)], [0, 1], atol=1e-5)


def test_two_levels_by_their_recursion():
  batch, _ = _batch()
  got = _estimate('bilevel_gae', batch, gamma=.95, lam=.8, turn_gamma=.9, turn_part='s')
  advantages, returns = np.zeros(batch.values.shape), np.zeros(batch.values.shape)
  for i, own in _turns(batch):
    last, next_value = 0.0, 0.0
    for k in reversed(range(len(own))):
      end = own[k][-1]
      reward = batch.token_parts['s'][end] + (batch.rewards[i] if k == len(own) - 1 else 0.0)
      last = reward + .9 * next_value - batch.values[end] + .9 * .8 * last
      next_value = batch.values[end]
      # The turn's advantage and value are what its last token is rewarded with; beyond it there is nothing.
      inner, after, at = 0.0, 0.0, last + batch.values[end]
      for x in reversed(own[k]):
        inner = at + .95 * after - batch.values[x] + .95 * .8 * inner
        at, after = 0.0, batch.values[x]
        advantages[x], returns[x] = inner, inner + batch.values[x]
  np.testing.assert_allclose(got.advantages, advantages, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got.returns, returns, rtol=1e-4, atol=1e-5)


def test_without_discounts_both_levels_are_the_plain_estimator():
  # Every temporal difference telescopes to R - V_t.
  batch, _ = _batch()
  plain = _estimate('gae', batch)
  two = _estimate('bilevel_gae', batch, turn_gamma=1.0)
  np.testing.assert_allclose(two.advantages, plain.advantages, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(two.returns, plain.returns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, discount', [('turn_gae', 'gamma'), ('bilevel_gae', 'turn_gamma')])
def test_where_a_turn_is_one_token_turns_are_tokens(name, discount):
  batch, _ = _batch()
  one = np.zeros_like(batch.loss_mask)
  for _, own in _turns(batch):
    for turn in own:
      one[turn[0]] = True
  batch = batch._replace(loss_mask=one)
  got = _estimate(name, batch, **{discount: .9}, lam=.8)
  want = _estimate('gae', batch, gamma=.9, lam=.8)
  np.testing.assert_allclose(got.advantages, want.advantages, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got.returns, want.returns, rtol=1e-5, atol=1e-6)


def test_a_turn_without_a_sampled_token_is_no_step():
  batch, _ = _batch()
  for i, own in _turns(batch):
    if len(own) > 2:
      break
  gone = np.zeros_like(batch.loss_mask)
  for x in own[1]:
    gone[x] = True
  without = batch._replace(loss_mask=batch.loss_mask & ~gone)
  got = np.asarray(_estimate('turn_gae', without, gamma=.9, lam=.8).advantages)[own[0][0]]
  last = batch.rewards[i] - batch.values[own[2][0]]
  first = .9 * batch.values[own[2][0]] - batch.values[own[0][0]] + .9 * .8 * last
  np.testing.assert_allclose(got, first, rtol=1e-4, atol=1e-5)


def test_the_value_loss_is_the_mean_over_turns():
  batch, outputs = _batch()
  made = make('compose', channels={'policy': {'advantage': {'name': 'turn_gae', 'whiten': False}}},
              regularisers={'turn_value': {'coef': 1.0, 'clip': None}})
  prepared = made.prepare(batch)
  _, metrics = made.loss(outputs, prepared)
  firsts = [turn[0] for _, own in _turns(batch) for turn in own]
  want = np.mean([(outputs.values[x] - np.asarray(prepared.returns)[x])**2 / 2 for x in firsts])
  np.testing.assert_allclose(metrics.sums['loss/turn_value'][0], want, rtol=1e-5)
  # Nothing else of the value head is trained.
  gradient = np.asarray(jax.grad(lambda o: made.loss(o, prepared)[0])(outputs).values)
  assert {tuple(x) for x in np.argwhere(gradient != 0)} == set(firsts)


def test_far_ratios_are_cut():
  ratio = np.float32([[.5, 1., 5., 11., 11.]])
  advantages = np.float32([[-1, 1, -1, -1, 1]])
  rule = lambda l: turn_values.cut_far(jnp.exp(l), advantages, l)
  got = rule(jnp.log(ratio))
  plain = clips.asym(ratio, advantages, jnp.log(ratio), low=.1, high=.1)
  # Only the fourth differs: bad and above 10.
  np.testing.assert_allclose(got.loss, [[*plain.loss[0, :3], 1.1, plain.loss[0, 4]]], rtol=1e-5)
  gradient = jax.grad(lambda l: jnp.sum(rule(l).loss))(jnp.log(ratio))
  np.testing.assert_allclose(gradient, [[0, -1, 5, 0, 0]], rtol=1e-5)
  np.testing.assert_array_equal(got.high, [[False, False, False, True, True]])
