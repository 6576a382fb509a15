"""GAE, terminal rewards and credit against loops over single sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import credit, gae
from agentrl.algorithms.examples import example_batch


def _reference(rewards, values, mask, segments, gamma, lam):
  """Backwards through each sequence, over the tokens in the loss alone, in float64."""
  advantages = np.zeros(rewards.shape)
  for b in range(rewards.shape[0]):
    for segment in set(segments[b]) - {0}:
      tokens = [t for t in range(rewards.shape[1]) if segments[b, t] == segment and mask[b, t]]
      next_value = last = 0.0
      for t in reversed(tokens):
        delta = float(rewards[b, t]) + gamma * next_value - float(values[b, t])
        last = delta + gamma * lam * last
        advantages[b, t], next_value = last, float(values[b, t])
  return advantages, np.where(mask, advantages + values, 0)


@pytest.mark.parametrize('gamma, lam', [(1, 1), (.9, .8), (.5, 0), (0, 1)])
@pytest.mark.parametrize('seed', range(2))
def test_gae_over_packed_rows_equals_the_recursion(gamma, lam, seed):
  batch, _ = example_batch(seed)
  rewards = np.random.default_rng(seed).normal(size=batch.values.shape).astype(np.float32)
  arguments = rewards, batch.values, batch.loss_mask, batch.segment_ids
  got = jax.jit(lambda *a: gae.gae(*a, gamma=gamma, lam=lam))(*arguments)
  for have, want in zip(got, _reference(*arguments, gamma, lam)):
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


def test_a_long_row_stays_accurate():
  rng = np.random.default_rng(0)
  shape = (1, 4096)
  rewards, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
  mask, segments = rng.random(shape) < .7, np.ones(shape, np.int32)
  want, _ = _reference(rewards, values, mask, segments, .99, .95)
  got, _ = gae.gae(rewards, values, mask, segments, gamma=.99, lam=.95)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_numbers_outside_the_mask_are_not_read():
  batch, _ = example_batch()
  rewards = np.where(batch.loss_mask, np.float32(1), np.float32(np.nan))
  values = np.where(batch.loss_mask, batch.values, np.float32(np.nan))
  got = gae.gae(rewards, values, batch.loss_mask, batch.segment_ids)
  want = gae.gae(np.where(batch.loss_mask, rewards, 0), np.where(batch.loss_mask, values, 0),
                 batch.loss_mask, batch.segment_ids)
  np.testing.assert_array_equal(got, want)


def test_zero_values_and_lambda_one_give_the_reward_to_go():
  # A geometric series: rewards of 1 on three tokens with a discount of one half.
  ones, segments = jnp.ones((1, 3)), jnp.ones((1, 3), jnp.int32)
  got, _ = gae.gae(ones, jnp.zeros((1, 3)), ones > 0, segments, gamma=.5)
  np.testing.assert_allclose(got, [[1.75, 1.5, 1.0]])


def test_terminal_reward_lands_on_the_last_sampled_token_of_each_sequence():
  mask = np.bool_([[0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]])
  segments = np.int32([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 0, 0, 0]])
  trajectories = np.int32([[2, 2, 2, 2, 0, 0, 0, -1], [1, 1, 2, 2, 2, -1, -1, -1]])
  got = gae.place_terminal_reward(np.float32([5, 6, 7]), trajectories, segments, mask)
  # By hand: trajectory 1 sampled nothing, so its 6 is nowhere; trajectory 2 has two sequences.
  want = [[0, 0, 7, 0, 0, 5, 0, 0], [0, 0, 0, 7, 0, 0, 0, 0]]
  np.testing.assert_array_equal(got, want)


def test_a_terminal_reward_survives_gamma_zero_and_a_trailing_observation():
  # With gamma 0 only a reward on a token in the loss can be felt: the defect of placing it last.
  mask, segments = np.bool_([[0, 1, 0]]), np.ones((1, 3), np.int32)
  rewards = gae.place_terminal_reward(np.float32([3]), np.zeros((1, 3), np.int32), segments, mask)
  got, _ = gae.gae(rewards, np.zeros((1, 3), np.float32), mask, segments, gamma=0.)
  np.testing.assert_array_equal(got, [[0, 3, 0]])


def test_terminal_rewards_of_a_packed_batch_equal_a_loop():
  batch, _ = example_batch(3)
  want = np.zeros(batch.values.shape, np.float32)
  for b, row in enumerate(batch.segment_ids):
    for segment in set(row) - {0}:
      last = np.flatnonzero((row == segment) & batch.loss_mask[b])[-1]
      want[b, last] = batch.rewards[batch.trajectory_ids[b, last]]
  got = gae.place_terminal_reward(batch.rewards, batch.trajectory_ids, batch.segment_ids,
                                  batch.loss_mask)
  np.testing.assert_array_equal(got, want)


def test_broadcast_gives_each_token_the_number_of_its_trajectory():
  batch, _ = example_batch()
  numbers = np.arange(1, batch.rewards.size + 1, dtype=np.float32)
  got = credit.broadcast(numbers, batch.trajectory_ids, batch.loss_mask)
  # Index -1 of padding must not wrap to the last trajectory, so the mask there is set too.
  np.testing.assert_array_equal(got, np.where(batch.loss_mask, batch.trajectory_ids + 1, 0))
  everywhere = credit.broadcast(numbers, batch.trajectory_ids, np.ones_like(batch.loss_mask))
  np.testing.assert_array_equal(everywhere, batch.trajectory_ids + 1)


def test_wrong_shapes_are_refused_at_trace_time():
  x, mask, ids = jnp.ones((2, 3)), jnp.ones((2, 3), bool), jnp.ones((2, 3), jnp.int32)
  for wrong in ((x[0], x, mask, ids), (x, x[:, :2], mask, ids), (x, x, x, ids)):
    with pytest.raises(AssertionError):
      jax.eval_shape(gae.gae, *wrong)
