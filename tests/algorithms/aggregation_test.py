"""Aggregation weights against means taken sequence by sequence."""

from __future__ import annotations

import numpy as np
import pytest

from agentrl.algorithms import aggregation
from agentrl.algorithms.examples import example_batch

RULES = {
    'tok_mean': aggregation.tok_mean,
    'seq_mean_tok_mean': aggregation.seq_mean_tok_mean,
    'seq_mean_tok_sum': aggregation.seq_mean_tok_sum,
    'sum_over_constant': lambda *a: aggregation.sum_over_constant(*a, max_tokens=20),
}


def _reference(rule, losses, mask, trajectories, weights):
  """The mean as one would take it with the trajectories in hand, each repeated `weight` times."""
  pieces = [losses[mask & (trajectories == i)].astype(np.float64)
            for i in range(weights.size) if (trajectories == i).any()
            for _ in range(int(weights[i]))]
  full = [p for p in pieces if p.size]
  if not full:
    return 0.0
  return {
      'tok_mean': lambda: np.concatenate(full).mean(),
      'seq_mean_tok_mean': lambda: np.mean([p.mean() for p in full]),
      'seq_mean_tok_sum': lambda: np.mean([p.sum() for p in full]),
      'sum_over_constant': lambda: np.mean([p.sum() for p in pieces]) / 20,
  }[rule]()


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('case', ['plain', 'weights', 'silent', 'nothing'])
def test_the_weighted_sum_is_the_mean_of_the_definition(rule, case):
  batch, _ = example_batch(1)
  losses = np.random.default_rng(1).normal(size=batch.loss_mask.shape).astype(np.float32)
  weights, mask = batch.weights.copy(), batch.loss_mask.copy()
  if case == 'weights':  # 2 counts twice, 0 not at all
    weights[:4] = [2, 0, 3, 0]
  if case == 'silent':  # a trajectory without a token in the loss
    mask &= batch.trajectory_ids != 2
  if case == 'nothing':
    mask[:] = False
  got = np.sum(np.asarray(RULES[rule](mask, batch.trajectory_ids, weights)) * losses)
  want = _reference(rule, losses, mask, batch.trajectory_ids, weights)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('rule', RULES)
def test_weights_are_zero_outside_the_mask_and_for_trajectories_of_weight_zero(rule):
  batch, _ = example_batch(1)
  weights = batch.weights.copy()
  weights[0] = 0
  got = np.asarray(RULES[rule](batch.loss_mask, batch.trajectory_ids, weights))
  np.testing.assert_array_equal(got == 0, ~batch.loss_mask | (batch.trajectory_ids == 0))


def test_a_sequence_is_a_trajectory_wherever_its_tokens_lie():
  # Trajectory 0 has one token in each row; trajectory 1 has two: means of 3 and 5, hence 4.
  mask, trajectories = np.ones((2, 2), bool), np.int32([[0, 1], [0, 1]])
  losses = np.float32([[2, 4], [4, 6]])
  weights = aggregation.seq_mean_tok_mean(mask, trajectories, np.ones(2, np.float32))
  assert np.sum(np.asarray(weights) * losses) == 4.0


def test_a_constant_that_is_no_length_is_refused():
  batch, _ = example_batch()
  with pytest.raises(ValueError, match='max_tokens'):
    aggregation.sum_over_constant(batch.loss_mask, batch.trajectory_ids, batch.weights,
                                  max_tokens=0)
