"""Identities of an update: how rows are packed, cut and spread over devices changes nothing.

Expected values are those of the same batch laid out in another way, or zeros where the mathematics
has no path.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import OBJECTIVES
from agentrl.algorithms import objective as objectives
from agentrl.models import transformer
from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params, param_axes
from agentrl.sharding import mesh as meshes
from agentrl.training import packing
from agentrl.training.optimizer import make_optimizer
from agentrl.training.state import LearnerState
from agentrl.training.step import make_score, make_update

pytestmark = pytest.mark.usefixtures('quick_compile')

VOCAB, LENGTH, TRAJECTORIES = 50, 32, 12
# A token that only ever stands at the end of a trajectory, after everything that is in the loss.
OBSERVED = 49


def _config(value_head=False):
  return ModelConfig(VOCAB, num_layers=2, width=16, ff_width=32, num_heads=4, num_kv_heads=4,
                     head_dim=4, value_head=value_head, unroll_layers=False)


@functools.cache
def _params(value_head=False):
  params = jax.jit(functools.partial(init_params, _config(value_head)))(jax.random.key(0))
  if value_head:  # It starts at zero, where its gradient with respect to the trunk would vanish.
    params['value']['weight'] = jax.random.normal(jax.random.key(1),
                                                  params['value']['weight'].shape)
  return jax.device_get(params)


def _objective(name):
  return OBJECTIVES.get(name)(kl_coef=0.1, entropy_coef=0.05)


def _sequences():
  """Prompt, turn, observation, turn; the lengths differ."""
  rng, made = np.random.default_rng(0), []
  for i in range(TRAJECTORIES):
    parts = [(False, 3 + i % 3), (True, 2 + i % 4), (False, 2), (True, 1 + i % 5)]
    mask = np.concatenate([np.full(n, sampled) for sampled, n in parts])
    tokens = rng.integers(1, OBSERVED, len(mask)).astype(np.int32)
    noise = 0.3 * rng.normal(size=len(mask))
    log_probs = np.where(mask, noise - np.log(VOCAB), np.nan).astype(np.float32)
    turns = np.repeat([0, 0, 1, 1], [n for _, n in parts]).astype(np.int32)
    made.append(packing.TokenSequence(tokens, mask, log_probs, turns, i))
  return made


def _alike():
  """The same, but those of a group begin alike, one of them beyond where another starts to draw, as forks do."""
  made = _sequences()
  for i, s in enumerate(made):
    first, shared = i - i % 4, 3 + i % 4 // 2 * 3
    tokens, mask = s.tokens.copy(), s.loss_mask.copy()
    tokens[:shared] = made[first].tokens[:shared]
    mask[:shared] &= i == first
    made[i] = s._replace(tokens=tokens, loss_mask=mask)
  return made


UNPACKED = packing.Plan([[i] for i in range(TRAJECTORIES)])


def _batch(rows, *, plan=None, micro_batches=1, sequences=None, share=False):
  """Returns a batch, values and reference following from each token alone, and what is used."""
  groups = np.arange(TRAJECTORIES, dtype=np.int32) // 4
  rewards = (np.arange(TRAJECTORIES) * 7 % 5 / 5).astype(np.float32)
  outcome = packing.Outcome(groups, rewards, np.ones(TRAJECTORIES, np.float32),
                            np.ones(TRAJECTORIES, bool))
  batch, used = packing.pack(sequences or _sequences(), outcome, rows=rows, row_length=LENGTH,
                             micro_batches=micro_batches, plan=plan, share=share)
  waves = np.sin(3.0 * batch.tokens + batch.positions).astype(np.float32)
  values = np.where(batch.segment_ids > 0, waves, 0.0).astype(np.float32)
  reference = batch.behaviour_log_probs + np.where(batch.loss_mask, 0.2 * waves, 0.0)
  reference = reference.astype(np.float32)
  return batch._replace(values=values, reference_log_probs=reference), used


def _state(name, optimizer, mesh=None):
  config = _config(name == 'ppo')
  params = jax.tree.map(jnp.array, _params(name == 'ppo'))
  if mesh is not None:
    params = jax.device_put(params, meshes.shardings(param_axes(config), params, mesh))
  return LearnerState(params, optimizer.init(params), np.int32(0))


@functools.cache
def _update(name, optimizer='adamw', micro_batches=1, mesh=None):
  """Returns the optimiser and the compiled update."""
  optimizer = make_optimizer(optimizer, 1e-2)
  return optimizer, make_update(_config(name == 'ppo'), optimizer, _objective(name),
                                micro_batches=micro_batches, mesh=mesh)


def _run(name, batch, used, *, micro_batches=1, mesh=None, updates=1):
  optimizer, update = _update(name, micro_batches=micro_batches, mesh=mesh)
  state, losses = _state(name, optimizer, mesh), []
  for _ in range(updates):
    state, metrics = update(state, batch, np.int32(used))
    losses.append(float(metrics['loss/total']))
  return state, np.array(losses), {k: float(v) for k, v in metrics.items()}


def _assert_trees_close(a, b, atol):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@functools.cache
def _loss_and_gradients(name):
  """Returns a compiled function from a batch to the loss of `_params` and its gradients."""
  config, objective = _config(name == 'ppo'), _objective(name)

  @jax.jit
  def compute(params, batch):
    micro = objective.prepare(batch)

    def loss(params):
      got = transformer.evaluate(params, config, micro.tokens, micro.positions, micro.segment_ids,
                                 with_entropy=True)
      return objective.loss(objectives.PolicyOutputs(*got), micro)[0]

    return jax.value_and_grad(loss)(params)

  return lambda batch: jax.device_get(compute(_params(name == 'ppo'), batch))


@pytest.mark.parametrize('name', ['grpo', 'ppo'])
def test_packed_rows_give_the_loss_and_gradients_of_one_trajectory_a_row(name):
  packed, _ = _batch(TRAJECTORIES)
  unpacked, _ = _batch(TRAJECTORIES, plan=UNPACKED)
  assert packed.segment_ids.max() > 1 == unpacked.segment_ids.max()
  loss, grads = _loss_and_gradients(name)(packed)
  other_loss, other_grads = _loss_and_gradients(name)(unpacked)
  np.testing.assert_allclose(loss, other_loss, atol=1e-5)
  _assert_trees_close(grads, other_grads, 1e-5)
  # The comparison is of something.
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-2


@pytest.mark.parametrize('name', ['grpo', 'ppo'])
def test_what_sequences_begin_with_once_gives_the_loss_and_gradients_of_each_with_its_own(name):
  shared, _ = _batch(TRAJECTORIES, sequences=_alike(), share=True)
  unpacked, _ = _batch(TRAJECTORIES, sequences=_alike(), plan=UNPACKED)
  left_out = (unpacked.segment_ids > 0).sum() - (shared.segment_ids > 0).sum()
  # Of each group one may leave out 2 tokens, and two may leave out 5, some of them in the loss of another; a row has not
  # room for all of a group.
  assert 3 * (2 + 5) <= left_out <= 3 * (2 + 5 + 5)
  assert shared.loss_mask.sum() == unpacked.loss_mask.sum()
  loss, grads = _loss_and_gradients(name)(shared)
  other_loss, other_grads = _loss_and_gradients(name)(unpacked)
  np.testing.assert_allclose(loss, other_loss, atol=1e-5)
  _assert_trees_close(grads, other_grads, 1e-5)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-2


@pytest.mark.parametrize('name', ['grpo', 'ppo'])
def test_a_last_observation_changes_nothing(name):
  # No token in the loss comes after it, so it has no way into the loss but as a target.
  last = (OBSERVED, False, np.nan, 2)  # token, mask, log-prob, turn
  sequences = [
      packing.TokenSequence(*(np.append(x, end).astype(x.dtype) for x, end in zip(s, last)),
                            s.trajectory) for s in _sequences()
  ]
  loss, grads = _loss_and_gradients(name)(_batch(TRAJECTORIES)[0])
  longer, _ = _batch(TRAJECTORIES, sequences=sequences)
  longer_loss, longer_grads = _loss_and_gradients(name)(longer)
  np.testing.assert_allclose(longer_loss, loss, atol=1e-6)
  _assert_trees_close(longer_grads, grads, 1e-6)


@pytest.mark.parametrize('name', ['grpo', 'ppo'])
def test_what_the_policy_did_not_draw_gets_exactly_no_gradient(name):
  # Through the whole loss, with KL, entropy and value terms, to log-probs, entropies and values of
  # every position.
  batch, _ = _batch(8)
  config, objective = _config(name == 'ppo'), _objective(name)

  @jax.jit
  def gradients(params, batch):
    micro = objective.prepare(batch)
    got = transformer.evaluate(params, config, batch.tokens, batch.positions, batch.segment_ids,
                               with_entropy=True)
    return jax.grad(lambda o: objective.loss(o, micro)[0])(objectives.PolicyOutputs(*got))

  grads = gradients(_params(name == 'ppo'), batch)
  assert (grads.values is None) == (name == 'grpo')
  for grad in (g for g in grads if g is not None):
    assert np.all(np.asarray(grad)[~batch.loss_mask] == 0.0)
    assert np.any(np.asarray(grad)[batch.loss_mask] != 0.0)


def test_micro_batches_and_their_padding_do_not_change_an_update():
  # PPO has all terms: whitened advantages, values, KL and entropy.
  batch, used = _batch(TRAJECTORIES, plan=UNPACKED)
  want, loss, metrics = _run('ppo', batch, used)
  assert metrics['applied'] == 1
  # 12 rows in 2 parts; 16 rows in 4 parts, of which the last is padding that is not run.
  for rows, micro_batches, used_parts in [(12, 2, 2), (16, 4, 3)]:
    batch, used = _batch(rows, plan=UNPACKED, micro_batches=micro_batches)
    assert used == used_parts
    state, other_loss, other = _run('ppo', batch, used, micro_batches=micro_batches)
    np.testing.assert_allclose(other_loss, loss, atol=1e-5)
    assert other == pytest.approx(metrics, abs=1e-4)
    # Adam divides gradients by their size: sums in another order may move what is almost 0.
    _assert_trees_close(state.params, want.params, 1e-4)


def test_micro_batches_of_rows_with_what_is_shared():
  want, loss, metrics = _run('ppo', *_batch(TRAJECTORIES, sequences=_alike(), plan=UNPACKED))
  batch, used = _batch(12, sequences=_alike(), micro_batches=4, share=True)
  assert 1 < used < 4
  state, other_loss, other = _run('ppo', batch, used, micro_batches=4)
  np.testing.assert_allclose(other_loss, loss, atol=1e-5)
  assert other == pytest.approx(metrics, rel=1e-5, abs=1e-4)
  _assert_trees_close(state.params, want.params, 1e-4)


def _shard_shape(x):
  return x.sharding.shard_shape(x.shape)


@pytest.mark.parametrize('shape, name, share', [
    ((8, 1, 1), 'ppo', True), ((2, 4, 1), 'grpo', False), ((1, 2, 4), 'ppo', False),
])
def test_eight_devices_make_the_updates_of_one(shape, name, share):
  if jax.device_count() < 8:
    pytest.skip('needs eight devices')
  batch = _batch(8, sequences=_alike(), share=share)
  want, losses, _ = _run(name, *batch, updates=3)
  mesh = meshes.make_mesh(dict(zip(('data', 'fsdp', 'tensor'), shape)), jax.devices()[:8])
  layout = jax.tree.map(_shard_shape, _state(name, _update(name)[0], mesh).params)
  state, other_losses, _ = _run(name, *batch, mesh=mesh, updates=3)
  np.testing.assert_allclose(other_losses, losses, atol=1e-5)
  _assert_trees_close(jax.device_get(state.params), jax.device_get(want.params), 1e-4)
  # They stay split as they were, moments too, or the next step would be another program.
  assert jax.tree.map(_shard_shape, state.params) == layout
  whole, part = state.params['layers']['up'].shape, layout['layers']['up']
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == whole]
  assert [_shard_shape(m) for m in moments] == [part] * 2
  assert part == (2, 16 // shape[1], 2, 32 // shape[2])  # [L, D / fsdp, 2, F / tensor]


@pytest.mark.parametrize('name, optimizer', [('grpo', 'muon'), ('ppo', 'adamw')])
def test_an_update_that_is_not_finite_is_not_applied(name, optimizer):
  batch, used = _batch(8)
  optimizer, update = _update(name, optimizer)
  state, metrics = update(_state(name, optimizer), batch, np.int32(used))
  assert metrics['applied'] == 1 and state.updates == 1
  before = jax.device_get(state)
  for field in ('behaviour_log_probs', 'rewards'):
    broken = getattr(batch, field).copy()
    broken[np.nonzero(batch.loss_mask) if broken.ndim == 2 else slice(0, 1)] = np.nan
    state, metrics = update(state, batch._replace(**{field: broken}), np.int32(used))
    assert metrics['applied'] == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def test_scores_are_those_of_the_policy_whatever_the_packing():
  score = make_score(_config(True), micro_batches=2)
  rows, used = _batch(12, plan=UNPACKED, micro_batches=2)
  log_probs, values = jax.device_get(score(_params(True), rows, np.int32(used)))
  got = jax.jit(functools.partial(transformer.evaluate, config=_config(True)))(
      _params(True), tokens=rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
  np.testing.assert_allclose(log_probs, np.where(rows.loss_mask, got.log_probs, 0.0), atol=1e-5)
  np.testing.assert_allclose(values, np.where(rows.segment_ids > 0, got.values, values), atol=1e-5)


def test_imitation_minimises_the_negative_log_likelihood():
  # By hand from the policy's own log-probs: the mean over the tokens of the mask.
  batch, used = _batch(8)
  batch = batch._replace(rewards=np.ones(TRAJECTORIES, np.float32))
  log_probs, _ = make_score(_config(), micro_batches=1)(_params(), batch, np.int32(used))
  want = -np.asarray(log_probs)[batch.loss_mask].mean()
  optimizer = make_optimizer('adamw', 1e-2)
  update = make_update(_config(), optimizer, OBJECTIVES.get('supervised')(), micro_batches=1)
  state, losses = _state('grpo', optimizer), []
  for _ in range(3):
    state, metrics = update(state, batch, np.int32(used))
    losses.append(float(metrics['loss/total']))
  assert losses[0] == pytest.approx(want, abs=1e-5)
  assert losses[2] < losses[1] < losses[0]
