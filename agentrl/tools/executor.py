"""Runs calls: concurrently, within limits, and turning every failure into a result."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
import weakref
from typing import Any, Collection, Iterable, Mapping, Sequence

from agentrl.core import types
from agentrl.tools import base
from agentrl.tools import schema
from agentrl.tools.recording import RECORDING


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one tool may use.

  Attributes:
    timeout: Seconds one call may run; waiting for its turn does not count.
    concurrency: Calls at once over all trajectories; the tool's own `concurrency` also holds.
    output: Characters of text that the policy is shown of one result.
    retries: Further attempts after a failure of a kind in `retry_on`; only for tools without state.
    retry_on: Kinds of failure worth another attempt.
  """

  timeout: float = 5.0
  concurrency: int = 64
  output: int = 4096
  retries: int = 0
  retry_on: tuple[str, ...] = ('crash', 'timeout', 'raised')


@dataclasses.dataclass
class ToolStats:
  """What became of the calls of one tool.

  Attributes:
    calls: Results handed out, failures included.
    failures: Results that are not ok, by kind.
    truncated: Results cut to the output limit.
    seconds: Sum over calls of wall time from start to result, waiting included.
  """

  calls: int = 0
  failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  truncated: int = 0
  seconds: float = 0.0

  def add(self, result: types.ToolResult) -> None:
    """Counts one result."""
    self.calls += 1
    self.truncated += result.truncated
    self.seconds += result.seconds
    if not result.ok:
      self.failures[result.error or 'failed'] += 1


class ToolSession:
  """One trajectory's side of the tools; made by `Executor.open`. Opens a tool at its first call."""

  def __init__(self, executor: Executor, seed: int, snapshots: Mapping[str, Any] | None = None):
    """Binds nothing yet.

    Args:
      executor: Runs the calls.
      seed: For what tools draw at random.
      snapshots: By tool name, what to start from; see `Executor.restore`.
    """
    self._executor = executor
    self._seed = seed
    self._snapshots = dict(snapshots or {})
    self._states: dict[str, Any] = {}
    self._locks: dict[str, asyncio.Lock] = {}
    self._opening = asyncio.Lock()

  async def call(self, calls: Sequence[types.ToolCall]) -> list[types.ToolResult]:
    """Returns the results in the order of the calls; see `Executor.run`."""
    return await self._executor.run(self, calls)

  async def state(self, tool: base.Tool) -> Any:
    """Returns the tool's state, opening it if this is its first use."""
    if tool.name not in self._states:
      async with self._opening:
        if tool.name in self._snapshots:
          self._states[tool.name] = await tool.restore(self._snapshots.pop(tool.name))
        elif tool.name not in self._states:
          self._states[tool.name] = await tool.open(self._seed)
    return self._states[tool.name]

  def lock(self, tool: base.Tool) -> asyncio.Lock:
    """Returns the lock that keeps calls on one state in their order."""
    return self._locks.setdefault(tool.name, asyncio.Lock())

  async def snapshot(self) -> tuple[int, Mapping[str, Any]]:
    """Returns a value for `Executor.restore`; no call may be running."""
    snapshots = dict(self._snapshots)
    for name, state in self._states.items():
      snapshots[name] = await self._executor.tools[name].snapshot(state)
    return self._seed, snapshots

  async def close(self) -> None:
    """Closes what was opened; a tool that cannot close is counted under the kind 'close'."""
    states, self._states, self._snapshots = self._states, {}, {}
    for name, state in states.items():
      try:
        await self._executor.tools[name].close(state)
      except Exception:  # Boundary to the tool: the trajectory is over, only the count can tell.
        self._executor.stats[name].failures['close'] += 1


class Executor:
  """Runs the calls of many trajectories on a set of tools.

  Belongs to no event loop and may serve one after another; use it from one thread at a time.
  Leaving the context shuts the tools down.

      with Executor([tool]) as executor:
        session = executor.open(seed=0)
        results = await session.call(calls)
        await session.close()
  """

  UNKNOWN = '(unknown)'

  def __init__(self, tools: Iterable[base.Tool], *, limits: Limits = Limits(),
               limits_by_tool: Mapping[str, Limits] | None = None,
               disabled: bool | Collection[str] = False):
    """Makes an executor; starts nothing.

    Args:
      tools: With distinct names.
      limits: Of every tool not named in `limits_by_tool`.
      limits_by_tool: By tool name.
      disabled: Names of tools that answer every call with a failure of kind 'disabled'; True for
        all. Measures what a policy can do without them.
    Raises:
      ValueError: if two tools share a name, or a name in the other arguments is no tool's.
    """
    tools = list(tools)
    self.tools = {tool.name: tool for tool in tools}
    if len(self.tools) < len(tools):
      raise ValueError(f'tools share a name: {[tool.name for tool in tools]}')
    if disabled is True:
      disabled = set(self.tools)
    self.disabled = frozenset(disabled or ())
    self._limits = {name: (limits_by_tool or {}).get(name, limits) for name in self.tools}
    stray = (set(limits_by_tool or ()) | self.disabled) - set(self.tools)
    if stray:
      raise ValueError(f'no tool is called {sorted(stray)}; there are {sorted(self.tools)}')
    self.stats = self._fresh_stats()
    # A semaphore belongs to the event loop that it first waits in.
    self._slots: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

  def __enter__(self) -> Executor:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def close(self) -> None:
    """Shuts every tool down; blocks until workers are gone. Safe to repeat."""
    for tool in self.tools.values():
      tool.shutdown()

  def open(self, seed: int) -> ToolSession:
    """Returns a new trajectory's session. Costs nothing until its first call."""
    return ToolSession(self, seed)

  def restore(self, snapshot: tuple[int, Mapping[str, Any]]) -> ToolSession:
    """Returns a new session that goes on from a snapshot; one snapshot serves many times."""
    seed, snapshots = snapshot
    return ToolSession(self, seed, snapshots)

  def take_stats(self) -> dict[str, ToolStats]:
    """Returns the counts by tool name since the last time, unknown tools under '(unknown)'."""
    stats, self.stats = self.stats, self._fresh_stats()
    return stats

  async def run(self, session: ToolSession,
                calls: Sequence[types.ToolCall]) -> list[types.ToolResult]:
    """Returns the results in the order of the calls, which run concurrently.

    Calls on one stateful tool run in their order, each seeing what the ones before it did. Never
    raises for what a policy or a tool does; a cancelled run cancels its calls.

    Where the trajectory has a recording, calls that stand in it get the recorded results; of those only the ones on
    stateful tools are run again, so that their state is what it was.
    """
    recording = RECORDING.get()
    place = recording.ask() if recording else 0
    if recording and recording.answers[place] is not None:
      await self._all(session, [c for c in calls if c.name in self.tools and self.tools[c.name].stateful])
      return list(recording.answers[place])
    results = await self._all(session, calls)
    if recording:
      recording.answers[place] = tuple(results)
    return results

  async def _all(self, session: ToolSession, calls: Sequence[types.ToolCall]) -> list[types.ToolResult]:
    return list(await asyncio.gather(*(self._one(session, call) for call in calls)))

  async def _one(self, session: ToolSession, call: types.ToolCall) -> types.ToolResult:
    start = time.monotonic()
    tool = self.tools.get(call.name)
    result = self._refused(call, tool)
    if result is None:
      limits = self._limits[tool.name]
      if tool.stateful:
        async with session.lock(tool):
          result = await self._attempt(session, tool, call, limits)
      else:
        for _ in range(1 + limits.retries):
          result = await self._attempt(session, tool, call, limits)
          if result.ok or result.error not in limits.retry_on:
            break
      result = base.cut(result, limits.output)
    result = dataclasses.replace(result, seconds=time.monotonic() - start)
    self.stats[tool.name if tool else self.UNKNOWN].add(result)
    return result

  def _refused(self, call: types.ToolCall, tool: base.Tool | None) -> types.ToolResult | None:
    """Returns the answer to a call that no tool needs to see, else None."""
    if call.error is not None:
      return base.failure('malformed', call.error)
    if tool is None:
      known = ', '.join(sorted(self.tools))
      return base.failure('unknown_tool', f'unknown tool {call.name[:40]!r}, known: {known}')
    if tool.name in self.disabled:
      return base.failure('disabled', 'tool disabled')
    wrong = schema.problem(call.arguments, tool.parameters)
    return base.failure('malformed', wrong) if wrong else None

  async def _attempt(self, session: ToolSession, tool: base.Tool, call: types.ToolCall,
                     limits: Limits) -> types.ToolResult:
    async with self._slot(tool):
      task = asyncio.ensure_future(_answer(session, tool, call))
      try:
        # Not wait_for: it would wait for a tool that ignores its cancellation.
        done, _ = await asyncio.wait({task}, timeout=limits.timeout)
      finally:
        task.cancel()
      if done and not task.cancelled():
        return task.result()
      return base.failure('timeout', f'no result after {limits.timeout:g} s')

  def _slot(self, tool: base.Tool) -> asyncio.Semaphore:
    slots = self._slots.setdefault(asyncio.get_running_loop(), {})
    if tool.name not in slots:
      ours = self._limits[tool.name].concurrency
      slots[tool.name] = asyncio.Semaphore(min(ours, tool.concurrency or ours))
    return slots[tool.name]

  def _fresh_stats(self) -> dict[str, ToolStats]:
    return {name: ToolStats() for name in (*self.tools, self.UNKNOWN)}


async def _answer(session: ToolSession, tool: base.Tool, call: types.ToolCall) -> types.ToolResult:
  try:
    return await tool.call(await session.state(tool), call.arguments)
  except (Exception, SystemExit) as error:  # Boundary to the tool: what it raises is the result.
    return base.failure('raised', base.worded(error))
