"""Tests of whole runs: what one leaves behind, and that ending it anywhere changes nothing.

Expected values are those of one run that nobody disturbed. AGENTRL_KILLS=10 in the environment
kills ten times, not three.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from agentrl.checkpointing import checkpoints
from agentrl.metrics import writers
from agentrl.rollout import store
from agentrl.training import loop

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_KILLS = int(os.environ.get('AGENTRL_KILLS', '3'))
_STEPS = 8  # 2 supervised, 3 of reinforcement, 3 evaluations
_TIMES = re.compile(r'time$|seconds|tokens_per_second|engine')  # what depends on time


def start(workdir, *overrides):
  """Starts the tiny run on one device."""
  environment = {**os.environ, 'XLA_FLAGS': '', 'PYTHONUNBUFFERED': '1'}
  with open(workdir.with_suffix('.log'), 'a', encoding='utf-8') as log:
    return subprocess.Popen([
        sys.executable, '-m', 'agentrl.main', '--config=tests/training/tiny.py',
        f'--workdir={workdir}', '--verbosity=0', *overrides
    ], cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def log_of(workdir):
  return workdir.with_suffix('.log').read_text()


def finish(workdir, *overrides):
  process = start(workdir, *overrides)
  assert process.wait(300) == 0, log_of(workdir)[-3000:]


def wait_for(process, condition):
  """Returns whether `condition` came true before the process ended."""
  while process.poll() is None:
    if condition():
      return True
    time.sleep(0.002)
  return False


def saved(workdir):
  """Returns the newest checkpoint: step, arrays by name, host state."""
  folder = workdir / 'checkpoints'
  newest = max(p for p in folder.iterdir() if p.name.startswith('step_'))
  leaves = checkpoints._read_manifest(newest)['leaves']
  template = {name: np.zeros(shape, dtype) for name, (shape, dtype) in leaves.items()}
  with checkpoints.Checkpointer(folder) as checkpointer:
    return checkpointer.restore(template)


def lines(workdir):
  """Returns the lines of metrics.jsonl without what is a time."""
  return [_timeless(line) for line in writers.read_metrics(workdir)]


def summary(workdir):
  return _timeless(json.loads((workdir / 'summary.json').read_text()))


def _timeless(values):
  return {k: v for k, v in values.items() if not _TIMES.match(k)}


def assert_same_run(workdir, reference):
  assert lines(workdir) == lines(reference)
  assert summary(workdir) == summary(reference)
  found, wanted = saved(workdir), saved(reference)
  assert found.step == wanted.step == _STEPS and found.arrays.keys() == wanted.arrays.keys()
  for name, array in wanted.arrays.items():
    np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)
  names = [p.name for p in store.list_paths(reference / 'trajectories')]
  assert [p.name for p in store.list_paths(workdir / 'trajectories')] == names


@pytest.fixture(scope='module')
def undisturbed(tiny_folder, tmp_path_factory, quick_compile):
  """The workdir of a run from start to end."""
  folder = tmp_path_factory.mktemp('undisturbed')
  workdir = pathlib.Path(shutil.copytree(tiny_folder, folder / 'run'))
  finish(workdir)
  return workdir


def test_a_run_leaves_what_it_promises(undisturbed):
  found = json.loads((undisturbed / 'summary.json').read_text())
  assert 0 <= found['cold_start']['success'] <= 1
  final = found['final']
  low, high = final['success_ci95']
  assert 0 <= low <= final['success'] <= high <= 1
  assert {'success_without_tool', 'calls_per_task', 'failed_call_rate'} <= set(final)
  assert {'sft', 'rl', 'eval', 'compile', 'setup', 'total'} <= set(found['seconds'])
  assert found['tokens_per_second']['decode'] > 0 and found['tokens_per_second']['update'] > 0
  assert found['compilations_after_warmup'] == 0 and found['steps'] == _STEPS
  assert [line['step'] for line in lines(undisturbed)] == list(range(_STEPS))
  assert [line['stage'] for line in lines(undisturbed)] == ['sft'] * 2 + ['eval'] + ['rl'] * 3 + [
      'eval', 'eval_without_tools']
  page = (undisturbed / 'report.html').read_text()
  assert '<html' in page and 'final' in page
  table = log_of(undisturbed)
  assert 'final.success' in table and 'seconds.total' in table


def test_evaluation_without_tools_runs_none(undisturbed):
  trajectories = store.read(store.list_paths(undisturbed / 'trajectories')[-1]).trajectories
  assert len(trajectories) == 8
  assert not any(r.ok for t in trajectories for r in t.results)


def test_starting_a_finished_run_again_changes_nothing(undisturbed, tmp_path):
  workdir = pathlib.Path(shutil.copytree(undisturbed, tmp_path / 'run'))
  (workdir / 'summary.json').unlink()  # as if killed between the last state and the summary
  finish(workdir)
  assert_same_run(workdir, undisturbed)


def test_kills_at_random_points_change_nothing(undisturbed, tiny_folder, tmp_path, quick_compile):
  rng = random.Random(int(os.environ.get('AGENTRL_KILL_SEED', '0')))
  workdir = pathlib.Path(shutil.copytree(tiny_folder, tmp_path / 'run'))
  killed = []
  # Spread over the run; every third kill waits for a checkpoint that is being written.
  targets = sorted(rng.randrange(_STEPS - 1) for _ in range(_KILLS))
  for i, target in enumerate(targets):
    process = start(workdir)
    unfinished = lambda: any((workdir / 'checkpoints').glob('unfinished_*'))
    reached = lambda: len(writers.read_metrics(workdir)) > target
    if wait_for(process, (lambda: reached() and unfinished()) if i % 3 == 1 else reached):
      time.sleep(0.0 if i % 3 == 1 else rng.uniform(0.0, 0.2))
      process.kill()
    process.wait()
    written = len(writers.read_metrics(workdir))
    with checkpoints.Checkpointer(workdir / 'checkpoints') as checkpointer:
      steps = checkpointer.steps()
    assert written - max(steps, default=0) <= 1
    killed.append(process.returncode == -signal.SIGKILL)
  assert sum(killed) > _KILLS // 2
  finish(workdir)
  assert_same_run(workdir, undisturbed)


def test_a_kill_while_the_workdir_is_being_prepared_changes_nothing(undisturbed, tmp_path,
                                                                    quick_compile):
  # The data set, the demonstrations and the tokenizer are made at the start: kill there, then let
  # it finish.
  workdir = tmp_path / 'run'
  process = start(workdir)
  assert wait_for(process, lambda: (workdir / 'config.json').exists())
  time.sleep(random.Random(1).uniform(0.0, 0.3))
  process.kill()
  process.wait()
  finish(workdir)
  assert_same_run(workdir, undisturbed)


def test_sigterm_saves_and_starting_again_goes_on(undisturbed, tiny_folder, tmp_path,
                                                  quick_compile):
  workdir = pathlib.Path(shutil.copytree(tiny_folder, tmp_path / 'run'))
  process = start(workdir)
  assert wait_for(process, lambda: len(writers.read_metrics(workdir)) >= 4)
  process.terminate()
  assert process.wait(60) == 0
  step = saved(workdir).step
  assert f'agentrl: stopped after step {step}; start again' in re.sub(r'\s+', ' ', log_of(workdir))
  # Nothing is lost: a line for every step that the state has seen.
  assert [line['step'] for line in lines(workdir)] == list(range(step)) and 4 <= step < _STEPS
  finish(workdir)
  assert f'Going on from step {step}' in log_of(workdir)
  assert_same_run(workdir, undisturbed)


def test_a_truncated_checkpoint_is_stepped_over_loudly(undisturbed, tmp_path):
  workdir = pathlib.Path(shutil.copytree(undisturbed, tmp_path / 'run'))
  newest = max(p for p in (workdir / 'checkpoints').iterdir() if p.name.startswith('step_'))
  largest = max((p for p in newest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  finish(workdir)
  assert 'CHECKPOINT DAMAGED' in log_of(workdir)
  assert f'Moved to {workdir / "checkpoints" / "corrupt_step_"}' in log_of(workdir)
  assert_same_run(workdir, undisturbed)


def test_three_updates_that_are_not_finite_end_the_run(tiny_folder, tmp_path, quick_compile):
  # The first update at this rate sends the parameters out of range; every later loss is NaN.
  workdir = pathlib.Path(shutil.copytree(tiny_folder, tmp_path / 'run'))
  overrides = ['--config.stages=sft', '--config.sft.learning_rate=1e38', '--config.sft.steps=20']
  process = start(workdir, *overrides)
  assert process.wait(300) == 2
  folder = workdir / 'rejected'
  (message,) = [line for line in log_of(workdir).splitlines() if line.startswith('agentrl:')]
  assert 'updates in a row were not finite' in message and str(folder) in message
  files = sorted(folder.iterdir())
  assert 3 <= len(files) <= 4  # two updates a step
  with np.load(files[0]) as batch:
    assert (batch['segment_ids'] > 0).any()
  state = saved(workdir)
  assert state.host['rejected_in_a_row'] == len(files) and state.step < 20
  assert 'Traceback' not in log_of(workdir)


def test_nan_rewards_end_the_reinforcement_stage(tiny_config, tiny_workdir, quick_compile,
                                                 monkeypatch):
  from agentrl.training import build

  class Broken:
    names = ('accuracy', 'success')

    def __call__(self, task, trajectory):
      # A task is checked before anyone has answered.
      return {'accuracy': float('nan') if trajectory.turns else 0.0, 'success': 0.0}

  broken = build.rewards.Reward([Broken()], {'accuracy': 1.0})
  monkeypatch.setattr(build.rewards, 'make', lambda *arguments: broken)
  config = tiny_config({'stages': 'rl', 'rl.steps': '9', 'report': 'false'})
  with pytest.raises(loop.RunError, match=r'3 updates in a row were not finite; .*rejected'):
    loop.run(config, tiny_workdir)
  assert len(list((tiny_workdir / 'rejected').iterdir())) == 3
  assert len(lines(tiny_workdir)) == 3
