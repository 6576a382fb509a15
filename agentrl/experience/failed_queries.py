"""Questions that nobody answered: asked again every few steps."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.core.types import Iteration, Task, Trajectory
from agentrl.experience import base


@base.MEMORIES.register('failed_queries')
class FailedQueries(base.Memory):
  """Puts failed questions in the place of some of the next ones, every few steps; all samples of them are fresh.

  A question has failed when none of its samples succeeded, until one does.

  Source: DeepTravel, read on a secondary page: period and share were not seen, the defaults are our choice.
    Deviation: unknown.
  """

  def __init__(self, every: int = 4, share: float = 0.5, size: int = 1_024, part: str = 'accuracy'):
    """Makes an empty memory.

    Args:
      every: Steps from one replay to the next.
      share: Of a step's questions that are replaced at most, in (0, 1].
      size: Questions that are kept; the oldest are forgotten.
      part: 1 for a success.
    Raises:
      ValueError: if a setting is out of range.
    """
    if min(every, size) < 1 or not 0.0 < share <= 1.0:
      raise ValueError(f'every={every} and size={size} must be at least 1 and share={share} in (0, 1]')
    self._every, self._share, self._size, self._part = every, share, size, part
    self.needs = (part,)
    # One failed sample stands for each question.
    self.trajectories = []

  def max_replayed(self, trajectories: int) -> int:
    """Returns 0: questions come back, samples do not."""
    del trajectories
    return 0

  def ask(self, tasks: Sequence[Task], rng: np.random.Generator, iteration: Iteration) -> list[Task]:
    """Returns the tasks, some of them replaced by failed ones when it is time."""
    due = {task.id for task in tasks}
    failed = [t.task for t in self.trajectories if t.task.id not in due]
    count = min(len(failed), int(self._share * len(tasks)))
    if not iteration.step or iteration.step % self._every or not count:
      return list(tasks)
    again = [failed[i] for i in sorted(rng.choice(len(failed), count, replace=False))]
    return [*tasks[:len(tasks) - count], *again]

  def exchange(self, fresh: Sequence[Trajectory], rng: np.random.Generator, iteration: Iteration) -> list[Trajectory]:
    """Returns the fresh trajectories as they are, and notes which questions failed."""
    del rng, iteration
    best: dict[str, float] = {}
    for t in fresh:
      best[t.task.id] = max(best.get(t.task.id, 0.0), t.rewards[self._part])
    kept = {t.task.id: t for t in self.trajectories if t.task.id not in best}
    for t in fresh:
      if best[t.task.id] < 1:
        kept.setdefault(t.task.id, t)
    self.trajectories = list(kept.values())[-self._size:]
    return list(fresh)
