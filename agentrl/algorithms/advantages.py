"""Advantages of whole trajectories, from their rewards and the groups they belong to.

Axes: N trajectories, G groups. All results are gradient-stopped. A trajectory outside the baseline
mask is left out of its group's statistics and is still compared with them.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from agentrl.core import masked

SINGLETONS = ('zero', 'raw')


class GroupStatistics(NamedTuple):
  """What each trajectory is compared with; every field is [N].

  Attributes:
    count: float32. Members of its group that count in the baseline.
    mean: float32. Their mean reward: exactly their common reward if `equal`.
    variance: float32. Of their rewards; 0 if `equal`.
    equal: bool. Whether their rewards are all the same number.
  """

  count: chex.Array
  mean: chex.Array
  variance: chex.Array
  equal: chex.Array


def dense_groups(group_ids: chex.Array) -> chex.Array:
  """Renumbers arbitrary group ids from 0 in increasing order, so that N is a valid static number of
  groups.

  Example:
    >>> dense_groups(jnp.array([70, -1, 70, 5])).tolist()
    [2, 0, 2, 1]
  """
  chex.assert_rank(group_ids, 1)
  _, dense = jnp.unique(group_ids, return_inverse=True, size=group_ids.shape[0])
  return dense.astype(jnp.int32)


def group_statistics(rewards: chex.Array, group_ids: chex.Array, baseline_mask: chex.Array,
                     num_groups: int,
                     ddof: int = 0) -> GroupStatistics:
  """Gives each trajectory the statistics of its group's rewards.

  Args:
    rewards: [N] float32.
    group_ids: [N] int32, from 0 to num_groups - 1; `dense_groups` makes them so.
    baseline_mask: [N] bool. Which trajectories count.
    num_groups: Static; more than there are is harmless.
    ddof: 0 for the population's variance, 1 for the unbiased one.
  Raises:
    AssertionError: at trace time, if ranks, lengths or dtypes differ.
  """
  chex.assert_rank([rewards, group_ids, baseline_mask], 1)
  chex.assert_equal_shape([rewards, group_ids, baseline_mask])
  chex.assert_type([rewards, group_ids, baseline_mask], [jnp.float32, int, bool])
  rewards = jax.lax.stop_gradient(rewards)

  def per_member(reduce, x):
    return reduce(x, group_ids, num_segments=num_groups)[group_ids]

  def total(x):
    return per_member(jax.ops.segment_sum, jnp.where(baseline_mask, x, 0.0))

  count = total(jnp.ones_like(rewards))
  largest = per_member(jax.ops.segment_max, jnp.where(baseline_mask, rewards, -jnp.inf))
  smallest = per_member(jax.ops.segment_min, jnp.where(baseline_mask, rewards, jnp.inf))
  equal = largest == smallest
  # The mean of equal numbers need not be that number in floating point, and dividing the difference
  # by a vanishing deviation would turn the rounding error into an advantage of about 0.01.
  mean = jnp.where(equal, largest, masked.safe_divide(total(rewards), count))
  squares = total(jnp.square(rewards - mean))
  variance = jnp.where(equal, 0.0, masked.safe_divide(squares, jnp.maximum(count - ddof, 0.0)))
  return GroupStatistics(count, mean, variance, equal)


def _alone(advantages, rewards, others, singleton):
  """Replaces the advantage where there is nobody to compare with."""
  if singleton not in SINGLETONS:
    raise ValueError(f'singleton={singleton!r} is none of {", ".join(SINGLETONS)}')
  fallback = rewards if singleton == 'raw' else jnp.zeros_like(rewards)
  return jax.lax.stop_gradient(jnp.where(others, advantages, fallback))


def group_z(rewards: chex.Array, group_ids: chex.Array, baseline_mask: chex.Array, num_groups: int,
            *, ddof: int = 0, eps: float = 1e-6, singleton: str = 'zero') -> chex.Array:
  """Returns how many standard deviations each reward lies above the mean of its group.

  Invariant to a positive affine change of a group's rewards, so a factor shared by the group has no
  effect; take `group_center` where the scale of the reward should matter.

      A_i = (R_i - mean_g) / (std_g + eps)

  Args:
    rewards: [N] float32. Final reward in the reward function's own unit; unscaled.
    group_ids: [N] int32, from 0 to num_groups - 1.
    baseline_mask: [N] bool. Which trajectories count in mean and deviation.
    num_groups: Static; more than there are is harmless.
    ddof: 0 for the population's deviation, 1 for the unbiased variance's root.
    eps: Added to the deviation, in the unit of the reward.
    singleton: What a group with fewer than two members in the baseline gets: 'zero', or 'raw' for
      the reward itself.
  Returns:
    [N] float32, input order, gradient stopped. Exactly 0 for all of a group whose baseline rewards
    are equal: for want of a scale this holds for a member outside the baseline too.
  Raises:
    AssertionError: at trace time, if ranks, lengths or dtypes differ.
    ValueError: if `singleton` is unknown.
  Source: Shao et al., arXiv 2402.03300.  Deviation: exact 0 for equal rewards; 0 for a group of
  one.
  Example:
    >>> rewards, ids = jnp.array([1., 0., 5., 5.]), jnp.array([0, 0, 1, 1])
    >>> group_z(rewards, ids, jnp.ones(4, bool), 2, eps=0.).tolist()
    [1.0, -1.0, 0.0, 0.0]
  """
  stats = group_statistics(rewards, group_ids, baseline_mask, num_groups, ddof)
  scale = jnp.sqrt(stats.variance) + jnp.where(stats.equal, 1.0, eps)
  advantages = (rewards - stats.mean) / scale
  return _alone(jnp.where(stats.equal, 0.0, advantages), rewards, stats.count >= 2, singleton)


def group_center(rewards: chex.Array, group_ids: chex.Array, baseline_mask: chex.Array,
                 num_groups: int, *,
                 singleton: str = 'zero') -> chex.Array:
  """Returns how far each reward lies above the mean of its group, in the unit of the reward.

      A_i = R_i - mean_g

  Args: as in `group_z`.
  Returns:
    [N] float32, input order, gradient stopped. Exactly 0 in the baseline of a group of equal
    rewards.
  Source: Liu et al. (Dr. GRPO), arXiv 2503.20783.  Deviation: 0 for a group of one.
  Example:
    >>> counts = jnp.array([True, True, False])
    >>> group_center(jnp.array([1., 0., 2.]), jnp.array([0, 0, 0]), counts, 1).tolist()
    [0.5, -0.5, 1.5]
  """
  stats = group_statistics(rewards, group_ids, baseline_mask, num_groups)
  return _alone(rewards - stats.mean, rewards, stats.count >= 2, singleton)


def group_leave_one_out(rewards: chex.Array, group_ids: chex.Array, baseline_mask: chex.Array,
                        num_groups: int, *,
                        singleton: str = 'zero') -> chex.Array:
  """Returns how far each reward lies above the mean of the others in its group.

      A_i = R_i - mean over j != i of R_j = n / (n - 1) (R_i - mean_g)        i in the baseline
      A_i = R_i - mean_g                                                      i outside it

  Args: as in `group_z`.
  Returns:
    [N] float32, input order, gradient stopped. Exactly 0 in the baseline of a group of equal
    rewards.
  Source: Ahmadian et al. (RLOO), arXiv 2402.14740.  Deviation: 0 where there are no others.
  Example:
    >>> ids, counts = jnp.zeros(3, jnp.int32), jnp.ones(3, bool)
    >>> group_leave_one_out(jnp.array([3., 0., 0.]), ids, counts, 1).tolist()
    [3.0, -1.5, -1.5]
  """
  stats = group_statistics(rewards, group_ids, baseline_mask, num_groups)
  others = stats.count - baseline_mask.astype(jnp.float32)
  scale = masked.safe_divide(stats.count, others)
  return _alone((rewards - stats.mean) * scale, rewards, others >= 1, singleton)


def global_whiten(x: chex.Array, mask: chex.Array, *, ddof: int = 1,
                  eps: float = 1e-8) -> chex.Array:
  """Returns `x` shifted and scaled to mean 0 and variance 1 over the entries that `mask` keeps.

  Over [N] rewards it needs no groups; over [B, T] advantages it is what PPO and REINFORCE++ apply.
  Call it on the whole rollout batch, never on a micro-batch.

      y = (x - mean) / sqrt(variance + eps)

  Args:
    x: [...] float32.
    mask: Same shape, bool.
    ddof: 1 for the unbiased variance, 0 for the population's.
    eps: Added to the variance.
  Returns:
    As `x`, gradient stopped. 0 outside the mask, and everywhere if the entries kept are all equal.
  Source: Hu et al. (REINFORCE++), arXiv 2501.03262.  Deviation: exact 0 for equal entries.
  Example:
    >>> global_whiten(jnp.array([1., 3., 99.]), jnp.array([True, True, False]), ddof=0).tolist()
    [-1.0, 1.0, 0.0]
  """
  chex.assert_type([x, mask], [jnp.float32, bool])
  x = jax.lax.stop_gradient(x)
  smallest, largest = masked.masked_extremes(x, mask)
  variance = masked.masked_variance(x, mask, ddof)
  scaled = (x - masked.masked_mean(x, mask)) * jax.lax.rsqrt(variance + eps)
  return jnp.where(mask & (smallest < largest), scaled, 0.0)
