"""Who draws next: which sessions have a seat in the cache, which of these draw, who waits for one, who gives theirs up.

A session that waits for a tool keeps its seat while nobody else wants it: that costs room, but no time. Once it has waited
longer than it is given and another has nowhere to go, its part of the cache goes to host memory, or, where that is full, is
computed again later.
"""

from __future__ import annotations

import time
from typing import Sequence

import numpy as np

from agentrl.rollout.priorities import Outlook, Rule
from agentrl.rollout.session import Session
from agentrl.rollout.stats import EngineStats, Timeline
from agentrl.sampling.contexts import CacheFull, Parked
from agentrl.sampling.sampler import Extension, Sampler


class Slots:
  """The slots and seats of one sampler. All methods are called between two draws.

  Attributes:
    ready: Sessions that want a turn and have a seat.
    queue: Sessions that want a turn and have none.
    owners: Of each seat; None where it is free.
    stats: Counts.
    timeline: What was done in the seats when.
  """

  def __init__(self, sampler: Sampler, priorities: Sequence[Rule] = (), parked_bytes: int = 1 << 28):
    """Makes seats that nobody has.

    Args:
      sampler: Whose they are.
      priorities: Compared one after the other; among equals, whoever asked first.
      parked_bytes: Host memory for contexts that have left their seats.
    """
    self.sampler = sampler
    self.ready: list[Session] = []
    self.queue: list[Session] = []
    self.owners: list[Session | None] = [None] * sampler.contexts.seats
    self.stats = EngineStats()
    self.timeline = Timeline(sampler.contexts.seats)
    self.outlook = Outlook()
    self.parked_bytes = 0
    self.park_seconds = 0.0  # of one session, running mean
    self._most_parked_bytes = parked_bytes
    self._priorities = tuple(priorities)
    self._parked: dict[Session, None] = {}  # whose context the host has
    # What happened while the device was busy, and nobody may touch the cache.
    self._left: list[int] = []
    self._forked: list[tuple[Session, Sequence[Session]]] = []

  def clear(self):
    """Takes everybody's seat away."""
    self.ready.clear()
    self.queue.clear()
    self.owners = [None] * self.sampler.contexts.seats
    self._forget()

  # ---- any time ---------------------------------------------------------------------------------

  def submit(self, session: Session):
    """Takes a session's request for a turn."""
    session.asked_at = session.queued_at = time.perf_counter()
    if session.seat is None:
      self.queue.append(session)
    else:
      self.ready.append(session)
      self.timeline.begin(session.seat, session.label, 'ready')

  def withdraw(self, session: Session):
    """Takes back a session's request for a turn."""
    if session in self.queue:
      self.queue.remove(session)
    if session in self.ready:
      self.ready.remove(session)
      if session.seat is not None:
        self.timeline.begin(session.seat, session.label, 'wait')

  def leave(self, session: Session):
    """Takes note that a session needs its seat no more."""
    if session.seat is not None:
      self.timeline.end(session.seat)
      self.owners[session.seat] = None
      self._left.append(session.seat)
    session.seat, session.cached = None, 0
    self.withdraw(session)

  def forked(self, session: Session, forks: Sequence[Session]):
    """Takes note that sessions go on from where `session` is."""
    self._forked.append((session, forks))

  def forget(self):
    """Takes note that the cache was emptied."""
    for session in self.owners:
      if session is not None:
        session.cached = 0
    self._forget()

  def _forget(self):
    self._left.clear()
    self._forked.clear()
    for session in self._parked:
      session.parked = None
    self._parked.clear()
    self.parked_bytes = 0

  # ---- between draws ----------------------------------------------------------------------------

  def admit(self, patience: float):
    """Gives seats to those who could draw next: free ones, and of sessions that wait longer than `patience`, seconds."""
    self._catch_up()
    if not self.queue:
      return
    self.queue.sort(key=self._rank)
    ranks = sorted(map(self._rank, self.ready))
    slots = self.sampler.slots
    last = ranks[slots - 1] if len(ranks) >= slots else None  # who comes after that one would not draw
    now = time.perf_counter()
    waiting = sorted((s for s in self.owners if s is not None and s.request is None), key=lambda s: -s.waiting_since)
    # All that go go first: what those that come need is then computed together.
    for _ in range(min(len(self.queue), slots - len(self.ready)) - self.owners.count(None)):
      if waiting and now - waiting[-1].waiting_since >= patience:
        self.park(waiting.pop())
    room = self._room()
    while self.queue and (len(self.ready) < slots or last and self._rank(self.queue[0]) < last):
      session, wanted = self.queue[0], self._wanting(self.queue[0])
      free = next((i for i, owner in enumerate(self.owners) if owner is None), None)
      if free is not None and (wanted <= room or not (self.ready or waiting)):
        del self.queue[0]
        self._enter(session, free)
        room -= wanted
        waiting = [s for s in waiting if s.seat is not None]  # one may have had to make room
      # If nobody else could draw, the device would have nothing to do.
      elif waiting and (now - waiting[-1].waiting_since >= patience or not self.ready):
        self.park(waiting.pop())
        room = self._room()
      else:
        break

  def _rank(self, session: Session) -> tuple[float, ...]:
    return (*(rule(session, self.outlook) for rule in self._priorities), session.asked_at)

  def drawing(self) -> list[Session]:
    """Returns those who draw now: of the ready sessions as many as there are slots, in the order of their seats."""
    ordered = sorted(self.ready, key=self._rank) if len(self.ready) > self.sampler.slots else self.ready
    chosen, others, now = ordered[:self.sampler.slots], ordered[self.sampler.slots:], time.perf_counter()
    for session in chosen:
      if session.queued_at is not None:
        self.stats.queue_seconds += now - session.queued_at
        session.queued_at = None
        self.timeline.begin(session.seat, session.label, 'draw')
    for session in others:
      if session.queued_at is None:
        session.queued_at = now
        self.timeline.begin(session.seat, session.label, 'ready')
    return sorted(chosen, key=lambda s: s.seat)

  @property
  def swap_seconds(self) -> float | None:
    """About what it takes a session to leave for host memory and to come back; None if that is full."""
    held = [self.sampler.held_bytes(s.seat) for s in self.owners if s is not None and s.request is None]
    full = held and self.parked_bytes + min(held) > self._most_parked_bytes
    return None if full else 2 * self.park_seconds

  def extend(self):
    """Has what the ready sessions' contexts hold beyond the cache written, all but their last tokens."""
    for session in list(self.ready):
      if session.seat is not None:
        if self.sampler.contexts.contexts[session.seat] is None:  # the cache was emptied
          self._open(session, session.context.tail(0)[:-1])
        self._extend(session)

  def park(self, session: Session):
    """Takes a session's seat from it, keeping what it holds in host memory while there is room."""
    seat, nbytes = session.seat, self.sampler.held_bytes(session.seat)
    self.stats.evictions += 1
    if session.cached and self.parked_bytes + nbytes <= self._most_parked_bytes:
      started, before = time.perf_counter(), self.sampler.prefill_seconds
      self._keep(session, self.sampler.park(seat))
      waited = self.sampler.prefill_seconds - before
      self.park_seconds += 0.2 * (time.perf_counter() - started - waited - self.park_seconds)
      self.timeline.add('device', 'prefill', started, started + waited)
      self.stats.prefill_seconds += waited
      self.stats.parked += 1
    else:
      self.sampler.close(seat)
    self.timeline.end(seat)
    self.owners[seat], session.seat, session.cached = None, None, 0
    if session in self.ready:
      self.ready.remove(session)
      self.queue.append(session)
      if session.queued_at is None:
        session.queued_at = time.perf_counter()

  def make_room(self, but: Session) -> bool:
    """Frees blocks of the cache; returns whether there is hope.

    Who left goes first, then whoever waits longest for something else than a turn, who asked last, and what was parked.
    """
    if self._left:
      self._catch_up()
      return True
    others = [s for s in self.owners if s is not None and s is not but]
    waiting = [s for s in others if s.request is None]
    if others:
      self.park(min(waiting, key=lambda s: s.waiting_since) if waiting else max(others, key=lambda s: s.asked_at))
      return True
    parked = list(self._parked)
    for session in parked:
      self._let_go(session)
    return bool(parked)

  def _room(self) -> int:
    """Returns how many blocks of the cache are left for others once all that are ready have drawn a chunk."""
    contexts, reach = self.sampler.contexts, self.sampler.reach
    taken = sum(contexts.lacking(s.seat, len(s.context) + min(reach, s.request.budget)) for s in self.ready)
    return contexts.available() - taken

  def _wanting(self, session: Session) -> int:
    """Returns how many blocks a session that has no seat would take until it has drawn a chunk."""
    length = len(session.context) + min(self.sampler.reach, session.request.budget)
    return self.sampler.contexts.wanting(session.context.tail(0)[:-1], length, session.policy, session.parked)

  def _catch_up(self):
    """Does what could not be done while the device was busy."""
    for session, forks in self._forked:
      if session.seat is not None:
        self.sampler.note(session.seat)
      elif session.parked is not None:
        for fork in (f for f in forks if f.adopted):  # no program would ever let go of another's
          self._keep(fork, self.sampler.contexts.again(session.parked))
    for seat in self._left:
      self.sampler.close(seat)
    for session in [s for s in self._parked if s.finished]:
      self._let_go(session)
    self._forked.clear()
    self._left.clear()

  def _keep(self, session: Session, parked: Parked):
    session.parked = parked
    self._parked[session] = None
    self.parked_bytes += parked.nbytes

  def _let_go(self, session: Session):
    parked = self._take_back(session)
    self.sampler.contexts.forget(parked)

  def _take_back(self, session: Session) -> Parked:
    parked, session.parked = session.parked, None
    del self._parked[session]
    self.parked_bytes -= parked.nbytes
    return parked

  def _enter(self, session: Session, seat: int):
    """Gives a session a free seat, with what the cache or the host has of its context."""
    session.seat, self.owners[seat] = seat, session
    self.ready.append(session)
    self.timeline.begin(seat, session.label, 'ready')
    context = session.context.tail(0)[:-1]
    session.cached = self._unpark(session, seat, context)
    if not session.cached:
      self._open(session, context)
    self._extend(session)

  def _open(self, session: Session, context: np.ndarray):
    session.cached = self.sampler.open(session.seat, context, session.policy)
    self.stats.shared_tokens += session.cached

  def _unpark(self, session: Session, seat: int, context: np.ndarray) -> int:
    """Returns how many tokens of its context a session gets back."""
    if session.parked is None:
      return 0
    parked = self._take_back(session)
    # Its program may have cut or changed the context meanwhile.
    n = min(len(parked.tokens), len(context))
    differ = np.flatnonzero(parked.tokens[:n] != context[:n])
    try:
      held = min(self.sampler.unpark(seat, parked), int(differ[0]) if len(differ) else n)
    except CacheFull:
      self.sampler.contexts.forget(parked)
      return 0
    self.stats.unparked += held > 0
    return held

  def _extend(self, session: Session):
    fresh = session.context.tail(session.cached)[:-1]
    while len(fresh):
      try:
        self.sampler.extend([Extension(session.seat, fresh, session.cached)])
        session.cached += len(fresh)
        self.stats.extended_tokens += len(fresh)
        return
      except CacheFull:
        if not self.make_room(session):
          raise
