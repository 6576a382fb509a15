"""Groups that find a task easy count less."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('difficulty_w')
class DifficultyWeight:
  """Part 'difficulty_weight', from 0.5 (easy) to 1 (hard) and the same in all of a group; the total is multiplied by it.

      difficulty_weight = clip(2 - mean total of the group, 0, 1) / 2 + 1 / 2

  It is meant for totals up to 3: accuracy, format and tool use. A factor that a group shares cancels under an advantage
  that divides by the group's deviation: take 'center', or leave the total alone (`in_reward=False`) and multiply the
  advantages with the map 'scale_by_part'.

  Source: VITAL (DGRPO), read on a single secondary page; whether it divides by a deviation was not seen.
    Deviation: unknown.
  Example:
    >>> [difficulty_weight(mean) for mean in (0.5, 1.0, 1.5, 3.0)]
    [1.0, 1.0, 0.75, 0.5]
  """

  needs = ('total',)
  turn_names = ()

  def __init__(self, in_reward: bool = True):
    """Binds the settings.

    Args:
      in_reward: Whether the total is multiplied.
    """
    self._in_reward = in_reward
    self.names = ('difficulty_weight', 'total') if in_reward else ('difficulty_weight',)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the weight of each trajectory, and its new total."""
    del iteration
    totals: dict[str, list[float]] = {}
    for t in trajectories:
      totals.setdefault(t.group_id, []).append(t.rewards['total'])
    weights = {group: difficulty_weight(sum(x) / len(x)) for group, x in totals.items()}
    return [self._parts(t, weights[t.group_id]) for t in trajectories]

  def _parts(self, trajectory: types.Trajectory, weight: float) -> dict[str, float]:
    new = {'difficulty_weight': weight}
    return {**new, 'total': weight * trajectory.rewards['total']} if self._in_reward else new


def difficulty_weight(mean: float) -> float:
  """Returns the weight of a group whose rewards have that mean."""
  return min(max(2.0 - mean, 0.0), 1.0) * 0.5 + 0.5
