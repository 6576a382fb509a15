"""AEPO's two parts: entropy-aware credit, and the clip that keeps gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import clips, entropy_scale, make
from agentrl.algorithms.examples import example_batch

RATIOS = np.float32([[.1, .5, .79, .81, 1., 1.19, 1.25, 2., 5., 50.]] * 2)
ADVANTAGES = np.float32([[1.5] * 10, [-.5] * 10])


def _loss(rule, log_ratios):
  return rule(jnp.exp(log_ratios), ADVANTAGES, log_ratios, high=.28, dual=3.)


def test_the_value_is_that_of_the_plain_clip():
  got, plain = (_loss(rule, np.log(RATIOS)) for rule in (entropy_scale.grad_preserve, clips.asym))
  np.testing.assert_allclose(got.loss, plain.loss, rtol=1e-6)


def test_the_gradient_by_cases():
  gradient = jax.grad(lambda l: jnp.sum(_loss(entropy_scale.grad_preserve, l).loss))(np.log(RATIOS))
  factor = np.where(ADVANTAGES > 0, np.minimum(RATIOS, 1.28), np.where(RATIOS < .8, 0, RATIOS))
  factor = np.where((ADVANTAGES < 0) & (RATIOS > 3), 0, factor)  # the dual bound
  np.testing.assert_allclose(gradient, -ADVANTAGES * factor, rtol=1e-5)


def test_the_plain_clip_loses_what_this_one_keeps():
  gradient = jax.grad(lambda l: jnp.sum(_loss(clips.asym, l).loss))(np.log(RATIOS))
  np.testing.assert_array_equal(np.asarray(gradient)[0][RATIOS[0] > 1.28], 0)


@pytest.mark.parametrize('over', ['batch', 'group'])
def test_advantages_grow_with_entropy(over):
  batch, _ = example_batch(4, reads=['entropy'])
  plain = np.asarray(make('compose').estimate(batch).advantages)[0]
  made = make('compose', channels={'p': {'maps': {'name': 'entropy_scale', 'over': over}}})
  entropy, group = batch.token_parts['entropy'], batch.group_ids[batch.trajectory_ids]
  z = np.zeros(plain.shape)
  for g in range(3):
    among = batch.loss_mask & ((group == g) if over == 'group' else True)
    if over == 'group' or g == 0:
      z[among] = (entropy[among] - entropy[among].mean()) / (entropy[among].std() + 1e-6)
  np.testing.assert_allclose(np.asarray(made.estimate(batch).advantages)[0], plain * (1 + .2 * z), rtol=1e-4, atol=1e-5)


def test_equal_entropies_change_nothing():
  batch, _ = example_batch(4, reads=['entropy'])
  batch = batch._replace(token_parts={'entropy': np.full_like(batch.token_parts['entropy'], .7)})
  made = make('compose', channels={'p': {'maps': 'entropy_scale'}})
  np.testing.assert_allclose(made.estimate(batch).advantages, make('compose').estimate(batch).advantages, rtol=1e-6)


def test_an_unknown_span_is_refused():
  batch, _ = example_batch(4, reads=['entropy'])
  with pytest.raises(ValueError, match='over'):
    make('compose', channels={'p': {'maps': {'name': 'entropy_scale', 'over': 'row'}}}).estimate(batch)
