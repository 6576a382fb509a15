"""The plain agent: think, call tools, read, go on, answer."""

from __future__ import annotations

from typing import Any, Sequence

from agentrl.agents import base
from agentrl.agents.independent import Independent
from agentrl.agents.player import Player
from agentrl.core.types import Task
from agentrl.rollout.session import Session


def react(environment: Any, template: Any, task: Task, *, stops: Sequence[str] = ()):
  """Returns a program that alternates turns of the policy with steps of the environment until the episode is done.

  Args:
    environment: With `async open(task, seed) -> episode`; see `agentrl.envs.base`.
    template: Renders messages; see `agentrl.tokens.chat.ChatTemplate`.
    task: What is asked.
    stops: Strings that end a turn besides the environment's own.
  """
  player = Player(environment, template, task, stops=stops)

  async def program(session: Session):
    episode = await player.begin(session)
    try:
      await player.play(session, episode)
    finally:
      await episode.close()

  return program


@base.AGENTS.register('react')
class React(Independent):
  """Independent samples of the plain program."""
