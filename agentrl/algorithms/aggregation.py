"""How token losses become one number: weights such that the loss is their weighted sum.

    loss = sum over b, t of weight[b, t] loss[b, t]

The weights are made once from the whole optimiser batch and hold its global counts. Rows may then
be split into micro-batches or sharded in any way: the parts add up to the same loss and the same
gradient. Making them from a micro-batch, or from one shard, would be the mean of means that this
module exists to prevent.

Axes: B rows, T tokens, N trajectories. Every rule has the signature
`rule(loss_mask [B, T] bool, trajectory_ids [B, T] int32, weights [N] float32) -> [B, T] float32`, 0
outside the loss mask and 0 everywhere if nothing is left to average. A sequence is a trajectory,
wherever its tokens lie. A trajectory of weight 2 counts as if it were there twice, one of weight 0
as if it were not there.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import credit
from agentrl.core import masked


def tok_mean(loss_mask: chex.Array, trajectory_ids: chex.Array, weights: chex.Array) -> chex.Array:
  """Weighs all tokens alike, so that long trajectories weigh more.

      weight[b, t] = w_i m[b, t] / sum of w m

  Source: Yu et al. (DAPO), arXiv 2503.14476.  Deviation: trajectory weights.
  Example:
    >>> mask = jnp.array([[True, True, False, True]])
    >>> tok_mean(mask, jnp.array([[0, 0, 1, 1]]), jnp.array([1., 2.])).tolist()
    [[0.25, 0.25, 0.0, 0.5]]
  """
  token_weights = _token_weights(loss_mask, trajectory_ids, weights)
  return masked.safe_divide(token_weights, jnp.sum(token_weights))


def seq_mean_tok_mean(loss_mask: chex.Array, trajectory_ids: chex.Array,
                      weights: chex.Array) -> chex.Array:
  """Weighs all trajectories alike, and the tokens of each alike.

      weight[b, t] = w_i m[b, t] / (n_i * sum of w over trajectories with a token)

  Trajectories without a token in the loss are left out of the mean.

  Source: Shao et al. (GRPO), arXiv 2402.03300.  Deviation: trajectory weights.
  """
  token_weights = _token_weights(loss_mask, trajectory_ids, weights)
  lengths = _count(loss_mask, trajectory_ids, weights)
  own_length = credit.of_trajectory(lengths, trajectory_ids)
  return masked.safe_divide(token_weights, own_length * _total(weights, lengths > 0))


def seq_mean_tok_sum(loss_mask: chex.Array, trajectory_ids: chex.Array,
                     weights: chex.Array) -> chex.Array:
  """Sums over the tokens of a trajectory and averages over trajectories.

      weight[b, t] = w_i m[b, t] / sum of w over trajectories with a token

  The exact policy gradient of the return; its scale grows with the length.
  """
  token_weights = _token_weights(loss_mask, trajectory_ids, weights)
  lengths = _count(loss_mask, trajectory_ids, weights)
  return masked.safe_divide(token_weights, _total(weights, lengths > 0))


def sum_over_constant(loss_mask: chex.Array, trajectory_ids: chex.Array, weights: chex.Array, *,
                      max_tokens: int) -> chex.Array:
  """Divides by a constant length, so that a token counts the same whatever its trajectory's length.

      weight[b, t] = w_i m[b, t] / (max_tokens * sum of w over the trajectories in the batch)

  A trajectory is in the batch if any of its tokens is, in the loss or not.

  Args:
    max_tokens: Tokens; the most that a trajectory may sample.
  Source: Liu et al. (Dr. GRPO), arXiv 2503.20783.  Deviation: trajectory weights.
  """
  if max_tokens <= 0:
    raise ValueError(f'max_tokens={max_tokens} is no length; give the most tokens a trajectory may '
                     'sample')
  token_weights = _token_weights(loss_mask, trajectory_ids, weights)
  present = _count(trajectory_ids >= 0, trajectory_ids, weights) > 0
  return masked.safe_divide(token_weights, _total(weights, present) * max_tokens)


def _token_weights(loss_mask, trajectory_ids, weights):
  chex.assert_rank([loss_mask, trajectory_ids, weights], [2, 2, 1])
  chex.assert_equal_shape([loss_mask, trajectory_ids])
  chex.assert_type([loss_mask, weights], [bool, jnp.float32])
  return credit.broadcast(jax.lax.stop_gradient(weights), trajectory_ids, loss_mask)


def _count(mask, trajectory_ids, weights):
  """Counts the tokens of each trajectory that `mask` keeps: [N] float32."""
  size = weights.shape[0]
  ids = jnp.where(mask & (trajectory_ids >= 0), trajectory_ids, size)
  ones = jnp.ones(ids.size, jnp.float32)
  return jax.ops.segment_sum(ones, ids.reshape(-1), num_segments=size + 1)[:size]


def _total(weights, mask):
  return masked.masked_sum(jax.lax.stop_gradient(weights), mask)
