"""CISPO with a token mask: PPO's set of tokens without gradient, CISPO's weights on the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from agentrl.algorithms import cispo, clips

RATIOS = np.float32([[.1, .5, .79, .81, 1., 1.19, 1.25, 2., 5., 50.]] * 2)
ADVANTAGES = np.float32([[1.5] * 10, [-.5] * 10])


def _gradient(rule):
  return np.asarray(jax.grad(lambda l: jnp.sum(rule(jnp.exp(l), ADVANTAGES, l).loss))(np.log(RATIOS)))


def test_it_stops_exactly_the_tokens_that_ppo_stops():
  np.testing.assert_array_equal(_gradient(cispo.weight_sg_masked) == 0, _gradient(clips.asym) == 0)


def test_the_others_keep_cispos_weight():
  masked, plain = _gradient(cispo.weight_sg_masked), _gradient(clips.weight_sg)
  np.testing.assert_allclose(masked[masked != 0], plain[masked != 0])
  assert np.all(plain != 0)
