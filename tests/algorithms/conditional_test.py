"""Comparisons and losses over some trajectories only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.algorithms import choices, conditional, make
from agentrl.algorithms.examples import example_batch

CHANNEL = {'advantage': {'name': 'cond_z', 'part': 'thrift'}, 'filters': ('nonzero_adv',)}


def _batch(thrift=None):
  batch, outputs = example_batch(1, reads=['thrift'])
  if thrift is not None:
    batch = batch._replace(parts={'thrift': np.float32([*thrift, *[0] * (batch.weights.size - len(thrift))])})
  return batch, outputs


def test_scores_among_those_above_zero():
  rng = np.random.default_rng(0)
  rewards = np.where(rng.random(30) < .5, rng.random(30), 0).astype(np.float32)
  groups, counts = rng.integers(0, 4, 30).astype(np.int32), rng.random(30) < .8
  want = np.zeros(30)
  for i in range(30):
    others = [float(r) for r, g, c in zip(rewards, groups, counts) if g == groups[i] and c and r > 0]
    if rewards[i] > 0 and len(others) >= 2:
      want[i] = (rewards[i] - np.mean(others)) / (np.std(others, ddof=1) + 1e-6)
  got = conditional.conditional_z(rewards, groups, counts)
  assert (want != 0).sum() > 5
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_one_right_answer_has_no_tool_advantage():
  batch, _ = _batch([.5, 0, 0, 0])
  estimated = choices.advantage('cond_z', part='thrift').function(batch, batch.loss_mask)
  np.testing.assert_array_equal(estimated.advantages, 0)


def test_the_tool_loss_averages_its_own_rows():
  # Group 0: 1/2 and 1/4 right, so +-1/sqrt(2); all else 0 and out of the mean.
  batch, outputs = _batch([.5, .25, 0, 0])
  made = make('compose', channels={'tool': CHANNEL})
  prepared = made.prepare(batch)
  rows = batch.loss_mask & np.isin(batch.trajectory_ids, (0, 1))
  np.testing.assert_allclose(prepared.token_weights[:, 0], rows / rows.sum(), rtol=1e-6)
  found = np.unique(np.asarray(prepared.advantages)[:, 0][rows])
  np.testing.assert_allclose(found, [-.5**.5, .5**.5], rtol=1e-4)
  gradient = np.asarray(jax.grad(lambda o: made.loss(o, prepared)[0])(outputs).log_probs)
  assert np.any(gradient[rows] != 0)
  np.testing.assert_array_equal(gradient[~rows], 0)


def test_without_a_row_the_tool_loss_is_nothing():
  batch, outputs = _batch([.5, 0, 0, 0])
  made = make('compose', channels={'tool': CHANNEL})
  (loss, metrics), gradient = jax.value_and_grad(lambda o: made.loss(o, made.prepare(batch)), has_aux=True)(outputs)
  assert loss == 0 and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(metrics))
  np.testing.assert_array_equal(gradient.log_probs, 0)


def test_small_advantages_are_left_out():
  batch, _ = _batch()
  # By hand: trajectory i has advantage size[i] on one of its tokens, either sign.
  size = np.float32([.5, -.009, .0, -.02, .01, .0099, 1, 1, 1, 1, 1, 1, 0, 0])
  plane = np.zeros(batch.loss_mask.shape, np.float32)
  for i, a in enumerate(size[:12]):
    plane[tuple(np.argwhere(batch.loss_mask & (batch.trajectory_ids == i))[-1])] = a
  want = np.abs(size) >= .01
  np.testing.assert_array_equal(conditional.abs_adv(batch, jnp.asarray(plane)), want)
  np.testing.assert_array_equal(conditional.nonzero_adv(batch, jnp.asarray(plane)), size != 0)


def test_a_group_without_signal_is_out_of_loops_mean():
  batch, _ = _batch()
  rewards = np.where(batch.group_ids == 0, np.float32(1), batch.rewards).astype(np.float32)
  made = make('compose', channels={'p': {'advantage': 'loo', 'filters': 'abs_adv', 'aggregation': 'seq_mean_tok_mean'}})
  weights = np.asarray(made.prepare(batch._replace(rewards=rewards)).token_weights)[:, 0]
  dead = batch.loss_mask & np.isin(batch.trajectory_ids, range(4))
  np.testing.assert_array_equal(weights[dead], 0)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
