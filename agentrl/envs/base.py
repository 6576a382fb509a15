"""The Environment protocol: poses a task, reacts to turns. Needs no accelerator, no jax."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from agentrl.core import registry
from agentrl.core import types

ENVIRONMENTS: registry.Registry = registry.Registry('environment', package='agentrl.envs')


@dataclasses.dataclass(frozen=True)
class Observation:
  """What an environment answers to a turn.

  Attributes:
    messages: What the policy is shown next; () when done.
    calls: Calls found in the turn, malformed ones included.
    results: Their results, in the order of the calls; () if they were not run because it is over.
    done: Whether the episode is over.
    answer: The final answer; None if none was given.
    status: RUNNING until done.
    boundary: Whose fault the ending is; None while running and when finished.
    detail: What went wrong, in words; '' otherwise.
  """

  messages: tuple[types.Message, ...] = ()
  calls: tuple[types.ToolCall, ...] = ()
  results: tuple[types.ToolResult, ...] = ()
  done: bool = False
  answer: str | None = None
  status: types.Status = types.Status.RUNNING
  boundary: types.Boundary | None = None
  detail: str = ''


class Episode(Protocol):
  """One attempt at a task.

  Attributes:
    messages: The chat that the policy starts from, the system message included.
  """

  messages: tuple[types.Message, ...]

  async def step(self, turn: str, stop_reason: str) -> Observation:
    """Returns the reaction to a turn of the policy.

    Args:
      turn: The turn's text, the stop included.
      stop_reason: As `Turn.stop_reason`.
    Raises:
      RuntimeError: if the episode is over.
    """

  async def snapshot(self) -> Any:
    """Returns a value for `Environment.restore`; no step may be running."""

  async def close(self) -> None:
    """Frees what the episode holds; safe to repeat."""


class Environment(Protocol):
  """Where tasks are attempted; shared by all trajectories.

  Attributes:
    name: Tasks name it in `Task.environment`.
    stops: Strings at which a turn's sampling stops.
  """

  name: str
  stops: tuple[str, ...]

  def system_message(self, task: types.Task | None = None) -> types.Message | None:
    """Returns the message that opens the chat, or None for none."""

  async def open(self, task: types.Task, seed: int) -> Episode:
    """Returns a new episode; what it draws at random follows from `seed`."""

  async def restore(self, snapshot: Any) -> Episode:
    """Returns an independent episode that goes on from a snapshot, which serves many times."""


def make(name: str, **kwargs: Any) -> Environment:
  """Returns the environment registered under `name`, made with `kwargs`.

  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
  """
  return ENVIRONMENTS.get(name)(**kwargs)
