"""The chain world with a user in the loop, who says one thing after the other."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from agentrl.core import types
from agentrl.envs import base
from agentrl.envs import chains
from agentrl.envs import tool_env


@base.ENVIRONMENTS.register('chains_user')
class ChainUserEnvironment(chains.ChainEnvironment):
  """Asks for the first steps of a chain, and for the rest once they are answered.

  '4FP+3' becomes '4F' and then, if the answer to that is 7, '7P+3'. The user goes on from whatever digit is answered, so
  that an early mistake ends in a wrong answer; what is no digit ends the talk. The last answer is the trajectory's.
  """

  def __init__(self, *args: Any, name: str = 'chains_user', **kwargs: Any):
    """See `tool_env.ToolEnvironment`."""
    super().__init__(*args, name=name, **kwargs)

  async def open(self, task: types.Task, seed: int) -> UserEpisode:
    """Returns a new episode."""
    first, rest = split(task.messages[-1].content)
    asked = dataclasses.replace(task, messages=(*task.messages[:-1], types.Message('user', first)))
    inner = await super().open(asked, seed)
    return UserEpisode(inner, rest)

  async def restore(self, snapshot: tuple[Any, str]) -> UserEpisode:
    """Returns an independent episode that goes on from a snapshot."""
    inner, rest = snapshot
    return UserEpisode(await super().restore(inner), rest)


class UserEpisode:
  """An episode of tools that goes on with the user's next message where the policy answers; see `base.Episode`."""

  def __init__(self, inner: tool_env.ToolEpisode, rest: str):
    """Wraps an episode of the first steps; `rest` is what the user is yet to ask."""
    self._inner, self._rest = inner, rest

  @property
  def messages(self) -> tuple[types.Message, ...]:
    """What the policy is shown first."""
    return self._inner.messages

  async def step(self, turn: str, stop_reason: str) -> base.Observation:
    """Returns the reaction of a tool or of the user."""
    seen = await self._inner.step(turn, stop_reason)
    answer = (seen.answer or '').strip()
    if seen.status != types.Status.FINISHED or not self._rest or not re.fullmatch(r'\d', answer):
      return seen
    said, self._rest = f'{answer}{self._rest}', ''
    self._inner.go_on()
    return base.Observation(messages=(types.Message('user', said),))

  async def snapshot(self) -> tuple[Any, str]:
    """Returns a value for `ChainUserEnvironment.restore`."""
    return await self._inner.snapshot(), self._rest

  async def close(self) -> None:
    """Closes the tools' states; safe to repeat."""
    await self._inner.close()


def split(question: str) -> tuple[str, str]:
  """Returns the first half of a chain's steps, rounded down but at least one, as a question, and the other steps.

  Example:
    >>> split('4FP+3'), split('4F')
    (('4F', 'P+3'), ('4F', ''))
  """
  start, *steps = re.findall(r'^\d|[A-Z]|\+\d', question)
  cut = max(1, len(steps) // 2)
  return start + ''.join(steps[:cut]), ''.join(steps[cut:])
