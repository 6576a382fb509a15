"""Tokens of large covariance: which they are, how many are chosen, and that layout has no say in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import covariance, make
from agentrl.algorithms.examples import example_batch


def _batch(packed=True, **kwargs):
  return example_batch(6, packed=packed, **kwargs)


def _covariances(batch):
  a = np.asarray(make('compose').estimate(batch).advantages)[0]
  m = batch.loss_mask
  c = (a - a[m].mean()) * (batch.behaviour_log_probs - batch.behaviour_log_probs[m].mean())
  return a, np.where(m, c, 0)


def test_covariances_by_their_definition():
  batch, _ = _batch()
  a, c = _covariances(batch)
  np.testing.assert_allclose(covariance.covariance(a, batch.behaviour_log_probs, batch.loss_mask), c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('ratio, count, want', [(2e-4, 5000, 1), (2e-4, 4999, 1), (2e-4, 10000, 2), (2e-4, 9999, 1),
                                                (.02, 100, 2), (.5, 3, 1), (1e-6, 3, 1)])
def test_how_many_a_share_is(ratio, count, want):
  # max(1, int(ratio n)), where 2e-4 * 5000 is 1 and not a little less.
  mask = np.arange(10_000).reshape(100, 100) < count
  assert int(covariance.share_of(ratio, jnp.asarray(mask))) == want


def _dropped(batch, **options):
  made = make('compose', channels={'p': {'maps': {'name': 'clip_cov', **options}}})
  plain, left = (np.asarray(m.estimate(batch).advantages)[0] for m in (make('compose'), made))
  np.testing.assert_array_equal(left[left != 0], plain[left != 0])
  return (left == 0) & (plain != 0)


@pytest.mark.parametrize('ratio', [.001, .05, .2, 1.])
def test_chosen_tokens_lie_in_the_band_and_are_so_many(ratio):
  batch, _ = _batch()
  a, c = _covariances(batch)
  among = (c > .05) & (c < .6) & (a != 0)
  dropped = _dropped(batch, ratio=ratio, low=.05, high=.6)
  assert np.all(among[dropped])
  assert dropped.sum() == min(among.sum(), max(1, int(ratio * batch.loss_mask.sum())))


def test_the_choice_changes_with_step_and_seed_and_not_with_rows():
  options = dict(ratio=.1, low=.01, high=50.)
  batch, _ = _batch()
  loose, _ = _batch(packed=False)
  first = _dropped(batch, **options)
  # The same tokens, in the order of trajectories, wherever they lie.
  np.testing.assert_array_equal(first[batch.loss_mask], _dropped(loose, **options)[loose.loss_mask])
  order = np.random.default_rng(0).permutation(len(batch.tokens))
  moved = batch._replace(**{k: v[order] for k, v in batch._asdict().items() if isinstance(v, np.ndarray) and v.ndim == 2})
  np.testing.assert_array_equal(_dropped(moved, **options), first[order])
  assert np.any(_dropped(batch._replace(step=np.int32(1)), **options) != first)
  assert np.any(_dropped(batch, **options, seed=1) != first)


def test_all_tokens_have_the_same_chance():
  # 600 draws among n tokens: each is the smallest about 600 / n times; the bounds are 6 deviations away.
  batch, _ = _batch()
  inside = batch.loss_mask
  draw = jax.jit(lambda step: covariance.token_draws(batch._replace(step=step)))
  hits = np.zeros(inside.shape)
  for step in range(600):
    draws = np.where(inside, np.asarray(draw(step)), np.uint32(2**32 - 1))
    hits.flat[np.argmin(draws)] += 1
  expected = 600 / inside.sum()
  assert np.all(hits[~inside] == 0) and hits[inside].max() < expected + 6 * expected**.5 + 1
  assert (hits[inside] > 0).mean() > .9


def test_the_penalty_is_on_the_largest_covariances():
  batch, outputs = _batch()
  made = make('compose', channels={'p': {'clip': 'none'}}, regularisers={'kl_cov': {'coef': 1., 'ratio': .1}})
  prepared = made.prepare(batch)
  weights = np.asarray(prepared.regulariser_weights)[:, 0]
  count = max(1, int(.1 * batch.loss_mask.sum()))
  _, c = _covariances(batch)
  assert (weights != 0).sum() == count
  assert c[weights != 0].min() >= np.sort(c[batch.loss_mask])[-count] - 1e-6
  np.testing.assert_allclose(weights[weights != 0], 1 / batch.loss_mask.sum(), rtol=1e-6)
  _, metrics = made.loss(outputs, prepared)
  drift = np.abs(outputs.log_probs - batch.behaviour_log_probs)
  np.testing.assert_allclose(metrics.sums['loss/kl_cov'][0], (weights * drift).sum(), rtol=1e-5)


def test_at_the_first_update_the_penalty_is_nothing_and_a_run_with_one_is_refused():
  batch, outputs = _batch()
  made = make('compose', regularisers={'kl_cov': 1.})
  still = outputs._replace(log_probs=batch.behaviour_log_probs)
  with_term, without = (jax.grad(lambda o, m=m: m.loss(o, m.prepare(batch))[0])(still).log_probs
                        for m in (made, make('compose')))
  np.testing.assert_array_equal(with_term, without)
  settings = dict(group_size=2, value_head=False, reference=False)
  with pytest.raises(ValueError, match="'kl_cov'.*single update.*rl.minibatches"):
    made.check(**settings, updates=1)
  made.check(**settings, updates=2)


def test_single_tokens_and_ratios_of_sequences_do_not_go_together():
  for ratio in ('sequence_geo', 'trajectory_prod'):
    with pytest.raises(ValueError, match=f"'clip_cov'.*'{ratio}'.*take ratio 'token'"):
      make('compose', channels={'p': {'maps': 'clip_cov', 'ratio': ratio}})
