"""Equalities that hold between methods, or between batches, by mathematics alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import advantages, aggregation, choices, compose, gae, make
from agentrl.algorithms.examples import example_batch


@functools.cache
def _batch():
  return example_batch(3)


def _gradient(objective, batch, outputs):
  prepared = objective.prepare(batch)
  return np.asarray(jax.grad(lambda o: objective.loss(o, prepared)[0])(outputs).log_probs)


@pytest.mark.parametrize('seed', range(3))
def test_inserting_observations_leaves_the_advantages_of_sampled_tokens(seed):
  rng = np.random.default_rng(seed)
  n, length = 12, 40
  rewards, values = (rng.normal(size=n).astype(np.float32) for _ in range(2))

  def spread(indices):
    def place(x, fill=0):
      out = np.full((1, length), fill, np.asarray(x).dtype)
      out[0, indices] = x
      return out
    mask = place(np.ones(n, bool), False)
    # Noise where nothing was sampled: it must not be read.
    noise = np.where(mask, 0, rng.normal(size=mask.shape)).astype(np.float32)
    segments = np.ones((1, length), np.int32)
    got = gae.gae(place(rewards) + noise, place(values) + noise, mask, segments, gamma=.9, lam=.7)
    return [np.asarray(x)[0, indices] for x in got]

  close = spread(np.arange(n))
  apart = spread(np.sort(rng.permutation(length)[:n]))
  np.testing.assert_array_equal(close, apart)


def test_doubling_a_trajectory_doubles_its_part_of_the_sum_and_not_of_the_mean():
  # Trajectory 0 has 3 tokens of loss 1, trajectory 1 has 2 of loss 0; then 0 has 6.
  def contributions(rule, length):
    ids = np.int32([[0] * length + [1] * 2])
    weights = rule(np.ones(ids.shape, bool), ids, np.ones(2, np.float32))
    return float(np.sum(np.asarray(weights)[ids == 0]))

  constant = functools.partial(aggregation.sum_over_constant, max_tokens=10)
  want = {
      constant: (3 / 20, 6 / 20),  # doubles
      aggregation.seq_mean_tok_sum: (3 / 2, 6 / 2),  # doubles
      aggregation.tok_mean: (3 / 5, 6 / 8),  # its share of the tokens
      aggregation.seq_mean_tok_mean: (1 / 2, 1 / 2),  # its share of the trajectories
  }
  for rule, (single, double) in want.items():
    np.testing.assert_allclose([contributions(rule, 3), contributions(rule, 6)], [single, double],
                               rtol=1e-6)


@pytest.mark.parametrize('ratio', ['token', 'segment_geo', 'sequence_geo', 'trajectory_prod'])
@pytest.mark.parametrize('clip', ['none', 'asym', 'recip', 'weight_sg', 'one_sided_neg'])
def test_on_policy_every_rule_gives_the_reinforce_gradient(ratio, clip):
  # With ratio 1 the gradient of each token's loss is -A, whatever the level and the rule. Weights
  # are those of the aggregation, here shared; GSPO proper differs by its aggregation alone.
  batch, outputs = _batch()
  outputs = outputs._replace(log_probs=batch.behaviour_log_probs)
  objective = make('grpo', ratio=ratio, clip=clip)
  prepared = objective.prepare(batch)
  want = -np.asarray(prepared.token_weights[:, 0] * prepared.advantages[:, 0])
  np.testing.assert_allclose(_gradient(objective, batch, outputs), want, rtol=1e-5, atol=1e-8)


def test_reinforce_reads_no_behaviour_log_probs_and_its_two_forms_have_one_gradient():
  batch, outputs = _batch()
  forms = [make('grpo', ratio='off', clip=clip) for clip in ('none', 'log_likelihood')]
  shifted = batch._replace(behaviour_log_probs=batch.behaviour_log_probs - 3)
  gradients = [_gradient(f, b, outputs) for f in forms for b in (batch, shifted)]
  for gradient in gradients[1:]:
    np.testing.assert_allclose(gradient, gradients[0], rtol=1e-6, atol=1e-9)


def test_where_every_sequence_is_one_token_all_levels_are_the_token_level():
  batch, outputs = _batch()
  first = np.zeros_like(batch.loss_mask)
  for i in range(int(batch.baseline_mask.sum())):
    b, t = np.argwhere(batch.loss_mask & (batch.trajectory_ids == i))[0]
    first[b, t] = True
  batch = batch._replace(loss_mask=first)
  token, *others = (_gradient(make('grpo', ratio=r), batch, outputs)
                    for r in ('token', 'segment_geo', 'sequence_geo', 'trajectory_prod'))
  for other in others:
    np.testing.assert_allclose(other, token, rtol=1e-5, atol=1e-8)


def test_inside_the_band_cispo_and_ppo_have_one_gradient():
  batch, outputs = _batch()
  near = batch.behaviour_log_probs + .1 * np.sin(outputs.log_probs)  # ratios in [.9, 1.11]
  outputs = outputs._replace(log_probs=np.where(batch.loss_mask, near, 0).astype(np.float32))
  np.testing.assert_allclose(_gradient(make('grpo', clip='weight_sg'), batch, outputs),
                             _gradient(make('grpo'), batch, outputs), rtol=1e-5, atol=1e-8)


def test_equal_bounds_in_the_log_are_the_reciprocal_rule():
  batch, outputs = _batch()
  np.testing.assert_allclose(
      _gradient(make('grpo', clip='recip', clip_high=.25), batch, outputs),
      _gradient(make('grpo', clip='asym', clip_low=.2, clip_high=.25), batch, outputs),
      rtol=1e-6)  # 1 / 1.25 = 1 - .2


def test_affine_rewards_leave_z_and_scale_center_and_loo():
  rng = np.random.default_rng(0)
  rewards, groups = rng.normal(size=12).astype(np.float32), np.int32([0] * 4 + [1] * 5 + [2] * 3)
  factor, shift = np.float32([2, .5, 3])[groups], np.float32([1, -4, 10])[groups]
  counts = np.ones(12, bool)
  for rule, scale in ((advantages.group_z, 1), (advantages.group_center, factor),
                      (advantages.group_leave_one_out, factor)):
    before, after = (rule(r, groups, counts, 3) for r in (rewards, factor * rewards + shift))
    np.testing.assert_allclose(after, scale * np.asarray(before), rtol=1e-3, atol=1e-4)


def test_leave_one_out_is_center_times_n_over_n_minus_one():
  batch, _ = _batch()
  arguments = batch.rewards, batch.group_ids, batch.baseline_mask, batch.rewards.size
  real = batch.baseline_mask  # groups of 4
  np.testing.assert_allclose(np.asarray(advantages.group_leave_one_out(*arguments))[real],
                             np.asarray(advantages.group_center(*arguments))[real] * 4 / 3,
                             rtol=1e-6)


def test_a_perfect_value_head_leaves_no_advantage():
  # gamma = lam = 1 and values equal to the final reward: every temporal difference is 0.
  batch, _ = _batch()
  exact = np.where(batch.trajectory_ids >= 0, batch.rewards[batch.trajectory_ids], 0)
  estimated = make('ppo', whiten=False).estimate(batch._replace(values=exact.astype(np.float32)))
  np.testing.assert_allclose(estimated.advantages, 0, atol=1e-6)
  np.testing.assert_allclose(estimated.returns, np.where(batch.loss_mask, exact, 0), atol=1e-6)


def test_undiscounted_reward_to_go_is_broadcast_credit():
  batch, _ = _batch()
  plain = compose.single_channel(
      'reinforce', choices.advantage('reward_to_go', whiten=False, group_baseline=True),
      choices.ratio('token'), choices.clip('asym'), choices.aggregation('tok_mean'))
  np.testing.assert_allclose(plain.estimate(batch).advantages,
                             make('grpo', advantage='center').estimate(batch).advantages,
                             rtol=1e-6, atol=1e-7)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_tokens():
  batch, _ = _batch()
  a = np.asarray(make('ppo').estimate(batch).advantages)[0][batch.loss_mask]
  np.testing.assert_allclose([a.mean(), a.var(ddof=1)], [0, 1], atol=1e-5)


def test_doubling_every_weight_changes_no_mean():
  batch, outputs = _batch()
  objective = make('grpo', aggregation='seq_mean_tok_mean')
  double = batch._replace(weights=batch.weights * 2)
  np.testing.assert_allclose(_gradient(objective, double, outputs),
                             _gradient(objective, batch, outputs), rtol=1e-6)


def test_the_gradient_reaches_logits_of_sampled_tokens_alone():
  # Through a softmax over 5 symbols, the last stretch before the parameters.
  batch, outputs = _batch()
  logits = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 5))
  symbols = jnp.asarray(batch.tokens % 5)
  objective = make('ppo', kl_coef=.1, entropy_coef=.1)
  prepared = objective.prepare(batch)

  def loss(logits):
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, symbols[..., None], axis=-1)[..., 0]
    entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return objective.loss(outputs._replace(log_probs=chosen, entropies=entropies), prepared)[0]

  gradient = np.asarray(jax.grad(loss)(logits))
  np.testing.assert_array_equal(gradient[~batch.loss_mask], 0)
  assert np.all(np.any(gradient[batch.loss_mask] != 0, axis=-1))
