"""Telling what comes from a memory from what is fresh, and advantages that were estimated elsewhere.

Axes: B rows, T tokens, N trajectories.
"""

from __future__ import annotations

from agentrl.algorithms import choices
from agentrl.algorithms.channel import Advantage, Estimate


@choices.ADVANTAGES.register('given')
def given(*, part: str = 'total', baseline_part: str = '') -> Advantage:
  """Takes a reward part for the advantage, perhaps less another one; compares nothing.

      A_i = R_i - b_i

  For trajectories that come without their group: with what the group once gave, or with a percentile that a memory
  notes on them. With `rl.greedy_baseline` and baseline_part='greedy' it is ReMax.

  Args:
    part: R.
    baseline_part: b; '' for 0.
  Source: the percentile baseline is SPEAR's, the greedy one that of ReMax, arXiv 2310.10505.  Deviation: none.
  Example:
    >>> given(baseline_part='percentile').min_group
    1
  """
  def estimate(batch, loss_mask):
    del loss_mask
    advantages = choices.reward_of(batch, part)
    return Estimate(advantages - choices.reward_of(batch, baseline_part) if baseline_part else advantages)

  return Advantage('given', estimate)


@choices.ROWS.register('fresh')
def fresh(batch, *, part: str = 'replayed'):
  """Returns [N]: 1 for trajectories of this step, 0 for those from a memory."""
  return 1.0 - batch.parts[part]


@choices.ROWS.register('replayed')
def replayed(batch, *, part: str = 'replayed'):
  """Returns [N]: 1 for trajectories from a memory, 0 for those of this step."""
  return batch.parts[part]
