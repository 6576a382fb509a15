"""Which turns could be run at all."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base


@base.SHAPINGS.register('executable')
class Executable:
  """Part of turns 'executable': 1 for a turn whose calls were all valid and all succeeded, and for the last one; else 0.

  Source: SPA-RL's grounding signal; that a call which failed counts as not executable is our reading.
  """

  needs = ()
  names = ()
  turn_names = ('executable',)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, list[float]]]:
    """Returns the part of each trajectory."""
    del iteration
    return [{'executable': [float(k == len(t.turns) - 1 or _runs(turn)) for k, turn in enumerate(t.turns)]}
            for t in trajectories]


def _runs(turn: types.Turn) -> bool:
  return bool(turn.calls) and all(c.error is None for c in turn.calls) and all(r.ok for r in turn.results)
