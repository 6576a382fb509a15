"""Imitation of a run's own right trajectories: which they are, and that it makes them likelier."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.metrics import writers
from agentrl.rollout import store
from agentrl.training import build, loop, own_traces


@pytest.fixture(name='config')
def _config(tiny_config):
  # A right trajectory is one that ends with an answer: a policy that knows nothing has such ones.
  return tiny_config({'stages': 'rl:first,eval:middle,own_traces,rl:second', 'rl.steps': '2', 'own_traces.part': 'format',
                      'own_traces.steps': '2', 'own_traces.updates_per_step': '4', 'own_traces.batch_rows': '8',
                      'rollout.turn_tokens': '24', 'report': 'false', 'rl.recompute_behaviour': 'false'})


def test_a_run_imitates_itself_between_two_stages(config, tiny_workdir, quick_compile):
  loop.run(config, tiny_workdir)
  lines = writers.read_metrics(tiny_workdir)
  assert [line['stage'] for line in lines] == ['rl', 'rl', 'eval', 'own_traces', 'own_traces', 'rl', 'rl']
  right = set()
  for path in store.list_paths(tiny_workdir / 'trajectories'):
    stored = store.read(path)
    if store.step_of(path) < 2:
      right |= {t.segments[0].tokens.tobytes() for t in stored.trajectories if t.rewards['format'] == 1}
  assert right, 'this seed should finish some'
  first, second = lines[3:5]
  assert first['traces'] == second['traces'] == len(right)
  # They become likelier: the loss is their mean negative log-likelihood, nats a token.
  assert second['loss'] < first['loss']


def test_without_a_right_trajectory_nothing_changes(config, tiny_workdir, quick_compile):
  config.own_traces.part = 'success'
  loop.run(config, tiny_workdir)
  lines = writers.read_metrics(tiny_workdir)
  assert not any(line['success'] for line in lines[:2]), 'this seed should know nothing'
  assert [line['traces'] for line in lines[3:5]] == [0, 0]


def test_the_latest_traces_are_taken_and_no_more_than_asked_for(config, tiny_workdir, quick_compile):
  config.stages = ('rl', 'own_traces')
  config.own_traces.most, config.own_traces.part = 3, 'turns'
  loop.run(config, tiny_workdir)
  assert [line['traces'] for line in writers.read_metrics(tiny_workdir) if line['stage'] == 'own_traces'] == [3, 3]
  assert np.isfinite(writers.read_metrics(tiny_workdir)[-1]['loss'])


def test_a_part_that_there_is_none_of_is_refused(config, tiny_folder):
  config.own_traces.part = 'acuracy'
  parts = build.build(config, tiny_folder)
  with pytest.raises(ValueError, match="own_traces.part='acuracy' is no part of the reward; parts: .*accuracy"):
    own_traces.OwnTracesStage(parts, 'own_traces')
  parts.close()
