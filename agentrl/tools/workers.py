"""Warm worker processes that run one function and can be killed when they hang.

Nothing here belongs to an event loop, so a pool outlives `asyncio.run`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from typing import Any, Callable, Mapping

import cloudpickle

from agentrl.core import types
from agentrl.tools import base

_HEADER = struct.Struct('>Q')


class WorkerPool:
  """Up to `size` processes that run one function; started when first needed.

  Each busy worker is watched by a thread of a pool of the same size, so threads are bounded too.
  Cancelling a call kills its worker, and everything that the worker started; the next call gets a
  new one.
  """

  def __init__(self, fn: Callable[..., Any], size: int, memory: int):
    """Makes a pool without starting anything.

    Args:
      fn: Sent by reference if importable, else by value (closures, notebook functions).
      size: Most processes at once.
      memory: Address space of a worker, bytes.
    """
    self.size = size
    self._fn = cloudpickle.dumps(fn)
    self._memory = memory
    self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
    self._alive: set[_Worker] = set()
    self._lock = threading.Lock()
    self._threads: concurrent.futures.ThreadPoolExecutor | None = None

  async def call(self, arguments: Mapping[str, Any]) -> types.ToolResult:
    """Returns the result of `fn(**arguments)`; cancelling kills the worker."""
    with self._lock:
      if self._threads is None:
        self._threads = concurrent.futures.ThreadPoolExecutor(self.size, 'agentrl-tool')
      threads = self._threads
    job = _Job(dict(arguments))
    try:
      return await asyncio.get_running_loop().run_in_executor(threads, self._run, job)
    finally:
      job.cancel()

  def shutdown(self) -> None:
    """Kills every worker and waits until its thread has noticed."""
    with self._lock:
      threads, self._threads = self._threads, None
      for worker in self._alive:
        worker.kill()
    if threads is not None:
      threads.shutdown(wait=True, cancel_futures=True)
    while not self._idle.empty():
      self._drop(self._idle.get())

  def _run(self, job: _Job) -> types.ToolResult:
    try:
      worker = self._idle.get_nowait()
    except queue.Empty:
      worker = _Worker(self._fn, self._memory)
      with self._lock:
        self._alive.add(worker)
    if not job.start(worker):
      self._idle.put(worker)
      return base.failure('cancelled', 'cancelled')
    try:
      result = worker.ask(job.arguments)
      alive = True
    except (EOFError, BrokenPipeError):
      alive = False
    # From here on a cancellation leaves the worker alone.
    if job.finish() and alive:
      self._idle.put(worker)
      return result
    ending = self._drop(worker)
    return result if alive else base.failure('crash', f'tool crashed ({ending})')

  def _drop(self, worker: _Worker) -> str:
    with self._lock:
      self._alive.discard(worker)
      worker.kill()
      return worker.reap()


class _Job:
  """One call; decides races between its end and its cancellation."""

  def __init__(self, arguments: dict[str, Any]):
    self.arguments = arguments
    self._lock = threading.Lock()
    self._worker: _Worker | None = None
    self._over = False

  def start(self, worker: _Worker) -> bool:
    """Binds the worker; False if the call is cancelled already."""
    with self._lock:
      self._worker = worker
      return not self._over

  def finish(self) -> bool:
    """Unbinds the worker; False if it has been killed meanwhile."""
    with self._lock:
      self._worker = None
      return not self._over

  def cancel(self):
    with self._lock:
      self._over = True
      if self._worker is not None:
        self._worker.kill()


class _Worker:
  """A process that answers one pickled request at a time over its pipes."""

  def __init__(self, fn: bytes, memory: int):
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
    environment = {**os.environ, 'PYTHONPATH': paths,
                   # Thread pools of numerical libraries would eat the address space.
                   'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
    self._process = subprocess.Popen(
        [sys.executable, '-m', 'agentrl.tools._worker', str(os.getpid()), str(memory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment, start_new_session=True)
    self._fn = fn
    self._sent = False

  def ask(self, arguments: dict[str, Any]) -> types.ToolResult:
    if not self._sent:
      write(self._process.stdin, self._fn)
      self._sent = True
    write(self._process.stdin, pickle.dumps(arguments))
    return pickle.loads(read(self._process.stdout))

  def kill(self):
    """Only sends the signal: the thread that reads the pipes must be the one to close them."""
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass  # It is dead already.

  def reap(self) -> str:
    code = self._process.wait()
    for pipe in (self._process.stdin, self._process.stdout):
      try:
        pipe.close()
      except BrokenPipeError:
        pass  # Closing flushes bytes that nobody reads any more.
    return f'signal {-code}' if code < 0 else f'exit code {code}'


def write(stream: Any, payload: bytes) -> None:
  """Writes one length-prefixed message; blocks until it is taken."""
  stream.write(_HEADER.pack(len(payload)))
  stream.write(payload)
  stream.flush()


def read(stream: Any) -> bytes:
  """Reads one length-prefixed message; blocks.

  Raises:
    EOFError: if the stream ends first.
  """
  header = stream.read(_HEADER.size)
  if len(header) < _HEADER.size:
    raise EOFError('the stream ended')
  length = _HEADER.unpack(header)[0]
  payload = stream.read(length)
  if len(payload) < length:
    raise EOFError('the stream ended within a message')
  return payload
