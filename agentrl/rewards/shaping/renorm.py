"""Scores of turns that cannot argue with the outcome."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('renorm')
class Renorm:
  """Part of turns 'renormed': a judge's score in [0, 1], moved down by 1 where the outcome is bad.

      renormed[k] = score[k] + outcome - 1        0 at the last turn

  So turns of a success count 0 or more and those of a failure 0 or less. The last turn's reward is the outcome itself,
  which an advantage over tokens ('gae' with 'turn_part') places there from the total.

  Source: PPR with ReNorm, read on a secondary page; how the last turn is handled was not seen.  Deviation: unknown.
  Example:
    >>> renorm([0.75, 0.5, 1.0], 1.0), renorm([0.75, 0.5, 1.0], 0.0)
    ([0.75, 0.5, 0.0], [-0.25, -0.5, 0.0])
  """

  names = ()
  turn_names = ('renormed',)

  def __init__(self, turn_part: str, part: str = 'accuracy'):
    """Binds the settings.

    Args:
      turn_part: Scores of the turns, each in [0, 1].
      part: Outcome, 0 or 1.
    """
    self._turn_part, self._part = turn_part, part
    self.needs = (turn_part, part)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, list[float]]]:
    """Returns the part of each trajectory."""
    del iteration
    return [{'renormed': renorm(t.turn_rewards[self._turn_part], t.rewards[self._part])} for t in trajectories]


def renorm(scores: Sequence[float], outcome: float) -> list[float]:
  """Returns the rewards of turns with such scores."""
  return [score + outcome - 1.0 for score in scores[:-1]] + [0.0] * bool(scores)
