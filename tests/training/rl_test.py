"""Tests of the reinforcement stage on real rollouts, with real tools and real updates.

Expected values are the trajectories on disk, and the identity that a policy which has not moved has
ratio 1.
"""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from agentrl.agents.react import react
from agentrl.models import lora
from agentrl.rewards import base as rewards
from agentrl.rollout import gather, store
from agentrl.rollout.engine import Job
from agentrl.sampling.draw import SamplingParams
from agentrl.training import build
from agentrl.training.packing import count_tokens
from agentrl.training.rl import ReinforcementStage
from agentrl.training.state import HostState, LearnerState

ALGORITHMS = {
    'grpo': {},
    'ppo': {'rl.algorithm': 'ppo', 'rl.reference': 'true', 'rl.options.kl_coef': '0.1',
            'rl.options.entropy_coef': '0.01', 'rl.minibatches': '2'},
}


class _Broken:
  """A reward function that has gone wrong."""

  names = ('accuracy', 'success')

  def __call__(self, task, trajectory):
    return {'accuracy': float('nan'), 'success': 0.0}


NOT_A_NUMBER = rewards.Reward([_Broken()], {'accuracy': 1.0})


class Run:
  """A stage that has begun, with the batches of its updates kept."""

  def __init__(self, config, folder, name):
    self.parts = build.build(config, folder)
    self.stage = ReinforcementStage(self.parts, name)
    self.host = HostState()
    self.state = self.stage.begin(LearnerState(self.parts.init_params(), {}, np.int32(0)),
                                  self.host)
    self.stage.warm_up(self.state)
    self.batches = []
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

  @property
  def folder(self):
    return self.parts.workdir


@pytest.fixture(params=list(ALGORITHMS))
def run(request, tiny_config, tiny_workdir, quick_compile):
  made = Run(tiny_config(ALGORITHMS[request.param]), tiny_workdir, 'rl')
  yield made
  made.parts.close()


def _trajectories(folder, step):
  (path,) = [p for p in store.list_paths(folder / 'trajectories') if store.step_of(p) == step]
  return store.read(path).trajectories


def test_rollouts_are_trained_on_as_they_were_sampled(run):
  metrics = [run.step() for _ in range(2)]
  assert all(m.get('skipped_batches', 0) == 0 for m in metrics)
  # Sampler and learner agree, so that the first update of a step has ratio 1.
  for m in metrics:
    assert 0 <= m['log_prob_gap_max'] < 1e-4
    assert m['policy/ratio_max'] == pytest.approx(1.0, abs=1e-4)
    assert m['applied'] == 1.0 and np.isfinite(m['loss'])
  # The batches hold the tokens on disk, no more and no less, with the mask and the log-probs of
  # their sampling.
  minibatches = run.parts.config.rl.minibatches
  for step in range(2):
    trajectories = _trajectories(run.folder, step)
    batches = run.batches[step * minibatches:(step + 1) * minibatches]
    size = len(trajectories) // minibatches
    for k, batch in enumerate(batches):
      total = sum(len(s) for t in trajectories[k * size:(k + 1) * size] for s in t.segments)
      assert count_tokens(batch) == total > (batch.segment_ids > 0).sum()
      for i, t in enumerate(trajectories[k * size:(k + 1) * size]):
        (segment,), where = t.segments, batch.trajectory_ids == i
        start = batch.positions[where][0]  # what is before it stands in the row once for several
        assert not segment.sampled[:start + 1].any()
        np.testing.assert_array_equal(batch.tokens[where], segment.tokens[start:])
        np.testing.assert_array_equal(batch.loss_mask[where], segment.sampled[start:])
        np.testing.assert_array_equal(batch.behaviour_log_probs[where],
                                      np.where(segment.sampled, segment.log_probs, 0.0)[start:])
        assert batch.rewards[i] == np.float32(t.rewards['total'])
  # Groups are the samples of one task, and they differ.
  groups = {}
  for t in _trajectories(run.folder, 0):
    groups.setdefault(t.group_id, []).append(tuple(t.segments[0].tokens))
  assert [len(g) for g in groups.values()] == [4] * 4
  assert all(len(set(g)) == 4 for g in groups.values())


def test_what_samples_begin_with_once_changes_no_update(tiny_config, tmp_path_factory, tiny_workdir, quick_compile):
  made = []
  for share in ('True', 'False'):
    folder = tmp_path_factory.mktemp('share') / 'run'
    shutil.copytree(tiny_workdir, folder)
    run = Run(tiny_config({**ALGORITHMS['ppo'], 'train.share_prefixes': share}), folder, 'rl')
    metrics = run.step()
    made.append((jax.device_get(run.state.params), metrics, sum((b.segment_ids > 0).sum() for b in run.batches)))
    run.parts.close()
  (params, metrics, computed), (other, other_metrics, all_computed) = made
  assert metrics['trained_tokens'] == other_metrics['trained_tokens'] == all_computed > computed
  for name in ('loss', 'grad_norm', 'log_prob_gap_max', 'policy/ratio_max'):
    assert metrics[name] == pytest.approx(other_metrics[name], rel=1e-3, abs=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, other)


@pytest.mark.parametrize('adapters', [{}, {'model.lora_targets': "('*_proj',)", 'model.lora_alpha': '64.0'}],
                         ids=['whole', 'adapters'])
def test_the_reference_is_the_policy_that_the_stage_began_with(tiny_config, tiny_workdir, quick_compile, adapters):
  run = Run(tiny_config({**ALGORITHMS['ppo'], **adapters}), tiny_workdir, 'rl')
  before = jax.device_get(run.state.params)
  first = run.step()
  kept = jax.device_get(lora.restored(run.state.params, run.state.reference))
  # A reference is asked for log-probs, not for values.
  without_values = lambda tree: {name: x for name, x in tree.items() if name != 'value'}
  jax.tree.map(np.testing.assert_array_equal, without_values(kept), without_values(before))
  # Of a policy with adapters there is no second copy: they are all that is kept.
  assert not adapters or set(run.state.reference['layers']) == {'lora'} and set(run.state.reference) == {'layers'}
  # Before any update the policy is its own reference: the first of the two updates of a step sees
  # no divergence.
  np.testing.assert_allclose(run.batches[0].reference_log_probs, run.batches[0].behaviour_log_probs,
                             atol=1e-4)
  drift = np.abs(run.batches[1].reference_log_probs - run.batches[1].behaviour_log_probs)
  assert drift.max() < 1e-4
  run.step()
  drift = np.abs(run.batches[2].reference_log_probs - run.batches[2].behaviour_log_probs)
  assert drift.max() > 1e-4 and np.isfinite(first['kl'])
  run.parts.close()


def test_calls_under_a_grammar_are_valid_and_trained_on_as_they_were_drawn(tiny_config, tiny_workdir, quick_compile):
  run = Run(tiny_config({**ALGORITHMS['ppo'], 'rl.minibatches': '1', 'rollout.constrain': 'true', 'train.mask_rows': '2',
                         'rollout.speculate': '2', 'rollout.speculate_ngram': '1'}), tiny_workdir, 'rl')
  add_scores = run.stage._add_scores
  run.stage._add_scores = lambda *a: run.batches.append(jax.device_get(add_scores(*a))) or run.batches[-1]
  metrics = run.step()
  assert metrics['log_prob_gap_max'] < 1e-4 and metrics['policy/ratio_max'] == pytest.approx(1.0, abs=1e-4)
  batch = run.batches[0]
  trajectories = _trajectories(run.folder, 0)
  for i, t in enumerate(trajectories):
    [segment] = t.segments
    rows = batch.masks[batch.mask_ids[batch.trajectory_ids == i]]
    for mask, row, sampled in zip(segment.masks, rows, segment.sampled):
      assert (mask is not None) == sampled
      assert row[:len(mask or b'') // 4].tobytes() == (mask or b'')
    assert not any(call.error for turn in t.turns if turn.stop_reason == 'stop' for call in turn.calls)
  # There was room for one set; the steps were compiled anew for as many as there are.
  assert run.stage._mask_rows == len(batch.masks) > 2
  # What the reference says is of the same sets: the policy has not moved when it is asked.
  np.testing.assert_allclose(batch.reference_log_probs[batch.loss_mask], batch.behaviour_log_probs[batch.loss_mask], atol=1e-4)
  run.parts.close()


def test_tools_that_no_grammar_is_made_for_are_refused_at_start(tiny_config, tiny_workdir, monkeypatch):
  from agentrl.tools.calculator import Calculator
  odd = {'type': 'object', 'properties': {'expression': {'type': 'string', 'enum': ['</calculator>']}}, 'required': ['expression']}
  monkeypatch.setattr(Calculator, 'parameters', odd)
  with pytest.raises(ValueError, match="tool 'calculator': none of .*</calculator>"):
    build.build(tiny_config({'rollout.constrain': 'true'}), tiny_workdir)


def test_a_batch_without_signal_is_skipped_and_counted(tiny_config, tiny_workdir, quick_compile):
  # With no weight on any part but one that is always 0 here, all rewards are equal.
  run = Run(tiny_config({'reward.weights.calls': '0.0'}), tiny_workdir, 'rl')
  before = jax.device_get(run.state.params)
  metrics = run.step()
  assert metrics['skipped_batches'] == 1 and metrics['signal_groups'] == 0 and not run.batches
  assert metrics['trained_tokens'] == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state.params), before)
  assert run.host.rejected_in_a_row == 0
  run.parts.close()


def test_groups_without_signal_are_left_out_if_asked(tiny_config, tiny_workdir, quick_compile):
  run = Run(tiny_config({'rl.select': "[{'name': 'drop_zero_std'}]"}), tiny_workdir, 'rl')
  metrics = run.step()
  (batch,), trajectories = run.batches, _trajectories(run.folder, 0)
  rewards = np.reshape([t.rewards['total'] for t in trajectories], (4, 4))
  varied = np.ptp(rewards, axis=1) > 0
  assert 0 < varied.sum() < 4, 'this seed should give groups of both kinds'
  assert metrics['signal_groups'] == varied.sum()
  np.testing.assert_array_equal(batch.weights, np.repeat(varied, 4))
  (kept,) = np.nonzero(np.repeat(varied, 4))
  assert set(batch.trajectory_ids[batch.segment_ids > 0]) == set(kept)
  run.parts.close()


def test_more_prompts_are_rolled_out_until_enough_groups_are_left(tiny_config, tiny_workdir, quick_compile):
  run = Run(tiny_config({'rl.select': "[{'name': 'drop_zero_std'}]", 'rl.max_generation_batches': '5',
                         'rl.epochs': '2'}), tiny_workdir, 'rl')
  metrics = run.step()
  trajectories = _trajectories(run.folder, 0)
  rewards = np.reshape([t.rewards['total'] for t in trajectories], (-1, 4))
  assert 1 < metrics['generation_batches'] <= 5
  # All of a batch's groups were asked for in the end, and none of them is without signal.
  assert len({t.group_id for t in trajectories}) == 4 and (np.ptp(rewards, axis=1) > 0).all()
  first, second = run.batches
  assert (first.weights == 1).all() and metrics['trained_tokens'] == 2 * count_tokens(first)
  # The second pass is over the same batch, and no longer on-policy.
  jax.tree.map(np.testing.assert_array_equal, first, second)
  run.parts.close()


def test_the_likeliest_words_are_what_each_sample_is_compared_with(tiny_config, tiny_workdir, quick_compile, monkeypatch):
  config = tiny_config({'rl.algorithm': 'compose', 'rl.greedy_baseline': 'true', 'rl.group_size': '2'})
  with config.unlocked():
    config.rl.options = {'channels': {'policy': {'advantage': {'name': 'given', 'baseline_part': 'greedy'},
                                                 'ratio': 'off', 'clip': 'log_likelihood'}}}
  run = Run(config, tiny_workdir, 'rl')
  before = jax.device_get(run.state.params)
  collect, rollouts = gather.collect, []

  def counted(engine, *arguments, **options):
    collected = collect(engine, *arguments, **options)
    rollouts.append(dataclasses.replace(engine.stats))
    return collected

  monkeypatch.setattr(gather, 'collect', counted)
  metrics = run.step()
  monkeypatch.undo()
  # Both rollouts of a step are in its metrics.
  assert len(rollouts) == 2 and rollouts[1].decoded_tokens > 0
  assert metrics['decoded_tokens'] == sum(s.decoded_tokens for s in rollouts)
  wall = sum(s.total_seconds for s in rollouts)
  np.testing.assert_allclose(sum(v for k, v in metrics.items() if k.startswith('engine_seconds/')), wall)
  assert metrics['seconds/rollout'] >= wall
  trajectories = _trajectories(run.folder, 0)
  tasks = {t.task.id: t.task for t in trajectories}
  greedy = run.parts.engine(SamplingParams(temperature=0.0))
  greedy.sampler.set_params(before)
  found = greedy.collect([Job(task, 7, task.id, react(run.parts.environment, run.parts.template, task))
                          for task in tasks.values()])
  earned = {t.task.id: run.parts.reward(t.task, t)['total'] for t in found}
  assert [t.rewards['greedy'] for t in trajectories] == [earned[t.task.id] for t in trajectories]
  [batch] = run.batches
  np.testing.assert_array_equal(batch.parts['greedy'], np.float32([t.rewards['greedy'] for t in trajectories]))
  run.parts.close()


def test_an_objective_that_reads_a_part_nobody_gives_is_refused(tiny_config, tiny_workdir):
  config = tiny_config({'rl.algorithm': 'compose', 'stages': 'rl'})
  with config.unlocked():
    config.rl.options = {'channels': {'policy': {'advantage': {'name': 'z', 'part': 'econommy'}}}}
  parts = build.build(config, tiny_workdir)
  with pytest.raises(ValueError, match="reads the reward part 'econommy' and cannot go with .*failed_calls"):
    ReinforcementStage(parts, 'rl')
  parts.close()


@pytest.mark.parametrize('overrides, message', [
    ({'rl.select': "[{'name': 'drop_zero_st'}]"}, "did you mean 'drop_zero_std'"),
    ({'rl.select': "[{'name': 'drop_zero_std', 'fraction': 0.5}]"}, "does not take 'fraction'; known: part"),
    ({'rl.memory.name': 'nothing'}, "unknown memory 'nothing'"),
    ({'agent.name': 'reakt'}, "did you mean 'react'"),
    ({'agent.options.depth': '3'}, 'agent.options.*depth'),
    ({'reward.shapings': "[{'name': 'gatte'}]"}, "unknown reward shaping 'gatte'"),
])
def test_choices_that_do_not_exist_are_refused_by_name(overrides, message, tiny_config, tiny_workdir):
  with pytest.raises((ValueError, LookupError), match=message):
    parts = build.build(tiny_config({'stages': 'rl', **overrides}), tiny_workdir)
    try:
      ReinforcementStage(parts, 'rl')
    finally:
      parts.close()


def test_an_update_that_is_not_finite_leaves_its_batch_behind(tiny_config, tiny_workdir,
                                                              quick_compile):
  run = Run(tiny_config(), tiny_workdir, 'rl')
  run.parts.reward = NOT_A_NUMBER
  before = jax.device_get(run.state)
  metrics = run.step()
  assert metrics['applied'] == 0.0 and run.host.rejected_in_a_row == 1
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state), before)
  with np.load(run.folder / 'rejected' / 'step_00000000_0.npz') as saved:
    np.testing.assert_array_equal(saved['tokens'], run.batches[0].tokens)
    assert set(saved) == {k for k, v in run.batches[0]._asdict().items() if v is not None} - {'parts', 'token_parts'}
  run.parts.close()
