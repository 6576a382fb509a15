"""The latest success at each question, for when all samples of it fail; solved questions are not asked again."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.core.types import Iteration, Task, Trajectory
from agentrl.experience import base


@base.MEMORIES.register('prompt_success')
class PromptSuccess(base.Memory):
  """Puts an earlier success in the place of one random sample where all samples of a group fail.

  It joins that group, with the log-probs of its own sampling. A question whose share of successes reached `solved` when
  it was last asked is left out from then on; another takes its place.

  Source: RAPO (Fathom-DeepResearch): success is a reward above .5, solved .9.  Deviation: none; the paper prunes at the
    end of an epoch, here a question is left out when it would come up again, which is the same.
  """

  def __init__(self, threshold: float = 0.5, solved: float = 0.9, part: str = 'total'):
    """Makes an empty memory.

    Args:
      threshold: Reward above which a trajectory is a success.
      solved: Share of successes from which on a question is not asked again; above 1 for never.
      part: Reward part that is compared with the threshold.
    """
    self._threshold, self._solved, self._part = threshold, solved, part
    self.needs = (part,)
    self.trajectories = []

  def max_replayed(self, trajectories: int) -> int:
    """Returns 0: what comes back takes another's place."""
    del trajectories
    return 0

  def ask(self, tasks: Sequence[Task], rng: np.random.Generator, iteration: Iteration) -> list[Task]:
    """Returns the tasks that are not solved."""
    del rng
    return [task for task in tasks if task.id not in iteration.memory.get('solved', [])]

  def exchange(self, fresh: Sequence[Trajectory], rng: np.random.Generator, iteration: Iteration) -> list[Trajectory]:
    """Returns the fresh trajectories, one of each failed group replaced."""
    kept = {t.task.id: t for t in self.trajectories}
    solved = iteration.memory.setdefault('solved', [])
    groups: dict[str, list[int]] = {}
    for i, t in enumerate(fresh):
      groups.setdefault(t.group_id, []).append(i)
    out = list(fresh)
    for group, members in groups.items():
      task = fresh[members[0]].task.id
      successes = [i for i in members if fresh[i].rewards[self._part] > self._threshold]
      if len(successes) >= self._solved * len(members):
        solved.append(task)
      if successes:
        kept[task] = fresh[successes[-1]]
      elif task in kept:
        out[int(rng.choice(members))] = base.replayed(kept[task], group)
    self.trajectories = [t for t in kept.values() if t.task.id not in solved]
    return out
