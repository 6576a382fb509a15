"""Who was better than whom: pairs found in scored trajectories, and who finds them."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Sequence

import numpy as np

from agentrl.core import registry
from agentrl.core.types import Iteration, Segment, Trajectory

MINERS: registry.Registry = registry.Registry('pair miner', package='agentrl.synthesis')


class Excerpt(NamedTuple):
  """A trajectory, or the start of one, and which of its sampled tokens count.

  Attributes:
    trajectory: Of one segment.
    start: Tokens before this index are context only.
    stop: Tokens from this index on are left out; None for none.
  """

  trajectory: Trajectory
  start: int = 0
  stop: int | None = None


class Pair(NamedTuple):
  """A preference.

  Attributes:
    chosen: What was better.
    rejected: What was worse, from the same prompt.
    weight: Share among the pairs of a step.
  """

  chosen: Excerpt
  rejected: Excerpt
  weight: float = 1.0


class Miner(Protocol):
  """Finds pairs; made by `MINERS.get(name)(**options)`.

  Attributes:
    needs: Reward parts of trajectories that it reads.
  """

  needs: tuple[str, ...]

  def __call__(self, trajectories: Sequence[Trajectory], rng: np.random.Generator, iteration: Iteration) -> list[Pair]:
    """Returns the pairs, [] if there are none.

    Args:
      trajectories: Scored, whole groups.
      rng: For all that is random.
      iteration: Where the stage stands; its memory is this miner's own.
    """
    ...


def groups_of(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
  """Returns the groups, in order of first occurrence, without what cannot be paired.

  A pair is two token sequences, so trajectories whose context was edited (several segments) are left out, as are those
  in which nothing was sampled or where it is unknown how likely that was.
  """
  groups: dict[str, list[Trajectory]] = {}
  for t in trajectories:
    if len(t.segments) == 1 and _is_known(t.segments[0]):
      groups.setdefault(t.group_id, []).append(t)
  return list(groups.values())


def _is_known(segment: Segment) -> bool:
  return bool(segment.sampled.any() and np.isfinite(segment.log_probs[segment.sampled]).all())


def mean_entropy(trajectory: Trajectory) -> float:
  """Returns the mean entropy of the sampled tokens, nats; 0 without any."""
  found = [s.entropies[s.sampled] for s in trajectory.segments]
  return float(np.mean(np.concatenate(found))) if sum(map(len, found)) else 0.0
