"""Tests of how the benchmarks plan, pool and compare. Expected figures are computed by hand."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

_PATH = pathlib.Path(__file__).parents[2] / 'experiments' / 'benchmarks' / 'run.py'


@pytest.fixture(scope='module')
def run():
  spec = importlib.util.spec_from_file_location('benchmarks_run', _PATH)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their module up
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


def _record(library, phase, threads, samples, memory=1e9, **more):
  return {'library': library, 'phase': phase, 'threads': threads, 'samples': samples,
          'seconds': sorted(samples)[len(samples) // 2], 'tokens': 100, 'peak_rss_bytes': memory,
          **more}


def test_plan_puts_a_phase_together_and_turns_every_second_round(run):
  comparisons = (run.Comparison('update', 2, 'trl', 'update', 1.2),
                 run.Comparison('decode', 1, 'tunix', 'decode'),
                 run.Comparison('update', 2, 'trl', 'update_by_hand'))
  update = [('agentrl', 'update', 2), ('trl', 'update', 2), ('trl', 'update_by_hand', 2)]
  decode = [('agentrl', 'decode', 1), ('tunix', 'decode', 1)]
  assert run.plan(comparisons, 1) == update + decode
  assert run.plan(comparisons, 2) == update + update[::-1] + decode + decode[::-1]


def test_ratios_come_from_the_medians_of_all_rounds(run):
  pooled = run.pool([
      _record('agentrl', 'decode', 1, [1.0, 2.0, 9.0]), _record('tunix', 'decode', 1, [5.0], 3e9),
      _record('agentrl', 'decode', 1, [2.0, 2.0], 2e9), {'error': 'x'}])
  speed, memory = run.compare(pooled)
  assert speed.figure == 5.0 / 2.0 and speed.met  # median of 1, 2, 2, 2, 9
  assert memory.figure == 3.0 / 2.0 and memory.met  # the larger of our two processes
  assert pooled['agentrl', 'decode', 1]['tokens_per_second'] == 50.0


def test_a_missed_aim_is_said(run):
  pooled = run.pool([_record('agentrl', 'decode', 1, [4.0], 5e9),
                     _record('tunix', 'decode', 1, [5.0], 3e9)])
  assert [line.met for line in run.compare(pooled)] == [False, False]  # 1.25 < 1.5, 0.6 < 1


def test_our_own_aims(run):
  pooled = run.pool([
      _record('agentrl', 'three_turns', 1, [3.0], turn_seconds=[0.9, 1.0, 1.2]),
      _record('agentrl', 'three_turns_tool', 2, [2.125, 2.5, 2.5], added=[0.125, 0.5, 0.125]),
      _record('agentrl', 'three_turns_tool', 2, [2.5], added=[0.0])])
  turns, tool = run.compare(pooled)
  assert turns.figure == pytest.approx(0.75) and not turns.met
  assert tool.figure == 0.125 and tool.met


def test_a_missing_measurement_leaves_its_lines_out(run):
  assert run.compare(run.pool([_record('agentrl', 'decode', 1, [4.0])])) == []


def test_unknown_phases_and_rivals_are_refused(run):
  for only, rivals in (('decoed', ''), ('', 'tunx')):
    with pytest.raises(SystemExit, match='phases are decode'):
      run.choose(only, rivals)
  assert {c.rival for c in run.choose('three_turns', 'trl')} == {'trl'}


def test_a_measurement_that_fails_is_an_error_and_no_figure(run, monkeypatch, tmp_path):
  script = tmp_path / 'broken.py'
  script.write_text('raise SystemExit("no such thing")')
  monkeypatch.setitem(run._SCRIPTS, 'tunix', (sys.executable, script))
  assert 'no such thing' in run.measure('tunix', 'decode', 1, 1)['error']
  monkeypatch.setitem(run._SCRIPTS, 'tunix', (tmp_path / 'missing-python', script))
  assert 'error' in run.measure('tunix', 'decode', 1, 1)
