"""Generalised advantage estimation over the policy's own tokens in packed rows.

Axes: B rows, T tokens, N trajectories. A sequence is the tokens of a row that share a segment id.
Environment tokens take no step of their own: time, for the discount and for the bootstrap, runs
over the tokens in the loss mask only.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import credit
from agentrl.core import masked


def place_terminal_reward(rewards: chex.Array, trajectory_ids: chex.Array, segment_ids: chex.Array,
                          loss_mask: chex.Array) -> chex.Array:
  """Puts each trajectory's reward on the last token in the loss of each of its sequences.

  On the last token in the loss, not on the last token: a sequence that ends with an observation or
  a forced end marker would lose its reward. A sequence without a token in the loss gets none; a
  trajectory cut into several sequences by context edits gets its reward at the end of each, because
  none of them sees how another one ends.

  Args:
    rewards: [N] float32.
    trajectory_ids: [B, T] int32, -1 where padded.
    segment_ids: [B, T] int32, from 1 within a row; 0 where padded.
    loss_mask: [B, T] bool.
  Returns:
    [B, T] float32; 0 but on those tokens.
  Example:
    >>> mask = jnp.array([[False, True, True, False]])
    >>> trajectory, segment = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32)
    >>> place_terminal_reward(jnp.array([7.]), trajectory, segment, mask).tolist()
    [[0.0, 0.0, 7.0, 0.0]]
  """
  chex.assert_rank([rewards, trajectory_ids, segment_ids, loss_mask], [1, 2, 2, 2])
  chex.assert_equal_shape([trajectory_ids, segment_ids, loss_mask])
  chex.assert_type([rewards, loss_mask], [jnp.float32, bool])
  index = jax.lax.broadcasted_iota(jnp.int32, loss_mask.shape, 1)
  last = masked.row_segment_max(jnp.where(loss_mask, index, -1), segment_ids)
  return jnp.where(loss_mask & (index == last), credit.of_trajectory(rewards, trajectory_ids), 0.0)


def gae(rewards: chex.Array, values: chex.Array, loss_mask: chex.Array, segment_ids: chex.Array, *,
        gamma: float = 1.0,
        lam: float = 1.0) -> tuple[chex.Array, chex.Array]:
  """Returns the advantage of every token in the loss and the target of the value head.

  With values 0 and lam 1 the advantages are the discounted rewards to go, as REINFORCE++ takes
  them. Whiten afterwards, with `advantages.global_whiten`: the returns are those before whitening.

      delta_t = r_t + gamma V_next(t) - V_t
      A_t = delta_t + gamma lam A_next(t)
      return_t = A_t + V_t

  next(t) is the next token in the loss of the same sequence; V and A are 0 past the last one.

  Args:
    rewards: [B, T] float32. Read at the tokens in the loss only.
    values: [B, T] float32. Value predicted from what precedes token t.
    loss_mask: [B, T] bool.
    segment_ids: [B, T] int32, from 1 within a row; 0 where padded.
    gamma: Discount a token, in [0, 1].
    lam: Weight of longer returns, in [0, 1].
  Returns:
    Advantages and returns, [B, T] float32, gradient stopped, 0 outside the loss mask.
  Raises:
    AssertionError: at trace time, if ranks, shapes or dtypes differ.
  Source: Schulman et al., arXiv 1506.02438.  Deviation: tokens outside the loss mask are no steps.
  Example:
    >>> mask, ids = jnp.array([[True, False, True]]), jnp.ones((1, 3), jnp.int32)
    >>> a, r = gae(jnp.array([[0., 9., 1.]]), jnp.array([[.5, 9., .25]]), mask, ids)
    >>> a.tolist(), r.tolist()
    ([[0.5, 0.0, 0.75]], [[1.0, 0.0, 1.0]])
  """
  chex.assert_rank([rewards, values, loss_mask, segment_ids], 2)
  chex.assert_equal_shape([rewards, values, loss_mask, segment_ids])
  chex.assert_type([rewards, values, loss_mask], [jnp.float32, jnp.float32, bool])
  rewards, values = (jax.lax.stop_gradient(jnp.where(loss_mask, x, 0.0)) for x in (rewards, values))

  def step(carry, at):
    next_value, last, segment = carry
    reward, value, mask, own_segment = at
    same = segment == own_segment
    next_value, last = (jnp.where(same, x, 0.0) for x in (next_value, last))
    advantage = reward + gamma * next_value - value + gamma * lam * last
    # What is not the policy's hands both through unchanged, as if it were not there.
    carry = jnp.where(mask, value, next_value), jnp.where(mask, advantage, last), own_segment
    return carry, jnp.where(mask, advantage, 0.0)

  zeros = jnp.zeros(rewards.shape[0], jnp.float32)
  over_time = [jnp.swapaxes(x, 0, 1) for x in (rewards, values, loss_mask, segment_ids)]
  start = zeros, zeros, jnp.zeros_like(segment_ids[:, 0])
  _, advantages = jax.lax.scan(step, start, over_time, reverse=True)
  advantages = jnp.swapaxes(advantages, 0, 1)
  return advantages, advantages + values
