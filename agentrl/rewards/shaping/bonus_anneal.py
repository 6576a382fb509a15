"""A bonus for using tools that fades away: explore first, economise later."""

from __future__ import annotations

import math
from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('bonus_anneal')
class AnnealedBonus:
  """Part 'tool_bonus', added to the total.

      tool_bonus = min(per_turn m, most) (1 + cos(pi step / steps)) / 2         0 from step `steps` on

  m is the number of turns with a call: the part 'tool_turns' of the shaping 'tool_use'.

  Source: SPEAR (TencentYoutuResearch/SPEAR): .1 a turn, at most 1, over 200 steps.  Deviation: none.
  Example:
    >>> bonus = AnnealedBonus(steps=10)
    >>> [round(bonus.bonus(3, step), 3) for step in (0, 5, 10, 20)], bonus.bonus(99, 0)
    ([0.3, 0.15, 0.0, 0.0], 1.0)
  """

  needs = ('tool_turns', 'total')
  names = ('tool_bonus', 'total')
  turn_names = ()

  def __init__(self, steps: int, per_turn: float = 0.1, most: float = 1.0):
    """Binds the settings.

    Args:
      steps: Steps of the stage after which the bonus is gone.
      per_turn: Bonus of a turn with a call, in the reward's unit.
      most: Bonus of a trajectory at most.
    Raises:
      ValueError: if `steps` is not positive.
    """
    if steps < 1:
      raise ValueError(f'steps={steps} must be at least 1')
    self._steps, self._per_turn, self._most = steps, per_turn, most

  def bonus(self, tool_turns: float, step: int) -> float:
    """Returns the part for a number of turns with calls, at a step."""
    share = (1.0 + math.cos(math.pi * step / self._steps)) / 2.0 if step < self._steps else 0.0
    return min(self._per_turn * tool_turns, self._most) * share

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the bonus and the new total of each trajectory."""
    bonuses = [self.bonus(t.rewards['tool_turns'], iteration.step) for t in trajectories]
    return [{'tool_bonus': b, 'total': t.rewards['total'] + b} for t, b in zip(trajectories, bonuses)]
