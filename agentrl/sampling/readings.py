"""How the slots of a call of `decode` read the blocks of their contexts: in place, or gathered; see `agentrl.sampling.cache`.

Axes: S slots, N blocks, P tokens of a block, M shared blocks, J blocks for new tokens, G rows that are gathered.
"""

from __future__ import annotations

from typing import Iterable, Mapping, NamedTuple, Sequence

import numpy as np

from agentrl.sampling.cache import Reading, Rows
from agentrl.sampling.contexts import SHARED_BY, Contexts

# Columns of a row of which a slot may have several: of longer ones more is left empty, shorter ones are slower to read.
ROW_TOKENS = 96
# Most columns of a slot's only row: a layout more is a program more to compile, and long contexts seldom are alike.
MOST_SINGLE = 512


class Layout(NamedTuple):
  """A shape that what slots alone read is gathered into.

  Attributes:
    rows: G.
    blocks: Of a row.
    single: Whether row s is slot s's, and no slot has another.
  """

  rows: int
  blocks: int
  single: bool


def layouts_for(capacities: Sequence[int], slots: int, context: int, block: int) -> tuple[Layout, ...]:
  """Returns layouts with room for so many tokens a slot on average, the smaller ones first.

  Rows of which a slot may have several waste little where contexts are of different length; with one row a slot a step is
  a few per cent faster. The largest has room for all slots at their longest.

  >>> for layout in layouts_for((64, 128, 288, 300), 4, 300, 32):
  ...   print(*layout)
  4 2 True
  4 4 True
  6 3 False
  4 9 True
  12 3 False
  4 10 True
  16 3 False
  """
  found = {Layout(slots, -(-capacity // block), True) for capacity in capacities if capacity <= MOST_SINGLE}
  blocks = max(1, min(ROW_TOKENS, capacities[-1]) // block)
  columns = blocks * block
  for capacity in capacities:
    rows = slots * -(-capacity // columns) if capacity == capacities[-1] else -(-slots * capacity // columns)
    if capacity >= columns:
      found.add(Layout(max(rows, -(-context // columns)), blocks, False))
  return tuple(sorted(found, key=lambda layout: (layout.rows * layout.blocks, not layout.single)))


def gathered(books: Contexts, reaches: Mapping[int, int], layouts: Sequence[Layout]) -> Reading | None:
  """Returns how seats read what is gathered into the first of the layouts that has room for it; None if none has.

  Args:
    books: No work is due in them.
    reaches: Of the seats that are to draw, the first in slot 0 and so on: most tokens of their contexts after it.
    layouts: Not empty.
  """
  p, most = books.block, min(books.most_shared, books.row)
  ids = _ids(books, reaches)
  full = [mine[:books.contexts[seat].held // p] for seat, mine in ids.items()]
  shared = np.flatnonzero(_readers(books, full) >= max(2, SHARED_BY * books.slots))[:most]
  # Of blocks in common, those that a context begins with.
  begun = [mine[:np.argmin(np.append(np.isin(mine, shared), False))] for mine in full]
  wanted = [reach - len(mine) * p for reach, mine in zip(reaches.values(), begun)]
  layout = next((x for x in layouts if _has_room(x, p, wanted)), None)
  if layout is None:
    return None
  columns = layout.blocks * p
  blocks, starts = np.zeros((layout.rows, layout.blocks), np.int32), np.zeros(layout.rows, np.int32)
  owners, firsts = np.full(layout.rows, books.slots, np.int32), np.full(books.slots, layout.rows, np.int32)
  at = 0
  for slot, mine in enumerate(ids.values()):
    at, count, common = slot if layout.single else at, -(-wanted[slot] // columns), len(begun[slot])
    firsts[slot], owners[at:at + count] = at, slot
    starts[at:at + count] = common * p + np.arange(count) * columns
    own = mine[common:][:count * layout.blocks]
    blocks[at:at + count].reshape(-1)[:len(own)] = own
    at += count
  rows = Rows(blocks, None if layout.single else owners, starts, firsts)
  nothing = np.zeros(0, np.int32)
  common = [(mine, np.arange(len(mine)) * p) for mine in begun]
  return Reading(nothing, nothing, nothing, *_in_common(books, shared, most, common), _targets(books, ids), rows)


def _has_room(layout: Layout, block: int, wanted: Iterable[int]) -> bool:
  rows = [-(-tokens // (layout.blocks * block)) for tokens in wanted]
  return max(rows, default=0) <= 1 if layout.single else sum(rows) <= layout.rows


def in_place(books: Contexts, seats: Sequence[int]) -> Reading:
  """Returns how seats read blocks where they are.

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
