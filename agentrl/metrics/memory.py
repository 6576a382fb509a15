"""How much memory the process keeps that it does not use."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Iterator

import jax

from agentrl.metrics.timing import COMPILE_EVENT

# Seconds of a compilation that leaves something worth returning, which takes some 10 ms.
LONG = 0.2
# Heaps that all threads share; by itself glibc makes up to eight a core.
ARENAS = 2
_M_ARENA_MAX = -8  # of malloc.h


@contextlib.contextmanager
def economical() -> Iterator[None]:
  """A block in which what a long compilation frees goes back to the system, where glibc would keep it.

  From here on, and after the block as well, threads share their heaps. Does nothing with other C libraries.
  """
  try:
    libc = ctypes.CDLL('libc.so.6')
    trim = libc.malloc_trim
    libc.mallopt(_M_ARENA_MAX, ARENAS)
  except (OSError, AttributeError):
    yield
    return

  def listen(event: str, seconds: float, **_):
    if event == COMPILE_EVENT and seconds >= LONG:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
