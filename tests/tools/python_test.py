"""Tests of the Python tool. CPython's behaviour is the oracle, except where a limit is tested."""

from __future__ import annotations

import asyncio
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from agentrl import tools
from agentrl.core.types import ToolCall


@pytest.fixture(scope='module', name='executor')
def shared_executor():
  """One pool for all tests that do no harm to it."""
  with tools.Executor([tools.make('python', workers=2, time_limit=3.0)]) as executor:
    yield executor


def run(executor, *codes, seed=0):
  """Runs codes one after another in one new trajectory."""
  async def main():
    session = executor.open(seed)
    return [(await session.call([ToolCall('python', {'code': c})]))[0] for c in codes]
  return asyncio.run(main())


@pytest.mark.parametrize('code, text', [
  ('1 + 1', '2'), ('"text"', 'text'), ('["text", 1]', "['text', 1]"), ('3 / 2', '1.5'),
  ('print(1)\n2', '1\n2'), ('print(1)', '1'), ('x = 4', '(no output)'), ('None', '(no output)'),
  ('', '(no output)'), ('gcd(12, 18), lcm(4, 6)', '(6, 12)'), ('\n  1 + 1\n', '2'),
  ('def f(x):\n  return x * 2\nf(21)', '42'), ('"é"', 'é'),
])
def test_output_and_value(executor, code, text):
  (result,) = run(executor, code)
  assert (result.text, result.ok, result.error) == (text, True, None)


@pytest.mark.parametrize('code, text', [
  ('foo', "error: NameError: name 'foo' is not defined"),
  ('1 / 0', 'error: ZeroDivisionError: division by zero'),
  ('raise ValueError("no")', 'error: ValueError: no'),
  ('print("before")\nfoo', "before\nerror: NameError: name 'foo' is not defined"),
  ('1 +', 'error: SyntaxError: '),
  ('open("/etc/passwd").read()', 'error: PermissionError: '),
  ('import numpy', "error: ModuleNotFoundError: No module named 'numpy'"),
  ('10 ** 5000', 'error: ValueError: Exceeds the limit'),
  ('"\ud800"', 'error: '),
])
def test_errors_are_the_last_line_of_a_traceback(executor, code, text):
  (result,) = run(executor, code)
  assert result.text.startswith(text)
  assert (result.ok, result.error) == (False, 'raised')


def test_names_live_on_within_a_trajectory_and_nowhere_else(executor):
  assert [r.text for r in run(executor, 'x = 40', 'x + 2')] == ['(no output)', '42']
  assert run(executor, 'x')[0].error == 'raised'


def test_what_ran_before_an_exception_stays_done(executor):
  results = run(executor, 'x = 1', 'x = 2\nfoo', 'x')
  assert [r.text for r in results[::2]] == ['(no output)', '2']


def test_many_trajectories_at_once_on_few_processes(executor):
  async def main():
    sessions = [executor.open(i) for i in range(100)]
    for code in ('x = {}', 'x += 1000', 'x'):
      results = await asyncio.gather(*[
          s.call([ToolCall('python', {'code': code.format(i)})]) for i, s in enumerate(sessions)])
    return [r[0].text for r in results]

  assert asyncio.run(main()) == [str(1000 + i) for i in range(100)]
  assert len(children()) <= 2


def test_calls_of_one_turn_run_in_order(executor):
  async def main():
    codes = ['x = [1]', 'x.append(2)', 'x']
    return await executor.open(0).call([ToolCall('python', {'code': c}) for c in codes])

  assert asyncio.run(main())[-1].text == '[1, 2]'


def test_forks_are_independent(executor):
  async def main():
    async def call(session, code):
      return (await session.call([ToolCall('python', {'code': code})]))[0].text
    session = executor.open(0)
    await call(session, 'x = [1]')
    snapshot = await session.snapshot()
    await call(session, 'x.append(2)')
    fork = executor.restore(snapshot)
    await call(fork, 'x.append(3)')
    return await call(session, 'x'), await call(fork, 'x')

  assert asyncio.run(main()) == ('[1, 2]', '[1, 3]')


def test_the_seed_decides_all_that_is_random(executor):
  codes = ['import random, time\nrandom.random()', 'random.random(), time.time()']
  first, again, other = (([r.text for r in run(executor, *codes, seed=s)]) for s in (1, 1, 2))
  assert first == again
  assert first[0] != other[0] and first[1] != other[1]


def test_sleeping_takes_no_time(executor):
  start = time.monotonic()
  assert run(executor, 'import time\ntime.sleep(60)\n1')[0].text == '1'
  assert time.monotonic() - start < 5


def test_ten_megabytes_of_output_are_cut(executor):
  for code in ('print("a" * 10_000_000)', '"a" * 10_000_000',
               'for i in range(10**4): print("a" * 999)'):
    (result,) = run(executor, code)
    assert result.truncated and result.text.endswith('... [output cut]')
    assert len(result.text) <= 4096 + 20


def test_memory_hogs_are_stopped_and_undone(executor):
  results = run(executor, 'x = 1', 'x = [0] * 10**9', 'x = "a" * 5_000_000', 'x')
  assert [r.text for r in results] == [
      '(no output)', 'error: MemoryError: memory limit exceeded',
      'error: MemoryError: variables too large',
      '1']
  assert [r.error for r in results] == [None, 'memory', 'memory', None]


def test_endless_loops_are_stopped_and_undone():
  with tools.Executor([tools.make('python', workers=1, time_limit=0.2)]) as executor:
    start = time.monotonic()
    results = run(executor, 'x = 1', 'x = 2\nwhile True: pass', 'while True: print("a")', 'x')
    assert time.monotonic() - start < 5
  assert [r.error for r in results] == [None, 'timeout', 'timeout', None]
  assert results[1].text == 'error: TimeoutError: time limit exceeded'
  # What went wrong is told even when the output before it fills the limit.
  assert results[2].text.endswith('error: TimeoutError: time limit exceeded')
  assert results[3].text == '1'


def children(parent=None):
  """Process ids of a process's interpreter workers, this one's if None."""
  parent = parent or os.getpid()
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      name, rest = path.read_text().split('(', 1)[1].rsplit(')', 1)
    except OSError:
      continue  # It ended meanwhile.
    if 'monty' in name and int(rest.split()[1]) == parent:
      found.append(int(path.parent.name))
  return found


def test_a_killed_worker_is_a_result_and_the_state_survives():
  others = set(children())
  with tools.Executor([tools.make('python', workers=1, time_limit=3.0)]) as executor:

    async def main():
      session = executor.open(0)
      await session.call([ToolCall('python', {'code': 'x = 40'})])
      call = asyncio.ensure_future(session.call([ToolCall('python', {'code': 'while True: pass'})]))
      await asyncio.sleep(0.2)
      for pid in set(children()) - others:
        os.kill(pid, signal.SIGKILL)
      (crashed,) = await call
      (after,) = await session.call([ToolCall('python', {'code': 'x + 2'})])
      return crashed, after

    crashed, after = asyncio.run(main())
  assert (crashed.error, crashed.text) == ('crash', 'error: the interpreter crashed')
  assert after.text == '42'


_COMPUTES = """
import asyncio
from agentrl import tools
from agentrl.core.types import ToolCall

executor = tools.Executor([tools.make('python', workers=1, time_limit=0.2)])
code = 'x = 3 ** 10**6\\ny = x\\nwhile True: y = y * x'  # the products take longer and longer
asyncio.run(executor.open(0).call([ToolCall('python', {'code': code})]))
"""


@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='needs Linux')
def test_a_worker_that_computes_does_not_outlive_its_killed_parent_for_long():
  parent = subprocess.Popen([sys.executable, '-c', _COMPUTES])
  try:
    wait_for(lambda: any(cpu_seconds(pid) > 0.5 for pid in children(parent.pid)))
    [worker] = children(parent.pid)
  finally:
    parent.kill()
    parent.wait()
  assert alive(worker)
  # 0.2 s and 1.5 s of grace, rounded up to 2, and one more, of processor time.
  wait_for(lambda: not alive(worker) or cpu_seconds(worker) > 6)
  assert not alive(worker)


def wait_for(condition, seconds=60):
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.02)


def cpu_seconds(pid):
  try:
    return time.clock_gettime(~pid << 3 | 2)
  except OSError:
    return 0.0


def alive(pid):
  """Whether a process runs: one that nobody waited for does not."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
  except OSError:
    return False


def test_a_worker_may_compute_for_longer_in_all_than_in_one_call():
  others = set(children())
  with tools.Executor([tools.make('python', workers=1, time_limit=0.2)]) as executor:
    run(executor, '1')
    worker, calls = set(children()) - others, 0
    # One call may take 3 s, as above.
    while sum(map(cpu_seconds, worker)) < 3.5:
      assert run(executor, 'while True: pass')[0].error == 'timeout'
      assert set(children()) - others == worker and calls < 100
      calls += 1


def test_shutdown_leaves_no_process_and_no_thread_and_the_tool_can_start_again():
  others, threads = set(children()), threading.active_count()
  tool = tools.make('python', workers=2)
  for _ in range(2):
    with tools.Executor([tool]) as executor:
      assert not set(children()) - others  # Nothing starts before the first call.
      assert run(executor, '1')[0].text == '1'
    assert not set(children()) - others
    assert threading.active_count() == threads
