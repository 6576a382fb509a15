"""Python code in pydantic-monty: an interpreter in its own process, without files or network.

A trajectory's session is a value: what the interpreter's own dump gives, 1.4 kB for a few names.
A call takes any warm worker, loads that value, runs the code and dumps again, in one hop to a
thread. So a few processes serve any number of open trajectories, a fork copies nothing, and a
worker that dies takes only its call along. Measured on two shared x86 cores, 2 workers, ms a call:

    load + run + dump, as here                                0.15 (0.19 with 512 at once)
    the same through AsyncMonty, with a state of 20 kB        1.9  (1.1 with 512 at once)
    run only, one process kept a trajectory, AsyncMonty       0.28, and 9.5 MB and 2.5 ms each
    as here, through the executor, 256 trajectories at once   0.5
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import datetime
import math
import os
import resource
import textwrap
import threading
import time
from typing import Any, Mapping

import pydantic_monty

from agentrl.core import types
from agentrl.tools import base

# Above any executor's limit: what is kept of the output while the code runs on.
_CAPTURE = 1 << 16
# Seconds beyond the time limit that a worker has to stop by itself, and its process to answer.
_GRACE = 1.0
_ANSWER = 0.5


@dataclasses.dataclass
class _Session:
  seed: int
  dump: bytes | None = None


@base.TOOLS.register('python')
class PythonTool(base.Tool):
  """Runs Python; names live on from call to call of a trajectory.

  The result is what was printed, then the value of the last line if it is an expression: a str as
  it is (no quotes), anything else by repr, None not at all. Code that does neither gives
  '(no output)'. An exception gives the last line of its traceback, after what was printed until
  then, and what the code did before stays done. At a time or memory limit, and when a worker dies,
  the call as a whole is undone.

  Nothing but the seed decides what the code computes: the clock stands still at 2025-01-01, sleep
  returns at once, `random` is seeded with the trajectory's seed.
  """

  name = 'python'
  stateful = True
  parameters = {
      'type': 'object',
      'properties': {'code': {'type': 'string', 'description': 'Python code.'}},
      'required': ['code'],
      'additionalProperties': False,
  }

  def __init__(self, *, prelude: str = 'from math import gcd, lcm', time_limit: float = 1.0,
               memory: int = 64 << 20, state_memory: int = 1 << 20, workers: int | None = None,
               description: str = 'Runs Python code; returns what it prints and its last value.'):
    """Makes the tool; workers start at the first call (30 ms).

    Args:
      prelude: Code run once in every trajectory, before its first call.
      time_limit: Seconds one call may run. Give the executor at least 1.5 s more: up to then a
        worker that does not stop by itself is killed here, and its slot is free again.
      memory: Heap of the interpreter, bytes.
      state_memory: Largest dump kept between calls, bytes: bounds this process, not the worker.
      workers: Processes and calls at once; by default one a core, at most 16.
      description: For the policy.
    """
    self.description = description
    self.concurrency = workers or min(os.cpu_count() or 1, 16)
    self._prelude = prelude
    self._time_limit = time_limit
    self._state_memory = state_memory
    self._limits = pydantic_monty.ResourceLimits(
        max_feed_duration_secs=time_limit, max_memory=memory)
    self._lock = threading.Lock()
    self._pool: pydantic_monty.Monty | None = None
    self._threads: concurrent.futures.ThreadPoolExecutor | None = None

  async def open(self, seed: int) -> _Session:
    """Returns an empty session; no worker is involved."""
    return _Session(seed)

  async def call(self, state: _Session, arguments: Mapping[str, Any]) -> types.ToolResult:
    """Runs the code; see the class. A cancelled call leaves the session as it was."""
    pool, threads = self._start()
    code = textwrap.dedent(arguments['code']).strip('\n')
    result, state.dump = await asyncio.get_running_loop().run_in_executor(
        threads, self._run, pool, state.seed, state.dump, code)
    return result

  async def snapshot(self, state: _Session) -> _Session:
    """Returns the session as it is now."""
    return dataclasses.replace(state)

  async def restore(self, snapshot: _Session) -> _Session:
    """Returns an independent session."""
    return dataclasses.replace(snapshot)

  def shutdown(self) -> None:
    """Ends threads and workers; waits for running calls, at most their time limit and 1.5 s."""
    with self._lock:
      pool, self._pool = self._pool, None
      threads, self._threads = self._threads, None
    if threads is not None:
      threads.shutdown(wait=True, cancel_futures=True)
      pool.__exit__(None, None, None)

  def _start(self):
    with self._lock:
      if self._pool is None:
        self._pool = pydantic_monty.Monty(
            min_processes=1, max_processes=self.concurrency, feed_duration_limit_grace=_GRACE,
            request_timeout=self._time_limit + _GRACE + _ANSWER)
        self._pool.__enter__()
        self._threads = concurrent.futures.ThreadPoolExecutor(self.concurrency, 'agentrl-python')
      return self._pool, self._threads

  def _run(self, pool: pydantic_monty.Monty, seed: int, dump: bytes | None,
           code: str) -> tuple[types.ToolResult, bytes | None]:
    """Returns the result and the dump to go on from; blocks."""
    printed = _Printed()
    policy = pydantic_monty.OSPolicy(sleep='zero', random_start={'seed': seed},
                                     datetime=datetime.datetime(2025, 1, 1))
    try:
      with pool.checkout(limits=self._limits, os_policy=policy) as worker:
        _bound(worker.worker_pid, self._time_limit + _GRACE + _ANSWER)
        if dump is not None:
          worker.load_session(dump)
        elif self._prelude:
          worker.feed_run(self._prelude)
        result = _feed(worker, code, printed)
        if result.error in ('timeout', 'memory'):
          return result, dump
        after = worker.dump()
    except pydantic_monty.MontyCrashedError as error:
      if error.timed_out:
        return base.failure('timeout', 'TimeoutError: time limit exceeded'), dump
      return base.failure('crash', 'the interpreter crashed'), dump
    if len(after) > self._state_memory:
      return base.failure('memory', 'MemoryError: variables too large'), dump
    return result, after


def _bound(pid: int | None, seconds: float):
  """Has the kernel end a process that computes about a second longer than this from now on.

  One in the midst of a single long operation heeds neither its own time limit nor that whoever started it is gone. Does
  nothing where a process cannot be bounded by another.
  """
  if pid is None or not hasattr(resource, 'prlimit'):
    return
  try:
    used = time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) gives for a process
    _, hard = resource.prlimit(pid, resource.RLIMIT_CPU)
    resource.prlimit(pid, resource.RLIMIT_CPU, (math.ceil(used + seconds) + 1, hard))
  except OSError:
    pass  # It is dead already, which its next answer says, or is not ours to bound.


class _Printed:
  """Keeps the head of what code prints, so that endless output costs no memory here."""

  def __init__(self):
    self._pieces: list[str] = []
    self._length = 0

  def __call__(self, stream: str, text: str):
    del stream
    if self._length < _CAPTURE:
      self._pieces.append(text[:_CAPTURE - self._length])
    self._length += len(text)

  def text(self) -> str:
    return ''.join(self._pieces)

  @property
  def cut(self) -> bool:
    return self._length > _CAPTURE


def _feed(worker: pydantic_monty.MontySession, code: str, printed: _Printed) -> types.ToolResult:
  try:
    value = worker.feed_run(code, print_callback=printed)
    shown = '' if value is None else value if isinstance(value, str) else repr(value)
  except (pydantic_monty.MontyRuntimeError, pydantic_monty.MontySyntaxError) as error:
    return _raised(error.exception(), printed)
  except ValueError as error:  # An integer of more digits than Python turns into text.
    return _raised(error, printed)
  text = printed.text() + shown
  return base.success(text.removesuffix('\n') or '(no output)', truncated=printed.cut)


def _raised(error: BaseException, printed: _Printed) -> types.ToolResult:
  kind = {TimeoutError: 'timeout', MemoryError: 'memory'}.get(type(error), 'raised')
  # The interpreter's own wording of a limit holds measured times, which no seed decides.
  words = {'timeout': 'TimeoutError: time limit exceeded',
           'memory': 'MemoryError: memory limit exceeded'}.get(kind) or base.worded(error)
  result = base.failure(kind, words, truncated=printed.cut)
  if not printed.text():
    return result
  before = types.Part('text', printed.text().removesuffix('\n') + '\n')
  return dataclasses.replace(result, parts=(before, *result.parts))
