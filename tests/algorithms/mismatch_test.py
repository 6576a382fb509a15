"""Where sampler and learner disagree: by hand, and nothing where they agree."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.algorithms import make, mismatch, objective, ratios
from agentrl.algorithms.examples import example_batch


def _batch(packed=True):
  batch, _ = example_batch(8, packed=packed, reads=['sampler_log_prob'])
  noise = np.where(batch.loss_mask, .3 * np.sin(7.0 * batch.tokens), 0)
  return batch._replace(token_parts={'sampler_log_prob': (batch.behaviour_log_probs - noise).astype(np.float32)})


def _maps(batch, **options):
  plain, changed = (np.asarray(make('compose', channels={'p': {'maps': maps}}).estimate(batch).advantages)[0]
                    for maps in ((), (options,)))
  return plain, changed


def _level(batch, level):
  gap = batch.behaviour_log_probs - batch.token_parts['sampler_log_prob']
  runs = np.asarray(ratios.run_ids(batch.loss_mask, batch.segment_ids, batch.turn_ids))
  whole = batch.segment_ids
  ids = {'segment': runs, 'segment_product': runs, 'sequence': whole, 'product': whole}.get(level)
  over = np.sum if 'product' in level else np.mean
  out = gap.copy()
  for b in range(len(gap)) if ids is not None else ():
    for i in np.unique(ids[b]):
      own = (ids[b] == i) & batch.loss_mask[b]
      out[b, own] = over(gap[b, own]) if own.any() else 0
  return np.exp(out)


@pytest.mark.parametrize('level', mismatch.LEVELS)
def test_what_lies_outside_the_band_has_no_advantage(level):
  batch = _batch()
  plain, changed = _maps(batch, name='mismatch_mask', level=level, low=.9, high=1.1)
  ratio = _level(batch, level)
  inside = (ratio >= .9) & (ratio <= 1.1)
  assert 0 < inside[batch.loss_mask].mean() < 1
  np.testing.assert_array_equal(changed, np.where(inside & batch.loss_mask, plain, 0))


@pytest.mark.parametrize('level', mismatch.LEVELS)
def test_weights_are_capped_and_far_tokens_veto_their_sequence(level):
  batch = _batch()
  plain, changed = _maps(batch, name='mismatch_weight', level=level, cap=1.05, veto=.75)
  tokens, want = _level(batch, 'token'), np.minimum(_level(batch, level), 1.05)
  vetoed = 0
  for b in range(len(plain)):
    for i in np.unique(batch.segment_ids[b]):
      own = (batch.segment_ids[b] == i) & batch.loss_mask[b]
      if own.any() and tokens[b, own].min() < .75:
        want[b, own], vetoed = 0, vetoed + 1
  assert 0 < vetoed < 12
  np.testing.assert_allclose(changed, plain * want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('options, bounded', [
    ({'name': 'mismatch_weight', 'cap': 1.05}, lambda ratio: ratio > 1.05),
    ({'name': 'mismatch_mask', 'level': 'segment', 'low': .9, 'high': 1.1}, lambda ratio: (ratio < .9) | (ratio > 1.1)),
])
def test_the_share_of_bounded_weights_is_a_metric(options, bounded):
  batch, outputs = _batch(), example_batch(8)[1]
  made = make('compose', channels={'p': {'maps': (options,)}})
  _, metrics = made.loss(outputs, made.prepare(batch))
  share = bounded(_level(batch, options.get('level', 'token')))[batch.loss_mask].mean()
  found = float(objective.summarise(metrics)[f'p/{options["name"]}_share'])
  assert 0 < share < 1 and found == pytest.approx(share, abs=1e-6)


def test_a_stale_token_is_weighed_by_how_much_likelier_it_has_become():
  """A policy of two tokens: the older one drew token 1 at probability 1/4, the present one has it at 3/4."""
  batch, _ = example_batch(8, reads=['sampler_log_prob'])
  older, present = np.log(np.float32(.25)), np.log(np.float32(.75))
  log_probs = lambda x: np.where(batch.loss_mask, x, 0).astype(np.float32)
  batch = batch._replace(behaviour_log_probs=log_probs(present), token_parts={'sampler_log_prob': log_probs(older)})
  for cap, weight in ((10.0, 3.0), (2.0, 2.0)):
    plain, changed = _maps(batch, name='mismatch_weight', cap=cap)
    np.testing.assert_allclose(changed, weight * plain, rtol=1e-5)
  # A turn of n tokens as a whole: 3 to the n.
  runs = np.asarray(ratios.run_ids(batch.loss_mask, batch.segment_ids, batch.turn_ids))
  lengths = np.stack([np.bincount(row, minlength=64)[row] for row in runs])
  plain, changed = _maps(batch, name='mismatch_weight', level='segment_product', cap=1e9)
  np.testing.assert_allclose(changed, plain * np.where(batch.loss_mask, 3.0 ** lengths, 0), rtol=1e-4)
  assert lengths[batch.loss_mask].max() > 2


def test_tokens_older_than_a_lag_are_left_out():
  batch, _ = example_batch(8, reads=['lag'])
  plain, changed = _maps(batch, name='lag_mask', most=1)
  lag = batch.token_parts['lag']
  assert (lag > 1).any() and (plain[lag > 1] != 0).any()
  np.testing.assert_array_equal(changed, np.where(lag > 1, 0, plain))


@pytest.mark.parametrize('name', ['mismatch_mask', 'mismatch_weight'])
def test_where_both_agree_or_the_sampler_is_unknown_nothing_happens(name):
  batch = _batch()
  for sampler in (batch.behaviour_log_probs, np.full_like(batch.behaviour_log_probs, np.nan)):
    plain, changed = _maps(batch._replace(token_parts={'sampler_log_prob': sampler}), name=name)
    np.testing.assert_allclose(changed, plain, rtol=1e-6)


def test_it_needs_log_probs_that_the_learner_computed():
  made = make('compose', channels={'p': {'maps': 'mismatch_weight'}})
  settings = dict(group_size=2, value_head=False, reference=False)
  made.check(**settings, recomputed=True)
  with pytest.raises(ValueError, match='rl.recompute_behaviour'):
    made.check(**settings, recomputed=False)


@pytest.mark.parametrize('name', ['mismatch_mask', 'mismatch_weight'])
def test_an_unknown_level_is_refused(name):
  with pytest.raises(ValueError, match='level'):
    _maps(_batch(), name=name, level='row')
