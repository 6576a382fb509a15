"""Baselines of groups against loops from their definitions."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from agentrl.algorithms import choices, make
from agentrl.algorithms.examples import example_batch


@functools.cache
def _batch():
  batch, _ = example_batch(7)
  real = np.arange(batch.weights.size) < 12
  return batch._replace(baseline_mask=batch.baseline_mask & (np.arange(batch.weights.size) != 3),
                        rewards=np.where(real, np.random.default_rng(0).random(real.size), 0).astype(np.float32))


def _estimate(name, batch=None, **options):
  batch = batch or _batch()
  return np.asarray(choices.advantage(name, **options).function(batch, batch.loss_mask).advantages)


def _groups(batch):
  for g in range(3):
    members = [i for i in range(12) if batch.group_ids[i] == g]
    yield members, [i for i in members if batch.baseline_mask[i]]


def _tokens(batch, i):
  return int((batch.loss_mask & (batch.trajectory_ids == i)).sum())


def _turns(batch, i):
  return len(np.unique(batch.turn_ids[batch.loss_mask & (batch.trajectory_ids == i)]))


def _check(got, want):
  assert np.any(want != 0)
  # Beyond them N is padding, which no token reads.
  np.testing.assert_allclose(got[:12], want, rtol=1e-4, atol=1e-5)


def test_a_baseline_weighed_by_length():
  batch, want = _batch(), np.zeros(12)
  for members, counted in _groups(batch):
    lengths = [_tokens(batch, i) for i in counted]
    want[members] = batch.rewards[members] - np.average(batch.rewards[counted], weights=lengths)
  _check(_estimate('opo'), want)


@pytest.mark.parametrize('ddof', [0, 1])
def test_turns_as_rows(ddof):
  batch, want = _batch(), np.zeros(12)
  for members, counted in _groups(batch):
    rows = np.repeat(batch.rewards[counted], [_turns(batch, i) for i in counted])
    want[members] = (batch.rewards[members] - rows.mean()) / (rows.std(ddof=ddof) + 1e-6)
  _check(_estimate('turn_rows_z', ddof=ddof), want)


def test_without_rows_it_is_z():
  np.testing.assert_array_equal(_estimate('turn_rows_z', rows=False), _estimate('z'))


@pytest.mark.parametrize('coefficient', [0.0, .1])
def test_leave_one_out_of_rewards_less_divergence(coefficient):
  batch, want = _batch(), np.zeros(12)
  drift = batch.behaviour_log_probs - batch.reference_log_probs
  rewards = batch.rewards - coefficient * np.array(
      [drift[batch.loss_mask & (batch.trajectory_ids == i)].sum() for i in range(14)])
  for members, counted in _groups(batch):
    for i in members:
      want[i] = rewards[i] - np.mean([rewards[j] for j in counted if j != i])
  _check(_estimate('rloo', kl_in_reward=coefficient), want)


@pytest.mark.parametrize('dead', ['rewards', 'groups'])
def test_centred_rewards_make_up_for_what_carries_no_signal(dead):
  batch = _batch()
  # One group fails as a whole, and one trajectory of another.
  rewards = np.where((batch.group_ids == 1) | (np.arange(14) == 0), np.float32(0), batch.rewards)
  batch, want = batch._replace(rewards=rewards), np.zeros(12)
  counted_in_all = [i for _, counted in _groups(batch) for i in counted]
  alive = [i for i in counted_in_all if (rewards[i] != 0 if dead == 'rewards' else batch.group_ids[i] != 1)]
  for members, counted in _groups(batch):
    want[members] = len(counted_in_all) / len(alive) * (rewards[members] - rewards[counted].mean())
  _check(_estimate('gpg', batch, dead=dead), want)


@pytest.mark.parametrize('std', [False, True])
def test_the_best_of_a_group_is_credited_with_what_it_adds_to_the_second(std):
  batch, want = _batch(), np.zeros(12)
  tied = batch.rewards.copy()
  for _, counted in _groups(batch):
    first, second = sorted(counted, key=lambda i: -batch.rewards[i])[:2]
    scale = np.std(batch.rewards[counted], ddof=1) + 1e-6 if std else 1
    want[first] = (batch.rewards[first] - batch.rewards[second]) / scale
    tied[first] = tied[second]
  _check(_estimate('pass_k', std=std), want)
  # Two that are best add nothing to each other.
  np.testing.assert_array_equal(_estimate('pass_k', batch._replace(rewards=tied), std=std), 0)


def test_without_divergence_it_is_loo_and_needs_no_reference():
  np.testing.assert_allclose(_estimate('rloo'), _estimate('loo'), rtol=1e-6)
  assert not choices.advantage('rloo').needs_reference and choices.advantage('rloo', kl_in_reward=.1).needs_reference


def test_the_deviation_of_the_batch():
  batch, away = _batch(), np.zeros(12)
  for members, counted in _groups(batch):
    away[members] = batch.rewards[members] - batch.rewards[counted].mean()
  counted = batch.baseline_mask[:12]
  _check(_estimate('batch_std'), away / (away[counted].std() + 1e-6))


@pytest.mark.parametrize('name', ['opo', 'turn_rows_z', 'rloo', 'batch_std'])
@pytest.mark.parametrize('change', ['equal', 'alone'])
def test_nothing_to_compare_gives_exactly_nothing(name, change):
  batch = _batch()
  if change == 'equal':
    batch = batch._replace(rewards=np.full_like(batch.rewards, .1), baseline_mask=np.arange(14) < 12)
  else:
    batch = batch._replace(group_ids=np.arange(14, dtype=np.int32))
  np.testing.assert_array_equal(_estimate(name, batch)[:12], 0)


@pytest.mark.parametrize('level', ['trajectory', 'token'])
def test_scores_over_the_batch(level):
  batch = _batch()
  made = make('compose', channels={'p': {'maps': {'name': 'batch_z', 'level': level}}})
  got = np.asarray(made.estimate(batch).advantages)[0]
  z = _estimate('z')[:12]
  counts = [_tokens(batch, i) if level == 'token' else 1 for i in range(12)]
  spread = np.repeat(z, counts)
  want = (z - spread.mean()) / (spread.std() + 1e-9)
  for i in range(12):
    own = got[batch.loss_mask & (batch.trajectory_ids == i)]
    np.testing.assert_allclose(own, want[i], rtol=1e-4, atol=1e-5)


def test_scores_over_the_batch_of_equal_advantages_are_zero():
  batch = _batch()._replace(rewards=np.ones(14, np.float32), baseline_mask=np.arange(14) < 12)
  made = make('compose', channels={'p': {'maps': 'batch_z'}})
  np.testing.assert_array_equal(made.estimate(batch).advantages, 0)


def test_an_unknown_level_is_refused():
  batch = _batch()
  with pytest.raises(ValueError, match='level'):
    make('compose', channels={'p': {'maps': {'name': 'batch_z', 'level': 'row'}}}).estimate(batch)
