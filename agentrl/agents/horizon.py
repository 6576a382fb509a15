"""More turns as training goes on: ScalingInter-RL."""

from __future__ import annotations

import dataclasses
from typing import Any, Sequence

from agentrl.agents import base
from agentrl.agents.react import react
from agentrl.core.types import Iteration, Task
from agentrl.rollout.session import Session


def turns_at(step: int, rounds: Sequence[int], every: int) -> int:
  """Returns the turns allowed at a step.

      rounds[min(step // every, last)]

  Example:
    >>> [turns_at(step, (8, 12, 15), 100) for step in (0, 99, 100, 250, 999)]
    [8, 8, 12, 15, 15]
  """
  return rounds[min(step // every, len(rounds) - 1)]


@base.AGENTS.register('horizon')
class Horizon(base.Agent):
  """The plain program with a limit of turns that rises; rows that reach it end with TURN_LIMIT and are trained on.

  Source: ScalingInter-RL (AgentGym-RL), code WooooDyy/AgentGym-RL: every 80 to 100 steps, rounds such as (8, 12, 15).
  Deviation: none.
  """

  def __init__(self, environment: Any, template: Any, *, rounds: Sequence[int], every: int):
    """Makes the agent.

    Args:
      environment: Where it acts; its own limit holds as well.
      template: Renders messages.
      rounds: Turns of each phase.
      every: Steps of a phase; the last one stays.
    Raises:
      ValueError: if there are no rounds, or a number is below 1.
    """
    if not rounds or min(*rounds, every) < 1:
      raise ValueError(f'rounds={tuple(rounds)} must not be empty, and they and every={every} at least 1')
    self._environment, self._template = environment, template
    self._rounds, self._every = tuple(rounds), every

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample."""
    turns = turns_at(iteration.step, self._rounds, self._every)
    plain = react(self._environment, self._template, task)

    async def program(session: Session):
      session.limits = dataclasses.replace(session.limits, turns=min(turns, session.limits.turns))
      await plain(session)

    return [program] * group_size
