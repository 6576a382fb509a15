"""What the engine says of its time: parts add up to the whole, and each figure is at least what was put there.

Expected values are sleeps, which bound from below what they are counted as, and identities between figures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest

from agentrl.core.types import Status
from agentrl.rollout.engine import Job
from agentrl.rollout.stats import EngineStats, Stretch, Timeline
from agentrl.rollout.stream import Order, Stream
from agentrl.sampling.sampler import Sampler

PROMPT = list(range(20, 44))
PARTS = ('prefill', 'decode', 'idle', 'linger', 'host')
SLEEP, TURNS = 0.08, 3


def program_of(tool, turns=TURNS):
  """A program of some turns, after each of which `tool(turn)` is awaited."""
  async def program(session):
    session.append(PROMPT)
    for i in range(turns):
      await session.generate(stops=('e',), max_tokens=8)
      await tool(i)
      session.append([60, 61])
    session.finish(Status.FINISHED)
  return program


async def sleeps(_):
  await asyncio.sleep(SLEEP)


async def returns(_):
  pass


async def blocks(_):
  time.sleep(SLEEP)


def jobs_of(tiny, *tools):
  return [Job(tiny.task(n), 0, str(n), program_of(tool)) for n, tool in enumerate(tools)]


def collect(tiny, jobs, slots=4, sampler=None):
  """Returns (trajectories, stats, timeline, wall time) of a collection of its own."""
  with tiny.engine(sampler=sampler or tiny.sampler(slots, capacities=(tiny.context,))) as engine:
    engine.cut()
    started = time.perf_counter()
    trajectories = engine.collect(jobs)
    wall = time.perf_counter() - started
    return trajectories, *engine.cut(), wall


def seconds_of(stats):
  return {part: stats.metrics()[f'engine_seconds/{part}'] for part in PARTS}


def spent(timeline, kind):
  return sum(s.end - s.start for s in timeline.stretches if s.kind == kind)


@pytest.fixture(name='mixed', scope='module')
def mixed_run(tiny):
  """Ten sessions on four slots, of all kinds."""
  return collect(tiny, jobs_of(tiny, *[sleeps, returns, blocks, sleeps, returns] * 2))


def test_the_parts_are_the_wall_time(mixed):
  _, stats, _, wall = mixed
  assert sum(seconds_of(stats).values()) == pytest.approx(stats.total_seconds)
  assert min(seconds_of(stats).values()) >= 0
  # All of the call is counted but what starts and ends an event loop.
  assert wall - 0.1 < stats.total_seconds <= wall


def test_waiting_for_tools_alone_is_idle(tiny):
  [t], stats, timeline, _ = collect(tiny, jobs_of(tiny, sleeps))
  assert stats.idle_seconds >= TURNS * SLEEP * 0.99 and stats.linger_seconds < 1e-3
  assert stats.tool_seconds >= TURNS * SLEEP * 0.99
  # A single session either draws, or waits for its tool, or for a slot.
  assert t.seconds == pytest.approx(stats.tool_seconds + stats.queue_seconds + spent(timeline, 'draw'), rel=0.02)


def test_tools_of_sessions_side_by_side_take_their_time_but_once(tiny):
  _, stats, _, _ = collect(tiny, jobs_of(tiny, *[sleeps] * 4))
  assert stats.tool_seconds >= 4 * TURNS * SLEEP * 0.99
  assert stats.idle_seconds <= stats.total_seconds < stats.tool_seconds


def test_a_session_is_always_drawing_or_waiting_for_a_tool_or_for_a_slot(mixed):
  trajectories, stats, timeline, _ = mixed
  assert stats.queue_seconds > 0
  assert sum(t.seconds for t in trajectories) == pytest.approx(
      stats.tool_seconds + stats.queue_seconds + spent(timeline, 'draw'), rel=0.02)


class TimedSampler(Sampler):
  """A real sampler that knows how long it was at work."""

  def __init__(self, like: Sampler):
    self.__dict__.update(like.__dict__)
    self.seconds = 0.0

  def decode(self, requests, floor=0):
    started = time.perf_counter()
    draws = super().decode(requests, floor)
    self.seconds += time.perf_counter() - started
    return draws


def test_what_programs_do_while_the_device_draws_is_not_the_devices_time(tiny):
  # Their blocks keep the engine from looking at what was drawn meanwhile.
  sampler = TimedSampler(tiny.sampler(4, capacities=(tiny.context,)))
  _, stats, _, _ = collect(tiny, jobs_of(tiny, *[blocks] * 4), sampler=sampler)
  assert sampler.seconds <= stats.prefill_seconds + stats.decode_seconds < sampler.seconds + SLEEP
  blocked = 4 * TURNS * SLEEP
  assert stats.host_seconds + stats.idle_seconds + stats.linger_seconds >= blocked - sampler.seconds


def test_a_session_that_lost_its_slot_is_in_the_queue_from_then_on(tiny):
  """The cache holds one session and a half: who asked last leaves its slot in mid-turn."""
  made = Sampler(tiny.config, slots=2, context=96, chunk=4, block=16, capacities=(72,), row_buckets=(2,),
                 token_buckets=(16,))
  made.set_params(tiny.params)
  async def long(session):
    session.append(PROMPT)
    await session.generate(max_tokens=64)
    session.finish(Status.FINISHED)
  with tiny.engine(sampler=made, turn_tokens=64) as engine:
    engine.cut()
    trajectories = engine.collect([Job(tiny.task(n), 0, str(n), long) for n in range(2)])
    stats, timeline = engine.cut()
  assert stats.evictions > 0
  assert sum(t.seconds for t in trajectories) == pytest.approx(
      stats.tool_seconds + stats.queue_seconds + spent(timeline, 'draw'), rel=0.02)


def test_occupancy_and_rates_are_quotients_of_counts(mixed):
  trajectories, stats, _, _ = mixed
  found = stats.metrics()
  drawn = sum(int(s.sampled.sum()) for t in trajectories for s in t.segments)
  assert found['decoded_tokens'] >= drawn  # what is cut at a stop was drawn too
  assert found['engine/occupancy'] == stats.decoded_tokens / (4 * stats.steps) <= 1
  assert found['tokens_per_second/decode'] * stats.total_seconds == pytest.approx(stats.decoded_tokens)
  assert found['tokens_per_second/decode_alone'] * stats.decode_seconds == pytest.approx(stats.decoded_tokens)
  assert found['tokens_per_second/prefill_alone'] * stats.prefill_seconds == pytest.approx(stats.extended_tokens)
  # Each prompt but its last token, which is pending.
  assert found['engine/prefilled_tokens'] + found['engine/shared_tokens'] >= 10 * (len(PROMPT) - 1)
  assert 0 < found['engine/cache_fill'] <= 1
  assert found['engine/device_idle_while_ready'] == pytest.approx(
      (stats.linger_seconds + stats.host_seconds) / (stats.total_seconds - stats.idle_seconds))


def test_nothing_done_is_zero_everywhere():
  assert set(EngineStats().metrics().values()) == {0.0}


# ---- the timeline --------------------------------------------------------------------------------


def test_the_device_does_one_thing_at_a_time_as_long_as_the_stats_say(mixed):
  _, stats, timeline, _ = mixed
  for kind in ('prefill', 'decode', 'idle', 'linger'):
    assert spent(timeline, kind) == pytest.approx(getattr(stats, f'{kind}_seconds'))
  rows = {s.row for s in timeline.stretches}
  assert rows == {'device', 0, 1, 2, 3}
  for row in rows:
    own = sorted(s for s in timeline.stretches if s.row == row)
    own.sort(key=lambda s: s.start)
    assert own[0].start >= 0 and own[-1].end <= timeline.seconds
    assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(own))


def test_what_is_done_in_a_seat_goes_on_after_a_cut():
  timeline = Timeline(2)
  timeline.begin(1, 'a', 'draw')
  first = timeline.cut()
  timeline.end(1)
  second = timeline.cut()
  [a], [b] = first.stretches, second.stretches
  assert (a.row, a.kind, a.label) == (b.row, b.kind, b.label) == (1, 'draw', 'a')
  assert a.start < a.end == first.seconds and b.start == 0 < b.end
  assert timeline.cut().stretches == [] and timeline.cut().seconds == 0


def made_of(*stretches, slots=2):
  timeline = Timeline(slots)
  timeline.stretches = [Stretch(*s) for s in stretches]
  return timeline


def test_a_picture_shows_what_was_done_longest():
  timeline = made_of(('device', 'decode', '', 0.0, 2.0), (0, 'draw', 'a', 0.0, 0.6), (0, 'wait', 'a', 0.6, 1.0),
                     (0, 'draw', 'a', 1.0, 1.4), (1, 'wait', 'b', 0.7, 4.0))
  found = timeline.picture(bins=4)
  assert found == {'seconds': 4.0, 'bins': 4, 'rows': [
      ('device', [('decode', 0, 2)]),
      ('seat 0', [('draw', 0, 1)]),  # of the second second it drew 0.4 and was free 0.6
      ('seat 1', [('wait', 1, 4)])]}
  assert json.loads(json.dumps(found))['rows'][1] == ['seat 0', [['draw', 0, 1]]]
  assert made_of().picture(bins=4)['rows'] == [('device', []), ('seat 0', []), ('seat 1', [])]


def test_a_picture_loses_little_of_a_real_timeline(mixed):
  _, _, timeline, _ = mixed
  picture = timeline.picture(bins=2_000)
  for kind in ('draw', 'wait', 'decode', 'idle'):
    shown = sum(last - first for _, runs in picture['rows'] for name, first, last in runs if name == kind)
    assert shown * picture['seconds'] / 2_000 == pytest.approx(spent(timeline, kind), rel=0.1, abs=0.02)


def test_a_trace_has_a_row_a_seat_and_one_for_the_device(mixed):
  _, _, timeline, _ = mixed
  trace = json.loads(json.dumps(timeline.trace()))
  named = {e['tid']: e['args']['name'] for e in trace['traceEvents'] if e['name'] == 'thread_name'}
  assert named == {0: 'device', 1: 'seat 0', 2: 'seat 1', 3: 'seat 2', 4: 'seat 3'}
  order = {e['tid']: e['args']['sort_index'] for e in trace['traceEvents'] if e['name'] == 'thread_sort_index'}
  assert order == {tid: tid for tid in named}
  spans = [e for e in trace['traceEvents'] if e['ph'] == 'X']
  assert len(spans) == len(timeline.stretches) and len(trace['traceEvents']) == len(spans) + 10
  assert {e['name'] for e in spans if e['tid']} == {'draw', 'ready', 'wait'}
  assert {e['args']['session'] for e in spans if e['tid']} == {f'task-{n}/0' for n in range(10)}
  assert sum(e['dur'] for e in spans if e['name'] == 'decode') == pytest.approx(1e6 * spent(timeline, 'decode'), rel=0.01)


# ---- from step to step ----------------------------------------------------------------------------


@pytest.mark.parametrize('overlap', [False, True])
def test_what_a_stream_did_between_two_steps_is_part_of_the_second(tiny, overlap):
  with tiny.engine(sampler=tiny.sampler(4, capacities=(tiny.context,))) as engine:
    stream = Stream(engine, staleness=1, overlap=overlap)
    try:
      engine.cut()
      cuts, taken, began = [], [], time.perf_counter()
      for step in range(4):
        stream.take_weights(tiny.params, step)
        stream.ask([Order(jobs_of(tiny, sleeps, returns)) for _ in range((2, 1, 1, 0)[step])])
        taken += stream.take(1)
        cuts.append((*stream.cut(), time.perf_counter() - began))
        began = time.perf_counter()
        time.sleep(0.05)  # an update
    finally:
      stream.close()
    rest, _ = engine.cut()
  assert rest.decoded_tokens == 0 and len(taken) == 4
  for stats, timeline, wall in cuts:
    assert sum(seconds_of(stats).values()) == pytest.approx(stats.total_seconds)
    # Nothing is counted twice, and nothing that was under way at a cut as the engine's own work.
    assert min(seconds_of(stats).values()) >= -1e-6 and stats.total_seconds <= wall + 0.06
    assert spent(timeline, 'decode') == pytest.approx(stats.decode_seconds)
    assert all(0 <= s.start < s.end <= timeline.seconds for s in timeline.stretches)
  # A run on its own draws the same tokens, in one piece.
  _, alone, _, _ = collect(tiny, [job for _ in range(4) for job in jobs_of(tiny, sleeps, returns)])
  assert sum(stats.decoded_tokens for stats, _, _ in cuts) == alone.decoded_tokens
