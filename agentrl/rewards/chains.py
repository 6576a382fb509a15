"""What a trajectory of the chain world achieved, and what each of its turns was worth."""

from __future__ import annotations

import dataclasses
from typing import Mapping, Sequence

from agentrl.core import types
from agentrl.rewards import base
from agentrl.tools import chains


class ChainAccuracy:
  """Parts 'accuracy' and 'success': 1 if the answer is the number, else 0."""

  names = ('accuracy', 'success')

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> Mapping[str, float]:
    right = float(is_right(task, trajectory))
    return {'accuracy': right, 'success': right}


class ChainCalls:
  """Parts 'needed_calls', 'avoidable_calls' and 'missing_calls'.

  'needed_calls' is how many the task takes when nothing fails: a fact about the task.
  'avoidable_calls' counts calls that neither failed for a passing reason nor told a needed fact for
  the first time: of facts that can be known by heart, repeats, wrong facts, malformed calls, noise.
  'missing_calls' counts needed facts that were never found out.
  """

  names = ('needed_calls', 'avoidable_calls', 'missing_calls')

  def __call__(self, task: types.Task, trajectory: types.Trajectory) -> Mapping[str, float]:
    progress = Progress(tuple(task.ground_truth['needed']))
    avoidable = 0
    for turn in trajectory.turns:
      for call, result in zip(turn.calls, turn.results):
        after = progress.after([call], [result])
        avoidable += after == progress and result.error != 'transient'
        progress = after
    return {'needed_calls': float(len(task.ground_truth['needed'])),
            'avoidable_calls': float(avoidable), 'missing_calls': float(len(progress.missing))}


@base.REWARDS.register('chains')
def components() -> list[base.Component]:
  """Returns what scores the tasks of `agentrl.data.chains`."""
  return [ChainAccuracy(), ChainCalls()]


def is_right(task: types.Task, trajectory: types.Trajectory) -> bool:
  """Whether the trajectory ended with the right answer."""
  return (trajectory.answer or '').strip() == task.ground_truth['answer']


@dataclasses.dataclass(frozen=True)
class Progress:
  """What is known of the needed facts.

  Attributes:
    needed: Facts to look up, in order.
    found: Those whose value is known for sure.
    narrowed: Those known to be one of two.
  """

  needed: tuple[str, ...]
  found: frozenset[str] = frozenset()
  narrowed: frozenset[str] = frozenset()

  @property
  def missing(self) -> tuple[str, ...]:
    """Needed facts that are not known for sure, in order."""
    return tuple(name for name in self.needed if name not in self.found)

  def after(self, calls: Sequence[types.ToolCall], results: Sequence[types.ToolResult]) -> Progress:
    """Returns the progress after some calls."""
    found, narrowed = set(self.found), set(self.narrowed)
    for call, result in zip(calls, results):
      name = call.arguments.get('fact')
      if call.name == 'lookup' and name in self.needed and result.ok:
        (narrowed if chains.OR in result.text else found).add(name)
    return dataclasses.replace(self, found=frozenset(found), narrowed=frozenset(narrowed))


def turn_values(task: types.Task, trajectory: types.Trajectory, *, skill: float = 0.8,
                max_turns: int | None = None) -> dict[str, list[float]]:
  """Returns what each turn was truly worth.

      value[k]  = V(after turn k) - V(before turn k)
      V(state)  = skill^(calls still missing + 1 for the answer), or 0 where turns do not suffice
      V(end)    = 1 if the answer is right, else 0

  V is the chance of success of a player that does each needed step right with probability `skill`
  and never does anything else. Over a trajectory the values add up to V(end) - V(start), so they
  are the exact split of its outcome among its turns. A fact narrowed to two is still missing.

  Args:
    task: Of the chain world.
    trajectory: Finished.
    skill: In (0, 1).
    max_turns: Turns that the environment allows; None for no limit.
  Returns:
    By name, one float a turn: 'value', and 'needed': 1 for the answer and for turns with a call that
    told something new about a needed fact, else 0.
  Raises:
    ValueError: if the skill is out of range.
  """
  if not 0.0 < skill < 1.0:
    raise ValueError(f'skill must be in (0, 1), got {skill}')

  def chance(progress: Progress, turns_done: int) -> float:
    steps = len(progress.missing) + 1
    if max_turns is not None and steps > max_turns - turns_done:
      return 0.0
    return skill**steps

  progress = Progress(tuple(task.ground_truth['needed']))
  before = chance(progress, 0)
  values, needed = [], []
  last = len(trajectory.turns) - 1
  for k, turn in enumerate(trajectory.turns):
    after_calls = progress.after(turn.calls, turn.results)
    if k == last:
      now = float(is_right(task, trajectory))
      needed.append(float(trajectory.status == types.Status.FINISHED))
    else:
      now = chance(after_calls, k + 1)
      needed.append(float(after_calls != progress))
    values.append(now - before)
    progress, before = after_calls, now
  return {'value': values, 'needed': needed}
