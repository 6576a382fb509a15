"""Each turn against a list of what a good one does."""

from __future__ import annotations

from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base
from agentrl.rewards import chains


@base.SHAPINGS.register('checklist')
class Checklist:
  """Part of turns 'checklist': the share of the items that a turn of the chain world fulfils.

  A turn that calls: no call failed but for a passing reason; none was made before; something new was
  told about a needed fact. A turn that does not: an answer was given; no needed fact was missing.

  Source: CM2, code namezhenzhang/CM2-RLCR-Tool-Agent.  Deviation: fixed items and a rule; there a
    language model writes the items of each task and judges them.
  """

  needs = ()
  names = ()
  turn_names = ('checklist',)

  def __call__(self, trajectories: Sequence[types.Trajectory],
               iteration: types.Iteration) -> list[Mapping[str, list[float]]]:
    """Returns the part of each trajectory."""
    del iteration
    return [{'checklist': _shares(t)} for t in trajectories]


def _shares(trajectory: types.Trajectory) -> list[float]:
  progress, made, out = chains.Progress(tuple(trajectory.task.ground_truth['needed'])), set(), []
  for turn in trajectory.turns:
    after = progress.after(turn.calls, turn.results)
    calls = {(c.name, repr(sorted(c.arguments.items()))) for c in turn.calls}
    if turn.calls:
      items = [all(r.ok or r.error == 'transient' for r in turn.results), not calls & made,
               after != progress]
    else:
      answered = turn is trajectory.turns[-1] and trajectory.status == types.Status.FINISHED
      items = [answered, not progress.missing]
    # A call that failed for a passing reason may be made again.
    made |= calls if all(r.ok for r in turn.results) else set()
    progress = after
    out.append(sum(items) / len(items))
  return out
