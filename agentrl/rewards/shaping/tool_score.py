"""Full marks for a right answer; for a wrong one, what its calls were worth."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('tool_score')
class ToolScore:
  """Replaces the total: format first, then the answer, then the calls.

      total = 0            where the format is broken
              full         where the answer is right
              mean of the turns' scores before the first negative one, trailing zeros left out; 0 if none is left

  Source: AdaReasoner (Tool-GRPO), as released; full is 8, and 3 in a variant, with scores from 0 to 4.  Deviation:
    none, given the scores of the turns.
  Example:
    >>> [ToolScore().of_turns(x) for x in ([4, 2, 0], [4, -1, 4], [-1], [0, 4, 0, 0])]
    [3.0, 4.0, 0.0, 2.0]
  """

  names = ('total',)
  turn_names = ()

  def __init__(self, full: float = 8.0, part: str = 'accuracy', turn_part: str = 'call_score'):
    """Binds the settings.

    Args:
      full: Reward of a right answer.
      part: 1 for a right answer.
      turn_part: Scores of the turns; negative ones end the count.
    """
    self._full, self._part, self._turn_part = full, part, turn_part
    self.needs = ('format', part, turn_part)

  def of_turns(self, scores: Sequence[float]) -> float:
    """Returns the reward of a wrong answer after such turns."""
    end = next((i for i, score in enumerate(scores) if score < 0), len(scores))
    counted = list(scores[:end])
    while counted and counted[-1] == 0:
      counted.pop()
    return sum(counted) / len(counted) if counted else 0.0

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the total of each trajectory."""
    del iteration
    return [{'total': self._total(t)} for t in trajectories]

  def _total(self, trajectory: types.Trajectory) -> float:
    if not trajectory.rewards['format']:
      return 0.0
    if trajectory.rewards[self._part] >= 1:
      return self._full
    return self.of_turns(trajectory.turn_rewards[self._turn_part])
