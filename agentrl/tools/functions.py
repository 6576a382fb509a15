"""Tools made from plain Python functions."""

from __future__ import annotations

import inspect
from typing import Any, Callable, Mapping

from agentrl.core import types
from agentrl.tools import base
from agentrl.tools import schema
from agentrl.tools import workers


class FunctionTool(base.Tool):
  """A stateless tool that calls a function; made by `function_tool`."""

  def __init__(self, fn: Callable[..., Any], name: str, pool: workers.WorkerPool | None):
    """Wraps `fn`; with a pool it runs there, without one it is awaited here."""
    self.name = name
    self.description, self.parameters = schema.from_function(fn)
    self.concurrency = pool.size if pool else None
    self._fn = fn
    self._pool = pool

  async def call(self, state: None, arguments: Mapping[str, Any]) -> types.ToolResult:
    """Calls the function with the arguments by name."""
    if self._pool:
      return await self._pool.call(arguments)
    return as_result(await self._fn(**arguments))

  def shutdown(self) -> None:
    """Kills the workers."""
    if self._pool:
      self._pool.shutdown()


def as_result(value: Any) -> types.ToolResult:
  """Returns what a function returned as a result: None is '', a str is itself, others are str()."""
  if isinstance(value, types.ToolResult):
    return value
  return base.success('' if value is None else str(value))


def function_tool(fn: Callable[..., Any], *, name: str | None = None, processes: int = 2,
                  memory: int = 1 << 30) -> FunctionTool:
  """Returns a tool that calls a typed function; its schema is read off signature and docstring.

  A coroutine function runs on the event loop and must not block it. Any other function runs in
  warm worker processes, because only a process can be stopped when it hangs: about 0.1 ms a call,
  0.2 s to start a worker. A worker is not a sandbox: it has the rights of this process, so only the
  arguments may come from the policy, never the code.

  Args:
    fn: Parameters annotated (see `schema.from_function`) and given by name. Returns a str, a
      ToolResult, None, or anything whose str() the policy should read. May raise.
    name: What the policy calls it by; the function's name by default.
    processes: Worker processes, and so calls at once. They start when first needed.
    memory: Address space of one worker, bytes; beyond it allocation fails with MemoryError.
  Raises:
    TypeError: if the signature has no JSON schema.
  Example:
    >>> def double(x: int) -> int:
    ...   '''Doubles an integer.'''
    ...   return 2 * x
    >>> function_tool(double).name
    'double'
  """
  asynchronous = inspect.iscoroutinefunction(fn)
  pool = None if asynchronous else workers.WorkerPool(fn, size=processes, memory=memory)
  return FunctionTool(fn, name or fn.__name__, pool)
