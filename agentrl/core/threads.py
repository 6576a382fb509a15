"""Work on host memory, shared by a few threads."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from typing import Any, Callable, Iterable

MOST = 8  # more gain nothing: memory is then what is waited for
_WORTH_IT = 4 << 20  # bytes


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(min(MOST, os.cpu_count() or 1), 'memory')


def each(function: Callable[..., Any], items: Iterable[tuple], size: int):
  """Calls function(*item) for every item, in any order and from several threads if it is about `size` bytes, and those are many.

  Gains where the function lets go of the interpreter's lock, as copies of numpy and reads of files do. Blocks until all
  are done.

  Raises:
    Exception: the first that a call raised.
  """
  if size < _WORTH_IT:
    for item in items:
      function(*item)
  else:
    for done in [_pool().submit(function, *item) for item in items]:
      done.result()
