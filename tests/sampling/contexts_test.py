"""The books of the cache against a plain model of it, under random work.

The model is a list of tokens a slot, and a device whose every place holds what it was computed from: the policy and all
tokens up to its own. What a context holds is right if, and only if, each of its places says so. Whoever computes a
token reads all places before it, so these are looked at too.
"""

from __future__ import annotations

import collections

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
import numpy as np
import pytest

from agentrl.sampling import contexts
from agentrl.sampling import readings
from agentrl.sampling.contexts import CacheFull, Contexts, Copy

SLOTS, BLOCK, CONTEXT, REACH = 4, 4, 15, 6
SIZES = (4, 6, 9)  # the largest holds two contexts and a bit
TOKENS = st.sampled_from([1, 1, 1, 2])
# Most begin alike.
TEXTS = st.builds(lambda ones, rest: ([1] * ones + rest)[:CONTEXT - 1], st.integers(0, 14),
                  st.lists(TOKENS, max_size=6))
SLOT = st.integers(0, SLOTS - 1)


class Device:
  """What the places of the blocks hold, as `Sampler` would have it."""

  def __init__(self):
    self.places = collections.defaultdict(lambda: [None] * BLOCK)

  def take(self, ids):
    keys = np.empty((1, len(ids), 1, 1, BLOCK), object)
    for i, block in enumerate(ids):
      keys[0, i, 0, 0] = self.places[block]
    return keys, np.zeros(keys.shape)

  def copy(self, source, target):
    self.places[target] = list(self.places[source])


class Books(RuleBasedStateMachine):
  """Does with the books what a sampler does, in any order."""

  parked = Bundle('parked')

  def __init__(self):
    super().__init__()
    self.books = Contexts(SLOTS, CONTEXT, BLOCK, SIZES, REACH)
    self.device = Device()
    self.truth: dict[int, tuple[tuple[str, int], list[int]]] = {}  # by slot: policy and age of its books, tokens
    self.outside = []  # what is parked, and whether it still counts

  # ---- what the device does ---------------------------------------------------------------------

  def flush(self):
    for work in self.books.take_steps():
      for copy in (w for w in work if isinstance(w, Copy)):
        self.device.copy(copy.source, copy.target)
      # All of a step read what was there before it.
      written = []
      for write in (w for w in work if not isinstance(w, Copy)):
        tokens = self.books.tokens[write.seat, :write.start + len(write.tokens)].tolist()
        assert tokens[write.start:] == write.tokens.tolist()
        weights = self.truth[write.seat][0]
        assert write.policy == weights[0]
        self.check_places([b.id for b in write.blocks], weights, tokens[:write.start])
        written += [(write.blocks[at // BLOCK], at % BLOCK, (weights, *tokens[:at + 1]))
                    for at in range(write.start, len(tokens))]
      for block, place, content in written:
        self.device.places[block.id][place] = content

  def check_places(self, ids, weights, tokens):
    for at in range(len(tokens)):
      assert self.device.places[ids[at // BLOCK]][at % BLOCK] == (weights, *tokens[:at + 1])

  def settle(self, slot):
    if self.books.is_due(slot):
      self.flush()

  # ---- what a sampler is asked for --------------------------------------------------------------

  @rule(slot=SLOT, tokens=TEXTS, policy=st.sampled_from(['', '', '', '', 'other']))
  def open(self, slot, tokens, policy):
    self.settle(slot)
    held = self.books.open(slot, np.asarray(tokens, np.int32), policy)
    self.truth[slot] = (policy, self.books.age), tokens[:held]

  @rule(slot=SLOT)
  def close(self, slot):
    self.settle(slot)
    self.books.close(slot)
    self.truth.pop(slot, None)

  @precondition(lambda self: self.truth)
  @rule(data=st.data())
  def note(self, data):
    self.books.note(data.draw(st.sampled_from(sorted(self.truth))))

  @precondition(lambda self: self.truth)
  @rule(data=st.data(), into=SLOT)
  def fork(self, data, into):
    source = data.draw(st.sampled_from(sorted(self.truth)))
    self.books.note(source)
    (policy, _), tokens = self.truth[source]
    self.open(into, list(tokens), policy)

  @precondition(lambda self: self.truth)
  @rule(data=st.data())
  def truncate(self, data):
    slot = data.draw(st.sampled_from(sorted(self.truth)))
    policy, tokens = self.truth[slot]
    length = data.draw(st.integers(0, len(tokens)))
    self.settle(slot)
    self.books.truncate(slot, length)
    self.truth[slot] = policy, tokens[:length]

  @precondition(lambda self: self.truth)
  @rule(data=st.data(), tokens=TEXTS)
  def write(self, data, tokens):
    slot = data.draw(st.sampled_from(sorted(self.truth)))
    policy, before = self.truth[slot]
    tokens = tokens[:CONTEXT - len(before)]
    if tokens:
      try:
        self.books.write(slot, len(before), np.asarray(tokens, np.int32))
      except CacheFull:
        return
      self.truth[slot] = policy, before + tokens

  @precondition(lambda self: any(len(t) + 1 < CONTEXT for _, t in self.truth.values()))
  @rule(data=st.data())
  def decode(self, data):
    fit = [s for s, (_, t) in sorted(self.truth.items()) if len(t) + 1 < CONTEXT]
    slots = data.draw(st.lists(st.sampled_from(fit), min_size=1, unique=True))
    by_table = data.draw(st.booleans())
    drawn = {s: data.draw(st.lists(TOKENS, min_size=1, max_size=min(REACH, CONTEXT - 1 - len(self.truth[s][1]))))
             for s in slots}
    books = self.books
    try:
      for slot in slots:
        books.tokens[slot, len(self.truth[slot][1])] = 1
        books.reach(slot, len(self.truth[slot][1]) + len(drawn[slot]))
    except CacheFull:
      return
    try:
      if not by_table:
        books.unshare(slots)
    except CacheFull:
      return
    self.flush()
    for copy in books.tidy():
      self.device.copy(copy.source, copy.target)
    reading = (readings.by_table if by_table else readings.by_block)(books, slots)
    for index, slot in enumerate(slots):
      self.check_reading(reading, slot, index)
    for index, slot in enumerate(slots):
      policy, before = self.truth[slot]
      after = [*before, 1, *drawn[slot][:-1]]
      context = books.contexts[slot]
      for at in range(len(before), len(after)):
        target = (reading.tables[index, at // BLOCK] if by_table else
                  reading.targets[index, at // BLOCK - len(before) // BLOCK])
        assert target == context.blocks[at // BLOCK].id and context.blocks[at // BLOCK].users == 1
        self.device.places[int(target)][at % BLOCK] = (policy, *after[:at + 1])
      books.drew(slot, drawn[slot])
      self.truth[slot] = policy, after

  def check_reading(self, reading, slot, index):
    """A slot sees each place of its context once, and nothing else."""
    policy, tokens = self.truth[slot]
    seen = []
    for block in np.flatnonzero(reading.owners == index):
      seen += [(reading.starts[block] + i, self.device.places[int(block)][i]) for i in range(reading.fills[block])]
    if reading.tables is not None:
      seen += [(at, self.device.places[int(reading.tables[index, at // BLOCK])][at % BLOCK]) for at in range(len(tokens))]
      assert (reading.tables[index, len(self.books.contexts[slot].blocks):] == self.books.size).all()
    for m in range(int(reading.shared_count)):
      if reading.sharers[index, m]:
        seen += [(reading.shared_starts[m] + i, self.device.places[int(reading.shared[m])][i]) for i in range(BLOCK)]
    assert sorted(seen) == [(at, (policy, *tokens[:at + 1])) for at in range(len(tokens))]

  @precondition(lambda self: self.truth)
  @rule(target=parked, data=st.data())
  def park(self, data):
    slot = data.draw(st.sampled_from(sorted(self.truth)))
    self.flush()
    left = self.books.park(slot, self.device.take), self.truth.pop(slot)
    assert left[0].tokens.tolist() == left[1][1]
    self.outside.append(left[0])
    return left

  @rule(slot=SLOT, left=consumes(parked))
  def unpark(self, slot, left):
    parked, truth = left
    self.close(slot)
    try:
      ids = self.books.unpark(slot, parked)
    except CacheFull:
      self.books.forget(parked)
      self.remove(parked)
      return
    self.remove(parked)
    assert len(ids) == parked.keys.shape[1] or not ids
    for i, block in enumerate(ids):
      self.device.places[block] = list(parked.keys[0, i, 0, 0])
    self.truth[slot] = truth if parked.generation == self.books.generation else (truth[0], [])

  @rule(target=parked, left=parked)
  def again(self, left):
    other = self.books.again(left[0])
    self.outside.append(other)
    return other, left[1]

  @rule(left=consumes(parked))
  def forget(self, left):
    self.books.forget(left[0])
    self.remove(left[0])

  def remove(self, parked):
    self.outside = [p for p in self.outside if p is not parked]

  @rule()
  def do_what_is_noted(self):
    self.flush()

  @rule(really=st.integers(0, 9))
  def clear(self, really):
    if not really:
      self.books.clear()
      self.device = Device()
      self.truth.clear()

  @rule(really=st.integers(0, 4))
  def outdate(self, really):
    if not really:
      self.flush()
      self.books.outdate()

  # ---- what is always so ------------------------------------------------------------------------

  def parked_now(self):
    return [p for p in self.outside if p.generation == self.books.generation]

  @invariant()
  def every_block_is_free_or_used_and_its_users_are_known(self):
    books = self.books
    assert sorted([*books._free, *books._all]) == list(range(books.size)) and books.size in SIZES
    users, nodes = collections.Counter(), collections.Counter()
    for context in books.contexts:
      users.update(b for b in (context.blocks if context else ()))
    for parked in self.parked_now():
      users.update(parked.kept.values())
    nodes.update(node.block for node in books.tree._walk())
    for number, block in books._all.items():
      assert block.id == number and block.users == users[block] and block.nodes == nodes[block], number
      assert block.users or block.nodes or block.pins
    assert {*users, *nodes} <= set(books._all.values())

  @invariant()
  def slots_hold_what_they_should(self):
    for slot, context in enumerate(self.books.contexts):
      assert (context is None) == (slot not in self.truth)
      if context is not None:
        weights, tokens = self.truth[slot]
        assert ((context.policy, context.age), context.held) == (weights, len(tokens))
        assert self.books.tokens[slot, :context.held].tolist() == tokens

  @invariant()
  def what_is_held_is_what_was_computed(self):
    """So nobody has written to what another holds."""
    for slot, (weights, tokens) in self.truth.items():
      blocks = self.books.contexts[slot].blocks
      if not self.books.is_due(slot):
        self.check_places([b.id for b in blocks], weights, tokens)
    for parked in self.parked_now():
      tokens = parked.tokens.tolist()
      for i, block in parked.kept.items():
        for at in range(i * BLOCK, min((i + 1) * BLOCK, len(tokens)) if block.due < 0 else 0):
          assert self.device.places[block.id][at % BLOCK] == ((parked.policy, parked.age), *tokens[:at + 1])

  def teardown(self):
    self.flush()
    self.what_is_held_is_what_was_computed()
    for slot in range(SLOTS):
      self.books.close(slot)
    for parked in self.outside:
      self.books.forget(parked)
    self.books._forget_idle(10_000)
    assert self.books.used == 0 and sorted(self.books._free) == list(range(self.books.size))


TestBooks = Books.TestCase
TestBooks.settings = settings(stateful_step_count=50)


class FewShared(Books):
  """The same where a call reads two shared blocks at most."""

  def __init__(self):
    super().__init__()
    self.books.most_shared = 2

  def check_reading(self, reading, slot, index):
    super().check_reading(reading, slot, index)
    assert reading.shared_count <= len(reading.shared) == (2 if reading.tables is None else 0)


TestFewShared = FewShared.TestCase
TestFewShared.settings = settings(stateful_step_count=50)


def test_of_more_shared_blocks_than_a_call_reads_those_of_fewest_readers_are_copied(monkeypatch):
  monkeypatch.setattr(contexts, 'MOST_SHARED', 2)
  books = Contexts(3, CONTEXT, BLOCK, (7,), REACH)
  # Three begin with one block, two of them with two more.
  for slot, ones in enumerate((12, 12, 4)):
    books.open(slot, np.full(ones, 1, np.int32))
    books.write(slot, books.contexts[slot].held, np.full(ones - books.contexts[slot].held, 1, np.int32))
  books.take_steps()
  assert books.used == 3
  reading = lambda slots: (books.unshare(slots), books.take_steps(), readings.by_block(books, slots))[2]
  assert reading([0, 1, 2]).shared_count == 2 and books.used == 4
  assert [b.users for b in books.contexts[0].blocks] == [3, 1, 2] and not books.lacking(1, 12)
  # No room for a copy: whoever asks has fewer slots draw.
  books.most_shared = 1
  while books.available():
    books._hold(books.contexts[2], books._new())
  with pytest.raises(CacheFull, match='all 7 blocks'):
    books.unshare([0, 1, 2])
  assert reading([0, 2]).shared_count == 1


def test_who_was_noted_under_a_beginning_that_is_gone_is_noted_anew():
  """Two slots compute the same block; the tree has the first one's, which goes, and then the second one's."""
  books = Contexts(3, CONTEXT, BLOCK, (6,), REACH)
  for slot in (0, 1):
    books.open(slot, np.zeros(0, np.int32))
    books.write(slot, 0, np.full(4, 1, np.int32))
  books.take_steps()
  books.close(0)
  # Five of the six blocks are had anew, the first one's among them.
  for slot in (0, 2):
    books.open(slot, np.zeros(0, np.int32))
  books.write(0, 0, np.full(15, 2, np.int32))
  books.write(2, 0, np.full(4, 3, np.int32))
  books.take_steps()
  books.close(0)
  books.close(2)
  books.write(1, 4, np.full(3, 1, np.int32))
  books.take_steps()
  books.close(1)
  assert books.open(1, np.full(7, 1, np.int32)) == 7
  books.close(1)
  books._forget_idle(100)
  assert books.used == 0


def test_room_made_for_more_tokens_is_not_parked():
  books, device = Contexts(1, CONTEXT, BLOCK, (4,), REACH), Device()
  books.open(0, np.zeros(0, np.int32))
  books.write(0, 0, np.full(6, 1, np.int32))
  books.take_steps()
  books.reach(0, 6 + REACH)  # and then something came in between
  parked = books.park(0, device.take)
  assert parked.keys.shape[1] == 2 and books.used == 2  # of the tree
  assert len(books.unpark(0, parked)) == 2 and books.contexts[0].held == 6
