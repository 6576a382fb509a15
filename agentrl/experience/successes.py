"""What was solved of late, given back to be imitated."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.core.types import Iteration, Trajectory
from agentrl.experience import base


@base.MEMORIES.register('successes')
class Successes(base.Memory):
  """Keeps the latest successes, one a question, and gives some of them back at every step.

  They are to have a channel of their own: rows 'replayed', ratio 'off', clip 'log_likelihood'.

  Source: the imitation term of IPA (ROME).  Deviation: our choice of what is imitated; the source has expert prefixes.
  """

  def __init__(self, size: int = 128, most: int = 16, part: str = 'success'):
    """Makes an empty memory.

    Args:
      size: Successes that are kept.
      most: That come back at a step, drawn at random.
      part: Reward part above 0 for a success.
    Raises:
      ValueError: if a number is below 1.
    """
    if min(size, most) < 1:
      raise ValueError(f'size={size} and most={most} must be at least 1')
    self._size, self._most, self._part = size, most, part
    self.needs = (part,)
    self.trajectories = []

  def max_replayed(self, trajectories: int) -> int:
    """Returns the most that come back."""
    del trajectories
    return self._most

  def exchange(self, fresh: Sequence[Trajectory], rng: np.random.Generator, iteration: Iteration) -> list[Trajectory]:
    """Returns the fresh trajectories and some successes of earlier steps."""
    del iteration
    kept = self.trajectories
    chosen = sorted(rng.choice(len(kept), min(self._most, len(kept)), replace=False)) if kept else []
    back = [base.replayed(kept[i]) for i in chosen]
    latest = {t.task.id: t for t in kept}
    for t in fresh:
      if t.rewards[self._part] > 0:
        latest.pop(t.task.id, None)
        latest[t.task.id] = t
    self.trajectories = list(latest.values())[-self._size:]
    return [*fresh, *back]
