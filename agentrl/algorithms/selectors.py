"""Which trajectories of a step are trained on, and which count in the baselines: two answers, never one.

Host side, on numpy arrays, before the batch is packed: what is left out costs nothing. A selector is a function
`rule(candidates, rng, **options) -> Selection`, registered under its own name; those of a config are applied in order,
each to what the ones before it left. It is tried without candidates when a run starts, so it checks its options first.

Axes: N trajectories.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, NamedTuple

import numpy as np

from agentrl.core import registry

SELECTORS: registry.Registry[Callable[..., Any]] = registry.Registry('selector', package='agentrl.algorithms')

# Names of the selectors that need several samples of a question.
COMPARES_GROUPS: set[str] = set()


class Candidates(NamedTuple):
  """What is known of the trajectories of a step.

  Attributes:
    rewards: [N] float32. Total reward.
    group_ids: [N] int32, from 0.
    parts: Name to [N] float32: reward parts.
    weights: [N] float32. 0 for those out of the loss already.
    baseline_mask: [N] bool. Whether each still counts in its group's baseline.
  """

  rewards: np.ndarray
  group_ids: np.ndarray
  parts: Mapping[str, np.ndarray]
  weights: np.ndarray
  baseline_mask: np.ndarray


class Selection(NamedTuple):
  """What a selector leaves.

  Attributes:
    weights: [N] float32. 0 takes a trajectory out of the loss.
    baseline_mask: [N] bool. Whether it counts in its group's baseline.
  """

  weights: np.ndarray
  baseline_mask: np.ndarray


def compares_groups(rule: Callable[..., Selection]) -> Callable[..., Selection]:
  """Marks a selector, under `SELECTORS.register`, as one that needs several samples of a question."""
  COMPARES_GROUPS.add(rule.__name__)
  return rule


@SELECTORS.register('drop_zero_std')
@compares_groups
def drop_zero_std(candidates: Candidates, rng: np.random.Generator, *, part: str = 'total',
                  unless: str = '') -> Selection:
  """Leaves out groups whose counted trajectories all have the same reward: under a group baseline they carry no signal.

  Args:
    candidates: Of a step.
    rng: Not used.
    part: Reward part that is compared; 'total' for the reward itself.
    unless: Part above 0 in trajectories whose groups are left as they are; '' for none.
  Source: Yu et al. (DAPO), arXiv 2503.14476.  Deviation: a group of one is left out, where the release keeps it: its
    advantage is 0 here. The sampling of more groups is the stage's `rl.max_generation_batches`.
  Example:
    >>> n = Candidates(np.float32([1, 1, 0, 1]), np.int32([0, 0, 1, 1]), {}, np.ones(4, np.float32), np.ones(4, bool))
    >>> drop_zero_std(n, np.random.default_rng(0)).weights.tolist()
    [0.0, 0.0, 1.0, 1.0]
  """
  del rng
  values = of_part(candidates, part)
  weights = candidates.weights.copy()
  exempt = candidates.group_ids[of_part(candidates, unless) > 0] if unless else ()
  for group in np.setdiff1d(candidates.group_ids, exempt):
    members = candidates.group_ids == group
    counted = members & candidates.baseline_mask & (candidates.weights > 0)
    # A reward that is not a number is no lack of signal: the update refuses it, and says so.
    if not counted.any() or np.ptp(values[counted]) == 0:
      weights[members] = 0.0
  return Selection(weights, candidates.baseline_mask)


def of_part(candidates: Candidates, part: str) -> np.ndarray:
  """Returns [N] float32: a reward part, or the total."""
  return candidates.rewards if part == 'total' else candidates.parts[part]
