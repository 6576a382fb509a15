"""Where sampler and learner disagree on a token's probability: leave it out, or weigh it down.

    r_t = exp(b_t - s_t)          b the learner's behaviour log-prob, s the sampler's

Needs `rl.recompute_behaviour`: without it b is s, and nothing happens. With it, b is of the policy before the update,
and the ratio also corrects for what an older policy has sampled (`rl.staleness`): weights capped at a bound are
truncated importance weights.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from agentrl.algorithms import choices, ratios
from agentrl.core import masked

# 'product' is the whole sequence's ratio, 'sequence' its geometric mean; 'segment_product' and 'segment' of a turn.
LEVELS = ('token', 'segment', 'sequence', 'product', 'segment_product')


@choices.MAPS.register('mismatch_mask')
def mismatch_mask(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *,
                  level: str = 'segment', low: float = 0.8, high: float = 1.2,
                  part: str = 'sampler_log_prob') -> chex.Array:
  """Takes the advantage away where the mean ratio lies outside a band.

      A <- A [low <= r <= high],     r = exp(mean of b - s over the token, turn or sequence)

  What is taken away still counts in the aggregation's denominators.

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    level: One of `LEVELS`; IPA's is 'segment', its chunk. The products take the sum instead of the mean.
    low: Lower bound; 0 for IPA, which has only an upper one.
    high: Upper bound. IPA's value was not found; the band is ROLL's.
    part: Token part with the sampler's log-probs.
  Raises:
    ValueError: if `level` is unknown.
  Source: IPA (ROME), section 3.2.4; alibaba/ROLL base_config.py.  Deviation: none.
  """
  outside = _outside(batch, loss_mask, level=level, low=low, high=high, part=part)
  return jnp.where(outside, 0.0, advantages)


@choices.marks('mismatch_mask')
def _outside(batch, loss_mask, *, level='segment', low=0.8, high=1.2, part='sampler_log_prob'):
  ratio = mismatch(batch, loss_mask, level, part)
  return (ratio < low) | (ratio > high)


@choices.MAPS.register('mismatch_weight')
def mismatch_weight(batch: Any, advantages: chex.Array, loss_mask: chex.Array, *,
                    level: str = 'token', cap: float = 2.0, veto: float = 0.0,
                    part: str = 'sampler_log_prob') -> chex.Array:
  """Weighs by the ratio, at most `cap`, and drops sequences in which a token is far off.

      A <- A min(r, cap) [all r_t of the sequence >= veto]

  Args:
    batch: A TrainBatch.
    advantages: [B, T] float32.
    loss_mask: [B, T] bool.
    level: One of `LEVELS`.
    cap: Largest weight; 2 in CM2, 1.2 in ROLL.
    veto: Smallest ratio of a token that is put up with; 1e-4 in CM2, 0 for none.
    part: Token part with the sampler's log-probs.
  Raises:
    ValueError: if `level` is unknown.
  Source: CM2, code namezhenzhang/CM2-RLCR-Tool-Agent; alibaba/ROLL.  Deviation: none.
  """
  worst = -masked.row_segment_max(-mismatch(batch, loss_mask, 'token', part), batch.segment_ids)
  weight = jnp.minimum(mismatch(batch, loss_mask, level, part), cap)
  return jnp.where(worst >= veto, advantages * weight, 0.0)


@choices.marks('mismatch_weight')
def _bounded(batch, loss_mask, *, level='token', cap=2.0, veto=0.0, part='sampler_log_prob'):
  worst = -masked.row_segment_max(-mismatch(batch, loss_mask, 'token', part), batch.segment_ids)
  return (mismatch(batch, loss_mask, level, part) > cap) | (worst < veto)


def mismatch(batch: Any, loss_mask: chex.Array, level: str, part: str) -> chex.Array:
  """Returns the geometric mean of the ratios r at a level, or their product, [B, T] float32; 1 outside the loss mask.

  A token whose sampling log-prob is unknown, NaN, counts as agreed upon.

  Args:
    batch: A TrainBatch.
    loss_mask: [B, T] bool.
    level: One of `LEVELS`.
    part: Token part with the sampler's log-probs.
  Raises:
    ValueError: if `level` is unknown.
  """
  if level not in LEVELS:
    raise ValueError(f'level={level!r} is none of {", ".join(LEVELS)}')
  sampler = batch.token_parts[part]
  behaviour = jnp.where(loss_mask, batch.behaviour_log_probs, 0.0)
  sampler = jnp.where(jnp.isfinite(sampler), sampler, behaviour)
  if level == 'token':
    return ratios.token(behaviour, sampler, loss_mask)
  if level in ('segment', 'segment_product'):
    of_turn = ratios.segment_geo if level == 'segment' else ratios.segment_prod
    return of_turn(behaviour, sampler, loss_mask, batch.segment_ids, batch.turn_ids)
  whole = ratios.trajectory_prod if level == 'product' else ratios.sequence_geo
  return whole(behaviour, sampler, loss_mask, batch.segment_ids)
