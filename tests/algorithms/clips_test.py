"""Clip rules by the cases of their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import clips

RATIOS = np.float32([[.1, .5, .79, .81, 1., 1.19, 1.25, 2., 5., 50.]] * 2)
ADVANTAGES = np.float32([[1.5] * 10, [-.5] * 10])
LOG_PROBS = np.log(RATIOS)  # as if the behaviour's were 0, so that d ratio / d log-prob = ratio


def _gradient(rule, **bounds):
  """Of the summed loss, by log-probability, through ratio and log-probability both."""
  f = lambda l: jnp.sum(rule(jnp.exp(l), ADVANTAGES, l, **bounds).loss)
  return np.asarray(jax.grad(f)(LOG_PROBS))


def _loop(function):
  return np.vectorize(function)(RATIOS.astype(np.float64), ADVANTAGES, LOG_PROBS)


def _ppo(lower, upper, dual=None):
  def loss(r, a, _):
    value = max(-a * r, -a * min(max(r, lower), upper))
    return min(value, -a * dual) if dual and a < 0 else value
  return loss


@pytest.mark.parametrize('rule, bounds, definition', [
    (clips.none, {}, lambda r, a, l: -a * r),
    (clips.log_likelihood, {}, lambda r, a, l: -a * l),
    (clips.asym, {}, _ppo(.8, 1.2)),
    (clips.asym, {'low': .3, 'high': .5}, _ppo(.7, 1.5)),
    (clips.asym, {'high': .28, 'dual': 10.}, _ppo(.8, 1.28, 10)),
    (clips.recip, {'high': .25}, _ppo(.8, 1.25)),
    (clips.weight_sg, {}, lambda r, a, l: -min(max(r, .8), 1.2) * a * l),
    (clips.one_sided_neg, {}, lambda r, a, l: -(1 if a > 0 else min(r, 1)) * a * l),
])
def test_losses_equal_the_definition(rule, bounds, definition):
  got = rule(RATIOS, ADVANTAGES, LOG_PROBS, **bounds).loss
  np.testing.assert_allclose(got, _loop(definition), rtol=1e-5, atol=1e-6)


def test_asym_loses_the_gradient_exactly_where_its_flags_say():
  clipped = clips.asym(RATIOS, ADVANTAGES, LOG_PROBS, low=.2, high=.28, dual=10.)
  cut = np.asarray(clipped.low | clipped.high)
  np.testing.assert_array_equal(_gradient(clips.asym, low=.2, high=.28, dual=10.) == 0, cut)
  # PPO's rule: too high for a good token, too low for a bad one; dual: far too high for a bad one.
  np.testing.assert_array_equal(clipped.high, [RATIOS[0] > 1.28, RATIOS[1] > 10])
  np.testing.assert_array_equal(clipped.low, [np.zeros(10), RATIOS[1] < .8])


def test_no_token_loses_its_gradient_under_weight_sg():
  # The gradient of -sg(w) A l is -w A.
  np.testing.assert_allclose(_gradient(clips.weight_sg), -np.clip(RATIOS, .8, 1.2) * ADVANTAGES,
                             rtol=1e-5)


def test_weight_sg_without_a_lower_bound_keeps_small_ratios():
  np.testing.assert_allclose(_gradient(clips.weight_sg, low=1.),
                             -np.minimum(RATIOS, 1.2) * ADVANTAGES, rtol=1e-5)


def test_one_sided_neg_weighs_bad_tokens_by_at_most_one():
  want = np.where(ADVANTAGES > 0, 1, np.minimum(RATIOS, 1)) * -ADVANTAGES
  np.testing.assert_allclose(_gradient(clips.one_sided_neg), want, rtol=1e-5)


def test_a_dual_bound_inside_the_band_is_refused():
  with pytest.raises(ValueError, match='dual'):
    clips.asym(RATIOS, ADVANTAGES, LOG_PROBS, dual=1.1)


@pytest.mark.parametrize('rule', [clips.none, clips.asym, clips.recip, clips.weight_sg,
                                  clips.one_sided_neg, clips.log_likelihood])
def test_no_gradient_reaches_the_advantages(rule):
  f = lambda a: jnp.sum(rule(RATIOS, a, LOG_PROBS).loss)
  np.testing.assert_array_equal(jax.grad(f)(ADVANTAGES), np.zeros_like(ADVANTAGES))
