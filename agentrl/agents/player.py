"""What agents are made of: one episode played through one session, a turn at a time, and its forks."""

from __future__ import annotations

from typing import Any, Awaitable, Sequence

from absl import logging

from agentrl.core.types import Boundary, Message, Status, Task, ToolCall, Turn
from agentrl.envs.base import Observation
from agentrl.rollout.session import Session, TrajectoryEnded


class Player:
  """Plays a task: opens episodes, renders what they say, and lets them react to what is drawn.

  It holds no state of an episode, so that one serves any number of sessions. What an environment raises ends the
  trajectory as the environment's failure.

      episode = await player.begin(session)
      try:
        await player.play(session, episode)
      finally:
        await episode.close()
  """

  def __init__(self, environment: Any, template: Any, task: Task, *, stops: Sequence[str] = ()):
    """Binds what is shared.

    Args:
      environment: See `agentrl.envs.base.Environment`.
      template: Renders messages; see `agentrl.tokens.chat.ChatTemplate`.
      task: What is asked.
      stops: Strings that end a turn besides the environment's own.
    """
    self.environment, self.template, self.task = environment, template, task
    self.stops = tuple(dict.fromkeys((*environment.stops, *template.stops, *stops)))

  async def open(self, session: Session) -> Any:
    """Returns a new episode; what it draws at random follows from the session's key."""
    return await self.ask(self.environment.open(self.task, session.seed[0]))

  async def begin(self, session: Session, extra: Sequence[Message] = ()) -> Any:
    """Opens an episode, shows its messages, and returns it.

    Args:
      session: With an empty context.
      extra: Messages shown after the episode's system message, if it has one.
    """
    episode = await self.open(session)
    try:
      session.append(self.prompt(episode, extra))
    except TrajectoryEnded:
      await episode.close()
      raise
    return episode

  def prompt(self, episode: Any, extra: Sequence[Message] = ()) -> list[int]:
    """Returns the ids of an episode's messages, up to where the policy goes on."""
    messages = tuple(episode.messages)
    first = bool(messages) and messages[0].role == 'system'
    messages = (*messages[:first], *extra, *messages[first:])
    return self.template.render(messages, add_generation_prompt=True)

  async def turn(self, session: Session, episode: Any, *, max_tokens: int | None = None) -> Turn:
    """Samples a turn, lets the episode react, and shows its answer; ends the trajectory where it is over."""
    turn = await session.generate(stops=self.stops, max_tokens=max_tokens)
    await self.react(session, episode, turn)
    return turn

  async def react(self, session: Session, episode: Any, turn: Turn):
    """Lets the episode react to a turn, and shows its answer; ends the trajectory where it is over."""
    if turn.stop_reason != 'stop':
      session.finish(Status.LENGTH, boundary=Boundary.POLICY,
                     detail=f'turn {turn.index} ran out of tokens ({turn.stop_reason})')
      return
    step = await self.ask(episode.step(turn.text, turn.stop_reason))
    session.observe(turn, step.calls, step.results)
    if step.done:
      session.finish(step.status, answer=step.answer, boundary=step.boundary, detail=step.detail)
    else:
      session.append(self.observation(step))

  def observation(self, step: Observation) -> list[int]:
    """Returns the ids of what an environment answered, up to where the policy goes on."""
    return self.template.render(step.messages, add_generation_prompt=True, continued=True)

  async def play(self, session: Session, episode: Any):
    """Goes on until the trajectory has ended."""
    while not session.finished:
      await self.turn(session, episode)

  async def fork(self, session: Session, episode: Any, n: int) -> list[tuple[Session, Any]]:
    """Returns n sessions that go on from here, each with an episode of its own in the present state.

    Raises:
      TrajectoryEnded: if the session may not fork so often, or the environment fails.
    """
    if not n:
      return []
    forks = session.fork(n)
    snapshot = await self.ask(episode.snapshot())
    return [(fork, await self.restore(snapshot)) for fork in forks]

  async def restore(self, snapshot: Any) -> Any:
    """Returns an episode that goes on from a snapshot."""
    return await self.ask(self.environment.restore(snapshot))

  async def ask(self, answer: Awaitable[Any]) -> Any:
    """The boundary to the environment: what it raises is its own failure, not the program's."""
    try:
      return await answer
    except Exception as e:  # pylint: disable=broad-except
      logging.warning('The environment failed on task %s', self.task.id, exc_info=True)
      raise TrajectoryEnded(Status.ENVIRONMENT_FAILURE, Boundary.ENVIRONMENT, f'{type(e).__name__}: {e}') from e

  def find_call(self, session: Session, turn: Turn) -> int:
    """Returns where in the current segment the last call of a turn is opened; the turn's start if it holds none."""
    tokens = session.context.tokens[turn.start:turn.end].tolist()
    decode, parse = session.engine.tokenizer.decode, self.environment.call_format.parse
    calls = parse(turn.text)
    for start in range(len(tokens) - 1, -1, -1):
      if calls and parse(decode(tokens[start:]))[-1:] == calls[-1:]:
        return turn.start + start
    return turn.start


def failed(turn: Turn) -> bool:
  """Whether a call of the turn was run and failed."""
  return any(not result.ok for result in turn.results)


def call_text(call: ToolCall) -> str:
  """Returns a call as one line, for comparisons."""
  return f'{call.name}({", ".join(f"{k}={v}" for k, v in call.arguments.items())}){call.error or ""}'
