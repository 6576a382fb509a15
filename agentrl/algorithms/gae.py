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


def _shift_left(x, fill):
  return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], fill)], axis=1)


def sequence_continues(segment_ids: chex.Array) -> chex.Array:
  """Returns [B, T] bool: whether the next token of the row belongs to the same sequence."""
  chex.assert_rank(segment_ids, 2)
  return (_shift_left(segment_ids, 0) == segment_ids) & (segment_ids > 0)


def _reverse_recurrence(decay, x):
  """Solves y[:, t] = x[:, t] + decay[:, t] y[:, t + 1], y = 0 past the end, in log2(T) steps."""

  def combine(later, earlier):
    decay_later, y_later = later
    decay_earlier, y_earlier = earlier
    return decay_earlier * decay_later, y_earlier + decay_earlier * y_later

  return jax.lax.associative_scan(combine, (decay, x), reverse=True, axis=1)[1]


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
  within = sequence_continues(segment_ids).astype(jnp.float32)
  from_here = _reverse_recurrence(within, loss_mask.astype(jnp.float32))
  last = loss_mask & (from_here == 1)
  return jnp.where(last, credit.of_trajectory(rewards, trajectory_ids), 0.0)


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
  continues = sequence_continues(segment_ids)
  within = continues.astype(jnp.float32)
  # The value of the first token in the loss at or after t: what an environment token hands through.
  first_value = _reverse_recurrence(jnp.where(loss_mask, 0.0, within), values)
  next_value = jnp.where(continues, _shift_left(first_value, 0), 0.0)
  delta = jnp.where(loss_mask, rewards + gamma * next_value - values, 0.0)
  advantages = _reverse_recurrence(jnp.where(loss_mask, gamma * lam * within, within), delta)
  advantages = jnp.where(loss_mask, advantages, 0.0)
  return advantages, advantages + values
