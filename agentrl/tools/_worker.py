"""The process behind a function tool: reads a function, then answers calls until its input ends.

    python -m agentrl.tools._worker <pid of the parent> <address space in bytes>
"""

from __future__ import annotations

import os
import pickle
import resource
import sys
import threading
import time
from typing import Any

from agentrl.core import types
from agentrl.tools import base
from agentrl.tools import functions
from agentrl.tools import workers

# Far above any executor's limit: keeps a huge result from crossing the pipe.
_LARGEST = 1 << 20


def main() -> None:
  """Serves one parent."""
  parent, memory = int(sys.argv[1]), int(sys.argv[2])
  requests, replies = _take_pipes()
  threading.Thread(target=_watch, args=(parent,), daemon=True).start()
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  try:
    fn = pickle.loads(workers.read(requests))
    while True:
      arguments = pickle.loads(workers.read(requests))
      workers.write(replies, pickle.dumps(_answer(fn, arguments)))
  except EOFError:
    return  # The parent closed the pipe.


def _answer(fn: Any, arguments: dict[str, Any]) -> types.ToolResult:
  try:
    return base.cut(functions.as_result(fn(**arguments)), _LARGEST)
  except BaseException as error:  # Boundary to the tool: what it raises is the result.
    return base.failure('raised', base.worded(error))


def _take_pipes():
  """Keeps the pipes for the protocol; what the tool prints or reads goes nowhere."""
  requests = os.fdopen(os.dup(0), 'rb')
  replies = os.fdopen(os.dup(1), 'wb')
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null, 0)
  os.dup2(null, 1)
  return requests, replies


def _watch(parent: int):
  """Ends this process soon after its parent, even when the tool hangs."""
  while os.getppid() == parent:
    time.sleep(1.0)
  os._exit(1)


if __name__ == '__main__':
  main()
