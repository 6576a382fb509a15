"""Tests of critics learned from a log: by definition, on a chain with a known solution, and on real rollouts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import offline_q
from agentrl.checkpointing.checkpoints import Checkpointer
from agentrl.training import build
from agentrl.training.offline_q import OfflineQStage, _critic_epoch, _draws
from agentrl.training.optimizer import make_optimizer
from agentrl.training.state import HostState, LearnerState
from agentrl.training.sums import Trained

pytestmark = pytest.mark.usefixtures('quick_compile')

TINY = {'offline_q.prompts': '4', 'offline_q.turns': '12', 'offline_q.actions': '3', 'offline_q.batch': '6',
        'offline_q.critic_steps': '2', 'offline_q.actor_steps': '2', 'offline_q.threshold': '-9.0', 'offline_q.hidden': '8'}


def _slow(network, x):
  x = np.asarray(x, np.float64)
  for i, layer in enumerate(network):
    x = (np.maximum(x, 0) if i else x) @ np.asarray(layer['weight'], np.float64) + np.asarray(layer['bias'])
  return x[..., 0]


def _random(seed, features=3):
  critics = offline_q.init_critics(jax.random.key(seed), features, 8)
  noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
  return jax.tree.map(noise, critics)


def test_the_loss_is_that_of_the_definition_and_targets_get_no_gradient():
  critics, targets, rng = _random(0), _random(1), np.random.default_rng(0)
  s, a, n = rng.normal(size=(3, 5, 3)).astype(np.float32)
  r, done = rng.normal(size=5).astype(np.float32), np.array([0, 1, 0, 0, 1]) > 0
  n[done] = 1e6  # no next state is read where there is none
  of = lambda c, t: offline_q.critic_loss(c, t, s, a, r, n, done, gamma=0.9)[0]
  got, want, sa = of(critics, targets), 0.0, np.concatenate([s, a], axis=1)
  for i in '12':
    after = np.where(done, 0.0, 0.9 * _slow(targets[f'v{i}'], n))
    want += np.mean((_slow(critics[f'q{i}'], sa) - (r + after))**2)
    want += np.mean((_slow(critics[f'v{i}'], s) - _slow(targets[f'q{i}'], sa))**2)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(of, argnums=1)(critics, targets)))


def test_the_best_action_is_the_one_of_largest_advantage_above_the_threshold():
  critics, rng = _random(0), np.random.default_rng(1)
  s, a = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(6, 4, 3)).astype(np.float32)
  offered = rng.random((6, 4)) < 0.7
  offered[:, 0] = True
  best, weights = offline_q.best_actions(critics, s, a, offered, threshold=0.2)
  for m in range(6):
    v = max(_slow(critics['v1'], s[m]), _slow(critics['v2'], s[m]))
    gains = [max(_slow(critics[q], np.concatenate([s[m], x])) for q in ('q1', 'q2')) - v if ok else -np.inf
             for x, ok in zip(a[m], offered[m])]
    assert best[m] == int(np.argmax(gains))
    want = min(max(gains), 1.0) if max(gains) > 0.2 else 0.0
    np.testing.assert_allclose(weights[m], want, rtol=1e-4, atol=1e-5)
  assert (np.asarray(weights) > 0).any() and (np.asarray(weights) == 0).any()


def test_targets_move_by_their_rate():
  got = offline_q.moved({'w': jnp.zeros(2)}, {'w': jnp.array([1., 2.])}, 0.1)
  np.testing.assert_allclose(got['w'], [0.1, 0.2], rtol=1e-6)


def test_values_of_a_chain_are_discounted_from_its_end():
  # Three turns, the last one rewarded: V = Q = gamma^2, gamma, 1.
  s = np.eye(3, dtype=np.float32)
  n, r, done = np.roll(s, -1, axis=0), np.float32([0, 0, 1]), np.array([0, 0, 1]) > 0
  optimizer = make_optimizer('adamw', 1e-2, max_grad_norm=0.0)
  critics = offline_q.init_critics(jax.random.key(0), 3, 16)
  carried = Trained(critics, optimizer.init(critics), np.int32(0)), jax.tree.map(jnp.array, critics)
  epoch = jax.jit(functools.partial(_critic_epoch, optimizer, 0.5, 0.1, None))
  for _ in range(300):
    carried, _ = epoch(carried, np.tile(np.arange(3, dtype=np.int32), (2, 1)), s, s, r, n, done)
  for name in ('v1', 'v2'):
    np.testing.assert_allclose(offline_q.value(carried[0].params[name], s), [0.25, 0.5, 1.0], atol=0.03)


def test_what_is_hardly_ever_drawn_is_not_imitated():
  one, other, third = (np.int32(x) for x in ([1, 2], [1], [1, 2, 3]))
  draws = _draws([[one, other, one.copy(), third, one], [other, third]])
  assert draws.tolist() == [[3, 1, 3, 1, 3], [1, 1, 0, 0, 0]]
  critics, rng = _random(0), np.random.default_rng(1)
  s, a = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(2, 5, 3)).astype(np.float32)
  best, weights = offline_q.best_actions(critics, s, a, draws >= 3, threshold=-9.0)
  assert draws[0, best[0]] == 3 and weights[1] == 0


def _begin(config, folder):
  parts = build.build(config, folder)
  stage, host = OfflineQStage(parts, 'offline_q'), HostState()
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


@pytest.mark.parametrize('at', [1, 3])
def test_a_stage_that_is_resumed_midway_is_the_one_that_was_not(tiny_config, tiny_workdir, tmp_path, at):
  parts, stage, state, host = _begin(tiny_config(TINY), tiny_workdir)
  state, _ = _steps(stage, state, host, at)
  with Checkpointer(tmp_path / 'saved') as checkpointer:
    checkpointer.save(at, state, host.to_json(), wait=True)
    state, rest = _steps(stage, state, host, 4 - at)
    again = OfflineQStage(parts, 'offline_q')
    restored = checkpointer.restore(again.begin(LearnerState(parts.init_params(), {}, np.int32(0)), HostState()))
  other = restored.arrays
  again.warm_up(other)
  other, redone = _steps(again, other, HostState(**restored.host), 4 - at)
  assert redone == rest and rest[-1]['imitated'] > 0 and rest[-1]['applied'] == 1
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), jax.device_get(state))
  start = jax.device_get(parts.init_params())
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.reference), start)
  assert not np.array_equal(state.params['final_norm'], start['final_norm'])
  parts.close()


@pytest.mark.parametrize('key, value, words', [
    ('actions', '1', 'no choice but the logged action'), ('batch', '0', 'batch=0 must be at least 1'),
    ('gamma', '1.5', r'must lie in \[0, 1\]'), ('least_draws', '0', 'least_draws=0 must be at least 1'),
])
def test_bad_settings_are_refused_at_start(tiny_config, tiny_workdir, key, value, words):
  parts = build.build(tiny_config({**TINY, f'offline_q.{key}': value}), tiny_workdir)
  with pytest.raises(ValueError, match=words):
    OfflineQStage(parts, 'offline_q')
  parts.close()
