"""What happens where slots, blocks of the cache and host memory are short: sessions make room for each other and end.

Blocks hold 16 tokens. What is expected follows from counting them, and draws are those of sessions that are alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

import jax
import numpy as np
import pytest

from agentrl.core.types import Status
from agentrl.rollout.budget import Limits
from agentrl.rollout.engine import Engine, Job
from agentrl.sampling.sampler import Sampler

pytestmark = pytest.mark.usefixtures('quick_compile')


def prompt(number, length):
  """A prompt that begins like no other."""
  return [20 + number, *range(30, 29 + length)]


def draws(start, turns, max_tokens=40):
  async def program(session):
    session.append(start)
    for _ in range(turns):
      await session.generate(max_tokens=max_tokens)
    session.finish(Status.FINISHED)
  return program


@contextlib.contextmanager
def engine_of(tiny, sampler, seconds=60.0, **settings):
  limits = Limits(turn_tokens=40, trajectory_tokens=96, context_tokens=96, turns=20, seconds=seconds)
  engine = Engine(sampler, tiny.tokenizer, limits=limits, **settings)
  try:
    yield engine
  finally:
    engine.close()


def jobs_of(tiny, *running):
  return [Job(tiny.task(i), 0, str(i), p) for i, p in enumerate(running)]


def tokens_of(trajectories):
  return [t.segments[-1].tokens.tolist() for t in trajectories]


def alone(tiny, jobs):
  with engine_of(tiny, tiny.sampler(4, capacities=(96,))) as engine:
    return [engine.collect([job])[0] for job in jobs]


def test_sessions_that_fit_in_but_cannot_go_on_together_do_not_push_each_other_out_for_ever(tiny):
  """Two of 4 blocks each fill all 8; each is about to need a fifth."""
  jobs = jobs_of(tiny, *(draws(prompt(i, 50), 1) for i in range(2)))
  with engine_of(tiny, tiny.sampler(4, capacities=(24,)), seconds=30.0) as engine:
    got = engine.collect(jobs)
    assert engine.stats.evictions <= 2
  assert [t.status for t in got] == [Status.FINISHED] * 2, got[0].detail
  assert tokens_of(got) == tokens_of(alone(tiny, jobs))


def test_what_is_parked_of_sessions_that_wait_makes_room_at_last(tiny):
  """Pairs of forks wait for a tool and hold a prompt of 3 blocks in common, of 8; a context of 6 is wanted."""
  released = asyncio.Event()
  ready = []

  async def branch(session):
    session.append([70 + session.trajectory.path[0]])
    await session.generate(max_tokens=2)
    ready.append(session)
    await released.wait()
    await session.generate(max_tokens=2)
    session.finish(Status.FINISHED)

  async def parent(session):
    session.append(prompt(1, 48))
    await session.generate(max_tokens=1)
    for fork in session.fork(2):
      session.engine.adopt(fork, branch)
    session.finish(Status.FINISHED)

  async def large(session):
    while len(ready) < 2:
      await asyncio.sleep(0.001)
    session.append(prompt(2, 60))
    await session.generate(max_tokens=36)
    session.finish(Status.FINISHED)
    released.set()

  with engine_of(tiny, tiny.sampler(4, capacities=(24,)), patience=0.0) as engine:
    got = engine.collect(jobs_of(tiny, parent, large))
  assert [t.status for t in got] == [Status.FINISHED] * 4
  assert engine._slots.parked_bytes == 0


class Hooked(Sampler):
  """A real sampler that calls a function in the engine's loop, and waits for it, before it draws."""

  def __init__(self, like, hook):
    self.__dict__.update(like.__dict__)
    self.hook = hook

  def decode(self, requests, floor=0):
    self.hook()
    return super().decode(requests, floor)


@pytest.mark.parametrize('what', ['ends', 'forks'])
def test_what_a_waiting_session_does_while_the_device_finds_no_room(tiny, what):
  """The other's 4 blocks of 8 are wanted, and in this moment it ends, or forks."""
  go, done = asyncio.Event(), threading.Event()
  loops, state = [], dict(waiting=False, wanted=False)

  def hook():
    if state['waiting'] and state['wanted']:
      loops[0].call_soon_threadsafe(go.set)
      assert done.wait(30)

  async def waits(session):
    loops.append(asyncio.get_running_loop())
    session.append(prompt(1, 60))
    await session.generate(max_tokens=1)
    state['waiting'] = True
    await go.wait()
    if what == 'forks':
      session.fork(1)
      done.set()
      await asyncio.sleep(0.05)
      session.append([70])
      await session.generate(max_tokens=1)
    session.finish(Status.FINISHED)
    # Called once the engine has taken note of the end.
    asyncio.get_running_loop().call_soon(done.set)

  async def wants(session):
    while not state['waiting']:
      await asyncio.sleep(0.001)
    session.append(prompt(2, 64))
    state['wanted'] = True
    await session.generate(max_tokens=30)
    session.finish(Status.FINISHED)

  sampler = Hooked(tiny.sampler(4, capacities=(24,)), hook)
  with engine_of(tiny, sampler, patience=60.0) as engine:
    got = engine.collect(jobs_of(tiny, waits, wants))
  assert [t.status for t in got] == [Status.FINISHED] * 2, [t.detail for t in got]


def test_a_slot_is_kept_while_that_costs_less_than_leaving(tiny):
  with engine_of(tiny, tiny.sampler(4)) as engine:
    engine._slots.park_seconds = 0.004  # as long again to come back
    for ready, usual, patience in ((1, 0.002, 0.008), (1, 0.02, 0.0), (4, 0.02, 0.032), (4, 0.05, 0.0)):
      engine._slots.ready, engine._wait_seconds = [None] * ready, usual
      assert engine._patience_seconds == pytest.approx(patience)
    engine._slots.ready = []


def test_one_context_fills_the_whole_cache_whatever_was_there_before(tiny):
  """Of 6 blocks all are wanted, while the block that the context began like is still to be copied."""
  sampler = tiny.sampler(3, capacities=(32,))
  long = prompt(0, 60)

  async def program(session):
    session.append(long[:25])
    mark = session.mark()
    await session.generate(max_tokens=20)
    session.rollback(mark)
    session.append([75])
    await session.generate(max_tokens=40)
    session.append(list(range(40, 40 + session.tokens_left - 10)))
    mark = session.mark()
    await session.generate(max_tokens=9)
    session.rollback(mark)
    session.append([76])
    await session.generate(max_tokens=9)
    session.finish(Status.FINISHED)

  jobs = jobs_of(tiny, program, program)
  for job in jobs:
    with engine_of(tiny, sampler) as engine:
      got = engine.collect([job, jobs_of(tiny, draws(long[:30], 2, 10))[0]])
    assert [t.status for t in got] == [Status.FINISHED] * 2
    assert tokens_of(got[:1]) == tokens_of(alone(tiny, [job]))


def test_forks_without_a_program_hold_nothing_once_their_job_is_taken(tiny):
  async def program(session):
    session.append(prompt(0, 40))
    await session.generate(max_tokens=2)
    while session.parked is None:
      await asyncio.sleep(0.001)
    session.fork(2)
    session.finish(Status.FINISHED)

  async def run():
    sampler = tiny.sampler(2, capacities=(96,))
    with engine_of(tiny, sampler, patience=0.0) as engine:
      async with engine.serving():
        roots = [engine.begin(job) for job in jobs_of(tiny, program, draws(prompt(1, 40), 5, 4),
                                                      draws(prompt(2, 40), 5, 4))]
        while engine.under_way():
          await engine.serve()
        engine.take(roots)
        engine._slots._catch_up()
        assert engine._slots.parked_bytes == 0
        assert not any(b.users for b in sampler.contexts._all.values())

  asyncio.run(run())


def test_what_wakes_the_engine_while_it_settles_is_not_lost(tiny):
  async def program(session):
    session.append(prompt(0, 20))
    await asyncio.get_running_loop().create_future()

  async def run():
    with engine_of(tiny, tiny.sampler(2, capacities=(96,))) as engine:
      async with engine.serving():
        engine.begin(Job(tiny.task(0), 0, 'g', program))
        for _ in range(2):
          serving = asyncio.create_task(engine.serve())
          await asyncio.sleep(0)  # it lets programs run before it looks for something to draw
          engine.wake()
          await asyncio.wait_for(serving, 10)

  asyncio.run(run())


def test_new_weights_leave_each_session_its_policy(tiny):
  """A judge keeps its slot while the learner's weights change, and with them what the cache holds."""
  other = jax.tree.map(lambda x: x * 1.05, tiny.params)
  sampler = tiny.sampler(2, capacities=(96,))
  sampler.set_params(other, 'other')
  changed, judges = asyncio.Event(), []

  async def program(session):
    judge = session.open('other')
    judges.append(judge)
    judge.append(prompt(0, 20))
    await judge.generate(max_tokens=4)
    asyncio.get_running_loop().call_later(0.05, session.engine.wake)
    await changed.wait()
    judge.append([70])
    await judge.generate(max_tokens=6)
    session.finish(Status.FINISHED)

  async def run():
    with engine_of(tiny, sampler) as engine:
      async with engine.serving():
        engine.begin(Job(tiny.task(0), 0, 'g', program))
        while not judges or not judges[0].num_turns:
          await engine.serve()
        engine.take_weights(tiny.params, 1)
        changed.set()
        while engine.under_way():
          await engine.serve()

  asyncio.run(run())
  before, tiny.params = tiny.params, other
  try:
    [(log_probs, _)] = tiny.learner_scores([judges[0].trajectory])
  finally:
    tiny.params = before
  s = judges[0].context
  assert s.sampled.sum() == 10
  np.testing.assert_allclose(s.log_probs[s.sampled], log_probs[s.sampled], atol=1e-4)
