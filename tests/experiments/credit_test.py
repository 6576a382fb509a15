"""Tests of how credit is ranked: by hand, by identities, and on real rollouts whose advantage is the truth itself."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from agentrl import tools
from agentrl.algorithms import make
from agentrl.algorithms.examples import example_batch
from agentrl.core.types import Iteration
from agentrl.experience.base import REPLAYED
from agentrl.rewards import base as rewards
from agentrl.training.packing import Outcome, pack, sequences_of

_ROOT = pathlib.Path(__file__).parents[2]


def _load(path, name):
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module', name='credit')
def credit_module():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'path', [*sys.path])
    yield _load(_ROOT / 'experiments' / 'methods' / 'credit.py', 'methods_credit')


def test_ranks_are_compared_and_not_sizes(credit):
  a = np.array([1.0, 2.0, 3.0, 4.0])
  assert credit.spearman(a, np.exp(a)) == pytest.approx(1) and credit.spearman(a, -a) == pytest.approx(-1)
  assert credit.spearman(a, np.ones(4)) == credit.spearman(np.zeros(4), a) == 0.0
  # By hand: ranks 1 2 3 4 against 2 1 4 3, 1 - 6 * 4 / (4 * 15).
  assert credit.spearman(a, np.array([5.0, 3.0, 9.0, 8.0])) == pytest.approx(0.6)


def test_what_is_the_same_on_all_turns_of_a_trajectory_ranks_nothing_within_it(credit):
  rng = np.random.default_rng(0)
  worth = {i: rng.normal(size=int(rng.integers(1, 5))) for i in range(50)}
  every = [(i, k) for i, turns in worth.items() for k in range(len(turns))]
  truth = credit.correlations([(i, worth[i][k], worth[i][k]) for i, k in every])
  assert truth == {'turns': len(every), 'all': pytest.approx(1), 'within': pytest.approx(1)}
  total = credit.correlations([(i, 0.1 * worth[i].sum(), worth[i][k]) for i, k in every])
  assert 0 < total['all'] < 1 and total['within'] == 0.0


def test_the_advantage_of_a_turn_is_the_mean_over_its_tokens_and_the_sum_over_channels(credit):
  batch, _ = example_batch(2, reads=('s',))
  of = lambda name: {'advantage': {'name': name, 'turn_part': 's'}}
  both = make('compose', channels={'a': {**of('gae'), 'weight': 2.0}, 'b': {**of('step_z'), 'weight': {
      'schedule': 'linear', 'start': 0.0, 'end': 1.0, 'steps': 4}}})
  plane = credit.total_advantages(both, batch._replace(step=np.int32(1)))
  single = [np.asarray(make('compose', channels={'a': of(n)}).estimate(batch).advantages)[0] for n in ('gae', 'step_z')]
  np.testing.assert_allclose(plane, 2 * single[0] + 0.25 * single[1], rtol=1e-5, atol=1e-6)
  found = credit.turn_advantages(plane, batch)
  mask = batch.loss_mask
  assert set(found) == {(int(i), int(k)) for i, k in zip(batch.trajectory_ids[mask], batch.turn_ids[mask])}
  for (i, k), value in found.items():
    own = batch.loss_mask & (batch.trajectory_ids == i) & (batch.turn_ids == k)
    assert value == pytest.approx(plane[own].mean(), rel=1e-5)


def test_credit_that_is_the_truth_is_found_to_be_it(credit):
  agents = _load(_ROOT / 'tests' / 'agents' / 'conftest.py', 'agents_stage')
  with tools.Executor([tools.make('lookup'), tools.make('noise')]) as executor:
    stage = agents.Stage(executor)
    stage.script()
    got = stage.run(stage.agent('react'), [stage.task(i) for i in range(6)], 3)
  rewards.make('chains', shapings=[{'name': 'true_values', 'max_turns': 6}]).score(got, Iteration(0, 1))
  got[4].rewards[REPLAYED] = 1.0
  n = len(got)
  outcome = Outcome(np.arange(n, dtype=np.int32) // 3, np.float32([t.rewards['total'] for t in got]),
                    np.ones(n, np.float32), np.ones(n, bool))
  batch, _ = pack(sequences_of(got, ['true_value']), outcome, rows=n, row_length=agents.CONTEXT,
                  token_part_names=['true_value'])
  truth = make('compose', channels={'p': {'advantage': {
      'name': 'disc_segment_return', 'gamma': 0.0, 'part': '', 'turn_part': 'true_value'}}})
  pairs = credit.compare(truth, batch, got, 6)
  assert len(pairs) == sum(len(t.turns) for k, t in enumerate(got) if k != 4)
  np.testing.assert_allclose([a for _, a, _ in pairs], [w for _, _, w in pairs], atol=1e-6)
  assert credit.correlations(pairs)['all'] == pytest.approx(1, abs=1e-3)


def test_only_what_learns_by_reinforcement_in_the_plain_world_is_measured(credit):
  run = credit._run_module()
  names = {m for m in run.known_methods() if credit.measured(m, run)}
  assert {'grpo', 'vl_dac', 'istar', 'ipa', 'spear'} <= names
  assert not {'dpo', 'digi_q', 'memento', 'tf_grpo', 'mua_rl'} & names


def test_the_table_has_a_row_a_method_the_best_first(credit):
  results = {f'{m}_seed{s}': {'method': m, 'seed': s, 'turns': 10, 'all': a + 0.1 * s, 'within': 0.0}
             for m, a in (('low', 0.1), ('high', 0.5)) for s in (0, 1)}
  lines = credit.as_markdown(results, {'low': 'Low', 'high': 'High'}).splitlines()[2:]
  assert [line.split(' | ')[0] for line in lines] == ['| High', '| Low']
  assert lines[0] == '| High | 0.550 ± 0.071 | 0.000 ± 0.000 | 20 | 2 |'
