"""Ctrl-C in the middle of a collection, as a terminal sends it: the process ends, and with it all that it started."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

_FOLDER = pathlib.Path(__file__).resolve().parent

# Programs in the middle of calls of every kind of tool: a function that hangs in a worker process, an interpreter that
# loops in another, and turns that are being drawn.
_SCRIPT = '''
import importlib.util, signal, sys, time
from agentrl import tools
from agentrl.core.types import Status, ToolCall
from agentrl.rollout.engine import Job

def hang() -> str:
  """Waits."""
  time.sleep(600)

spec = importlib.util.spec_from_file_location('tiny_policy', sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
tiny = module.TinyPolicy()
limits = tools.Limits(timeout=600.0)
python = tools.make('python', workers=1, time_limit=600.0)

async def calls(session):
  session.append(list(range(20, 30)))
  await session.generate(max_tokens=4)
  name, arguments = [('hang', {}), ('python', {'code': 'while True: pass'})][session.trajectory.sample]
  await executor.open(0).call([ToolCall(name, arguments)])

async def draws(session):
  session.append(list(range(20, 30)))
  mark = session.mark()
  for i in range(10**9):
    await session.generate(max_tokens=4)
    session.rollback(mark)
    if i == 20:
      print('drawing', flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell's background ignores it
with tools.Executor([tools.function_tool(hang, processes=1), python], limits=limits) as executor:
  with tiny.engine(redraws=10**9) as engine:
    engine.collect([Job(tiny.task(i), i, 'g', calls) for i in range(2)] + [Job(tiny.task(2), 0, 'g', draws)])
'''


def children(parent):
  """Returns the processes that a process has started, by id, with when they began."""
  found = {}
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    fields = fields_of(path)
    if fields and int(fields[1]) == parent:
      found[int(path.parent.name)] = fields[19]
  return found


def fields_of(path):
  """Returns the fields of a process behind its name, from its state on; [] if it has ended."""
  try:
    fields = path.read_text().rsplit(')', 1)[1].split()
  except OSError:
    return []
  return [] if fields[0] == 'Z' else fields


def left(started):
  """Returns those of some processes that still run."""
  now = {pid: fields_of(pathlib.Path(f'/proc/{pid}/stat')) for pid in started}
  return [pid for pid, fields in now.items() if fields and fields[19] == started[pid]]


def test_ctrl_c_leaves_no_worker_behind(tmp_path):
  (tmp_path / 'script.py').write_text(_SCRIPT)
  path = os.pathsep.join([str(_FOLDER.parents[1]), os.environ.get('PYTHONPATH', '')])
  with open(tmp_path / 'log', 'wb') as log:
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / 'script.py'), str(_FOLDER.parent / 'tiny_policy.py')],
        env={**os.environ, 'PYTHONPATH': path}, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
  said = lambda: (tmp_path / 'log').read_text(errors='replace')
  started = {}
  try:
    assert process.stdout.readline() == b'drawing\n', said()
    deadline = time.monotonic() + 60
    while len(started) < 2 and time.monotonic() < deadline:
      time.sleep(0.05)
      started = children(process.pid)
    assert len(started) >= 2, 'the worker of the function and the interpreter'
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    # A worker looks once a second whether its parent is there; here it is told.
    deadline = time.monotonic() + 0.5
    while left(started) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not left(started)
    assert process.returncode in (-signal.SIGINT, 1, 130) and 'KeyboardInterrupt' in said(), said()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in left(started):
      os.kill(pid, signal.SIGKILL)
