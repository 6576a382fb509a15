"""Tests of the preference stage on real rollouts, with real tools and real updates.

Expected values are the trajectories on disk, and those of a run that nobody disturbed.
"""

from __future__ import annotations

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from agentrl.checkpointing.checkpoints import Checkpointer
from agentrl.rollout import store
from agentrl.training import build
from agentrl.training.preference import PreferenceStage
from agentrl.training.state import HostState, LearnerState

# A policy that knows nothing calls something at times: the part 'calls' differs within groups.
BASE = {
    'preference.steps': '3', 'preference.prompts': '4', 'preference.group_size': '4', 'preference.pairs': '4',
    'preference.max_updates': '2', 'preference.warmup': '0', 'preference.trajectories_every': '1',
    'preference.miners': {'pairs': {'name': 'ranked_pairs', 'weights': {'calls': 1.0}}},
}
HEADS = {
    **BASE, 'model.tied_embeddings': 'false', 'preference.heads': {'calls': 0.5, 'tokens': 0.5},
    'preference.miners': {'calls': {'name': 'ranked_pairs', 'weights': {'calls': 1.0}},
                          'tokens': {'name': 'ranked_pairs', 'weights': {'tokens': -1.0}}},
}


def _config(tiny_config, overrides):
  """Returns the tiny config with overrides, of which dicts replace whole sections of `preference`."""
  config = tiny_config({k: v for k, v in overrides.items() if isinstance(v, str)})
  with config.unlocked():
    for key, section in overrides.items():
      if not isinstance(section, str):
        config.preference[key.removeprefix('preference.')] = ConfigDict(section)
  return config


@pytest.fixture
def begun(tiny_config, tiny_workdir, quick_compile):
  """Returns a function from overrides to a stage that has begun: parts, stage, state, host."""
  opened = []

  def begin(overrides):
    parts = build.build(_config(tiny_config, overrides), tiny_workdir)
    opened.append(parts)
    stage, host = PreferenceStage(parts, 'preference'), HostState()
    state = stage.begin(LearnerState(parts.init_params(), {}, np.int32(0)), host)
    stage.warm_up(state)
    return parts, stage, state, host

  yield begin
  for parts in opened:
    parts.close()


def _steps(stage, state, host, count):
  metrics = []
  for _ in range(count):
    state, found = stage.step(state, host)
    host.step += 1
    host.stage_step += 1
    metrics.append(found)
  return state, metrics


def _numbers(metrics):
  # What the engine did depends on time as well: where a chunk ends, and who was there.
  return [{k: v for k, v in m.items() if 'second' not in k and not k.startswith('engine/')} for m in metrics]


@pytest.mark.parametrize('overrides', [BASE, HEADS], ids=['plain', 'heads'])
def test_a_stage_that_is_resumed_midway_is_the_one_that_was_not(begun, overrides, tmp_path):
  parts, stage, state, host = begun(overrides)
  state, first = _steps(stage, state, host, 1)
  with Checkpointer(tmp_path / 'saved') as checkpointer:
    checkpointer.save(1, state, host.to_json(), wait=True)
    state, rest = _steps(stage, state, host, 2)
    again = PreferenceStage(parts, 'preference')
    template = again.begin(LearnerState(parts.init_params(), {}, np.int32(0)), HostState())
    restored = checkpointer.restore(template)
  other, resumed_host = restored.arrays, HostState(**restored.host)
  again.warm_up(other)
  other, redone = _steps(again, other, resumed_host, 2)
  assert _numbers(redone) == _numbers(rest) and resumed_host.to_json() == host.to_json()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), jax.device_get(state))
  # Something was learned from at all, with the reference kept as it was.
  assert sum(m['pairs'] for m in first + rest) >= 3 and host.rejected_in_a_row == 0
  start = jax.device_get(parts.init_params())
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.reference), start)
  assert not np.array_equal(state.params['final_norm'], start['final_norm'])
  # At the reference both are log 2; the heads differ from it by noise.
  assert first[0]['loss'] == pytest.approx(np.log(2), abs=2e-2)


def test_the_batches_hold_the_pairs_of_the_trajectories_on_disk(begun):
  parts, stage, state, host = begun({**BASE, 'preference.reference': 'round'})
  batches, update = [], stage._update
  stage._update = lambda state, batch, found, used: batches.append((batch, found)) or update(state, batch, found, used)
  state, (metrics,) = _steps(stage, state, host, 1)
  assert state.reference is None
  (path,) = store.list_paths(parts.workdir / 'trajectories')
  by_tokens = {t.segments[0].tokens.tobytes(): t for t in store.read(path).trajectories}

  def found_at(batch, i):
    own = batch.trajectory_ids == i
    start = batch.positions[own][0]
    if not start:
      return by_tokens[batch.tokens[own].tobytes()], 0
    # The other of its pair stands before it in the row, whole.
    other = batch.trajectory_ids == i ^ 1
    assert batch.positions[other][0] == 0 and np.flatnonzero(other)[-1] < np.flatnonzero(own)[0]
    return by_tokens[np.concatenate([batch.tokens[other][:start], batch.tokens[own]]).tobytes()], start

  seen = begun_alike = 0
  for batch, found in batches:
    for p in np.flatnonzero(found.weights):
      (chosen, start), (rejected, other) = (found_at(batch, i) for i in (2 * p, 2 * p + 1))
      begun_alike += (start > 0) != (other > 0)
      assert chosen.group_id == rejected.group_id and chosen.rewards['calls'] > rejected.rewards['calls']
      segment, where = chosen.segments[0], batch.trajectory_ids == 2 * p
      np.testing.assert_array_equal(batch.loss_mask[where], segment.sampled[start:])
      # The reference of the round is what it was sampled from.
      np.testing.assert_array_equal(batch.reference_log_probs[where],
                                    np.where(segment.sampled, segment.log_probs, 0)[start:])
      seen += 1
  assert seen == metrics['pairs'] - metrics['pairs_left_out'] > 0 and begun_alike


def test_a_round_without_a_pair_is_counted_and_changes_nothing(begun):
  _, stage, state, host = begun({**BASE, 'preference.miners': {
      'pairs': {'name': 'step_pairs', 'part': 'truncated', 'rule': 'value', 'min_visits': 99}}})
  before = jax.device_get(state.params)
  state, (metrics,) = _steps(stage, state, host, 1)
  assert metrics['pairs'] == 0 and metrics['skipped_batches'] == 1 and metrics['trained_tokens'] == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
  assert host.rejected_in_a_row == 0


@pytest.mark.parametrize('overrides, words', [
    ({'preference.miners': {}}, 'preference.miners is empty'),
    ({'preference.reference': 'begin'}, "reference='begin' is none of stage, round"),
    ({'preference.group_size': '1'}, 'leaves nothing to compare'),
    ({'preference.epochs': '0'}, 'preference.epochs=0 must be at least 1'),
    ({'preference.heads': {'pairs': 1.0}}, 'set model.tied_embeddings to False'),
    ({'preference.heads': {'other': 1.0}}, 'one weight for each of preference.miners'),
    ({'preference.miners': {'pairs': {'name': 'ranked_pairs', 'weights': {'grace': 1.0}}}}, "reads the reward part 'grace'"),
    ({'preference.miners': {'pairs': {'name': 'ranked_pairs', 'per_grup': 1}}}, 'per_grup'),
    ({'preference.options': {'gamma': 1.0}}, 'gamma'),
])
def test_bad_settings_are_refused_at_start(tiny_config, tiny_workdir, overrides, words):
  parts = build.build(_config(tiny_config, {**BASE, **overrides}), tiny_workdir)
  with pytest.raises(ValueError, match=words):
    PreferenceStage(parts, 'preference')
  parts.close()
