"""How an advantage reaches the tokens of packed rows. Axes: B rows, T tokens, N trajectories."""

from __future__ import annotations

import chex
import jax.numpy as jnp


def of_trajectory(x: chex.Array, trajectory_ids: chex.Array) -> chex.Array:
  """Gives every token the number of its trajectory, and 0 (or False) to padding.

  Args:
    x: [N], any dtype.
    trajectory_ids: [B, T] int32, -1 where padded.
  Returns:
    [B, T], of `x`'s dtype.
  """
  chex.assert_rank([x, trajectory_ids], [1, 2])
  # Index -1 would read the last trajectory.
  return jnp.where(trajectory_ids >= 0, x[jnp.maximum(trajectory_ids, 0)], jnp.zeros((), x.dtype))


def broadcast(advantages: chex.Array, trajectory_ids: chex.Array,
              loss_mask: chex.Array) -> chex.Array:
  """Gives every token in the loss the advantage of its trajectory.

  Args:
    advantages: [N] float32.
    trajectory_ids: [B, T] int32, -1 where padded.
    loss_mask: [B, T] bool.
  Returns:
    [B, T] float32; 0 outside the loss mask.
  Example:
    >>> mask = jnp.array([[True, False, True, False]])
    >>> broadcast(jnp.array([2., -1.]), jnp.array([[0, 1, 1, -1]]), mask).tolist()
    [[2.0, 0.0, -1.0, 0.0]]
  """
  chex.assert_equal_shape([trajectory_ids, loss_mask])
  chex.assert_type([advantages, loss_mask], [jnp.float32, bool])
  return jnp.where(loss_mask, of_trajectory(advantages, trajectory_ids), 0.0)


def per_token(advantages: chex.Array, trajectory_ids: chex.Array,
              loss_mask: chex.Array) -> chex.Array:
  """Keeps advantages that are estimated token by token, clearing what is outside the loss mask."""
  chex.assert_equal_shape([advantages, trajectory_ids, loss_mask])
  return jnp.where(loss_mask, advantages, 0.0)
