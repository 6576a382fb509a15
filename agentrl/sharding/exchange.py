"""What the processes of one run tell each other: short messages, payloads, refusals.

All of it is collective: every process makes the same calls in the same order, from its main thread. With one process
nothing is sent. Waiting has no time limit: a process may be as slow as its tools are, and one that dies takes the others
with it, as jax's coordination service notices.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Callable, Iterator, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

T = TypeVar('T')

# What fits is sent through the coordinator; what does not goes over the devices' network, in parts of one shape.
MESSAGE_BYTES = 16 << 10
PART_BYTES = 1 << 20
_FOREVER_MS = 7 * 24 * 3600 * 1000
_numbers = itertools.count()


class PeerError(ValueError):
  """What another process of the run was refused for; the message says which."""


def count() -> int:
  """Returns how many processes the run has."""
  return jax.process_count()


def is_first() -> bool:
  """Whether this is the process that writes; the others read."""
  return jax.process_index() == 0


def warm_up():
  """Compiles what a long message needs."""
  if count() > 1:
    _gather_long(b'', [1] * count())


def gather(value: bytes) -> list[bytes]:
  """Returns the value of every process, in their order; waits for the slowest."""
  if count() == 1:
    return [value]
  short = len(value) <= MESSAGE_BYTES
  heads = _gather_short(value if short else b'', len(value))
  if all(len(message) == size for size, message in heads):
    return [message for _, message in heads]
  return _gather_long(value, [size for size, _ in heads])


def wait():
  """Returns once every process has called it."""
  gather(b'')


def any_process(flag: bool) -> bool:
  """Whether the flag is set on any process."""
  return any(gather(b'1' if flag else b''))


def same(value: bytes) -> bool:
  """Whether the value is the same on every process."""
  return len(set(gather(value))) == 1


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Runs a body that fails on every process where it fails on one. Nothing in it may be collective.

  Raises:
    PeerError: if the body failed on another process only.
  """
  error = None
  try:
    yield
  except Exception as caught:  # pylint: disable=broad-except  # told to the others, then raised
    error = caught
  messages = gather(b'' if error is None else (str(error) or type(error).__name__).encode()[:MESSAGE_BYTES])
  if error is not None:
    raise error
  for process, message in enumerate(messages):
    if message:
      raise PeerError(f'process {process}: {message.decode(errors="replace")}')


def in_turn(function: Callable[[], T]) -> T:
  """Returns what the function returns, called on the first process and then on all others: it writes, they read.

  Raises:
    PeerError: if it failed on another process only.
  """
  results: list[T] = []
  for own_turn in (is_first(), not is_first()):
    with together():
      if own_turn:
        results.append(function())
  return results[0]


def to_host(tree: Any) -> Any:
  """Returns a tree of arrays as numpy arrays, wherever in the run they lie."""
  def whole(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)

  return jax.tree.map(whole, tree)


def _gather_short(message: bytes, size: int) -> list[tuple[int, bytes]]:
  """Returns the (size, message) of every process."""
  client = _client()
  number = next(_numbers)
  folder = f'agentrl/{number}/'
  client.key_value_set_bytes(f'{folder}{jax.process_index():08d}', size.to_bytes(8, 'big') + message)
  client.wait_at_barrier(f'agentrl/{number}', _FOREVER_MS)
  found = [value for _, value in sorted(client.key_value_dir_get_bytes(folder))]
  if number and is_first():  # Whoever is here has read the messages before these.
    client.key_value_delete(f'agentrl/{number - 1}/')
  return [(int.from_bytes(value[:8], 'big'), value[8:]) for value in found]


def _gather_long(value: bytes, sizes: list[int]) -> list[bytes]:
  values = [bytearray() for _ in sizes]
  for start in range(0, max(sizes), PART_BYTES):
    part = np.zeros(PART_BYTES, np.uint8)
    own = np.frombuffer(value[start:start + PART_BYTES], np.uint8)
    part[:len(own)] = own
    for gathered, row in zip(values, multihost_utils.process_allgather(part)):
      gathered += row.tobytes()
  return [bytes(gathered[:size]) for gathered, size in zip(values, sizes)]


def _client() -> Any:
  from jax._src import distributed  # pylint: disable=g-import-not-at-top  # jax has no public way to it
  client = distributed.global_state.client
  if client is None:
    raise RuntimeError(f'there are {count()} processes, but jax.distributed was not initialised: call '
                       'agentrl.sharding.processes.start before anything else')
  return client
