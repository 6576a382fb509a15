"""Importance ratios against loops over sequences and runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import choices, objective, ratios
from agentrl.algorithms.examples import example_batch

LEVELS = ('token', 'segment_geo', 'segment_prod', 'sequence_geo', 'trajectory_prod', 'off')


def _runs(batch):
  """Index lists of the longest stretches of sampled tokens of one sequence."""
  runs = []
  for b, row in enumerate(batch.loss_mask):
    for t, sampled in enumerate(row):
      if not sampled:
        continue
      follows = t and row[t - 1] and batch.segment_ids[b, t - 1] == batch.segment_ids[b, t]
      if not follows:
        runs.append([])
      runs[-1].append((b, t))
  return runs


def _sequences(batch):
  found = {}
  for b, t in zip(*np.nonzero(batch.loss_mask)):
    found.setdefault((b, batch.segment_ids[b, t]), []).append((b, t))
  return list(found.values())


def _reference(level, log_probs, batch):
  d = (log_probs - batch.behaviour_log_probs).astype(np.float64)
  out = np.ones(d.shape)
  parts = {'token': [[i] for i in zip(*np.nonzero(batch.loss_mask))], 'segment_geo': _runs(batch),
           'segment_prod': _runs(batch),           'sequence_geo': _sequences(batch), 'trajectory_prod': _sequences(batch), 'off': []}
  for part in parts[level]:
    logs = [d[i] for i in part]
    for i in part:
      out[i] = np.exp(np.sum(logs) if level.endswith('prod') else np.mean(logs))
  return out


def _ratio(level):
  def function(log_probs, batch):
    fields = {k: batch._asdict().get(k) for k in objective.LossBatch._fields}
    return choices.ratio(level).function(log_probs, objective.LossBatch(**fields))
  return function


@pytest.mark.parametrize('level', LEVELS)
def test_ratios_equal_the_definition(level):
  batch, outputs = example_batch(5)
  got = _ratio(level)(outputs.log_probs, batch)
  np.testing.assert_allclose(got, _reference(level, outputs.log_probs, batch), rtol=1e-4)


@pytest.mark.parametrize('level', LEVELS)
def test_the_gradient_flows_through_each_tokens_own_log_prob(level):
  # d s_t / d l_t = s_t and no gradient to any other token, by the stop-gradient construction.
  batch, outputs = example_batch(5)
  f = _ratio(level)
  weights = np.random.default_rng(0).normal(size=batch.loss_mask.shape).astype(np.float32)
  got = jax.grad(lambda l: jnp.sum(weights * f(l, batch)))(outputs.log_probs)
  want = np.where(batch.loss_mask, weights * _reference(level, outputs.log_probs, batch), 0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('move', [1e4, -1e4])
def test_a_ratio_far_from_one_stays_finite(level, move):
  batch, outputs = example_batch()
  f = _ratio(level)
  value, gradient = jax.value_and_grad(lambda l: jnp.sum(f(l, batch)))(outputs.log_probs + move)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize('level', LEVELS)
def test_numbers_outside_the_mask_are_not_read(level):
  batch, outputs = example_batch()
  clean = _ratio(level)(np.where(batch.loss_mask, outputs.log_probs, 0), batch)
  dirty = _ratio(level)(np.where(batch.loss_mask, outputs.log_probs, np.float32(-np.inf)), batch)
  np.testing.assert_array_equal(clean, dirty)


def test_runs_split_at_observations_sequences_and_turns():
  mask = np.bool_([[0, 1, 1, 0, 1, 1, 1, 1, 0]])
  segments = np.int32([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
  turns = np.int32([[0, 0, 0, 1, 1, 0, 0, 1, -1]])
  # By hand: [1, 2] is a run; 4 follows an observation; 5 starts a sequence; 7 starts a turn.
  np.testing.assert_array_equal(ratios.run_ids(mask, segments, turns),
                                [[0, 1, 1, 0, 2, 3, 3, 4, 0]])
