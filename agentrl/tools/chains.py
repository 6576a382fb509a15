"""The facts of the chain world, and its tools: one that knows them and one that knows nothing.

A fact says what a relation makes of a digit: 'F4' is 7. Each relation is a permutation of the ten
digits, so one wrong step makes the end wrong. Public relations are the same in every task and can
be learned by heart; private ones are drawn anew for every task and have to be looked up.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, Mapping

import numpy as np

from agentrl.core import types
from agentrl.tools import base

DIGITS = 10
PRIVATE = 'FGHK'
PUBLIC = 'PQ'
# The largest number that a step adds.
MAX_ADDEND = 3
# What separates the two candidates of an ambiguous answer.
OR = '/'
_TABLE_BITS = 31
_SEED_BITS = 32


def fact(name: str, table: int) -> int:
  """Returns what a fact says, 0 to 9.

  Args:
    name: A relation's letter and a digit, such as 'F4'.
    table: Of the task; only private relations depend on it.
  Raises:
    ValueError: if there is no such fact.
  Example:
    >>> fact('P4', table=1) == fact('P4', table=2)
    True
    >>> sorted(fact(f'F{digit}', table=1) for digit in range(10)) == list(range(10))
    True
  """
  if len(name) != 2 or name[0] not in PRIVATE + PUBLIC or name[1] not in '0123456789':
    raise ValueError(f'there is no fact {name!r}')
  relation, digit = name
  return _permutation(relation, table if relation in PRIVATE else -1)[int(digit)]


@functools.lru_cache(maxsize=1 << 16)
def _permutation(relation: str, table: int) -> tuple[int, ...]:
  order = np.argsort([_draw('fact', relation, table, digit) for digit in range(DIGITS)])
  return tuple(int(i) for i in order)


def _draw(*key: Any) -> float:
  """Returns a number in [0, 1) that follows from the key alone."""
  digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') / 2.0**64


def session_seed(table: int, seed: int) -> int:
  """Returns the seed of a tool session: the task's table and the episode's own seed in one number.

  Raises:
    ValueError: if the table is no 31 bit or the seed no 32 bit number.
  """
  if not (0 <= table < 1 << _TABLE_BITS and 0 <= seed < 1 << _SEED_BITS):
    raise ValueError(f'table={table} or seed={seed} is out of range')
  return table << _SEED_BITS | seed


@dataclasses.dataclass(frozen=True)
class Page:
  """State of a tool in one episode.

  Attributes:
    table: Of the task.
    seed: Of the episode.
    calls: Calls made so far.
    asked: Ambiguous facts that were asked for already.
  """

  table: int
  seed: int
  calls: int = 0
  asked: frozenset[str] = frozenset()


class _ChainTool(base.Tool):
  """A tool whose state is a `Page`, replaced and never changed, so that it is its own snapshot."""

  stateful = True
  parameters = {'type': 'object', 'properties': {'fact': {'type': 'string'}}, 'required': ['fact'],
                'additionalProperties': False}

  async def open(self, seed: int) -> list[Page]:
    """Returns the state of an episode; `seed` is a `session_seed`."""
    return [Page(table=seed >> _SEED_BITS, seed=seed & (1 << _SEED_BITS) - 1)]

  async def snapshot(self, state: list[Page]) -> Page:
    """Returns the page, a value."""
    return state[0]

  async def restore(self, snapshot: Page) -> list[Page]:
    """Returns a new state."""
    return [snapshot]


@base.TOOLS.register('lookup')
class Lookup(_ChainTool):
  """Answers a fact.

  A call fails at a rate, with an error of kind 'transient': asking again is a new draw. Some facts
  are ambiguous: at first asking the answer is two digits, one of them right, and at the second the
  right one.
  """

  name = 'lookup'
  description = 'Looks up a fact.'

  def __init__(self, fail_rate: float = 0.0, ambiguous_rate: float = 0.0):
    """Makes the tool.

    Args:
      fail_rate: Share of calls that fail, in [0, 1).
      ambiguous_rate: Share of private facts that are ambiguous, in [0, 1].
    Raises:
      ValueError: if a rate is out of range.
    """
    if not (0.0 <= fail_rate < 1.0 and 0.0 <= ambiguous_rate <= 1.0):
      raise ValueError(f'fail_rate={fail_rate} must be in [0, 1) and '
                       f'ambiguous_rate={ambiguous_rate} in [0, 1]')
    self._fail_rate = fail_rate
    self._ambiguous_rate = ambiguous_rate

  async def call(self, state: list[Page], arguments: Mapping[str, Any]) -> types.ToolResult:
    """Returns the digit, two of them, or why there is none."""
    page, name = state[0], arguments['fact']
    state[0] = dataclasses.replace(page, calls=page.calls + 1, asked=page.asked | {name})
    try:
      value = fact(name, page.table)
    except ValueError:
      return base.failure('no_such_fact', 'no fact')
    if _draw('fails', page.seed, page.calls) < self._fail_rate:
      state[0] = dataclasses.replace(state[0], asked=page.asked)
      return base.failure('transient', 'busy')
    if name not in page.asked and self._is_ambiguous(name, page.table):
      other = (value + 1 + int(9 * _draw('other', name, page.table))) % DIGITS
      return base.success(f'{min(value, other)}{OR}{max(value, other)}')
    return base.success(str(value))

  def _is_ambiguous(self, name: str, table: int) -> bool:
    return name[0] in PRIVATE and _draw('ambiguous', name, table) < self._ambiguous_rate


@base.TOOLS.register('noise')
class Noise(_ChainTool):
  """Answers any question with a random digit: no call of it is worth its tokens."""

  name = 'noise'
  description = 'Says something.'

  async def call(self, state: list[Page], arguments: Mapping[str, Any]) -> types.ToolResult:
    """Returns a digit that follows from the episode and the number of the call."""
    page = state[0]
    state[0] = dataclasses.replace(page, calls=page.calls + 1)
    return base.success(str(int(DIGITS * _draw('noise', page.seed, page.calls))))
