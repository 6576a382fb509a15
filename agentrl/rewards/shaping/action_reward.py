"""How many calls were right, whatever became of the answer."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards import chains


@base.SHAPINGS.register('action_reward')
class ActionReward:
  """Part 'action': how many calls told a needed fact of the chain world for the first time.

  Source: ToolPO (DeepAgent), from its paper: lambda_1 times the right calls, lambda_1 = 1.  Deviation:
    the world's own facts judge a call; the preference for folding the memory is 0, as nothing folds.
  """

  needs = ()
  names = ('action',)
  turn_names = ()

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, float]]:
    """Returns the part of each trajectory."""
    del iteration
    return [{'action': float(_found(t))} for t in trajectories]


def _found(trajectory: types.Trajectory) -> int:
  needed = tuple(trajectory.task.ground_truth['needed'])
  progress = chains.Progress(needed)
  for turn in trajectory.turns:
    progress = progress.after(turn.calls, turn.results)
  return len(needed) - len(progress.missing)
