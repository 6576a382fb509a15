"""Runs agent programs on the slots of one sampler.

A program awaits its session; the engine draws for all sessions that want a turn in one device call, and while it runs
the event loop serves everyone's tools. Who draws in its slots is the business of `agentrl.rollout.slots`.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from typing import Any, AsyncIterator, Awaitable, Callable, Sequence, TypeVar

from absl import logging

from agentrl.core.types import Boundary, Status, Task, Trajectory
from agentrl.models.params import Params
from agentrl.rollout.budget import Budget, Limits
from agentrl.rollout.journal import Journal
from agentrl.rollout.priorities import PRIORITIES
from agentrl.rollout.session import Session, TrajectoryEnded, check_context
from agentrl.rollout.slots import Slots
from agentrl.rollout.stats import EngineStats, Timeline
from agentrl.sampling.constrain import Grammar
from agentrl.sampling.contexts import CacheFull
from agentrl.sampling.sampler import MAX_STOPS, Draws, Sampler, SlotRequest
from agentrl.tools.recording import RECORDING

T = TypeVar('T')
Program = Callable[[Session], Awaitable[None]]

# A step costs the same however few slots take part, so sessions that may come back within the time of a chunk
# are waited for: at least and at most this long, seconds.
LINGER_SECONDS = (0.002, 0.05)
# Share of waits that must be so short, for this to be worth it.
QUICK = 0.5
# A program that is cancelled has so many seconds to clean up; one that goes on is closed where it stands.
CLEAN_UP_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Job:
  """One trajectory to collect: `program` driving a session of `task`'s sample number `sample`."""

  task: Task
  sample: int
  group_id: str
  program: Program


class Engine:
  """Collects trajectories from one sampler."""

  def __init__(self, sampler: Sampler, tokenizer: Any, *, limits: Limits = Limits(), seed: int = 0,
               grammar: Grammar | None = None, priorities: Sequence[str] = ('begun',), patience: float | None = None,
               parked_bytes: int = 1 << 28):
    """Makes an engine.

    Args:
      sampler: Its slots are this engine's alone; set its parameters before `collect`.
      tokenizer: See `agentrl.tokens.tokenizer.Tokenizer`.
      limits: Of every trajectory, unless a program's session is given others.
      seed: Of all draws.
      grammar: What turns may be, unless a program gives its session another; None to draw freely.
      priorities: Names of rules, see `agentrl.rollout.priorities`: who of those that want a slot gets one first.
      patience: Seconds that a session may wait in its slot while others want one; None by what waiting and leaving cost.
      parked_bytes: Host memory for the cache of sessions that had to leave their slots.
    Raises:
      ValueError: if the sampler has no room for the limits' context, or was not made for a grammar.
      agentrl.core.registry.UnknownNameError: if there is no such rule.
    """
    if grammar and not sampler.masks:
      raise ValueError('the engine has a grammar, and its sampler was not made with constrained=True')
    check_context(limits, sampler)
    self.sampler = sampler
    self.tokenizer = tokenizer
    self.limits = limits
    self.seed = seed
    self.grammar = grammar
    self.version = 0  # of the policy whose weights the sampler has
    self._slots = Slots(sampler, [PRIORITIES.get(name) for name in priorities], parked_bytes)
    self._patience = patience
    self._chunk_seconds = 0.0  # running mean
    self._quick = 1.0  # share of waits shorter than a chunk, running mean
    self._wait_seconds = 0.0  # of a session between two turns, running mean
    self._tasks: set[asyncio.Task] = set()
    self._adopted: list[tuple[Session, asyncio.Task]] = []
    self._stop_cache: dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str, ...]]] = {}
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='decode')

  @property
  def stats(self) -> EngineStats:
    """What was done since they were last replaced."""
    return self._slots.stats

  @stats.setter
  def stats(self, stats: EngineStats):
    self._slots.stats = stats

  @property
  def timeline(self) -> Timeline:
    """What the slots did when."""
    return self._slots.timeline

  def cut(self) -> tuple[EngineStats, Timeline]:
    """Returns what was done since the last call, and counts anew; call it between two calls of `serve`."""
    stats, self.stats = self.stats, EngineStats()
    return stats, self.timeline.cut()

  def close(self):
    """Ends the engine's thread."""
    self._pool.shutdown()

  def collect(self, jobs: Sequence[Job], *, policy_version: int = 0, enough: float = 1.0, budget: Budget = Budget(),
              on_done: Callable[[Trajectory], None] | None = None) -> list[Trajectory]:
    """Runs all jobs to their end and returns their trajectories, in order, each followed by its forks. Blocks.

    A job fails alone: its trajectory ends with a status and a boundary at fault, the others go on. Forks follow in
    the order of their paths; those that no program was started on, or that were discarded, are left out.

    Args:
      jobs: What to collect.
      policy_version: Recorded on each trajectory and token.
      enough: Share of the trajectories under way after which the rest are cut, status CUT. Below 1, which they are
        depends on time.
      budget: Of all of them; what is under way when it is spent is cut as well.
      on_done: Called with each trajectory as it ends.
    Raises:
      ValueError: if `enough` is not in (0, 1].
    """
    return asyncio.run(self.collect_async(jobs, policy_version=policy_version, enough=enough, budget=budget,
                                          on_done=on_done))

  async def collect_async(self, jobs: Sequence[Job], *, policy_version: int = 0, enough: float = 1.0,
                          budget: Budget = Budget(),
                          on_done: Callable[[Trajectory], None] | None = None) -> list[Trajectory]:
    """As `collect`, inside a running event loop."""
    if not 0.0 < enough <= 1.0:
      raise ValueError(f'enough={enough} must be in (0, 1]')
    started = time.perf_counter()
    try:
      async with self.serving(policy_version, enough, budget, on_done):
        sessions = [self.begin(job) for job in jobs]
        while self._tasks:
          await self.serve()
        runs = [run for _, run in self._adopted if run not in self._closed]
        for outcome in await asyncio.gather(*runs, return_exceptions=True):
          if isinstance(outcome, Exception):
            raise outcome
    finally:
      self.stats.total_seconds += time.perf_counter() - started
    return self.take(sessions)

  @contextlib.asynccontextmanager
  async def serving(self, policy_version: int = 0, enough: float = 1.0, budget: Budget = Budget(),
                    on_done: Callable[[Trajectory], None] | None = None) -> AsyncIterator[None]:
    """A block in which programs may be begun and `serve` is called for them; those left at its end are cut."""
    self._enough, self._budget, self._on_done = enough, budget, on_done
    self._cutting, self._spent = '', collections.Counter()
    self._slots.clear()
    self.sampler.reset()
    self.version = policy_version
    # Both are set when something happens: `_wake` until a `serve` has waited for it, so that none waits for what has
    # happened before it came to that, `_stir` for what settles just then.
    self._wake, self._stir = asyncio.Event(), asyncio.Event()
    self._adopted = []
    self._closed: set[asyncio.Task] = set()  # by force: what asyncio says came of them tells nothing
    clock = None
    if budget.seconds:
      clock = asyncio.get_running_loop().call_later(
          budget.seconds, self._cut_rest, f'the {budget.seconds:g} s for all trajectories were over')
    try:
      yield
    finally:
      if clock:
        clock.cancel()
      for task in list(self._tasks):
        self._cancel(task)
      await asyncio.gather(*self._tasks, return_exceptions=True)
      # A decode that was under way when we were cancelled would write the next collection's cache.
      self._pool.submit(lambda: None).result()
      self._slots.clear()
      self.sampler.reset()  # An update that comes next has the cache's memory.

  def begin(self, job: Job, journals: dict[tuple[int, ...], Journal] | None = None) -> Session:
    """Starts a job's program and returns its session.

    Args:
      job: What to collect.
      journals: By path, of the session and its forks: what they draw is written there, and what is there already is
        run through again first. None for none.
    """
    trajectory = Trajectory(task=job.task, sample=job.sample, group_id=job.group_id, seed=self.seed,
                            policy_version=self.version)
    session = Session(self, trajectory, self.limits, journals=journals)
    self.adopt(session, job.program)
    return session

  def take(self, roots: Sequence[Session]) -> list[Trajectory]:
    """Returns the trajectories of sessions and of their forks, in order, and forgets about them."""
    order = {id(s): i for i, s in enumerate(roots)}
    taken = [s for s, _ in self._adopted if id(s.root) in order]
    self._adopted = [(s, run) for s, run in self._adopted if id(s.root) not in order]
    for session in taken:
      if not session.finished:  # cut before its program took its first step
        session.finish(Status.CUT, boundary=Boundary.ENGINE, detail=f'cut: {self._cutting or "cancelled"}')
    taken.sort(key=lambda s: (order[id(s.root)], s.trajectory.path))
    return [s.trajectory for s in taken if not s.discarded]

  def under_way(self) -> list[Session]:
    """Returns the sessions whose programs have not ended."""
    return [session for session, run in self._adopted if not run.done()]

  def take_weights(self, params: Params, version: int, keep_cache: bool = False):
    """Goes on with other weights; call it between two calls of `serve`.

    Args:
      params: Learner's view. Not read any more once this returns.
      version: Of the policy, for the tokens that it draws.
      keep_cache: Leave what the older weights computed of the contexts under way, which no later one shares; else it is
        computed anew as it is needed, so that each draw is exactly the new policy's.
    """
    if keep_cache:
      self.sampler.outdate()
    self.sampler.set_params(params)
    self.version = version
    if not keep_cache:
      self._slots.forget()
      self.sampler.reset()

  def adopt(self, session: Session, program: Program) -> asyncio.Task:
    """Starts a program on a session: a job's, or a fork's. Returns its asyncio task, which raises only what `on_done`
    does.

    Raises:
      ValueError: if a program was started on it before.
    """
    if session.adopted:
      raise ValueError(f'session {session.label} has a program already; fork it, or open another')
    session.adopted = True
    task = asyncio.create_task(self._run(session, program, self._on_done))
    self._adopted.append((session, task))
    self._tasks.add(task)
    task.add_done_callback(self._ended)
    return task

  def _ended(self, task: asyncio.Task):
    """Takes note that a program is over, and ends the last ones where enough are."""
    self._tasks.discard(task)
    ended = len(self._adopted) - len(self._tasks)
    if self._enough < 1.0 and ended >= self._enough * len(self._adopted):
      self._cut_rest('enough others had ended')
    self.wake()

  def _cut_rest(self, why: str):
    """Ends what is under way."""
    if not self._cutting:
      self._cutting = why
      for straggler in self._tasks:
        self._cancel(straggler)

  def _cancel(self, program: asyncio.Task):
    """Has a program end."""
    program.cancel()
    self._close_after(CLEAN_UP_SECONDS, program)

  def _close_after(self, seconds: float, program: asyncio.Task):
    """Ends a program that is still there after so many seconds.

    One that catches CancelledError and goes on can be cancelled as often as one likes; GeneratorExit it does not catch.
    """
    def close():
      logging.error('A program went on for %g s after it was cancelled, and is closed. It should let CancelledError pass.',
                    CLEAN_UP_SECONDS)
      try:
        program.get_coro().close()
      except RuntimeError as e:
        logging.error('It cannot be closed, and nothing ends it but itself: %s', e)
      else:
        self._closed.add(program)
      finally:
        program.cancel()  # what it waited for may never come

    clock = asyncio.get_running_loop().call_later(seconds, close)
    program.add_done_callback(lambda _: clock.cancel())

  def spend(self, **used: int):
    """Takes note of what was used, by the names of `Budget`, and ends all where that was the last of it."""
    for name, count in used.items():
      self._spent[name] += count
      most = getattr(self._budget, name)
      if most and self._spent[name] >= most:
        self._cut_rest(f'the {most} {name} for all trajectories were used')

  async def _run(self, session: Session, program: Program, on_done):
    RECORDING.set(session.journal and session.journal.recording)
    started = time.perf_counter()
    session.waiting_since = started
    trajectory = session.trajectory
    clock = asyncio.timeout(session.limits.seconds)
    self._close_after(session.limits.seconds + CLEAN_UP_SECONDS, asyncio.current_task())
    try:
      async with clock:
        await program(session)
      if not session.finished:
        session.finish(Status.AGENT_FAILURE, boundary=Boundary.AGENT, detail='the program returned without finishing')
    except TrajectoryEnded as e:
      session.finish(e.status, boundary=e.boundary, detail=str(e))
    except asyncio.CancelledError:
      if not asyncio.current_task().cancelling():
        session.finish(Status.AGENT_FAILURE, boundary=Boundary.AGENT, detail='something awaited was cancelled')
      elif self._cutting:
        session.finish(Status.CUT, boundary=Boundary.ENGINE, detail=f'cut: {self._cutting}')
      else:
        session.finish(Status.CUT, boundary=Boundary.ENGINE, detail='cancelled')
        raise
    except Exception as e:  # pylint: disable=broad-except  # the agent boundary: one program, one trajectory
      if clock.expired():
        e = TimeoutError(f'the program did not end within {session.limits.seconds:g} s')
      logging.exception('The agent program failed on task %s', trajectory.task.id)
      session.finish(Status.AGENT_FAILURE, boundary=Boundary.AGENT, detail=f'{type(e).__name__}: {e}')
    except GeneratorExit:  # see `_close_after`
      session.finish(Status.AGENT_FAILURE, boundary=Boundary.AGENT, detail='the program went on after it was cancelled')
    finally:
      now = time.perf_counter()
      trajectory.seconds = now - started
      self.stats.tool_seconds += now - session.waiting_since
      self._leave(session)
      self._slots.outlook.note(trajectory)
    if on_done:
      on_done(trajectory)

  def _leave(self, session: Session):
    """Gives up the seats of a session and of those that it opened and nobody else drives, and turns nobody awaits."""
    session.give_up()
    self._slots.leave(session)
    for other in session.opened:
      if not other.adopted:
        if not other.finished:
          other.finish(Status.CUT, boundary=Boundary.AGENT, detail='the program that opened it has ended')
        self._leave(other)

  # ---- what sessions ask for -------------------------------------------------------------------

  def split_stops(self, stops: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns (ids of the stops that are one piece, the stops to look for in the text).

    Only a marker is found by its id alone; the text of any other piece may be part of a longer one.
    """
    if stops not in self._stop_cache:
      if '' in stops:
        raise ValueError(f'a stop must not be empty: {stops}')
      encoded = [self.tokenizer.encode(s, allow_markers=True) for s in stops]
      ids = tuple(e[0] for e in encoded if len(e) == 1)
      if len(ids) > MAX_STOPS:
        raise ValueError(f'{len(ids)} stop tokens, but at most {MAX_STOPS} are supported: {stops}')
      self._stop_cache[stops] = ids, tuple(s for s in stops if s not in self.tokenizer.markers)
    return self._stop_cache[stops]

  def submit(self, session: Session):
    """Takes a session's request for a turn."""
    self._slots.submit(session)
    waited = session.asked_at - session.waiting_since
    self.stats.tool_seconds += waited
    self._quick += 0.05 * ((waited < self._linger_seconds) - self._quick)
    self._wait_seconds += 0.05 * (waited - self._wait_seconds)
    self.wake()

  def withdraw(self, session: Session):
    """Takes back a session's request for a turn."""
    self._slots.withdraw(session)
    session.waiting_since = time.perf_counter()

  def forked(self, session: Session, forks: Sequence[Session]):
    """Takes note that sessions go on from where `session` is."""
    self._slots.forked(session, forks)

  # ---- the pump ---------------------------------------------------------------------------------

  async def serve(self):
    """Draws a chunk for all that want one; waits for something to happen if none does."""
    await self._settle()
    slots = self._slots
    slots.admit(self._patience_seconds if slots.queue else 0.0)
    slots.extend()
    if slots.ready:
      await self._decode()
    elif self._tasks:
      started = time.perf_counter()
      if not slots.queue:
        await self._wake.wait()
      self._wake.clear()
      now = time.perf_counter()
      slots.timeline.add('device', 'idle', started, now)
      self.stats.idle_seconds += now - started

  def wake(self):
    """Makes a `serve` that waits return, or the next one that would."""
    self._wake.set()
    self._stir.set()

  @property
  def _patience_seconds(self) -> float:
    """How long a session may wait in a seat that others want.

    While it waits a slot may have nobody to draw for; while it leaves for host memory, and comes back, none draws. So it
    leaves at once where waits usually cost more than that, and else when this one has. What there is no host memory for
    has to be computed again, which takes about a chunk.
    """
    if self._patience is not None:
      return self._patience
    swap = self._slots.swap_seconds
    drawing = min(len(self._slots.ready), self.sampler.slots)
    worth = (self._linger_seconds if swap is None else swap) * max(1, drawing)
    return worth if self._wait_seconds < worth else 0.0

  @property
  def _linger_seconds(self) -> float:
    return min(max(self._chunk_seconds, LINGER_SECONDS[0]), LINGER_SECONDS[1])

  async def _settle(self):
    """Lets programs run until few of those that took over a moment ago are likely to come back soon."""
    await asyncio.sleep(0)
    started, linger, owners = time.perf_counter(), self._linger_seconds, self._slots.owners
    while self._quick > QUICK:
      now = time.perf_counter()
      held = sum(1 for s in owners if s is not None)
      young = sum(1 for s in owners if s is not None and s.request is None and now - s.waiting_since < linger)
      full = min(held, self.sampler.slots)
      if now > started + linger or not young or len(self._slots.ready) >= full - full // 8:
        break
      self._stir.clear()
      try:
        await asyncio.wait_for(self._stir.wait(), started + linger - now)
      except asyncio.TimeoutError:
        break
    now = time.perf_counter()
    if self._slots.ready or self._slots.queue:
      self._slots.timeline.add('device', 'linger', started, now)
      self.stats.linger_seconds += now - started
    else:
      self._slots.timeline.add('device', 'idle', started, now)
      self.stats.idle_seconds += now - started

  async def _decode(self):
    """Draws one chunk for every ready session and hands out what is done."""
    slots, sampler, stats = self._slots, self.sampler, self.stats
    steps, draws = sampler.steps, None
    while draws is None:
      if not slots.ready:  # all were cancelled meanwhile
        return
      active = {s.seat: (s, s.request) for s in slots.drawing()}
      requests = {
          seat: SlotRequest(int(s.context.tail(-1)[0]), s.cached, s.request.budget, s.seed, s.request.stop_ids,
                            s.request.cursor(s.context))
          for seat, (s, _) in active.items()}
      # Back to the host as soon as some are done: others may want their slots, or they their tools.
      enough = max((len(active) + 3) // 4, sampler.slots // 8, 1)
      floor = max(0, len(active) - enough)
      prefill = sampler.prefill_seconds
      try:
        draws, started, ended = await asyncio.get_running_loop().run_in_executor(
            self._pool, _timed, sampler.decode, requests, floor)
      except CacheFull:
        # Nobody new is let in before the others have drawn, or they would take each other's room for ever.
        if slots.ready and not slots.make_room(min(slots.ready, key=lambda s: s.asked_at)):
          raise
        slots.extend()
    now, turns = time.perf_counter(), 0
    for seat, (session, request) in active.items():
      # It may have been cancelled, or another turn asked for, meanwhile.
      if session.seat == seat and session.request is request and not request.future.cancelled():
        self._record(session, draws[seat], now)
        turns += request.future.done()
    self._chunk_seconds += 0.2 * (ended - started - self._chunk_seconds)
    prefill, steps = sampler.prefill_seconds - prefill, sampler.steps - steps
    stats.prefill_seconds += prefill
    stats.decode_seconds += ended - started - prefill
    slots.timeline.add('device', 'prefill', started, started + prefill)
    slots.timeline.add('device', 'decode', started + prefill, ended)
    tokens = sum(len(d.tokens) for d in draws.values())
    stats.decoded_tokens += tokens
    stats.steps += steps
    stats.slot_steps += steps * sampler.slots
    stats.chunks += 1
    stats.stored_tokens += sampler.contexts.stored
    stats.cache_tokens += sampler.cache.blocks * sampler.block
    self.spend(tokens=tokens, turns=turns)

  def _record(self, session: Session, draws: Draws, now: float):
    """Appends what a session drew to its trajectory and ends its turn where it is to end."""
    request, context = session.request, session.context
    context.append_sampled(draws.tokens, draws.log_probs, draws.entropies, session.num_turns,
                           -1 if session.policy else self.version, draws.masks)
    session.cached += len(draws.tokens)
    request.budget -= len(draws.tokens)
    reason = 'stop' if draws.stopped else 'length' if request.budget <= 0 else None
    if request.stop_texts:
      drawn = context.tail(request.start).tolist()
      kept = self._cut_at_stop(drawn, request.stop_texts)
      if kept is not None:
        context.truncate(request.start + kept)
        session.cached = min(session.cached, len(context) - 1)
        reason = 'stop'
    if reason:
      self._slots.ready.remove(session)
      self._slots.timeline.begin(session.seat, session.label, 'wait')
      session.waiting_since = now
      request.future.set_result(reason)

  def _cut_at_stop(self, tokens: list[int], stops: tuple[str, ...]) -> int | None:
    """Returns how many tokens the shortest prefix with a stop string in its text has; None without one."""
    text = self.tokenizer.decode(tokens)
    if not any(s in text for s in stops):
      return None
    low, high = 1, len(tokens)
    while low < high:
      middle = (low + high) // 2
      if any(s in self.tokenizer.decode(tokens[:middle]) for s in stops):
        high = middle
      else:
        low = middle + 1
    return low


def _timed(function: Callable[..., T], *arguments: Any) -> tuple[T, float, float]:
  """Returns what a function returns, and when it began and ended: while it runs, a program may keep the event loop busy."""
  started = time.perf_counter()
  return function(*arguments), started, time.perf_counter()
