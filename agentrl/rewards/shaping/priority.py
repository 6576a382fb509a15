"""Which trajectories an update should see first: short right ones and long wrong ones."""

from __future__ import annotations

import math
from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('priority')
class Priority:
  """Parts 'priority' and 'group_z': who trains at once, and the advantage that the others keep for later.

  'priority' is 1 for the shortest share of the right trajectories of a step and the longest share of the wrong ones,
  each rounded up, else 0. 'group_z' is the total's distance from its group's mean in deviations, 0 where all are equal:
  as the whole group gave it.

  Source: RoRecomp, read on a secondary page; the share was not seen.  Deviation: unknown.
  """

  names = ('priority', 'group_z')
  turn_names = ()

  def __init__(self, share: float = 0.5, length: str = 'tokens', part: str = 'accuracy'):
    """Binds the settings.

    Args:
      share: Of the right and of the wrong, in (0, 1]. The default is our choice.
      length: Part that is long or short: 'tokens' or 'calls'.
      part: 1 for a right answer.
    Raises:
      ValueError: if the share is out of range.
    """
    if not 0.0 < share <= 1.0:
      raise ValueError(f'share={share} must lie in (0, 1]')
    self._share, self._length, self._part = share, length, part
    self.needs = (length, part, 'total')

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the parts of each trajectory."""
    del iteration
    first: set[int] = set()
    for right, sign in ((True, 1), (False, -1)):
      own = [i for i, t in enumerate(trajectories) if (t.rewards[self._part] >= 1) == right]
      own.sort(key=lambda i: sign * trajectories[i].rewards[self._length])
      first |= set(own[:math.ceil(self._share * len(own))])
    z = _group_z(trajectories)
    return [{'priority': float(i in first), 'group_z': z[i]} for i in range(len(trajectories))]


def _group_z(trajectories: Sequence[types.Trajectory]) -> list[float]:
  groups: dict[str, list[float]] = {}
  for t in trajectories:
    groups.setdefault(t.group_id, []).append(t.rewards['total'])
  return [_z(t.rewards['total'], groups[t.group_id]) for t in trajectories]


def _z(reward: float, rewards: Sequence[float]) -> float:
  if min(rewards) == max(rewards):
    return 0.0
  mean = sum(rewards) / len(rewards)
  return (reward - mean) / (math.sqrt(sum((r - mean)**2 for r in rewards) / len(rewards)) + 1e-6)
