"""Tests of the engine: scheduling changes nothing, sharing is free, bad programs fail alone."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
import time

import numpy as np
import pytest

from agentrl.core.types import Boundary, Status
from agentrl.metrics.timing import CompileCounter
from agentrl.rollout import engine as engines
from agentrl.rollout.budget import Budget, Limits
from agentrl.rollout.engine import LINGER_SECONDS, Engine, Job
from agentrl.rollout.session import Mark
from agentrl.sampling import contexts
from agentrl.sampling.draw import SamplingParams
from agentrl.sampling.sampler import Sampler
from agentrl.sampling.speculation import Speculation

PROMPT = list(range(20, 44))  # Longer than one extension's width.


def agent(prompt=PROMPT, turns=3, delays=None, stops=('e', '1', '<|end|>')):
  """A program of some turns with observations between; delays(turn) seconds for each tool."""

  async def program(session):
    session.append(prompt)
    for i in range(turns):
      turn = await session.generate(stops=stops)
      if delays:
        await asyncio.sleep(delays(i))
      # The observation depends on the turn, as a tool's would.
      session.append([60 + (turn.end - turn.start) % 7, 61, 62])
    session.finish(Status.FINISHED, answer=turn.text)

  return program


def jobs_of(tiny, tasks=4, samples=4, delays=None):
  return [Job(tiny.task(n), k, f'task-{n}', agent([*PROMPT, 50 + n], delays=delays))
          for n in range(tasks) for k in range(samples)]


def collect(tiny, jobs, sampler=None, seed=0):
  with tiny.engine(sampler=sampler, seed=seed) as engine:
    return engine.collect(jobs), engine.stats


def tokens_of(trajectories):
  return [t.segments[0].tokens.tolist() for t in trajectories]


def wide(tiny):
  return tiny.sampler(16, capacities=(tiny.context,))


@pytest.fixture(scope='module', name='plain')
def plain_run(tiny):
  """16 trajectories on 4 slots, to compare with."""
  return collect(tiny, jobs_of(tiny))[0]


def check_same(plain, other):
  assert tokens_of(other) == tokens_of(plain)
  for a, b in zip(plain, other):
    np.testing.assert_array_equal(a.segments[0].sampled, b.segments[0].sampled)
    # Only the order of additions differs.
    np.testing.assert_allclose(a.segments[0].log_probs, b.segments[0].log_probs, atol=1e-5)
    assert [t.stop_reason for t in a.turns] == [t.stop_reason for t in b.turns]


def test_members_of_a_group_differ(tiny, plain):
  """Rivals sample a group with one key, so every advantage is 0."""
  for n in range(4):
    group = [t for t in plain if t.group_id == f'task-{n}']
    prompt = len(PROMPT) + 1
    assert len({tuple(t.segments[0].tokens[prompt:]) for t in group}) == 4
    assert len({tuple(t.segments[0].tokens[:prompt]) for t in group}) == 1


def test_slots_do_not_matter(tiny, plain):
  check_same(plain, collect(tiny, jobs_of(tiny), sampler=wide(tiny))[0])


def test_tool_delays_and_order_do_not_matter(tiny, plain):
  rng = np.random.default_rng(0)
  for sampler in (tiny.sampler(), wide(tiny)):
    jobs = jobs_of(tiny, delays=lambda i: rng.random() * 0.01)
    check_same(plain, collect(tiny, jobs, sampler=sampler)[0])
  order = rng.permutation(16)
  jobs = jobs_of(tiny)
  shuffled = collect(tiny, [jobs[i] for i in order])[0]
  check_same([plain[i] for i in order], shuffled)


def test_chunks_and_capacities_do_not_matter(tiny, plain):
  sampler = tiny.sampler(4, chunk=3, capacities=(tiny.context + 5,))
  check_same(plain[:8], collect(tiny, jobs_of(tiny)[:8], sampler=sampler)[0])


def test_the_company_does_not_matter_nor_sharing_a_prefix(tiny, plain):
  jobs = jobs_of(tiny)
  # Alone there is nobody to share a prompt with; with its group there is.
  for i in (1, 7):
    alone, stats = collect(tiny, [jobs[i]])
    check_same([plain[i]], alone)
    assert stats.shared_tokens == 0


def test_speculation_does_not_matter(tiny, plain):
  sampler = tiny.sampler(speculation=Speculation(3, ngram=1))
  check_same(plain, collect(tiny, jobs_of(tiny), sampler=sampler)[0])


def test_speculation_spares_a_policy_that_repeats_itself_most_steps(tiny):
  greedy = SamplingParams(temperature=0.0)
  ones = (tiny.context,)
  plain, stats = collect(tiny, jobs_of(tiny, samples=1), tiny.sampler(capacities=ones, sampling=greedy))
  others, fewer = collect(tiny, jobs_of(tiny, samples=1), tiny.sampler(
      capacities=ones, sampling=greedy, speculation=Speculation(3, ngram=1)))
  check_same(plain, others)
  assert stats.steps >= stats.decoded_tokens / 4 and fewer.steps < 0.7 * stats.steps


def test_seeds_matter(tiny, plain):
  other = collect(tiny, jobs_of(tiny), seed=1)[0]
  assert not any(a == b for a, b in zip(tokens_of(plain), tokens_of(other)))


def test_a_group_costs_one_prefill(tiny):
  jobs = jobs_of(tiny, tasks=1)
  prompt = len(PROMPT) + 1
  trajectories, stats = collect(tiny, jobs)
  # The prompt but its last token is written once and copied three times; two observations of 3
  # tokens are written for each. (The third is read by nobody.)
  assert stats.shared_tokens == 3 * (prompt - 1)
  assert stats.extended_tokens == prompt - 1 + 4 * 2 * 3
  assert stats.decoded_tokens >= sum(t.num_sampled for t in trajectories)
  # Twice as many samples as slots: the later ones find the prompt where an earlier one was.
  _, stats = collect(tiny, jobs_of(tiny, tasks=1, samples=8))
  assert stats.extended_tokens == prompt - 1 + 8 * 2 * 3


def test_waiting_slots_keep_their_cache(tiny):
  """A session waits in its slot while others decode many times; then it goes on as if alone."""
  jobs = [Job(tiny.task(0), 0, 'a', agent(delays=lambda i: 0.05)),
          *(Job(tiny.task(n), 0, 'b', agent([70 + n] * 5, turns=6)) for n in (1, 2, 3))]
  together, stats = collect(tiny, jobs)
  assert stats.evictions == 0
  alone, _ = collect(tiny, [Job(tiny.task(0), 0, 'a', agent())])
  check_same(alone, together[:1])


def test_more_sessions_than_slots_that_all_wait_are_evicted_and_come_back(tiny, plain):
  # All hold their slots for longer than the engine is willing to linger.
  jobs = jobs_of(tiny, delays=lambda i: 1.6 * LINGER_SECONDS[1])
  others, stats = collect(tiny, jobs)
  assert stats.evictions > 0
  check_same(plain, others)


def test_a_cache_with_room_for_little_more_than_one_context_serves_all_in_turn(tiny):
  # 8 blocks of 16 tokens, and contexts that come to 85: who has begun is not put out by who comes after, for ever.
  def jobs(wait):
    return [Job(tiny.task(n), 0, f'g{n}', agent([50 + n, *PROMPT], turns=4, stops=(), delays=lambda i: wait * (n % 3)))
            for n in range(6)]

  ample, _ = collect(tiny, jobs(0.0), sampler=wide(tiny))
  assert {len(t.segments[0]) for t in ample} == {85}
  tight = tiny.sampler(4, capacities=(32,))
  for wait in (0.0, 0.02):
    others, stats = collect(tiny, jobs(wait), sampler=tight)
    check_same(ample, others)
    assert stats.cache_tokens == stats.chunks * 128


@pytest.mark.parametrize('capacity', [96, 36])
def test_more_shared_blocks_than_a_call_reads_end_no_run(tiny, monkeypatch, capacity):
  """Five blocks of a prompt, in all four slots; with a capacity of 36 there is room for few copies."""
  jobs = [Job(tiny.task(0), k, 'g', agent(list(range(20, 100)), turns=1)) for k in range(8)]
  ample, _ = collect(tiny, jobs)
  monkeypatch.setattr(contexts, 'MOST_SHARED', 2)
  sampler = Sampler(tiny.config, slots=4, context=tiny.context, chunk=8, block=16, capacities=(capacity,))
  sampler.set_params(tiny.params)
  others, stats = collect(tiny, jobs, sampler=sampler)
  check_same(ample, others)
  assert (stats.evictions > 0) == (capacity == 36)


def test_nothing_compiles_after_warm_up(tiny):
  sampler = Sampler(tiny.config, slots=3, context=tiny.context, chunk=4, block=16, capacities=(32, 96))
  sampler.set_params(tiny.params)
  sampler.warm_up()
  counter = CompileCounter()
  try:
    counter.mark()
    jobs = [Job(tiny.task(n), k, f'g{n}', agent([50 + n] * (1 + 10 * n), turns=1 + n % 3,
                                               delays=lambda i: 0.001 * i))
            for n in range(5) for k in range(3)]
    for seed in (0, 1):
      sampler.set_params(tiny.params)
      trajectories, stats = collect(tiny, jobs, sampler=sampler, seed=seed)
      assert {t.status for t in trajectories} == {Status.FINISHED}
      # It has been larger than at first.
      assert stats.cache_tokens > stats.chunks * 3 * 32 and stats.shared_tokens > 0
    assert counter.count == 0, counter.names
  finally:
    counter.close()


class SlowSampler(Sampler):
  """A real sampler on a device that takes its time, so that interruptions meet a decode."""

  def __init__(self, like: Sampler):
    self.__dict__.update(like.__dict__)
    self.started, self.seconds = threading.Event(), 0.0

  def decode(self, requests, floor=0):
    self.started.set()
    time.sleep(self.seconds)
    return super().decode(requests, floor)


# ---- bad programs --------------------------------------------------------------------------------


async def raises(session):
  session.append(PROMPT)
  await session.generate()
  raise KeyError('lost')


async def returns(session):
  session.append(PROMPT)
  await session.generate()


async def appends_too_much(session):
  session.append(PROMPT)
  session.append(range(100))


async def generates_first(session):
  await session.generate()


async def negative_budget(session):
  session.append(PROMPT)
  await session.generate(max_tokens=-4)


async def too_many_stops(session):
  session.append(PROMPT)
  await session.generate(stops=[str(i) for i in range(9)])


async def empty_stop(session):
  session.append(PROMPT)
  await session.generate(stops=['</python>', ''])


async def goes_on_for_ever(session):
  session.append(PROMPT)
  while True:
    await session.generate(max_tokens=1)


async def talks_for_ever(session):
  session.append(PROMPT)
  while True:
    await session.generate()


async def overlaps(session):
  session.append(PROMPT)
  await asyncio.gather(session.generate(), session.generate())


async def appends_while_sampling(session):
  session.append(PROMPT)
  turn = asyncio.ensure_future(session.generate())
  await asyncio.sleep(0)
  try:
    session.append([3])
  finally:
    await turn


async def goes_on_after_the_end(session):
  session.append(PROMPT)
  session.finish(Status.FINISHED)
  await session.generate()


async def awaits_something_cancelled(session):
  session.append(PROMPT)
  tool = asyncio.ensure_future(asyncio.sleep(1))
  asyncio.get_running_loop().call_later(0.001, tool.cancel)
  await tool


async def half_a_token(session):
  session.append(PROMPT)
  await session.generate(max_tokens=2.5)


async def one_string_of_stops(session):
  session.append(PROMPT)
  await session.generate(stops='abc')


async def unknown_token(session):
  session.append([*PROMPT, 1 << 20])
  await session.generate()


async def negative_token(session):
  session.append(PROMPT)
  session.replace([*PROMPT, -1])


async def token_of_another_kind(session):
  session.append(PROMPT)
  mark = session.mark()
  await session.generate()
  session.revise(mark, [1.5])


async def huge_token(session):
  session.append([1 << 40])
  await session.generate()


async def longer_context(session):
  session.limits = dataclasses.replace(session.limits, context_tokens=1 << 20)


async def no_such_place(session):
  session.append(PROMPT)
  session.rollback(Mark(0, 0, 0))


async def no_such_status(session):
  session.append(PROMPT)
  session.finish('done')


async def no_such_policy(session):
  session.append(PROMPT)
  session.policy = 'nobody'
  await session.generate()


async def two_programs(session):
  session.append(PROMPT)
  session.engine.adopt(session, two_programs)


AGENT = (Status.AGENT_FAILURE, Boundary.AGENT)
BAD = [
    (raises, *AGENT, "KeyError: 'lost'"),
    (returns, *AGENT, 'returned without finishing'),
    (appends_too_much, Status.LENGTH, Boundary.ENVIRONMENT, '100 tokens were appended where 72'),
    (generates_first, *AGENT, 'generate() before any append()'),
    (negative_budget, *AGENT, 'max_tokens=-4'),
    (too_many_stops, *AGENT, '9 stop tokens, but at most 8'),
    (empty_stop, *AGENT, 'a stop must not be empty'),
    (goes_on_for_ever, Status.TURN_LIMIT, Boundary.POLICY, 'no turn left of 20'),
    (talks_for_ever, Status.LENGTH, Boundary.POLICY, 'no token left'),
    (overlaps, *AGENT, 'a turn is being sampled'),
    (appends_while_sampling, *AGENT, 'a turn is being sampled'),
    (goes_on_after_the_end, *AGENT, 'the trajectory has ended (finished)'),
    (awaits_something_cancelled, *AGENT, 'cancelled'),
]
WORSE = [
    (half_a_token, *AGENT, "'float' object cannot be interpreted as an integer"),
    (one_string_of_stops, *AGENT, "stops='abc' is one string"),
    (unknown_token, *AGENT, 'got int64 of shape (25,) from 20 to 1048576'),
    (negative_token, *AGENT, 'from -1 to 43'),
    (token_of_another_kind, *AGENT, 'got float64 of shape (1,)'),
    (huge_token, *AGENT, 'to 1099511627776'),
    (longer_context, *AGENT, 'context_tokens=1048576 is above the sampler'),
    (no_such_place, *AGENT, 'is no place'),
    (no_such_status, *AGENT, "'done' is not a valid Status"),
    (no_such_policy, *AGENT, "policy 'nobody' is unknown; known: ''"),
    (two_programs, *AGENT, 'session task-110/0 has a program already'),
]


@pytest.mark.parametrize('bad', [BAD, WORSE], ids=['bad', 'worse'])
def test_bad_programs_end_their_own_trajectory_alone(tiny, plain, bad):
  good, done = jobs_of(tiny), []
  jobs = [j for i, g in enumerate(good[:len(bad)])
          for j in (g, Job(tiny.task(100 + i), 0, 'bad', bad[i][0]))]
  with tiny.engine() as engine:
    trajectories = engine.collect(jobs, on_done=done.append, policy_version=3)
    check_same(plain[:len(bad)], trajectories[::2])
    for (program, status, boundary, detail), t in zip(bad, trajectories[1::2], strict=True):
      assert (t.status, t.boundary) == (status, boundary), program.__name__
      assert detail in t.detail, (program.__name__, t.detail)
    assert sorted(map(id, done)) == sorted(map(id, trajectories))
    assert {t.policy_version for t in trajectories} == {3}
    # Slots and queues are free again.
    check_same(plain[:4], engine.collect(good[:4]))


@pytest.mark.parametrize('ended_by', ['its own time', 'the time of all', 'enough others'])
def test_a_program_that_cannot_be_cancelled_is_closed(tiny, plain, monkeypatch, ended_by):
  monkeypatch.setattr(engines, 'CLEAN_UP_SECONDS', 0.1)
  done = []

  async def hears_nothing(session):
    session.append(PROMPT)
    while True:
      try:
        await asyncio.sleep(60)
      except asyncio.CancelledError:
        pass

  jobs = [*jobs_of(tiny), Job(tiny.task(99), 0, 'deaf', hears_nothing)]
  own, of_all = {'its own time': (3.0, 0.0), 'the time of all': (60.0, 3.0), 'enough others': (60.0, 0.0)}[ended_by]
  with tiny.engine(seconds=own) as engine:
    *others, deaf = engine.collect(jobs, on_done=done.append, budget=Budget(seconds=of_all),
                                   enough=0.5 if ended_by == 'enough others' else 1.0)
    assert (deaf.status, deaf.boundary) == AGENT and 'went on after it was cancelled' in deaf.detail
    assert done.count(deaf) == 1
    if ended_by != 'enough others':
      check_same(plain, others)
    check_same(plain[:4], engine.collect(jobs[:4]))


def test_a_cancelled_turn_leaves_the_context_as_it_was(tiny):
  seen, sampler = {}, SlowSampler(tiny.sampler())

  async def gives_up(session):
    session.append(PROMPT)
    before = session.context.tokens.tolist()
    turn = asyncio.ensure_future(session.generate())
    while not sampler.started.is_set():
      await asyncio.sleep(0.001)
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
      await turn
    seen['context'] = session.context.tokens.tolist() == before
    # The decode under way draws for the turn before, more than this one asks for.
    turn = await session.generate(max_tokens=2)
    session.finish(Status.FINISHED, answer=turn.text)

  async def patient(session):
    session.append(PROMPT)
    session.finish(Status.FINISHED, answer=(await session.generate(max_tokens=2)).text)

  sampler.seconds = 0.05
  [a], [b] = (collect(tiny, [Job(tiny.task(), 0, 'g', p)], sampler=sampler)[0]
              for p in (gives_up, patient))
  assert seen['context'] and a.status is Status.FINISHED and a.answer == b.answer
  assert tokens_of([a]) == tokens_of([b]) and len(a.turns) == 1


@pytest.mark.parametrize('role', [False, True])
def test_a_turn_that_nobody_awaits_any_more_is_forgotten(tiny, role):
  """A program ends while a turn of its session, or of one that it opened, is under way in a task of its own."""
  seen = {}

  async def leaves(session):
    seen['session'] = drawing = session.open() if role else session
    session.append(PROMPT)
    if role:
      drawing.append(PROMPT)
    seen['turn'] = asyncio.ensure_future(drawing.generate(max_tokens=60))
    while len(drawing.context) == len(PROMPT):
      await asyncio.sleep(0.001)
    session.finish(Status.FINISHED)

  async def waits(session):
    session.append(PROMPT)
    while 'turn' not in seen or not seen['turn'].done():
      await session.generate(max_tokens=1)
    seen['cancelled'] = seen['turn'].cancelled()
    session.finish(Status.FINISHED)

  with tiny.engine(turn_tokens=60, turns=60) as engine:
    one, other = engine.collect([Job(tiny.task(), 0, 'g', leaves), Job(tiny.task(1), 0, 'g', waits)])
  assert (one.status, other.status) == (Status.FINISHED, Status.FINISHED), other.detail
  assert seen['cancelled'] and seen['session'].context.tokens.tolist() == PROMPT
  assert not seen['session'].trajectory.turns


def test_turns_that_are_given_up_count_as_drawn(tiny):
  async def impatient(session):
    session.append(PROMPT)
    while True:
      turn = asyncio.ensure_future(session.generate(max_tokens=60))
      while not turn.done() and len(session.context) == len(PROMPT):
        await asyncio.sleep(0.001)
      turn.cancel()
      await asyncio.wait([turn])
      if not turn.cancelled():
        turn.result()

  with tiny.engine(turn_tokens=60, trajectory_tokens=60, redraws=2, seconds=60.0) as engine:
    [t] = engine.collect([Job(tiny.task(), 0, 'g', impatient)])
  assert t.status is Status.AGENT_FAILURE and 'most of them rolled back again' in t.detail


# ---- interruptions -------------------------------------------------------------------------------


def test_a_collection_that_is_cancelled_in_mid_decode_leaves_the_engine_usable(tiny, plain):
  sampler = SlowSampler(tiny.sampler())
  # Of other prompts: what their decode writes late would spoil those collected next.
  others = [Job(tiny.task(50 + k), 0, 'o', agent([90 + k] * 9)) for k in range(4)]
  with tiny.engine(sampler=sampler) as engine:

    async def cancelled():
      sampler.seconds = 0.2
      collection = asyncio.ensure_future(engine.collect_async(others))
      while not sampler.started.is_set():
        await asyncio.sleep(0.001)
      collection.cancel()
      with pytest.raises(asyncio.CancelledError):
        await collection
      sampler.seconds = 0.0
      return await engine.collect_async(jobs_of(tiny))

    check_same(plain, asyncio.run(cancelled()))


def test_ctrl_c_ends_the_collection_and_leaves_the_engine_usable(tiny, plain):
  done = []

  async def interrupts(session):
    session.append(PROMPT)
    await session.generate()
    signal.raise_signal(signal.SIGINT)
    await asyncio.sleep(60)

  # A job of a shell's background starts with SIGINT ignored.
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with tiny.engine() as engine:
      with pytest.raises(KeyboardInterrupt):
        engine.collect([*jobs_of(tiny), Job(tiny.task(99), 0, 'bad', interrupts)],
                       on_done=done.append)
      check_same(plain, engine.collect(jobs_of(tiny)))
  finally:
    signal.signal(signal.SIGINT, previous)


def test_close_leaves_no_thread(tiny):
  before = set(threading.enumerate())
  with tiny.engine() as engine:
    engine.collect(jobs_of(tiny)[:2])
    assert set(threading.enumerate()) - before
  assert not set(threading.enumerate()) - before
  with pytest.raises(RuntimeError):
    engine.collect(jobs_of(tiny)[:2])


def test_limits_beyond_the_cache_are_refused_at_once(tiny):
  with pytest.raises(ValueError, match='context_tokens=97 .* 96'):
    Engine(tiny.sampler(), tiny.tokenizer, limits=Limits(context_tokens=97))


def test_errors_of_on_done_reach_the_caller(tiny):
  def on_done(trajectory):
    raise OSError('disk full')

  with tiny.engine() as engine, pytest.raises(OSError, match='disk full'):
    engine.collect(jobs_of(tiny)[:2], on_done=on_done)


def test_an_empty_collection_is_empty(tiny):
  assert collect(tiny, [])[0] == []
