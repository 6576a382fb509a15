"""Whole trajectories ranked by their rewards: the best against the worst."""

from __future__ import annotations

import math
from typing import Mapping, Sequence

import numpy as np

from agentrl.core.types import Iteration, Trajectory
from agentrl.synthesis import pairs


@pairs.MINERS.register('ranked_pairs')
class RankedPairs:
  """Ranks each group by a weighted sum of reward parts and pairs its ends: best with worst, second best with second worst.

      score = sum_k weights[k] * part[k]

  With weights {'success': 1} these are pairs of success and failure, one to one. With a penalty on steps and a reward
  for what was found out it is the ranking of TeaRAG's iterative process-aware DPO (outcome, knowledge sufficiency,
  number of steps; abstract only, so the weights are ours).
  """

  def __init__(self, weights: Mapping[str, float] | None = None, per_group: int = 4, min_gap: float = 1e-6):
    """Binds the settings.

    Args:
      weights: By reward part; None is 1 for 'success'.
      per_group: Most pairs of a group.
      min_gap: Scores that are closer are no preference.
    Raises:
      ValueError: if a weight is not finite, or the others are not above 0.
    """
    self._weights = dict(weights or {'success': 1.0})
    self.needs = tuple(sorted(self._weights))
    if not all(math.isfinite(w) for w in self._weights.values()):
      raise ValueError(f'weights={self._weights} of ranked_pairs must be finite')
    if per_group < 1 or min_gap <= 0:
      raise ValueError(f'per_group={per_group} must be at least 1 and min_gap={min_gap} above 0')
    self._per_group, self._min_gap = per_group, min_gap

  def __call__(self, trajectories: Sequence[Trajectory], rng: np.random.Generator,
               iteration: Iteration) -> list[pairs.Pair]:
    """Returns the pairs; equal scores are paired in random order."""
    del iteration
    return [pair for group in pairs.groups_of(trajectories) for pair in self._of_group(group, rng)]

  def _of_group(self, group: list[Trajectory], rng: np.random.Generator) -> list[pairs.Pair]:
    scores = np.array([sum(w * t.rewards[name] for name, w in self._weights.items()) for t in group])
    order = rng.permutation(len(group))
    order = order[np.argsort(-scores[order], kind='stable')]
    ends = zip(order[:len(group) // 2], order[::-1])
    return [pairs.Pair(pairs.Excerpt(group[i]), pairs.Excerpt(group[j])) for i, j in ends
            if scores[i] - scores[j] >= self._min_gap][:self._per_group]
