"""Sampling that goes on from step to step: groups are asked for, drawn in a thread, and taken as they finish.

    stream.take_weights(params, version)     between two chunks; what is under way goes on under them
    stream.ask(order)                        a group joins those under way
    stream.take(count)                       the oldest that are done, once none is left that would grow too old
    stream.snapshot(), stream.restore(...)   what is under way, of JSON types, and back

Whatever a group's tokens were drawn by, none is older than `staleness` versions when it is taken: with B groups taken a
version and (staleness + 1) B under way, a group asked for at version v is taken by version v + staleness. With staleness
0 that is B groups of one version, as `Engine.collect` draws them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from typing import Any, Callable, Coroutine, Sequence, TypeVar

from agentrl.core.types import Trajectory
from agentrl.models.params import Params
from agentrl.rollout import journal as journals_lib
from agentrl.rollout import store
from agentrl.rollout.engine import Engine, Job
from agentrl.rollout.journal import Journal
from agentrl.rollout.session import Session
from agentrl.rollout.stats import EngineStats, Timeline

T = TypeVar('T')
_CLOSE_SECONDS = 60.0


@dataclasses.dataclass
class Order:
  """A group to collect.

  Attributes:
    jobs: Its samples. Programs that know of each other may stand in one order only.
    note: Of JSON types: what its jobs can be made of again.
  """

  jobs: Sequence[Job]
  note: Any = None


@dataclasses.dataclass
class _Group:
  """An order under way.

  Attributes:
    number: Orders before it.
    version: Of the policy when it was asked for.
    order: What was asked for.
    roots: Session of each job; [] once they are done.
    journals: Of each job, by path.
    trajectories: What came of it; None before.
  """

  number: int
  version: int
  order: Order
  roots: list[Session] = dataclasses.field(default_factory=list)
  journals: list[dict[tuple[int, ...], Journal]] = dataclasses.field(default_factory=list)
  trajectories: list[Trajectory] | None = None


class Stream:
  """The groups under way on one engine, which is its alone until it is closed.

  Its thread ends with the process. All methods block, and are called from one thread.
  """

  def __init__(self, engine: Engine, *, staleness: int = 0, overlap: bool = False, keep_cache: bool = False):
    """Starts the thread; nothing is drawn before there are weights.

    Args:
      engine: To draw with.
      staleness: Versions that a token may be old when it is taken.
      overlap: Whether to draw also between `take` and the next call, while others use the device. Tools run on in
        either case.
      keep_cache: See `Engine.take_weights`.
    Raises:
      ValueError: if the staleness is negative.
    """
    if staleness < 0:
      raise ValueError(f'staleness={staleness} must be at least 0')
    self.staleness, self._overlap, self._keep_cache = staleness, overlap, keep_cache
    self._engine = engine
    self._groups: list[_Group] = []  # by number
    self._asked = 0
    self._drawing = self._closed = False
    started: concurrent.futures.Future[None] = concurrent.futures.Future()
    self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), name='stream', daemon=True)
    self._thread.start()
    started.result()

  @property
  def under_way(self) -> int:
    """Groups asked for and not taken."""
    return len(self._groups)

  @property
  def group_ids(self) -> set[str]:
    """Of the groups under way."""
    return {job.group_id for group in self._groups for job in group.order.jobs}

  @property
  def asked(self) -> int:
    """Groups asked for so far."""
    return self._asked

  def take_weights(self, params: Params, version: int):
    """Goes on with other weights; returns once they are no longer read."""
    self._between(lambda: self._engine.take_weights(params, version, self._keep_cache))

  def ask(self, orders: Sequence[Order]):
    """Adds groups to those under way."""
    def begin():
      for order in orders:
        self._begin(_Group(self._asked, self._engine.version, order, journals=[{} for _ in order.jobs]))
        self._asked += 1
    self._between(begin)

  def take(self, count: int) -> list[list[Trajectory]]:
    """Returns groups that are done, oldest first, each in the order of its jobs, forks after what they left.

    Args:
      count: How many; 1 to `under_way`. Every version is to take as many.
    Raises:
      ValueError: if fewer are under way, or none is to be taken.
      Exception: what ended the drawing, if something did.
    """
    if not 0 < count <= len(self._groups):
      raise ValueError(f'{count} groups are to be taken, but {len(self._groups)} are under way')
    return self._call(self._take(count))

  def cut(self) -> tuple[EngineStats, Timeline]:
    """Returns what was done since the last call, between calls of `take` included, and what the slots did when."""
    return self._between(self._engine.cut)

  def snapshot(self) -> dict[str, Any]:
    """Returns what is under way as of now, of JSON types."""
    return self._between(lambda: {'asked': self._asked, 'groups': [self._to_plain(g) for g in self._groups]})

  def restore(self, snapshot: dict[str, Any], jobs_of: Callable[[Any], Sequence[Job]]):
    """Goes on from a snapshot: programs are run again to where they were, see `agentrl.rollout.journal`.

    Args:
      snapshot: What `snapshot` returned.
      jobs_of: From the note of an order to its jobs.
    """
    def begin():
      self._asked = snapshot['asked']
      for plain in snapshot['groups']:
        note = store.decode(plain['note'])
        journals = [{tuple(path): journals_lib.from_plain(store.decode(j)) for path, j in job}
                    for job in plain['journals']]
        done = plain['trajectories'] and store.decode_trajectories(plain['trajectories'])
        self._begin(_Group(plain['number'], plain['version'], Order(jobs_of(note), note), [], journals, done))
    self._between(begin)

  def close(self):
    """Ends what is under way, and the thread. Safe to repeat."""
    if not self._closed:
      self._closed = True
      self._loop.call_soon_threadsafe(self._stop.set)
      self._thread.join(_CLOSE_SECONDS)

  # ---- in the thread ----------------------------------------------------------------------------

  async def _main(self, started: concurrent.futures.Future[None]):
    self._loop = asyncio.get_running_loop()
    self._turn = asyncio.Lock()  # held by whoever uses the engine
    self._news, self._done, self._stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with self._engine.serving():
      self._pump = asyncio.create_task(self._serve())
      started.set_result(None)
      await self._stop.wait()
      self._pump.cancel()
      await asyncio.gather(self._pump, return_exceptions=True)

  async def _serve(self):
    """Draws while there is something to draw and it is to be drawn."""
    while True:
      self._news.clear()
      self._note_done()
      if self._drawing and self._engine.under_way():
        async with self._turn:
          begun = time.perf_counter()
          await self._engine.serve()
          self._engine.stats.total_seconds += time.perf_counter() - begun
      else:
        await self._news.wait()

  def _note_done(self):
    """Takes what came of the groups whose programs have all ended."""
    busy = {id(s.root) for s in self._engine.under_way()}
    for group in self._groups:
      if group.trajectories is None and not any(id(root) in busy for root in group.roots):
        group.trajectories = self._engine.take(group.roots)
        group.roots, group.journals = [], []
        self._done.set()

  def _between(self, function: Callable[[], T]) -> T:
    """Calls a function between two chunks and returns what it returns."""
    async def call():
      self._engine.wake()
      async with self._turn:
        result = function()
      self._news.set()
      return result
    return self._call(call())

  def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

  def _begin(self, group: _Group):
    self._groups.append(group)
    if group.trajectories is None:
      group.roots = [self._engine.begin(job, journals) for job, journals in zip(group.order.jobs, group.journals)]
      for root in group.roots:
        root.trajectory.policy_version = group.version

  async def _take(self, count: int) -> list[list[Trajectory]]:
    self._drawing = True
    self._news.set()
    while not (taken := self._due(count)):
      self._done.clear()
      waiting = asyncio.create_task(self._done.wait())
      await asyncio.wait({waiting, self._pump}, return_when=asyncio.FIRST_COMPLETED)
      waiting.cancel()
      if self._pump.done():
        self._pump.result()
    if not self._overlap:
      self._drawing = False
      self._engine.wake()
      async with self._turn:  # the chunk under way is the last
        pass
    self._groups = [g for g in self._groups if g not in taken]
    return [g.trajectories for g in taken]

  def _due(self, count: int) -> list[_Group]:
    """Returns the groups to take; [] where too few are done, or later versions could not take what is left in time."""
    done = [g for g in self._groups if g.trajectories is not None]
    if len(done) < count:
      return []
    for version in {g.version for g in self._groups}:
      later = count * (version + self.staleness - self._engine.version)
      old = [g for g in self._groups if g.version <= version]
      if sum(g.trajectories is not None for g in old) < min(count, len(old) - later):
        return []
    return done[:count]

  def _to_plain(self, group: _Group) -> dict[str, Any]:
    under_way = {(id(s.root), s.trajectory.path): s.under_way() for s in self._engine.under_way()}
    journals = [[[list(path), store.encode(journals_lib.to_plain(
        [*j.draws, *under_way.get((id(root), path), [])], j.recording))] for path, j in by_path.items()]
                for root, by_path in zip(group.roots, group.journals)]
    done = None if group.trajectories is None else store.encode_trajectories(group.trajectories)
    return {'number': group.number, 'version': group.version, 'note': store.encode(group.order.note),
            'journals': journals, 'trajectories': done}
