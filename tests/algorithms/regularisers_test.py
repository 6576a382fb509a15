"""Regularisers against their definitions, and what their gradients estimate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import regularisers

L = np.float32([[-1., -2., -.5, -3.]])
Q = np.float32([[-1., -1., -2.5, -9.]])
MASK = np.bool_([[1, 1, 1, 0]])


@pytest.mark.parametrize('estimator, definition', [
    ('k1', lambda l, q: l - q),
    ('k2', lambda l, q: (l - q)**2 / 2),
    ('k3', lambda l, q: np.exp(q - l) - (q - l) - 1),
    ('abs', lambda l, q: abs(l - q)),
])
def test_kl_equals_the_definition_and_plus_only_changes_the_gradient(estimator, definition):
  want = np.where(MASK, definition(L.astype(np.float64), Q), 0)
  for name in (estimator, estimator + '+'):
    np.testing.assert_allclose(regularisers.kl(L, Q, MASK, estimator=name), want, rtol=1e-5)
  gradient = jax.grad(lambda l: jnp.sum(regularisers.kl(l, Q, MASK, estimator=estimator + '+')))(L)
  # The gradient of k2 is l - q.
  np.testing.assert_allclose(gradient, np.where(MASK, L - Q, 0), rtol=1e-5)


def test_expected_gradient_of_k2_is_that_of_the_divergence_and_of_k1_is_zero():
  # Over a vocabulary of four, in expectation under the policy, all tokens enumerated.
  logits, reference = jnp.array([.3, -1., .7, 0.]), jax.nn.log_softmax(jnp.array([1., 0., -1., .5]))
  mask = jnp.ones((1, 4), bool)

  def expected(x, estimator):
    log_probs = jax.nn.log_softmax(x)
    kl = regularisers.kl(log_probs[None], reference[None], mask, estimator=estimator)[0]
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_probs)) * kl)

  def divergence(x):
    log_probs = jax.nn.log_softmax(x)
    return jnp.sum(jnp.exp(log_probs) * (log_probs - reference))

  np.testing.assert_allclose(jax.grad(expected)(logits, 'k2'), jax.grad(divergence)(logits),
                             atol=1e-6)
  np.testing.assert_allclose(jax.grad(expected)(logits, 'k3+'), jax.grad(divergence)(logits),
                             atol=1e-6)
  np.testing.assert_allclose(jax.grad(expected)(logits, 'k1'), np.zeros(4), atol=1e-6)


def test_a_vanishing_log_prob_gives_a_bounded_penalty():
  far = np.full((1, 4), -1e30, np.float32)
  value, gradient = jax.value_and_grad(lambda l: jnp.sum(regularisers.kl(l, Q, MASK)))(far)
  # Three tokens at the clamp of 10.
  assert value == 30.0
  assert np.all(np.isfinite(gradient))


def test_an_unknown_estimator_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match='k1, k2, k3, abs'):
    regularisers.kl(L, Q, MASK, estimator='k4')


@pytest.mark.parametrize('clip', [.5, None])
def test_value_loss_equals_the_definition(clip):
  rng = np.random.default_rng(0)
  v, old, target = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(3))
  mask = rng.random((3, 5)) < .7

  def one(v, old, target):
    bounded = v if clip is None else min(max(v, old - clip), old + clip)
    return max((v - target)**2, (bounded - target)**2) / 2

  want = np.where(mask, np.vectorize(one)(v, old, target), 0)
  np.testing.assert_allclose(regularisers.value_loss(v, old, target, mask, clip=clip), want,
                             rtol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_masked_out_has_exactly_zero_gradient_even_if_not_finite(bad):
  dirty = np.where(MASK, L, np.float32(bad))
  terms = {
      'kl': lambda x: regularisers.kl(x, dirty, MASK),
      'entropy': lambda x: regularisers.entropy(x, MASK),
      'value': lambda x: regularisers.value_loss(x, dirty, dirty, MASK),
  }
  for term in terms.values():
    gradient = jax.grad(lambda x: jnp.sum(term(x)))(dirty)
    assert np.all(np.isfinite(gradient)) and gradient[0, 3] == 0
