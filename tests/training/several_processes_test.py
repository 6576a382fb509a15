"""Tests of a run of two processes of four devices each: it is the run that one process of eight makes.

Expected values are those of the one process, at the same seed and the same mesh.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from agentrl.checkpointing import checkpoints
from agentrl.metrics import timelines, writers
from agentrl.rollout import store
from agentrl.training import loop

STEPS = 3
# PPO learns from every sample; two updates a step and a reference take every way that arrays go between processes.
SETTINGS = {'stages': 'rl', 'mesh.data': '2', 'mesh.fsdp': '4', 'rl.steps': str(STEPS), 'rl.algorithm': 'ppo',
            'rl.reference': 'true', 'rl.options.kl_coef': '0.1', 'rl.minibatches': '2', 'checkpoint.keep': '100',
            # A token whose ratio is within rounding of a bound has a gradient in one run and none in the other.
            'rl.options.clip': '0.6',
            'report': 'false'}
STOPPED = 9

pytestmark = pytest.mark.skipif(jax.device_count() < 8 or jax.default_backend() != 'cpu',
                                reason='needs eight devices of a host')


def start(start_processes, workdir, **overrides):
  """Starts two processes."""
  settings = [f'--config.{key}={value}' for key, value in {**SETTINGS, **overrides}.items()]
  return start_processes(2, [sys.executable, '-m', 'agentrl.main', '--config=tests/training/tiny.py',
                             f'--workdir={workdir}', f'--stopped_exit_code={STOPPED}', '--trace=0', *settings], devices=4)


def finish(processes, code=0):
  for process in processes:
    assert process.wait(600) == code, process.said()[-4000:]
  return '\n'.join(process.said() for process in processes)


def copy(source, folder, steps=None):
  """Returns a copy of a workdir; as it was after so many steps."""
  target = pathlib.Path(shutil.copytree(source, folder / 'run'))
  for path in (target / 'checkpoints').glob('step_*') if steps else ():
    if checkpoints._step_of(path) > steps:
      shutil.rmtree(path)
  return target


def params_at(workdir, step):
  """Returns the parameters of a checkpoint by name."""
  folder = max((workdir / 'checkpoints').glob(f'step_{step:08d}*'), key=checkpoints._order)
  leaves = checkpoints._read_manifest(folder)['leaves']
  wanted = {name: np.zeros(shape, dtype) for name, (shape, dtype) in leaves.items() if name.startswith('params.')}
  assert len(wanted) > 5
  with checkpoints.Checkpointer(workdir / 'checkpoints') as checkpointer:
    values = checkpointer._read(folder, wanted, partial=True)
  return dict(zip(wanted, values))


def assert_same(workdir, reference, first=0):
  """Checks losses, rewards, trajectories and parameters of the steps from `first` on."""
  mine, theirs = ([line for line in writers.read_metrics(w) if first <= line['step'] < STEPS]
                  for w in (workdir, reference))
  assert [line['step'] for line in mine] == list(range(first, STEPS))
  for name in ('loss', 'kl', 'grad_norm', 'entropy'):
    np.testing.assert_allclose([m[name] for m in mine], [t[name] for t in theirs], atol=1e-5, rtol=1e-5, err_msg=name)
  for name in ('decoded_tokens', 'trained_tokens', 'reward', 'signal_groups', 'applied'):
    assert [m[name] for m in mine] == [t[name] for t in theirs], name
  for path in store.list_paths(reference / 'trajectories')[first:]:
    got, want = (store.read(w / 'trajectories' / path.name).trajectories for w in (workdir, reference))
    assert [(t.task.id, t.sample) for t in got] == [(t.task.id, t.sample) for t in want]
    for a, b in zip(got, want):
      np.testing.assert_array_equal(a.segments[0].tokens, b.segments[0].tokens)
      np.testing.assert_allclose(a.segments[0].log_probs, b.segments[0].log_probs, atol=1e-4)
      assert a.rewards == b.rewards
  got, want = params_at(workdir, STEPS), params_at(reference, STEPS)
  for name, values in want.items():
    np.testing.assert_allclose(got[name], values, atol=1e-4, err_msg=name)


@pytest.fixture(scope='module')
def one(tiny_config, tiny_folder, tmp_path_factory, quick_compile):
  """The workdir of one process."""
  workdir = pathlib.Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp('one') / 'run'))
  loop.run(tiny_config(SETTINGS), workdir)
  return workdir


@pytest.fixture(scope='module')
def two(tiny_folder, tmp_path_factory, start_processes, quick_compile):
  """The workdir of two."""
  workdir = pathlib.Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp('two') / 'run'))
  (workdir / 'log').write_text(finish(start(start_processes, workdir)))
  return workdir


def test_two_processes_make_the_run_of_one(one, two):
  assert_same(two, one)
  # Some policy was trained on something, and nothing was compiled on the way.
  assert all(np.abs(params_at(two, STEPS)[name] - values).max() > 1e-3 for name, values in params_at(two, 1).items()
             if 'value' not in name and values.ndim > 2)
  assert '"compilations_after_warmup": 0' in (two / 'summary.json').read_text(), (two / 'log').read_text()


def test_each_process_writes_what_its_slots_did(two):
  found = [timelines.read(two, process) for process in (0, 1)]
  assert [f['step'] for f in found] == [STEPS - 1] * 2
  traces = sorted(p.name for p in (two / 'trace').iterdir())
  assert traces == ['step-000000-1.json.gz', 'step-000000.json.gz']
  labels = []
  for name in traces:
    events = json.loads(gzip.decompress((two / 'trace' / name).read_bytes()))['traceEvents']
    labels.append({e['args']['session'] for e in events if e['ph'] == 'X' and e['args']})
  assert all(labels) and not labels[0] & labels[1], 'each has groups of its own'


def test_one_process_goes_on_where_two_were(one, two, tiny_config, tmp_path, quick_compile):
  workdir = copy(two, tmp_path, steps=2)
  loop.run(tiny_config({**SETTINGS, 'mesh.data': '-1', 'mesh.fsdp': '1'}), workdir)
  assert_same(workdir, one)


def test_two_go_on_where_one_was_and_end_together(one, tmp_path, start_processes, quick_compile):
  workdir = copy(one, tmp_path, steps=1)
  (workdir / 'metrics.jsonl').unlink()  # so that its lines are those of the two
  processes = start(start_processes, workdir, **{'rl.steps': '1000'})
  while len(writers.read_metrics(workdir)) < STEPS - 1:
    assert all(process.poll() is None for process in processes), processes[0].said()[-4000:]
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  finish(processes, STOPPED)
  saved = max(checkpoints._step_of(p) for p in (workdir / 'checkpoints').glob('step_*'))
  lines = writers.read_metrics(workdir)
  assert [line['step'] for line in lines] == list(range(1, saved)) and saved >= STEPS
  assert all(f'stopped after step {saved}; start again' in process.said() for process in processes)
  assert_same(workdir, one, first=1)


def test_what_is_refused_on_one_is_refused_on_both(tmp_path, start_processes):
  (tmp_path / 'file').write_text('')
  processes = start(start_processes, tmp_path / 'file')
  finish(processes, 2)
  first, second = (process.said() for process in processes)
  assert f'agentrl: the workdir {tmp_path / "file"} cannot be written' in first and 'Traceback' not in first + second
  assert f'agentrl: process 0: the workdir {tmp_path / "file"} cannot be written' in second
