"""metrics.jsonl survives kills, restarts and NaN."""

from __future__ import annotations

import builtins
import json
import logging as std_logging

import numpy as np
import pytest

from agentrl.metrics import writers


def _write(folder, steps, start_step=0):
  with writers.MetricsWriter(folder, start_step, tensorboard=False) as writer:
    for step in steps:
      writer.write(step, 'rl', {'success': step / 8, 'seconds': 1.0})


def _without_time(folder):
  return [{k: v for k, v in line.items() if k != 'time'} for line in writers.read_metrics(folder)]


def test_a_line_has_step_stage_time_seconds_and_values(tmp_path):
  with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(3, 'sft', {'loss': np.float32(0.5), 'status/length': np.int64(7)})
    # Read while the writer is open: the line was flushed.
    line, = writers.read_metrics(tmp_path)
  assert (line['step'], line['stage'], line['loss'], line['status/length']) == (3, 'sft', 0.5, 7)
  assert line['time'] > 1.7e9 and 0 <= line['seconds'] < 60


@pytest.mark.parametrize('killed_after, resumed_at', [(5, 5), (5, 3), (5, 0), (1, 0)])
def test_the_file_of_a_resumed_run_equals_that_of_an_uninterrupted_one(
    tmp_path, killed_after, resumed_at):
  _write(tmp_path / 'whole', range(8))
  _write(tmp_path / 'killed', range(killed_after))
  _write(tmp_path / 'killed', range(resumed_at, 8), start_step=resumed_at)
  assert _without_time(tmp_path / 'killed') == _without_time(tmp_path / 'whole')


@pytest.mark.parametrize('torn', ['{"step": 4, "sta', '{', '{"step": 4, "stage": "rl"}'])
def test_a_line_torn_by_a_kill_is_repaired(tmp_path, torn):
  _write(tmp_path, range(4))
  with open(tmp_path / writers.FILE_NAME, 'a') as f:
    f.write(torn)  # No newline: the write did not end.
  assert [line['step'] for line in writers.read_metrics(tmp_path)] == [0, 1, 2, 3]
  _write(tmp_path, [4], start_step=4)
  assert [line['step'] for line in writers.read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_another_kind_of_file_is_refused_and_left_alone(tmp_path):
  path = tmp_path / writers.FILE_NAME
  path.write_text('not ours\n{"step": 1}\n')
  with pytest.raises(ValueError, match='metrics.jsonl:1 is not JSON'):
    writers.MetricsWriter(tmp_path, tensorboard=False)
  assert path.read_text() == 'not ours\n{"step": 1}\n'


def test_values_that_are_not_finite_become_null_with_a_warning(tmp_path, caplog):
  with caplog.at_level(std_logging.WARNING):
    with writers.MetricsWriter(
        tmp_path) as writer:  # With TensorBoard, which must not get them either.
      for step in range(2):
        writer.write(step, 'rl', {'loss': float('nan'), 'ratio_max': np.inf, 'reward': 1.0})
  for line in (tmp_path / writers.FILE_NAME).read_text().splitlines():
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    assert parsed['loss'] is None and parsed['ratio_max'] is None and parsed['reward'] == 1.0
  assert sum("metric 'loss'" in r.getMessage()
             for r in caplog.records) == 1  # Once a name, not once a step.


def test_a_reserved_name_is_refused(tmp_path):
  with writers.MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match='stage'):
      writer.write(0, 'rl', {'stage': 1.0})


def test_tensorboard_gets_the_scalars(tmp_path):
  with writers.MetricsWriter(tmp_path) as writer:
    writer.write(0, 'rl', {'success': 0.25})
  events, = (tmp_path / 'tensorboard').glob('events.*')
  assert b'rl/success' in events.read_bytes()


def test_works_where_tensorboard_is_missing(tmp_path, monkeypatch):
  real_import = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name == 'tensorboardX':
      raise ImportError(name)
    return real_import(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', refuse)
  with writers.MetricsWriter(tmp_path) as writer:
    writer.write(0, 'rl', {'success': 0.25})
  assert not (tmp_path / 'tensorboard').exists()
  assert len(writers.read_metrics(tmp_path)) == 1
