"""The host's books of the cache: which blocks each context holds, which are free, and what is to be written when.

Nothing here touches the device. Changes are noted as work, in steps: what a step reads was written by an earlier one.
A context whose prompt another is about to compute takes its blocks over at once and computes only what it has beyond
them, one step later.

Axes: S slots, N blocks, P tokens of a block, M shared blocks, J blocks for new tokens.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Callable, NamedTuple, Sequence

import numpy as np

from agentrl.sampling.prefixes import Block, Node, PrefixTree

# A block that at least this share of the slots read is read once for all; of others, each reads a copy.
SHARED_BY = 1 / 4
# Most shared blocks that a call reads; of more, slots read copies.
MOST_SHARED = 1024
# Share of the blocks that hold beginnings of contexts no longer there.
KEPT_IDLE = 1 / 16
# The cache becomes smaller if what it holds fills no more than this share of the smaller size.
SHRINK_BELOW = 0.8


class CacheFull(Exception):
  """There is no block left, and none to be had."""


class Copy(NamedTuple):
  """A block to be copied: ids."""

  source: int
  target: int


class Write(NamedTuple):
  """Tokens to be computed.

  Attributes:
    seat: Whose.
    start: Position of the first.
    tokens: [n] int32.
    blocks: Blocks of the context from its beginning to the last of these tokens.
    policy: Which weights compute them.
  """

  seat: int
  start: int
  tokens: np.ndarray
  blocks: list[Block]
  policy: str


@dataclasses.dataclass
class Context:
  """What a seat holds.

  Attributes:
    policy: Whose keys and values.
    blocks: In order.
    held: Tokens.
    node: Of the tree, as far as the context is in it by whole blocks.
    noted: Tokens of it that are in the tree.
    age: Of the books when it was opened, see `Contexts.outdate`.
  """

  policy: str
  node: Node
  age: int
  blocks: list[Block] = dataclasses.field(default_factory=list)
  held: int = 0
  noted: int = 0


@dataclasses.dataclass
class Parked:
  """A context that has left its seat: blocks that others hold as well, and a copy of the others' content.

  Attributes:
    policy: Whose keys and values.
    tokens: [held] int32.
    kept: By index into the context's blocks, those still in the cache.
    keys: [L, n, K, Dh, P], the others' in order.
    values: [L, n, K, P, Dh].
    generation: Of the cache; of no use once that has been emptied.
    age: See `Context`.
  """

  policy: str
  tokens: np.ndarray
  kept: dict[int, Block]
  keys: np.ndarray
  values: np.ndarray
  generation: int
  age: int

  @property
  def nbytes(self) -> int:
    """Bytes outside the cache."""
    return self.keys.nbytes + self.values.nbytes


class Contexts:
  """The books of one cache."""

  def __init__(self, slots: int, context: int, block: int, sizes: Sequence[int], reach: int, share: bool = True,
               seats: int = 0):
    """Opens the books of an empty cache.

    Args:
      slots: S, how many contexts draw in a call at most.
      context: Most tokens of a context.
      block: P.
      sizes: Numbers of blocks that the cache may have, ascending.
      reach: Most tokens that a seat draws in a call.
      share: Whether contexts take over what others began with.
      seats: How many there may be at a time; 0 for as many as slots.
    """
    self.slots, self.seats, self.block, self.sizes, self._share = slots, seats or slots, block, tuple(sizes), share
    self.row = -(-context // block)  # most blocks of a context
    self.most_shared = min(self.sizes[-1], MOST_SHARED)
    self.spread = (reach + block - 2) // block + 1  # most blocks that a call writes to in a seat
    self.tokens = np.zeros((self.seats, self.row * block + 1), np.int32)  # and the pending one
    self.tree = PrefixTree(block)
    self.generation = self.age = 0
    self.clear()

  def clear(self):
    """Forgets everything."""
    self.size = self.sizes[0]
    self._all: dict[int, Block] = {}  # that hold something
    self._free = list(range(self.size))
    self.tree.clear()
    self.generation += 1
    self.contexts: list[Context | None] = [None] * self.seats
    self._steps: dict[int, list[Copy | Write]] = {}
    self._due: list[Block] = []
    self._pinned: list[Block] = []

  def outdate(self):
    """Has no context that is opened from here on begin as one does that is there; no work may be due."""
    self.tree.clear()
    for block in list(self._all.values()):
      block.nodes = block.sealed = 0
      self._free_if_unused(block)
    self.age += 1

  # ---- contexts ---------------------------------------------------------------------------------

  def open(self, seat: int, tokens: np.ndarray, policy: str = '') -> int:
    """Gives a seat what the cache has of the beginning of a context, and returns how many tokens that are."""
    self.close(seat)
    path, best, common = self.tree.match(policy, tokens)
    context = Context(policy, path[-1] if path else self.tree.root(policy), self.age)
    self.contexts[seat] = context
    for node in path:
      self._hold(context, node.block)
    if best is not None:
      self._begin_like(context, best.block, common)
    else:
      common = 0
    context.held = context.noted = min(len(path) * self.block + common, len(context.blocks) * self.block)
    self.tokens[seat, :context.held] = tokens[:context.held]
    return context.held

  def _begin_like(self, context: Context, block: Block, common: int):
    """Gives a context a last block whose first `common` tokens are those of `block`, if there is room for one."""
    if not block.users and common >= block.sealed:
      self._hold(context, block)
      return
    try:
      self._hold(context, self._copied(block))
    except CacheFull:
      pass

  def _hold(self, context: Context, block: Block):
    block.users += 1
    context.blocks.append(block)

  def _copied(self, source: Block) -> Block:
    source.pins += 1  # until it is copied
    try:
      target = self._new()
    except CacheFull:
      source.pins -= 1
      raise
    self._pinned.append(source)
    step = 2 * (source.due // 2 + 1)  # copies come at even steps, writes at odd ones
    self._at(step, Copy(source.id, target.id), [target])
    return target

  def _at(self, step: int, work: Copy | Write, written: Sequence[Block]):
    self._steps.setdefault(step, []).append(work)
    for block in written:
      block.due = step
      self._due.append(block)

  def write(self, seat: int, start: int, tokens: np.ndarray):
    """Has tokens computed from position `start` on, where the seat's context ends.

    Raises:
      CacheFull: if there is no room for them.
      ValueError: if the context ends elsewhere.
    """
    if self.contexts[seat].held != start:
      raise ValueError(f'seat {seat} holds {self.contexts[seat].held} tokens and cannot go on from {start}')
    context, end = self.contexts[seat], start + len(tokens)
    self.reach(seat, end)
    self.tokens[seat, start:end] = tokens
    blocks = context.blocks[:-(-end // self.block)]
    step = 2 * ((max(b.due for b in blocks) + 1) // 2) + 1
    self._at(step, Write(seat, start, np.asarray(tokens, np.int32), blocks, context.policy),
             blocks[start // self.block:])
    context.held = end
    if context.noted == start:
      self.note(seat)

  def reach(self, seat: int, length: int):
    """Makes room for a context of `length` tokens whose tokens from `held` on are to be written.

    Raises:
      CacheFull: if there is none.
    """
    context = self.contexts[seat]
    at, inside = divmod(context.held, self.block)
    if inside and at < len(context.blocks):
      open_block = context.blocks[at]
      if open_block.users > 1 or open_block.sealed > inside:
        context.blocks[at] = self._copied(open_block)
        context.blocks[at].users += 1
        self._drop(open_block)
    while len(context.blocks) * self.block < length:
      self._hold(context, self._new())

  def lacking(self, seat: int, length: int) -> int:
    """Returns how many blocks more a seat's context needs to have room for `length` tokens."""
    context = self.contexts[seat]
    return max(0, -(-length // self.block) - (len(context.blocks) if context else 0))

  def wanting(self, tokens: np.ndarray, length: int, policy: str = '', parked: Parked | None = None) -> int:
    """Returns how many blocks must be had to open a context with room for `length` tokens.

    Args:
      tokens: [n] int32. What it is to begin with.
      length: See above.
      policy: Whose context it is.
      parked: What the host has of it; None for nothing.
    """
    if parked is not None and parked.generation == self.generation:
      there = len(parked.kept)
    else:
      there = sum(1 for node in self.tree.match(policy, tokens)[0] if node.block.users)
    return -(-length // self.block) - there

  def truncate(self, seat: int, length: int):
    """Cuts a seat's context; blocks beyond are free."""
    context = self.contexts[seat]
    for block in context.blocks[-(-length // self.block):]:
      self._drop(block)
    del context.blocks[-(-length // self.block):]
    context.held = min(context.held, length)
    if context.noted > length:
      context.noted = length
      while context.node.parent is not None and self._depth(context.node) * self.block > length:
        context.node = context.node.parent

  def _depth(self, node: Node) -> int:
    depth = 0
    while node.parent is not None:
      node, depth = node.parent, depth + 1
    return depth

  def note(self, seat: int):
    """Lets others begin as the seat's context does, as far as it is held."""
    context, p = self.contexts[seat], self.block
    if not self._share or context.age != self.age:
      return
    if context.node.gone:
      context.node, context.noted = self.tree.root(context.policy), 0
    at = context.noted // p
    while at * p < context.held:
      tokens = self.tokens[seat, at * p:min((at + 1) * p, context.held)]
      node = self.tree.add(context.node, tokens, context.blocks[at])
      if len(tokens) < p:
        break
      context.node, at = node, at + 1
    context.noted = context.held

  def close(self, seat: int):
    """Empties a seat; what it held is kept for others while there is room."""
    context = self.contexts[seat]
    if context is not None:
      self.note(seat)
      for block in context.blocks:
        self._drop(block)
      self.contexts[seat] = None

  def drew(self, seat: int, tokens: Sequence[int]):
    """Takes note of what a seat drew: the cache holds the token that was pending and all of these but the last."""
    context = self.contexts[seat]
    self.tokens[seat, context.held + 1:context.held + 1 + len(tokens)] = tokens
    context.held += len(tokens)
    self.truncate(seat, context.held)

  def is_due(self, seat: int) -> bool:
    """Whether work is to be done on a seat's blocks."""
    context = self.contexts[seat]
    return context is not None and any(b.due >= 0 for b in context.blocks)

  def take_steps(self) -> list[list[Copy | Write]]:
    """Returns what is to be done, step by step, and takes it for done."""
    steps = [self._steps[step] for step in sorted(self._steps)]
    for block in self._due:
      block.due = -1
    for block in self._pinned:
      block.pins -= 1
      self._free_if_unused(block)
    self._steps, self._due, self._pinned = {}, [], []
    return steps

  def park(self, seat: int, take: Callable[[list[int]], tuple[np.ndarray, np.ndarray]]) -> Parked:
    """Empties a seat and returns what it held; no work may be due.

    Args:
      seat: Which.
      take: From ids of blocks to their keys [L, n, K, Dh, P] and values [L, n, K, P, Dh].
    """
    context = self.contexts[seat]
    self.truncate(seat, context.held)  # room for more may have been made
    kept = {i: block for i, block in enumerate(context.blocks) if block.users > 1}
    alone = [block for block in context.blocks if block.users == 1]
    keys, values = take([b.id for b in alone]) if alone else (np.zeros((0,) * 5), np.zeros((0,) * 5))
    parked = Parked(context.policy, self.tokens[seat, :context.held].copy(), kept, keys, values, self.generation,
                    context.age)
    for block in alone:
      self._drop(block)
    self.contexts[seat] = None
    return parked

  def unpark(self, seat: int, parked: Parked) -> list[int]:
    """Gives a seat what was parked, and returns the blocks that the copies are to be put into.

    Raises:
      CacheFull: if there is no room; nothing is changed then.
    """
    self.close(seat)
    context = self.contexts[seat] = Context(parked.policy, self.tree.root(parked.policy), parked.age)
    if parked.generation != self.generation:
      return []
    count = -(-len(parked.tokens) // self.block)
    put: list[Block] = []
    try:
      while len(put) < count - len(parked.kept):
        put.append(self._new())
    except CacheFull:
      for block in put:
        self._free_if_unused(block)
      self.contexts[seat] = None
      raise
    fresh = iter(put)
    for i in range(count):
      block = parked.kept.get(i)
      context.blocks.append(block if block is not None else next(fresh))
    for block in put:
      block.users += 1
    context.held = len(parked.tokens)
    self.tokens[seat, :context.held] = parked.tokens
    return [b.id for b in put]

  def again(self, parked: Parked) -> Parked:
    """Returns the same once more, to be unparked or forgotten apart."""
    if parked.generation == self.generation:
      for block in parked.kept.values():
        block.users += 1
    return dataclasses.replace(parked)

  def forget(self, parked: Parked):
    """Lets go of what will not be unparked."""
    if parked.generation == self.generation:
      for block in parked.kept.values():
        self._drop(block)

  # ---- blocks -----------------------------------------------------------------------------------

  @property
  def used(self) -> int:
    """Blocks that hold something."""
    return len(self._all)

  @property
  def stored(self) -> int:
    """Tokens that contexts in slots hold, those of a block that several hold counted once."""
    fills: dict[int, int] = {}
    for context in self.contexts:
      for i, block in enumerate(context.blocks if context else ()):
        fills[block.id] = max(fills.get(block.id, 0), min(self.block, context.held - i * self.block))
    return sum(f for f in fills.values() if f > 0)

  def available(self) -> int:
    """Returns how many blocks may still be had."""
    idle = sum(1 for b in self._all.values() if not (b.users or b.pins) and b.due < 0)
    return self.sizes[-1] - len(self._all) + idle

  def _new(self) -> Block:
    if not self._free and self.size < self.sizes[-1]:
      grown = self.sizes[self.sizes.index(self.size) + 1]
      self._free.extend(range(self.size, grown))
      heapq.heapify(self._free)
      self.size = grown
    while not self._free:
      idle = self.tree.idle()
      if not idle:
        raise CacheFull(f'all {self.size} blocks of {self.block} tokens are in use')
      self._forget(idle[0])
    block = Block(heapq.heappop(self._free))
    self._all[block.id] = block
    return block

  def _drop(self, block: Block):
    block.users -= 1
    self._free_if_unused(block)

  def _forget(self, leaf: Node):
    self.tree.remove(leaf)
    self._free_if_unused(leaf.block)

  def _free_if_unused(self, block: Block):
    if not (block.users or block.nodes or block.pins) and block.id in self._all:
      del self._all[block.id]
      heapq.heappush(self._free, block.id)

  def tidy(self) -> list[Copy]:
    """Forgets beginnings beyond what is to be kept; returns the copies to make before the cache may shrink to `size`.

    No work may be due.
    """
    busy = sum(1 for b in self._all.values() if b.users)
    smaller = [s for s in self.sizes if s < self.size and busy <= SHRINK_BELOW * s]
    kept = max(self.row, int(KEPT_IDLE * len(self._all)))
    if smaller:
      kept = min(kept, int(SHRINK_BELOW * smaller[0]) - busy)
    self._forget_idle(len(self._all) - busy - kept)
    return self._compact(smaller[0]) if smaller and len(self._all) <= smaller[0] else []

  def _forget_idle(self, count: int):
    """Forgets `count` beginnings that no context uses, or all of them."""
    while count > 0 and (leaves := self.tree.idle()):
      for leaf in leaves[:count]:
        self._forget(leaf)
      count -= len(leaves)

  def _compact(self, size: int) -> list[Copy]:
    holes = iter(sorted(set(range(size)) - set(self._all)))
    copies = []
    for block in [b for b in self._all.values() if b.id >= size]:
      target = next(holes)
      copies.append(Copy(block.id, target))
      del self._all[block.id]
      block.id = target
      self._all[target] = block
    self.size = size
    self._free = sorted(set(range(size)) - set(self._all))
    return copies

  # ---- decoding ---------------------------------------------------------------------------------

  def unshare(self, seats: Sequence[int]):
    """Gives each of the seats that are to draw in place copies of blocks that few others of them read, while there is room.

    Raises:
      CacheFull: if there is no room for the copies without which more blocks were shared than a call reads.
    """
    readers: dict[Block, list[tuple[Context, int]]] = {}
    for seat in seats:
      context = self.contexts[seat]
      for i, block in enumerate(context.blocks):
        if block.users > 1:
          readers.setdefault(block, []).append((context, i))
    shared = sorted(((b, held) for b, held in readers.items() if len(held) > 1), key=lambda pair: len(pair[1]))
    for n, (block, held) in enumerate(shared):
      too_many = len(shared) - n > self.most_shared
      if too_many or len(held) < SHARED_BY * self.slots:
        for context, i in held[1:]:
          try:
            context.blocks[i] = self._copied(block)
          except CacheFull:
            if too_many:
              raise
            return
          context.blocks[i].users += 1
          self._drop(block)
