"""Tests of how the methods' runs are planned and judged. Expected figures are computed by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import sys

import pytest

_FOLDER = pathlib.Path(__file__).parents[2] / 'experiments' / 'methods'


def _load(name, monkeypatch):
  spec = importlib.util.spec_from_file_location(f'methods_{name}', _FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def run(monkeypatch):
  monkeypatch.setattr(sys, 'path', [*sys.path])
  return _load('run', monkeypatch)


@pytest.fixture
def table(monkeypatch):
  return _load('table', monkeypatch)


def test_every_claim_has_a_baseline_that_exists_and_a_metric_of_the_table(run, table):
  for method in run.known_methods():
    claim = run.description(method)['claim']
    if claim is not None:
      assert claim['than'] in (*run.known_methods(), run.COLD_START), method
      assert claim['metric'] in table.METRICS and claim['better'] in ('higher', 'lower'), method


def test_a_plan_holds_methods_and_what_they_are_compared_with_once(run, monkeypatch):
  claims = {'a': dict(than='base'), 'b': dict(than='base'), 'base': None, 'c': dict(than='cold_start')}
  worlds = {'b': 'windy'}
  monkeypatch.setattr(run, 'description', lambda m: {'claim': claims[m]})
  monkeypatch.setattr(run, 'config_of', lambda m: worlds.get(m, 'calm'))
  monkeypatch.setattr(run, 'world_of', lambda config: config)
  runs = run.plan(['a', 'b', 'c'], [0, 1])
  names = ['cold_start', 'a', 'b', 'c', 'base', 'base@b']
  assert [r.name for r in runs] == [f'{n}_seed{s}' for s in (0, 1) for n in names]


def test_a_run_starts_from_the_cold_start_and_leaves_its_stages_out(run, tmp_path):
  config = run.run_config(run.Run('grpo', 'grpo', 7), tmp_path, 64)
  assert config.stages == ('rl', 'eval:final') and config.seed == 7
  assert config.checkpoint.init_from == str(tmp_path) and config.data.options.size == 64
  assert run.run_config(run.Run('cold_start', 'cold_start', 0), tmp_path, 64).stages == ('eval:final',)


def test_a_baseline_in_another_world_takes_its_tools_and_nothing_else(run, tmp_path, monkeypatch):
  windy = run.config_of('grpo')
  windy.tools.options.lookup.fail_rate = 0.4
  windy.rl.learning_rate = 1.0
  original = run.config_of
  monkeypatch.setattr(run, 'config_of', lambda m: windy if m == 'windy' else original(m))
  config = run.run_config(run.Run('grpo', 'windy', 0), tmp_path, 64)
  assert config.tools.options.lookup.fail_rate == 0.4
  assert config.rl.learning_rate == original('grpo').rl.learning_rate
  assert run.world_of(config) != run.world_of(run.run_config(run.Run('grpo', 'grpo', 0), tmp_path, 64))


def test_a_method_with_demonstrations_of_its_own_is_shown_some(run, tmp_path):
  config = run.run_config(run.Run('memento', 'memento', 0), tmp_path, 64)
  assert config.stages == ('sft', 'rl', 'eval:final') and config.sft.demonstrator == 'with_hints'
  assert 0 < config.sft.steps < run.config_of('cold_start').sft.steps
  compared = run.run_config(run.Run('cold_start', 'memento', 0), tmp_path, 64)
  assert compared.stages == ('sft', 'eval:final')
  assert run.world_of(compared) == run.world_of(config)
  assert run.Run('cold_start', 'memento', 0) in run.plan(['memento'], [0])


def test_a_result_counts_only_for_the_config_that_made_it(run, tmp_path):
  one = run.Run('grpo', 'grpo', 0)
  assert not run.is_done(tmp_path, one, 'x')
  (tmp_path / f'{one.name}.json').write_text(json.dumps({'fingerprint': 'x'}))
  assert run.is_done(tmp_path, one, 'x') and not run.is_done(tmp_path, one, 'y')
  (tmp_path / 'config.json').write_text('{}')
  keys = run.known_keys(tmp_path)
  mark = lambda seed, keys=keys: run.fingerprint(
      run.run_config(run.Run('grpo', 'grpo', seed), tmp_path, 64), tmp_path, keys)
  assert mark(0) == mark(0) != mark(1)
  # A key that came later counts only away from its default; one at its default changed nothing.
  before = keys - {'rl.max_generation_batches'}
  assert mark(0, before) != mark(0)
  assert run.known_keys(tmp_path) == keys


def test_a_new_key_at_its_default_leaves_results_in_force(run, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  config = run.run_config(run.Run('grpo', 'grpo', 0), tmp_path, 64)
  keys = run.known_keys(tmp_path) - {'rl.max_generation_batches'}
  mark = run.fingerprint(config, tmp_path, keys)
  less = _before_the_key(run, config)
  assert run.fingerprint(less, tmp_path, keys) == mark
  config.rl.max_generation_batches += 1
  assert run.fingerprint(config, tmp_path, keys) != mark


def _before_the_key(run, config):
  """The config as it was before a key came."""
  settings = config.to_dict()
  del settings['rl']['max_generation_batches']
  return run.ConfigDict(settings)


def test_one_process_at_a_time_does_a_run(run, tmp_path):
  one = run.Run('grpo', 'grpo', 0)
  with run.claimed(tmp_path, one) as ours:
    with run.claimed(tmp_path, one) as again:
      assert ours and not again
  with run.claimed(tmp_path, one) as later:
    assert later


def test_a_cold_start_of_another_config_is_made_again(run, tmp_path):
  config = run.cold_start_config()
  assert config.stages == ('sft', 'eval:cold_start')
  keys = run.known_keys(tmp_path)
  # What is not taken from the toy config is what reinforcement alone reads.
  toy = run.config_of('cold_start')
  assert {key for key in toy if config[key] != toy[key]} == {'stages', 'rl'}
  assert not run.is_cold_start(tmp_path, config, keys)
  (tmp_path / 'config.json').write_text(run.config_lib.to_json(config) + '\n')
  (tmp_path / 'summary.json').write_text(json.dumps({'sft': {}}))
  assert not run.is_cold_start(tmp_path, config, keys)
  (tmp_path / 'summary.json').write_text(json.dumps({'cold_start': {}}))
  assert run.is_cold_start(tmp_path, config, keys)
  config.sft.share_right = 0.1
  assert not run.is_cold_start(tmp_path, config, keys)


def test_a_cold_start_outlives_keys_that_came_later(run, tmp_path):
  config = run.cold_start_config()
  older = json.loads(run.config_lib.to_json(config))
  del older['model']['logit_chunk']
  keys = frozenset(run._flat(older))
  (tmp_path / 'config.json').write_text(json.dumps(older))
  (tmp_path / 'summary.json').write_text(json.dumps({'cold_start': {}}))
  assert run.is_cold_start(tmp_path, config, keys)
  config.model.logit_chunk = 64
  assert not run.is_cold_start(tmp_path, config, keys)


def _result(method, seed, success, calls=1.0, world=None, world_hash='w'):
  return {'method': method, 'world': world or method, 'world_hash': world_hash, 'seed': seed, 'final': {
      'success': success, 'calls_per_task': calls, 'avoidable_calls': 0.0, 'failed_call_rate': 0.0,
      'response_tokens': 9.0, 'entropy': 0.1, 'seconds': 20.0}}


def _results(*results):
  found = {}
  for r in results:
    found.setdefault((r['method'], r['world']), {})[r['seed']] = r
  return found


CLAIM = {'title': 'M', 'claim': dict(metric='calls_per_task', better='lower', than='base')}


def test_gains_are_paired_by_seed_and_signed_as_claimed(table):
  # Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303.
  results = _results(*(_result('m', s, 0.8, 4.0 - s) for s in range(3)),
                     *(_result('base', s, 0.8, 5.0) for s in range(4)))
  found = table.compare('m', CLAIM, results)
  assert found.gain == pytest.approx(2.0)
  assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-3)
  assert found.verdict == table.DIRECTION


@pytest.mark.parametrize('ours, success, verdict', [
    ([1.0, 1.01, 1.02], 0.8, 'reproduced'), ([1.0, 1.01, 1.02], 0.7, 'at the cost of success'),
    ([2.0, 2.0, 2.0], 0.8, 'not reproduced'), ([3.0, 3.0, 3.0], 0.9, 'not reproduced')])
def test_verdicts(table, ours, success, verdict):
  results = _results(*(_result('m', s, success, calls) for s, calls in enumerate(ours)),
                     *(_result('base', s, 0.8, 2.0) for s in range(3)))
  assert table.compare('m', CLAIM, results).verdict == verdict


def test_a_baseline_of_another_world_is_not_taken(table):
  own = [_result('m', 0, 0.8, 1.0, world_hash='windy')]
  calm = [_result('base', 0, 0.8, 2.0)]
  windy = [_result('base', 0, 0.8, 3.0, world='m', world_hash='windy')]
  assert table.compare('m', CLAIM, _results(*own, *calm)) is None
  assert table.compare('m', CLAIM, _results(*own, *calm, *windy)).theirs == (3.0,)


def test_a_method_without_a_claim_has_no_verdict(table):
  found = table.compare('m', {'title': 'M', 'claim': None}, _results(_result('m', 0, 0.8)))
  assert (found.verdict, found.success[0]) == ('', 0.8)
  assert table.compare('m', {'title': 'M', 'claim': None}, {}) is None


def test_the_files_are_written(table, tmp_path, monkeypatch):
  pytest.importorskip('matplotlib')
  results = tmp_path / 'results'
  results.mkdir()
  for r in [_result('grpo', s, 0.7 + 0.01 * s) for s in range(3)] + [
      _result('ppo', s, 0.7) for s in range(3)]:
    (results / f"{r['method']}_{r['seed']}.json").write_text(json.dumps(r))
  monkeypatch.setattr(sys, 'path', [*sys.path])
  assert table.main(['--results', str(results), '--out', str(tmp_path)]) == 0
  text = (tmp_path / 'results.md').read_text()
  assert '| GRPO | seconds of training than ppo | 20 | 20 | 0 | 0 | 0.710, 0.700 | not reproduced |' in text
  assert '| ppo | 3 | 0.7 ± 0 |' in text
  assert (tmp_path / 'results.png').stat().st_size > 10_000
  assert table.main(['--results', str(tmp_path / 'none'), '--out', str(tmp_path)]) == 1
