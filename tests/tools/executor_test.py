"""Tests of the executor against tools that hang, crash, raise, lie and flood.

Times are asserted loosely, and only to show that something did not wait for something else.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time

import pytest

from agentrl import tools
from agentrl.core.types import Part, ToolCall, ToolResult
from agentrl.tools import base


async def wait(seconds: float, answer: str = '') -> str:
  """Answers late."""
  await asyncio.sleep(seconds)
  return answer


async def fail(message: str) -> str:
  """Raises."""
  raise ValueError(message)


async def flood(length: int) -> str:
  """Answers at length."""
  return 'a' * length


def run(executor, *calls, seed=0):
  async def main():
    session = executor.open(seed)
    results = await session.call([ToolCall(*c) if isinstance(c, tuple) else c for c in calls])
    await session.close()
    return results
  return asyncio.run(main())


def asynchronous(**settings):
  return tools.Executor([tools.function_tool(f) for f in (wait, fail, flood)], **settings)


def test_results_are_in_the_order_of_the_calls_whatever_the_delays():
  delays = [i / 100 for i in range(20)]
  random.Random(0).shuffle(delays)
  with asynchronous() as executor:
    results = run(executor, *[('wait', {'seconds': d, 'answer': str(i)})
                              for i, d in enumerate(delays)])
  assert [r.text for r in results] == [str(i) for i in range(20)]
  assert all(r.ok for r in results)


def test_calls_run_at_the_same_time():
  start = time.monotonic()
  with asynchronous() as executor:
    run(executor, *[('wait', {'seconds': 0.2})] * 20)
  assert time.monotonic() - start < 2.0  # One after another they take 4 s.


def test_concurrency_is_limited_and_waiting_does_not_count_against_the_timeout():
  running, most = 0, 0

  async def count() -> str:
    """Counts how many run at once."""
    nonlocal running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.1)
    running -= 1
    return ''

  limits = tools.Limits(concurrency=3, timeout=0.8)
  with tools.Executor([tools.function_tool(count)], limits=limits) as executor:
    results = run(executor, *[('count', {})] * 30)  # 10 rounds of 0.1 s, above the timeout.
  assert most == 3
  assert all(r.ok for r in results)


def test_failures_are_results():
  with asynchronous(limits=tools.Limits(timeout=0.5, output=100)) as executor:
    results = run(
        executor,
        ('fail', {'message': 'no such key'}),
        ('wait', {'seconds': 60.0}),
        ('flood', {'length': 10_000_000}),
        ('fial', {}),
        ('wait', {'seconds': 'long'}),
        ToolCall('wait', {}, error='<wait> is not closed'),
        ToolCall('', {}, error='invalid JSON'))
    stats = executor.take_stats()
  assert [r.error for r in results] == ['raised', 'timeout', None, 'unknown_tool', 'malformed',
                                        'malformed', 'malformed']
  assert [r.text for r in results] == [
      'error: ValueError: no such key', 'error: no result after 0.5 s',
      'a' * 100 + '... [output cut]', "error: unknown tool 'fial', known: fail, flood, wait",
      "error: argument 'seconds' must be number, got 'long'", 'error: <wait> is not closed',
      'error: invalid JSON']
  assert [r.truncated for r in results] == [False, False, True, False, False, False, False]
  assert (stats['wait'].calls, dict(stats['wait'].failures)) == (3, {'timeout': 1, 'malformed': 2})
  assert dict(stats['fail'].failures) == {'raised': 1}
  assert (stats['flood'].failures.total(), stats['flood'].truncated) == (0, 1)
  assert dict(stats['(unknown)'].failures) == {'unknown_tool': 1, 'malformed': 1}
  assert stats['wait'].seconds >= 0.5
  assert executor.take_stats()['wait'].calls == 0


def test_a_timeout_frees_the_slot_even_of_a_tool_that_ignores_its_cancellation():
  async def stubborn(seconds: float) -> str:
    """Ignores being cancelled."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      try:
        await asyncio.sleep(0.01)
      except asyncio.CancelledError:
        pass
    return 'done'

  limits = tools.Limits(timeout=0.1, concurrency=1)
  with tools.Executor([tools.function_tool(stubborn)], limits=limits) as executor:
    start = time.monotonic()

    async def main():
      session = executor.open(0)
      results = await session.call([ToolCall('stubborn', {'seconds': s}) for s in (1.0, 1.0, 0.0)])
      return results, time.monotonic() - start

    results, seconds = asyncio.run(main())
  assert [r.error for r in results] == ['timeout', 'timeout', None]
  assert seconds < 0.9


def test_a_cancelled_run_cancels_its_calls():
  cancelled = []

  async def patient() -> str:
    """Notes its cancellation."""
    try:
      await asyncio.sleep(60)
    except asyncio.CancelledError:
      cancelled.append(True)
      raise
    return ''

  async def main():
    with tools.Executor([tools.function_tool(patient)]) as executor:
      task = asyncio.ensure_future(executor.open(0).call([ToolCall('patient', {})] * 2))
      await asyncio.sleep(0.05)
      task.cancel()
      await asyncio.wait({task})
      await asyncio.sleep(0)

  asyncio.run(main())
  assert cancelled == [True, True]


def test_retries_until_success_and_only_for_the_kinds_asked_for():
  attempts = []

  async def flaky(kind: str) -> str:
    """Fails twice."""
    attempts.append(kind)
    if attempts.count(kind) < 3:
      raise ValueError(kind)
    return 'done'

  tool = tools.function_tool(flaky)
  with tools.Executor([tool], limits=tools.Limits(retries=2)) as executor:
    assert run(executor, ('flaky', {'kind': 'a'}))[0].text == 'done'
  with tools.Executor([tool], limits=tools.Limits(retries=2, retry_on=('crash',))) as executor:
    assert run(executor, ('flaky', {'kind': 'b'}))[0].error == 'raised'
  assert attempts == ['a', 'a', 'a', 'b']


def test_disabled_tools_say_so_and_are_not_run():
  ran = []

  async def record() -> str:
    """Records."""
    ran.append(True)
    return ''

  tool = tools.function_tool(record)
  for disabled in (True, ['record']):
    with tools.Executor([tool], disabled=disabled) as executor:
      (result,) = run(executor, ('record', {}))
      assert (result.ok, result.error, result.text) == (False, 'disabled', 'error: tool disabled')
      assert dict(executor.stats['record'].failures) == {'disabled': 1}
  assert not ran


def test_wrong_settings_are_refused():
  tool = tools.function_tool(wait)
  with pytest.raises(ValueError, match='share a name'):
    tools.Executor([tool, tool])
  with pytest.raises(ValueError, match="no tool is called .'wiat'"):
    tools.Executor([tool], disabled=['wiat'])
  with pytest.raises(ValueError, match="no tool is called .'wiat'"):
    tools.Executor([tool], limits_by_tool={'wiat': tools.Limits()})


class Counter(base.Tool):
  """Adds up, slowly; notes what is opened and closed."""

  name = 'counter'
  description = 'Adds.'
  parameters = {'type': 'object', 'properties': {'n': {'type': 'integer'}}, 'required': ['n']}
  stateful = True

  def __init__(self):
    self.opened = []
    self.closed = []

  async def open(self, seed):
    self.opened.append(seed)
    return [0]

  async def call(self, state, arguments):
    total = state[0] + arguments['n']
    # Later calls are quicker: the order must not be theirs.
    await asyncio.sleep(0.01 / (1 + arguments['n']))
    state[0] = total
    return base.success(str(total))

  async def snapshot(self, state):
    return state[0]

  async def restore(self, snapshot):
    return [snapshot]

  async def close(self, state):
    self.closed.append(state[0])


def test_calls_on_one_state_run_in_their_order_and_trajectories_do_not_mix():
  tool = Counter()

  async def main():
    with tools.Executor([tool]) as executor:
      sessions = [executor.open(seed) for seed in range(3)]
      assert not tool.opened
      calls = [ToolCall('counter', {'n': n}) for n in (1, 2, 3, 4)]
      results = await asyncio.gather(*[s.call(calls) for s in sessions[:2]])
      for session in (*sessions, sessions[0]):
        await session.close()
      return results

  # Prefix sums of 1, 2, 3, 4, for each trajectory alone; the third was never used.
  results = asyncio.run(main())
  assert [[r.text for r in rs] for rs in results] == [['1', '3', '6', '10']] * 2
  assert (sorted(tool.opened), tool.closed) == ([0, 1], [10, 10])


def test_a_snapshot_makes_independent_sessions():
  async def main():
    with tools.Executor([Counter()]) as executor:
      async def add(session, n):
        return (await session.call([ToolCall('counter', {'n': n})]))[0].text
      session = executor.open(0)
      await add(session, 1)
      snapshot = await session.snapshot()
      forks = [executor.restore(snapshot) for _ in range(2)]
      again = executor.restore(await executor.restore(snapshot).snapshot())
      return [await add(session, 10), await add(forks[0], 100), await add(forks[1], 1000),
              await add(again, 10000)]

  assert asyncio.run(main()) == ['11', '101', '1001', '10001']


class Broken(base.Tool):
  """Cannot open or close."""

  name = 'broken'
  description = ''
  parameters = {'type': 'object'}

  def __init__(self, opens):
    self._opens = opens

  async def open(self, seed):
    if not self._opens:
      raise OSError('no sandbox')

  async def call(self, state, arguments):
    return base.success('fine')

  async def close(self, state):
    raise OSError('cannot close')


def test_a_tool_that_cannot_open_or_close_does_not_stop_the_run():
  with tools.Executor([Broken(opens=False)]) as executor:
    assert run(executor, ('broken', {}))[0].text == 'error: OSError: no sandbox'
  with tools.Executor([Broken(opens=True)]) as executor:
    assert run(executor, ('broken', {}))[0].text == 'fine'
    assert dict(executor.stats['broken'].failures) == {'close': 1}


def test_cut_keeps_images_and_what_went_wrong():
  image = Part('image', b'png')
  shown = base.cut(ToolResult((Part('text', 'abc'), image, Part('text', 'def'))), 4)
  assert shown.text == 'abc[image]d... [output cut]'
  failed = ToolResult((Part('text', 'x' * 100), Part('text', 'error: no')), ok=False,
                      error='raised')
  assert base.cut(failed, 12).text == 'xxx... [output cut]error: no'
  whole = ToolResult((Part('text', 'abc'),))
  assert base.cut(whole, 3) is whole


# Functions that block: these run in worker processes.


def add(a: int, b: int = 1) -> int:
  """Adds."""
  return a + b


def hang(seconds: float) -> str:
  """Hangs."""
  time.sleep(seconds)
  return 'awake'


def die(code: int) -> str:
  """Takes its process along."""
  os._exit(code)


def eat(gigabytes: int) -> int:
  """Eats memory."""
  return len(bytearray(gigabytes << 30))


def shout(length: int) -> str:
  """Prints and answers at length."""
  print('b' * length, flush=True)
  return 'a' * length


def leave() -> str:
  """Exits."""
  raise SystemExit('bye')


def who() -> int:
  """Tells its process id."""
  return os.getpid()


def test_blocking_functions_that_fail_are_results_and_the_next_call_works():
  functions = [tools.function_tool(f, processes=1) for f in (add, hang, die, eat, shout, leave)]
  # Starting a worker counts, so the limit leaves room for a busy machine.
  with tools.Executor(functions, limits=tools.Limits(timeout=5.0)) as executor:
    bad = run(executor, ('die', {'code': 3}), ('eat', {'gigabytes': 100}), ('leave', {}),
              ('shout', {'length': 10_000_000}))
    good = run(executor, ('add', {'a': 1}), ('add', {'a': 1, 'b': 5}), ('hang', {'seconds': 0.0}),
               ('die', {'code': 4}), ('eat', {'gigabytes': 0}), ('shout', {'length': 1}))
  assert [(r.error, r.text) for r in bad[:3]] == [
      ('crash', 'error: tool crashed (exit code 3)'), ('raised', 'error: MemoryError'),
      ('raised', 'error: SystemExit: bye')]
  assert bad[3].truncated and bad[3].text == 'a' * 4096 + '... [output cut]'
  assert [r.text for r in good] == [
      '2', '6', 'awake', 'error: tool crashed (exit code 4)', '0', 'a']


def test_a_function_that_hangs_is_killed_and_its_only_slot_is_free_again():
  before = threading.active_count()
  tool = tools.function_tool(hang, processes=1)
  with tools.Executor([tool], limits=tools.Limits(timeout=5.0)) as warm:
    run(warm, ('hang', {'seconds': 0.0}))
    start = time.monotonic()
    limited = tools.Executor([tool], limits=tools.Limits(timeout=0.3))
    assert run(limited, ('hang', {'seconds': 60.0}))[0].error == 'timeout'
    assert run(warm, ('hang', {'seconds': 0.0}))[0].text == 'awake'
    assert time.monotonic() - start < 10
  assert threading.active_count() == before


def test_workers_stay_warm_over_calls_and_event_loops_and_end_with_the_executor():
  with tools.Executor([tools.function_tool(who, processes=1)]) as executor:
    pids = {run(executor, ('who', {}))[0].text for _ in range(3)}
  assert len(pids) == 1
  with pytest.raises(ProcessLookupError):
    os.kill(int(pids.pop()), 0)


def test_a_function_defined_anywhere_can_be_sent():
  offset = 40

  def shifted(x: int) -> int:
    """Adds what it closes over."""
    return x + offset

  with tools.Executor([tools.function_tool(shifted, name='shift', processes=1)]) as executor:
    assert run(executor, ('shift', {'x': 2}))[0].text == '42'


def test_unknown_tools_are_refused_with_the_known():
  with pytest.raises(LookupError, match="did you mean 'calculator'.* Known: calculator, .*python"):
    tools.make('calculater')
