"""What can be reached from each step of a group's tree."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base

REACHES = ('any', 'mean')


@base.SHAPINGS.register('descendants')
class Descendants:
  """Parts of turns 'reachable' and 'call_quality'; a step that several trajectories share has one value.

      reachable(step) = max (or mean) of the outcome over the trajectories through the step
      call_quality(step) = share of its calls that were well-formed and did not fail; 0 without calls

  Steps are told apart by who drew them: the group, the sample, the path of the branch and the turn.

  Source: PORTool, from a page about it: any right descendant dominates (its second version); the small term for calls.
    Deviation: none known; the decay over steps was not found, and there is none.
  """

  names = ()
  turn_names = ('reachable', 'call_quality')

  def __init__(self, part: str = 'accuracy', reach: str = 'any'):
    """Binds the settings.

    Args:
      part: Outcome.
      reach: 'any', the best that a trajectory through the step achieved, or 'mean'.
    Raises:
      ValueError: if `reach` is unknown.
    """
    if reach not in REACHES:
      raise ValueError(f'reach={reach!r} is none of {", ".join(REACHES)}')
    self._part, self._reach = part, reach
    self.needs = (part,)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, list[float]]]:
    """Returns the parts of each trajectory."""
    del iteration
    outcomes: dict[Any, list[float]] = {}
    for t in trajectories:
      for turn in t.turns:
        outcomes.setdefault(_step(t, turn), []).append(t.rewards[self._part])
    value = max if self._reach == 'any' else lambda x: sum(x) / len(x)
    return [{'reachable': [value(outcomes[_step(t, turn)]) for turn in t.turns],
             'call_quality': [_quality(turn) for turn in t.turns]} for t in trajectories]


def _step(trajectory: types.Trajectory, turn: types.Turn) -> Any:
  return trajectory.group_id, trajectory.sample, trajectory.drawn_by(turn), turn.index


def _quality(turn: types.Turn) -> float:
  return sum(result.ok for result in turn.results) / len(turn.calls) if turn.calls else 0.0
