"""Group advantages against loops written from their definitions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import advantages

RULES = {
    'z': advantages.group_z,
    'center': advantages.group_center,
    'loo': advantages.group_leave_one_out,
}


def _reference(rule, rewards, groups, counts, ddof=0, eps=1e-6):
  """One trajectory at a time, in float64."""
  out = []
  for i, reward in enumerate(rewards):
    members = [j for j in range(len(rewards)) if groups[j] == groups[i] and counts[j]]
    others = [j for j in members if j != i]
    baseline = np.array([rewards[j] for j in members], np.float64)
    if rule == 'loo':
      out.append(reward - np.mean([rewards[j] for j in others], dtype=np.float64) if others else 0)
    elif len(members) < 2:
      out.append(0.0)
    elif rule == 'center':
      out.append(reward - baseline.mean())
    elif baseline.min() == baseline.max():
      out.append(0.0)
    else:
      out.append((reward - baseline.mean()) / (baseline.std(ddof=ddof) + eps))
  return np.array(out)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('seed', range(3))
def test_group_advantages_equal_the_definition(rule, seed):
  rng = np.random.default_rng(seed)
  rewards = rng.choice([0, 1, 1.7], size=40).astype(np.float32)
  groups = rng.integers(0, 12, size=40).astype(np.int32)  # sizes 0 to about 7
  counts = rng.random(40) < 0.8
  got = jax.jit(RULES[rule], static_argnums=3)(rewards, groups, counts, 15)
  np.testing.assert_allclose(got, _reference(rule, rewards, groups, counts), rtol=1e-4, atol=1e-5)


def test_the_deviation_takes_either_denominator():
  rewards, groups, counts = np.float32([1, 0, 0, 3]), np.int32([0] * 4), np.ones(4, bool)
  for ddof in (0, 1):
    got = advantages.group_z(rewards, groups, counts, 1, ddof=ddof)
    np.testing.assert_allclose(got, _reference('z', rewards, groups, counts, ddof), rtol=1e-5)


@pytest.mark.parametrize('rule', RULES)
def test_equal_rewards_give_exactly_zero(rule):
  # 0.1 and its like have no exact sum: without the rule the rounding error over 1e-6 shows.
  sizes = [2, 3, 7, 11, 64]
  groups = np.repeat(np.arange(5), sizes).astype(np.int32)
  for reward in (0.1, 1 / 3, 1e6 + 0.1):
    rewards = np.full(groups.size, reward, np.float32)
    got = RULES[rule](rewards, groups, np.ones(groups.size, bool), 5)
    np.testing.assert_array_equal(got, np.zeros(groups.size))


@pytest.mark.parametrize('rule', RULES)
def test_a_group_of_one_gets_zero_or_its_raw_reward(rule):
  arguments = np.float32([0.7]), np.int32([0]), np.ones(1, bool), 1
  assert RULES[rule](*arguments) == 0
  assert RULES[rule](*arguments, singleton='raw') == np.float32(0.7)
  with pytest.raises(ValueError, match='zero, raw'):
    RULES[rule](*arguments, singleton='keep')


@pytest.mark.parametrize('rule', RULES)
def test_outside_the_baseline_a_reward_moves_nobody_else(rule):
  groups, counts = np.zeros(4, np.int32), np.array([True, True, True, False])
  one, other = (RULES[rule](np.float32([0, 1, 1, r]), groups, counts, 1) for r in (-5, 9))
  np.testing.assert_array_equal(one[:3], other[:3])
  # Compared with the mean 2/3 of the three that count: below it, then above it.
  assert one[3] < 0 < other[3]


def test_a_reward_that_is_nan_outside_the_baseline_stays_there():
  got = advantages.group_z(np.float32([0, 1, np.nan]), np.zeros(3, np.int32),
                           np.array([True, True, False]), 1)
  assert np.all(np.isfinite(got[:2]))


@pytest.mark.parametrize('rule', RULES)
def test_no_gradient_flows_through_an_advantage(rule):
  f = functools.partial(RULES[rule], group_ids=jnp.zeros(3, jnp.int32),
                        baseline_mask=jnp.ones(3, bool), num_groups=1)
  gradient = jax.grad(lambda r: jnp.sum(f(r)**2))(jnp.array([0., 1., 2.]))
  np.testing.assert_array_equal(gradient, np.zeros(3))


def test_dense_groups_keeps_who_is_with_whom():
  ids = np.int32([900, -1, 900, 5, -1])
  got = advantages.dense_groups(ids)
  np.testing.assert_array_equal(got[:, None] == got[None, :], ids[:, None] == ids[None, :])
  assert 0 <= int(got.min()) and int(got.max()) < len(ids)


def test_wrong_ranks_and_dtypes_are_refused_at_trace_time():
  rewards, groups, counts = jnp.ones(3), jnp.zeros(3, jnp.int32), jnp.ones(3, bool)
  for wrong in ((rewards[:, None], groups, counts), (rewards, groups[:2], counts),
                (rewards.astype(jnp.float16), groups, counts), (rewards, groups, rewards)):
    with pytest.raises(AssertionError):
      jax.eval_shape(functools.partial(advantages.group_z, num_groups=1), *wrong)


def test_whitening_equals_numpy_on_the_selected_entries():
  rng = np.random.default_rng(0)
  x, mask = rng.normal(3, 5, size=(4, 9)).astype(np.float32), rng.random((4, 9)) < 0.6
  kept = x[mask].astype(np.float64)
  expected = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
  got = np.asarray(advantages.global_whiten(x, mask))
  np.testing.assert_allclose(got[mask], expected, rtol=1e-4)
  np.testing.assert_array_equal(got[~mask], 0)


@pytest.mark.parametrize('count', [0, 1, 5])
def test_whitening_what_does_not_vary_gives_zero(count):
  x = np.full(6, 0.1, np.float32)
  np.testing.assert_array_equal(advantages.global_whiten(x, np.arange(6) < count), np.zeros(6))
