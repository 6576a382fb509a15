"""Generalised advantages over turns, and over turns and their tokens; what trains a value a turn.

Axes: B rows, T tokens, N trajectories.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import advantages, choices, clips, credit, gae, regularisers, turns
from agentrl.algorithms.channel import Advantage, Estimate, Regulariser
from agentrl.core import masked

FAR = 10.0


@choices.ADVANTAGES.register('turn_gae')
def turn_gae(*, gamma: float = 0.99, lam: float = 0.95, whiten: bool = True, part: str = 'total',
             turn_part: str = '') -> Advantage:
  """Makes an estimator whose steps are turns: one value and one advantage each.

      delta_k = r_k + gamma V_(k+1) - V_k,     A_k = delta_k + gamma lam A_(k+1)

  V_k is the value predicted where turn k begins, from the prompt or the observation before it. Every
  token of the turn gets A_k and, as the value head's target, A_k + V_k; train the head with
  regulariser 'turn_value', which reads the first token of each turn alone.

  Args:
    gamma: Discount a turn. 0.9 to 0.99 in the release, by environment.
    lam: Weight of longer returns.
    whiten: Whether the advantages of turns get mean 0 and variance 1 over the batch. Over turns
      rather than their tokens: our choice.
    part: Reward of the last turn.
    turn_part: Reward part of turns that is added; '' for none.
  Source: VL-DAC, code corl-team/VL-DAC, whose value head sends no gradient into the trunk: that is
    `model.value_gradient`.  Deviation: whitening over turns.
  """
  choices.check_unit(gamma=gamma, lam=lam)

  def estimate(batch, loss_mask):
    found = turns.find(batch, loss_mask)
    given = turns.rewards(batch, loss_mask, found, choices.reward_of(batch, part), turn_part)
    steps = jnp.where(found.first, turns.on_turns(given, found), 0.0)
    raw, targets = gae.gae(steps, batch.values, found.first, batch.segment_ids, gamma=gamma, lam=lam)
    raw = advantages.global_whiten(raw, found.first) if whiten else raw
    return Estimate(turns.on_turns(raw, found), turns.on_turns(targets, found))

  return Advantage('turn_gae', estimate, level='token', needs_values=True, gives_returns=True)


@choices.ADVANTAGES.register('bilevel_gae')
def bilevel_gae(*, gamma: float = 1.0, lam: float = 1.0, turn_gamma: float = 0.99,
                whiten: bool = True, part: str = 'total', turn_part: str = '') -> Advantage:
  """Makes an estimator of two levels: over turns first, then over the tokens inside each.

      A_k = GAE(turn_gamma, lam) over turns, with V_k the value at the last token of turn k
      A_t = GAE(gamma, lam) over the tokens of turn k, whose last token is rewarded A_k + V_k

  With `turn_gamma` = `gamma` = `lam` = 1 it is the plain estimator over tokens; where every turn is
  one token it is the plain one with `turn_gamma`.

  Args:
    gamma: Discount a token, within its turn.
    lam: Weight of longer returns, at both levels.
    turn_gamma: Discount a turn. 0.99 is our choice.
    whiten: Whether advantages get mean 0 and variance 1 over the tokens of the batch.
    part: Reward of the last turn.
    turn_part: Reward part of turns that is added; '' for none.
  Source: RAGEN, arXiv 2504.20073; the recursion is recalled, not checked.  Deviation: none known.
  """
  choices.check_unit(gamma=gamma, lam=lam, turn_gamma=turn_gamma)

  def estimate(batch, loss_mask):
    found = turns.find(batch, loss_mask)
    given = turns.rewards(batch, loss_mask, found, choices.reward_of(batch, part), turn_part)
    _, ends = gae.gae(given, batch.values, found.last, batch.segment_ids, gamma=turn_gamma, lam=lam)
    raw, targets = gae.gae(ends, batch.values, loss_mask, found.ids, gamma=gamma, lam=lam)
    return Estimate(advantages.global_whiten(raw, loss_mask) if whiten else raw, targets)

  return Advantage('bilevel_gae', estimate, level='token', needs_values=True, gives_returns=True)


@choices.REGULARISERS.register('turn_value')
def turn_value(*, clip: float | None = 0.5) -> Regulariser:
  """Makes the value head's regression at the first token of each turn.

  Under aggregation 'tok_mean' it is the mean over turns.

  Args:
    clip: Furthest useful move of a value; None for no limit.
  """
  def function(outputs, batch):
    return regularisers.value_loss(outputs.values, batch.values, batch.returns, batch.loss_mask,
                                   clip=clip)

  def where(batch):
    weights = credit.broadcast(batch.weights, batch.trajectory_ids, batch.loss_mask)
    first = turns.find(batch, weights != 0).first
    per_turn = masked.safe_divide(jnp.sum(weights), masked.masked_sum(weights, first))
    return jnp.where(first, per_turn, 0.0)

  return Regulariser('turn_value', function, needs_values=True, where=where)


def cut_far(ratio: chex.Array, advantages_: chex.Array, log_probs: chex.Array, *, low: float = 0.1,
            high: float = 0.1) -> clips.Clipped:
  """Clips as `clips.asym` does, and takes the clipped term alone where a ratio is above 10.

  There a bad token's loss is bounded too, and its gradient is 0.

  Args:
    low: Distance of the lower bound from 1.
    high: Distance of the upper bound from 1.
  Source: VL-DAC, code corl-team/VL-DAC.  Deviation: decided token by token; the release decides for
    a whole micro-batch, by its largest ratio, so that the loss depends on how rows are split.
  """
  clipped = clips.asym(ratio, advantages_, log_probs, low=low, high=high)
  bounded = jax.lax.stop_gradient(-advantages_ * (1.0 + high))
  far = (ratio > FAR) & (advantages_ < 0)
  return clips.Clipped(jnp.where(far, bounded, clipped.loss), clipped.low,
                       clipped.high | far)


@choices.CLIPS.register('cut_far')
def _cut_far(ratio, advantages_, log_probs, batch, *, low: float = 0.1, high: float = 0.1):
  del batch
  return cut_far(ratio, advantages_, log_probs, low=low, high=high)
