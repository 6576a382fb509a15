"""Rows by origin, given advantages, and factors on advantages, against loops over trajectories."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from agentrl import algorithms
from agentrl.algorithms.examples import example_batch


def _estimate(batch, **channel):
  made = algorithms.make('compose', channels={'policy': channel})
  return np.asarray(jax.jit(made.estimate)(batch).advantages[0])


def _of(batch, per_trajectory):
  on_tokens = np.where(batch.trajectory_ids >= 0, np.asarray(per_trajectory)[batch.trajectory_ids], 0)
  return np.where(batch.loss_mask, on_tokens, 0)


def _halves(batch):
  """The batch with a part that is 1 for every second trajectory."""
  back = np.float32(np.arange(batch.rewards.size) % 2)
  return batch._replace(parts={**batch.parts, 'replayed': back}), back


def test_a_given_advantage_is_the_part_less_the_baseline():
  batch, _ = example_batch(reads=['percentile'])
  found = _estimate(batch, advantage={'name': 'given', 'baseline_part': 'percentile'})
  np.testing.assert_allclose(found, _of(batch, batch.rewards - batch.parts['percentile']))
  np.testing.assert_allclose(_estimate(batch, advantage={'name': 'given', 'part': 'percentile'}),
                             _of(batch, batch.parts['percentile']))


@pytest.mark.parametrize('name', ['fresh', 'replayed'])
def test_channels_take_their_own_rows(name):
  batch, back = _halves(example_batch(reads=['replayed'])[0])
  mine = back == (name == 'replayed')
  found = _estimate(batch, advantage='given', rows=name)
  np.testing.assert_allclose(found, _of(batch, np.where(mine, batch.rewards, 0)))


def test_fresh_and_replayed_rows_together_are_all_rows():
  batch, back = _halves(example_batch(reads=['replayed'])[0])
  outputs = example_batch()[1]
  whole = {'advantage': 'given', 'aggregation': 'seq_mean_tok_sum'}

  def loss(*channels):
    made = algorithms.make('compose', channels={str(i): c for i, c in enumerate(channels)})
    return float(made.loss(outputs, made.prepare(batch))[0])

  fresh, replayed = ({**whole, 'rows': name} for name in ('fresh', 'replayed'))
  share = np.sum(back * batch.weights) / np.sum(batch.weights)
  np.testing.assert_allclose(loss(fresh, replayed), loss(fresh) + loss(replayed), rtol=1e-5)
  # Each is a mean over its own trajectories.
  np.testing.assert_allclose((1 - share) * loss(fresh) + share * loss(replayed), loss(whole), rtol=1e-5)


def test_a_factor_of_the_group_acts_after_the_z_and_not_before_it():
  batch, _ = example_batch(reads=['weight'])
  factor = np.float32([.5, 1., .75])[batch.group_ids]
  batch = batch._replace(parts={'weight': factor}, token_parts={})
  plain = _estimate(batch, advantage='z')
  np.testing.assert_allclose(_estimate(batch._replace(rewards=factor * batch.rewards), advantage='z'), plain, atol=1e-4)
  scaled = _estimate(batch, advantage='z', maps={'name': 'scale_by_part', 'part': 'weight'})
  np.testing.assert_allclose(scaled, plain * _of(batch, factor), rtol=1e-6)
  assert np.abs(scaled - plain).max() > .1
  # Centred rewards do see it.
  centred = _estimate(batch._replace(rewards=factor * batch.rewards), advantage='center')
  np.testing.assert_allclose(centred, _estimate(batch, advantage='center') * _of(batch, factor), rtol=1e-5, atol=1e-6)


def test_what_counts_three_times_pulls_once():
  batch, _ = example_batch()
  batch = batch._replace(weights=np.where(batch.group_ids == 1, np.float32(3), batch.weights))
  plain = _estimate(batch, advantage='center')
  np.testing.assert_allclose(_estimate(batch, advantage='center', maps='repeat_decay'),
                             plain / np.where(_of(batch, batch.group_ids == 1), 3, 1), rtol=1e-6)


@pytest.mark.parametrize('dead', [0, 1, 2, 3])
def test_groups_without_signal_are_made_up_for(dead):
  batch, _ = example_batch(2)
  rewards = np.where(batch.group_ids < dead, np.float32(.3), np.float32(np.arange(batch.rewards.size) % 2))
  batch = batch._replace(rewards=rewards)
  factor = 3 / (3 - dead) if dead < 3 else 0
  np.testing.assert_allclose(_estimate(batch, advantage='z', maps='revive'),
                             _estimate(batch, advantage='z') * factor, rtol=1e-5)


def test_groups_outside_the_loss_do_not_count_as_dead():
  batch, _ = example_batch(2)
  rewards = np.where(batch.group_ids == 0, np.float32(.3), np.float32(np.arange(batch.rewards.size) % 2))
  weights = np.where(batch.group_ids == 0, np.float32(0), batch.weights)
  batch = batch._replace(rewards=rewards, weights=weights)
  np.testing.assert_allclose(_estimate(batch, advantage='z', maps='revive'), _estimate(batch, advantage='z'), rtol=1e-6)
