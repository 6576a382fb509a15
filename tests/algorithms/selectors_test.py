"""Selectors against their definitions, on hand-made steps."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.algorithms.selectors import SELECTORS, Candidates

RNG = np.random.default_rng


def _step(rewards, group_size, weights=None, **parts):
  n = len(rewards)
  return Candidates(np.float32(rewards), np.repeat(np.arange(n // group_size, dtype=np.int32), group_size),
                    {name: np.float32(x) for name, x in parts.items()},
                    np.ones(n, np.float32) if weights is None else np.float32(weights), np.ones(n, bool))


def _apply(name, step, seed=0, **options):
  found = SELECTORS.get(name)(step, RNG(seed), **options)
  assert found.weights.dtype == np.float32 and found.baseline_mask.dtype == bool
  return found


def test_the_groups_that_vary_most_are_kept():
  step = _step([0, 1, .2, .4, 1, 1, 0, .5], 2)
  found = _apply('top_std', step, share=.75)
  # Deviations .5, .1, 0, .25: three of four are kept, and nobody leaves the baseline.
  assert found.weights.tolist() == [1, 1, 1, 1, 0, 0, 1, 1] and found.baseline_mask.all()
  # The share is of the groups that are left: of two, rounded up, both.
  left = _apply('top_std', step._replace(weights=np.float32([0, 0, 1, 1, 1, 1, 0, 0])), share=.75)
  assert left.weights.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
  # What a memory gave back stands alone: it is not compared.
  alone = step._replace(group_ids=np.int32([0, 0, 1, 1, 2, 2, 3, 4]))
  assert _apply('top_std', alone, share=.3).weights.tolist() == [1, 1, 0, 0, 0, 0, 1, 1]


def test_groups_without_signal_are_left_out_unless_they_are_exempt():
  step = _step([1, 1, 0, 1, 0, 0], 2, suffix=[0, 0, 0, 0, 1, 1])
  assert _apply('drop_zero_std', step).weights.tolist() == [0, 0, 1, 1, 0, 0]
  found = _apply('drop_zero_std', step, unless='suffix')
  assert found.weights.tolist() == [0, 0, 1, 1, 1, 1] and found.baseline_mask.all()


@pytest.mark.parametrize('choose', ['sampled', 'sorted'])
def test_the_samples_of_a_group_are_thinned_out_in_proportion(choose):
  rng = RNG(3)
  right = rng.random(8 * 12) < np.repeat(rng.uniform(.1, .9, 8), 12)
  calls, failed = rng.integers(0, 4, 96), rng.integers(0, 2, 96)
  step = _step(right, 12, accuracy=right, calls=calls, failed_calls=np.minimum(calls, failed),
               format=rng.integers(0, 2, 96))
  found = _apply('roc_downsample', step, keep=6, choose=choose)
  kept = (found.weights > 0).reshape(8, 12)
  np.testing.assert_array_equal(found.baseline_mask, found.weights > 0)
  for mine, good in zip(kept, right.reshape(8, 12)):
    if not 0 < good.sum() < 12:
      assert not mine.any()
      continue
    assert mine.sum() == 6
    expected = round(6 * good.sum() / 12)
    assert mine[good].sum() == min(max(expected, min(2, good.sum()), 6 - (~good).sum()), good.sum(),
                                   6 - min(2, (~good).sum()))


def test_sorted_thinning_takes_the_cleanest_right_ones():
  # Penalties of the right: 1 (failed), 0, .5 (no call), 0 + 1 (no format); wrong ones in order.
  step = _step([1] * 4 + [0] * 4, 8, accuracy=[1] * 4 + [0] * 4, calls=[1, 2, 0, 1] * 2, failed_calls=[1, 0, 0, 0] * 2,
               format=[1, 1, 1, 0] * 2)
  assert _apply('roc_downsample', step, keep=4, choose='sorted').weights.tolist() == [0, 1, 1, 0, 1, 1, 0, 0]
  # Sampled, the clean one is nearly always among the two; a chance of 1 / (penalty + 1e-3).
  times = sum(_apply('roc_downsample', step, seed, keep=4).weights[1] for seed in range(50))
  assert times >= 48
  assert not _apply('roc_downsample', step, keep=9).weights.any()


def test_valuable_groups_take_the_place_of_worthless_ones():
  step = _step([1, 0, 1, 1, .4, .2, 0, 0], 2)
  # (max - mean) * std: .25, 0, .01, 0.
  drawn = np.array([_apply('value_replace', step, seed).weights for seed in range(400)])
  assert (drawn.sum(axis=1) == 8).all() and not drawn[:, [2, 3, 6, 7]].any()
  np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
  # Two draws at chances .25 : .01, so that the first group's mean weight is 1 + 2 * .25 / .26.
  assert drawn[:, 0].mean() == pytest.approx(1 + 2 * .25 / .26, abs=.06)
  assert not _apply('value_replace', _step([1, 1, 0, 0], 2)).weights.any()
  assert _apply('value_replace', step, threshold=.1).weights.tolist() == [4, 4, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize('in_loss, in_baseline', [(False, True), (False, False), (True, False)])
def test_flags_take_out_of_the_loss_and_the_baseline_separately(in_loss, in_baseline):
  step = _step([0] * 4, 2, void=[0, 1, 0, 0], truncated=[0, 0, 2, 0])
  found = _apply('mask_flags', step, parts=('void', 'truncated'), in_loss=in_loss, in_baseline=in_baseline)
  assert found.weights.tolist() == ([1] * 4 if in_loss else [1, 0, 0, 1])
  assert found.baseline_mask.tolist() == ([True] * 4 if in_baseline else [True, False, False, True])


def test_groups_with_too_few_left_are_left_out():
  step = _step([0] * 6, 3, void=[1, 1, 0, 1, 0, 0])
  assert _apply('mask_flags', step, parts=('void',), min_share=.5).weights.tolist() == [0, 0, 0, 0, 1, 1]


def test_noise_is_in_neither_loss_nor_baseline():
  found = _apply('env_noise_reject', _step([0, 1], 2, noisy=[1, 0]))
  assert found.weights.tolist() == [0, 1] and found.baseline_mask.tolist() == [False, True]


def test_what_has_priority_and_what_comes_back_is_trained_on():
  found = _apply('recompose', _step([0] * 4, 4, priority=[1, 0, 0, 0], replayed=[0, 0, 1, 0]))
  assert found.weights.tolist() == [1, 0, 1, 0] and found.baseline_mask.all()


@pytest.mark.parametrize('name, options, message', [
    ('top_std', dict(share=0.), r'share=0.0; take one in \(0, 1\]'), ('top_std', dict(share=1.5), 'share=1.5'),
    ('roc_downsample', dict(keep=1), 'keep=1'), ('roc_downsample', dict(choose='best'), 'sampled, sorted'),
    ('value_replace', dict(threshold=-1.), 'threshold=-1.0'), ('mask_flags', dict(parts=()), 'name parts'),
    ('mask_flags', dict(parts=('void',), in_loss=True), 'no effect'),
    ('mask_flags', dict(parts=('void',), min_share=2.), 'min_share')])
def test_options_out_of_range_are_refused_even_without_candidates(name, options, message):
  nobody = _step([], 1, void=[], calls=[], failed_calls=[], accuracy=[], format=[])
  with pytest.raises(ValueError, match=message):
    SELECTORS.get(name)(nobody, RNG(0), **options)
