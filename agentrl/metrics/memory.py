"""What compiling took of memory goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Iterator

import jax

from agentrl.metrics.timing import COMPILE_EVENT

# A compilation that took so long has left something worth returning, which takes some 10 ms.
LONG = 0.2


@contextlib.contextmanager
def returned_after_compiling() -> Iterator[None]:
  """A block after whose long compilations what they freed is returned: else glibc keeps it, up to half of the process's
  memory. Does nothing with other C libraries.
  """
  try:
    trim = ctypes.CDLL('libc.so.6').malloc_trim
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
