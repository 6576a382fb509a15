"""The Tool protocol: what an object must do so that a policy can call it.

A new tool is one new module of this package that registers a factory:

    @base.TOOLS.register('dice')
    class Dice(base.Tool): ...

and `tools.make('dice')` finds it. Stateless functions need no class: see `functions.function_tool`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Mapping

from agentrl.core import registry
from agentrl.core import types

TOOLS: registry.Registry = registry.Registry('tool', package='agentrl.tools')


class Tool(abc.ABC):
  """Something a policy can call.

  The executor opens one state a trajectory, before that trajectory's first call, and never runs two
  calls on one state at once. A tool that keeps nothing between calls implements `call` alone.

  Attributes:
    name: What the policy calls it by.
    description: One sentence for the policy.
    parameters: JSON schema of the arguments, type 'object'. The executor checks calls against it.
    concurrency: Calls it can work on at once, over all trajectories; None for no limit of its own.
    stateful: Whether a trajectory's calls see each other's effects; such calls run in their order.
  """

  name: str
  description: str
  parameters: Mapping[str, Any]
  concurrency: int | None = None
  stateful: bool = False

  async def open(self, seed: int) -> Any:
    """Returns the state of one trajectory; what is drawn at random later follows from `seed`."""
    del seed
    return None

  @abc.abstractmethod
  async def call(self, state: Any, arguments: Mapping[str, Any]) -> types.ToolResult:
    """Returns the result of one call.

    May raise: the executor turns an exception into a result of kind 'raised'. It is cancelled at
    the executor's time limit and must give back what it holds then. Must not block the event loop.

    Args:
      state: What `open` or `restore` returned.
      arguments: JSON values by name; they fit `parameters`.
    """

  async def snapshot(self, state: Any) -> Any:
    """Returns a value from which `restore` makes independent copies of the state, many times."""
    return state

  async def restore(self, snapshot: Any) -> Any:
    """Returns a new state equal to the one that the snapshot was taken of."""
    return snapshot

  async def close(self, state: Any) -> None:
    """Frees what the state holds."""

  def shutdown(self) -> None:
    """Frees what all states share (processes, threads). A later call starts afresh."""


def make(name: str, **kwargs: Any) -> Tool:
  """Returns the tool registered under `name`, made with `kwargs`.

  Raises:
    agentrl.core.registry.UnknownNameError: if there is none; lists those there are.
  Example:
    >>> make('calculator').parameters['required']
    ['expression']
  """
  return TOOLS.get(name)(**kwargs)


def success(text: str, **fields: Any) -> types.ToolResult:
  """Returns a result that is one text."""
  return types.ToolResult(parts=(types.Part('text', text),), **fields)


def failure(kind: str, text: str, **fields: Any) -> types.ToolResult:
  """Returns a failed result; the policy reads 'error: <text>'.

  Args:
    kind: Machine-readable, as `ToolResult.error`.
    text: What went wrong, short.
    **fields: Other fields of the result.
  """
  part = types.Part('text', f'error: {text}')
  return types.ToolResult(parts=(part,), ok=False, error=kind, **fields)


def worded(error: BaseException) -> str:
  """Returns an exception in one short line, as a traceback ends: 'ValueError: no such key'."""
  text = str(error)[:300].strip()
  line = text.splitlines()[0] if text else ''
  return f'{type(error).__name__}: {line}' if line else type(error).__name__


def cut(result: types.ToolResult, limit: int) -> types.ToolResult:
  """Returns the result with its text cut to `limit` characters over all parts, and saying so.

  Images are kept, and so is the last text of a failed call, which tells what went wrong. A result
  that the tool has cut already only gets the notice.
  """
  texts = [i for i, part in enumerate(result.parts) if part.kind == 'text']
  if not result.truncated and sum(len(result.parts[i].data) for i in texts) <= limit:
    return result
  parts, left = list(result.parts), limit
  for i in (texts if result.ok else texts[-1:] + texts[:-1]):
    parts[i] = types.Part('text', parts[i].data[:left])
    left -= len(parts[i].data)
  notice = types.Part('text', '... [output cut]')
  parts.insert(len(parts) if result.ok else max(len(parts) - 1, 0), notice)
  return dataclasses.replace(result, parts=tuple(parts), truncated=True)
