"""Where the seconds go, and whether anything was compiled that should not have been."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Callable, Iterator

# Recorded by jax around every backend compilation. A hit in jax's persistent cache is recorded as
# well: it too means that a new program was asked for.
COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'


class Timer:
  """Seconds by named phase.

  An inner phase stops the clock of the outer one, so phases add up to wall time.

  One thread only.

  Example:
    >>> timer = Timer()
    >>> with timer('rollout'):
    ...   with timer('tool'):
    ...     pass
    >>> sorted(timer.pop())
    ['rollout', 'tool']
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._seconds: dict[str, float] = {}
    self._open: list[str] = []
    self._since = 0.0

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    """Counts the body's seconds for `phase`, also when it raises."""
    self._charge()
    self._open.append(phase)
    try:
      yield
    finally:
      self._charge()
      self._open.pop()

  def _charge(self):
    now = self._clock()
    if self._open:
      self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
    self._since = now

  def seconds(self) -> dict[str, float]:
    """Returns seconds by phase since the last `pop`, phases still open included."""
    self._charge()
    return dict(self._seconds)

  def pop(self) -> dict[str, float]:
    """Returns `seconds()` and starts again from zero; open phases go on."""
    seconds = self.seconds()
    self._seconds.clear()
    return seconds


class CompileCounter:
  """Counts XLA compilations of the whole process since `mark()`, on any thread.

  Example:
    >>> import jax
    >>> counter = CompileCounter()
    >>> float(jax.jit(lambda x: x * 3 + 2)(1.0))
    5.0
    >>> counter.mark()
    >>> counter.count
    0
  """

  def __init__(self):
    import jax  # Timer must not need it.
    self._lock = threading.Lock()
    self._count = 0
    self._seconds = 0.0
    self._names: list[str] = []
    self._unregister = jax.monitoring.unregister_event_duration_listener
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration: float, **metadata):
    if event == COMPILE_EVENT:
      with self._lock:
        self._count += 1
        self._seconds += duration
        self._names.append(str(metadata.get('fun_name', 'unknown')))

  def mark(self):
    """Starts again from zero: the end of warm-up."""
    with self._lock:
      self._count = 0
      self._seconds = 0.0
      self._names = []

  @property
  def count(self) -> int:
    """Compilations since `mark`."""
    return self._count

  @property
  def seconds(self) -> float:
    """Seconds spent compiling since `mark`."""
    return self._seconds

  @property
  def names(self) -> list[str]:
    """Functions compiled since `mark`, in order: which one was it?"""
    return list(self._names)

  def close(self):
    """Stops listening."""
    self._unregister(self._listen)
