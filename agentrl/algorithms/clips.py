"""Clip rules: the loss of each token from its ratio and its advantage.

Axes: B rows, T tokens. Every rule has the signature `rule(ratio, advantages, log_probs, **bounds)`
with three [B, T] float32 arrays, stops the gradient of the advantages and returns a `Clipped`.
Losses are minimised. Lower bounds are 1 - low, upper bounds 1 + high. Write r for the ratio, A for
the advantage, l for the log-probability.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Clipped(NamedTuple):
  """What a clip rule gives; every field is [B, T].

  Attributes:
    loss: float32.
    low: bool. Where the lower bound changed the gradient.
    high: bool. Where the upper bound, or the dual one, changed the gradient.
  """

  loss: chex.Array
  low: chex.Array
  high: chex.Array


def none(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array) -> Clipped:
  """Leaves the ratio as it is.

      loss = -A r
  """
  advantages = _check(ratio, advantages, log_probs)
  never = jnp.zeros(ratio.shape, bool)
  return Clipped(-advantages * ratio, never, never)


def log_likelihood(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array) -> Clipped:
  """Weighs the log-likelihood by the advantage and leaves the ratio unread: REINFORCE, imitation.

  Its gradient is that of `none` on the policy's own samples, its value the weighted likelihood.

      loss = -A l

  Example:
    >>> one = jnp.ones((1, 1))
    >>> log_likelihood(one, one, jnp.array([[-3.]])).loss.tolist()
    [[3.0]]
  """
  advantages = _check(ratio, advantages, log_probs)
  never = jnp.zeros(ratio.shape, bool)
  return Clipped(-advantages * log_probs, never, never)


def asym(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array, *, low: float = 0.2,
         high: float = 0.2, dual: float | None = None) -> Clipped:
  """Stops a token's gradient once its ratio has moved out of the band the way its advantage pulls.

  Equal bounds are PPO's rule, a higher upper one DAPO's clip-higher.

      loss = max(-A r, -A clip(r, 1 - low, 1 + high))
      loss = min(loss, -A dual)                   where A < 0, if dual is given

  Args:
    low: Distance of the lower bound from 1, in [0, 1].
    high: Distance of the upper bound from 1.
    dual: Bound of the loss for negative advantages, above 1 + high; None for none.
  Source: Schulman et al., arXiv 1707.06347; Yu et al. (DAPO), arXiv 2503.14476; dual: Ye et al.,
    arXiv 1912.09729.  Deviation: none.
  Example:
    >>> asym(jnp.array([[1.5]]), jnp.array([[2.]]), jnp.zeros((1, 1))).loss.round(3).tolist()
    [[-2.4000000953674316]]
  """
  return _pessimistic(ratio, advantages, log_probs, 1.0 - low, 1.0 + high, dual)


def recip(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array, *,
          high: float = 0.2) -> Clipped:
  """Clips as `asym` does, to a band that is symmetric in the log of the ratio.

      loss = max(-A r, -A clip(r, 1 / (1 + high), 1 + high))

  Source: Chen et al. (LOOP), arXiv 2502.01600.  Deviation: none.
  """
  return _pessimistic(ratio, advantages, log_probs, 1.0 / (1.0 + high), 1.0 + high, None)


def weight_sg(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array, *,
              low: float = 0.2, high: float = 0.2) -> Clipped:
  """Clips the weight of each token's policy gradient; no token ever loses its gradient.

      loss = -sg(clip(r, 1 - low, 1 + high)) A l

  `low=1` leaves the upper bound alone.

  Args: as in `asym`. `Clipped.low` and `.high` say where the weight was bounded.
  Source: MiniMax (CISPO), arXiv 2506.13585.  Deviation: none.
  """
  advantages = _check(ratio, advantages, log_probs)
  weight = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - low, 1.0 + high))
  return Clipped(-weight * advantages * log_probs, ratio < 1.0 - low, ratio > 1.0 + high)


def one_sided_neg(ratio: chex.Array, advantages: chex.Array, log_probs: chex.Array) -> Clipped:
  """Takes good tokens at full weight and bad ones at their ratio, at most 1.

  For strongly off-policy batches: what the policy no longer does is not pushed down further.

      loss = -A l                                 where A > 0
      loss = -sg(clip(r, 0, 1)) A l               elsewhere

  Source: Le Roux et al. (TOPR), arXiv 2503.14286.  Deviation: none.
  """
  advantages = _check(ratio, advantages, log_probs)
  weight = jnp.where(advantages > 0, 1.0, jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1.0)))
  return Clipped(-weight * advantages * log_probs, jnp.zeros(ratio.shape, bool),
                 (advantages < 0) & (ratio > 1))


def _pessimistic(ratio, advantages, log_probs, lower, upper, dual):
  """The larger of the clipped and the unclipped loss."""
  advantages = _check(ratio, advantages, log_probs)
  loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, lower, upper))
  low = (advantages < 0) & (ratio < lower)
  high = (advantages > 0) & (ratio > upper)
  if dual is not None:
    if isinstance(dual, (int, float)) and isinstance(upper, (int, float)) and dual <= upper:
      raise ValueError(f'dual={dual} would bound the loss inside the band, which ends at {upper}')
    loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual), loss)
    high |= (advantages < 0) & (ratio > dual)
  return Clipped(loss, low, high)


def _check(ratio, advantages, log_probs):
  chex.assert_rank([ratio, advantages, log_probs], 2)
  chex.assert_equal_shape([ratio, advantages, log_probs])
  chex.assert_type([ratio, advantages, log_probs], jnp.float32)
  return jax.lax.stop_gradient(advantages)
