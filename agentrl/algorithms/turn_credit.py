"""Advantages of turns from their own rewards, without a value head.

Axes: B rows, T tokens, N trajectories. Comparisons span the trajectories that are in the batch, in
the loss of the channel and in the baseline.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from agentrl.algorithms import advantages, choices, credit, turns
from agentrl.algorithms.channel import Advantage, Estimate
from agentrl.core import masked


@choices.ADVANTAGES.register('disc_segment_return')
def disc_segment_return(*, gamma: float = 1.0, group_baseline: bool = False, part: str = 'total',
                        turn_part: str = '') -> Advantage:
  """Makes an estimator that gives a turn its discounted return.

      A_k = r_k + gamma A_(k+1)           on every token of turn k

  Args:
    gamma: Discount a turn; 1 or 0.95 in ROLL's examples.
    group_baseline: Whether the final reward is taken less its group's mean. Needed with clip
      'one_sided_neg' where rewards are 0 and 1, whose second half would never act: our choice.
    part: Reward of the last turn.
    turn_part: Reward part of turns that is added; '' for none.
  Source: IPA (ROME), section 3.2.4; alibaba/ROLL.  Deviation: the baseline.
  """
  choices.check_unit(gamma=gamma)

  def estimate(batch, loss_mask):
    final, found = choices.reward_of(batch, part), turns.find(batch, loss_mask)
    if group_baseline:
      final = advantages.group_center(final, advantages.dense_groups(batch.group_ids),
                                      batch.baseline_mask, final.shape[0])
    given = turns.rewards(batch, loss_mask, found, final, turn_part)
    return Estimate(turns.on_turns(turns.returns(given, batch, found, gamma), found))

  return Advantage('disc_segment_return', estimate, level='token',
                   min_group=2 if group_baseline else 1)


@choices.ADVANTAGES.register('step_z')
def step_z(*, turn_part: str, ddof: int = 0, eps: float = 1e-6) -> Advantage:
  """Makes an estimator that compares the reward of each turn with those of all turns of its group.

      A_k = (r_k - mean) / (std + eps)          over all turns of the group

  Args:
    turn_part: Reward part of turns.
    ddof: Of the deviation.
    eps: Added to it.
  Source: OPRL (iStar).  Deviation: none from the paper; the release's baseline reads the first-seen
    turn of each trajectory only.
  """
  def estimate(batch, loss_mask):
    found = turns.find(batch, loss_mask)
    given = turns.rewards(batch, loss_mask, found, turn_part=turn_part)
    z = turns.compare(given, turns.groups(batch), found.last, turns.counted(batch, found.last),
                      ddof=ddof, eps=eps)
    return Estimate(turns.on_turns(z, found))

  return Advantage('step_z', estimate, level='token')


@choices.ADVANTAGES.register('z_per_turn_index')
def z_per_turn_index(*, turn_part: str, gamma: float = 0.9, std: bool = True, ddof: int = 0,
                     eps: float = 1e-6, min_count: int = 2, alone: str = 'raw') -> Advantage:
  """Makes an estimator that compares a turn's return with the same turn of the group's others.

      G_k = r_k + gamma G_(k+1)
      A_k = (G_k - mean) / (std + eps)    over trajectories of the group that have a turn k

  Args:
    turn_part: Reward part of turns.
    gamma: Discount a turn; 0 compares the rewards of turns themselves.
    std: Whether to divide by the deviation.
    ddof: Of the deviation.
    eps: Added to it.
    min_count: Trajectories that must have turn k.
    alone: What it gets where they are fewer: 'raw' for its return, or 'zero'.
  Source: MatchTIR, code quchangle1/MatchTIR: the defaults. CM2, code
    namezhenzhang/CM2-RLCR-Tool-Agent: gamma=0, std=False, min_count=5, alone='zero'.
    Deviation: none.
  """
  choices.check_unit(gamma=gamma)

  def estimate(batch, loss_mask):
    found = turns.find(batch, loss_mask)
    given = turns.rewards(batch, loss_mask, found, turn_part=turn_part)
    total = turns.returns(given, batch, found, gamma)
    keys = turns.pairs(turns.groups(batch), jnp.where(found.last, batch.turn_ids, -1))
    z = turns.compare(total, keys, found.last, turns.counted(batch, found.last), std=std, ddof=ddof,
                      eps=eps, min_count=min_count, alone=alone)
    return Estimate(turns.on_turns(z, found))

  return Advantage('z_per_turn_index', estimate, level='token',
                   min_group=min_count if alone == 'zero' else 1)


@choices.ADVANTAGES.register('state_z')
def state_z(*, gamma: float = 0.95, std: bool = True, eps: float = 1e-6, part: str = 'total',
            turn_part: str = '', state_part: str = 'state') -> Advantage:
  """Makes an estimator that compares the turns of a group that began in the same state.

      G_k = r_k + gamma G_(k+1),     A_k = (G_k - mean) / (std + eps)    over turns from that state

  A turn whose state no other turn of its group began in gets 0.

  Args:
    gamma: Discount a turn; 0.95 in ROLL's examples.
    std: Whether to divide by the deviation.
    eps: Added to it.
    part: Reward of the last turn.
    turn_part: Reward part of turns that is added; '' for none.
    state_part: Token part with the state's number: 'state', the last observation, 'history', all of
      them so far, or 'node'.
  Source: GiGPO, arXiv 2505.10978.  Deviation: none known.
  """
  choices.check_unit(gamma=gamma)

  def estimate(batch, loss_mask):
    found = turns.find(batch, loss_mask)
    given = turns.rewards(batch, loss_mask, found, choices.reward_of(batch, part), turn_part)
    total = turns.returns(given, batch, found, gamma)
    state = jnp.where(found.last, batch.token_parts[state_part].astype(jnp.int32), -1)
    z = turns.compare(total, turns.pairs(turns.groups(batch), state), found.last,
                      turns.counted(batch, found.last), std=std, eps=eps)
    return Estimate(turns.on_turns(z, found))

  return Advantage('state_z', estimate, level='token')


@choices.ADVANTAGES.register('suffix_sum')
def suffix_sum(*, turn_part: str, alpha: float = 0.1, part: str = 'total', by_root: bool = False,
               eps: float = 1e-6) -> Advantage:
  """Makes an estimator that adds what later turns were worth, and the outcome, to each turn.

      A_k = sum over j >= k of alpha s_j, + z of the outcome
      s_j = (r_j - mean_g) / (std_g + eps)

  The mean is that of the trajectories' means and the variance that of their mean squares, so that
  each trajectory of the group weighs the same however many turns it has.

  Args:
    turn_part: Reward part of turns.
    alpha: Weight of the turns. 0.1 in the documentation, 0.2 in the script, and 0 after 20 epochs.
    part: Outcome.
    by_root: Whether to divide a trajectory's s by the root of its number of turns.
    eps: Added to deviations.
  Source: ADCA-GRPO (AgentEvolver), code modelscope/AgentEvolver adca_grpo.py.  Deviation: none.
  """
  def estimate(batch, loss_mask):
    found, groups = turns.find(batch, loss_mask), advantages.dense_groups(batch.group_ids)
    given = turns.rewards(batch, loss_mask, found, turn_part=turn_part)
    steps = balanced_z(given, found.last, batch.trajectory_ids, groups, batch.baseline_mask, eps=eps)
    if by_root:
      count = credit.of_trajectory(
          _per_trajectory(found.last.astype(jnp.float32), batch.trajectory_ids, groups.size),
          batch.trajectory_ids)
      steps = masked.safe_divide(steps, jnp.sqrt(jnp.maximum(count, 1.0)))
    outcome = choices.reward_of(batch, part)
    outcome = advantages.group_z(outcome, groups, batch.baseline_mask, groups.size, eps=eps)
    given = alpha * steps + turns.rewards(batch, loss_mask, found, outcome)
    return Estimate(turns.on_turns(turns.returns(given, batch, found), found))

  return Advantage('suffix_sum', estimate, level='token', min_group=2)


def balanced_z(x: chex.Array, marked: chex.Array, trajectory_ids: chex.Array, group_ids: chex.Array,
               baseline_mask: chex.Array, *, eps: float = 1e-6) -> chex.Array:
  """Returns z-scores of marked numbers in their group, in which each trajectory weighs the same.

      mean = mean over i of mean over k of x_ik,   variance = mean over i of mean over k (x_ik - mean)^2

  Args:
    x: [B, T] float32.
    marked: [B, T] bool.
    trajectory_ids: [B, T] int32, -1 where padded.
    group_ids: [N] int32, from 0 to N - 1.
    baseline_mask: [N] bool.
    eps: Added to the deviation.
  Returns:
    [B, T] float32, gradient stopped; 0 where not marked and where the group's numbers are equal.
  """
  n = group_ids.size
  x = jax.lax.stop_gradient(jnp.where(marked, x, 0.0))
  of_token = lambda y: credit.of_trajectory(y[group_ids], trajectory_ids)
  count = _per_trajectory(marked.astype(jnp.float32), trajectory_ids, n)
  present = baseline_mask & (count > 0)

  def group_mean(y):
    means = masked.safe_divide(_per_trajectory(y, trajectory_ids, n), count)
    totals = jax.ops.segment_sum(jnp.where(present, means, 0.0), group_ids, num_segments=n)
    holders = jax.ops.segment_sum(present.astype(jnp.float32), group_ids, num_segments=n)
    return masked.safe_divide(totals, holders)

  away = jnp.where(marked, x - of_token(group_mean(x)), 0.0)
  variance = of_token(group_mean(jnp.square(away)))
  inside = marked & credit.of_trajectory(present, trajectory_ids)
  ids = jnp.where(inside, credit.of_trajectory(group_ids, trajectory_ids), n).reshape(-1)
  largest, smallest = (of_token(f(x.reshape(-1), ids, num_segments=n + 1)[:n])
                       for f in (jax.ops.segment_max, jax.ops.segment_min))
  # Rounding errors of equal numbers must not be blown up.
  differ = marked & (largest > smallest)
  return jnp.where(differ, away / (jnp.sqrt(variance) + jnp.where(differ, eps, 1.0)), 0.0)


def _per_trajectory(x, trajectory_ids, size):
  """Sums over the tokens of each trajectory: [N] float32."""
  ids = jnp.where(trajectory_ids >= 0, trajectory_ids, size).reshape(-1)
  return jax.ops.segment_sum(x.reshape(-1), ids, num_segments=size + 1)[:size]
