"""The reinforcement stage where sampling and learning are not in turns: nothing changes without staleness, and with it
every token is what it says it is.

Expected values are those of the run in turns, of the learner's own log-probs, and of a run that nobody disturbed.
"""

from __future__ import annotations

import ast
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from agentrl.rollout import store
from agentrl.training import build
from agentrl.training.rl import ReinforcementStage
from agentrl.training.state import HostState, LearnerState

# Every trajectory has a reward, and every reward a gradient.
PLAIN = {'rl.steps': '4', 'rl.algorithm': 'compose', 'reward.weights.tokens': '0.1',
         'rl.options.channels': "{'policy': {'advantage': 'reward_to_go', 'clip': 'asym'}}"}
CORRECTED = {'rl.recompute_behaviour': 'true', 'rl.options.channels': (
    "{'policy': {'advantage': 'reward_to_go', 'clip': 'asym', 'maps': {'name': 'mismatch_weight', 'cap': 2.0}}}")}


class Run:
  """A stage that has begun, with the batches of its updates kept."""

  def __init__(self, config, folder, state=None, host=None):
    self.parts = build.build(config, folder)
    self.stage, self.host, self.batches = ReinforcementStage(self.parts, 'rl'), host or HostState(), []
    bare = LearnerState(self.parts.init_params(), {}, np.int32(0))
    self.state = state or self.stage.begin(bare, self.host)
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
def runs(tiny_config, tiny_folder, tmp_path_factory, quick_compile):
  made = []

  def make(overrides, **state):
    folder = pathlib.Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp('made') / 'run'))
    config = tiny_config({k: v for k, v in {**PLAIN, **overrides}.items() if k != 'rl.options.channels'})
    with config.unlocked():
      config.rl.options.channels = ast.literal_eval({**PLAIN, **overrides}['rl.options.channels'])
    made.append(Run(config, folder, **state))
    return made[-1]

  yield make
  for each in made:
    each.parts.close()


def assert_same_tokens(a, b, exactly):
  assert [(t.group_id, t.sample, t.policy_version) for t in a] == [(t.group_id, t.sample, t.policy_version) for t in b]
  for x, y in zip(a, b):
    for name in ('tokens', 'sampled', 'versions'):
      np.testing.assert_array_equal(getattr(x.segments[0], name), getattr(y.segments[0], name))
    np.testing.assert_allclose(x.segments[0].log_probs, y.segments[0].log_probs, atol=0 if exactly else 1e-5)


def test_without_staleness_it_is_the_run_in_turns_bit_for_bit(run):
  plain, streamed = run({}), run({'rl.overlap': 'true'})
  for step in range(3):
    for metrics in (plain.step(), found := streamed.step()):
      assert metrics['applied'] == 1.0
    assert found['staleness/max'] == 0 and found['carried_groups'] == 0
    assert_same_tokens(plain.stored(step), streamed.stored(step), exactly=True)
  for a, b in zip(plain.batches, streamed.batches, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(plain.state), jax.device_get(streamed.state))


@pytest.mark.parametrize('settings', [
    {}, {'rl.overlap': 'true'},
    # On devices of their own.
    {'rl.overlap': 'true', 'rollout.devices': '4'},
], ids=['in turns', 'overlapped', 'split'])
def test_stale_tokens_are_known_as_such_and_weighed(run, settings):
  made = run({**CORRECTED, 'rl.staleness': '2', **settings})
  metrics = [made.step() for _ in range(4)]
  assert metrics[0]['staleness/max'] == 0 and 0 < max(m['staleness/max'] for m in metrics) <= 2
  assert [m['carried_groups'] for m in metrics] == [8, 8, 4, 0] and made.host.carried == {}
  stale = 0
  for step, batch in enumerate(made.batches):
    trajectories, sampler = made.stored(step), batch.token_parts['sampler_log_prob']
    for i, t in enumerate(trajectories):
      [s], own = t.segments, batch.trajectory_ids == i
      start = batch.positions[own][0]  # what is before it stands in the row once for several
      assert not s.sampled[:start + 1].any()
      tokens, sampled, log_probs, drawn_at = (x[start:] for x in (s.tokens, s.sampled, s.log_probs, s.versions))
      np.testing.assert_array_equal(batch.tokens[own], tokens)
      np.testing.assert_array_equal(sampler[own], np.where(sampled, log_probs, 0))
      assert set(s.versions[s.sampled]) <= set(range(t.policy_version, step + 1)) and step - t.policy_version <= 2
      gap = np.abs(batch.behaviour_log_probs[own] - sampler[own])
      # The learner's log-probs are of the policy of this step: it agrees with its own draws, and not with older ones.
      assert not (drawn_at == step).any() or gap[drawn_at == step].max() < 1e-4
      old = sampled & (drawn_at < step)
      stale += old.sum()
      assert not old.any() or gap[old].max() > 1e-4
    groups = {t.group_id for t in trajectories}
    assert len(groups) == 4 and len(trajectories) == 16
  assert stale > 0
  learner, sampler = ({d.id for x in jax.tree.leaves(tree) for d in x.devices()} for tree in (
      made.state.params, made.stage._collector.engine.sampler.cache))
  assert learner == sampler or ('rollout.devices' in settings and not learner & sampler and len(sampler) == 4)


def test_a_stage_made_again_goes_on_as_if_it_had_not_ended(run):
  settings = {'rl.staleness': '1'}
  plain = run(settings)
  carried = [plain.step()['carried_groups'] for _ in range(4)]
  assert carried == [4, 4, 4, 0]
  broken = run(settings)
  for step in range(4):
    if step in (1, 3):
      host = json.loads(json.dumps(broken.host.to_json()))
      state = jax.tree.map(np.array, jax.device_get(broken.state))
      broken.parts.close()
      broken = Run(broken.parts.config, broken.parts.workdir, state, HostState(**host))
    broken.step()
    assert_same_tokens(plain.stored(step), broken.stored(step), exactly=False)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), jax.device_get(plain.state.params),
               jax.device_get(broken.state.params))
  broken.parts.close()


@pytest.mark.parametrize('overrides, message', [
    ({'rl.greedy_baseline': 'true'}, 'rl.greedy_baseline rolls out beside'),
    ({'rollout.devices': '8'}, r'rollout.devices=8 must leave at least 1 of the 8 devices'),
    ({'rl.enough': '0.5'}, r'rl.enough=0.5 cuts the slowest and cannot go with rl.staleness=1'),
    ({'rl.budget.turns': '5'}, r'rl.budget.turns=5 ends a step where it is spent and cannot go with rl.staleness=1'),
    ({'agent.name': 'experience_prompt', 'rl.recompute_behaviour': 'true'},
     "agent 'experience_prompt' learns from a batch .* cannot go with rl.staleness=1"),
])
def test_what_cannot_be_carried_over_is_refused(run, overrides, message):
  with pytest.raises(ValueError, match=message):
    run({'rl.staleness': '1', **overrides})
