"""Agents whose samples do not know of each other: one program, run once a sample."""

from __future__ import annotations

from typing import Any

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Iteration, Task
from agentrl.rollout.session import Session


class Independent(base.Agent):
  """Plays an episode through each session; a subclass says how."""

  def __init__(self, environment: Any, template: Any):
    """Makes the agent.

    Args:
      environment: Where it acts.
      template: Renders messages.
    """
    self._environment, self._template = environment, template

  def max_trajectories(self, group_size: int) -> int:
    """Returns the group size: nothing forks."""
    return group_size

  def programs(self, task: Task, group_size: int, iteration: Iteration) -> list[base.Program]:
    """Returns one program a sample."""
    del iteration
    player = Player(self._environment, self._template, task)

    async def program(session: Session):
      episode = await player.begin(session)
      try:
        await self.play(player, session, episode)
      finally:
        await episode.close()

    return [program] * group_size

  async def play(self, player: Player, session: Session, episode: Any):
    """Goes on from the episode's first messages until the trajectory has ended.

    Args:
      player: Of the task.
      session: Holds the episode's messages.
      episode: Open; closed by the caller.
    """
    await player.play(session, episode)
