"""The true worth of each turn, in worlds where it is known."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards import chains


@base.SHAPINGS.register('true_values')
class TrueValues:
  """Parts of turns 'true_value' and 'true_need' of the chain world; see `chains.turn_values`.

  What schemes of credit assignment are measured against; as a reward it is an upper bound of what
  they could reach.
  """

  needs = ()
  names = ()
  turn_names = ('true_value', 'true_need')

  def __init__(self, skill: float = 0.8, max_turns: int | None = None):
    """Binds the settings of `chains.turn_values`."""
    self._settings = dict(skill=skill, max_turns=max_turns)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, list[float]]]:
    """Returns the parts of each trajectory."""
    del iteration
    found = [chains.turn_values(t.task, t, **self._settings) for t in trajectories]
    return [{'true_value': f['value'], 'true_need': f['needed']} for f in found]
