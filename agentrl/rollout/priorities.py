"""Which of the sessions that want a slot gets one first: rules, found by name."""

from __future__ import annotations

from typing import Callable

from agentrl.core import registry
from agentrl.core.types import Trajectory
from agentrl.rollout.session import Session

# From a session and what is known of others to a number; the smallest goes first.
Rule = Callable[[Session, 'Outlook'], float]

PRIORITIES: registry.Registry[Rule] = registry.Registry('priority')


class Outlook:
  """How long trajectories turn out, by task."""

  def __init__(self):
    self._sums: dict[str, tuple[int, int]] = {}
    self._all = 0, 0

  def note(self, trajectory: Trajectory):
    """Counts a trajectory that has ended."""
    n = trajectory.num_sampled
    tokens, count = self._sums.get(trajectory.task.id, (0, 0))
    self._sums[trajectory.task.id] = tokens + n, count + 1
    self._all = self._all[0] + n, self._all[1] + 1

  def tokens(self, task_id: str) -> float:
    """Returns the tokens that a trajectory of a task is expected to draw: the mean of its others, else of all."""
    tokens, count = self._sums.get(task_id, self._all)
    return tokens / count if count else 0.0


@PRIORITIES.register('begun')
def begun(session: Session, outlook: Outlook) -> float:
  """What has begun before what has not: few are under way, and what they hold is little."""
  del outlook
  return float(not session.num_turns)


@PRIORITIES.register('longest')
def longest(session: Session, outlook: Outlook) -> float:
  """What is expected to draw most before what will soon be done, so that it does not end alone."""
  return session.trajectory.num_sampled - outlook.tokens(session.trajectory.task.id)


@PRIORITIES.register('oldest')
def oldest(session: Session, outlook: Outlook) -> float:
  """What was asked for under an older policy before what is newer."""
  del outlook
  return session.trajectory.policy_version
