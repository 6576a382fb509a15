"""Turns as units: their ends, their rewards and returns, and what they are compared with.

Axes: B rows, T tokens, N trajectories. A turn is a longest run of tokens in the loss of one sequence
and one turn id; one without such a token does not exist here. What belongs to a turn stands on its
last token, 0 elsewhere, until `on_turns` gives it to all of its tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from agentrl.algorithms import advantages, credit, gae, ratios
from agentrl.core import masked


class Turns(NamedTuple):
  """Where the turns of a batch lie; [B, T] each.

  Attributes:
    ids: int32. From 1 within a row; 0 outside the loss mask.
    first: bool. Whether it is the first token of its turn.
    last: bool. Whether it is the last one.
  """

  ids: chex.Array
  first: chex.Array
  last: chex.Array


def find(batch: Any, loss_mask: chex.Array) -> Turns:
  """Returns where the turns of a TrainBatch lie.

  Args:
    batch: A TrainBatch.
    loss_mask: [B, T] bool. Of the channel.
  """
  ids = ratios.run_ids(loss_mask, batch.segment_ids, batch.turn_ids)
  edge = jnp.zeros_like(ids[:, :1])
  first = loss_mask & (ids != jnp.concatenate([edge, ids[:, :-1]], axis=1))
  last = loss_mask & (ids != jnp.concatenate([ids[:, 1:], edge], axis=1))
  return Turns(ids, first, last)


def on_turns(x: chex.Array, turns: Turns) -> chex.Array:
  """Gives every token of a turn the sum of `x` over the turn's tokens, and 0 to all others.

  Args:
    x: [B, T] float32; read at the tokens of turns only.
    turns: From `find`.
  """
  inside = turns.ids > 0
  return jnp.where(inside, masked.row_segment_sum(jnp.where(inside, x, 0.0), turns.ids), 0.0)


def rewards(batch: Any, loss_mask: chex.Array, turns: Turns, final: chex.Array | None = None,
            turn_part: str = '') -> chex.Array:
  """Returns the reward of each turn on its last token, [B, T] float32.

  Args:
    batch: A TrainBatch.
    loss_mask: [B, T] bool. Of the channel.
    turns: From `find`.
    final: [N] float32, added to the last turn of each sequence; None for nothing.
    turn_part: Reward part of turns that is added; '' for none.
  """
  out = jnp.zeros(loss_mask.shape, jnp.float32)
  if final is not None:
    out += gae.place_terminal_reward(final, batch.trajectory_ids, batch.segment_ids, loss_mask)
  if turn_part:
    out += jnp.where(turns.last, on_turns(batch.token_parts[turn_part], turns), 0.0)
  return out


def returns(given: chex.Array, batch: Any, turns: Turns, gamma: float = 1.0) -> chex.Array:
  """Returns the discounted sum of the rewards from each turn on, on its last token.

      G_k = r_k + gamma G_(k+1)           over the turns of one sequence

  Args:
    given: [B, T] float32. Rewards, on the last tokens of turns.
    batch: A TrainBatch.
    turns: From `find`.
    gamma: Discount a turn, in [0, 1].
  """
  return gae.gae(given, jnp.zeros_like(given), turns.last, batch.segment_ids, gamma=gamma)[0]


def groups(batch: Any) -> chex.Array:
  """Returns [B, T] int32: a number of each token's group, from 0; 0 for padding."""
  return credit.of_trajectory(advantages.dense_groups(batch.group_ids), batch.trajectory_ids)


def counted(batch: Any, marked: chex.Array) -> chex.Array:
  """Returns [B, T] bool: the marked tokens whose trajectory counts in the baseline."""
  return marked & credit.of_trajectory(batch.baseline_mask, batch.trajectory_ids)


def pairs(a: chex.Array, b: chex.Array) -> chex.Array:
  """Numbers the pairs (a, b) of equally many numbers densely from 0.

  Args:
    a: [...] int32, any numbers.
    b: Same shape.
  Returns:
    Same shape, int32, below the number of elements.
  Example:
    >>> pairs(jnp.array([7, 7, 9]), jnp.array([1, 1, 1])).tolist()
    [0, 0, 1]
  """
  chex.assert_equal_shape([a, b])
  a, b = (advantages.dense_groups(x.reshape(-1)).reshape(x.shape) for x in (a, b))
  return advantages.dense_groups((a * a.size + b).reshape(-1)).reshape(a.shape)


def compare(x: chex.Array, keys: chex.Array, marked: chex.Array, in_baseline: chex.Array, *,
            std: bool = True, ddof: int = 0, eps: float = 1e-6, min_count: int = 2,
            alone: str = 'zero') -> chex.Array:
  """Returns how far each marked number lies above the mean of those that share its key.

      y = (x - mean) / (std + eps)                   or x - mean

  Args:
    x: [B, T] float32.
    keys: [B, T] int32, from 0 to B T - 1.
    marked: [B, T] bool. What is compared.
    in_baseline: [B, T] bool. What it is compared with.
    std: Whether to divide by the deviation.
    ddof: Of the deviation.
    eps: Added to it.
    min_count: Numbers that must share a key for there to be a comparison.
    alone: What a number gets that has too few others: 'zero', or 'raw' for itself.
  Returns:
    [B, T] float32, gradient stopped; 0 where not marked and where the numbers of a key are all
    equal.
  Raises:
    ValueError: if `alone` is unknown.
  """
  if alone not in advantages.SINGLETONS:
    raise ValueError(f'alone={alone!r} is none of {", ".join(advantages.SINGLETONS)}')
  flat = [jnp.where(marked, x, 0.0), jnp.where(marked, keys, 0), in_baseline & marked]
  found = advantages.group_statistics(*(y.reshape(-1) for y in flat), x.size, ddof)
  count, mean, variance, equal = (y.reshape(x.shape) for y in found)
  y = flat[0] - mean
  if std:
    y = jnp.where(equal, 0.0, y / (jnp.sqrt(variance) + jnp.where(equal, 1.0, eps)))
  y = jnp.where(count >= min_count, y, flat[0] if alone == 'raw' else 0.0)
  return jnp.where(marked, y, 0.0)
