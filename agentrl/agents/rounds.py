"""Groups whose rows go on together: what one row does next may depend on where the others are."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Protocol, Sequence

import numpy as np

from agentrl.agents import base
from agentrl.agents.player import Player
from agentrl.core.types import Turn
from agentrl.rollout.session import Session, trajectory_seed

_PURPOSE = 0x524F554E  # keeps these draws apart from those of tokens


class Rule(Protocol):
  """What a group of rows does next."""

  def decide(self, rows: Sequence[Session], free: int) -> Sequence[int]:
    """Returns how many branches each row has from here.

    Args:
      rows: All that are under way, in the order of their paths; each has just been shown an observation.
      free: Rows that are still to be given out; the branches may add up to that.
    Returns:
      0 or more; -1 ends the row and leaves it out, for another to branch in its place.
    """
    ...

  def fresh(self, ended: Session, free: int) -> int:
    """Returns how many rows begin from nothing now that none is under way, at least 1.

    Args:
      ended: The row that ended last.
      free: Rows that are still to be given out, at least 1.
    """
    ...


class Rounds:
  """Lets the rows of a group meet after every turn; the group ends with exactly `size` of them.

  When all rows under way have arrived, the rule says how often each branches; each then forks itself, with its episode,
  and goes on. Rows are asked in the order of their paths, so that nothing depends on how long tools took. A row that
  ends is not waited for; when none is left, fresh ones begin as long as there are some to be given out. What a row
  could not branch for, because it or its environment failed, is given out again.

  Rows that wait keep their place in the cache, unless others need it.
  """

  def __init__(self, player: Player, rule: Rule, size: int, roots: int):
    """Makes a group that nothing has arrived at yet.

    Args:
      player: Plays the task.
      rule: Of the method.
      size: Rows to end with.
      roots: Rows that begin as jobs, 1 to `size`.
    """
    self._player, self._rule = player, rule
    self._free = size - roots
    self._running = roots
    self._waiting: dict[Session, asyncio.Future[int]] = {}
    self._stem: Session | None = None  # what fresh rows are forked from, with nothing in it

  async def root(self, session: Session):
    """The program of a row that begins as a job."""
    if self._stem is None:
      [self._stem] = session.fork(1)
    await self._row(session, None)

  def _branch(self, episode: Any) -> base.Program:
    async def program(session: Session):
      await self._row(session, episode)
    return program

  async def _row(self, session: Session, episode: Any):
    try:
      episode = episode or await self._player.begin(session)
      try:
        while not session.finished:
          await self._player.turn(session, episode)
          if not session.finished:
            await self._meet(session, episode)
      finally:
        await episode.close()
    except asyncio.CancelledError:
      self._free = 0  # The engine is ending things: nothing new may begin.
      raise
    finally:
      self._running -= 1
      self._waiting.pop(session, None)
      self._advance(session)

  async def _meet(self, session: Session, episode: Any):
    """Waits for the others, then branches as decided."""
    future = self._waiting[session] = asyncio.get_running_loop().create_future()
    self._advance(session)
    branches = await future
    if branches < 0:
      session.discard()
      return
    try:
      for fork, copy in await self._player.fork(session, episode, branches):
        session.engine.adopt(fork, self._branch(copy))
        self._running += 1
        branches -= 1
    finally:
      self._free += branches

  def _advance(self, session: Session):
    """Decides once nobody is left to wait for; lets fresh rows begin once nobody is under way."""
    if self._waiting and len(self._waiting) == self._running:
      rows = sorted(self._waiting, key=lambda s: (s.trajectory.sample, s.trajectory.path))
      decided = list(self._rule.decide(rows, self._free))
      self._free -= sum(decided)
      for row, branches in zip(rows, decided, strict=True):
        future = self._waiting.pop(row)
        if not future.done():
          future.set_result(branches)
    elif not self._running and self._free > 0 and self._stem is not None:
      count = min(self._free, max(1, self._rule.fresh(session, self._free)))
      for fresh in self._stem.fork(count):
        self._free -= 1
        self._running += 1
        session.engine.adopt(fresh, self._branch(None))


def uniform(session: Session, index: int = 0) -> float:
  """Returns a number in [0, 1) that follows from the run's seed, the row, its turns so far and `index` alone."""
  t = session.trajectory
  key = trajectory_seed(t.seed, t.task.id, t.sample, t.path)
  return float(np.random.default_rng([*key, session.num_turns, index, _PURPOSE]).random())


def turn_entropy(session: Session, turn: Turn, tokens: int = 20) -> float:
  """Returns the entropy of a turn's first tokens, summed, in units of the largest that one token can have.

      H = sum over t < tokens of H_t / log V
  """
  drawn = session.trajectory.segments[turn.segment].entropies[turn.start:min(turn.end, turn.start + tokens)]
  return float(np.nansum(drawn)) / math.log(session.engine.tokenizer.vocab_size)
