"""How the slots of a call of `decode` read the blocks of their contexts: by block, or by table; see `agentrl.sampling.cache`.

Axes: S slots, N blocks, P tokens of a block, M shared blocks, J blocks for new tokens, B blocks of a context.
"""

from __future__ import annotations

from typing import Iterable, Mapping, Sequence

import numpy as np

from agentrl.sampling.cache import Reading
from agentrl.sampling.contexts import Contexts


def by_table(books: Contexts, seats: Sequence[int]) -> Reading:
  """Returns how seats read by the tables of their contexts.

  Args:
    books: No work is due in them.
    seats: Those that are to draw, the first in slot 0 and so on.
  """
  tables = np.full((books.slots, books.row), books.size, np.int32)
  for slot, mine in enumerate(_ids(books, seats).values()):
    tables[slot, :len(mine)] = mine
  nothing = np.zeros(0, np.int32)
  nobody = np.zeros((books.slots, 0), np.int32)
  return Reading(nothing, nothing, nothing, nothing, nothing, np.int32(0), nobody.astype(bool), nobody, tables)


def by_block(books: Contexts, seats: Sequence[int]) -> Reading:
  """Returns how seats read block after block.

  Args:
    books: `unshare` has been called, and no work is due.
    seats: Those that are to draw, the first in slot 0 and so on.
  """
  n, p = books.size, books.block
  ids = _ids(books, seats)
  seen = [mine[:-(-books.contexts[seat].held // p)] for seat, mine in ids.items()]
  readers = _readers(books, seen)
  owners, fills, starts = np.full(n, books.slots, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
  common = []
  for slot, (seat, mine) in enumerate(zip(seats, seen)):
    begin = np.arange(len(mine), dtype=np.int32) * p
    alone = readers[mine] == 1
    owners[mine[alone]] = slot
    fills[mine[alone]] = np.minimum(p, books.contexts[seat].held - begin[alone])
    starts[mine[alone]] = begin[alone]
    common.append((mine[~alone], begin[~alone]))
  shared = _in_common(books, np.flatnonzero(readers > 1), books.most_shared, common)
  return Reading(owners, fills, starts, *shared, _targets(books, ids))


def _ids(books: Contexts, seats: Iterable[int]) -> dict[int, np.ndarray]:
  """Returns the blocks of seats' contexts, by seat."""
  return {seat: np.array([b.id for b in books.contexts[seat].blocks], np.int32) for seat in seats}


def _readers(books: Contexts, blocks: Sequence[np.ndarray]) -> np.ndarray:
  """Returns [N] int: how many of some lists a block is in."""
  return np.bincount(np.concatenate([np.zeros(0, np.int32), *blocks]), minlength=books.size)


def _in_common(books: Contexts, shared: np.ndarray, most: int,
               read: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.int32, np.ndarray]:
  """Returns what `Reading` says of shared blocks: which, positions, how many, and who reads them.

  Args:
    books: Whose blocks.
    shared: [n] int. Which.
    most: M.
    read: Of each slot those that it reads, and their positions.
  """
  ids, starts, sharers = np.zeros(most, np.int32), np.zeros(most, np.int32), np.zeros((books.slots, most), bool)
  ids[:len(shared)] = shared
  place = np.zeros(books.size, np.int32)
  place[shared] = np.arange(len(shared))
  for slot, (mine, begin) in enumerate(read):
    sharers[slot, place[mine]] = True
    starts[place[mine]] = begin
  return ids, starts, np.int32(len(shared)), sharers


def _targets(books: Contexts, ids: Mapping[int, np.ndarray]) -> np.ndarray:
  """Returns [S, J] int32: the blocks that what is new goes to."""
  targets = np.full((books.slots, books.spread), books.size, np.int32)
  for slot, (seat, mine) in enumerate(ids.items()):
    new = mine[books.contexts[seat].held // books.block:]
    targets[slot, :len(new)] = new
  return targets
