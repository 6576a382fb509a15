"""The plain agent: think, call tools, read, go on, answer."""

from __future__ import annotations

from typing import Any, Awaitable, Sequence

from absl import logging

from agentrl.core.types import Boundary, Status, Task
from agentrl.rollout.session import Session, TrajectoryEnded


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
    episode = await _ask(task, environment.open(task, session.seed[0]))
    try:
      session.append(template.render(episode.messages, add_generation_prompt=True))
      while not session.finished:
        turn = await session.generate(stops=stops)
        if turn.stop_reason != 'stop':
          session.finish(Status.LENGTH, boundary=Boundary.POLICY,
                         detail=f'turn {turn.index} ran out of tokens ({turn.stop_reason})')
          return
        step = await _ask(task, episode.step(turn.text, turn.stop_reason))
        session.observe(turn, step.calls, step.results)
        if step.done:
          session.finish(step.status, answer=step.answer, boundary=step.boundary, detail=step.detail)
        else:
          session.append(template.render(step.messages, add_generation_prompt=True))
    finally:
      await episode.close()

  return program


async def _ask(task: Task, answer: Awaitable[Any]) -> Any:
  """The boundary to the environment: what it raises is its own failure, not the program's."""
  try:
    return await answer
  except Exception as e:  # pylint: disable=broad-except
    logging.warning('The environment failed on task %s', task.id, exc_info=True)
    raise TrajectoryEnded(Status.ENVIRONMENT_FAILURE, Boundary.ENVIRONMENT, f'{type(e).__name__}: {e}') from e
