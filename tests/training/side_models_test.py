"""Tests of the models that are trained beside the policy, alone and within the reinforcement stage.

Expected values are the definitions written out with one forward pass a sequence, and the identities that a copy of the policy
finds nothing more or less likely than it, and that a run which is resumed goes on as it was.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from agentrl.algorithms import choices
from agentrl.checkpointing.checkpoints import Checkpointer
from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params
from agentrl.sharding import mesh as meshes
from agentrl.training import build, packing
from agentrl.training.rl import ReinforcementStage
from agentrl.training.side import base
from agentrl.training.state import HostState, LearnerState

pytestmark = pytest.mark.usefixtures('quick_compile')

VOCAB, LENGTH = 40, 24
CONFIG = ModelConfig(VOCAB, num_layers=1, width=16, ff_width=24, num_heads=2, num_kv_heads=2, head_dim=8,
                     unroll_layers=False)
SUCCESS = np.float32([1, 0, 1, 0, 0, 1])
GROUPS = np.int32([0, 0, 0, 1, 1, 1])


@functools.cache
def _params():
  return jax.device_get(jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0)))


@functools.cache
def _log_probs(seed=None):
  """Log-probs of each sequence under the policy (or another one), unpacked."""
  params = _params() if seed is None else jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(seed))
  out = []
  for tokens, _, _ in _plain():
    n = len(tokens)
    got = transformer.evaluate(params, CONFIG, tokens[None], np.arange(n, dtype=np.int32)[None], np.ones((1, n), np.int32))
    out.append(np.asarray(got.log_probs[0]))
  return out


@functools.cache
def _plain():
  """Tokens, mask and turns: a prompt, then one to three turns with an observation between them."""
  rng, made = np.random.default_rng(0), []
  for i in range(len(SUCCESS)):
    mask, turns = [False] * 3, [0] * 3
    for k in range(1 + i % 3):
      mask, turns = mask + [False] * (k > 0) + [True] * (1 + (i + k) % 3), turns + [k] * ((k > 0) + 1 + (i + k) % 3)
    made.append((rng.integers(1, VOCAB, len(mask)).astype(np.int32), np.array(mask), np.array(turns, np.int32)))
  return made


def _batch(micro_batches=1, shift=0.0):
  """What the policy sampled, its recorded log-probs lower by `shift` nats."""
  sequences = []
  for i, (tokens, mask, turns) in enumerate(_plain()):
    last = mask & np.append((turns[1:] != turns[:-1]) | ~mask[1:], True)
    sequences.append(packing.TokenSequence(tokens, mask, np.where(mask, _log_probs()[i] - np.float32(shift), np.nan), turns, i,
                                           {'executable': np.where(last, turns % 2, 0).astype(np.float32)}))
  ones = np.ones(len(SUCCESS), np.float32)
  outcome = packing.Outcome(GROUPS, SUCCESS, ones, ones > 0, {'success': SUCCESS})
  return packing.pack(sequences, outcome, rows=8, row_length=LENGTH, micro_batches=micro_batches,
                      token_part_names=['executable'])


def _ends(batch, plane, i):
  """The numbers of a plane on the last tokens of the turns of trajectory i; everything else must be 0."""
  own = np.asarray(plane)[batch.trajectory_ids == i]
  _, mask, turns = _plain()[i]
  ends = [int(np.flatnonzero(mask & (turns == k))[-1]) for k in np.unique(turns[mask])]
  assert not np.delete(own, ends).any()
  return own[ends]


def _made(name, micro_batches=1, **options):
  side = base.SIDE_MODELS.get(name)(**options)
  side.bind(base.Setting(CONFIG, micro_batches))
  return side


def test_a_success_is_paired_with_a_failure_of_its_group_one_to_one():
  chosen, rejected, weights = base.one_to_one(SUCCESS > 0, GROUPS, np.array([1, 1, 1, 1, 1, 1]) > 0)
  found = [(int(i), int(j)) for i, j, w in zip(chosen, rejected, weights) if w]
  assert found == [(0, 1), (5, 3)]
  *_, weights = base.one_to_one(SUCCESS > 0, GROUPS, np.array([1, 0, 1, 1, 1, 0]) > 0)
  assert not weights.any()


def test_the_implicit_reward_of_a_turn_is_beta_times_what_the_copy_adds_to_it():
  side = _made('implicit_prm', beta=0.5)
  batch, used = _batch(shift=0.25)
  # Without a learning rate the reward model stays the policy, which is 0.25 nats a token above what was recorded.
  still = _made('implicit_prm', beta=0.5, learning_rate=0.0)
  _, parts, metrics = still.learn(still.begin(_params()), batch, used)
  for i, (_, mask, turns) in enumerate(_plain()):
    sizes = [(mask & (turns == k)).sum() for k in np.unique(turns[mask])]
    np.testing.assert_allclose(_ends(batch, parts['implicit'], i), 0.5 * 0.25 * np.array(sizes), rtol=1e-3)
  assert metrics['pairs'] == 2
  # It learns that successes are likelier: over passes the margin of its pairs grows.
  trained, margins = side.begin(_params()), []
  for _ in range(5):
    trained, parts, metrics = side.learn(trained, batch, used)
    margins.append(float(metrics['margin']))
  assert margins == sorted(margins) and margins[-1] > margins[0] + 0.1
  totals = [_ends(batch, parts['implicit'], i).sum() for i in range(6)]
  assert totals[0] > totals[1] and totals[5] > totals[3]


@pytest.mark.parametrize('name', ['implicit_prm', 'progress'])
def test_micro_batches_change_nothing(name):
  found = []
  for micro_batches in (1, 2):
    side = _made(name, micro_batches, optimizer='adamw', max_grad_norm=0.0)
    batch, used = _batch(micro_batches)
    trained, parts, metrics = side.learn(side.begin(_params()), batch, used)
    found.append(([_ends(batch, parts[side.turn_names[0]], i) for i in range(6)], metrics))
  for one, two in zip(*(f[0] for f in found)):
    np.testing.assert_allclose(one, two, rtol=2e-2, atol=2e-4)  # Adam's first step follows signs
  for metric in set(found[0][1]) - {'accuracy'}:  # margins are 0 but for rounding
    np.testing.assert_allclose(found[0][1][metric], found[1][1][metric], rtol=1e-4, atol=1e-6)


def test_progress_adds_up_to_the_final_reward():
  side = _made('progress', learning_rate=3e-3, passes=60)
  batch, used = _batch()
  first = _made('progress')
  _, parts, metrics = first.learn(first.begin(_params()), batch, used)
  # The estimates begin at 0, so the first loss is the mean square of the rewards.
  np.testing.assert_allclose(metrics['loss'], np.mean(np.square(SUCCESS)), rtol=1e-6)
  _, parts, metrics = side.learn(side.begin(_params()), batch, used)
  assert metrics['loss'] < 0.02
  for i, (_, mask, turns) in enumerate(_plain()):
    grounding = 0.5 * (np.unique(turns[mask]) % 2)
    assert abs((_ends(batch, parts['progress'], i) - grounding).sum() - SUCCESS[i]) < 0.35


def test_what_is_not_in_the_loss_is_neither_read_nor_rewarded():
  batch, used = _batch()
  changed = batch._replace(behaviour_log_probs=np.where(batch.loss_mask, batch.behaviour_log_probs, 9.0).astype(np.float32))
  for name in ('implicit_prm', 'progress'):
    side = _made(name)
    one, two = (side.learn(side.begin(_params()), b, used) for b in (batch, changed))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one[:2]), jax.device_get(two[:2]))


def test_the_weight_of_a_penalty_follows_the_divergence():
  batch, used = _batch()
  drift = np.where(batch.loss_mask, 0.3 * np.sin(batch.tokens) + 0.2, 0).astype(np.float32)
  batch = batch._replace(reference_log_probs=np.where(batch.loss_mask, batch.behaviour_log_probs - drift, 7.0).astype(np.float32))
  kl = np.mean([drift[batch.loss_mask & (batch.trajectory_ids == i)].mean() for i in range(len(SUCCESS))])
  side = base.make('kl', {'name': 'adaptive_kl', 'coef': 0.5, 'target': float(kl) / 1.1, 'horizon': 60.0})
  side.bind(base.Setting(CONFIG, 2))
  trained, coef = side.begin(_params()), 0.5
  for _ in range(3):
    trained, parts, metrics = side.learn(trained, batch, used)
    np.testing.assert_allclose([metrics['kl'], metrics['coef']], [kl, coef], rtol=1e-5)
    np.testing.assert_allclose(parts['kl_penalty'], -coef * drift, rtol=1e-5, atol=1e-7)
    coef *= 1 + 0.1 * len(SUCCESS) / 60  # a tenth too far, by 6 of 60 trajectories
  # Far beyond the target and far below it the change is bounded to a fifth.
  for target, change in ((kl / 99, 1 + 0.2 / 10), (kl * 99, 1 - 0.2 / 10)):
    side = base.make('kl', {'name': 'adaptive_kl', 'coef': 1.0, 'target': float(target), 'horizon': 60.0})
    side.bind(base.Setting(CONFIG, 2))
    trained = side.learn(side.begin(_params()), batch, used)[0]
    np.testing.assert_allclose(trained.params['coef'], change, rtol=1e-5)
  # Of a constant weight, it is the divergence in the reward that the advantage knows by itself.
  own = choices.advantage('reward_to_go', kl_in_reward=0.5)
  given = choices.advantage('reward_to_go', turn_part='kl_penalty')
  with_part = batch._replace(token_parts={'kl_penalty': -0.5 * drift})
  np.testing.assert_allclose(given.function(with_part, batch.loss_mask).advantages,
                             own.function(batch, batch.loss_mask).advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options, words', [
    ({'name': 'adaptive_kl', 'target': 0.0}, 'target=0.0'),
    ({'name': 'implicit_prm', 'passes': 0}, 'passes=0'), ({'name': 'implicit_prm', 'beta': -1.0}, 'beta=-1.0'),
    ({'name': 'progress', 'passes': 0}, 'passes=0'), ({'name': 'progress', 'speed': 1}, 'rl.side.x: .*speed'),
])
def test_bad_options_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    base.make('x', options)


ISTAR = {'side': {'prm': {'name': 'implicit_prm', 'part': 'calls'}}, 'channels': {'policy': {'advantage': {
    'name': 'sum', 'terms': {'episode': {'name': 'z'}, 'step': {'name': 'step_z', 'turn_part': 'implicit'}}}}}}


def _begun(config, folder, change=ISTAR):
  with config.unlocked():
    config.rl.side = ConfigDict(change['side'])
    config.rl.options = ConfigDict({'channels': change['channels']})
  # One device: eight simulated ones on few cores may keep each other waiting for ever.
  mesh = meshes.make_mesh({}, jax.devices()[:1])
  parts = dataclasses.replace(build.build(config, folder), mesh=mesh)
  stage, host = ReinforcementStage(parts, 'rl'), HostState()
  state = stage.begin(LearnerState(parts.init_params(), {}, np.int32(0)), host)
  stage.warm_up(state)
  return parts, stage, state, host


def _steps(stage, state, host, count):
  metrics = []
  for _ in range(count):
    state, found = stage.step(state, host)
    host.step, host.stage_step = host.step + 1, host.stage_step + 1
    metrics.append({k: v for k, v in found.items() if 'second' not in k and not k.startswith('engine/')})
  return state, metrics


def test_a_run_with_a_side_model_goes_on_where_it_was(tiny_config, tiny_workdir, tmp_path):
  parts, stage, state, host = _begun(tiny_config({'rl.algorithm': 'compose'}), tiny_workdir)
  state, first = _steps(stage, state, host, 1)
  with Checkpointer(tmp_path / 'saved') as checkpointer:
    checkpointer.save(1, state, host.to_json(), wait=True)
    state, rest = _steps(stage, state, host, 2)
    again = ReinforcementStage(parts, 'rl')
    restored = checkpointer.restore(again.begin(LearnerState(parts.init_params(), {}, np.int32(0)), HostState()))
  other, resumed = restored.arrays, HostState(**restored.host)
  again.warm_up(other)
  other, redone = _steps(again, other, resumed, 2)
  assert redone == rest
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), jax.device_get(state))
  assert first[0]['prm/pairs'] > 0 and first[0]['prm/applied'] == 1 and np.isfinite(first[0]['loss'])
  # The reward model learned apart from the policy.
  assert not np.array_equal(state.side['prm'].params['final_norm'], state.params['final_norm'])
  parts.close()


def test_a_part_that_nobody_gives_is_refused(tiny_config, tiny_workdir):
  change = {**ISTAR, 'side': {'prm': {'name': 'implicit_prm', 'part': 'grace'}}}
  with pytest.raises(ValueError, match="reads the reward part 'grace'"):
    _begun(tiny_config({'rl.algorithm': 'compose'}), tiny_workdir, change)


def test_a_penalty_without_a_reference_is_refused(tiny_config, tiny_workdir):
  change = {**ISTAR, 'side': {'kl': {'name': 'adaptive_kl'}}}
  with pytest.raises(ValueError, match='rl.side.kl reads .* cannot go with rl.reference=False; set that to True'):
    _begun(tiny_config({'rl.algorithm': 'compose'}), tiny_workdir, change)
