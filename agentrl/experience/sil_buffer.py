"""Better than usual, with tools: trajectories that the policy imitates itself in, once enough have come together."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from agentrl.core.types import Iteration, Trajectory
from agentrl.experience import base


@base.MEMORIES.register('sil_buffer')
class SelfImitationBuffer(base.Memory):
  """Keeps what was better than its group and called a tool; gives it back when that is a good deal, and starts anew.

  With p the median of the group means of late, the kept whose reward is above p are counted. Once they are more than
  1.5 `size`, a random power of two of them, `most` at most, comes back, and all is forgotten. The part 'percentile' of
  what comes back is p, and the advantage 'given' with `baseline_part='percentile'` is their distance from it. They come
  back with groups of their own and are to have a channel of their own, with rows 'replayed'.

  Source: SPEAR (TencentYoutuResearch/SPEAR): a window of 10240 group means, 5 to 10 steps of age, subsets up to 2048.
    Deviation: what a step brings is kept for the next, so that no trajectory is trained on twice at once.
  """

  names = ('percentile',)

  def __init__(self, size: int, most: int = 2_048, max_age: int = 10, window: int = 10_240, percentile: float = 50.0,
               part: str = 'total'):
    """Makes an empty memory.

    Args:
      size: Trajectories; 1.5 times as many good ones bring it to give them back.
      most: Trajectories that come back at most.
      max_age: Steps after which a trajectory is dropped.
      window: Group means that the percentile is of.
      percentile: In [0, 100].
      part: Reward part that is compared; reads 'calls' too.
    Raises:
      ValueError: if a setting is out of range.
    """
    if min(size, most, max_age, window) < 1 or not 0.0 <= percentile <= 100.0:
      raise ValueError(f'size={size}, most={most}, max_age={max_age} and window={window} must be at least 1 and '
                       f'percentile={percentile} in [0, 100]')
    self._size, self._most, self._max_age = size, most, max_age
    self._window, self._percentile, self._part = window, percentile, part
    self.needs = (part, 'calls')
    self.trajectories = []

  def max_replayed(self, trajectories: int) -> int:
    """Returns the most that come back."""
    del trajectories
    return self._most

  def exchange(self, fresh: Sequence[Trajectory], rng: np.random.Generator, iteration: Iteration) -> list[Trajectory]:
    """Returns the fresh trajectories and, when the buffer is full of good ones, some of those."""
    groups: dict[str, list[float]] = {}
    for t in fresh:
      groups.setdefault(t.group_id, []).append(t.rewards[self._part])
    means = {group: float(np.mean(rewards)) for group, rewards in groups.items()}
    window = [*iteration.memory.get('means', []), *means.values()][-self._window:]
    iteration.memory['means'] = window
    p = float(np.percentile(window, self._percentile))
    kept = [t for t in self.trajectories if iteration.step - t.policy_version <= self._max_age]
    good = [t for t in kept if t.rewards[self._part] > p]
    back: list[Trajectory] = []
    if len(good) > 1.5 * self._size:
      count = 1 << (min(len(good), self._most).bit_length() - 1)
      back = [base.replayed(good[i], percentile=p) for i in sorted(rng.choice(len(good), count, replace=False))]
      kept = []
    self.trajectories = kept + [t for t in fresh if t.rewards[self._part] > means[t.group_id] and t.rewards['calls']]
    return [*fresh, *back]
