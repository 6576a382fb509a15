"""A verdict on each turn: good or bad."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards import chains


@base.SHAPINGS.register('step_label')
class StepLabel:
  """Part of turns 'step_label': plus `size` for a good turn, minus `size` for a bad one.

  In the chain world a turn is good that told something new about a needed fact, or gave the right
  answer: what a labeller that sees the whole trajectory and its outcome could know.

  Source: ADCA-GRPO (AgentEvolver), code modelscope/AgentEvolver: 0.2.  Deviation: a rule instead of
    a language model.
  """

  needs = ()
  names = ()
  turn_names = ('step_label',)

  def __init__(self, size: float = 0.2):
    """Binds the settings.

    Args:
      size: Above 0.
    Raises:
      ValueError: if it is not.
    """
    if size <= 0:
      raise ValueError(f'size={size} must be above 0')
    self._size = size

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, list[float]]]:
    """Returns the part of each trajectory."""
    del iteration
    return [{'step_label': [self._size if good else -self._size for good in _good(t)]}
            for t in trajectories]


def _good(trajectory: types.Trajectory) -> list[bool]:
  found = chains.turn_values(trajectory.task, trajectory)
  return [bool(needed) and value >= 0 for needed, value in zip(found['needed'], found['value'])]
