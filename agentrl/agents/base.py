"""Who drives the sessions of a group: agents, found by their module's name."""

from __future__ import annotations

import functools
from typing import Any, Awaitable, Callable, Protocol, Sequence

from agentrl.core import registry
from agentrl.core.types import Iteration, Task, Trajectory
from agentrl.rollout.session import Session

AGENTS: registry.Registry = registry.Registry('agent', package='agentrl.agents')

Program = Callable[[Session], Awaitable[None]]


class Agent(Protocol):
  """Makes the programs of a group of trajectories; made by `AGENTS.get(name)(environment, template, **options)`.

  Agents are subclasses of it.

  Attributes:
    names: Parts of trajectories that it writes on those it runs; 0 where it writes none.
    max_segments: Contexts that a trajectory may end with: what memory is laid out for.
    needs_recompute: Whether trajectories hold words drawn in another context than they now stand in, whose log-probs
      only the learner knows; they need `rl.recompute_behaviour`.
  """

  names: tuple[str, ...] = ()
  max_segments: int = 1
  needs_recompute: bool = False

  def max_trajectories(self, group_size: int) -> int:
    """Returns the most trajectories that a group may end with, forks included: what memory is laid out for."""
    ...

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> Sequence[Program]:
    """Returns a program for each root of a group.

    A root may fork its session and start programs on the forks with `session.engine.adopt`; those trajectories join
    the group unless they are given another `group_id`.

    Args:
      task: What the group is asked.
      group_size: Trajectories the group is to have.
      iteration: Where the run stands; its memory is this agent's own.
    """
    ...

  def learn(self, trajectories: Sequence[Trajectory], iteration: Iteration):
    """Takes note of what became of the trajectories of a batch; what it is to find again belongs in the memory.

    Args:
      trajectories: Scored.
      iteration: As for `programs`.
    """


def make(name: str, environment: Any, template: Any, options: Any) -> Agent:
  """Returns the agent of that name.

  Args:
    name: Of a module of this package.
    environment: Where it acts; see `agentrl.envs.base`.
    template: Renders messages; see `agentrl.tokens.chat.ChatTemplate`.
    options: Keyword arguments of the agent.
  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
    ValueError: if it does not take an option, or refuses its value.
  """
  factory = AGENTS.get(name)
  return registry.call('agent.options', functools.partial(factory, environment, template), options)
