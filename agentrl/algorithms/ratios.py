"""Importance ratios between the policy and the behaviour that sampled, at several levels.

Axes: B rows, T tokens. Each function returns one ratio a token, [B, T] float32, 1 outside the loss
mask. Above the token level the number is shared by the tokens of a sequence or segment, while the
gradient of a token's ratio flows through that token's own log-probability:

    s_t = exp(l_t - sg(l_t) + sg(log of the shared ratio))

A sequence is the tokens of a row that share a segment id. Ratios are taken over sequences, not over
trajectories that a context edit cut into several: a sequence lies in one row, so that its ratio is
the same in every split into micro-batches.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from agentrl.core import masked

MAX_LOG_RATIO = 20.0  # of one token; exp(20) is 4.9e8, far from float32's infinity
MAX_SHARED_LOG_RATIO = 10.0  # of a sequence or segment


def log_ratio(log_probs: chex.Array, behaviour_log_probs: chex.Array,
              loss_mask: chex.Array) -> chex.Array:
  """Returns the clamped log of the token ratios.

      d_t = clip(l_t - b_t, -20, 20)

  Args:
    log_probs: [B, T] float32, nats. Of the policy being trained.
    behaviour_log_probs: [B, T] float32, nats. Recorded when the tokens were sampled.
    loss_mask: [B, T] bool.
  Returns:
    [B, T] float32, nats; 0 outside the loss mask, whatever stands there.
  Raises:
    AssertionError: at trace time, if ranks, shapes or dtypes differ.
  """
  chex.assert_rank([log_probs, behaviour_log_probs, loss_mask], 2)
  chex.assert_equal_shape([log_probs, behaviour_log_probs, loss_mask])
  chex.assert_type([log_probs, behaviour_log_probs, loss_mask], [jnp.float32, jnp.float32, bool])
  behaviour_log_probs = jax.lax.stop_gradient(behaviour_log_probs)
  # Masked before the subtraction: -inf or NaN outside the mask must not reach a gradient.
  difference = jnp.where(loss_mask, log_probs, 0.0) - jnp.where(loss_mask, behaviour_log_probs, 0.0)
  return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def token(log_probs: chex.Array, behaviour_log_probs: chex.Array,
          loss_mask: chex.Array) -> chex.Array:
  """Returns each token's own ratio, exp(d_t).

  Args: as in `log_ratio`.
  Source: Schulman et al. (PPO), arXiv 1707.06347.  Deviation: d_t is clamped to +-20.
  Example:
    >>> token(jnp.array([[-1., -2.]]), jnp.array([[-1., 0.]]), jnp.array([[True, False]])).tolist()
    [[1.0, 1.0]]
  """
  return jnp.exp(log_ratio(log_probs, behaviour_log_probs, loss_mask))


def off(log_probs: chex.Array, behaviour_log_probs: chex.Array,
        loss_mask: chex.Array) -> chex.Array:
  """Returns 1 with the gradient of the log-probability: no importance weighting, as in REINFORCE.

  Args: as in `log_ratio`; the behaviour log-probs are not read.
  """
  return _shared(log_probs, jnp.zeros_like(log_probs), loss_mask)


def sequence_geo(log_probs: chex.Array, behaviour_log_probs: chex.Array, loss_mask: chex.Array,
                 segment_ids: chex.Array) -> chex.Array:
  """Returns the geometric mean of the token ratios of each sequence.

      s = exp(sum of m_t d_t / sum of m_t)        over the sequence, log clamped to at most 10

  Args:
    segment_ids: [B, T] int32, from 1 within a row; 0 where padded.
    The others: as in `log_ratio`.
  Source: Zheng et al. (GSPO), arXiv 2507.18071.  Deviation: the two clamps.
  """
  return _shared(log_probs, _mean_within(log_probs, behaviour_log_probs, loss_mask, segment_ids),
                 loss_mask)


def segment_geo(log_probs: chex.Array, behaviour_log_probs: chex.Array, loss_mask: chex.Array,
                segment_ids: chex.Array, turn_ids: chex.Array) -> chex.Array:
  """Returns the geometric mean of the token ratios of each run of sampled tokens.

      s = exp(mean of d_t over the run)           log clamped to at most 10

  Args:
    segment_ids: [B, T] int32, from 1 within a row; 0 where padded.
    turn_ids: [B, T] int32. Turn index within the trajectory; -1 where padded.
    The others: as in `log_ratio`.
  Source: IPA, as released in alibaba/ROLL.  Deviation: the two clamps.
  """
  runs = run_ids(loss_mask, segment_ids, turn_ids)
  return _shared(log_probs, _mean_within(log_probs, behaviour_log_probs, loss_mask, runs),
                 loss_mask)


def segment_prod(log_probs: chex.Array, behaviour_log_probs: chex.Array, loss_mask: chex.Array,
                 segment_ids: chex.Array, turn_ids: chex.Array) -> chex.Array:
  """Returns the product of the token ratios of each run of sampled tokens: the exact weight of a turn.

      s = exp(sum of d_t over the run)            log clamped to +-20, then 10

  Args: as in `segment_geo`.
  Source: LOOP compares it with the other levels, recalled.  Deviation: the clamps.
  """
  runs = run_ids(loss_mask, segment_ids, turn_ids)
  total = masked.row_segment_sum(log_ratio(log_probs, behaviour_log_probs, loss_mask), runs)
  return _shared(log_probs, jnp.maximum(total, -MAX_LOG_RATIO), loss_mask)


def trajectory_prod(log_probs: chex.Array, behaviour_log_probs: chex.Array, loss_mask: chex.Array,
                    segment_ids: chex.Array) -> chex.Array:
  """Returns the product of the token ratios of each sequence: the exact importance weight.

  Its variance grows with the length; `sequence_geo` is the tamed form.

      s = exp(sum of m_t d_t)                     over the sequence, log clamped to +-20, then 10

  Args:
    segment_ids: [B, T] int32, from 1 within a row; 0 where padded.
    The others: as in `log_ratio`.
  Source: Chen et al. (LOOP), arXiv 2502.01600.  Deviation: the clamps; over sequences.
  """
  total = masked.row_segment_sum(log_ratio(log_probs, behaviour_log_probs, loss_mask), segment_ids)
  return _shared(log_probs, jnp.maximum(total, -MAX_LOG_RATIO), loss_mask)


def run_ids(loss_mask: chex.Array, segment_ids: chex.Array, turn_ids: chex.Array) -> chex.Array:
  """Numbers, from 1 within a row, the longest runs of tokens in the loss of one sequence and turn.

  Args:
    loss_mask: [B, T] bool.
    segment_ids: [B, T] int32, from 1 within a row; 0 where padded.
    turn_ids: [B, T] int32. Turn index within the trajectory; -1 where padded.
  Returns:
    [B, T] int32; 0 outside the loss mask.
  Example:
    >>> mask, ids = jnp.array([[True, False, True, True]]), jnp.array([[1, 1, 1, 2]])
    >>> run_ids(mask, ids, jnp.zeros((1, 4), jnp.int32)).tolist()
    [[1, 0, 2, 3]]
  """
  chex.assert_rank([loss_mask, segment_ids, turn_ids], 2)
  chex.assert_equal_shape([loss_mask, segment_ids, turn_ids])

  def before(x):
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)

  same = (before(segment_ids) == segment_ids) & (before(turn_ids) == turn_ids) & before(loss_mask)
  starts = loss_mask & ~same
  return jnp.where(loss_mask, jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)


def _mean_within(log_probs, behaviour_log_probs, loss_mask, ids):
  total = masked.row_segment_sum(log_ratio(log_probs, behaviour_log_probs, loss_mask), ids)
  return masked.safe_divide(total, masked.row_segment_sum(loss_mask.astype(jnp.float32), ids))


def _shared(log_probs, shared_log_ratio, loss_mask):
  """Gives `exp(shared_log_ratio)`, capped, the gradient of each token's own log-probability."""
  own = jnp.where(loss_mask, log_probs, 0.0)
  shared = jnp.minimum(jnp.where(loss_mask, shared_log_ratio, 0.0), MAX_SHARED_LOG_RATIO)
  return jnp.exp(own - jax.lax.stop_gradient(own) + jax.lax.stop_gradient(shared))
