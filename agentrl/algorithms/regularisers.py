"""Token losses that are added to the policy's: KL to a reference, entropy, value regression.

Axes: B rows, T tokens. All take and give [B, T] float32 and read nothing outside the loss mask.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

KL_ESTIMATORS = ('k1', 'k2', 'k3', 'abs')
MAX_LOG_DIFFERENCE = 20.0
MAX_KL = 10.0


def kl(log_probs: chex.Array, reference_log_probs: chex.Array, loss_mask: chex.Array, *,
       estimator: str = 'k3') -> chex.Array:
  """Returns an estimate of the KL divergence from a reference at each sampled token.

      k1 = l - q                                  unbiased; of no use as a loss: its gradient has
      mean 0 k2 = (l - q)^2 / 2                          biased, its gradient is that of the
      divergence k3 = exp(q - l) - (q - l) - 1               unbiased on-policy and never negative
      abs = |l - q|

  with l the log-probability and q the reference's. A '+' after the name keeps the value and takes
  the gradient of k2.

  Args:
    log_probs: [B, T] float32, nats.
    reference_log_probs: [B, T] float32, nats. No gradient flows to it.
    loss_mask: [B, T] bool.
    estimator: 'k1', 'k2', 'k3' or 'abs', with or without '+'.
  Returns:
    [B, T] float32, nats; 0 outside the loss mask. l - q is clamped to +-20, k3 to at most 10.
  Raises:
    ValueError: if `estimator` is unknown.
  Source: Schulman, "Approximating KL divergence" (2020).  Deviation: the clamps.
  Example:
    >>> kl(jnp.array([[-1.]]), jnp.array([[-1.]]), jnp.array([[True]])).tolist()
    [[0.0]]
  """
  chex.assert_rank([log_probs, reference_log_probs, loss_mask], 2)
  chex.assert_equal_shape([log_probs, reference_log_probs, loss_mask])
  chex.assert_type([log_probs, reference_log_probs, loss_mask], [jnp.float32, jnp.float32, bool])
  check_estimator(estimator)
  reference = jax.lax.stop_gradient(jnp.where(loss_mask, reference_log_probs, 0.0))
  difference = jnp.where(loss_mask, log_probs, 0.0) - reference
  difference = jnp.clip(difference, -MAX_LOG_DIFFERENCE, MAX_LOG_DIFFERENCE)
  value = _kl_value(difference, estimator.removesuffix('+'))
  if estimator.endswith('+'):
    proxy = _kl_value(difference, 'k2')
    value = proxy + jax.lax.stop_gradient(value - proxy)
  return value


def check_estimator(estimator: str):
  """Raises a ValueError that lists the known estimators unless `estimator` is one of them."""
  if estimator.removesuffix('+') not in KL_ESTIMATORS:
    raise ValueError(f'KL estimator {estimator!r} is none of {", ".join(KL_ESTIMATORS)}, with or '
                     "without a '+'")


def _kl_value(difference, estimator):
  if estimator == 'k1':
    return difference
  if estimator == 'k2':
    return 0.5 * jnp.square(difference)
  if estimator == 'abs':
    return jnp.abs(difference)
  return jnp.clip(jnp.exp(-difference) + difference - 1.0, -MAX_KL, MAX_KL)


def entropy(entropies: chex.Array, loss_mask: chex.Array) -> chex.Array:
  """Returns the entropy of the policy at each token; a negative coefficient keeps the policy broad.

  Args:
    entropies: [B, T] float32, nats. Of the distribution that token t is drawn from.
    loss_mask: [B, T] bool.
  """
  chex.assert_rank([entropies, loss_mask], 2)
  chex.assert_equal_shape([entropies, loss_mask])
  chex.assert_type([entropies, loss_mask], [jnp.float32, bool])
  return jnp.where(loss_mask, entropies, 0.0)


def value_loss(values: chex.Array, old_values: chex.Array, returns: chex.Array,
               loss_mask: chex.Array, *, clip: float | None = 0.5) -> chex.Array:
  """Returns the squared error of the value head, pessimistic about large moves.

      loss = max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2

  Args:
    values: [B, T] float32. Of the policy being trained, before token t.
    old_values: [B, T] float32. Of the policy before the update.
    returns: [B, T] float32. Targets.
    loss_mask: [B, T] bool.
    clip: Furthest useful move, in the unit of the reward; None for the plain squared error.
  Source: PPO's reference code, openai/baselines.  Deviation: none.
  """
  chex.assert_rank([values, old_values, returns, loss_mask], 2)
  chex.assert_equal_shape([values, old_values, returns, loss_mask])
  chex.assert_type([values, old_values, returns], jnp.float32)
  values = jnp.where(loss_mask, values, 0.0)
  old_values = jax.lax.stop_gradient(jnp.where(loss_mask, old_values, 0.0))
  returns = jax.lax.stop_gradient(jnp.where(loss_mask, returns, 0.0))
  loss = jnp.square(values - returns)
  if clip is not None:
    bounded = jnp.clip(values, old_values - clip, old_values + clip)
    loss = jnp.maximum(loss, jnp.square(bounded - returns))
  return 0.5 * loss
