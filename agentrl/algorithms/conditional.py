"""HDPO and LOOP: comparisons and losses over some of the trajectories only.

Axes: B rows, T tokens, N trajectories.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import advantages as advantages_lib
from agentrl.algorithms import choices
from agentrl.algorithms.channel import Advantage, Estimate


@choices.ADVANTAGES.register('cond_z')
def cond_z(*, part: str = 'total', ddof: int = 1, eps: float = 1e-6) -> Advantage:
  """Makes an estimator that compares the trajectories of a group whose part is above 0 alone.

      A_i = (r_i - mean) / (std + eps)          over those with r > 0, if they are at least two
      A_i = 0                                   otherwise

  For a second reward that means something only where the first was earned, such as thrift among
  right answers.

  Args:
    part: Reward part r.
    ddof: Of the deviation.
    eps: Added to it.
  Source: HDPO, code Accio-Lab/Metis hdpo_algos.py.  Deviation: none.
  """
  def estimate(batch, loss_mask):
    del loss_mask
    return Estimate(conditional_z(
        choices.reward_of(batch, part), advantages_lib.dense_groups(batch.group_ids),
        batch.baseline_mask, ddof=ddof, eps=eps))

  return Advantage('cond_z', estimate, min_group=2)


def conditional_z(rewards: chex.Array, group_ids: chex.Array, baseline_mask: chex.Array, *,
                  ddof: int = 1, eps: float = 1e-6) -> chex.Array:
  """Returns [N] float32: z-scores among the rewards of a group that are above 0; 0 for the others.

  Args:
    rewards: [N] float32.
    group_ids: [N] int32, from 0 to N - 1.
    baseline_mask: [N] bool.
    ddof: Of the deviation.
    eps: Added to it.
  Example:
    >>> one_group = jnp.zeros(3, jnp.int32)
    >>> conditional_z(jnp.array([1., .5, 0.]), one_group, jnp.ones(3, bool), ddof=0).round(3).tolist()
    [1.0, -1.0, 0.0]
  """
  above = rewards > 0
  z = advantages_lib.group_z(rewards, group_ids, baseline_mask & above, rewards.shape[0], ddof=ddof,
                             eps=eps)
  return jnp.where(above, z, 0.0)


@choices.FILTERS.register('abs_adv')
def abs_adv(batch: Any, advantages: chex.Array, *, least: float = 0.01) -> chex.Array:
  """Returns [N]: 1 for trajectories with an advantage of at least `least`, either sign, else 0.

  What is left out does not count in the mean over the others either.

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    least: In the unit of the advantage. The smallest positive number keeps all but those of exactly 0.
  Source: LOOP, code apple/ml-loop: 0.01.  Deviation: the count left is not rounded to a number of
    devices.
  """
  largest = _largest(jnp.abs(advantages), batch)
  return (largest >= least).astype(jnp.float32)


@choices.FILTERS.register('nonzero_adv')
def nonzero_adv(batch: Any, advantages: chex.Array) -> chex.Array:
  """Returns [N]: 1 for trajectories with an advantage other than 0, else 0.

  With any mean as the aggregation this is HDPO's mean over the rows with a tool advantage: 0, not
  NaN, if there are none.

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
  Source: HDPO, code Accio-Lab/Metis hdpo_actor.py.  Deviation: none.
  """
  return (_largest(jnp.abs(advantages), batch) > 0).astype(jnp.float32)


def _largest(x, batch):
  n = batch.weights.shape[0]
  ids = jnp.where(batch.trajectory_ids >= 0, batch.trajectory_ids, n).reshape(-1)
  return jax.ops.segment_max(x.reshape(-1), ids, num_segments=n + 1)[:n]
