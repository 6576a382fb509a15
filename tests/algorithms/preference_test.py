"""Tests of the losses of pairs.

Expected values are the definitions written out with numpy in float64, finite differences of those, and the identities of
direct preference optimisation.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import preference
from agentrl.algorithms.preference import PairScores, Pairs

# float32 against float64, of numbers around 1.
CLOSE = dict(rtol=2e-5, atol=2e-6)
LOSSES = {
    'dpo': {'beta': 0.3}, 'dpo_smooth': {'beta': 0.3, 'label_smoothing': 0.1}, 'ipo': {'beta': 0.2},
    'exo': {'beta': 0.4, 'label_smoothing': 0.05}, 'orpo': {'weight': 0.7},
    'sum': {'terms': {'odds': {'name': 'orpo', 'weight': {'schedule': 'switch', 'before': 1.0, 'after': 0.0, 'at': 3}},
                      'exact': {'name': 'exo', 'weight': 0.5}}},
}


def _make(label):
  return preference.make(label.split('_')[0], **LOSSES[label])


def _scores(seed=0, pairs=5):
  rng = np.random.default_rng(seed)
  chosen, rejected, ref_chosen, ref_rejected = -rng.uniform(1, 6, size=(4, pairs))
  return [chosen, rejected, ref_chosen, ref_rejected, *rng.integers(1, 9, size=(2, pairs)).astype(float)]


def _sigmoid(x):
  return 1 / (1 + math.exp(-x))


def _slow(label, w, l, rw, rl, nw, nl):
  """One pair's loss, from the definition."""
  m = (w - rw) - (l - rl)
  if label.startswith('dpo'):
    s = LOSSES[label].get('label_smoothing', 0.0)
    return -(1 - s) * math.log(_sigmoid(0.3 * m)) - s * math.log(_sigmoid(-0.3 * m))
  if label == 'ipo':
    return (m - 1 / (2 * 0.2))**2
  if label == 'exo':
    p, q = _sigmoid(0.4 * m), 1 - 0.05
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
  odds = lambda mean: math.exp(mean) / (1 - math.exp(mean))
  return -w / nw - 0.7 * math.log(_sigmoid(math.log(odds(w / nw) / odds(l / nl))))


@pytest.mark.parametrize('label', [x for x in LOSSES if x != 'sum'])
def test_losses_and_their_gradients_are_the_definitions(label):
  columns, loss = _scores(), _make(label)
  given = [jnp.asarray(c, jnp.float32) for c in columns]
  got = loss.function(PairScores(*given), 0)
  want = [_slow(label, *row) for row in zip(*columns)]
  np.testing.assert_allclose(got, want, **CLOSE)
  # Central differences in float64 of the slow definition.
  grads = jax.grad(lambda w, l: jnp.sum(loss.function(PairScores(w, l, *given[2:]), 0)), argnums=(0, 1))(*given[:2])
  for which, grad in enumerate(grads):
    for p, row in enumerate(zip(*columns)):
      moved = [list(row), list(row)]
      moved[0][which] += 1e-5
      moved[1][which] -= 1e-5
      slope = (_slow(label, *moved[0]) - _slow(label, *moved[1])) / 2e-5
      np.testing.assert_allclose(grad[p], slope, rtol=1e-3, atol=1e-5)


def test_a_sum_weighs_its_terms_by_the_step():
  given = PairScores(*(jnp.asarray(c, jnp.float32) for c in _scores()))
  odds, exact = preference.make('orpo').function(given, 0), preference.make('exo').function(given, 0)
  made = _make('sum')
  np.testing.assert_allclose(made.function(given, 2), odds + 0.5 * exact, rtol=1e-6)
  np.testing.assert_allclose(made.function(given, 3), 0.5 * exact, rtol=1e-6)
  assert made.needs_reference


def test_at_the_reference_the_loss_is_log_2_and_only_the_difference_counts():
  w, l, *_, n, k = (jnp.asarray(c, jnp.float32) for c in _scores())
  np.testing.assert_allclose(_make('dpo').function(PairScores(w, l, w, l, n, k), 0), math.log(2), rtol=1e-6)
  # The reverse KL is 0 exactly where the implicit preference is the label's.
  at_label = jnp.full(1, math.log(0.95 / 0.05) / 0.4, jnp.float32)
  np.testing.assert_allclose(preference.exo_loss(at_label, beta=0.4, label_smoothing=0.05), 0.0, atol=1e-6)
  np.testing.assert_allclose(preference.ipo_loss(jnp.full(1, 2.5), beta=0.2), 0.0, atol=1e-9)


@pytest.mark.parametrize('label', ['dpo', 'ipo', 'exo', 'orpo'])
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(label):
  w, l, *_, n, k = (jnp.asarray(c, jnp.float32) for c in _scores())
  of = lambda w, l: jnp.sum(_make(label).function(PairScores(w, l, jnp.full(5, -3.), jnp.full(5, -3.), n, k), 0))
  up, down = jax.grad(of, argnums=(0, 1))(jnp.full(5, -3.), jnp.full(5, -3.))
  assert (up < 0).all() and (down > 0).all()
  if label != 'orpo':
    # What both have in common, such as a prefix, cancels.
    np.testing.assert_allclose(up, -down, rtol=1e-6)


def test_sums_of_trajectories_follow_the_ids_wherever_they_are():
  rng = np.random.default_rng(0)
  values, ids = rng.normal(size=(3, 8)).astype(np.float32), rng.integers(-1, 4, size=(3, 8)).astype(np.int32)
  got = preference.sums_of_trajectories(jnp.asarray(values), jnp.asarray(ids), 5)
  np.testing.assert_allclose(got, [values[ids == i].sum() for i in range(5)], rtol=1e-5, atol=1e-6)


def test_pairs_of_weight_0_are_not_read():
  rng = np.random.default_rng(0)
  log_probs = jnp.asarray(-rng.uniform(1, 5, 6), jnp.float32).at[5].set(jnp.nan)
  pairs = Pairs(jnp.array([0, 2, 5]), jnp.array([1, 3, 4]), jnp.array([.5, .5, 0.], jnp.float32))
  of = lambda x: preference.pair_loss(_make('dpo'), x, jnp.full(6, -3.), jnp.full(6, 4.), pairs)
  (loss, metrics), grad = jax.value_and_grad(of, has_aux=True)(log_probs)
  margins = [float(log_probs[0] - log_probs[1]), float(log_probs[2] - log_probs[3])]
  np.testing.assert_allclose(loss, np.mean([-math.log(_sigmoid(0.3 * m)) for m in margins]), **CLOSE)
  np.testing.assert_allclose(metrics['margin'], np.mean(margins), **CLOSE)
  np.testing.assert_allclose(metrics['accuracy'], np.mean([m > 0 for m in margins]))
  np.testing.assert_array_equal(grad[4:5], 0)


def test_normalised_weights_make_a_mean_of_means():
  weights, labels = jnp.array([1., 3., 2., 0.]), jnp.array([0, 0, 2, 1])
  # Three heads, one of them without a pair: thirds, split by weight within each.
  np.testing.assert_allclose(preference.normalised(weights, labels, 3), [1 / 12, 3 / 12, 4 / 12, 0], rtol=1e-6)


@pytest.mark.parametrize('name, options, words', [
    ('dpo', {'beta': 0.0}, "beta=0.0 of preference loss 'dpo' must be above 0"),
    ('dpo', {'label_smoothing': 0.5}, r'must lie in \[0, 0.5\)'),
    ('exo', {'label_smoothing': 0.0}, "infinite without; take 'dpo'"),
    ('orpo', {'beta': 0.1}, "unexpected keyword argument 'beta'; known: weight"),
])
def test_bad_options_are_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    preference.make(name, **options)
