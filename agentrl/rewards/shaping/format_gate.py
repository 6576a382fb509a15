"""A broken format costs; a right answer may earn a little more where several tools were used."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('format_gate')
class FormatGate:
  """Replaces the total.

      total = penalty                         where the format is broken
              score + bonus                   where score > 0 and at least `tools` tools answered
              score                           else

  With a bonus it reads 'tools_used' of the shaping 'tool_use'.

  Source: Dong et al. (ARPO; AEPO has the same): -1, bonus .1 for two tools; TAPO (Goer17/TAPO): -1 and no bonus.
    Deviation: none; the score is the part `part`.
  Example:
    >>> gate = FormatGate(bonus=0.1)
    >>> gate.total(1.0, 0.0, 2), gate.total(1.0, 1.0, 2), gate.total(1.0, 1.0, 1), gate.total(0.0, 1.0, 2)
    (-1.0, 1.1, 1.0, 0.0)
  """

  names = ('total',)
  turn_names = ()

  def __init__(self, penalty: float = -1.0, bonus: float = 0.0, tools: int = 2, part: str = 'accuracy'):
    """Binds the settings.

    Args:
      penalty: Reward of a broken format.
      bonus: Added to the score of an answer that is not wrong and used enough tools.
      tools: How many those are.
      part: Score of the answer.
    """
    self._penalty, self._bonus, self._tools, self._part = penalty, bonus, tools, part
    self.needs = ('format', part, *(('tools_used',) if bonus else ()))

  def total(self, score: float, well_formed: float, tools_used: float) -> float:
    """Returns the reward."""
    if not well_formed:
      return self._penalty
    return score + self._bonus * (score > 0 and tools_used >= self._tools)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the total of each trajectory."""
    del iteration
    return [{'total': self.total(t.rewards[self._part], t.rewards['format'], t.rewards.get('tools_used', 0.0))}
            for t in trajectories]
