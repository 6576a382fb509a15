"""Further baselines of groups: weighed by length, by turns, or scaled by the whole batch.

Axes: B rows, T tokens, N trajectories.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import advantages as advantages_lib
from agentrl.algorithms import choices, turns
from agentrl.algorithms.channel import Advantage, Estimate
from agentrl.core import masked


@choices.ADVANTAGES.register('opo')
def opo(*, part: str = 'total') -> Advantage:
  """Makes an estimator whose baseline weighs each trajectory of the group by its length.

      A_i = R_i - sum of len_j R_j / sum of len_j

  The length is the number of tokens in the loss.

  Args:
    part: Reward part R.
  Source: OPO, as in volcengine/verl core_algos.py.  Deviation: 0 where there are no others.
  """
  def estimate(batch, loss_mask):
    return Estimate(weighted_group(choices.reward_of(batch, part), _tokens(batch, loss_mask), batch,
                                   std=False))

  return Advantage('opo', estimate, min_group=2)


@choices.ADVANTAGES.register('rloo')
def rloo(*, kl_in_reward: float = 0.0, part: str = 'total') -> Advantage:
  """Makes an estimator that compares with the mean of the others, divergence from the reference included.

      R'_i = R_i - kl_in_reward sum over t of (b_t - q_t),     A_i = R'_i - mean over j != i of R'_j

  with b the behaviour's and q the reference's log-probability. With 0 it is 'loo'.

  Args:
    kl_in_reward: A nat's worth of reward.
    part: Reward part R.
  Source: Ahmadian et al. (RLOO), arXiv 2402.14740; the divergence in the reward is recalled, not
    checked.  Deviation: 0 where there are no others.
  """
  def estimate(batch, loss_mask):
    rewards = choices.reward_of(batch, part)
    if not choices.is_off(kl_in_reward):
      drift = jnp.where(loss_mask, batch.behaviour_log_probs - batch.reference_log_probs, 0.0)
      rewards -= kl_in_reward * _tokens(batch, loss_mask, drift)
    return Estimate(advantages_lib.group_leave_one_out(
        rewards, advantages_lib.dense_groups(batch.group_ids), batch.baseline_mask, rewards.size))

  return Advantage('rloo', estimate, min_group=2, needs_reference=not choices.is_off(kl_in_reward))


@choices.ADVANTAGES.register('turn_rows_z')
def turn_rows_z(*, rows: bool = True, ddof: int = 0, eps: float = 1e-6,
                part: str = 'total') -> Advantage:
  """Makes an estimator whose statistics run over the turns of all trajectories of a group.

      A_i = (R_i - mean) / (std + eps)          each trajectory counted once a turn

  Args:
    rows: Whether each turn is a row of its own; else each trajectory counts once, and this is 'z'.
    ddof: Of the deviation, over turns.
    eps: Added to it.
    part: Reward part R, the same for all turns of a trajectory.
  Source: Flow-GRPO (AgentFlow), code lupantech/AgentFlow.  Deviation: the switch.
  """
  if not rows:
    return choices.advantage('z', ddof=ddof, eps=eps, part=part)

  def estimate(batch, loss_mask):
    counts = _tokens(batch, turns.find(batch, loss_mask).last)
    return Estimate(weighted_group(choices.reward_of(batch, part), counts, batch, ddof=ddof, eps=eps))

  return Advantage('turn_rows_z', estimate, min_group=2)


def weighted_group(rewards: chex.Array, counts: chex.Array, batch: Any, *, std: bool = True,
                   ddof: int = 0, eps: float = 1e-6) -> chex.Array:
  """Returns how far rewards lie above the mean of their group, in which each counts several times.

  Args:
    rewards: [N] float32.
    counts: [N] float32. How often each counts.
    batch: A TrainBatch, for groups and baseline.
    std: Whether to divide by the deviation, weighed alike.
    ddof: Taken off the sum of the counts in the variance.
    eps: Added to the deviation.
  Returns:
    [N] float32, gradient stopped; 0 where the rewards of the baseline are equal, or fewer than two.
  """
  rewards = jax.lax.stop_gradient(rewards)
  groups = advantages_lib.dense_groups(batch.group_ids)
  counted = batch.baseline_mask & (counts > 0)
  plain = advantages_lib.group_statistics(rewards, groups, counted, rewards.size)

  def total(x):
    return jax.ops.segment_sum(jnp.where(counted, x, 0.0), groups, num_segments=rewards.size)[groups]

  mean = masked.safe_divide(total(counts * rewards), total(counts))
  away = rewards - mean
  if std:
    squares = total(counts * jnp.square(away))
    away /= jnp.sqrt(masked.safe_divide(squares, jnp.maximum(total(counts) - ddof, 0.0))) + eps
  # Whoever has no token takes no part.
  return jnp.where(plain.equal | (plain.count < 2), 0.0, away)


@choices.ADVANTAGES.register('batch_std')
def batch_std(*, part: str = 'total', ddof: int = 0, eps: float = 1e-6) -> Advantage:
  """Makes an estimator that centres by group and scales by the deviation of the whole batch.

      A_i = (R_i - mean_g) / (std of R_j - mean_g over the batch + eps)

  An easy group's rare failure then weighs no more than another, as it does under 'z'.

  Args:
    part: Reward part R.
    ddof: Of the deviation.
    eps: Added to it.
  Source: an option of several trainers.  Deviation: the deviation is that of centred rewards.
  """
  def estimate(batch, loss_mask):
    del loss_mask
    rewards = choices.reward_of(batch, part)
    groups = advantages_lib.dense_groups(batch.group_ids)
    away = advantages_lib.group_center(rewards, groups, batch.baseline_mask, rewards.size)
    deviation = jnp.sqrt(masked.masked_variance(away, batch.baseline_mask, ddof))
    return Estimate(masked.safe_divide(away, jnp.where(deviation > 0, deviation + eps, 0.0)))

  return Advantage('batch_std', estimate, min_group=2)


@choices.ADVANTAGES.register('gpg')
def gpg(*, part: str = 'total', dead: str = 'rewards') -> Advantage:
  """Makes an estimator that centres by group and makes up for what carries no signal, undivided by any deviation.

      A_i = alpha (R_i - mean_g),     alpha = N / N_alive

  To be taken with ratio 'off' and clip 'log_likelihood'.

  Args:
    part: Reward part R.
    dead: What is not alive: 'rewards', trajectories of reward 0, as the code counts, or 'groups', those of groups
      whose rewards are all equal, as the paper does.
  Raises:
    ValueError: if `dead` is neither.
  Source: GPG, arXiv 2504.02546, as in volcengine/verl core_algos.py.  Deviation: 0 where there are no others.
  """
  if dead not in ('rewards', 'groups'):
    raise ValueError(f"dead={dead!r} is neither 'rewards' nor 'groups'")

  def estimate(batch, loss_mask):
    del loss_mask
    rewards, counted = choices.reward_of(batch, part), batch.baseline_mask
    groups = advantages_lib.dense_groups(batch.group_ids)
    away = advantages_lib.group_center(rewards, groups, counted, rewards.size)
    if dead == 'groups':
      alive = ~advantages_lib.group_statistics(rewards, groups, counted, rewards.size).equal
    else:
      alive = rewards != 0
    share = masked.safe_divide(jnp.sum(counted, dtype=jnp.float32), jnp.sum(counted & alive, dtype=jnp.float32))
    return Estimate(away * share)

  return Advantage('gpg', estimate, min_group=2)


@choices.ADVANTAGES.register('pass_k')
def pass_k(*, part: str = 'total', std: bool = True, ddof: int = 1, eps: float = 1e-6) -> Advantage:
  """Makes an estimator that credits the best of a group alone, with what it adds to the second best.

      A_best = (R_best - R_second) / (std_g + eps)          0 for all others, and where the best is not alone

  Args:
    part: Reward part R.
    std: Whether to divide by the deviation.
    ddof: Of the deviation.
    eps: Added to it.
  Source: arXiv 2503.19595, as in volcengine/verl core_algos.py.  Deviation: 0 where there are no others; the release
    refuses such groups.
  """
  def estimate(batch, loss_mask):
    del loss_mask
    rewards, counted = choices.reward_of(batch, part), batch.baseline_mask
    rewards = jax.lax.stop_gradient(rewards)
    groups = advantages_lib.dense_groups(batch.group_ids)
    stats = advantages_lib.group_statistics(rewards, groups, counted, rewards.size, ddof)
    largest = lambda kept: jax.ops.segment_max(
        jnp.where(kept, rewards, -jnp.inf), groups, num_segments=rewards.size)[groups]
    best = largest(counted)
    at_top = counted & (rewards == best)
    alone = jax.ops.segment_sum(at_top.astype(jnp.float32), groups, num_segments=rewards.size)[groups] == 1
    gain = jnp.where(at_top & alone & (stats.count >= 2), best - largest(counted & ~at_top), 0.0)
    return Estimate(gain / (jnp.sqrt(stats.variance) + eps) if std else gain)

  return Advantage('pass_k', estimate, min_group=2)


@choices.MAPS.register('batch_z')
def batch_z(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *, level: str = 'trajectory',
            eps: float = 1e-9) -> chex.Array:
  """Takes z-scores over the whole batch once more.

      A <- (A - mean) / (std + eps)          population deviation

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    level: 'trajectory': each trajectory in the loss counts once, with its mean advantage; or 'token'.
    eps: Added to the deviation.
  Raises:
    ValueError: if `level` is unknown.
  Source: BN-GSPO, code OpenSenseNova/SenseNova-MARS core_algos.py.  Deviation: exact 0 for equal
    advantages.
  """
  if level not in ('trajectory', 'token'):
    raise ValueError(f"level={level!r} is neither 'trajectory' nor 'token'")
  if level == 'token':
    x, mask = advantages, loss_mask
  else:
    tokens = _tokens(batch, loss_mask)
    x = masked.safe_divide(_tokens(batch, loss_mask, advantages), tokens)
    mask = tokens > 0
  smallest, largest = masked.masked_extremes(x, mask)
  mean, deviation = masked.masked_mean(x, mask), jnp.sqrt(masked.masked_variance(x, mask))
  # The means of equal advantages may differ by rounding.
  differ = largest - smallest > 1e-5 * jnp.maximum(jnp.abs(largest), jnp.abs(smallest))
  scaled = jnp.where(differ, (advantages - mean) / (deviation + eps), 0.0)
  return jnp.where(loss_mask, scaled, 0.0)


def _tokens(batch, mask, x=None):
  """Sums `x`, or counts, over the tokens of each trajectory that `mask` keeps: [N] float32."""
  n = batch.weights.shape[0]
  ids = jnp.where(mask & (batch.trajectory_ids >= 0), batch.trajectory_ids, n).reshape(-1)
  x = jnp.ones(mask.shape, jnp.float32) if x is None else x
  return jax.ops.segment_sum(x.reshape(-1), ids, num_segments=n + 1)[:n]
