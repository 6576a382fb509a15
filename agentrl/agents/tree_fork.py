"""A tree of a fixed number of rows that is thinned out and forked again at every step: PORTool."""

from __future__ import annotations

from typing import Any, Sequence

from agentrl.agents import base, rounds
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Task
from agentrl.rollout.session import Session


def keep_forks(draws: Sequence[Sequence[float]], keep: int) -> list[int]:
  """Returns how many of each row's forks are kept: those with the smallest draws.

  Args:
    draws: For each row, a number in [0, 1) for each fork that it proposes.
    keep: Forks that are kept in all; no more than are proposed.
  Example:
    >>> keep_forks([[.1, .2], [.3, .9], [.8, .4]], 3)
    [2, 1, 0]
  """
  proposed = sorted((u, i) for i, row in enumerate(draws) for u in row)
  kept = [i for _, i in proposed[:keep]]
  return [kept.count(i) for i in range(len(draws))]


@base.AGENTS.register('tree_fork')
class TreeFork(base.Agent):
  """All rows begin; after every turn each unfinished one proposes forks, and as many as there were rows are kept.

  A row none of whose forks is kept is left out; what it shares with others is in them. A group ends with exactly its
  size, and its steps have siblings: advantage 'fork_z' compares them.

  Source: PORTool, from a page about it: n rows at the first step; then f forks each, of which n less those that are
    done are kept.
  Deviation: how forks are chosen was not found. Ours are drawn uniformly, and before they are sampled, so that nothing
    is drawn in vain.
  """

  def __init__(self, environment: Any, template: Any, *, forks: int = 2):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
      forks: f, that an unfinished row proposes at each step. 1 is plain sampling.
    Raises:
      ValueError: if it is below 1.
    """
    if forks < 1:
      raise ValueError(f'forks={forks} must be at least 1')
    self._environment, self._template, self._forks = environment, template, forks

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a row of the first step."""
    del iteration
    player = Player(self._environment, self._template, task)
    return [rounds.Rounds(player, self, group_size, group_size).root] * group_size

  def decide(self, rows: Sequence[Session], free: int) -> list[int]:
    """Returns for each row the forks that are kept, besides itself."""
    draws = [[rounds.uniform(row, j) for j in range(self._forks)] for row in rows]
    return [kept - 1 for kept in keep_forks(draws, min(len(rows) + free, self._forks * len(rows)))]

  def fresh(self, ended: Session, free: int) -> int:
    """Returns all that are missing, which happens where a fork failed."""
    del ended
    return free
