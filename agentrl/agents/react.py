"""The plain agent: think, call tools, read, go on, answer."""

from __future__ import annotations

from typing import Any, Sequence

from agentrl.core.types import Boundary, Status, Task
from agentrl.rollout.session import Session


def react(environment: Any, template: Any, task: Task, *, stops: Sequence[str] = ()):
  """Returns a program that alternates turns of the policy with steps of the environment until the episode is done.

  Args:
    environment: With `async open(task, seed) -> episode`; see `agentrl.envs.base`.
    template: Renders messages; see `agentrl.tokens.chat.ChatTemplate`.
    task: What is asked.
    stops: Strings that end a turn besides the environment's own.
  """
  stops = tuple(dict.fromkeys((*environment.stops, *template.stops, *stops)))

  async def program(session: Session):
    episode = await environment.open(task, session.seed[0])
    try:
      session.append(template.render(episode.messages, add_generation_prompt=True))
      while not session.finished:
        turn = await session.generate(stops=stops)
        if turn.stop_reason != 'stop':
          session.finish(Status.LENGTH, boundary=Boundary.POLICY,
                         detail=f'turn {turn.index} ran out of tokens ({turn.stop_reason})')
          return
        step = await episode.step(turn.text, turn.stop_reason)
        session.observe(turn, step.calls, step.results)
        if step.done:
          session.finish(step.status, answer=step.answer, boundary=step.boundary, detail=step.detail)
        else:
          session.append(template.render(step.messages, add_generation_prompt=True))
    finally:
      await episode.close()

  return program
