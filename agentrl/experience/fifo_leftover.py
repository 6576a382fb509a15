"""What an update left out, in a queue: what falls out of it is trained on after all, now and then."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.core.types import Iteration, Trajectory
from agentrl.experience import base


@base.MEMORIES.register('fifo_leftover')
class FifoLeftover(base.Memory):
  """Keeps the trajectories without priority; the oldest that no longer fit come back, with a probability.

  They come back alone, so their advantage must be one they bring along: the shaping 'priority' gives 'group_z', which
  the advantage 'given' reads. They are to have a channel of their own, with rows 'replayed'.

  Source: RoRecomp, read on a secondary page: the size of the queue and the probability were not seen, the defaults are
    our choice.  Deviation: the compensation is a channel of the same update rather than an update of its own.
  """

  def __init__(self, size: int = 256, probability: float = 0.5, part: str = 'priority'):
    """Makes an empty memory.

    Args:
      size: Trajectories that are kept.
      probability: That those which fall out at a step come back.
      part: 1 for a trajectory with priority, which is not kept.
    Raises:
      ValueError: if a setting is out of range.
    """
    if size < 1 or not 0.0 <= probability <= 1.0:
      raise ValueError(f'size={size} must be at least 1 and probability={probability} in [0, 1]')
    self._size, self._probability, self._part = size, probability, part
    self.needs = (part,)
    self.trajectories = []

  def max_replayed(self, trajectories: int) -> int:
    """Returns the number of fresh ones: no more fall out than come in."""
    return trajectories

  def exchange(self, fresh: Sequence[Trajectory], rng: np.random.Generator, iteration: Iteration) -> list[Trajectory]:
    """Returns the fresh trajectories and those that come back."""
    del iteration
    queue = [*self.trajectories, *(t for t in fresh if not t.rewards[self._part])]
    surplus = max(0, len(queue) - self._size)
    self.trajectories = queue[surplus:]
    back = queue[:surplus] if rng.random() < self._probability else []
    return [*fresh, *(base.replayed(t) for t in back)]
