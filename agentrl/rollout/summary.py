"""What a batch of trajectories shows, as plain numbers."""

from __future__ import annotations

import collections
import math
from typing import Sequence

import numpy as np

from agentrl.core.types import Trajectory


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
  """Returns the metrics of scored trajectories.

  'success' and 'reward' are means over trajectories, 'entropy' (nats) over sampled tokens, 'failed_call_rate' over
  calls (0 without any), 'status/...' shares of trajectories.
  """
  n = max(1, len(trajectories))
  results = [r for t in trajectories for r in t.results]
  entropies = [s.entropies[s.sampled] for t in trajectories for s in t.segments]
  sampled = sum(len(e) for e in entropies)
  # Those of words that were put where they were not drawn are unknown.
  entropies = np.concatenate([np.zeros(0), *entropies])
  entropies = entropies[np.isfinite(entropies)]
  statuses = collections.Counter(t.status.value for t in trajectories)
  rewards = [t.rewards.get('total', math.nan) for t in trajectories]
  return {
      'success': sum(t.rewards.get('success', 0.0) for t in trajectories) / n,
      'reward': float(np.mean(rewards)) if trajectories else math.nan,
      'reward_std': float(np.std(rewards)) if trajectories else math.nan,
      'entropy': float(entropies.sum() / max(1, len(entropies))),
      'calls_per_task': len(results) / n,
      'failed_call_rate': sum(not r.ok for r in results) / max(1, len(results)),
      'response_tokens': sampled / n,
      'turns': sum(len(t.turns) for t in trajectories) / n,
      **{f'status/{k}': v / n for k, v in sorted(statuses.items())},
  }


def staleness(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
  """Returns how old what was sampled is, in steps: the tokens' mean and maximum, and the share not drawn in this step.

  Args:
    trajectories: Sampled with versions, see `Segment.versions`.
    step: Steps of the stage done.
  """
  versions = np.concatenate([np.zeros(0, int), *(s.versions for t in trajectories for s in t.segments)])
  lags = step - versions[versions >= 0]
  lags = lags if len(lags) else np.zeros(1)
  return {'staleness/mean': float(lags.mean()), 'staleness/max': float(lags.max()),
          'staleness/share': float((lags > 0).mean())}


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
  """Returns the Wilson score interval of a share, at 95 % by default.

  Example:
    >>> low, high = wilson_interval(0, 10)
    >>> low, round(high, 4)
    (0.0, 0.2775)
  """
  if n == 0:
    return 0.0, 1.0
  p = successes / n
  middle = p + z * z / (2 * n)
  spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))
