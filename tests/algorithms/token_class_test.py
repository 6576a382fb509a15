"""A second advantage on a class of tokens."""

from __future__ import annotations

import numpy as np

from agentrl.algorithms import make
from agentrl.algorithms.examples import example_batch


def _advantages(batch, **options):
  channel = {'advantage': 'center', 'maps': ({'name': 'token_class_add', **options},) if options else ()}
  return np.asarray(make('compose', channels={'p': channel}).estimate(batch).advantages)[0]


def test_calls_have_both_advantages_and_the_rest_one():
  batch, _ = example_batch(3, reads=['action', 'call'])
  away = np.zeros(14, np.float32)
  for g in range(3):
    members = np.flatnonzero((batch.group_ids == g) & batch.baseline_mask)
    away[members] = batch.parts['action'][members] - batch.parts['action'][members].mean()
  calls = (batch.token_parts['call'] > 0) & batch.loss_mask
  assert 0 < calls[batch.loss_mask].mean() < 1
  want = _advantages(batch) + .5 * np.where(calls, away[batch.trajectory_ids], 0)
  np.testing.assert_allclose(_advantages(batch, part='action', weight=.5), want, rtol=1e-4, atol=1e-6)


def test_equal_actions_change_nothing():
  batch, _ = example_batch(3, reads=['action', 'call'])
  batch = batch._replace(parts={'action': np.full_like(batch.rewards, 3)})
  np.testing.assert_array_equal(_advantages(batch, part='action'), _advantages(batch))
