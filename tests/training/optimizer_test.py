"""Tests of schedules and optimisers.

Expected values are the schedules' own end points and Muon's identity: what it applies to a matrix
has all singular values nearly equal.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agentrl.models.config import ModelConfig
from agentrl.models.params import init_params
from agentrl.training.optimizer import make_optimizer, schedule

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = ModelConfig(vocab_size=40, num_layers=2, width=16, ff_width=32, num_heads=4,
                     num_kv_heads=2, head_dim=8, qk_norm=True)


@pytest.mark.parametrize('name, end', [('constant', 1.0), ('linear', 0.1), ('cosine', 0.1)])
@pytest.mark.parametrize('warmup', [0, 4])
def test_schedules_rise_and_end_where_they_should(name, end, warmup):
  rate = schedule(name, 2.0, 24, warmup)
  assert rate(warmup) == pytest.approx(2.0)
  assert rate(24) == pytest.approx(2.0 * end)
  # Halfway down, by symmetry, linear and cosine are in the middle between peak and end.
  assert rate(warmup + (24 - warmup) // 2) == pytest.approx(2.0 * (1 + end) / 2)
  if warmup:
    assert rate(0) == 0.0 and rate(2) == pytest.approx(1.0)


def test_a_stage_shorter_than_its_warmup_still_has_a_schedule():
  assert np.isfinite(schedule('cosine', 1.0, 2, 5)(7))


def test_unknown_names_are_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="schedule 'cosin' is unknown; known: constant, linear"):
    schedule('cosin', 1.0, 10, 0)
  with pytest.raises(ValueError, match="optimiser 'adam' is unknown; known: adafactor, adamw, muon"):
    make_optimizer('adam', 1e-3)


@functools.cache
def _updates(name, **options):
  """Returns parameters, random gradients and what the first update would add."""
  params = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  grads = tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])
  optimizer = make_optimizer(name, 0.1, **options)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  return params, grads, updates


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_updates_have_the_shapes_of_the_parameters(name):
  params, _, updates = _updates(name)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_adamw_moves_every_parameter_by_the_learning_rate_at_first():
  # Adam's first update is -rate * g / (|g| + eps).
  _, grads, updates = _updates('adamw', max_grad_norm=0.0)
  for update, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(grads)):
    np.testing.assert_allclose(update, -0.1 * np.sign(grad), rtol=1e-3)


def test_adafactor_divides_a_gradient_by_its_rows_and_columns_and_keeps_no_more_than_those():
  # The first update of a gradient u v^T, which rows and columns describe wholly, is its sign times the rate.
  rng = np.random.default_rng(0)
  grad = {'w': jnp.asarray(np.outer(rng.normal(size=160), rng.normal(size=130)), jnp.float32)}
  params = {'w': jnp.full((160, 130), 2.0)}
  optimizer = make_optimizer('adafactor', 0.1, max_grad_norm=0.0, weight_decay=0.5)
  state = optimizer.init(params)
  assert sum(x.size for x in jax.tree.leaves(state)) < 1_000
  updates, _ = optimizer.update(grad, state, params)
  np.testing.assert_allclose(updates['w'], -0.1 * (np.sign(grad['w']) + 0.5 * 2.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('leaf, rows', [
    ('qkv', 16), ('out', 4 * 8), ('up', 16), ('down', 32),
])
def test_muon_orthogonalises_each_matrix_of_each_layer(leaf, rows):
  # `rows` is the number of inputs of the projection: width, heads x head_dim, width, ff_width.
  _, grads, updates = _updates('muon')
  for update, grad in zip(updates['layers'][leaf], grads['layers'][leaf]):
    matrix, raw = np.reshape(update, (rows, -1)), np.reshape(grad, (rows, -1))
    values = np.linalg.svd(matrix, compute_uv=False)
    # Five Newton-Schulz steps bring singular values to within 0.7 to 1.2 of each other, wherever
    # they began.
    assert values.max() / values.min() < 2.0 < np.linalg.cond(raw)
    # consistent_rms: the mean square of an update is (0.2 rate)^2, whatever the matrix's shape.
    np.testing.assert_allclose(np.sqrt(np.mean(matrix**2)), 0.2 * 0.1, rtol=0.2)
    assert np.sum(matrix * raw) < 0


def test_muon_leaves_embeddings_and_norms_to_adam():
  # Adam with Nesterov momentum: the first update is larger by b1 / (1 + b1).
  _, grads, updates = _updates('muon', max_grad_norm=0.0)
  first = -0.1 * (1 + 0.9 / 1.9)
  for of in (lambda t: t['embedding'], lambda t: t['final_norm'],
             lambda t: t['layers']['query_norm']):
    np.testing.assert_allclose(of(updates), first * np.sign(of(grads)), rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm():
  # Adam's first update hides the scale, its first moment shows it.
  params = {'w': jnp.zeros(2)}
  optimizer = make_optimizer('adamw', 0.1, max_grad_norm=1.0)
  _, state = optimizer.update({'w': jnp.array([30.0, 40.0])}, optimizer.init(params), params)
  (mu,) = [
      s.mu['w']
      for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
      if isinstance(s, optax.ScaleByAdamState)
  ]
  np.testing.assert_allclose(mu, 0.1 * np.array([0.6, 0.8]), rtol=1e-5)  # (1 - b1) g / |g|
