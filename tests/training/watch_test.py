"""What a run writes of its speed: metrics of every rollout, the last timeline, traces and profiles on request.

Runs are real and tiny; expected values are identities between what they write.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from agentrl.metrics import timelines, writers
from agentrl.rollout.stats import Timeline
from agentrl.training import loop, sft, watch
from agentrl.viz import report

PARTS = ('prefill', 'decode', 'idle', 'linger', 'host')
SETTINGS = {'stages': 'sft,rl,eval:final', 'sft.steps': '3', 'rl.steps': '3'}


@pytest.fixture(scope='module', name='done')
def finished_run(tiny_config, tiny_folder, tmp_path_factory, quick_compile):
  """A run that was traced at some steps, and profiled for one step a stage; then it went on for a step."""
  workdir = pathlib.Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp('watched') / 'run'))
  loop.run(tiny_config({**SETTINGS, 'stages': 'sft,rl', 'rl.steps': '2'}), workdir, trace='0,3-4', profile=1)
  first = timelines.read(workdir)
  loop.run(tiny_config({**SETTINGS, 'stages': 'sft,rl,eval:final'}), workdir, report.write_report, trace='all')
  return workdir, first


def lines_of(workdir, stage):
  return [line for line in writers.read_metrics(workdir) if line['stage'] == stage]


def test_every_rollout_says_what_its_time_went_into(done):
  workdir, _ = done
  for line in [*lines_of(workdir, 'rl'), *lines_of(workdir, 'eval')]:
    parts = [line[f'engine_seconds/{part}'] for part in PARTS]
    assert min(parts) >= 0
    # The rate is of the wall time that the parts add up to, which is part of the phase that collects and scores.
    assert sum(parts) * line['tokens_per_second/decode'] == pytest.approx(line['decoded_tokens'])
    assert sum(parts) <= line['seconds/rollout'] + 1e-9 <= line['seconds'] + 1e-9
    assert 0 < line['engine/occupancy'] <= 1 and line['engine/tool_seconds'] > 0
  assert all('engine/occupancy' not in line for line in lines_of(workdir, 'sft'))


def test_the_timeline_is_that_of_the_last_rl_step(done):
  workdir, first = done
  second = timelines.read(workdir)
  assert (first['step'], second['step']) == (4, lines_of(workdir, 'rl')[-1]['step'])
  assert second['stage'] == 'rl' and [name for name, _ in second['rows']] == ['device', *(f'seat {i}' for i in range(32))]
  kinds = {kind for _, runs in second['rows'] for kind, _, _ in runs}
  assert {'decode', 'draw'} <= kinds <= {'decode', 'prefill', 'idle', 'linger', 'draw', 'ready', 'wait'}
  assert (workdir / timelines.FILE_NAME).stat().st_size < 100_000


def test_chosen_steps_are_traced(done):
  workdir, _ = done
  paths = sorted((workdir / 'trace').iterdir())
  # Steps 0 to 2 imitate; 3 and 4 were asked for by number, what follows by 'all'.
  assert [p.name for p in paths] == [f'step-00000{i}.json.gz' for i in range(3, 3 + len(paths))] and len(paths) >= 3
  for path in paths:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    spans = [e for e in trace['traceEvents'] if e['ph'] == 'X']
    assert {e['name'] for e in spans} >= {'decode', 'draw'} and all(e['dur'] >= 0 and e['ts'] >= 0 for e in spans)
    names = [e['args']['name'] for e in trace['traceEvents'] if e['name'] == 'thread_name']
    assert names == ['device', *(f'seat {i}' for i in range(32))]


def test_a_step_of_each_stage_is_profiled(done):
  workdir, _ = done
  assert [p.name for p in sorted((workdir / 'profile').iterdir())] == ['rl-step-000004', 'sft-step-000001']
  for stage, step in (('rl', 4), ('sft', 1)):
    [data] = (workdir / 'profile' / f'{stage}-step-{step:06d}').rglob('*.xplane.pb')
    names = {e.name for plane in jax.profiler.ProfileData.from_file(str(data)).planes
             for line in plane.lines for e in line.events}
    assert stage in names  # the step itself is marked


def test_the_report_shows_it(done):
  page = (done[0] / 'report.html').read_text()
  section = page[page.index('<h2>Engine</h2>'):]
  assert 'idle, all wait for tools' in section and 'seats over time: the rollout of step' in section


def profiled(folder):
  return sorted(p.name for p in (folder / 'profile').iterdir()) if (folder / 'profile').exists() else []


def test_a_stop_in_a_profiled_step_writes_what_there_is(tiny_config, tiny_workdir, quick_compile, monkeypatch):
  step = sft.SupervisedStage.step

  def stopped(self, state, host):
    if host.stage_step == 1:
      signal.raise_signal(signal.SIGTERM)
    return step(self, state, host)

  monkeypatch.setattr(sft.SupervisedStage, 'step', stopped)
  with pytest.raises(loop.Interrupted):
    loop.run(tiny_config({'stages': 'sft', 'sft.steps': '5'}), tiny_workdir, profile=3)
  assert profiled(tiny_workdir) == ['sft-step-000001']
  monkeypatch.undo()
  loop.run(tiny_config({'stages': 'sft', 'sft.steps': '5'}), tiny_workdir, profile=3)
  # Three steps were left; of these the first finds empty caches.
  assert profiled(tiny_workdir) == ['sft-step-000001', 'sft-step-000003']
  assert len(list((tiny_workdir / 'profile').rglob('*.xplane.pb'))) == 2


def run_steps(profiler, done, total, stage='rl'):
  profiler.stage(total, done)
  for step in range(done, total):
    with profiler.step(stage, step):
      jnp.arange(3).sum().block_until_ready()


def test_the_first_step_of_a_start_is_left_out_unless_it_is_the_last(tmp_path):
  for steps, done, total, expected in [(0, 0, 9, []), (2, 0, 9, ['rl-step-000001']), (9, 3, 5, ['rl-step-000004']),
                                       (2, 4, 5, ['rl-step-000004']), (2, 0, 1, [])]:
    folder = tmp_path / f'{steps}-{done}-{total}'
    with watch.Profiler(folder, steps) as profiler:
      run_steps(profiler, done, total)
      assert profiled(folder) == expected  # it ends with its steps


def test_an_error_in_a_profiled_step_leaves_a_whole_profile_and_the_next_start_another(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with watch.Profiler(tmp_path, 2) as profiler:
      profiler.stage(9, 0)
      for step in range(2):
        with profiler.step('rl', step):
          if step:
            raise KeyboardInterrupt
  assert profiled(tmp_path) == ['rl-step-000001']
  [before] = (tmp_path / 'profile').rglob('*.xplane.pb')
  (tmp_path / 'profile' / 'rl-step-000001.unfinished').mkdir()  # as a kill in mid-write leaves it
  with watch.Profiler(tmp_path, 1) as profiler:
    run_steps(profiler, 0, 3)
  [after] = (tmp_path / 'profile').rglob('*.xplane.pb')
  assert profiled(tmp_path) == ['rl-step-000001'] and before.parent.parent == after.parent.parent


@pytest.mark.parametrize('text', ['some', '3-', '-3', '1,,2', '5-3', '1.5', 'all,3'])
def test_what_names_no_steps_is_refused(text):
  with pytest.raises(ValueError, match=r"--trace='.*: '.*' names no steps of the run; give 'all', or steps such as"):
    watch.parse_steps(text)


def test_of_several_processes_each_writes_files_of_its_own(tmp_path, monkeypatch):
  for process in (0, 1):
    timeline = Timeline(2 + process)
    timeline.add('device', 'decode', time.perf_counter(), time.perf_counter() + 1)
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    watch.Timelines(tmp_path, '7').write(7, 'rl', timeline, keep=True)
  assert [len(timelines.read(tmp_path, process)['rows']) for process in (0, 1)] == [3, 4]
  files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file()}
  assert files == {'timeline.json', 'timeline-1.json', 'trace/step-000007.json.gz', 'trace/step-000007-1.json.gz'}


def test_a_file_that_is_no_timeline_is_refused(tmp_path):
  assert timelines.read(tmp_path) == {}
  for text in ('{"step": 1', '[]', '{"step": 1, "stage": "rl", "seconds": 1, "bins": 2, "rows": [["device", [["x", 1]]]]}'):
    (tmp_path / timelines.FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match='timeline.json holds no timeline'):
      timelines.read(tmp_path)
