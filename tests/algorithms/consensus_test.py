"""ADPO: scale, bound and selection by how far a group agrees."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from agentrl.algorithms import clips, consensus, make
from agentrl.algorithms.examples import example_batch
from agentrl.algorithms.selectors import Candidates


@pytest.mark.parametrize('p, factor', [(0., .5), (.3, .5), (.55, .75), (.8, 1.), (1., 1.)])
def test_the_scale_by_hand(p, factor):
  batch, _ = example_batch(reads=['consensus'])
  batch = batch._replace(parts={'consensus': np.full_like(batch.rewards, p)})
  made = make('compose', channels={'p': {'maps': 'consensus_scale'}})
  np.testing.assert_allclose(made.estimate(batch).advantages, factor * make('compose').estimate(batch).advantages,
                             rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('p, high', [(.1, .3), (.3, .3), (.55, .25), (.8, .2), (1., .2)])
def test_the_upper_bound_by_hand(p, high):
  ratio = np.linspace(.5, 1.5, 21, dtype=np.float32)[None]
  for sign in (1, -1):
    advantages = np.full_like(ratio, sign)
    got = consensus.dyn_high(ratio, advantages, jnp.log(ratio), np.full_like(ratio, p))
    want = clips.asym(ratio, advantages, jnp.log(ratio), high=high)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)


def test_the_bound_is_each_tokens_own():
  batch, outputs = example_batch(reads=['consensus'])
  made = make('compose', channels={'p': {'clip': 'dyn_high'}})
  prepared = made.prepare(batch)
  np.testing.assert_array_equal(
      prepared.parts['consensus'][batch.loss_mask],
      batch.token_parts['consensus'][batch.loss_mask] if 'consensus' in batch.token_parts else
      batch.parts['consensus'][batch.trajectory_ids][batch.loss_mask])
  assert np.isfinite(made.loss(outputs, prepared)[0])


def test_the_band_keeps_its_edges():
  share = np.float32([.2, .2, .3, .3, .8, .8, .9, .9])
  groups = np.int32([0, 0, 1, 1, 2, 2, 3, 3])
  given = Candidates(share * 0, groups, {'consensus': share}, np.ones(8, np.float32), np.ones(8, bool))
  kept = consensus.band(given, np.random.default_rng(0))
  np.testing.assert_array_equal(kept.weights, [0, 0, 1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(kept.baseline_mask, True)


def test_a_group_that_nobody_counts_in_is_left_out():
  given = Candidates(np.zeros(2, np.float32), np.int32([0, 0]), {'consensus': np.float32([.5, .5])},
                     np.ones(2, np.float32), np.zeros(2, bool))
  np.testing.assert_array_equal(consensus.band(given, np.random.default_rng(0)).weights, 0)
