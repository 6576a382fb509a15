"""Memories of trajectories, found by their module's name."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, Sequence

import numpy as np

from agentrl.core import registry
from agentrl.core.types import Iteration, Task, Trajectory

MEMORIES: registry.Registry = registry.Registry('memory', package='agentrl.experience')
# The part of a trajectory that is 1 where it was kept from an earlier step, and 0 where it is fresh.
REPLAYED = 'replayed'


class Memory(Protocol):
  """Takes each step's trajectories in, and gives what the step trains on. Memories are subclasses of it.

  Attributes:
    trajectories: What it holds; saved with the run. Whatever else it must find again belongs in the
      iteration's memory.
    needs: Parts of trajectories that it reads.
    names: Parts of trajectories that it writes, besides `REPLAYED`.
  """

  trajectories: list[Trajectory]
  needs: tuple[str, ...] = ()
  names: tuple[str, ...] = ()

  def ask(self, tasks: Sequence[Task], rng: np.random.Generator, iteration: Iteration) -> list[Task]:
    """Returns what to roll out where `tasks` are next in the data's order: other ones in their place, or fewer.

    In place of those left out the tasks that follow are drawn, and asked about in turn.

    Args:
      tasks: Of one batch, no two alike.
      rng: For all that is random.
      iteration: As for `exchange`.
    """
    del rng, iteration
    return list(tasks)

  def max_replayed(self, trajectories: int) -> int:
    """Returns the most that `exchange` adds to a number of fresh trajectories."""
    ...

  def exchange(self, fresh: Sequence[Trajectory], rng: np.random.Generator, iteration: Iteration) -> list[Trajectory]:
    """Returns what to train on: fresh trajectories, and earlier ones with `rewards[REPLAYED] = 1`.

    Earlier ones are copies with a `group_id` of their own, unless they are to be compared with a fresh group. Their
    behaviour log-probs stay those of their sampling.

    Args:
      fresh: Scored, whole groups. They are not changed.
      rng: For all that is random.
      iteration: Where the run stands; its memory is this memory's own.
    """
    ...


def replayed(trajectory: Trajectory, group_id: str | None = None, **parts: float) -> Trajectory:
  """Returns a copy marked as coming from an earlier step; it shares tokens and turns with the original.

  Args:
    trajectory: As it was kept.
    group_id: Of the group it is to be compared with; None for one of its own.
    **parts: Further parts that it is given.
  """
  own = f'{trajectory.group_id}/{trajectory.policy_version}/{trajectory.sample}/{trajectory.path}'
  return dataclasses.replace(trajectory, group_id=own if group_id is None else group_id,
                             rewards={**trajectory.rewards, **parts, REPLAYED: 1.0})


def make(name: str, options: Any) -> Memory:
  """Returns the memory of that name, empty.

  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
    ValueError: if it does not take an option, or refuses its value.
  """
  return registry.call('rl.memory', MEMORIES.get(name), options)
