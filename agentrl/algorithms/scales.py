"""Advantages times a factor of their trajectory or of the batch. Axes: B rows, T tokens, N trajectories, G groups.

All are credit maps `rule(batch, advantages [B, T], loss_mask [B, T], **options) -> [B, T]`.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from agentrl.algorithms import advantages as advantages_lib
from agentrl.algorithms import choices, credit
from agentrl.core import masked


@choices.MAPS.register('scale_by_part')
def scale_by_part(batch, advantages: chex.Array, loss_mask: chex.Array, *, part: str) -> chex.Array:
  """Multiplies the advantages of each trajectory by a part of it.

      A'[b, t] = part_i A[b, t]

  After an advantage that divides by the group's deviation it is the only way in which a factor that the group shares
  can act.

  Args:
    batch: Holds the part, of trajectories or of tokens.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    part: Name of the part.
  Returns:
    [B, T] float32.
  """
  del loss_mask
  chex.assert_equal_shape([advantages, batch.trajectory_ids])
  if part in batch.token_parts:
    return advantages * batch.token_parts[part]
  return advantages * credit.of_trajectory(batch.parts[part], batch.trajectory_ids)


@choices.MAPS.register('repeat_decay')
def repeat_decay(batch, advantages: chex.Array, loss_mask: chex.Array) -> chex.Array:
  """Divides the advantages of a trajectory that counts several times by how often it does.

      A'[b, t] = A[b, t] / max(weight_i, 1)

  What is repeated then pulls as hard as if it were there once, while it goes on filling the denominator of a mean.

  Source: VSPO's value-smoothing clipping; its formula was not found, this one is our choice.  Deviation: unknown.
  """
  del loss_mask
  repeats = jnp.maximum(batch.weights, 1.0)
  return advantages / jnp.maximum(credit.of_trajectory(repeats, batch.trajectory_ids), 1.0)


@choices.MAPS.register('revive')
def revive(batch, advantages: chex.Array, loss_mask: chex.Array) -> chex.Array:
  """Makes up for groups without signal: multiplies by all groups over those whose rewards differ.

      A'[b, t] = A[b, t] G / G_good                  0 where no group has a signal

  Source: RAPO (Fathom-DeepResearch).  Deviation: none; groups with a trajectory in the baseline are counted.
  """
  del loss_mask
  counted = batch.baseline_mask & (batch.weights > 0)
  groups = advantages_lib.dense_groups(batch.group_ids)
  stats = advantages_lib.group_statistics(batch.rewards, groups, counted, batch.rewards.shape[0])
  share = jnp.where(counted, masked.safe_divide(jnp.ones_like(stats.count), stats.count), 0.0)
  good = jnp.sum(jnp.where(stats.equal, 0.0, share))
  return advantages * masked.safe_divide(jnp.sum(share), good)
