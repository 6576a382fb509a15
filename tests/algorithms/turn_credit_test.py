"""Advantages of turns against loops written from their definitions."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from agentrl.algorithms import choices, turns
from agentrl.algorithms.examples import example_batch


@functools.cache
def _batch(packed=True):
  batch, _ = example_batch(5, groups=2, packed=packed, min_rows=8, reads=['s', 'state', 'history'])
  # One trajectory outside the baseline, and one outside the loss.
  return batch._replace(baseline_mask=batch.baseline_mask & (np.arange(batch.weights.size) != 1),
                        loss_mask=batch.loss_mask & (batch.trajectory_ids != 6))


def _turns(batch):
  """Returns, for each trajectory, its turns as lists of (row, token)."""
  out = []
  for i in range(batch.weights.size):
    tokens = [tuple(x) for x in np.argwhere(batch.loss_mask & (batch.trajectory_ids == i))]
    out.append([list(g) for _, g in itertools.groupby(tokens, lambda x: batch.turn_ids[x])])
  return out


def _plane(batch, per_turn):
  out = np.zeros(batch.loss_mask.shape)
  for i, own in enumerate(_turns(batch)):
    for k, tokens in enumerate(own):
      for x in tokens:
        out[x] = per_turn[i][k]
  return out


def _part(batch, name='s'):
  return [[float(batch.token_parts[name][tokens[-1]]) for tokens in own] for own in _turns(batch)]


def _discounted(rewards, gamma):
  out, total = [], 0.0
  for r in reversed(rewards):
    total = r + gamma * total
    out.append(total)
  return out[::-1]


def _ended(batch, rewards, final):
  return [[*r[:-1], r[-1] + f] if r else [] for r, f in zip(rewards, final)]


def _compare(per_turn, keys, batch, std=True, min_count=2, raw=False):
  """Compares numbers of one key, those of trajectories outside the baseline with the others'."""
  out = []
  for i, own in enumerate(per_turn):
    out.append([])
    for k, x in enumerate(own):
      others = [y for j, row in enumerate(per_turn) for m, y in enumerate(row)
                if keys[j][m] == keys[i][k] and batch.baseline_mask[j]]
      if len(others) < min_count:
        out[-1].append(x if raw else 0.0)
      elif std:
        out[-1].append(0.0 if np.ptp(others) == 0 else (x - np.mean(others)) / (np.std(others) + 1e-6))
      else:
        out[-1].append(x - np.mean(others))
  return out


def _estimate(name, batch, **options):
  estimator = choices.advantage(name, **options)
  assert estimator.level == 'token'
  with jax.numpy_dtype_promotion('strict'):
    return np.asarray(estimator.function(batch, batch.loss_mask).advantages)


def _check(got, batch, per_turn):
  want = _plane(batch, per_turn)
  assert np.any(want != 0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_where_turns_lie():
  batch = _batch()
  found = turns.find(batch, batch.loss_mask)
  own = [tokens for t in _turns(batch) for tokens in t]
  assert {tuple(x) for x in np.argwhere(found.first)} == {t[0] for t in own}
  assert {tuple(x) for x in np.argwhere(found.last)} == {t[-1] for t in own}
  np.testing.assert_array_equal(np.asarray(found.ids) > 0, batch.loss_mask)


def test_a_turn_has_its_discounted_return():
  batch = _batch()
  rewards = _ended(batch, _part(batch), batch.rewards)
  _check(_estimate('disc_segment_return', batch, gamma=.9, turn_part='s'), batch,
         [_discounted(r, .9) for r in rewards])
  centred = choices.advantage('center').function(batch, batch.loss_mask).advantages
  finals = _ended(batch, [[0.0] * len(r) for r in rewards], np.asarray(centred))
  _check(_estimate('disc_segment_return', batch, gamma=.5, group_baseline=True), batch,
         [_discounted(r, .5) for r in finals])


def test_undiscounted_and_without_turn_rewards_it_is_the_final_reward():
  batch = _batch()
  np.testing.assert_allclose(
      _estimate('disc_segment_return', batch),
      np.where(batch.loss_mask, batch.rewards[batch.trajectory_ids], 0), rtol=1e-6)


def test_steps_are_compared_with_all_steps_of_the_group():
  batch = _batch()
  part = _part(batch)
  keys = [[batch.group_ids[i]] * len(own) for i, own in enumerate(part)]
  _check(_estimate('step_z', batch, turn_part='s'), batch, _compare(part, keys, batch))


@pytest.mark.parametrize('options', [
    dict(), dict(gamma=0., std=False, min_count=3, alone='zero'), dict(std=False, min_count=3)])
def test_turns_are_compared_with_the_same_turn_of_the_others(options):
  batch = _batch()
  total = [_discounted(r, options.get('gamma', .9)) for r in _part(batch)]
  keys = [[(batch.group_ids[i], k) for k in range(len(own))] for i, own in enumerate(total)]
  want = _compare(total, keys, batch, options.get('std', True), options.get('min_count', 2),
                  options.get('alone') != 'zero')
  # Some turns have too few others: the case the option is about.
  counts = [sum(len(own) > k and batch.group_ids[i] == g and batch.baseline_mask[i]
                for i, own in enumerate(total)) for g in (0, 1) for k in range(3)]
  assert min(counts) < options.get('min_count', 2) <= max(counts)
  _check(_estimate('z_per_turn_index', batch, turn_part='s', **options), batch, want)


@pytest.mark.parametrize('part', ['state', 'history'])
@pytest.mark.parametrize('std', [True, False])
def test_turns_are_compared_with_those_from_the_same_state(part, std):
  batch = _batch()
  total = [_discounted(r, .95) for r in _ended(batch, _part(batch), batch.rewards)]
  keys = [[(batch.group_ids[i], batch.token_parts[part][tokens[0]]) for tokens in own]
          for i, own in enumerate(_turns(batch))]
  _check(_estimate('state_z', batch, turn_part='s', std=std, state_part=part), batch,
         _compare(total, keys, batch, std))


def _balanced(part, batch):
  """Each trajectory weighs the same in mean and deviation."""
  out = []
  for i, own in enumerate(part):
    group = [np.array(p) for j, p in enumerate(part)
             if p and batch.group_ids[j] == batch.group_ids[i] and batch.baseline_mask[j]]
    mean = np.mean([p.mean() for p in group]) if group else 0
    std = np.sqrt(np.mean([np.square(p - mean).mean() for p in group])) if group else 0
    equal = not group or np.ptp(np.concatenate(group)) == 0
    out.append([0.0 if equal else (x - mean) / (std + 1e-6) for x in own])
  return out


@pytest.mark.parametrize('by_root', [False, True])
def test_suffix_sums_of_balanced_scores_and_the_outcome(by_root):
  batch = _batch()
  steps = _balanced(_part(batch), batch)
  outcome = np.asarray(choices.advantage('z').function(batch, batch.loss_mask).advantages)
  scaled = [[.1 * x / (np.sqrt(len(own)) if by_root else 1) for x in own] for own in steps]
  want = [_discounted(r, 1.0) for r in _ended(batch, scaled, outcome)]
  _check(_estimate('suffix_sum', batch, turn_part='s', by_root=by_root), batch, want)


def test_a_schedule_may_switch_the_steps_off():
  batch = _batch()._replace(step=np.int32(7))
  off = _estimate('suffix_sum', batch, turn_part='s', alpha=lambda step: np.float32(step < 5))
  np.testing.assert_allclose(off, choices.credit('trajectory').function(
      choices.advantage('z').function(batch, batch.loss_mask).advantages, batch.trajectory_ids, batch.loss_mask),
                             rtol=1e-5, atol=1e-6)


def test_longer_trajectories_weigh_no_more_where_they_must_not():
  # One bad turn against three good ones: means 0.5 and variance 0.25 whatever the number of turns.
  batch = _batch()
  part = [[1.0], [0.0, 0.0, 0.0]]
  got = _balanced(part, batch._replace(baseline_mask=np.ones(2, bool), group_ids=np.zeros(2, np.int32)))
  np.testing.assert_allclose(got[0] + got[1], [1, -1, -1, -1], rtol=1e-5)


def test_equal_rewards_of_turns_give_exactly_nothing():
  batch = _batch()
  last = np.asarray(turns.find(batch, batch.loss_mask).last)
  batch = batch._replace(token_parts={**batch.token_parts, 's': np.where(last, np.float32(.1), np.float32(0))})
  np.testing.assert_array_equal(_estimate('step_z', batch, turn_part='s'), 0)
  np.testing.assert_array_equal(_estimate('z_per_turn_index', batch, turn_part='s', gamma=0., alone='zero'), 0)


@pytest.mark.parametrize('name, options', [
    ('disc_segment_return', dict(gamma=1.5)), ('z_per_turn_index', dict(turn_part='s', gamma=-1.)),
    ('state_z', dict(gamma=2.))])
def test_a_discount_out_of_range_is_refused(name, options):
  with pytest.raises(ValueError, match='gamma'):
    choices.advantage(name, **options)


def test_too_few_samples_are_refused_where_lone_turns_get_nothing():
  assert choices.advantage('z_per_turn_index', turn_part='s', min_count=5, alone='zero').min_group == 5
  assert choices.advantage('z_per_turn_index', turn_part='s').min_group == 1
