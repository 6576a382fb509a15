"""Clip-Cov and KL-Cov: the few tokens whose likely choice was good, and which use entropy up.

    c_t = (A_t - mean A)(l_t - mean l)          over the tokens in the loss

Both means and the choice of tokens span the batch, so they are made before the loss, from the
behaviour's log-probs. The releases take the present ones of a minibatch: equal at its first update.

Axes: B rows, T tokens, N trajectories.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import choices, credit, ratios
from agentrl.algorithms.channel import Regulariser
from agentrl.core import masked


def covariance(advantages: chex.Array, log_probs: chex.Array, loss_mask: chex.Array) -> chex.Array:
  """Returns c_t, [B, T] float32, 0 outside the loss mask.

  Args:
    advantages: [B, T] float32.
    log_probs: [B, T] float32, nats.
    loss_mask: [B, T] bool.
  """
  away = [x - masked.masked_mean(x, loss_mask)
          for x in (jnp.where(loss_mask, y, 0.0) for y in (advantages, log_probs))]
  return jnp.where(loss_mask, away[0] * away[1], 0.0)


def share_of(ratio: float, loss_mask: chex.Array) -> chex.Array:
  """Returns how many tokens a share of those in the loss is: max(1, floor(ratio n)), int32."""
  count = jnp.sum(loss_mask, dtype=jnp.float32)
  # The product may fall short of a whole number by rounding.
  return jnp.maximum(1, jnp.floor(ratio * count * (1.0 + 1e-6)).astype(jnp.int32))


def token_draws(batch: Any, seed: int = 0) -> chex.Array:
  """Returns a pseudo-random number for each token, [B, T] uint32.

  It follows from seed, step, trajectory, turn and position, whatever row the token lies in.

  Args:
    batch: A TrainBatch.
    seed: Distinguishes uses.
  """
  draws = jnp.full(batch.tokens.shape, seed, jnp.uint32)
  step = jnp.broadcast_to(jnp.asarray(batch.step), batch.tokens.shape)
  for x in (step, batch.trajectory_ids, batch.turn_ids, batch.positions):
    draws = _mix(draws ^ _mix(jnp.asarray(x).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
  return draws


def _mix(x):
  """The finaliser of MurmurHash3: every bit of the input changes half of those of the output."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
  return x ^ (x >> jnp.uint32(16))


def first(count: chex.Array, marked: chex.Array, *order: chex.Array) -> chex.Array:
  """Marks the first `count` of the marked tokens in an order, all of them if they are fewer.

  Args:
    count: int32 scalar.
    marked: [B, T] bool.
    *order: [B, T] each; what to sort by, most important first.
  """
  keys = [(~marked).astype(jnp.int32), *order]
  by_rank = jnp.lexsort([k.reshape(-1) for k in reversed(keys)])
  taken = jnp.arange(marked.size, dtype=jnp.int32) < count
  return jnp.zeros(marked.size, bool).at[by_rank].set(taken).reshape(marked.shape) & marked


@choices.MAPS.register('clip_cov')
def clip_cov(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *, ratio: float = 2e-4,
             low: float = 1.0, high: float = 5.0, seed: int = 0) -> chex.Array:
  """Takes the loss of some tokens of large covariance away, chosen at random.

      A_t <- 0         for max(1, floor(ratio n)) of the tokens with low < c_t < high

  They still count in the aggregation's denominators, as they do in the source.

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool; n is the number of its tokens.
    ratio: Share of tokens; 2e-4, and 0.02 in SPEAR's replay.
    low: Bound of c.
    high: Bound of c; 5, and 40 in SPEAR's replay.
    seed: Of the choice.
  Source: Clip-Cov, arXiv 2505.22617, as in volcengine/verl.  Deviation: behaviour log-probs; tokens
    that the ratio's clip holds already are not set aside.
  """
  c = covariance(advantages, batch.behaviour_log_probs, loss_mask)
  among = loss_mask & (c > low) & (c < high)
  return jnp.where(first(share_of(ratio, loss_mask), among, token_draws(batch, seed)), 0.0, advantages)


@choices.REGULARISERS.register('kl_cov')
def kl_cov(*, ratio: float = 2e-4, channel: int = 0) -> Regulariser:
  """Makes a penalty on the drift of the tokens of largest covariance.

      + |l_t - b_t|         for the max(1, floor(ratio n)) tokens of largest c_t

  0 at the first update on a batch: it needs several, see `rl.minibatches` and `rl.epochs`. The
  source's coefficient is 1, its aggregation that of the policy loss and its clip 'none'.

  Args:
    ratio: Share of tokens.
    channel: Index of the channel whose advantages are read; a config names it.
  Source: KL-Cov, arXiv 2505.22617, as in volcengine/verl.  Deviation: behaviour log-probs in c_t.
  """
  def function(outputs, batch):
    drift = ratios.log_ratio(outputs.log_probs, batch.behaviour_log_probs, batch.loss_mask)
    # The derivative of jnp.abs at 0 is 1, and before the first update all drift is 0.
    return drift * jnp.sign(jax.lax.stop_gradient(drift))

  def where(batch):
    mask = credit.broadcast(batch.weights, batch.trajectory_ids, batch.loss_mask) != 0
    c = covariance(batch.advantages[channel], batch.behaviour_log_probs, mask)
    chosen = first(share_of(ratio, mask), mask, -c, token_draws(batch))
    return jax.lax.stop_gradient(chosen.astype(jnp.float32))

  return Regulariser('kl_cov', function, where=where, needs_drift=True)
