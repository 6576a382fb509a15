"""Tests of the reinforcement stage with agents that edit contexts, fork, remember or are cut short.

Expected values are the trajectories on disk and the memory that is saved with the run.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from agentrl.core.types import Status
from agentrl.rollout import store
from agentrl.training import build, packing
from agentrl.training.rl import ReinforcementStage
from agentrl.training.state import HostState, LearnerState


class Run:
  """A stage that has begun, with the batches of its updates kept."""

  def __init__(self, config, folder):
    self.parts = build.build(config, folder)
    self.stage, self.host, self.batches = ReinforcementStage(self.parts, 'rl'), HostState(), []
    self.state = self.stage.begin(LearnerState(self.parts.init_params(), {}, np.int32(0)), self.host)
    update = self.stage._update

    def keep(state, batch, used):
      self.batches.append(jax.device_get(batch))
      return update(state, batch, used)

    self.stage._update = keep

  def step(self):
    self.state, metrics = self.stage.step(self.state, self.host)
    self.host.step += 1
    self.host.stage_step += 1
    return metrics

  def stored(self, step):
    [path] = [p for p in store.list_paths(self.parts.workdir / 'trajectories') if store.step_of(p) == step]
    return store.read(path).trajectories


@pytest.fixture(name='run')
def runs(tiny_config, tiny_workdir, quick_compile):
  made = []

  def make(**overrides):
    made.append(Run(tiny_config({k.replace('__', '.'): v for k, v in overrides.items()}), tiny_workdir))
    return made[-1]

  yield make
  for each in made:
    each.parts.close()


def test_every_segment_is_trained_on_as_it_was_sampled(run):
  made = run(agent__name='turn_rows', agent__options__turns='4')
  metrics = made.step()
  assert metrics['log_prob_gap_max'] < 1e-4 and metrics['applied'] == 1.0
  [batch], trajectories = made.batches, made.stored(0)
  assert max(len(t.segments) for t in trajectories) > 1
  assert packing.count_tokens(batch) == sum(len(s) for t in trajectories for s in t.segments)
  for i, t in enumerate(trajectories):
    own = batch.trajectory_ids == i
    assert (own & batch.loss_mask).sum() == t.num_sampled
    drawn = np.concatenate([s.log_probs[s.sampled] for s in t.segments])
    np.testing.assert_array_equal(np.sort(batch.behaviour_log_probs[own & batch.loss_mask]), np.sort(drawn))


def test_room_is_made_for_all_contexts(run):
  plain, several = run(), run(agent__name='turn_rows', agent__options__turns='4')
  assert several.stage._rows == 4 * plain.stage._rows


@pytest.mark.parametrize('name', ['rollback_purify', 'experience_prompt'])
def test_edited_words_need_recomputed_log_probs(run, name):
  with pytest.raises(ValueError, match=f"agent '{name}'.*rl.recompute_behaviour=False.*True.*'react'"):
    run(agent__name=name)
  made = run(agent__name=name, rl__recompute_behaviour='true')
  assert made.step()['applied'] == 1.0
  [batch] = made.batches
  assert np.isfinite(batch.behaviour_log_probs).all() and batch.behaviour_log_probs[batch.loss_mask].max() < 0


def test_what_agents_write_on_trajectories_can_be_read_and_suffixes_are_no_attempts(run):
  made = run(agent__name='suffix_resample', agent__options__suffixes='3', agent__options__before='1',
             rl__select="[{'name': 'mask_flags', 'parts': ('flawed',)}]")
  metrics = made.step()
  trajectories = made.stored(0)
  suffixes = [t for t in trajectories if t.rewards.get('suffix')]
  assert suffixes and len(trajectories) == 16 + len(suffixes)
  rest = [t for t in trajectories if not t.rewards.get('suffix')]
  assert metrics['calls_per_task'] == sum(len(t.results) for t in rest) / 16
  assert any(t.rewards['flawed'] for t in rest)


def test_agents_learn_from_scored_trajectories_and_their_memory_is_saved(run):
  made = run(agent__name='instruction_population', agent__options__instructions="('', 'a')")
  made.step()
  memory = json.loads(json.dumps(made.host.memory['agent']))
  assert sum(i['count'] for i in memory['population']) == 16
  total = sum(t.rewards['total'] for t in made.stored(0))
  assert sum(i['sum'] for i in memory['population']) == pytest.approx(total)


def test_the_slowest_are_cut_and_left_out(run):
  made = run(rl__enough='0.5')
  metrics = made.step()
  trajectories = made.stored(0)
  assert 8 <= len(trajectories) < 16 and not any(t.status is Status.CUT for t in trajectories)
  assert metrics['cut_trajectories'] == 16 - len(trajectories)
  assert metrics.get('status/cut', 0.0) == 0.0
