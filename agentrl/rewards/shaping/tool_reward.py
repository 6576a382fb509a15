"""How thrifty a right answer was."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('tool_reward')
class ToolReward:
  """Part 'tool_reward': 1 / (calls + 1) for a right answer, else 0.

  No call at all gives 1.

  Source: HDPO, code Accio-Lab/Metis.  Deviation: none.
  """

  needs = ('accuracy', 'calls')
  names = ('tool_reward',)
  turn_names = ()

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the part of each trajectory."""
    del iteration
    return [{'tool_reward': float(t.rewards['accuracy'] > 0) / (t.rewards['calls'] + 1.0)}
            for t in trajectories]
